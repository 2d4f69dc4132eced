"""Batched greedy generation: the same answers whatever the batch size, padding or order of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dagster_project.core.progress import Progress
from dagster_project.training.inference.decoding import decode, keeps_all, read
from dagster_project.training.methods.load import Prompted

if TYPE_CHECKING:
    import torch


def generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, what: str) -> list[str]:
    """The model's answer to each prompt, without special tokens.

    The ids that all prompts begin with (system prompt, shots) are run through the model once and shared.

    Args:
        prompts: token ids of each prompt, the assistant's header included.
        what: named in the progress lines.
    """
    if not prompts:
        return []
    causal, behind = (model.causal, model.behind(1)) if isinstance(model, Prompted) else (model, None)
    shared = _common_prefix(prompts) if keeps_all(causal) else 0
    if shared:
        behind = read(causal, prompts[0][:shared], behind)
    if behind is not None and not keeps_all(causal):
        batch_size = 1
    progress = Progress(what, len(prompts), "answer")
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rests = [prompts[i][shared:] for i in batch]
        found = decode(causal, rests, _likeliest, max_new_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id, behind)
        for i, ids in zip(batch, found, strict=True):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        progress.advance(len(batch))
    return answers


def _likeliest(logits: torch.Tensor, *_: Any) -> list[int]:
    found: list[int] = logits.argmax(-1).tolist()
    return found


def _common_prefix(prompts: Sequence[list[int]]) -> int:
    """Length of the longest common beginning, at least one token short of every prompt; 0 where sharing it would save little."""
    first, last = min(prompts), max(prompts)
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    n = min(n, min(map(len, prompts)) - 1)
    return n if n >= 16 and len(prompts) > 1 else 0
