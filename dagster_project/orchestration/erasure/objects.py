"""Which objects of DVC's cache and remotes an erasure removes.

Those of this project that hold the record, all files of outputs with one, and all files of retired outputs. A cache or
remote can have objects of other projects, so only what the history of this one names is removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dagster_project.core.git import git
from dagster_project.core.layout import PLOTS
from dagster_project.lineage.history import WHOLE_LOG, blobs, cached_runs, is_within
from dagster_project.lineage.index import Index
from dagster_project.lineage.run_index import SOURCES
from dagster_project.lineage.runs import StageRun

BASE_MODEL, BENCHMARKS = "base_model", f"{SOURCES}/benchmarks"
RECORDED = ("commit", "workspace", "reflog")
"""Places of runs that this project recorded itself. A run cache can have been
fetched from a remote of several projects."""
NAME = re.compile(r"[0-9a-f]{32}(?:\.dir)?")


def name_of(path: Path) -> str | None:
    """Hash of an object of a cache or remote, by its path; None if it is another file."""
    name = path.parent.name + path.name
    return name if NAME.fullmatch(name) else None


def listings(folder: Path) -> dict[str, frozenset[str]]:
    """Hash of each folder in a cache -> hashes of its files."""
    found: dict[str, frozenset[str]] = {}
    for path in folder.glob("??/*.dir"):
        name = name_of(path)
        try:
            found[name or ""] = frozenset(entry["md5"] for entry in json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, KeyError):  # damaged: it names nothing
            continue
    found.pop("", None)
    return found


@dataclass(frozen=True)
class Own:
    """Objects of this project, by hash."""

    outputs: frozenset[str]
    """Outputs that can hold a row of a source or of what was made from it, and
    versions of sources that .dvc files name."""
    files: frozenset[str]
    """Files of those outputs that are folders."""
    others: frozenset[str]
    """Outputs that hold no row, such as the base model, and their files."""


def own_objects(index: Index, known: Collection[str], with_run_cache: bool) -> Own:
    """What the history of the project names: dvc.lock and .dvc files of the
    workspace and of every commit, reflog included.

    Args:
        known: outputs that are known to be the project's, from before the sources changed.
        with_run_cache: also what the run cache names. Not if projects share it.
    """
    runs = {run.entry.id: run for run in index.runs.values() if with_run_cache or run.place in RECORDED}.values()
    outputs, others = {*known, *_tracked_sources(index.root)}, set[str]()
    paths = _with_rows(runs)
    for run in runs:
        (outputs if run.path in paths else others).update(_outs(index, run))
    files = {file for name in outputs for file in (index.files(name) or {}).values()}
    others |= {file for name in others - outputs for file in (index.files(name) or {}).values()}
    return Own(frozenset(outputs), frozenset(files), frozenset(others - outputs))


def _outs(index: Index, run: StageRun) -> Iterator[str]:
    yield run.md5
    yield from (str(out["md5"]) for out in index.lock_entry(run).get("outs", ()) if "md5" in out)


def _with_rows(runs: Iterable[StageRun]) -> set[str]:
    """Paths of the outputs that sources other than benchmarks flow into, directly or not."""
    inputs: dict[str, set[str]] = {}
    for run in runs:
        if run.address != BASE_MODEL:
            inputs.setdefault(run.path, set()).update(path for path, _ in run.entry.inputs)
    found: set[str] = set()
    while new := {
        path
        for path, given in inputs.items()
        if path not in found
        and any(_is_source(one) or any(is_within(one, by) or is_within(by, one) for by in found) for one in given)
    }:
        found |= new
    return found


def _is_source(path: str) -> bool:
    return is_within(path, SOURCES) and not is_within(path, BENCHMARKS)


def _tracked_sources(root: Path) -> set[str]:
    """Hashes that .dvc files of sources name, in the workspace and in every commit."""
    where = [f":(glob){SOURCES}/**/*.dvc", f":(exclude){BENCHMARKS}"]
    options = ("--all", "--reflog", "--raw", "--no-abbrev", "--no-renames", "-m", "--format=")
    log = git(root, *WHOLE_LOG, "log", *options, "--", *where) or ""
    committed = blobs(root, re.findall(r" [0-9a-f]{40,64} ([0-9a-f]{40,64}) [AM]", log)).values()
    files = [
        path
        for path in (root / SOURCES).rglob("*.dvc")
        if path.is_file() and not path.is_relative_to(root / BENCHMARKS)
    ]
    texts = [
        *(content.decode("utf-8", "replace") for content in committed),
        *(path.read_text("utf-8", "replace") for path in files),
    ]
    return {name for text in texts for name in NAME.findall(text)}


def to_remove(
    folders: Mapping[str, frozenset[str]],
    holding: Collection[str],
    retired: Collection[str],
    needed: Collection[str],
    own: Own,
) -> set[str]:
    """Hashes of the objects to remove. What a folder that stays has, stays, whichever project's it is.

    Args:
        folders: as `listings`.
        holding: objects that hold something of the record.
        retired: outputs that were made from it.
        needed: objects of the workspace, which stay.
        own: what content may be removed from.
    """
    outputs = own.outputs - {*needed}
    holding = {*holding} - own.others
    gone = {
        name
        for name, files in folders.items()
        if name not in needed and (name in retired or (name in outputs and not files.isdisjoint(holding)))
    }
    kept = {file for name, files in folders.items() if name not in gone for file in files}
    files = {file for name in gone for file in folders[name]}
    single = {*retired} | (holding & (outputs | own.files))
    return (single | gone | files) - kept - own.others - {*needed}


def present_in(storage: Path, names: Iterable[str]) -> set[str]:
    """Those of some objects that a cache or remote has."""
    return {name for name in names if (storage / "files" / "md5" / name[:2] / name[2:]).is_file()}


def curves_of(index: Index, known: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Hash of an output -> hashes of the curves and figures that its runs wrote beside it.

    Args:
        known: the same from before: of runs that no commit has, the history now may lack some.
    """
    found = {name: {*curves} for name, curves in known.items()}
    for run in index.runs.values():
        outs = index.lock_entry(run).get("outs", ())
        found.setdefault(run.md5, set()).update(
            out["md5"] for out in outs if "md5" in out and out["path"].startswith(PLOTS)
        )
    return {name: sorted(curves) for name, curves in found.items() if curves}


def curves_to_remove(curves: Mapping[str, Iterable[str]], removed: Collection[str]) -> set[str]:
    """Curves of removed outputs. Those that an output that stays has, too, stay."""
    gone = {one for name, found in curves.items() if name in removed for one in found}
    return gone - {one for name, found in curves.items() if name not in removed for one in found}


def runs_naming(storage: Path, removed: Collection[str]) -> list[Path]:
    """Entries of the run cache in a cache or remote that name one of these objects: DVC would restore a run by them."""
    return [path for path in cached_runs(storage) if _names(path, removed)]


def _names(path: Path, removed: Collection[str]) -> bool:
    return not {*NAME.findall(path.read_text(encoding="utf-8", errors="replace"))}.isdisjoint(removed)
