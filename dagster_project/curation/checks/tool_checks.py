"""Records -> faults in their tool calls, results, reasoning and weights. Each check is one object in `TOOL_CHECKS`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagster_project.core.messages import JSON, Call, Message, calls, is_trained
from dagster_project.core.text import many
from dagster_project.core.tool_schemas import ArgumentsSchema, arguments_schema
from dagster_project.curation.checks.check import Check, DataSet, Rows, is_true, kinds
from dagster_project.curation.checks.damage import visible
from dagster_project.curation.checks.privacy import mask

SHOWN = 120
"""Characters shown of a fault in a call."""
_TEXT_CALL = re.compile(r"\{|<\|?\w*call|\w\(|\bAction:")
"""An assistant turn that calls a tool in its text, because some layouts have no field for calls."""


# --- calls


def _invalid_calls(rows: Rows, _: str) -> list[str | None]:
    facts: list[str | None] = [None] * len(rows.records)
    validators: dict[str, ArgumentsSchema] = {}
    for i in rows.rich:
        facts[i] = _invalid_call(rows.records[i], validators)
    return facts


def _invalid_call(record: Mapping[str, Any], validators: dict[str, ArgumentsSchema]) -> str | None:
    """The first fault in a call that is trained on. The prompt and the rejected side of a pair may contain any."""
    messages = record["messages"]
    made = [call for message in messages[record.get("asked", 0) :] if is_trained(message) for call in calls(message)]
    if not made:
        return None
    defined = [tool.get("function", tool) for tool in record.get("tools") or () if isinstance(tool, dict)]
    tools = {str(one.get("name")): one.get("parameters") for one in defined if isinstance(one, dict)}
    system = "\n".join(message["content"] for message in messages if message["role"] in {"system", "developer"})
    return next((problem for call in made if (problem := _problem(call, tools, system, validators))), None)


def _problem(call: Call, tools: Mapping[str, Any], system: str, validators: dict[str, ArgumentsSchema]) -> str | None:
    if call.name not in tools:
        if tools:
            return _quote("unknown tool", call.name)
        if call.name not in system:  # a system prompt may define the tools in its text
            return _quote("no tools are defined", call.name)
    if not isinstance(call.arguments, dict):
        text = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments)
        return _quote("arguments are not a JSON object", text)
    if (parameters := tools.get(call.name)) is None:
        return None
    key = JSON.encode(parameters)
    if key not in validators:
        validators[key] = arguments_schema(parameters)
    problem = validators[key].problem(call.arguments)
    return problem and f"{problem[0]}: {call.name}: {_excerpt(problem[1])}"


def _quote(kind: str, text: str) -> str:
    return f"{kind}: '{_excerpt(text)}'"


def _excerpt(text: str) -> str:
    shown = visible(mask(text[: 20 * SHOWN]))
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"


# --- results


@dataclass
class _Unmatched:
    """Calls without a result, and results without a call."""

    calls: list[str] = field(default_factory=list)
    """Names of the tools."""
    results: list[str] = field(default_factory=list)
    """Identification of each result: its id, else its content."""


def unmatched(messages: Sequence[Message]) -> _Unmatched:
    """Match results with calls: by id if both have one, else in order among the calls of the last assistant turn.

    Calls of the last message have no result yet. A result after a turn that calls a tool in its text is matched.
    """
    found = _Unmatched()
    by_id: list[Call] = []  # calls of earlier turns that may still get their result
    last: list[Call] = []  # unanswered calls of the last assistant turn
    called_in_text = False
    for message in messages:
        if message["role"] == "assistant":
            by_id += last
            last = calls(message)
            called_in_text = not last and _TEXT_CALL.search(message["content"]) is not None
        elif message["role"] == "tool":
            identity = message.get("tool_call_id")
            named = [call for call in (*last, *reversed(by_id)) if identity is not None and call.identity == identity]
            named = named[:1] or [call for call in last if identity is None or call.identity is None][:1]
            if named:
                pending = last if any(call is named[0] for call in last) else by_id
                pending[:] = [call for call in pending if call is not named[0]]
            elif not called_in_text:
                found.results.append(f"id {identity}" if identity is not None else message["content"])
    ends = messages and messages[-1]["role"] == "assistant"
    found.calls = [call.name for call in (*by_id, *([] if ends else last))]
    return found


def _unmatched(rows: Rows) -> dict[int, _Unmatched]:
    """Index -> unmatched calls and results, for records that have any."""
    rich = {*rows.rich}
    found = {}
    for i, record in enumerate(rows.records):
        if i in rich or any(message["role"] == "tool" for message in record["messages"]):
            found[i] = unmatched(record["messages"])
    return found


def _unanswered(rows: Rows, _: str) -> list[str | None]:
    facts: list[str | None] = [None] * len(rows.records)
    for i, found in rows.shared(_unmatched).items():
        if found.calls:
            facts[i] = _quote("no result", found.calls[0])
    return facts


def _results_without_call(rows: Rows, _: str) -> list[str | None]:
    facts: list[str | None] = [None] * len(rows.records)
    for i, found in rows.shared(_unmatched).items():
        if found.results:
            facts[i] = _quote("answers no call", found.results[0])
    return facts


# --- reasoning and weights


WITH, WITHOUT = 1, 2
"""Values of the feature `reasoning`: an answer has reasoning; there is an answer, and none has. 0 for rows without
answers."""


def has_reasoning(record: Mapping[str, Any]) -> bool:
    """Whether an answer that is trained on has reasoning."""
    answers = (message for message in _trained_messages(record) if message["role"] == "assistant")
    return any((message.get("reasoning_content") or "").strip() for message in answers)


def has_answer(record: Mapping[str, Any]) -> bool:
    return "labelled" not in record and any(message["role"] == "assistant" for message in _trained_messages(record))


def _trained_messages(record: Mapping[str, Any]) -> Sequence[Message]:
    return record["messages"][record.get("asked", 0) :]


def _reasoning_counts(data: DataSet) -> tuple[int, int]:
    """Number of rows with reasoning in an answer, and of those without; 0 and 0 if no row has any."""
    column = data.features.table["reasoning"]
    reasons = int((column == WITH).sum())
    return (reasons, int((column == WITHOUT).sum())) if reasons else (0, 0)


def _mixed_reasoning(data: DataSet, _: str) -> dict[int, str]:
    """In a set in which some rows have reasoning, the minority: those with, or without if the numbers are equal."""
    reasons, without = data.shared(_reasoning_counts)
    if not reasons:
        return {}
    fewer, fact = (WITHOUT, "no reasoning") if without <= reasons else (WITH, "reasoning")
    return dict.fromkeys((data.features.table["reasoning"] == fewer).arg_true().to_list(), fact)


def _mixed_note(data: DataSet, facts: Sequence[str]) -> list[str]:
    reasons, without = data.shared(_reasoning_counts)
    traced = many(reasons, "row has reasoning", "rows have reasoning")
    return [f"{traced}, {many(without, 'has none', 'have none')}"] if facts else []


def _is_trained(record: Mapping[str, Any]) -> bool:
    said = [message for message in record["messages"] if message["role"] == "assistant"]
    return not said or "rejected" in record or any(map(is_trained, said))


def _trained(rows: Rows, _: str) -> list[bool]:
    facts = [True] * len(rows.records)
    for i in rows.rich:
        facts[i] = _is_trained(rows.records[i])
    return facts


TOOL_CHECKS: tuple[Check, ...] = (
    Check(
        "invalid_tool_call",
        "Every call names a tool of the row, and its arguments fit the tool's JSON Schema.",
        "error",
        "Correct the call or the tool's definition; give a call that must not be trained on the weight 0.",
        column=_invalid_calls,
        quotes=True,
        note=kinds,
    ),
    Check(
        "unanswered_tool_call",
        "Every call has its result before the conversation continues.",
        "error",
        "Add the result, or end the conversation with the call.",
        column=_unanswered,
        quotes=True,
    ),
    Check(
        "orphan_tool_result",
        "Every tool result answers a call.",
        "error",
        "Add the call as `tool_calls`, or remove the result; compare the ids.",
        column=_results_without_call,
        quotes=True,
    ),
    Check(
        "untrained_example",
        "Every conversation has an answer whose weight is not 0.",
        "warn",
        "Nothing to do: the row has no effect on training. To train on it, give an answer another weight.",
        column=_trained,
        holds=is_true,
        kind="examples",
    ),
    Check(
        "missing_reasoning",
        "Either all rows have reasoning, or none has.",
        "warn",
        "Add reasoning to the rows without, or train two models; a model trained on a mixed set reasons at random.",
        "warn",
        of_set=_mixed_reasoning,
        note=_mixed_note,
    ),
)
"""In the order of evaluation."""
