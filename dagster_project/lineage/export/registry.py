"""Formats of `pedigree export`, found by their files: a format "model-card" is
the function `model_card` of model_card.py in this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

Write = Callable[[Mapping[str, Any], date], str]
"""(`export.summarize` of a model, issue date) -> text of the file. The same input gives the same text."""

NOT_FORMATS = {
    "__init__", "answers", "data_sets", "export", "folder", "formulation", "licenses", "registry", "responsible",
    "summary", "tables",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A format, as its module declares it."""

    write: Write
    any_stage: bool
    """`ANY_STAGE`: it describes any stage. Other formats describe trained models only."""
    data_sets: bool
    """`DATA_SETS`: it describes tables of records, so the summary has their
    files and columns (`data_sets.data_sets`)."""
    file: str
    """`FILE`: name of its file in a folder of all formats."""
    shows: str
    """`SHOWS`: what a reader learns from it, in words."""
    shows_not: str
    """`SHOWS_NOT`: what it must not be taken for."""


def formats() -> list[str]:
    """Names of all formats, without importing any."""
    modules = {path.stem for path in Path(__file__).parent.glob("*.py")} - NOT_FORMATS
    return sorted(name.replace("_", "-") for name in modules)


def of_any_stage() -> list[str]:
    """Names of the formats that describe any stage."""
    return [name for name in formats() if find(name).any_stage]


def find(name: str) -> Format:
    """A format by its name."""
    module = import_module(f"{__package__}.{name.replace('-', '_')}")
    return Format(
        getattr(module, name.replace("-", "_")),
        getattr(module, "ANY_STAGE", False),
        getattr(module, "DATA_SETS", False),
        *(
            getattr(module, attribute, default)
            for attribute, default in (("FILE", f"{name}.txt"), ("SHOWS", ""), ("SHOWS_NOT", ""))
        ),
    )
