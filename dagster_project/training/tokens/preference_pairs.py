"""Preference pairs -> token ids, with the chat template of the policy. Used by all alignment methods and reward models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.core.chat import IGNORE, encode_pieces, last_turn_pieces
from dagster_project.core.messages import Message, Messages, Tools

Answered = tuple[list[int], list[int]]
"""(ids of the prompt including the assistant's header, ids of the answer including its end-of-turn token)."""


def answered(tokenizer: Any, conversations: Sequence[Messages], tools: Sequence[Tools] | None = None) -> list[Answered]:
    """Encode conversations that end with an answer. Text that the template adds after the end of the turn is left out.

        [user "Hi", assistant "Yes?"]  ->  ids of "...user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", ids of "Yes?<|im_end|>"

    Args:
        tools: of each conversation; None if none has any.
    Raises:
        InputError: the template refuses a conversation, or its turns cannot be separated.
    """
    defined = tools or [None] * len(conversations)
    cuts = [last_turn_pieces(tokenizer, _unweighted(turns), known) for turns, known in zip(conversations, defined, strict=True)]
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


def both(tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids of the prompt, the chosen and the rejected answer of each pair."""
    tools = [pair.get("tools") for pair in pairs]
    chosen = answered(tokenizer, [[*pair["prompt"], *pair["chosen"]] for pair in pairs], tools)
    rejected = answered(tokenizer, [[*pair["prompt"], *pair["rejected"]] for pair in pairs], tools)
    return [(prompt, good, bad) for (prompt, good), (_, bad) in zip(chosen, rejected, strict=True)]


def labelled(prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one answer; only the answer is labelled."""
    return [*prompt, *answer], [IGNORE] * len(prompt) + [*answer]
