"""Removes temporary files of killed processes: DVC's in the cache and in data/reports, and our own in the cache,
reports, pages and .dvc/tmp/pedigree."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dagster_project.core.layout import REPORTS
from dagster_project.orchestration.last_sync import OBJECTS
from dagster_project.orchestration.processes import is_running
from dagster_project.orchestration.rwlock import locks_by_hard_links

log = logging.getLogger("pedigree")

TEMPORARY = re.compile(r".*\.[A-Za-z0-9_-]{22}\.tmp")
"""Names by DVC (dvc_objects.fs.utils.tmp_fname): a prefix, a dot, and 16 random bytes in base64."""
RUNS = Path(".dvc") / "cache" / "runs"
OWN = re.compile(r"\..+\.(\d+)")
"""Names by core.records.write_text, and of objects that are being fetched (remote_store.py): a dot, the name of the
file, and the id of the process that writes it."""
WRITTEN = (REPORTS, "data/pages", ".dvc/tmp/pedigree")
SWEPT = Path(".dvc") / "tmp" / "pedigree" / "swept"
"""Its modification time is that of the latest search: a folder of the cache
that has not changed since is not searched again."""


def remove_leftovers(root: Path) -> None:
    """Remove temporary files whose process has ended.

    DVC's are removed only if no process holds DVC's lock of the project.
    """
    for path in (
        Path(folder, name) for start in WRITTEN for folder, _, names in os.walk(root / start) for name in names
    ):
        if _is_abandoned(path.name):
            with suppress(OSError):  # the command itself says what it cannot write
                path.unlink()
    lock = root / ".dvc" / "tmp" / "lock"
    if not lock.is_file():
        return
    try:
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = [*_leftovers(root)]
            if found and locks_by_hard_links(root):  # then `flock` does not show whether DVC holds its lock
                return
            abandoned = [path for path in found if TEMPORARY.fullmatch(path.name) or _is_abandoned(path.name)]
            for path in abandoned:
                path.unlink(missing_ok=True)
                log.info(f"removed {path.relative_to(root)}, which a killed process left behind")
            # otherwise files in use are looked for again, even if their folders do not change
            if len(abandoned) == len(found):
                (root / SWEPT).parent.mkdir(parents=True, exist_ok=True)
                (root / SWEPT).touch()
    except OSError as error:  # busy, or not writable
        log.debug(f"temporary files of DVC are not searched: {error}")


def _leftovers(root: Path) -> Iterator[Path]:
    """Temporary files, also those of our own that are in use."""
    swept = (root / SWEPT).stat().st_mtime if (root / SWEPT).is_file() else 0.0
    cache = [
        root / OBJECTS,
        *(Path(entry.path) for entry in _entries(root / OBJECTS) if entry.is_dir(follow_symlinks=False)),
    ]
    folders = [folder for folder in cache if folder.is_dir() and folder.stat().st_mtime >= swept - 2]
    folders += [Path(folder) for start in (RUNS, REPORTS) for folder, _, _ in os.walk(root / start)]
    for folder in folders:
        for entry in _entries(folder):
            if (TEMPORARY.fullmatch(entry.name) or OWN.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                yield Path(entry.path)


def _is_abandoned(name: str) -> bool:
    """Whether it is the name of a temporary file of our own whose process has ended."""
    own = OWN.fullmatch(name)
    return own is not None and not is_running(int(own[1]))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    return [*os.scandir(folder)] if folder.is_dir() else []
