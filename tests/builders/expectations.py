"""Records and expectations of a data set, and a suite of them as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def record(prompt: str = "Where is my kite?", response: str = "On its way.", **more: Any) -> Record:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return {"source": "a.jsonl", "messages": messages, "category": None, "group_id": None, **more}


ROWS = [
    record("Where is my kite?", '{"category": "bug"}', category="bug", group_id="x"),
    record("Where is my red kite?", '{"category": "bug"}', category="bug", group_id="x"),
    record("风筝在哪里?", "[1, 2]", category="idea", group_id="y", source="b.jsonl"),
    record("Где мой змей", "{on its way}", group_id="z"),
]


def suite(folder: Path, *entries: Any, **more: Any) -> Path:
    path = folder / "suite.json"
    path.write_text(json.dumps({"name": "test", "expectations": list(entries), **more}), encoding="utf-8")
    return path


def expect(kind: str, severity: str = "warning", description: str | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "kwargs": kwargs,
        "severity": severity,
        **({"description": description} if description else {}),
    }


ODD = "<img src=x onerror=alert(1)>"
FAILING = [
    expect("expect_table_row_count_to_be_between", "critical", f"Ten rows {ODD}.", min_value=10),
    expect("expect_column_values_to_be_in_set", column="category", value_set=["bug"]),
    expect("expect_column_distinct_values_to_be_in_set", column="category", value_set=["bug"]),
    expect(
        "expect_column_mean_to_be_between", "info", "Four words or so.", column="prompt_words", min_value=3, max_value=5
    )
    | {"notes": ODD},
    expect("expect_column_pair_values_a_to_be_greater_than_b", column_A="turns", column_B="prompt_words"),
]
