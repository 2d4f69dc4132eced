"""Files as they were at a revision of git, for `pedigree check --since`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dagster_project.core.errors import InputError
from dagster_project.core.git import git, git_bytes, refuse_without_git
from dagster_project.core.hashing import sha256_of_bytes
from dagster_project.lineage.history import LINK, SUBMODULE, commit_of, path_exists

LFS_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n(?:ext-.*\n)*oid sha256:([0-9a-f]{64})\nsize [0-9]+\n"
)
"""What git keeps of a file of Git LFS."""
ANNEX_POINTER = re.compile(rb"/annex/objects/[^\n]+\n?")
"""What git keeps of an unlocked file of git-annex."""


def files_at(version: str, paths: Sequence[Path], folder: Path) -> list[Path]:
    """Another version of `paths`: the path `version`, or the files at the git
    revision `version`, written into `folder`.

    Raises:
        InputError: no such path or revision exists, or one of the paths is missing at that revision.
    """
    if version and path_exists(Path(version)):
        return [Path(version)]
    if missing := [path for path in paths if not path_exists(path)]:
        raise InputError(
            f"--since {version}: {missing[0]} does not exist here", "name a file or folder with the earlier version"
        )
    copies = []
    commit = commit_of(Path.cwd(), version) if version else None
    if not commit:
        refuse_without_git()
        raise InputError(
            f"--since {version}: no such path, and no such revision in git",
            "name a file, a folder, or a revision (see `git log`)",
        )
    for number, path in enumerate(paths):
        resolved = path.resolve()
        folder_of_path = resolved if resolved.is_dir() else resolved.parent
        listed = git_bytes(folder_of_path, "ls-tree", "-r", "-z", commit, "--", str(resolved))
        entries = [entry.split("\t", 1) for entry in os.fsdecode(listed or b"").split("\0") if entry]
        if not entries:
            raise InputError(
                f"--since {version}: {path} is not in git at that revision",
                "name a file or folder with the earlier version",
            )
        copy = folder / str(number) / (resolved.name or "root")
        # links last: nothing is written through one
        for header, name in sorted(entries, key=lambda entry: entry[0].startswith(LINK)):
            mode, _, digest = header.split()
            target = copy / name if resolved.is_dir() else copy.parent / name
            is_outside = not target.parent.resolve().is_relative_to(folder.resolve())
            if mode == SUBMODULE or is_outside or target.is_symlink() or target.exists():
                continue
            content = _content(folder_of_path, digest, f"--since {version}: {name}", commit)
            target.parent.mkdir(parents=True, exist_ok=True)
            if mode == LINK:
                target.symlink_to(os.fsdecode(content))
            else:
                target.write_bytes(content)
        copies.append(copy)
    return copies


def _content(root: Path, digest: str, what: str, commit: str) -> bytes:
    """A blob, or the file of Git LFS that it points to.

    That file is read from the folder of Git LFS: the repository names the program that git would start for it.

    Args:
        root: a folder of the repository.
        what: the file, for messages.
    Raises:
        InputError: git has not the blob, or the file that it points to is not here.
    """
    content = git_bytes(root, "cat-file", "blob", digest)
    if content is None:
        raise InputError(f"{what}: git cannot read it", "fetch the objects of that commit (`git fetch`)")
    if ANNEX_POINTER.fullmatch(content):
        raise InputError(
            f"{what} is in git-annex, which is not read at other revisions", "name a file with the earlier version"
        )
    if not (pointer := LFS_POINTER.fullmatch(content)):
        return content
    oid = pointer[1].decode()
    stored = Path(
        root, (git(root, "rev-parse", "--git-common-dir") or "").strip(), "lfs/objects", oid[:2], oid[2:4], oid
    )
    found = stored.read_bytes() if stored.is_file() else b""
    if sha256_of_bytes(found) != oid:
        raise InputError(
            f"{what} is a file of Git LFS, and its content of that revision is not here",
            f"`git lfs fetch origin {commit[:12]}`, or name a file with the earlier version",
        )
    return found
