"""What is declared for each source, and what of it violates the use policy, as tables.

Audits and the page of a data set have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.views.html import Table

UNKNOWN = "unknown"
COLUMNS = {
    "category": "category",
    "collected": "collected",
    "generator": "generator",
    "permission": "permission",
    "retain_until": "retain until",
    "purposes": "purposes",
}
"""Key of what is declared -> column, as in curation/sources/declarations.py (tests/test_declarations.py compares)."""


def declared_table(sources: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per source.

    Args:
        sources: source -> its facts in a report or an audit. Keys of `declared` that are missing are unknown.
    """
    rows = [
        (
            path,
            facts.get("rows", UNKNOWN),
            facts.get("license", UNKNOWN),
            *(_words(facts.get("declared", {}).get(key)) for key in COLUMNS),
        )
        for path, facts in sources.items()
    ]
    columns = ["source", "rows", "license", *COLUMNS.values()]
    return Table("Declared by the project", columns, rows, folded=False, region="What is declared for the sources")


def violations_table(violations: Sequence[Mapping[str, Any]]) -> Table:
    """A row per violated rule of the use policy."""
    rows = [(one["source"], one["rows"], one["rule"], one["why"]) for one in violations]
    return Table("Violations of the use policy", ["source", "rows", "rule", "why"], rows, folded=False)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):  # a period
        return f"{value.get('from', UNKNOWN)} to {value.get('to', UNKNOWN)}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return UNKNOWN if value is None else str(value)
