"""The audit of one model -> one HTML page: its lineage, as a picture and as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dagster_project.core.text import commit_text, many, number, visible
from dagster_project.views.declared import declared_table, violations_table
from dagster_project.views.html import Figure, Plot, Table, cut, label, render, shape

ROW, BOX = 76, 44
"""Pixels from one row of the diagram to the next, and height of a box."""
FITTING, LEAST = 6, 160
"""Boxes side by side that a page has room for; with more, pixels for each, and the diagram scrolls."""
LISTED = 200
"""Records listed on the page; `--records` writes all."""


def lineage_page(document: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The page of an audit.

    Args:
        document: the document of `lineage.document`.
        records: of `lineage.listed`.
    """
    metrics = {
        f"{stage}, {name}": value for stage, figures in document["metrics"].items() for name, value in figures.items()
    }
    sections = {
        "Lineage": _diagram(document),
        "Sources": _nonempty(
            _sources(document),
            declared_table(document["sources"]),
            violations_table(document.get("use_policy", {}).get("violations", [])),
            _other_files(document),
        ),
        "Rows": _nonempty(*_rows(document)),
        "Watched": _nonempty(_watched(document)),
        "Records": _records(document, records) if document["records"] else None,
        "Checks": _nonempty(
            _checks(document),
            _mapping_table({str(i + 1): waiver for i, waiver in enumerate(document["waivers"])}, "Waivers"),
        ),
        "Parameters": _nonempty(_mapping_table(document["parameters"], "Recorded parameters"), _other_values(document)),
        "Metrics": _nonempty(_mapping_table(metrics, "Metrics")),
        "Code": {
            "commit": code_text(document["code"]),
            "table": Table("Code", ["file", "hash"], list(document["code"]["files"].items())),
            "others": _nonempty(_other_code(document["code"])),
        },
        "Missing": _nonempty(_missing(document)),
    }
    title = f"Audit of {document['model']['stage']}"
    return render(
        "lineage.jinja",
        title,
        sections,
        stage=document["model"]["stage"],
        figures=_key_figures(document),
        facts=_details(document),
    )


def code_text(code: Mapping[str, Any]) -> str:
    """The commit that contains a model, and whether it contains the code of every stage."""
    if unknown := "; ".join(code.get("unknown", ())):
        return (
            f"commit unknown, without {unknown}"
            if code["commit"] is None
            else f"{commit_text(code)}; it may be an earlier one, in {unknown}"
        )
    if code["commit"] is None or not code.get("uncommitted"):
        return commit_text(code)
    if code.get("shallow"):
        return (
            f"commit {code['commit'][:12]}; the runs of {', '.join(code['uncommitted'])} are"
            " in no commit of this shallow clone (`git fetch --unshallow`)"
        )
    return (
        f"commit {code['commit'][:12]}; the runs of {', '.join(code['uncommitted'])} are uncommitted,"
        f" after {(code['after'] or 'no commit')[:12]}"
    )


def versions_text(versions: Iterable[Mapping[str, Any]]) -> str:
    """Registered versions of a model, e.g. "in production: release v3.0.0; registered: release v2.0.0"."""
    return "; ".join(
        f"{'in ' + ', '.join(one['stages']) if one['stages'] else 'registered'}: {one['artifact']} {one['version']}"
        for one in versions
    )


def _key_figures(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    records = document["records"]
    trained = (records or {}).get("learnt_by", {}).values()
    count = "unknown" if document["missing"] or "order_unknown" in document else "0"
    if records:
        count = number(records["records"])
    return [
        ("sources", number(len(document["sources"])), ""),
        ("records", count, "trained on"),
        ("steps", number(sum(part["steps"] for part in trained)) if trained else "–", "in total"),
    ]


def _details(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = document["model"]
    facts = [("output", f"{model['path']}, md5 {model['md5']}"), ("code", code_text(document["code"]))]
    for base in filter(None, (document["base_model"], *document.get("other_base_models", ()))):
        hashes = weights_text(base["sha256"])
        facts.append(("base model", f"{base['origin']}, {base.get('license', 'unknown')}, {hashes}"))
    facts += [("teacher", teacher_text(one)) for one in document.get("teachers", ())]
    if template := document["chat_template"]:
        facts.append(("chat template", f"{template['name']}, sha256 {template['sha256']}"))
    if policy := document.get("use_policy"):
        facts.append(("use policy", _policy(policy)))
    if "registered" in document:
        facts.append(("version", versions_text(document["registered"])))
    if document["environment"]:
        facts.append(
            ("environment", ", ".join(f"{name} {version}" for name, version in document["environment"].items()))
        )
    for name, others in document.get("other_versions", {}).items():
        facts += [(f"{name} of {', '.join(one['stages'])}", one["value"]) for one in others]
    return [*facts, ("verify with", f"pedigree verify {model['stage']}{_at(document['code'])}")]


def _at(code: Mapping[str, Any]) -> str:
    """The revision to verify: without it, the model of the workspace would be, which can be another one."""
    commit = code["lineage_at"] or (None if code.get("uncommitted") else code["commit"])
    return f" --rev {commit[:12]}" if commit else ""


def teacher_text(teacher: Mapping[str, Any]) -> str:
    """A teacher in words."""
    return (
        f"{visible(teacher['folder'])}, {visible(teacher['license'])},"
        f" learned from by {teacher['training']}, {weights_text(teacher['sha256'])}"
    )


def weights_text(sha256: Mapping[str, str], digits: int = 64) -> str:
    """The hash of the one file of weights, or the name and hash of each.

    Args:
        sha256: of all files of the model, by name.
        digits: hexadecimal digits of each hash.
    """
    weights = {name: digest[:digits] for name, digest in sha256.items() if name.endswith(".safetensors")}
    if len(weights) == 1:
        return f"sha256 {next(iter(weights.values()))}"
    return f"sha256 of {', '.join(map(' '.join, weights.items()))}" if weights else "sha256 unknown"


def _policy(verdict: Mapping[str, Any]) -> str:
    """The verdict in words."""
    day, waiver = verdict["policy"].get("as_of"), verdict.get("waiver")
    words = f"not passed: {many(len(verdict['violations']), 'violation')}" if verdict["violations"] else "passed"
    waived = f"; waived until {waiver['expires']}: {waiver['reason']}" if waiver and verdict["violations"] else ""
    return f"{words}{f', as of {day}' if day else ''}{waived}"


def _diagram(document: Mapping[str, Any]) -> Figure:
    """Sources at the top, the model at the bottom; each stage is in the row after its last input.

    Horizontal positions are in percent.
    """
    stages = document["stages"]
    parents = {
        name: [path for path in document["sources"] if name in document["read_by"][path]] + stage["parents"]
        for name, stage in stages.items()
    }
    depth: dict[str, int] = dict.fromkeys(document["sources"], 0)
    for name in stages:
        depth[name] = 1 + max((depth[parent] for parent in parents[name]), default=-1)
    rows = [[name for name in depth if depth[name] == row] for row in range(max(depth.values(), default=-1) + 1)]
    place: dict[str, float] = {}
    for names in rows:
        preferred = {
            name: sum(place[p] for p in parents.get(name, [])) / len(parents[name]) if parents.get(name) else 50
            for name in names
        }
        names.sort(key=preferred.__getitem__)
        place |= {name: 100 * (i + 0.5) / len(names) for i, name in enumerate(names)}
    models = {one["stage"] for one in document["parents"]} | {document["model"]["stage"]}
    lines, boxes = [], []
    for name, row in depth.items():
        wide = min(30.0, 92 / len(rows[row]))
        for parent in parents.get(name, []):
            x1, x2, y1, y2 = place[parent], place[name], depth[parent] * ROW + BOX, row * ROW
            if row == depth[parent] + 1 or abs(x1 - x2) < wide / 2:
                corners: list[tuple[float, float]] = [(x1, y1), (x2, y2)]
            else:  # around the rows in between: down, then across
                corners = [(x1, y1), (x1, y2 + BOX / 2), (x2 + (wide / 2 if x1 > x2 else -wide / 2), y2 + BOX / 2)]
            for (xa, ya), (xb, yb) in pairwise(corners):
                lines.append(shape("line", class_="line", x1=f"{xa:.2f}%", x2=f"{xb:.2f}%", y1=f"{ya:g}", y2=f"{yb:g}"))
        stage, title, middle = stages.get(name), label(name.removeprefix("data/sources/"), 26), f"{place[name]:.2f}%"
        kind = "box node kept" if name in models else "box node"
        if stage:
            note = f"{stage['md5'][:12]}{_passed(stage)}"
        else:
            note = f"{many(document['sources'][name]['rows'], 'row')}, {document['sources'][name]['license']}"
        boxes += [
            shape(
                "rect",
                class_=kind,
                x=f"{place[name] - wide / 2:.2f}%",
                y=row * ROW,
                width=f"{wide:.2f}%",
                height=BOX,
                rx="6",
            ),
            shape("text", title, class_="name", x=middle, y=row * ROW + 18, text_anchor="middle"),
            shape("text", cut(note, 40), class_="soft", x=middle, y=row * ROW + 35, text_anchor="middle"),
        ]
    cells = [(name, stage["md5"], ", ".join(parents[name]), stage["output"]) for name, stage in stages.items()]
    table = Table("Lineage", ["stage", "md5 of its output", "inputs", "output"], cells)
    widest = max(map(len, rows), default=0)
    width = "100%" if widest <= FITTING else f"{widest * LEAST}"
    picture = Plot(
        f"Lineage of {cut(document['model']['stage'])}",
        len(rows) * ROW - ROW + BOX,
        [*lines, *boxes],
        "plot lineage",
        width,
    )
    return Figure("Lineage", "every stage with the hash of its output; models are in color", picture, table)


def _passed(stage: Mapping[str, Any]) -> str:
    failed = sum(not check["passed"] for check in stage.get("checks", {}).values())
    return f", {failed} of {len(stage['checks'])} checks failed" if failed else ""


def _sources(document: Mapping[str, Any]) -> Table:
    columns = ["source", "rows", "format", "license", "origin", "sha256"]
    rows = []
    for path, one in document["sources"].items():
        origin, sha256 = one.get("origin", one.get("revision", "")), one.get("sha256", "unknown")
        rows.append((path, one["rows"], one["format"], one["license"], origin, sha256))
    return _table("Sources", columns, rows)


def _other_files(document: Mapping[str, Any]) -> Table:
    rows = [
        (path, ", ".join(file["stages"]), file["license"], file.get("sha256", f"md5 {file['md5']}"))
        for path, file in document["other_files"].items()
    ]
    return _table("Other files that contributed", ["file", "read by", "license", "sha256"], rows)


def _watched(document: Mapping[str, Any]) -> Table:
    """Nothing was learned from these: the model was compared with them, or measured by them."""
    watched = document["watched"]
    rows = [(name, f"md5 {stage['md5']}") for name, stage in watched["stages"].items()]
    rows += [(name, f"sha256 {source.get('sha256', 'unknown')}") for name, source in watched["sources"].items()]
    rows += [
        (path, f"sha256 {file['sha256']}" if "sha256" in file else f"md5 {file['md5']}")
        for path, file in watched["other_files"].items()
    ]
    return _table("Compared or only watched", ["stage, source or file", "hash"], rows)


def _rows(document: Mapping[str, Any]) -> tuple[Table, Table]:
    flow = [
        (name, stage["rows_in"], stage["rows_out"], ", ".join(f"{why} {n}" for why, n in stage["dropped"].items()))
        for name, stage in document["stages"].items()
        if "rows_in" in stage
    ]
    outcomes = [
        (path, stage, ", ".join(f"{outcome} {n}" for outcome, n in counts.items()))
        for path, one in document["sources"].items()
        for stage, counts in one["outcomes"].items()
    ]
    return (
        _table("Rows through the stages", ["stage", "rows in", "rows out", "dropped"], flow),
        _table("Outcomes of each source's rows", ["source", "stage", "rows"], outcomes),
    )


def _records(document: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = ["model", "records", "uses", "steps", "epochs"]
    parts = [(model, *part.values()) for model, part in document["records"]["learnt_by"].items()]
    rows = []
    for one in records[:LISTED]:
        place = f"{one['source'] or 'unknown'}:{'' if one['source_row'] is None else one['source_row']}"
        steps = ", ".join(f"{step} ({epoch})" for step, epoch in zip(one["steps"], one["epochs"], strict=True))
        rows.append((one["example_id"], place, one["model"], steps))
    return {
        "models": _nonempty(_table("Models trained on the records", columns, parts)),
        "listed": Table("Records", ["record", "source row", "model", "steps (epochs)"], rows),
        "more": max(0, len(records) - LISTED),
    }


def _checks(document: Mapping[str, Any]) -> Table:
    rows = []
    for stage, facts in document["stages"].items():
        for name, one in facts.get("checks", {}).items():
            result = "passed" if one["passed"] else f"failed ({one['severity']})"
            dropped, waived = one.get("dropped", 0), one.get("waived", 0)
            rows.append((f"{stage}, {name}", result, one["count"], dropped, waived, one.get("note", "")))
    return _table("Checks", ["check", "result", "rows", "dropped", "waived", "note"], rows)


def _mapping_table(values: Mapping[str, Any], caption: str) -> Table:
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in values.items()
    ]
    return _table(caption, ["name", "value"], rows)


def _other_values(document: Mapping[str, Any]) -> Table:
    rows = [
        (key, json.dumps(one["value"], ensure_ascii=False), ", ".join(one["stages"]))
        for key, values in document.get("other_values", {}).items()
        for one in values
    ]
    return _table("Other values of parameters", ["name", "value", "of"], rows)


def _other_code(code: Mapping[str, Any]) -> Table:
    rows = [
        (path, one["value"], ", ".join(one["stages"]))
        for path, others in code.get("other_files", {}).items()
        for one in others
    ]
    return _table("Other versions of code", ["file", "hash", "of"], rows)


def _missing(document: Mapping[str, Any]) -> Table:
    rows = [(one["path"], one["md5"], one["fetch"]) for one in document["missing"]]
    if document["shallow"]:
        rows.append(("history before the first commit", "", "`git fetch --unshallow`: this clone is shallow"))
    return _table("Missing", ["output", "md5", "fetch with"], rows)


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    return Table(caption, columns, rows, folded=False)


def _nonempty(*tables: Table) -> list[Table]:
    """The tables with rows."""
    return [table for table in tables if table.rows]
