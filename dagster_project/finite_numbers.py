"""params.yaml -> no number in it is infinite or NaN. The sections refuse these
in their fields; this covers free mappings such as `peft`, too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dagster_project.core.errors import InputError


def refuse_not_finite(values: dict[str, Any]) -> None:
    """Raises:
    InputError: a value of params.yaml is infinite or NaN.
    """
    if wrong := [*_not_finite(values, "")]:
        raise InputError(
            "\n".join(f"params.yaml: {place}: Input should be a finite number (got {value})" for place, value in wrong),
            "fix params.yaml and run again",
        )


def _not_finite(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """(dotted path, value) of each number that is infinite or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        yield where, value
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _not_finite(one, f"{where}.{key}".lstrip("."))
