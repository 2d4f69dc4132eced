"""What benchmarks that repeat a training with several seeds share: processor
time of a training, spread over seeds, and paired differences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Scores = Mapping[str, float]
"""Held-out record -> its score."""


@contextmanager
def training_seconds() -> Iterator[list[float]]:
    """Processor seconds, user and system, of `aligned.produce` until it begins
    to measure the trained model: loading, training, and what comes between."""
    from dagster_project.stages import aligned

    began, measure = time.process_time(), aligned._agreement
    seconds: list[float] = []

    def timed(*given: Any) -> dict[str, Any]:
        seconds.append(time.process_time() - began)
        return measure(*given)

    aligned._agreement = timed
    try:
        yield seconds
    finally:
        aligned._agreement = measure


def gain(after: Mapping[int, Scores], before: Mapping[int, Scores]) -> dict[str, Any]:
    """Mean difference, with a 95 % interval by a bootstrap over the records of each record's mean over the seeds.

    Args:
        after: seed -> scores.
        before: the same of the models that are compared with: of these seeds at least, and of the same records.
    """
    from dagster_project.evaluation.paired.alignment import paired

    records = sorted(next(iter(before.values())))
    earlier, later = (
        [statistics.mean(of[seed][record] for seed in after) for record in records] for of in (before, after)
    )
    return paired(earlier, later, records)


def spread(values: Iterable[float], digits: int) -> str:
    """The mean and, if the values differ, minimum and maximum in brackets."""
    found = [*values]
    low, middle, high = (f"{value:.{digits}f}" for value in (min(found), statistics.mean(found), max(found)))
    return middle if low == high else f"{middle} ({low} to {high})"
