"""How often each train row is learnt from: rare categories more often, general data as often as its share of the tokens wants."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section
from dagster_project.training.tokens.examples import Fate

Balance = Literal["none", "category", "sqrt"]


class Replay(Section):
    """General data mixed into train against forgetting."""

    sources: list[str] = Field(min_length=1)
    """Entries of `raw_examples.sources` that contain general data: files, or folders of files."""
    share: float = Field(gt=0, lt=1)
    """Share of the training tokens that these rows make up. Rows are left out or repeated to reach it."""


def mix(
    records: Sequence[dict[str, Any]], fates: list[Fate], how: Balance, replay: Replay | None, seed: int
) -> tuple[list[int], dict[str, Any]]:
    """Copies of each train record, and what the report says of them. A record that replay leaves out gets the fate dropped:replay.

    Rows of the replayed sources are not balanced: they are what they are, in the share that is asked for.

    Raises:
        InputError: replay names a source without rows, or all of them.
    """
    copies = [int(fate.kept) for fate in fates]
    kept = [i for i, fate in enumerate(fates) if fate.kept]
    general = [i for i in kept if replay and _of(records[i]["source"], replay.sources)]
    own = sorted(set(kept) - set(general))
    ids = [record["example_id"] for record in records]
    for i, n in zip(own, balance([records[i]["category"] for i in own], [ids[i] for i in own], how, seed), strict=True):
        copies[i] = n
    if replay:
        _refuse_empty([records[i]["source"] for i in kept], replay.sources, bool(own))
        tokens = sum(copies[i] * _tokens(fates[i]) for i in own)
        target = tokens * replay.share / (1 - replay.share)
        for i, n in zip(general, resample([_tokens(fates[i]) for i in general], [ids[i] for i in general], target, seed), strict=True):
            copies[i] = n
            if not n:
                fates[i] = Fate("dropped:replay", "replay has its share without it", [], fates[i].tokens, fates[i].trained, fates[i].stable)
    if how == "none" and not replay:
        return copies, {}
    more = [(i, copies[i] - 1) for i in kept if copies[i] > 1]
    report: dict[str, Any] = {
        "repeats": {name: _counts([(str(records[i][name] or "(none)"), n) for i, n in more]) for name in ("category", "source")}
    }
    if replay:
        replayed = sum(copies[i] * _tokens(fates[i]) for i in general)
        report["replay_share"] = round(replayed / (replayed + tokens), 4)
    return copies, report


def _tokens(fate: Fate) -> int:
    return sum(len(example.input_ids) for example in fate.examples)


def _of(source: str, named: Sequence[str]) -> bool:
    return any(source == name or source.startswith(name.rstrip("/") + "/") for name in named)


def _refuse_empty(sources: Sequence[str], named: Sequence[str], others: bool) -> None:
    where = "params.yaml: tokenized.replay.sources"
    for name in named:
        if not any(_of(source, [name]) for source in sources):
            raise InputError(f"{where}: no train row comes from {name}", f"sources of train: {', '.join(sorted(set(sources))) or 'none'}")
    if not others:
        raise InputError(f"{where}: all of train comes from them", "name only the general data, which is mixed into the rest")


def draw_order(ids: Sequence[str], seed: int) -> list[int]:
    """Indices in an order that depends on the seed and the ids alone, not on where a row stands."""
    return sorted(range(len(ids)), key=lambda i: (hashlib.sha256(f"{seed}:{ids[i]}".encode()).digest(), i))


def balance(categories: Sequence[str | None], ids: Sequence[str], how: Balance, seed: int) -> list[int]:
    """Copies of each row, at least one. Rows without a category are a category of their own.

    With n rows in a category and m in the largest, it gets m copies in all by `category`, and sqrt(n m) by `sqrt`: half way between, on a
    logarithmic scale (temperature 2; Arivazhagan et al. 2019, section 4). Copies are dealt out evenly, what is left over by seed.

        bug 4 rows, login 1  ->  by category 4 and 4 copies, by sqrt 4 and 2
    """
    if how == "none":
        return [1] * len(ids)
    sizes = Counter(categories)
    largest = max(sizes.values(), default=0)
    wanted = {name: largest if how == "category" else math.isqrt(n * largest) for name, n in sizes.items()}
    copies = [wanted[name] // sizes[name] for name in categories]
    over = {name: wanted[name] % n for name, n in sizes.items()}
    for i in draw_order(ids, seed):
        if over[categories[i]]:
            over[categories[i]] -= 1
            copies[i] += 1
    return copies


def resample(tokens: Sequence[int], ids: Sequence[str], target: float, seed: int) -> list[int]:
    """Copies of each row, none included, so that their tokens come as near to `target` as whole rows can, taken by turns in an order drawn by
    seed: no row is taken once more before all have been."""
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
    found: defaultdict[str, int] = defaultdict(int)
    for name, n in extra:
        found[name] += n
    return {name: found[name] for name in sorted(found) if found[name]}
