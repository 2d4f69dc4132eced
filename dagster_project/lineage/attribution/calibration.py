"""Tells whether records stand out for a question, by questions for which none
should: the parts of answers in the validation split.

Some records are like many questions. So a question is measured by its excess: how far the scores of records go beyond
the highest that each of them has with any of those questions. The p-value is the share of these questions whose own
excess, beyond those of other validation records, is as large, as in conformal prediction (Vovk, Gammerman and Shafer
2005): of questions that are drawn like them, about a share of `ALPHA` is wrongly said to have a record that stands out.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ALPHA = 0.1
"""A record stands out up to this p-value. Chosen in docs/decisions/059."""
LEAST, MOST, ANSWERS = 20, 96, 10
"""Fewest questions that are enough, most that are used, and fewest answers that they are about."""
SENTENCE = re.compile(r"(?<=[.!?。！？।۔؟])\s+|(?<=[。！？])(?=[^\s。！？」』”’）])")
"""Between two sentences, which Chinese and Japanese do not separate by spaces."""


def parts_of(answer: str) -> list[str]:
    """What could be asked about in an answer: the values of a JSON object, or the sentences of a text; each once.

    >>> parts_of('{"label": "bug", "urgent": true, "n": 2}'), parts_of("Sorry. It is on its way!")
    (['bug', 'true', '2'], ['Sorry.', 'It is on its way!'])
    """
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):  # also thousands of brackets
        found = None
    if isinstance(found, dict):
        values = [
            value if isinstance(value, str) else json.dumps(value)
            for value in found.values()
            if not isinstance(value, dict | list)
        ]
        return [value for value in dict.fromkeys(values) if value.strip() and value in answer]
    return [part for part in dict.fromkeys(SENTENCE.split(answer)) if part.strip()]


def asked_parts(answers: Sequence[str]) -> list[tuple[int, str]]:
    """The questions: number of an answer and a part of it.

    Of more than `MOST`, those of answers that are drawn at random, always the same.
    """
    numbers = list(range(len(answers)))
    random.Random(0).shuffle(numbers)
    return [(i, part) for i in numbers for part in parts_of(answers[i])][:MOST]


@dataclass(frozen=True)
class Calibration:
    """Scores of all records for the questions of the validation split."""

    scores: np.ndarray
    """(questions, records) float32."""
    owners: np.ndarray
    """Number of the validation record that each question is about, the same for near-copies; (questions,)."""

    def excess(self, scores: np.ndarray) -> float:
        """How far the scores are above the highest of the questions.

        The root of the sum of the squares over the records for which they are. One record that is far above counts as
        much as several that are less far above.

        Args:
            scores: of another question, (records,).
        """
        return float(_beyond(scores[None], self.scores.max(0))[0])

    def p_value(self, scores: np.ndarray) -> float:
        """Share of questions with at least this excess, the asked one counted in."""
        import numpy as np

        excess = self.excess(scores)
        return float(1 + np.count_nonzero(self.own_excesses() >= excess)) / (len(self.owners) + 1)

    def own_excesses(self) -> np.ndarray:
        """Excess of each question beyond those of the other validation records, (questions,)."""
        import numpy as np

        owners = np.unique(self.owners)
        highest = np.stack([self.scores[self.owners == owner].max(0) for owner in owners])
        first, places = highest.max(0), highest.argmax(0)
        np.put_along_axis(highest, places[None], -np.inf, 0)
        second, found = highest.max(0), np.empty(len(self.owners))
        for number, owner in enumerate(owners):
            own = self.owners == owner
            found[own] = _beyond(self.scores[own], np.where(places == number, second, first))
        return found


def _beyond(rows: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Length of the part of each row that is above a bound."""
    import numpy as np

    return np.sqrt(np.square(np.maximum(rows - bound, 0.0), dtype=np.float64).sum(1))
