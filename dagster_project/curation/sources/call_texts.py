"""Tools, calls, results and reasoning that a source writes inside the text of its messages -> fields of their own.

- Hermes: definitions in <tools> in the system prompt, calls in <tool_call>, results in <tool_response>.
- ToolACE: definitions as a list in the system prompt, calls as "[Get Weather(city='Oslo')]".
- Glaive: definitions one after another at the end of the system prompt, calls after <functioncall>, with arguments as
  text in single quotes.
- Traces: "<think>...</think>" (DeepSeek-R1, Qwen3) or "<|begin_of_thought|>..." (OpenThoughts) at the beginning of an
  answer.
"""

from __future__ import annotations

import json
import re
from typing import Literal, NamedTuple

from dagster_project.core.messages import Message, tool_names
from dagster_project.curation.sources import tools
from dagster_project.curation.sources.files import parse_json
from dagster_project.curation.sources.message import ORDER_OF_CALLS, Messages
from dagster_project.curation.sources.python_values import python_calls, python_value
from dagster_project.curation.sources.tools import Tools

Think = Literal["auto", "keep", "split"]
"""Traces at the beginning of an answer: `auto` moves those between both tags, `split` also those without the opening
tag, `keep` none."""


MARKS = ("functions in JSON format", "access to the following functions")
"""What system prompts of ToolACE and Glaive say before definitions of tools."""


def is_marked(messages: Messages) -> bool:
    """Whether any of the texts may hold what the functions here read, which is cheap to see."""
    for message in messages:
        text = message["content"]
        if "<" in text or (message["role"] == "system" and any(mark in text for mark in MARKS)):
            return True
    return False


class Prompted(NamedTuple):
    """Tools that a system prompt defines."""

    messages: Messages
    """Without the instructions on tools, which the model's own chat template writes."""
    tools: Tools | None
    meta: dict[str, str]
    """The system prompt as it was, if it has changed, and its name if no message is left for it."""
    style: str
    """`hermes`, `toolace`, `glaive`, or empty."""


HERMES_TOOLS, HERMES_TOOLS_END = re.compile(r"<tools>(?=\s*[\[{])"), "</tools>"
HERMES_START = re.compile(
    r"You are a function calling AI model|You are provided with function signatures"
    r"|# Tools\s+You may call one or more functions"
)
TOOLACE_TOOLS = "list of functions in JSON format"
TOOLACE_START, TOOLACE_END = "You are an expert in composing functions", "MUST be included."


def prompted_tools(messages: Messages) -> Prompted:
    """The tools that a system prompt defines, and the messages without that part of it."""
    if messages and messages[0]["role"] == "system":
        text = messages[0]["content"]
        readers = {"<tools>": _hermes, MARKS[0]: _toolace, MARKS[1]: _glaive}
        read = next((reader for mark, reader in readers.items() if mark in text), None)
        if read and (found := read(text)):
            style, defined, rest = found
            first = [{**messages[0], "content": rest}] if rest else []
            lost = {"system_name": messages[0]["name"]} if "name" in messages[0] and not rest else {}
            return Prompted([*first, *messages[1:]], defined, {"system_prompt": text, **lost}, style)
    return Prompted(messages, None, {}, "")


def _hermes(text: str) -> tuple[str, Tools | None, str] | None:
    position = 0
    while (block := HERMES_TOOLS.search(text, position)) and (last := text.find(HERMES_TOOLS_END, block.end())) >= 0:
        position = last + len(HERMES_TOOLS_END)
        try:
            defined = tools.definitions(_objects(text[block.end() : last]))
        except ValueError:
            continue
        begin = HERMES_START.search(text, 0, block.start())
        example = text.rfind("</tool_call>", position)
        end = example + len("</tool_call>") if example >= 0 else position
        return "hermes", defined, (text[: begin.start() if begin else block.start()] + text[end:]).strip()
    return None


def _objects(text: str) -> list[object]:
    """A JSON list, or JSON objects one after another."""
    text = text.strip()
    try:
        value = parse_json(text)
        return value if isinstance(value, list) else [value]
    except ValueError:
        pass
    try:
        return [parse_json(line) for line in text.split("\n") if line.strip()]  # a text may have other line ends
    except ValueError:
        value = python_value(text)
        return value if isinstance(value, list) else [value]


def _toolace(text: str) -> tuple[str, Tools | None, str] | None:
    marker = text.find(TOOLACE_TOOLS)
    start = text.find("[", marker) if marker >= 0 else -1
    if start < 0:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
        parse_json(text[start:end])
        given = tools.definitions(value) or ()
        defined = [{**tool, "function": tools.with_json_types(tool["function"])} for tool in given]
    except (ValueError, RecursionError):
        return None
    begin = text.rfind(TOOLACE_START, 0, marker)
    last = text.find(TOOLACE_END, end)
    rest = text[: begin if begin >= 0 else marker] + text[last + len(TOOLACE_END) if last >= 0 else end :]
    return "toolace", defined, rest.strip()


JSON_START, SEPARATOR = re.compile(r"[{\[]"), re.compile(r"[\s,]*")


def _glaive(text: str) -> tuple[str, Tools | None, str] | None:
    marker = text.index(MARKS[1])
    start = max(text.rfind(".", 0, marker), text.rfind("\n", 0, marker)) + 1  # of the sentence with the marker
    if not (first := JSON_START.search(text, marker)):
        return None
    found: list[object] = []
    position = first.start()
    try:
        while text.startswith(("{", "["), position):
            value, end = json.JSONDecoder().raw_decode(text, position)
            parse_json(text[position:end])
            found += value if isinstance(value, list) else [value]
            position = SEPARATOR.match(text, end).end()  # type: ignore[union-attr]
        defined = tools.definitions(found)
    except (ValueError, RecursionError):
        return None
    return ("glaive", defined, f"{text[:start].strip()}\n{text[position:].strip()}".strip()) if defined else None


END_OF_CALL, END_OF_RESPONSE = re.compile("</tool_call>"), re.compile("</tool_response>")
END_OF_FUNCTION_CALL = re.compile(r"</functioncall>|<\|endoftext\|>|(?=<functioncall>)|\Z")
ARGUMENTS, QUOTED_END = re.compile(r"""("arguments":\s*)'"""), re.compile(r"'(\s*\})\Z")


def _split_at_tags(text: str, opening: str, closing: re.Pattern[str]) -> list[str]:
    """Parts of a text outside of tags, at even indices, and inside, without white space around them.

    Needs linear time for any text.
    """
    parts, at = [], 0
    while (start := text.find(opening, at)) >= 0 and (end := closing.search(text, start + len(opening))):
        parts += [text[at:start], text[start + len(opening) : end.start()].strip()]
        at = end.end()
    return [*parts, text[at:]]


def texts_as_calls(messages: Messages, style: str, defined: Tools | None, unused: list[str]) -> Messages:
    """Messages whose calls and results are fields.

    {"role": "assistant", "content": 'Wait.<tool_call>{"name": "clock", "arguments": {}}</tool_call>'}  ->
    {"role": "assistant", "content": "Wait.", "tool_calls": [...]}

    Args:
        unused: gets the keys of calls that are not used, and `ORDER_OF_CALLS` if there is text after a call.
    Raises:
        ValueError: a call to one of the tools cannot be parsed.
    """
    if style == "toolace":
        names = tuple(f"[{name}(" for name in tool_names(defined))
        return [_toolace_call(message, names) for message in messages]
    if not any("<tool_" in message["content"] or "<functioncall>" in message["content"] for message in messages):
        return messages
    found: Messages = []
    for message in messages:
        tag = next((tag for tag in ("<tool_call>", "<functioncall>") if tag in message["content"]), "")
        if message["role"] == "assistant" and "tool_calls" not in message and tag:
            found.append(_tagged_call(message, tag, bool(style or defined), unused))
        elif message["role"] == "tool":
            found += _tagged_results(message)
        else:
            found.append(message)
    return found


def _tagged_results(message: Message) -> Messages:
    """A message for each result in tags; the message itself if it has none, or text outside of them."""
    parts = _split_at_tags(message["content"], "<tool_response>", END_OF_RESPONSE)
    if len(parts) == 1 or "".join(parts[::2]).strip():
        return [message]
    return [{**message, "content": result} for result in parts[1::2]]


def _tagged_call(message: Message, tag: str, known: bool, unused: list[str]) -> Message:
    """Args:
    known: whether the conversation has tools, so that the tags are calls and not a text on such tags.
    """
    parts = _split_at_tags(message["content"], tag, END_OF_CALL if tag == "<tool_call>" else END_OF_FUNCTION_CALL)
    texts, blocks = parts[::2], parts[1::2]
    try:
        read = [tools.calls(_with_json_text(block)) for block in blocks]
        if any(tag in text for text in texts):
            raise ValueError("a tool call that is not closed")
    except ValueError:
        if known:
            raise
        return message
    if not (calls := [call for found, _ in read for call in found]):
        return message
    unused += [name for _, names in read for name in names]
    # a message has its text before its calls
    unused += [ORDER_OF_CALLS] if any(text.strip() for text in texts[1:]) else []
    return {**message, "content": "\n".join(part for text in texts if (part := text.strip())), "tool_calls": calls}


def _with_json_text(block: str) -> str:
    """A call with Glaive's arguments, JSON in single quotes, as JSON text."""
    begin, end = ARGUMENTS.search(block), QUOTED_END.search(block)
    if not begin or not end or begin.end() > end.start():
        return block
    quoted = block[begin.end() : end.start()].replace("\\'", "'")
    return block[: begin.end() - 1] + json.dumps(quoted) + end[1]


def _toolace_call(message: Message, names: tuple[str, ...]) -> Message:
    text = message["content"].strip()
    if message["role"] != "assistant" or "tool_calls" in message or not text.startswith(names) or not names:
        return message
    try:
        calls = python_calls(text)
    except ValueError as error:
        raise ValueError(f"a tool call cannot be parsed: {error}") from None
    return {**message, "content": "", "tool_calls": [tools.call_of(name, arguments) for name, arguments in calls]}


# --- traces

OPENING, CLOSING = "<think>", "</think>"
THOUGHT, THOUGHT_END = "<|begin_of_thought|>", "<|end_of_thought|>"
SOLUTION = re.compile(r"<\|(?:begin|end)_of_solution\|>")


def split_traces(messages: Messages, think: Think = "auto") -> Messages:
    """Messages with the traces at the beginning of answers in `reasoning_content`:

    {"role": "assistant", "content": "<think>\\nTwo and two.\\n</think>\\n\\nFour"}  ->
    {"role": "assistant", "content": "Four", "reasoning_content": "Two and two."}

    Raises:
        ValueError: an answer already has another trace.
    """
    if think == "keep":
        return messages
    split = _split_closed if think == "split" else _split
    return [split(message) if message["role"] == "assistant" else message for message in messages]


def _split(message: Message) -> Message:
    text = message["content"]
    if not text[:40].lstrip().startswith((OPENING, THOUGHT)):
        return message
    text = text.lstrip()
    if text.startswith(THOUGHT):
        trace, end, rest = text[len(THOUGHT) :].partition(THOUGHT_END)
        return _with(message, trace.strip(), SOLUTION.sub("", rest).strip()) if end else message
    trace, end, rest = text[len(OPENING) :].partition(CLOSING)
    return _with(message, trace.strip("\n"), rest.lstrip("\n")) if end else message  # as Qwen3's template reads them


def _split_closed(message: Message) -> Message:
    """Also a trace whose opening tag is in the generation prompt, as DeepSeek-R1's template has it."""
    found = _split(message)
    trace, end, rest = message["content"].partition(CLOSING)
    return found if found is not message or not end else _with(message, trace.strip("\n"), rest.lstrip("\n"))


def _with(message: Message, trace: str, answer: str) -> Message:
    """The answer with its trace; an empty one is none."""
    if "reasoning_content" in message and trace.strip() not in {"", message["reasoning_content"].strip()}:
        raise ValueError("two different traces of reasoning in one message")
    more = {key: value for key, value in message.items() if key not in {"role", "content"}}
    traced = {"reasoning_content": trace} if trace.strip() else {}
    return {"role": message["role"], "content": answer, **traced, **more}
