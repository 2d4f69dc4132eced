"""What `pedigree verify` compares: recorded outputs of a stage, its reproduced
outputs in a clone, and the machines that made both."""

from __future__ import annotations

import json
import math
import platform
import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dagster_project.commands import elsewhere
from dagster_project.core.hashing import md5_of_bytes, md5_of_file
from dagster_project.core.layout import REPORTS, is_code, report_of
from dagster_project.core.records import write_json
from dagster_project.lineage.first_difference import first_difference
from dagster_project.lineage.graph import flow_order
from dagster_project.lineage.history import Objects, Revision, bytes_of, report_at, undeclared
from dagster_project.lineage.runs import Listing, outputs_in
from dagster_project.lineage.tolerance import Deviation, deviations
from dagster_project.orchestration import dvc, integrity
from dagster_project.pipeline import FLOATING_POINT

IDENTITY = ("dtype", "device", "threads", "processes", "attention")
"""Keys of training.json that identify the environment of a training, in addition to versions."""


@dataclass(frozen=True)
class Judged:
    """The verdict on one stage."""

    verdict: str
    machine: dict[str, Any]
    """As in `elsewhere.compared`."""
    reasons: Sequence[str] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)
    """{"deviations"}, if another kind of machine made the output."""


@dataclass(frozen=True)
class Outputs:
    """Outputs as recorded, and as reproduced in a clone."""

    at: Revision
    lock: Mapping[str, Any]
    store: Objects
    """Of the project."""
    root: Path
    """Of the clone."""

    def compare(self, name: str) -> tuple[dict[str, dict[str, str]], list[dict[str, Any]]]:
        """Recorded and reproduced hash of each output; and the first difference
        of each file that differs, the report last."""
        reproduced = dvc.outputs(self.root, name)
        outs = sorted(self.lock[name]["outs"], key=lambda out: out["path"].startswith(REPORTS))
        differences = []
        for out in outs:
            published = None
            if not out["path"].startswith(REPORTS):
                published = integrity.published(self.at, self.lock, name, out["path"])
            if reproduced.get(out["path"]) != out["md5"]:
                differences += self._differences(out["path"], out["md5"])
            elif published is not None and integrity.sha256_of(self.root / out["path"]) != published:
                differences.append({"artifact": out["path"], "sha256": "not the one in its report"})
        made = {out["path"]: reproduced.get(out["path"], dvc.MISSING) for out in outs}
        return {out["path"]: {"recorded": out["md5"], "made": made[out["path"]]} for out in outs}, differences

    def _differences(self, path: str, oid: str) -> list[dict[str, Any]]:
        recorded, reproduced = self._recorded(path, oid), self._reproduced(path)
        if recorded is None:
            return [{"artifact": path, "unknown": "the recorded version is not in the cache"}]
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
        """(hash, file) of each recorded file by its path in the output.

        A report comes from git or the workspace, without the machine.
        """
        if not path.startswith(REPORTS):
            files = self.store.unverified_listing(oid)
            return None if files is None else {name: (one, self.store.at(one)) for name, one in files.items()}
        report = self._report(path, oid)
        if report is None:
            return {"": (oid, self.store.at(oid))}
        return {"": _without_machine(report, self.root.parent / "recorded.json")}

    def _reproduced(self, path: str) -> dict[str, Path]:
        """Each reproduced file by its path in the output; a report without the machine."""
        target = self.root / path
        if path.startswith(REPORTS) and target.is_file():
            return {"": _without_machine(json.loads(target.read_bytes()), self.root.parent / "reproduced.json")[1]}
        present = (
            {str(file.relative_to(target)): file for file in target.rglob("*")} if target.is_dir() else {"": target}
        )
        return {name: file for name, file in present.items() if file.is_file()}

    def _report(self, path: str, oid: str) -> dict[str, Any] | None:
        """The recorded report, from git, the workspace or the cache; None if it cannot be found."""
        cached = self.store.at(oid)
        for content in (bytes_of(self.at, path), cached.read_bytes() if cached.is_file() else None):
            if content is not None and md5_of_bytes(content) == oid:
                return dict(json.loads(content))
        return None

    def judge(self, name: str, differences: Sequence[Mapping[str, Any]]) -> Judged:
        """The verdict on a stage.

        Outputs that differ are a fault, unless another kind of machine made them and they are within its bounds.
        """
        recorded, report = self._machine(name), self.root / report_of(name)
        made = json.loads(report.read_bytes()).get("machine") if report.is_file() else None
        machine = elsewhere.compared(recorded, made)
        if not differences:
            return Judged("identical", machine)
        if machine["same_kind"] is not False or name.partition("@")[0] not in FLOATING_POINT:
            return Judged("different", machine)
        incomparable = [
            one["artifact"]
            for one in differences
            if not {"unknown", "only", "sha256"}.isdisjoint(one) and "tensor" not in one
        ]
        parameters = self.lock[name].get("params", {}).get("params.yaml", {})
        listed, beyond = elsewhere.judge(name.partition("@")[0], parameters, self._deviations(name))
        reasons = [f"{artifact}: cannot be compared" for artifact in incomparable] + beyond
        return Judged("different" if reasons else "elsewhere", machine, reasons, {"deviations": listed})

    def _machine(self, name: str) -> dict[str, Any] | None:
        """The machine that the recorded report of a stage names."""
        oid = next((out["md5"] for out in self.lock[name]["outs"] if out["path"] == report_of(name)), "")
        return (self._report(report_of(name), oid) or {}).get("machine") if oid else None

    def _deviations(self, name: str) -> Iterator[Deviation]:
        """How far each reproduced file that differs is from the recorded one."""
        folders = [self.root / dep["path"] for dep in self.lock[name].get("deps", []) if not is_code(dep["path"])]
        starts = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        for out in self.lock[name]["outs"]:
            recorded, reproduced = self._recorded(out["path"], out["md5"]) or {}, self._reproduced(out["path"])
            for file in sorted(recorded.keys() & reproduced.keys()):
                md5, path = recorded[file]
                artifact = f"{out['path']}/{file}" if file else out["path"]
                if md5_of_file(reproduced[file]) == md5:
                    continue
                if path.is_file() and md5_of_file(path) == md5:
                    yield from deviations(artifact, path, reproduced[file], starts)
                else:
                    yield Deviation(
                        artifact, "equal", math.inf, "the recorded version, missing or altered in the cache,"
                    )

    def causes(self, name: str, machine: Mapping[str, Any]) -> list[str]:
        """Differences between the recorded environment and this one, according to reports and training.json."""
        producer, recorded = next(
            (
                (producer, environment)
                for producer in reversed([*ancestors(self.at, self.lock, name), name])
                if (environment := report_at(self.at, producer).get("environment"))
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
        causes += [
            f"{key}: {before.get(key)} then, {after.get(key)} now"
            for key in IDENTITY
            if before.get(key) != after.get(key)
        ]
        causes += elsewhere.differences(machine["recorded"], machine["now"]) if machine["same_kind"] is False else []
        then, here = ((machine[when] or {}).get("packages") for when in ("recorded", "now"))
        if then and here and then != here:
            causes.append(f"other installed packages: sha256 {then[:16]} then, {here[:16]} now")
        if causes:
            return causes
        known = f"the same versions as when {producer} was produced"
        same = [known if recorded else "the earlier versions are not recorded"]
        same += [f"the same {', '.join(IDENTITY)}"] if before else []
        kind = "unknown kind of machine: the report does not record it"
        if machine["same_kind"]:
            kind = "the same kind of machine, which gives the same bytes: a fault"
        elif name.partition("@")[0] not in FLOATING_POINT:
            kind = "this stage gives the same bytes on any machine: a fault"
        return [f"unknown: {', '.join(same)}; {kind}"]

    def _training(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Recorded and reproduced training.json; empty if there is none."""
        for out in self.lock[name]["outs"]:
            oid = (self.store.unverified_listing(out["md5"]) or {}).get("training.json")
            reproduced = self.root / out["path"] / "training.json"
            if oid and self.store.at(oid).is_file() and reproduced.is_file():
                return json.loads(self.store.at(oid).read_bytes()), json.loads(reproduced.read_bytes())
        return {}, {}


def _without_machine(report: Mapping[str, Any], path: Path) -> tuple[str, Path]:
    """Write a report without the machine to `path`: (hash, file)."""
    write_json(path, {key: value for key, value in report.items() if key != "machine"})
    return md5_of_file(path), path


def ancestors(at: Revision, lock: Mapping[str, Any], address: str) -> list[str]:
    """All stages upstream of one according to dvc.lock, in flow order."""
    removed, listing = undeclared(at, lock), Objects(at.root).listing
    return flow_order([address], lambda name: _producers(lock, name, removed, listing))[:-1]


def producers(at: Revision, lock: Mapping[str, Any], addresses: Iterable[str]) -> set[str]:
    """The stages of which some stages read outputs according to dvc.lock."""
    removed, listing = undeclared(at, lock), Objects(at.root).listing
    return {name for address in addresses for name in _producers(lock, address, removed, listing)}


def _producers(lock: Mapping[str, Any], address: str, removed: Collection[str], listing: Listing) -> list[str]:
    """Without renamed and removed variants, whose entries DVC keeps, unless a folder that was read held their outputs.

    Args:
        removed: stages that dvc.yaml no longer has.
    """
    made = {
        posixpath.normpath(out["path"]): (name, out.get("md5", ""))
        for name, stage in lock.items()
        for out in stage.get("outs", [])
    }
    gone = [path for path, (name, _) in made.items() if name in removed]
    found, deleted = set[str](), set[str]()
    for dep in lock[address].get("deps", []):
        read = posixpath.normpath(dep["path"])  # DVC writes it as dvc.yaml has it, such as ./data/x/
        inside = {path: md5 for path, (_, md5) in made.items() if path.startswith(f"{read}/")}
        held = outputs_in(read, dep.get("md5", ""), inside, gone, listing)
        # a report stays in git where its output was deleted
        deleted |= {made[path][0] for path in inside if path not in held and not path.startswith(REPORTS)}
        found |= {made[path][0] for path in made if path not in inside and dvc.overlap(path, read)}
        found |= {made[path][0] for path in held}
    return [name for name in lock if name in found - deleted - {address}]


def _version(library: str) -> str:
    try:
        return platform.python_version() if library == "python" else version(library)
    except PackageNotFoundError:
        return "not installed"
