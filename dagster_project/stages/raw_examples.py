"""data/sources/* -> raw_examples. All sources in one canonical form, one row per example; nothing is dropped."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.records import Report, uncollected, write_ledger, write_records
from dagster_project.curation.sources import fields, formats
from dagster_project.curation.sources.reading import Reading, Source, locate_sources, read_sources

CHECK_DESCRIPTIONS = {fields.NAME: fields.DESCRIPTION}


class Params(Reading):
    """The examples to learn from. See docs/sources.md."""

    sources: list[Source] = Field(min_length=1)
    """Files, folders and data sets on the Hub, in order."""


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
    rows, sources = read_sources(root, params.sources, params, "raw_examples", formats.records_of)
    write_records(out, rows)
    write_ledger(out, ({**row, "outcome": "read", "why": fields.why(row)} for row in rows))
    return Report(rows_in=len(rows), rows_out=len(rows), metrics={"sources": sources}, checks=[fields.check(rows)])
