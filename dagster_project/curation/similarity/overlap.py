"""Near-copies among texts. Candidates share a rare run of words; their similarity is then measured exactly.

On instruction data (one edited word, a text quoted inside a longer one) the rule is better than locality-sensitive
hashing and needs no tuning; docs/decisions/006 has the measurements.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from dagster_project.core.words import SPACED_MARKS

if TYPE_CHECKING:
    from dagster_project.curation.similarity.engine import Constants, Found

RUN = 5
"""Words in the run two texts must share to be compared. Texts with fewer words match only if equal."""
SHINGLE = 3
"""Words in the runs that similarity is measured over (Broder, On the resemblance and containment of documents,
1997)."""
BINS = 20
RARE = 50
"""A run or shingle in more different texts than this is boilerplate and is ignored."""
JACCARD, CONTAINMENT = 0.3, 0.6
"""Texts are near-copies from this share of common shingles, of their union or, where they share a run, of the smaller
text."""
FIRM, IN_ORDER, LONG = 0.5, 0.7, 40
"""Below a Jaccard index of `FIRM`, texts of which one has fewer than `LONG` words must also have this share of the
shorter one's words in the same order: an edit leaves the rest in place, while "Explain the concept of ..." is a common
opening and no copy."""
FEW, WHOLE = 10, 0.8
"""A text of fewer than `FEW` shingles must be contained nearly whole: half of a short text is a common phrase."""
SHORT = 15
"""Two texts of fewer words may lack a common run after one or two edits: any common shingle makes them candidates for
`JACCARD`."""
EDITED = 8
"""One edit may leave two texts of fewer words without enough common shingles: they also match if they are the same once
a word is left out of one or each of them (the index of deletions known from SymSpell, over words)."""

SMALL, ALONE = 400_000, 20_000_000
"""Characters of texts that plain Python compares (_overlap_python.py): in less time than numba takes to load; and
without numba."""
_SAMPLE = 1000

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:[{SPACED_MARKS}]+[^\W_{_CJK}]*)*")

Rule: TypeAlias = Literal["equal", "jaccard", "containment", "one_word"]
_RULES: tuple[Rule, ...] = ("equal", "jaccard", "containment", "one_word")


@dataclass(frozen=True, slots=True)
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


class Passage(NamedTuple):
    """Words that many texts share, by where the first of them has it."""

    row: int
    """Of the text, counted over both sides."""
    start: int
    """Its first word, counted in `words`."""
    words: int
    texts: int
    """Different texts with it."""

    def of(self, text: str) -> str:
        return " ".join(words(text)[self.start : self.start + self.words])


@dataclass(frozen=True)
class Comparison:
    """Near-copies of a comparison, and statistics."""

    pairs: list[Pair]
    scores: list[tuple[int, int]]
    """For each of `BINS` equal steps of containment from 0 to 1: compared pairs that are not near-copies, and
    near-copies. Complete above half of the thresholds."""
    boilerplate: list[Passage]
    """Passages in more than `RARE` different texts: the ten most frequent."""
    frequency: dict[str, int] = field(default_factory=dict)
    """Word -> number of different texts with it, for the words of near-copies; empty unless requested."""


def near_pairs(texts: Sequence[str], against: Sequence[str] | None = None) -> Iterator[Pair]:
    """Pairs of near-copies: within `texts` (left < right), or of `texts` (left) with `against` (right), in order."""
    return iter(compare(texts, against).pairs)


def compare(texts: Sequence[str], against: Sequence[str] | None = None, count_words: bool = False) -> Comparison:
    """Near-copies within `texts` (left < right), or of `texts` (left) with `against` (right), in order.

    Equal texts count once in the frequencies of runs, so a text is found however often it is repeated.

    Args:
        texts, against: read in order, a few of them once more at the end. Large ones are compared in rounds
            (rounds.py), which changes memory and time only.
        count_words: whether to fill `Comparison.frequency`.
    """
    from dagster_project.curation.similarity.engine import Constants, Gates

    gates = Gates(JACCARD, FIRM, IN_ORDER, LONG, CONTAINMENT, WHOLE, FEW)
    constants = Constants(RUN, SHINGLE, SHORT, EDITED, RARE, gates)
    return _comparison(_engine(texts, against)(texts, against, constants, count_words), texts, against)


def _engine(texts: Sequence[str], against: Sequence[str] | None) -> Callable[..., Found]:
    """The fastest of the engines for texts of this size. All give the same result."""
    size = sum(_characters(side) for side in (texts, against or ()))
    if size <= (SMALL if find_spec("numba") else ALONE):
        from dagster_project.curation.similarity import _overlap_python

        return _overlap_python.search
    from dagster_project.curation.similarity import rounds

    return rounds.search if rounds.are_worth_it(size) else _search


def _characters(texts: Sequence[str]) -> int:
    """Characters of all texts, estimated by a sample."""
    sampled = range(0, len(texts), max(1, len(texts) // _SAMPLE))
    return sum(len(texts[i]) for i in sampled) * len(texts) // max(1, len(sampled))


def encode(text: str) -> bytes:
    """UTF-8 with the same `words` as the text."""
    return text.encode() if text.isascii() else " ".join(words(text)).encode()


def _search(texts: Sequence[str], against: Sequence[str] | None, constants: Constants, count_words: bool) -> Found:
    """Near-copies among texts that fit into memory."""
    import numpy as np

    from dagster_project.curation.similarity import _overlap_numba as compiled
    from dagster_project.curation.similarity.engine import BINS, Found

    size = len(texts)
    tokens, offsets = compiled.tokenize([encode(text) for text in chain(texts, against or ())])
    number, first = compiled.distinct(tokens, offsets)
    left, right = np.zeros(len(first), np.bool_), np.zeros(len(first), np.bool_)
    for side, numbers in ((left, number[:size]), (right, number if against is None else number[size:])):
        side[numbers[numbers >= 0]] = True
    scores = np.zeros((BINS, 2), np.int64)
    frequent: list[tuple[int, int, int]] = []
    low, high = offsets[first], offsets[first + 1]
    outputs: dict[str, Any] = {"scores": scores, "boilerplate": frequent}
    near = [*compiled.near_texts(tokens, low, high, left, right, against is None, constants=constants, **outputs)]
    word_counts: dict[int, list[int]] = {}
    if count_words:
        spread = compiled.spread(tokens, low, high)
        for text in sorted({text for a, b, _, _ in near for text in (a, b)}):
            row = int(first[text])
            word_counts[text] = spread[tokens[offsets[row] : offsets[row + 1]]].tolist()
    passages = []
    for start, length, count in frequent:
        row = int(np.searchsorted(offsets, start, "right")) - 1
        passages.append((int(number[row]), start - int(offsets[row]), length, count))
    return Found(number, first, near, scores, passages, word_counts)


def _comparison(found: Found, texts: Sequence[str], against: Sequence[str] | None) -> Comparison:
    """Pairs of rows from those of different texts: a text represents all its equal copies."""
    import numpy as np

    within, size, number = against is None, len(texts), found.number
    near: dict[int, list[tuple[int, float, int]]] = defaultdict(list)
    for a, b, similarity, rule in found.near:
        near[a].append((b, round(similarity, 3), rule))
        if within:
            near[b].append((a, round(similarity, 3), rule))

    def first_row(text: int) -> str:
        row = int(found.first[text])
        return texts[row] if row < size else (against or ())[row - size]

    frequency: dict[str, int] = {}
    for text, counts in found.word_counts.items():
        frequency.update(zip(words(first_row(text)), counts, strict=True))
    pairs: list[Pair] = []
    rights = number if within else number[size:]
    by_text = np.argsort(rights, kind="stable")
    bounds = np.searchsorted(rights, np.arange(len(found.first) + 1), sorter=by_text)
    repeated = np.diff(bounds) > within
    repeated[list(near)] = True
    for i in np.flatnonzero((number[:size] >= 0) & repeated[number[:size]]) if len(repeated) else ():
        others: list[tuple[int, float, int]] = []
        for text, similarity, rule in [(int(number[i]), 1.0, 0), *near.get(int(number[i]), ())]:
            others += [(int(j), similarity, rule) for j in by_text[bounds[text] : bounds[text + 1]]]
        others.sort()
        pairs += [Pair(int(i), j, similarity, _RULES[rule]) for j, similarity, rule in others if not within or j > i]
    passages = [Passage(int(found.first[text]), start, length, count) for text, start, length, count in found.passages]
    scores = found.scores[:BINS].copy()
    scores[-1] += found.scores[BINS]
    return Comparison(pairs, [(int(other), int(near)) for other, near in scores], passages, frequency)


def thirteen_gram_pairs(texts: Sequence[str], against: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of `texts` and `against` that share a run of 13 words, in order: the common test of benchmark leakage.

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
    """Position of the longest common run of words in both texts, as (start, end) in characters; (0, 0) for none.

    "He said: Good Morning!" and "good morning, Ann" -> (9, 21), (0, 12)
    """
    mine, theirs = _spans(left), _spans(right)
    i, j, size = _longest_run([w for w, _, _ in mine], [w for w, _, _ in theirs])
    if not size:
        return (0, 0), (0, 0)
    (_, a, _), (_, _, a_end) = mine[i], mine[i + size - 1]
    (_, b, _), (_, _, b_end) = theirs[j], theirs[j + size - 1]
    return (a, a_end), (b, b_end)


def _longest_run(left: Sequence[str], right: Sequence[str]) -> tuple[int, int, int]:
    """Start of the longest common run of words in both texts, and its length. difflib takes minutes if words repeat."""
    import numpy as np

    number = {word: i for i, word in enumerate(dict.fromkeys(right))}
    theirs = np.array([number[word] for word in right], np.int32)
    best = 0, 0, 0
    before = np.zeros(len(right) + 1, np.int32)  # words in common up to each of theirs, and the last of mine
    for i, word in enumerate(left):
        now = np.zeros(len(right) + 1, np.int32)
        if word in number:
            now[1:] = (before[:-1] + 1) * (theirs == number[word])
            j = int(now.argmax())
            size = int(now[j])
            best = (i + 1 - size, j - size, size) if size > best[2] else best
        before = now
    return best


def _spans(text: str) -> list[tuple[str, int, int]]:
    """The `words` of a text, each with (start, end) of its characters."""
    if text.isascii():
        return [(m.group(), m.start(), m.end()) for m in _WORD.finditer(text.lower())]
    parts: list[tuple[str, int]] = []  # the shortest pieces that can be normalized independently, and their start
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


def clusters(size: int, pairs: Sequence[Pair]) -> array[int]:
    """For each of `size` rows the smallest row it is linked to, directly or through others (itself if none)."""
    parent = array("q", range(size))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for pair in pairs:
        a, b = root(pair.left), root(pair.right)
        parent[max(a, b)] = min(a, b)
    for i, up in enumerate(parent):
        parent[i] = parent[up]  # a parent is never larger, so that of the parent is final
    return parent
