"""`pedigree export`: a model's papers in the forms that others read. Same lineage, same text; only the issue date is given from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.core.layout import report_of
from dagster_project.lineage import lineage
from dagster_project.lineage.export.summary import from_reports
from dagster_project.lineage.history import Revision

MODELS = ("adapter", "aligned", "reward_model", "merged", "merged_aligned", "release")
"""Stages that make a model that was tuned here."""


def papers(root: Path, model: str, rev: str | None = None) -> dict[str, Any]:
    """`from_reports`, and beside it what dvc.lock and git know: hashes, inputs, parameters and the commit."""
    at = Revision(root, rev)
    lock = at.lock()
    found = lineage.audit(root, model, rev)
    address = found["model"]["stage"]
    variant = address.partition("@")[2]
    beside = [
        name
        for name in lock
        if name in {"baselines", "comparison"} or (variant and name.startswith("evaluation") and name.endswith(f"@{variant}"))
    ]
    reports = {name: at.json(report_of(name)) for name in dict.fromkeys([*found["stages"], *beside])}
    told = from_reports(address, reports, reports[address].get("variant", "") if address == "release" else "")
    stages = {
        name: {**stage, **{key: found["stages"][name][key] for key in ("output", "md5", "inputs")}}
        for name, stage in told["stages"].items()
        if name in found["stages"]
    }
    return {
        **told,
        "model": {**found["model"], **told["model"]},
        "stages": stages,
        "parameters": found["parameters"],
        "code": found["code"],
    }


def issue_date(root: Path, rev: str | None) -> date:
    """The date of the commit that recorded the model.

    Raises:
        InputError: what dvc.lock says is not committed yet.
    """
    status = git(root, "status", "--porcelain", "--", "dvc.lock")
    made = "" if status and rev is None else (git(root, "log", "-1", "--format=%cs", rev or "HEAD", "--", "dvc.lock") or "").strip()
    if not made:
        raise InputError(
            "dvc.lock is not committed, so that no date says when this model was recorded", "commit it, or give --issued YYYY-MM-DD"
        )
    return date.fromisoformat(made)


def export(root: Path, model: str, form: str, rev: str | None = None, issued: date | None = None) -> str:
    """A model's paper in one of FORMATS.

    Args:
        issued: default: the date of the commit that recorded the model.
    Raises:
        InputError: no such model, or one that has no such paper.
    """
    found = papers(root, model, rev)
    address = found["model"]["stage"]
    if form != "openlineage" and address.partition("@")[0] not in MODELS:
        raise InputError(
            f"{address} is no model that was tuned here: it has no {form}", f"name one of {', '.join(MODELS)}, or ask for openlineage"
        )
    return FORMATS[form](found, issued or issue_date(root, rev))


def _card(found: Mapping[str, Any], issued: date) -> str:
    from dagster_project.lineage.export.model_card import model_card

    return model_card({**found, "issued": issued.isoformat()})


def _bom(found: Mapping[str, Any], issued: date) -> str:
    from dagster_project.lineage.export.cyclonedx import bom

    return bom(found, issued)


def _events(found: Mapping[str, Any], issued: date) -> str:
    from dagster_project.lineage.export.openlineage import events

    return events(found, issued)


FORMATS: dict[str, Callable[[Mapping[str, Any], date], str]] = {"model-card": _card, "cyclonedx": _bom, "openlineage": _events}
