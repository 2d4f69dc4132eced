"""Formats of `pedigree export`, found by their files: a format "model-card" is the function `model_card` of model_card.py in this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

Format = Callable[[Mapping[str, Any], date], str]
"""(`export.summarize` of a model, issue date) -> text of the file. The same input gives the same text."""

NOT_FORMATS = {"__init__", "export", "licenses", "registry", "summary"}


def formats() -> list[str]:
    """Names of all formats, without importing any."""
    modules = {path.stem for path in Path(__file__).parent.glob("*.py")} - NOT_FORMATS
    return sorted(name.replace("_", "-") for name in modules)


def find(name: str) -> tuple[Format, bool]:
    """A format, and whether it describes any stage: its module then sets `ANY_STAGE = True`. Other formats describe trained models only."""
    module = import_module(f"{__package__}.{name.replace('-', '_')}")
    return getattr(module, name.replace("-", "_")), getattr(module, "ANY_STAGE", False)
