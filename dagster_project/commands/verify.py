"""`pedigree verify STAGE`: reproduces a stage in a scratch clone from the records in dvc.lock, and compares the bytes.

The project is not changed.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tarfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from dagster_project.commands import elsewhere
from dagster_project.commands.new_project import as_yaml
from dagster_project.commands.outputs import Judged, Outputs, ancestors, producers
from dagster_project.core import params
from dagster_project.core.errors import INNER, CheckFailed, InputError
from dagster_project.core.git import git_bytes, refuse_without_git
from dagster_project.core.hashing import md5_of_file
from dagster_project.core.layout import RECORD_KEY, REPORTS, is_code, report_of
from dagster_project.core.records import remove, write_text
from dagster_project.lineage import code_lock
from dagster_project.lineage.code import PARAMS, value_at, values_in
from dagster_project.lineage.history import LOCK, Objects, Revision, bytes_of, resolve
from dagster_project.lineage.runs import part_of, unread_inputs
from dagster_project.lineage.scratch_folder import scratch_folder
from dagster_project.lineage.working_folders import working_folders
from dagster_project.orchestration import dvc, dvc_cache, dvc_run, integrity, processes
from dagster_project.views.texts import text

log = logging.getLogger("pedigree")


def verify(root: Path, stage: str, rev: str | None = None, deep: bool = False) -> dict[str, Any]:
    """Reproduce a stage with the code of a revision, from recorded inputs and parameters, and compare its outputs.

    Args:
        stage: name of a stage, path of an output, or content hash.
        rev: a git revision; None for the workspace, including uncommitted code.
        deep: reproduce all upstream stages first. The result ends with the first stage that differs.
    Returns:
        {"stage", "rev", "verdict": "identical", "elsewhere" or "different", "stages": {address: recorded and reproduced
        hashes of its outputs}, "changed": code that differs from its record, "differences", "causes": likely causes,
        "machine": {"recorded", "now", "same_kind"} of the stage that decides the verdict}. Stages made on another kind
        of machine also have "deviations", each with its bound.
    Raises:
        InputError: an input is missing, other code than the recorded is installed, or the stage cannot run.
        CheckFailed: an input was tampered with, or a blocking check of the stage failed.
    """
    at = Revision(root, rev)
    lock = at.lock()
    address = resolve(lock, stage)
    addresses = [*ancestors(at, lock, address), address] if deep else [address]
    document: dict[str, Any] = {
        "stage": address,
        "rev": rev,
        "verdict": "identical",
        "stages": {},
        "changed": [],
        "differences": [],
        "causes": [],
        "machine": elsewhere.compared(None, None),
    }
    with closing(reproduce(at, lock, addresses)) as reproduced:
        for one in reproduced:
            judged = one.judged
            document["changed"] += one.changed
            document["stages"][one.name] = {"verdict": judged.verdict, "outputs": one.outs, **judged.measured}
            worse = VERDICTS.index(judged.verdict) - VERDICTS.index(document["verdict"])
            if worse > 0 or (worse == 0 and judged.machine["now"]):
                document |= {"verdict": judged.verdict, "machine": judged.machine}
            if one.differences:
                changed = [f"{path} changed since it was recorded" for path in document["changed"]]
                document["differences"] += one.differences
                document["causes"] += [*changed, *judged.reasons, *one.causes()]
            if judged.verdict == "different":
                break
    return document


def verdicts(root: Path, stages: Sequence[str]) -> dict[str, str]:
    """Verdict of `verify` with `deep` for each of several stages of the workspace.

    Each stage above them is reproduced once.

    Raises:
        InputError, CheckFailed: as `verify`.
    """
    at = Revision(root, None)
    lock = at.lock()
    above = {stage: [*ancestors(at, lock, stage), stage] for stage in stages}
    addresses = list(dict.fromkeys(name for names in above.values() for name in names))
    with closing(reproduce(at, lock, addresses)) as reproduced:
        found = {one.name: one.judged.verdict for one in reproduced}
    return {stage: max((found[name] for name in names), key=VERDICTS.index) for stage, names in above.items()}


@dataclass(frozen=True)
class _Reproduced:
    """A stage that was run again."""

    name: str
    changed: list[str]
    """Code, other files of parameters, and folders of outputs, that differ from their record."""
    outs: dict[str, Any]
    differences: list[dict[str, Any]]
    judged: Judged
    outputs: Outputs

    def causes(self) -> list[str]:
        return self.outputs.causes(self.name, self.judged.machine)


def reproduce(at: Revision, lock: dict[str, Any], addresses: Sequence[str]) -> Generator[_Reproduced]:
    """Run stages in a clone, each from the recorded outputs of those before it.

    Args:
        addresses: in the order of the pipeline.
    """
    code_lock.refuse_to_verify(at.root, {name: code_lock.recorded_in(lock[name]) for name in addresses})
    folders = working_folders((at.text("dvc.yaml") or "").encode())
    for name in addresses:
        if not lock[name].get("outs"):
            raise InputError(
                f"{name}: dvc.lock records no output of this stage, so there is nothing to compare",
                "name a stage with an output",
            )
        if name.partition("@")[0] in folders:
            raise InputError(
                f"{name}: dvc.yaml has `wdir` for this stage, and such stages are not reproduced",
                "write its command and paths from the project's folder, without `wdir`",
            )
        for item in (*lock[name].get("deps", []), *lock[name].get("outs", [])):
            if "md5" not in item:  # a place outside of the project, such as https://
                raise InputError(
                    f"{name}: dvc.lock records no md5 of {item['path']}, so the stage cannot be reproduced",
                    "copy it into the project, e.g. with `dvc import-url`, and read the copy",
                )
    with scratch_folder(at.root) as folder:
        clone = _Clone(at, lock, Objects(at.root), folder / "project")
        clone.fill(addresses)
        outputs = Outputs(at, lock, clone.store, clone.root)
        for name in addresses:
            log.info(f"reproducing {name}")
            changed = clone.restore_parameters(name)
            clone.run(name)
            outs, differences = outputs.compare(name)
            yield _Reproduced(name, changed, outs, differences, outputs.judge(name, differences), outputs)
            clone.settle(name, outs)  # inputs of the next stage


VERDICTS = ("identical", "elsewhere", "different")


@dataclass(frozen=True)
class _Clone:
    """A copy of the project in a temporary folder, with its own cache."""

    at: Revision
    lock: dict[str, Any]
    store: Objects
    """Of the project."""
    root: Path

    def fill(self, addresses: Sequence[str]) -> None:
        """Copy the project's files, and from the cache all inputs of the stages that are going to run.

        Raises:
            InputError: an input is not in the cache.
            CheckFailed: an input was tampered with.
        """
        _unpack(self.at, self.root)
        if (secret := self.at.root / RECORD_KEY).is_file() and not (
            self.root / RECORD_KEY
        ).exists():  # where git ignores it
            (self.root / RECORD_KEY).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(secret, self.root / RECORD_KEY)
        dvc_cache.isolate_project(self.root)
        dependencies = {dep["path"]: dep["md5"] for name in addresses for dep in self.lock[name].get("deps", [])}
        inputs, outdated = self._recorded_inputs(addresses, dependencies)
        sources = dvc.tracked_sources(self.root)
        read = {path: oid for path, oid in sources.items() if any(dvc.overlap(path, dep) for dep in dependencies)}
        for path, oid in [*((path, oid) for path, (oid, _) in inputs.items()), *read.items()]:
            self._refuse_altered_list(path, oid)
        self._refuse_other_parts(addresses, inputs)
        inputs |= {path: (oid, None) for path, oid in read.items()}
        self._refuse_missing({path: oid for path, (oid, _) in inputs.items()})
        for name in outdated:
            (self.root / report_of(name)).unlink(missing_ok=True)
        if outdated:
            write_text(self.root / LOCK, as_yaml({"schema": "2.0", "stages": self.lock}))
        for path, (oid, published) in inputs.items():
            self._copy(path, oid, published)
        for path, oid in sources.items():  # no input, but DVC requires that they exist
            if path not in inputs and not self._missing(oid):
                self._copy(path, oid, None)
        dvc_cache.add_to_cache(self.root, inputs)

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
        read = producers(self.at, self.lock, addresses)
        for name, stage in self.lock.items():
            for out in stage.get("outs", []) if name in read and name not in addresses else []:
                if not any(dvc.overlap(out["path"], path) for path in dependencies) or out["path"].startswith(REPORTS):
                    continue
                oid = dependencies.get(out["path"], out["md5"])
                is_latest = oid == out["md5"]
                inputs[out["path"]] = (
                    oid,
                    integrity.published(self.at, self.lock, name, out["path"]) if is_latest else None,
                )
                if not is_latest:
                    outdated.append(name)
                    out["md5"] = oid
        return inputs, outdated

    def _refuse_altered_list(self, path: str, oid: str) -> None:
        """Raises:
        CheckFailed: the list of files of an input was tampered with, so it names others than the stage read.
        """
        file = self.store.at(oid)
        if oid.endswith(".dir") and file.is_file() and md5_of_file(file) != oid.removesuffix(".dir"):
            raise _tampered(path, oid)

    def _refuse_other_parts(self, addresses: Sequence[str], inputs: Mapping[str, tuple[str, str | None]]) -> None:
        """Raises:
        InputError: a stage read files or a folder of an output, which has another content now, as its stage ran again.
        """
        for name in addresses:
            unread = unread_inputs(name, self.lock[name])
            for dep in (one for one in self.lock[name].get("deps", []) if one["path"] not in unread):
                for path, (oid, _) in inputs.items():
                    part = dep["path"].removeprefix(f"{path}/")
                    if (
                        part != dep["path"]
                        and (files := self.store.unverified_listing(oid))
                        and part_of(files, part) != dep["md5"]
                    ):
                        raise InputError(
                            f"{name} read another {dep['path']} than there is now",
                            f"`dvc repro {name}`, or give --rev of its commit",
                        )

    def _missing(self, oid: str) -> list[str]:
        files = self.store.unverified_listing(oid)
        return [oid] if files is None else [one for one in files.values() if not self.store.at(one).is_file()]

    def _refuse_missing(self, inputs: Mapping[str, str]) -> None:
        missing = {path: objects for path, oid in inputs.items() if (objects := self._missing(oid))}
        if missing:
            lines = [
                f"{path}: {len(objects)} object(s) of it are not in the cache (first: {objects[0]})"
                for path, objects in missing.items()
            ]
            fetch = f"dvc pull {' '.join(missing)}" if self.at.rev is None else "dvc pull --all-commits"
            raise InputError("\n".join(lines), f"fetch them with `{fetch}`, or produce them again; nothing was done")

    def _copy(self, path: str, oid: str, published: str | None) -> None:
        """Copy an output from the project's cache, and verify its hashes."""
        target = self.root / path
        if oid.endswith(".dir"):
            target.mkdir(parents=True, exist_ok=True)
        for name, one in (self.store.unverified_listing(oid) or {}).items():
            file = target / name if name else target
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.store.at(one), file)
            if md5_of_file(file) != one:
                raise _tampered(path, one)
        if published is not None and integrity.sha256_of(target) != published:
            raise CheckFailed(f"{path} is not what was published (sha256 differs)", "see `pedigree verify --integrity`")

    def restore_parameters(self, name: str) -> list[str]:
        """Write the recorded parameters of a stage to params.yaml, and to other files of YAML.

        Returns:
            Code, other files of parameters, and folders of outputs, that differ from their record.
        Raises:
            InputError: a source in git differs from its record, and its version in the latest commit does, too.
        """
        code = []
        for file, recorded in self.lock[name].get("params", {}).items():
            content = (self.root / file).read_bytes() if (self.root / file).is_file() else b""
            values = params.read(self.root) if file == PARAMS else values_in(file, content) or {}
            changed = [key for key, value in (recorded or {}).items() if value_at(values, key) != value]
            if not changed or file == code_lock.FILE:
                continue
            if Path(file).suffix not in {".yaml", ".yml"}:
                code.append(file)
                continue
            log.info(f"{name}: using the recorded {', '.join(changed)} instead of that in {file}")
            for key in changed:
                _put(values, key, recorded[key])
            write_text(self.root / file, as_yaml(values))
        if entry := code_lock.recorded_in(self.lock[name]):
            code_lock.record(self.root, entry)
        deps = {dep["path"]: dep["md5"] for dep in self.lock[name].get("deps", [])}
        outs = [out["path"] for stage in self.lock.values() for out in stage.get("outs", [])]
        for path, now in dvc.inputs_now(self.root, name).items():
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
            if dvc.inputs_now(self.root, name).get(path) == recorded:
                log.info(f"{name}: {path} has changed; using the committed version, which is the recorded one")
                return
        where = f"at {self.at.rev}" if self.at.rev else "here or in the latest commit"
        raise InputError(
            f"{name}: {path} {where} is not what dvc.lock recorded",
            f"run `dvc repro {name}`, or name a commit that has it with --rev",
        )

    def run(self, name: str) -> None:
        """Run the recorded commands on the clone's code, by the current interpreter, as DVC does: each line or item
        in a shell of the user's kind, until one fails.

        Raises:
            InputError: a command failed with exit code 2.
            CheckFailed: it failed with another exit code.
        """
        # the copy is in a folder of the project's repository, which is not the copy's
        outside = {"GIT_CEILING_DIRECTORIES": str(self.root.parent)}
        environment = dvc_run.environment_in_copy(self.root, ["DVC_STAGE"], {INNER: "1", **outside})
        recorded, shell = self.lock[name]["cmd"], os.environ.get("SHELL") or "/bin/sh"
        for command in recorded if isinstance(recorded, list) else recorded.splitlines():
            with processes.ended_with_its_children(
                subprocess.Popen(command, shell=True, executable=shell, cwd=self.root, env=environment, stdout=2)
            ) as process:
                code = process.wait()
            if code:
                kind = InputError if code == 2 else CheckFailed
                raise kind(
                    f"{name} could not be reproduced: its command failed",
                    f"{processes.next_step(code)}; the project was not changed",
                )

    def settle(self, name: str, outs: Mapping[str, Mapping[str, str]]) -> None:
        """Put the recorded version of each output in place of one that differs,
        so that the next stages start from what they started from."""
        for path, out in outs.items():
            if out["made"] == out["recorded"]:
                continue
            remove(self.root / path)
            if path.startswith(REPORTS):
                (self.root / path).write_bytes(bytes_of(self.at, path) or b"")
            else:
                self._copy(path, out["recorded"], integrity.published(self.at, self.lock, name, path))
        dvc_cache.add_to_cache(self.root, outs)


def _tampered(path: str, oid: str) -> CheckFailed:
    return CheckFailed(
        f"{path}: cache object {oid} does not match its name: it was tampered with", "see `pedigree verify --integrity`"
    )


def _unpack_unexported(at: Revision, target: Path, path: str) -> None:
    """Copy the files at a revision that .gitattributes leaves out of archives
    (`export-ignore`), or that archives change (`export-subst`)."""
    changes = git_bytes(at.root, "grep", "-l", "export-subst", f"{at.rev}", "--", ":(top,glob)**/.gitattributes")
    found = git_bytes(at.root, "grep", "-alzF", "$Format:", f"{at.rev}", "--", path) if changes else None
    changed = {name.partition(b":")[2] for name in (found or b"").split(b"\0")}
    for line in (git_bytes(at.root, "ls-tree", "-r", "-z", f"{at.rev}", "--", path) or b"").split(b"\0"):
        facts, _, name = line.partition(b"\t")
        mode, kind = facts.split()[:2] if name else (b"", b"")
        file = target / os.fsdecode(name)
        if kind != b"blob" or (os.path.lexists(file) and (name not in changed or mode == b"120000")):
            continue
        content = git_bytes(at.root, "cat-file", "--filters", f"{at.rev}:./{os.fsdecode(name)}")
        if content is None:
            raise InputError(
                f"git cannot read {os.fsdecode(name)} at {at.rev}",
                "fetch the objects of that commit (`git fetch`, `git lfs fetch`)",
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        if mode == b"120000":
            file.symlink_to(os.fsdecode(content))
        else:
            file.write_bytes(content)
            file.chmod(0o755 if mode == b"100755" else 0o644)


def _unpack(at: Revision, target: Path, path: str = ".") -> None:
    """Copy the project's files at a revision; in the workspace, all files that git does not ignore."""
    target.mkdir(parents=True, exist_ok=True)
    if at.rev is not None:
        packed = git_bytes(at.root, "archive", "--format=tar", at.rev, "--", path)
        if packed is not None:
            with tarfile.open(fileobj=BytesIO(packed)) as archive:
                archive.extractall(target, filter="tar")
        _unpack_unexported(at, target, path)
        return
    listed = git_bytes(at.root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", path)
    if listed is None:
        refuse_without_git()
        raise InputError(f"{at.root} is not in a git repository", "run `git init`: git lists the files of the project")
    for name in sorted({os.fsdecode(name) for name in listed.split(b"\0") if name}):
        source, copy = at.root / name, target / name
        if source.is_symlink() or source.is_file():  # neither deleted nor a submodule
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value


def as_text(document: Mapping[str, Any]) -> str:
    """The document of `verify` as text for the terminal."""
    measured = [one for stage in document["stages"].values() for one in elsewhere.largest(stage.get("deviations", []))]
    return text("verify", **document, measured=measured)
