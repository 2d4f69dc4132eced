"""The canonical message.

In addition to `role` and `content` it may have reasoning, tool calls, the id of a tool result, a name and a loss
weight.

    {"role": "assistant", "content": "", "reasoning_content": "I need the weather.", "tool_calls":
        [{"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}
    {"role": "tool", "content": "-3", "tool_call_id": "call_1", "name": "weather"}
    {"role": "assistant", "content": "It is cold.", "weight": 0}

Keys that a source does not fill are absent, so a plain message has just `role` and `content`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]] | None
"""Definitions of the functions that the assistant may call, in OpenAI's form:
[{"type": "function", "function": {"name": ..., ...}}]."""

FIELDS = ("reasoning_content", "tool_calls", "tool_call_id", "name", "weight")
"""Optional keys of a message, in their order."""

_FIELDS = frozenset(FIELDS)

JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
"""Keeps the order of keys, because a chat template writes arguments in their order."""


class Call(NamedTuple):
    """A call of a tool by the assistant."""

    name: str
    arguments: Any
    """An object, or the text of the source where that is not JSON."""
    identity: str | None


def is_plain(messages: Messages) -> bool:
    """Whether no message has any of the optional keys."""
    return all(map(_FIELDS.isdisjoint, messages))


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether a message contributes to the loss: the assistant's, unless its weight is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def calls(message: Mapping[str, Any]) -> list[Call]:
    """The tool calls of a message, in order."""
    return [
        Call(call["function"]["name"], call["function"]["arguments"], call.get("id"))
        for call in message.get("tool_calls") or ()
    ]


def readable(value: Any) -> str:
    """A call's arguments or a tool's definition for display: text as it is, all else as JSON, indented if long."""
    if isinstance(value, str):
        return value
    try:
        line = json.dumps(value, ensure_ascii=False)
        return line if len(line) <= 100 else json.dumps(value, ensure_ascii=False, indent=1)
    except RecursionError:
        return "(nested too deeply to be shown)"


def tool_names(tools: Tools) -> list[str]:
    return [str(tool.get("function", tool).get("name")) for tool in tools or ()]


def identity_parts(messages: Messages, tools: Tools = None) -> list[Any]:
    """Everything in a conversation that affects training, for its content hash.

    A plain message gives [role, content], one with further fields [role, content, {field: value}]; tools follow as an
    object.
    """
    parts: list[Any] = []
    for message in messages:
        more = {} if _FIELDS.isdisjoint(message) else {field: message[field] for field in FIELDS if field in message}
        parts.append([message["role"], message["content"], *([more] if more else [])])
    return [*parts, {"tools": list(tools)}] if tools else parts


def stored(messages: Messages) -> list[Message]:
    """Messages as Parquet stores them: tool calls as JSON, because arguments have no fixed schema."""
    return [
        {**message, "tool_calls": JSON.encode(message["tool_calls"])} if "tool_calls" in message else message
        for message in messages
    ]


def loaded(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """The inverse of `stored`; columns that are null become absent keys."""
    rows = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for row in rows:
        if "tool_calls" in row:
            row["tool_calls"] = json.loads(row["tool_calls"])
    return rows


def field_texts(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, text) of everything in a message that may contain personal data.

    content "It is cold."                    ->  ("content", "It is cold.")
    a call of weather with {"city": "Oslo"}  ->  ("tool_calls", '{"city":"Oslo"}')
    """
    yield "content", message["content"]
    if reasoning := message.get("reasoning_content"):
        yield "reasoning_content", reasoning
    for call in calls(message):
        yield "tool_calls", call.arguments if isinstance(call.arguments, str) else JSON.encode(call.arguments)


def full_text(messages: Messages) -> str:
    """All texts of a conversation: contents, reasoning and arguments, in order."""
    return "\n".join(text for message in messages for _, text in field_texts(message))


def argument_texts(arguments: Any) -> Iterator[tuple[str, str | int | float]]:
    """(key, value) of each text and number in the arguments of a call, in order; what is not JSON is one text.

    {"city": "Oslo", "days": [1, 2]}  ->  ("city", "Oslo"), ("days", 1), ("days", 2)
    """
    pending: list[tuple[str, Any]] = [("", arguments)]
    while pending:  # a stack, because JSON may be nested deeper than Python's calls
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(str(name), one) for name, one in reversed(value.items())]
        elif isinstance(value, list):
            pending += [(key, one) for one in reversed(value)]
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            yield key, value


def conversation_text(messages: Messages, tools: Tools = None) -> str:
    """All that the model reads: definitions of tools, then of each message reasoning, content, and calls as JSON."""
    parts = [JSON.encode(list(tools))] if tools else []
    for message in messages:
        made = [JSON.encode({"name": call.name, "arguments": call.arguments}) for call in calls(message)]
        if message.get("reasoning_content"):
            parts.append(message["reasoning_content"])
        if message["content"] or not made:
            parts.append(message["content"])
        parts += made
    return "\n".join(parts)
