"""`pedigree export`: the lineage of a model in formats that other tools read. Same lineage, same text; only the issue date is an argument."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.core.layout import report_of
from dagster_project.lineage import lineage
from dagster_project.lineage.export import registry
from dagster_project.lineage.export.summary import from_reports, published_parameters
from dagster_project.lineage.history import Revision

MODELS = ("adapter", "aligned", "reward_model", "merged", "merged_aligned", "release")
"""Stages whose output is a model that this project trained."""


def summarize(root: Path, model: str, rev: str | None = None) -> dict[str, Any]:
    """`from_reports`, completed with what dvc.lock and git record: hashes, inputs, parameters and the commit."""
    revision = Revision(root, rev)
    audit = lineage.audit(root, model, rev)
    address = audit["model"]["stage"]
    variant = address.partition("@")[2]
    measuring = [
        name
        for name in revision.lock()
        if name in {"baselines", "comparison"} or (variant and name.startswith("evaluation") and name.endswith(f"@{variant}"))
    ]
    reports = {name: revision.json(report_of(name)) for name in dict.fromkeys([*audit["stages"], *measuring])}
    summary = from_reports(address, reports, reports[address].get("variant", "") if address == "release" else "")
    stages = {
        name: {**stage, **{key: audit["stages"][name][key] for key in ("output", "md5", "inputs")}}
        for name, stage in summary["stages"].items()
        if name in audit["stages"]
    }
    return {
        **summary,
        "model": {**audit["model"], **summary["model"]},
        "stages": stages,
        "parameters": published_parameters(audit["parameters"]),
        "code": audit["code"],
    }


def issue_date(root: Path, rev: str | None) -> date:
    """The date of the commit that recorded the model.

    Raises:
        InputError: dvc.lock has uncommitted changes.
    """
    uncommitted = rev is None and git(root, "status", "--porcelain", "--", "dvc.lock")
    committed = "" if uncommitted else (git(root, "log", "-1", "--format=%cs", rev or "HEAD", "--", "dvc.lock") or "").strip()
    if not committed:
        raise InputError("dvc.lock is not committed, so the model has no issue date", "commit it, or give --issued YYYY-MM-DD")
    return date.fromisoformat(committed)


def export(root: Path, model: str, form: str, rev: str | None = None, issued: date | None = None) -> str:
    """A model in one of `registry.formats()`.

    Args:
        issued: default: the date of the commit that recorded the model.
    Raises:
        InputError: unknown model, or a stage that the format cannot describe.
    """
    write, any_stage = registry.find(form)
    summary = summarize(root, model, rev)
    address = summary["model"]["stage"]
    if not any_stage and address.partition("@")[0] not in MODELS:
        raise InputError(
            f"{address} is not a model that this project trained: {form} cannot describe it",
            f"name one of {', '.join(MODELS)}, or use openlineage",
        )
    return write(summary, issued or issue_date(root, rev))
