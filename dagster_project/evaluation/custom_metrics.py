"""User-defined measures: functions (reference, answer) -> number in Python files under data/metrics/."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.params import inside
from dagster_project.evaluation.metrics import Measure

if TYPE_CHECKING:
    import numpy as np

FOLDER = "data/metrics"
"""A dependency in dvc.yaml: editing a measure re-runs the evaluation."""


LARGEST = 1e100
"""Largest absolute value of a measure: sums and differences of larger ones may not be finite."""


def custom_measures(root: Path, names: Sequence[str]) -> dict[str, Measure]:
    """Name -> measure; `tone.polite` is the mean over the answers of the function `polite` in data/metrics/tone.py.

    Raises:
        InputError: the file or function does not exist, or the file raises an exception.
    """
    return {name: Measure(_checked(name, _load(root, name)), paired=True) for name in names}


def locate_measure(root: Path, name: str) -> tuple[str, Path]:
    """The file of a measure, relative to the project and whole, without running it.

    Raises:
        InputError: the name has another form, or there is no such file.
    """
    *parts, function = name.split(".")
    if not parts or not all(part.isidentifier() for part in (*parts, function)):
        raise InputError(
            f"params.yaml: evaluation.metrics: {name!r} is not of the form file.function",
            f"name a function of a Python file in {FOLDER}/",
        )
    relative = f"{FOLDER}/{'/'.join(parts)}.py"
    return relative, inside(root, relative, "evaluation.metrics")


def _load(root: Path, name: str) -> Callable[[str, str], Any]:
    relative, path = locate_measure(root, name)
    function = name.rpartition(".")[2]
    try:
        loaded = runpy.run_path(str(path)).get(function)  # by path, without writing a __pycache__
    except (Exception, SystemExit) as error:  # noqa: BLE001  user code may raise anything; report it to the user
        raise InputError(
            f"{relative} fails: {type(error).__name__}: {error}", "fix the file, or remove it from evaluation.metrics"
        ) from None
    if not callable(loaded):
        raise InputError(
            f"params.yaml: evaluation.metrics: {relative} has no function {function!r}",
            "define it there, or use another function",
        )
    return loaded


def _checked(name: str, function: Callable[[str, str], Any]) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    known: dict[tuple[str, str], float] = {}  # so that a score, its interval and its differences use the same values

    def value(reference: str, answer: str) -> float:
        if (reference, answer) not in known:
            known[reference, answer] = _value(name, function, reference, answer)
            if len(known) == 1:
                _refuse_another_value(name, function, reference, answer, known[reference, answer])
        return known[reference, answer]

    def statistics(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        import numpy as np

        values = [(value(reference, answer), 1) for reference, answer in zip(references, answers, strict=True)]
        return np.array(values, dtype=float).reshape(-1, 2)

    return statistics


def _refuse_another_value(
    name: str, function: Callable[[str, str], Any], reference: str, answer: str, first: float
) -> None:
    """Call a function once more.

    Raises:
        InputError: it returns another value for the same answer.
    """
    if (second := _value(name, function, reference, answer)) != first:
        problem = f"returns {first} and then {second} for the same answer {answer[:80]!r}"
        raise InputError(f"evaluation.metrics: {name} {problem}", f"fix it in {FOLDER}/: a score must be repeatable")


def _value(name: str, function: Callable[[str, str], Any], reference: str, answer: str) -> float:
    try:
        value = function(reference, answer)
        finite = isinstance(value, Real) and math.isfinite(value)  # OverflowError: an integer above the largest float
    except (Exception, SystemExit) as error:  # noqa: BLE001  as above
        problem = f"fails: {type(error).__name__}: {error}"
    else:
        if finite and abs(value) <= LARGEST:
            return float(value)
        problem = f"returns {value!r}, which is {'too large' if finite else 'not a finite number'}"
    raise InputError(f"evaluation.metrics: {name} {problem}; for the answer {answer[:80]!r}", f"fix it in {FOLDER}/")
