"""Columns of the tables in outputs. A damaged file, or one with other columns, raises InputError with its path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core import faults, frames
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.hashing import md5_of_file
from dagster_project.core.text import shortened

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

NUMBERS = frozenset({"source_row", "step", "epoch"})
TEXTS = frozenset({"example_id", "source", "outcome", "why", "check", "other", "source_id"})


def column_names(path: Path) -> list[str]:
    """Names of the columns of a table.

    Raises:
        InputError: it is not a table.
    """
    return list(schema(path))


def read(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Read columns of a table. A column of nulls alone gets the type that it has in this project.

    Raises:
        InputError: it is not a table, or lacks one of the columns, or one has another type.
    """
    import polars as pl

    types = schema(path)
    for name in columns:
        if name not in types:
            raise _damaged(path, f"no column {name}")
        kind = types[name]
        expected = NUMBERS if kind.is_integer() else TEXTS if kind == pl.String else set()
        if name in NUMBERS | TEXTS and name not in expected and kind != pl.Null:
            raise _damaged(path, f"column {name} has type {kind}")
    try:
        table = frames.read_frame(path, columns)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return table.with_columns(pl.col(pl.Null).cast(pl.String)).cast(
        {name: pl.Int64 for name in NUMBERS & {*columns} if types[name] == pl.Null}
    )


def rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a table (`frames.read_rows`).

    Raises:
        InputError: it is not a table with rows of this project.
    """
    _refuse_altered(path)
    try:
        return frames.read_rows(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


def flattened(column: pl.Series) -> tuple[np.ndarray, dict[str, pl.Series]]:
    """Number of objects in each list of a column of lists, (rows,); and field -> its values in all of them, in order.

    Without fields if the items are not objects.
    """
    import polars as pl

    sizes = column.list.len().fill_null(0)
    objects = column.filter(sizes > 0).explode()
    names = objects.struct.fields if isinstance(objects.dtype, pl.Struct) else []
    return sizes.to_numpy(), {name: objects.struct.field(name) for name in names}


def schema(path: Path) -> dict[str, pl.DataType]:
    """Column -> type.

    Raises:
        InputError: it is not a table.
    """
    _refuse_altered(path)
    try:
        return frames.read_schema(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _refuse_altered(path: Path) -> None:
    """Raises:
    InputError: an object of DVC's cache does not match its name. Some damage
        ends the process inside of polars, which no exception reports.
    """
    prefix, store = path.parent.name, path.parent.parent.name
    if store != "md5" or len(prefix) != 2 or not path.is_file():
        return
    stat = path.stat()
    if _md5(path, stat.st_mtime_ns, stat.st_size) != prefix + path.name:
        raise _damaged(path, "its content does not match its name")


@lru_cache(maxsize=1 << 14)
def _md5(path: Path, changed: int, size: int) -> str:
    """Hash of a file, once as long as it is the same."""
    return md5_of_file(path)


def _damaged(path: Path, reason: Exception | str) -> PedigreeError:
    """An error that names the file. After an error of the operating system, such as a missing permission, it does not
    call the file damaged."""
    if isinstance(reason, Exception) and (known := faults.explained(reason, path.parent)):
        return known
    return InputError(
        f"{path}: damaged, or not a table of this project: {shortened(' '.join(str(reason).split()))}",
        "`pedigree verify --integrity` lists all damaged files; remove it, and `dvc fetch` it again",
    )
