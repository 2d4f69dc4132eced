"""Alarms of evaluations that measured nothing: no questions, empty answers, the same answer to everything, a measure
with one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from dagster_project.core.records import CheckResult
from dagster_project.core.text import many, number
from dagster_project.training.inference.answers import Answer

if TYPE_CHECKING:
    import numpy as np

FEW = 2
"""Fewer equal answers can be chance."""


def scored_something(answers: Sequence[Answer], likelihoods: Sequence[tuple[float, int]]) -> CheckResult:
    """The blocking check that there is any result.

    Args:
        likelihoods: (nats, tokens) of the test examples; empty for a classifier.
    """
    tokens = sum(n for _, n in likelihoods)
    note = (
        ""
        if answers or tokens
        else "no question was asked and no likelihood measured; set evaluation.task, or add examples with answers"
    )
    return CheckResult("scored_something", passed=bool(answers or tokens), blocking=True, note=note)


def answers_are_not_empty(systems: Mapping[str, Sequence[Answer]], severity: Literal["error", "warn"]) -> CheckResult:
    """It does not block, so that the other variants are compared.

    `comparison` calls no variant with a failed check a gain.

    Args:
        systems: system -> its answers. One that has answers, all of them empty, fails the check.
    """
    silent = [name for name, answers in systems.items() if answers and not any(map(_is_not_empty, answers))]
    note = (
        f"all answers of {', '.join(silent)} are empty; raise evaluation.max_new_tokens, or look for the fault in the"
        " model's chat template"
    )
    return CheckResult(
        "answers_are_not_empty",
        passed=not silent,
        severity=severity,
        count=sum(len(systems[name]) for name in silent),
        note=note if silent else "",
    )


def answers_differ(references: Sequence[Answer], answers: Sequence[Answer]) -> CheckResult:
    """A warning if one answer, which is not empty, is given to all questions, although their references differ."""
    given, expected = ({_content(answer) for answer in some} for some in (answers, references))
    same = len(answers) >= FEW and len(given) == 1 and len(expected) > 1 and _is_not_empty(answers[0])
    note = (
        f"all {many(len(answers), 'question')} have the same answer, where {number(len(expected))} different ones are"
        " right"
        if same
        else ""
    )
    return CheckResult("answers_differ", passed=not same, severity="warn", count=len(answers) if same else 0, note=note)


def _is_not_empty(answer: Answer) -> bool:
    return bool(answer.content.strip() or answer.calls)


def _content(answer: Answer) -> tuple[str, str]:
    return answer.content.strip(), str([(call.name, call.arguments) for call in answer.calls])


def scores_differ(values: Mapping[str, Sequence[np.ndarray]]) -> CheckResult:
    """A warning about each measure that gives every answer of every system the same score, so that it compares nothing.

    Args:
        values: measure -> for each system the contributions of its answers, (examples, k).
    """
    import numpy as np

    constant = []
    for name, systems in values.items():
        rows = np.concatenate(list(systems))
        if len(rows) >= FEW and (rows == rows[0]).all():
            constant.append(f"{name} is the same for all {many(len(rows), 'answer')}")
    return CheckResult(
        "scores_differ",
        passed=not constant,
        severity="warn",
        count=len(constant),
        note=(
            "; ".join([*constant, "it does not distinguish the systems: look at the samples, or use another measure"])
            if constant
            else ""
        ),
    )
