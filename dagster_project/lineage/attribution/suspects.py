"""Scores of records whose gradients do not fit those of the others: the queue of `pedigree why --suspects`.

Measured: docs/why.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dagster_project.core.messages import Message
from dagster_project.lineage.attribution.ranking import fused, ranks
from dagster_project.lineage.attribution.rows_on_disk import Rows

if TYPE_CHECKING:
    import numpy as np

LEAST = 5
"""Records of a group. A record of a smaller group is compared with a wider one."""
UNKNOWN = "unknown"
OTHERS = 2048
"""Most records that each record is compared with for its opposition."""


def form_of(answer: Message | None) -> str:
    """How an answer is built, in words: calls, the keys of a JSON object, or text.

    >>> form_of({"role": "assistant", "content": '{"b": 1, "a": 2}'}), form_of({"role": "assistant", "content": "Yes."})
    ('JSON with a, b', 'text')
    """
    if answer is None:
        return UNKNOWN
    if answer.get("tool_calls"):
        return "calls"
    try:
        found = json.loads(answer.get("content") or "")
    except (ValueError, RecursionError):  # also thousands of brackets
        return "text"
    if isinstance(found, dict):
        return f"JSON with {', '.join(sorted(found))}"
    return "JSON" if isinstance(found, list) else "text"


@dataclass(frozen=True)
class Group:
    """Records that are alike in source, category and form of the answer; a part that is None is not compared."""

    source: str | None = None
    category: str | None = None
    form: str | None = None

    def wider(self) -> list[Group]:
        """This group, then those that contain it, the narrowest first."""
        return list(dict.fromkeys([self, Group(None, self.category, self.form), Group(None, None, self.form), Group()]))

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.source, self.category, self.form) if part) or "all records"


def chosen_groups(own: Sequence[Group]) -> list[Group]:
    """For each record the narrowest group around it that has enough records; all records if none has.

    Args:
        own: the group of each record.
    """
    sizes = Counter(group for one in own for group in one.wider())
    return [next((group for group in one.wider() if sizes[group] >= LEAST), Group()) for one in own]


def members(own: Sequence[Group], chosen: Sequence[Group]) -> list[np.ndarray]:
    """For each record the numbers of the records of its chosen group, itself included."""
    import numpy as np

    inside: Mapping[Hashable, list[int]] = {group: [] for group in chosen}
    for i, one in enumerate(own):
        for group in one.wider():
            if group in inside:
                inside[group].append(i)
    arrays = {group: np.array(numbers) for group, numbers in inside.items()}
    return [arrays[group] for group in chosen]


def agreement(gradients: Rows, own: Sequence[Group], chosen: Sequence[Group]) -> np.ndarray:
    """Cosine of each record's gradient with the mean direction of the others of its chosen group, (records,) float32.

    0 without others.

    Args:
        gradients: of length 1, (records, width) float16.
    """
    import numpy as np

    scores = np.zeros(len(gradients), np.float32)
    of_group = dict(zip(chosen, members(own, chosen), strict=True))
    sums = {group: _sum(gradients, numbers) for group, numbers in of_group.items()}
    for i, group in enumerate(chosen):
        unit = gradients[i].astype(np.float32)
        others = sums[group] - unit
        length = float(np.sqrt(np.square(others, dtype=np.float64).sum()))
        scores[i] = float(unit @ others) / length if length > 1e-6 and len(of_group[group]) > 1 else 0.0
    return scores


def _sum(gradients: Rows, numbers: np.ndarray) -> np.ndarray:
    import numpy as np

    total = np.zeros(gradients.shape[1], np.float32)
    for start in range(0, len(numbers), 1024):  # in blocks, because the sum needs float32
        total += gradients[numbers[start : start + 1024]].astype(np.float32).sum(0)
    return total


def opposition(gradients: Rows, lengths: np.ndarray) -> np.ndarray:
    """How strongly steps on other records would undo a step on each record, (records,) float32.

    The sum of its negative inner products with the gradients of the others, with the sign changed. Of more than
    `OTHERS` records, that many stand for all.

    Args:
        gradients: of length 1, (records, width) float16.
        lengths: of the gradients, (records,).
    """
    import numpy as np

    count = len(gradients)
    others = (
        np.arange(count) if count <= OTHERS else np.sort(np.random.default_rng(0).choice(count, OTHERS, replace=False))
    )
    columns = (gradients[others].astype(np.float32) * lengths[others, None]).T
    found = np.empty(count, np.float32)
    for start in range(0, count, 512):
        rows = np.arange(start, min(start + 512, count))
        products = (gradients[rows].astype(np.float32) * lengths[rows, None]) @ columns
        products[rows[:, None] == others] = 0.0  # its own
        found[rows] = -np.minimum(products, 0.0).sum(1)
    return found


def harm(cosines: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How much less likely a step on each record would make parts of the answers in
    the validation split, (records,) float32: the sum of the inner products of its
    gradient with those of these parts, each of length 1, with the sign changed.

    Args:
        cosines: of the gradients of parts and records, (parts, records).
        lengths: of the gradients of records, (records,).
    """
    found: np.ndarray = -cosines.sum(0) * lengths
    return found


@dataclass(frozen=True)
class Suspicion:
    """All records, ranked in several ways, and by two of them together; (records,) each."""

    opposition: np.ndarray
    length: np.ndarray
    """Length of the gradient: its square is the product of the gradient with itself."""
    opposition_rank: np.ndarray
    """From 1, the most opposed first."""
    length_rank: np.ndarray
    """From 1, the longest first."""
    score: np.ndarray
    rank: np.ndarray
    """By score, the highest first."""
    harm: np.ndarray | None = None
    harm_rank: np.ndarray | None = None
    """From 1, the most harmful first; None without a validation split."""

    @classmethod
    def of(cls, opposed: np.ndarray, lengths: np.ndarray, harmful: np.ndarray | None = None) -> Suspicion:
        """The score fuses the ranks by opposition and by harm; without a
        validation split, by opposition and by length."""
        by_opposition, by_length = ranks(opposed), ranks(lengths)
        by_harm = None if harmful is None else ranks(harmful)
        score = fused(by_opposition, by_length if by_harm is None else by_harm)
        return cls(opposed, lengths, by_opposition, by_length, score, ranks(score), harmful, by_harm)

    def order(self) -> list[int]:
        """Numbers of the records, the most suspect first."""
        import numpy as np

        return [int(i) for i in np.argsort(self.rank, kind="stable")]
