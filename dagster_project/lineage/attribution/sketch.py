"""Sketches of gradients: few numbers each, by which the gradients that are worth reading are found among many.

Each number of a gradient is added, with a random sign, to one of `NUMBERS` sums (CountSketch: Charikar, Chen and
Farach-Colton 2002). Inner products of sketches are unbiased estimates of those of the gradients; the standard deviation
of an estimate is about the product of their lengths, divided by the root of `NUMBERS`.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

NUMBERS = 1024
"""Of a sketch."""


def sketches(rows: np.ndarray) -> np.ndarray:
    """Sketches of gradients, (rows, NUMBERS) float32.

    Args:
        rows: (rows, width) float32.
    """
    import numpy as np

    order, signs, sums, starts = _places(rows.shape[1])
    found = np.zeros((len(rows), NUMBERS), np.float32)
    found[:, sums] = np.add.reduceat(rows[:, order] * signs, starts, axis=1)
    return found


def in_bytes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of whole numbers from -127 to 127, (rows, NUMBERS) int8, and what each is multiplied by, (rows,) float32.

    What is rounded away is a hundredth of the error of a sketch.
    """
    import numpy as np

    scales = np.abs(rows).max(1) / 127
    return np.rint(rows / np.where(scales, scales, 1.0)[:, None]).astype(np.int8), scales.astype(np.float32)


@lru_cache(maxsize=4)
def _places(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of a gradient by the sum that they belong to, and their signs,
    (width,) each; the sums that have any, and where each begins.

    They are determined by the width alone: by the raw bits of Philox, which are the same in all versions of numpy.
    """
    import numpy as np

    key = int.from_bytes(hashlib.sha256(f"sketch of {width} in {NUMBERS}".encode()).digest()[:16], "little")
    bits = np.random.Philox(key=key).random_raw(width)
    of = ((bits >> np.uint64(1)) % np.uint64(NUMBERS)).astype(np.int64)
    order = np.argsort(of, kind="stable")
    sums, starts = np.unique(of[order], return_index=True)
    return order, (1.0 - 2.0 * (bits & np.uint64(1)).astype(np.float32))[order], sums, starts
