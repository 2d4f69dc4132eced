"""Scores of all records for a question.

Of many records, the gradients of few are read: of those whose sketches or words are most like the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dagster_project.lineage.attribution.ranking import products, totals
from dagster_project.lineage.attribution.sketch import sketches
from dagster_project.lineage.attribution.store import Gradients, probes_of

if TYPE_CHECKING:
    import numpy as np

MOST = 256
"""Records whose gradients are read for each of three reasons: high estimates,
estimates above those of other questions, and a high place in the list."""


@dataclass(frozen=True)
class Found:
    """Scores of all records for a question, (records,) float32."""

    scores: np.ndarray
    read: np.ndarray
    """Whether the score of a record is that of its gradient, and not an estimate; (records,)."""
    error: float | None
    """Standard deviation of estimates from scores, over the probes; None if nothing is estimated."""

    @property
    def certain(self) -> np.ndarray:
        """The scores, and for records whose gradients were not read the lowest that is possible."""
        import numpy as np

        return np.where(self.read, self.scores, np.float32(-1.0))


class Search:
    """A question at one point of a training."""

    def __init__(self, gradients: Gradients, question: np.ndarray) -> None:
        """Args:
        question: its projected gradient, (width,) float32.
        """
        self.gradients = gradients
        self.direction = gradients.second_moment.directions(gradients.units, question[None])

    def exact(self, numbers: np.ndarray) -> np.ndarray:
        """Scores of some records."""
        return products(self.gradients.units[numbers], self.direction)[0]

    def all(self) -> np.ndarray:
        return products(self.gradients.units, self.direction)[0]

    def estimates(self) -> np.ndarray:
        """From the sketches of all records."""
        of = self.gradients.sketches
        assert of is not None
        return products(of.numbers, sketches(self.direction))[0] * of.scales

    def of_probes(self) -> np.ndarray:
        assert self.gradients.sketches is not None
        return products(self.gradients.sketches.probes, self.direction)[0]


def search(
    points: Sequence[Search], prompt: np.ndarray, part: np.ndarray, bound: np.ndarray | None, shown: int
) -> Found:
    """Score all records for a question: the mean over points of the training.

    Estimates of the records whose gradients are not read are moved towards their
    median by a factor, so that they spread as the scores of the probes do.

    Args:
        prompt, part: scores of the words of each record, as in `Ranking.of`.
        bound: the highest score that each record has with questions for which none should stand out, if known.
        shown: records that will be listed. Their gradients are read.
    """
    import numpy as np

    if points[0].gradients.sketches is None:
        return read_all(points)
    raw = np.mean([one.estimates() for one in points], axis=0)
    probes = probes_of(len(raw))
    of_probes = np.mean([one.of_probes() for one in points], axis=0)
    center, spread = float(np.median(raw)), _spread(raw)
    scores = (center + (raw - center) * (_spread(of_probes) / spread if spread else 1.0)).astype(np.float32)
    error = float(np.std(scores[probes] - of_probes))
    read = np.zeros(len(scores), bool)
    scores[probes], read[probes] = of_probes, True

    def read_more(numbers: np.ndarray) -> None:
        missing = np.unique(numbers[~read[numbers]])
        scores[missing], read[missing] = np.mean([one.exact(missing) for one in points], axis=0), True

    read_more(np.concatenate([_first(raw, MOST), *([] if bound is None else [_first(raw - bound, MOST)])]))
    read_more(_first(totals(scores, prompt, part), max(MOST, shown)))
    while not read[listed := np.argsort(-totals(scores, prompt, part), kind="stable")[:shown]].all():
        read_more(listed)
    return Found(scores, read, error)


def read_all(points: Sequence[Search]) -> Found:
    """As `search`, from the gradients of all records."""
    import numpy as np

    scores = np.mean([one.all() for one in points], axis=0)
    return Found(scores, np.ones(len(scores), bool), None)


def _spread(scores: np.ndarray) -> float:
    """Median absolute deviation."""
    import numpy as np

    return float(np.median(np.abs(scores - np.median(scores))))


def _first(scores: np.ndarray, most: int) -> np.ndarray:
    import numpy as np

    return np.argpartition(-scores, min(most, len(scores)) - 1)[:most]
