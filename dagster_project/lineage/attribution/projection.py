"""Seeded random projections of gradients.

Each weight's gradient G becomes P G Q^T, as LoGRA does (Choe et al. 2024, arXiv 2405.13954, section 3).

Entries of P and Q are +1 or -1, divided by the root of the number of rows, so inner
products of projected gradients are unbiased estimates of those of the gradients (Achlioptas
2003). A side that needs no projection keeps its values: then inner products are exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

KEPT = 16
"""The narrower side of a weight is not projected if it has at most this many rows or columns."""


@dataclass(frozen=True)
class Projection:
    """A projection of the gradients of a model's trained weights."""

    numbers: int = 256
    """A weight's gradient is projected to at most this many. One that has no more stays as it is."""
    seed: int = 0
    _sides: dict[tuple[str, int, int], Any] = field(default_factory=dict, repr=False, compare=False)

    def shape(self, weight: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the projected gradient of a weight.

        Its narrow side, such as the rank of LoRA, is kept as it is, up to `KEPT`.

        >>> Projection().shape((16, 576)), Projection().shape((576, 8))
        ((16, 16), (32, 8))
        >>> Projection().shape((2048, 576)), Projection().shape((2048,))
        ((16, 16), (1, 256))
        """
        rows, columns = as_matrix(weight)
        if rows * columns <= self.numbers:
            return rows, columns
        narrow = min(rows, columns, KEPT, self.numbers)
        wide = min(max(rows, columns), self.numbers // narrow)
        return (narrow, wide) if rows <= columns else (wide, narrow)

    def width(self, weights: Mapping[str, tuple[int, ...]]) -> int:
        """Numbers of a projected gradient of all weights, given their shapes."""
        return sum(rows * columns for rows, columns in map(self.shape, weights.values()))

    def project(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Projected gradients of all weights, sorted by name, as one vector (width,) float32.

        Args:
            gradients: name -> gradient of the weight.
        """
        import torch

        return torch.cat([self.of_weight(name, gradients[name].float()) for name in sorted(gradients)]).cpu()

    def of_weight(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Projected gradient of one weight as a vector."""
        matrix = gradient.reshape(as_matrix(tuple(gradient.shape)))
        left, right = self.sides(name, tuple(gradient.shape), gradient.device)
        matrix = matrix if left is None else left @ matrix
        return (matrix if right is None else matrix @ right.T).flatten()

    def sides(self, name: str, weight: tuple[int, ...], device: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """P (rows, rows of the weight) and Q (columns, columns of the weight) in float32.

        None for a side that is not projected.

        Args:
            weight: its shape.
        """
        whole, projected = as_matrix(weight), self.shape(weight)
        left, right = (
            self._side(f"{name}:{side}", small, large, device) if small < large else None
            for side, small, large in zip(("left", "right"), projected, whole, strict=True)
        )
        return left, right

    def _side(self, name: str, rows: int, columns: int, device: Any) -> Any:
        import torch

        key = (name, rows, columns)
        if key not in self._sides:
            self._sides[key] = (
                torch.from_numpy(signs(f"{self.seed}:{name}", rows, columns) / rows**0.5).float().to(device)
            )
        return self._sides[key]


def signs(name: str, rows: int, columns: int) -> np.ndarray:
    """Random +1 and -1, (rows, columns) float32, determined by the name alone:
    by the raw bits of Philox, which are the same in all versions of numpy."""
    import numpy as np

    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(-(-rows * columns // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: rows * columns]
    return (2.0 * bits.astype(np.float32) - 1.0).reshape(rows, columns)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of a weight as a matrix: a vector is one row, further dimensions are columns."""
    if len(shape) < 2:
        return 1, shape[0] if shape else 1
    columns = 1
    for length in shape[1:]:
        columns *= length
    return shape[0], columns


def lengths_of(rows: np.ndarray) -> np.ndarray:
    """(rows, 1) float64."""
    import numpy as np

    found: np.ndarray = np.sqrt(np.square(rows, dtype=np.float64).sum(1, keepdims=True))
    return found


def units(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32; those of length 0 stay."""
    import numpy as np

    lengths = lengths_of(rows)
    return (rows / np.where(lengths, lengths, 1.0)).astype(np.float32)
