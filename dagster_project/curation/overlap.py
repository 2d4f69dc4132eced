"""Which texts are nearly the same? Candidates share a rare run of five words; similarity is then measured exactly.

The rule beats locality-sensitive hashing on what happens in instruction data (one edited word, a text quoted inside
a longer one) and needs no tuning; docs/decisions/006 has the figures it rests on.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

RUN = 5
"""Words in the run two texts must share to be compared."""
RARE = 50
"""A run or shingle that stands in more texts than this is boilerplate and proves nothing."""
JACCARD, CONTAINMENT = 0.3, 0.5
"""Texts are near-copies from this share of common three-word shingles, of their union or of the smaller text."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")


@dataclass(frozen=True)
class Pair:
    left: int
    right: int
    similarity: float
    """Jaccard index, or containment where that is what matched. 1.0 for texts that normalise to the same words."""


def words(text: str) -> tuple[str, ...]:
    """Words after NFKC and case folding; one token per CJK character, which has no spaces around it."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _grams(tokens: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def near_pairs(texts: Sequence[str], against: Sequence[str] | None = None) -> Iterator[Pair]:
    """Pairs of near-copies: within `texts` (left < right), or of `texts` (left) with `against` (right).

    Texts shorter than a run match only when all their words are the same.
    """
    tokens = [words(text) for text in texts]
    other = tokens if against is None else [words(text) for text in against]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    shingles: dict[tuple[str, ...], int] = defaultdict(int)
    for j, row in enumerate(other):
        for gram in _grams(row, RUN) | {row}:
            holders[gram].append(j)
    for row in tokens if against is None else [*tokens, *other]:
        for gram in _grams(row, 3):
            shingles[gram] += 1
    for i, row in enumerate(tokens):
        if not row:
            continue
        found: set[int] = set()
        for gram in _grams(row, RUN) | {row}:
            at = holders.get(gram, ())
            if len(at) <= RARE or gram == row:
                found.update(at)
        mine = {gram for gram in _grams(row, 3) if shingles[gram] <= RARE}
        for j in sorted(found):
            if against is None and j <= i:
                continue
            if row == other[j]:
                yield Pair(i, j, 1.0)
                continue
            theirs = {gram for gram in _grams(other[j], 3) if shingles[gram] <= RARE}
            common = len(mine & theirs)
            if not common:
                continue
            jaccard, containment = common / len(mine | theirs), common / min(len(mine), len(theirs))
            if jaccard >= JACCARD or containment >= CONTAINMENT:
                yield Pair(i, j, round(max(jaccard, containment), 3))


def clusters(size: int, pairs: Sequence[Pair]) -> list[int]:
    """For each of `size` rows the smallest row it is linked to, directly or through others (itself if none)."""
    parent = list(range(size))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for pair in pairs:
        a, b = sorted((root(pair.left), root(pair.right)))
        parent[b] = a
    return [root(i) for i in range(size)]
