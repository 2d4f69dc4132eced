"""Registered versions of models: tags of GTO in git, which `gto register` and
`gto assign` write, and what `dvc.lock` says at their commits.

An artifact is declared in dvc.yaml (`artifacts:`) with the path of a model. A version of it is a tag such as
release@v1.0.0, and a stage of its life a tag such as release#production#1. The tags are read by GTO itself: which
version is in which stage is its answer.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.lineage.history import LOCK, blobs
from dagster_project.lineage.notes import parsed_yaml
from dagster_project.lineage.runs import outputs, sections_of, stage_in

log = logging.getLogger("pedigree")
HEAD = ("artifact", "version", "in use as", "made by", "md5", "commit")
"""Of `table_rows`."""
TAG = re.compile(r"@v\d|#")
"""In the name of a tag: a version of an artifact, or where it is in use."""


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
    """Hash of a model -> its versions that are registered or in use, the latest first.

    Those that were taken back are left out.

    Empty, with a warning, if there are such tags and GTO is not installed or cannot read them.
    """
    if not TAG.search(git(root, "for-each-ref", "--format=%(refname:short)", "refs/tags") or ""):
        return {}
    folder = (git(root, "rev-parse", "--show-prefix") or "").strip().rstrip("/")
    versions = _versions(Path((git(root, "rev-parse", "--show-toplevel") or "").strip()), folder)
    models = _Models(root, [commit for _, _, _, commit in versions])
    found: dict[str, list[Version]] = defaultdict(list)
    for artifact, version, stages, commit in versions:
        model = models.of(artifact, commit)
        if model:
            found[model[1]].append(Version(artifact, version, stages, commit, *model))
    return dict(found)


def of_model(root: Path, md5: str) -> dict[str, Any]:
    """{"registered": its versions}, of a model by its hash; empty if it has none."""
    versions = registered(root).get(md5)
    return {"registered": [one.as_dict() for one in versions]} if versions else {}


def table_rows(
    versions: Mapping[str, Iterable[Version]], address: str | None = None
) -> list[tuple[str, str, str, str, str, str]]:
    """(artifact, version, stages, stage that made it, md5, commit) of every
    version, or of those that one stage of the pipeline made."""
    return [
        (one.artifact, one.version, ", ".join(one.stages) or "-", one.address, one.md5[:12], one.commit[:12])
        for of_model in versions.values()
        for one in of_model
        if address in {None, one.address}
    ]


def _versions(repository: Path, folder: str) -> list[tuple[str, str, tuple[str, ...], str]]:
    """(artifact, version, stages, commit) of every active version of the
    artifacts in one folder of a repository, as GTO reads the tags.

    A commit that was assigned without a version is called by its first digits.
    """
    try:
        from gto.registry import GitRegistry
    except ImportError:
        log.warning(
            "registered versions of models are not shown: GTO is not installed; pip install 'pedigree-llm[pipeline]'"
        )
        return []
    found = []
    try:
        with GitRegistry.from_url(str(repository)) as registry:
            for name, artifact in registry.get_artifacts().items():
                place, _, own_name = name.rpartition(":")
                if place != folder or not artifact.is_active:
                    continue
                assigned = [one for in_stage in artifact.get_vstages().values() for one in in_stage]
                for one in artifact.get_versions(include_non_explicit=True):
                    stages = tuple(dict.fromkeys(stage.stage for stage in assigned if stage.version == one.version))
                    if one.is_registered or stages:
                        version = one.version if one.is_registered else one.commit_hexsha[:7]
                        found.append((own_name, version, stages, one.commit_hexsha))
    except Exception as error:  # noqa: BLE001  GTO fails in its own ways on tags that it did not write; an audit needs none of them
        log.warning(
            "registered versions of models are not shown:"
            f" GTO cannot read the tags of this repository: {error!r}; see `gto doctor`"
        )
        return []
    return list(dict.fromkeys(found))


class _Models:
    """The models that some commits record, by the name of an artifact."""

    def __init__(self, root: Path, commits: Iterable[str]) -> None:
        self.root = root
        self._files = blobs(
            root, [f"{commit}:./{name}" for commit in dict.fromkeys(commits) for name in ("dvc.yaml", LOCK)]
        )
        here = root / "dvc.yaml"
        self._here = _paths(here.read_bytes() if here.is_file() else b"")
        self._paths = {content: _paths(content) for name, content in self._files.items() if not name.endswith(LOCK)}

    def of(self, artifact: str, commit: str) -> tuple[str, str] | None:
        """(address, md5) of the model of an artifact in the dvc.lock of a commit.

        None, with a warning if it is declared, if there is none.

        A commit before the artifact was declared has it at the path that the workspace declares.
        """
        path = self._paths.get(self._files.get(f"{commit}:./dvc.yaml", b""), {}).get(artifact) or self._here.get(
            artifact
        )
        if path is None:
            return None
        lock = self._files.get(f"{commit}:./{LOCK}", b"").decode("utf-8", "replace")
        try:
            for address, text in sections_of(lock).items():
                for out in outputs(stage_in(text)):
                    if posixpath.normpath(out["path"]) == path:
                        return address, out["md5"]
        except InputError:
            pass
        log.warning(f"a version of {artifact} at commit {commit[:12]} is not shown: its dvc.lock records no {path}")
        return None


def _paths(pipeline: bytes) -> dict[str, str]:
    """Artifact -> its path, from a dvc.yaml; empty if it cannot be read."""
    artifacts = (parsed_yaml(pipeline) or {}).get("artifacts") or {}
    try:
        return {str(name): posixpath.normpath(str(one["path"])) for name, one in artifacts.items()}
    except (AttributeError, TypeError, KeyError):
        return {}
