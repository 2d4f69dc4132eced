"""Checks on source content outside of the records: content that is not text, and fields that are not used."""

from __future__ import annotations

from collections.abc import Sequence

from dagster_project.curation.checks.check import Check, DataSet, Rows
from dagster_project.curation.checks.privacy import mask
from dagster_project.curation.sources import fields


def _unsupported(rows: Rows, _: str) -> list[str | None]:
    """The content of a row on which a text model cannot be trained, else null."""
    facts: list[str | None] = []
    for record, meta in zip(rows.records, rows.metas, strict=True):
        is_unsupported = not record["messages"] and meta.get("unsupported") is True
        facts.append(meta.get("problem") if is_unsupported else None)
    return facts


def _ignored(rows: Rows, _: str) -> list[str | None]:
    """Fields of each source row that are not used, else null."""
    return [mask(", ".join(record["ignored"])) if record.get("ignored") else None for record in rows.records]


def _ignored_note(data: DataSet, facts: Sequence[str]) -> list[str]:
    return fields.note(fact.split(", ") for fact in facts)


SOURCE_CHECKS = (
    Check(
        "unsupported_content",
        "Every message is text: no images, sound, video or files.",
        "error",
        "Remove the rows, or train a model for such content with other tools.",
        column=_unsupported,
        note=lambda data, facts: [", ".join(sorted({fact.partition(" (")[0] for fact in facts}))] if facts else [],
    ),
    Check(
        fields.NAME,
        fields.DESCRIPTION,
        "info",
        "Rename the field to one that the layout reads, or use a `mapping`;"
        " docs/sources.md lists the fields of each layout.",
        "warn",
        column=_ignored,
        quotes=True,
        note=_ignored_note,
        worst=lambda facts: fields.severity(name for fact in facts for name in fact.split(", ")),
    ),
)
