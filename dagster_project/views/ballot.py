"""A ballot -> one HTML page for blind votes between two answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster_project.core.text import visible
from dagster_project.views.html import render


def ballot_page(ballot: Mapping[str, Any]) -> str:
    """One HTML file that takes votes by keyboard or mouse and saves them to a file. It does not contain the names of the systems.

    Args:
        ballot: `evaluation.ballots.document`.
    """
    pairs = [
        {
            "id": pair["id"],
            "prompt": [[visible(message["role"]), visible(message["content"])] for message in pair["prompt"]],
            "answers": [visible(answer) for answer in pair["answers"]],
            **({"folds": _visible(pair["folds"])} if "folds" in pair else {}),
        }
        for pair in ballot["pairs"]
    ]
    data = {"ballot": ballot["ballot"], "pairs": pairs}
    return render("ballot.jinja", "Ballot", {"Vote": True, "Save": data}, "ballot.js", ballot=data)


def _visible(folds: Mapping[str, Any]) -> dict[str, Any]:
    """Titles and texts of folded parts, of the prompt and of both answers."""
    prompt, *answers = ([[visible(title), visible(text)] for title, text in parts] for parts in (folds["prompt"], *folds["answers"]))
    return {"prompt": prompt, "answers": answers}
