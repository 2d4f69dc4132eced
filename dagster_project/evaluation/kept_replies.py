"""Replies of a judge that are kept until the command that asks for them is complete.

A file for each reply. Its name is the hash of all that was asked: the endpoint, the whole request with the model, and
the pair. So it is never used for another judge, question or pair. It holds the verdict and token counts, and no text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.records import write_json

log = logging.getLogger("pedigree")

REPLIES = Path(".dvc", "tmp", "pedigree", "judge")
"""Folder of the replies of all judges of a project. A cache: it can be deleted at any time."""


class KeptReplies:
    """The kept replies of a project; none if DVC does not manage it."""

    def __init__(self, root: Path) -> None:
        self._folder = root / REPLIES if (root / ".dvc").is_dir() else None
        self._used: set[Path] = set()
        self._is_writable = True

    def read(self, pair: str, url: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The reply to a request; None if none is kept, or its file is damaged."""
        if (path := self._path(pair, url, request)) is None:
            return None
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(path.read_bytes())
            return found if isinstance(found, dict) else None
        return None

    def keep(self, pair: str, url: str, request: Mapping[str, Any], reply: Mapping[str, Any]) -> bool:
        """Keep a reply; whether it is kept. A full or read-only disk does not end the command, which has paid for it.

        After a failure no further reply is kept.
        """
        path = self._path(pair, url, request) if self._is_writable else None
        if path is None:
            return False
        try:
            write_json(path, reply)
        except OSError as error:
            log.warning(f"judge: this reply and those that follow are not kept: {path.parent}: {error.strerror}")
            self._is_writable = False
        return self._is_writable

    def forget(self) -> None:
        """Remove the replies that this command has read or kept."""
        for path in self._used:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        if self._used:
            with suppress(OSError):
                next(iter(self._used)).parent.rmdir()  # only if it is empty

    def _path(self, pair: str, url: str, request: Mapping[str, Any]) -> Path | None:
        if self._folder is None:
            return None
        parts: Sequence[Any] = (pair, url, request)
        path = self._folder / f"{sha256_of_text(json.dumps(parts, sort_keys=True))}.json"
        self._used.add(path)
        return path
