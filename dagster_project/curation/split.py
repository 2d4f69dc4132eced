"""Deal groups of near-duplicates out to train, validation and test, category by category."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

TRAIN = "train"


def assign(groups: Sequence[str], strata: Sequence[str], shares: Mapping[str, float], seed: int) -> list[str]:
    """The split of each row.

    Args:
        groups: group of each row; rows of one group get one split.
        strata: what each row is stratified by. A group counts to one of its rows' strata.
        shares: split -> share of each stratum's rows; the rest is "train".
        seed: another seed gives another deal. The order of rows does not matter, and a new row moves few others.
    """
    size = Counter(groups)
    stratum_of: dict[str, str] = {}
    for group, stratum in sorted(zip(groups, strata, strict=True)):
        stratum_of.setdefault(group, stratum)
    members: dict[str, list[str]] = defaultdict(list)
    for group, stratum in stratum_of.items():
        members[stratum].append(group)
    split_of: dict[str, str] = {}
    for ids in members.values():
        rows = sum(size[group] for group in ids)
        waiting = sorted(ids, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
        for name, share in shares.items():
            room = round(rows * share)
            for group in list(waiting):
                if room >= size[group]:
                    split_of[group] = name
                    room -= size[group]
                    waiting.remove(group)
        split_of.update(dict.fromkeys(waiting, TRAIN))
    return [split_of[group] for group in groups]


def straddling(groups: Sequence[str], splits: Sequence[str]) -> list[str]:
    """Groups that stand in more than one split, by pandera's account of the table (group, number of splits)."""
    import pandera.polars as pa
    import polars as pl

    if not groups:
        return []
    frame = pl.DataFrame({"group": groups, "split": splits}).group_by("group").agg(pl.col("split").n_unique().cast(pl.Int64)).sort("group")
    schema = pa.DataFrameSchema(
        {"group": pa.Column(pl.String), "split": pa.Column(pl.Int64, pa.Check.eq(1, name="split_leakage"))}, strict=True
    )
    try:
        schema.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        return [frame["group"][int(i)] for i in errors.failure_cases["index"]]
    return []
