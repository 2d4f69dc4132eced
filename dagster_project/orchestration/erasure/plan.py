"""The plan of an erasure: rows, relatives, models, places.

A document on disk, by which an interrupted erasure goes on; it is deleted at the end.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dagster_project.core import params
from dagster_project.core.documents import read_report
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_file, sha256_of_bytes, sha256_of_file
from dagster_project.core.layout import PLOTS, RECORD_KEY, REPORTS, report_of
from dagster_project.core.published_ids import CREATE, SAMPLE_KEY, read_key
from dagster_project.core.records import write_json
from dagster_project.curation.left_out import is_remote
from dagster_project.curation.sources.erased import read_erased
from dagster_project.lineage import code_lock, exports_in_place
from dagster_project.lineage.erasure import removal
from dagster_project.lineage.erasure.kinds import DEFAULT, KINDS
from dagster_project.lineage.erasure.needles import SHORTEST, Needles
from dagster_project.lineage.erasure.records import (
    EXAMPLES,
    NOTES,
    PAIRS,
    Finder,
    Found,
    Raw,
    Request,
    is_name_of,
    rows_of_notes,
)
from dagster_project.lineage.erasure.scan import Scanner
from dagster_project.lineage.history import Objects, Revision, is_within, undeclared
from dagster_project.lineage.impact.question import exposed_in_workspace, exposed_models
from dagster_project.lineage.index import Index
from dagster_project.lineage.runs import StageRun
from dagster_project.lineage.signing.target import folders_naming
from dagster_project.lineage.unfinished_erasure import FILE, PLAN, is_unfinished
from dagster_project.orchestration import dvc
from dagster_project.orchestration.erasure.layout import dagster_home
from dagster_project.orchestration.erasure.objects import curves_of, own_objects
from dagster_project.orchestration.erasure.places import search
from dagster_project.orchestration.erasure.remotes import remotes_of

REMAKE, RETIRE, KEEP = "remake", "retire", "keep"
"""What becomes of a model that saw the record: made again in the workspace;
deleted; kept, because it was only tested on it."""

NOT_DATA = (REPORTS, PLOTS)
"""Outputs without records that git tracks."""

STORAGES = frozenset(
    {
        "storage",
        "run_storage",
        "event_log_storage",
        "schedule_storage",
        "local_artifact_storage",
        "compute_logs",
        "instance_class",
    }
)
"""Sections of dagster.yaml that put something in other places than Dagster's home."""


def chosen_kinds(also: Sequence[str], declined: Sequence[str]) -> list[str]:
    """Kinds of relatives to erase too.

    Raises:
        InputError: a kind is both chosen and declined.
    """
    if both := sorted({*also} & {*declined}):
        raise InputError(f"{both[0]} is both in --also and in --not", "name it once")
    return [kind for kind in KINDS if (kind in DEFAULT or kind in also) and kind not in declined]


def load(root: Path) -> dict[str, Any] | None:
    """The plan of an unfinished erasure; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    if not is_unfinished(root):
        return None
    try:
        found: dict[str, Any] = json.loads((root / FILE).read_bytes())
    except ValueError:
        raise InputError(
            f"{FILE}: the plan of an unfinished erasure is damaged", "delete it, and ask for the erasure again"
        ) from None
    return found


def save(root: Path, plan: Mapping[str, Any]) -> None:
    """Only the owner may enter the folder of the plan, which holds the text."""
    (root / PLAN).mkdir(parents=True, exist_ok=True)
    (root / PLAN).chmod(0o700)
    write_json(root / FILE, plan)


def usable_key(root: Path) -> bytes:
    """The project's key.

    Raises:
        InputError: there is none, or it is the public one of the sample project, with which anyone could test a guess.
    """
    key = read_key(root)
    if hashlib.sha256(key).hexdigest() == SAMPLE_KEY:
        raise InputError(
            f"{RECORD_KEY} is the key of the sample project, which is public:"
            " keyed hashes of erased records would hide nothing",
            f"create a key of your own: `{CREATE}`",
        )
    return key


def fingerprint(request: Request, chosen: Sequence[str], key: bytes) -> str:
    """Keyed hash of a request: the same command gives the same one."""
    text = json.dumps([request.asked, list(chosen)])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=key, digest_size=16).hexdigest()


def make(root: Path, request: Request, chosen: Sequence[str], reason: str) -> dict[str, Any]:
    """Look everything up; nothing is changed.

    Raises:
        InputError: a part of the request means nothing, the raw data sets are
            not those of the sources, or a row cannot be taken out.
    """
    key = usable_key(root)
    read_erased(root)  # tombstones of another key would end the pipeline after the rows are gone
    states = dvc.read_stages(root)
    _refuse_outdated(root, states)
    _refuse_left(root, states)
    index = Index(root)
    index.read_records()
    read = {**_hashes_of_notes(root), **_hashes_when_read(root)}
    finder = Finder(index, key)
    found = finder.find(request, chosen)
    remote = {path: sorted(numbers) for path, numbers in sorted(found.rows.items()) if is_remote(path)}
    rows = {path: numbers for path, numbers in found.rows.items() if path not in remote}
    _refuse_reason(reason, request, found)
    _refuse_waived(root, found.own_ids)
    _refuse_shifted_names(root, rows, found.notes)
    _refuse_without_tombstone(found, key)
    sources = {path: _change(root, path, numbers, False, read) for path, numbers in sorted(rows.items())}
    sources |= {
        path: _change(root, path, numbers, path.startswith("data/sources/review/"), read)
        for path, numbers in sorted(found.notes.items())
    }
    refuse_empty(finder.raws, found)
    models, unknown, retired = models_of(index, found)
    remotes = remotes_of(root)
    places = search(root, Scanner(found.needles), remotes)
    return {
        "request": fingerprint(request, chosen, key),
        "key": finder.key_id,
        "date": datetime.date.today().isoformat(),
        "reason": reason,
        "asked": found.asked,
        "chosen": list(chosen),
        "relatives": found.relatives,
        "records": len(found.ids),
        "made": len(found.made),
        "sources": sources,
        "remote": {path: {"rows": numbers, "revision": _revision(root, path)} for path, numbers in remote.items()},
        "tombstones": found.tombstones,
        "models": models,
        "unknown": [{name: model[name] for name in ("stage", "md5", "found_in", "fetch")} for model in unknown],
        "unreadable": index.unreadable,
        "retired": sorted(retired),
        "own": sorted(own_objects(index, (), with_run_cache=False).outputs),
        "curves": curves_of(index, {}),
        "stages": _to_make_again(states),
        "before": _outputs(index),
        "places": places.document(),
        "searched": places.searched(),
        "exports": exports_in_place.present(root),
        "signatures": [str(folder.relative_to(root)) for folder in folders_naming(root, sources)],
        "blobs": places.blobs,
        "remotes elsewhere": remotes.elsewhere,
        "event log elsewhere": _has_event_log_elsewhere(root),
        "needles": found.needles.document(),
        "ids": found.own_ids,
        "done": [],
    }


def _to_make_again(states: Mapping[str, dvc.StageState]) -> list[str]:
    """Stages that had run, and those that they read now, such as a variant that was added since."""
    return with_parents(states, [address for address, state in states.items() if state.recorded])


def with_parents(states: Mapping[str, dvc.StageState], addresses: Sequence[str]) -> list[str]:
    """Stages, and all that they read, in flow order."""
    needed = {*addresses, *(above for address in addresses for above in dvc.ancestors(states, address))}
    return [address for address in states if address in needed]


def _refuse_outdated(root: Path, states: Mapping[str, dvc.StageState]) -> None:
    """Raises:
    InputError: the rows of a raw data set may not be those of its sources, its
        sources were never read, or a stage cannot be made again.
    """
    if frozen := [address for address, state in states.items() if state.frozen and state.recorded]:
        raise InputError(
            f"{', '.join(frozen)}: frozen in dvc.yaml, so DVC would not make it again without the records",
            "remove `frozen: true` first",
        )
    code_lock.refuse_other_code(
        root, {address.partition("@")[0] for address, state in states.items() if state.recorded}
    )
    for address in (EXAMPLES, PAIRS):
        is_used = address == EXAMPLES or (params.read(root).get(address) or {}).get("sources")
        # one that DVC runs each time is never without a change
        if address in states and (states[address].recorded or is_used) and not states[address].as_recorded:
            reason = next(one for one in states[address].changed if one != dvc.ALWAYS)
            raise InputError(
                f"{address} is not up to date ({reason}), so its rows may not be those of the sources",
                f"run `dvc repro {address}`, then ask again",
            )


def _refuse_left(root: Path, states: Collection[str]) -> None:
    """Raises:
    InputError: there are outputs of stages and variants that dvc.yaml no longer has: nothing would make them again.
    """
    entries = (entry for address, entry in Revision(root, None).lock().items() if address not in states)
    outs = [out["path"] for entry in entries for out in entry.get("outs", ()) if not out["path"].startswith(NOT_DATA)]
    if left := [path for path in outs if os.path.lexists(root / path)]:
        raise InputError(
            f"{', '.join(left)}: left by a stage that dvc.yaml no longer has, so it would not be made again without"
            " the records",
            f"remove them first: `rm -r {shlex.join(left)}`",
        )


def _refuse_without_tombstone(found: Found, key: bytes) -> None:
    """Raises:
    InputError: a row on the Hub or in S3 would not be left out.
    """
    if kept := found.without_tombstone(key):
        raise InputError(
            f"{kept[0]}: its source cannot be changed from here,"
            " and it cannot be left out, because a row that stays has the same text, or it has no text",
            "erase its copies, too (leave out --not copies), or have its owner take it out, and set the new `revision`",
        )


def refuse_empty(raws: Iterable[Raw], found: Found) -> None:
    """Raises:
    InputError: a raw data set would have no row, so the stages after it would stop half-way through the erasure. A file
        keeps a row; sources on the Hub and in S3 need not.
    """
    meant = {id(raw) for raw in found.meant}
    current = [raw for raw in raws if raw.current]
    kept = {raw.stage for raw in current if id(raw) not in meant}
    if emptied := sorted({raw.stage for raw in current} - kept):
        raise InputError(
            f"{emptied[0]}: no row would be left, and the stages after it need one",
            f"give it other sources in params.yaml, `dvc repro {emptied[0]}`,"
            " then ask again: earlier versions are searched, too",
        )


def _sources_read(root: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and facts of each source that the raw data sets were read from, by their reports."""
    for address in (EXAMPLES, PAIRS):
        if (root / report_of(address)).is_file():
            yield from read_report(root, address).get("sources", {}).items()


def _revision(root: Path, path: str) -> str:
    """The revision of a source on the Hub or in S3, by the reports; empty if none names it."""
    found = (facts for name, facts in _sources_read(root) if is_within(path, name.rstrip("/")))
    return next((str(facts["revision"]) for facts in found if "revision" in facts), "")


def _hashes_when_read(root: Path) -> dict[str, str]:
    """sha256 of each source file when it was read. Row numbers are those of these versions."""
    found: dict[str, str] = {}
    for name, facts in _sources_read(root):
        if (files := facts.get("files")) is None:
            found[name] = facts["sha256"]
        else:
            found |= {f"{name.rstrip('/')}/{one}": of["sha256"] for one, of in files.items()}
    return found


def _hashes_of_notes(root: Path) -> dict[str, str]:
    """sha256 of each file of paraphrases and review, before it is read."""
    paths = [path for folder in NOTES.values() for path in (root / folder).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): sha256_of_file(path) for path in paths}


def _change(root: Path, path: str, rows: Iterable[int], may_be_empty: bool, read: Mapping[str, str]) -> dict[str, Any]:
    """What a file is before and after some rows are taken out; `md5` is the hash before, by which DVC may have it.

    Args:
        read: sha256 of each file when its rows were numbered.
    Raises:
        InputError: it is not a file of data/sources, it was changed since its
            rows were numbered, or the rows cannot be taken out.
    """
    file = root / path
    if "://" in path or not file.is_file() or not _is_own(root, file):
        raise InputError(
            f"{path}: not a file in data/sources, so rows cannot be taken out",
            "erase them where it is kept, and set its new `revision`",
        )
    numbers = sorted(rows)
    content = removal.without(file, {*numbers}, path, may_be_empty, root)
    if (before := sha256_of_file(file)) != read.get(path):
        raise InputError(
            f"{path} was changed after its rows were read, so their numbers may be those of others",
            f"run `dvc repro {EXAMPLES} {PAIRS}`, then ask again",
        )
    changed = {"before": before, "after": sha256_of_bytes(content), "md5": md5_of_file(file)}
    return {"rows": numbers, **changed, "may_be_empty": may_be_empty}


def _is_own(root: Path, file: Path) -> bool:
    """Whether a file is in data/sources, itself or, for a file that DVC tracks,
    as a link to DVC's cache, which is replaced and not followed."""
    folder = file.parent.resolve()
    is_link_elsewhere = file.is_symlink() and not file.resolve().is_relative_to(Objects(root).cache.resolve())
    return folder.is_relative_to((root / "data" / "sources").resolve()) and not is_link_elsewhere


def _refuse_reason(reason: str, request: Request, found: Found) -> None:
    """Raises:
    InputError: the reason, which is written to files that git tracks, holds
        what was requested or a text or id of the records, or is not UTF-8.
    """
    try:
        reason.encode()
    except UnicodeEncodeError:
        raise InputError("--reason: it has bytes that are not UTF-8", "write it in UTF-8") from None
    said = " ".join(reason.casefold().split())
    ids = [*found.ids, *found.made, *found.needles.ids]
    texts = [*found.needles.texts, *(text for raw in found.meant for text in raw.texts if len(text) >= SHORTEST)]
    parts = [*request.containing, *request.records, *ids, *texts]
    if any(part and part in said for part in (" ".join(one.casefold().split()) for one in parts)):
        raise InputError(
            "--reason: it repeats what was requested,"
            " or a text or id of the records, and is written to files that git tracks",
            "name the request by a number of your own",
        )


def _has_event_log_elsewhere(root: Path) -> bool:
    """Whether dagster.yaml puts the event log, the runs or the logs of runs in
    other places than Dagster's home, such as Postgres."""
    file = dagster_home(root) / "dagster.yaml"
    if not file.is_file():
        return False
    try:
        settings = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError):  # nobody can say where
        return True
    return isinstance(settings, Mapping) and not STORAGES.isdisjoint(settings)


def _refuse_waived(root: Path, ids: Sequence[str]) -> None:
    """Raises:
    InputError: a waiver names one of the records by its id. The beginning of an id would not be found by a search.
    """
    for where, name in _waived(root):
        if is_name_of(name, ids, ()):
            raise InputError(
                f"{where}: {name} is the id of a record to erase, and would stay in params.yaml",
                "remove it from the waiver, then ask again",
            )


def _refuse_shifted_names(root: Path, rows: Mapping[str, set[int]], notes: Mapping[str, set[int]]) -> None:
    """Raises:
    InputError: params.yaml or a review file names a row by its number, which another row of the file will have.
    """
    for where, name, what in _names_of_rows(root, notes):
        path, _, row = name.rpartition(":")
        if path in rows and row.isdecimal() and int(row) >= min(rows[path]):
            raise InputError(
                f"{where}: {name} is the number of a row, which changes when rows before it are taken out",
                f"name it by the first 8 characters of its example_id, or take the {what} out if the row will go",
            )


def _names_of_rows(root: Path, notes: Mapping[str, set[int]]) -> Iterator[tuple[str, str, str]]:
    """(where, name of a row, what names it), without lines of review files that are taken out."""
    yield from ((where, name, "waiver") for where, name in _waived(root))
    for path, lines in rows_of_notes(root, NOTES["review"]):
        yield from (
            (path, str(line.value.get("example_id")), "line")
            for line in lines
            if line.value and line.source_row not in notes.get(path, ())
        )


def _waived(root: Path) -> Iterator[tuple[str, str]]:
    """(section of params.yaml, name of a row) of each row that a waiver names."""
    for section, value in params.read(root).items():
        for waiver in value.get("waivers", []) if isinstance(value, Mapping) else ():
            if isinstance(waiver, Mapping):
                named = [*(waiver.get("rows") or ()), *(one for pair in waiver.get("pairs") or () for one in pair)]
                yield from ((f"params.yaml: {section}.waivers", str(name)) for name in named)


def models_of(index: Index, found: Found) -> tuple[list[dict[str, Any]], list[dict[str, Any]], set[str]]:
    """Models that saw any of the erased records, each with its `outcome`; those of which it is unknown; and hashes of
    the outputs to retire: of models, and of everything that was made from them. Ids that a row that stays has too do
    not count: a model that learned from that row only is kept."""
    models, unknown = exposed_models(index, found.own_ids) if found.own_ids else ([], [])
    workspace = {run.md5 for run in _in_workspace(index)}
    models = [_with_outcome(model, workspace) for model in models]
    retired = {model["md5"] for model in models if model["outcome"] != KEEP}
    return models, unknown, retired | _made_from(index, retired)


def _with_outcome(model: Mapping[str, Any], workspace: set[str]) -> dict[str, Any]:
    splits = {split for seen in model["seen"] for split in seen["splits"]}
    outcome = KEEP if splits == {"test"} else REMAKE if model["md5"] in workspace else RETIRE
    return {
        **{name: model[name] for name in ("stage", "path", "md5", "commit", "found_in")},
        "splits": sorted(splits),
        "outcome": outcome,
    }


def _made_from(index: Index, models: set[str]) -> set[str]:
    """Hashes of all outputs that were made from some models: their evaluations, comparisons and releases."""
    known: dict[int, bool] = {}

    def depends(run: StageRun) -> bool:
        if run.id not in known:
            known[run.id] = False
            known[run.id] = any(producer.md5 in models or depends(producer) for producer in run.producers.values())
        return known[run.id]

    return {run.md5 for run in index.runs.values() if depends(run)}


def _in_workspace(index: Index) -> list[StageRun]:
    """The runs in the dvc.lock of the workspace. DVC keeps the entries of removed and renamed variants there, of which
    nothing is left that an erasure could make again."""
    runs = [run for run in index.runs.values() if run.in_workspace]
    removed = undeclared(Revision(index.root, None), {run.address for run in runs})
    return [run for run in runs if run.address not in removed]


def _outputs(index: Index) -> dict[str, str]:
    return {run.address: run.md5 for run in _in_workspace(index) if run.is_model}


def needles_in(plan: Mapping[str, Any]) -> Needles:
    saved = plan["needles"]
    return Needles(
        tuple(saved["texts"]), tuple(map(tuple, saved["groups"])), tuple(saved["ids"]), saved["unsearchable"]
    )


def models_now(root: Path) -> dict[str, str]:
    """Address -> hash of every model in the dvc.lock of the workspace."""
    return _outputs(Index(root))


def found_in_models(root: Path, ids: Sequence[str]) -> dict[str, list[str]]:
    """Addresses of the models of the workspace that saw any of the records,
    whatever the split, as "yes"; those that cannot be decided, as "unknown"."""
    index = Index(root)
    index.read_records()
    exposed, unknown = exposed_in_workspace(index, ids) if ids else ([], [])
    here = {run.address for run in _in_workspace(index)}
    return {"yes": [one for one in exposed if one in here], "unknown": [one for one in unknown if one in here]}
