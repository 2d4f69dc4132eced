"""Number of copies of each train row: balances categories, and mixes in general data up to its share of the tokens."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section

Balance = Literal["none", "category", "sqrt"]


class Replay(Section):
    """General data mixed into train against forgetting."""

    sources: list[str] = Field(min_length=1)
    """Entries of `raw_examples.sources` that contain general data: files, or folders of files."""
    share: float = Field(gt=0, lt=1)
    """Share of the training tokens that these rows make up. Rows are left out or repeated to reach it."""


class Row(NamedTuple):
    """What decides how often a train record is used."""

    example_id: str
    source: str
    category: str | None
    tokens: int
    """Of its examples; 0 for a record that was dropped."""


def mix(rows: Iterable[Row], how: Balance, replay: Replay | None, seed: int) -> tuple[list[int], dict[str, Any]]:
    """Determine the copies of each train record. Rows of replayed sources are not balanced.

    Returns:
        Copies of each record, 0 for those that are dropped or that replay leaves out; and facts for the report.
    Raises:
        InputError: replay lists a source without rows, or all sources.
    """
    if how == "none" and not replay:
        return [int(row.tokens > 0) for row in rows], {}
    rows = list(rows)
    copies = [int(row.tokens > 0) for row in rows]
    kept = [i for i, row in enumerate(rows) if row.tokens]
    own = [i for i in kept if not (replay and _is_in(rows[i].source, replay.sources))]
    counts = balance([rows[i].category for i in own], [rows[i].example_id for i in own], how, seed)
    for i, n in zip(own, counts, strict=True):
        copies[i] = n
    share = {}
    if replay:
        _refuse_empty({rows[i].source for i in kept}, replay.sources, bool(own))
        general = [i for i in kept if _is_in(rows[i].source, replay.sources)]
        tokens = sum(copies[i] * rows[i].tokens for i in own)
        target = tokens * replay.share / (1 - replay.share)
        counts = resample([rows[i].tokens for i in general], [rows[i].example_id for i in general], target, seed)
        for i, n in zip(general, counts, strict=True):
            copies[i] = n
        replayed = sum(copies[i] * rows[i].tokens for i in general)
        share = {"replay_share": round(replayed / (replayed + tokens), 4)}
    more = [(rows[i], copies[i] - 1) for i in kept if copies[i] > 1]
    repeats = {
        "category": _counts([(str(row.category or "(none)"), n) for row, n in more]),
        "source": _counts([(str(row.source or "(none)"), n) for row, n in more]),
    }
    return copies, {"repeats": repeats, **share}


def _is_in(source: str, named: Sequence[str]) -> bool:
    return any(source == name or source.startswith(name.rstrip("/") + "/") for name in named)


def _refuse_empty(sources: Collection[str], named: Sequence[str], others: bool) -> None:
    where = "params.yaml: tokenized.replay.sources"
    for name in named:
        if not any(_is_in(source, [name]) for source in sources):
            known = ", ".join(sorted(sources)) or "none"
            raise InputError(f"{where}: no train row comes from {name}", f"sources of train: {known}")
    if not others:
        hint = "list only the general data, which is mixed into the rest"
        raise InputError(f"{where}: all of train comes from them", hint)


def draw_number(name: str, seed: int) -> bytes:
    """The random number by which `draw_order` sorts an id."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def draw_order(ids: Sequence[str], seed: int) -> list[int]:
    """Indices in a random order that depends only on the seed and the ids, not on the order of the rows."""
    import numpy as np

    numbers = np.frombuffer(b"".join(draw_number(name, seed) for name in ids), "S32")
    order: list[int] = np.argsort(numbers, kind="stable").tolist()
    return order


def balance(categories: Sequence[str | None], ids: Sequence[str], how: Balance, seed: int) -> list[int]:
    """Copies of each row, at least one. Rows without a category form a category.

    With n rows in a category and m in the largest, it gets m copies in all by `category`, and sqrt(n m) by `sqrt`:
    halfway between, on a logarithmic scale (temperature 2; Arivazhagan et al. 2019, section 4). Copies are distributed
    evenly, the remainder by seed.

        bug 4 rows, login 1  ->  by category 4 and 4 copies, by sqrt 4 and 2
    """
    if how == "none":
        return [1] * len(ids)
    sizes = Counter(categories)
    largest = max(sizes.values(), default=0)
    targets = {name: largest if how == "category" else math.isqrt(n * largest) for name, n in sizes.items()}
    copies = [targets[name] // sizes[name] for name in categories]
    remainder = {name: targets[name] % n for name, n in sizes.items()}
    for i in draw_order(ids, seed):
        if remainder[categories[i]]:
            remainder[categories[i]] -= 1
            copies[i] += 1
    return copies


def resample(tokens: Sequence[int], ids: Sequence[str], target: float, seed: int) -> list[int]:
    """Copies of each row, possibly 0, whose tokens are as close to `target` as whole rows allow.

    Rows are taken in turn, in an order given by the seed, so copies differ by at most one.
    """
    passes, rest = divmod(target, sum(tokens))
    copies = [int(passes)] * len(tokens)
    taken = 0
    for i in draw_order(ids, seed):
        if taken + tokens[i] / 2 > rest:
            break
        copies[i] += 1
        taken += tokens[i]
    return copies


def _counts(extra: Sequence[tuple[str, int]]) -> dict[str, int]:
    """(name, n) summed by name, names in order, zeros left out."""
    sums: defaultdict[str, int] = defaultdict(int)
    for name, n in extra:
        sums[name] += n
    return {name: sums[name] for name in sorted(sums) if sums[name]}
