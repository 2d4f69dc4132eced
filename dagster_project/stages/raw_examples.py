"""data/sources/* -> raw_examples. All sources in one canonical form, one row per example; nothing is dropped, but what was erased and cannot be taken out of its source."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.records import (
    READ,
    Report,
    StoredPart,
    is_rich,
    ledger_line,
    record_schema,
    uncollected,
    write_ledger,
    write_stored_records,
)
from dagster_project.curation import left_out
from dagster_project.curation.sources import erased, fields, use_policy
from dagster_project.curation.sources.reading import Reading, Source, locate_sources, read_sources
from dagster_project.curation.sources.streaming import Records
from dagster_project.curation.sources.use_policy import Policy

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
    count, rows = len(records), records.rows()
    gone = left_out.left_out(erased.read_erased(root), rows)
    kept = gone.kept(count)
    rich = records.is_rich and (len(kept) == count or any(is_rich(rows[number]) for number in kept))
    write_stored_records(rows, records.ids, record_schema(), [StoredPart(out, kept, rich, {})])
    ignored = fields.IgnoredFields()
    write_ledger(out, _ledger(records, ignored, gone.places), repaired=False)
    gone.write(out)
    policy, metrics = params.use_policy, {"sources": sources}
    stated = {} if policy is None else {use_policy.NAME: policy.given}
    judged = use_policy.check(None if policy is None else use_policy.judge(policy, [metrics]))
    checks = [ignored.check(), gone.check, judged]
    return Report(rows_in=count, rows_out=len(kept), dropped=gone.dropped, metrics={**metrics, **stated}, checks=checks)


def _ledger(records: Records, ignored: fields.IgnoredFields, without: Container[int]) -> Iterator[dict[str, Any]]:
    for number, ((source, source_row), identity) in enumerate(zip(records.places(), records.ids, strict=True)):
        if number in without:
            continue
        names = {"ignored": records.ignored[number]} if number in records.ignored else {}
        row = {"source": source, "source_row": source_row, "example_id": identity, **names}
        ignored.add(row)
        yield ledger_line(row, source_row, READ, fields.why(row))
