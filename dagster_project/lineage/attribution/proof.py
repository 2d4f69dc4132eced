"""A test of an attribution.

The loss weights of some records are set to zero where they are, so that a training differs from the original in nothing
else.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean, stdev

from dagster_project.core.errors import InputError
from dagster_project.core.records import read_arrow
from dagster_project.core.text import many

PROOFS = Path(".dvc", "tmp", "pedigree", "proofs")
"""Folder of adapters that were trained without some records, and of the altered
data. A cache: it can be deleted at any time."""
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip
"""Quantile 0.975 of Student's t distribution with 1, 2, ... degrees of freedom."""
LEAST_DRAWS, MOST_DRAWS = 2, len(T_975) + 1
TRIES = 10_000
"""Random sets of all records that are drawn in search of some without those in
`top`; then as many of the other records."""
TRAIN = "train.parquet"


def zero_weights(tokenized: Path, out: Path, names: Collection[str]) -> None:
    """Copy tokenized data, with a loss weight of 0 for all tokens of some records of the training split.

    Order, packing, tokens and labels stay.

    The loss of a step is the mean over its tokens by weight, so its other
    examples share the weight that these had.

    Raises:
        InputError: a packed row would have no weight left, so that its loss would not be defined.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(tokenized, out)
    table = read_arrow(tokenized / TRAIN)
    rows, left_out = table.select(["example_ids", "lengths", "weights"]).to_pylist(), {*names}
    altered = [_without(row["example_ids"], row["lengths"], row["weights"], left_out) for row in rows]
    position, kind = table.schema.get_field_index("weights"), table.schema.field("weights")
    pq.write_table(
        table.set_column(position, kind, pa.array(altered, kind.type)),
        out / TRAIN,
        compression="zstd",
        store_schema=True,
    )


def _without(names: Sequence[str], lengths: Sequence[int], weights: list[float], left_out: set[str]) -> list[float]:
    """Weights of a packed row."""
    found = list(weights)
    for name, (start, stop) in zip(names, pairwise(accumulate(lengths, initial=0)), strict=True):
        if name in left_out:
            found[start:stop] = [0.0] * (stop - start)
    if any(weights) and not any(found):
        raise InputError(
            "a packed row of the training consists only of records that are left out, so its loss would be undefined",
            "leave out fewer records with --top",
        )
    return found


def fits(tokenized: Path, names: Collection[str]) -> bool:
    """Whether every packed row keeps a weight without some records."""
    return _keep_some(_rows(tokenized), {*names})


def _rows(tokenized: Path) -> list[list[str]]:
    """Ids of the records of each packed row."""
    rows: list[list[str]] = read_arrow(tokenized / TRAIN, ["example_ids"])["example_ids"].to_pylist()
    return rows


def _keep_some(rows: Sequence[Sequence[str]], left_out: set[str]) -> bool:
    return not any(left_out.issuperset(row) for row in rows)


def draws(names: Sequence[str], top: Collection[str], seed: str, tokenized: Path) -> Iterator[list[str]]:
    """Different sets of as many random records as `top`, none of which is in it.

    The same seed gives the same sets, but for those that are skipped.

    A set that came before would make the spread of the changes too small, and so the interval too narrow.

    Args:
        names: all records of the training.
        seed: identity of the training, so that questions about one model share their sets.
    Raises:
        InputError: there are too few records for such sets.
    """
    pool, taken, earlier = sorted(names), {*top}, set[str]()
    if len(pool) < 2 * len(taken):
        raise InputError(
            f"--top {len(taken)}: the training has {many(len(pool), 'record')}, too few for as many random ones",
            "leave out fewer records with --top",
        )
    others, rows = [name for name in pool if name not in taken], _rows(tokenized)
    for number in range(2 * TRIES):
        # hardly any set of a seventh of all records is without those in `top`
        among = pool if number < TRIES else others
        found = sorted(random.Random(f"{seed}:{len(taken)}:{number}").sample(among, len(taken)))
        if taken.isdisjoint(found) and name_of(found) not in earlier and _keep_some(rows, {*found}):
            earlier.add(name_of(found))
            yield found
    raise InputError(
        f"--top {len(taken)}: too few other records for more random sets",
        "leave out fewer records with --top, or take fewer sets with --draws",
    )


def name_of(names: Collection[str]) -> str:
    """Identity of a set of records that are left out."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Verdict:
    """How much less likely the asked tokens became without the first records, and without random ones, in nats."""

    change: float
    of_draws: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.of_draws)

    @property
    def half_width(self) -> float:
        """Of the 95 % prediction interval of one more random set: t s sqrt(1 +
        1/n), from normally distributed changes."""
        n = len(self.of_draws)
        return T_975[n - 2] * stdev(self.of_draws) * (1 + 1 / n) ** 0.5

    @property
    def interval(self) -> tuple[float, float]:
        """Of the difference between the change without the first records and that of a random set."""
        difference = self.change - self.mean
        return difference - self.half_width, difference + self.half_width

    @property
    def supported(self) -> bool:
        """Whether the asked tokens became less likely than a random set of records would explain."""
        return self.interval[0] > 0
