"""Conversations -> token ids and labels, by the model's chat template. Only assistant turns contribute to the loss."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message, Messages, Tools, field_texts, is_trained
from dagster_project.core.rendering import (
    ANOTHER_TEMPLATE,
    end_of_answer,
    end_tokens,
    form_of,
    refuse_unwritten,
    render,
)
from dagster_project.core.text import common_prefix

IGNORE = -100
"""Label of a token that is ignored by the loss."""

Reasoning = Literal["template", "keep", "strip", "last"]
"""Which traces are rendered: what the template does by itself, all (or the record is refused), none, that of the last
answer."""

Pieces = list[tuple[str, bool]]
"""A text split into (text, whether it is trained on)."""


def is_text(record: Mapping[str, Any]) -> bool:
    """Whether a record is plain text: a single message of the assistant, with `{"kind": "text"}` in its meta."""
    meta = record.get("meta") or ""
    if '"text"' not in meta or [m["role"] for m in record["messages"]] != ["assistant"]:
        return False
    return json.loads(meta).get("kind") == "text"


class RewritesEarlierTurnsError(InputError):
    """The template renders turns in another way once a further one follows: no single rendering takes all labels."""


class Turn(NamedTuple):
    """An answer of the assistant, as the template renders it when it is the last message."""

    header: str
    """All before the answer: what the model gets to read when it is served."""
    answer: str
    """The trace, content and calls, with the end-of-turn token."""
    after: str
    """What the template writes after the end of the turn."""

    @property
    def rendered(self) -> str:
        return self.header + self.answer + self.after


def turn_of(tokenizer: Any, messages: Messages, tools: Tools = None, checked: int = 0, written: str = "") -> Turn:
    """The last message, which is the assistant's, and all before it as the model gets to read it.

    Args:
        checked: number of first messages that are known to be in the text.
        written: the text with these messages.
    Raises:
        InputError: the template rejects the conversation, drops content, opens the answer in a way in which the
            rendered answer does not begin, or does not end the turn with an end-of-turn token; or there is no prompt.
    """
    *prompt, message = messages
    if not prompt:
        raise InputError(
            "the assistant speaks first, so there is no prompt to render", "begin with a system or user turn"
        )
    header, text = _answer(tokenizer, messages, tools)
    refuse_unwritten(tokenizer, messages, tools, range(checked, len(prompt)), header.removeprefix(written))
    position = end_of_answer(tokenizer, message, len(messages), text)
    ends = end_tokens(tokenizer)
    text_without = text
    if any(end in part for _, part in field_texts(message) for end in ends):
        text_without, position = _without_ends(tokenizer, messages, tools, text, ends)
    if stops := [found + len(end) for end in ends if (found := text_without.find(end, position)) >= 0]:
        stop = min(stops)
        return Turn(header, text[:stop], text[stop:])
    if end := _following_end(tokenizer, messages, tools, ends):
        return Turn(header, text + end, "")
    raise InputError(
        f"the chat template does not end the assistant's turn with {' or '.join(map(repr, ends))}",
        f"{ANOTHER_TEMPLATE} or tokenizer",
    )


def _without_ends(tokenizer: Any, messages: Messages, tools: Tools, text: str, ends: Sequence[str]) -> tuple[str, int]:
    """An answer that quotes end-of-turn tokens, with letters instead, and the end of what the assistant says in it.

    Raises:
        InputError: the template writes them in another spelling, so the end of the turn cannot be found in them.
    """
    quoted = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))))
    other = _replaced(messages[-1], quoted)
    text_without = _answer(tokenizer, [*messages[:-1], other], tools)[1]
    if _letters(quoted, text_without) != _letters(quoted, text):
        raise InputError(
            "the answer quotes an end-of-turn token, which the chat template writes in another way", ANOTHER_TEMPLATE
        )
    return text_without, end_of_answer(tokenizer, other, len(messages), text_without)


def _letters(quoted: re.Pattern[str], text: str) -> str:
    return quoted.sub(lambda found: "x" * len(found[0]), text)


def _replaced(value: Any, quoted: re.Pattern[str]) -> Any:
    """A message with letters in the place of each match in its texts."""
    if isinstance(value, str):
        return _letters(quoted, value)
    if isinstance(value, list):
        return [_replaced(one, quoted) for one in value]
    if isinstance(value, dict):
        return {_letters(quoted, key): _replaced(one, quoted) for key, one in value.items()}
    return value


def _answer(tokenizer: Any, messages: Messages, tools: Tools) -> tuple[str, str]:
    """(prompt with the header of the answer, text from there on).

    Raises:
        InputError: the template opens the answer in a way in which the rendered answer does not begin.
    """
    prompt, header, rendered = messages[:-1], "", ""
    said = messages[-1].get("reasoning_content") or "", messages[-1]["content"]
    for thinking in (None, bool(said[0])) if _thinks(tokenizer) else (None,):
        header = render(tokenizer, prompt, True, tools, thinking)
        rendered = render(tokenizer, messages, False, tools, thinking)
        if not rendered.startswith(header):
            continue
        text = rendered[len(header) :]
        opening = form_of(tokenizer).opening
        # DiffusionGemma opens an answer to a tool result, but not in the prompt: the model does not get to read it
        is_opened = opening and text.startswith(opening) and not any(part.lstrip().startswith(opening) for part in said)
        if is_opened and header == render(tokenizer, prompt, False, tools, thinking):
            text = text.removeprefix(opening)
        return header, text
    before = render(tokenizer, prompt, False, tools)
    opening = header.removeprefix(before) if header.startswith(before) else ""
    start = -1
    if opening and not rendered.startswith(before):
        start = rendered.rfind(opening, 0, _same_until(tokenizer, messages, tools, rendered))
    if start < 0:
        raise InputError(
            "the chat template opens an answer in a way in which the rendered answer does not begin", ANOTHER_TEMPLATE
        )
    begin = start + len(opening)
    if messages[-2]["role"] == "assistant" and _is_joined(tokenizer, messages, tools, rendered, begin):
        raise InputError(
            "the chat template joins messages of the assistant that follow each other",
            f"join them in the source, or {ANOTHER_TEMPLATE}",
        )
    # an answer makes the template rewrite earlier turns (gpt-oss drops the trace of a call), which the model reads as
    # they were
    return header, rendered[begin:]


def _is_joined(tokenizer: Any, messages: Messages, tools: Tools, rendered: str, begin: int) -> bool:
    """Whether the text of an answer, which begins there, has the content of the message before it, too."""
    other = [*messages[:-2], {**messages[-2], "content": "\x00"}, messages[-1]]
    return common_prefix(rendered, render(tokenizer, other, False, tools)) >= begin


def _same_until(tokenizer: Any, messages: Messages, tools: Tools, rendered: str) -> int:
    """Length of what the rendered conversation has in common with one whose last message says something else."""
    other: Message = {"role": "assistant", "content": "\x00"}
    if messages[-1].get("reasoning_content"):
        other["reasoning_content"] = "\x00"
    return common_prefix(rendered, render(tokenizer, [*messages[:-1], other], False, tools))


def _thinks(tokenizer: Any) -> bool:
    return "think" in str(tokenizer.chat_template)


def _following_end(tokenizer: Any, messages: Messages, tools: Tools, ends: Sequence[str]) -> str:
    """The end-of-turn token with which the template begins the next turn, as GLM does; "" if it begins with none."""
    messages = with_reasoning(messages, "strip")  # which a further turn may remove
    reply = {"role": "user", "content": "x"}
    if made := messages[-1].get("tool_calls"):
        reply = {"role": "tool", "content": "x", "name": made[0]["function"]["name"]}
        if "id" in made[0]:
            reply["tool_call_id"] = made[0]["id"]
    try:
        rendered = render(tokenizer, messages, False, tools)
        further = render(tokenizer, [*messages, reply], False, tools)
    except InputError:
        return ""
    following = further.removeprefix(rendered) if further.startswith(rendered) else ""
    return next((end for end in ends if following.startswith(end)), "")


def pieces(tokenizer: Any, messages: Messages, tools: Tools = None) -> Pieces:
    """Split the rendered conversation into (text, whether it is trained on).

    Assistant content and the end-of-turn token are trained on; template headers, all other turns and answers of weight
    0 are not:

        [{"user": "Hi"}, {"assistant": "Yes?"}]  ->  ("...user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", False),
                                                     ("Yes?<|im_end|>", True), ("\\n", False)

    Raises:
        RewritesEarlierTurnsError: the template rewrites earlier turns when a later one is added.
        InputError: as `turn_of`.
    """
    parts: Pieces = []
    written, checked = "", 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = turn_of(tokenizer, messages[: i + 1], tools, checked, written)
        checked = i + 1
        if not turn.header.startswith(written):
            raise RewritesEarlierTurnsError(
                "the chat template rewrites earlier turns, so labels cannot be placed", ANOTHER_TEMPLATE
            )
        parts += [(turn.header[len(written) :], False), (turn.answer, is_trained(message)), (turn.after, False)]
        written = turn.rendered
    return [(text, trained) for text, trained in parts if text]


def last_turn_pieces(tokenizer: Any, messages: Messages, tools: Tools = None) -> Pieces:
    """As `pieces`, up to the last answer; all before it is one piece if the template rewrites earlier turns."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    try:
        return pieces(tokenizer, messages, tools)
    except RewritesEarlierTurnsError:
        return _parts(turn_of(tokenizer, messages, tools), is_trained(messages[-1]))


def _parts(turn: Turn, trained: bool) -> Pieces:
    parts = ((turn.header, False), (turn.answer, trained), (turn.after, False))
    return [(text, is_label) for text, is_label in parts if text]


def with_reasoning(messages: Messages, policy: Reasoning) -> Messages:
    """Messages with the traces that are rendered: `strip` removes all, `last` all but that of the last answer."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    removed = {"strip": range(len(messages)), "last": range(last)}.get(policy, range(0))
    return [
        {key: value for key, value in message.items() if key != "reasoning_content"} if i in removed else message
        for i, message in enumerate(messages)
    ]


def examples_of(tokenizer: Any, record: Mapping[str, Any], reasoning: Reasoning = "template") -> list[Pieces]:
    """The training examples of a record: one, or one per trained answer if the template rewrites earlier turns.

    Each is rendered as the model gets to read it when it is served. Plain text uses no template: the text and the
    end-of-text token are trained on.

    Raises:
        InputError: as `turn_of`; or a trace is to be kept and the template does not write it.
    """
    if is_text(record):
        begin = [(tokenizer.bos_token, False)] if adds_bos(tokenizer) else []
        return [[*begin, (record["messages"][0]["content"] + tokenizer.eos_token, True)]]
    messages, tools = with_reasoning(record["messages"], reasoning), record.get("tools")
    try:
        examples = [pieces(tokenizer, messages, tools)]
    except RewritesEarlierTurnsError:
        ends = [i + 1 for i, message in enumerate(messages) if is_trained(message)]
        turns = [turn_of(tokenizer, messages[:end], tools) for end in ends]
        examples = [_parts(turn, True) for turn in turns]
    if reasoning == "keep":
        _refuse_lost_traces(messages, examples)
    return examples


def _refuse_lost_traces(messages: Messages, examples: Sequence[Pieces]) -> None:
    """Check that each trained answer begins with its trace; the answer itself may have the same words."""
    trained = [text for parts in examples for text, is_trained_on in parts if is_trained_on]
    for message, text in zip(filter(is_trained, messages), trained, strict=True):
        trace, content = (message.get("reasoning_content") or "").strip(), message["content"].strip()
        found = text.find(trace)
        if found < 0 or (trace and content not in text[found + len(trace) :]):
            raise InputError(
                "the chat template leaves out a trace that tokenized.reasoning keeps",
                "use reasoning: template, or another chat template",
            )


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer prepends its beginning-of-text token by default, as its model expects.

    Templates must write it explicitly.
    """
    return tokenizer.bos_token_id is not None and tokenizer("x").input_ids[0] == tokenizer.bos_token_id


def encode_pieces(tokenizer: Any, texts: Iterable[Pieces]) -> list[list[list[int]]]:
    """Token ids of each piece of each text.

    Pieces are tokenized separately, so that a prompt has the same ids in training and generation.
    """
    texts = list(texts)
    number = {text: i for i, text in enumerate(dict.fromkeys(text for parts in texts for text, _ in parts))}
    ids = tokenizer(list(number), add_special_tokens=False, return_attention_mask=False)["input_ids"] if number else []
    return [[ids[number[text]] for text, _ in parts] for parts in texts]


def encode(tokenizer: Any, messages: Messages, tools: Tools = None) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a conversation, both (tokens,).

    A label equals the id if the token is trained on, else -100.
    """
    return _with_labels(tokenizer, pieces(tokenizer, messages, tools))


def encode_record(tokenizer: Any, record: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """As `encode`, for each example of a record (`examples_of`)."""
    return [_with_labels(tokenizer, parts) for parts in examples_of(tokenizer, record)]


def _with_labels(tokenizer: Any, parts: Pieces) -> tuple[list[int], list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    for (_, trained), ids in zip(parts, encode_pieces(tokenizer, [parts])[0], strict=True):
        input_ids += ids
        labels += ids if trained else [IGNORE] * len(ids)
    return input_ids, labels


def loss_weights(
    tokenizer: Any,
    encoded: Iterable[tuple[Sequence[int], bool]],
    said: Iterable[tuple[str, str]],
    fields: Mapping[str, float],
    per_example: bool,
) -> list[float]:
    """Loss weight of each token, (tokens,); 0 where it is not trained on.

    Args:
        encoded: token ids of each piece, and whether it is trained on.
        said: each piece that is trained on, and the content of its message. If the content is a JSON object, the
            tokens of a named field's value have that field's weight instead of 1. In `{"summary": "...", "category":
            "login"}` a single token out of about thirty decides whether the answer is correct.
        fields: JSON field -> weight.
        per_example: scale to a sum of 1, so that every example has the same weight; otherwise every token has.
    """
    weights: list[float] = []
    answers = iter(said)
    for ids, trained in encoded:
        weights += _answer_weights(tokenizer, ids, *next(answers), fields) if trained else [0.0] * len(ids)
    total = sum(weights)
    return [weight / total for weight in weights] if per_example and total else weights


def _answer_weights(
    tokenizer: Any, ids: Sequence[int], text: str, content: str, fields: Mapping[str, float]
) -> list[float]:
    weights, content = [1.0] * len(ids), content.strip()
    begin = text.rfind(content)
    if not fields or not content or begin < 0:
        return weights
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    is_whole = list(ids) == encoded["input_ids"]  # else the answer is cut
    for name, weight in fields.items() if is_whole else ():
        for match in _field(name).finditer(text, begin, begin + len(content)):
            start, stop = match.span(1) if match.group(1) is not None else match.span(2)
            for i, (a, b) in enumerate(encoded["offset_mapping"]):
                if a < stop and b > start:
                    weights[i] = weight
    return weights


def trimmed(answer: str) -> list[str]:
    """An answer as it is, and as templates trim it: white space (Llama) or line breaks (Qwen3), at one end or both."""
    if not (answer[:1].isspace() or answer[-1:].isspace()):
        return [answer]
    from_left = (answer, answer.lstrip("\n"), answer.lstrip())
    return list(dict.fromkeys(text for left in from_left for text in (left, left.rstrip("\n"), left.rstrip())))


def has_field(answer: str, name: str) -> bool:
    """Whether an answer contains a JSON field whose value `loss_weights` can weight: anything but a list or an
    object."""
    return _field(name).search(answer) is not None


def _field(name: str) -> re.Pattern[str]:
    """A JSON field with a text (group 1), or a number, true, false or null (group 2)."""
    return re.compile(rf'"{re.escape(name)}"\s*:\s*+(?:"((?:[^"\\]|\\.)*)"|([^\s",{{}}\[\]]+))')


def encode_prompt(tokenizer: Any, messages: Messages, tools: Tools = None, reasoning: bool = False) -> list[int]:
    """Token ids of the prompt, including the assistant header.

    They equal the ids before the last answer in training: earlier turns are split into the same pieces, and the header
    is the same.

    Args:
        reasoning: whether an answer with a trace is expected, so that the template may open one.
    """
    text = generation_prompt(tokenizer, messages, tools, reasoning)
    try:
        parts = pieces(tokenizer, messages, tools)
    except RewritesEarlierTurnsError:
        parts = []
    before = "".join(piece for piece, _ in parts)
    if not text.startswith(before):
        parts, before = [], ""
    return [token for ids in encode_pieces(tokenizer, [[*parts, (text[len(before) :], False)]])[0] for token in ids]


def generation_prompt(tokenizer: Any, messages: Messages, tools: Tools = None, reasoning: bool = False) -> str:
    """The rendered prompt with the header with which an answer begins in training."""
    answer = {"role": "assistant", "content": "Yes"} | ({"reasoning_content": "I think so."} if reasoning else {})
    for thinking in (None, reasoning) if _thinks(tokenizer) else ():
        header = render(tokenizer, messages, True, tools, thinking)
        if render(tokenizer, [*messages, answer], False, tools, thinking).startswith(header):
            return header
    return render(tokenizer, messages, True, tools)


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack examples into rows, as `packed_rows`.

    Returns:
        Indices of the examples in each row.

    >>> pack([5, 6, 3, 2], room=8)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    for i, row in enumerate(packed_rows(lengths, room)):
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
    return rows


def packed_rows(lengths: Sequence[int], room: int) -> array[int]:
    """Pack examples into rows of at most `room` tokens by first fit, in the given order.

    A longer example gets a separate row.

    A tree over the rows, whose nodes hold the maximum free space below them, finds the first row that fits: O(n log n)
    for n examples.

    Returns:
        The row of each example.
    """
    row_of, rows = array("q"), 0
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    # node k has children 2k and 2k + 1; leaves are rows, including empty ones
    most_room = array("q", [room]) * (2 * leaves)
    for length in lengths:
        node = 1
        if length > room:
            node = leaves + rows
        while node < leaves:
            node *= 2
            if most_room[node] < length:
                node += 1
        row_of.append(node - leaves)
        rows = max(rows, node - leaves + 1)
        most_room[node] -= length
        while node > 1:
            node //= 2
            most_room[node] = max(most_room[2 * node], most_room[2 * node + 1])
    return row_of
