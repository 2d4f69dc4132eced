"""A row of a data set by its place and content, in place of its text: what findings hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from dagster_project.core.hashing import sha256_of_text
from dagster_project.curation.sources.benchmarks import Item


class Reference(NamedTuple):
    """Names one version of a row: a row with another content has another `example_id`."""

    place: str
    """ "source:row"."""
    example_id: str
    """Content hash, of a record or of a benchmark item."""

    @classmethod
    def of(cls, record: Mapping[str, Any], as_read: bool = False) -> Reference:
        """Args:
        as_read: the row before its repair, if it was repaired.
        """
        identity = (record.get("source_id") if as_read else None) or record["example_id"]
        return cls(place(record), identity)

    @classmethod
    def of_item(cls, item: Item) -> Reference:
        parts = [item.question, *item.choices, item.text]
        return cls(item.place, sha256_of_text(json.dumps(parts))[:32])


def place(record: Mapping[str, Any]) -> str:
    return f"{record['source']}:{record['source_row']}"
