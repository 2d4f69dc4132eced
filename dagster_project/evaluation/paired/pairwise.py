"""Blind pairs of two systems' answers to the same prompts, and statistics of judgments on them."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from dagster_project.core import params
from dagster_project.core.documents import read_document
from dagster_project.core.errors import InputError
from dagster_project.core.frames import read_records, read_rows
from dagster_project.core.messages import Message, Tools
from dagster_project.core.text import many, number
from dagster_project.evaluation.paired.bootstrap import independent, unit, wilson
from dagster_project.training.inference.answers import Answer, of_row

PROMPTED = ("zero_shot", "same_prompt", "system_prompt", "chain_of_thought", "few_shot", "retrieved")
"""Baselines answered by the prompted base model."""

Outcome = Literal["win", "tie", "loss"]
"""Outcome for the first system against the second, on one pair."""
Choice = Literal["a", "b", "tie"]
"""Choice of a rater, who sees the answers as A and B."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    id: str
    """Opaque: reveals neither the example nor the systems without the test split."""
    prompt: list[Message]
    category: str | None
    answers: tuple[str, str]
    """Answers of the first and of the second system, without traces and calls."""
    swapped: bool
    """Whether A is the second system's answer."""
    messages: tuple[Message, Message] | None = None
    """The answers with traces and calls; None if neither has any."""
    tools: Tools = None
    """Tools that were offered."""
    unit: str | None = None
    """The same for turns of one test example and for near-copies; None if it shares it with no other pair."""

    @property
    def shown(self) -> tuple[str, str]:
        """Answers in the order shown: A, B."""
        first, second = self.answers
        return (second, first) if self.swapped else (first, second)

    @property
    def turns(self) -> tuple[Message, Message]:
        """The answers as messages of the assistant."""
        first, second = ({"role": "assistant", "content": text} for text in self.answers)
        return self.messages or (first, second)

    def outcome(self, choice: Choice) -> Outcome:
        if choice == "tie":
            return "tie"
        return "win" if (choice == "a") != self.swapped else "loss"


@dataclass(frozen=True)
class Match:
    """All pairs of differing answers of two systems."""

    id: str
    """Hash of systems, seed and all answers: different answers give a different match."""
    systems: tuple[str, str]
    seed: int
    pairs: list[Pair]
    """In random order; the first n form a sample of size n."""
    identical: int
    """Number of pairs left out because their answers are identical."""
    secret: str = field(default="", repr=False)
    """What the ids are derived from. Raters cannot compute it."""

    def seal(self, n: int) -> str:
        """Code on the page with the first n pairs, so that a rater's file cannot state another number."""
        return _digest(self.secret, "pairs", n)[:16]


Key = tuple[str, int]
"""Test example, and the index of the answered message: -1 is the last one."""


def answers_of(project: Path) -> dict[str, dict[Key, Answer]]:
    """System -> question -> answer. Baselines first, then variants, without those that were removed from params.yaml.

    Raises:
        InputError: there are no answers yet.
    """
    files = [project / "data" / "baselines" / "results.parquet", *_results_of_variants(project)]
    answers: dict[str, dict[Key, Answer]] = {}
    columns = ("system", "example_id", "answer")
    for row in (row for file in files if file.is_file() for row in read_rows(file, columns)):
        if row["answer"] is not None:
            turn = row.get("turn")
            answers.setdefault(row["system"], {})[row["example_id"], -1 if turn is None else turn] = of_row(row)
    if not answers:
        raise InputError(
            "data/baselines, data/evaluation: no system has answered the test examples",
            "run `dvc repro comparison`; it asks for answers to test examples with a prompt and a response",
        )
    return answers


def _results_of_variants(project: Path) -> list[Path]:
    """Results of the variants that params.yaml has. Those of a removed one may be left behind in its folder."""
    files = sorted((project / "data").glob("evaluation*/*/results.parquet"))
    values = params.read(project) if files else {}
    sections = {
        stage: values.get(section)
        for stage, section in {"evaluation": "adapter", "evaluation_aligned": "aligned"}.items()
    }
    variants = {stage: section if isinstance(section, dict) else {} for stage, section in sections.items()}
    return [file for file in files if file.parent.name in variants.get(file.parent.parent.name, {})]


def contenders(project: Path) -> tuple[str, str]:
    """The best variant and the best prompted baseline, by the deciding measure (`metrics.measures`).

    Raises:
        InputError: there is no such comparison, or its file is damaged.
    """
    document = project / "data" / "comparison" / "comparison.json"
    name = "data/comparison/comparison.json"
    hint = "restore it with `dvc checkout --force data/comparison`, or make it again with `dvc repro comparison`"
    gains: dict[str, dict[str, float]] = {}
    if document.is_file():
        try:
            gains = _gains(read_document(document, name, hint))
        except ValueError as error:
            other = f"it is not a comparison as this version of Pedigree writes it ({error})"
            raise InputError(f"{name} cannot be read: {other}", hint) from None
    if not any(gains.values()):
        problem = "data/comparison/comparison.json: no variant is compared with a prompt to the base model"
        raise InputError(problem, f"name two systems: {', '.join(answers_of(project))}")
    best = max(gains, key=lambda name: max(gains[name].values(), default=-math.inf))
    return best, min(gains[best], key=lambda other: gains[best][other])


def _gains(document: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Variant -> prompted baseline -> difference by the deciding measure, which comes first.

    Raises:
        ValueError: the document has another shape. Says where.
    """
    gains: dict[str, dict[str, float]] = {}
    for variant in (compared := _object(document, "compared", "")):
        found = _object(compared, variant, "compared")
        if "to" not in found:  # without answers, only likelihoods are compared
            continue
        where = f"compared.{variant}.to"
        against = _object(found, "to", f"compared.{variant}")
        gains[variant] = {}
        for other in (other for other in PROMPTED if other in against):
            measures = _object(against, other, where)
            if not measures:
                raise ValueError(f"{where}.{other} has no measure")
            measure = next(iter(measures))
            value: Any = _object(measures, measure, f"{where}.{other}").get("difference")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and abs(value) < math.inf):  # nor is NaN
                raise ValueError(f"{where}.{other}.{measure}.difference is not a number")
            gains[variant][other] = value
    return gains


def _object(parent: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{where}{'.' if where else ''}{key} is {'missing' if value is None else 'not an object'}")
    return value


def match(project: Path, systems: tuple[str, str], seed: int) -> Match:
    """The pairs of two systems, possibly none. The same seed and answers give the same ids, order and positions.

    Raises:
        InputError: a system is unknown, both are the same, or there is no test split.
    """
    known = answers_of(project)
    if unknown := [name for name in systems if name not in known]:
        raise InputError(f"no answers of {', '.join(map(repr, unknown))}", f"systems with answers: {', '.join(known)}")
    if systems[0] == systems[1]:
        raise InputError(f"both systems are {systems[0]!r}", f"name two of {', '.join(known)}")
    columns = ("example_id", "messages", "category")
    test = read_records(project / "data" / "splits" / "test", columns)
    records = {record["example_id"]: record for record in test}
    if not records:
        raise InputError(
            "data/splits/test: there are no test examples",
            "restore them with `dvc checkout data/splits`, or run `dvc repro splits`",
        )
    first, second = (known[name] for name in systems)
    both = sorted(key for key in first.keys() & second.keys() if key[0] in records)
    # example ids are hashes of prompt and reference, so this digest cannot be guessed from the page alone
    secret = _digest(
        systems, seed, [(_label(key), *(_comparison_key(answers[key]) for answers in (first, second))) for key in both]
    )
    rng = random.Random(secret)
    rng.shuffle(both)
    # each system is A in one of every two consecutive pairs, so in half of any sample
    swaps = [swap for _ in both[::2] for swap in rng.sample((False, True), 2)]
    differing = [key for key in both if _digest_content(first[key]) != _digest_content(second[key])]
    pairs = [
        _pair(_digest(secret, _label(key))[:12], records[key[0]], key[1], (first[key], second[key]), swapped)
        for key, swapped in zip(differing, swaps, strict=False)
    ]
    return Match(_digest(secret)[:16], systems, seed, pairs, len(both) - len(pairs), secret)


def _pair(identity: str, record: Mapping[str, Any], turn: int, answers: tuple[Answer, Answer], swapped: bool) -> Pair:
    first, second = answers
    plain = not any(answer.calls or answer.reasoning for answer in answers)
    return Pair(
        identity,
        record["messages"][:turn],
        record["category"],
        (first.content, second.content),
        swapped,
        None if plain else (first.message, second.message),
        record.get("tools"),
        unit(record),
    )


def _label(key: Key) -> Any:
    """The example for its last turn, else [example, turn]."""
    return key[0] if key[1] == -1 else list(key)


def _comparison_key(answer: Answer) -> Any:
    """An answer for a digest: its text or, with trace or calls, its message."""
    return answer.message if answer.calls or answer.reasoning else answer.content


def _digest_content(answer: Answer) -> Any:
    """What makes two answers differ: text and calls, not the trace."""
    return answer.content.strip(), [(call.name, call.arguments) for call in answer.calls]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def majority(outcomes: Sequence[Outcome]) -> Outcome:
    """The most frequent outcome; a tie where two are equally frequent."""
    (first, most), *rest = Counter(outcomes).most_common()
    return "tie" if rest and rest[0][1] == most else first


def tally(pairs: Sequence[Pair], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Wins, ties, losses and win rate of the first system, overall and by category.

    Intervals count near-copies, and turns of one example, as one.

    Args:
        outcomes: pair id -> outcome; other pairs are ignored.
    """
    judged = [pair for pair in pairs if pair.id in outcomes]
    overall = _rate(judged, outcomes)
    categories = sorted({pair.category for pair in judged if pair.category is not None})
    by = {name: _rate([pair for pair in judged if pair.category == name], outcomes) for name in categories}
    once = ", near-copies and turns of one conversation as one" if len(set(_units(judged))) < len(judged) else ""
    return {**overall, "interval_method": f"Wilson, 95 %{once}", "categories": by}


def _units(pairs: Sequence[Pair]) -> list[str]:
    return [pair.unit or pair.id for pair in pairs]


def _rate(pairs: Sequence[Pair], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    counts = Counter(outcomes[pair.id] for pair in pairs)
    wins, ties, losses = (counts[name] for name in ("win", "tie", "loss"))
    rate = (wins + ties / 2) / len(pairs)
    interval = [round(bound, 4) for bound in wilson(rate, independent(_units(pairs)))]
    return {
        "pairs": len(pairs),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "win_rate": round(rate, 4),
        "interval": interval,
    }


def agreement(units: Collection[Sequence[str]]) -> dict[str, Any]:
    """Inter-rater agreement on the units with two or more ratings; missing votes do not count as disagreement.

    Args:
        units: the ratings of each unit.
    Returns:
        "pairs": units rated more than once; "percent": of all pairs of raters on a unit, those that agree; "alpha":
        Krippendorff's, nominal (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"), 1 if perfect, 0 by
        chance. None if undefined.
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


def as_text(result: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal with the result of `tally` and its `systems`."""
    first, second = result["systems"]
    width = max(map(len, result["categories"]), default=0)
    losses = f"{number(result['losses'])} {'loss' if result['losses'] == 1 else 'losses'}"
    return [
        (
            f"{first} against {second}: {many(result['wins'], 'win')}, {many(result['ties'], 'tie')}, {losses} in"
            f" {many(result['pairs'], 'pair')}"
        ),
        f"win rate of {first} {_percent(result)} (a tie counts half; interval: {result['interval_method']})",
        *(f"  {name:<{width}}  {_percent(part)}  of {part['pairs']}" for name, part in result["categories"].items()),
    ]


def _percent(part: Mapping[str, Any]) -> str:
    low, high = part["interval"]
    return f"{100 * part['win_rate']:.1f} %, {100 * low:.1f} to {100 * high:.1f}"
