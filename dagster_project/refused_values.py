"""params.yaml -> no number in it is infinite or NaN (the sections refuse these in their fields; this covers free
mappings such as `peft`, too), and no variant has the name of a system that it is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.text import NAMES


def refuse(values: dict[str, Any], variants: Sequence[str]) -> None:
    """Refuse values that the sections of params.yaml cannot judge by themselves.

    Args:
        variants: their places, e.g. `adapter.lora`.
    Raises:
        InputError: a value is infinite or NaN, or a variant has the name of a baseline or of the base model. Tables of
            results name systems, so its rows would replace those that it is compared with.
    """
    if wrong := [*_not_finite(values, "")]:
        raise InputError(
            "\n".join(f"params.yaml: {place}: Input should be a finite number (got {value})" for place, value in wrong),
            "fix params.yaml and run again",
        )
    systems = {**NAMES, "base": "base model"}
    taken = [(place, systems[name]) for place in variants if (name := place.partition(".")[2]) in systems]
    if taken:
        lines = [f"params.yaml: {place}: results use this name for the system '{system}'" for place, system in taken]
        raise InputError("\n".join(lines), "rename the variant")


def _not_finite(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """(dotted path, value) of each number that is infinite or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        yield where, value
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _not_finite(one, f"{where}.{key}".lstrip("."))
