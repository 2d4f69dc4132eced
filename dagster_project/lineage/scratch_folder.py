"""Temporary folders of commands, with copies of data, in the project: an erasure finds them there if a command is
killed. Nothing of them stays otherwise, also if their removal is interrupted."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

FOLDERS = Path(".dvc", "tmp", "pedigree", "commands")


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """A temporary folder of this process, in the project; in the system's folder where there is none to write in.

    Those of killed processes are removed first.
    """
    with ExitStack() as stack:
        if not os.access(root / ".dvc", os.W_OK):
            yield stack.enter_context(_removed_at_the_end(tempfile.TemporaryDirectory(prefix="pedigree-")))
            return
        (root / FOLDERS).mkdir(parents=True, exist_ok=True)
        folders = (root / FOLDERS).resolve()
        with _locked(folders):  # otherwise another process could remove it before it is locked
            _remove_abandoned(folders)
            folder = stack.enter_context(_removed_at_the_end(tempfile.TemporaryDirectory(dir=folders, prefix="")))
            stack.enter_context(_locked(folder))
        yield folder


def remove_abandoned(root: Path) -> None:
    """Remove the folders of killed processes."""
    if (root / FOLDERS).is_dir():
        with _locked(root / FOLDERS):
            _remove_abandoned(root / FOLDERS)


def is_in_use(root: Path) -> bool:
    """Whether a command that runs has such a folder."""
    return any(_is_locked(folder) for folder in (root / FOLDERS).glob("*"))


def _remove_abandoned(folders: Path) -> None:
    for folder in folders.iterdir():
        if not _is_locked(folder):
            shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system releases when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    with suppress(FileNotFoundError):  # its command has just ended
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


@contextmanager
def _removed_at_the_end(folder: tempfile.TemporaryDirectory[str]) -> Iterator[Path]:
    try:
        yield Path(folder.name)
    finally:
        try:
            folder.cleanup()
        except KeyboardInterrupt:
            folder.cleanup()
            raise
