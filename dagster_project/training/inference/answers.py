"""Generated tokens -> an answer: its content, reasoning trace and tool calls, parsed as the model's family writes them.

    <think>It is cold.</think>Let me look.<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>
    -> Answer("Let me look.", "It is cold.", (Call("weather", {"city": "Oslo"}, None),))

Calls are parsed by the tokenizer's response template, its own or TRL's for its chat template, and by the forms of
`call_forms` that read back a call rendered by the chat template; if the template renders no calls, by any form.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from dagster_project.core.errors import InputError
from dagster_project.core.messages import JSON, Call, Message, Tools, calls
from dagster_project.core.rendering import end_tokens, render
from dagster_project.training.inference.call_forms import FORMS, find_calls, library_calls

TRACES = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel|>analysis<|message|>": "<|end|>",
    "<|channel>thought": "<channel|>",
    "to=self<|message|>": "<|eom|>",
}
"""Beginning and end of a reasoning trace, by family."""
CHANNEL = re.compile(
    r"(?:<\|channel\|>(?:final|commentary|analysis)\s*(?:<\|constrain\|>\w+)?|\A\s*to=user)<\|message\|>"
)
"""What gpt-oss and Muse write before the content of an answer."""
NEXT_CHANNEL = re.compile(r"\A\s*<\|start\|>assistant(?=<\|channel\|>| to=user)")
"""What they write after a trace, before the next channel."""
PROMPT_TAIL = 128
"""Tokens at the end of a prompt that can belong to the assistant's header."""


@dataclass(frozen=True)
class Answer:
    """An answer, or the reference that it is compared with."""

    content: str
    """Text without the trace and calls."""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()

    @property
    def message(self) -> Message:
        """The canonical message of the assistant."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [_as_dict(call) for call in self.calls]
        return message

    @property
    def columns(self) -> dict[str, str | None]:
        """Columns of the results table."""
        made = JSON.encode([_as_dict(call) for call in self.calls]) if self.calls else None
        return {"answer": self.content, "reasoning": self.reasoning or None, "tool_calls": made}


def _as_dict(call: Call) -> dict[str, Any]:
    identity = {"id": call.identity} if call.identity is not None else {}
    return {"type": "function", **identity, "function": {"name": call.name, "arguments": call.arguments}}


def of_message(message: Mapping[str, Any]) -> Answer:
    """The answer that a canonical message gives."""
    return Answer(message["content"], message.get("reasoning_content", ""), tuple(calls(message)))


def of_row(row: Mapping[str, Any]) -> Answer:
    """An answer from the columns of the results table. `reasoning` and `tool_calls` may be missing."""
    made = {"tool_calls": json.loads(row["tool_calls"])} if row.get("tool_calls") else {}
    return Answer(row["answer"], row.get("reasoning") or "", tuple(calls(made)))


def read_answer(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], tools: Tools = None) -> Answer:
    """The answer of generated ids.

    Args:
        prompt: ids of the prompt, whose end may open a trace.
        tools: the tools that were offered. Without tools nothing is a call.
    """
    return read_parts(tokenizer, prompt, ids, tools) or Answer(tokenizer.decode(ids, skip_special_tokens=True).strip())


def read_parts(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], tools: Tools = None) -> Answer | None:
    """As `read_answer`; None if the answer has neither trace nor calls nor the header of a channel."""
    head = tokenizer.decode(list(prompt)[-PROMPT_TAIL:])
    return parse(tokenizer, head, tokenizer.decode(list(ids)), tools)


def parse(tokenizer: Any, prompt: str, text: str, tools: Tools = None) -> Answer | None:
    """The answer of a text with its special tokens; None if it has neither trace nor calls nor a channel's header."""
    reasoning, rest = split_trace(prompt, text)
    library, forms = reader(tokenizer) if tools else Reader(None, ())
    found = _by_library(library, prompt, text, tools) if library and rest.strip() else None
    if found is None and tools:
        own = find_calls(_unended(tokenizer, rest), tools, forms)
        found = (own.calls, own.rest) if own else None
    if found is None and not reasoning and rest == text and not CHANNEL.search(text):
        return None
    made, content = found or ([], rest)
    return Answer(_plain_text(tokenizer, content), _plain_text(tokenizer, reasoning), tuple(map(_storable, made)))


def _storable(call: Call) -> Call:
    """A call as JSON in UTF-8 can have it: without unpaired surrogates.

    Arguments with NaN or infinity are the text that they are in Python's JSON, so that the call counts as invalid.
    """
    try:
        text = json.dumps(call, ensure_ascii=False, allow_nan=False)
    except ValueError:
        call = call._replace(arguments=JSON.encode(call.arguments))
        text = JSON.encode(call)
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return call if whole == text else Call(*json.loads(whole))


def split_trace(prompt: str, text: str) -> tuple[str, str]:
    """(trace, rest) of an answer.

    A trace begins at the end of the prompt or at the beginning of the answer; an end without a beginning ends one, too.
    A trace that does not end, because the answer was cut, leaves no rest.
    """
    reasoning: list[str] = []
    opened = next((name for name in TRACES if prompt.rstrip().endswith(name)), None)
    rest = text
    if opened is None:
        ends = {begin: end for begin, end in TRACES.items() if end not in {"<|end|>", "<|eom|>"}}
        unopened = next((end for begin, end in ends.items() if end in text and begin not in text), None)
        if unopened:
            before, _, rest = text.partition(unopened)
            reasoning.append(before)
    while begin := opened or next((name for name in TRACES if rest.lstrip().startswith(name)), None):
        inner = rest if opened else rest.lstrip()[len(begin) :]
        before, _, rest = inner.partition(TRACES[begin])
        reasoning.append(before)
        opened = None
        rest = NEXT_CHANNEL.sub("", rest)
    return "\n".join(part.strip() for part in reasoning if part.strip()), rest


def _plain_text(tokenizer: Any, text: str) -> str:
    """Text without special tokens and the headers of channels."""
    text = CHANNEL.sub("", text)
    special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token in [*special, *sorted(added, key=len, reverse=True)]:
        text = text.replace(token, "")
    return text.strip()


def _unended(tokenizer: Any, text: str) -> str:
    """Text without the end-of-turn token."""
    text = text.rstrip()
    return text.removesuffix(next((end for end in end_tokens(tokenizer) if text.endswith(end)), ""))


def _by_library(library: Any, prompt: str, text: str, tools: Tools) -> tuple[list[Call], str] | None:
    """Calls and content by the tokenizer's response template; None if it finds no call that it can read."""
    try:
        message = library.parse_response(text, prefix=prompt, tools=list(tools or ()))
        made = library_calls(message)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # a malformed call
    content = split_trace("", message.get("content") or "")[1]
    return (made, content) if made and all(isinstance(call.name, str) for call in made) else None


def _with_response_template(tokenizer: Any) -> Any:
    """The tokenizer with its own response template or with TRL's for a chat template of TRL; else None."""
    if getattr(tokenizer, "response_template", None) is not None:
        return tokenizer
    known = _trl_response_template(tokenizer.chat_template) if isinstance(tokenizer.chat_template, str) else None
    if known is None:
        return None
    parser = copy.copy(tokenizer)
    parser.response_template = known
    return parser


@cache
def _trl_response_template(chat_template: str) -> Any:
    from trl.chat_template_utils import add_response_schema

    class TokenizerStub:
        """The attributes of a tokenizer that `add_response_schema` uses."""

        def __init__(self) -> None:
            self.chat_template = chat_template
            self.response_template = None

    try:
        return add_response_schema(TokenizerStub()).response_template
    except ValueError:
        return None  # not one of TRL's


PROBE_ARGUMENTS = {
    "text": {"type": "string", "description": "Text."},
    "count": {"type": "integer", "description": "Count."},
    "flag": {"type": "boolean", "description": "Flag."},
}
PROBE_SCHEMA = {"type": "object", "properties": PROBE_ARGUMENTS, "required": ["text"]}
PROBE_FUNCTION = {"name": "probe_tool", "description": "A probe.", "parameters": PROBE_SCHEMA}
PROBE_TOOLS = [{"type": "function", "function": PROBE_FUNCTION}]
EASY_PROBE: dict[str, Any] = {"text": "a probe", "count": 7}
HARD_PROBE: dict[str, Any] = {"text": "it's a \"probe\", isn't it\n", "count": 7, "flag": False}
PROBE_QUESTION = "What does the probe say?"


class Reader(NamedTuple):
    """How the calls of a model are read."""

    library: Any
    """Tokenizer with a response template; None if there is none, or if it misreads a call that one of `forms` reads."""
    forms: tuple[str, ...]
    """The forms that read a call rendered by the chat template; empty if the template renders no call that any form
    reads."""


def reader(tokenizer: Any) -> Reader:
    """The reader that is right for the calls that the chat template renders."""
    return _reader(_Template(tokenizer, f"{tokenizer.chat_template} {getattr(tokenizer, 'response_template', None)}"))


class _Template:
    """A tokenizer, equal to others with the same chat template."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@cache
def _reader(template: _Template) -> Reader:
    tokenizer = template.tokenizer
    easy, hard = ((arguments, _rendered_call(tokenizer, arguments)) for arguments in (EASY_PROBE, HARD_PROBE))
    forms = tuple(name for name in FORMS if _form_reads(tokenizer, name, *easy))
    library = _with_response_template(tokenizer)
    if library is not None and not _library_reads(library, *hard):
        reads_better = any(_form_reads(tokenizer, name, *hard) for name in forms)
        library = None if reads_better else library
    return Reader(library, forms)


def _rendered_call(tokenizer: Any, arguments: dict[str, Any]) -> tuple[str, str]:
    """(prompt, assistant's turn) of a call as the chat template writes it; the turn is empty if the template fails."""
    call = {"id": "call00001", "type": "function", "function": {"name": "probe_tool", "arguments": arguments}}
    prompt = [{"role": "user", "content": PROBE_QUESTION}]
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        header = render(tokenizer, prompt, True, PROBE_TOOLS)
        whole = render(tokenizer, [*prompt, turn], False, PROBE_TOOLS)
    except InputError:
        return "", ""
    return header, whole[len(header) :] if whole.startswith(header) else whole.rpartition(PROBE_QUESTION)[2]


def _form_reads(tokenizer: Any, name: str, arguments: dict[str, Any], rendered: tuple[str, str]) -> bool:
    """Whether a form reads the probe in a rendered turn, which may begin with the assistant's header."""
    turn = _unended(tokenizer, rendered[1])
    starts = [0, *(match.start() for match in re.finditer(r"[{\[]", turn))]  # bare forms begin after the header
    found = (FORMS[name](turn[start:], PROBE_TOOLS) for start in starts)
    return any(one is not None and _is_probe(one.calls, arguments) for one in found)


def _library_reads(library: Any, arguments: dict[str, Any], rendered: tuple[str, str]) -> bool:
    found = _by_library(library, *rendered, PROBE_TOOLS)
    return found is not None and _is_probe(found[0], arguments)


def _is_probe(found: Sequence[Call], arguments: dict[str, Any]) -> bool:
    return [(call.name, call.arguments) for call in found] == [("probe_tool", arguments)]
