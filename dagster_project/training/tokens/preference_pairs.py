"""Preference pairs -> token ids, with the chat template of the policy.

Used by all alignment methods and reward models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.core.chat import IGNORE, encode_pieces, encode_prompt, last_turn_pieces
from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message, Messages, Tools, is_plain

Answered = tuple[list[int], list[int]]
"""(ids of the prompt including the assistant's header, ids of the answer including its end-of-turn token)."""


def answered(tokenizer: Any, conversations: Sequence[Messages], tools: Sequence[Tools] | None = None) -> list[Answered]:
    """Encode conversations that end with an answer. Text that the template adds after the end of the turn is left out.

        [user "Hi", assistant "Yes?"] -> ids of "...user\\nHi<|im_end|>\\n<|im_start|>assistant\\n" and "Yes?<|im_end|>"

    Args:
        tools: of each conversation; None if none has any.
    Raises:
        InputError: the template refuses a conversation, or its turns cannot be separated.
    """
    offered = zip(conversations, tools or [None] * len(conversations), strict=True)
    cuts = [last_turn_pieces(tokenizer, _unweighted(turns), known) for turns, known in offered]
    encoded = []
    for cut, ids in zip(cuts, encode_pieces(tokenizer, cuts), strict=True):
        last = max(i for i, (_, trained) in enumerate(cut) if trained)
        encoded.append(([token for piece in ids[:last] for token in piece], ids[last]))
    return encoded


def _unweighted(messages: Messages) -> list[Message]:
    """Messages without loss weights, which concern imitation: a preference is about the last answer."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def reply(text: str) -> list[Message]:
    """A conversation of one assistant message."""
    return [{"role": "assistant", "content": text}]


def prompt_ids(tokenizer: Any, pair: Mapping[str, Any]) -> list[int]:
    """Ids of a pair's prompt with the header of a new answer, which opens a trace if that of the chosen answer does."""
    return encode_prompt(tokenizer, pair["prompt"], pair.get("tools"), bool(pair["chosen"][0].get("reasoning_content")))


def both(tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids of the prompt, the chosen and the rejected answer of each pair.

    Some templates begin an answer with a trace differently. If only one answer of a pair has a trace, the prompt ends
    where the two headers differ, and the rest of each header belongs to its answer.
    """
    tools = [pair.get("tools") for pair in pairs]
    chosen = answered(tokenizer, [[*pair["prompt"], *pair["chosen"]] for pair in pairs], tools)
    rejected = answered(tokenizer, [[*pair["prompt"], *pair["rejected"]] for pair in pairs], tools)
    return [_with_one_prompt(*sides) for sides in zip(chosen, rejected, strict=True)]


def refuse_misfits(
    tokenizer: Any, pairs: Mapping[str, Sequence[Mapping[str, Any]]], model: str, next_step: str = ""
) -> None:
    """Check that the chat template writes the tools, calls and traces of all pairs, before anything is trained.

    Args:
        pairs: split -> its pairs.
        model: model of the template, for the message.
        next_step: advice; "" for that of the refusal.
    Raises:
        InputError: it does not.
    """
    for split, of_split in pairs.items():
        for pair in of_split:
            if not pair.get("tools") and all(is_plain(pair[side]) for side in ("prompt", "chosen", "rejected")):
                continue
            try:
                both(tokenizer, [pair])
            except InputError as error:
                what = (
                    f"data/preferences: pair {pair['example_id']} ({split}) does not fit the chat template of {model}"
                )
                raise InputError(f"{what}: {error.what}", next_step or error.hint) from None


def _with_one_prompt(chosen: Answered, rejected: Answered) -> tuple[list[int], list[int], list[int]]:
    (prompt, good), (other, bad) = chosen, rejected
    if prompt == other:
        return prompt, good, bad
    shared = next(i for i, (a, b) in enumerate(zip([*prompt, None], [*other, None], strict=False)) if a != b)
    return prompt[:shared], prompt[shared:] + good, other[shared:] + bad


def labelled(prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one answer; only the answer is labeled."""
    return [*prompt, *answer], [IGNORE] * len(prompt) + [*answer]
