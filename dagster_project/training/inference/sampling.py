"""Sampling of answers: a token is drawn by inverting the distribution function at a given number in [0, 1)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dagster_project.training.inference.decoding import Choose

if TYPE_CHECKING:
    import torch


def uniform_numbers(seed: str, answers: Sequence[int], longest: int) -> list[list[float]]:
    """Numbers in [0, 1) for each answer and position, which depend only on these and the seed.

    So neither the batch nor the maximum length affects what is sampled, except for rounding.
    """
    dice = [random.Random(f"{seed} answer {answer}") for answer in answers]
    return [[die.random() for _ in range(longest)] for die in dice]


def sampled(uniform: Sequence[Sequence[float]], temperature: float, top_p: float = 1.0) -> Choose:
    """Tokens sampled at these numbers, one for each prompt and position."""
    return lambda logits, rows, place: draw(logits, [uniform[row][place] for row in rows], temperature, top_p)


def draw(logits: torch.Tensor, uniform: Sequence[float], temperature: float, top_p: float = 1.0) -> list[int]:
    """The token at which each row's distribution function exceeds its number.

    On the CPU: a cumulative sum on a GPU is not reproducible.

    Args:
        logits: (batch, vocabulary).
        top_p: only the most likely tokens that together have this probability are drawn.
    """
    import torch

    scores = logits.cpu().to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    probabilities = scores.softmax(-1).double()
    if top_p < 1:
        falling, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        excluded = falling.cumsum(-1) - falling >= top_p
        probabilities = probabilities.masked_fill(excluded.scatter(-1, tokens, excluded), 0)
    upto = probabilities.cumsum(-1)
    chosen = torch.searchsorted(upto, torch.tensor(uniform, dtype=torch.float64)[:, None] * upto[:, -1:], right=True)
    return [int(token) for token in chosen[:, 0].clamp(max=logits.shape[-1] - 1)]
