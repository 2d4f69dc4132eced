"""Records with tools, calls, reasoning or weights -> the part of the check document with them, masked and shortened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from dagster_project.core.messages import Call, Message, calls, is_plain, readable, tool_names
from dagster_project.curation.checks.privacy import mask

SHOWN, MESSAGES, WIDTH = 5, 40, 2_000
"""Records in a document, messages of each, and characters of each text."""

FEATURES = ("tool_calls", "reasoning_content", "weight")
"""One record with each of these fields of messages is shown, if there is any."""


def is_rich(record: Mapping[str, Any]) -> bool:
    """Whether a record has more than roles and texts."""
    return bool(record.get("tools")) or not is_plain(record["messages"]) or not is_plain(record.get("rejected") or ())


def chosen(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first record with calls, with reasoning and with weights, and further rich records up to SHOWN, in order."""
    first: dict[int, Mapping[str, Any]] = {}
    examples: dict[str, int] = {}
    for i, record in enumerate(filter(is_rich, records)):
        fields = {*chain.from_iterable(record["messages"])}
        new = [field for field in FEATURES if field in fields and field not in examples]
        examples |= dict.fromkeys(new, i)
        if new or i < SHOWN:
            first[i] = record
    order = dict.fromkeys([*(examples[field] for field in FEATURES if field in examples), *first])
    return [first[i] for i in sorted(list(order)[:SHOWN])]


def shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """The messages of a record, in canonical form, except that arguments are text.

    For a preference pair `messages` is the prompt; `chosen` and `rejected` follow. `left_out` counts messages that are
    not in the document.
    """
    messages, prompt = record["messages"], record.get("asked")
    prompt = len(messages) if prompt is None else prompt
    first = messages[:prompt]
    document: dict[str, Any] = {"messages": [_mask_message(message) for message in first[:MESSAGES]]}
    if "rejected" in record:
        sides = {"chosen": messages[prompt:], "rejected": record["rejected"]}
        document |= {side: [_mask_message(message) for message in turns[:MESSAGES]] for side, turns in sides.items()}
    if record.get("tools"):
        tools = record["tools"][:MESSAGES]
        named = zip(tool_names(tools), tools, strict=True)
        document["tools"] = [{"name": _shorten(name), "definition": _shorten(readable(tool))} for name, tool in named]
    if len(first) > MESSAGES:
        document["left_out"] = len(first) - MESSAGES
    return document


def _mask_message(message: Message) -> Message:
    """A message without secrets and personal data."""
    masked = {key: _shorten(value) if isinstance(value, str) else value for key, value in message.items()}
    if "tool_calls" in masked:
        del masked["tool_calls"]  # comes last
        masked["tool_calls"] = [_mask_call(call) for call in calls(message)[:MESSAGES]]
    return masked


def _mask_call(call: Call) -> dict[str, Any]:
    function = {"name": _shorten(call.name), "arguments": _shorten(readable(call.arguments))}
    return {"function": function} if call.identity is None else {"id": _shorten(call.identity), "function": function}


def _shorten(text: str) -> str:
    masked = mask(str(text)[: 10 * WIDTH])
    return masked if len(masked) <= WIDTH else f"{masked[:WIDTH]} …"
