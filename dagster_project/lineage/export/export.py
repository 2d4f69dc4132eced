"""`pedigree export`: the lineage of a model in formats that other tools read.
Same lineage, same text; only the issue date is an argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.lineage import code_lock
from dagster_project.lineage.export import registry
from dagster_project.lineage.export.data_sets import data_sets
from dagster_project.lineage.export.summary import from_reports, published_parameters
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import Subject, document, find, unavailable_reports, unrecorded
from dagster_project.lineage.provider import provider
from dagster_project.lineage.runs import StageRun

MODELS = ("adapter", "aligned", "reward_model", "merged", "merged_aligned", "release")
"""Stages whose output is a model that this project trained."""


MEASURING = ("baselines", "evaluation", "evaluation_aligned", "comparison")
"""Stages that measure a model, or what it is compared with."""


def summarize(subject: Subject) -> dict[str, Any]:
    """`from_reports`, completed with what dvc.lock and git record: hashes,
    inputs, parameters, and the commit of every stage.

    Everything comes from the dvc.lock that contains the model: its reports are
    found by hash, whatever the workspace contains.
    """
    index, audit = subject.index, document(subject)
    address = subject.run.address
    contributing = dict(zip(audit["stages"], subject.contributing, strict=True))
    reports = {name: index.report(run) for name, run in contributing.items()}
    reports |= {run.address: index.report(run) for run in measuring(subject) if run not in contributing.values()}
    released = reports[address].get("variant", "") if address == "release" else ""
    summary = from_reports(address, reports, released, audit["waivers"], audit.get("teachers", ()))
    commits = audit["code"]["stages"]
    stages = {
        name: {
            **stage,
            **{key: audit["stages"][name][key] for key in ("output", "md5", "inputs", "parents")},
            "made_from": _names_of(contributing[name].made_from().values(), contributing),
            **_recorded(index, commits.get(name)),
            **_ran(index, contributing[name]),
        }
        for name, stage in summary["stages"].items()
        if name in audit["stages"]
    }
    return {
        **summary,
        "model": {**audit["model"], **summary["model"]},
        "stages": stages,
        "watched": list(audit["watched"]["stages"]),
        "watched_by": audit.get("watched_by", []),
        "parameters": published_parameters(audit["parameters"]),
        "code": audit["code"],
        "outcomes": {path: source["outcomes"] for path, source in audit["sources"].items()},
        "checks": {name: stage.get("checks", {}) for name, stage in audit["stages"].items()},
        "records": audit["records"],
        "other_files": audit["other_files"],
    }


def _names_of(runs: Iterable[StageRun], known: Mapping[str, StageRun]) -> list[str]:
    """Names of some runs, of those that are known."""
    outputs = {(run.path, run.md5) for run in runs}
    return [name for name, run in known.items() if (run.path, run.md5) in outputs]


def measuring(subject: Subject) -> list[StageRun]:
    """The runs in the model's dvc.lock that measure it, or what it is compared with, in flow order."""
    candidates = [run for run in subject.lock.values() if run.stage in MEASURING]
    candidates += [run for run in subject.upstream if run.stage in MEASURING and run not in candidates]
    known = {run.md5 for run in subject.upstream}
    found = []
    for run in sorted(candidates, key=lambda one: MEASURING.index(one.stage)):
        reads = {producer.md5 for producer in run.producers.values()}
        upstream = {one.md5 for one in Subject(subject.index, run, subject.lock).upstream}
        is_part = run in subject.upstream or subject.run.md5 in upstream
        if reads <= known if run.address == "baselines" else is_part:
            found.append(run)
    return found


def _recorded(index: Index, code: Mapping[str, Any] | None) -> dict[str, Any]:
    """The first commit that contains a stage's run, and its date. Where a
    shallow clone begins, an earlier one may contain it: the date is unknown."""
    commit = code["commit"] if code else None
    earlier = {"or_earlier": True} if commit in index.history.boundary else {}
    dated = _date_of(index.root, commit) if commit and not earlier else None
    return {"commit": commit, **earlier, "date": dated and dated.isoformat(), "clean": code["clean"] if code else None}


def _ran(index: Index, run: StageRun) -> dict[str, Any]:
    """The command of a stage, and the parameters that it read."""
    entry = index.lock_entry(run)
    read = {file: found for file, found in entry.get("params", {}).items() if file != code_lock.FILE}
    values = {key: value for found in read.values() for key, value in (found or {}).items()}
    command = {"cmd": entry["cmd"]} if isinstance(entry.get("cmd"), str) else {}
    return {**command, "parameters": published_parameters(values)}


@cache
def _date_of(root: Path, commit: str) -> date | None:
    """None for a date before 1970 or after 9999, which git or calendars do not have."""
    try:
        return date.fromisoformat(
            (git(root, "show", "--no-patch", "--no-show-signature", "--format=%cs", commit) or "").strip()
        )
    except ValueError:
        return None


def issue_date(subject: Subject) -> date:
    """The date of the first commit that recorded the model: later commits do not change it.

    Raises:
        InputError: no commit contains the model, or this clone is shallow and does not show which was the first.
    """
    commit = subject.index.first_commit_with(subject.run)
    if commit is None:
        raise InputError(
            "dvc.lock is not committed, so the model has no issue date", "commit it, or give --issued YYYY-MM-DD"
        )
    if commit in subject.index.history.boundary:
        raise InputError(
            "this clone is shallow, so the commit that recorded the model, and with it the issue date, is unknown",
            "`git fetch --unshallow`, or give --issued YYYY-MM-DD",
        )
    if (dated := _date_of(subject.index.root, commit)) is None:
        raise InputError(
            f"commit {commit[:12]}, which recorded the model, has no valid date", "give --issued YYYY-MM-DD"
        )
    return dated


def export(root: Path, model: str, form: str, rev: str | None = None, issued: date | None = None) -> str:
    """A model in one of `registry.formats()`.

    Args:
        issued: default: the date of the first commit that recorded the model.
    Raises:
        InputError: unknown model, a stage that the format cannot describe, or a
            model whose lineage is not recorded completely.
    """
    chosen = registry.find(form)
    subject = find(Index(root), model, rev)
    refuse(subject, model, form)
    tables = {"data_sets": data_sets(subject)} if chosen.data_sets else {}
    return chosen.write(
        summarize(subject) | tables | {"provider": provider(root, subject.rev)}, issued or issue_date(subject)
    )


def refuse(subject: Subject, model: str, form: str | None = None) -> None:
    """Args:
        form: None for a folder of all formats.
    Raises:
        InputError: the format cannot describe the stage, or the lineage is not recorded completely.
    """
    chosen, address = registry.find(form) if form else None, subject.run.address
    if not (chosen and chosen.any_stage) and address.partition("@")[0] not in MODELS:
        raise InputError(
            f"{address} is not a model that this project trained:"
            f" {f'{form} cannot describe it' if form else '--all needs a model'}",
            f"name one of {', '.join(MODELS)}, or use --format with one of {', '.join(registry.of_any_stage())}",
        )
    if not chosen or not chosen.any_stage or chosen.data_sets:
        _refuse_unknown_lineage(subject, model)


def _refuse_unknown_lineage(subject: Subject, model: str) -> None:
    """Refuse to describe a model whose sources are partly unknown, as if there were no others.

    Raises:
        InputError: nothing records an input, or a recorded report is unavailable.
    """
    index = subject.index
    lost = [one["path"] for one in unrecorded(index, subject.contributing)]
    lost += (
        [one.path for one in index.unavailable_originals(subject.run)]
        if index.has_unknown_original(subject.run)
        else []
    )
    lost += [one["path"] for one in unavailable_reports(index, subject.contributing)]
    if lost:
        raise InputError(
            f"{subject.run.address}: {', '.join(dict.fromkeys(lost))}: not recorded or not available, so the sources of"
            " the model are unknown",
            f"`pedigree audit {model}` says what is missing",
        )
