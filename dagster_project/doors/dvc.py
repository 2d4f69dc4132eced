"""The only file that knows DVC: what dvc.yaml, dvc.lock and the workspace say, and how to run one stage.

DVC's Python API for this is undocumented, so pyproject.toml pins its minor version and every call stands here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.errors import CheckFailed, InputError

logging.getLogger("dvc").setLevel(logging.ERROR)

CODE = "dagster_project/"
MISSING = "missing"


@dataclass(frozen=True)
class Input:
    """Something a stage reads: another stage's output, or a source nobody makes."""

    producer: str | None
    """Address of the stage that makes it; None for a source."""
    path: str
    """Relative to the project."""
    now: str
    """Content hash on disk."""
    recorded: str | None
    """Content hash in dvc.lock, when the stage last ran."""


@dataclass(frozen=True)
class StageState:
    """One stage of dvc.yaml as it should be, as dvc.lock says it was, and as the workspace is."""

    address: str
    """"adapter@lora"."""
    description: str
    meta: Mapping[str, Any]
    out: str
    report: str | None
    inputs: tuple[Input, ...]
    definition_now: str
    """Hash of command, parameter values and code."""
    definition_recorded: str | None
    version: str
    """Content hash of the output on disk, or "missing"."""
    recorded: bool
    """Does dvc.lock know the stage?"""
    outs_clean: bool
    """Are all outputs what dvc.lock says?"""

    @property
    def changed(self) -> list[str]:
        """Why the stage is not up to date, in words; empty if it is. The same verdict as `dvc status`."""
        if not self.recorded:
            return ["never run"]
        return (
            ([] if self.outs_clean else [f"{self.out} is not what dvc.lock recorded"])
            + [f"{i.path} changed" for i in self.inputs if i.now != i.recorded]
            + ([] if self.definition_now == self.definition_recorded else ["command, parameters or code changed"])
        )


@contextmanager
def _open(root: Path) -> Iterator[Any]:
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo(str(root), _wait_for_lock=True) as repo:
            yield repo
    except NotDvcRepoError:
        raise InputError(f"{root} is not a DVC project", "run `make run` once, or `dvc init`, in the project's folder") from None
    except DvcException as error:
        if type(error).__name__ in {
            "YAMLFileCorruptedError",
            "YAMLValidationError",
            "YAMLSyntaxError",
            "ResolveError",
            "EntryNotFound",
            "CyclicGraphError",
        }:
            raise InputError(f"dvc.yaml or dvc.lock: {error}", "mend the file named and run again") from None
        raise


def digest(value: Any) -> str:
    return hashlib.md5(json.dumps(value, sort_keys=True, default=str).encode(), usedforsecurity=False).hexdigest()


def read_street(root: Path) -> dict[str, StageState]:
    """The state of every stage, in flow order. Asks DVC per output, so it never waits for a running stage."""
    with _open(root) as repo:
        stages = [stage for stage in repo.index.stages if not stage.is_data_source]
        main = {stage.name: next(out for out in stage.outs if not out.is_metric and not out.is_plot) for stage in stages}
        paths = {address: os.path.relpath(out.fs_path, root) for address, out in main.items()}
        versions = {address: _hash(out) for address, out in main.items()}
        states = {stage.name: _state(root, stage, paths, versions) for stage in stages}
    order = _flow({address: [i.producer for i in state.inputs if i.producer] for address, state in states.items()})
    return {address: states[address] for address in order}


def _hash(output: Any) -> str:
    return output.get_hash().value if output.exists else MISSING


def _state(root: Path, stage: Any, paths: Mapping[str, str], versions: Mapping[str, str]) -> StageState:
    lockfile = stage.dvcfile._lockfile
    lock = (lockfile.load().get("stages", {}) if lockfile.exists() else {}).get(stage.name)
    recorded = {dep["path"]: dep.get("md5") for dep in (lock or {}).get("deps", [])}
    files = [dep for dep in stage.deps if dep not in stage.params]
    now = {os.path.relpath(dep.fs_path, root): _hash(dep) for dep in files}
    code = sorted(path for path in now if path.startswith(CODE))
    values: dict[str, Any] = {}
    for dep in stage.params:
        values.update(dep.read_params())
    inputs: list[Input] = []
    for path in (path for path in now if path not in code):
        makers = [address for address, made in paths.items() if made == path or made.startswith(path + "/")]
        same = now[path] == recorded.get(path)
        for maker in makers:
            # of a folder of outputs dvc.lock holds one hash: where it differs, none of the outputs counts as the recorded one
            whole = paths[maker] == path
            inputs.append(Input(maker, paths[maker], versions[maker], recorded.get(path) if whole or not same else versions[maker]))
        if not makers:
            inputs.append(Input(None, path, now[path], recorded.get(path)))
    locked_params = {key: value for file in (lock or {}).get("params", {}).values() for key, value in file.items()}
    metric = next((os.path.relpath(out.fs_path, root) for out in stage.outs if out.is_metric), None)
    return StageState(
        address=stage.name,
        description=stage.desc or "",
        meta=stage.meta or {},
        out=paths[stage.name],
        report=metric,
        inputs=tuple(inputs),
        definition_now=digest([stage.cmd, values, {path: now[path] for path in code}]),
        definition_recorded=digest([lock.get("cmd"), locked_params, {p: h for p, h in recorded.items() if p.startswith(CODE)}])
        if lock
        else None,
        version=versions[stage.name],
        recorded=lock is not None,
        outs_clean=lock is not None and not any(out.status() for out in stage.outs),
    )


def _flow(parents: Mapping[str, list[str]]) -> list[str]:
    order: list[str] = []

    def visit(address: str) -> None:
        if address not in order:
            for parent in parents[address]:
                visit(parent)
            order.append(address)

    for address in parents:
        visit(address)
    return order


def ancestors(street: Mapping[str, StageState], address: str) -> list[str]:
    """All stages that `address` is made from, in flow order."""
    found: set[str] = set()
    waiting = [address]
    while waiting:
        for i in street[waiting.pop()].inputs:
            if i.producer and i.producer not in found:
                found.add(i.producer)
                waiting.append(i.producer)
    return [name for name in street if name in found]


def reproduce(root: Path, address: str, force: bool, environment: Mapping[str, str]) -> bool:
    """Let DVC bring one stage up to date. Returns whether anything was done (run, or restored from the run cache).

    Raises:
        CheckFailed: the stage's command failed; it has said why itself.
    """
    from dvc.exceptions import ReproductionError

    with chdir(root), _open(root) as repo:  # DVC resolves targets against the current directory
        try:
            return bool(repo.reproduce([address], single_item=True, force=force, run_env=command_environment(environment)))
        except ReproductionError as error:
            raise CheckFailed(
                f"{address} failed: {error.__cause__ or error}", "its own message stands above; nothing was recorded"
            ) from None


def command_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Environment of a stage command: `python` must be the interpreter that runs us."""
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", **extra}


@dataclass(frozen=True)
class Recorded:
    """What the guard compares: hashes of what a stage reads, and what dvc.lock says its producers made."""

    now: Mapping[str, str]
    disputed: Mapping[str, str]
    """Inputs that are not what their producer recorded -> the producer's address."""


def fingerprint(root: Path, address: str) -> Recorded:
    """Hashes of everything a stage depends on, files and code, as they are now."""
    with _open(root) as repo:
        stages = {stage.name: stage for stage in repo.index.stages if not stage.is_data_source}
        if address not in stages:
            raise InputError(f"{address} is not a stage of dvc.yaml", f"stages: {', '.join(stages)}")
        deps = [dep for dep in stages[address].deps if dep not in stages[address].params]
        now = {os.path.relpath(dep.fs_path, root): _hash(dep) for dep in deps}
        values: dict[str, Any] = {}
        for dep in stages[address].params:
            values.update(dep.read_params())
        disputed = {}
        for other in stages.values():
            for out in other.outs:
                path = os.path.relpath(out.fs_path, root)
                if other.name != address and any(path == read or path.startswith(read + "/") for read in now) and out.status():
                    disputed[path] = other.name
    return Recorded({**now, "params.yaml": digest(values)}, disputed)


def restore_outputs(root: Path, address: str) -> None:
    """Put back from the cache what DVC removed before it ran a stage that then failed, so that nothing is lost."""
    from shutil import copyfile

    with _open(root) as repo:
        stage = next((stage for stage in repo.index.stages if stage.name == address), None)
        for out in stage.outs if stage is not None else []:
            if out.exists or not out.hash_info:
                continue
            if out.use_cache:
                if not out.changed_cache():
                    out.checkout(force=True)
                continue
            kept = Path(repo.cache.local.oid_to_path(out.hash_info.value))
            if kept.is_file():
                Path(out.fs_path).parent.mkdir(parents=True, exist_ok=True)
                copyfile(kept, out.fs_path)
