"""What differs between two models: records, parameters, code, versions, scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster_project.core.text import visible
from dagster_project.lineage.index import SPLIT, Index, Made
from dagster_project.lineage.lineage import NO_FIGURES, Subject, document, fetch, find

SHOWN = 20
"""Records that are shown at a terminal; `--json` has all."""

Place = tuple[str, int | None]


def diff(root: Path, before: str, after: str, rev: str | None = None, against_rev: str | None = None) -> dict[str, Any]:
    """What differs between two models, or between one at two revisions.

    Args:
        rev, against_rev: of `before` and of `after`; "REV:MODEL" says the same.
    Returns:
        {"models", "same", "records", "parameters", "code", "environment", "base_model", "sources", "metrics", "missing"}. "records" has "added",
        "removed", "changed" (another record from the same source row) and "moved" (to another split), each record with its source rows; it is null
        where a data set is not here. The others are {name: [before, after]}, of what differs alone.
    """
    index = Index(root)
    subjects = [find(index, before, rev), find(index, after, against_rev)]
    old, new = (document(subject) for subject in subjects)
    records, missing = _records(subjects[0], subjects[1])
    return {
        "models": [old["model"], new["model"]],
        "same": old["model"]["md5"] == new["model"]["md5"],
        "records": records,
        "parameters": _differing(_flat(old["parameters"]), _flat(new["parameters"])),
        "code": _differing(old["code"]["files"], new["code"]["files"]),
        "environment": _differing(old["environment"], new["environment"]),
        "base_model": _differing(_flat(old["base_model"]), _flat(new["base_model"])),
        "sources": _differing(*({name: facts.get("sha256") for name, facts in one["sources"].items()} for one in (old, new))),
        "metrics": _differing(*(_scores(subject, one) for subject, one in zip(subjects, (old, new), strict=True))),
        "missing": missing,
    }


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [before.get(name), after.get(name)] for name in sorted({*before, *after}) if before.get(name) != after.get(name)}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return found


def _scores(subject: Subject, found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures, by the stage that measured them: a variant's name would keep those of two variants apart."""
    variant = subject.made.address.partition("@")[2]
    named = {name.removesuffix(f"@{variant}") if variant else name: figures for name, figures in found["metrics"].items()}
    return _flat({name: {key: value for key, value in figures.items() if key not in NO_FIGURES} for name, figures in named.items()})


def _records(before: Subject, after: Subject) -> tuple[dict[str, list[dict[str, Any]]] | None, list[dict[str, str]]]:
    """Records by example_id and split, over all that each model and those it was made from were given."""
    given, missing = [], []
    for subject in (before, after):
        rows, lost = _given(subject)
        given.append(rows)
        missing += [{"path": one.path, "md5": one.md5, "fetch": fetch([one])} for one in lost]
    if missing:
        return None, missing
    old, new = given
    gone, come = old.keys() - new.keys(), new.keys() - old.keys()
    rows_before = {place: identity for identity in gone for _, places in [old[identity]] for place in places}
    changed = {
        identity: was
        for identity in come
        for place in new[identity][1]
        if (was := rows_before.get(place)) is not None and place[1] is not None
    }

    def told(identity: str, among: Mapping[str, tuple[list[str], list[Place]]]) -> dict[str, Any]:
        splits, places = among[identity]
        return {
            "example_id": identity,
            "splits": splits,
            "rows": [f"{source}:{row}" if row is not None else source for source, row in places],
        }

    return {
        "added": [told(one, new) for one in sorted(come - changed.keys())],
        "removed": [told(one, old) for one in sorted(gone - set(changed.values()))],
        "changed": [{"before": told(was, old), "after": told(one, new)} for one, was in sorted(changed.items())],
        "moved": [
            {"before": told(one, old), "after": told(one, new)} for one in sorted(old.keys() & new.keys()) if old[one][0] != new[one][0]
        ],
    }, []


def _given(subject: Subject) -> tuple[dict[str, tuple[list[str], list[Place]]], list[Made]]:
    """example_id -> (splits, (source, row) of each), of every data set that was dealt out; and the runs whose output is not here."""
    import pyarrow.parquet as pq

    index = subject.index
    rows: dict[str, tuple[list[str], list[Place]]] = {}
    lost: list[Made] = []
    data = {md5: one for made in subject.models for md5, one in index.data(made).items()}
    for md5, made in data.items():
        files = index.files(md5)
        if files is None:
            lost += [made] if index.deals(made) else []
            continue
        shards = [(split, index.place(md5, name)) for name in files if (found := SPLIT.search(name)) for split in found.groups()]
        if not all(path for _, path in shards):
            lost.append(made)
            continue
        ledger = index.place(md5, "ledger.parquet")
        places: dict[str, list[Place]] = {}
        for row in pq.read_table(ledger, columns=["source", "source_row", "example_id"]).to_pylist() if ledger else []:
            places.setdefault(row["example_id"], []).append((row["source"], row["source_row"]))
        for split, path in shards:
            for row in pq.read_table(path, columns=["example_id", "source"]).to_pylist():
                splits, where = rows.setdefault(row["example_id"], ([], []))
                splits += [split] if split not in splits else []
                where += [place for place in places.get(row["example_id"], [(row["source"], None)]) if place not in where]
    return rows, lost


def as_text(found: Mapping[str, Any]) -> str:
    """The difference for a person at a terminal."""
    lines = [f"{sign} {one['stage']}  {one['path']}  md5 {one['md5']}" for sign, one in zip("-+", found["models"], strict=True)]
    if found["same"]:
        lines.append("the same bytes")
    records = found["records"]
    lines.append("")
    if records is None:
        lines += ["records: unknown, because a data set is not in the cache"]
        lines += [f"  {one['path']}  md5 {one['md5']}\n    fetch it: {one['fetch']}" for one in found["missing"]]
    else:
        lines.append("records: " + (", ".join(f"{len(ones)} {name}" for name, ones in records.items() if ones) or "the same"))
        lines += [f"  + {_record(one)}" for one in records["added"][:SHOWN]]
        lines += [f"  - {_record(one)}" for one in records["removed"][:SHOWN]]
        for one in [*records["changed"][:SHOWN], *records["moved"][:SHOWN]]:
            lines += [f"  - {_record(one['before'])}", f"  + {_record(one['after'])}"]
    for name in ("sources", "base_model", "parameters", "code", "environment", "metrics"):
        if found[name]:
            lines += ["", name.replace("_", " ")]
            lines += [f"  {key}: {_value(name, was)} -> {_value(name, now)}" for key, (was, now) in found[name].items()]
    return "\n".join(lines)


def _record(one: Mapping[str, Any]) -> str:
    rows: Sequence[str] = one["rows"]
    return f"{one['example_id']}  {', '.join(one['splits'])}  {visible(', '.join(rows[:3]))}{' and more' if len(rows) > 3 else ''}"


def _value(name: str, value: Any) -> str:
    if value is None:
        return "none"
    return str(value)[:12] if name in {"sources", "code"} else json.dumps(value, ensure_ascii=False)
