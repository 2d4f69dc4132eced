"""Preference pairs as the stage `preferences` writes them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from dagster_project.core.records import example_id

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
