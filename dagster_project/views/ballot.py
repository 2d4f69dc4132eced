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
        }
        for pair in ballot["pairs"]
    ]
    data = {"ballot": ballot["ballot"], "pairs": pairs}
    return render("ballot.jinja", "Ballot", {"Vote": True, "Save": data}, "ballot.js", ballot=data)
