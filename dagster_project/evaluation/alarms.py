"""Alarms of evaluations that measured nothing: no questions, empty or equal answers, a measure with one value."""

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
    passed = bool(answers or sum(n for _, n in likelihoods))
    note = "no question was asked and no likelihood measured; set evaluation.task, or add examples with answers"
    return CheckResult("scored_something", passed=passed, blocking=True, note="" if passed else note)


def answers_are_not_empty(systems: Mapping[str, Sequence[Answer]], severity: Literal["error", "warn"]) -> CheckResult:
    """A system that has answers, all of them empty, fails the check.

    It does not block, so that the other variants are compared. `comparison` calls no variant with a failed check a
    gain.

    Args:
        systems: system -> its answers.
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
    if not same:
        return CheckResult("answers_differ", passed=True, severity="warn")
    asked, right = many(len(answers), "question"), number(len(expected))
    note = f"all {asked} have the same answer, where {right} different ones are right"
    return CheckResult("answers_differ", passed=False, severity="warn", count=len(answers), note=note)


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
    advice = ["it does not distinguish the systems: look at the samples, or use another measure"] if constant else []
    note = "; ".join([*constant, *advice])
    return CheckResult("scores_differ", passed=not constant, severity="warn", count=len(constant), note=note)
