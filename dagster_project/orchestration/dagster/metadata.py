"""Metadata and check results of one of Pedigree's assets, from its stage's state, report, pages and plots."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_project.core.context import measured
from dagster_project.core.errors import InputError
from dagster_project.core.layout import pages_of
from dagster_project.core.records import write_text
from dagster_project.core.severity import shown
from dagster_project.core.text import markdown, visible
from dagster_project.lineage import lineage
from dagster_project.lineage.index import Index
from dagster_project.orchestration.dagster.pages import url
from dagster_project.orchestration.dagster_dvc.metadata import commit_of_lock, finite, read_report, table
from dagster_project.orchestration.dvc import StageState
from dagster_project.views.lineage import lineage_page


def describe(root: Path, state: StageState) -> dict[str, Any]:
    """Metadata of a materialization, in the order in which Dagster shows it: results and links to pages first."""
    report = read_report(root, state) or {}
    if report.get("passed") is False:
        report = {}  # a failed attempt without output
    metadata: dict[str, Any] = {}
    board = root / state.out / "board.md"
    if board.is_file():
        metadata["board"] = dg.MetadataValue.md(board.read_text("utf-8"))
    lineage_of = _lineage(root, state)  # writes a page, too
    metadata |= {name: page_url(root, path) for name, path in pages(root, state.address).items()}
    for name in ("rows_in", "rows_out"):
        if name in report:
            metadata[name] = dg.MetadataValue.int(report[name])
    for name in ("dropped", "fixed"):
        if report.get(name):
            metadata[name] = dg.MetadataValue.md(table(["check", "rows"], list(report[name].items())))
    metadata |= {
        name: value
        for name, value in report.items()
        if isinstance(value, int | float | str) and name not in metadata and name not in {"passed", "output_sha256"}
    }
    plots = _plots(root, state, metadata)
    metadata |= {name: value for name, value in tables(report).items() if name not in metadata}
    metadata |= plots | _measured(root, state.address) | lineage_of
    metadata["path"] = dg.MetadataValue.text(state.out)
    metadata["data_version"] = dg.MetadataValue.text(state.version)
    metadata |= {name: report[name] for name in ("output_sha256",) if name in report}
    commit = commit_of_lock(root)
    metadata |= {"git_commit": commit} if commit else {}
    if (folder := pages_of(root, state.address)).is_dir():
        # for readers without `pedigree ui`; `pages` is the link, of which a figure with that name would take the place
        metadata["pages_folder"] = dg.MetadataValue.path(str(folder))
    metadata |= {
        f"check/{name}": dg.MetadataValue.int(check["count"]) for name, check in report.get("checks", {}).items()
    }
    return finite(metadata)


def _plots(root: Path, state: StageState, others: Mapping[str, Any]) -> dict[str, Any]:
    """The plots of a stage as images.

    Args:
        others: metadata whose names a plot does not take.
    """
    found = {}
    stage, _, variant = state.address.partition("@")
    for plot, draw in PLOTS.get(stage, ()):
        path = root / "data" / "plots" / (f"{plot}/{variant}.csv" if variant else f"{plot}.csv")
        if points := _rows_of(path):
            taken = plot in PAGES or plot in others  # `alignment` is the link to the page, `loss` the last loss
            name = f"{plot}_curves" if taken else plot
            found[name] = dg.MetadataValue.md(f"![{plot}](data:image/png;base64,{draw(points, root / state.out)})")
    return found


SHOWN_OTHERWISE = {"dropped", "fixed", "checks"}
"""Mappings of a report that `describe` shows by itself, or not at all."""
COLUMNS = 5
"""Most columns of a table of figures: Dagster's pane is narrow."""
HASH = re.compile("[0-9a-f]{40,64}")


def tables(report: Mapping[str, Any]) -> dict[str, Any]:
    """The mappings and lists of a report, each as a table or a text, and the intervals of its figures as one table."""
    found: dict[str, Any] = {}
    known = {name for name in report if _is_interval(report.get(f"{name}_interval"))}
    if known:
        figures = {name: value for name, value in report.items() if name.removesuffix("_interval") in known}
        found["intervals"] = dg.MetadataValue.md(_table_of(figures))
    for name, value in report.items():
        if name in SHOWN_OTHERWISE or name.removesuffix("_interval") in known:
            continue
        if isinstance(value, Mapping) and value:
            found[name] = dg.MetadataValue.md(_table_of(value))
        elif isinstance(value, list) and any(isinstance(one, str) and " " in one for one in value):
            found[name] = dg.MetadataValue.md("\n".join(f"- {markdown(str(one))}" for one in value))
        elif isinstance(value, Mapping | list):
            found[name] = dg.MetadataValue.text(_text(value))
    return found


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, int | float) for one in value)


def _depth(value: Any) -> int:
    """How many levels of mappings a value has."""
    return 1 + max(map(_depth, value.values()), default=0) if isinstance(value, Mapping) else 0


def _table_of(value: Mapping[str, Any]) -> str:
    """A table of figures: one row for each, or for each mapping of a few figures if there is nothing else."""
    columns = list(dict.fromkeys(name for one in value.values() if isinstance(one, Mapping) for name in one))
    if all(_depth(one) == 1 for one in value.values()) and len(columns) <= COLUMNS:
        rows = [[name, *(_text(one.get(column), column) for column in columns)] for name, one in value.items()]
        return table(["", *columns], rows)
    rows = _rows_of_figures(value)
    if not any(interval for *_, interval in rows):
        return table(["figure", "value"], [row[:2] for row in rows])
    return table(["figure", "value", "95 % interval"], rows)


def _rows_of_figures(value: Mapping[str, Any]) -> list[list[str]]:
    """Name, value and interval of each figure; "a / b" is the name of one inside of a deep mapping."""
    rows: list[list[str]] = []
    for name, one in value.items():
        if name.removesuffix("_interval") in value.keys() - {name} and _is_interval(one):
            continue  # in the row of its figure
        if _depth(one) > 2:
            rows += [[f"{name} / {inner}", *rest] for inner, *rest in _rows_of_figures(one)]
        else:
            rows.append([name, _text(one, name), _text(value.get(f"{name}_interval"), "interval")])
    return rows


def _text(value: Any, name: str = "") -> str:
    """A value of a report in a line: "a 1, b 2" of a mapping, "0.1 to 0.2" of an interval, the beginning of a hash."""
    if value is None or isinstance(value, str):
        return (value or "")[: 16 if HASH.fullmatch(value or "") else None]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        between, after = ("; ", ": ") if _depth(value) > 1 else (", ", " ")
        known = {key: one for key, one in value.items() if one is not None}
        return between.join(f"{key}{after}{_text(one, key)}" for key, one in known.items()) or "none"
    if isinstance(value, list):
        between = " to " if name.endswith("interval") and _is_interval(value) else ", "
        return between.join(map(_text, value)) or "none"
    return f"{value:,}"


def _rows_of(path: Path) -> list[dict[str, str]]:
    """Rows of a table; empty if there is none.

    Labels may have line breaks, also those that the csv module does not quote.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _measured(root: Path, address: str) -> dict[str, Any]:
    """Time and memory of the run and, if it ran on a cluster, where, with a link to Ray's dashboard."""
    found: dict[str, Any] = dict(measured(root, address))
    execution = found.pop("execution", None)
    if execution is None:
        return found
    found["execution"] = dg.MetadataValue.json(execution)
    found["dashboard"] = dg.MetadataValue.url(execution["dashboard"])
    return found


def _lineage(root: Path, state: StageState) -> dict[str, Any]:
    """Metadata of a model: its inputs, the number of records it was trained on, and the command that verifies it.

    Writes its audit as a page.
    """
    if "safetensors" not in (state.meta.get("kinds") or []) or not state.recorded or state.output_problem:
        return {}
    try:
        subject = lineage.find(Index(root), state.address)
    except InputError as error:  # dvc.lock lacks entries of other stages that the committed one has
        return {"lineage": dg.MetadataValue.text(str(error))}
    audited = lineage.document(subject)
    records, _ = lineage.trained_on(subject)
    write_text(pages_of(root, state.address) / "audit.html", lineage_page(audited, lineage.listed(records)))
    rows = []
    for name, one in audited["stages"].items():
        dropped = sum(one.get("dropped", {}).values()) or ""
        rows.append([name, one["md5"][:12], one.get("rows_in", ""), one.get("rows_out", ""), dropped])
    trained_on = {"records": dg.MetadataValue.int(audited["records"]["records"])} if audited["records"] else {}
    return {
        "lineage": dg.MetadataValue.md(table(["stage", "md5", "rows in", "rows out", "dropped"], rows)),
        **trained_on,
        "verify": dg.MetadataValue.text(f"pedigree verify {state.address}"),
    }


def live(root: Path, address: str) -> dict[str, float]:
    """Progress of a running stage: the newest value of each of its live tables, and the step."""
    values: dict[str, float] = {}
    for path in sorted((root / "data" / "live" / address.replace("@", "/")).glob("*.csv")):
        # a new run removes the tables of the previous run; a line that is being appended lacks values
        with suppress(FileNotFoundError, IndexError, KeyError, TypeError, ValueError):
            newest = list(csv.DictReader(path.read_text("utf-8").splitlines()))[-1]
            step, value = int(newest["step"]), float(newest[path.stem])
            values |= {"step": max(step, int(values.get("step", 0))), path.stem: value}
    return values


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
    """Link to a page that `pedigree ui` serves."""
    return dg.MetadataValue.url(url(root, path.relative_to(root / "data" / "pages").as_posix()))


def pages(root: Path, address: str) -> dict[str, Path]:
    """The existing pages of a stage. `dvc checkout` does not restore pages."""
    folder = pages_of(root, address)
    return {name: folder / file for name, file in PAGES.items() if (folder / file).is_file()}


def _cell(value: Any) -> str | float:
    return visible(value) if isinstance(value, str) else value


def severity_of(check: Mapping[str, Any]) -> str | None:
    """Severity of a check result, the same as on the data-quality page.

    Dagster has no severity for remarks: they pass.
    """
    return shown(check["severity"], check["passed"], check["count"])


def check_metadata(root: Path, address: str, check: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of a check in a report, the places of the rows that it found, and a link to the page that shows them.

    Dagster keeps metadata for good, so it never has text of a row, not even where the report of an earlier version
    quotes one.
    """
    metadata: dict[str, Any] = {
        **{name: check.get(name, 0) for name in ("count", "dropped", "waived")},
        **({"fixed": check["fixed"]} if check.get("fixed") else {}),
    }
    if "matches" in check:
        metadata["pairs"] = _table(check["matches"], "place", "other", "part", "rule", "score")
    if "violations" in check:
        metadata["violations"] = _table(check["violations"], "source", "rows", "rule", "why")
    for name, column in (("rows", "source row"), ("details", "details")):
        if name in check:
            metadata[name] = _table([{column: line} for line in check[name]], column)
    if link := pages(root, address).get("report"):
        metadata["full report"] = page_url(root, link)
    return metadata


def _table(rows: Iterable[Mapping[str, Any]], *columns: str) -> dg.TableMetadataValue:
    return dg.MetadataValue.table([dg.TableRecord({name: _cell(row[name]) for name in columns}) for row in rows])


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


def _draw_curves(rows: list[dict[str, str]], out: Path) -> str:
    from matplotlib.figure import Figure

    names = [name for name in rows[0] if name not in {"step", "tokens"}]
    # a fourth column would be cut off in Dagster's dialog
    lines, columns = -(-len(names) // 3), min(3, len(names))
    figure = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    figure.subplots(lines, columns, squeeze=False)
    for axes in figure.axes[len(names) :]:
        figure.delaxes(axes)
    for axes, name in zip(figure.axes, names, strict=True):
        axes.plot([int(row["step"]) for row in rows], [float(row[name]) for row in rows], linewidth=1.2, label=name)
        axes.set(xlabel="step")
        axes.set_title(visible(name), parse_math=False)
        axes.grid(alpha=0.3)
    training = out / "training.json"
    validation = json.loads(training.read_text("utf-8"))["validation"] if training.is_file() else []
    if validation:
        steps, losses = zip(*((p["step"], p["validation_loss"]) for p in validation), strict=True)
        figure.axes[0].plot(steps, losses, marker="o", label="validation_loss")
        for text in figure.axes[0].legend().get_texts():
            text.set_parse_math(False)
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
    highest = max(map(max, counts))
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                color = "white" if count > highest / 2 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=color)
    return _png(figure)


def _draw_calibration(rows: list[dict[str, str]], _: Path) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":", label="perfectly calibrated")
    confidence, accuracy = [float(row["confidence"]) for row in rows], [float(row["accuracy"]) for row in rows]
    axes.plot(confidence, accuracy, marker="o", label="held-out pairs")
    axes.set(xlabel="confidence of the reward model", ylabel="accuracy")
    axes.legend()
    return _png(figure)


PLOTS: dict[str, list[tuple[str, Callable[[list[dict[str, str]], Path], str]]]] = {
    "adapter": [("loss", _draw_curves)],
    "evaluation": [("confusion", _draw_confusion)],
    "reward_model": [("reward", _draw_curves), ("calibration", _draw_calibration)],
    "aligned": [("alignment", _draw_curves)],
    "evaluation_aligned": [("confusion_aligned", _draw_confusion)],
}
"""Stage -> its tables for `dvc plots`, each with the function that draws it."""
