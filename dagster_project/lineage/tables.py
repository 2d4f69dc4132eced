"""Columns of the tables in outputs. A damaged file, or one with other columns, raises InputError with its path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core import faults
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.text import shortened

if TYPE_CHECKING:
    import pyarrow as pa

NUMBERS = frozenset({"source_row", "step", "epoch"})
TEXTS = frozenset({"example_id", "source", "outcome", "why", "check", "other", "source_id"})


def column_names(path: Path) -> list[str]:
    """Names of the columns of a table.

    Raises:
        InputError: it is not a table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def read(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read columns of a table.

    Raises:
        InputError: it is not a table, or lacks one of the columns, or one has another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=[*columns])
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from None
    for name in columns:
        if name not in table.column_names:
            raise _damaged(path, f"no column {name}")
        kind = table.schema.field(name).type
        expected = NUMBERS if pa.types.is_integer(kind) else TEXTS if pa.types.is_string(kind) or pa.types.is_large_string(kind) else set()
        if name in NUMBERS | TEXTS and name not in expected and not pa.types.is_null(kind):
            raise _damaged(path, f"column {name} has type {kind}")
    return table


def rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of a table (`records.read_table`).

    Raises:
        InputError: it is not a table with rows of this project.
    """
    import pyarrow as pa

    from dagster_project.core.records import read_table

    try:
        return read_table(path, columns)
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, reason: Exception | str) -> PedigreeError:
    """An error that names the file; that of the operating system, such as a missing permission, does not call it damaged."""
    if isinstance(reason, Exception) and (known := faults.explained(reason, path.parent)):
        return known
    return InputError(
        f"{path}: damaged, or not a table of this project: {shortened(' '.join(str(reason).split()))}",
        "`pedigree verify --integrity` lists all damaged files; remove it, and `dvc fetch` it again",
    )
