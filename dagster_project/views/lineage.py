"""The audit of one model -> one HTML page (markup.py): where it comes from, as a picture and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dagster_project.core.text import commit_text
from dagster_project.views import html

ROW, BOX = 76, 44
"""Pixels from one row of the diagram to the next, and of a box in it."""
LISTED = 200
"""Records that are listed; `--records` writes all."""


def page(found: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Args:
    found: the document of `lineage.document`.
    records: of `lineage.listed`.
    """
    sections = {
        "Lineage": _diagram(found),
        "Sources": _sources(found),
        "Rows": _rows(found),
        "Records": _records(found, records),
        "Checks": _checks(found),
        "Parameters": _named(found["parameters"], "Parameters as they were recorded"),
        "Metrics": _named(
            {f"{stage}, {name}": value for stage, figures in found["metrics"].items() for name, value in figures.items()}, "Metrics"
        ),
        "Code": _code(found),
        "Unknown": _missing(found),
    }
    title = f"Audit of {found['model']['stage']}"
    return html.page(title, _head(found), sections, "Made by <b>pedigree audit</b>. What is unknown is said to be unknown.")


def _head(found: Mapping[str, Any]) -> str:
    model, records = found["model"], found["records"]
    learnt = (records or {}).get("learnt_by", {}).values()
    figures = [
        ("sources", html.number(len(found["sources"])), ""),
        ("records", html.number(records["records"]) if records else "unknown" if found["missing"] else "0", "learnt from"),
        ("steps", html.number(sum(part["steps"] for part in learnt)) if learnt else "–", "in all"),
    ]
    tiles = "".join(f"<div><dt>{name}</dt><dd><b>{value}</b> <span>{unit}</span></dd></div>" for name, value, unit in figures)
    facts = [("output", f"{model['path']}, md5 {model['md5']}"), ("code", commit_text(found["code"]))]
    if base := found["base_model"]:
        digest = base["sha256"].get("model.safetensors", "")
        facts.append(("base model", f"{base['origin']}, {base.get('license', 'unknown')}{f', sha256 {digest}' if digest else ''}"))
    if template := found["chat_template"]:
        facts.append(("chat template", f"{template['name']}, sha256 {template['sha256']}"))
    if found["environment"]:
        facts.append(("made with", ", ".join(f"{name} {version}" for name, version in found["environment"].items())))
    facts.append(("prove it", f"pedigree verify {model['stage']}"))
    listed = "".join(f"<div><dt>{name}</dt><dd>{html.bdi(value)}</dd></div>" for name, value in facts)
    return (
        f'<header class="head"><p class="over">Audit</p><h1>{html.bdi(model["stage"])}</h1>'
        f'<dl class="tiles three">{tiles}</dl><dl class="notes">{listed}</dl></header>'
    )


def _diagram(found: Mapping[str, Any]) -> str:
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
    lines, boxes = "", ""
    for name, row in depth.items():
        wide = min(30.0, 92 / len(rows[row]))
        for parent in parents.get(name, []):
            x1, x2, y1, y2 = place[parent], place[name], depth[parent] * ROW + BOX, row * ROW
            if row == depth[parent] + 1 or abs(x1 - x2) < wide / 2:
                corners: list[tuple[float, float]] = [(x1, y1), (x2, y2)]
            else:  # past the rows between, down and then across
                corners = [(x1, y1), (x1, y2 + BOX / 2), (x2 + (wide / 2 if x1 > x2 else -wide / 2), y2 + BOX / 2)]
            for (xa, ya), (xb, yb) in pairwise(corners):
                lines += f'<line class="line" x1="{xa:.2f}%" x2="{xb:.2f}%" y1="{ya:g}" y2="{yb:g}"/>'
        stage, title = stages.get(name), html.label(name.removeprefix("data/sources/"), 26)
        kind = "node kept" if name in models else "node"
        note = (
            f"{stage['md5'][:12]}{_passed(stage)}"
            if stage
            else f"{found['sources'][name]['rows']} rows, {found['sources'][name]['license']}"
        )
        boxes += (
            f'<rect class="box {kind}" x="{place[name] - wide / 2:.2f}%" y="{row * ROW}" width="{wide:.2f}%" height="{BOX}" rx="6"/>'
            f'<text class="name" x="{place[name]:.2f}%" y="{row * ROW + 18}" text-anchor="middle">{title}</text>'
            f'<text class="soft" x="{place[name]:.2f}%" y="{row * ROW + 35}" text-anchor="middle">{html.text(note, 40)}</text>'
        )
    told = [(name, stage["md5"], ", ".join(stage["parents"]) or "sources", stage["output"]) for name, stage in stages.items()]
    table = html.table("Lineage", ["stage", "md5 of its output", "made from", "output"], told)
    picture = html.svg(f"Lineage of {html.text(found['model']['stage'])}", len(rows) * ROW - ROW + BOX, lines + boxes, "plot lineage")
    return html.figure("Lineage", "every stage with the hash of its output; models in the other colour", picture, table)


def _passed(stage: Mapping[str, Any]) -> str:
    failed = sum(not check["passed"] for check in stage.get("checks", {}).values())
    return f", {failed} of {len(stage['checks'])} checks failed" if failed else ""


def _sources(found: Mapping[str, Any]) -> str:
    columns = ["source", "rows", "format", "license", "origin", "sha256"]
    rows = [
        (path, one["rows"], one["format"], one["license"], one.get("origin", one.get("revision", "")), one.get("sha256", "unknown"))
        for path, one in found["sources"].items()
    ]
    return _sheet("Sources", columns, rows)


def _rows(found: Mapping[str, Any]) -> str:
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
    return _sheet("Rows through the stages", ["stage", "rows in", "rows out", "dropped"], flow) + _sheet(
        "What became of each source's rows", ["source", "stage", "rows"], became
    )


def _records(found: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    if not found["records"]:
        return ""
    columns = ["model", "records", "times seen", "steps", "epochs"]
    parts = [(model, *part.values()) for model, part in found["records"]["learnt_by"].items()]
    rows = [
        (one["example_id"], f"{one['source'] or 'unknown'}:{'' if one['source_row'] is None else one['source_row']}", one["model"],
         ", ".join(f"{step} ({epoch})" for step, epoch in zip(one["steps"], one["epochs"], strict=True)))
        for one in records[:LISTED]
    ]  # fmt: skip
    more = (
        f'<p class="sum">{html.number(len(records) - LISTED)} more: <code>--records FILE.csv</code> writes all.</p>'
        if len(records) > LISTED
        else ""
    )
    listed = html.table("Records", ["record", "source row", "model", "steps (epochs)"], rows)
    return _sheet("Learnt by", columns, parts) + f'<figure class="sheet">{listed}{more}</figure>'


def _checks(found: Mapping[str, Any]) -> str:
    rows = [
        (f"{stage}, {name}", "passed" if one["passed"] else f"failed ({one['severity']})", one["count"], one.get("dropped", 0),
         one.get("waived", 0), one.get("note", ""))
        for stage, facts in found["stages"].items()
        for name, one in facts.get("checks", {}).items()
    ]  # fmt: skip
    columns = ["check", "result", "rows", "dropped", "waived", "note"]
    waived = _named({str(i + 1): waiver for i, waiver in enumerate(found["waivers"])}, "Waivers")
    return _sheet("Checks", columns, rows) + waived


def _code(found: Mapping[str, Any]) -> str:
    code = found["code"]
    rows = list(code["files"].items())
    return f'<p class="lead">{html.bdi(commit_text(code))}</p><figure class="sheet">{html.table("Code", ["file", "md5"], rows)}</figure>'


def _named(values: Mapping[str, Any], caption: str) -> str:
    rows = [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for name, value in values.items()]
    return _sheet(caption, ["name", "value"], rows)


def _missing(found: Mapping[str, Any]) -> str:
    rows = [(one["path"], one["md5"], one["fetch"]) for one in found["missing"]]
    if found["shallow"]:
        rows.append(("history before the first commit", "", "`git fetch --unshallow`: this clone is shallow"))
    return _sheet("Not here", ["what", "md5", "fetch it"], rows)


def _sheet(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return f'<figure class="sheet">{html.table(caption, columns, rows, unfolded=True)}</figure>' if rows else ""
