"""Conversations -> token ids and labels by the model's own chat template: loss on what the assistant says and on nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dagster_project.core.errors import InputError

IGNORE = -100
"""Label of a token that does not count in the loss."""

Messages = Sequence[dict[str, str]]
Pieces = list[tuple[str, bool]]
"""A text cut into (text, is it trained on)."""


def is_text(record: Mapping[str, Any]) -> bool:
    """Whether a record is plain text to continue and no conversation: one message, which the assistant says, and `{"kind": "text"}` in its meta."""
    meta = record.get("meta") or ""
    return '"text"' in meta and [m["role"] for m in record["messages"]] == ["assistant"] and json.loads(meta).get("kind") == "text"


def render(tokenizer: Any, messages: Messages, add_generation_prompt: bool = False) -> str:
    """The conversation by the tokenizer's chat template, in transformers' sandbox.

    Raises:
        InputError: the template refuses the conversation or fails on it.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the chat template refuses it: {said}", "use another chat template") from None


def pieces(tokenizer: Any, messages: Messages) -> Pieces:
    """The rendered conversation cut into (text, is it trained on).

    The assistant's words and the end-of-turn token are trained on; the template's headers and all other turns are not:

        [{"user": "Hi"}, {"assistant": "Yes?"}]  ->  ("...user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", False),
                                                     ("Yes?<|im_end|>", True), ("\\n", False)

    Raises:
        InputError: the template refuses the conversation, rewrites earlier turns when a later one comes, drops the assistant's words, or does
            not end its turn with the tokenizer's end-of-turn token; or the assistant speaks first.
    """
    found: Pieces = []
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not i:
            raise InputError("the assistant speaks first, so there is no prompt to render", "begin with a system or user turn")
        header = render(tokenizer, messages[:i], add_generation_prompt=True)
        whole = render(tokenizer, messages[: i + 1])
        said, end = message["content"].strip(), tokenizer.eos_token
        if not (header.startswith(written) and whole.startswith(header)):
            raise InputError("the chat template rewrites earlier turns, so labels cannot be placed", "use another chat template")
        spoken = whole[len(header) :]
        stop = spoken.find(end, max(0, spoken.find(said)) + len(said))
        if said not in spoken or stop < 0:
            raise InputError(f"the chat template does not end the assistant's turn with {end!r}", "use another chat template or tokenizer")
        stop += len(end)
        found += [(header[len(written) :], False), (spoken[:stop], True), (spoken[stop:], False)]
        written = whole
    return [(text, trained) for text, trained in found if text]


def record_pieces(tokenizer: Any, record: Mapping[str, Any]) -> Pieces:
    """The pieces of a record. Plain text has no template: all of it is trained on, and the end-of-text token after it.

    Raises:
        InputError: as `pieces`.
    """
    if not is_text(record):
        return pieces(tokenizer, record["messages"])
    begin = [(tokenizer.bos_token, False)] if adds_bos(tokenizer) else []
    return [*begin, (record["messages"][0]["content"] + tokenizer.eos_token, True)]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its beginning-of-text token before a text, as its model is used to. Templates have to write it."""
    return tokenizer.bos_token_id is not None and tokenizer("x").input_ids[0] == tokenizer.bos_token_id


def encode_pieces(tokenizer: Any, cut: Iterable[Pieces]) -> list[list[list[int]]]:
    """The ids of each piece of each text. Each piece is tokenized by itself, so that a prompt has the same ids here and in generation; all in one call."""
    cut = list(cut)
    number = {text: i for i, text in enumerate(dict.fromkeys(text for found in cut for text, _ in found))}
    ids = tokenizer(list(number), add_special_tokens=False, return_attention_mask=False)["input_ids"] if number else []
    return [[ids[number[text]] for text, _ in found] for found in cut]


def encode(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a conversation, both (tokens,). Labels equal the ids where trained on, else -100."""
    return _labelled(tokenizer, pieces(tokenizer, messages))


def encode_record(tokenizer: Any, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """As `encode`, of a record, which may be plain text."""
    return _labelled(tokenizer, record_pieces(tokenizer, record))


def _labelled(tokenizer: Any, cut: Pieces) -> tuple[list[int], list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    for (_, trained), ids in zip(cut, encode_pieces(tokenizer, [cut])[0], strict=True):
        input_ids += ids
        labels += ids if trained else [IGNORE] * len(ids)
    return input_ids, labels


def loss_weights(tokenizer: Any, labels: Sequence[int], answer: str, fields: Mapping[str, float], per_example: bool) -> list[float]:
    """How much each token counts in the loss, (tokens,); 0 where the label is -100.

    Args:
        labels: as `encode` gives them.
        answer: the last response. Where it is a JSON object, the tokens of a named field's value count that field's weight instead of 1.
            In `{"summary": "...", "category": "login"}` one token decides what the answer is worth, among thirty that do not.
        per_example: scale to a sum of 1, so that every example counts the same; otherwise every token does.
    """
    weights = [float(label != IGNORE) for label in labels]
    last = len(labels) - next((n for n, label in enumerate(reversed(labels)) if label != IGNORE), len(labels))
    for text in (answer, answer.strip()) if fields else ():
        spoken = tokenizer(text + tokenizer.eos_token, add_special_tokens=False, return_offsets_mapping=True)
        first = last - len(spoken["input_ids"])
        if first < 0 or list(labels[first:last]) != spoken["input_ids"]:
            continue  # the template trims the answer, or writes it in a way of its own
        for name, weight in fields.items():
            for match in re.finditer(rf'"{re.escape(name)}"\s*:\s*(?:"((?:[^"\\]|\\.)*)"|([^",{{}}\[\]]+))', text):
                begin, stop = match.span(1) if match.group(1) is not None else match.span(2)
                for i, (start, end) in enumerate(spoken["offset_mapping"]):
                    if start < stop and end > begin:
                        weights[first + i] = weight
        break
    total = sum(weights)
    return [weight / total for weight in weights] if per_example and total else weights


def has_field(answer: str, name: str) -> bool:
    """Does an answer write the JSON field that `loss_weights` looks for?"""
    return re.search(rf'"{re.escape(name)}"\s*:', answer) is not None


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Ids of everything before the answer that is asked for, the assistant's header included.

    These are the ids that `encode` puts before that answer: earlier turns are cut into the same pieces.
    """
    text = render(tokenizer, messages, add_generation_prompt=True)
    cut = pieces(tokenizer, messages)
    for piece, _ in cut:
        if not text.startswith(piece):
            raise InputError("the chat template rewrites earlier turns", "use another chat template")
        text = text[len(piece) :]
    return [token for ids in encode_pieces(tokenizer, [[*cut, (text, False)]])[0] for token in ids]


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of the examples in each row of at most `room` tokens: first fit, in the order given. A longer example has a row of its own.

    A tree over the rows, each node with the most room in any row beneath it, leads to the first row that fits: n log n steps for n examples.

    >>> pack([5, 6, 3, 2], room=8)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    most = [room] * (2 * leaves)  # node k has children 2k and 2k + 1; the leaves are rows, those not begun included
    for i, length in enumerate(lengths):
        node = 1
        if length > room:
            node = leaves + len(rows)
        while node < leaves:
            node *= 2
            if most[node] < length:
                node += 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(i)
        most[node] -= length
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return rows
