"""Uncertainty of scores: 95 % bootstrap intervals over the test examples, paired where two systems are compared.

Every score here is a function of sums over examples: correct answers for accuracy, nats and tokens for perplexity,
counts for macro-F1 and BLEU. So a bootstrap draw is a vector of example counts, and the sums of all draws are one
matrix product. Near-copies count as one example here (`summed`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
FEWEST = 30
"""Smallest number of test examples for a conclusion. Measured on simulated pairs of right and wrong answers: the 95 %
bootstrap interval of a difference of accuracies contains the true one in 95 % of the cases at 30 answers if the systems
differ in many of them, in 84 to 92 % at 30 to 60 if they differ in two to six, and in 65 to 89 % at 10
(docs/evaluation.md)."""

Combine = Callable[["np.ndarray"], "np.ndarray"]
"""Sums over examples, (..., k) -> scores, (...)."""


def rate(sums: np.ndarray) -> np.ndarray:
    """Ratio of the first sum to the second, (..., 2) -> (...); 0 where the second is 0."""
    import numpy as np

    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


def summed(statistics: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """The rows of each unit added up, (units, k), in order of their first rows.

    The turns of one conversation and near-copies are not independent: drawn one by one, they would make an interval too
    narrow.

    Args:
        statistics: (n, k).
        units: unit of each row.
    """
    import numpy as np

    order = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    if len(order) == len(statistics):
        return statistics
    sums = np.zeros((len(order), statistics.shape[1]))
    np.add.at(sums, [order[unit] for unit in units], statistics)
    return sums


def unit(example: Mapping[str, Any]) -> str:
    """The unit of a test example: near-copies have the same."""
    return str(example.get("group_id") or example["example_id"])


def estimate(combine: Combine, statistics: np.ndarray) -> tuple[float, list[float]]:
    """A score and its interval.

    Args:
        statistics: contribution of each example to the sums, (n, k).
    """
    return rounded(combine(statistics.sum(0))), _interval(combine(_draws(len(statistics)) @ statistics))


def difference(combine: Combine, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """The score of `ours` minus that of `theirs` on the same examples, both (n, k), with a paired interval."""
    return {
        "difference": rounded(combine(ours.sum(0)) - combine(theirs.sum(0))),
        "interval": _interval(drawn_differences(combine, ours, theirs)),
    }


def ratio(combine: Combine, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """As `difference`, for the ratio of the score of `ours` to that of `theirs`."""
    return {
        "ratio": rounded(combine(ours.sum(0)) / combine(theirs.sum(0))),
        "interval": _interval(drawn_ratios(combine, ours, theirs)),
    }


def drawn_differences(combine: Combine, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """`difference` in each draw, (RESAMPLES,)."""
    draws = _draws(len(ours))
    return combine(draws @ ours) - combine(draws @ theirs)


def drawn_ratios(combine: Combine, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """`ratio` in each draw, (RESAMPLES,)."""
    draws = _draws(len(ours))
    return combine(draws @ ours) / combine(draws @ theirs)


def simultaneous_intervals(drawn: Sequence[np.ndarray]) -> list[list[float]]:
    """Intervals of several comparisons on the same examples that hold all at once in 95 % of the cases.

    Percentile intervals at the level at which 95 % of the draws lie within all of them (Mandel and Betensky 2008,
    "Simultaneous confidence intervals based on the percentile bootstrap approach"). Of one comparison it is the usual
    interval. Each alone at 95 %, one of many comparisons would often seem significant by chance.

    Args:
        drawn: values of each comparison in the draws, which are the same for all.
    """
    import numpy as np

    values = np.stack(drawn)
    ordered = np.sort(values)
    tails = [
        np.minimum(np.searchsorted(row, draws, "right"), RESAMPLES - np.searchsorted(row, draws, "left"))
        for row, draws in zip(ordered, values, strict=True)
    ]  # for each draw, how many are at least as far out at the nearer end
    # with few different values, the nearer end of most draws is far away, and none is wider than alone
    tail = min(0.025, np.quantile(np.min(tails, axis=0), 0.05) / RESAMPLES)
    return [[rounded(edge) for edge in np.quantile(row, [tail, 1 - tail])] for row in ordered]


@lru_cache(maxsize=2)
def _draws(n: int) -> np.ndarray:
    """How often each of n examples is drawn, (RESAMPLES, n).

    The same for every system, so that differences are paired.
    """
    import numpy as np

    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    return np.stack([np.bincount(draw, minlength=n) for draw in drawn]).astype(float)


def _interval(scores: np.ndarray) -> list[float]:
    """The central 95 % of the scores of the draws (percentile interval)."""
    import numpy as np

    low, high = np.quantile(scores, [0.025, 0.975])
    return [rounded(low), rounded(high)]


def independent(units: Sequence[str]) -> float:
    """Effective sample size (Kish 1965): the number of independent trials that are as informative as these.

    It assumes that all of a unit have the same result. It is the number of trials where no two share a unit, and the
    number of units where all have the same size.

    Args:
        units: unit of each trial.
    """
    sizes = Counter(units).values()
    return len(units) ** 2 / sum(size**2 for size in sizes)


def wilson(rate: float, n: float) -> tuple[float, float]:
    """95 % score interval of a proportion of n trials (Wilson 1927). With ties as half a win it is conservative.

    Unlike a bootstrap it is valid at the extremes: 12 wins of 12 give 0.76 to 1, not 1 to 1.
    """
    z2 = 1.959964**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def rounded(value: Any) -> float:
    return round(float(value), 4)
