"""Trainings with a larger model: their passes on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dagster_project.training.methods.build import PreparedModel
from dagster_project.training.trainers.alignment.trl_trainers.distillation import mean_divergence


def distillation_passes(
    ledger: Any, prepared: PreparedModel, teacher: Any, lengths: Sequence[int], counted: int, beta: float, passes: int
) -> None:
    """Run the forward and backward passes of trainers/alignment/trl_trainers/distillation.py on the meta device.

    Args:
        ledger: of memory.py; it records them.
        teacher: on the meta device, too.
        lengths, counted: see `TrainingSpec`.
        beta: of the divergence.
    """
    import torch

    teacher.requires_grad_(False)
    rows, width = len(lengths), counted // len(lengths)
    ids = torch.zeros(rows, max(lengths), dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids}
    where = torch.zeros(rows * width, dtype=torch.long, device="meta")
    for _ in range(passes):
        with ledger.mode(), ledger.attention():
            loss = mean_divergence(prepared.model, teacher, batch, width, where, beta)
            torch.autograd.backward(loss)
            del loss  # a reference that is kept would count as memory
