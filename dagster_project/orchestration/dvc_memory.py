"""DVC's files in memory.

It writes the listing of every folder that it hashes to fsspec's global store, where it would stay as long as the
process.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dagster_project.orchestration.private_api import private_module

OF_DVC = re.compile(r"/dvc-staging(/|$)|/\.[\w-]+\.tmp(\.with_meta)?$")
"""Paths that DVC uses: objects that it has not stored yet, by content, and listings under random names."""

_lock = threading.Lock()
_users = 0


@contextmanager
def released_afterwards() -> Iterator[None]:
    """DVC is used within; its files in memory are removed when the last of several uses at once ends."""
    global _users
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _release()


def _release() -> None:
    memory = private_module("dvc.fs").MemoryFileSystem().fs
    for path in filter(OF_DVC.match, [*memory.store]):
        memory.store.pop(path, None)
    memory.pseudo_dirs[:] = [path for path in memory.pseudo_dirs if not OF_DVC.match(path)]
