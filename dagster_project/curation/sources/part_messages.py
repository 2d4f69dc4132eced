"""Messages of Gemini, Amazon Bedrock and Anthropic, whose content is a list of parts -> canonical messages.

A message of a user may hold the results of several tools and a text, each of which is a canonical message. So the
readers return {"messages": [...]}, and `spread` joins these lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dagster_project.core.messages import Message
from dagster_project.core.text import shortened
from dagster_project.curation.sources import tools
from dagster_project.curation.sources.message import (
    EMPTY,
    MEDIA,
    ORDER_OF_CALLS,
    ROLES,
    Messages,
    Parsed,
    UnsupportedContent,
    as_text,
    continues,
    part_type,
    read_message,
    with_calls,
)


class Part(NamedTuple):
    """One part of a message."""

    kind: str
    """`text`, `thought`, `call`, `result`, or empty for a part without content."""
    value: Any = None
    """Text, a canonical call, or the canonical message with a result."""


PartReader = Callable[[dict[str, Any], list[str]], Part]
"""Reads a part, and adds its keys that are not used to the list."""
NO_ANSWER = "reasoning that no message of the assistant follows"
NOT_TEXT = "a content part that is neither text nor reasoning"


def spread(found: Iterable[Mapping[str, Any]]) -> Messages:
    """All messages of several results of a reader."""
    return [message for one in found for message in one["messages"]]


def instruction_of(row: Mapping[str, Any], *keys: str) -> Messages:
    """The system prompt of a row under one of the keys, as text or as it was read. Its parts are paragraphs."""
    given = [row[key] for key in keys if row.get(key) not in EMPTY]
    if len(given) > 1:
        raise ValueError(f"both {' and '.join(keys)}")
    texts = [text for value in given for text in ([value] if isinstance(value, str) else _contents(value))]
    return [{"role": "system", "content": "\n\n".join(texts)}] if texts else []


def _contents(read: Any) -> list[str]:
    if not isinstance(read, list):
        raise ValueError(f"expected a system prompt, found {type(read).__name__}")
    return [message["content"] for message in spread(read)]


def _read(message: Any, key: str, read_part: PartReader) -> Parsed:
    """Args:
    key: of the list of parts.
    """
    rest = _object(message, "a message")
    given = rest.pop("role", None)
    role = "user" if given in EMPTY and key == "parts" else as_text(given)  # Gemini's contents need none
    role = ROLES.get(role, role)
    unused: list[str] = []
    parts = _parts(rest.pop(key), key, read_part, unused)
    if role != "assistant":
        return {"messages": _asked(role, parts)}, (*rest, *unused)
    found, more = _answer(rest, parts, key, unused)
    return {"messages": [found]}, (*more, *unused)


def _read_system(given: dict[str, Any], key: str, read_part: PartReader) -> Parsed:
    """A system prompt, with a message for each part."""
    unused: list[str] = []
    parts = [part for part in _parts(given.pop(key), key, read_part, unused) if part.kind]
    if any(part.kind != "text" for part in parts):
        raise ValueError("a system prompt with a part that is not text")
    given.pop("role", None)  # Gemini ignores it
    return {"messages": [{"role": "system", "content": part.value} for part in parts]}, (*given, *unused)


def _parts(value: Any, key: str, read_part: PartReader, unused: list[str]) -> list[Part]:
    if isinstance(value, str):
        return [Part("text", value)]
    given = [value] if isinstance(value, dict) else value
    if not isinstance(given, list):
        raise ValueError(f"{key} must be a list of parts, found {type(value).__name__}")
    parts = []
    for part in given:
        names: list[str] = []
        held = {name: one for name, one in _object(part, "a content part").items() if one is not None}
        parts.append(read_part(held, names))
        unused += [f"{key}[].{name}" for name in names]
    return parts


def _answer(
    rest: Mapping[str, Any], parts: Iterable[Part], key: str, unused: list[str]
) -> tuple[Message, Sequence[str]]:
    """The assistant's message, and its other keys that are not used."""
    found: dict[str, list[Any]] = {"text": [], "thought": [], "call": []}
    for part in parts:
        if part.kind == "result":
            raise ValueError("the result of a tool in a message of the assistant")
        if part.kind == "thought" and (found["text"] or found["call"]):
            raise ValueError("a part with reasoning after text")
        if part.kind == "text" and found["call"] and part.value.strip():
            unused.append(f"{key}[].{ORDER_OF_CALLS}")  # a message has its text before its calls
        if part.kind:
            found[part.kind].append(part.value)
    message: Message = {"role": "assistant", "content": "".join(found["text"])}
    if found["thought"]:
        message["reasoning_content"] = "".join(found["thought"])
    if found["call"]:
        message["tool_calls"] = found["call"]
    unused += [name for name in rest if name in message]
    return read_message({**rest, **message})


def _asked(role: str, parts: Iterable[Part]) -> Messages:
    """The messages of a user, in the order of the parts: texts, and results of tools."""
    found: Messages = []
    for part in parts:
        if part.kind == "call":
            raise ValueError("tool calls in a message that is not the assistant's")
        if part.kind == "thought":
            raise ValueError("a part with reasoning in a message that is not the assistant's")
        if part.kind == "result":
            found.append(part.value)
        elif part.kind and found and found[-1]["role"] == role != "tool":
            found[-1] = {**found[-1], "content": found[-1]["content"] + part.value}
        elif part.kind:
            found.append({"role": role, "content": part.value})
    return found or [{"role": role, "content": ""}]


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected {name}, found {type(value).__name__}")
    return dict(value)


def _call(given: dict[str, Any], arguments: str, identity: str) -> Part:
    """Args:
    given: a call, from which the keys that are used are removed.
    arguments, identity: keys of the call.
    """
    call = {"name": given.pop("name", None), "arguments": given.pop(arguments, None), "id": given.pop(identity, None)}
    return Part("call", tools.calls(call)[0][0])


def _result(content: Any, identity: Any, name: Any = None) -> Part:
    text = "" if content is None else tools.result_text(content)
    return Part("result", read_message({"role": "tool", "content": text, "tool_call_id": identity, "name": name})[0])


def _held(key: str, given: Mapping[str, Any]) -> list[str]:
    return [f"{key}.{name}" for name, value in given.items() if value not in EMPTY]


# --- Gemini
# ---------------------------------------------------------------------------------------------------------------------

GEMINI_CONTENTS = (
    "text", "functionCall", "functionResponse", "inlineData", "fileData", "executableCode", "codeExecutionResult",
)  # fmt: skip
"""Keys of a part for its content; it has one of them."""


def read_content(content: Any) -> Parsed:
    """A message in Gemini's form: {"role": "model", "parts": [{"text": "Hello"}]}"""
    return _read(content, "parts", _gemini_part)


def read_gemini_instruction(content: Any) -> Parsed:
    return _read_system(_object(content, "a system instruction"), "parts", _gemini_part)


def read_completion(given: Any) -> Parsed:
    """A completion of Gemini's preference tuning: {"score": 1, "completion": {"role": "model", "parts": [...]}}"""
    rest = _object(given, "a completion")
    score = rest.pop("score")
    found, unused = read_content(rest.pop("completion"))
    return {**found, "score": score}, (*rest, *(f"completion[].{name}" for name in unused))


def _gemini_part(part: dict[str, Any], unused: list[str]) -> Part:
    """Keys may be in snake case, too, as Python's client writes them."""
    names = {re.sub("_([a-z])", lambda found: found[1].upper(), key): key for key in part}
    kinds = [kind for kind in GEMINI_CONTENTS if kind in names]
    if len(kinds) > 1 or len(names) < len(part):
        raise ValueError(f"a content part with several contents: {', '.join(part)}")
    kind = kinds[0] if kinds else ""
    value = part[names.pop(kind)] if kind else None
    thought = kind == "text" and "thought" in names and part[names.pop("thought")] is True
    unused += [name for name in names.values() if part[name] not in (*EMPTY, False)]
    if kind in {"inlineData", "fileData"}:
        held = _object(value, kind)
        medium = str(held.get("mimeType", held.get("mime_type"))).partition("/")[0]
        raise UnsupportedContent(f"{MEDIA.get(medium, 'file')} in a message")
    if kind in {"executableCode", "codeExecutionResult"}:
        raise ValueError(NOT_TEXT)
    if kind in {"functionCall", "functionResponse"}:
        given = _object(value, kind)
        found = (
            _call(given, "args", "id")
            if kind == "functionCall"
            else _result(given.pop("response", None), given.pop("id", None), given.pop("name", None))
        )
        unused += _held(kind, given)
        return found
    return Part("thought" if thought else "text", as_text(value)) if kind else Part("")


# --- Amazon Bedrock
# ---------------------------------------------------------------------------------------------------------------------


def read_bedrock_message(message: Any) -> Parsed:
    """A message in the form of Bedrock's Converse API: {"role": "user", "content": [{"text": "Hi"}]}"""
    return _read(message, "content", _bedrock_part)


def read_bedrock_instruction(block: Any) -> Parsed:
    """One of the blocks of a system prompt: {"text": "Be brief."}"""
    found, unused = _read_system({"system": [block]}, "system", _bedrock_part)
    return found, tuple(name.removeprefix("system[].") for name in unused)


def _bedrock_part(part: dict[str, Any], unused: list[str]) -> Part:
    kind = next((kind for kind in ("text", "toolUse", "toolResult", "reasoningContent") if kind in part), "")
    rest = {name: value for name, value in part.items() if name != kind}
    if media := next((name for name in rest if name in MEDIA), None):
        raise UnsupportedContent(f"{MEDIA[media]} in a message")
    if not kind and set(rest) - {"cachePoint"}:
        raise ValueError(NOT_TEXT)
    unused += [name for name, value in rest.items() if value not in EMPTY]
    if not kind or kind == "text":
        return Part("text", as_text(part["text"])) if kind else Part("")
    given = _object(part[kind], kind)
    if kind == "toolUse":
        found = _call(given, "input", "toolUseId")
    elif kind == "toolResult":
        found = _result(_result_of(given.pop("content", None)), given.pop("toolUseId", None))
    else:
        trace = _object(given.pop("reasoningText", None) or {}, "reasoningText")
        found = Part("thought", as_text(trace.pop("text", "")))
        given |= trace
    unused += _held(kind, given)
    return found


# --- Anthropic
# ---------------------------------------------------------------------------------------------------------------------

BLOCKS = ("tool_use", "tool_result", "redacted_thinking")
"""Types of parts that a message in OpenAI's form does not have."""


def read_anthropic_message(message: Any) -> Parsed:
    """A message in the form of Anthropic's API; one without its blocks is read as in OpenAI's form."""
    content = message.get("content") if isinstance(message, dict) else None
    blocks = content if isinstance(content, list) else []
    if any(isinstance(block, dict) and block.get("type") in BLOCKS for block in blocks):
        return _read(message, "content", _anthropic_part)
    found, unused = read_message(message)
    return {"messages": [found]}, unused


def read_anthropic_instruction(block: Any) -> Parsed:
    """One of the blocks of a system prompt: {"type": "text", "text": "Be brief."}"""
    found, unused = _read_system({"system": [block]}, "system", _anthropic_part)
    return found, tuple(name.removeprefix("system[].") for name in unused)


def _anthropic_part(part: dict[str, Any], unused: list[str]) -> Part:
    kind = part_type(part.pop("type", "text"))
    if kind in MEDIA:
        raise UnsupportedContent(f"{MEDIA[kind]} in a message")
    if kind == "tool_use":
        found = _call(part, "input", "id")
    elif kind == "tool_result":
        found = _result(_result_of(part.pop("content", None)), part.pop("tool_use_id", None))
    elif kind in {"text", "thinking"}:
        found = Part("text" if kind == "text" else "thought", as_text(part.pop(kind)))
    elif kind == "redacted_thinking":
        found = Part("")
    else:
        raise ValueError(NOT_TEXT)
    unused += [name for name, value in part.items() if value not in (*EMPTY, False)]
    return found


def _result_of(content: Any) -> Any:
    """The result of a tool: a JSON value, or texts joined."""
    blocks = [content] if isinstance(content, str | dict) else content or []
    held = [{"text": block} if isinstance(block, str) else _object(block, "a result of a tool") for block in blocks]
    values = []
    for block in held:
        given = {
            name: value for name, value in block.items() if value is not None and (name, value) != ("type", "text")
        }
        if media := next((name for name in (*given, part_type(given.get("type", ""))) if name in MEDIA), None):
            raise UnsupportedContent(f"{MEDIA[media]} in a message")
        if len(given) != 1 or not given.keys() <= {"text", "json"}:
            raise ValueError("a result of a tool that is neither text nor JSON")
        values.append(next(iter(given.values())))
    return values[0] if len(values) == 1 else "".join(map(tools.result_text, values))


# --- OpenAI's Responses API
# ---------------------------------------------------------------------------------------------------------------------


def read_item(item: Any) -> Parsed:
    """An item of `input` or `output`: a message, a call of a function, its result, or reasoning (`thought`)."""
    rest = _object(item, "an item")
    kind = rest.pop("type", None) or "message"
    if kind == "reasoning":
        parts = [_object(part, "a content part") for part in rest.pop("content", None) or ()]
        more = [
            name for part in parts for name, one in part.items() if name not in {"type", "text"} and one not in EMPTY
        ]
        thought = "".join(as_text(part["text"]) for part in parts)
        return {"messages": [], "thought": thought}, (*rest, *(f"content[].{name}" for name in more))
    if kind == "function_call":
        call = _call(rest, "arguments", "call_id")
        return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call.value]}]}, tuple(rest)
    if kind == "function_call_output":
        given = rest.pop("output", None)
        names: tuple[str, ...] = ()
        if isinstance(given, list):
            message, names = read_message({"role": "tool", "content": given})
            given = message["content"]
        return {"messages": [_result(given, rest.pop("call_id", None)).value]}, (*rest, *names)
    if kind != "message":
        raise ValueError(
            f"items of type {shortened(str(kind))} are not supported: only messages, reasoning, calls and results"
        )
    if isinstance(rest.get("content"), list):
        rest["content"] = [_response_part(part) for part in rest["content"]]
    found, unused = read_message(rest)
    return {"messages": [found]}, unused


def _response_part(part: Any) -> dict[str, Any]:
    """A content part without empty fields, such as `annotations`; a refusal is text."""
    held = {name: value for name, value in _object(part, "a content part").items() if value not in EMPTY}
    return {"type": "text", "text": held["refusal"]} if held.get("type") == "refusal" else {"text": "", **held}


def answered(items: Iterable[Mapping[str, Any]]) -> Messages:
    """The messages of items.

    Reasoning is the trace of the message or call that follows it. Calls are in one message with the text or calls of
    the assistant directly before them.
    """
    messages: Messages = []
    thought = ""
    for item in items:
        thought += item.get("thought", "")
        for message in item["messages"]:
            if thought and message["role"] != "assistant":
                raise ValueError(NO_ANSWER)
            if thought and message.get("reasoning_content", thought) != thought:
                raise ValueError("two different traces of reasoning in one message")
            if not thought and messages and continues(messages[-1], message):
                messages[-1] = with_calls(messages[-1], message)
                continue
            messages.append({**message, "reasoning_content": thought} if thought else message)
            thought = ""
    if thought:
        raise ValueError(NO_ANSWER)
    return messages
