"""The loops behind overlap.py, over flat integer arrays.

Imported on first use: numba takes a second to load and more to compile.

Words, runs of words, whole texts are all *spans* of an array, and each span is named by the first span that equals it.
A hash only locates candidates: spans are equal if their elements are, so a hash collision cannot create a pair. Only
names are compared, so the result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dagster_project.core.errors import InputError
from dagster_project.core.imports import hidden
from dagster_project.curation.similarity.engine import BINS, Array, Constants, Gates

with hidden("scipy", "cffi"):  # for linear algebra and for functions in C, which these loops do not use
    import numba
    import numba.core.typing.cffi_utils
    import numba.np.arraymath

Function = TypeVar("Function", bound=Callable[..., Any])

THREADS = numba.config.NUMBA_NUM_THREADS
"""Compiled loops release the GIL, so plain threads share the work."""
MOST = 2**31 - 1
"""Spans that can be named at once: a name has 32 bits."""
PARTS = 8
"""Hash tables over which a set of spans is divided, by the top bits of the hash: each is small enough for the
processor's cache."""

_SHIFT, _HALF = np.uint64(61), np.uint64(32)
_LOW, _HIGH = np.uint64(0xFFFFFFFF), np.uint64(0xFFFFFFFF00000000)
_OFFSET, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_MIX_SHIFT, _MIX = np.uint64(33), np.uint64(0xFF51AFD7ED558CCD)

FOLD = np.array([ord(chr(c).lower()) if chr(c).isalnum() else 0 for c in range(128)] + list(range(128, 256)), np.uint8)
"""Mapping of each byte of UTF-8: ASCII letters to lower case, other ASCII that is not a word character to 0, the rest
unchanged."""


class Index(NamedTuple):
    """Index of keys by text and of texts by key; only keys in 2 to `rare` texts."""

    bounds: Array
    """The keys of text t are keys[bounds[t] : bounds[t + 1]]."""
    keys: Array
    begin: Array
    end: Array
    """The texts with key k are texts[begin[k] : end[k]], ascending."""
    texts: Array


def compiled(function: Function) -> Function:
    """Compile on first call, and keep the result beside the module, in the user's cache, or else in memory."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@compiled
def _split(data: Array, bounds: Array, fold: Array) -> tuple[Array, Array, Array]:
    """Fold `data` in place; returns start and length of each word, and the number of words before each row."""
    count = 0
    for row in range(len(bounds) - 1):
        inside = False
        for i in range(bounds[row], bounds[row + 1]):
            data[i] = fold[data[i]]
            count += data[i] != 0 and not inside
            inside = data[i] != 0
    starts, lengths, offsets = np.empty(count, np.int64), np.empty(count, np.int32), np.zeros(len(bounds), np.int64)
    count = 0
    for row in range(len(bounds) - 1):
        i, stop = bounds[row], bounds[row + 1]
        while i < stop:
            start = i
            while i < stop and data[i] != 0:
                i += 1
            if i > start:
                starts[count], lengths[count] = start, i - start
                count += 1
            i += 1
        offsets[row + 1] = count
    return starts, lengths, offsets


@compiled
def hash_spans(values: Array, starts: Array, lengths: Array) -> Array:
    """64-bit hashes: Fowler-Noll-Vo 1a over the elements, then a step of MurmurHash3's finalizer."""
    hashes = np.empty(len(starts), np.uint64)
    for k in range(len(starts)):
        start, length = starts[k], lengths[k if len(lengths) > 1 else 0]
        h = _OFFSET
        for i in range(start, start + length):
            h = (h ^ np.uint64(values[i])) * _PRIME
        h = (h ^ (h >> _MIX_SHIFT)) * _MIX
        hashes[k] = h ^ (h >> _MIX_SHIFT)
    return hashes


@compiled
def _count_parts(hashes: Array, counts: Array) -> None:
    for k in range(len(hashes)):
        counts[hashes[k] >> _SHIFT] += 1


@compiled
def _name_part(
    hashes: Array, values: Array, starts: Array, lengths: Array, part: np.uint64, count: int, names: Array
) -> None:
    """Name the `count` spans with a hash in `part`, in a table by linear probing of (half a hash, first span + 1)."""
    size = count + count // 2 + 1
    table = np.zeros(size, np.uint64)
    for k in range(len(hashes)):
        h = hashes[k]
        if h >> _SHIFT != part:
            continue
        slot = np.int64(((h & _LOW) * np.uint64(size)) >> _HALF)
        while True:
            entry = table[slot]
            if entry == 0:
                table[slot] = (h & _HIGH) | np.uint64(k + 1)
                names[k] = k
                break
            if entry & _HIGH == h & _HIGH:
                first = np.int64(entry & _LOW) - 1
                length = lengths[k if len(lengths) > 1 else 0]
                same = length == lengths[first if len(lengths) > 1 else 0]
                i = 0
                while same and i < length:
                    same = values[starts[k] + i] == values[starts[first] + i]
                    i += 1
                if same:
                    names[k] = first
                    break
            slot = np.int64(slot + 1 if slot + 1 < size else 0)


def name_spans(values: Array, starts: Array, lengths: Array) -> Array:
    """For each span of `values` the index of the first span with the same elements.

    Args:
        starts, lengths: int arrays; a single length applies to all spans.
    """
    if len(starts) > MOST:
        raise InputError(f"{len(starts)} words: at most {MOST} can be compared at once", "compare the files in parts")
    hashes = hash_spans(values, starts, lengths)
    names, counts = np.empty(len(starts), np.int32), np.zeros(PARTS, np.int64)
    _count_parts(hashes, counts)

    def name(part: int) -> None:
        _name_part(hashes, values, starts, lengths, np.uint64(part), int(counts[part]), names)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(name, np.flatnonzero(counts).tolist()))
    return names


@compiled
def grams(low: Array, high: Array, n: int, shingle: int, shared: Array) -> tuple[Array, Array]:
    """Starts and texts of the runs of n words in the texts low[t]:high[t] whose every shingle is `shared`."""
    total = 0
    for text in range(len(low)):
        total += max(0, high[text] - low[text] - n + 1)
    starts, texts = np.empty(total, np.int32), np.empty(total, np.int32)
    count = 0
    for text in range(len(low)):
        for i in range(low[text], high[text] - n + 1):
            keep = True
            for k in range(i, i + n - shingle + 1):
                keep = keep and shared[k]
            if keep:
                starts[count], texts[count] = i, text
                count += 1
    return starts[:count].copy(), texts[:count].copy()


@compiled
def frequency(names: Array, texts: Array, size: int) -> Array:
    """Number of texts with each name. `texts` ascends."""
    counts, last = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    for k in range(len(names)):
        if last[names[k]] != texts[k]:
            last[names[k]] = texts[k]
            counts[names[k]] += 1
    return counts


@compiled
def spread(tokens: Array, low: Array, high: Array) -> Array:
    """For each word id the number of texts low[t]:high[t] with the word."""
    counts, last = np.zeros(len(tokens), np.int32), np.full(len(tokens), -1, np.int32)
    for text in range(len(low)):
        for i in range(low[text], high[text]):
            if last[tokens[i]] != text:
                last[tokens[i]] = text
                counts[tokens[i]] += 1
    return counts


@compiled
def _index(names: Array, texts: Array, counts: Array, right: Array, rare: int) -> Index:
    """Keys in at most `rare` texts, with those of their texts that are on the right."""
    key, kept, total = np.full(len(counts), -1, np.int32), 0, 0
    for name in range(len(counts)):
        if 2 <= counts[name] <= rare:
            key[name] = kept
            kept += 1
            total += counts[name]
    begin, holders = np.empty(kept, np.int64), np.empty(total, np.int32)
    kept, total = 0, 0
    for name in range(len(counts)):
        if key[name] >= 0:
            begin[kept] = total
            kept += 1
            total += counts[name]
    end, bounds, keys = begin.copy(), np.zeros(len(right) + 1, np.int64), np.empty(len(names), np.int32)
    used = 0
    for k in range(len(names)):
        at, text = key[names[k]], texts[k]
        if at < 0:
            continue
        keys[used] = at
        used += 1
        bounds[text + 1] += 1
        if right[text] and (end[at] == begin[at] or holders[end[at] - 1] != text):
            holders[end[at]] = text
            end[at] += 1
    return Index(np.cumsum(bounds), keys[:used].copy(), begin, end, holders)


@compiled
def shingle_sets(names: Array, texts: Array, counts: Array, size: int, rare: int) -> tuple[Array, Array, Array]:
    """Number of different shingles of each text, without boilerplate, and those that other texts contain, sorted."""
    sizes, bounds, shingles = np.zeros(size, np.int32), np.zeros(size + 1, np.int64), np.empty(len(names), np.int32)
    used, k = 0, 0
    for text in range(size):
        first = k
        while k < len(names) and texts[k] == text:
            k += 1
        mine = np.sort(names[first:k])
        for i in range(len(mine)):
            if counts[mine[i]] <= rare and (i == 0 or mine[i] != mine[i - 1]):
                sizes[text] += 1
                if counts[mine[i]] > 1:
                    shingles[used] = mine[i]
                    used += 1
        bounds[text + 1] = used
    return sizes, bounds, shingles[:used].copy()


@compiled
def leave_one_out(tokens: Array, low: Array, high: Array, least: int, below: int) -> tuple[Array, Array, Array, Array]:
    """Each text of `least` to `below` words whole and with each one word left out: words, starts, lengths, texts."""
    spans, total = 0, 0
    for text in range(len(low)):
        n = high[text] - low[text]
        if least <= n < below:
            spans += n + 1
            total += n * n
    values, starts = np.empty(total, np.int32), np.empty(spans, np.int32)
    lengths, texts = np.empty(spans, np.int32), np.empty(spans, np.int32)
    spans, total = 0, 0
    for text in range(len(low)):
        n = high[text] - low[text]
        if least <= n < below:
            for left_out in range(low[text], high[text] + 1):
                starts[spans], texts[spans] = total, text
                for i in range(low[text], high[text]):
                    if i != left_out:
                        values[total] = tokens[i]
                        total += 1
                lengths[spans] = total - starts[spans]
                spans += 1
    return values, starts, lengths, texts


@compiled
def _in_order(tokens: Array, a: int, a_end: int, b: int, b_end: int) -> float:
    """Words that two texts have in the same order (longest common subsequence), as a share of the shorter text."""
    lengths = np.zeros(b_end - b + 1, np.int32)
    for i in range(a, a_end):
        diagonal = 0
        for j in range(b, b_end):
            above = lengths[j - b + 1]
            lengths[j - b + 1] = diagonal + 1 if tokens[i] == tokens[j] else max(above, lengths[j - b])
            diagonal = above
    return lengths[-1] / min(a_end - a, b_end - b)


@compiled
def judge(
    a: int, b: int, by_run: bool, sizes: Array, bounds: Array, shingles: Array, tokens: Array, low: Array, high: Array,
    gates: Gates
) -> tuple[int, float, int]:  # fmt: skip
    """Rule (0: not near-copies, 1: Jaccard, 2: containment), similarity, and bin of containment (-1: not counted) of
    two texts.

    Args:
        by_run: whether they share a rare run of words.
        sizes, bounds, shingles: result of `shingle_sets`.
    """
    i, i_end, j, j_end = bounds[a], bounds[a + 1], bounds[b], bounds[b + 1]
    smaller, both, common = min(sizes[a], sizes[b]), sizes[a] + sizes[b], 0
    most = min(i_end - i, j_end - j)
    if most < gates.containment / 2 * smaller and most < gates.jaccard / 2 * (both - most):
        return 0, 0.0, -1  # half of the thresholds, so that the scores include pairs slightly below them
    while i < i_end and j < j_end:
        common += shingles[i] == shingles[j]
        step = shingles[i] <= shingles[j]
        j += shingles[j] <= shingles[i]
        i += step
    if not common:
        return 0, 0.0, -1
    similar, contained = common / (both - common), common / smaller
    rule, score = 0, 0.0
    if similar >= gates.firm or (
        similar >= gates.jaccard
        and (
            min(high[a] - low[a], high[b] - low[b]) >= gates.long
            or _in_order(tokens, low[a], high[a], low[b], high[b]) >= gates.in_order
        )
    ):
        rule, score = 1, similar
    elif by_run and contained >= (gates.containment if smaller >= gates.few else gates.whole):
        rule, score = 2, contained
    return rule, score, int((BINS - 1) * common / smaller)


@compiled
def _compare(
    first: int, last: int, left: Array, within: bool, runs: Index, short: Index, edited: Index,
    sizes: Array, bounds: Array, shingles: Array, tokens: Array, low: Array, high: Array, gates: Gates,
) -> tuple[list[tuple[int, int, float, int]], Array]:  # fmt: skip
    """Near-copies of the texts first:last as (text, text, similarity, rule); and compared pairs by `BINS`."""
    found = [(0, 0, 0.0, 0)]
    found.pop()
    scores = np.zeros((BINS, 2), np.int64)
    words = high - low
    seen, paired = np.full(len(left), -1, np.int32), np.full(len(left), -1, np.int32)
    for a in range(first, last):
        if not left[a]:
            continue
        kind = -1
        for index in (runs, short, edited):
            kind += 1
            for k in range(index.bounds[a], index.bounds[a + 1]):
                key = index.keys[k]
                for at in range(index.end[key] - 1, index.begin[key] - 1, -1):
                    b = index.texts[at]
                    if within and b <= a:
                        break
                    if b == a or paired[b] == a:
                        continue
                    if kind == 2:
                        paired[b] = a
                        found.append((a, b, 1 - 1 / max(words[a], words[b]), 3))
                        scores[int((BINS - 1) * (1 - 1 / max(words[a], words[b]))), 1] += 1
                        continue
                    if seen[b] == a:
                        continue
                    seen[b] = a
                    rule, similarity, score = judge(a, b, kind == 0, sizes, bounds, shingles, tokens, low, high, gates)
                    if rule:
                        paired[b] = a
                        found.append((a, b, similarity, rule))
                    if score >= 0:
                        scores[score, int(rule > 0)] += 1
    return found, scores


@compiled
def passages(starts: Array, texts: Array, frequent: Array, run: int) -> tuple[Array, Array, Array]:
    """The longest passages in which every run of `run` words is `frequent`: starts, lengths, texts."""
    begin = np.empty(len(starts), np.int32)
    lengths = np.empty(len(starts), np.int32)
    owners = np.empty(len(starts), np.int32)
    count = 0
    for k in range(len(starts)):
        if not frequent[k]:
            continue
        if count and owners[count - 1] == texts[k] and begin[count - 1] + lengths[count - 1] == starts[k] + run - 1:
            lengths[count - 1] += 1
        else:
            begin[count], lengths[count], owners[count] = starts[k], run, texts[k]
            count += 1
    return begin[:count].copy(), lengths[:count].copy(), owners[:count].copy()


def split(rows: Sequence[bytes]) -> tuple[Array, Array, Array, Array]:
    """Words of `rows`: folded bytes, start and length of each word in them, and the bounds of each row's words."""
    bounds = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=bounds[1:])
    data = np.frombuffer(bytearray().join(rows), np.uint8)
    return (data, *_split(data, bounds, FOLD))


def tokenize(rows: Sequence[bytes]) -> tuple[Array, Array]:
    """Number the words of `rows`: an id for each, equal where the words are, and the bounds of each row's ids."""
    data, starts, lengths, offsets = split(rows)
    return name_spans(data, starts, lengths), offsets


def distinct(tokens: Array, offsets: Array) -> tuple[Array, Array]:
    """For each row the number of its text (-1 if it has no words), and for each different text its first row."""
    lengths = np.diff(offsets).astype(np.int32)
    names = name_spans(tokens, offsets[:-1].astype(np.int32), lengths)
    is_first = (names == np.arange(len(names))) & (lengths > 0)
    number = np.cumsum(is_first, dtype=np.int64) - 1
    return np.where(lengths > 0, number[names], -1), np.flatnonzero(is_first)


def near_texts(
    tokens: Array, low: Array, high: Array, left: Array, right: Array, within: bool,
    *, constants: Constants, scores: Array, boilerplate: list[tuple[int, int, int]],
) -> Iterator[tuple[int, int, float, int]]:  # fmt: skip
    """Near-copies among different texts.

    Args:
        tokens: ids of words; text t is tokens[low[t]:high[t]].
        left, right: texts on the left and right side of a pair.
        within: whether a pair is given once, smaller text first.
        scores: (BINS, 2), incremented by the compared pairs: those that are not near-copies, and near-copies. Complete
            above half of the thresholds.
        boilerplate: gets the passages in more than `rare` texts, the most frequent first, as (start, length, texts).
    Yields:
        (text, text, similarity, rule): rule 1 Jaccard, 2 containment, 3 one word left out.
    """
    run, shingle, short, edited, rare, gates = constants
    words = high - low
    shared = np.ones(len(tokens), np.bool_)
    starts, texts = grams(low, high, shingle, shingle, shared)
    names = name_spans(tokens, starts, np.array([shingle], np.int32))
    counts = frequency(names, texts, len(names))
    sizes, bounds, shingles = shingle_sets(names, texts, counts, len(low), rare)
    # A run can be in two texts only if its shingles are.
    shared[:] = False
    shared[starts] = counts[names] > 1
    is_short = (words >= run) & (words < short)
    few = is_short[texts] & (counts[names] > 1) & (counts[names] <= rare)
    names, texts = names[few], texts[few]
    by_shingle = _index(names, texts, frequency(names, texts, len(counts)), right, rare)
    del starts, names, counts
    starts, texts = grams(low, high, run, shingle, shared)
    names = name_spans(tokens, starts, np.array([run], np.int32))
    counts = frequency(names, texts, len(names))
    boilerplate += _most_frequent(tokens, *passages(starts, texts, counts[names] > rare, run), rare)
    by_run = _index(names, texts, counts, right, rare)
    values, starts, lengths, texts = leave_one_out(tokens, low, high, run, edited)
    names = name_spans(values, starts, lengths)
    by_rest = _index(names, texts, frequency(names, texts, len(names)), right, rare)
    del starts, names, texts, shared

    def compare(first: int) -> tuple[list[tuple[int, int, float, int]], Array]:
        return _compare(
            first, min(first + step, len(low)), left, within, by_run, by_shingle, by_rest,
            sizes, bounds, shingles, tokens, low, high, gates,
        )  # fmt: skip

    step = max(1024, len(low) // 64)
    with ThreadPoolExecutor(THREADS) as pool:
        for found, counted in pool.map(compare, range(0, len(low), step)):
            scores += counted
            yield from found


def _most_frequent(tokens: Array, starts: Array, lengths: Array, texts: Array, rare: int) -> list[tuple[int, int, int]]:
    names = name_spans(tokens, starts, lengths if len(lengths) != 1 else np.array([lengths[0]], np.int32))
    counts = frequency(names, texts, len(names))
    order = np.argsort(-counts, kind="stable")[:10]
    return [(int(starts[k]), int(lengths[k]), int(counts[k])) for k in order if counts[k] > rare]
