"""Parquet files -> polars, for commands that work without Arrow, such as `audit` and `impact`.

Stages read with core/records.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dagster_project.core.records import IGNORED, LEDGER, ignored_in, loaded, uncollected, with_source_rows
from dagster_project.core.stored_rows import encode, encoded

if TYPE_CHECKING:
    import polars as pl


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open, because polars would take `*` and `[` in a path as a pattern.

    Errors of polars are raised as ValueError.
    """
    import polars as pl

    with path.open("rb") as file:
        try:
            yield file
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            # some damage leads to a panic, which is no Exception
            raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error


def read_schema(path: Path) -> dict[str, pl.DataType]:
    """Column -> type.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or not a table.
    """
    import polars as pl

    with _opened(path) as file:
        return dict(pl.read_parquet_schema(file))


def read_frame(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read columns of a table; None: all.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, not a table, or lacks one of the columns.
    """
    import polars as pl

    with _opened(path) as file:
        return pl.read_parquet(file, columns=None if columns is None else [*columns])


def read_rows(path: Path, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """As `records.read_table`. Raises as `read_frame`.

    Args:
        required: columns that the table must have.
    """
    frame = read_frame(path)
    if missing := [name for name in required if name not in frame.columns]:
        raise ValueError(f"it has no column {', '.join(missing)}")
    return [*map(loaded, frame.rows(named=True))]


@uncollected
def read_records(folder: Path, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """As `records.read_records`. Arguments and exceptions as of `read_rows`."""
    return [row for shard in sorted(folder.glob("records-*.parquet")) for row in read_rows(shard, required)]


def placed_records(folder: Path) -> Iterator[bytes]:
    """The output of `raw_examples`: each record as `stored_rows` encodes it, with `source_row` and `ignored`.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, or the ledger has other rows.
    """
    import polars as pl

    ledger, start = read_frame(folder / LEDGER, ["source_row", "why"]), 0
    for shard in sorted(folder.glob("records-*.parquet")):
        records = read_frame(shard)
        lines = ledger[start : start + len(records)]
        start += len(records)
        if "tools" in records.columns or lines["why"].str.starts_with(IGNORED).any():
            for record, line in zip(records.iter_rows(named=True), lines.iter_rows(named=True), strict=True):
                yield encode({"source_row": line["source_row"], **loaded(record), **ignored_in(line)})
        else:
            yield from encoded(pl.concat([lines.select("source_row"), records], how="horizontal", strict=True))
    if start != len(ledger):
        raise ValueError(f"{folder}: {start} records, and {len(ledger)} lines in the ledger")


@uncollected
def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """As `records.read_ledger`. Raises as `read_frame`."""
    return read_rows(folder / LEDGER)


@uncollected
def read_pairs(folder: Path) -> list[dict[str, Any]]:
    """As `records.iter_pairs`, all of them. Raises as `read_frame`."""
    return [*with_source_rows(read_records(folder), read_ledger(folder))]
