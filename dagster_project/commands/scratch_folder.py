"""A temporary folder of a command, with copies of data: nothing of it stays, also if its removal is interrupted."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def scratch_folder(prefix: str = "pedigree-") -> Iterator[str]:
    folder = tempfile.TemporaryDirectory(prefix=prefix)
    try:
        yield folder.name
    finally:
        try:
            folder.cleanup()
        except KeyboardInterrupt:
            folder.cleanup()
            raise
