"""The tables of the data sets that a model was made from: their files by hash, and their columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from dagster_project.core.documents import read_document
from dagster_project.core.errors import InputError
from dagster_project.lineage import tables
from dagster_project.lineage.lineage import Subject
from dagster_project.lineage.rows import LEDGER
from dagster_project.lineage.runs import StageRun, fetch_hint

if TYPE_CHECKING:
    import polars as pl

STAGES = ("instructions", "splits", "preferences")
"""Stages whose outputs are checked records. Their ledgers name the source row of each record."""
FINDINGS = "findings.json"
PROFILE = ("scripts", "categories")
"""Parts of the findings' profile that quote no text."""
_SHARD = re.compile(r"records-\d{5,}\.parquet")
LIST = "[]"
"""After the name of a column or type: a list of them."""


def described(summary: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """The data sets of a summary, for a format that describes those.

    Args:
        what: the format, for the message.
    Raises:
        InputError: nothing in the lineage is a checked data set.
    """
    if not summary["data_sets"]:
        stage = summary["model"]["stage"]
        raise InputError(
            f"{stage} was made from no checked data set: {what} describes those", f"name {', '.join(STAGES)} or a model"
        )
    return dict(summary["data_sets"])


def data_sets(subject: Subject) -> dict[str, dict[str, Any]]:
    """The data sets among the stages that contributed to an output, in flow order.

    Returns:
        stage -> {"path", "md5", "tables": table -> {"files": path in the output -> md5,
        "columns": name -> type, "rows"}, "profile": numbers of the findings; empty if the stage
        wrote none}. A table is `records`, a split, or `ledger`. A type is text, integer, float,
        a name with [] for a list of it, or name -> type of the fields of each item of a list.
    Raises:
        InputError: the files of one are unavailable.
    """
    return {run.address: _data_set(subject, run) for run in subject.contributing if run.address in STAGES}


def _data_set(subject: Subject, run: StageRun) -> dict[str, Any]:
    index = subject.index
    listing = index.files(run.md5)
    grouped: dict[str, dict[str, str]] = {}
    for name, md5 in sorted((listing or {}).items()):
        inside = PurePosixPath(name)
        if _SHARD.fullmatch(inside.name):
            grouped.setdefault(inside.parent.name or "records", {})[name] = md5
        elif name == LEDGER:
            grouped["ledger"] = {name: md5}
    found = {}
    for table, files in grouped.items():
        local = [path for name in files if (path := index.file_path(run.md5, name))]
        if len(local) < len(files):
            raise _unavailable(run)
        columns = {name: _kind(kind) for name, kind in tables.schema(local[0]).items()}
        found[table] = {
            "files": files,
            "columns": columns,
            "rows": sum(tables.read(path, ["example_id"]).height for path in local),
        }
    if not found:
        raise _unavailable(run)
    return {
        "path": run.path,
        "md5": run.md5,
        "tables": found,
        "profile": _profile(subject, run, FINDINGS in (listing or {})),
    }


def _profile(subject: Subject, run: StageRun, written: bool) -> dict[str, Any]:
    if not written:
        return {}
    path = subject.index.file_path(run.md5, FINDINGS)
    if path is None:
        raise _unavailable(run)
    profile = read_document(path, f"{run.path}/{FINDINGS}", f"`dvc checkout --force {run.path}` restores it").get(
        "profile", {}
    )
    return {key: profile[key] for key in PROFILE if isinstance(profile, dict) and isinstance(profile.get(key), dict)}


def _kind(kind: pl.DataType) -> Any:
    import polars as pl

    if isinstance(kind, pl.List):
        inner = kind.inner
        if isinstance(inner, pl.Struct):
            return {field.name: _kind(field.dtype) for field in inner.fields}  # type: ignore[arg-type]
        return f"{_kind(inner)}{LIST}"  # type: ignore[arg-type]
    return "integer" if kind.is_integer() else "float" if kind.is_float() else "text"


def _unavailable(run: StageRun) -> InputError:
    return InputError(f"{run.path} (md5 {run.md5}) is not available, so its files are unknown", fetch_hint([run]))
