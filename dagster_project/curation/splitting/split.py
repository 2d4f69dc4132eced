"""Deal rows out to train, validation and test. What belongs together is never divided, and the finished splits are proven apart."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.core.records import uncollected
from dagster_project.curation.similarity.overlap import near_pairs

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
OPEN, DROPPED = "", "dropped"


# --- who belongs together


@dataclass(frozen=True)
class Copies:
    """The near-copies in a set, found by one search over all of it."""

    number: Mapping[str, int]
    """Each different text -> its number."""
    left: array[int]
    right: array[int]
    """The numbers of each pair of near-copies. Plain arrays: templated sets have millions."""

    def links(self, texts: Sequence[str], groups: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Pairs of different groups that hold near-copies of each other.

        `instructions` grouped rows among some that it then dropped. A run of words that was boilerplate there can be rare here, and so link
        two rows that have different groups.
        """
        group_of: dict[int, str] = {}
        for text, group in zip(texts, groups, strict=True):
            if text in self.number and (first := group_of.setdefault(self.number[text], group)) != group:
                yield first, group
        for a, b in zip(self.left, self.right, strict=True):
            if group_of[a] != group_of[b]:
                yield group_of[a], group_of[b]


@uncollected
def find_copies(texts: Iterable[str]) -> Copies:
    """Texts without any character but white space are compared with nothing."""
    number = {text: i for i, text in enumerate(dict.fromkeys(text for text in texts if text.strip()))}
    left, right = array("i"), array("i")
    for pair in near_pairs(list(number)):
        left.append(pair.left)
        right.append(pair.right)
    return Copies(number, left, right)


def joined(links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Name -> the smallest of the names that it is linked to, directly or through others. Names without a link are left out."""
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


def units(groups: Sequence[str], keys: Sequence[str | None]) -> list[str]:
    """What each row may not be divided from: all rows that share its group or its key, directly or through others. Named by the smallest group.

    groups a b b c, keys 1 1 None 2  ->  a a a c
    """
    first: dict[str, str] = {}
    link = joined((first.setdefault(key, group), group) for group, key in zip(groups, keys, strict=True) if key is not None)
    return [link.get(group, group) for group in groups]


# --- who goes where


@dataclass(frozen=True)
class Deal:
    """Which row goes where."""

    splits: list[str]
    """For each row its split, or `DROPPED`."""
    labelled: set[int]
    """Rows that stand where the label of the upstream split put them, or a labelled row that they belong to."""
    because: dict[int, int]
    """Dropped row -> the row of a more strictly held-out split that it belongs to."""
    largest: int
    """Rows of the largest thing that was not divided."""


@uncollected
def deal(
    groups: Sequence[str],
    keys: Sequence[str | None],
    labels: Sequence[str | None],
    strata: Sequence[str],
    shares: Mapping[str, float],
    seed: int,
) -> Deal:
    """The split of each row.

    A label of an upstream split is kept, and rows without one are dealt out by share. A wanted split that no label names is dealt out of the
    rows without a label and, by the same share, of those labelled train: an upstream split into train and test has no validation rows.

    Args:
        groups: near-copies have the same. Never divided.
        keys: what else must not be divided, or None.
        labels: the row's split in an upstream data set, or None.
        strata: what each row is stratified by.
        shares: split -> share of each stratum's rows; the rest is train.
        seed: another seed gives another deal. The order of rows does not matter.
    """
    fate, because = settle(groups, keys, labels)
    labelled = {i for i, name in enumerate(fate) if name in SPLITS}
    named, largest = set(fate), 0
    unnamed = {name: share for name, share in shares.items() if name not in named and share}
    splits = list(fate)
    for pool, wanted in ((OPEN, shares), (TRAIN, unnamed)):
        rows = [i for i, name in enumerate(fate) if name == pool] if wanted and pool in named else []
        names = units([groups[i] for i in rows], [keys[i] for i in rows])
        largest = max([largest, *Counter(names).values()])
        coarse = any(keys[i] is not None for i in rows)
        for i, name in zip(rows, assign(names, [strata[i] for i in rows], wanted, seed, top_up=coarse), strict=True):
            splits[i] = name
            if name != pool:
                labelled.discard(i)
    return Deal(splits, labelled, because, largest)


def settle(groups: Sequence[str], keys: Sequence[str | None], labels: Sequence[str | None]) -> tuple[list[str], dict[int, int]]:
    """Keep the labels of an upstream split where they keep rows apart.

    Test is settled first, then validation, then train. Rows without a label that belong to a labelled row (by group or key, directly or through
    others) follow it. Rows with another label that do are leakage in the upstream split and dropped: what was held out stays held out, and
    nothing moves from train into what is held out. A dropped row links nothing.

    Returns:
        For each row its split, `DROPPED`, or `OPEN` where no label decides; and for each dropped row one it belongs to.
    """
    fate = [OPEN] * len(labels)
    because: dict[int, int] = {}
    if not any(labels):
        return fate, because
    columns = (groups, keys)
    rows_of: tuple[dict[str | None, list[int]], ...] = (defaultdict(list), defaultdict(list))
    for held, column in zip(rows_of, columns, strict=True):
        for i, name in enumerate(column):
            if name is not None:
                held[name].append(i)
    for label in (TEST, VALIDATION, TRAIN):
        queue = [i for i, mine in enumerate(labels) if mine == label and fate[i] == OPEN]
        for i in queue:
            fate[i] = label
        for i in queue:  # grows
            for held, column in zip(rows_of, columns, strict=True):
                for j in held.pop(column[i], ()):
                    if fate[j] != OPEN:
                        continue
                    if labels[j] is None:
                        fate[j] = label
                        queue.append(j)
                    else:
                        fate[j] = DROPPED
                        because[j] = i
    return fate, because


def assign(units: Sequence[str], strata: Sequence[str], shares: Mapping[str, float], seed: int, top_up: bool = False) -> list[str]:
    """The split of each row, by share.

    Args:
        units: what each row belongs to; rows of one unit get one split.
        strata: what each row is stratified by. A unit counts to the most frequent one of its rows.
        shares: split -> share of each stratum's rows; the rest is train.
        seed: another seed gives another deal. The order of rows does not matter, and a new row moves few others.
        top_up: for units so large that strata cannot be divided well: what is missing of a share is taken from anywhere, and a split that no
            unit is small enough for gets the one nearest in size.
    """
    size = Counter(units)
    most: dict[str, tuple[int, str]] = {}
    for (unit, stratum), rows in Counter(zip(units, strata, strict=True)).items():
        if unit not in most or (-rows, stratum) < most[unit]:
            most[unit] = (-rows, stratum)
    waiting = sorted(size, key=lambda unit: hashlib.sha256(f"{seed}:{unit}".encode()).digest())
    members: dict[str, list[str]] = defaultdict(list)
    for unit in waiting:
        members[most[unit][1]].append(unit)
    split_of = dict.fromkeys(waiting, TRAIN)

    def fill(name: str, candidates: Sequence[str], room: int) -> None:
        for unit in candidates:
            if size[unit] <= room and split_of[unit] == TRAIN:
                split_of[unit] = name
                room -= size[unit]

    for ids in members.values():
        rows = sum(size[unit] for unit in ids)
        for name, share in shares.items():
            fill(name, ids, round(rows * share))
    for name, share in shares.items() if top_up else ():
        wanted, got = round(len(units) * share), sum(size[unit] for unit in waiting if split_of[unit] == name)
        fill(name, waiting, wanted - got)
        left = [unit for unit in waiting if split_of[unit] == TRAIN]
        if wanted and name not in split_of.values() and len(left) > 1:
            split_of[min(left, key=lambda unit: abs(size[unit] - wanted))] = name
    return [split_of[unit] for unit in units]


# --- the proof


@dataclass(frozen=True)
class Leak:
    """Two rows of different splits that belong together."""

    place: str
    """The row of the split that is held out more strictly, as "split/example_id"."""
    other: str
    why: str
    text: str
    """What the row asks."""


@dataclass(frozen=True)
class Proof:
    """What reading the finished splits back found."""

    rows: dict[str, int]
    """Split -> rows in its shards, added ones included."""
    leaks: list[Leak]
    """At most `LEAKS` of each kind."""
    leaking: int
    """Rows in any leak."""
    strangers: list[str]
    """Places of rows of validation and test that the set dealt out does not hold."""


LEAKS = 20
WHYS = {"copy": "near-copies", "group": "the same group", "id": "the same example"}


@uncollected
def prove(folder: Path, copies: Copies, known: set[str], elsewhere: Path | None = None) -> Proof:
    """Read the shards of train, validation and test back and look for rows that stand in, or nearly in, two of them.

    Near-copies are those of the one search over the whole set (`find_copies`), dropped rows included, whatever `group_id` says. A search of
    test against train would count in how many texts a run stands over other texts, and so call other runs boilerplate: it would prove a
    slightly different claim than the one the deal was made by. That search is valid for the shards because every text in them is looked up in
    it by content; texts that it did not see, which only rows added to train may have, are searched against the held-out ones here.

    Args:
        folder: what `write_records` wrote, one folder per split.
        copies: of all rows that were dealt out.
        known: the example_id of each of them.
        elsewhere: a folder of records that count as rows of test, whose texts the search saw as well.
    Raises:
        AssertionError: a held-out row says something that was in no row dealt out.
    """
    import numpy as np

    splits, numbers = array("B"), array("i")
    ids: list[str] = []
    groups: list[str] = []
    strangers: list[str] = []
    added: dict[str, int] = {}  # text that the search did not see -> first row of train that has it
    for code, name in enumerate(SPLITS):
        shards = sorted((folder / name).glob("records-*.parquet"))
        for shard in [*shards, *(sorted(elsewhere.glob("records-*.parquet")) if elsewhere and name == TEST else ())]:
            for identity, group, text in _read(shard):
                number = copies.number.get(text, -1)
                if identity not in known and name != TRAIN:
                    strangers.append(f"{name}/{identity}")
                elif number < 0 and text.strip():
                    if identity in known:
                        raise AssertionError(f"{name}/{identity}: the shard holds a text that no row dealt out has")
                    added.setdefault(text, len(ids))
                splits.append(code)
                ids.append(identity)
                groups.append(group)
                numbers.append(number)
    code_of, number_of = np.array(splits, np.uint8), np.array(numbers, np.int32)
    stands_in = np.zeros(len(copies.number), np.uint8)  # one bit per split
    for code in range(len(SPLITS)):
        stands_in[number_of[(code_of == code) & (number_of >= 0)]] |= 1 << code

    def several(bits: Any) -> Any:
        return bits & (bits - 1) != 0

    left, right = np.array(copies.left, np.int32), np.array(copies.right, np.int32)
    crossing = several(stands_in[left] | stands_in[right]) & (stands_in[left] > 0) & (stands_in[right] > 0)
    same = np.flatnonzero(several(stands_in))
    sides = [(int(n), int(n)) for n in same] + [(int(a), int(b)) for a, b in zip(left[crossing], right[crossing], strict=True)]
    held_out = {text: n for text, n in copies.number.items() if stands_in[n] > 1} if added else {}
    texts, against = list(added), list(held_out)
    stray = [(added[texts[p.left]], held_out[against[p.right]]) for p in near_pairs(texts, against)] if added else []

    leaks: list[Leak] = []
    leaking: set[int] = set()
    said = list(copies.number)
    names = [SPLITS[code] for code in splits]

    def report(rows: Iterable[int], why: str, limit: int) -> None:
        """The first row of the strictest split, and the first of each other."""
        first: dict[int, int] = {}
        for i in rows:
            leaking.add(i)
            first.setdefault(splits[i], i)
        strictest, *others = sorted(first, reverse=True)
        for code in others if limit > 0 else ():
            a, b = first[strictest], first[code]
            text = said[numbers[a]] if numbers[a] >= 0 else ""
            leaks.append(Leak(f"{names[a]}/{ids[a]}", f"{names[b]}/{ids[b]}", WHYS[why], text))

    rows_of = _rows_of(numbers, {n for pair in sides for n in pair} | {n for _, n in stray})
    for k, (n, m) in enumerate(sides):
        report(rows_of[n] + rows_of[m], "copy", LEAKS - k)
    for k, (i, n) in enumerate(stray):
        report([i, *(j for j in rows_of[n] if splits[j])], "copy", LEAKS - k)
    for why, column in (("group", groups), ("id", ids)):
        split_up = straddling(column, names)
        holders = _rows_of(column, set(split_up))
        for k, value in enumerate(split_up):
            report(holders[value], why, LEAKS - k)
    counts = Counter(names)
    return Proof({name: counts[name] for name in SPLITS}, leaks, len(leaking), strangers)


def _read(shard: Path) -> Iterator[tuple[str, str, str]]:
    """example_id, group_id and `subject` of each row, column by column: building every message as a dict would take most of the proof's time.
    The subject of a pair is that of its prompt."""
    import pyarrow.parquet as pq

    column = "messages" if "messages" in pq.read_schema(shard).names else "prompt"
    table = pq.read_table(shard, columns=["example_id", "group_id", column]).combine_chunks()
    said = table[column].combine_chunks()
    turns = said.flatten()
    roles, contents = (turns.field(name).to_pylist() for name in ("role", "content"))
    lengths = said.value_lengths().to_pylist()
    end = 0
    for identity, group, length in zip(table["example_id"].to_pylist(), table["group_id"].to_pylist(), lengths, strict=True):
        start, end = end, end + length
        asked = "\n".join([contents[k] for k in range(start, end) if roles[k] == "user"])
        yield identity, group, asked or (contents[end - 1] if length and roles[end - 1] == "assistant" else "")


def _rows_of(column: Sequence[Any], values: set[Any]) -> dict[Any, list[int]]:
    found: dict[Any, list[int]] = {value: [] for value in values}
    for i, value in enumerate(column) if values else ():
        if value in found:
            found[value].append(i)
    return found


def straddling(groups: Sequence[str], splits: Sequence[str]) -> list[str]:
    """Groups that stand in more than one split, by pandera's account of the table (group, number of splits)."""
    import pandera.polars as pa
    import polars as pl

    if len(set(groups)) == len(groups):  # nothing stands twice
        return []
    frame = pl.DataFrame({"group": groups, "split": splits}).group_by("group").agg(pl.col("split").n_unique().cast(pl.Int64))
    schema = pa.DataFrameSchema(
        {"group": pa.Column(pl.String), "split": pa.Column(pl.Int64, pa.Check.eq(1, name="split_leakage"))}, strict=True
    )
    try:
        schema.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        return sorted(frame["group"][int(i)] for i in errors.failure_cases["index"])
    return []
