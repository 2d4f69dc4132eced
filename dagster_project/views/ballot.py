"""A ballot -> one HTML page for blind votes between two answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster_project.core.text import visible
from dagster_project.views.conversations import Part, conversation, parts
from dagster_project.views.html import render


def ballot_page(ballot: Mapping[str, Any]) -> str:
    """One HTML file that takes votes by keyboard or mouse and saves them to a file.

    It does not contain the names of the systems.

    Args:
        ballot: `evaluation.ballots.document`.
    """
    pairs = [
        {
            "id": pair["id"],
            "prompt": [[visible(message["role"]), visible(message["content"])] for message in pair["prompt"]],
            "answers": [visible(answer) for answer in pair["answers"]],
            **_folded(pair),
        }
        for pair in ballot["pairs"]
    ]
    data = {"ballot": ballot["ballot"], "seal": ballot["seal"], "pairs": pairs}
    return render("ballot.jinja", "Ballot", {"Vote": True, "Save": data}, "ballot.js", ballot=data)


def _folded(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Tools, traces and calls as [summary, text, whether it is open]: of each
    message of the prompt, and of both answers."""
    asked = conversation({"messages": pair["prompt"], "tools": pair.get("tools")})
    prompt = [[asked.tools] if asked.tools else [], *(parts(message) for message in pair["prompt"])]
    answers = [parts(message) for message in pair.get("messages", ())]
    if not any([*prompt, *answers]):
        return {}
    return {
        "folds": {
            name: [[_texts(part) for part in some] for some in each]
            for name, each in (("prompt", prompt), ("answers", answers))
        }
    }


def _texts(part: Part) -> list[Any]:
    return [visible(part.summary), visible(part.text), part.is_open]
