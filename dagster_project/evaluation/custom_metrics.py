"""A team's own measures: functions (reference, answer) -> number in Python files under data/metrics/, named in params.yaml."""

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
"""The folder that dvc.yaml watches: an edit of a measure measures again."""


def own_measures(root: Path, names: Sequence[str]) -> dict[str, Measure]:
    """Name -> measure; `tone.polite` is the mean over the answers of the function `polite` in data/metrics/tone.py.

    Raises:
        InputError: there is no such file or function, or the file fails.
    """
    return {name: Measure(_checked(name, _load(root, name)), paired=True) for name in names}


def _load(root: Path, name: str) -> Callable[[str, str], Any]:
    *parts, function = name.split(".")
    if not parts or not all(part.isidentifier() for part in (*parts, function)):
        raise InputError(f"params.yaml: evaluation.metrics: {name!r} names no function", f"write file.function, of a file in {FOLDER}/")
    place = f"{FOLDER}/{'/'.join(parts)}.py"
    path = inside(root, place, "evaluation.metrics")
    try:
        found = runpy.run_path(str(path)).get(function)  # by file, and without a __pycache__ beside it
    except (Exception, SystemExit) as error:  # noqa: BLE001  it is somebody's own code: whatever it raises is for them to read
        raise InputError(f"{place} fails: {type(error).__name__}: {error}", "mend the file, or take it out of evaluation.metrics") from None
    if not callable(found):
        raise InputError(f"params.yaml: evaluation.metrics: {place} has no function {function!r}", "define it there, or name another")
    return found


def _checked(name: str, function: Callable[[str, str], Any]) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    def statistics(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        import numpy as np

        values = []
        for reference, answer in zip(references, answers, strict=True):
            try:
                value = function(reference, answer)
            except (Exception, SystemExit) as error:  # noqa: BLE001  as above
                said = f"fails: {type(error).__name__}: {error}"
            else:
                if isinstance(value, Real) and math.isfinite(value):
                    values.append((float(value), 1))
                    continue
                said = f"gives {value!r}, which is no finite number"
            raise InputError(f"evaluation.metrics: {name} {said}; for the answer {answer[:80]!r}", f"mend it in {FOLDER}/")
        return np.array(values, dtype=float).reshape(-1, 2)

    return statistics
