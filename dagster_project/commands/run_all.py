"""`pedigree run --all` as text, and its exit code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster_project.views.texts import text


def exit_code(document: Mapping[str, Any]) -> int:
    return 130 if document["interrupted"] else 0 if document["passed"] else 1


def as_text(document: Mapping[str, Any]) -> str:
    """One line for each stage that was not up to date, and a summary."""
    by_outcome: dict[str, list[str]] = {}
    for address, stage in document["stages"].items():
        by_outcome.setdefault(stage["outcome"], []).append(address)
    return text("run_all", **document, by_outcome=by_outcome)
