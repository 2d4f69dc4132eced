"""The result of a job, on its node until it is in the remote, which may be full or unreachable when the stage ends.

The next job with the same inputs on this node pushes it and does not compute. The outputs are objects in the node's
cache; here are the document and the pages.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.core.records import write_text

FOLDER = "results"
"""Folder of a node, next to its cache."""
KEPT_SECONDS = 7 * 86400.0
"""Age at which a result is removed. Its driver may never run the stage again."""


@dataclass(frozen=True)
class KeptResult:
    node: Path
    """Folder of the node."""
    key: str
    """Identity of the job, as in the remote."""

    @property
    def document(self) -> Path:
        return self.node / FOLDER / f"{self.key}.json"

    @property
    def archive(self) -> Path:
        """Pages."""
        return self.node / FOLDER / f"{self.key}.tar"

    def write(self, result: Mapping[str, Any], pages: Path | None) -> Path | None:
        """Keep a result. A node without space for it keeps none.

        Returns:
            The archive of pages, which is moved.
        """
        with suppress(OSError):
            self.document.parent.mkdir(exist_ok=True)
            if pages is not None:
                pages = Path(shutil.move(pages, self.archive))
            write_text(self.document, json.dumps(result))
        return pages

    def read(self) -> dict[str, Any] | None:
        """The result; None if there is none, or its writer was killed."""
        with suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads(self.document.read_text(encoding="utf-8"))
            return found
        return None

    def remove(self) -> None:
        for path in (self.document, self.archive):
            path.unlink(missing_ok=True)


def remove_old_results(node: Path) -> None:
    for path in (node / FOLDER).glob("*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink()
