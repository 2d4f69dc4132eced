"""Searches every place of a project that can hold a record: work tree, DVC's
cache and scratch files, index, Dagster's home, remotes, git objects."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dagster_project.core.errors import InputError
from dagster_project.core.progress import Progress
from dagster_project.lineage.erasure.scan import SURE, Hit, Scanner, Walk, is_weights
from dagster_project.lineage.history import is_in_repository
from dagster_project.lineage.unfinished_erasure import PLAN
from dagster_project.orchestration.erasure.git_objects import (
    COPIES,
    LARGE_FILES,
    GitSearch,
    git_folder,
    missing_history,
    submodules,
)
from dagster_project.orchestration.erasure.layout import EVENT_LOG, Layout, layout_of
from dagster_project.orchestration.erasure.remotes import Remotes

SKIPPED = (".git", ".venv", "__pycache__")
"""Folders that are not searched as files: git objects are searched decompressed, and the others hold code."""
AT_ONCE = 256
"""Files that are searched at once."""
GIT, LARGE, SUBMODULES, GIT_FILES = "git history", "Git LFS and git-annex", "git submodules", "other files of git"


@dataclass
class Search:
    """What was found, and what was looked at."""

    layout: Layout
    places: dict[str, list[Hit]] = field(default_factory=dict)
    blobs: list[str] = field(default_factory=list)
    """Hashes of git blobs."""
    files: int = 0
    weights: int = 0
    """Files with weights, which are not searched: they hold numbers."""
    objects: int = 0
    """Git blobs that were searched."""
    unreadable: list[str] = field(default_factory=list)
    """Archives that cannot be opened."""
    unsearched: dict[str, int] = field(default_factory=dict)
    """What else was not searched -> how many."""

    def document(self) -> dict[str, object]:
        """Place -> what was found there."""
        found: dict[str, object] = {
            place: {
                "files": len(hits),
                "bytes": sum(hit.size for hit in hits),
                "paths": [self._shown(hit.path) for hit in hits],
            }
            for place, hits in self.places.items()
        }
        return found | ({GIT: {"blobs": self.blobs}} if self.blobs else {})

    def searched(self) -> dict[str, object]:
        return {
            "files": self.files,
            "git objects": self.objects,
            "weights": self.weights,
            "unreadable": self.unreadable,
            "unsearched": self.unsearched,
        }

    def _shown(self, path: Path) -> str:
        return path.relative_to(self.layout.root).as_posix() if path.is_relative_to(self.layout.root) else str(path)

    def add(self, files: Iterable[tuple[str, Path]], scanner: Scanner) -> None:
        """Search files, each with its place. One that another program deleted meanwhile holds nothing."""
        searched = [(place, path) for place, path in files if not self._is_left_out(place, path)]
        for (place, path), kinds in zip(searched, scanner.files(path for _, path in searched), strict=True):
            if isinstance(kinds, OSError):
                self.skip("files that cannot be read")
            elif kinds:
                with suppress(FileNotFoundError):
                    self.places.setdefault(place, []).append(Hit(path, path.stat().st_size, SURE in kinds))

    def _is_left_out(self, place: str, path: Path) -> bool:
        """Count a file; whether it has weights or cannot be read."""
        try:
            self.files += 1
            if place != EVENT_LOG and is_weights(path):
                self.weights += 1
                return True
        except FileNotFoundError:
            return True
        except OSError:
            self.skip("files that cannot be read")
            return True
        return False

    def skip(self, what: str, count: int = 1) -> None:
        if count:
            self.unsearched[what] = self.unsearched.get(what, 0) + count


def search(root: Path, scanner: Scanner, remotes: Remotes) -> Search:
    """Search all files and git objects.

    Raises:
        InputError: the project is in a repository whose objects git cannot list.
    """
    found = Search(layout_of(root, remotes))
    scanner.unreadable.clear()  # those of an earlier search may be gone
    walk = Walk(SKIPPED)
    paths = [*_files(found.layout, walk)]
    bar = Progress("search", len(paths), "file")
    for start in range(0, len(paths), AT_ONCE):
        batch = paths[start : start + AT_ONCE]
        found.add(((found.layout.place(path), path) for path in batch), scanner)
        bar.advance(len(batch))
    found.skip("folders that cannot be read", len({*walk.unreadable}))
    found.skip("links to files and folders elsewhere", sum(1 for _ in _outward(walk.links, [*found.layout.folders()])))
    if is_in_repository(found.layout.root):
        _search_git(found, scanner, walk.repositories)
    found.unreadable = [*dict.fromkeys(scanner.unreadable)]
    return found


def _files(layout: Layout, walk: Walk) -> Iterator[Path]:
    seen: set[Path] = set()
    for folder in layout.folders():
        for path in walk.files(folder):
            if path not in seen and not path.is_relative_to(layout.root / PLAN):
                seen.add(path)
                yield path


def _outward(links: Iterable[Path], folders: list[Path]) -> Iterator[Path]:
    """Links to what exists, and is in none of the folders that are searched."""
    for link in dict.fromkeys(links):
        target = Path(os.path.realpath(link))
        if target.exists() and not any(target.is_relative_to(folder) for folder in folders):
            yield link


def _search_git(found: Search, scanner: Scanner, nested: Iterable[Path]) -> None:
    """Search every blob, also those that no commit reaches any more."""
    root = found.layout.root
    folder = git_folder(root)
    own = GitSearch(root, scanner)
    own.run()
    found.blobs, found.objects = [*own.found], own.objects
    found.skip("git objects that cannot be read", own.unreadable)
    for what, count in missing_history(root).items():
        found.skip(what, count)
    for module in submodules(folder, nested):
        inner = GitSearch(module, scanner)
        try:
            inner.run()
        except InputError:
            found.skip("git submodules that cannot be read")
            continue
        found.objects += inner.objects
        found.skip("git objects that cannot be read", inner.unreadable)
        for name, size in inner.found.items():
            found.places.setdefault(SUBMODULES, []).append(Hit(module / name, size, False))
    for one in [folder, *submodules(folder, nested)]:
        for name in (*LARGE_FILES, *COPIES):
            place = LARGE if name in LARGE_FILES else GIT_FILES
            found.add(((place, path) for path in Walk().files(one / name)), scanner)
