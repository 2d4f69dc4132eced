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

    def padded(rows: Sequence[list[int]], filler: int) -> Any:
        width = max(map(len, rows))
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=model.device)

    scores: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    progress = Progress(what, len(examples), "answer")
    with torch.inference_mode():
        for batch in groups([len(ids) for ids, _ in examples], batch_size, model.device.type):
            ids = padded([examples[i][0] for i in batch], pad_token_id)
            labels = padded([examples[i][1] for i in batch], IGNORE)[:, 1:]
            mask = padded([[1] * len(examples[i][0]) for i in batch], 0)
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            counted = labels != IGNORE
            losses = torch.zeros(labels.shape, dtype=torch.float32, device=model.device)
            logits = logits_of(model, hidden[counted]).float()
            losses[counted] = cross_entropy(logits, labels[counted], reduction="none")
            for i, loss, n in zip(batch, losses.double().sum(1).tolist(), counted.sum(1).tolist(), strict=True):
                scores[i] = (loss, n)
            progress.advance(len(batch))
    return scores
