"""Ranks the records of a training by the likeness of their gradients and of
their words, and decides whether the first stand out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dagster_project.lineage.attribution.projection import units
from dagster_project.lineage.attribution.rows_on_disk import Rows

if TYPE_CHECKING:
    import numpy as np

FUSION = 60
"""Constant of reciprocal rank fusion (Cormack, Clarke and Buettcher 2009)."""
STANDS_OUT = 6.0
"""Robust z of the best gradient score from which a record can stand out."""
CROWD, TIMES = 10, 2.0
"""It does if it is also this many times as far from the median as the record of this rank: a label that dozens of
records share has no few behind it. Measured: docs/why.md."""
WEIGHT = 1.5
"""Of the gradient in the order of the list; that of the words of the prompt,
and of those of the asked part, is 1. Chosen in docs/decisions/059."""
TO_SIGMA = 1.4826
"""Median absolute deviation times this is the standard deviation of a normal distribution."""


BLOCK = 16 * 2**20
"""Bytes of gradients in float32 at the same time."""


def float32_blocks(gradients: Rows) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the gradients of some records at a time as float32, and the numbers of these records.

    Each block is in the memory of the one before.

    Args:
        gradients: (records, width) float16; or other numbers of them.
    """
    import torch

    count = max(1, BLOCK // (4 * gradients.shape[1]))
    memory = torch.empty(count, gradients.shape[1])
    for start in range(0, len(gradients), count):
        rows = torch.from_numpy(gradients[start : start + count])
        yield slice(start, start + len(rows)), memory[: len(rows)].copy_(rows).numpy()  # several times as fast as numpy


def products(gradients: Rows, rows: np.ndarray) -> np.ndarray:
    """Inner products of rows with the gradient of every record, (rows, records) float32.

    Args:
        gradients: (records, width) float16.
        rows: (rows, width) float32.
    """
    import numpy as np

    found = np.empty((len(rows), len(gradients)), np.float32)
    for records, block in float32_blocks(gradients):
        found[:, records] = rows @ block.T
    return found


def cosines(gradients: Rows, questions: np.ndarray) -> np.ndarray:
    """Cosines of the gradients of questions with that of every record, (questions, records) float32.

    0 where a gradient is 0.

    Args:
        gradients: of length 1, (records, width) float16.
        questions: (questions, width) float32.
    """
    return products(gradients, units(questions))


def robust_z(scores: np.ndarray) -> np.ndarray:
    """Distance of each score from the median, in standard deviations estimated by the median absolute deviation.

    0 if all are equal.
    """
    import numpy as np

    away = scores - np.median(scores)
    scale = TO_SIGMA * float(np.median(np.abs(away)))
    return away / scale if scale else np.zeros_like(away)


def standardized(scores: np.ndarray) -> np.ndarray:
    """Distance of each score from the mean, in standard deviations; 0 if all are equal."""
    away = scores - scores.mean()
    scale = float(scores.std())
    return away / scale if scale > 1e-12 else 0.0 * away


def stands_out(z: np.ndarray) -> bool:
    """Whether few records are much more like the question than all others.

    Args:
        z: of each record, (records,).
    """
    import numpy as np

    ordered = np.sort(z)[::-1]
    first, of_crowd = float(ordered[0]), float(ordered[min(CROWD, len(ordered)) - 1])
    return first >= STANDS_OUT and first >= TIMES * of_crowd


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of each score from 1, the highest first; equal scores by position."""
    import numpy as np

    found = np.empty(len(scores), np.int64)
    found[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return found


def fused(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Score of reciprocal rank fusion of two rankings.

    Args:
        first, second: ranks from 1.
    """
    return 1.0 / (FUSION + first) + 1.0 / (FUSION + second)


def totals(gradient: np.ndarray, prompt: np.ndarray, part: np.ndarray) -> np.ndarray:
    """What records are listed by, the highest first; (records,) each, as in `Ranking.of`."""
    found: np.ndarray = WEIGHT * standardized(gradient) + standardized(prompt) + standardized(part)
    return found


@dataclass(frozen=True)
class Ranking:
    """All records, ranked in three ways; (records,) each."""

    gradient: np.ndarray
    """Score of the gradients (`second_moment.py`)."""
    z: np.ndarray
    bm25: np.ndarray
    """Of the words of the prompt and those of the asked part, together."""
    gradient_rank: np.ndarray
    bm25_rank: np.ndarray
    rank: np.ndarray
    """By the weighted sum of three scores, each in its standard deviations from its mean, as CombSUM adds z-scores (Fox
    and Shaw 1994): gradients, words of the prompt, words of the asked part. A score in which nothing is far from the
    others adds little, where a fusion of ranks would count all the same."""

    @classmethod
    def of(cls, gradient: np.ndarray, prompt: np.ndarray, part: np.ndarray) -> Ranking:
        """Args:
        gradient: scores of the gradients.
        prompt, part: BM25 of the words of the prompt, and of those of the asked part of the answer.
        """
        import numpy as np

        words = prompt + part  # the score of a query is the sum of those of its words
        by_words = np.where(words > 0, ranks(words), len(words))  # without a word in common: last
        by_both = ranks(totals(gradient, prompt, part))
        return cls(gradient, robust_z(gradient), words, ranks(gradient), by_words, by_both)

    def order(self) -> list[int]:
        """Numbers of the records, the first first."""
        import numpy as np

        return [int(i) for i in np.argsort(self.rank, kind="stable")]
