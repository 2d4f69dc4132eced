"""The document of `pedigree why --suspects` -> one page: records whose
gradients do not fit those of the others, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster_project.core.text import many, number, place_text
from dagster_project.views.html import render


def suspects_page(document: Mapping[str, Any]) -> str:
    """The page.

    Args:
        document: of `commands/why_suspects.py`.
    """
    model, written = document["model"], document["queue"]
    figures = [
        ("records", number(document["records"]), "that the model was trained on"),
        ("to look at", number(len(document["suspects"])), "of them, the most suspect first"),
        ("queue", number(written["records"]) if written else "none", written["file"] if written else "not written"),
    ]
    sections = {"Suspects": [suspect_row(one) for one in document["suspects"]], "Notes": document["notes"]}
    return render(
        "suspects.jinja",
        f"Records of {model['stage']} to look at",
        sections,
        stage=model["stage"],
        md5=model["md5"],
        figures=figures,
    )


def suspect_row(one: Mapping[str, Any]) -> dict[str, Any]:
    """A record as templates print it."""
    group, opposed, length = one["group"], one["opposition"], one["length"]
    harm = []
    if "harm" in one:
        harm = [f"harm to validation answers {one['harm']['value']:.4g}, rank {one['harm']['rank']}"]
    return {
        "rank": one["rank"],
        "place": place_text(one["source"], one["source_row"]),
        "chips": [
            f"score {one['score']:.5f}",
            f"opposition {opposed['value']:.4g}, rank {opposed['rank']}",
            f"length {length['value']:.4g}, rank {length['rank']}",
            *harm,
            one["example_id"][:8],
        ],
        "group": f"cosine {group['cosine']:+.3f} with {many(group['records'] - 1, 'other')}: {group['name']}",
        "prompt": one["prompt"],
        "answer": one["answer"],
    }
