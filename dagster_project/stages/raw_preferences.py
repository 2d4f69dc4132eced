"""data/sources/* -> raw_preferences.

All preference sources in one canonical form, one row per pair; nothing is dropped, but what was erased and cannot be
taken out of its source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.records import (
    JOINED,
    READ,
    Report,
    is_rich,
    ledger_line,
    pair_schema,
    uncollected,
    write_ledger,
    write_records,
)
from dagster_project.core.stored_rows import StoredRows
from dagster_project.curation import left_out
from dagster_project.curation.sources import erased, fields
from dagster_project.curation.sources.reading import PairSource, Reading, locate_sources, read_sources

CHECK_DESCRIPTIONS = {fields.NAME: fields.DESCRIPTION, **erased.DESCRIPTIONS}


class Params(Reading):
    """Pairs of a better and a worse answer. See docs/sources.md."""

    sources: list[PairSource] = []
    """Files, folders, objects in S3 and data sets on the Hub, in order. An empty list means a project without
    preferences."""


def validate(params: Params, ctx: ValidationContext) -> None:
    locate_sources(ctx.root, params.sources, f"{ctx.section}.sources")


def run(ctx: StageContext) -> Report:
    return produce(ctx.root, ctx.params("raw_preferences", Params), out=ctx.out)


@uncollected
def produce(root: Path, params: Params, out: Path) -> Report:
    """Read all sources and write pairs and ledger.

    Args:
        root: the project's folder; source paths are relative to it.
    """
    records, sources = read_sources(root, params.sources, params, "raw_preferences", pairs=True, scratch=out.parent)
    pairs = records.rows()
    gone = left_out.left_out(erased.read_erased(root), _with_first_row(pairs))
    kept = StoredRows((pairs[number] for number in gone.kept(len(pairs))), out.parent) if gone.places else pairs
    rich = records.is_rich and (kept is pairs or any(map(is_rich, kept)))
    write_records(out, kept, pair_schema(), rich)
    ignored = fields.IgnoredFields()
    write_ledger(out, _ledger(kept, ignored))
    gone.write(out, lambda number: pairs[number]["source_rows"])
    metrics, checks = {"sources": sources}, [ignored.check(), gone.check]
    return Report(rows_in=len(pairs), rows_out=len(kept), dropped=gone.dropped, metrics=metrics, checks=checks)


def _ledger(pairs: Iterable[dict[str, Any]], ignored: fields.IgnoredFields) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        ignored.add(pair)
        first, *others = pair["source_rows"]
        yield ledger_line(pair, first, READ, fields.why(pair))
        for row in others:
            yield ledger_line(pair, row, JOINED, f"the other half of the pair that row {first} begins")


def _with_first_row(pairs: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        yield {**pair, "source_row": pair["source_rows"][0]}
