"""The largest pass of trainings that read what two texts have in common once, and such passes on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from dagster_project.training.methods.build import PreparedModel
from dagster_project.training.methods.load import load_base
from dagster_project.training.tokens.collators import SIZES
from dagster_project.training.trainers.alignment.trl_trainers.pair_attention import attending_by_pair
from dagster_project.training.trainers.alignment.trl_trainers.shared_prompts import (
    collate_shared,
    has_router,
    hidden_states,
    log_probabilities,
    reads_prompts_once,
)

ORDERS, MOST_ROWS = 21, 20_000
"""Random orders of the pairs in which the largest pass is sought, and the most pairs of each."""

Pair = tuple[list[int], list[int], list[int]]
"""Ids of the prompt, the chosen and the rejected answer."""


def pair_passes(
    ledger: Any,
    prepared: PreparedModel,
    base: Any,
    pair_lengths: Sequence[tuple[int, int, int]],
    counted: int,
    passes: int,
) -> None:
    """Run the forward and backward passes of trainers/alignment/trl_trainers/shared_prompts.py on the meta device.

    Args:
        ledger: of memory.py; it records them.
        pair_lengths, counted: see `TrainingSpec`.
    """
    import torch

    pairs, tokens = len(pair_lengths), sum(map(sum, pair_lengths))
    spare = -tokens % SIZES
    longest = max(shared + max(first, second) for shared, first, second in pair_lengths)

    def ids(*shape: int) -> Any:
        return torch.zeros(shape, dtype=torch.long, device="meta")

    batch = {
        "input_ids": ids(2 * pairs, longest),
        "packed_ids": ids(1, tokens + spare),
        "packed_positions": ids(1, tokens + spare),
        "pair_lengths": [*pair_lengths, (spare, 0, 0)],
        "last_token": ids(2 * pairs),
        "predicts": ids(counted),
        "target": ids(counted),
        "slot": ids(counted),
    }
    with attending_by_pair(base):
        for _ in range(passes):
            with ledger.mode(), ledger.attention():
                if counted:
                    loss = log_probabilities(prepared.model, **batch).log_probs.sum()
                else:
                    loss = hidden_states(prepared.model, batch, "last_token").float().sum()
                torch.autograd.backward(loss)
                del loss  # a reference that is kept would count as memory


def largest_pass(sizes: Sequence[int], batch: int, passes: int) -> list[int]:
    """Numbers of the rows in the largest of so many passes: the median of several random orders of the rows.

    Args:
        sizes: tokens of each row.
        batch: rows of a pass.
    """

    def tokens(group: Sequence[int]) -> int:
        return sum(sizes[row] for row in group)

    random, found = Random(0), []
    for _ in range(ORDERS):
        rows: list[int] = []
        while len(rows) < batch * passes and len(rows) < MOST_ROWS:
            rows += random.sample(range(len(sizes)), len(sizes))
        groups = [rows[start : start + batch] for start in range(0, min(len(rows), batch * passes), batch)]
        found.append(max(groups, key=tokens))
    return sorted(found, key=tokens)[ORDERS // 2]


def reads_pairs_once(base_model: Path, device: str, options: Mapping[str, Any], router_loss: bool = False) -> bool:
    """Whether a training on pairs or groups of answers reads what texts have in common once, see shared_prompts.py.

    Args:
        options: PEFT's keys.
        router_loss: whether TRL adds the loss of a router, if the model has one.
    """
    import torch

    model = load_base(base_model, torch.device("cpu"), torch.bfloat16, weights=False)
    if (router_loss and has_router(model)) or "lm_head" in str(options.get("target_modules")):
        return False
    return reads_prompts_once(model.requires_grad_(False), device)


def lengths_of(pair: Pair) -> tuple[int, int, int]:
    """Tokens with which both texts of a pair begin, of the rest of the chosen and of the rest of the rejected one."""
    prompt, chosen, rejected = pair
    _, (place,) = collate_shared([(prompt + chosen, prompt + rejected)])
    shared, first, second = place.lengths
    return shared, first, second
