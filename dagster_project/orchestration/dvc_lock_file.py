"""dvc.lock is replaced in one step where DVC runs in a process of ours: DVC itself empties the file, then writes it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dagster_project.lineage.history import LOCK


def replace_in_one_step(repo: Any) -> None:
    """Let a process that is killed while DVC writes dvc.lock leave the former one, instead of an empty file.

    Args:
        repo: DVC's `Repo`. While it writes the file, it holds its lock.
    """
    open_file = repo.fs.open

    def opened(path: str, mode: str = "r", **options: Any) -> Any:
        if Path(path).name == LOCK and "w" in mode:
            return _replaced(Path(path), Path(repo.tmp_dir) / f"{LOCK}.new", mode, **options)
        return open_file(path, mode, **options)

    repo.fs.open = opened


@contextmanager
def _replaced(path: Path, scratch: Path, mode: str, **options: Any) -> Iterator[IO[Any]]:
    with scratch.open(mode, **options) as file:
        yield file
    if path.exists():
        shutil.copymode(path, scratch)
    try:
        scratch.replace(path.resolve())
    except OSError:  # it is on another file system, or only the file itself may be changed
        shutil.copyfile(scratch, path)
