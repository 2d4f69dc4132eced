"""A training as tables for plots: one that is part of the result, and live ones that grow while it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dagster_project.records import remove, write_text

Point = dict[str, float]
"""{"step": 3, "loss": 2.1, ...}: what is known of a step."""

LIVE = ("loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second")
POINTS = 1000
"""Rows of a live table, or one more: a longer training is thinned, so that writing it costs the same at any step."""


def write_curve(path: Path, curve: Sequence[Point]) -> None:
    """The training as CSV for `dvc plots`: step, loss, learning_rate, grad_norm, and tokens so far. The same bytes on every run."""
    columns = ("loss", "learning_rate", "grad_norm")
    lines = [
        ",".join([str(point["step"]), *(f"{point[name]:.6g}" for name in columns), str(point["tokens"])])
        for point in curve
        if "loss" in point
    ]
    write_text(path, "\n".join([f"step,{','.join(columns)},tokens", *lines]) + "\n")


def live_writer(folder: Path, every: float = 3.0, names: Sequence[str] = LIVE) -> Callable[..., None]:
    """A function that writes the curve so far for whoever watches, at most every few seconds unless it is told `now=True`.

    Each figure is a table of its own, `loss.csv` with the columns step and loss, as `dvc plots` wants them. A table is replaced in one step, so
    it is whole at any moment. Those of an earlier training are removed.
    """
    remove(folder)
    last = float("-inf")

    def write(curve: Sequence[Point], now: bool = False) -> None:
        nonlocal last
        if not now and time.monotonic() - last < every:
            return
        last = time.monotonic()
        for name in names:
            if points := thinned([point for point in curve if name in point]):
                rows = [f"{point['step']},{point[name]:.6g}" for point in points]
                write_text(folder / f"{name}.csv", "\n".join([f"step,{name}", *rows]) + "\n")

    return write


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """Every n-th point, and the last.

    >>> [point["step"] for point in thinned([{"step": step} for step in range(1, 8)], most=3)]
    [1, 4, 7]
    """
    stride = max(1, math.ceil(len(points) / most))
    kept = list(points[::stride])
    return kept if not points or kept[-1] is points[-1] else [*kept, points[-1]]
