"""`pedigree verify STAGE`: re-makes a stage in a scratch clone from what dvc.lock recorded, and compares the bytes. Nothing of the project changes."""

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
"""What training.json tells of where a training ran, beside versions."""


def verify(root: Path, stage: str, rev: str | None = None, deep: bool = False) -> dict[str, Any]:
    """Re-make a stage (with `deep`, every stage above it first) with the code of the revision, from the inputs and parameters that were recorded.

    Args:
        stage: a stage's name, the path of an output or a content hash.
        rev: a git revision; None for the workspace, uncommitted code included.
    Returns:
        {"stage", "rev", "verdict": "identical" or "different", "stages": {address: its outputs' hashes, recorded and made}, "changed": code
        that is not what was recorded, "differences", "causes": what may have made them}. Of `deep`, stages end with the first that differs.
    Raises:
        InputError: an input is not here (nothing was done), or the stage cannot run.
        CheckFailed: an input was tampered with, or the stage's own gate failed.
    """
    at = Revision(root, rev)
    lock = at.lock()
    address = resolve(lock, stage)
    again = [*_above(lock, address), address] if deep else [address]
    with tempfile.TemporaryDirectory(prefix="pedigree-") as folder:
        scratch = _Scratch(at, lock, dvc.store(root), Path(folder).resolve() / "project")
        scratch.fill(again)
        found: dict[str, Any] = {
            "stage": address,
            "rev": rev,
            "verdict": "identical",
            "stages": {},
            "changed": [],
            "differences": [],
            "causes": [],
        }
        for name in again:
            log.info(f"{name}: re-making it")
            found["changed"] += scratch.settle(name)
            scratch.run(name)
            outs, differences = scratch.compare(name)
            found["stages"][name] = {"verdict": "different" if differences else "identical", "outputs": outs}
            if differences:
                causes = [*(f"{what} changed since it was recorded" for what in found["changed"]), *scratch.causes(name)]
                return {**found, "verdict": "different", "differences": differences, "causes": causes}
            dvc.keep(scratch.root, outs)  # what the next stage reads
    return found


@dataclass(frozen=True)
class _Scratch:
    """A clone in a folder of its own, with a cache of its own."""

    at: Revision
    lock: dict[str, Any]
    store: dvc.Store
    """The project's."""
    root: Path

    def fill(self, again: Sequence[str]) -> None:
        """Everything that stages need which are run again: the project's files, and inputs from the cache, each found to be what its hash says."""
        _unpack(self.at, self.root)
        dvc.stand_alone(self.root)
        read = {dep["path"]: dep["md5"] for name in again for dep in self.lock[name].get("deps", [])}
        wanted: dict[str, tuple[str, str | None]] = {}
        stale: list[str] = []
        for name, stage in self.lock.items():
            for out in stage.get("outs", []) if name not in again else []:
                if any(dvc.overlap(out["path"], path) for path in read) and not out["path"].startswith(REPORTS):
                    oid = read.get(out["path"], out["md5"])
                    wanted[out["path"]] = oid, integrity.published(self.at, self.lock, name, out["path"]) if oid == out["md5"] else None
                    if oid != out["md5"]:  # it was made anew since
                        stale.append(name)
                        out["md5"] = oid
        sources = dvc.tracked_sources(self.root)
        wanted |= {path: (oid, None) for path, oid in sources.items() if any(dvc.overlap(path, dep) for dep in read)}
        self._refuse_missing({path: oid for path, (oid, _) in wanted.items()})
        for name in stale:
            (self.root / report_of(name)).unlink(missing_ok=True)
        if stale:
            (self.root / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": self.lock}))
        for path, (oid, published) in wanted.items():
            self._bring(path, oid, published)
        for path, oid in sources.items():  # those that only have to exist
            if path not in wanted and not self._missing(oid):
                self._bring(path, oid, None)
        dvc.keep(self.root, wanted)

    def _missing(self, oid: str) -> list[str]:
        files = self.store.files(oid)
        return [oid] if files is None else [one for one in files.values() if not self.store.at(one).is_file()]

    def _refuse_missing(self, wanted: Mapping[str, str]) -> None:
        lacking = {path: missing for path, oid in wanted.items() if (missing := self._missing(oid))}
        if lacking:
            told = [
                f"{path}: {len(missing)} object(s) of it are not in the cache (first: {missing[0]})" for path, missing in lacking.items()
            ]
            fetch = f"dvc pull {' '.join(lacking)}" if self.at.rev is None else "dvc pull --all-commits"
            raise InputError("\n".join(told), f"fetch them with `{fetch}`, or make them again; nothing was done")

    def _bring(self, path: str, oid: str, published: str | None) -> None:
        target = self.root / path
        if oid.endswith(".dir"):
            target.mkdir(parents=True, exist_ok=True)
        for name, one in (self.store.files(oid) or {}).items():
            file = target / name if name else target
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.store.at(one), file)
            if md5_of_file(file) != one:
                raise CheckFailed(
                    f"{path}: cache object {one} is not what its name says: it was tampered with", "see `pedigree verify --integrity`"
                )
        if published is not None and integrity.sha256_of(target) != published:
            raise CheckFailed(f"{path} is not what was published (sha256 differs)", "see `pedigree verify --integrity`")

    def settle(self, name: str) -> list[str]:
        """Put the recorded parameters in place. Returns code, and folders of outputs, that are not what was recorded.

        Raises:
            InputError: a source in git is not what was recorded, and the latest commit does not have it either.
        """
        values = params.read(self.root)
        recorded = self.lock[name].get("params", {}).get("params.yaml", {})
        if changed := [key for key, value in recorded.items() if _get(values, key) != value]:
            log.info(f"{name}: the recorded {', '.join(changed)} and not that of params.yaml")
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
        if self.at.rev is None:
            shutil.rmtree(self.root / path, ignore_errors=True)
            _unpack(Revision(self.at.root, "HEAD"), self.root, path)
            if dvc.fingerprint(self.root, name).now.get(path) == recorded:
                log.info(f"{name}: {path} has changed; the committed version is used, which is the one recorded")
                return
        where = f"at {self.at.rev}" if self.at.rev else "here or in the latest commit"
        raise InputError(
            f"{name}: {path} {where} is not what dvc.lock recorded", f"run `dvc repro {name}`, or name a commit that has it with --rev"
        )

    def run(self, name: str) -> None:
        """The recorded command, by the interpreter that runs us, on the clone's code."""
        own = {key: value for key, value in os.environ.items() if key not in {"DVC_STAGE", "DVC_ROOT", "DAGSTER_PIPES_CONTEXT"}}
        path = os.pathsep.join([str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = own | dvc.command_environment({"PYTHONPATH": path, "PEDIGREE_PROJECT": str(self.root)})
        code = subprocess.run(self.lock[name]["cmd"], shell=True, cwd=self.root, env=environment, stdout=2, check=False).returncode
        if code:
            kind = InputError if code == 2 else CheckFailed
            raise kind(
                f"{name} could not be re-made: its command failed", "its own message stands above; nothing of the project was changed"
            )

    def compare(self, name: str) -> tuple[dict[str, dict[str, str]], list[dict[str, Any]]]:
        """Each output's recorded and made hash; and where what was made first differs, file by file, the report last."""
        made = dvc.outputs(self.root, name)
        outs = sorted(self.lock[name]["outs"], key=lambda out: out["path"].startswith(REPORTS))
        differences = []
        for out in outs:
            published = integrity.published(self.at, self.lock, name, out["path"]) if not out["path"].startswith(REPORTS) else None
            if made.get(out["path"]) != out["md5"]:
                differences += self._differences(out["path"], out["md5"])
            elif published is not None and integrity.sha256_of(self.root / out["path"]) != published:
                differences.append({"artifact": out["path"], "sha256": "not the one that its report recorded"})
        return {out["path"]: {"recorded": out["md5"], "made": made.get(out["path"], dvc.MISSING)} for out in outs}, differences

    def _differences(self, path: str, oid: str) -> list[dict[str, Any]]:
        target, files = self.root / path, self._recorded(path, oid)
        if files is None:
            return [{"artifact": path, "unknown": "the recorded version is not in the cache"}]
        made = {str(file.relative_to(target)): file for file in target.rglob("*") if file.is_file()} if target.is_dir() else {"": target}
        found: list[dict[str, Any]] = []
        for name in sorted({*files, *(name for name in made if made[name].is_file())}):
            artifact = f"{path}/{name}" if name else path
            if name not in made or not made[name].is_file():
                found.append({"artifact": artifact, "only": "recorded"})
            elif name not in files:
                found.append({"artifact": artifact, "only": "made"})
            elif md5_of_file(made[name]) != files[name][0]:
                kept = files[name][1]
                where = first_difference(kept, made[name]) if kept.is_file() else {"unknown": "the recorded version is not in the cache"}
                found.append({"artifact": artifact, **where})
        return found

    def _recorded(self, path: str, oid: str) -> dict[str, tuple[str, Path]] | None:
        """(hash, file) of each recorded file by its path in the output; a report comes from git or the workspace."""
        if not path.startswith(REPORTS):
            files = self.store.files(oid)
            return None if files is None else {name: (one, self.store.at(one)) for name, one in files.items()}
        kept = self.root.parent / "report.json"
        kept.write_bytes(integrity.bytes_of(self.at, path) or b"")
        return {"": (oid, kept if md5_of_file(kept) == oid else self.store.at(oid))}

    def causes(self, name: str) -> list[str]:
        """What is not as it was when the stage was recorded, as far as reports and training.json tell."""
        found = []
        maker, then = next(
            (
                (maker, environment)
                for maker in reversed([*_above(self.lock, name), name])
                if (environment := json.loads(integrity.bytes_of(self.at, report_of(maker)) or b"{}").get("environment"))
            ),
            (name, {}),
        )
        now = {library: _version(library) for library in then}
        found += [
            f"{library} {then[library]} when {maker} was made, {now[library]} now" for library in then if then[library] != now[library]
        ]
        recorded, made = self._training(name)
        found += [f"{key}: {recorded.get(key)} then, {made.get(key)} now" for key in IDENTITY if recorded.get(key) != made.get(key)]
        if found:
            return found
        same = [f"the same versions as when {maker} was made" if then else "versions then are not recorded"]
        same += [f"the same {', '.join(IDENTITY)}"] if recorded else []
        return [f"unknown: {', '.join(same)}; the kind of processor and environment variables are not recorded"]

    def _training(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        for out in self.lock[name]["outs"]:
            then = (self.store.files(out["md5"]) or {}).get("training.json")
            now = self.root / out["path"] / "training.json"
            if then and self.store.at(then).is_file() and now.is_file():
                return json.loads(self.store.at(then).read_bytes()), json.loads(now.read_bytes())
        return {}, {}


def _above(lock: Mapping[str, Any], address: str) -> list[str]:
    """All stages that one was made from, in flow order."""
    made = {out["path"]: name for name, stage in lock.items() for out in stage.get("outs", [])}
    found: list[str] = []

    def visit(name: str) -> None:
        for dep in lock[name].get("deps", []):
            for maker in dict.fromkeys(maker for path, maker in made.items() if dvc.overlap(path, dep["path"])):
                if maker not in found and maker != address:
                    visit(maker)
                    found.append(maker)

    visit(address)
    return found


def _unpack(at: Revision, target: Path, path: str = ".") -> None:
    """The project's files at a revision, or in the workspace all that git does not ignore."""
    target.mkdir(parents=True, exist_ok=True)
    if at.rev is not None:
        packed = git_bytes(at.root, "archive", "--format=tar", at.rev, "--", path)
        if packed is not None:
            with tarfile.open(fileobj=BytesIO(packed)) as archive:
                archive.extractall(target, filter="tar")
        return
    listed = git_bytes(at.root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", path)
    if listed is None:
        raise InputError(f"{at.root} is not in a git repository", "run `git init`: git tells what belongs to the project")
    for name in sorted({os.fsdecode(name) for name in listed.split(b"\0") if name}):
        source, copy = at.root / name, target / name
        if source.is_symlink() or source.is_file():  # not one that was deleted, nor a submodule
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


def as_text(found: Mapping[str, Any]) -> str:
    lines = [f"{found['stage']}: {found['verdict']}" + (f" at {found['rev']}" if found["rev"] else "")]
    for name, stage in found["stages"].items():
        for path, out in stage["outputs"].items():
            same = out["recorded"] == out["made"]
            lines.append(f"  {name:<16} {path}  {out['recorded'][:12]}" + ("" if same else f" recorded, {out['made'][:12]} made"))
    if found["changed"] and found["verdict"] == "identical":
        lines += ["", f"though changed since it was recorded: {', '.join(found['changed'])}"]
    if found["differences"]:
        lines += [
            "",
            "differs",
            *(f"  {_told(one)}" for one in found["differences"]),
            "",
            "likely cause",
            *(f"  {cause}" for cause in found["causes"]),
        ]
    return "\n".join(lines)


def _told(one: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in one.items() if key != "artifact")
    return f"{one['artifact']}: {rest}"
