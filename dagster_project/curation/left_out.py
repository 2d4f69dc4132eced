"""Erased records in sources that cannot be edited from here: on the Hub and in S3.

Their rows are left out at reading; a row of a file is refused (docs/erase.md).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dagster_project.core.records import CheckResult, ledger_schema, write_table
from dagster_project.curation.sources.erased import SHOWN, TOMBSTONES, Erased

LEFT_OUT = "left_out.parquet"
"""File of an output, if any rows were left out: their lines of a ledger, without ids. The lines of `ledger.parquet` are
those of the records, in their order."""
ERASED = "erased"
"""Why rows were left out, in the report and in that file."""
REMOTE = ("hub:", "s3://")
"""How the names of sources begin that cannot be edited from here."""


def is_remote(source: str) -> bool:
    return source.startswith(REMOTE)


@dataclass(frozen=True)
class LeftOut:
    """Rows that are left out."""

    places: Mapping[int, tuple[str, int]]
    """Number of the record or pair -> source and row."""
    check: CheckResult
    """The blocking check of all rows."""

    @property
    def dropped(self) -> dict[str, int]:
        """For the report."""
        return {ERASED: len(self.places)} if self.places else {}

    def kept(self, count: int) -> Sequence[int]:
        """Numbers of the records that stay, of so many."""
        if not self.places:
            return range(count)
        return array("q", (number for number in range(count) if number not in self.places))

    def write(self, out: Path, rows_of: Callable[[int], Iterable[int]] | None = None) -> None:
        """Write which rows were left out, if any were.

        Args:
            rows_of: number of a pair -> all its rows; None: one.
        """
        line = {"example_id": "", "outcome": ERASED, "why": f"a tombstone in {TOMBSTONES}"}
        lines: list[dict[str, Any]] = []
        for number, (source, first) in self.places.items():
            rows = rows_of(number) if rows_of else [first]
            lines += [{"source": source, "source_row": row, **line} for row in rows]
        if lines:
            write_table(out / LEFT_OUT, lines, ledger_schema(repaired=False))


def left_out(erased: Erased, records: Iterable[Mapping[str, Any]]) -> LeftOut:
    """Compare records or pairs, with `source` and `source_row`, with the tombstones."""
    places: dict[int, tuple[str, int]] = {}

    def of_files() -> Iterable[Mapping[str, Any]]:
        for number, record in enumerate(records):
            if not is_remote(record["source"]):
                yield record
            elif erased.includes(record):
                places[number] = (record["source"], record["source_row"])

    check = erased.check(of_files())
    if places and check.passed:
        names = [f"{source}:{row}" for source, row in places.values()]
        note = f"erased, and left out at each reading; {TOMBSTONES} has their keyed hashes"
        check = replace(check, count=len(names), dropped=len(names), rows=names[:SHOWN], note=note)
    return LeftOut(places, check)
