"""data/sources/* -> raw_examples. All sources in one canonical form, one row per example; nothing is dropped."""

from __future__ import annotations

from collections.abc import Iterator
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
    ledger_schema,
    ledger_table,
    record_schema,
    uncollected,
    write_stored_records,
    write_tables,
)
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
    """What a release may rest on: judged here for these sources, as a warning, and by `release` for all that the model was made
    from. null: anything."""


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
    count, returned = len(records), erased.read_erased(root).check(records.rows())
    write_stored_records(records.rows(), records.ids, record_schema(), [StoredPart(out, range(count), records.is_rich, {})])
    ignored = fields.IgnoredFields()
    write_tables(out / LEDGER, _ledger(records, ignored), ledger_schema())
    policy, metrics = params.use_policy, {"sources": sources}
    stated = {} if policy is None else {use_policy.NAME: policy.given}
    judged = use_policy.check(None if policy is None else use_policy.judge(policy, [metrics]))
    return Report(rows_in=count, rows_out=count, metrics={**metrics, **stated}, checks=[ignored.check(), returned, judged])


def _ledger(records: Records, ignored: fields.IgnoredFields) -> Iterator[pa.Table]:
    placed = records.places()
    for start in range(0, len(records), BATCH):
        places = [*islice(placed, BATCH)]
        found = [records.ignored.get(start + k, []) for k in range(len(places))]
        for (source, row), names in zip(places, found, strict=True):
            ignored.add({"source": source, "source_row": row, "ignored": names})
        yield ledger_table(
            {
                "source": [source for source, _ in places],
                "source_row": [row for _, row in places],
                "example_id": records.ids[start : start + len(places)],
                "outcome": READ,
                "why": [fields.why({"ignored": names}) for names in found],
            }
        )
