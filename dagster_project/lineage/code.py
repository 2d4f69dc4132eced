"""The code behind an output, file by file: dvc.lock records one hash per folder; git or the workspace has the files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dagster_project.core.git import git
from dagster_project.core.hashing import md5_of_bytes, md5_of_folder
from dagster_project.core.layout import is_code
from dagster_project.lineage import code_lock
from dagster_project.lineage.history import blobs, listing_of
from dagster_project.lineage.notes import parsed_yaml

PARAMS = "params.yaml"


def code_in(
    root: Path, commit: str | None, stages: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[dict[str, str], list[str]]]:
    """The recorded code of some stages, and the part of it that differs from a commit.

    Args:
        commit: None for uncommitted work.
        stages: address -> entry of dvc.lock.
    Returns:
        Per stage: {path: md5} of every file, or of a whole folder (md5 ends in ".dir") if its recorded content is
        neither in the commit nor in the workspace; and the paths with other content in the commit, including
        params.yaml and other files of parameters. Of a stage whose code is installed, the file is
        "code.lock.yaml:STAGE" with the recorded sha256.
    """
    recorded = {
        name: {dep["path"]: dep.get("md5", "") for dep in stage.get("deps", []) if is_code(dep["path"])}
        for name, stage in stages.items()
    }
    parameters = {
        name: {file: values for file, values in stage.get("params", {}).items() if file != code_lock.FILE}
        for name, stage in stages.items()
    }
    paths = dict.fromkeys(path for code in recorded.values() for path in code)
    files_of_parameters = {file for given in parameters.values() for file in given}
    found_there = contents_at(root, commit, {code_lock.FILE, *files_of_parameters, *paths}) if commit else {}
    committed = {name: md5_of_bytes(content) for name, content in found_there.items()}
    lock = found_there.get(code_lock.FILE, b"")
    code_at_commit = code_lock.parse(lock.decode("utf-8", "replace")) if lock else None
    values_at_commit = {file: values_in(file, found_there.get(file, b"")) for file in files_of_parameters}
    in_workspace: dict[str, dict[str, str]] = {}

    def files_of(path: str, md5: str) -> dict[str, str]:
        if not md5.endswith(".dir"):
            return {path: md5}
        if _folder_md5(below := _files_below(committed, path), path) == md5:
            return below
        if path not in in_workspace:
            in_workspace[path] = _in_workspace(root, path)
        return in_workspace[path] if _folder_md5(in_workspace[path], path) == md5 else {path: md5}

    found = {}
    for name, code in recorded.items():
        files: dict[str, str] = {}
        removed: set[str] = set()
        for path, md5 in code.items():
            listing = files_of(path, md5)
            files |= listing
            removed |= set(_files_below(committed, path)) if md5.endswith(".dir") and path not in listing else set()
        differs = sorted((removed - files.keys()) | {path for path, md5 in files.items() if committed.get(path) != md5})
        for stage, sha256 in code_lock.recorded_in(stages[name]).items():
            files[f"{code_lock.FILE}:{stage}"] = sha256
            differs += [] if code_at_commit and code_at_commit.stages.get(stage) == sha256 else [code_lock.FILE]
        differs += [
            file
            for file, values in parameters[name].items()
            if any(_as_json(value_at(values_at_commit[file], key)) != value for key, value in (values or {}).items())
        ]
        found[name] = dict(sorted(files.items())), [] if commit is None else differs
    return found


def listed_like(files: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """Files as in `code_in`, with a folder that is listed as a whole file by file if another listing has its files."""
    found: dict[str, str] = {}
    for path, md5 in files.items():
        below = _files_below(others, path)
        found |= below if below and _folder_md5(below, path) == md5 else {path: md5}
    return found


def values_in(file: str, content: bytes) -> dict[str, Any] | None:
    """The parameters in a file of YAML, JSON or TOML; None if it cannot be read."""
    if file.endswith(".toml"):
        try:
            return tomllib.loads(content.decode())
        except ValueError:
            return None
    return parsed_yaml(content)


def contents_at(root: Path, commit: str, paths: Iterable[str]) -> dict[str, bytes]:
    """Path -> content of every file of a commit at or below some paths."""
    output = git(root, "ls-tree", "-r", "-z", commit, "--", *paths) or ""
    entries = [entry.split("\t", 1) for entry in output.split("\0") if entry]
    hashes = {name: head.split()[2] for head, name in entries if head.split()[1] == "blob"}
    content = blobs(root, hashes.values())
    return {name: content[blob] for name, blob in hashes.items() if blob in content}


def _files_below(files: Mapping[str, str], folder: str) -> dict[str, str]:
    return {path: md5 for path, md5 in files.items() if path.startswith(f"{folder}/")}


def _in_workspace(root: Path, folder: str) -> dict[str, str]:
    """{path: md5} of the files in a folder, without the caches of Python and numba, which .dvcignore excludes."""
    listing = listing_of(root / folder).items()
    return {
        f"{folder}/{name}": md5
        for name, md5 in listing
        if "__pycache__" not in name.split("/") and not name.endswith(".pyc")
    }


def _folder_md5(files: Mapping[str, str], folder: str) -> str:
    return md5_of_folder({path.removeprefix(f"{folder}/"): md5 for path, md5 in files.items()})


def _as_json(value: Any) -> Any:
    """A value as `as_section` of runs.py writes it: keys of mappings are texts, and so are dates."""
    return json.loads(json.dumps(value, default=str))


def value_at(values: Any, key: str) -> Any:
    """The value of a params.yaml at a dotted name; None without one."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
