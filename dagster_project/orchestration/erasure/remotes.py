"""The cache and the DVC remotes of a project: those in a folder of this
machine, and those elsewhere, which `pedigree erase` does not reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster_project.orchestration.dvc import open_repo
from dagster_project.orchestration.private_api import private_module


@dataclass
class Remotes:
    cache: Path
    """Folder of DVC's cache, whichever of its settings names it: the one with `files` and `runs`."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Name -> folder, of remotes on this machine. Links are resolved."""
    elsewhere: list[str] = field(default_factory=list)
    """Names of the others."""


def remotes_of(root: Path) -> Remotes:
    with open_repo(root) as repo:
        return _remotes(repo)


def _remotes(repo: Any) -> Remotes:
    found = Remotes(Path(repo.cache.local.path).resolve().parent.parent)
    for name in repo.config["remote"]:
        try:
            remote = repo.cloud.get_remote(name)
        except (ImportError, private_module("dvc.exceptions").DvcException):
            found.elsewhere.append(name)
            continue
        if remote.fs.protocol == "local":
            found.folders[name] = Path(remote.path).resolve()
        else:
            found.elsewhere.append(name)
    return found


@contextmanager
def removers(root: Path) -> Iterator[dict[str, Callable[[str], None]]]:
    """Name of each remote on this machine -> function that removes an object by its hash, by DVC's own file system."""
    with open_repo(root) as repo:

        def remover(name: str) -> Callable[[str], None]:
            objects = repo.cloud.get_remote_odb(name)

            def remove(oid: str) -> None:
                path = objects.oid_to_path(oid)
                if objects.fs.exists(path):
                    objects.fs.remove(path)

            return remove

        yield {name: remover(name) for name in _remotes(repo).folders}


def needed_objects(root: Path) -> set[str]:
    """Hashes of all objects that dvc.lock and .dvc files of the workspace name, files of folders included."""
    with open_repo(root) as repo:
        return {str(info.value) for infos in repo.used_objs().values() for info in infos}
