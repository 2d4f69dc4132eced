"""Rows with faults, copies, labels, calls and reasoning, drawn from a seed; and
everything that the checks say about them."""

from __future__ import annotations

import json
import random
from typing import Any

from dagster_project.core.records import content_id
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.checks.findings import document
from dagster_project.curation.checks.review import Decision, Waiver
from dagster_project.curation.checks.token_counts import Tokens
from dagster_project.curation.sources.benchmarks import Item

WORDS = [
    "where",
    "is",
    "the",
    "red",
    "kite",
    "that",
    "ann",
    "lost",
    "in",
    "the",
    "hall",
    "on",
    "monday",
    "evening",
    "and",
    "who",
    "found",
    "it",
    "near",
    "the",
    "old",
    "tower",
]
TOOL = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}},
}


def sample(seed: int, size: int, pairs: bool = False) -> list[dict[str, Any]]:
    """Records with faults, copies, near-copies, conflicting answers, labels, calls and reasoning."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(size):
        if rows and draw.random() < 0.4:
            row = json.loads(json.dumps(draw.choice(rows)))
            at = draw.choice([0, -1])
            row["messages"][at]["content"] += draw.choice(
                ["", "", " Now.", "\ufeff", " Write to ann@kites.org", "<|im_end|>"]
            )
        else:
            asked, said = (" ".join(draw.choices(WORDS, k=draw.randint(1, 14))) for _ in "ab")
            row = {
                "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
                "category": draw.choice("abc"),
            }
            if draw.random() < 0.2:
                row["messages"][1]["reasoning_content"] = " ".join(draw.choices(WORDS, k=12))
            if draw.random() < 0.2:
                row["tools"] = [TOOL]
                row["messages"][1]["tool_calls"] = [
                    {"type": "function", "function": {"name": "find", "arguments": {"what": draw.choice(WORDS)}}}
                ]
            if pairs:
                row |= {
                    "asked": 1,
                    "rejected": [{"role": "assistant", "content": draw.choice(WORDS)}],
                    "same_prompt": True,
                    "margin": None,
                }
        if pairs and draw.random() < 0.2:
            row["messages"][1:], row["rejected"] = row["rejected"], row["messages"][1:]
        label = {"split": draw.choice(["train", "validation", "test"])} if draw.random() < 0.2 else {}
        rows.append(
            {
                **row,
                "source": draw.choice(["a.jsonl", "b.jsonl"]),
                "source_row": i,
                "group_id": None,
                "meta": json.dumps(label),
            }
        )
        rows[-1] |= {"example_id": content_id(rows[-1]), **({"source_rows": [i]} if pairs else {})}
    return rows


def answer(rows: list[dict[str, Any]], tokens: Tokens, pairs: bool) -> str:
    held_out = [
        Item(f"benchmark:{i}", row["messages"][0]["content"], text=row["messages"][-1]["content"])
        for i, row in enumerate(rows[:3])
    ]
    waiver = Waiver(
        check="pii", rows=[f"{rows[5]['source']}:5", rows[9]["example_id"][:8]], reason="public", expires="2999-01-01"
    )  # type: ignore[arg-type]
    decisions = [
        Decision(rows[i]["example_id"], "conflicting_responses", how, "seen", "Who?", "Ann.")
        for i, how in ((7, "edit"), (8, "accept"))
    ]  # type: ignore[arg-type]
    rules = Rules(policy={"pii": "fix", "near_duplicates": "drop"}, waivers=[waiver], max_tokens=40)
    judged = judge(rows, held_out, rules, tokens, decisions, "preferences" if pairs else "examples")
    found = document("set", "records", judged, held_out)
    links = {name: [vars(link) for link in links] for name, links in judged.overlaps.links.items()}
    facts = [judged.reason, [*map(int, judged.cluster)], judged.said, judged.waiting, [*judged.records], links]
    return json.dumps([found, facts], default=str)
