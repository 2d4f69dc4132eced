"""Preference pairs -> token ids, in the words of the chat template that the policy was tuned with. All that align or judge read them from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.core.chat import IGNORE, Messages, encode_pieces, pieces

Answered = tuple[list[int], list[int]]
"""(ids of the prompt with the assistant's header, ids of the answer with its end-of-turn token)."""


def answered(tokenizer: Any, conversations: Sequence[Messages]) -> list[Answered]:
    """Conversations that end with an answer, cut before it. What the template writes after the end of the turn is left out.

        [user "Hi", assistant "Yes?"]  ->  ids of "...user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", ids of "Yes?<|im_end|>"

    Raises:
        InputError: the template refuses a conversation, or its turns cannot be told apart.
    """
    cuts = [pieces(tokenizer, conversation) for conversation in conversations]
    found = []
    for cut, ids in zip(cuts, encode_pieces(tokenizer, cuts), strict=True):
        last = max(i for i, (_, trained) in enumerate(cut) if trained)
        found.append(([token for piece in ids[:last] for token in piece], ids[last]))
    return found


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def both(tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], list[int], list[int]]]:
    """Of each pair the ids of prompt, chosen and rejected answer."""
    chosen = answered(tokenizer, [[*pair["prompt"], *pair["chosen"]] for pair in pairs])
    rejected = answered(tokenizer, [[*pair["prompt"], *pair["rejected"]] for pair in pairs])
    return [(prompt, good, bad) for (prompt, good), (_, bad) in zip(chosen, rejected, strict=True)]


def labelled(prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one answer, as likelihoods are asked for."""
    return [*prompt, *answer], [IGNORE] * len(prompt) + [*answer]
