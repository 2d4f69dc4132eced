"""Which data, parameters, code and checks made this model? Read from dvc.lock, the reports and git, at any revision."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.core.hashing import md5_of_bytes, md5_of_folder
from dagster_project.core.layout import REPORTS
from dagster_project.core.records import with_license
from dagster_project.core.text import commit_text
from dagster_project.lineage.code import code_in
from dagster_project.lineage.history import LOCK, Revision, blobs, commit_of, is_there, listing_of
from dagster_project.lineage.index import EVIDENCE, WEIGHTS, Index, Made, is_input

if TYPE_CHECKING:
    import pyarrow as pa

ORIGIN = ("origin", "revision", "license", "parameters", "sha256")
"""What a report says of weights that came from elsewhere."""
NO_FIGURES = {"checks", "environment", "passed", "output_sha256"}


@dataclass(frozen=True)
class Subject:
    """The run of a stage that is asked about, and the dvc.lock in which it stands."""

    index: Index
    made: Made
    lock: Mapping[str, Made]

    @cached_property
    def street(self) -> list[Made]:
        """What it was made from, in flow order, and itself last: each run with the very bytes that the next one read."""
        return _flow(self.index, self.made)

    @cached_property
    def models(self) -> list[Made]:
        """The models among them that it was made from, through their parents, and itself last."""
        found: list[Made] = []

        def visit(made: Made) -> None:
            for parent in self.index.parents(made):
                visit(parent)
            if made not in found:
                found.append(made)

        visit(self.made)
        return found

    def report(self, made: Made) -> dict[str, Any]:
        return report_of(self.index, made)


def _flow(index: Index, made: Made) -> list[Made]:
    order: dict[tuple[str, str], Made] = {}  # a stage that made the same bytes twice is one

    def visit(one: Made) -> None:
        for _, _, md5 in one.reads:
            if parent := index.maker(one, md5):
                visit(parent)
        order.setdefault((one.address, one.md5), one)

    visit(made)
    return list(order.values())


def report_of(index: Index, made: Made) -> dict[str, Any]:
    """The report of that very run, from wherever the bytes with its hash lie; empty if nowhere."""
    for out in index.stage(made).get("outs", []):
        if out["path"].startswith(REPORTS) and out["path"].endswith(".json"):
            here = index.root / out["path"]
            content = here.read_bytes() if here.is_file() else b""
            if md5_of_bytes(content) != out["md5"]:
                name = f"{made.commit}:./{out['path']}"
                kept = index.objects.path(out["md5"])
                content = blobs(index.root, [name]).get(name, b"") if made.commit else kept.read_bytes() if kept else b""
            if md5_of_bytes(content) == out["md5"]:
                return dict(json.loads(content))
    return {}


def find(index: Index, model: str, rev: str | None = None) -> Subject:
    """What a name, a path, a content hash or a copied folder stands for; "REV:MODEL" is one at a revision, as git writes it.

    Raises:
        InputError: nothing, or more than one thing, matches.
    """
    before, colon, after = model.partition(":")
    if colon and rev is None and not is_there(Path(model)) and commit_of(index.root, before):
        return find(index, after, before)
    lock = _lock(index, rev)
    wanted = model.rstrip("/").removeprefix("./")
    full = Path(model).absolute()
    if full.is_relative_to(index.root) and full != index.root:
        wanted = wanted if wanted in lock else full.relative_to(index.root).as_posix()
    if wanted in lock:
        return Subject(index, lock[wanted], lock)
    found = [made for made in lock.values() if made.path == wanted or (len(model) >= 6 and made.md5.startswith(model))]
    if len(found) == 1:
        return Subject(index, found[0], lock)
    if found:
        raise InputError(f"{model} could be {', '.join(sorted(m.address for m in found))}", "give more of the hash, or the stage's name")
    hashes = _copied(index, Path(model)) if is_there(Path(model)) else index.starting_with(model) if len(model) >= 6 else []
    if len(hashes) > 1:
        raise InputError(f"{model} could be {', '.join(hashes)}", "give more of the hash")
    if hashes:
        made = next((made for made in index.makers[hashes[0]] if made in lock.values()), index.makers[hashes[0]][0])
        return Subject(index, made, lock if made in lock.values() else _lock(index, made.commit))
    once = [made for made in index.made.values() if model in {made.address, made.path}]
    if once:
        raise InputError(
            f"{model} is not in dvc.lock{f' at {rev}' if rev else ''}; it was, last with md5 {once[-1].md5}",
            f"give --rev {(once[-1].commit or '')[:12]}, or that hash",
        )
    shallow = "; this clone is shallow: `git fetch --unshallow` brings the rest of history" if index.history.shallow else ""
    what = "no output in history holds these files" if is_there(Path(model)) else "no such stage, output path or content hash in dvc.lock"
    raise InputError(f"{model}: {what}", f"known: {', '.join(lock)}{shallow}")


def _lock(index: Index, rev: str | None) -> dict[str, Made]:
    """Raises:
    InputError: the revision does not exist, nothing was run there, or its dvc.lock cannot be read.
    """
    blob = (
        index.history.workspace if rev is None else (git(index.root, "rev-parse", "--verify", "--quiet", f"{rev}:./{LOCK}") or "").strip()
    )
    found = index.at(blob)
    if not found:
        if not Revision(index.root, rev).lock():
            raise InputError(f"dvc.lock{f' at {rev}' if rev else ''} has no stages: nothing has been run", "run `dvc repro` first")
        raise InputError(f"no branch or tag leads to {rev}, so its models are not known", f"give it a name: `git branch NAME {rev}`")
    return found


def _copied(index: Index, place: Path) -> list[str]:
    """Hashes of the outputs that a file or folder is a copy of: all of it or, if files were added or left out, its weights."""
    listing = listing_of(place)
    if place.is_file():
        return index.outs_with(listing[""])
    whole = md5_of_folder(listing)
    if whole in index.makers:
        return [whole]
    weights = [md5 for name, md5 in listing.items() if name.endswith(WEIGHTS)]
    holders = [set(index.outs_with(md5)) & index.makers.keys() for md5 in weights]
    return sorted(set.intersection(*holders)) if holders else []


def audit(root: Path, model: str, rev: str | None = None) -> dict[str, Any]:
    """The lineage of one output; see `document`."""
    return document(find(Index(root), model, rev))


def document(subject: Subject) -> dict[str, Any]:
    """The lineage of one output.

    Returns:
        "model"; "sources" with sha256, rows, license and what became of the rows; "base_model"; "stages" in flow order, each with its output's hash,
        inputs, rows and checks; "records" it learnt from; "parents", the models it was made from; "parameters" as they were recorded; "waivers";
        "chat_template"; "code" with commit and file hashes; "environment"; "metrics"; "missing" outputs, for which something is unknown; "shallow".
    """
    index, made, street = subject.index, subject.made, subject.street
    reports = {one: subject.report(one) for one in street}
    names = _names(street)
    parameters = {
        key: value for one in street for values in index.stage(one).get("params", {}).values() for key, value in (values or {}).items()
    }
    ledgers = {one: _ledger(index, one) for one in street if not one.weights}
    records, missing = trained_on(subject)
    sources = {name: with_license(facts) for report in reports.values() for name, facts in report.get("sources", {}).items()}
    for name, facts in sources.items():
        facts["outcomes"] = {
            names[one.path, one.md5]: counts
            for one, found in ledgers.items()
            if (counts := _of_source(found, name)) and counts != {"read": facts.get("rows")}
        }
    return {
        "model": {"stage": made.address, "path": made.path, "md5": made.md5},
        "sources": sources,
        "base_model": next((_origin(r) for r in reports.values() if {"origin", "sha256"} <= r.keys()), {}),
        "stages": {names[one.path, one.md5]: _stage(index, one, reports[one], names) for one in street},
        "records": _counted(records),
        "parents": [{"stage": one.address, "path": one.path, "md5": one.md5, **_dated(index, one)} for one in subject.models[:-1]],
        "parameters": parameters,
        "waivers": [waiver for value in parameters.values() if isinstance(value, dict) for waiver in value.get("waivers") or []],
        "chat_template": next((r["template"] for r in reversed(reports.values()) if "template" in r), None),
        "code": _code(index, made),
        "environment": next((r["environment"] for r in reversed(reports.values()) if "environment" in r), {}),
        "metrics": _metrics(subject, reports[made]),
        "missing": missing,
        "shallow": index.history.shallow,
    }


def _origin(report: Mapping[str, Any]) -> dict[str, Any]:
    facts = with_license(report)
    return {key: facts[key] for key in ORIGIN if key in facts}


def _names(street: Iterable[Made]) -> dict[tuple[str, str], str]:
    """(path, hash) -> address, told apart where two versions of a stage had a part in it."""
    found: dict[tuple[str, str], str] = {}
    for made in street:
        found[made.path, made.md5] = f"{made.address} {made.md5[:8]}" if made.address in found.values() else made.address
    return found


def _dated(index: Index, made: Made) -> dict[str, Any]:
    """The first commit whose dvc.lock holds this output's hash."""
    first = index.makers[made.md5][0]
    earlier = {"or_earlier": True} if first.commit in index.history.boundary else {}
    return {"commit": first.commit, **earlier}


def _code(index: Index, made: Made) -> dict[str, Any]:
    """The code that first made these bytes, and whether the commit that recorded them holds it.

    Returns:
        {"commit", "clean", "files": {path: md5}} as `code_in` gives them; also "differs" (paths that the commit holds otherwise), "made_again" (a later commit, where other code
        made the same bytes) and "after" (the commit that the uncommitted work stands on), where they apply.
    """
    first = index.makers[made.md5][0]
    files, differs = code_in(index.root, first.commit, [index.stage(one) for one in _flow(index, first)])
    if first.commit is None:
        return {**_dated(index, made), "clean": False, "after": commit_of(index.root, "HEAD"), "files": files}
    again = {"made_again": made.commit} if made.commit not in {None, first.commit} else {}
    return {**_dated(index, made), "clean": not differs, **({"differs": differs} if differs else {}), **again, "files": files}


def _stage(index: Index, made: Made, report: Mapping[str, Any], names: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    shown = ("passed", "severity", "blocking", "count", "dropped", "fixed", "waived", "note")
    checks = {name: {key: found[key] for key in shown if key in found} for name, found in report.get("checks", {}).items()}
    parents = {names[path, md5] for _, path, md5 in made.reads if (path, md5) in names}
    splits = {name: report[name] for name in ("train", "validation", "test") if isinstance(report.get(name), int)}
    return {
        "output": made.path,
        "md5": made.md5,
        "inputs": {dep["path"]: dep.get("md5", "") for dep in index.stage(made).get("deps", []) if is_input(dep["path"])},
        "parents": [name for name in names.values() if name in parents],
        **{key: report[key] for key in ("rows_in", "rows_out", "dropped", "fixed") if key in report},
        **({"examples": splits} if splits else {}),
        **({"checks": checks} if checks else {}),
        **({} if report else {"report": "unknown"}),
    }


def _ledger(index: Index, made: Made) -> dict[tuple[str, str], int]:
    """(source, outcome) -> rows; empty where the ledger is not here."""
    import pyarrow.parquet as pq

    path = index.place(made.md5, "ledger.parquet")
    if path is None:
        return {}
    rows = pq.read_table(path, columns=["source", "outcome"]).group_by(["source", "outcome"]).aggregate([([], "count_all")]).to_pylist()
    return {(row["source"], row["outcome"]): row["count_all"] for row in sorted(rows, key=lambda row: (row["source"], row["outcome"]))}


def _of_source(found: Mapping[tuple[str, str], int], name: str) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for (source, outcome), n in found.items():
        if source == name or source.startswith(name.rstrip("/") + "/"):
            counted[outcome] += n
    return dict(counted)


def trained_on(subject: Subject) -> tuple[pa.Table | None, list[dict[str, str]]]:
    """Every example that went through a training step of the model, or of a model it was made from, in the order seen.

    Returns:
        A table of model, example_id, step, epoch, source and source_row (null where it is not known), or None if nothing tells; and what is
        missing, each with path, md5 and how to fetch it.
    """
    import pyarrow as pa

    index = subject.index
    tables, missing = [], []
    for made in subject.models:
        files = index.files(made.md5)
        data = list(index.data(made).values())
        if files is None:
            if data:  # else it learnt nothing by itself
                missing.append(_missing(made))
            continue
        if EVIDENCE not in files or any(index.weights(made.md5) <= index.weights(parent.md5) for parent in index.parents(made)):
            continue  # a copy of its parent learnt nothing by itself, though the evidence went along
        path = index.place(made.md5, EVIDENCE)
        if path is None:
            missing.append(_missing(made))
            continue
        places, lost = _places(index, data)
        missing += [one for one in lost if one not in missing]
        tables.append(_placed(made.address, path, places))
    return (pa.concat_tables(tables) if tables else None), missing


def _placed(model: str, evidence: Path, places: Mapping[str, tuple[str, int | None]]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(evidence, columns=["example_id", "step", "epoch"])
    ids = table["example_id"].to_pylist()
    found = [places.get(identity, (None, None)) for identity in ids]
    table = table.add_column(0, "model", pa.array([model] * len(ids), pa.string()))
    table = table.append_column("source", pa.array([source for source, _ in found], pa.string()))
    return table.append_column("source_row", pa.array([row for _, row in found], pa.int64()))


def _places(index: Index, data: Iterable[Made]) -> tuple[dict[str, tuple[str, int | None]], list[dict[str, str]]]:
    """example_id -> (source, source_row) by the ledgers of the data sets that are dealt out; and what is missing."""
    import pyarrow.parquet as pq

    found: dict[str, tuple[str, int | None]] = {}
    missing = []
    for one in data:
        files = index.files(one.md5)
        if not index.deals(one) or (files is not None and "ledger.parquet" not in files):
            continue
        path = index.place(one.md5, "ledger.parquet")
        if path is None:
            missing.append(_missing(one))
            continue
        for row in pq.read_table(path, columns=["source", "source_row", "example_id"]).to_pylist():
            found.setdefault(row["example_id"], (row["source"], row["source_row"]))
    return found, missing


def _missing(made: Made) -> dict[str, str]:
    return {"stage": made.address, "path": made.path, "md5": made.md5, "fetch": fetch([made])}


def fetch(made: Sequence[Made]) -> str:
    """How to bring back outputs that are not in the cache."""
    commit = next((one.commit for one in reversed(made) if one.commit), None)
    back = f"`git checkout {commit[:12]}`, then " if commit and not all(one.here for one in made) else ""
    names = " ".join(dict.fromkeys(one.address for one in made))
    return f"{back}`dvc pull {names}`, or `dvc repro {names}` where no remote has it"


def _counted(records: pa.Table | None) -> dict[str, Any] | None:
    """How many records, in how many steps; None if that is not known, or it learnt nothing."""
    import pyarrow.compute as pc

    if records is None:
        return None
    parts = {
        model: {
            "records": len(pc.unique(part["example_id"])),
            "views": part.num_rows,
            "steps": pc.max(part["step"]).as_py() or 0,
            "epochs": pc.max(part["epoch"]).as_py() or 0,
        }
        for model in pc.unique(records["model"]).to_pylist()
        for part in [records.filter(pc.equal(records["model"], model))]
    }
    return {"records": len(pc.unique(records["example_id"])), "learnt_by": parts}


def listed(records: pa.Table | None) -> list[dict[str, Any]]:
    """One entry for each record and model that learnt from it, with all its steps."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in records.to_pylist() if records is not None else []:
        one = found.setdefault(
            (row["model"], row["example_id"]),
            {**{key: row[key] for key in ("example_id", "source", "source_row", "model")}, "steps": [], "epochs": []},
        )
        one["steps"].append(row["step"])
        one["epochs"].append(row["epoch"])
    return list(found.values())


def write_trained_on(records: pa.Table | None, path: Path) -> None:
    """The table of `trained_on` to a CSV or Parquet file.

    Raises:
        InputError: there is none, or the file cannot be written.
    """
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    if records is None:
        raise InputError(f"--records {path}: no record is known that it learnt from", "`pedigree audit MODEL` says what is missing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".csv":
            csv.write_csv(records, path)
        else:
            pq.write_table(records, path, compression="zstd")
    except OSError as error:
        raise InputError(f"--records {path}: {error.strerror or error}", "name a file that can be written") from None


def _metrics(subject: Subject, report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the stage itself, and of what was measured on its very output, or on a model made of it, in the same dvc.lock."""
    found = {subject.made.address: report}
    waiting = [subject.made]
    while waiting:
        made = waiting.pop()
        for reader in subject.lock.values():
            if reader.address not in found and any(md5 == made.md5 for _, _, md5 in reader.reads):
                if reader.weights:
                    waiting.append(reader)
                else:
                    found[reader.address] = subject.report(reader)
    return {name: {key: value for key, value in figures.items() if key not in NO_FIGURES} for name, figures in found.items()}


def as_text(found: dict[str, Any]) -> str:
    """The audit for a person at a terminal."""
    model, code = found["model"], found["code"]
    lines = [f"{model['stage']}  {model['path']}  md5 {model['md5']}", "", f"code       {commit_text(code)}; {len(code['files'])} files"]
    if found["base_model"]:
        base = found["base_model"]
        lines += [
            f"base model {base['origin']}, {base.get('license', 'unknown')}, sha256 {base['sha256'].get('model.safetensors', '')[:16]}"
        ]
    lines += [f"made from  {one['stage']}  md5 {one['md5']}" for one in found["parents"]]
    lines += [f"learnt by  {line}" for line in told_records(found)]
    if template := found["chat_template"]:
        lines += [f"template   {template['name']}, sha256 {template['sha256'][:16]}"]
    if found["environment"]:
        lines += [f"made with  {', '.join(f'{name} {version}' for name, version in found['environment'].items())}"]
    lines += ["", "sources"]
    for path, source in found["sources"].items():
        origin = f", {source['origin']}" if source.get("origin") else ""
        lines.append(f"  {path}  {source['rows']} rows, {source['format']}, {source['license']}{origin}, sha256 {source['sha256'][:16]}")
        if flow := "; ".join(f"{stage}: {_told(outcomes)}" for stage, outcomes in source["outcomes"].items()):
            lines.append(f"    {flow}")
    lines += ["", "stages"]
    for name, stage in found["stages"].items():
        rows = f"  {stage['rows_in']} rows in, {stage['rows_out']} out" if "rows_in" in stage else ""
        drops = f"  dropped: {_told(stage['dropped'])}" if stage.get("dropped") else ""
        drops += f"  repaired: {_told(stage['fixed'])}" if stage.get("fixed") else ""
        split = f"  {_told(stage['examples'])}" if "examples" in stage else ""
        lines.append(f"  {name:<16} {stage['md5'][:12]}{rows}{drops}{split}{_told_checks(stage)}")
    lines += [f"waived     {json.dumps(waiver, ensure_ascii=False)}" for waiver in found["waivers"]]
    lines += ["", "parameters"]
    lines += [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in found["parameters"].items()]
    lines += ["", "metrics"]
    lines += [f"  {name}  {key}: {json.dumps(value)}" for name, metrics in found["metrics"].items() for key, value in metrics.items()]
    if found["missing"]:
        lines += ["", "unknown, because it is not in the cache"]
        lines += [f"  {one['path']}  md5 {one['md5']}\n    fetch it: {one['fetch']}" for one in found["missing"]]
    return "\n".join(lines)


def told_records(found: Mapping[str, Any]) -> list[str]:
    if found["records"] is None:
        return ["unknown: see below"] if found["missing"] else []
    return [
        f"{model}: {part['records']} records, {part['views']} times in {part['steps']} steps and {part['epochs']} epochs"
        for model, part in found["records"]["learnt_by"].items()
    ]


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def _told_checks(stage: Mapping[str, Any]) -> str:
    if "report" in stage:
        return "  report unknown"
    checks = stage.get("checks", {})
    failed = [name for name, check in checks.items() if not check["passed"]]
    waived = {name: check["waived"] for name, check in checks.items() if check.get("waived")}
    said = f"  {len(checks) - len(failed)} of {len(checks)} checks passed" if checks else ""
    said += f", not {', '.join(failed)}" if failed else ""
    return said + (f"; waived: {_told(waived)}" if waived else "")
