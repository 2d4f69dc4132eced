"""What the engines behind overlap.py share: the constants of the rule, and the form of a result."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

BINS = 21
"""Bins of equal width for the scores from 0 to 1; the last bin is 1.0 itself."""


class Gates(NamedTuple):
    """Thresholds of near-copies; the constants of overlap.py, by their names."""

    jaccard: float
    firm: float
    in_order: float
    long: int
    containment: float
    whole: float
    few: int


class Constants(NamedTuple):
    """The constants of overlap.py, by their names."""

    run: int
    shingle: int
    short: int
    edited: int
    rare: int
    gates: Gates


class Found(NamedTuple):
    """Near-copies among different texts, as an engine finds them. Different texts are numbered by their first rows."""

    number: Array
    """For each row the number of its text; -1 if it has no words."""
    first: Array
    """For each text its first row."""
    near: list[tuple[int, int, float, int]]
    """(text, text, similarity, rule): rule 1 Jaccard, 2 containment, 3 one word left out. In no particular order."""
    scores: Array
    """(BINS, 2): compared pairs that are not near-copies, and near-copies, by containment."""
    passages: list[tuple[int, int, int, int]]
    """The most frequent passages: first text, position and length in words, number of texts."""
    word_counts: dict[int, list[int]]
    """Text of `near` -> for each of its words the number of texts with it; ascending, empty unless requested."""
