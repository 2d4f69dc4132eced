"""Answers of two systems to the same prompts, in pairs that do not tell which is whose; and what judgements of such pairs add up to."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from dagster_project.core.errors import InputError
from dagster_project.core.records import read_records, read_table

PROMPTED = ("zero_shot", "system_prompt", "chain_of_thought", "few_shot", "retrieved")
"""Baselines that are answers of the base model itself."""

Outcome = Literal["win", "tie", "loss"]
"""Of the first system over the second, on one pair."""
Choice = Literal["a", "b", "tie"]
"""What is said of a pair by who sees its answers as A and B."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    id: str
    """Says nothing of the example or the systems to who has not got the test split."""
    prompt: list[dict[str, str]]
    """Messages."""
    category: str | None
    answers: tuple[str, str]
    """Of the first system and of the second."""
    swapped: bool
    """Is A the second system's answer?"""

    @property
    def shown(self) -> tuple[str, str]:
        """A and B."""
        first, second = self.answers
        return (second, first) if self.swapped else (first, second)

    def outcome(self, choice: Choice) -> Outcome:
        if choice == "tie":
            return "tie"
        return "win" if (choice == "a") != self.swapped else "loss"


@dataclass(frozen=True)
class Match:
    """All that two systems said differently."""

    id: str
    """Hash of systems, seed and all answers: other answers make another match."""
    systems: tuple[str, str]
    seed: int
    pairs: list[Pair]
    """In random order; the first n are the draw of n."""
    identical: int
    """Pairs left out, since their answers are the same."""


def answers_of(project: Path) -> dict[str, dict[str, str]]:
    """System -> example_id -> what it wrote. Baselines first, then variants.

    Raises:
        InputError: nothing was answered yet.
    """
    files = [project / "data" / "baselines" / "results.parquet", *sorted((project / "data").glob("evaluation*/*/results.parquet"))]
    found: dict[str, dict[str, str]] = {}
    for row in (row for file in files if file.is_file() for row in read_table(file, ["system", "example_id", "answer"])):
        if row["answer"] is not None:
            found.setdefault(row["system"], {})[row["example_id"]] = row["answer"]
    if not found:
        raise InputError(
            "data/baselines, data/evaluation: no system has answered the test examples",
            "run `dvc repro comparison`; systems are asked to answer where evaluation.task in params.yaml says what a right answer is",
        )
    return found


def contenders(project: Path) -> tuple[str, str]:
    """The best variant, and the best the base model does with a prompt, by the measure that decides (`metrics.measures`).

    Raises:
        InputError: there is no such comparison.
    """
    board = project / "data" / "comparison" / "comparison.json"
    compared = json.loads(board.read_text(encoding="utf-8"))["compared"] if board.is_file() else {}
    gains = {
        name: {other: next(iter(against[other].values()))["difference"] for other in PROMPTED if other in against}
        for name, found in compared.items()
        if (against := found.get("to"))
    }
    if not any(gains.values()):
        raise InputError(
            "data/comparison/comparison.json: no variant is compared with a prompt to the base model",
            f"name two systems: {', '.join(answers_of(project))}",
        )
    best = max(gains, key=lambda name: max(gains[name].values(), default=-math.inf))
    return best, min(gains[best], key=lambda other: gains[best][other])


def match(project: Path, systems: tuple[str, str], seed: int) -> Match:
    """The pairs of two systems, none where they never wrote different answers to one prompt. The same seed and answers give the same ids, order and places.

    Raises:
        InputError: a system is unknown, or both are one.
    """
    known = answers_of(project)
    if unknown := [name for name in systems if name not in known]:
        raise InputError(f"no answers of {', '.join(map(repr, unknown))}", f"systems with answers: {', '.join(known)}")
    if systems[0] == systems[1]:
        raise InputError(f"both systems are {systems[0]!r}", f"name two of {', '.join(known)}")
    records = {record["example_id"]: record for record in read_records(project / "data" / "splits" / "test")}
    first, second = (known[name] for name in systems)
    both = sorted(first.keys() & second.keys() & records.keys())
    # example ids are hashes of prompt and reference together, so who has only the page cannot guess this one
    secret = _digest(systems, seed, [(i, first[i], second[i]) for i in both])
    draw = random.Random(secret)
    draw.shuffle(both)
    # each system is A in one of every two pairs, so in half of them however many are drawn
    places = [place for _ in both[::2] for place in draw.sample((False, True), 2)]
    pairs = [
        Pair(_digest(secret, i)[:12], records[i]["messages"][:-1], records[i]["category"], (first[i], second[i]), swapped)
        for i, swapped in zip((i for i in both if first[i].strip() != second[i].strip()), places, strict=False)
    ]
    return Match(_digest(secret)[:16], systems, seed, pairs, len(both) - len(pairs))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def majority(outcomes: Sequence[Outcome]) -> Outcome:
    """The most frequent outcome; a tie where two are equally frequent."""
    (first, most), *rest = Counter(outcomes).most_common()
    return "tie" if rest and rest[0][1] == most else first


def tally(pairs: Sequence[Pair], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Wins, ties and losses of the first system and its win rate, of all pairs and by category.

    Args:
        outcomes: by the pair's id; pairs without one do not count.
    """
    judged = [pair for pair in pairs if pair.id in outcomes]
    found = _rate([outcomes[pair.id] for pair in judged])
    categories = sorted({pair.category for pair in judged if pair.category is not None})
    by = {name: _rate([outcomes[pair.id] for pair in judged if pair.category == name]) for name in categories}
    return {**found, "interval_method": "Wilson, 95 %", "categories": by}


def _rate(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    wins, ties, losses = (outcomes.count(name) for name in ("win", "tie", "loss"))
    rate = (wins + ties / 2) / len(outcomes)
    interval = [round(bound, 4) for bound in wilson(rate, len(outcomes))]
    return {"pairs": len(outcomes), "wins": wins, "ties": ties, "losses": losses, "win_rate": round(rate, 4), "interval": interval}


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share of n trials (Wilson 1927). With ties as half a win it is wider than needed, never narrower.

    It stays honest where a bootstrap does not: 12 wins of 12 give 0.76 to 1, not 1 to 1.
    """
    z2 = 1.959964**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def agreement(units: Collection[Sequence[str]]) -> dict[str, Any]:
    """How far raters agree on the units that two or more of them rated; missing votes are no disagreement.

    Args:
        units: the values each unit was given.
    Returns:
        pairs: units rated more than once. percent: of all pairs of raters on a unit, those that agree. alpha: Krippendorff's, nominal
        (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"); 1 is perfect, 0 is chance. None where nothing can be said.
    """
    shared = [values for values in units if len(values) > 1]
    couples = [a == b for values in shared for a, b in combinations(values, 2)]
    if not couples:
        return {"pairs": 0, "percent": None, "alpha": None}
    total = Counter(value for values in shared for value in values)
    n = sum(total.values())
    observed = sum(sum(a != b for a, b in combinations(values, 2)) * 2 / (len(values) - 1) for values in shared) / n
    expected = sum(2 * total[a] * total[b] for a, b in combinations(total, 2)) / (n * (n - 1))
    alpha = round(1 - observed / expected, 4) if expected else None
    return {"pairs": len(shared), "percent": round(100 * sum(couples) / len(couples), 1), "alpha": alpha}


def as_text(found: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal, of what `tally` found between `systems`."""
    first, second = found["systems"]
    width = max(map(len, found["categories"]), default=0)
    return [
        f"{first} against {second}: {found['wins']} wins, {found['ties']} ties, {found['losses']} losses in {found['pairs']} pairs",
        f"win rate of {first} {_percent(found)} (ties half; {found['interval_method']})",
        *(f"  {name:<{width}}  {_percent(part)}  of {part['pairs']}" for name, part in found["categories"].items()),
    ]


def _percent(part: Mapping[str, Any]) -> str:
    low, high = part["interval"]
    return f"{100 * part['win_rate']:.1f} %, {100 * low:.1f} to {100 * high:.1f}"
