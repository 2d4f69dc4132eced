"""Points of a curve over training steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = dict[str, float]
"""{"step": 3, "loss": 2.1, ...}: the metrics of one step."""

POINTS = 1000
"""Number of points of a thinned curve, give or take one, so that the cost of writing or drawing is independent of
training length."""


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """Every n-th point, and the last.

    >>> [point["step"] for point in thinned([{"step": step} for step in range(1, 8)], most=3)]
    [1, 4, 7]
    """
    stride = max(1, math.ceil(len(points) / most))
    kept = list(points[::stride])
    return kept if not points or kept[-1] is points[-1] else [*kept, points[-1]]
