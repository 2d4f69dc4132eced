"""Scores of answers that are one JSON object, with bootstrap intervals over the examples."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from dagster_project.params import Section

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
NO_LABEL = "(none)"
"""Predicted where an answer names no label."""


class Task(Section):
    """What a right answer looks like: one JSON object with these fields."""

    fields: dict[str, list[str]] = Field(min_length=1)
    """Field -> the values it may have; an empty list allows any text."""
    score: str
    """The field whose value is the label."""

    @model_validator(mode="after")
    def _labels_exist(self) -> Task:
        if not self.fields.get(self.score):
            raise ValueError(f"score: {self.score!r} must be one of `fields` and list its labels")
        return self

    @property
    def labels(self) -> list[str]:
        return self.fields[self.score]


def parse(answer: str) -> dict[str, Any] | None:
    """The JSON object an answer is, or None."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def follows(task: Task, value: dict[str, Any] | None) -> bool:
    """Does it have exactly the task's fields, each with an allowed value?"""
    return (
        value is not None
        and value.keys() == task.fields.keys()
        and all(isinstance(value[name], str) and (not allowed or value[name] in allowed) for name, allowed in task.fields.items())
    )


def label(task: Task, answer: str) -> str:
    """The label an answer gives: its JSON field if it has one, else the first label it names in any way; NO_LABEL if none.

    The second rule is for models that were not tuned to the format: they are credited for what they say, not for how.
    """
    value = parse(answer)
    if value is not None and value.get(task.score) in task.labels:
        return str(value[task.score])
    at = {name: match.start() for name in task.labels if (match := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", answer, re.IGNORECASE))}
    return min(at, key=at.__getitem__) if at else NO_LABEL


def score(task: Task, references: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Rates over all answers: valid JSON, schema followed, accuracy and macro-F1 of the label with 95 % intervals, accuracy of each closed field."""
    true = [label(task, reference) for reference in references]
    predicted = [label(task, answer) for answer in answers]
    parsed = [parse(answer) for answer in answers]
    wanted = [parse(reference) or {} for reference in references]
    closed = {
        name: sum((value or {}).get(name) == want[name] for value, want in zip(parsed, wanted, strict=True)) / len(answers)
        for name, allowed in task.fields.items()
        if allowed
    }
    return {
        "n": len(answers),
        "valid_json": _round(sum(value is not None for value in parsed) / len(answers)),
        "follows_schema": _round(sum(follows(task, value) for value in parsed) / len(answers)),
        "accuracy": _round(sum(a == b for a, b in zip(true, predicted, strict=True)) / len(answers)),
        "fields": {name: _round(value) for name, value in closed.items()},
        **macro_f1_interval(task, true, predicted),
    }


def _codes(task: Task, labels: Sequence[str]) -> np.ndarray:
    import numpy as np

    number = {name: i for i, name in enumerate(task.labels)}
    return np.array([number.get(name, -1) for name in labels])


def macro_f1(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur in either; a class that occurs in neither does not count.

    Args:
        true, predicted: class numbers, (..., n); -1 is no class.
    Returns: (...,)
    """
    import numpy as np

    total, present = np.zeros(true.shape[:-1]), np.zeros(true.shape[:-1])
    for k in range(classes):
        hit = ((true == k) & (predicted == k)).sum(-1)
        named = (true == k).sum(-1) + (predicted == k).sum(-1)
        total += np.divide(2 * hit, named, out=np.zeros(hit.shape), where=named > 0)
        present += named > 0
    return total / np.maximum(present, 1)


def resample(n: int) -> np.ndarray:
    """Bootstrap draws of example indices, (RESAMPLES, n); the same for every system, so that differences are paired."""
    import numpy as np

    return np.random.default_rng(0).integers(0, n, (RESAMPLES, n))


def interval(draws: np.ndarray) -> list[float]:
    """The central 95 % of bootstrap draws (percentile interval)."""
    import numpy as np

    low, high = np.quantile(draws, [0.025, 0.975])
    return [_round(low), _round(high)]


def macro_f1_interval(task: Task, true: Sequence[str], predicted: Sequence[str]) -> dict[str, Any]:
    t, p = _codes(task, true), _codes(task, predicted)
    draws = resample(len(t))
    return {
        "macro_f1": _round(macro_f1(t, p, len(task.labels))),
        "macro_f1_interval": interval(macro_f1(t[draws], p[draws], len(task.labels))),
    }


def macro_f1_difference(task: Task, true: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
    """Macro-F1 of `ours` minus `theirs` on the same examples, with a paired 95 % interval."""
    t, a, b = _codes(task, true), _codes(task, ours), _codes(task, theirs)
    n, draws = len(task.labels), resample(len(true))
    return {
        "difference": _round(macro_f1(t, a, n) - macro_f1(t, b, n)),
        "interval": interval(macro_f1(t[draws], a[draws], n) - macro_f1(t[draws], b[draws], n)),
    }


def perplexity_ratio(ours: Sequence[tuple[float, int]], theirs: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Perplexity of `ours` over that of `theirs` on the same examples, with a paired 95 % interval. Below 1 is better."""
    import numpy as np

    a, b, n = (np.array(column, dtype=float) for column in ([x for x, _ in ours], [x for x, _ in theirs], [count for _, count in ours]))
    draws = resample(len(n))
    ratios = np.exp((a[draws] - b[draws]).sum(-1) / n[draws].sum(-1))
    return {"ratio": _round(np.exp((a - b).sum() / n.sum())), "interval": interval(ratios)}


def _round(value: Any) -> float:
    return round(float(value), 4)
