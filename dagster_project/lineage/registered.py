"""Registered versions of models: tags of GTO in git, which `gto register` and `gto assign` write, and what `dvc.lock` says at their commits.

An artifact is declared in dvc.yaml (`artifacts:`) with the path of a model. A version of it is a tag such as release@v1.0.0, and a stage of its life a
tag such as release#production#1. The tags are read by GTO itself: which version is in which stage is its answer.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.lineage.history import LOCK, blobs, stages_of
from dagster_project.lineage.runs import output

log = logging.getLogger("pedigree")
HEAD = ("artifact", "version", "in use as", "made by", "md5", "commit")
"""Of `table_rows`."""
VERSION_TAG = re.compile(r"@v\d")


@dataclass(frozen=True)
class Version:
    """A version of a model that somebody registered."""

    artifact: str
    """Its name in dvc.yaml."""
    version: str
    """Such as v1.0.0."""
    stages: tuple[str, ...]
    """Where it is in use: those that it was assigned to last."""
    commit: str
    address: str
    """Stage of the pipeline that made it."""
    md5: str
    """Hash of the model."""

    def as_dict(self) -> dict[str, Any]:
        return {"artifact": self.artifact, "version": self.version, "stages": [*self.stages], "commit": self.commit}


def registered(root: Path) -> dict[str, list[Version]]:
    """Hash of a model -> its registered versions, the latest first. Versions that were deregistered and artifacts that are deprecated are left out.

    Empty, with a warning, if there are tags of versions and GTO is not installed.
    """
    if not VERSION_TAG.search(git(root, "for-each-ref", "--format=%(refname:short)", "refs/tags") or ""):
        return {}
    versions = _versions(Path((git(root, "rev-parse", "--show-toplevel") or "").strip()))
    folder = (git(root, "rev-parse", "--show-prefix") or "").strip().rstrip("/")
    found: dict[str, list[Version]] = defaultdict(list)
    pipelines = {commit: _pipeline(root, commit) for commit in dict.fromkeys(one["commit_hexsha"] for one in versions)}
    for one in versions:
        place, _, name = one["artifact"].rpartition(":")
        paths, models = pipelines[one["commit_hexsha"]]
        if place == folder and (model := models.get(paths.get(name, ""))):
            stages = tuple(dict.fromkeys(stage["stage"] for stage in one["stages"]))
            found[model[1]].append(Version(name, one["version"], stages, one["commit_hexsha"], *model))
    return dict(found)


def of_model(root: Path, md5: str) -> dict[str, Any]:
    """{"registered": its versions}, of a model by its hash; empty if it has none."""
    versions = registered(root).get(md5)
    return {"registered": [one.as_dict() for one in versions]} if versions else {}


def table_rows(versions: Mapping[str, Iterable[Version]], address: str | None = None) -> list[tuple[str, str, str, str, str, str]]:
    """(artifact, version, stages, stage that made it, md5, commit) of every version, or of those that one stage of the pipeline made."""
    return [
        (one.artifact, one.version, ", ".join(one.stages) or "-", one.address, one.md5[:12], one.commit[:12])
        for of_model in versions.values()
        for one in of_model
        if address in {None, one.address}
    ]


def _versions(repository: Path) -> list[dict[str, Any]]:
    """What GTO says of every registered version in a repository."""
    try:
        import gto
    except ImportError:
        log.warning("registered versions of models are not shown: GTO is not installed; pip install 'pedigree-llm[pipeline]'")
        return []
    artifacts = gto.api.show(str(repository), registered_only=True)
    return [one for name in artifacts for one in gto.api.show(str(repository), name, registered_only=True)]


def _pipeline(root: Path, commit: str) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Of a commit: artifact -> its path, from dvc.yaml; and path -> (address, md5) of what dvc.lock records. Empty where they cannot be read."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    names = [f"{commit}:./dvc.yaml", f"{commit}:./{LOCK}"]
    declared, lock = (blobs(root, names).get(name, b"").decode("utf-8", "replace") for name in names)
    try:
        artifacts = (YAML(typ="safe").load(declared) or {}).get("artifacts") or {}
        paths = {str(name): str(one["path"]).rstrip("/") for name, one in artifacts.items()}
        outputs = {address: output(stage) for address, stage in stages_of(lock).items()} if lock else {}
    except (YAMLError, InputError, AttributeError, TypeError, KeyError):
        return {}, {}
    return paths, {out["path"]: (address, out["md5"]) for address, out in outputs.items() if out}
