"""Libraries that write files, for tests of disks that are full: each writes some 300 kB into a folder."""

from __future__ import annotations

import os
import shutil
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from dagster_project.core import faults, records
from dagster_project.core.errors import PedigreeError


def write_safetensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(100_000)}, folder / "a.safetensors")


def write_arrow(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [f"{i * i:x}" for i in range(50_000)]}), folder / "a.parquet", compression="none")


def write_polars(folder: Path) -> None:
    import polars as pl

    pl.DataFrame({"a": [f"{i * i:x}" for i in range(50_000)]}).write_parquet(
        folder / "a.parquet", compression="uncompressed"
    )


def write_sqlite(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "a.db")) as db:
        db.execute("CREATE TABLE t (a)")
        db.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 300)
        db.commit()


def write_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w") as file:
        file.writestr("a", os.urandom(200_000))


def write_numpy(folder: Path) -> None:
    import numpy as np

    np.save(folder / "a.npy", np.zeros(50_000))


def write_text(folder: Path) -> None:
    records.write_text(folder / "a.txt", "x" * 200_000)


def write_copy(folder: Path) -> None:
    shutil.copytree(Path(__file__).parent, folder / "tree", dirs_exist_ok=True)


WRITERS = [write_safetensors, write_arrow, write_polars, write_sqlite, write_zip, write_numpy, write_text, write_copy]


def failure(writer: Callable[[Path], None], folder: Path) -> PedigreeError:
    """The message about the error of a writer."""
    try:
        writer(folder)
    except Exception as error:  # noqa: BLE001 of any library
        found = faults.explained(error, folder)
        assert found is not None, repr(error)
        return found
    raise AssertionError(f"{writer.__name__} wrote everything")
