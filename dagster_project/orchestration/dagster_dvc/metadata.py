"""Metadata and check results of an asset, from its stage's state, metrics and plots."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_project.core.git import git
from dagster_project.core.text import markdown
from dagster_project.orchestration import dvc
from dagster_project.orchestration.dvc import StageState, digest

CODE_VERSION = "1"
"""Constant for all assets: changes of code are reported through `def/<stage>` (docs/decisions/002)."""
RESULT_HASH = "result_hash"
"""Metadata of a check result: hash of the check's entry in the report. By it,
sync detects results that Dagster already has."""
IN_SYNC = "dvc_in_sync"
IN_SYNC_DESCRIPTION = (
    "DVC reports the stage as up to date: its output, inputs, parameters and code are as recorded in dvc.lock."
)
FROZEN = "frozen in dvc.yaml: DVC does not compare its inputs, parameters and code with dvc.lock"
IMAGES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".svg": "svg+xml"}
MAX_IMAGE = 300_000
"""Bytes. The event log keeps metadata of every materialization."""
MAX_ROWS = 50
"""Rows of a plot's table."""
OWN_NAMES = {"path", "data_version", "git_commit", "done"}
"""Metadata that is not from metrics files."""


def read_report(root: Path, state: StageState) -> dict[str, Any] | None:
    """The stage's first metrics file, if it is a mapping."""
    document = dvc.load_document(root / state.report) if state.report else None
    return document if isinstance(document, dict) else None


def damaged_report(root: Path, state: StageState) -> str:
    """A line that names the stage's first metrics file if it cannot be read; empty otherwise."""
    path = root / (state.report or "")
    if not path.is_file() or path.suffix not in dvc.DOCUMENTS or dvc.load_document(path) is not None:
        return ""
    return (
        f"{state.report} cannot be read; restore it with `git checkout HEAD {state.report}`,"
        f" or make it again with `dvc repro {state.address}`"
    )


def describe(root: Path, state: StageState) -> dict[str, Any]:
    """Metadata of a materialization: path, version, metrics, plots and commit."""
    metadata: dict[str, Any] = {
        "path": dg.MetadataValue.text(", ".join(state.outs)),
        "data_version": dg.MetadataValue.text(state.version),
    }
    stems = [Path(path).stem for path in state.metrics]
    for path, stem in zip(state.metrics, stems, strict=True):
        file = stem if stems.count(stem) == 1 else Path(path).with_suffix("").as_posix()
        for name, value in _numbers(dvc.load_document(root / path)):
            metadata[f"{file}/{name}" if len(stems) > 1 or name in OWN_NAMES else name] = value
    for path in state.plots:
        metadata |= _plot(root / path, path)
    commit = commit_of_lock(root)
    return finite({**metadata, **({"git_commit": commit} if commit else {})})


def finite(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with NaN and infinity, e.g. the loss of a diverged training, as texts: Dagster shows them blank."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metadata.items()
    }


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float | str | bool]]:
    """The scalars of a metrics file, each with its dotted path. The section `checks` is shown as checks."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if name or key != "checks":
                yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float | str):
        yield name or "value", value


def _plot(path: Path, name: str) -> dict[str, Any]:
    """An image, or the first rows of a table. Other plots are shown by `dvc plots show`."""
    if not path.is_file():
        return {}
    if path.suffix in IMAGES and path.stat().st_size <= MAX_IMAGE:
        encoded = base64.b64encode(path.read_bytes()).decode()
        return {name: dg.MetadataValue.md(f"![{path.stem}](data:image/{IMAGES[path.suffix]};base64,{encoded})")}
    if path.suffix in {".csv", ".tsv"}:
        rows: list[list[str]] = []
        with path.open(encoding="utf-8", errors="replace", newline="") as file, suppress(csv.Error):
            rows = [*islice(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","), MAX_ROWS + 1)]
        return {name: dg.MetadataValue.md(table(rows[0], rows[1:]))} if rows else {}
    return {}


def commit_of_lock(root: Path) -> str:
    """The commit of dvc.lock; if dvc.lock has uncommitted changes, HEAD with a note."""
    if git(root, "status", "--porcelain", "--", "dvc.lock"):
        head = (git(root, "rev-parse", "--verify", "--quiet", "HEAD") or "").strip()
        return f"{head} with uncommitted changes" if head else ""
    return (git(root, "log", "-1", "--no-follow", "--format=%H", "--", "dvc.lock") or "").strip()


def check_result(
    key: dg.AssetKey,
    name: str,
    description: str,
    check: Mapping[str, Any],
    severity: str | None,
    extra: Mapping[str, Any],
) -> dg.AssetCheckResult:
    """Result of one check of a report.

    Args:
        check: its entry in the report.
        severity: "error", "warn", or anything else for a check that passed.
        extra: metadata in addition to `description`, `severity` and `note`.
    """
    metadata: dict[str, Any] = {
        "description": description,
        **extra,
        "severity": severity or "none",
        RESULT_HASH: digest([check, severity]),
        **({"note": check["note"]} if "note" in check else {}),
    }
    return dg.AssetCheckResult(
        check_name=name,
        asset_key=key,
        passed=severity not in {"error", "warn"},
        severity=dg.AssetCheckSeverity.ERROR if severity == "error" else dg.AssetCheckSeverity.WARN,
        metadata={
            key: dg.MetadataValue.text(value) if isinstance(value, str) else value
            for key, value in finite(metadata).items()
        },
    )


def in_sync(key: dg.AssetKey, state: StageState) -> dg.AssetCheckResult:
    """Result of the check that the stage is up to date. Agrees with `dvc status`."""
    reasons = "; ".join(state.changed)
    note = "; ".join(filter(None, [reasons, FROZEN if state.frozen else ""]))
    metadata = {
        "description": dg.MetadataValue.text(IN_SYNC_DESCRIPTION),
        RESULT_HASH: dg.MetadataValue.text(digest(note)),
    }
    return dg.AssetCheckResult(
        check_name=IN_SYNC,
        asset_key=key,
        passed=not reasons,
        severity=dg.AssetCheckSeverity.WARN,
        metadata=metadata | ({"note": dg.MetadataValue.text(note)} if note else {}),
    )


def table(head: list[str], rows: list[Any]) -> str:
    """A table in Markdown. Cells are plain text."""
    lines = [f"| {' | '.join(map(markdown, head))} |", f"| {' | '.join('---' for _ in head)} |"]
    return "\n".join(lines + [f"| {' | '.join(markdown(str(cell)) for cell in row)} |" for row in rows])
