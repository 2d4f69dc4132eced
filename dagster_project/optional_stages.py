"""Stages that a project may leave out of params.yaml and dvc.yaml: nothing
reads them unless a setting names them (docs/alignment.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.lineage.history import stages_of

OPTIONAL = frozenset({"reward_model"})
"""Each has a section and a stage of its name."""
_UPGRADES = "; with an installed package, `pedigree upgrade` writes dvc.yaml to fit"


def present(root: Path, values: Mapping[str, Any], sections: Sequence[str]) -> list[str]:
    """The sections without those that the project leaves out.

    Args:
        values: of params.yaml.
    Raises:
        InputError: only one of params.yaml and dvc.yaml has an optional stage.
            Without it in dvc.yaml, stages would read what nothing records.
    """
    stages = _stages(root)
    for name in OPTIONAL if "aligned" in stages else ():
        in_pipeline = name in stages
        if name in values and not in_pipeline:
            raise InputError(
                f"params.yaml: {name}: dvc.yaml has no such stage",
                f"remove the section, or restore the stage{_UPGRADES}",
            )
        if name not in values and in_pipeline:
            raise InputError(
                f"params.yaml has no section {name}, but dvc.yaml has the stage",
                "add the section, or remove the stage and what names it, see"
                f" docs/alignment.md#without-a-reward-model{_UPGRADES}",
            )
    return [section for section in sections if section in values or section not in OPTIONAL]


def refuse_missing(root: Path, values: Mapping[str, Any]) -> None:
    """Refuse a params.yaml without a section or key that a stage of dvc.yaml names. DVC requires it even if all of its
    keys have defaults, and says so only after it has removed the outputs of the stage.

    Args:
        values: of params.yaml.
    Raises:
        InputError: there is such a section or key.
    """
    for stage, entry in _stages(root).items():
        read = entry.get("do", entry)
        keys = read.get("params") if isinstance(read, dict) else None
        for key in keys if isinstance(keys, list) else ():
            if not isinstance(key, str) or "${" in key or has_key(values, key):
                continue
            raise InputError(
                f"params.yaml has no {key}, which dvc.yaml names under {stage}",
                (
                    "add it with its default, see docs/parameters.md"
                    if "." in key
                    else f"add `{key}: {{}}`: keys that are left out have their defaults"
                ),
            )


def has_key(values: Any, key: str) -> bool:
    """Whether a mapping has a dotted key, e.g. `lora.peft`."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _stages(root: Path) -> dict[str, Any]:
    """The stages of dvc.yaml; none if it cannot be read: commands that need it say what is wrong with it."""
    path = root / "dvc.yaml"
    with suppress(InputError):
        return stages_of(path.read_text(encoding="utf-8", errors="replace"), path.name) if path.is_file() else {}
    return {}
