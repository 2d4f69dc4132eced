"""A message of a source -> the canonical message (core/messages.py), and the keys of it that are not used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.core.messages import Message
from dagster_project.curation.sources import tools

Messages = list[Message]
Parsed = tuple[Message, tuple[str, ...]]
"""A canonical message, and the keys of the source that are not in it."""


class UnsupportedContent(ValueError):
    """Content that a text model cannot be trained on: images, sound, video, files."""


ROLES = {
    "function": "tool", "developer": "system", "model": "assistant", "bot": "assistant", "ai": "assistant",
    "human": "user",
}  # fmt: skip
"""Role of a source -> canonical role. Others are unchanged."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TRAIN_KEYS = ("weight", "train", "training", "train_on_turn", "loss")
"""Keys that say whether the loss counts a message: 0 or 1, false or true."""
MEDIA = {
    "image": "image", "images": "image", "image_url": "image", "input_image": "image", "audio": "audio",
    "audio_url": "audio", "input_audio": "audio", "video": "video", "video_url": "video", "videos": "video",
    "file": "file", "input_file": "file", "files": "file", "document": "file",
}  # fmt: skip
"""Type of a content part, or key of a message -> kind of content."""
ORDER_OF_CALLS = "order of text and calls"
"""Reported as an ignored field where a message has text after a call: chat templates write text before calls."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that say nothing. 0 and false are not among them."""
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


def as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {type(value).__name__}")
    return value


def as_turns(system: Any, *turns: tuple[str, str]) -> Messages:
    """Messages of (role, content), after the system prompt if there is one."""
    first = [] if system in EMPTY else [{"role": "system", "content": as_text(system)}]
    return first + [{"role": role, "content": content} for role, content in turns]


def read_message(message: Any) -> Parsed:
    """A message in OpenAI's form.

    Raises KeyError or ValueError if it is not one, UnsupportedContent for images and the like.
    """
    if type(message) is dict and len(message) == 2:
        role, content = message.get("role"), message.get("content")
        if type(role) is str and type(content) is str and role not in ROLES:
            return {"role": role, "content": content}, ()
    if not isinstance(message, dict):
        raise ValueError(f"expected a message, found {type(message).__name__}")
    rest = dict(message)
    role = as_text(rest.pop("role"))
    role = ROLES.get(role, role)
    unused: list[str] = []
    for key in [key for key in rest if key in MEDIA]:  # in their order: that of a set differs between processes
        if rest.pop(key) not in (None, "", [], {}):
            raise UnsupportedContent(f"{MEDIA[key]} in a message")
    calls = _calls(rest, unused)
    if calls and role != "assistant":
        raise ValueError("tool calls in a message that is not the assistant's")
    content, thought = _content(rest, role, bool(calls), unused)
    if thought and role != "assistant":
        raise ValueError("a part with reasoning in a message that is not the assistant's")
    found: Message = {"role": role, "content": content}
    if role == "assistant" and (trace := _reasoning(rest, thought)):
        found["reasoning_content"] = trace
    if calls:
        found["tool_calls"] = calls
    if role == "tool" and (identity := rest.pop("tool_call_id", None)) not in (None, ""):
        found["tool_call_id"] = str(identity) if isinstance(identity, int) else as_text(identity)
    if (name := rest.pop("name", None)) not in (None, ""):
        found["name"] = as_text(name)
    if _weight(rest, role) == 0:
        found["weight"] = 0.0
    return found, (*rest, *unused)


def _calls(rest: dict[str, Any], unused: list[str]) -> list[dict[str, Any]]:
    """Calls in `tool_calls` or in `function_call`, the older key for one call."""
    found: list[dict[str, Any]] = []
    for key in ("tool_calls", "function_call"):
        if (value := rest.pop(key, None)) in (None, "", [], {}):
            continue
        if found:
            raise ValueError("both tool_calls and function_call")
        if key == "function_call" and not isinstance(value, dict | str):
            raise ValueError(f"function_call must be one call, found {type(value).__name__}")
        found, more = tools.calls(value)
        unused += more
    return found


def _content(rest: dict[str, Any], role: str, calling: bool, unused: list[str]) -> tuple[str, str]:
    """The text of a message, and a trace that is a part of its content.

    The text of a refusal (OpenAI's key `refusal`) counts as content if there is no other.
    """
    value = rest.pop("content", None) if calling or "refusal" in rest else rest.pop("content")
    if value is None and isinstance(rest.get("refusal"), str):
        value = rest.pop("refusal")
    if value is None and calling:
        return "", ""
    if isinstance(value, list):
        return _joined(value, unused)
    if isinstance(value, dict) and role == "tool":
        return tools.result_text(value), ""
    return as_text(value), ""


def part_type(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the type of a content part must be text, found {type(value).__name__}")
    return value


def _joined(parts: Sequence[Any], unused: list[str]) -> tuple[str, str]:
    """Text parts joined as a chat template joins them, without a separator, and parts with reasoning."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise ValueError(f"expected a content part, found {type(part).__name__}")
        kind = part_type(part.get("type") or "text")
        if kind in MEDIA:
            raise UnsupportedContent(f"{MEDIA[kind]} in a message")
        if kind in TEXT_PARTS:
            texts.append(as_text(part["text"]))
        elif kind == "thinking" and isinstance(part.get("thinking"), str | list):
            if texts:
                raise ValueError("a part with reasoning after text")
            inner = part["thinking"]
            thoughts += [inner] if isinstance(inner, str) else _joined(inner, unused)
        else:
            raise ValueError("a content part that is neither text nor reasoning")
        used = {"type", "text" if kind in TEXT_PARTS else "thinking"}
        unused += [f"content[].{key}" for key, value in part.items() if key not in used and value not in (None, "")]
    return "".join(texts), "".join(thoughts)


def _reasoning(rest: dict[str, Any], thought: str) -> str:
    """The trace of a message; an empty one is none."""
    traces = [thought] if thought.strip() else []
    for key in REASONING_KEYS:
        if (value := rest.pop(key, None)) is not None and as_text(value).strip() and value not in traces:
            traces.append(value)
    if len(traces) > 1:
        raise ValueError("two different traces of reasoning in one message")
    return traces[0] if traces else ""


def _weight(rest: dict[str, Any], role: str) -> int:
    """1, or 0 where the source says that the loss does not count the assistant's message.

    Turns of others are not trained on. A key that says they are is left in `rest`, and so reported.
    """
    weights = set()
    for key in TRAIN_KEYS:
        value = rest.get(key)
        if value is not None:
            if not isinstance(value, bool | int | float):
                raise ValueError(f"{key} must be 0 or 1, found {type(value).__name__}")
            if value not in (0, 1):
                found = f", found {value:g}" if abs(value) < 1e9 else ""
                raise ValueError(f"{key} must be 0 or 1{found}")
            weights.add(int(value))
        if role == "assistant" or not value:
            rest.pop(key, None)
    if len(weights) > 1:
        raise ValueError("keys that say both that a message is trained on and that it is not")
    return weights.pop() if weights and role == "assistant" else 1


SHAREGPT_ROLES = {
    **ROLES, "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant", "observation": "tool",
}  # fmt: skip


def read_turn(turn: Any) -> Parsed:
    """A ShareGPT turn, {"from": "gpt", "value": "Hello"}. A `function_call` turn holds calls as JSON."""
    if type(turn) is dict and len(turn) == 2:
        who, value = turn.get("from"), turn.get("value")
        if type(who) is str and type(value) is str and who != "function_call":
            return {"role": SHAREGPT_ROLES.get(who, who), "content": value}, ()
    if not isinstance(turn, dict):
        raise ValueError(f"expected a turn, found {type(turn).__name__}")
    # in a table, every turn has the keys of all
    if turn.get("from") is None and (turn.get("role") is not None or ("from" not in turn and "role" in turn)):
        return read_message(turn)
    more = {key: value for key, value in turn.items() if key not in {"from", "value", "role", "content"}}
    role, value = SHAREGPT_ROLES.get(as_text(turn["from"]), turn["from"]), turn["value"]
    is_call = turn["from"] == "function_call" and value
    calling = {"content": None, "tool_calls": value} if is_call else {"content": value}
    unused = [key for key in ("role", "content") if key in turn]
    unused += [key for key in more if key in calling]  # further calls beside those in `value`
    message, others = read_message({**more, "role": role, **calling})
    return message, (*unused, *others)


def joined_calls(messages: Messages) -> Messages:
    """Consecutive turns that only call tools as one message with parallel calls. The first may have a trace."""
    found: Messages = []
    for message in messages:
        last = found[-1] if found else {}
        if _only_calls(last) and continues(last, message):
            found[-1] = with_calls(last, message)
        else:
            found.append(message)
    return found


def continues(last: Message, message: Message) -> bool:
    """Whether a message only calls tools, without a trace, and belongs to the assistant's message before it."""
    is_alike = all(message.get(key) == last.get(key) for key in ("role", "weight", "name"))
    return is_alike and _only_calls(message) and "reasoning_content" not in message


def with_calls(last: Message, message: Message) -> Message:
    """A message with the calls of one that continues it."""
    return {**last, "tool_calls": [*last.get("tool_calls", ()), *message["tool_calls"]]}


def _only_calls(message: Mapping[str, Any]) -> bool:
    return "tool_calls" in message and not message["content"]
