"""`pedigree audit` of an exported file or folder: what it says about its
origin, and what of that this project's history confirms.

What a file says is a claim: anyone can write it into any file. Weights of safetensors
are compared with the record, because the copy without our metadata is the recorded
file. Weights of GGUF are other numbers than the recorded ones, and are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dagster_project.commands.model_files.claim import RELEASE, TABLES, Claim, ClaimingFile, audit_hash, lock_hash
from dagster_project.commands.model_files.safetensors_metadata import listing_without_pedigree, md5_without_pedigree
from dagster_project.core.hashing import md5_of_folder
from dagster_project.lineage import lineage
from dagster_project.lineage.history import Revision, commit_of
from dagster_project.lineage.index import Index
from dagster_project.views.texts import text

ONE_FILE = "verified: the file is one of those that this project recorded for the model, apart from the added metadata"
VERDICTS = {
    "verified": "verified: all files are those that this project recorded for the model, apart from the added metadata",
    "different": (
        "NOT VERIFIED: files, or what they say about their origin, differ from what this project recorded for the model"
    ),
    "claimed": (
        "not verified: the project's history has the model that the file names;"
        " whether the file was made from it was not compared"
    ),
    "unknown": "NOT VERIFIED: this project's history has no such model",
    "unverified": "not verified: there is no project here to compare with; this is only what the file says",
}


def examine(root: Path | None, file: ClaimingFile) -> dict[str, Any]:
    """Args:
        root: the project; None: there is none.
    Returns:
        {"file", "format", "says": the claim, "verdict": a key of `VERDICTS`, "verified", "means", "compared": what was
        compared, with the result, "differs": files, "lineage": the audit of the model, or None}.
    """
    verdict, compared, differs, found = _compared(root, file)
    is_one_file = verdict == "verified" and file.path.is_file()
    return {
        "file": str(file.path),
        "format": file.form,
        "says": {key: value for key, value in asdict(file.claim).items() if value},
        "verdict": verdict,
        "verified": verdict == "verified",
        "means": ONE_FILE if is_one_file else VERDICTS[verdict],
        "compared": compared,
        "differs": differs,
        "lineage": found,
    }


def _compared(
    root: Path | None, file: ClaimingFile
) -> tuple[str, dict[str, bool | None], list[str], dict[str, Any] | None]:
    """Verdict, what was compared with its result, files that differ, and the audit of the model."""
    if root is None:
        return "unverified", {}, [], None
    index = Index(root)
    subject = _subject(index, file.claim)
    if subject is None:
        return "unknown", {}, [], None
    found = lineage.document(subject)
    differs = _differing_files(index, subject, file.path) if file.form == "safetensors" else None
    compared: dict[str, bool | None] = {
        "content hash in history": True,
        **_compared_claims(root, file.claim, subject, found),
        "weights" if file.form == "gguf" else "file" if file.path.is_file() else "files": (
            None if differs is None else not differs
        ),
    }
    verdict = "different" if False in compared.values() else "claimed" if differs is None else "verified"
    return verdict, compared, differs or [], found


def _subject(index: Index, claim: Claim) -> lineage.Subject | None:
    """The run whose output has the claimed hash, in the whole length; of
    several, one of the claimed stage and commit, and one of the workspace."""
    runs = index.runs_by_output.get(claim.model, []) if claim.model else []
    for run in sorted(
        runs,
        key=lambda run: (run.address != claim.stage, claim.commit not in index.commits_of(run), not run.in_workspace),
    ):
        if run.in_workspace or run.commit:
            subject = lineage.find(index, run.address, None if run.in_workspace else run.commit)
            if subject.run.md5 == claim.model:
                return subject
    return lineage.find(index, claim.model) if runs else None


def _compared_claims(
    root: Path, claim: Claim, subject: lineage.Subject, found: Mapping[str, Any]
) -> dict[str, bool | None]:
    """Claim -> whether the history confirms it; claims that the file does not make are left out.

    None: it could not be compared.
    """
    results: dict[str, bool | None] = {}
    addresses = {run.address for run in subject.index.runs_by_output[claim.model]}
    results |= {"stage": claim.stage in addresses} if claim.stage else {}
    if claim.commit:
        results["commit"] = _is_recorded_at(root, claim.commit, claim.model)
    if claim.dvc_lock:
        at_commit = results.get("commit")  # a model that was not committed has no commit to compare with
        results["dvc.lock"] = lock_hash(root, claim.commit) == claim.dvc_lock if at_commit else at_commit
    if claim.audit_sha256:
        same = audit_hash(found) == claim.audit_sha256
        results["audit record"] = True if same else None if found["missing"] else False
    return results


def _is_recorded_at(root: Path, commit: str, model: str) -> bool | None:
    """Whether dvc.lock at a commit has an output with this hash; None if this clone does not have the commit."""
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", commit):
        return False
    if commit_of(root, commit) is None:
        return None
    return any(
        out.get("md5") == model for stage in Revision(root, commit).lock().values() for out in stage.get("outs", [])
    )


def _differing_files(index: Index, subject: lineage.Subject, folder: Path) -> list[str] | None:
    """Files that are not as recorded, missing or added; None if the record of single files is not available here.

    Of one file: the file itself, if no file of the model is the same.

    A copy has all files of the model, apart from tables of records; so its hash as a whole is the recorded one where
    there are no such tables. Links to folders, devices and the like are in no record.
    """
    if folder.is_file():
        known = index.files(subject.run.md5)
        return None if known is None else [] if md5_without_pedigree(folder) in known.values() else [folder.name]
    if others := sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_file_or_folder(path)
    ):
        return others
    copied = listing_without_pedigree(folder)
    if md5_of_folder(copied) == subject.run.md5:
        return []
    recorded = index.files(subject.run.md5)
    if recorded is None:
        return None
    is_whole = subject.run.address == RELEASE
    expected = {name: md5 for name, md5 in recorded.items() if is_whole or name in copied or not name.endswith(TABLES)}
    return sorted(name for name in {*expected, *copied} if expected.get(name) != copied.get(name))


def _is_file_or_folder(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and not path.is_symlink())


def as_text(document: Mapping[str, Any]) -> str:
    """For the terminal."""
    return text("claimed", **document, lineage_text=lineage.as_text)


def exit_code(document: Mapping[str, Any]) -> int:
    return 1 if document["verdict"] in ("different", "unknown") else 0
