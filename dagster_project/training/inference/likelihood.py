"""Likelihood of given answers under a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dagster_project.core.chat import IGNORE
from dagster_project.core.progress import Progress
from dagster_project.training.inference.decoding import groups
from dagster_project.training.methods.logits import logits_of


def negative_log_likelihood(
    model: Any, pad_token_id: int, examples: Sequence[tuple[list[int], list[int]]], batch_size: int, what: str
) -> list[tuple[float, int]]:
    """Negative log-likelihood of the labeled tokens of each example.

    Padding is on the right and masked, so batch size and padding change scores only by rounding.

    Args:
        examples: (input_ids, labels) of each example; tokens labeled -100 are not scored.
        what: name of the work in progress lines.
    Returns:
        For each example the sum in nats, and the number of labeled tokens.
    """
    import torch
    from torch.nn.functional import cross_entropy

    scores: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    progress = Progress(what, len(examples), "answer")
    with torch.inference_mode():
        for batch in groups([len(ids) for ids, _ in examples], batch_size, model.device.type):
            width = max(len(examples[i][0]) for i in batch)
            ids = torch.tensor(
                [examples[i][0] + [pad_token_id] * (width - len(examples[i][0])) for i in batch], device=model.device
            )
            labels = torch.tensor(
                [examples[i][1] + [IGNORE] * (width - len(examples[i][1])) for i in batch], device=model.device
            )[:, 1:]
            mask = torch.tensor(
                [[1] * len(examples[i][0]) + [0] * (width - len(examples[i][0])) for i in batch], device=model.device
            )
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            counted = labels != IGNORE
            losses = torch.zeros(labels.shape, dtype=torch.float32, device=model.device)
            losses[counted] = cross_entropy(
                logits_of(model, hidden[counted]).float(), labels[counted], reduction="none"
            )
            for i, loss, n in zip(batch, losses.double().sum(1).tolist(), counted.sum(1).tolist(), strict=True):
                scores[i] = (loss, n)
            progress.advance(len(batch))
    return scores
