"""Scores of records in which what many of their gradients have in common counts little: by the damped inverse of the second moment of these gradients.

    score of g for a question q    d g' (M + d)^-1 q,   M the sum of g g' over all records, all gradients of length 1, d the damping

TRAK divides by the same second moment (Park et al. 2023, arXiv 2303.14186); the damping is that of influence functions. M is never formed: with the gradients of
n records as the rows of G, d (G'G + d)^-1 q = q - G' (GG' + d)^-1 G q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dagster_project.lineage.attribution.projection import units
from dagster_project.lineage.attribution.ranking import float32_blocks, products
from dagster_project.lineage.attribution.rows_on_disk import Rows

if TYPE_CHECKING:
    import numpy as np

DAMPING = 0.01
"""Damping as a share of the number of records. Chosen in docs/decisions/062."""
LEAST = 1.0
"""Least damping. It is the mean eigenvalue of the inner products of the records, because all gradients have length 1."""
SAMPLE = 2048
"""Most records that M is made from. A larger set is represented by as many, at equal distances in it: records are sorted by hash."""


@dataclass(frozen=True)
class SecondMoment:
    """The second moment of the gradients of records."""

    inner: np.ndarray
    """Inner products of the gradients of the sample, (sample, sample) float32."""
    records: int

    @classmethod
    def of(cls, gradients: Rows) -> SecondMoment:
        """Args:
        gradients: of length 1, (records, width) float16.
        """
        import numpy as np

        rows = gradients[sample(len(gradients))].astype(np.float32)
        return cls(rows @ rows.T, len(gradients))

    def scores(self, gradients: Rows, questions: np.ndarray) -> np.ndarray:
        """Scores of all records for each question, (questions, records) float32; from -1 to 1, and 0 where a gradient is 0.

        Args:
            gradients: of length 1, (records, width) float16.
            questions: (questions, width) float32.
        """
        chosen = gradients[:] if self.records <= SAMPLE else gradients[sample(self.records)]
        return products(gradients, self.directions(chosen, questions)[0])

    def directions(self, chosen: np.ndarray, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Directions whose inner products with gradients are their scores, (questions, width) float32; and the scores of the sample, (questions, sample).

        Args:
            chosen: gradients of the sample, of length 1, (sample, width) float16.
            questions: (questions, width) float32.
        """
        import numpy as np

        asked = units(questions)
        damping = max(LEAST, DAMPING * self.records) * len(chosen) / max(1, self.records)  # the sample's M is that share of the whole
        damped = self.inner.astype(np.float64)
        np.fill_diagonal(damped, damped.diagonal() + damping)
        alike = products(chosen, asked)
        known = np.linalg.solve(damped, alike.T.astype(np.float64)).astype(np.float32)
        shared = np.zeros_like(asked)
        for records, block in float32_blocks(chosen):
            shared += known[records].T @ block
        return asked - shared, alike - known.T @ self.inner


def sample(records: int) -> np.ndarray:
    """Numbers of the records that stand for all, sorted."""
    import numpy as np

    return np.arange(min(records, SAMPLE)) * records // max(1, min(records, SAMPLE))
