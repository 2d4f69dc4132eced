"""A question with the answers of all systems, as the comparison page reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster_project.core.messages import is_plain
from dagster_project.core.records import prompt_text
from dagster_project.training.inference.answers import Answer


def sample(record: Mapping[str, Any], answers: Mapping[str, Answer], marks: Mapping[str, float]) -> dict[str, Any]:
    """The texts of a question.

    Only where there is more than text: the `conversation` before the answer, and `messages` with traces or calls.
    """
    *prompt, response = record["messages"]
    tools = {"tools": record["tools"]} if record.get("tools") else {}
    rich = {name: answer.message for name, answer in answers.items() if answer.calls or answer.reasoning}
    return {
        "prompt": prompt_text(record["messages"]),
        "reference": response["content"],
        "category": record["category"],
        "answers": {name: (answer.content, marks[name]) for name, answer in answers.items()},
        **({"conversation": {"messages": prompt, **tools}} if tools or not is_plain(prompt) else {}),
        **({"reference_message": response} if not is_plain([response]) else {}),
        **({"messages": rich} if rich else {}),
    }
