"""Paths under a project's data/ folder."""

from __future__ import annotations

from pathlib import Path

CODE = "dagster_project"
REPORTS = "data/reports/"
PLOTS = "data/plots/"
RECORD_KEY = "data/keys/record_ids.key"
"""The secret that keys the ids of records in what is published (core/published_ids.py)."""


def report_of(address: str) -> str:
    """ "adapter@lora" -> "data/reports/adapter/lora.json": the stage's report, which git tracks."""
    return f"{REPORTS}{address.replace('@', '/')}.json"


def is_report(path: str) -> bool:
    """Whether a path is a stage's report. A report read by a stage is part of that stage's definition, not an input."""
    return path.startswith(REPORTS)


def is_code(path: str) -> bool:
    """Whether a dependency is code: a module, or a whole folder of the package."""
    return path.endswith(".py") or path.split("/")[0] == CODE


def pages_of(root: Path, address: str) -> Path:
    """Folder of a stage's pages, and of other files about its latest run. Not tracked."""
    return root / "data" / "pages" / address.replace("@", "/")


def measured_path(root: Path, address: str) -> Path:
    """Time and memory of the stage's latest run, with the sha256 of its output. Not tracked."""
    return pages_of(root, address) / "measured.json"
