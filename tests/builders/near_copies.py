"""The rule of near-copies (docs/decisions/006), by brute force: every text with every other one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from dagster_project.curation.similarity import overlap
from dagster_project.curation.similarity.overlap import Pair, words


def by_definition(texts: Sequence[str], against: Sequence[str] | None) -> Iterator[Pair]:
    """The rule of overlap.py, slowly."""

    def grams(row: tuple[str, ...], n: int) -> set[tuple[str, ...]]:
        return {row[i : i + n] for i in range(len(row) - n + 1)}

    def rests(row: tuple[str, ...]) -> set[tuple[str, ...]]:
        return (
            {row, *(row[:i] + row[i + 1 :] for i in range(len(row)))}
            if overlap.RUN <= len(row) < overlap.EDITED
            else set()
        )

    def shared(
        of: Callable[[tuple[str, ...]], set[tuple[str, ...]]], a: tuple[str, ...], b: tuple[str, ...]
    ) -> set[tuple[str, ...]]:
        return {key for key in of(a) & of(b) if counts[of][key] <= overlap.RARE}

    def runs(row: tuple[str, ...]) -> set[tuple[str, ...]]:
        return grams(row, overlap.RUN)

    def shingles(row: tuple[str, ...]) -> set[tuple[str, ...]]:
        return grams(row, overlap.SHINGLE)

    def in_order(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        if not a or not b:
            return 0
        return in_order(a[1:], b[1:]) + 1 if a[0] == b[0] else max(in_order_of(a[1:], b), in_order_of(a, b[1:]))

    in_order_of = cache(in_order)

    def judge(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[float, overlap.Rule] | None:
        if a == b:
            return 1.0, "equal"
        mine, theirs = ({s for s in shingles(row) if counts[shingles][s] <= overlap.RARE} for row in (a, b))
        common, run = len(mine & theirs), shared(runs, a, b)
        both_short = all(overlap.RUN <= len(row) < overlap.SHORT for row in (a, b))
        similar, smaller = common / max(1, len(mine | theirs)), min(len(mine), len(theirs))
        firm = (
            similar >= overlap.FIRM
            or min(len(a), len(b)) >= overlap.LONG
            or in_order(a, b) >= overlap.IN_ORDER * min(len(a), len(b))
        )
        if common and (run or both_short) and similar >= overlap.JACCARD and firm:
            return round(common / len(mine | theirs), 3), "jaccard"
        if common and run and common / smaller >= (overlap.CONTAINMENT if smaller >= overlap.FEW else overlap.WHOLE):
            return round(common / min(len(mine), len(theirs)), 3), "containment"
        if shared(rests, a, b):
            return round(1 - 1 / max(len(a), len(b)), 3), "one_word"
        return None

    left = [words(text) for text in texts]
    right = left if against is None else [words(text) for text in against]
    counts = {of: Counter(key for row in {*left, *right} for key in of(row)) for of in (runs, shingles, rests)}
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            verdict = judge(a, b) if a and b and (against is not None or i < j) else None
            if verdict:
                yield Pair(i, j, *verdict)
