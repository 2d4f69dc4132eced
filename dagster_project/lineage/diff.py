"""Differences between two models: records, parameters, code, library versions, machines and scores."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dagster_project.core.text import shortened
from dagster_project.lineage import tables
from dagster_project.lineage.certificates import without_deleted
from dagster_project.lineage.code import listed_like
from dagster_project.lineage.history import is_within
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import (
    Subject,
    document,
    find,
    machine_text,
    missing_output,
    trained_on,
    unavailable_reports,
    unrecorded,
)
from dagster_project.lineage.rows import AUGMENTED, LEDGER
from dagster_project.lineage.run_index import SPLIT
from dagster_project.lineage.runs import StageRun

SHOWN = 20
"""Most records of a kind shown in the terminal; `--json` lists all."""

WITHOUT_SPLITS = re.compile(r"records-\d+\.parquet")
"""Shards of a data set without splits."""

SourceRow = tuple[str, int | None]
"""(source, row in it from 0, or None if unknown)."""


@dataclass
class _Record:
    """Where a record is, and where it is from."""

    splits: list[str] = field(default_factory=list)
    rows: list[SourceRow] = field(default_factory=list)
    kind: str = ""
    """How it was made from another record of the same source row: "augmented:paraphrase"; empty for others."""


def diff(root: Path, before: str, after: str, rev: str | None = None, against_rev: str | None = None) -> dict[str, Any]:
    """The differences between two models or data sets, or between two revisions of one.

    Args:
        rev, against_rev: revisions of `before` and `after`; "REV:MODEL" is equivalent.
    Returns:
        {"models", "same", "records", "trained_on", "parameters", "code", "environment", "machine", "base_model",
        "sources", "other_files", "metrics", "missing"}. "records" has "added", "removed", "changed" (another record
        from the same source row) and "moved" (to another split), each record with its source rows; it is null if a data
        set is unavailable or unrecorded. "trained_on" has of each model the number of "records" in training steps, and
        of those that it alone was trained on; null if unknown. The others are {name: [before, after]}, for differing
        values only. If a report is unavailable, values that it would state and that only one of the models has are left
        out.
    """
    index = Index(root)
    subjects = [find(index, before, rev), find(index, after, against_rev)]
    old, new = (document(subject) for subject in subjects)
    records, missing = _records(subjects[0], subjects[1])
    reports = [one for subject in subjects for one in unavailable_reports(index, subject.upstream)]
    stated = partial(_differing, of_both=bool(reports))
    naming = [
        run
        for subject in subjects
        for run in subject.upstream
        if index.reads_sources(run) and index.unavailable_report(run)
    ]
    code = old["code"]["files"], new["code"]["files"]
    unavailable = {path for one in (old, new) for path, facts in one["other_files"].items() if "sha256" not in facts}
    return {
        "models": [old["model"], new["model"]],
        "same": old["model"]["md5"] == new["model"]["md5"],
        "records": records,
        "trained_on": _trained_on(subjects),
        "parameters": _differing(_values(old), _values(new)),
        "code": _differing(
            listed_like(*code) | _others(old["code"].get("other_files", {})),
            listed_like(*reversed(code)) | _others(new["code"].get("other_files", {})),
        ),
        "environment": stated(*(one["environment"] | _others(one.get("other_versions", {})) for one in (old, new))),
        "machine": stated(*(_machines(subject, one) for subject, one in zip(subjects, (old, new), strict=True))),
        "base_model": stated(*(_base_models(one) for one in (old, new))),
        "sources": _differing(_hashes(old["sources"]), _hashes(new["sources"]), of_both=bool(naming)),
        "other_files": _differing(
            _hashes_of_others(old, unavailable), _hashes_of_others(new, unavailable), of_both=bool(naming)
        ),
        "metrics": stated(*(_scores(subject, one) for subject, one in zip(subjects, (old, new), strict=True))),
        "missing": _each_once(missing + reports),
    }


def _each_once(missing: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Missing outputs and reports, which both models may need."""
    keys = ("path", "md5", "fetch")
    return list({(one["path"], one["md5"]): {key: one[key] for key in keys} for one in missing}.values())


def _base_models(audited: Mapping[str, Any]) -> dict[str, Any]:
    """The base model by dotted name, and others in the lineage, numbered."""
    others = enumerate(audited.get("other_base_models", ()), 1)
    return _flat(audited["base_model"] | {f"other {n}": one for n, one in others})


def _hashes(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: facts.get("sha256") for name, facts in sources.items()}


def _hashes_of_others(audited: Mapping[str, Any], whole: Collection[str]) -> dict[str, Any]:
    """The hash of each further file that contributed.

    Args:
        whole: files and folders whose content is unavailable for one of the two models: compared as dvc.lock has them.
    """
    files = audited["other_files"]
    hashes = {path: files[path].get("sha256") for path in files if not any(is_within(path, one) for one in whole)}
    recorded = {path: facts["md5"] for path, facts in files.items()}
    recorded |= {path: md5 for stage in audited["stages"].values() for path, md5 in stage["inputs"].items()}
    return hashes | {path: recorded[path] for path in whole if path in recorded}


def _values(audited: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by dotted name; where stages ran with several values, the others as a list under another name.

    A null can turn off what a parameter that is left out has by default.
    """
    values = _flat(audited["parameters"])
    nulls = {f"{name}, given as null": True for name, value in values.items() if value is None}
    return values | nulls | _others(audited.get("other_values", {}))


def _others(values: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Other values by name, as rows of a difference: {"torch, other values": ["1"]}."""
    return {f"{name}, other values": [one["value"] for one in others] for name, others in values.items()}


def _differing(before: Mapping[str, Any], after: Mapping[str, Any], of_both: bool = False) -> dict[str, list[Any]]:
    """Name -> [before, after] of the values that differ; those of one side only are left out if `of_both`."""
    names = before.keys() & after.keys() if of_both else before.keys() | after.keys()
    return {name: [before.get(name), after.get(name)] for name in sorted(names) if before.get(name) != after.get(name)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _scores(subject: Subject, audited: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics by stage, without the variant's name, so that two variants can be compared."""
    return _flat(_without_variant(subject, audited["metrics"]))


def _machines(subject: Subject, audited: Mapping[str, Any]) -> dict[str, str]:
    """The machine that each stage ran on, if its report has it, in words."""
    machines = _without_variant(subject, audited["machine"])
    return {stage: machine_text(machine) for stage, machine in machines.items()}


def _without_variant(subject: Subject, of_stages: Mapping[str, Any]) -> dict[str, Any]:
    suffix = f"@{subject.run.variant}" if subject.run.variant else ""
    return {name.removesuffix(suffix): value for name, value in of_stages.items()}


def _records(before: Subject, after: Subject) -> tuple[dict[str, list[dict[str, Any]]] | None, list[dict[str, str]]]:
    """Differences in records, over the data sets of each model and of the
    models it was derived from; and the missing outputs."""
    rows_of, missing = [], list[dict[str, str]]()
    for subject in (before, after):
        rows, unavailable = _split_rows(subject)
        rows_of.append(rows)
        lost = [*map(missing_output, unavailable), *unrecorded(subject.index, _up_to_splits(subject))]
        missing += without_deleted(subject.index.root, lost, [model.md5 for model in subject.models])
    if missing:
        return None, missing
    old, new = rows_of
    removed, added = old.keys() - new.keys(), new.keys() - old.keys()
    changed = _changed(
        {one: record for one, record in old.items() if one in removed}, {one: new[one] for one in new if one in added}
    )

    def describe(identity: str, records: Mapping[str, _Record]) -> dict[str, Any]:
        record = records[identity]
        return {
            "example_id": identity,
            "splits": record.splits,
            "rows": [f"{source}:{row}" if row is not None else source for source, row in record.rows],
        }

    return {
        "added": [describe(identity, new) for identity in sorted(added - changed.keys())],
        "removed": [describe(identity, old) for identity in sorted(removed - set(changed.values()))],
        "changed": [
            {"before": describe(former, old), "after": describe(identity, new)}
            for identity, former in sorted(changed.items())
        ],
        "moved": [
            {"before": describe(identity, old), "after": describe(identity, new)}
            for identity in sorted(old.keys() & new.keys())
            if {*old[identity].splits} != {*new[identity].splits}
        ],
    }, []


def _trained_on(subjects: Sequence[Subject]) -> dict[str, list[int]] | None:
    """Numbers of records in training steps of two models, and of those that the other one was not trained on; None if
    they are unknown. With the same data set they differ, for example, if `max_steps` does."""
    steps = [trained_on(subject) for subject in subjects]
    if any(records is None or missing for records, missing in steps):
        return None
    old, new = (set(records["example_id"]) for records, _ in steps if records is not None)
    return {"records": [len(old), len(new)], "alone": [len(old - new), len(new - old)]}


def _changed(removed: Mapping[str, _Record], added: Mapping[str, _Record]) -> dict[str, str]:
    """Added record -> the removed one of the same source row.

    A row can have several records, such as augmented copies: each is paired with one of its kind.
    """
    of_row: dict[tuple[SourceRow, str], list[str]] = defaultdict(list)
    for identity, record in removed.items():
        for row in record.rows:
            of_row[row, record.kind].append(identity)
    changed: dict[str, str] = {}
    taken = set[str]()
    for identity, record in added.items():
        former = (
            one
            for row in record.rows
            if row[1] is not None
            for one in of_row.get((row, record.kind), ())
            if one not in taken
        )
        if (one := next(former, None)) is not None:
            changed[identity] = one
            taken.add(one)
    return changed


def _up_to_splits(subject: Subject) -> list[StageRun]:
    """The runs that a model's data sets with splits are found through."""
    index = subject.index
    upstream = [
        run
        for model in subject.models
        if not index.is_copy(model)
        for run in index.data(model).values()
        if not index.is_split(run)
    ]
    return [*subject.models, *upstream]


def _split_rows(subject: Subject) -> tuple[dict[str, _Record], list[StageRun]]:
    """example_id -> record, over every data set with splits, or of the data set that was asked for itself; and the runs
    whose outputs are unavailable."""
    index = subject.index
    records: dict[str, _Record] = {}
    unavailable = [
        original
        for model in subject.models
        if index.has_unknown_original(model)
        for original in index.unavailable_originals(model)
    ]
    data = {md5: run for model in subject.models if not index.is_copy(model) for md5, run in index.data(model).items()}
    run = subject.run
    own = None if run.is_model or any(map(index.is_split, index.data(run).values())) else run
    for md5, run in (data | ({own.md5: own} if own else {})).items():
        files = index.files(md5)
        if files is None:
            unavailable += [run] if run is own or index.is_split(run) else []
            continue
        names = [(split, name) for name in files if (match := SPLIT.search(name)) for split in match.groups()]
        names += [("", name) for name in files if run is own and WITHOUT_SPLITS.fullmatch(name)]
        shards = [(split, path) for split, name in names if (path := index.file_path(md5, name))]
        if len(shards) < len(names):
            unavailable.append(run)
            continue
        ledger = index.file_path(md5, LEDGER)
        rows_by_id: dict[str, list[SourceRow]] = {}
        kinds: dict[str, str] = {}
        for row in (
            tables.read(ledger, ["source", "source_row", "example_id", "outcome"]).rows(named=True) if ledger else []
        ):
            rows_by_id.setdefault(row["example_id"], []).append((row["source"], row["source_row"]))
            if (row["outcome"] or "").startswith(AUGMENTED):
                kinds[row["example_id"]] = row["outcome"]
        for split, path in shards:
            for row in tables.read(path, ["example_id", "source"]).rows(named=True):
                record = records.setdefault(row["example_id"], _Record(kind=kinds.get(row["example_id"], "")))
                record.splits += [split] if split and split not in record.splits else []
                known = rows_by_id.get(row["example_id"], [(row["source"], None)])
                record.rows += [source_row for source_row in known if source_row not in record.rows]
    return records, unavailable


def as_text(difference: Mapping[str, Any]) -> str:
    """The differences as text for the terminal."""
    from dagster_project.views.texts import text

    stages: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for stage, machines in difference["machine"].items():
        stages[tuple(machine or "unknown" for machine in machines)].append(stage)
    machines = {", ".join(names): pair for pair, names in stages.items()}
    return text("diff", **{**difference, "machine": machines}, shown=SHOWN, value_text=_value)


def _value(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name in {"sources", "other_files", "code"}:
        return ", ".join(str(one)[:12] for one in (value if isinstance(value, list) else [value]))
    whole = value if name == "machine" else json.dumps(value, ensure_ascii=False)
    return shortened(whole) if name == "metrics" else whole  # those of `comparison` have thousands of characters
