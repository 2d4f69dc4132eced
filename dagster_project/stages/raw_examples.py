"""data/sources/* -> raw_examples.

All sources in one canonical form, one row per example; nothing is dropped, but what was erased and cannot be taken out
of its source.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.records import (
    BATCH,
    LEDGER,
    READ,
    Report,
    StoredPart,
    is_rich,
    ledger_schema,
    ledger_table,
    record_schema,
    uncollected,
    write_stored_records,
    write_tables,
)
from dagster_project.curation import left_out
from dagster_project.curation.sources import erased, fields, use_policy
from dagster_project.curation.sources.reading import Reading, Source, locate_sources, read_sources
from dagster_project.curation.sources.streaming import Records
from dagster_project.curation.sources.use_policy import Policy

if TYPE_CHECKING:
    import pyarrow as pa

CHECK_DESCRIPTIONS = {fields.NAME: fields.DESCRIPTION, use_policy.NAME: use_policy.DESCRIPTION, **erased.DESCRIPTIONS}


class Params(Reading):
    """The examples to learn from. See docs/sources.md."""

    sources: list[Source] = Field(min_length=1)
    """Files, folders, objects in S3 and data sets on the Hub, in order."""
    use_policy: Policy | None = None
    """What a release may rest on: judged here for these sources, as a warning, and by `release` for all that the model
    was made from. null: anything."""


def validate(params: Params, ctx: ValidationContext) -> None:
    locate_sources(ctx.root, params.sources, f"{ctx.section}.sources")


def run(ctx: StageContext) -> Report:
    return produce(ctx.root, ctx.params("raw_examples", Params), out=ctx.out)


@uncollected
def produce(root: Path, params: Params, out: Path) -> Report:
    """Read all sources and write examples and ledger.

    Args:
        root: the project's folder; source paths are relative to it.
    """
    records, sources = read_sources(root, params.sources, params, "raw_examples", pairs=False, scratch=out.parent)
    count, rows = len(records), records.rows()
    gone = left_out.left_out(erased.read_erased(root), rows)
    kept = gone.kept(count)
    rich = records.is_rich and (len(kept) == count or any(is_rich(rows[number]) for number in kept))
    write_stored_records(rows, records.ids, record_schema(), [StoredPart(out, kept, rich, {})])
    ignored = fields.IgnoredFields()
    write_tables(out / LEDGER, _ledger(records, ignored, gone.places), ledger_schema())
    gone.write(out)
    policy, metrics = params.use_policy, {"sources": sources}
    stated = {} if policy is None else {use_policy.NAME: policy.given}
    judged = use_policy.check(None if policy is None else use_policy.judge(policy, [metrics]))
    checks = [ignored.check(), gone.check, judged]
    return Report(rows_in=count, rows_out=len(kept), dropped=gone.dropped, metrics={**metrics, **stated}, checks=checks)


def _ledger(records: Records, ignored: fields.IgnoredFields, without: Container[int]) -> Iterator[pa.Table]:
    placed = enumerate(records.places())
    for _ in range(0, len(records), BATCH):
        lines = [(number, source, row) for number, (source, row) in islice(placed, BATCH) if number not in without]
        found = [records.ignored.get(number, []) for number, _, _ in lines]
        for (_, source, row), names in zip(lines, found, strict=True):
            ignored.add({"source": source, "source_row": row, "ignored": names})
        yield ledger_table(
            {
                "source": [source for _, source, _ in lines],
                "source_row": [row for _, _, row in lines],
                "example_id": [records.ids[number] for number, _, _ in lines],
                "outcome": READ,
                "why": [fields.why({"ignored": names}) for names in found],
            }
        )
