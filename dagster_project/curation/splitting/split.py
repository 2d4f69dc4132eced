"""Assign rows to train, validation and test without dividing groups, and verify that finished splits do not overlap."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core import row_cache
from dagster_project.core.imports import import_pandera
from dagster_project.core.records import read_arrow, uncollected
from dagster_project.core.stored_rows import SelectedTexts
from dagster_project.core.strings import StringIndex, Strings, digests
from dagster_project.curation.similarity.overlap import near_pairs

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import pyarrow as pa

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
OPEN, DROPPED = "", "dropped"
ROUNDING = 2
"""Rows by which a split may differ from its share of all rows because shares of strata are rounded; of larger sets 1%.
"""


# --- groups


@dataclass(frozen=True)
class Copies:
    """The near-copies in a data set, from one search over all of it."""

    texts: Sequence[str]
    """All texts, which may be read when they are used."""
    index: StringIndex
    """Numbers of the different texts that are not empty."""
    left: np.ndarray
    right: np.ndarray
    """Numbers of each pair of near-copies, (pairs,) int32. Compact arrays, because templated sets have millions."""

    def text(self, number: int) -> str:
        return self.texts[int(self.index.first[number])]

    def links(self, groups: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield pairs of different groups that contain near-copies of each other.

        `instructions` formed the groups before it dropped rows. A run of words that was boilerplate there can be rare
        here.

        Args:
            groups: group of each text.
        """
        first = self.index.first
        for i, (number, group) in enumerate(zip(self.index.numbers, groups, strict=True)):
            if number >= 0 and first[number] != i and (other := groups[int(first[number])]) != group:
                yield other, group
        for a, b in zip(self.left, self.right, strict=True):
            if (one := groups[int(first[a])]) != (other := groups[int(first[b])]):
                yield one, other


@uncollected
def find_copies(texts: Sequence[str]) -> Copies:
    """Find near-copies among texts, which are read several times. Empty texts are ignored."""
    index = StringIndex(text if text.strip() else None for text in texts)
    different = SelectedTexts(texts, index.first.tolist())
    found = row_cache.fact_of_set("near_copies", different, partial(_near_copies, different))
    return Copies(texts, index, *(found[side][0].to_numpy() for side in ("left", "right")))


def _near_copies(texts: Sequence[str]) -> pl.DataFrame:
    """One row: the numbers of the texts of each pair of near-copies, in two lists."""
    import numpy as np
    import polars as pl

    left, right = array("i"), array("i")
    for pair in near_pairs(texts):
        left.append(pair.left)
        right.append(pair.right)
    sides = {"left": np.array(left, np.int32), "right": np.array(right, np.int32)}
    return pl.DataFrame(sides).select(pl.all().implode())


def joined(links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Name -> smallest name in its connected component. Names without a link are left out."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = parent[above]
            name = above
        return name

    for a, b in links:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {name: root(name) for name in list(parent)}


def units(groups: Sequence[str], keys: Sequence[str | None]) -> Sequence[str]:
    """The unit of each row: all rows connected by shared groups or keys, named by the smallest group.

    Units are not divided.

    groups a b b c, keys 1 1 None 2  ->  a a a c
    """
    first: dict[str, str] = {}
    keyed = ((key, group) for group, key in zip(groups, keys, strict=True) if key is not None)
    return renamed(groups, joined((first.setdefault(key, group), group) for key, group in keyed))


def renamed(groups: Sequence[str], link: Mapping[str, str]) -> Sequence[str]:
    """The groups by the names that `joined` gave them."""
    return Strings(link.get(group, group) for group in groups) if link else groups


# --- assignment


@dataclass(frozen=True)
class Assignment:
    """The split of each row."""

    splits: list[str]
    """Split of each row, or `DROPPED`."""
    labelled: set[int]
    """Rows whose split was determined by an upstream label, their own or that of a connected row."""
    because: dict[int, int]
    """Dropped row -> connected row in a more strictly held-out split."""
    largest: int
    """Number of rows of the largest unit."""


@uncollected
def assign_splits(
    groups: Sequence[str],
    keys: Sequence[str | None],
    labels: Sequence[str | None],
    strata: Sequence[str],
    shares: Mapping[str, float],
    seed: int,
) -> Assignment:
    """Assign each row to a split.

    Upstream labels are kept; rows without one are assigned by share. A requested split that no row has by `keep_labels`
    is taken from rows without a label and, by the same share, from those labeled train (an upstream split into train
    and test has no validation rows; those of another one may all be dropped).

    Args:
        groups: group of each row; near-copies share one. Never divided.
        keys: further key that is not divided, or None.
        labels: upstream split of each row, or None.
        strata: stratum of each row.
        shares: split -> share of each stratum's rows; the rest is train.
        seed: determines the assignment. The order of rows does not matter.
    """
    import numpy as np

    by_label, because = keep_labels(groups, keys, labels)
    named, largest = set(by_label), 0
    unnamed = {name: share for name, share in shares.items() if name not in named and share}
    splits, labelled = list(by_label), set[int]()
    # units that are larger than the share of every stratum would leave a split without rows
    for top_up in (False, True):
        splits, labelled = list(by_label), {i for i, name in enumerate(by_label) if name in SPLITS}
        for pool, pool_shares in ((OPEN, shares), (TRAIN, unnamed)):
            is_divided = pool_shares and pool in named
            rows = array("q", (i for i, name in enumerate(by_label) if name == pool) if is_divided else ())
            names = units(Strings(groups[i] for i in rows), [keys[i] for i in rows])
            largest = max(largest, int(np.bincount(StringIndex(names).numbers).max(initial=0)))
            coarse = top_up or any(keys[i] is not None for i in rows)
            assigned = assign(names, [strata[i] for i in rows], pool_shares, seed, top_up=coarse)
            for i, name in zip(rows, assigned, strict=True):
                splits[i] = name
                if name != pool:
                    labelled.discard(i)
        if {name for name, share in shares.items() if share} <= {*splits}:
            break
    return Assignment(splits, labelled, because, largest)


def keep_labels(
    groups: Sequence[str], keys: Sequence[str | None], labels: Sequence[str | None]
) -> tuple[list[str], dict[int, int]]:
    """Keep upstream labels, and drop rows that leak between upstream splits.

    Test is processed first, then validation, then train. Rows connected to a labeled row (by group or key) get its
    split if they have no label, and are dropped if they have another one. So held-out rows stay held out. A dropped row
    connects no others.

    Returns:
        Split of each row, `DROPPED`, or `OPEN` if no label applies; and for each dropped row a row it is connected to.
    """
    by_label = [OPEN] * len(labels)
    because: dict[int, int] = {}
    if not any(labels):
        return by_label, because
    neighbors = (_Neighbors(groups), _Neighbors(keys))
    for label in (TEST, VALIDATION, TRAIN):
        queue = array("q", (i for i, own in enumerate(labels) if own == label and by_label[i] == OPEN))
        for i in queue:
            by_label[i] = label
        for i in queue:  # the queue grows during iteration
            for column in neighbors:
                for j in column.pop(i):
                    if by_label[j] != OPEN:
                        continue
                    if labels[j] is None:
                        by_label[j] = label
                        queue.append(j)
                    else:
                        by_label[j] = DROPPED
                        because[j] = i
    return by_label, because


class _Neighbors:
    """Rows with the same value."""

    def __init__(self, column: Sequence[str | None]) -> None:
        import numpy as np

        index = StringIndex(column)
        self._numbers = index.numbers
        self._rows = np.argsort(index.numbers, kind="stable")  # by value, in order; first those without one
        self._ends = np.cumsum(np.bincount(index.numbers + 1, minlength=len(index) + 1))
        self._returned = np.zeros(len(index), np.bool_)

    def pop(self, row: int) -> list[int]:
        """All rows with the value of a row, in order; none if it has no value or they were returned before."""
        number = int(self._numbers[row])
        if number < 0 or self._returned[number]:
            return []
        self._returned[number] = True
        return self._rows[self._ends[number] : self._ends[number + 1]].tolist()


def assign(
    units: Sequence[str], strata: Sequence[str], shares: Mapping[str, float], seed: int, top_up: bool = False
) -> list[str]:
    """The split of each row, by share.

    Args:
        units: unit of each row; rows of a unit get the same split.
        strata: stratum of each row. A unit belongs to the most frequent stratum of its rows.
        shares: split -> share of each stratum's rows, rounded, unless there are so many small strata that this would
            miss the share of all rows; the rest is train.
        seed: determines the assignment. The order of rows does not matter, and a new row changes few others.
        top_up: for units that are large compared with strata: a missing share is taken from any stratum, and an empty
            split gets the unit closest in size. Otherwise only more missing rows than `ROUNDING` are.
    """
    import numpy as np

    index = StringIndex(units)
    size = np.bincount(index.numbers, minlength=len(index))
    waiting = np.argsort(digests(f"{seed}:{units[i]}" for i in index.first.tolist()), kind="stable")
    stratum = _most_frequent(index, strata)[waiting]
    names, tolerance = [TRAIN, *shares], max(ROUNDING, len(units) // 100)
    split_of = np.zeros(len(index), np.uint8)

    def fill(code: int, candidates: np.ndarray, room: int) -> None:
        for unit, rows in zip(candidates.tolist(), size[candidates].tolist(), strict=True):
            if room <= 0:
                return
            if rows <= room and not split_of[unit]:
                split_of[unit] = code
                room -= rows

    by_stratum = waiting[np.argsort(stratum, kind="stable")]
    of_strata = np.split(by_stratum, np.cumsum(np.bincount(stratum))[:-1]) if len(index) else []
    for code, share in enumerate(shares.values(), 1):
        rows = [int(size[ids].sum()) for ids in of_strata]
        wanted, rooms = round(len(units) * share), [round(n * share) for n in rows]
        # Of many strata of two rows each gives round(0.4) = 0, of three rows round(0.6) = 1: then the rest of whole
        # rows is left to some of them
        small = abs(sum(rooms) - wanted) > tolerance or (wanted > 0 and not any(rooms))
        for ids, n, room in zip(of_strata, rows, rooms, strict=True):
            fill(code, ids, int(n * share) if small else room)
        if small:
            left = split_of[waiting] == 0
            first = np.sort(np.unique(stratum[left], return_index=True)[1])
            fill(code, waiting[left][first], wanted - int(size[split_of == code].sum()))
    for code, share in enumerate(shares.values(), 1):
        target, assigned = round(len(units) * share), int(size[split_of == code].sum())
        if top_up or target - assigned > tolerance:
            fill(code, waiting, target - assigned)
        left = waiting[split_of[waiting] == 0]
        if top_up and target and not (split_of == code).any() and len(left) > 1:
            split_of[left[np.argmin(abs(size[left] - target))]] = code
    return [names[code] for code in split_of[index.numbers]]


def _most_frequent(index: StringIndex, strata: Sequence[str]) -> np.ndarray:
    """The most frequent stratum of each unit, of several the first; strata are numbered by name, (units,) int64."""
    import numpy as np

    code = {name: k for k, name in enumerate(sorted(set(strata)))}
    codes = np.fromiter((code[name] for name in strata), np.int64, len(strata))
    pairs, counts = np.unique(index.numbers.astype(np.int64) * max(1, len(code)) + codes, return_counts=True)
    unit, stratum = np.divmod(pairs, max(1, len(code)))
    best = np.lexsort((stratum, -counts, unit))
    first = np.ones(len(best), np.bool_)
    first[1:] = unit[1:] != unit[:-1]  # sorted by unit before and after
    return stratum[best][first]


# --- verification


@dataclass(frozen=True)
class Leak:
    """Two connected rows in different splits."""

    place: str
    """The row of the split that is held out more strictly, as "split/example_id"."""
    other: str
    why: str


@dataclass(frozen=True)
class Verification:
    """Result of reading the finished splits back."""

    rows: dict[str, int]
    """Split -> rows in its shards, including added ones."""
    leaks: list[Leak]
    """At most `LEAKS` of each kind."""
    leaking: int
    """Rows in any leak."""
    unexpected: list[str]
    """Locations of rows in validation and test that are not in the assigned set."""


LEAKS = 20
WHYS = {"copy": "near-copies", "group": "the same group", "id": "the same example"}


@uncollected
def verify_splits(folder: Path, copies: Copies, known: StringIndex, elsewhere: Path | None = None) -> Verification:
    """Read the shards of all splits back and find copies and near-copies in different splits.

    Near-copies are those of `find_copies` over the whole set, because a new search would consider other runs
    boilerplate. Texts that it did not include, which only rows added to train have, are compared with the held-out
    texts here.

    Args:
        folder: output of `write_records`, one folder per split.
        copies: near-copies among all assigned rows.
        known: the example_ids of all assigned rows.
        elsewhere: folder of further test records, whose texts are in `copies`.
    Raises:
        AssertionError: a held-out row has a text that no assigned row has.
    """
    import numpy as np

    splits, numbers = array("B"), array("i")
    ids, groups = Strings(), Strings()
    unexpected: list[str] = []
    added: dict[str, int] = {}  # text that is not in `copies` -> first train row with it
    for code, name in enumerate(SPLITS):
        shards = sorted((folder / name).glob("records-*.parquet"))
        for shard in [*shards, *(sorted(elsewhere.glob("records-*.parquet")) if elsewhere and name == TEST else ())]:
            shard_ids, shard_groups, texts = _read(shard)
            found, is_known = copies.index.find(texts), known.find(shard_ids) >= 0
            for k in np.flatnonzero((found < 0) | ~is_known).tolist():
                if not is_known[k] and name != TRAIN:
                    unexpected.append(f"{name}/{shard_ids[k]}")
                elif found[k] < 0 and texts[k].strip():
                    if is_known[k]:
                        raise AssertionError(f"{name}/{shard_ids[k]}: the shard has a text that no assigned row has")
                    added.setdefault(texts[k], len(ids) + k)
            splits.extend([code] * len(shard_ids))
            ids.extend(shard_ids)
            groups.extend(shard_groups)
            numbers.extend(found.tolist())
    code_of, number_of = np.array(splits, np.uint8), np.array(numbers, np.int32)
    splits_of = np.zeros(len(copies.index), np.uint8)  # one bit per split
    for code in range(len(SPLITS)):
        splits_of[number_of[(code_of == code) & (number_of >= 0)]] |= 1 << code

    def several(bits: Any) -> Any:
        return bits & (bits - 1) != 0

    left, right = copies.left, copies.right
    crossing = several(splits_of[left] | splits_of[right]) & (splits_of[left] > 0) & (splits_of[right] > 0)
    sides = [(int(n), int(n)) for n in np.flatnonzero(several(splits_of))]
    sides += [(int(a), int(b)) for a, b in zip(left[crossing], right[crossing], strict=True)]
    held_out = np.flatnonzero(splits_of > 1)
    new = list(added)
    against = SelectedTexts(copies.texts, copies.index.first[held_out].tolist())
    added_copies = [(added[new[p.left]], int(held_out[p.right])) for p in near_pairs(new, against)] if added else []

    leaks: list[Leak] = []
    leaking: set[int] = set()
    names = [SPLITS[code] for code in splits]

    def report(rows: Iterable[int], why: str, limit: int) -> None:
        """Record the first row of the strictest split, and the first of each other split."""
        first: dict[int, int] = {}
        for i in rows:
            leaking.add(i)
            first.setdefault(splits[i], i)
        strictest, *others = sorted(first, reverse=True)
        for code in others if limit > 0 else ():
            a, b = first[strictest], first[code]
            leaks.append(Leak(f"{names[a]}/{ids[a]}", f"{names[b]}/{ids[b]}", WHYS[why]))

    rows_of = _rows_of(numbers, {n for pair in sides for n in pair} | {n for _, n in added_copies})
    for k, (n, m) in enumerate(sides):
        report(rows_of[n] + rows_of[m], "copy", LEAKS - k)
    for k, (i, n) in enumerate(added_copies):
        report([i, *(j for j in rows_of[n] if splits[j])], "copy", LEAKS - k)
    for why, column in (("group", groups), ("id", ids)):
        split_up = straddling(column, names)
        holders = _rows_of(column, set(split_up))
        for k, value in enumerate(split_up):
            report(holders[value], why, LEAKS - k)
    return Verification({name: names.count(name) for name in SPLITS}, leaks, len(leaking), unexpected)


def _read(shard: Path) -> tuple[list[str], list[str], list[str]]:
    """example_id, group_id and prompt text of each row."""
    import pyarrow.parquet as pq

    column = "messages" if "messages" in pq.read_schema(shard).names else "prompt"
    table = read_arrow(shard, ["example_id", "group_id", column])
    return table["example_id"].to_pylist(), table["group_id"].to_pylist(), subject_texts(table[column])


def subject_texts(column: pa.ChunkedArray) -> list[str]:
    """`records.subject_text` of each row of a column with messages.

    Read by column, because building a dict for every message would take most of the time.
    """
    messages = column.combine_chunks()
    turns = messages.flatten()
    roles, contents = (turns.field(name).to_pylist() for name in ("role", "content"))
    texts, end = [], 0
    for length in messages.value_lengths().to_pylist():
        start, end = end, end + length
        prompt = "\n".join([contents[k] for k in range(start, end) if roles[k] == "user"])
        texts.append(prompt or (contents[end - 1] if length and roles[end - 1] == "assistant" else ""))
    return texts


def _rows_of(column: Sequence[Any], values: set[Any]) -> dict[Any, list[int]]:
    found: dict[Any, list[int]] = {value: [] for value in values}
    for i, value in enumerate(column) if values else ():
        if value in found:
            found[value].append(i)
    return found


def straddling(groups: Sequence[str], splits: Sequence[str]) -> list[str]:
    """Groups with rows in more than one split, found by a pandera check of the table (group, number of splits)."""
    pa = import_pandera()
    import polars as pl

    column = pl.Series("group", groups.arrow() if isinstance(groups, Strings) else groups, pl.String)
    if column.n_unique() == len(column):  # no duplicates
        return []
    counted = pl.col("split").n_unique().cast(pl.Int64)
    frame = pl.DataFrame({"group": column, "split": splits}).group_by("group").agg(counted)
    is_one = pa.Column(pl.Int64, pa.Check.eq(1, name="split_leakage"))
    try:
        pa.DataFrameSchema({"group": pa.Column(pl.String), "split": is_one}, strict=True).validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        return sorted(frame["group"][int(i)] for i in errors.failure_cases["index"])
    return []
