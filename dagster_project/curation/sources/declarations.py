"""What people declare for a source: license, category, period, generator, permission, retention, purposes.

No row depends on it. The report of the stage that reads the source states it, so a model's declarations are those of
its own runs.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dagster_project.core.errors import InputError
from dagster_project.core.params import Licensed, Section, parse
from dagster_project.core.records import with_license

UNKNOWN = "unknown"
DECLARED = "declared"
"""Key of a source's facts in reports and audits. Reports contain what is given; audits and summaries say `unknown` for
the rest."""
Category = Literal["public", "licensed", "third_party", "crawled", "user", "synthetic"]
NAMES = {
    "category": "category",
    "collected": "collected",
    "generator": "generator",
    "permission": "permission",
    "retain_until": "retain until",
    "purposes": "purposes",
}
"""Field of `Declared`, besides `license` -> its name on pages."""


def _date(value: Any) -> Any:
    if isinstance(value, datetime.date):
        raise ValueError(f'DVC cannot parse YAML dates: quote the value: "{value}"')
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", value, re.ASCII):
        raise ValueError("not a date: write YYYY-MM-DD, in quotes")
    return datetime.date.fromisoformat(value)


Date = Annotated[datetime.date, BeforeValidator(_date)]
"""A date in params.yaml, as text, e.g. "2026-01-31"."""
Text = Annotated[str, Field(min_length=1)]


class Period(Section):
    """When the text was collected: the first and the last day, in quotes. Either may be left out."""

    start: Date | None = Field(default=None, alias="from")
    """First day, e.g. "2024-01-01"."""
    end: Date | None = Field(default=None, alias="to")
    """Last day."""

    @model_validator(mode="after")
    def _in_order(self) -> Period:
        if self.start is None and self.end is None:
            raise ValueError("give from, to or both")
        if self.start and self.end and self.start > self.end:
            raise ValueError("from is after to")
        return self

    def __str__(self) -> str:
        return f"{self.start or UNKNOWN} to {self.end or UNKNOWN}"


class Declared(Licensed):
    """What is declared for a source. Nothing of it changes a row; what is left out is unknown."""

    license: str = UNKNOWN
    """License of the text, an SPDX expression if it has one. Audits and model cards show it."""
    category: Category | None = None
    """Where the text comes from: `public` data sets, `licensed` from rights holders, obtained from a `third_party`
    otherwise, `crawled` from the web, from `user`s of a service, or `synthetic`, i.e. written by a model. null:
    unknown. Not the category of a row."""
    collected: Period | None = None
    """Period in which the text was collected, e.g. `{from: "2024-01-01", to: "2024-06-30"}`. null: unknown."""
    generator: Text | None = None
    """What wrote synthetic text, e.g. the name and version of a model. A source with a generator is synthetic, whatever
    its category. null: unknown."""
    permission: Text | None = None
    """What permits the use of the text, in words, e.g. a contract or a consent. null: unknown."""
    retain_until: Date | None = None
    """Last day on which the text may be used, in quotes. null: unknown."""
    purposes: list[Text] | None = None
    """Purposes that the text may be used for, in your words, e.g. `[support, evaluation]`. null: unknown."""

    @property
    def given(self) -> dict[str, Any]:
        """What is declared besides the license, as in reports: {"declared": {"category": "public"}}, or empty."""
        values = self.model_dump(mode="json", by_alias=True, include=set(NAMES), exclude_none=True)
        return {DECLARED: values} if values else {}

    @property
    def shown(self) -> dict[str, str]:
        """Every field besides the license in words, or `unknown`."""
        return {name: _words(getattr(self, name)) for name in NAMES}


def _words(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)


def declared_of(facts: Mapping[str, Any], name: str = "a source") -> Declared:
    """What the facts on a source declare of it.

    Args:
        facts: of a source in a report, an audit or a summary; of any version.
        name: of the source, for messages.
    Raises:
        InputError: they declare what this version does not know.
    """
    declared, values = facts.get(DECLARED, {}), {"license": str(with_license(facts).get("license") or UNKNOWN)}
    if isinstance(declared, Mapping):
        values |= {key: value for key, value in declared.items() if value != UNKNOWN}
    else:
        values[DECLARED] = declared
    try:
        return parse(Declared, values, name, file="report")
    except InputError as error:
        hint = "restore the report with git, or use the version of pedigree-llm that wrote it"
        raise InputError(error.what, hint) from None


def with_unknown(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The facts on a source, with `unknown` for what is not declared.

    Raises:
        InputError: as `declared_of`.
    """
    known = declared_of(facts, name).given.get(DECLARED, {})
    return {**with_license(facts), DECLARED: {field: known.get(field, UNKNOWN) for field in NAMES}}


def declared_sources(document: Mapping[str, Any]) -> dict[str, Declared]:
    """Source -> what is declared for it, for the sources that a model was made from.

    Args:
        document: of `lineage.document`, `export.summarize` or `summary.from_reports`, whose sources are those that the
            reports of the model's own runs state.
    Raises:
        InputError: as `declared_of`.
    """
    return {name: declared_of(facts, name) for name, facts in document["sources"].items()}
