"""Our own sha256 of every output, beside DVC's md5: DVC trusts a read-only cache object without hashing it, we do not.

A stage's report holds the sha256 of the output it published. Before an output is used it is compared; one that differs though DVC calls it clean
came from a tampered cache object, is set aside, and is then made again like any output that is missing. `pedigree verify --integrity` looks at everything
at once, the cache and dvc.lock included, and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.git import git_bytes
from dagster_project.core.hashing import md5_of_bytes, sha256_of_file, sha256_of_text
from dagster_project.core.layout import PLOTS, REPORTS, report_of
from dagster_project.lineage.history import Revision
from dagster_project.orchestration import dvc
from dagster_project.orchestration.dvc import StageState

"""Where a stage's outputs lie that are not its main one."""
KNOWN = Path(".dvc", "tmp", "pedigree", "sha256.json")
"""What was hashed before: path -> [mtime in ns, inode, size, sha256]. Only a cache: it can be deleted."""


def sha256_of(folder: Path, known: dict[str, list[int | str]] | None = None) -> str:
    """sha256 over the lines "<sha256 of file> <path>" of all files in a folder, in the order of their paths."""
    known = {} if known is None else known
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]:
        stat = path.stat()
        seen = [stat.st_mtime_ns, stat.st_ino, stat.st_size]
        have = known.get(str(path))
        if have is None or have[:3] != seen:
            have = known[str(path)] = [*seen, sha256_of_file(path)]
        lines.append(f"{have[3]} {path.relative_to(folder)}\n")
    return sha256_of_text("".join(lines))


def _differs(published: str, out: Path) -> bool:
    return sha256_of(out) != published


def set_tampered_aside(root: Path, states: Iterable[StageState], held: bool = False) -> list[str]:
    """Compare what DVC calls clean with the sha256 it was published with; set aside what differs. Returns a line for each.

    What another process is at work on is left to the next look.

    Args:
        held: DVC holds these outputs for us, because it runs a stage that reads them.
    """
    path = root / KNOWN
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    before, said = json.dumps(known), []
    for state in states:
        report = root / state.report if state.report else None
        if state.doubt or report is None or not report.is_file():
            continue
        published = json.loads(report.read_text()).get("output_sha256")
        try:
            if published is None or published == sha256_of(root / state.out, known):
                continue
            objects = dvc.set_aside(root, state.address, partial(_differs, published), held)
        except FileNotFoundError:  # it is being replaced
            continue
        if objects is None:
            continue
        what = f"{len(objects)} cache object(s) of it were tampered with" if objects else "it was changed behind DVC's back"
        said.append(f"{state.address}: {state.out} is not what was published (sha256 differs): {what}; set aside, to be made again")
    if (after := json.dumps(known)) != before:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(after)
        scratch.replace(path)
    return said


def bytes_of(at: Revision, path: str) -> bytes | None:
    if at.rev is None:
        file = at.root / path
        return file.read_bytes() if file.is_file() else None
    return git_bytes(at.root, "show", f"{at.rev}:./{path}")


def published(at: Revision, lock: Mapping[str, Any], address: str, path: str) -> str | None:
    """The sha256 that a stage's report gives its main output; None for another output, or if the report is not the one that dvc.lock recorded."""
    report, known = bytes_of(at, report_of(address)), {out["path"]: out["md5"] for out in lock[address]["outs"]}
    if report is None or path.startswith((REPORTS, PLOTS)) or md5_of_bytes(report) != known.get(report_of(address)):
        return None
    return json.loads(report).get("output_sha256")


def examine(root: Path, rev: str | None = None, all_revs: bool = False) -> dict[str, Any]:
    """Hash everything that dvc.lock reaches, whatever DVC thinks of it: cache objects, and in the workspace outputs, reports and dvc.lock itself.

    Args:
        rev: a git revision instead of the workspace.
        all_revs: the workspace and every commit that changed dvc.lock.
    Returns:
        {"verdict": "intact", "altered" or "incomplete" (nothing altered, but not everything is here), "findings": [{"where", "path", "wrong", "next"}],
        "missing": [{"path", "object", "next"}], "revisions", "objects", "files", "bytes", "shallow"}.
    """
    listed = (git_bytes(root, "rev-list", "--all", "--", "dvc.lock") or b"").decode().split() if all_revs else []
    look = _Look(root)
    for revision in [rev, *listed]:
        look.at(Revision(root, revision))
    verdict = "altered" if look.findings else "incomplete" if look.missing else "intact"
    shallow = all_revs and (git_bytes(root, "rev-parse", "--is-shallow-repository") or b"").strip() == b"true"
    counts = {"revisions": 1 + len(listed), "objects": len(look.objects), "files": look.files, "bytes": look.bytes}
    return {
        "verdict": verdict,
        "findings": list(look.findings.values()),
        "missing": list(look.missing.values()),
        **counts,
        "shallow": shallow,
    }


class _Look:
    """What has been hashed so far, each object once, and what was found."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, dvc.store(root)
        self.objects: dict[str, str | None] = {}
        """sha256 of each object; None of one that is not here or not what its name says."""
        self.findings: dict[tuple[str, str], dict[str, str]] = {}
        self.missing: dict[tuple[str, str], dict[str, str]] = {}
        self.files = self.bytes = 0

    def at(self, at: Revision) -> None:
        lock = self._lock(at)
        if at.rev is None and lock:
            self._entries(at, lock)
        for address, stage in lock.items():
            for out in stage["outs"]:
                if out["path"].startswith(REPORTS):
                    self._report(at, address, out)
                else:
                    self._output(at, address, out["path"], out["md5"], published(at, lock, address, out["path"]))
        if at.rev is None and not any(where == "dvc.lock" for where, _ in self.findings):  # which DVC may not read
            for path, oid in dvc.tracked_sources(self.root).items():
                self._output(at, "", path, oid, None)

    def _lock(self, at: Revision) -> dict[str, Any]:
        """The entries of dvc.lock; none, and a finding, if it is damaged."""
        content = bytes_of(at, "dvc.lock")
        try:
            lock = at.lock()
            if all(isinstance(out[key], str) for stage in lock.values() for out in stage["outs"] for key in ("path", "md5")):
                return lock
        except (InputError, ValueError, KeyError, TypeError, AttributeError):
            if content is None:
                raise
        self._found(f"dvc.lock at {at.rev}" if at.rev else "dvc.lock", "dvc.lock", "cannot be read", "git checkout dvc.lock")
        return {}

    def _found(self, where: str, path: str, wrong: str, then: str) -> None:
        self.findings.setdefault((where, path), {"where": where, "path": path, "wrong": wrong, "next": then})

    def _hashes(self, path: Path) -> tuple[str, str]:
        md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                md5.update(block)
                sha256.update(block)
                self.bytes += len(block)
        self.files += 1
        return md5.hexdigest(), sha256.hexdigest()

    def _object(self, oid: str, path: str, fetch: str, again: str) -> str | None:
        if oid not in self.objects:
            file = self.store.at(oid)
            self.objects[oid] = None
            if not file.is_file():
                self.missing[path, oid] = {"path": path, "object": oid, "next": fetch}
            else:
                md5, sha256 = self._hashes(file)
                if md5 == oid.removesuffix(".dir"):
                    self.objects[oid] = sha256
                else:
                    self._found("cache", str(file), f"is not what its name says; it holds {path}", again)
        return self.objects[oid]

    def _report(self, at: Revision, address: str, out: Mapping[str, Any]) -> None:
        content = bytes_of(at, out["path"])
        where = f"report at {at.rev}" if at.rev else "report"
        if content is None:
            self.missing[out["path"], at.rev or ""] = {"path": out["path"], "object": out["md5"], "next": f"git checkout {out['path']}"}
        elif md5_of_bytes(content) != out["md5"]:
            self._found(where, out["path"], "is not what dvc.lock recorded", f"git checkout {out['path']}, or dvc repro {address}")
        self.files, self.bytes = self.files + 1, self.bytes + len(content or b"")

    def _output(self, at: Revision, address: str, path: str, oid: str, told: str | None) -> None:
        again = f"dvc repro {address}: what is not what it was is set aside and made again" if address else f"dvc pull {path}"
        fetch = "dvc pull --all-commits" if at.rev else f"dvc pull {path}, or dvc repro {address or path}"
        listing = self._object(oid, path, fetch, again)
        known = self.store.files(oid) if listing else None
        files = known or {}
        sums = {name: self._object(one, f"{path}/{name}" if name else path, fetch, again) for name, one in files.items()}
        if known is not None and told and None not in sums.values() and _whole(sums) != told:
            self._found(
                f"dvc.lock at {at.rev}" if at.rev else "dvc.lock",
                path,
                f"is recorded as {oid}, whose sha256 is not that of the report",
                again,
            )
        target = self.root / path
        if at.rev is not None or not target.exists():
            return
        lying = {p.relative_to(target).as_posix(): p for p in target.rglob("*") if p.is_file()} if target.is_dir() else {"": target}
        hashes = {name: self._hashes(file) for name, file in lying.items()}
        for name in sorted({*lying, *files}) if known is not None else []:
            one = f"{path}/{name}" if name else path
            if name not in lying:
                self._found("workspace", one, "is gone", f"dvc checkout {path}")
            elif name not in files:
                self._found("workspace", one, "is in no record", f"dvc checkout {path}")
            elif hashes[name][0] != files[name]:
                self._found("workspace", one, "is not what dvc.lock recorded", f"dvc checkout --force {path}")
        if (
            told
            and _whole({name: sha256 for name, (_, sha256) in hashes.items()}) != told
            and not any(dvc.overlap(at, path) for _, at in self.findings)
        ):
            self._found("workspace", path, "is not what was published (sha256 differs)", again)

    def _entries(self, at: Revision, lock: Mapping[str, Any]) -> None:
        """Entries of dvc.lock that are neither committed nor in DVC's own record of the runs."""
        if bytes_of(at, "dvc.lock") == bytes_of(Revision(self.root, "HEAD"), "dvc.lock"):
            return
        try:
            committed = Revision(self.root, "HEAD").lock()
        except InputError:
            committed = {}
        from ruamel.yaml import YAML

        whole = YAML(typ="safe").load(bytes_of(at, "dvc.lock"))
        if set(whole) != {"schema", "stages"} or whole["schema"] != "2.0":
            self._found("dvc.lock", "dvc.lock", "does not begin as DVC writes it", "git checkout dvc.lock")
        runs = [path.read_bytes() for path in self.store.runs.rglob("*") if path.is_file()]
        for address, stage in lock.items():
            if stage == committed.get(address):
                continue
            if not runs:
                self.missing["dvc.lock", address] = {
                    "path": f"dvc.lock: {address}", "object": "DVC's record of its run", "next": "commit dvc.lock, or dvc repro"
                }  # fmt: skip
            elif not any(stage == YAML(typ="safe").load(run) for run in runs if str(stage.get("cmd", "")).encode() in run):
                wrong = "its entry is neither the committed one nor that of a run that DVC recorded"
                self._found("dvc.lock", address, wrong, f"git checkout dvc.lock, or dvc repro --force {address}")


def _whole(sums: Mapping[str, str | None]) -> str:
    """`sha256_of` a folder, from the sha256 of its files by path; "" is the path of an output that is one file."""
    lines = [f"{sums[name]} {name or '.'}\n" for name in sorted(sums, key=PurePosixPath)]
    return sha256_of_text("".join(lines))


def as_text(found: Mapping[str, Any]) -> str:
    lines = [
        f"{found['verdict']}: {found['objects']} objects and {found['files']} files, {found['bytes'] / 1e6:,.1f} MB, hashed with md5 and sha256,"
        f" {found['revisions']} revision(s)" + (" of a shallow clone: earlier ones are unknown" if found["shallow"] else "")
    ]
    lines += [f"  {one['where']}: {one['path']} {one['wrong']}\n    next: {one['next']}" for one in found["findings"]]
    lines += [f"  not here: {one['path']} ({one['object']})\n    next: {one['next']}" for one in found["missing"][:SHOWN]]
    rest = len(found["missing"]) - SHOWN
    return "\n".join([*lines, *([f"  and {rest} more that are not here"] if rest > 0 else [])])


SHOWN = 20
"""Missing objects told at a terminal."""
