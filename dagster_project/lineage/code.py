"""The code behind an output, file by file: dvc.lock records one hash per folder; git or the workspace has the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dagster_project.core.git import git
from dagster_project.core.hashing import md5_of_bytes, md5_of_folder
from dagster_project.core.layout import is_code
from dagster_project.lineage.history import blobs, listing_of

PARAMS = "params.yaml"


def code_in(root: Path, commit: str | None, stages: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """The recorded code of some stages, and the part of it that differs from a commit.

    Args:
        commit: None for uncommitted work.
        stages: entries of dvc.lock.
    Returns:
        {path: md5} of every file, or of a whole folder (md5 ends in ".dir") if its recorded content is neither in the commit nor in the
        workspace; and the paths with other content in the commit, including params.yaml.
    """
    stages = list(stages)
    recorded = {dep["path"]: dep.get("md5", "") for stage in stages for dep in stage.get("deps", []) if is_code(dep["path"])}
    committed, params = _committed(root, commit, recorded) if commit else ({}, b"")
    files: dict[str, str] = {}
    for path, md5 in recorded.items():
        candidates = (_files_below(committed, path), _in_workspace(root, path)) if md5.endswith(".dir") else ()
        files |= next((listing for listing in candidates if _folder_md5(listing, path) == md5), {path: md5})
    if commit is None:
        return dict(sorted(files.items())), []
    removed = {
        name for path, md5 in recorded.items() if md5.endswith(".dir") and path not in files for name in _files_below(committed, path)
    } - files.keys()
    differs = sorted(removed | {path for path, md5 in files.items() if committed.get(path) != md5})
    values = {key: value for stage in stages for key, value in (stage.get("params", {}).get(PARAMS) or {}).items()}
    return dict(sorted(files.items())), differs + ([] if _has_values(params, values) else [PARAMS])


def _committed(root: Path, commit: str, paths: Iterable[str]) -> tuple[dict[str, str], bytes]:
    """{path: md5} of every file of a commit at or below the paths; and its params.yaml."""
    output = git(root, "ls-tree", "-r", "-z", commit, "--", PARAMS, *paths) or ""
    entries = [entry.split("\t", 1) for entry in output.split("\0") if entry]
    hashes = {name: head.split()[2] for head, name in entries if head.split()[1] == "blob"}
    content = blobs(root, hashes.values())
    params = content.get(hashes.pop(PARAMS, ""), b"")
    return {name: md5_of_bytes(content[blob]) for name, blob in hashes.items() if blob in content}, params


def _files_below(files: Mapping[str, str], folder: str) -> dict[str, str]:
    return {path: md5 for path, md5 in files.items() if path.startswith(f"{folder}/")}


def _in_workspace(root: Path, folder: str) -> dict[str, str]:
    """{path: md5} of the files in a folder, without the caches of Python and numba, which .dvcignore excludes."""
    listing = listing_of(root / folder).items()
    return {f"{folder}/{name}": md5 for name, md5 in listing if "__pycache__" not in name.split("/") and not name.endswith(".pyc")}


def _folder_md5(files: Mapping[str, str], folder: str) -> str:
    return md5_of_folder({path.removeprefix(f"{folder}/"): md5 for path, md5 in files.items()})


def _has_values(params: bytes, recorded: Mapping[str, Any]) -> bool:
    """Whether a params.yaml has the recorded values, by dotted names."""
    from ruamel.yaml import YAML

    if not recorded:
        return True
    values = YAML(typ="safe").load(params.decode()) or {}
    for key, value in recorded.items():
        current: Any = values
        for part in key.split("."):
            current = current.get(part) if isinstance(current, dict) else None
        if current != value:
            return False
    return True
