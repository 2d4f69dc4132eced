"""Searches every place of a project that can hold a record: work tree, DVC's cache and scratch files, index, Dagster's home, remotes, git objects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dagster_project.core.git import git
from dagster_project.core.progress import Progress
from dagster_project.lineage.database import INDEX_FILE
from dagster_project.lineage.erasure.scan import Hit, Scanner, files_under, is_weights
from dagster_project.lineage.history import Objects, blobs
from dagster_project.orchestration.erasure.remotes import Remotes

SKIPPED = (".git", ".venv", "__pycache__")
"""Folders that are not searched as files: git objects are searched decompressed, and the others hold code."""
PLAN = Path(".dvc", "tmp", "pedigree", "erase")
"""Folder of the plan of an unfinished erasure. It holds the text, and is deleted at the end."""
CACHE, RUN_CACHE, INDEX, EVENT_LOG, GIT = "DVC cache", "run cache", "audit index", "Dagster", "git history"
FOLDERS = {
    "data/sources": "sources",
    "data/reports": "reports",
    "data/pages": "pages",
    ".dvc/tmp": "scratch files",
    "data": "outputs",
}
"""Folder -> name of the place, for files of the project."""
MOST_AT_ONCE = 64 * 2**20
"""Bytes of git objects that are read at once."""


@dataclass
class Search:
    """What was found, and what was looked at."""

    places: dict[str, list[Hit]] = field(default_factory=dict)
    blobs: list[str] = field(default_factory=list)
    """Hashes of git blobs."""
    files: int = 0
    weights: int = 0
    """Files with weights, which are not searched: they hold numbers."""
    objects: int = 0
    """Git blobs that were searched."""
    unreadable: list[str] = field(default_factory=list)

    def document(self, root: Path) -> dict[str, object]:
        found: dict[str, object] = {
            place: {"files": len(hits), "bytes": sum(hit.size for hit in hits), "paths": [_shown(root, hit.path) for hit in hits]}
            for place, hits in self.places.items()
        }
        return found | ({GIT: {"blobs": self.blobs}} if self.blobs else {})

    @property
    def paths(self) -> list[Path]:
        return [hit.path for hits in self.places.values() for hit in hits]


def _shown(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def dagster_home(root: Path) -> Path:
    return Path(os.environ.get("DAGSTER_HOME") or root / ".dagster").absolute()


def search(root: Path, scanner: Scanner, remotes: Remotes) -> Search:
    """Search all files and git objects."""
    found = Search()
    paths = [*_files(root, remotes)]
    bar = Progress("search", len(paths), "file")
    for place, path in paths:
        bar.advance()
        found.files += 1
        if place != EVENT_LOG and is_weights(path):
            found.weights += 1
        elif kinds := scanner.file(path):
            found.places.setdefault(place, []).append(Hit(path, tuple(sorted(kinds)), path.stat().st_size))
    _search_git(root, scanner, found)
    found.unreadable = [*dict.fromkeys(scanner.unreadable)]
    return found


def _files(root: Path, remotes: Remotes) -> Iterator[tuple[str, Path]]:
    """(place, path) of every file."""
    objects, home = Objects(root), dagster_home(root)
    storage = objects.cache.parent.parent
    outside = [(CACHE, storage), (EVENT_LOG, home), *((f"remote {name}", folder) for name, folder in remotes.folders.items())]
    seen: set[Path] = set()
    for folder in [root, *(one for _, one in outside if not one.resolve().is_relative_to(root.resolve()))]:
        for path in files_under(folder, SKIPPED):
            if path not in seen and not path.is_relative_to(root / PLAN):
                seen.add(path)
                yield _place(root, path, storage, outside), path


def _place(root: Path, path: Path, storage: Path, outside: list[tuple[str, Path]]) -> str:
    if path.name.startswith(INDEX_FILE.name):
        return INDEX
    if path.is_relative_to(storage / "runs"):
        return RUN_CACHE
    for name, folder in outside:
        if path.is_relative_to(folder):
            return name
    relative = path.relative_to(root).as_posix()
    return next((name for folder, name in FOLDERS.items() if relative.startswith(f"{folder}/")), "other files")


def _search_git(root: Path, scanner: Scanner, found: Search) -> None:
    """Search every blob, also those that no commit reaches any more."""
    listed = git(root, "cat-file", "--batch-all-objects", "--batch-check=%(objectname) %(objecttype) %(objectsize)") or ""
    batch: list[str] = []
    size = 0
    for name, kind, length in (line.split() for line in listed.splitlines()):
        if kind != "blob":
            continue
        found.objects += 1
        batch.append(name)
        size += int(length)
        if size >= MOST_AT_ONCE:
            _search_blobs(root, scanner, found, batch)
            batch, size = [], 0
    _search_blobs(root, scanner, found, batch)


def _search_blobs(root: Path, scanner: Scanner, found: Search, names: list[str]) -> None:
    found.blobs += [name for name, content in blobs(root, names).items() if scanner.content(content, f"git blob {name[:12]}")]
