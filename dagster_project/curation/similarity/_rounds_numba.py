"""The loops behind rounds.py, over arrays of a block of texts or of a partition. Words are numbered over all texts."""

from __future__ import annotations

import numpy as np

from dagster_project.curation.similarity._overlap_numba import (
    compiled,
    frequency,
    grams,
    hash_spans,
    judge,
    leave_one_out,
    name_spans,
    shingle_sets,
)
from dagster_project.curation.similarity.engine import BINS, Array, Gates

_SHIFT, _MIX = np.uint64(33), np.uint64(0xC4CEB9FE1A85EC53)
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64)

UNIQUE, SHARED, BOILERPLATE = 1, 2, 3
"""Class of a shingle: in one text, in 2 to RARE, in more. 0 where no shingle starts."""
_PAIR_BITS, _KIND_BITS = np.uint64(31), np.uint64(2)


@compiled
def span_keys(digests: Array, values: Array, starts: Array, lengths: Array) -> Array:
    """128-bit keys (n, 2) of spans of `values`, which are indices of `digests` (m, 2): equal spans have equal keys."""
    keys = np.zeros((len(starts), 2), np.uint64)
    for k in range(len(keys)):
        for lane in range(2):
            key = np.uint64(0)
            for i in range(starts[k], starts[k] + lengths[k]):
                key = (key ^ (key >> _SHIFT)) * _MIX
                key = (key ^ (key >> _SHIFT)) + digests[values[i], lane]
            keys[k, lane] = key
    return keys


def digests(ids: Array) -> Array:
    """Digests (n, 2) of numbers."""
    return ids.astype(np.uint64)[:, None] * _FACTORS


@compiled
def take(values: Array, low: Array, high: Array) -> Array:
    """The spans low[k]:high[k] of `values`, one after the other."""
    total = 0
    for k in range(len(low)):
        total += high[k] - low[k]
    taken = np.empty(total, values.dtype)
    total = 0
    for k in range(len(low)):
        for i in range(low[k], high[k]):
            taken[total] = values[i]
            total += 1
    return taken


@compiled
def _by_part(hashes: Array, parts: int) -> tuple[Array, Array]:
    """Indices of `hashes` by partition, ascending in each; and the number in each partition."""
    counts = np.zeros(parts, np.int64)
    for k in range(len(hashes)):
        counts[hashes[k] % np.uint64(parts)] += 1
    at, order = np.cumsum(counts) - counts, np.empty(len(hashes), np.int64)
    for k in range(len(hashes)):
        part = hashes[k] % np.uint64(parts)
        order[at[part]] = k
        at[part] += 1
    return order, counts


def divide(rows: Array, columns: int, parts: int) -> tuple[Array, Array]:
    """Order of `rows` (n, width) by partition, which the first `columns` determine; and the number in each one."""
    width = rows.shape[1]
    hashes = hash_spans(
        np.ascontiguousarray(rows).reshape(-1), np.arange(len(rows)) * width, np.array([columns], np.int32)
    )
    order, counts = _by_part(hashes, parts)
    return order, counts


def name_rows(rows: Array, columns: int) -> Array:
    """For each of `rows` (n, width) the index of the first with the same first `columns`."""
    return name_spans(
        np.ascontiguousarray(rows).reshape(-1), np.arange(len(rows)) * rows.shape[1], np.array([columns], np.int32)
    )


def shingle_rows(words: Array, offsets: Array, base: int, shingle: int) -> tuple[Array, Array]:
    """The shingles of a block: (words..., text), and the position of each in `words`."""
    starts, texts = grams(offsets[:-1], offsets[1:], shingle, shingle, np.ones(len(words), np.bool_))
    return np.column_stack([*(words[starts + i] for i in range(shingle)), texts + np.int32(base)]), starts


def run_rows(words: Array, offsets: Array, classes: Array, base: int, sides: Array, run: int, shingle: int) -> Array:
    """The runs of a block that may be in several texts: (words..., text, side, position in the text)."""
    starts, texts = grams(offsets[:-1], offsets[1:], run, shingle, classes > UNIQUE)
    places = (starts - offsets[texts]).astype(np.int32)
    return np.column_stack([*(words[starts + i] for i in range(run)), texts + np.int32(base), sides[texts], places])


def short_rows(
    words: Array, offsets: Array, classes: Array, base: int, sides: Array, shingle: int, least: int, below: int
) -> Array:
    """Rare shingles of the texts of `least` to `below` words: (words..., text, side)."""
    counts = np.diff(offsets)
    shared = classes == SHARED
    shared &= np.repeat((counts >= least) & (counts < below), counts)
    starts = np.flatnonzero(shared)
    texts = np.searchsorted(offsets, starts, "right") - 1
    return np.column_stack(
        [*(words[starts + i] for i in range(shingle)), (texts + base).astype(np.int32), sides[texts]]
    )


def rest_rows(words: Array, offsets: Array, base: int, sides: Array, least: int, below: int) -> Array:
    """Texts of `least` to `below` words, whole and without each one word: (words, 0 for none; text, side)."""
    values, starts, lengths, texts = leave_one_out(words, offsets[:-1], offsets[1:], least, below)
    rows = np.zeros((len(starts), below + 1), np.int32)
    for i in range(below - 1):
        longer = lengths > i
        rows[longer, i] = values[starts[longer] + i]
    rows[:, below - 1], rows[:, below] = texts + np.int32(base), sides[texts]
    return rows


@compiled
def _pairs(names: Array, texts: Array, sides: Array, counts: Array, within: bool, rare: int, kind: int) -> Array:
    """Pairs of texts that share a name with 2 to `rare` texts, encoded as in `pair_codes`; some repeatedly."""
    begin, total = np.full(len(names), -1, np.int64), 0
    for name in range(len(names)):
        if 2 <= counts[name] <= rare:
            begin[name] = total
            total += counts[name]
    end, holders = begin.copy(), np.empty(total, np.int64)
    for k in range(len(names)):
        at = end[names[k]]
        if at >= 0 and (at == begin[names[k]] or texts[holders[at - 1]] != texts[k]):
            holders[at] = k
            end[names[k]] += 1
    codes = [np.uint64(0)]
    codes.pop()
    for name in range(len(names)):
        for i in range(begin[name], end[name]):
            for j in range(i + 1, end[name]):
                a, b = np.uint64(texts[holders[i]]), np.uint64(texts[holders[j]])
                if within or (sides[holders[i]] & 1 and sides[holders[j]] & 2):
                    codes.append((((a << _PAIR_BITS) | b) << _KIND_BITS) | np.uint64(kind))
                if not within and sides[holders[j]] & 1 and sides[holders[i]] & 2:
                    codes.append((((b << _PAIR_BITS) | a) << _KIND_BITS) | np.uint64(kind))
    found = np.empty(len(codes), np.uint64)
    for k in range(len(codes)):
        found[k] = codes[k]
    return found


def pair_codes(rows: Array, columns: int, within: bool, rare: int, kind: int) -> tuple[Array, Array]:
    """Candidates of a partition; and for each of its rows the number of texts with its key.

    Args:
        rows: (key of `columns`, text, side, ...), texts ascending.
        kind: of the key, 0 to 3.
    Returns:
        Codes, ascending: left text << 33 | right text << 2 | kind.
    """
    names = name_rows(rows, columns)
    texts = np.ascontiguousarray(rows[:, columns])
    counts = frequency(names, texts, len(names))
    return (
        np.unique(_pairs(names, texts, np.ascontiguousarray(rows[:, columns + 1]), counts, within, rare, kind)),
        counts[names],
    )


def decode_pairs(codes: Array) -> tuple[Array, Array, Array]:
    """Different pairs of `codes`, ascending: left texts, right texts, and kinds of keys that they share, as bits."""
    codes = np.unique(codes)
    pairs, starts = np.unique(codes >> _KIND_BITS, return_index=True)
    kinds = np.left_shift(1, (codes & np.uint64(3)).astype(np.int64))
    return (
        (pairs >> _PAIR_BITS).astype(np.int64),
        (pairs & np.uint64(2**31 - 1)).astype(np.int64),
        np.bitwise_or.reduceat(kinds, starts) if len(starts) else kinds,
    )


@compiled
def _judge_all(
    left: Array, right: Array, kinds: Array, sizes: Array, bounds: Array, shingles: Array, tokens: Array, low: Array,
    high: Array, gates: Gates
) -> tuple[Array, Array, Array]:  # fmt: skip
    rules, similarities, scores = np.zeros(len(left), np.int8), np.zeros(len(left)), np.zeros((BINS, 2), np.int64)
    for k in range(len(left)):
        a, b = left[k], right[k]
        if kinds[k] & 3:
            rule, similarity, score = judge(a, b, kinds[k] & 1 != 0, sizes, bounds, shingles, tokens, low, high, gates)
            rules[k], similarities[k] = rule, similarity
            if score >= 0:
                scores[score, int(rule > 0)] += 1
        if rules[k] == 0 and kinds[k] & 4:
            rules[k], similarities[k] = 3, 1 - 1 / max(high[a] - low[a], high[b] - low[b])
            scores[int((BINS - 1) * (1 - 1 / max(high[a] - low[a], high[b] - low[b]))), 1] += 1
    return rules, similarities, scores


def judge_pairs(
    words: Array, classes: Array, offsets: Array, left: Array, right: Array, kinds: Array, shingle: int, gates: Gates
) -> tuple[Array, Array, Array]:
    """Rule (0 for none) and similarity of each pair; and their scores, (BINS, 2).

    Args:
        words, classes, offsets: of the texts of the pairs.
        left, right, kinds: indices of the texts, and the kinds of keys that they share, as bits: 1 runs, 2 shingles of
        short texts, 4 texts without a word.
    """
    starts, texts = grams(offsets[:-1], offsets[1:], shingle, shingle, np.ones(len(words), np.bool_))
    names = name_spans(words, starts, np.array([shingle], np.int32))
    sizes, bounds, shingles = shingle_sets(names, texts, classes[starts].astype(np.int32), len(offsets) - 1, SHARED)
    return _judge_all(left, right, kinds, sizes, bounds, shingles, words, offsets[:-1], offsets[1:], gates)


@compiled
def word_counts(words: Array, offsets: Array, wanted: Array) -> Array:
    """For each of the `wanted` words, which ascend, the number of texts with it."""
    counts, last = np.zeros(len(wanted), np.int64), np.full(len(wanted), -1, np.int64)
    for text in range(len(offsets) - 1):
        for i in range(offsets[text], offsets[text + 1]):
            at = np.searchsorted(wanted, words[i])
            if at < len(wanted) and wanted[at] == words[i] and last[at] != text:
                last[at] = text
                counts[at] += 1
    return counts
