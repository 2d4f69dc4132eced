"""A conversation -> text by the tokenizer's chat template, in the form in which that template reads messages.

Templates differ in how they want content (text or parts), tool arguments (an object or JSON text), and reasoning (the
name of its key). The form is found once per template by rendering probes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from dagster_project.core import bounded_templates
from dagster_project.core.errors import InputError
from dagster_project.core.messages import JSON, Message, Messages, Tools, argument_texts, calls
from dagster_project.core.text import shortened

DATE = datetime(2026, 1, 1)
"""Today, for templates that write the date (`strftime_now`): the same text on every day."""

THINKING = {switch: {"enable_thinking": switch, "thinking": switch} for switch in (True, False)}
"""Variables with which the templates of reasoning models begin an answer with or without a trace."""

_WORD, _KEY, _NAME = "pedigree7word", "pedigree7key", "pedigree7name"
_USER: Message = {"role": "user", "content": "Hi"}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "a1b2c3d4e", "function": {"name": _WORD, "arguments": {_KEY: "x"}}}],
}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "A text."}},
            "required": ["x"],
        },
    },
}


@dataclass(frozen=True)
class TemplateForm:
    """How a chat template reads messages."""

    parts: bool = False
    """Whether content must be a list of parts, as templates of vision models want it."""
    reasoning: str = ""
    """Key from which it takes a trace; "" if it writes none."""
    calls: bool = False
    """Whether it writes tool calls."""
    arguments_as_text: bool = False
    """Whether arguments must be JSON text instead of an object."""
    null_content: bool = False
    """Whether a message with calls and no text must have no content at all."""
    tools: bool = False
    """Whether it writes the definitions of tools."""
    results: bool = False
    """Whether it writes tool results."""
    parallel: bool = False
    """Whether it writes all calls of a message with several."""
    with_content: bool = False
    """Whether it writes both content and calls of a message that has both."""
    opening: str = ""
    """What the generation prompt writes after a user turn."""


_FORMS: dict[str, TemplateForm] = {}


def form_of(tokenizer: Any) -> TemplateForm:
    """The form of the tokenizer's chat template."""
    template = str(tokenizer.chat_template)
    if template not in _FORMS:
        _FORMS[template] = _probe(tokenizer)
    return _FORMS[template]


def _probe(tokenizer: Any) -> TemplateForm:
    def text(form: TemplateForm, messages: Sequence[Message], tools: Tools = None, generate: bool = False) -> str:
        try:
            return _render(tokenizer, form, messages, tools, generate)
        except InputError:
            return ""

    marked = [{**_USER, "content": _WORD}]
    parts = _WORD not in text(TemplateForm(), marked) and _WORD in text(TemplateForm(parts=True), marked)
    keys = ("reasoning_content", "thinking", "reasoning")
    answer = {"role": "assistant", "content": "Yes", "reasoning_content": _WORD}
    reasoning = next((key for key in keys if _WORD in text(TemplateForm(parts, key), [_USER, answer])), "")
    writing = (form for form in _forms_of_calls(parts, reasoning) if _writes_call(text(form, [_USER, _CALL], [_TOOL])))
    form = next(writing, TemplateForm(parts, reasoning))
    tools = _NAME in text(form, [_USER], [_TOOL])
    result = {"role": "tool", "content": _KEY, "tool_call_id": "a1b2c3d4e", "name": "f"}
    call = {**_CALL, "tool_calls": [{**_CALL["tool_calls"][0], "function": {"name": "f", "arguments": {"a": "x"}}}]}
    if not reasoning and form.calls:  # as Gemma 4, which writes only the traces of calls
        thought = {**call, "reasoning_content": _WORD}
        reasoning = next((key for key in keys if _WORD in text(replace(form, reasoning=key), [_USER, thought])), "")
        form = replace(form, reasoning=reasoning)
    answers = (call, {"role": "assistant", "content": "Yes"})
    results = any(_KEY in text(form, [_USER, before, result]) for before in answers)
    second = {**_CALL["tool_calls"][0], "id": "b1b2c3d4e", "function": {"name": "g", "arguments": {"x": _NAME}}}
    parallel = form.calls and _NAME in text(form, [_USER, {**_CALL, "tool_calls": [*_CALL["tool_calls"], second]}])
    both = text(form, [_USER, {**_CALL, "content": _NAME}]) if form.calls else ""
    with_content = _NAME in both and _writes_call(both)
    asked, opened = text(form, [_USER]), text(form, [_USER], generate=True)
    opening = opened.removeprefix(asked) if opened.startswith(asked) else ""
    return replace(form, parallel=parallel, with_content=with_content, tools=tools, results=results, opening=opening)


def _forms_of_calls(parts: bool, reasoning: str) -> Iterator[TemplateForm]:
    for arguments_as_text in (False, True):
        for null_content in (False, True):
            yield TemplateForm(parts, reasoning, True, arguments_as_text, null_content)


def _writes_call(text: str) -> bool:
    """Whether a text has the call of the probe, but no Python dictionary, which models are not trained to read."""
    return _WORD in text and _KEY in text.partition(_WORD)[2] and f"{{'{_KEY}'" not in text


def render(
    tokenizer: Any,
    messages: Messages,
    add_generation_prompt: bool = False,
    tools: Tools = None,
    thinking: bool | None = None,
) -> str:
    """Render the conversation with the tokenizer's chat template, as transformers does, with limits of time and memory.

    Args:
        tools: definitions of the functions that the assistant may call.
        thinking: whether answers begin with a trace (`THINKING`); None: as the template does by itself.
    Raises:
        InputError: the template rejects the conversation or fails on it.
        TemplateLimit: it takes too much time or memory.
    """
    variables = {} if thinking is None else THINKING[thinking]
    return _render(tokenizer, form_of(tokenizer), messages, tools, add_generation_prompt, variables)


def _render(
    tokenizer: Any,
    form: TemplateForm,
    messages: Messages,
    tools: Tools = None,
    add_generation_prompt: bool = False,
    variables: dict[str, Any] | None = None,
) -> str:
    """The text by the template, with limits; by the tokenizer's method if it has its own, which reads no template.

    The tokenizers of Mistral have one.
    """
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **(variables or {})}
    if tools:
        options["tools"] = list(tools)
    read = [_as_read(message, form) for message in messages]
    try:
        if _has_own_renderer(tokenizer):
            return str(tokenizer.apply_chat_template(read, tokenize=False, **options))
        template = str(tokenizer.get_chat_template(tools=options.get("tools")))
        if "strftime_now" in template:
            template = with_constant_date(template)
        if not read:
            raise ValueError("Cannot apply chat template to an empty conversation. Provide at least one message.")
        given = {"messages": [*map(_normalized, read)], "tools": None, "documents": None}
        return bounded_templates.render(template, {**tokenizer.special_tokens_map, **given, **options})
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the chat template refuses it: {shortened(reason)}", "use another chat template") from None


def _has_own_renderer(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers replaces the method that renders Jinja templates."""
    method = getattr(type(tokenizer), "apply_chat_template", None)
    return method is not None and method.__module__ != "transformers.tokenization_utils_base"


def _normalized(message: Message) -> Message:
    """A message as transformers 5.24 gives it to a template: without nulls, and with a trace under both its names."""
    present = {key: value for key, value in message.items() if value is not None}
    trace = next((present[key] for key in ("reasoning_content", "thinking", "reasoning") if key in present), None)
    return present if trace is None else {"thinking": trace, **present, "reasoning_content": trace}


_CLOCK = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")


def with_constant_date(template: str) -> str:
    """A template with `DATE` in place of today's date, so that a conversation gives the same text on every day."""
    return _CLOCK.sub(lambda call: json.dumps(DATE.strftime(call[1] or call[2] or "")), template)


def _as_read(message: Message, form: TemplateForm) -> Message:
    """A message as the template reads it. Without the loss weight, which templates do not use."""
    read = {key: value for key, value in message.items() if key not in {"weight", "reasoning_content", "tool_calls"}}
    if form.parts:
        read["content"] = [{"type": "text", "text": message["content"]}]
    if form.reasoning and message.get("reasoning_content"):
        read[form.reasoning] = message["reasoning_content"]
    if found := message.get("tool_calls"):
        read["tool_calls"] = [_call(call, form.arguments_as_text) for call in found]
        if form.null_content and not message["content"]:
            read["content"] = None
    return read


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = call["function"]
    if as_text and not isinstance(function["arguments"], str):
        function = {**function, "arguments": JSON.encode(function["arguments"])}
    return {**call, "function": function}


def end_tokens(tokenizer: Any) -> list[str]:
    """The tokens at which generation stops: the tokenizer's end-of-text token and those of generation_config.json."""
    folder = str(getattr(tokenizer, "name_or_path", ""))
    settings = Path(folder) / "generation_config.json"
    found = _end_ids(settings, settings.stat().st_mtime_ns) if folder and settings.is_file() else ()
    # one that stands for a template alone has no backend, and no file
    further = [tokenizer.backend_tokenizer.id_to_token(number) for number in found]
    return list(dict.fromkeys([str(tokenizer.eos_token), *(token for token in further if token is not None)]))


def end_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of `end_tokens`."""
    return frozenset(tokenizer.backend_tokenizer.token_to_id(token) for token in end_tokens(tokenizer))


@lru_cache(maxsize=64)
def _end_ids(settings: Path, _modified: int) -> tuple[int, ...]:
    try:
        ids = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{settings}: not a JSON object in UTF-8", "fix the file, or remove it") from None
    return tuple(one for one in (ids if isinstance(ids, list) else [ids]) if isinstance(one, int) and 0 <= one < 2**32)


ANOTHER_TEMPLATE = "use another chat template"
WITH_TOOLS = "use a chat template that does, e.g. base_model.chat_template: hermes"


def refuse_unwritten(tokenizer: Any, messages: Messages, tools: Tools, turns: range, text: str) -> None:
    """Check that a rendered prompt has all that its messages say, in their order: nothing may disappear in a template.

    Reasoning is left to the template, which may drop it from earlier turns.

    Args:
        turns: indices of the messages to look for.
        text: the conversation as rendered, or the part with these turns.
    Raises:
        InputError: something is missing from the text.
    """
    form = form_of(tokenizer)
    if tools and not form.tools:
        raise InputError("the chat template does not write the definitions of tools", WITH_TOOLS)
    position = 0
    for i in turns:
        message, content = messages[i], messages[i]["content"].strip()
        if message["role"] == "tool" and not form.results:
            raise InputError("the chat template does not write tool results", WITH_TOOLS)
        _refuse_calls(form, message, i + 1)
        for call in calls(message):
            if call.name not in text:
                raise InputError(
                    f"the chat template leaves out the call of {call.name} in turn {i + 1}", ANOTHER_TEMPLATE
                )
        if (found := text.find(content, position)) >= 0:
            position = found + len(content)
            continue
        is_respelled = message["role"] == "tool" and _is_respelled(content, text)
        if not is_respelled and not (content in text and _is_elsewhere(tokenizer, messages[: turns.stop], tools, i)):
            what = f"the chat template leaves out what the {message['role']} says in turn {i + 1}"
            raise InputError(what, ANOTHER_TEMPLATE)


def _is_elsewhere(tokenizer: Any, messages: Messages, tools: Tools, turn: int) -> bool:
    """Whether the template writes the content of a message, though not in the order of the messages."""
    marked = [*messages[:turn], {**messages[turn], "content": _WORD}, *messages[turn + 1 :]]
    return _WORD in render(tokenizer, marked, True, tools)


def end_of_answer(tokenizer: Any, message: Message, turn: int, text: str) -> int:
    """End of what the assistant says in its rendered message.

    The trace comes first, then content and calls with their arguments, in either order.

    Args:
        turn: number of the message, from 1.
    Raises:
        InputError: content or a call is missing from the text. A trace is left to the template.
    """
    form, content, trace = form_of(tokenizer), message["content"].strip(), message.get("reasoning_content", "").strip()
    starts = [found + len(trace), 0] if form.reasoning and trace and (found := text.find(trace)) >= 0 else [0]
    _refuse_calls(form, message, turn)
    missing = f"what the {message['role']} says"
    for start in starts:
        if (found := text.find(content, start)) >= 0:
            end, missing = _end_of_calls(message, text, found + len(content))
            if not missing:
                return end
    for start in starts:  # calls before content, as Gemma writes them
        end, lost = _end_of_calls(message, text, start)
        if not lost and (found := text.find(content, end)) >= 0:
            return found + len(content)
    raise InputError(f"the chat template leaves out {missing} in turn {turn}", ANOTHER_TEMPLATE)


def _end_of_calls(message: Message, text: str, position: int) -> tuple[int, str]:
    """End of the calls of a message in a text from a position on, and what is missing; "" if nothing is."""
    for call in calls(message):
        if (named := text.find(call.name, position)) < 0:
            return position, f"the call of {call.name}"
        position = start = named + len(call.name)
        for _, value in argument_texts(call.arguments):
            if (end := _end_of_argument(str(value), text, start)) < 0:
                return position, f"an argument of {call.name}"
            position = max(position, end)
    return position, ""


def _refuse_calls(form: TemplateForm, message: Message, turn: int) -> None:
    found = calls(message)
    if found and not form.calls:
        raise InputError("the chat template does not write tool calls", WITH_TOOLS)
    if any(isinstance(call.arguments, str) for call in found):
        raise InputError(
            f"turn {turn} calls a tool with arguments that are not JSON", "see the check invalid_tool_call"
        )
    if len(found) > 1 and not form.parallel:
        raise InputError(
            f"the chat template does not write several tool calls in one message (turn {turn})", ANOTHER_TEMPLATE
        )
    if found and message["content"].strip() and not form.with_content:
        raise InputError(f"the chat template does not write content beside tool calls (turn {turn})", ANOTHER_TEMPLATE)


def _end_of_argument(value: str, text: str, start: int) -> int:
    """End of an argument in a text from `start` on, as it is, as JSON or as Python writes it; -1 if it is not there."""
    escaped = json.dumps(value)[1:-1]
    quoted = (json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(escaped)[1:-1], *python_spellings(value))
    spellings = {value, value.strip(), escaped, *quoted}
    if ends := [found + len(one) for one in spellings if (found := text.find(one, start)) >= 0]:
        return min(ends)
    words = re.findall(r"\w+", value)
    return start if words and all(text.find(word, start) >= 0 for word in words) else -1


def python_spellings(value: str) -> tuple[str, str]:
    """A text as Python writes it, without its quotes, and as LFM2's templates write it: always in single quotes."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return repr(value)[1:-1], escaped


def _is_respelled(result: str, text: str) -> bool:
    """Whether a tool result is written as JSON, or a result that is JSON in another spelling."""
    if JSON.encode(result)[1:-1] in text or json.dumps(result)[1:-1] in text:
        return True
    try:
        value = json.loads(result)
    except ValueError:
        return False
    words = re.findall(r"\w+", json.dumps(value, ensure_ascii=False))
    return isinstance(value, dict | list) and all(word in text for word in words)
