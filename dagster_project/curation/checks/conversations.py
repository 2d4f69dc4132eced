"""Records with tools, calls, reasoning or weights -> the part of the check document that shows them, masked and
shortened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dagster_project.core.messages import Message, calls, is_plain, readable, tool_names
from dagster_project.curation.checks.privacy import mask

SHOWN, MESSAGES, WIDTH = 5, 40, 2_000
"""Records in a document, messages of each, and characters of each text."""

FEATURES: tuple[Callable[[Mapping[str, Any]], bool], ...] = (
    lambda record: any("tool_calls" in message for message in record["messages"]),
    lambda record: any("reasoning_content" in message for message in record["messages"]),
    lambda record: any("weight" in message for message in record["messages"]),
)
"""One record of each kind is shown, if there is any."""


def is_rich(record: Mapping[str, Any]) -> bool:
    """Whether a record has more than roles and texts."""
    return bool(record.get("tools")) or not is_plain(record["messages"]) or not is_plain(record.get("rejected") or ())


def chosen(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first record with calls, with reasoning and with weights, and further rich records up to SHOWN, in order."""
    first: dict[int, Mapping[str, Any]] = {}
    kinds: dict[int, int] = {}
    for i, record in enumerate(filter(is_rich, records)):
        found = [kind for kind, has in enumerate(FEATURES) if kind not in kinds and has(record)]
        kinds |= dict.fromkeys(found, i)
        if found or i < SHOWN:
            first[i] = record
    order = dict.fromkeys([*(kinds[kind] for kind in sorted(kinds)), *first])
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
        document["tools"] = [
            {"name": _shorten(name), "definition": _shorten(readable(tool))}
            for name, tool in zip(tool_names(tools), tools, strict=True)
        ]
    return document | ({"left_out": len(first) - MESSAGES} if len(first) > MESSAGES else {})


def _mask_message(message: Message) -> Message:
    """A message without secrets and personal data."""
    shown_message = {
        key: _shorten(value) if isinstance(value, str) else value
        for key, value in message.items()
        if key != "tool_calls"
    }
    if "tool_calls" in message:
        shown_message["tool_calls"] = [
            {
                **({} if call.identity is None else {"id": _shorten(call.identity)}),
                "function": {"name": _shorten(call.name), "arguments": _shorten(readable(call.arguments))},
            }
            for call in calls(message)[:MESSAGES]
        ]
    return shown_message


def _shorten(text: str) -> str:
    masked = mask(str(text)[: 10 * WIDTH])
    return masked if len(masked) <= WIDTH else f"{masked[:WIDTH]} …"
