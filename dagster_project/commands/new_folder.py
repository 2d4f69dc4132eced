"""A folder that a command writes, such as an export: it gets its name when all of it is complete."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from dagster_project.core.errors import InputError


def refuse_used(option: str, place: Path, then: str = "name a new folder") -> None:
    """Raises:
    InputError: there is something at this place, and it is not an empty folder.
    """
    if os.path.lexists(place) and (not place.is_dir() or place.is_symlink() or any(place.iterdir())):
        raise InputError(f"{option} {place}: it exists, and is not an empty folder", then)


@contextmanager
def new_folder(place: Path, option: str = "--out") -> Iterator[Path]:
    """A folder beside `place` in which files are written, and that is renamed to it at the end.

    After an error nothing is left.

    Args:
        place: a folder that does not exist, or is empty.
        option: the option that names it, for messages.
    Raises:
        InputError: nothing can be written there, or another process wrote there meanwhile.
    """
    folder = place.resolve()
    missing = [parent for parent in folder.parents if not os.path.lexists(parent)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            yield made
            try:
                made.replace(folder)
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                    raise
                raise InputError(
                    f"{option} {place}: another process wrote files there meanwhile", "name another folder"
                ) from None
    except OSError as error:
        raise InputError(
            f"{option} {place}: {error.strerror or error}", "name a folder with enough space that can be written"
        ) from None
    finally:
        for parent in missing if not os.path.lexists(folder) else ():
            with suppress(OSError):  # not empty: another process wrote there
                parent.rmdir()
