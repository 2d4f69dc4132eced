"""Batched greedy generation.

In float32 the answers equal those of single prompts; in bfloat16 some differ with the batch size, which is part of a
run's identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dagster_project.core.progress import Progress
from dagster_project.core.rendering import end_ids
from dagster_project.training.inference.decoding import decode, keeps_all_tokens, prefill
from dagster_project.training.methods.load import VirtualTokenModel
from dagster_project.training.tokens.collators import batches_by_length

if TYPE_CHECKING:
    import torch


def generate_ids(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, what: str
) -> list[list[int]]:
    """Generate the answer to each prompt.

    The common prefix of all prompts (system prompt, few-shot examples) is run through the model once.

    Args:
        prompts: token ids of each prompt, including the assistant's header.
        what: name of the work in progress lines.
    Returns:
        Token ids of each answer, including the end-of-turn token.
    """
    if not prompts:
        return []
    causal, prefix = (model.causal, model.new_cache(1)) if isinstance(model, VirtualTokenModel) else (model, None)
    shared = _common_prefix(prompts) if keeps_all_tokens(causal) else 0
    if shared:
        prefix = prefill(causal, prompts[0][:shared], prefix)
    if prefix is not None and not keeps_all_tokens(causal):
        batch_size = 1
    ends = end_ids(tokenizer)
    progress = Progress(what, len(prompts), "answer")
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in batches_by_length(prompts, batch_size):
        suffixes = [prompts[i][shared:] for i in batch]
        generated = decode(causal, suffixes, _most_likely, max_new_tokens, ends, tokenizer.pad_token_id, prefix)
        for i, ids in zip(batch, generated, strict=True):
            answers[i] = ids
        progress.advance(len(batch))
    return answers


def _most_likely(logits: torch.Tensor, *_: Any) -> list[int]:
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


def _common_prefix(prompts: Sequence[list[int]]) -> int:
    """Length of the longest common prefix, shorter than every prompt; 0 if it is too short to save time."""
    first, last = min(prompts), max(prompts)
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    n = min(n, min(map(len, prompts)) - 1)
    return n if n >= 16 and len(prompts) > 1 else 0
