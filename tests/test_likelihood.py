"""Likelihoods equal those of one plain forward pass per example, whatever the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dagster_project.evaluation.metrics import perplexity_interval
from dagster_project.training.inference.likelihood import IGNORE, negative_log_likelihood

EXAMPLES = [
    ([5, 6, 7, 8], [IGNORE, IGNORE, 7, 8]),
    ([9, 10, 11, 12, 13, 14, 15, 16, 17], [IGNORE, 10, IGNORE, IGNORE, IGNORE, IGNORE, 15, 16, 17]),
    ([200, 100], [IGNORE, 100]),
    ([40, 41, 42, 43, 44, 45], [IGNORE] * 6),
    ([7, 8, 9, 10, 11], [IGNORE, 8, 9, 10, 11]),
]
PAD = 0


def by_hand(model: Any, ids: list[int], labels: list[int]) -> tuple[float, int]:
    """Minus the sum of log p(token | tokens before it) over the labelled tokens, and their number."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    scored = [i for i, label in enumerate(labels) if label != IGNORE]
    return -sum(float(log_p[i - 1, ids[i]]) for i in scored), len(scored)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 40])
def test_batch_size_and_padding_change_no_score(model: Any, batch_size: int) -> None:
    found = negative_log_likelihood(model, PAD, EXAMPLES, batch_size, "test")
    wanted = [by_hand(model, ids, labels) for ids, labels in EXAMPLES]
    assert [n for _, n in found] == [n for _, n in wanted] == [2, 4, 1, 0, 4]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], abs=1e-4)


def test_perplexity_is_exp_of_the_mean_over_all_labeled_tokens(model: Any) -> None:
    scores = negative_log_likelihood(model, PAD, EXAMPLES, 3, "test")
    total = sum(by_hand(model, ids, labels)[0] for ids, labels in EXAMPLES)
    assert perplexity_interval(scores, list("abcde"))["perplexity"] == pytest.approx(math.exp(total / 11), rel=1e-4)
