"""sha256 of every output, in addition to DVC's md5: DVC trusts read-only cache objects without hashing them.

A stage's report contains the sha256 of the output it published, and an output is compared with
it before it is used. One that differs although DVC reports no change came from a tampered
cache object: it is set aside, and produced again like any missing output. `pedigree verify
--integrity` hashes everything at once, including the cache and dvc.lock, and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any

from dagster_project.core.documents import damage, set_aside
from dagster_project.core.errors import InputError
from dagster_project.core.git import git_bytes
from dagster_project.core.hashing import md5_of_bytes, md5_of_file, sha256_of_file, sha256_of_text
from dagster_project.core.layout import PLOTS, REPORTS, report_of
from dagster_project.core.records import write_text
from dagster_project.core.text import many
from dagster_project.lineage.certificates import CERTIFICATES
from dagster_project.lineage.exports_in_place import without_exports
from dagster_project.lineage.history import LOST_HINT, Objects, Revision, bytes_of, lost_entries, lost_text, undeclared
from dagster_project.lineage.working_folders import from_project, working_folders
from dagster_project.orchestration import dvc, dvc_cache
from dagster_project.orchestration.dvc import StageState

KNOWN_HASHES = Path(".dvc", "tmp", "pedigree", "sha256.json")
"""Cache of hashes: path -> [mtime in ns, inode, size, sha256]. It can be deleted."""
SHOWN = 20
"""Missing objects shown in the terminal."""


def sha256_of(folder: Path, known: dict[str, list[int | str]] | None = None) -> str:
    """sha256 over the lines "<sha256 of file> <path>" of all files in a folder,
    in the order of their paths, without the exports of a release.

    Args:
        folder: or one file.
        known: cache of hashes, which is updated.
    """
    known = {} if known is None else known
    lines = []
    for path in (
        sorted(p for p in without_exports(folder, folder.rglob("*")) if p.is_file()) if folder.is_dir() else [folder]
    ):
        stat = path.stat()
        current = [stat.st_mtime_ns, stat.st_ino, stat.st_size]
        entry = known.get(str(path))
        if entry is None or entry[:3] != current:
            entry = known[str(path)] = [*current, sha256_of_file(path)]
        lines.append(f"{entry[3]} {path.relative_to(folder)}\n")
    return sha256_of_text("".join(lines))


def _differs(published: str, out: Path) -> bool:
    return sha256_of(out) != published


def set_tampered_aside(root: Path, states: Iterable[StageState], locked: bool = False) -> list[str]:
    """Compare the outputs that DVC reports as unchanged with their published sha256; set aside those that differ.

    Outputs that another process is writing are skipped.

    Args:
        locked: DVC has locked these outputs for this process, because it runs a stage that reads them.
    Returns:
        One line for each output set aside.
    """
    known = _known_hashes(root)
    before, lines = json.dumps(known), []
    for state in states:
        report = root / state.report if state.report else None
        if state.output_problem or report is None or not report.is_file():
            continue
        if damage(content := report.read_bytes()):  # sync names it; the stage command refuses it
            continue
        published = json.loads(content).get("output_sha256")
        try:
            if published is None or published == sha256_of(root / state.out, known):
                continue
            objects = dvc_cache.set_aside(root, state.address, partial(_differs, published), locked)
        except FileNotFoundError:  # another process is replacing it
            continue
        if objects is None:
            continue
        what = f"{len(objects)} of its cache objects were tampered with" if objects else "it was changed without DVC"
        lines.append(
            f"{state.address}: {state.out} is not what was published (sha256 differs): {what};"
            " set aside, will be produced again"
        )
    if (after := json.dumps(known)) != before:
        with suppress(OSError):  # the disk is full or read-only: the next command hashes again
            write_text(root / KNOWN_HASHES, after)
    return lines


def _known_hashes(root: Path) -> dict[str, list[int | str]]:
    """The cache of hashes; empty if there is none, or if it was damaged and is set aside."""
    path = root / KNOWN_HASHES
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    if not (why := damage(content)):
        known: dict[str, Any] = json.loads(content)
        if all(isinstance(entry, list) and [*map(type, entry)] == [int, int, int, str] for entry in known.values()):
            return known
        why = "an entry is not [mtime, inode, size, sha256]"
    set_aside(path, why, "all outputs are hashed again")
    return {}


def published(at: Revision, lock: Mapping[str, Any], address: str, path: str) -> str | None:
    """sha256 of a stage's main output according to its report.

    None for other outputs, or if the report is not the recorded one.
    """
    report, recorded = bytes_of(at, report_of(address)), {out["path"]: out.get("md5") for out in lock[address]["outs"]}
    if report is None or path.startswith((REPORTS, PLOTS)) or md5_of_bytes(report) != recorded.get(report_of(address)):
        return None
    return None if damage(report) else json.loads(report).get("output_sha256")


def examine(root: Path, rev: str | None = None, all_revs: bool = False) -> dict[str, Any]:
    """Hash every output and report that dvc.lock names, in the cache and the workspace, and dvc.lock itself.

    Args:
        rev: a git revision instead of the workspace.
        all_revs: the workspace and every commit that changed dvc.lock.
    Returns:
        {"verdict": "intact", "altered" or "incomplete" (nothing altered, but something is
        missing), "findings": [{"where", "path", "wrong", "next"}], "missing": [{"path",
        "object", "next"}], "revisions", "objects", "files", "bytes", "shallow"}.
    Raises:
        InputError: nothing was hashed.
    """
    commits: list[str] = []
    if all_revs:
        commits = (git_bytes(root, "rev-list", "--all", "--full-history", "--", "dvc.lock") or b"").decode().split()
    examination = _Examination(root)
    for revision in [rev, *commits]:
        examination.examine(Revision(root, revision))
    if not (examination.files or examination.findings or examination.missing):
        raise InputError(
            "dvc.lock records no output: there is nothing to hash",
            "run `dvc repro` first, or name a revision with --rev",
        )
    return {
        "verdict": "altered" if examination.findings else "incomplete" if examination.missing else "intact",
        "findings": list(examination.findings.values()),
        "missing": list(examination.missing.values()),
        "revisions": 1 + len(commits),
        "objects": len(examination.objects),
        "files": examination.files,
        "bytes": examination.bytes,
        "shallow": all_revs and (git_bytes(root, "rev-parse", "--is-shallow-repository") or b"").strip() == b"true",
    }


class _Examination:
    """Hashes of all objects examined so far, each hashed once, and the findings."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Objects(root)
        self.objects: dict[str, str | None] = {}
        """sha256 of each object; None if it is missing or its content does not match its name."""
        self.findings: dict[tuple[str, str], dict[str, str]] = {}
        self.missing: dict[tuple[str, str], dict[str, str]] = {}
        self.files = self.bytes = 0

    def examine(self, at: Revision) -> None:
        lock = self._lock(at)
        if at.rev is None and lock:
            self._examine_entries(at, lock)
            self._examine_runs()
        # what a removed variant made can be neither fetched nor made again, and nobody needs it
        removed = undeclared(at, lock)
        folders = working_folders(bytes_of(at, "dvc.yaml") or b"")
        for address, stage in lock.items():
            for out in from_project(address, stage, folders).get("outs", []) if address not in removed else ():
                if "://" in out["path"]:  # neither in the cache nor in the workspace
                    continue
                if out["path"].startswith(REPORTS):
                    self._examine_report(at, address, out)
                else:
                    self._examine_output(
                        at, address, out["path"], out["md5"], published(at, lock, address, out["path"])
                    )
        # DVC may be unable to read an altered one
        if at.rev is None and not any(where == "dvc.lock" for where, _ in self.findings):
            for path, oid in dvc.tracked_sources(self.root).items():
                self._examine_output(at, "", path, oid, None)

    def _lock(self, at: Revision) -> dict[str, Any]:
        """The entries of dvc.lock; if it is damaged, none and a finding."""
        content = bytes_of(at, "dvc.lock")
        lost = lost_entries(self.root) if at.rev is None else []
        wrong, then = "cannot be read", "git checkout dvc.lock"
        if lost:
            wrong, then = lost_text(lost).removeprefix("dvc.lock "), LOST_HINT
        try:
            lock = at.lock(partial=True)
            outs = [out for stage in lock.values() for out in stage.get("outs", [])]
            if all(
                isinstance(out["path"], str) and (isinstance(out.get("md5"), str) or "://" in out["path"])
                for out in outs
            ):
                if lost:
                    self._add_finding("dvc.lock", "dvc.lock", wrong, then)
                return lock
        except InputError as error:
            if content is None:
                raise
            if "cannot be read" in error.what:
                wrong, then = error.what.removeprefix("dvc.lock "), error.hint
        except (ValueError, KeyError, TypeError, AttributeError):
            if content is None:
                raise
        self._add_finding(f"dvc.lock at {at.rev}" if at.rev else "dvc.lock", "dvc.lock", wrong, then)
        return {}

    def _add_finding(self, where: str, path: str, wrong: str, then: str) -> None:
        self.findings.setdefault((where, path), {"where": where, "path": path, "wrong": wrong, "next": then})

    def _add_missing(self, path: str, wanted: str, then: str, rev: str | None = None) -> None:
        """Args:
        wanted: the object, which is listed once for a path.
        rev: revision whose report is missing: each is listed.
        """
        self.missing[path, wanted if rev is None else rev] = {"path": path, "object": wanted, "next": then}

    def _hashes(self, path: Path) -> tuple[str, str]:
        """md5 and sha256 of a file."""
        md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                md5.update(block)
                sha256.update(block)
                self.bytes += len(block)
        self.files += 1
        return md5.hexdigest(), sha256.hexdigest()

    def _object(self, oid: str, path: str, fetch: str, reproduce: str, commit: str) -> str | None:
        """sha256 of an object of the cache; None, and a finding, if it is missing or altered.

        Args:
            path: of the file with this content.
            fetch: next step if it is missing.
            reproduce: next step if it is altered; empty if no stage produces it again.
            commit: command that stores the file of the workspace instead; empty if none does.
        """
        if oid not in self.objects:
            file = self.store.at(oid)
            self.objects[oid] = None

            def then(remove: str) -> str:
                removed = f"{remove} {quote(str(file))}, then "
                return removed + commit if commit and self._has(path, oid) else reproduce or removed + fetch

            if what := _misplaced(file):
                wrong = f"is {what}, not the object; it should contain {path}"
                self._add_finding("cache", str(file), wrong, then("rm -r"))
            elif not file.is_file():
                self._add_missing(path, oid, commit if commit and self._has(path, oid) else fetch)
            else:
                md5, sha256 = self._hashes(file)
                if md5 == oid.removesuffix(".dir"):
                    self.objects[oid] = sha256
                else:
                    self._add_finding("cache", str(file), f"does not match its name; it contains {path}", then("rm"))
        return self.objects[oid]

    def _has(self, path: str, oid: str) -> bool:
        """Whether the workspace has this file; of a folder, any content.

        DVC asks before it commits another one than recorded.
        """
        file = self.root / path
        return file.is_dir() if oid.endswith(".dir") else file.is_file() and md5_of_file(file) == oid

    def _examine_report(self, at: Revision, address: str, out: Mapping[str, Any]) -> None:
        content = bytes_of(at, out["path"])
        where = f"report at {at.rev}" if at.rev else "report"
        if content is None:
            self._add_missing(out["path"], out["md5"], f"git checkout {out['path']}", at.rev or "")
        elif md5_of_bytes(content.replace(b"\r\n", b"\n")) == out["md5"] != md5_of_bytes(content):
            then = (
                "write `* -text` into .gitattributes,"
                " and restore it with `git checkout HEAD`: git changed its line ends"
            )
            self._add_finding(where, out["path"], "has line ends of Windows, unlike what dvc.lock recorded", then)
        elif md5_of_bytes(content) != out["md5"]:
            then = f"git checkout {out['path']}, or dvc repro {address}"
            self._add_finding(where, out["path"], "is not what dvc.lock recorded", then)
        elif at.rev is None and os.path.lexists(copy := self.store.at(out["md5"])):  # a clone has none
            self._object(
                out["md5"], out["path"], "", f"rm -r {quote(str(copy))}: it is only a copy for DVC's run cache", ""
            )
        self.files, self.bytes = self.files + (content is not None), self.bytes + len(content or b"")

    def _examine_output(self, at: Revision, address: str, path: str, oid: str, sha256: str | None) -> None:
        """Compare an output, in the cache and the workspace, with its record.

        Args:
            address: of its stage; empty for a source.
            oid: DVC's hash in dvc.lock.
            sha256: published in the stage's report; None if unknown.
        """
        reproduce = f"dvc pull {quote(path)}"
        if address:
            reproduce = f"dvc repro {address}: it sets altered files aside and produces them again"
        again = "" if at.rev else reproduce  # a stage runs on the files of the workspace
        fetch = "dvc pull --all-commits" if at.rev else f"dvc pull {quote(path)}, or dvc repro {address or quote(path)}"
        if at.rev and any((self.root / CERTIFICATES).glob("*.json")):
            fetch += f", unless `pedigree erase` removed it (certificates in {CERTIFICATES})"
        commit = f"dvc commit {address}" if address and at.rev is None else ""
        listing = self._object(oid, path, fetch, again, commit)
        files = self.store.unverified_listing(oid) if listing else None
        sums = {
            name: self._object(one, f"{path}/{name}" if name else path, fetch, again, commit)
            for name, one in (files or {}).items()
        }
        if files is not None and sha256 and None not in sums.values() and _sha256_of_listing(sums) != sha256:
            where = f"dvc.lock at {at.rev}" if at.rev else "dvc.lock"
            wrong = f"is recorded as {oid}, whose sha256 is not that of the report"
            self._add_finding(where, path, wrong, again or "use another revision")
        if at.rev is None and (self.root / path).exists():
            self._examine_workspace(path, files, sha256, reproduce)

    def _examine_workspace(
        self, path: str, files: Mapping[str, str] | None, sha256: str | None, reproduce: str
    ) -> None:
        """Compare an output in the workspace with its record.

        Args:
            files: recorded md5 by path in the output; None if unknown.
        """
        target = self.root / path
        content = [file for file in without_exports(target, target.rglob("*")) if file.is_file()]
        present = {file.relative_to(target).as_posix(): file for file in content} if target.is_dir() else {"": target}
        hashes = {name: self._hashes(file) for name, file in present.items()}
        recorded = files or {}
        for name in sorted({*present, *recorded}) if files is not None else []:
            file = f"{path}/{name}" if name else path
            if name not in present:
                self._add_finding("workspace", file, "is missing", f"dvc checkout {quote(path)}")
            elif name not in recorded:
                self._add_finding("workspace", file, "is not recorded", f"dvc checkout --force {quote(path)}")
            elif hashes[name][0] != recorded[name]:
                self._add_finding(
                    "workspace", file, "is not what dvc.lock recorded", f"dvc checkout --force {quote(path)}"
                )
        actual = _sha256_of_listing({name: digest for name, (_, digest) in hashes.items()})
        if sha256 and actual != sha256 and not any(dvc.overlap(found, path) for _, found in self.findings):
            self._add_finding("workspace", path, "is not what was published (sha256 differs)", reproduce)

    def _examine_runs(self) -> None:
        """Find damaged records of DVC's run cache: DVC would run their stages again, or restore other outputs."""
        for path in sorted((self.store.storage / "runs").glob("*/*/*")):
            if what := _misplaced(path) or dvc_cache.run_record(path) is None:
                wrong = (
                    f"is {what}, not a record of a run"
                    if isinstance(what, str)
                    else "is a record of a run that does not match its name"
                )
                self._add_finding("cache", str(path), wrong, f"rm -r {quote(str(path))}: only DVC's run cache uses it")

    def _examine_entries(self, at: Revision, lock: Mapping[str, Any]) -> None:
        """Find entries of dvc.lock that are neither committed nor in DVC's run cache."""
        if bytes_of(at, "dvc.lock") == bytes_of(Revision(self.root, "HEAD"), "dvc.lock"):
            return
        try:
            committed = Revision(self.root, "HEAD").lock()
        except InputError:
            committed = {}
        from ruamel.yaml import YAML

        whole = YAML(typ="safe").load(bytes_of(at, "dvc.lock"))
        if set(whole) != {"schema", "stages"} or whole["schema"] != "2.0":
            self._add_finding("dvc.lock", "dvc.lock", "has other keys than DVC writes", "git checkout dvc.lock")
        runs = [
            record
            for path in (self.store.storage / "runs").glob("*/*/*")
            if path.is_file() and (record := dvc_cache.run_record(path)) is not None
        ]
        for address, stage in lock.items():
            if stage == committed.get(address):
                continue
            if not runs:
                what = f"dvc.lock: {address}"
                self._add_missing(what, "DVC's record of its run", "commit dvc.lock, or dvc repro")
            elif stage not in runs:
                wrong = "its entry is neither the committed one nor that of a run that DVC recorded"
                again = f"dvc repro --force --single-item {address}"
                self._add_finding("dvc.lock", address, wrong, f"git checkout dvc.lock, or {again}")


def _misplaced(path: Path) -> str:
    """What is in the place of a file; empty if it is one, or missing."""
    return "a link" if path.is_symlink() else "a folder" if path.is_dir() else ""


def _sha256_of_listing(sums: Mapping[str, str | None]) -> str:
    """`sha256_of` a folder, from the sha256 of its files by path; "" is the path of a single file."""
    lines = [f"{sums[name]} {name or '.'}\n" for name in sorted(sums, key=PurePosixPath)]
    return sha256_of_text("".join(lines))


def as_text(document: Mapping[str, Any]) -> str:
    """The document of `examine` as text for the terminal."""
    lines = [
        f"{document['verdict']}: {many(document['objects'], 'object')} and {many(document['files'], 'file')},"
        f" {document['bytes'] / 1e6:,.1f} MB, hashed with md5 and sha256, {many(document['revisions'], 'revision')}"
        + (" of a shallow clone: earlier ones are unknown" if document["shallow"] else "")
    ]
    for one in document["findings"]:
        lines += [f"  {one['where']}: {one['path']} {one['wrong']}", f"    next: {one['next']}"]
    for one in document["missing"][:SHOWN]:
        lines += [f"  missing: {one['path']} ({one['object']})", f"    next: {one['next']}"]
    more = len(document["missing"]) - SHOWN
    return "\n".join([*lines, *([f"  and {more} more that are missing"] if more > 0 else [])])
