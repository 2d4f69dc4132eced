"""Pedigree: LLM fine-tuning in which every model knows its data. Start reading at pipeline.py."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_EXPORTS = {
    "build_definitions": "dagster_project.orchestration.dagster.assets",
    "build_dvc_definitions": "dagster_project.orchestration.dagster_dvc.definitions",
    "PedigreeProjectComponent": "dagster_project.components",
    "DvcProjectComponent": "dagster_project.components",
}
"""What another Dagster project uses -> its module, imported when it is used: most commands need no Dagster."""


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
