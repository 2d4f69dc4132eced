"""Conversations -> token ids and labels, by the model's chat template. Only assistant turns contribute to the loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dagster_project.core.errors import InputError

IGNORE = -100
"""Label of a token that is ignored by the loss."""

Messages = Sequence[dict[str, str]]
Pieces = list[tuple[str, bool]]
"""A text split into (text, whether it is trained on)."""


def is_text(record: Mapping[str, Any]) -> bool:
    """Whether a record is plain text instead of a conversation: a single assistant message, with `{"kind": "text"}` in its meta."""
    meta = record.get("meta") or ""
    return '"text"' in meta and [m["role"] for m in record["messages"]] == ["assistant"] and json.loads(meta).get("kind") == "text"


def render(tokenizer: Any, messages: Messages, add_generation_prompt: bool = False) -> str:
    """Render the conversation with the tokenizer's chat template, in transformers' sandbox.

    Raises:
        InputError: the template rejects the conversation or fails on it.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the chat template refuses it: {reason}", "use another chat template") from None


def pieces(tokenizer: Any, messages: Messages) -> Pieces:
    """Split the rendered conversation into (text, whether it is trained on).

    Assistant content and the end-of-turn token are trained on; template headers and all other turns are not:

        [{"user": "Hi"}, {"assistant": "Yes?"}]  ->  ("...user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", False),
                                                     ("Yes?<|im_end|>", True), ("\\n", False)

    Raises:
        InputError: the template rejects the conversation, rewrites earlier turns when a later one is added, drops assistant content, or does
            not end the turn with the tokenizer's end-of-turn token; or the first turn is the assistant's.
    """
    parts: Pieces = []
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not i:
            raise InputError("the assistant speaks first, so there is no prompt to render", "begin with a system or user turn")
        header = render(tokenizer, messages[:i], add_generation_prompt=True)
        rendered = render(tokenizer, messages[: i + 1])
        answer, end = message["content"].strip(), tokenizer.eos_token
        if not (header.startswith(written) and rendered.startswith(header)):
            raise InputError("the chat template rewrites earlier turns, so labels cannot be placed", "use another chat template")
        turn = rendered[len(header) :]
        stop = turn.find(end, max(0, turn.find(answer)) + len(answer))
        if answer not in turn or stop < 0:
            raise InputError(f"the chat template does not end the assistant's turn with {end!r}", "use another chat template or tokenizer")
        stop += len(end)
        parts += [(header[len(written) :], False), (turn[:stop], True), (turn[stop:], False)]
        written = rendered
    return [(text, trained) for text, trained in parts if text]


def record_pieces(tokenizer: Any, record: Mapping[str, Any]) -> Pieces:
    """The pieces of a record. Plain text uses no template: the text and the end-of-text token are trained on.

    Raises:
        InputError: as `pieces`.
    """
    if not is_text(record):
        return pieces(tokenizer, record["messages"])
    begin = [(tokenizer.bos_token, False)] if adds_bos(tokenizer) else []
    return [*begin, (record["messages"][0]["content"] + tokenizer.eos_token, True)]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer prepends its beginning-of-text token by default, as its model expects. Templates must write it explicitly."""
    return tokenizer.bos_token_id is not None and tokenizer("x").input_ids[0] == tokenizer.bos_token_id


def encode_pieces(tokenizer: Any, texts: Iterable[Pieces]) -> list[list[list[int]]]:
    """Token ids of each piece of each text. Pieces are tokenized separately, so that a prompt has the same ids in training and generation."""
    texts = list(texts)
    number = {text: i for i, text in enumerate(dict.fromkeys(text for parts in texts for text, _ in parts))}
    ids = tokenizer(list(number), add_special_tokens=False, return_attention_mask=False)["input_ids"] if number else []
    return [[ids[number[text]] for text, _ in parts] for parts in texts]


def encode(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a conversation, both (tokens,). A label equals the id if the token is trained on, else -100."""
    return _with_labels(tokenizer, pieces(tokenizer, messages))


def encode_record(tokenizer: Any, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """As `encode`, for a record, which may be plain text."""
    return _with_labels(tokenizer, record_pieces(tokenizer, record))


def _with_labels(tokenizer: Any, parts: Pieces) -> tuple[list[int], list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    for (_, trained), ids in zip(parts, encode_pieces(tokenizer, [parts])[0], strict=True):
        input_ids += ids
        labels += ids if trained else [IGNORE] * len(ids)
    return input_ids, labels


def loss_weights(tokenizer: Any, labels: Sequence[int], answer: str, fields: Mapping[str, float], per_example: bool) -> list[float]:
    """Loss weight of each token, (tokens,); 0 where the label is -100.

    Args:
        labels: from `encode`, (tokens,).
        answer: the last response. If it is a JSON object, the tokens of a named field's value have that field's weight instead of 1.
            In `{"summary": "...", "category": "login"}` a single token out of about thirty decides whether the answer is correct.
        fields: JSON field -> weight.
        per_example: scale to a sum of 1, so that every example has the same weight; otherwise every token has.
    """
    weights = [float(label != IGNORE) for label in labels]
    last = len(labels) - next((n for n, label in enumerate(reversed(labels)) if label != IGNORE), len(labels))
    for text in (answer, answer.strip()) if fields else ():
        encoded = tokenizer(text + tokenizer.eos_token, add_special_tokens=False, return_offsets_mapping=True)
        first = last - len(encoded["input_ids"])
        if first < 0 or list(labels[first:last]) != encoded["input_ids"]:
            continue  # the template trims or reformats the answer
        for name, weight in fields.items():
            for match in re.finditer(rf'"{re.escape(name)}"\s*:\s*(?:"((?:[^"\\]|\\.)*)"|([^",{{}}\[\]]+))', text):
                begin, stop = match.span(1) if match.group(1) is not None else match.span(2)
                for i, (start, end) in enumerate(encoded["offset_mapping"]):
                    if start < stop and end > begin:
                        weights[first + i] = weight
        break
    total = sum(weights)
    return [weight / total for weight in weights] if per_example and total else weights


def has_field(answer: str, name: str) -> bool:
    """Whether an answer contains a JSON field, as matched by `loss_weights`."""
    return re.search(rf'"{re.escape(name)}"\s*:', answer) is not None


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of the prompt, including the assistant header.

    They equal the ids that `encode` places before the answer, because earlier turns are split into the same pieces.

    Raises:
        InputError: the template rewrites earlier turns.
    """
    text = render(tokenizer, messages, add_generation_prompt=True)
    parts = pieces(tokenizer, messages)
    for piece, _ in parts:
        if not text.startswith(piece):
            raise InputError("the chat template rewrites earlier turns", "use another chat template")
        text = text[len(piece) :]
    return [token for ids in encode_pieces(tokenizer, [[*parts, (text, False)]])[0] for token in ids]


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack examples into rows of at most `room` tokens by first fit, in the given order. A longer example gets a separate row.

    A tree over the rows, whose nodes hold the maximum free space below them, finds the first row that fits: O(n log n) for n examples.

    Returns:
        Indices of the examples in each row.

    >>> pack([5, 6, 3, 2], room=8)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    most_room = [room] * (2 * leaves)  # node k has children 2k and 2k + 1; leaves are rows, including empty ones
    for i, length in enumerate(lengths):
        node = 1
        if length > room:
            node = leaves + len(rows)
        while node < leaves:
            node *= 2
            if most_room[node] < length:
                node += 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(i)
        most_room[node] -= length
        while node > 1:
            node //= 2
            most_room[node] = max(most_room[2 * node], most_room[2 * node + 1])
    return rows
