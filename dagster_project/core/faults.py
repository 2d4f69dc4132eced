"""Errors of the operating system, also through libraries -> one message with path, reason and next step."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dagster_project.core.errors import InputError, PedigreeError

LIBRARIES = {"safetensors", "pyarrow", "polars", "tokenizers", "shutil", "sqlite3"}
"""Libraries whose exceptions give the operating system's error code only in their text."""
CODE = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
PATH = re.compile(r"at path \"(.+?)\"|local file '(.+?)'|\(os error \d+\): (/.+)$")
UNFINISHED = re.compile(r"^\d+ requested and \d+ written$")
"""NumPy's message for an incomplete write; it has no code."""
SQLITE = {8: errno.EACCES, 10: errno.EIO, 13: errno.ENOSPC}
"""SQLITE_READONLY, SQLITE_IOERR, SQLITE_FULL"""
SQLITE_CANTOPEN = 14

AGAIN = "then run the same command again"
NEXT_STEPS = {
    errno.ENOSPC: f"free some space on its disk, {AGAIN}",
    errno.EDQUOT: f"free some space, or ask for a larger quota, {AGAIN}",
    errno.EFBIG: f"raise the limit on the size of a file (`ulimit -f`), {AGAIN}",
    errno.EMFILE: f"raise the limit on open files (`ulimit -n`), {AGAIN}",
    errno.ENFILE: f"end processes with many open files, {AGAIN}",
    errno.EIO: f"look for errors of the disk, for example with `dmesg`, {AGAIN}",
    errno.ESTALE: f"mount the file system again, {AGAIN}",
    errno.EROFS: f"make the file system writable, or use a copy of the project elsewhere, {AGAIN}",
    errno.EACCES: f"give your user access to it (`ls -ld` shows who has it), {AGAIN}",
    errno.EPERM: f"give your user access to it (`ls -ld` shows who has it), {AGAIN}",
    errno.ENOENT: f"restore it (`git checkout` or `dvc checkout`), {AGAIN}",
    errno.ENOTDIR: f"remove the file that is in the place of a folder, {AGAIN}",
    errno.EISDIR: f"remove the folder that is in the place of a file, {AGAIN}",
    errno.ELOOP: f"remove the link that leads to itself, {AGAIN}",
    errno.ENAMETOOLONG: "use shorter names",
}
"""Codes that are explained, because their cause is outside of the program. Those of the network are explained where
they arise."""
RESOURCES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE}
"""Something has run out or failed: exit code 1. With all others, the project cannot be used as it is: exit code 2."""


def explained(error: BaseException, where: Path) -> PedigreeError | None:
    """The error as one for the user, which it may be already; None if its cause is not the operating system.

    Args:
        where: the folder that was written to, for errors that name no path.
    """
    if isinstance(error, PedigreeError):
        return error
    for one in _causes(error):
        if _sqlite_code(one) == SQLITE_CANTOPEN:
            return _not_opened(where)
        code = _code(one)
        if code not in NEXT_STEPS:
            continue
        path = _path(one)
        if code == errno.ENOENT and os.sep not in path:  # no path, or a program that is not installed
            continue
        place = path or str(_fullest(where) if code == errno.ENOSPC else where)
        kind = PedigreeError if code in RESOURCES else InputError
        return kind(f"{place}: {os.strerror(code)}", NEXT_STEPS[code])
    return None


def _not_opened(where: Path) -> PedigreeError:
    """SQLite names neither the file that it cannot open nor the reason: a reason that can be seen from here, or all."""
    if code := _obstacle(where):
        kind = PedigreeError if code in RESOURCES else InputError
        return kind(f"{where}: SQLite cannot open a database: {os.strerror(code)}", NEXT_STEPS[code])
    possible = "it or its folder is missing or not yours, its disk is full, or too many files are open"
    folders = "the folders of this project, and DAGSTER_HOME if it is elsewhere,"
    hint = f"look at {folders} with `ls -ld` and `df -h`, and at `ulimit -n`, {AGAIN}"
    return PedigreeError(f"{where}: SQLite cannot open a database: {possible}", hint)


def _obstacle(where: Path) -> int | None:
    """Why no file can be created now; None if nothing prevents it in this folder."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
        if os.statvfs(where).f_flag & os.ST_RDONLY:
            return errno.EROFS
        if not os.access(where, os.W_OK | os.X_OK):
            return errno.EACCES
        return None if shutil.disk_usage(where).free else errno.ENOSPC
    except OSError as error:
        return error.errno if error.errno in {errno.EMFILE, errno.ENFILE} else None


def is_full(error: BaseException) -> bool:
    """Whether a file could not be written as a whole: the disk is full, or a limit is reached."""
    return any(_code(one) in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} for one in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen = set[int]()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        yield one
        seen.add(id(one))
        one = one.__cause__


def _code(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if UNFINISHED.match(str(error)):
        return errno.ENOSPC
    if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in LIBRARIES:
        return None
    if (sqlite := _sqlite_code(error)) is not None:
        return SQLITE.get(sqlite)
    found = CODE.search(str(error))
    return int(found[1] or found[2]) if found else None


def _sqlite_code(error: BaseException) -> int | None:
    """SQLite's primary result code; None for errors of anything else."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _path(error: BaseException) -> str:
    """The path that an error names; of a copy, the one that was written. Empty if there is none."""
    if isinstance(error, OSError):
        named = error.filename2 or error.filename
        if isinstance(named, str | bytes):
            return os.fsdecode(named)
    found = PATH.search(str(error))
    return next(filter(None, found.groups()), "") if found else ""


def _fullest(where: Path) -> Path:
    """The folder, or the one for temporary files, whichever has less space left."""
    space = dict[Path, int]()
    for folder in (where, Path(tempfile.gettempdir())):
        with suppress(OSError):
            space[folder] = shutil.disk_usage(folder).free
    return min(space, key=lambda folder: space[folder], default=where)
