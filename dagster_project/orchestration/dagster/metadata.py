"""Names, metadata and check results of an asset in Dagster, from its stage's state and report."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_project.core.context import measured
from dagster_project.core.git import git
from dagster_project.core.layout import pages_of
from dagster_project.core.records import write_text
from dagster_project.core.severity import shown
from dagster_project.core.text import visible
from dagster_project.lineage import lineage
from dagster_project.lineage.index import Index
from dagster_project.orchestration.dagster.pages import url
from dagster_project.orchestration.dvc import StageState, digest
from dagster_project.pipeline import Pipeline
from dagster_project.views.lineage import page

CODE_VERSION = "1"
"""The same for every asset and for ever: changes of code are reported through `def/<stage>` (docs/decisions/002)."""
REPORT_TAG = "report"
"""Metadata of a check result: hash of what the report says of the check, so that sync can tell whether Dagster knows."""


def asset_key(address: str) -> dg.AssetKey:
    return dg.AssetKey(address.split("@"))


def definition_key(address: str) -> dg.AssetKey:
    return dg.AssetKey(["def", *address.split("@")])


def source_key(path: str) -> dg.AssetKey:
    """ "data/sources/benchmarks" -> sources / benchmarks."""
    return dg.AssetKey(list(Path(path).relative_to("data").parts) if path.startswith("data/") else ["workspace", *Path(path).parts])


def read_report(root: Path, state: StageState) -> dict[str, Any] | None:
    path = root / state.report if state.report else None
    return json.loads(path.read_text()) if path and path.is_file() else None


def describe(root: Path, state: StageState) -> dict[str, Any]:
    """Metadata of a materialization: rows, figures, plots, where it lies, which commit."""
    report = read_report(root, state) or {}
    if report.get("passed") is False:
        report = {}  # of an attempt that made nothing
    found: dict[str, Any] = {}
    board = root / state.out / "board.md"
    if board.is_file():
        found["board"] = dg.MetadataValue.md(board.read_text())
    found["path"] = dg.MetadataValue.text(state.out)
    found["data_version"] = dg.MetadataValue.text(state.version)
    for name in ("rows_in", "rows_out"):
        if name in report:
            found[name] = dg.MetadataValue.int(report[name])
    if report.get("dropped"):
        found["dropped"] = dg.MetadataValue.md(_table(["check", "rows"], list(report["dropped"].items())))
    if report.get("fixed"):
        found["fixed"] = dg.MetadataValue.md(_table(["check", "rows"], list(report["fixed"].items())))
    found |= {
        name: value for name, value in report.items() if isinstance(value, int | float | str) and name not in found and name != "passed"
    }
    if labels := report.get("by_label"):
        columns = list(next(iter(labels.values())))
        rows = [[visible(" ".join(name.split())), *(figures[column] for column in columns)] for name, figures in labels.items()]
        found["by_label"] = dg.MetadataValue.md(_table(["label", *columns], rows))
    nested = {
        name: value for name, value in report.items() if isinstance(value, dict | list) and name not in {"dropped", "fixed", "checks"}
    }
    if nested:
        found["figures"] = dg.MetadataValue.json(nested)
    found |= measured(root, state.address)
    found |= _lineage(root, state)
    found |= {f"check/{name}": dg.MetadataValue.int(check["count"]) for name, check in report.get("checks", {}).items()}
    found |= {name: page_url(root, path) for name, path in pages(root, state.address).items()}
    if (folder := pages_of(root, state.address)).is_dir():
        found["pages"] = dg.MetadataValue.path(str(folder))  # for those who look without `pedigree ui`, which serves them
    stage, _, variant = state.address.partition("@")
    for plot, draw in PLOTS.get(stage, ()):
        path = root / "data" / "plots" / (f"{plot}/{variant}.csv" if variant else f"{plot}.csv")
        if points := list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []:
            found[plot] = dg.MetadataValue.md(f"![{plot}](data:image/png;base64,{draw(points, root / state.out)})")
    commit = _commit(root)
    return {**found, **({"git_commit": commit} if commit else {})}


def _lineage(root: Path, state: StageState) -> dict[str, Any]:
    """Of a model: what it was made from, how many records it learnt from, and how to prove it. Leaves the audit as a page."""
    if "safetensors" not in state.meta.get("kinds", []) or not state.recorded or state.doubt:
        return {}
    subject = lineage.find(Index(root), state.address)
    audited = lineage.document(subject)
    records, _ = lineage.trained_on(subject)
    write_text(pages_of(root, state.address) / "audit.html", page(audited, lineage.listed(records)))
    rows = [
        [name, one["md5"][:12], one.get("rows_in", ""), one.get("rows_out", ""), sum(one.get("dropped", {}).values()) or ""]
        for name, one in audited["stages"].items()
    ]
    learnt = {"records": dg.MetadataValue.int(audited["records"]["records"])} if audited["records"] else {}
    return {
        "lineage": dg.MetadataValue.md(_table(["stage", "md5", "rows in", "rows out", "dropped"], rows)),
        **learnt,
        "verify": dg.MetadataValue.text(f"pedigree verify {state.address}"),
    }


def live(root: Path, address: str) -> dict[str, float]:
    """Where a stage at work has got to: the newest value of each of its live tables, and the step."""
    found: dict[str, float] = {}
    for path in sorted((root / "data" / "live" / address.replace("@", "/")).glob("*.csv")):
        with suppress(FileNotFoundError):  # a run that begins removes those of the run before
            newest = list(csv.DictReader(path.read_text().splitlines()))[-1]
            found = {**found, "step": max(int(newest["step"]), int(found.get("step", 0))), path.stem: float(newest[path.stem])}
    return found


PAGES = {
    "report": "report.html",
    "training": "training.html",
    "alignment": "alignment.html",
    "comparison": "comparison.html",
    "audit": "audit.html",
    "data_docs": "data_docs/index.html",
    "review": "review.csv",
}


def page_url(root: Path, path: Path) -> dg.UrlMetadataValue:
    """Link to a page, which `pedigree ui` serves."""
    return dg.MetadataValue.url(url(root, path.relative_to(root / "data" / "pages").as_posix()))


def pages(root: Path, address: str) -> dict[str, Path]:
    """What the stage left for people to look at, as far as it is there: pages are a view that `dvc checkout` does not bring back."""
    folder = pages_of(root, address)
    return {name: folder / file for name, file in PAGES.items() if (folder / file).is_file()}


def _commit(root: Path) -> str:
    """The commit that holds what dvc.lock says; if it is not committed yet, the one it will follow, with a word that says so."""

    if git(root, "status", "--porcelain", "--", "dvc.lock"):
        head = (git(root, "rev-parse", "--verify", "--quiet", "HEAD") or "").strip()
        return f"{head} with uncommitted changes" if head else ""
    return (git(root, "log", "-1", "--format=%H", "--", "dvc.lock") or "").strip()


def _marked(match: Mapping[str, Any], column: str) -> str | float:
    """A cell of the table of overlaps; what both texts share stands in brackets."""
    value = match[column]
    if column not in {"text", "other_text"}:
        return value
    start, end = match["span" if column == "text" else "other_span"]
    return visible(f"{value[:start]}⟦{value[start:end]}⟧{value[end:]}")


def check_results(root: Path, address: str, report: Mapping[str, Any], pipeline: Pipeline) -> list[dg.AssetCheckResult]:
    """What the report says of each of the stage's checks, as severe as the data-quality page shows it; Dagster has no remarks: they pass.

    `blocking` has already decided the run.
    """
    link = pages(root, address).get("report")
    results = []
    for name, truth in pipeline.check_descriptions(address.partition("@")[0]).items():
        found = report.get("checks", {}).get(name)
        if found is None:
            continue
        severity = shown(found["severity"], found["passed"], found["count"])
        metadata: dict[str, Any] = {
            "truth": truth,
            **{name: found.get(name, 0) for name in ("count", "dropped", "waived")},
            **({"fixed": found["fixed"]} if found.get("fixed") else {}),
            "severity": severity or "none",
            REPORT_TAG: digest([found, severity]),
        }
        if "matches" in found:
            columns = ("place", "other", "part", "rule", "score", "text", "other_text")
            metadata["pairs"] = dg.MetadataValue.table(
                [dg.TableRecord({c: _marked(match, c) for c in columns}) for match in found["matches"]]
            )
        if "rows" in found:
            begins = found.get("examples", [])
            metadata["rows"] = dg.MetadataValue.table(
                [
                    dg.TableRecord({"source row": row, "begins": visible(begins[i]) if i < len(begins) else ""})
                    for i, row in enumerate(found["rows"])
                ]
            )
        if link:
            metadata["full report"] = page_url(root, link)
        if "note" in found:
            metadata["note"] = found["note"]
        results.append(
            dg.AssetCheckResult(
                check_name=name,
                asset_key=asset_key(address),
                passed=severity not in {"error", "warn"},
                severity=dg.AssetCheckSeverity.ERROR if severity == "error" else dg.AssetCheckSeverity.WARN,
                metadata={key: dg.MetadataValue.text(value) if isinstance(value, str) else value for key, value in metadata.items()},
            )
        )
    return results


IN_SYNC = "dvc_in_sync"
IN_SYNC_TRUTH = "DVC calls the stage up to date: its output, inputs, parameters and code are what dvc.lock recorded."


def in_sync(state: StageState) -> dg.AssetCheckResult:
    """The same verdict as `dvc status`."""
    why = "; ".join(state.changed)
    metadata = {"truth": dg.MetadataValue.text(IN_SYNC_TRUTH), REPORT_TAG: dg.MetadataValue.text(digest(why))}
    return dg.AssetCheckResult(
        check_name=IN_SYNC,
        asset_key=asset_key(state.address),
        passed=not why,
        severity=dg.AssetCheckSeverity.WARN,
        metadata=metadata | ({"note": dg.MetadataValue.text(why)} if why else {}),
    )


def _table(head: list[str], rows: list[Any]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return "\n".join(lines + [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows])


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


def _draw_course(rows: list[dict[str, str]], out: Path) -> str:
    from matplotlib.figure import Figure

    names = [name for name in rows[0] if name not in {"step", "tokens"}][:8]
    figure = Figure(figsize=(4 * min(4, len(names)), 3 * -(-len(names) // 4)))
    for axes, name in zip(figure.subplots(-(-len(names) // 4), min(4, len(names)), squeeze=False).flat, names, strict=False):
        axes.plot([int(row["step"]) for row in rows], [float(row[name]) for row in rows], linewidth=1.2, label=name)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
    training = out / "training.json"
    watched = json.loads(training.read_text())["validation"] if training.is_file() else []
    if watched:
        figure.axes[0].plot([p["step"] for p in watched], [p["validation_loss"] for p in watched], marker="o", label="validation_loss")
        figure.axes[0].legend()
    return _png(figure)


def _draw_confusion(rows: list[dict[str, str]], _: Path) -> str:
    from matplotlib.figure import Figure

    names = sorted({row["actual"] for row in rows} | {row["predicted"] for row in rows})
    counts = [[sum(row["actual"] == a and row["predicted"] == p for row in rows) for p in names] for a in names]
    size = max(1, len(names) / 12)
    figure = Figure(figsize=(5 * size, 4.5 * size))
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues")
    ticks = [visible(name if len(name) <= 30 else f"{name[:29]}…") for name in names]
    axes.set_xticks(range(len(names)), ticks, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), ticks, parse_math=False)
    axes.set(xlabel="predicted", ylabel="actual")
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                axes.text(j, i, str(count), ha="center", va="center", color="white" if count > max(map(max, counts)) / 2 else "black")
    return _png(figure)


def _draw_calibration(rows: list[dict[str, str]], _: Path) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":", label="perfectly calibrated")
    axes.plot([float(row["confidence"]) for row in rows], [float(row["accuracy"]) for row in rows], marker="o", label="held-out pairs")
    axes.set(xlabel="how sure the reward model is", ylabel="how often it is right")
    axes.legend()
    return _png(figure)


PLOTS: dict[str, list[tuple[str, Callable[[list[dict[str, str]], Path], str]]]] = {
    "adapter": [("loss", _draw_course)],
    "evaluation": [("confusion", _draw_confusion)],
    "reward_model": [("reward", _draw_course), ("calibration", _draw_calibration)],
    "aligned": [("alignment", _draw_course)],
    "evaluation_aligned": [("confusion_aligned", _draw_confusion)],
}
"""Stage -> the tables it leaves for `dvc plots`, and how to draw them."""
