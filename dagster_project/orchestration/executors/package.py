"""The project as files, for a worker: all that git does not ignore, i.e. the commit and every uncommitted change.

Data under DVC travels by hash.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Set
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from shlex import quote

from dagster_project.core.errors import InputError
from dagster_project.core.git import git_bytes, refuse_without_git
from dagster_project.core.records import remove
from dagster_project.orchestration import dvc

LIMIT = 100_000_000
"""Bytes of a package. Ray's dashboard accepts requests of 100 MiB, and the head node keeps packages in memory."""


@contextmanager
def project_package(root: Path, folder: Path, limit: int = LIMIT) -> Iterator[Path]:
    """A folder with the project's files.

    `.dvc` is left out: its configuration may contain credentials. So are files `.rayignore`, by which Ray would leave
    out others, and links to anything that is not one of these files or a folder with some: Ray sends what a link points
    to.

    Args:
        folder: where to create it; removed afterwards. A folder left by a killed driver is replaced.
    Raises:
        InputError: no git repository, a file name that is not UTF-8, or the files are too large.
    """
    listed = git_bytes(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".")
    in_submodules = git_bytes(root, "ls-files", "-z", "--cached", "--recurse-submodules", "--", ".")
    if listed is None or in_submodules is None:
        refuse_without_git()
        raise InputError(f"{root} is not in a git repository", "run `git init`: git lists the files that a worker gets")
    names = sorted({os.fsdecode(name) for name in (listed + in_submodules).split(b"\0") if name})
    files = [name for name in names if not name.startswith(".dvc/") and PurePosixPath(name).name != ".rayignore"]
    known = {*files, *(str(parent) for name in files for parent in PurePosixPath(name).parents)}
    sizes = {name: size for name in files if (size := _size(root, name, known)) is not None}
    for name in sizes:
        if (shown := os.fsencode(name).decode("utf-8", "backslashreplace")) != name:
            raise InputError(
                f"a job cannot get the file {shown}: its name is not UTF-8", "rename it, or let .gitignore name it"
            )
    if sum(sizes.values()) > limit:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise InputError(
            f"the files in git are {sum(sizes.values()) / 1e6:,.0f} MB; a worker can get {limit / 1e6:,.0f} MB of"
            " files. Largest: " + ", ".join(f"{name} ({sizes[name] / 1e6:,.1f} MB)" for name in largest),
            f"keep large files in DVC: `git rm --cached {quote(largest[0])} && dvc add {quote(largest[0])}`",
        )
    remove(folder)
    try:
        for name in sizes:
            source, target = root / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with dvc.records_locked(root) if name == "dvc.lock" else nullcontext(), suppress(FileNotFoundError):
                if source.is_dir():
                    target.symlink_to(os.path.relpath(source.resolve(), source.parent.resolve()))
                else:
                    shutil.copy2(source, target)  # a report may vanish: another stage is replacing it
        yield folder
    finally:
        remove(folder)


def _size(root: Path, name: str, known: Set[str]) -> int | None:
    """Size of a file, or of the file that a link points to.

    None if it vanished, or is something else than a file or a link to one of the known paths.

    Args:
        known: files and folders, relative to the project.
    """
    path = root / name
    try:
        status = path.lstat()
        if not stat.S_ISLNK(status.st_mode):
            return status.st_size if stat.S_ISREG(status.st_mode) else None
        target = path.resolve(strict=True)
        is_known = target.relative_to(root.resolve()).as_posix() in known
    except (OSError, ValueError, RuntimeError):  # to nowhere, out of the project, or in a circle
        return None
    if not is_known or path.parent.resolve().is_relative_to(target):
        return None
    return target.stat().st_size if target.is_file() else 0
