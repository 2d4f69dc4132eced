"""Which data, parameters, code and checks made this model? Read from dvc.lock, the reports and git, at any revision."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.errors import InputError

CODE = "dagster_project/"


@dataclass(frozen=True)
class Revision:
    """The project's files as they are in the workspace (rev None) or were at a commit."""

    root: Path
    rev: str | None

    def text(self, path: str) -> str | None:
        if self.rev is None:
            file = self.root / path
            return file.read_text(encoding="utf-8") if file.is_file() else None
        shown = _git(self.root, "show", f"{self.rev}:{path}")
        return shown if shown is not None else None

    def json(self, path: str) -> dict[str, Any]:
        text = self.text(path)
        return json.loads(text) if text else {}

    def lock(self) -> dict[str, Any]:
        """The stages of dvc.lock.

        Raises:
            InputError: nothing was ever run there, or the revision does not exist.
        """
        if self.rev is not None and _git(self.root, "rev-parse", "--verify", "--quiet", f"{self.rev}^{{commit}}") is None:
            raise InputError(f"no revision {self.rev!r} in this repository", "see `git log`")
        text = self.text("dvc.lock")
        if not text:
            raise InputError(f"no dvc.lock{f' at {self.rev}' if self.rev else ''}: nothing has been run", "run `dvc repro` first")
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError

        try:
            return dict(YAML(typ="safe").load(text).get("stages", {}))
        except (YAMLError, AttributeError) as error:
            raise InputError(
                f"dvc.lock cannot be read: {' '.join(str(error).split())}", "resolve the merge, or restore it with `git checkout dvc.lock`"
            ) from None


def _git(root: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def files_at(version: str, paths: Sequence[Path], folder: Path) -> list[Path]:
    """Another version of `paths`: the path named `version`, or what git holds at the revision `version`, written into `folder`.

    Raises:
        InputError: there is neither such a path nor such a revision, or git does not hold one of the paths there.
    """
    if version and _is_there(Path(version)):
        return [Path(version)]
    if missing := [path for path in paths if not _is_there(path)]:
        raise InputError(f"--since {version}: {missing[0]} does not exist here", "name a file or folder with the earlier version")
    found = []
    known = shutil.which("git") and version
    commit = known and _git(Path.cwd(), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{version}^{{commit}}")
    if not commit:
        raise InputError(
            f"--since {version}: no such path, and no such revision in git", "name a file, a folder, or a revision (see `git log`)"
        )
    for number, path in enumerate(paths):
        real = path.resolve()
        top = real if real.is_dir() else real.parent
        listed = _git_bytes(top, "ls-tree", "-r", "-z", commit.strip(), "--", str(real))
        entries = [entry.split("\t", 1) for entry in os.fsdecode(listed or b"").split("\0") if entry]
        if not entries:
            raise InputError(
                f"--since {version}: git does not hold {path} at that revision", "name a file or folder with the earlier version"
            )
        place = folder / str(number) / (real.name or "root")
        for what, name in entries:
            mode, _, digest = what.split()
            target = place / name if real.is_dir() else place.parent / name
            if mode == SUBMODULE or ".." in target.parts:
                continue
            content = _git_bytes(top, "cat-file", "blob", digest) or b""
            target.parent.mkdir(parents=True, exist_ok=True)
            if mode == LINK:
                target.symlink_to(os.fsdecode(content))
            else:
                target.write_bytes(content)
        found.append(place)
    return found


LINK, SUBMODULE = "120000", "160000"
"""Modes of git's entries."""


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a file
        return False


def _git_bytes(root: Path, *arguments: str) -> bytes | None:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def resolve(lock: dict[str, Any], model: str) -> str:
    """The address of the stage that a name, a path or a content hash stands for.

    Raises:
        InputError: nothing, or more than one thing, matches.
    """
    wanted = model.rstrip("/").removeprefix("./")
    if wanted in lock:
        return wanted
    found = [
        address
        for address, stage in lock.items()
        for out in stage.get("outs", [])
        if out["path"] == wanted or (len(wanted) >= 6 and out["md5"].startswith(wanted))
    ]
    if len(set(found)) == 1:
        return found[0]
    if found:
        raise InputError(f"{model} could be {', '.join(sorted(set(found)))}", "give more of the hash, or the stage's name")
    raise InputError(f"{model}: no such stage, output path or content hash in dvc.lock", f"known: {', '.join(lock)}")


def audit(root: Path, model: str, rev: str | None = None) -> dict[str, Any]:
    """The lineage of one output.

    Returns:
        {"model", "sources", "stages", "parameters", "code", "metrics"}: `sources` with sha256, rows and licence; `stages` in flow order, each with
        its output's hash, inputs, rows and failed or dropping checks; `parameters` as they were recorded; `code` with commit and file hashes.
    """
    at = Revision(root, rev)
    lock = at.lock()
    address = resolve(lock, model)
    makers = {out["path"]: name for name, stage in lock.items() for out in stage.get("outs", [])}
    order: list[str] = []

    def visit(name: str) -> None:
        for parent in _parents(lock, makers, name):
            visit(parent)
        if name not in order:
            order.append(name)

    visit(address)
    stages = {name: _stage(at, lock, makers, name) for name in order}
    files = {dep["path"]: dep["md5"] for name in order for dep in lock[name].get("deps", []) if dep["path"].startswith(CODE)}
    parameters = {key: value for name in order for values in lock[name].get("params", {}).values() for key, value in values.items()}
    reports = {name: at.json(_report(name)) for name in order}
    commit = (_git(root, "rev-parse", rev or "HEAD") or "").strip() or None
    status = _git(root, "status", "--porcelain", "--", "dagster_project", "dvc.yaml", "params.yaml", "data/sources")
    out = _output(lock[address])
    return {
        "model": {"stage": address, "path": out["path"], "md5": out["md5"]},
        "sources": reports.get("raw_examples", {}).get("sources", {}),
        "base_model": {
            key: value for key, value in reports.get("base_model", {}).items() if key in {"origin", "licence", "parameters", "sha256"}
        },
        "stages": stages,
        "parameters": parameters,
        "code": {"commit": commit, "clean": rev is not None or not status, "files": dict(sorted(files.items()))},
        "environment": reports.get(address.replace("merged", "adapter").replace("evaluation", "adapter"), {}).get("environment", {}),
        "metrics": _metrics(at, lock, address),
    }


def _parents(lock: dict[str, Any], makers: dict[str, str], name: str) -> list[str]:
    reads = [dep["path"] for dep in lock[name].get("deps", [])]
    return list(dict.fromkeys(maker for path, maker in makers.items() for read in reads if path == read or path.startswith(read + "/")))


def _output(stage: dict[str, Any]) -> dict[str, Any]:
    """The stage's one output, apart from its report and plots."""
    return next(out for out in stage["outs"] if not out["path"].startswith(("data/reports/", "data/plots/")))


def _report(address: str) -> str:
    return f"data/reports/{address.replace('@', '/')}.json"


def _stage(at: Revision, lock: dict[str, Any], makers: dict[str, str], name: str) -> dict[str, Any]:
    report = at.json(_report(name))
    checks = {check: {"passed": found["passed"], "count": found["count"]} for check, found in report.get("checks", {}).items()}
    out = _output(lock[name])
    return {
        "output": out["path"],
        "md5": out["md5"],
        "inputs": {dep["path"]: dep["md5"] for dep in lock[name].get("deps", []) if not dep["path"].startswith(CODE)},
        "parents": _parents(lock, makers, name),
        **{key: report[key] for key in ("rows_in", "rows_out", "dropped") if key in report},
        **({"examples": {split: report[split] for split in ("train", "validation", "test")}} if name == "splits" else {}),
        **({"checks": checks} if checks else {}),
    }


def _metrics(at: Revision, lock: dict[str, Any], address: str) -> dict[str, Any]:
    """The figures of the stage itself, and of the evaluation of its variant."""
    variant = address.partition("@")[2]
    names = [
        address,
        *([f"evaluation@{variant}"] if variant and f"evaluation@{variant}" in lock and address != f"evaluation@{variant}" else []),
    ]
    return {
        name: {key: value for key, value in at.json(_report(name)).items() if key not in {"checks", "environment", "passed"}}
        for name in names
    }


def as_text(found: dict[str, Any]) -> str:
    """The audit for a person at a terminal."""
    model, code = found["model"], found["code"]
    lines = [f"{model['stage']}  {model['path']}  md5 {model['md5']}", ""]
    commit = code["commit"][:12] if code["commit"] else "none"
    lines += [f"code       commit {commit}{'' if code['clean'] else ', with uncommitted changes'}; {len(code['files'])} files"]
    if found["base_model"]:
        base = found["base_model"]
        lines += [f"base model {base['origin']}, {base['licence']}, sha256 {base['sha256'].get('model.safetensors', '')[:16]}"]
    if found["environment"]:
        lines += [f"made with  {', '.join(f'{name} {version}' for name, version in found['environment'].items())}"]
    lines += ["", "sources"]
    lines += [
        f"  {path}  {source['rows']} rows, {source['format']}, {source['licence']}, sha256 {source['sha256'][:16]}"
        for path, source in found["sources"].items()
    ]
    lines += ["", "stages"]
    for name, stage in found["stages"].items():
        rows = f"  {stage['rows_in']} rows in, {stage['rows_out']} out" if "rows_in" in stage else ""
        drops = "  dropped: " + ", ".join(f"{check} {n}" for check, n in stage["dropped"].items()) if stage.get("dropped") else ""
        split = "  " + ", ".join(f"{split} {n}" for split, n in stage["examples"].items()) if "examples" in stage else ""
        checks = (
            f"  {sum(c['passed'] for c in stage['checks'].values())} of {len(stage['checks'])} checks passed" if "checks" in stage else ""
        )
        lines.append(f"  {name:<16} {stage['md5'][:12]}{rows}{drops}{split}{checks}")
    lines += [
        "",
        "parameters",
        *(f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in found["parameters"].items()),
        "",
        "metrics",
    ]
    for name, metrics in found["metrics"].items():
        lines += [f"  {name}  {key}: {json.dumps(value)}" for key, value in metrics.items()]
    return "\n".join(lines)
