"""`pedigree check`: the checks of the pipeline on any files, without a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dagster_project.curation.checks import CHECKS, Rules, excerpt, judge
from dagster_project.curation.files import read_rows
from dagster_project.curation.formats import read_multiple_choice, to_records
from dagster_project.errors import InputError
from dagster_project.records import prompt_text


def check_paths(paths: Sequence[Path], layout: str, against: Sequence[Path]) -> dict[str, Any]:
    """Judge files of examples.

    Args:
        against: held-out files, of examples or of multiple-choice questions, that `paths` must not overlap.
    Returns:
        {"format", "rows", "kept", "findings": [{"check", "severity", "count", "rows", "examples"}]}; `rows` are 0-based source rows, counted
        on through the files where there is more than one.
    Raises:
        InputError: a file is missing, empty or in no known format.
    """
    records: list[dict[str, Any]] = []
    layouts = []
    for path in paths:
        found, rows = to_records(_file(path), path.name, layout)
        layouts.append(found)
        records += [{**row, "source_row": len(records) + i} for i, row in enumerate(rows)]
    held_out = [text for path in against for text in _texts(_file(path))]
    judged = judge(records, held_out, Rules())
    findings = [
        {
            "check": result.name,
            "severity": CHECKS[result.name].severity,
            "count": result.count or 1,
            "rows": judged.broken.get(result.name, [])[:20],
            "examples": [excerpt(records[i]) for i in judged.broken.get(result.name, [])[:3]],
            **({"note": result.note} if result.note and not result.count else {}),
        }
        for result in judged.results
        if result.count or not result.passed
    ]
    return {"format": ", ".join(dict.fromkeys(layouts)), "rows": len(records), "kept": judged.reason.count(None), "findings": findings}


def _file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}", "name a file of examples")
    return path


def _texts(path: Path) -> list[str]:
    """What a held-out file asks: the questions of a benchmark, or the prompts of examples."""
    first = next((row.value for row in read_rows(path) if row.value is not None), {})
    if "choices" in first:
        return [question["question"] for question in read_multiple_choice(path)]
    return [prompt_text(record["messages"]) for record in to_records(path, path.name)[1] if record["messages"]]


def check_text(found: dict[str, Any]) -> str:
    """The findings for a person at a terminal, worst first."""
    order = {"error": 0, "warn": 1, "info": 2}
    lines = [f"{found['rows']} rows ({found['format']}), {found['kept']} would be kept"]
    for finding in sorted(found["findings"], key=lambda f: (order[f["severity"]], -f["count"])):
        rows = f" rows {', '.join(map(str, finding['rows'][:8]))}{', ...' if finding['count'] > 8 else ''}" if finding["rows"] else ""
        lines.append(f"{finding['severity']:<5} {finding['check']:<22} {finding['count']:>5} {rows}{finding.get('note', '')}")
        lines += [f"      {text!r}" for text in finding["examples"][:2]]
    return "\n".join(lines if found["findings"] else [*lines, "no findings"])
