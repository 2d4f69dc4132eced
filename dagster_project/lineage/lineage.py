"""Audits a model at any revision: the data, parameters, code and checks behind
it, from dvc.lock, the reports and git."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.files import replacing
from dagster_project.core.git import git
from dagster_project.core.hashing import md5_of_folder
from dagster_project.core.records import with_license
from dagster_project.core.text import many, visible
from dagster_project.curation.left_out import LEFT_OUT
from dagster_project.curation.sources import use_policy
from dagster_project.curation.sources.declarations import NAMES, UNKNOWN, declared_of, with_unknown
from dagster_project.lineage import code_lock, registered, tables
from dagster_project.lineage.certificates import without_deleted
from dagster_project.lineage.code import code_in
from dagster_project.lineage.graph import closure, flow_order
from dagster_project.lineage.history import (
    LOCK,
    Revision,
    commit_of,
    is_within,
    listing_of,
    path_exists,
    refuse_lost_entries,
)
from dagster_project.lineage.index import Index
from dagster_project.lineage.rows import ANSWERS, EVIDENCE, LEDGER, ORDER_UNKNOWN, record_key, rewarded_answers
from dagster_project.lineage.run_index import WEIGHTS
from dagster_project.lineage.runs import StageRun, fetch_hint, is_input, outputs, teacher_of
from dagster_project.lineage.sources import other_files

if TYPE_CHECKING:
    import polars as pl

ORIGIN = ("origin", "revision", "license", "parameters", "sha256")
"""Keys of a report on imported weights."""
NOTHING_RECORDS_IT = "no commit and no entry of DVC's run cache has the run that produced it"
NOWHERE = "in no commit and no cache here"
CODE_SHOWN = 5
"""Most files in several versions that the terminal shows."""
SHALLOW = "the commits that this shallow clone lacks (`git fetch --unshallow` brings them)"
IF_ANY = {
    "other_base_models", "teachers", "watched_by", "answers", "order_unknown", "other_values", "other_versions",
}  # fmt: skip
"""Keys of an audit that are left out where there is nothing to say."""
NON_METRICS = {"checks", "environment", "machine", "passed", "output_sha256"}
"""Keys of a report that are not metrics."""


@dataclass(frozen=True)
class Subject:
    """The stage run to audit, with the dvc.lock that contains it."""

    index: Index
    run: StageRun
    lock: Mapping[str, StageRun]
    rev: str | None = None
    """The revision that was asked for; None: the workspace, or whichever commit has a content hash."""

    @cached_property
    def upstream(self) -> list[StageRun]:
        """All upstream runs in flow order, and the run itself last.

        The hash of each output is the one that its reader recorded. Two runs of a stage with the same bytes count as
        one: the one that the output was made from, or else the first.
        """
        order: dict[tuple[str, str], StageRun] = {}

        def producers(run: StageRun) -> list[StageRun]:
            return [run.producers[md5] for _, _, md5 in run.inputs if md5 in run.producers]

        for run in flow_order([self.run], producers):
            known = order.setdefault((run.address, run.md5), run)
            if known not in self._contributing and run in self._contributing:
                order[run.address, run.md5] = run
        return list(order.values())

    def name(self, run: StageRun) -> str:
        """Name of a run of `upstream` or `models`: the address of its stage, or address and hash.

        Of several versions of a stage, the address alone is that of the model itself, or else of the one in its
        dvc.lock, or else of the first.
        """
        return run.address if self._plain[run.address] == run.md5 else f"{run.address} {run.md5[:8]}"

    @cached_property
    def _plain(self) -> dict[str, str]:
        """Address of a stage -> hash of the version that it names alone."""
        first: dict[str, str] = {}
        for run in (self.run, *(run for run in self.upstream if self._is_current(run)), *self.upstream, *self.models):
            first.setdefault(run.address, run.md5)
        return first

    def _is_current(self, run: StageRun) -> bool:
        current = self.lock.get(run.address)
        return current is not None and current.md5 == run.md5

    @cached_property
    def contributing(self) -> list[StageRun]:
        """Those of `upstream` that the output was made from.

        The others were compared with it or only watched: a release is chosen by a comparison of all variants but made
        from one model, and DPO measures itself by a reward model but learns from pairs.
        """
        return [run for run in self.upstream if run in self._contributing]

    @cached_property
    def _contributing(self) -> dict[StageRun, None]:
        """The runs that the output was made from."""
        return closure(
            [self.run], lambda run: self.index.parents(run) if self.index.is_copy(run) else run.made_from().values()
        )

    @cached_property
    def models(self) -> list[StageRun]:
        """The models it was derived from, directly or indirectly, and the run itself last."""
        return flow_order([self.run], self.index.parents)

    @cached_property
    def watchers(self) -> list[tuple[StageRun, StageRun]]:
        """(model, training) of the models that only measured a training of `models`: nothing was learned from them."""
        found = [(watcher, model) for model in self.models for watcher in self.index.watchers(model)]
        return [(watcher, model) for watcher, model in found if watcher not in self._contributing]


def find(index: Index, model: str, rev: str | None = None) -> Subject:
    """The run that a name, a path, a content hash or a copied folder or file refers to.

    "REV:MODEL" refers to a revision, as in git.

    Raises:
        InputError: nothing matches, or more than one run does.
    """
    revision, colon, name = model.partition(":")
    if colon and name and rev is None and not path_exists(Path(model)) and commit_of(index.root, revision):
        return find(index, name, revision)
    lock = {} if _has_history_only(index, rev) else _lock(index, rev)
    target = model.rstrip("/").removeprefix("./")
    digest = model.lower() if re.fullmatch("[0-9a-fA-F]{6,}", model) else model
    absolute = Path(model).absolute()
    if absolute.is_relative_to(index.root) and absolute != index.root:
        target = target if target in lock else absolute.relative_to(index.root).as_posix()
    if target in lock:
        return Subject(index, lock[target], lock, rev)
    matches = [
        run
        for run in index.outputs_in_lock(_blob(index, rev))
        if run.path == target or (len(model) >= 6 and run.md5.startswith(digest))
    ]
    if len(matches) == 1:
        return Subject(index, matches[0], lock, rev)
    if matches:
        raise InputError(
            f"{model} could be {', '.join(sorted(m.address for m in matches))}",
            "give more of the hash, or the stage's name",
        )
    if path_exists(Path(model)):
        hashes = _originals(index, _outputs_copied_to(index, Path(model)), lock)
    else:
        hashes = index.outputs_with_prefix(digest) if len(model) >= 6 else []
    if len(hashes) > 1:
        hint = "give one of these hashes, or the file of the weights" if path_exists(Path(model)) else "give more of it"
        raise InputError(f"{model} could be {', '.join(hashes)}", hint)
    if not hashes:
        raise _not_found(index, model, rev, lock)
    runs = index.runs_by_output[hashes[0]]
    run = next((run for run in runs if run in lock.values()), runs[0])
    if run not in lock.values() and (run.commit or run.in_workspace):
        lock = _lock(index, run.commit)
    return Subject(index, run, lock, rev)


def _not_found(index: Index, model: str, rev: str | None, lock: Mapping[str, StageRun]) -> InputError:
    """The error for a name, path or hash that nothing matches: what was looked for, and what there is."""
    former = [run for run in index.runs.values() if model in {run.address, run.path}]
    if former:
        last = next((run for run in reversed(former) if run.commit), former[-1])
        return InputError(
            f"{model} is not in dvc.lock{f' at {rev}' if rev else ''}; it was before, last with md5 {last.md5}",
            f"give --rev {last.commit[:12]}, or that hash" if last.commit else "give that hash",
        )
    is_path = path_exists(Path(model))
    what = "no such stage, output path or content hash in dvc.lock"
    if is_path:
        what = "no output in history contains these files"
    revision, _, name = model.partition(":")
    if name and not name.startswith("//") and rev is None and not is_path:  # "//": an address such as s3://bucket
        what = f"there is no revision {visible(revision)} here, and {what}"
    known = "there is no dvc.lock here; of another commit give REV:MODEL or a content hash"
    if lock:
        known = f"known: {', '.join(lock)}"
    if index.history.shallow:
        known += "; this clone is shallow: `git fetch --unshallow` fetches the rest of the history"
    return InputError(f"{model}: {what}", known)


def _has_history_only(index: Index, rev: str | None) -> bool:
    """Whether the workspace has no dvc.lock, and the committed state none
    either, e.g. on a new branch, while models of other commits are known."""
    return (
        rev is None
        and index.history.workspace is None
        and bool(index.runs)
        and git(index.root, "cat-file", "-e", f"HEAD:./{LOCK}") is None
    )


def _blob(index: Index, rev: str | None) -> str | None:
    """Hash of the dvc.lock in the workspace (`rev` None) or at a revision; None or empty if there is none."""
    if rev is None:
        return index.history.workspace
    named = git(index.root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}:./{LOCK}") if rev else ""
    return (named or "").strip()


def _lock(index: Index, rev: str | None) -> dict[str, StageRun]:
    """Address -> run of the dvc.lock in the workspace (`rev` None) or at a revision.

    Raises:
        InputError: the revision does not exist, nothing was run there, or its dvc.lock cannot be read.
    """
    runs = index.runs_in_lock(_blob(index, rev))
    if not runs:
        where = f"dvc.lock{f' at {rev}' if rev else ''}"
        if not any(map(outputs, Revision(index.root, rev).lock().values())):
            raise InputError(f"{where} has no stages with an output: nothing has been run", "run `dvc repro` first")
        raise InputError(
            f"{rev} is not reachable from any branch, tag or reflog, so its models are unknown",
            f"create a branch: `git branch NAME {rev}`",
        )
    if rev is None:
        refuse_lost_entries(index.root)
    return runs


def _outputs_copied_to(index: Index, path_on_disk: Path) -> list[str]:
    """Hashes of the outputs that a file or folder is a copy of, compared as a
    whole or, if files were added or removed, by weights and then by all files."""
    listing = listing_of(path_on_disk)
    if path_on_disk.is_file():
        return index.outputs_with_file(listing[""])
    whole = md5_of_folder(listing)
    if whole in index.runs_by_output:
        return [whole]
    weights = [md5 for name, md5 in listing.items() if name.endswith(WEIGHTS)]
    holders = [set(index.outputs_with_file(md5)) for md5 in weights]
    return _most_like(index, set.intersection(*holders), listing) if holders else []


def _most_like(index: Index, hashes: Iterable[str], listing: Mapping[str, str]) -> list[str]:
    """Those of the outputs of which all files are in a folder, or else any of
    them, that have the most files in common with it."""
    files = {md5: index.files(md5) or {} for md5 in hashes}
    common = {md5: sum(listing.get(name) == one for name, one in found.items()) for md5, found in files.items()}
    ranks = {md5: (0 < len(found) == common[md5], common[md5]) for md5, found in files.items()}
    return sorted(md5 for md5, rank in ranks.items() if rank == max(ranks.values()))


def _originals(index: Index, hashes: Sequence[str], lock: Mapping[str, StageRun]) -> list[str]:
    """Of several outputs with the same weights those that are not copies of another one of them, as a release is; if
    there are several, those of the given lock."""
    runs = {md5: index.runs_by_output[md5] for md5 in hashes}
    made = [md5 for md5, found in runs.items() if not any(index.is_copy(run) for run in found)] or [*runs]
    here = [md5 for md5 in made if any(run in lock.values() for run in runs[md5])]
    return sorted(made if len(made) == 1 or not here else here)


def audit(root: Path, model: str, rev: str | None = None) -> dict[str, Any]:
    """The lineage of one output, as `document`, and its registered versions: "registered", if it has any."""
    subject = find(Index(root), model, rev)
    return document(subject) | registered.of_model(root, subject.run.md5)


def document(subject: Subject, as_of: date | None = None) -> dict[str, Any]:
    """The lineage of one output: what `pedigree audit --json` prints. Its keys are listed in docs/audit.md.

    Args:
        as_of: the day for which the use policy is judged, instead of its own.
    Raises:
        InputError: `as_of` is given, and the model has no use policy.
    """
    index, run, upstream, name = subject.index, subject.run, subject.upstream, subject.name
    reports = {stage: index.report(stage) for stage in upstream}
    entries = {stage: index.lock_entry(stage) for stage in upstream}
    made_from = {stage: reports[stage] for stage in subject.contributing}
    watched = {stage: reports[stage] for stage in upstream if stage not in made_from}
    parameters, others = _with_others(_parameters({name(stage): entries[stage] for stage in made_from}), name(run))
    versions, other_versions = _with_others(
        (
            (name(stage), *version)
            for stage in reversed(made_from)
            for version in made_from[stage].get("environment", {}).items()
        ),
        name(run),
    )
    sources, read_by = _sources(subject, made_from)
    watched_sources, _ = _sources(subject, watched, sources)
    waivers = _waivers(parameters.values())
    waivers += [
        one for one in _waivers(other["value"] for values in others.values() for other in values) if one not in waivers
    ]
    judged = use_policy.judged([*made_from.values()], waivers, as_of)
    if as_of and not judged:
        raise InputError(
            f"{run.address}: its data was read without a use policy", "set raw_examples.use_policy and run `dvc repro`"
        )
    base, *other_bases = _base_models(made_from.values()) or [{}]
    records, missing = trained_on(subject)
    missing += unrecorded(index, subject.contributing) + unavailable_reports(index, upstream)
    found = {
        "model": {"stage": run.address, "path": run.path, "md5": run.md5},
        "sources": sources,
        "read_by": read_by,
        "other_files": other_files(index, {stage: entries[stage] for stage in made_from}, name, sources),
        "base_model": base,
        "other_base_models": other_bases,
        "teachers": _teachers({name(stage): entries[stage] for stage in made_from}),
        "stages": {name(stage): _stage(subject, stage, report, made_from) for stage, report in made_from.items()},
        "watched": {
            "stages": {name(stage): _stage(subject, stage, report, upstream) for stage, report in watched.items()},
            "sources": {source: facts for source, facts in watched_sources.items() if source not in sources},
            "other_files": other_files(
                index, {stage: entries[stage] for stage in watched}, name, sources | watched_sources
            ),
        },
        "watched_by": [
            {"stage": watcher.address, "path": watcher.path, "md5": watcher.md5, "training": subject.name(model)}
            for watcher, model in subject.watchers
        ],
        "records": _training_counts(records),
        "answers": _rewarded(subject),
        "order_unknown": _unordered(subject),
        "parents": [
            {"stage": stage.address, "path": stage.path, "md5": stage.md5, **_commit_facts(index, stage)}
            for stage in subject.models[:-1]
        ],
        "parameters": parameters,
        "other_values": others,
        "waivers": waivers,
        **judged,
        "chat_template": next((r["template"] for r in reversed(made_from.values()) if "template" in r), None),
        "code": _code(subject),
        "environment": versions,
        "other_versions": other_versions,
        "machine": {name(stage): report["machine"] for stage, report in reports.items() if "machine" in report},
        "metrics": _metrics(subject, reports[run]),
        "missing": without_deleted(index.root, missing, [model.md5 for model in subject.models]),
        "shallow": index.history.shallow,
    }
    return {key: value for key, value in found.items() if value or key not in IF_ANY}


def _base_models(reports: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The imported weights that reports state, each once."""
    weights = [with_license(report) for report in reports if {"origin", "sha256"} <= report.keys()]
    found = [{key: facts[key] for key in ORIGIN if key in facts} for facts in weights]
    return list({json.dumps(one, sort_keys=True): one for one in found}.values())


def _unordered(subject: Subject) -> list[str]:
    """Models whose training command did not record the order of the examples."""
    index = subject.index
    return [
        subject.name(model)
        for model in subject.models
        if ORDER_UNKNOWN in (index.files(model.md5) or {}) and not index.is_copy(model)
    ]


def _waivers(values: Iterable[Any]) -> list[Any]:
    return [waiver for value in values if isinstance(value, dict) for waiver in value.get("waivers") or []]


def _teachers(entries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = {address: teacher_of(address, entry) for address, entry in entries.items()}
    return [{"training": address, **teacher} for address, teacher in found.items() if teacher]


def _parameters(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """The recorded parameters of stages: stage, name and value of each."""
    for stage, entry in entries.items():
        for file, values in entry.get("params", {}).items():
            if file != code_lock.FILE:
                yield from ((stage, key, value) for key, value in (values or {}).items())


def _with_others(
    values: Iterable[tuple[str, str, Any]], model: str
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The value of each name, and where stages differ, the other values with the stages that have them.

    Args:
        values: (stage, name, value). The value is that of the model's own stage, or else the first in this order.
    """
    # name -> value as JSON -> value, and the stages that have it
    found: dict[str, dict[str, tuple[Any, list[str]]]] = {}
    for stage, name, value in values:
        found.setdefault(name, {}).setdefault(json.dumps(value, sort_keys=True), (value, []))[1].append(stage)
    chosen, others = {}, {}
    for name, known in found.items():
        first, *rest = sorted(known.values(), key=lambda pair: model not in pair[1])
        chosen[name] = first[0]
        if rest:
            others[name] = [{"value": value, "stages": stages} for value, stages in rest]
    return chosen, others


def _sources(
    subject: Subject,
    reports: Mapping[StageRun, Mapping[str, Any]],
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """The sources that reports name, with the outcomes of their rows in every stage.

    Where several versions of a source were read, the hash is appended to the name of all but the first, and the
    outcomes of each are those of the stages after it.

    Args:
        known: sources that have their names already.
    Returns:
        The sources, and for each the names of the stages that read it.
    """
    sources: dict[str, dict[str, Any]] = {}
    versions: dict[str, dict[str, set[StageRun]]] = {}  # source -> name of each version -> the runs that read it
    for run, report in reports.items():
        for source, facts in report.get("sources", {}).items():
            first, sha256 = {**sources, **(known or {})}.get(source, facts), facts.get("sha256")
            name = source if first.get("sha256") == sha256 else f"{source} {(sha256 or 'unknown')[:8]}"
            sources[name] = with_unknown(facts, source)
            versions.setdefault(source, {}).setdefault(name, set()).add(run)
    ledgers = {stage: _ledger_counts(subject.index, stage) for stage in reports if not stage.is_model}
    read_by: dict[str, list[str]] = {}
    for source, readers in versions.items():
        for name, runs in readers.items():
            read_by[name] = [subject.name(run) for run in reports if run in runs]
            sources[name]["outcomes"] = {
                subject.name(stage): counts
                for stage, counted in ledgers.items()
                if ([*readers] == [source] or runs & closure([stage], lambda one: one.producers.values()).keys())
                and (counts := _outcomes_of_source(counted, source))
                and counts != {"read": sources[name].get("rows")}
            }
    return sources, {name: read_by[name] for name in sources}


def _commit_facts(index: Index, run: StageRun) -> dict[str, Any]:
    """The first commit that records this run, and what is unknown of the
    history before it; without one, the first that has the same bytes.

    Returns:
        {"commit"}. Where applicable also "same_bytes_at" (an earlier commit, in
        which another run gave the same output), "or_earlier", and "unknown".
    """
    first = index.first_commit_with(run)
    commit = index.first_commit(run) or first
    same = {"same_bytes_at": first} if first != commit else {}
    earlier = {"or_earlier": True} if commit in index.history.boundary else {}
    is_lost = index.history.unreadable if commit is None else commit in index.history.moved
    lost = [
        *(index.history.lost if is_lost else ()),
        *([SHALLOW] if commit is None and _may_be_before(index, run) else ()),
    ]
    return {"commit": commit, **same, **earlier, **({"unknown": lost} if lost else {})}


def _may_be_before(index: Index, run: StageRun) -> bool:
    """Whether a run that no commit here contains may be in one that a shallow
    clone lacks: it is not one that only the workspace has."""
    return index.history.shallow and not run.in_workspace


def _code(subject: Subject) -> dict[str, Any]:
    """The code behind a run, stage by stage, and whether the commit that first
    recorded the run of each stage contains its code.

    Returns:
        {"commit": the first that records this run of the model, "lineage_at": the first that also records all stages
        before it, if it contains the code and parameters of all, else None, "clean", "files": {path: md5} as in
        `code_in`, "stages": {address: {"commit", "clean"}}}. Where applicable also "differs" (paths with other content
        in the commit of their stage, also per stage), "other_files" (other content of a file in "files", which stages
        ran with: {path: [{"value": md5, "stages"}]}), "uncommitted" (stages whose run no commit contains), "shallow"
        (commits that a shallow clone lacks may contain them), "same_bytes_at" (an earlier commit, in which another run
        gave the same bytes), "after" (the commit that uncommitted work is based on), and "package"
        (`code_lock.compare`), if the package is installed and not part of the project.
    """
    by_commit: dict[str | None, dict[str, dict[str, Any]]] = {}
    index, run, order = subject.index, subject.run, subject.upstream
    for stage in order:
        by_commit.setdefault(index.first_commit(stage), {})[subject.name(stage)] = index.lock_entry(stage)
    recorded = {name: code_lock.recorded_in(entry) for entries in by_commit.values() for name, entry in entries.items()}
    code = {
        name: (commit, *found)
        for commit, entries in by_commit.items()
        for name, found in code_in(index.root, commit, entries).items()
    }
    files, other_files = _with_others(
        ((name, path, md5) for name in map(subject.name, reversed(order)) for path, md5 in code[name][1].items()),
        subject.name(run),
    )
    stages = {}
    for name in map(subject.name, order):
        commit, _, differing = code[name]
        stages[name] = {
            "commit": commit,
            "clean": commit is not None and not differing,
            **({"differs": differing} if differing else {}),
        }
    differs = sorted({path for _, _, differing in code.values() for path in differing})
    uncommitted = [name for name, stage in stages.items() if stage["commit"] is None]
    may_be_before = any(
        _may_be_before(index, stage) for stage in order if stages[subject.name(stage)]["commit"] is None
    )
    return {
        **_commit_facts(index, run),
        "lineage_at": _commit_with_all(
            index, {name: entry for entries in by_commit.values() for name, entry in entries.items()}, order
        ),
        "clean": all(stage["clean"] for stage in stages.values()),
        **({"differs": differs} if differs else {}),
        **({"uncommitted": uncommitted, "after": commit_of(index.root, "HEAD")} if uncommitted else {}),
        **({"shallow": True} if may_be_before else {}),
        "files": dict(sorted(files.items())),
        **({"other_files": dict(sorted(other_files.items()))} if other_files else {}),
        "stages": stages,
        **({"package": code_lock.compare(index.root, recorded)} if any(recorded.values()) else {}),
    }


def _commit_with_all(index: Index, entries: Mapping[str, Mapping[str, Any]], runs: Sequence[StageRun]) -> str | None:
    """The first commit whose dvc.lock has all these runs, if it contains the code and parameters of all."""
    commit = index.first_commit_with_all(runs)
    if commit is None or any(differing for _, differing in code_in(index.root, commit, entries).values()):
        return None
    return commit


def _stage(subject: Subject, run: StageRun, report: Mapping[str, Any], others: Iterable[StageRun]) -> dict[str, Any]:
    """A stage with its outputs, inputs and checks.

    Args:
        others: runs that may be its parents.
    """
    keys = ("passed", "severity", "blocking", "count", "dropped", "fixed", "waived", "note")
    checks = {
        name: {key: check[key] for key in keys if key in check} for name, check in report.get("checks", {}).items()
    }
    read = {(path, md5) for _, path, md5 in run.inputs}
    splits = {name: report[name] for name in ("train", "validation", "test") if isinstance(report.get(name), int)}
    return {
        "output": run.path,
        "md5": run.md5,
        "inputs": {
            dep["path"]: dep.get("md5", "")
            for dep in subject.index.lock_entry(run).get("deps", [])
            if is_input(dep["path"])
        },
        "parents": [subject.name(one) for one in others if (one.path, one.md5) in read],
        **{key: report[key] for key in ("rows_in", "rows_out", "dropped", "fixed") if key in report},
        **({"examples": splits} if splits else {}),
        **({"checks": checks} if checks else {}),
        **({} if report else {"report": "unknown"}),
    }


def _ledger_counts(index: Index, run: StageRun) -> dict[tuple[str, str], int]:
    """(source, outcome) -> rows; empty if the ledger is unavailable."""
    paths = [
        index.file_path(run.md5, name)
        for name in (LEDGER, LEFT_OUT)
        if name == LEDGER or name in (index.files(run.md5) or {})
    ]
    found: dict[tuple[str, str], int] = {}
    for path in paths:
        if path is None:
            return {}
        rows = tables.read(path, ["source", "outcome"]).group_by("source", "outcome").len().rows()
        found |= {(source, outcome): count for source, outcome, count in sorted(rows)}
    return found


def _outcomes_of_source(counts: Mapping[tuple[str, str], int], name: str) -> dict[str, int]:
    outcomes: Counter[str] = Counter()
    for (source, outcome), n in counts.items():
        if is_within(source, name):
            outcomes[outcome] += n
    return dict(outcomes)


def trained_on(subject: Subject) -> tuple[pl.DataFrame | None, list[dict[str, str]]]:
    """Every example in a training step of the model or of a model it was derived from, in training order.

    Returns:
        A table of model, example_id, step, epoch, source and source_row (null if unknown), or None without evidence;
        and the missing outputs, each with path, md5 and the commands that fetch it. Where other rows have the same
        record, dropped as copies or kept, `also_in` lists them: "faq.jsonl:3, b.csv:0".
    """
    import polars as pl

    index = subject.index
    trainings, missing = [], []
    for run in subject.models:
        if index.has_unknown_original(run):
            missing += [missing_output(one) for one in index.unavailable_originals(run)]
            continue
        files = index.files(run.md5)
        data = list(index.data(run).values())
        if files is None:
            if data:  # otherwise it was not trained itself
                missing.append(missing_output(run))
            continue
        if EVIDENCE not in files or index.is_copy(run):
            continue  # a copy of its parent was not trained itself, although the evidence was copied too
        path = index.file_path(run.md5, EVIDENCE)
        if path is None:
            missing.append(missing_output(run))
            continue
        source_rows, unavailable = _source_rows(index, data)
        missing += [output for output in unavailable if output not in missing]
        copies = index.copies_of_records(index.ancestors(run))
        trainings.append(_with_source_rows(subject.name(run), path, source_rows, copies))
    return (pl.concat(trainings, how="diagonal") if trainings else None), missing


def _with_source_rows(
    model: str,
    evidence: Path,
    source_rows: Mapping[str, Sequence[tuple[str | None, int | None]]],
    copies: Mapping[bytes, Sequence[tuple[str | None, int | None]]],
) -> pl.DataFrame:
    import polars as pl

    table = tables.read(evidence, ["example_id", "step", "epoch"])
    ids = table["example_id"].to_list()
    rows = [source_rows.get(identity) or [(None, None)] for identity in ids]
    table = table.select(
        pl.lit(model).alias("model"),
        pl.all(),
        pl.Series("source", [source for (source, _), *_ in rows], pl.String),
        pl.Series("source_row", [row for (_, row), *_ in rows], pl.Int64),
    )
    others = []
    for identity, (first, *more) in zip(ids, rows, strict=True):
        copied = copies.get(record_key(identity), ())  # copies that were kept are among `more`, too
        others.append([row for row in dict.fromkeys([*more, *copied]) if row != first])
    if not any(others):
        return table
    also = [", ".join(f"{source}:{row}" for source, row in found) or None for found in others]
    return table.with_columns(pl.Series("also_in", also, pl.String))


def _source_rows(
    index: Index, data: Iterable[StageRun]
) -> tuple[dict[str, list[tuple[str, int | None]]], list[dict[str, str]]]:
    """example_id -> (source, source_row) of each row with this record, those that were dropped last, from the ledger of
    the first data set with splits that has it; and the missing outputs."""
    source_rows: dict[str, list[tuple[str, int | None]]] = {}
    missing = []
    for run in data:
        files = index.files(run.md5)
        if not index.is_split(run) or (files is not None and LEDGER not in files):
            continue
        path = index.file_path(run.md5, LEDGER)
        if path is None:
            missing.append(missing_output(run))
            continue
        here: dict[str, list[tuple[str, int | None]]] = {}
        lines = tables.read(path, ["source", "source_row", "example_id", "outcome"]).rows(named=True)
        for line in sorted(lines, key=lambda line: (line["outcome"] or "").startswith("dropped")):
            here.setdefault(line["example_id"], []).append((line["source"], line["source_row"]))
        source_rows = here | source_rows
    return source_rows, missing


def missing_output(run: StageRun) -> dict[str, str]:
    """An unavailable output, with the commands that fetch it."""
    return {"stage": run.address, "path": run.path, "md5": run.md5, "fetch": fetch_hint([run])}


def unrecorded(index: Index, runs: Iterable[StageRun]) -> list[dict[str, str]]:
    """What nothing records of the lineage of runs: the model that a copy was
    made from, and the runs that produced their inputs."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for run in runs:
        recorded = dict(run.entry.inputs) | {path: md5 for _, path, md5 in run.inputs}
        lost = {path: recorded.get(path, "") for path in ([] if index.is_copy(run) else index.unexplained(run))}
        if index.has_unknown_original(run) and not index.unavailable_originals(run):
            lost = {f"the model that {run.path} is a copy of": min(index.weights(run.md5))}
        found |= {
            (path, md5): {"stage": run.address, "path": path, "md5": md5, "fetch": NOTHING_RECORDS_IT}
            for path, md5 in lost.items()
        }
    return list(found.values())


def unavailable_reports(index: Index, runs: Iterable[StageRun]) -> list[dict[str, str]]:
    """Reports of runs that are unavailable: they name sources, checks and figures, which are unknown without them."""
    fetch = (
        f"{NOWHERE}; this clone is shallow: `git fetch --unshallow` may bring it" if index.history.shallow else NOWHERE
    )
    return [{**lost, "fetch": fetch} for run in runs if (lost := index.unavailable_report(run))]


def _rewarded(subject: Subject) -> dict[str, dict[str, Any]]:
    """Model -> the answers of its own that it learned from, if its output has
    them: the model itself, and those it was derived from."""
    index, found = subject.index, {}
    for run in subject.models:
        files = {} if index.is_copy(run) else index.files(run.md5) or {}
        names = sorted(name for name in files if name.startswith(ANSWERS))
        shards = [path for name in names if (path := index.file_path(run.md5, name))]
        if names and len(shards) == len(names):
            found[subject.name(run)] = rewarded_answers(shards)
    return found


def _training_counts(records: pl.DataFrame | None) -> dict[str, Any] | None:
    """Number of records, views, steps and epochs, per model and in total; None if unknown, or not trained."""
    if records is None:
        return None
    by_model = {
        model: {
            "records": part["example_id"].n_unique(),
            "views": part.height,
            "steps": part["step"].max() or 0,
            "epochs": part["epoch"].max() or 0,
        }
        for (model,), part in records.group_by("model", maintain_order=True)
    }
    return {"records": records["example_id"].n_unique(), "learnt_by": by_model}


def listed(records: pl.DataFrame | None) -> list[dict[str, Any]]:
    """One entry per record and model that was trained on it, with all steps and epochs."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for row in records.rows(named=True) if records is not None else []:
        entry = entries.setdefault(
            (row["model"], row["example_id"]),
            {
                **{key: row[key] for key in ("example_id", "source", "source_row", "model")},
                **({"also_in": re.findall(r"(.+?:\d+)(?:, |$)", row["also_in"])} if row.get("also_in") else {}),
                "steps": [],
                "epochs": [],
            },
        )
        entry["steps"].append(row["step"])
        entry["epochs"].append(row["epoch"])
    return list(entries.values())


def write_trained_on(records: pl.DataFrame | None, path: Path) -> None:
    """The table of `trained_on` to a CSV or Parquet file.

    Raises:
        InputError: there are no records, or the file cannot be written.
    """
    if records is None:
        raise InputError(
            f"--records {path}: no training records found for this model",
            "`pedigree audit MODEL` lists missing outputs",
        )
    try:
        if path.exists() and not path.is_file():  # a pipe, which a new file would replace; a folder is refused
            _write_table(records, path, path.suffix)
            return
        with replacing(path.resolve()) as scratch:  # a link stays one
            _write_table(records, scratch, path.suffix)
    except OSError as error:
        raise InputError(f"--records {path}: {error.strerror or error}", "choose a writable file") from None


def _write_table(records: pl.DataFrame, path: Path, suffix: str) -> None:
    with path.open("wb") as file:
        if suffix.lower() == ".csv":
            records.write_csv(file, quote_style="non_numeric")
        else:
            records.write_parquet(file, compression="zstd")


def _metrics(subject: Subject, report: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of the stage itself, and of the stages in the same dvc.lock that evaluate its output, the model that it
    is a copy of, or a model derived from it."""
    index = subject.index
    originals = {one.md5 for one in index.parents(subject.run)} if index.is_copy(subject.run) else set()
    measuring = [
        one for one in subject.lock.values() if not one.is_model and any(md5 in originals for _, _, md5 in one.inputs)
    ]
    reports = {subject.run.address: report} | {one.address: index.report(one) for one in measuring}
    # a model whose files equal those of the model that it reads is its own reader, by hash
    pending, followed = [subject.run], set[str]()
    while pending:
        run = pending.pop()
        followed.add(run.address)
        for reader in subject.lock.values():
            if reader.address not in {*reports, *followed} and any(md5 == run.md5 for _, _, md5 in reader.inputs):
                if reader.is_model:
                    pending.append(reader)
                else:
                    reports[reader.address] = index.report(reader)
    return {
        name: {key: value for key, value in figures.items() if key not in NON_METRICS}
        for name, figures in reports.items()
    }


def _machine_lines(machines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each machine, with its stages."""
    stages: dict[str, list[str]] = {}
    for stage, one in machines.items():
        stages.setdefault(machine_text(one), []).append(stage)
    return [f"{text}: {', '.join(names)}" for text, names in stages.items()]


def machine_text(machine: Mapping[str, Any]) -> str:
    """Processor, instruction sets of torch and oneDNN, threads, GPU and installed packages of a machine."""
    used, gpu = machine["instruction_set"], machine.get("cuda")
    text = f"{machine['cpu']}, {used['torch']} (oneDNN {used['onednn'] or 'none'})"
    text += f", {many(machine['threads'], 'thread')}"
    text += f", {gpu['device']}, driver {gpu['driver']}" if gpu else ""
    return text + (f", packages sha256 {machine['packages'][:16]}" if "packages" in machine else "")


def as_text(audited: dict[str, Any]) -> str:
    """The audit as text for the terminal."""
    from dagster_project.views.lineage import code_text, teacher_text, versions_text, weights_text
    from dagster_project.views.texts import text

    lists, tables = ("other_base_models", "teachers", "watched_by"), ("other_versions", "other_values")
    return text(
        "audit",
        shown=CODE_SHOWN,
        **{**{name: [] for name in lists}, **{name: {} for name in tables}, **audited},
        audited=audited,
        training=training_lines(audited),
        machines=_machine_lines(audited["machine"]),
        policy=use_policy.lines(audited.get(use_policy.NAME)),
        declared=lambda source, path: _declared_text(declared_of(source, path).shown),
        code_text=code_text,
        package_text=code_lock.as_text,
        teacher_text=teacher_text,
        weights_text=weights_text,
        versions_text=versions_text,
    )


def _declared_text(shown: Mapping[str, str]) -> str:
    """What is declared for a source, then what is unknown."""
    known = [f"{NAMES[field]} {value}" for field, value in shown.items() if value != UNKNOWN]
    unknown = [NAMES[field] for field, value in shown.items() if value == UNKNOWN]
    return "; ".join([*known, *([f"unknown: {', '.join(unknown)}"] if unknown else [])])


def training_lines(audited: Mapping[str, Any]) -> list[str]:
    """One line per model: number of records, views, steps and epochs."""
    unordered = [
        f"{model}: records of its training split, order unknown: its training command did not record it"
        for model in audited.get("order_unknown", ())
    ]
    if audited["records"] is None:
        return ["unknown: see below"] if audited["missing"] else unordered
    trained = [
        f"{model}: {many(part['records'], 'record')},"
        f" {part['views']} time{'' if part['views'] == 1 else 's'} in {many(part['steps'], 'step')}"
        f" and {many(part['epochs'], 'epoch')}"
        for model, part in audited["records"]["learnt_by"].items()
    ]
    rewarded = [
        f"{model}: {many(part['answers'], 'answer')} to {many(part['records'], 'record')}, "
        + (f"rewarded by {', '.join(part['rewards'])}" if part["rewards"] else "without rewards")
        for model, part in audited.get("answers", {}).items()
    ]
    return unordered + trained + rewarded
