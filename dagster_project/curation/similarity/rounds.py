"""The rule of overlap.py in rounds of map and reduce, for texts that exceed memory or are compared by many processes.

A map round works on blocks of consecutive texts, a reduce round on partitions of keys (words, shingles, runs of words),
so that each key is counted over all texts. The calling process keeps arrays of numbers per text, and everything else in
scratch files. Results equal those of overlap.py, for any size of blocks and partitions and any workers:

1. map: number the words of a block; equal texts have equal keys, and the first represents the others
2. reduce: number the words of all blocks
3. map: shingles; reduce: in how many texts each is
4. map: runs, shingles of short texts, texts without one word; reduce: pairs that share a rare one
5. map: judge pairs
6. map: passages of frequent runs; reduce: count them
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from dagster_project.core import workers
from dagster_project.core.errors import InputError
from dagster_project.curation.similarity import _rounds_numba as loops
from dagster_project.curation.similarity._overlap_numba import frequency, name_spans, passages, split
from dagster_project.curation.similarity.engine import BINS, Array, Constants, Found
from dagster_project.curation.similarity.overlap import encode
from dagster_project.curation.similarity.shuffle import Column, Shuffle

IN_MEMORY = 100_000_000
"""Characters of texts that one process compares in its memory, which takes about 0.7 GB. More are compared in
rounds."""
SEVERAL = 40_000_000
"""The same if there are several workers. With two, this is where the time saved exceeds that of starting them."""
BLOCK = 4_000_000
"""Characters of a block, at most, if it has several texts. A worker needs about 20 bytes for each."""
PARTITION = 2**20
"""Words per partition. A worker needs about 80 bytes for each."""
MOST_PARTITIONS = 1024
PAIRS = 2**21
"""Words of the pairs that are judged at once, at most, if there are several pairs."""
BUCKET = 2**15
"""Left texts of the candidates that are sorted at once."""
TOP = 10
"""Number of reported passages."""


def are_worth_it(characters: int) -> bool:
    """Whether texts of so many characters are compared in rounds."""
    return characters > (SEVERAL if workers.current().count > 1 else IN_MEMORY)


class Sizes(NamedTuple):
    """Sizes of blocks and partitions; they do not change a result."""

    block: int
    partition: int
    pairs: int
    bucket: int


def search(
    texts: Sequence[str],
    against: Sequence[str] | None,
    constants: Constants,
    count_words: bool,
    sizes: Sizes | None = None,
) -> Found:
    """Near-copies within `texts`, or of `texts` with `against`.

    Args:
        texts, against: read once, in order.
        constants: of overlap.py.
        count_words: whether to fill `Found.word_counts`.
        sizes: defaults: the constants of this module.
    """
    sizes = sizes or Sizes(BLOCK, PARTITION, PAIRS, BUCKET)
    corpus = _Corpus(len(texts), against is None, constants, sizes, workers.current())
    corpus.read(chain(texts, against or ()))
    corpus.number_words()
    corpus.count_shingles()
    corpus.find_candidates()
    near, scores = corpus.judge()
    counts = corpus.word_counts(near) if count_words else {}
    return Found(corpus.number, corpus.first, near, scores, corpus.passages(), counts)


class _Corpus:
    """Texts in scratch files, and what the rounds have found."""

    def __init__(self, size: int, within: bool, constants: Constants, sizes: Sizes, processes: workers.Workers) -> None:
        self.size, self.within, self.constants, self.sizes, self.workers = size, within, constants, sizes, processes
        # of the different texts: ids of words, class of the shingle that starts there, and where a text is in both
        self.words, self.classes, self.offsets = Column(np.int32), Column(np.uint8), np.zeros(1, np.int64)

    def read(self, texts: Iterator[str]) -> None:
        """Number the words of each block, and the different texts."""
        self.local, self.vocabulary = Column(np.int32), Column(np.uint64)
        ends, rows, lengths, keys = [(0, 0)], [0], [np.empty(0, np.int32)], Column(np.uint64)
        for block in self.workers.map(_tokenize, None, _blocks(texts, self.sizes.block)):
            self.local.append(block.tokens)
            self.vocabulary.append(block.vocabulary.reshape(-1))
            lengths.append(block.lengths)
            keys.append(block.keys[block.lengths > 0])
            ends.append((self.local.size, self.vocabulary.size // 2))
            rows.append(rows[-1] + len(block.lengths))
        self.ends, self.rows = ends, np.array(rows, np.int64)
        self.lengths = np.concatenate(lengths)
        self.number, self.first = _distinct(keys.read(0, keys.size).reshape(-1, 2), self.lengths > 0)
        self.bases = np.searchsorted(self.first, self.rows)  # of each block, and the end: the number of its first text
        self.sides = self._sides()
        self.parts = min(MOST_PARTITIONS, max(1, -(-self.local.size // self.sizes.partition)))

    def _sides(self) -> Array:
        """For each text 1 if it is on the left, 2 on the right, 3 on both."""
        sides = np.zeros(len(self.first), np.int32)
        left, right = self.number[: self.size], self.number if self.within else self.number[self.size :]
        for side, numbers in ((1, left), (2, right)):
            there = np.zeros(len(sides), np.bool_)
            there[numbers[numbers >= 0]] = True
            sides[there] += side
        return sides

    def number_words(self) -> None:
        """Number the words of all blocks from 1."""
        shuffle = Shuffle(self.parts, 2, np.uint64)
        for _, (start, stop) in self._extents():
            keys = self.vocabulary.read(2 * start, 2 * stop).reshape(-1, 2)
            order, counts = loops.divide(keys, 2, self.parts)
            shuffle.add(keys[order], counts)
        self.ids, starts, used = Column(np.int32), [], 0
        for names, count in self.workers.map(_number_words, None, map(shuffle.part, range(self.parts))):
            starts.append(self.ids.size)
            if used + count >= 2**31:
                what = "2,147,483,648 different words or more: they cannot be numbered"
                raise InputError(what, "compare the files in parts")
            self.ids.append(names + np.int32(used + 1))
            used += count
        self.id_spans = shuffle.back(starts)

    def _extents(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """For each block where its words and its vocabulary are."""
        for (words, vocabulary), (words_end, vocabulary_end) in zip(self.ends, self.ends[1:], strict=False):
            yield (words, words_end), (vocabulary, vocabulary_end)

    def count_shingles(self) -> None:
        """Keep the different texts, and find the class of each shingle."""
        shuffle, offsets, at = Shuffle(self.parts, self.constants.shingle + 1), [np.zeros(1, np.int64)], 0
        found = self.workers.map(_shingles, (self.constants, self.parts), self._tokenized())
        for words, lengths, rows, counts in found:
            self.words.append(words)
            offsets.append(at + np.cumsum(lengths, dtype=np.int64))
            at = self.words.size
            shuffle.add(rows, counts)
        del self.local, self.vocabulary, self.ids
        self.offsets = np.concatenate(offsets)
        answers, starts = Column(np.uint8), []
        for classes in self.workers.map(_classify, self.constants, map(shuffle.part, range(self.parts))):
            starts.append(answers.size)
            answers.append(classes)
        self.shingle_classes, self.class_spans = answers, shuffle.back(starts)

    def _tokenized(self) -> Iterator[_Tokenized]:
        for k, ((start, stop), (word, word_end)) in enumerate(self._extents()):
            keys = self.vocabulary.read(2 * word, 2 * word_end).reshape(-1, 2)
            order, _ = loops.divide(keys, 2, self.parts)
            ids = np.empty(len(keys), np.int32)
            ids[order] = _read_all(self.ids, self.id_spans[k])
            offsets = np.concatenate(([0], np.cumsum(self.lengths[self.rows[k] : self.rows[k + 1]], dtype=np.int64)))
            firsts = self.first[self.bases[k] : self.bases[k + 1]] - self.rows[k]
            words = self.local.read(start, stop)
            yield _Tokenized(words, offsets[firsts], offsets[firsts + 1], ids, int(self.bases[k]))

    def _block(self, k: int) -> _Block:
        base, end = int(self.bases[k]), int(self.bases[k + 1])
        start, stop = int(self.offsets[base]), int(self.offsets[end])
        return _Block(self.words.read(start, stop), self.offsets[base : end + 1] - start, base, self.sides[base:end])

    def find_candidates(self) -> None:
        """Collect pairs that share a rare key, by their left texts; and frequent runs, by blocks."""
        columns = (self.constants.run, self.constants.shingle, self.constants.edited - 1)
        shuffles = [Shuffle(self.parts, width + more) for width, more in zip(columns, (3, 2, 2), strict=True)]
        numbers = range(len(self.rows) - 1)
        blocks = ((self._block(k), _read_all(self.shingle_classes, self.class_spans[k])) for k in numbers)
        for classes, keys in self.workers.map(_keys, (self.constants, self.parts), blocks):
            self.classes.append(classes)
            for shuffle, (rows, counts) in zip(shuffles, keys, strict=True):
                shuffle.add(rows, counts)
        del self.shingle_classes
        self.bucket = max(self.sizes.bucket, -(-len(self.first) // MOST_PARTITIONS))
        buckets = np.arange(0, len(self.first) + self.bucket, self.bucket, dtype=np.int64)
        self.candidates, self.frequent = Shuffle(len(buckets) - 1, 1, np.uint64), Shuffle(len(self.rows) - 1, 2)
        by_kind = [*enumerate(shuffles)]
        parts = ((of.part(part), columns[kind], kind) for kind, of in by_kind for part in range(self.parts))
        for codes, frequent in self.workers.map(_candidates, (self.constants, self.within), parts):
            self.candidates.add(codes, np.diff(np.searchsorted(codes, buckets.astype(np.uint64) << np.uint64(33))))
            if len(frequent):
                self.frequent.add(frequent, np.diff(np.searchsorted(frequent[:, 0], self.bases)))

    def judge(self) -> tuple[list[tuple[int, int, float, int]], Array]:
        """Near-copies among the candidates, and scores (`Found`)."""
        near: list[tuple[int, int, float, int]] = []
        scores = np.zeros((BINS, 2), np.int64)
        judged = self.workers.map(_judge, self.constants, self._candidate_pairs())
        for left, right, similarities, rules, counted in judged:
            near.extend(zip(left.tolist(), right.tolist(), similarities.tolist(), rules.tolist(), strict=True))
            scores += counted
        return near, scores

    def _candidate_pairs(self) -> Iterator[_Candidates]:
        lengths = np.diff(self.offsets)
        for bucket in range(self.candidates.parts):
            left, right, kinds = loops.decode_pairs(self.candidates.part(bucket).reshape(-1))
            ends = np.cumsum(lengths[left] + lengths[right])
            for pairs in _slices(ends, self.sizes.pairs):
                texts = np.unique(np.concatenate((left[pairs], right[pairs])))
                low, high = self.offsets[texts], self.offsets[texts + 1]
                words, classes = self.words.spans(low, high), self.classes.spans(low, high)
                yield _Candidates(texts, words, classes, high - low, left[pairs], right[pairs], kinds[pairs])

    def passages(self) -> list[tuple[int, int, int, int]]:
        """The most frequent passages (`Found`)."""
        shuffle = Shuffle(self.parts, _PASSAGE)
        runs = ((k, self.frequent.part(k)) for k in range(len(self.rows) - 1))
        blocks = ((self._block(k), frequent) for k, frequent in runs if len(frequent))
        for rows, counts in self.workers.map(_passages, (self.constants, self.parts), blocks):
            shuffle.add(rows, counts)
        found: list[tuple[int, int, int, int]] = []
        if not shuffle.size:
            return found
        for top in self.workers.map(_top_passages, self.constants, map(shuffle.part, range(self.parts))):
            found.extend(top)
        return sorted(found, key=lambda passage: (-passage[3], *passage[:2]))[:TOP]

    def word_counts(self, near: list[tuple[int, int, float, int]]) -> dict[int, list[int]]:
        """For each text of `near` the number of texts with each of its words."""
        texts = np.unique(np.array([(a, b) for a, b, _, _ in near], np.int64).reshape(-1))
        if not len(texts):
            return {}
        low, high = self.offsets[texts], self.offsets[texts + 1]
        words = self.words.spans(low, high)
        wanted, places = np.unique(words, return_inverse=True)
        counts = np.zeros(len(wanted), np.int64)
        for there in self.workers.map(_word_counts, wanted, map(self._block, range(len(self.rows) - 1))):
            counts += there
        ends = np.cumsum(high - low)
        spans = zip(texts, ends, high - low, strict=True)
        return {int(text): counts[places[end - size : end]].tolist() for text, end, size in spans}


def _read_all(column: Column, spans: Sequence[tuple[int, int]]) -> Array:
    return np.concatenate([column.read(start, stop) for start, stop in spans])


def _slices(ends: Array, most: int) -> Iterator[slice]:
    """Slices of elements that end at `ends`, each of at most `most` if it has several elements."""
    start, before = 0, 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield slice(start, stop)
        start, before = stop, int(ends[stop - 1])


def _blocks(texts: Iterator[str], most: int) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for text in texts:
        size += len(text) + 1
        if size > most and block:
            yield block
            block, size = [], len(text) + 1
        block.append(text)
    if block:
        yield block


def _distinct(keys: Array, with_words: Array) -> tuple[Array, Array]:
    """For each row the number of its text (-1 if it has no words), and for each different text its first row.

    Args:
        keys: of the rows with words.
    """
    names = loops.name_rows(keys, 2)
    is_first = names == np.arange(len(names))
    number = np.full(len(with_words), -1, np.int32)
    number[with_words] = (np.cumsum(is_first, dtype=np.int32) - np.int32(1))[names]
    return number, np.flatnonzero(with_words)[is_first]


class _Numbered(NamedTuple):
    """The words of a block of rows."""

    tokens: Array
    """Indices in the vocabulary, int32."""
    vocabulary: Array
    """BLAKE2b digests of the words, (n, 2) uint64."""
    lengths: Array
    """Words of each row, int32."""
    keys: Array
    """Key of each row, (n, 2) uint64."""


class _Tokenized(NamedTuple):
    """The different texts of a block: words low[t]:high[t] of `tokens`, which are indices of `ids`."""

    tokens: Array
    low: Array
    high: Array
    ids: Array
    base: int
    """Number of the first text."""


class _Block(NamedTuple):
    """The different texts of a block: words[offsets[t]:offsets[t + 1]]."""

    words: Array
    offsets: Array
    base: int
    """Number of the first text."""
    sides: Array


class _Candidates(NamedTuple):
    """Pairs, and the texts in them."""

    texts: Array
    """Their numbers, ascending."""
    words: Array
    classes: Array
    lengths: Array
    left: Array
    right: Array
    kinds: Array


_PASSAGE = 8
"""A passage in a shuffle: its key (4 numbers), first text, position and length in words, texts of the block."""


def _tokenize(_: None, block: list[str]) -> _Numbered:
    data, starts, lengths, offsets = split([encode(text) for text in block])
    names = name_spans(data, starts, lengths)
    firsts = np.flatnonzero(names == np.arange(len(names)))
    place = np.empty(len(names), np.int32)
    place[firsts] = np.arange(len(firsts), dtype=np.int32)
    tokens, view = place[names], data.data
    digests = bytearray().join(
        hashlib.blake2b(view[start : start + length], digest_size=16).digest()
        for start, length in zip(starts[firsts].tolist(), lengths[firsts].tolist(), strict=True)
    )
    vocabulary = np.frombuffer(digests, "<u8").reshape(-1, 2)
    lengths = np.diff(offsets).astype(np.int32)
    return _Numbered(tokens, vocabulary, lengths, loops.span_keys(vocabulary, tokens, offsets[:-1], lengths))


def _number_words(_: None, keys: Array) -> tuple[Array, int]:
    """The words of a partition, numbered from 0; and how many there are."""
    names = loops.name_rows(keys, 2)
    is_first = names == np.arange(len(names))
    return (np.cumsum(is_first, dtype=np.int32) - np.int32(1))[names], int(is_first.sum())


def _shingles(shared: tuple[Constants, int], block: _Tokenized) -> tuple[Array, Array, Array, Array]:
    """Words and lengths of the different texts; and their shingles, by partition."""
    constants, parts = shared
    words, lengths = block.ids[loops.take(block.tokens, block.low, block.high)], block.high - block.low
    rows, _ = loops.shingle_rows(words, _offsets(lengths), block.base, constants.shingle)
    order, counts = loops.divide(rows, constants.shingle, parts)
    return words, lengths.astype(np.int32), rows[order], counts


def _offsets(lengths: Array) -> Array:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))


def _classify(constants: Constants, rows: Array) -> Array:
    """Class of each shingle of a partition."""
    names = loops.name_rows(rows, constants.shingle)
    counts = frequency(names, np.ascontiguousarray(rows[:, constants.shingle]), len(names))[names]
    classes = np.where(counts > 1, loops.SHARED, loops.UNIQUE)
    return np.where(counts > constants.rare, loops.BOILERPLATE, classes).astype(np.uint8)


def _keys(shared: tuple[Constants, int], item: tuple[_Block, Array]) -> tuple[Array, list[tuple[Array, Array]]]:
    """Classes of a block's shingles by position; and by partition its runs, short shingles, and shortened texts."""
    (constants, parts), (block, answers) = shared, item
    words, offsets, base, sides = block
    run, shingle, short, edited, _, _ = constants
    rows, starts = loops.shingle_rows(words, offsets, base, shingle)
    classes = np.zeros(len(words), np.uint8)
    classes[starts[loops.divide(rows, shingle, parts)[0]]] = answers
    keys = []
    for rows, columns in (
        (loops.run_rows(words, offsets, classes, base, sides, run, shingle), run),
        (loops.short_rows(words, offsets, classes, base, sides, shingle, run, short), shingle),
        (loops.rest_rows(words, offsets, base, sides, run, edited), edited - 1),
    ):
        order, counts = loops.divide(rows, columns, parts)
        keys.append((rows[order], counts))
    return classes, keys


def _candidates(shared: tuple[Constants, bool], item: tuple[Array, int, int]) -> tuple[Array, Array]:
    """Codes of the pairs of a partition; and if it is one of runs, the (text, position) of those in too many texts."""
    (constants, within), (rows, columns, kind) = shared, item
    codes, counts = loops.pair_codes(rows, columns, within, constants.rare, kind)
    if kind:
        return codes, np.empty((0, 2), np.int32)
    return codes, np.ascontiguousarray(rows[counts > constants.rare][:, [columns, columns + 2]])


def _judge(constants: Constants, item: _Candidates) -> tuple[Array, Array, Array, Array, Array]:
    """Near-copies of a set of pairs: left, right, similarity, rule; and the scores of all."""
    left, right = np.searchsorted(item.texts, item.left), np.searchsorted(item.texts, item.right)
    rules, similarities, scores = loops.judge_pairs(
        item.words, item.classes, _offsets(item.lengths), left, right, item.kinds, constants.shingle, constants.gates
    )
    near = rules > 0
    return item.left[near], item.right[near], similarities[near], rules[near], scores


def _passages(shared: tuple[Constants, int], item: tuple[_Block, Array]) -> tuple[Array, Array]:
    """The different passages of a block, by partition (`_PASSAGE`)."""
    (constants, parts), (block, frequent) = shared, item
    frequent = frequent[np.lexsort((frequent[:, 1], frequent[:, 0]))]
    texts = frequent[:, 0] - np.int32(block.base)
    starts = (block.offsets[texts] + frequent[:, 1]).astype(np.int32)
    starts, lengths, texts = passages(starts, texts, np.ones(len(starts), np.bool_), constants.run)
    keys = loops.span_keys(loops.digests(block.words), np.arange(len(block.words), dtype=np.int32), starts, lengths)
    names = loops.name_rows(keys, 2)
    counts = frequency(names, texts, len(names))
    firsts = np.flatnonzero(names == np.arange(len(names)))
    places = (starts - block.offsets[texts]).astype(np.int32)
    columns = (*keys.view(np.int32).T, texts + np.int32(block.base), places, lengths, counts)
    rows = np.column_stack([column[firsts] for column in columns])
    order, sizes = loops.divide(rows, 4, parts)
    return rows[order], sizes


def _top_passages(constants: Constants, rows: Array) -> list[tuple[int, int, int, int]]:
    """The most frequent passages of a partition, in more than `RARE` texts (`Found`)."""
    names = loops.name_rows(rows, 4)
    counts = np.zeros(len(names), np.int64)
    np.add.at(counts, names, rows[:, 7])
    top = [k for k in np.argsort(-counts, kind="stable")[:TOP] if counts[k] > constants.rare]
    return [(int(rows[k, 4]), int(rows[k, 5]), int(rows[k, 6]), int(counts[k])) for k in top]


def _word_counts(wanted: Array, block: _Block) -> Array:
    return loops.word_counts(block.words, block.offsets, wanted)
