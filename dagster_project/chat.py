"""Conversations -> token ids and labels by the model's own chat template: loss on what the assistant says and on nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.errors import InputError

IGNORE = -100
"""Label of a token that does not count in the loss."""

Messages = Sequence[dict[str, str]]


def pieces(tokenizer: Any, messages: Messages) -> list[tuple[str, bool]]:
    """The rendered conversation cut into (text, is it trained on).

    The assistant's words and the end-of-turn token are trained on; the template's headers and all other turns are not:

        [{"user": "Hi"}, {"assistant": "Yes?"}]  ->  ("...user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", False),
                                                     ("Yes?<|im_end|>", True), ("\\n", False)

    Raises:
        InputError: the template rewrites earlier turns when a later one comes, drops the assistant's words, or does not end its turn with
            the tokenizer's end-of-turn token.
    """
    found: list[tuple[str, bool]] = []
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        header = tokenizer.apply_chat_template(list(messages[:i]), tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(list(messages[: i + 1]), tokenize=False)
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


def encode(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a conversation, both (tokens,). Labels equal the ids where trained on, else -100.

    Each piece is tokenized by itself, so that a prompt has the same ids here and in generation.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for text, trained in pieces(tokenizer, messages):
        ids = tokenizer.encode(text, add_special_tokens=False)
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


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Ids of everything before the answer that is asked for, the assistant's header included.

    These are the ids that `encode` puts before that answer: earlier turns are cut into the same pieces.
    """
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids: list[int] = []
    for piece, _ in pieces(tokenizer, messages):
        if not text.startswith(piece):
            raise InputError("the chat template rewrites earlier turns", "use another chat template")
        ids += tokenizer.encode(piece, add_special_tokens=False)
        text = text[len(piece) :]
    return ids + tokenizer.encode(text, add_special_tokens=False)


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of the examples in each row of at most `room` tokens: first fit, in the order given. A longer example has a row of its own.

    >>> pack([5, 6, 3, 2], room=8)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for i, length in enumerate(lengths):
        row = next((r for r, left in enumerate(free) if left >= length), None)
        if row is None:
            rows.append([i])
            free.append(room - length)
        else:
            rows[row].append(i)
            free[row] -= length
    return rows
