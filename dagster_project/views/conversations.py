"""Messages of a record -> turns as the pages show them: role, text, and folded tools, calls and reasoning.

The macro `conversation` in templates/macros.jinja draws them, on every page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagster_project.core.messages import Message, calls, readable
from dagster_project.core.text import many

OPEN = 240
"""Characters up to which arguments and tool results are shown unfolded."""


@dataclass(frozen=True)
class Part:
    """A text that is shown on demand."""

    summary: str
    text: str
    is_open: bool = False


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: str
    notes: Sequence[str]
    """Name, id of the call that is answered, and side of a preference pair."""
    excluded: bool
    """Whether it is an assistant message of weight 0, which the loss does not count."""
    reasoning: Part | None
    text: str | Part
    """Long tool results are folded."""
    calls: Sequence[Part]


@dataclass(frozen=True)
class Conversation:
    summary: str
    tools: Part | None
    turns: Sequence[Turn]
    left_out: str = ""
    """How many messages are not shown."""


def conversation(record: Mapping[str, Any]) -> Conversation:
    """A record for the macro `conversation`.

    Args:
        record: `messages` in canonical form; optionally `tools` (canonical, or each
            {"name": ..., "definition": text}), `chosen` and `rejected` with the turns
            after the messages, and `left_out`, the number of messages that are missing.
    """
    tools, left_out = record.get("tools") or (), record.get("left_out", 0)
    turns = [_turn(message) for message in record["messages"]]
    turns += [_turn(message, side) for side in ("chosen", "rejected") for message in record.get(side) or ()]
    return Conversation(
        _summary(turns, tools), _tools(tools), turns, f"{many(left_out, 'more message')} not shown" if left_out else ""
    )


def _turn(message: Message, side: str = "") -> Turn:
    role, text, reasoning = message["role"], message["content"], message.get("reasoning_content")
    names = [message["name"]] if "name" in message else []
    answered = [f"answers {message['tool_call_id']}"] if "tool_call_id" in message else []
    return Turn(
        role,
        [*([side] if side else []), *names, *answered],
        role == "assistant" and message.get("weight") == 0,
        Part(f"reasoning, {many(len(reasoning), 'character')}", reasoning) if reasoning else None,
        Part(f"result, {many(len(text), 'character')}", text) if role == "tool" and len(text) > OPEN else text,
        [_call(call.name, call.arguments, call.identity) for call in calls(message)],
    )


def parts(message: Message) -> list[Part]:
    """The parts of a message other than text: its trace and its calls."""
    turn = _turn(message)
    return [*([turn.reasoning] if turn.reasoning else []), *turn.calls]


def _call(name: str, arguments: Any, identity: str | None) -> Part:
    text = readable(arguments)
    return Part(f"calls {name}" + (f" as {identity}" if identity else ""), text, len(text) <= OPEN)


def _tools(tools: Sequence[Mapping[str, Any]]) -> Part | None:
    if not tools:
        return None
    named = [
        (str(tool.get("name") or tool.get("function", {}).get("name")), tool.get("definition", tool)) for tool in tools
    ]
    return Part(
        f"{many(len(tools), 'tool')}: {', '.join(name for name, _ in named)}",
        "\n".join(readable(tool) for _, tool in named),
    )


def _summary(turns: Iterable[Turn], tools: Sequence[Mapping[str, Any]]) -> str:
    """ "user, assistant (reasoning, 2 calls), tool, tool, assistant; 3 tools"."""
    words = []
    for turn in turns:
        parts = ["reasoning"] if turn.reasoning else []
        parts += [many(len(turn.calls), "call")] if turn.calls else []
        parts += ["not in the loss"] if turn.excluded else []
        words.append(turn.role + (f" ({', '.join(parts)})" if parts else ""))
    return ", ".join(words) + (f"; {many(len(tools), 'tool')}" if tools else "")
