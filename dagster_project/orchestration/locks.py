"""File locks: one driver per stage at a time. The operating system releases the lock when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dagster_project.core.errors import PedigreeError

LOCKS = Path(".dvc") / "tmp" / "pedigree" / "locks"


@contextlib.contextmanager
def hold(root: Path, address: str, on_wait: Callable[[str], None], command: str | None = None) -> Iterator[None]:
    """Hold a stage's lock; wait while another process holds it.

    Args:
        on_wait: called once with a description of the holder; may raise instead of waiting.
        command: how to describe this process to others; None: by its command line.
    Raises:
        PedigreeError: the file system has no locks.
    """
    path = root / LOCKS / address
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    on_wait(_holder(path))
                    waiting = True
                time.sleep(0.2)
            except OSError as error:
                raise PedigreeError(
                    f"{path}: this file system does not lock files ({error.strerror})",
                    "keep the project on a local disk, or on a network file system mounted with locks;"
                    " two runs of one stage would destroy each other's outputs",
                ) from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "command": " ".join(sys.argv) if command is None else command}))
        file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} ({holder['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # also JSON other than an object
        return "another process"
