"""The rule of overlap.py in plain Python: for few texts, and where numba is not installed.

Same results as _overlap_numba.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from typing import TypeAlias

import numpy as np

from dagster_project.curation.similarity.engine import BINS, Constants, Found, Gates
from dagster_project.curation.similarity.overlap import words

Words: TypeAlias = tuple[str, ...]
TOP = 10
"""Number of reported passages."""


def search(texts: Sequence[str], against: Sequence[str] | None, constants: Constants, count_words: bool) -> Found:
    """Near-copies within `texts`, or of `texts` with `against`."""
    numbers: dict[Words, int] = {}
    first: list[int] = []
    number = np.empty(len(texts) + len(against or ()), np.int64)
    for row, text in enumerate(chain(texts, against or ())):
        said = words(text)
        if said and said not in numbers:
            first.append(row)
            numbers[said] = len(numbers)
        number[row] = numbers[said] if said else -1
    size, rows = len(texts), [*numbers]
    left = set(number[:size].tolist())
    right = left if against is None else set(number[size:].tolist())
    corpus = _Corpus(rows, constants)
    near, scores = corpus.compare(left, right, against is None)
    counts: dict[int, list[int]] = {}
    if count_words:
        holders = Counter(chain.from_iterable(map(set, rows)))
        alike = sorted({text for a, b, _, _ in near for text in (a, b)})
        counts = {text: [holders[word] for word in rows[text]] for text in alike}
    return Found(number, np.array(first, np.int64), near, scores, corpus.passages(), counts)


class _Corpus:
    """Different texts, by their words, and what they have in common."""

    def __init__(self, rows: Sequence[Words], constants: Constants) -> None:
        self.rows, self.constants = rows, constants
        run, shingle, _, _, rare, _ = constants
        of_rows = [_grams(row, shingle) for row in rows]
        counts = Counter(chain.from_iterable(map(set, of_rows)))
        self.shingles = [{one for one in {*some} if 1 < counts[one] <= rare} for some in of_rows]
        """Of each text those that other texts contain and that are not boilerplate."""
        self.sizes = [sum(counts[one] <= rare for one in {*some}) for some in of_rows]
        """Different shingles of each text that are not boilerplate."""
        self.runs = [_grams(row, run) for row in rows]
        self.run_counts = Counter(chain.from_iterable(map(set, self.runs)))

    def compare(
        self, left: set[int], right: set[int], within: bool
    ) -> tuple[list[tuple[int, int, float, int]], np.ndarray]:
        """Near-copies as (text, text, similarity, rule), and the number of compared pairs by `BINS` of containment."""
        run, _, short, edited, rare, gates = self.constants
        rows, found, scores = self.rows, [], np.zeros((BINS, 2), np.int64)
        is_short = [run <= len(row) < short for row in rows]
        runs = _Index(self.runs, right, rare)
        shingles = _Index([some if is_short[text] else () for text, some in enumerate(self.shingles)], right, rare)
        rests = _Index([_rests(row) if run <= len(row) < edited else () for row in rows], right, rare)
        for a in sorted(left - {-1}):
            judged: set[int] = set()
            paired: set[int] = set()
            for by_run, index in ((True, runs), (False, shingles)):
                for b in index.others(a, within) - judged:
                    judged.add(b)
                    rule, similarity, score = self._judge(a, b, by_run, gates)
                    if rule:
                        paired.add(b)
                        found.append((a, b, similarity, rule))
                    if score >= 0:
                        scores[score, int(rule > 0)] += 1
            for b in rests.others(a, within) - paired:
                kept = 1 - 1 / max(len(rows[a]), len(rows[b]))
                found.append((a, b, kept, 3))
                scores[int((BINS - 1) * kept), 1] += 1
        return found, scores

    def _judge(self, a: int, b: int, by_run: bool, gates: Gates) -> tuple[int, float, int]:
        """Rule, similarity and bin of containment (-1: not counted) of two texts.

        Rules are 0: not near-copies, 1: Jaccard, 2: containment.

        Args:
            by_run: whether they share a rare run of words.
        """
        mine, theirs = self.shingles[a], self.shingles[b]
        smaller = min(self.sizes[a], self.sizes[b])
        both = self.sizes[a] + self.sizes[b]
        most = min(len(mine), len(theirs))
        if most < gates.containment / 2 * smaller and most < gates.jaccard / 2 * (both - most):
            return 0, 0.0, -1  # half of the thresholds, so that the scores include pairs slightly below them
        common = len(mine & theirs)
        if not common:
            return 0, 0.0, -1
        similar, contained, score = common / (both - common), common / smaller, int((BINS - 1) * common / smaller)
        one, other = self.rows[a], self.rows[b]
        if similar >= gates.jaccard:
            is_long = similar >= gates.firm or min(len(one), len(other)) >= gates.long
            if is_long or _in_order(one, other) >= gates.in_order:
                return 1, similar, score
        if by_run and contained >= (gates.containment if smaller >= gates.few else gates.whole):
            return 2, contained, score
        return 0, 0.0, score

    def passages(self) -> list[tuple[int, int, int, int]]:
        """The longest passages of boilerplate, most frequent first: first text, position, words, number of texts."""
        run, rare = self.constants.run, self.constants.rare
        if max(self.run_counts.values(), default=0) <= rare:
            return []
        holders: dict[Words, list[tuple[int, int]]] = {}
        for text, runs in enumerate(self.runs):
            frequent = [at for at, one in enumerate(runs) if self.run_counts[one] > rare]
            for _, group in groupby(enumerate(frequent), lambda pair: pair[1] - pair[0]):
                positions = [at for _, at in group]
                passage = self.rows[text][positions[0] : positions[-1] + run]
                holders.setdefault(passage, []).append((text, positions[0]))
        counted = [(*where[0], len(passage), len({text for text, _ in where})) for passage, where in holders.items()]
        return [one for one in sorted(counted, key=lambda one: -one[3])[:TOP] if one[3] > rare]


class _Index:
    """Texts by key, and keys by text; only of keys in 2 to `rare` texts."""

    def __init__(self, keys: Sequence[Iterable[Words]], right: set[int], rare: int) -> None:
        holders: dict[Words, list[int]] = {}
        for text, some in enumerate(keys):
            for key in {*some}:
                holders.setdefault(key, []).append(text)
        self.holders = {key: {*texts} & right for key, texts in holders.items() if 2 <= len(texts) <= rare}
        self.keys = [[key for key in {*some} if key in self.holders] for some in keys]

    def others(self, text: int, within: bool) -> set[int]:
        """Texts on the right that share a key with a text; `within`: only those after it."""
        found: set[int] = set().union(*(self.holders[key] for key in self.keys[text])) - {text}
        return {other for other in found if other > text} if within else found


def _grams(row: Words, n: int) -> list[Words]:
    return [*zip(*(row[i:] for i in range(n)), strict=False)]


def _rests(row: Words) -> set[Words]:
    """A text whole and with each one word left out."""
    return {row, *(row[:i] + row[i + 1 :] for i in range(len(row)))}


def _in_order(one: Words, other: Words) -> float:
    """Words that two texts have in the same order (longest common subsequence), as a share of the shorter text.

    Bits of one number are the words of the shorter text: Hyyrö, Bit-parallel LCS-length computation revisited (2004).
    """
    shorter, longer = sorted((one, other), key=len)
    places: dict[str, int] = {}
    for i, word in enumerate(shorter):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(shorter)) - 1
    rest = every
    for word in longer:
        if here := rest & places.get(word, 0):
            rest = (rest + here | rest - here) & every
    return (every ^ rest).bit_count() / len(shorter)
