"""The document of `pedigree why --diff` -> one page: each answer that changed,
beside the records of the difference that are most like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster_project.core.text import listed, many, number
from dagster_project.views.html import render

MARKS = {True: ("fine", "✓ right"), False: ("bad", "✕ wrong"), None: ("", "")}


def why_diff_page(document: Mapping[str, Any]) -> str:
    """The page.

    Args:
        document: of `commands/why_diff.py`.
    """
    counts = ", ".join(f"{number(n)} {kind}" for kind, n in document["records"].items() if n) or "the same"
    wrong = sum(one["right"] == [True, False] for one in document["answers"])
    right = sum(one["right"] == [False, True] for one in document["answers"])
    figures = [
        ("answers that changed", number(document["changed"]), f"of {number(document['compared'])} recorded ones"),
        ("became wrong", number(wrong), f"of those shown; {number(right)} became right"),
        ("records", number(sum(document["records"].values())), counts),
    ]
    others = [f"{kind.replace('_', ' ')}: {listed(names, 12)}" for kind, names in document["also_differ"].items()]
    sections = {
        "Answers": [_answer(one) for one in document["answers"]],
        "Notes": [*(f"Also different, and not explained by records: {line}" for line in others), *document["notes"]],
    }
    before, after = ({"stage": one["stage"], "md5": one["md5"][:12]} for one in document["models"])
    return render(
        "why_diff.jinja",
        "Answers that changed, and records like them",
        sections,
        before=before,
        after=after,
        figures=figures,
    )


def _answer(one: Mapping[str, Any]) -> dict[str, Any]:
    sides = zip(("before", "after"), one["right"], strict=True)
    return {
        "prompt": one["prompt"],
        "category": one["category"] or "",
        "reference": one["reference"],
        "answers": [(name, *MARKS[right], one[name]) for name, right in sides],
        "among": many(one["among"], "record"),
        "records": [record_view(record) for record in one["records"]],
    }


def record_view(one: Mapping[str, Any]) -> dict[str, Any]:
    """A ranked record of a difference for the macro `record`."""
    return {
        "rank": one["rank"],
        "place": listed(one["rows"], 3),
        "chips": [f"score {one['score']:+.3f}", f"{one['kind']}, trained {one['trained']}", one["example_id"][:8]],
        "prompt": one.get("prompt", ""),
        "answer": one.get("answer", ""),
    }
