"""Tables of a training for plots: one that is part of the result, and live ones that grow while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dagster_project.core.curves import Point, thinned
from dagster_project.core.records import remove, write_text

LIVE = ("loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second")


def write_curve(
    path: Path, curve: Sequence[Point], columns: Sequence[str] = ("loss", "learning_rate", "grad_norm")
) -> None:
    """The training as CSV for `dvc plots`: step, the columns, and tokens so far, for each point that has all of them.

    The same bytes on every run.
    """
    lines = [f"step,{','.join(columns)},tokens"]
    for point in curve:
        if all(name in point for name in (*columns, "tokens")):
            values = [f"{point[name]:.6g}" for name in columns]
            lines.append(",".join([str(point["step"]), *values, str(point["tokens"])]))
    write_text(path, "\n".join(lines) + "\n")


def live_writer(folder: Path, every: float = 3.0, names: Sequence[str] = LIVE) -> Callable[..., None]:
    """A function that writes the live curve, at most every few seconds unless called with `now=True`.

    Each metric has its own table, e.g. `loss.csv` with the columns step and loss, in the format of `dvc plots`. A table
    is replaced atomically, so it is always complete. Tables of an earlier training are removed.
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
