"""Paths in dvc.lock as paths from the project's folder.

DVC writes them as dvc.yaml has them, such as `./data/x/`. Stages can run in another folder than the project's: with
`wdir` in dvc.yaml, or by a dvc.yaml in a subfolder. dvc.lock has their paths from that folder.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.lineage.history import LOCK, stages_of


def working_folders(pipeline: bytes) -> dict[str, str]:
    """Stage of a dvc.yaml -> its `wdir`, of stages that have one."""
    try:
        stages = stages_of(pipeline.decode(), "dvc.yaml") if b"wdir" in pipeline else {}
    except (InputError, UnicodeDecodeError):
        return {}
    bodies = {name: body.get("do", body) for name, body in stages.items()}
    folders = {name: body.get("wdir") for name, body in bodies.items() if isinstance(body, dict)}
    return {name: folder for name, folder in folders.items() if isinstance(folder, str)}


def from_project(address: str, entry: Mapping[str, Any], folders: Mapping[str, str]) -> dict[str, Any]:
    """An entry of dvc.lock with its paths from the project's folder, in their shortest form.

    Args:
        folders: of the dvc.yaml that it ran by (`working_folders`).
    """
    stage, _, variant = address.partition("@")
    folder = folders.get(stage, "").replace("${key}", variant).replace("${item}", variant)
    if "${" in folder:
        return dict(entry)
    parts = {
        part: [{**one, "path": _joined(folder, one["path"])} for one in entry[part]]
        for part in ("deps", "outs")
        if part in entry
    }
    params = {_joined(folder, file): values for file, values in (entry.get("params") or {}).items()}
    return {**entry, **parts, **({"params": params} if params else {})}


def _joined(folder: str, path: str) -> str:
    return path if "://" in path else posixpath.normpath(posixpath.join(folder, path))


def is_as_written(section: str, address: str, folders: Container[str]) -> bool:
    """Whether the paths of a section of dvc.lock (`as_section`) are as `from_project` writes them."""
    return address.partition("@")[0] not in folders and _LONGER.search(section) is None


_LONGER = re.compile(r'"path": "(?:\./|[^"]*(?:/"|//|/\.\.?/))')
"""A path with more than names and single slashes, such as `./data/x/`."""


def same_run(entry: Mapping[str, Any], cached: Mapping[str, Any]) -> bool:
    """Whether an entry of dvc.lock and one of the run cache are of one run, whatever folder their paths are from."""
    return entry.get("cmd") == cached.get("cmd") and all(
        [one.get("md5") for one in entry.get(part, ())] == [one.get("md5") for one in cached.get(part, ())]
        for part in ("deps", "outs")
    )


def other_pipelines(root: Path, known: Container[str]) -> list[str]:
    """Every dvc.lock in a subfolder of the project with an output that is not known by its hash."""
    listed = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", f"*/{LOCK}")
    if listed is None:  # a project without git
        listed = "\0".join(path.relative_to(root).as_posix() for path in root.rglob(f"*/{LOCK}"))
    return [path for path in sorted({*listed.split("\0")} - {""}) if _is_other(root, Path(path), known)]


def _is_other(root: Path, path: Path, known: Container[str]) -> bool:
    file = root / path
    if not file.is_file() or any((root / parent / ".dvc").is_dir() for parent in path.parents[:-1]):
        return False  # deleted, or of another project
    try:
        entries = stages_of(file.read_text(encoding="utf-8"), path.as_posix())
    except (InputError, UnicodeDecodeError):
        return True
    return any(out.get("md5") not in known for entry in entries.values() for out in entry.get("outs", ()) or ())
