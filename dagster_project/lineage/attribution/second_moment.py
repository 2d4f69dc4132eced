"""Scores of records in which what many of their gradients have in common counts
little: by the damped inverse of the second moment of these gradients.

    score of g for a question q    d g' (M + d)^-1 q,   M the sum of g g' over
    all records, all gradients of length 1, d the damping

TRAK divides by the same second moment (Park et al. 2023, arXiv 2303.14186); the damping is that of influence functions.
M is never formed: with the gradients of n records as the rows of G, d (G'G + d)^-1 q = q - G' (GG' + d)^-1 G q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dagster_project.lineage.attribution.projection import units
from dagster_project.lineage.attribution.ranking import float32_blocks, products
from dagster_project.lineage.attribution.rows_on_disk import Rows

if TYPE_CHECKING:
    import numpy as np

DAMPING = 0.01
"""Damping as a share of the number of records. Chosen in docs/decisions/062."""
LEAST = 1.0
"""Least damping. It is the mean eigenvalue of the inner products of the
records, because all gradients have length 1."""
SAMPLE = 2048
"""Most records that M is made from. A larger set is represented by as many, at
equal distances in it: records are sorted by hash."""
PRINCIPAL = 512
"""Directions of the second moment that count for many records. What the others
would take out of a question is small (docs/decisions/064)."""


class Damped(Protocol):
    """Takes what many gradients have in common out of questions."""

    def directions(self, gradients: Rows, questions: np.ndarray) -> np.ndarray:
        """Directions whose inner products with gradients are their scores, (questions, width) float32.

        Args:
            gradients: of all records, of length 1, (records, width) float16.
            questions: (questions, width) float32.
        """


def scores(moment: Damped, gradients: Rows, questions: np.ndarray) -> np.ndarray:
    """Scores of all records for each question, (questions, records) float32; from -1 to 1, and 0 where a gradient is 0.

    Arguments are those of `Damped.directions`.
    """
    return products(gradients, moment.directions(gradients, questions))


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

    @property
    def damping(self) -> float:
        """Of the sample: its M is a share of the whole."""
        return max(LEAST, DAMPING * self.records) * len(self.inner) / max(1, self.records)

    def directions(self, gradients: Rows, questions: np.ndarray) -> np.ndarray:
        """As `Damped`."""
        import numpy as np

        chosen, asked = gradients[:] if self.records <= SAMPLE else gradients[sample(self.records)], units(questions)
        damped = self.inner.astype(np.float64)
        np.fill_diagonal(damped, damped.diagonal() + self.damping)
        known = np.linalg.solve(damped, products(chosen, asked).T.astype(np.float64)).astype(np.float32)
        shared = np.zeros_like(asked)
        for records, block in float32_blocks(chosen):
            shared += known[records].T @ block
        return asked - shared


@dataclass(frozen=True)
class PrincipalDirections:
    """The second moment of many records by the directions that are most common,
    so that the sample need not be read for a question."""

    axes: np.ndarray
    """(directions, width) float16, of length 1."""
    shares: np.ndarray
    """Share of each that is taken out of a question, (directions,) float32."""

    @classmethod
    def of(cls, gradients: Rows) -> PrincipalDirections:
        """Args:
        gradients: of length 1, (records, width) float16.
        """
        import numpy as np

        moment = SecondMoment.of(gradients)
        values, vectors = np.linalg.eigh(moment.inner.astype(np.float64))
        most = slice(-PRINCIPAL, None)
        axes = np.zeros((len(values[most]), gradients.shape[1]), np.float32)
        for records, block in float32_blocks(gradients[sample(len(gradients))]):
            axes += vectors[records, most].T.astype(np.float32) @ block
        return cls(units(axes).astype(np.float16), (values[most] / (values[most] + moment.damping)).astype(np.float32))

    def directions(self, gradients: Rows, questions: np.ndarray) -> np.ndarray:
        """As `Damped`."""
        import numpy as np

        asked = units(questions)
        parts, shared = products(self.axes, asked) * self.shares, np.zeros_like(asked)
        for numbers, block in float32_blocks(self.axes):
            shared += parts[:, numbers] @ block
        return asked - shared


def sample(records: int) -> np.ndarray:
    """Numbers of the records that stand for all, sorted."""
    import numpy as np

    return np.arange(min(records, SAMPLE)) * records // max(1, min(records, SAMPLE))
