"""The plan of an erasure: rows, relatives, models, places. A document on disk, by which an interrupted erasure goes on; it is deleted at the end."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_bytes, sha256_of_file
from dagster_project.core.layout import RECORD_KEY
from dagster_project.core.published_ids import CREATE, SAMPLE_KEY, read_key
from dagster_project.core.records import write_json
from dagster_project.lineage.erasure import removal
from dagster_project.lineage.erasure.kinds import DEFAULT, KINDS
from dagster_project.lineage.erasure.needles import Needles
from dagster_project.lineage.erasure.records import EXAMPLES, PAIRS, Finder, Request
from dagster_project.lineage.erasure.scan import Scanner
from dagster_project.lineage.impact import exposed_models
from dagster_project.lineage.index import Index
from dagster_project.lineage.runs import StageRun
from dagster_project.orchestration import dvc
from dagster_project.orchestration.erasure.layout import PLAN
from dagster_project.orchestration.erasure.objects import own_objects
from dagster_project.orchestration.erasure.places import search
from dagster_project.orchestration.erasure.remotes import remotes_of

FILE = PLAN / "plan.json"
REMAKE, RETIRE, KEEP = "remake", "retire", "keep"
"""What becomes of a model that saw the record: made again in the workspace; deleted; kept, because it was only tested on it."""


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
    if not (root / FILE).is_file():
        return None
    try:
        found: dict[str, Any] = json.loads((root / FILE).read_bytes())
    except ValueError:
        raise InputError(f"{FILE}: the plan of an unfinished erasure is damaged", "delete it, and ask for the erasure again") from None
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
            f"{RECORD_KEY} is the key of the sample project, which is public: keyed hashes of erased records would hide nothing",
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
        InputError: a part of the request means nothing, the raw data sets are not those of the sources, or a row cannot be taken out.
    """
    key = usable_key(root)
    states = dvc.read_stages(root)
    for address in (EXAMPLES, PAIRS):
        if address in states and (states[address].recorded or address == EXAMPLES) and states[address].changed:
            raise InputError(
                f"{address} is not up to date ({states[address].changed[0]}), so its rows may not be those of the sources",
                f"run `dvc repro {address}`, then ask again",
            )
    index = Index(root)
    index.read_records()
    finder = Finder(index, key)
    found = finder.find(request, chosen)
    rows = found.rows
    _refuse_shifted_waivers(root, rows)
    sources = {path: _change(root, path, numbers, False) for path, numbers in sorted(rows.items())}
    sources |= {
        path: _change(root, path, numbers, path.startswith("data/sources/review/")) for path, numbers in sorted(found.notes.items())
    }
    models, unknown, retired = models_of(index, found.ids)
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
        "tombstones": found.tombstones,
        "models": models,
        "unknown": [{name: model[name] for name in ("stage", "md5", "found_in", "fetch")} for model in unknown],
        "retired": sorted(retired),
        "own": sorted(own_objects(index, (), with_run_cache=False).outputs),
        "stages": [address for address, state in states.items() if state.recorded],
        "before": _outputs(index),
        "places": places.document(),
        "searched": places.searched(),
        "blobs": places.blobs,
        "remotes elsewhere": remotes.elsewhere,
        "needles": found.needles.document(),
        "ids": [*found.ids, *found.made],
        "done": [],
    }


def _change(root: Path, path: str, rows: Iterable[int], may_be_empty: bool) -> dict[str, Any]:
    """What a file is before and after some rows are taken out."""
    file = root / path
    if "://" in path or not file.is_file() or not file.resolve().is_relative_to((root / "data" / "sources").resolve()):
        raise InputError(
            f"{path}: not a file in data/sources, so rows cannot be taken out", "erase them where it is kept, and set its new `revision`"
        )
    numbers = sorted(rows)
    content = removal.without(file, {*numbers}, path, may_be_empty)
    return {"rows": numbers, "before": sha256_of_file(file), "after": sha256_of_bytes(content), "may_be_empty": may_be_empty}


def _refuse_shifted_waivers(root: Path, rows: Mapping[str, set[int]]) -> None:
    """Raises:
    InputError: params.yaml names a row by its number, which another row of the file will have.
    """
    for section, value in params.read(root).items():
        waivers = value.get("waivers", []) if isinstance(value, Mapping) else []
        for name in _names([w for w in waivers if isinstance(w, Mapping)]):
            path, _, row = name.rpartition(":")
            if path in rows and row.isdigit() and int(row) >= min(rows[path]):
                raise InputError(
                    f"params.yaml: {section}.waivers: {name} is the number of a row, which changes when rows before it are taken out",
                    "name it by the first 8 characters of its example_id, or take the waiver out if the row will go",
                )


def _names(waivers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for waiver in waivers:
        yield from map(str, waiver.get("rows") or ())
        yield from (str(name) for pair in waiver.get("pairs") or () for name in pair)


def models_of(index: Index, ids: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], set[str]]:
    """Models that saw any of some records, each with its `fate`; those of which it is unknown; and hashes of the outputs to retire: of models, and of
    everything that was made from them."""
    models, unknown = exposed_models(index, ids) if ids else ([], [])
    workspace = {run.md5 for run in index.runs.values() if run.in_workspace}
    models = [_fate(model, workspace) for model in models]
    retired = {model["md5"] for model in models if model["fate"] != KEEP}
    return models, unknown, retired | _made_from(index, retired)


def _fate(model: Mapping[str, Any], workspace: set[str]) -> dict[str, Any]:
    splits = {split for seen in model["seen"] for split in seen["splits"]}
    fate = KEEP if splits == {"test"} else REMAKE if model["md5"] in workspace else RETIRE
    return {**{name: model[name] for name in ("stage", "path", "md5", "commit", "found_in")}, "splits": sorted(splits), "fate": fate}


def _made_from(index: Index, models: set[str]) -> set[str]:
    """Hashes of all outputs that were made from some models: their evaluations, comparisons and releases."""
    known: dict[int, bool] = {}

    def depends(run: StageRun) -> bool:
        if run.id not in known:
            known[run.id] = False
            known[run.id] = any(producer.md5 in models or depends(producer) for producer in run.producers.values())
        return known[run.id]

    return {run.md5 for run in index.runs.values() if depends(run)}


def _outputs(index: Index) -> dict[str, str]:
    return {run.address: run.md5 for run in index.runs.values() if run.in_workspace and run.is_model}


def needles_in(plan: Mapping[str, Any]) -> Needles:
    saved = plan["needles"]
    return Needles(tuple(saved["texts"]), tuple(map(tuple, saved["groups"])), tuple(saved["ids"]), saved["unsearchable"])


def models_now(root: Path) -> dict[str, str]:
    """Address -> hash of every model in the dvc.lock of the workspace."""
    return _outputs(Index(root))


def found_in_models(root: Path, ids: Sequence[str]) -> list[str]:
    """Addresses of the models of the workspace that saw any of the records, whatever the split."""
    index = Index(root)
    index.read_records()
    workspace = {run.md5 for run in index.runs.values() if run.in_workspace}
    models, _ = exposed_models(index, ids) if ids else ([], [])
    return sorted({model["stage"] for model in models if model["md5"] in workspace})
