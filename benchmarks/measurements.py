"""Measurements that a benchmark has made already: a file to which each is added
as soon as it is made, so that an interrupted benchmark goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Measurements:
    """A file of lines `{"of": ..., "found": ...}`, one measurement each. `of` is everything that the result depends on,
    so that a result is not taken for that of other settings. Several processes may add to the same file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def find(self, of: Mapping[str, Any]) -> dict[str, Any] | None:
        """The newest result of exactly this; None if there is none."""
        wanted, newest = _plain(of), None
        for line in self._lines():
            if line["of"] == wanted:
                newest = line["found"]
        return newest

    def add(self, of: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a result, and give it as it will be read."""
        line = _plain({"of": of, "found": found})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torn = self.file.is_file() and not self.file.read_bytes().endswith(b"\n") and self.file.stat().st_size > 0
        with self.file.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(line) + "\n")
        result: dict[str, Any] = line["found"]
        return result

    def _lines(self) -> Iterable[dict[str, Any]]:
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        for number, written in enumerate(text.splitlines(), 1):
            try:
                line = json.loads(written) if written else None
            except ValueError:  # the process that wrote it was killed
                line = written
            if isinstance(line, dict) and {*line} == {"of", "found"}:
                yield line
            elif line is not None:
                print(
                    f"{self.file}: line {number} is not used: it is incomplete, or does not say what it measured",
                    file=sys.stderr,
                )


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: keys are texts, tuples are lists."""
    return json.loads(json.dumps(value))


def content(folder: Path) -> str:
    """sha256 of names and content of all files in a folder; "none" if there is no such folder."""
    from dagster_project.core.hashing import sha256_of_file, sha256_of_text

    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return (
        sha256_of_text(json.dumps({name: sha256_of_file(files[name]) for name in sorted(files)}))
        if folder.is_dir()
        else "none"
    )
