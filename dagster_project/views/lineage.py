"""The audit of one model -> one HTML page: where it comes from, as a picture and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dagster_project.core.text import commit_text, number
from dagster_project.views.html import Figure, Plot, Table, cut, label, render, shape

ROW, BOX = 76, 44
"""Pixels from one row of the diagram to the next, and of a box in it."""
LISTED = 200
"""Records that are listed; `--records` writes all."""


def lineage_page(found: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Args:
    found: the document of `lineage.document`.
    records: of `lineage.listed`.
    """
    metrics = {f"{stage}, {name}": value for stage, figures in found["metrics"].items() for name, value in figures.items()}
    sections = {
        "Lineage": _diagram(found),
        "Sources": _sheets(_sources(found)),
        "Rows": _sheets(*_rows(found)),
        "Records": _records(found, records) if found["records"] else None,
        "Checks": _sheets(_checks(found), _named({str(i + 1): waiver for i, waiver in enumerate(found["waivers"])}, "Waivers")),
        "Parameters": _sheets(_named(found["parameters"], "Parameters as they were recorded")),
        "Metrics": _sheets(_named(metrics, "Metrics")),
        "Code": {"commit": commit_text(found["code"]), "table": Table("Code", ["file", "md5"], list(found["code"]["files"].items()))},
        "Unknown": _sheets(_missing(found)),
    }
    title = f"Audit of {found['model']['stage']}"
    return render("lineage.jinja", title, sections, stage=found["model"]["stage"], figures=_figures(found), facts=_facts(found))


def _figures(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    records = found["records"]
    trained = (records or {}).get("learnt_by", {}).values()
    return [
        ("sources", number(len(found["sources"])), ""),
        ("records", number(records["records"]) if records else "unknown" if found["missing"] else "0", "learnt from"),
        ("steps", number(sum(part["steps"] for part in trained)) if trained else "–", "in all"),
    ]


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = found["model"]
    facts = [("output", f"{model['path']}, md5 {model['md5']}"), ("code", commit_text(found["code"]))]
    if base := found["base_model"]:
        digest = base["sha256"].get("model.safetensors", "")
        facts.append(("base model", f"{base['origin']}, {base.get('license', 'unknown')}{f', sha256 {digest}' if digest else ''}"))
    if template := found["chat_template"]:
        facts.append(("chat template", f"{template['name']}, sha256 {template['sha256']}"))
    if found["environment"]:
        facts.append(("made with", ", ".join(f"{name} {version}" for name, version in found["environment"].items())))
    return [*facts, ("prove it", f"pedigree verify {model['stage']}")]


def _diagram(found: Mapping[str, Any]) -> Figure:
    """Sources on top, the model below; each stage in the row after the last of what it reads. Places across are in percent."""
    stages = found["stages"]
    readers = [name for name, stage in stages.items() if "rows_in" in stage and not stage["parents"]] if found["sources"] else []
    parents = {name: list(stage["parents"]) for name, stage in stages.items()}
    for name in readers:
        parents[name] = [*found["sources"], *parents[name]]
    depth: dict[str, int] = dict.fromkeys(found["sources"] if readers else [], 0)
    for name in stages:
        depth[name] = 1 + max((depth[parent] for parent in parents[name]), default=-1)
    rows = [[name for name in depth if depth[name] == row] for row in range(max(depth.values(), default=-1) + 1)]
    place: dict[str, float] = {}
    for names in rows:
        wanted = {name: sum(place[p] for p in parents.get(name, [])) / len(parents[name]) if parents.get(name) else 50 for name in names}
        names.sort(key=wanted.__getitem__)
        place |= {name: 100 * (i + 0.5) / len(names) for i, name in enumerate(names)}
    models = {one["stage"] for one in found["parents"]} | {found["model"]["stage"]}
    lines, boxes = [], []
    for name, row in depth.items():
        wide = min(30.0, 92 / len(rows[row]))
        for parent in parents.get(name, []):
            x1, x2, y1, y2 = place[parent], place[name], depth[parent] * ROW + BOX, row * ROW
            if row == depth[parent] + 1 or abs(x1 - x2) < wide / 2:
                corners: list[tuple[float, float]] = [(x1, y1), (x2, y2)]
            else:  # past the rows between, down and then across
                corners = [(x1, y1), (x1, y2 + BOX / 2), (x2 + (wide / 2 if x1 > x2 else -wide / 2), y2 + BOX / 2)]
            for (xa, ya), (xb, yb) in pairwise(corners):
                lines.append(shape("line", class_="line", x1=f"{xa:.2f}%", x2=f"{xb:.2f}%", y1=f"{ya:g}", y2=f"{yb:g}"))
        stage, title, middle = stages.get(name), label(name.removeprefix("data/sources/"), 26), f"{place[name]:.2f}%"
        kind = "box node kept" if name in models else "box node"
        if stage:
            note = f"{stage['md5'][:12]}{_passed(stage)}"
        else:
            note = f"{found['sources'][name]['rows']} rows, {found['sources'][name]['license']}"
        left, width = f"{place[name] - wide / 2:.2f}%", f"{wide:.2f}%"
        boxes += [
            shape("rect", class_=kind, x=left, y=row * ROW, width=width, height=BOX, rx="6"),
            shape("text", title, class_="name", x=middle, y=row * ROW + 18, text_anchor="middle"),
            shape("text", cut(note, 40), class_="soft", x=middle, y=row * ROW + 35, text_anchor="middle"),
        ]
    cells = [(name, stage["md5"], ", ".join(stage["parents"]) or "sources", stage["output"]) for name, stage in stages.items()]
    table = Table("Lineage", ["stage", "md5 of its output", "made from", "output"], cells)
    picture = Plot(f"Lineage of {cut(found['model']['stage'])}", len(rows) * ROW - ROW + BOX, [*lines, *boxes], "plot lineage")
    return Figure("Lineage", "every stage with the hash of its output; models in the other colour", picture, table)


def _passed(stage: Mapping[str, Any]) -> str:
    failed = sum(not check["passed"] for check in stage.get("checks", {}).values())
    return f", {failed} of {len(stage['checks'])} checks failed" if failed else ""


def _sources(found: Mapping[str, Any]) -> Table:
    columns = ["source", "rows", "format", "license", "origin", "sha256"]
    rows = [
        (path, one["rows"], one["format"], one["license"], one.get("origin", one.get("revision", "")), one.get("sha256", "unknown"))
        for path, one in found["sources"].items()
    ]
    return _sheet("Sources", columns, rows)


def _rows(found: Mapping[str, Any]) -> tuple[Table, Table]:
    flow = [
        (name, stage["rows_in"], stage["rows_out"], ", ".join(f"{why} {n}" for why, n in stage["dropped"].items()))
        for name, stage in found["stages"].items()
        if "rows_in" in stage
    ]
    became = [
        (path, stage, ", ".join(f"{outcome} {n}" for outcome, n in counts.items()))
        for path, one in found["sources"].items()
        for stage, counts in one["outcomes"].items()
    ]
    return (
        _sheet("Rows through the stages", ["stage", "rows in", "rows out", "dropped"], flow),
        _sheet("What became of each source's rows", ["source", "stage", "rows"], became),
    )


def _records(found: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = ["model", "records", "times seen", "steps", "epochs"]
    parts = [(model, *part.values()) for model, part in found["records"]["learnt_by"].items()]
    rows = [
        (one["example_id"], f"{one['source'] or 'unknown'}:{'' if one['source_row'] is None else one['source_row']}", one["model"],
         ", ".join(f"{step} ({epoch})" for step, epoch in zip(one["steps"], one["epochs"], strict=True)))
        for one in records[:LISTED]
    ]  # fmt: skip
    return {
        "models": _sheets(_sheet("Learnt by", columns, parts)),
        "listed": Table("Records", ["record", "source row", "model", "steps (epochs)"], rows),
        "more": max(0, len(records) - LISTED),
    }


def _checks(found: Mapping[str, Any]) -> Table:
    rows = [
        (f"{stage}, {name}", "passed" if one["passed"] else f"failed ({one['severity']})", one["count"], one.get("dropped", 0),
         one.get("waived", 0), one.get("note", ""))
        for stage, facts in found["stages"].items()
        for name, one in facts.get("checks", {}).items()
    ]  # fmt: skip
    return _sheet("Checks", ["check", "result", "rows", "dropped", "waived", "note"], rows)


def _named(values: Mapping[str, Any], caption: str) -> Table:
    rows = [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for name, value in values.items()]
    return _sheet(caption, ["name", "value"], rows)


def _missing(found: Mapping[str, Any]) -> Table:
    rows = [(one["path"], one["md5"], one["fetch"]) for one in found["missing"]]
    if found["shallow"]:
        rows.append(("history before the first commit", "", "`git fetch --unshallow`: this clone is shallow"))
    return _sheet("Not here", ["what", "md5", "fetch it"], rows)


def _sheet(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    return Table(caption, columns, rows, folded=False)


def _sheets(*tables: Table) -> list[Table]:
    """Those with rows."""
    return [table for table in tables if table.rows]
