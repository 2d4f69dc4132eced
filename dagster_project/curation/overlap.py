"""Which texts are nearly the same? Candidates share a rare run of words; similarity is then measured exactly.

The rule beats locality-sensitive hashing on what happens in instruction data (one edited word, a text quoted inside
a longer one) and needs no tuning; docs/decisions/006 has the figures it rests on.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

RUN = 5
"""Words in the run two texts must share to be compared. Shorter texts match only if equal."""
SHINGLE = 3
"""Words in the runs that similarity is measured over (Broder, On the resemblance and containment of documents, 1997)."""
RARE = 50
"""A run or shingle that stands in more different texts than this is boilerplate and proves nothing."""
JACCARD, CONTAINMENT = 0.3, 0.5
"""Texts are near-copies from this share of common shingles, of their union or, where they share a run, of the smaller text."""
SHORT = 15
"""Two texts of fewer words may lack a common run after one or two edits: any common shingle makes them candidates for `JACCARD`."""
EDITED = 8
"""One edit may leave two texts of fewer words without enough common shingles: they also match if they are the same once
a word is left out of one or each of them (the index of deletions known from SymSpell, over words)."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]|[^\W_]+")

Rule: TypeAlias = Literal["equal", "jaccard", "containment", "one_word"]
_RULES: tuple[Rule, ...] = ("equal", "jaccard", "containment", "one_word")


@dataclass(frozen=True)
class Pair:
    left: int
    right: int
    similarity: float
    """1.0 for equal words, else the Jaccard index or containment, or for `one_word` the share of words kept."""
    rule: Rule = "equal"
    """What matched, the first that did: the same words, `JACCARD`, `CONTAINMENT`, or all words but one (`EDITED`)."""


def words(text: str) -> tuple[str, ...]:
    """Words after NFKC and case folding; one token per CJK character, which has no spaces around it."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def near_pairs(texts: Sequence[str], against: Sequence[str] | None = None) -> Iterator[Pair]:
    """Pairs of near-copies: within `texts` (left < right), or of `texts` (left) with `against` (right), in order.

    Copies count once where runs are counted, so a text is found however many copies of it there are.
    """
    import numpy as np

    from dagster_project.curation import _overlap_numba as compiled

    within, size = against is None, len(texts)
    rows = [text.encode() if text.isascii() else " ".join(words(text)).encode() for text in (*texts, *(against or ()))]
    tokens, offsets = compiled.tokenize(rows)
    del rows
    number, first = compiled.distinct(tokens, offsets)
    rights = range(size) if within else range(size, len(number))
    left, right = np.zeros(len(first), np.bool_), np.zeros(len(first), np.bool_)
    for side, held in ((left, number[:size]), (right, number[rights.start :])):
        side[held[held >= 0]] = True
    near: dict[int, list[tuple[int, float, int]]] = defaultdict(list)
    found = compiled.near_texts(
        tokens, offsets[first], offsets[first + 1], left, right, within,
        run=RUN, shingle=SHINGLE, short=SHORT, edited=EDITED, rare=RARE, jaccard=JACCARD, containment=CONTAINMENT,
    )  # fmt: skip
    for a, b, similarity, rule in found:
        near[a].append((b, round(similarity, 3), rule))
        if within:
            near[b].append((a, round(similarity, 3), rule))

    # Texts stand for all their copies.
    by_text = np.argsort(number[rights.start :], kind="stable")
    bounds = np.searchsorted(number[rights.start :], range(len(first) + 1), sorter=by_text)
    repeated = np.diff(bounds) > within
    repeated[list(near)] = True
    for i in np.flatnonzero((number[:size] >= 0) & repeated[number[:size]]) if len(first) else ():
        copies = [(int(number[i]), 1.0, 0), *near.get(int(number[i]), ())]
        pairs = [(int(j), similarity, rule) for text, similarity, rule in copies for j in by_text[bounds[text] : bounds[text + 1]]]
        for j, similarity, rule in sorted(pairs):
            if not within or j > i:
                yield Pair(int(i), j, similarity, _RULES[rule])


def thirteen_gram_pairs(texts: Sequence[str], against: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of `texts` and `against` with any run of 13 words in common, in order: the usual test of benchmark leakage, to compare with.

    Brown et al., Language Models are Few-Shot Learners (2020), appendix C.
    """

    def grams(text: str) -> set[tuple[str, ...]]:
        tokens = words(text)
        return {tokens[i : i + 13] for i in range(len(tokens) - 12)}

    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for j, text in enumerate(against):
        for gram in grams(text):
            holders[gram].append(j)
    for i, text in enumerate(texts):
        for j in sorted({j for gram in grams(text) & holders.keys() for j in holders[gram]}):
            yield i, j


def shared_span(left: str, right: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the longest common run of words stands in both texts, as (start, end) of characters; (0, 0) if there is none.

    "He said: Good Morning!" and "good morning, Ann" -> (9, 21), (0, 12)
    """
    mine, theirs = _spans(left), _spans(right)
    run = difflib.SequenceMatcher(None, [w for w, _, _ in mine], [w for w, _, _ in theirs], autojunk=False).find_longest_match()
    if not run.size:
        return (0, 0), (0, 0)
    (_, a, _), (_, _, a_end) = mine[run.a], mine[run.a + run.size - 1]
    (_, b, _), (_, _, b_end) = theirs[run.b], theirs[run.b + run.size - 1]
    return (a, a_end), (b, b_end)


def _spans(text: str) -> list[tuple[str, int, int]]:
    """The `words` of a text, each with the place of the characters it came from."""
    parts: list[tuple[str, int]] = []  # the shortest pieces that normalise alone as they do together, and where they start
    for i, c in enumerate(text):
        alone = c if c.isascii() else unicodedata.normalize("NFKC", c)
        before, start = parts[-1] if parts else ("", 0)
        joined = before + alone if c.isascii() else unicodedata.normalize("NFKC", text[start : i + 1])
        if not parts or (joined == before + alone and not unicodedata.combining(alone[0])):
            parts.append((alone, i))
        else:
            parts[-1] = (joined, start)
    folded = [(part.casefold(), start) for part, start in parts]
    origin = [k for k, (part, _) in enumerate(folded) for _ in part]
    starts = [start for _, start in folded] + [len(text)]
    matches = _WORD.finditer("".join(part for part, _ in folded))
    return [(m.group(), starts[origin[m.start()]], starts[origin[m.end() - 1] + 1]) for m in matches]


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
