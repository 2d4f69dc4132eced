"""Searches what git keeps: all its objects, also those that no commit reaches
any more, those of submodules, and files of Git LFS and git-annex."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.lineage.erasure.scan import Scanner
from dagster_project.lineage.history import blobs

MOST_AT_ONCE = 64 * 2**20
"""Bytes of git objects that are read at once."""
LARGE_FILES = ("lfs/objects", "annex")
"""Folders of a git directory with files that git itself does not keep."""
COPIES = ("lfs/tmp", "lfs/incomplete", "rr-cache", "lost-found")
"""Folders with other copies of files: half downloaded, of conflicts (`git rerere`), and what `git fsck` has found."""


def git_folder(root: Path) -> Path:
    """The git directory that all work trees of the repository share.

    Raises:
        InputError: git fails.
    """
    found = git(root, "rev-parse", "--git-common-dir")
    if found is None:
        raise _failed(root)
    return (root / found.strip()).resolve()


def submodules(folder: Path, nested: Iterable[Path]) -> Iterator[Path]:
    """Git directories of submodules, and of other repositories in the project.

    Args:
        folder: git directory of the repository.
        nested: what is a git directory in the project.
    """
    for parent, folders, _ in os.walk(folder / "modules"):
        if (Path(parent) / "objects").is_dir():
            folders[:] = [name for name in folders if name == "modules"]
            yield Path(parent)
    yield from (path for path in nested if path.resolve() != folder and (path / "objects").is_dir())


def missing_history(root: Path) -> dict[str, int]:
    """What a partial or shallow clone lacks: name -> 1."""
    partial = git(root, "config", "--get-regexp", r"^(extensions\.partialclone|remote\..*\.promisor)$")
    shallow = (git(root, "rev-parse", "--is-shallow-repository") or "").strip() == "true"
    return ({"git objects that a partial clone lacks": 1} if partial else {}) | (
        {"commits that a shallow clone lacks": 1} if shallow else {}
    )


class GitSearch:
    """A search of the blobs of one repository."""

    def __init__(self, root: Path, scanner: Scanner) -> None:
        """Args:
        root: where git runs: a work tree, or a git directory.
        """
        self.root, self.scanner = root, scanner
        self.objects = 0
        self.found: dict[str, int] = {}
        """Hash of a blob -> its bytes."""
        self.unreadable = 0

    def run(self) -> None:
        """Raises:
        InputError: git cannot list the objects: silence would read as a clean history.
        """
        listed = git(
            self.root, "cat-file", "--batch-all-objects", "--batch-check=%(objectname) %(objecttype) %(objectsize)"
        )
        if listed is None:
            raise _failed(self.root)
        batch: list[str] = []
        size = 0
        for name, kind, *length in (line.split() for line in listed.splitlines()):
            if kind == "blob":
                self.objects += 1
                batch.append(name)
                size += int(length[0])
            elif kind not in {"commit", "tree", "tag"}:  # missing, or damaged
                self.unreadable += 1
            if size >= MOST_AT_ONCE:
                self._search(batch)
                batch, size = [], 0
        self._search(batch)

    def _search(self, names: list[str]) -> None:
        contents = blobs(self.root, names)
        kinds = self.scanner.contents((f"git blob {name[:12]}", content) for name, content in contents.items())
        self.found |= {
            name: len(content) for (name, content), held in zip(contents.items(), kinds, strict=True) if held
        }
        lost = [name for name in names if name not in contents]
        if len(lost) == 1:
            self.unreadable += 1
        elif lost:  # git ends at a damaged object
            self._search(lost[: len(lost) // 2])
            self._search(lost[len(lost) // 2 :])


def _failed(root: Path) -> InputError:
    return InputError(
        "git history cannot be searched: git is not installed, refuses this folder, or has damaged objects",
        f"see what `git fsck` says in {root}, then run the same command again",
    )
