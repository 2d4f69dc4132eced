"""A question with the answers of all systems, for the comparison page: texts, and traces and calls as folded parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dagster_project.core.messages import Call, Messages, calls, tool_names
from dagster_project.core.records import prompt_text
from dagster_project.core.text import many
from dagster_project.training.inference.answers import Answer, of_message

Fold = tuple[str, str]
"""(title, text) of a part that is shown on demand."""


def sample(record: Mapping[str, Any], answers: Mapping[str, Answer], marks: Mapping[str, float]) -> dict[str, Any]:
    """A question as the comparison page reads it. `folds` has the parts of prompt, reference and answers other than text; it is absent if there are none."""
    *prompt, response = record["messages"]
    parts = {
        "prompt": prompt_folds(prompt, record.get("tools")),
        "reference": folds(of_message(response)),
        "answers": {name: found for name, answer in answers.items() if (found := folds(answer))},
    }
    return {
        "prompt": prompt_text(record["messages"]),
        "reference": response["content"],
        "category": record["category"],
        "answers": {name: (answer.content, marks[name]) for name, answer in answers.items()},
        **({"folds": parts} if any(parts.values()) else {}),
    }


def prompt_folds(messages: Messages, tools: Any) -> list[Fold]:
    """Tools, and the whole conversation where its text is not all that the model read."""
    found: list[Fold] = []
    if tools:
        found.append((f"{many(len(tools), 'tool')}: {', '.join(tool_names(tools))}", json.dumps(tools, indent=1, ensure_ascii=False)))
    if any(calls(message) or message["role"] == "tool" or message.get("reasoning_content") for message in messages):
        found.append((f"{many(len(messages), 'message')} before the answer", "\n\n".join(map(_message_text, messages))))
    return found


SHORT = 80
"""Characters of a call's arguments in its title."""


def folds(answer: Answer) -> list[Fold]:
    """The trace and the calls of an answer."""
    trace = [(f"trace, {many(len(answer.reasoning.split()), 'word')}", answer.reasoning)] if answer.reasoning else []
    return [*trace, *((_call_title(call), _arguments(call.arguments, indent=1)) for call in answer.calls)]


def _call_title(call: Call) -> str:
    arguments = " ".join(_arguments(call.arguments).split())
    return f"call of {call.name or '(unreadable)'}: {arguments if len(arguments) <= SHORT else arguments[: SHORT - 1] + '…'}"


def _message_text(message: Mapping[str, Any]) -> str:
    answer = of_message(message)
    trace = [f"[trace] {answer.reasoning}"] if answer.reasoning else []
    made = [f"[call of {call.name}] {_arguments(call.arguments)}" for call in answer.calls]
    return f"{message['role']}: " + "\n".join([*trace, *([answer.content] if answer.content else []), *made])


def _arguments(arguments: Any, indent: int | None = None) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, indent=indent, ensure_ascii=False)
