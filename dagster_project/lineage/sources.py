"""Files that contribute to a model without being one of its sources of rows: benchmarks that rows are compared with,
decisions of reviewers, expectations, chat templates, code of metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from dagster_project.core.hashing import md5_of_bytes, md5_of_folder, sha256_of_bytes
from dagster_project.core.layout import RECORD_KEY
from dagster_project.lineage.code import PARAMS, contents_at
from dagster_project.lineage.history import is_within, listing_of
from dagster_project.lineage.index import Index
from dagster_project.lineage.runs import StageRun, stage_in


def other_files(
    index: Index,
    entries: Mapping[StageRun, Mapping[str, Any]],
    name: Callable[[StageRun], str],
    sources: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Files that the parameters of stages name, besides the sources of rows.

    Args:
        entries: the stages' entries of dvc.lock.
        name: the name of each stage.
        sources: the sources of rows, which are left out.
    Returns:
        path -> {"md5", "sha256" if the content is available, "license", "stages"}. Where stages read two versions of a
        file, the hash is appended to the path of the second.
    """
    found: dict[str, dict[str, Any]] = {}
    for run, entry in entries.items():
        named = _named_in(entry)
        for dep, path, md5 in run.inputs:
            if (
                dep != path
                or md5 in run.producers
                or is_within(RECORD_KEY, dep)
                or any(is_within(source, dep) for source in sources)
            ):
                continue
            files = _recorded(index, run, dep, md5)
            used: Mapping[str, bytes | None] = (
                {dep: None}
                if files is None
                else {file: one for file, one in files.items() if file == dep or _is_named(file, dep, named)}
            )
            for file, content in used.items():
                facts = (
                    {"md5": md5}
                    if content is None
                    else {"md5": md5_of_bytes(content), "sha256": sha256_of_bytes(content)}
                )
                shown = file if found.get(file, facts)["md5"] == facts["md5"] else f"{file} {facts['md5'][:8]}"
                found.setdefault(shown, {**facts, "license": "unknown", "stages": []})["stages"].append(name(run))
    return found


def stages_reading(index: Index, path: str) -> list[str]:
    """Addresses of the stages that read a file or folder.

    It is their dependency or contains one, or their parameters name it in one.
    """
    found: dict[str, None] = {}
    for address, dep, text in index.entries_reading(path):
        if address not in found and (is_within(dep, path) or _is_named(path, dep, _named_in(stage_in(text)))):
            found[address] = None
    return list(found)


def _named_in(entry: Mapping[str, Any]) -> set[str]:
    """Every text in the parameters of an entry of dvc.lock, names of keys included."""
    return {*_texts((entry.get("params") or {}).get(PARAMS) or {})}


def _recorded(index: Index, run: StageRun, dep: str, md5: str) -> dict[str, bytes] | None:
    """Path -> content of a file, or of the files of a folder, with the recorded hash.

    None if neither the commit nor the workspace has it.
    """
    commit = index.first_commit(run)
    if commit and _hash(files := contents_at(index.root, commit, [dep]), dep) == md5:
        return files
    here = {f"{dep}/{name}" if name else dep: index.root / dep / name for name in listing_of(index.root / dep)}
    files = {name: path.read_bytes() for name, path in here.items()}
    return files if _hash(files, dep) == md5 else None


def _hash(files: Mapping[str, bytes], dep: str) -> str:
    """Hash of a file or folder, as DVC identifies it."""
    hashes = {path: md5_of_bytes(content) for path, content in files.items()}
    return (
        hashes[dep]
        if dep in hashes
        else md5_of_folder({path.removeprefix(dep + "/"): md5 for path, md5 in hashes.items()})
    )


def _is_named(path: str, folder: str, named: set[str]) -> bool:
    """Whether parameters name a file: by its path, its path in the folder, or, of a module, as `module.function`."""
    inside = path.removeprefix(folder + "/")
    modules = {name.partition(".")[0] for name in named} if inside.endswith(".py") else set()
    return bool({path, inside} & named) or PurePosixPath(inside).stem in modules


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from (str(key), *_texts(one))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
