"""Preference pairs as the stage `preferences` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dagster_project.core.records import example_id, write_records

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PREFERENCE_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("margin", pa.float64()),
        ("category", pa.string()),
        ("group_id", pa.string()),
    ]
)


def preference_row(i: int, chosen: str, rejected: str, margin: float | None = None) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"q{i}"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {
        "example_id": example_id(prompt + good + bad),
        "prompt": prompt,
        "chosen": good,
        "rejected": bad,
        "margin": margin,
        "category": "even" if i % 2 else None,
        "group_id": str(i),
    }


def write_pairs(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a split of preferences."""
    write_records(folder, rows, PREFERENCE_SCHEMA)


def write_letters(folder: Path, **numbers: range) -> None:
    """Write the pairs of each split: people like answers of a, and dislike those of z. Both are as long."""
    for split, of_split in numbers.items():
        pairs = [preference_row(i, "a" * (3 + i % 3), "z" * (3 + (i + 1) % 3)) for i in of_split]
        write_pairs(folder / split, pairs)
