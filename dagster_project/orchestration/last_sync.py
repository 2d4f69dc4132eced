"""The state of all files after a sync that had nothing to report.

While it is the same, the next one has nothing to report either.

So that one needs neither Dagster nor DVC. Like DVC and `integrity`, it trusts
that a file with the same time, inode and size has the same content.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dagster_project.core.hashing import md5_of_bytes
from dagster_project.core.records import write_text
from dagster_project.lineage.history import config_files
from dagster_project.lineage.notes import read_note
from dagster_project.orchestration.dagster_home import home_of

FILE = Path(".dvc", "tmp", "pedigree", "synced.json")
"""It can be deleted."""
PACKAGE = Path(__file__).parents[1]
ALWAYS = (
    "dvc.yaml",
    "dvc.lock",
    "params.yaml",
    "code.lock.yaml",
    ".dvc/config",
    ".dvc/config.local",
    ".dvcignore",
    ".git/HEAD",
    ".git/index",
    ".git/packed-refs",
    ".git/refs",
    ".git/info/exclude",
)
OBJECTS = Path(".dvc", "cache", "files", "md5")
"""The objects of DVC's cache, in folders by the beginning of their names."""
RUNS = "runs.db"
"""File of the runs of Dagster's SQLite storage, in the folder `history`."""
OTHER_CACHE = re.compile(r"^\s*(dir|local)\s*=", re.MULTILINE)
"""Setting in a configuration of DVC: the cache is in another folder."""


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int, int]]:
    """Path, modification time, inode and size of each of these files, and of everything in these folders.

    Of DVC's cache: of its folders only, which change if an object is added or removed.
    """
    found = []
    for path in sorted(paths):
        within = path.glob("*") if path.parts[-len(OBJECTS.parts) :] == OBJECTS.parts else path.rglob("*")
        for file in (path, *(within if path.is_dir() else ())):
            with suppress(FileNotFoundError, NotADirectoryError):
                stat = file.stat()
                found.append((str(file), stat.st_mtime_ns, stat.st_ino, stat.st_size))
    return sorted(found)


@dataclass(frozen=True)
class LastSync:
    """The files as they are now, which is before a sync, and as they were
    before the last one that had nothing to report."""

    root: Path
    key_prefix: tuple[str, ...]
    paths: tuple[str, ...]
    """Files and folders of the project that the last sync read."""
    before: str | None
    now: str | None
    """None: changes would not be seen, e.g. because Dagster's event log is in Postgres, or a stage reads an address."""

    @classmethod
    def read(cls, root: Path, key_prefix: tuple[str, ...]) -> LastSync:
        known = read_note(root / FILE)
        paths = known.get("paths")
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            return cls(root, key_prefix, (), None, None)
        now = None
        # a path that no file can have, or a folder or database that cannot be read
        with suppress(OSError, ValueError, sqlite3.Error):
            now = _state(root, key_prefix, paths)
        return cls(root, key_prefix, tuple(paths), known.get("state"), now)

    @property
    def unchanged(self) -> bool:
        return self.now is not None and self.now == self.before

    def remember(self, paths: Iterable[str]) -> None:
        """Call it after a sync that had nothing to report.

        The state counts from the second one on that read the same files.
        """
        names = sorted(paths)
        text = json.dumps({"paths": names, "state": self.now if names == [*self.paths] else None})
        with suppress(OSError):  # the disk is full or read-only: the next sync reads everything again
            write_text(self.root / FILE, text)


def _state(root: Path, key_prefix: tuple[str, ...], paths: Iterable[str]) -> str | None:
    home = home_of(root)
    log = home / "history"
    try:
        settings = (home / "dagster.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if "storage" in settings or "instance_class" in settings or not log.is_dir() or not (root / ".git").is_dir():
        return None
    configurations = config_files(root)
    if any("://" in path for path in paths) or any(
        OTHER_CACHE.search(file.read_text(encoding="utf-8")) for file in configurations if file.is_file()
    ):
        return None
    # an upgrade replaces these files
    packages = [Path(spec.origin) for spec in map(find_spec, ("dagster", "dvc")) if spec and spec.origin]
    files = [
        *stamps(root / path for path in {*paths, *ALWAYS}),
        *stamps([*configurations, *packages]),
        *stamps(PACKAGE.rglob("*.py")),
    ]
    return md5_of_bytes(json.dumps([str(home), settings, list(key_prefix), files, [*_databases(home)]]).encode())


def _databases(home: Path) -> Iterator[tuple[Any, ...]]:
    """Stamps of SQLite's files, without those that reading alone makes and removes.

    Of the file in which Dagster's daemon also writes that it is alive: identity, status and time of each run.
    """
    runs = home / "history" / RUNS
    for stamp in stamps([home / "history", home / "pedigree_project"]):
        if stamp[0] in {str(runs), f"{runs}-wal"} or stamp[0].endswith(("-shm", "-journal")) or Path(stamp[0]).is_dir():
            continue
        if stamp[3] or not stamp[0].endswith("-wal"):
            yield stamp
    if runs.is_file():
        with closing(sqlite3.connect(f"{runs.as_uri()}?mode=ro", uri=True)) as database:
            yield from database.execute("SELECT run_id, status, update_timestamp FROM runs ORDER BY id")
