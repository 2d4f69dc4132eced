"""`pedigree verify STAGE`: reproduces a stage in a scratch clone from the records in dvc.lock, and compares the bytes. The project is not changed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

from dagster_project.core import params
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.git import git_bytes
from dagster_project.core.hashing import md5_of_file
from dagster_project.core.layout import REPORTS, is_code, report_of
from dagster_project.lineage.first_difference import first_difference
from dagster_project.lineage.history import Revision, resolve
from dagster_project.orchestration import dvc, integrity

log = logging.getLogger("pedigree")

IDENTITY = ("dtype", "device", "threads", "processes", "attention")
"""Keys of training.json that identify the environment of a training, in addition to versions."""


def verify(root: Path, stage: str, rev: str | None = None, deep: bool = False) -> dict[str, Any]:
    """Reproduce a stage with the code of a revision, from the recorded inputs and parameters, and compare its outputs with the record.

    Args:
        stage: name of a stage, path of an output, or content hash.
        rev: a git revision; None for the workspace, including uncommitted code.
        deep: reproduce all upstream stages first. The result ends with the first stage that differs.
    Returns:
        {"stage", "rev", "verdict": "identical" or "different", "stages": {address: recorded and reproduced hashes of its outputs}, "changed": code
        that differs from its record, "differences", "causes": likely causes}.
    Raises:
        InputError: an input is missing (then nothing was done), or the stage cannot run.
        CheckFailed: an input was tampered with, or a blocking check of the stage failed.
    """
    at = Revision(root, rev)
    lock = at.lock()
    address = resolve(lock, stage)
    addresses = [*_ancestors(lock, address), address] if deep else [address]
    with tempfile.TemporaryDirectory(prefix="pedigree-") as folder:
        clone = _Clone(at, lock, dvc.store(root), Path(folder).resolve() / "project")
        clone.fill(addresses)
        document: dict[str, Any] = {
            "stage": address,
            "rev": rev,
            "verdict": "identical",
            "stages": {},
            "changed": [],
            "differences": [],
            "causes": [],
        }
        for name in addresses:
            log.info(f"reproducing {name}")
            document["changed"] += clone.restore_parameters(name)
            clone.run(name)
            outs, differences = clone.compare(name)
            document["stages"][name] = {"verdict": "different" if differences else "identical", "outputs": outs}
            if differences:
                causes = [*(f"{path} changed since it was recorded" for path in document["changed"]), *clone.causes(name)]
                return {**document, "verdict": "different", "differences": differences, "causes": causes}
            dvc.add_to_cache(clone.root, outs)  # inputs of the next stage
    return document


@dataclass(frozen=True)
class _Clone:
    """A copy of the project in a temporary folder, with its own cache."""

    at: Revision
    lock: dict[str, Any]
    store: dvc.Store
    """Of the project."""
    root: Path

    def fill(self, addresses: Sequence[str]) -> None:
        """Copy the project's files, and from the cache all inputs of the stages that are going to run.

        Raises:
            InputError: an input is not in the cache.
            CheckFailed: an input was tampered with.
        """
        _unpack(self.at, self.root)
        dvc.isolate_project(self.root)
        dependencies = {dep["path"]: dep["md5"] for name in addresses for dep in self.lock[name].get("deps", [])}
        inputs, outdated = self._recorded_inputs(addresses, dependencies)
        sources = dvc.tracked_sources(self.root)
        inputs |= {path: (oid, None) for path, oid in sources.items() if any(dvc.overlap(path, dep) for dep in dependencies)}
        self._refuse_missing({path: oid for path, (oid, _) in inputs.items()})
        for name in outdated:
            (self.root / report_of(name)).unlink(missing_ok=True)
        if outdated:
            (self.root / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": self.lock}))
        for path, (oid, published) in inputs.items():
            self._copy(path, oid, published)
        for path, oid in sources.items():  # no input, but DVC requires that they exist
            if path not in inputs and not self._missing(oid):
                self._copy(path, oid, None)
        dvc.add_to_cache(self.root, inputs)

    def _recorded_inputs(
        self, addresses: Sequence[str], dependencies: Mapping[str, str]
    ) -> tuple[dict[str, tuple[str, str | None]], list[str]]:
        """Outputs that the stages read, and the stages that produced them again since.

        Args:
            dependencies: recorded hash by path.
        Returns:
            {path: (DVC's hash, published sha256)}; and addresses, whose entries in `self.lock` get the earlier hash.
        """
        inputs: dict[str, tuple[str, str | None]] = {}
        outdated: list[str] = []
        for name, stage in self.lock.items():
            for out in stage.get("outs", []) if name not in addresses else []:
                if not any(dvc.overlap(out["path"], path) for path in dependencies) or out["path"].startswith(REPORTS):
                    continue
                oid = dependencies.get(out["path"], out["md5"])
                is_latest = oid == out["md5"]
                inputs[out["path"]] = oid, integrity.published(self.at, self.lock, name, out["path"]) if is_latest else None
                if not is_latest:
                    outdated.append(name)
                    out["md5"] = oid
        return inputs, outdated

    def _missing(self, oid: str) -> list[str]:
        files = self.store.files(oid)
        return [oid] if files is None else [one for one in files.values() if not self.store.at(one).is_file()]

    def _refuse_missing(self, inputs: Mapping[str, str]) -> None:
        missing = {path: objects for path, oid in inputs.items() if (objects := self._missing(oid))}
        if missing:
            lines = [
                f"{path}: {len(objects)} object(s) of it are not in the cache (first: {objects[0]})" for path, objects in missing.items()
            ]
            fetch = f"dvc pull {' '.join(missing)}" if self.at.rev is None else "dvc pull --all-commits"
            raise InputError("\n".join(lines), f"fetch them with `{fetch}`, or produce them again; nothing was done")

    def _copy(self, path: str, oid: str, published: str | None) -> None:
        """Copy an output from the project's cache, and verify its hashes."""
        target = self.root / path
        if oid.endswith(".dir"):
            target.mkdir(parents=True, exist_ok=True)
        for name, one in (self.store.files(oid) or {}).items():
            file = target / name if name else target
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.store.at(one), file)
            if md5_of_file(file) != one:
                raise CheckFailed(
                    f"{path}: cache object {one} does not match its name: it was tampered with", "see `pedigree verify --integrity`"
                )
        if published is not None and integrity.sha256_of(target) != published:
            raise CheckFailed(f"{path} is not what was published (sha256 differs)", "see `pedigree verify --integrity`")

    def restore_parameters(self, name: str) -> list[str]:
        """Write the recorded parameters of a stage to params.yaml.

        Returns:
            Code, and folders of outputs, that differ from their record.
        Raises:
            InputError: a source in git differs from its record, and its version in the latest commit does, too.
        """
        values = params.read(self.root)
        recorded = self.lock[name].get("params", {}).get("params.yaml", {})
        if changed := [key for key, value in recorded.items() if _get(values, key) != value]:
            log.info(f"{name}: using the recorded {', '.join(changed)} instead of that in params.yaml")
            for key in changed:
                _put(values, key, recorded[key])
            (self.root / "params.yaml").write_text(json.dumps(values, default=str))
        deps = {dep["path"]: dep["md5"] for dep in self.lock[name].get("deps", [])}
        outs = [out["path"] for stage in self.lock.values() for out in stage.get("outs", [])]
        code = []
        for path, now in dvc.fingerprint(self.root, name).now.items():
            if path not in deps or now == deps[path]:
                continue
            if is_code(path) or any(dvc.overlap(path, out) for out in outs):
                code.append(path)
            else:
                self._from_head(name, path, deps[path])
        return code

    def _from_head(self, name: str, path: str, recorded: str) -> None:
        """Replace a source by its version in the latest commit.

        Raises:
            InputError: that version differs from the record, too.
        """
        if self.at.rev is None:
            shutil.rmtree(self.root / path, ignore_errors=True)
            _unpack(Revision(self.at.root, "HEAD"), self.root, path)
            if dvc.fingerprint(self.root, name).now.get(path) == recorded:
                log.info(f"{name}: {path} has changed; using the committed version, which is the recorded one")
                return
        where = f"at {self.at.rev}" if self.at.rev else "here or in the latest commit"
        raise InputError(
            f"{name}: {path} {where} is not what dvc.lock recorded", f"run `dvc repro {name}`, or name a commit that has it with --rev"
        )

    def run(self, name: str) -> None:
        """Run the recorded command on the clone's code, by the current interpreter.

        Raises:
            InputError: the command failed with exit code 2.
            CheckFailed: it failed with another exit code.
        """
        inherited = {key: value for key, value in os.environ.items() if key not in {"DVC_STAGE", "DVC_ROOT", "DAGSTER_PIPES_CONTEXT"}}
        path = os.pathsep.join([str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = inherited | dvc.command_environment({"PYTHONPATH": path, "PEDIGREE_PROJECT": str(self.root)})
        code = subprocess.run(self.lock[name]["cmd"], shell=True, cwd=self.root, env=environment, stdout=2, check=False).returncode
        if code:
            kind = InputError if code == 2 else CheckFailed
            raise kind(f"{name} could not be reproduced: its command failed", "see its own message above; the project was not changed")

    def compare(self, name: str) -> tuple[dict[str, dict[str, str]], list[dict[str, Any]]]:
        """Recorded and reproduced hash of each output; and the first difference of each file that differs, the report last."""
        reproduced = dvc.outputs(self.root, name)
        outs = sorted(self.lock[name]["outs"], key=lambda out: out["path"].startswith(REPORTS))
        differences = []
        for out in outs:
            published = integrity.published(self.at, self.lock, name, out["path"]) if not out["path"].startswith(REPORTS) else None
            if reproduced.get(out["path"]) != out["md5"]:
                differences += self._differences(out["path"], out["md5"])
            elif published is not None and integrity.sha256_of(self.root / out["path"]) != published:
                differences.append({"artifact": out["path"], "sha256": "not the one in its report"})
        return {out["path"]: {"recorded": out["md5"], "made": reproduced.get(out["path"], dvc.MISSING)} for out in outs}, differences

    def _differences(self, path: str, oid: str) -> list[dict[str, Any]]:
        target, recorded = self.root / path, self._recorded(path, oid)
        if recorded is None:
            return [{"artifact": path, "unknown": "the recorded version is not in the cache"}]
        present = {str(file.relative_to(target)): file for file in target.rglob("*")} if target.is_dir() else {"": target}
        reproduced = {name: file for name, file in present.items() if file.is_file()}
        differences: list[dict[str, Any]] = []
        for name in sorted({*recorded, *reproduced}):
            artifact = f"{path}/{name}" if name else path
            if name not in reproduced:
                differences.append({"artifact": artifact, "only": "recorded"})
            elif name not in recorded:
                differences.append({"artifact": artifact, "only": "made"})
            elif md5_of_file(reproduced[name]) != recorded[name][0]:
                cached = recorded[name][1]
                unknown = {"unknown": "the recorded version is not in the cache"}
                where = first_difference(cached, reproduced[name]) if cached.is_file() else unknown
                differences.append({"artifact": artifact, **where})
        return differences

    def _recorded(self, path: str, oid: str) -> dict[str, tuple[str, Path]] | None:
        """(hash, file) of each recorded file by its path in the output. A report comes from git or the workspace."""
        if not path.startswith(REPORTS):
            files = self.store.files(oid)
            return None if files is None else {name: (one, self.store.at(one)) for name, one in files.items()}
        report = self.root.parent / "report.json"
        report.write_bytes(integrity.bytes_of(self.at, path) or b"")
        return {"": (oid, report if md5_of_file(report) == oid else self.store.at(oid))}

    def causes(self, name: str) -> list[str]:
        """Differences between the recorded environment and this one, according to reports and training.json."""
        producer, recorded = next(
            (
                (producer, environment)
                for producer in reversed([*_ancestors(self.lock, name), name])
                if (environment := json.loads(integrity.bytes_of(self.at, report_of(producer)) or b"{}").get("environment"))
            ),
            (name, {}),
        )
        now = {library: _version(library) for library in recorded}
        causes = [
            f"{library} {recorded[library]} when {producer} was produced, {now[library]} now"
            for library in recorded
            if recorded[library] != now[library]
        ]
        before, after = self._training(name)
        causes += [f"{key}: {before.get(key)} then, {after.get(key)} now" for key in IDENTITY if before.get(key) != after.get(key)]
        if causes:
            return causes
        same = [f"the same versions as when {producer} was produced" if recorded else "the earlier versions are not recorded"]
        same += [f"the same {', '.join(IDENTITY)}"] if before else []
        return [f"unknown: {', '.join(same)}; the kind of processor and environment variables are not recorded"]

    def _training(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Recorded and reproduced training.json; empty if there is none."""
        for out in self.lock[name]["outs"]:
            oid = (self.store.files(out["md5"]) or {}).get("training.json")
            reproduced = self.root / out["path"] / "training.json"
            if oid and self.store.at(oid).is_file() and reproduced.is_file():
                return json.loads(self.store.at(oid).read_bytes()), json.loads(reproduced.read_bytes())
        return {}, {}


def _ancestors(lock: Mapping[str, Any], address: str) -> list[str]:
    """All stages upstream of one according to dvc.lock, in flow order."""
    producers = {out["path"]: name for name, stage in lock.items() for out in stage.get("outs", [])}
    ancestors: list[str] = []

    def visit(name: str) -> None:
        for dep in lock[name].get("deps", []):
            for producer in dict.fromkeys(producer for path, producer in producers.items() if dvc.overlap(path, dep["path"])):
                if producer not in ancestors and producer != address:
                    visit(producer)
                    ancestors.append(producer)

    visit(address)
    return ancestors


def _unpack(at: Revision, target: Path, path: str = ".") -> None:
    """Copy the project's files at a revision; in the workspace, all files that git does not ignore."""
    target.mkdir(parents=True, exist_ok=True)
    if at.rev is not None:
        packed = git_bytes(at.root, "archive", "--format=tar", at.rev, "--", path)
        if packed is not None:
            with tarfile.open(fileobj=BytesIO(packed)) as archive:
                archive.extractall(target, filter="tar")
        return
    listed = git_bytes(at.root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", path)
    if listed is None:
        raise InputError(f"{at.root} is not in a git repository", "run `git init`: git lists the files of the project")
    for name in sorted({os.fsdecode(name) for name in listed.split(b"\0") if name}):
        source, copy = at.root / name, target / name
        if source.is_symlink() or source.is_file():  # neither deleted nor a submodule
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value


def _version(library: str) -> str:
    import platform

    try:
        return platform.python_version() if library == "python" else version(library)
    except PackageNotFoundError:
        return "not installed"


def as_text(document: Mapping[str, Any]) -> str:
    """The document of `verify` as text for the terminal."""
    lines = [f"{document['stage']}: {document['verdict']}" + (f" at {document['rev']}" if document["rev"] else "")]
    for name, stage in document["stages"].items():
        for path, out in stage["outputs"].items():
            same = out["recorded"] == out["made"]
            lines.append(f"  {name:<16} {path}  {out['recorded'][:12]}" + ("" if same else f" recorded, {out['made'][:12]} reproduced"))
    if document["changed"] and document["verdict"] == "identical":
        lines += ["", f"identical, although these changed since they were recorded: {', '.join(document['changed'])}"]
    if document["differences"]:
        lines += ["", "differences", *(f"  {_difference_text(one)}" for one in document["differences"])]
        lines += ["", "likely causes", *(f"  {cause}" for cause in document["causes"])]
    return "\n".join(lines)


def _difference_text(difference: Mapping[str, Any]) -> str:
    details = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in difference.items() if key != "artifact")
    return f"{difference['artifact']}: {details}"
