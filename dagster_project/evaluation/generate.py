"""Batched greedy generation: the same answers whatever the batch size, padding or order of the prompts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from dagster_project.progress import Progress


def generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, what: str) -> list[str]:
    """The model's answer to each prompt, without special tokens.

    The ids that all prompts begin with (system prompt, shots) are run through the model once and shared.

    Args:
        prompts: token ids of each prompt, the assistant's header included.
        what: named in the progress lines.
    """
    import torch
    from transformers import DynamicCache

    if not prompts:
        return []
    shared = _common_prefix(prompts)
    progress = Progress(what, len(prompts), "answer")
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    with torch.inference_mode():
        prefix = torch.tensor([prompts[0][:shared]], device=model.device)
        cache = model(prefix, use_cache=True, cache=DynamicCache(config=model.config)).cache if shared else None
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rests = [prompts[i][shared:] for i in batch]
            width = max(map(len, rests))
            ids = torch.tensor(
                [[*prompts[0][:shared], *[tokenizer.pad_token_id] * (width - len(rest)), *rest] for rest in rests], device=model.device
            )
            mask = torch.tensor([[1] * shared + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=model.device)
            past = copy.deepcopy(cache)
            if past is not None:
                past.batch_repeat_interleave(len(batch))
            out = model.generate(
                ids,
                attention_mask=mask,
                cache=past,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            for i, row in zip(batch, out[:, ids.shape[1] :], strict=True):
                answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
            progress.advance(len(batch))
    return answers


def _common_prefix(prompts: Sequence[list[int]]) -> int:
    """Length of the longest common beginning, at least one token short of every prompt; 0 where sharing it would save little."""
    first, last = min(prompts), max(prompts)
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    n = min(n, min(map(len, prompts)) - 1)
    return n if n >= 16 and len(prompts) > 1 else 0
