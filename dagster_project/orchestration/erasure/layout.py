"""Which place of a project a file is in: the place decides whether an erasure may delete the file.

All paths are resolved before they are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dagster_project.core.git import git
from dagster_project.lineage.database import INDEX_FILE
from dagster_project.orchestration.dagster_home import home_of
from dagster_project.orchestration.erasure.remotes import Remotes

CACHE, RUN_CACHE, INDEX, EVENT_LOG, SCRATCH = "DVC cache", "run cache", "audit index", "Dagster", "scratch files"
FOLDERS = {
    "data/sources": "sources",
    "data/reports": "reports",
    "data/pages": "pages",
    ".dvc/tmp/pedigree": SCRATCH,
    ".dvc/tmp": "scratch files of DVC",
    "data": "outputs",
}
"""Folder -> name of the place, for files of the project. In those of DVC
people's experiments can be, so nothing there is deleted."""
DAGSTER_FOLDERS = ("history", "schedules", "storage")
"""Folders of Dagster's home that Dagster fills: event log and runs, schedules, logs and values."""
WORK_TREES = "other work trees of git"
DVC_FOLDERS = ("files", "runs")
"""Folders of DVC's caches and remotes."""


@dataclass(frozen=True)
class Layout:
    """Folders of a project."""

    root: Path
    remotes: Remotes
    home: Path
    """Dagster's home."""
    tracked: frozenset[Path]
    """Files in Dagster's home that git tracks: never Dagster's."""
    work_trees: tuple[Path, ...] = ()
    """The project's folder in the other work trees of its repository. Nothing there is deleted."""

    @property
    def owns_cache(self) -> bool:
        """Whether the cache is in the project, and not one that projects share."""
        return self.remotes.cache.is_relative_to(self.root)

    def folders(self) -> Iterator[Path]:
        """Every folder to search. Of one that the project is in, only the folders that are Dagster's or DVC's."""
        yield self.root
        for folder, parts in self._outside():
            if self.root.is_relative_to(folder):
                yield from (folder / part for part in parts if not (folder / part).is_relative_to(self.root))
            elif not folder.is_relative_to(self.root):
                yield folder
        yield from self.work_trees

    def _outside(self) -> Iterator[tuple[Path, tuple[str, ...]]]:
        yield self.remotes.cache, DVC_FOLDERS
        yield self.home, DAGSTER_FOLDERS
        yield from ((folder, DVC_FOLDERS) for folder in self.remotes.folders.values())

    def place(self, path: Path) -> str:
        """Name of the place that a file is in."""
        if path.name.startswith(INDEX_FILE.name) and path.parent == self.root / INDEX_FILE.parent:
            return INDEX
        cache = self.remotes.cache
        if path.is_relative_to(cache / "runs"):
            return RUN_CACHE
        if path.is_relative_to(cache / "files"):
            return CACHE
        for name, folder in self.remotes.folders.items():
            if any(path.is_relative_to(folder / part) for part in DVC_FOLDERS):
                return f"remote {name}"
        if self._is_dagster(path):
            return EVENT_LOG
        if not path.is_relative_to(self.root):
            return WORK_TREES if any(map(path.is_relative_to, self.work_trees)) else "files outside the project"
        relative = path.relative_to(self.root).as_posix()
        return next((name for folder, name in FOLDERS.items() if relative.startswith(f"{folder}/")), "other files")

    def _is_dagster(self, path: Path) -> bool:
        """Whether Dagster made a file. The home can be the project's folder, or one around it."""
        if path in self.tracked or path.is_relative_to(self.root / "data"):
            return False
        if path.is_relative_to(self.root) and not self.home.is_relative_to(self.root):
            return False
        return any(path.is_relative_to(self.home / part) for part in DAGSTER_FOLDERS)


def dagster_home(root: Path) -> Path:
    return home_of(root).resolve()


def layout_of(root: Path, remotes: Remotes) -> Layout:
    home = dagster_home(root)
    listed = git(home, "ls-files", "-z") if home.is_dir() else None
    tracked = frozenset(home / name for name in (listed or "").split("\0") if name)
    return Layout(root.resolve(), remotes, home, tracked, (*_work_trees(root.resolve()),))


def _work_trees(root: Path) -> Iterator[Path]:
    """The project's folder in the other work trees of its repository."""
    inside = (git(root, "rev-parse", "--show-prefix") or "").strip()
    for entry in (git(root, "worktree", "list", "--porcelain") or "").split("\n\n"):
        first, *more = entry.splitlines() or [""]
        tree = Path(first.removeprefix("worktree "))
        if not first or "bare" in more or not tree.is_dir():
            continue
        # for the main one of a submodule, git lists its git directory
        folder = Path((git(tree, "rev-parse", "--show-toplevel") or "").rstrip("\n") or tree, inside).resolve()
        if folder != root and folder.is_dir():
            yield folder
