"""The third verdict of `pedigree verify`: outputs that differ because another
kind of machine made them, by no more than such machines differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dagster_project.lineage.tolerance import Deviation

NAMES = {"cpu", "packages"}
"""Keys of a recorded machine that do not make another kind: the processor's marketing name, and the hash of all
installed distributions, of which only a few change a result (`causes` of commands/outputs.py names these)."""

BOUNDS: dict[tuple[str, str], dict[str, float]] = {
    ("training", "float32"): {
        "update": 0.02,
        "weight": 0.001,
        "number": 0.01,
        "column": 0.05,
        "interval": 1.0,
        "answers": 0.05,
    },
    ("training", "bfloat16"): {
        "update": 0.75,
        "weight": 0.25,
        "number": 0.1,
        "column": 0.5,
        "interval": 1.0,
        "answers": 0.75,
    },
    ("merging", "float32"): {"update": 1e-4, "weight": 1e-5, "number": 0.001},
    ("merging", "bfloat16"): {"update": 0.25, "weight": 0.0078125, "number": 0.05},
    ("evaluation", "float32"): {"number": 0.02, "column": 0.001, "interval": 1.0, "answers": 0.05},
    ("evaluation", "bfloat16"): {"number": 0.25, "column": 0.1, "interval": 1.0, "answers": 0.5},
}
"""What a stage does and number format -> measure of `lineage/tolerance.py` -> largest difference that still counts as
that of another machine. How they were found: docs/verify.md, "Elsewhere"."""

KIND_OF_STAGE = {
    "adapter": "training",
    "reward_model": "training",
    "aligned": "training",
    "merged": "merging",
    "merged_aligned": "merging",
    "baselines": "evaluation",
    "evaluation": "evaluation",
    "evaluation_aligned": "evaluation",
}


def compared(recorded: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> dict[str, Any]:
    """The machine that made the recorded output, and the one that reproduced it.

    Returns:
        {"recorded", "now", "same_kind"}; "same_kind" is None if either is not recorded.
    """
    same_kind = None if recorded is None or now is None else not any(differences(recorded, now))
    return {"recorded": recorded, "now": now, "same_kind": same_kind}


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line for each part of the machine that makes it another kind."""
    for key in dict.fromkeys([*recorded, *now]):
        one, other = recorded.get(key), now.get(key)
        if one == other or key in NAMES:
            continue
        if isinstance(one, list) and isinstance(other, list):
            parts = [f"without {', '.join(lost)} now" if (lost := sorted(set(one) - set(other))) else ""]
            parts += [f"with {', '.join(more)} now" if (more := sorted(set(other) - set(one))) else ""]
            yield f"machine.{key}: {', '.join(filter(None, parts))}"
        elif isinstance(one, dict) and isinstance(other, dict):
            for name in dict.fromkeys([*one, *other]):
                if one.get(name) != other.get(name):
                    yield f"machine.{key}.{name}: {_shown(one.get(name))} then, {_shown(other.get(name))} now"
        else:
            yield f"machine.{key}: {_shown(one)} then, {_shown(other)} now"


def judge(
    stage: str, parameters: Mapping[str, Any], found: Iterable[Deviation]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare differences with the bounds of a stage.

    Args:
        stage: without variant.
        parameters: those of params.yaml that dvc.lock recorded for it, by dotted key.
    Returns:
        Every measured difference with its bound; and one line for each that exceeds it.
    """
    compute, evaluation = (parameters.get(section) or {} for section in ("compute", "evaluation"))
    dtype = "float32" if (evaluation.get("dtype") or compute.get("dtype")) == "float32" else "bfloat16"
    bounds = BOUNDS[KIND_OF_STAGE[stage], dtype]
    listed = [{**vars(one), "bound": bounds.get(one.measure, 0.0)} for one in found]
    return listed, [_reason(one) for one in listed if not one["value"] <= one["bound"]]


def _reason(one: Mapping[str, Any]) -> str:
    if one["measure"] == "equal":
        return f"{one['artifact']}: {one['where']} differs, which no machine may change"
    return (
        f"{one['artifact']}: {one['measure']} {one['where']} differs by {one['value']:.3g},"
        f" more than the {one['bound']:g} of other machines"
    )


def largest(listed: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each measure the difference that is closest to its bound, or furthest beyond it."""
    found: dict[str, Mapping[str, Any]] = {}
    for one in listed:
        other = found.get(one["measure"])
        if other is None or one["value"] * other["bound"] > other["value"] * one["bound"]:
            found[one["measure"]] = one
    return list(found.values())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return "none" if value is None else str(value)
