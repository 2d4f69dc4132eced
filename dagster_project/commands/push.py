"""`pedigree push`: a release to a repository of the Hugging Face Hub, in one
commit: the folder that `export release --all --with-model` makes."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import urlsplit

from dagster_project.commands.export_all import RELEASE, hand_over
from dagster_project.core.documents import read_report
from dagster_project.core.errors import CheckFailed, InputError, PedigreeError
from dagster_project.core.hashing import md5_of_file, sha256_of_file
from dagster_project.core.layout import report_of
from dagster_project.core.text import many
from dagster_project.curation.checks.privacy import scan
from dagster_project.curation.sources import use_policy
from dagster_project.lineage import lineage
from dagster_project.lineage.history import Revision, undeclared
from dagster_project.lineage.index import Index
from dagster_project.lineage.provider import provider
from dagster_project.lineage.scratch_folder import scratch_folder
from dagster_project.lineage.signing.target import Target, find
from dagster_project.views.texts import text

log = logging.getLogger("pedigree")

TOKEN = "HF_TOKEN"
"""Environment variable with the token, the only place from which it is read."""
PUBLIC = "https://huggingface.co"
ENDPOINT = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?(/[^\s?#@]*)?")
"""An address without user and password, which would be in messages."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OF_THE_HUB = (".gitattributes",)
"""Files that the Hub makes in a new repository, and that a push leaves."""
SHOWN = 5
"""Findings that a message names."""


@dataclass(frozen=True)
class Destination:
    """Where a release goes."""

    repo: str
    """OWNER/NAME."""
    private: bool
    endpoint: str
    token: str
    """Empty for a dry run."""


def destination(repo: str, private: bool, dry_run: bool) -> Destination:
    """Raises:
    InputError: the name, the address or the token is invalid, there is no
        token, or it would be sent in the clear to another machine.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo}: {' '.join(str(error).split())}", "name a repository as OWNER/NAME") from None
    if repo.count("/") != 1:
        raise InputError(f"{repo}: no owner", "name a repository as OWNER/NAME")
    endpoint = _endpoint()
    token = "" if dry_run else os.environ.get(TOKEN, "").strip()
    if not token and not dry_run:
        raise InputError(f"{TOKEN} is not set", f"put a token with write permission into {TOKEN}; --dry-run needs none")
    if not re.fullmatch("[!-~]*", token):  # the client's error would quote it
        raise InputError(
            f"{TOKEN} has spaces, line breaks or other characters that are in no token", "copy the token again"
        )
    return Destination(repo, private, endpoint, token)


def _endpoint() -> str:
    """Raises:
    InputError: it is not an address, or a token would be sent in the clear to another machine.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or PUBLIC
    try:
        address = urlsplit(endpoint) if ENDPOINT.fullmatch(endpoint) else None
        if address is None or address.port == 0:
            raise ValueError
    except ValueError:  # also of urlsplit, and of its port
        raise InputError(
            "HF_ENDPOINT is not an address of a Hub without user and password", f"set it to e.g. {PUBLIC}"
        ) from None
    if address.scheme == "http" and address.hostname not in LOOPBACK:
        raise InputError(f"HF_ENDPOINT={endpoint}: the token would be sent unencrypted", "use https")
    return endpoint


def push(
    root: Path, model: str, to: Destination, dry_run: bool, key: str | None, issued: date | None
) -> dict[str, Any]:
    """Check a release and upload it.

    Args:
        key: file of a private key to sign with, as for `export --with-model`.
        issued: as for `export`.
    Returns:
        {"repo", "url", "dry_run", "private", "model": {"stage", "md5"}, "files": [{"path", "bytes", "sha256"}],
        "bytes", "missing": exports, "not_examined": files}; after an upload also {"commit", "before", "deleted"}.
    Raises:
        InputError: not a recorded release with its whole lineage; or the Hub refuses the repository or the token.
        CheckFailed: the gate did not pass, the use policy forbids it, or secrets or personal data are in a text.
        PedigreeError: the connection broke.
    """
    target = find(root, model)
    if target.address != RELEASE:
        raise InputError(
            f"{model}: only a release is published, because only a release passed the gate", "push release"
        )
    target.refuse_unrecorded()
    refuse_failed_gate(root, target, date.today())
    refuse_older(root, target)
    _refuse_by_policy(root, date.today())
    with scratch_folder(root) as scratch:
        folder = scratch / to.repo.rpartition("/")[2]
        exports = hand_over(root, RELEASE, folder, issued, key)
        if find(root, RELEASE).lock_text != target.lock_text:  # what was copied may not be what was checked
            raise InputError("dvc.lock changed meanwhile", "run the same command again")
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        log.info(f"looking for secrets and personal data in {many(len(paths), 'file')}")
        skipped = refuse_private(
            folder, paths, [text for text in provider(root, None).values() if isinstance(text, str)]
        )
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        sha256 = {name: sha256_of_file(path) for name, path in files.items()}
        document = {
            "repo": to.repo,
            "url": f"{to.endpoint}/{to.repo}",
            "dry_run": dry_run,
            "private": to.private,
            "model": {"stage": RELEASE, "md5": target.md5},
            "files": [{"path": name, "bytes": sizes[name], "sha256": sha256[name]} for name in files],
            "bytes": sum(sizes.values()),
            "missing": exports["missing"],
            "not_examined": skipped,
        }
        return document if dry_run else document | upload(to, files, sha256, target.md5)


def refuse_failed_gate(root: Path, target: Target, today: date) -> None:
    """Raises:
    CheckFailed: the last run of the gate failed, the release is older than what
        it was made from, or a waiver that it needed has expired.
    InputError: its report is missing or changed.
    """
    entry, report = target.lock[RELEASE], root / report_of(RELEASE)
    last = read_report(root, RELEASE)
    failed = [
        name
        for name, check in dict[str, Any](last.get("checks", {})).items()
        if check["blocking"] and not check["passed"]
    ]
    if not last.get("passed") or failed:
        raise CheckFailed(
            f"the last run of {RELEASE} did not pass its gate: {', '.join(failed) or 'see its report'}",
            "`dvc repro release`, and fix what it names",
        )
    if md5_of_file(report) != next(out["md5"] for out in entry["outs"] if out["path"] == report_of(RELEASE)):
        raise InputError(
            f"{report_of(RELEASE)}: not what dvc.lock recorded", f"`dvc checkout --force {RELEASE}` restores it"
        )
    made = {out["path"]: (name, out.get("md5")) for name, stage in target.lock.items() for out in stage.get("outs", [])}
    for dep in entry["deps"]:
        name, now = made.get(dep["path"], ("", dep.get("md5")))
        if now != dep.get("md5"):
            raise CheckFailed(
                f"{target.path} was made from an earlier {dep['path']} ({name} ran again since)",
                f"`dvc repro {RELEASE}`",
            )
    gate = json.loads((target.folder / "release.json").read_text(encoding="utf-8"))
    until = {one["check"]: str(one["expires"]) for one in gate.get("waivers", [])}
    for name, check in gate["checks"].items():
        if not check["passed"] and name in until and until[name] < today.isoformat():
            raise CheckFailed(
                f"{name} failed and was waived until {until[name]}, which is over",
                f"renew the waiver in release.waivers, then `dvc repro {RELEASE}`",
            )


def refuse_older(root: Path, target: Target) -> None:
    """Raises:
    CheckFailed: a stage above the release ran again since, also one whose
        output is in a folder of outputs that the release read.
    """
    upstream = lineage.find(Index(root), RELEASE).upstream
    removed = undeclared(Revision(root, None), {run.address for run in upstream})
    left = [run.path for run in upstream if run.address in removed and (root / run.path).exists()]
    removal = f"`rm -r {' '.join(map(quote, left))}`, which dvc.yaml no longer has, then " if left else ""
    for run in upstream:
        outs = target.lock.get(run.address, {}).get("outs", [])
        now = next((out["md5"] for out in outs if out["path"] == run.path), run.md5)
        if now != run.md5:
            raise CheckFailed(
                f"{target.path} was made from an earlier {run.path} ({run.address} ran again since)",
                f"{removal}`dvc repro {RELEASE}`",
            )


def _refuse_by_policy(root: Path, today: date) -> None:
    """Raises:
    CheckFailed: the use policy, as of today, forbids the release, and no waiver holds.
    """
    subject = lineage.find(Index(root), RELEASE, None)
    if use_policy.NAME not in lineage.document(subject):
        return
    verdict = lineage.document(subject, today)[use_policy.NAME]
    if verdict["violations"] and "waiver" not in verdict:
        raise CheckFailed(
            "\n".join(["the use policy forbids it", *use_policy.lines(verdict)]), "see docs/checks.md#use-policy"
        )


def refuse_private(folder: Path, paths: list[Path], published: list[str]) -> list[str]:
    """Look for secrets and personal data in every text that would be uploaded,
    by the rules of the checks `secrets` and `pii`.

    Args:
        published: texts that are meant to be public, such as the contact of the provider.
    Returns:
        Files that are neither text, tables nor safetensors, which were not examined.
    Raises:
        CheckFailed: there are some.
    """
    found, skipped = list[str](), list[str]()
    for path in paths:
        name, texts = path.relative_to(folder).as_posix(), _texts(path)
        if texts is None:
            skipped.append(name)
            continue
        hits = [
            hit for hit in scan(texts) if not any(texts[hit.row][hit.start : hit.end] in text for text in published)
        ]
        has_lines = path.suffix not in {".safetensors", ".parquet"}
        found += [f"{name}{f':{hit.row + 1}' if has_lines else ''}: {hit.kind}: {hit.excerpt}" for hit in hits]
    if found:
        more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise CheckFailed(
            "\n".join(["secrets or personal data would be published:", *found[:SHOWN], *more]),
            "take them out of params.yaml or the sources, where the texts come from, and run the pipeline again",
        )
    return skipped


def _texts(path: Path) -> list[str] | None:
    """The texts of a file: lines, strings of a table, or metadata of weights; None for other binary files."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return [str(value) for value in header.get("__metadata__", {}).values()]
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq
        import pyarrow.types as types

        table = pq.read_table(path)
        values = (
            value
            for column in table.itercolumns()
            if not types.is_primitive(column.type)
            for value in column.to_pylist()
        )
        texts = {
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            for value in values
            if value
        }
        return [*sorted(texts), *(value.decode(errors="replace") for value in (table.schema.metadata or {}).values())]
    content = path.read_bytes()
    return None if b"\0" in content else content.decode("utf-8", errors="replace").split("\n")


def upload(to: Destination, files: Mapping[str, Path], sha256: Mapping[str, str], digest: str) -> dict[str, Any]:
    """Make the repository equal to the files, in one commit.

    Large files are sent first, each on its own, so that an interrupted upload goes on where it was; the commit appears
    as a whole or not at all.

    Args:
        files: path in the repository -> file.
        sha256: path in the repository -> hash of the file.
        digest: content hash of the release.
    Returns:
        {"commit", "before": head of the repository before, None if it is new,
        "private", "deleted": files that were there before}.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    with _explained(to), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tables in a repository of a model: these are part of its record
        api = HfApi(endpoint=to.endpoint, token=to.token)
        before, others, private = _head(api, to)
        deleted = sorted(name for name in others if name not in files)
        if others:
            log.info(f"{to.repo} exists: this is a new commit after {before[:12]}; earlier commits keep their files")
        add = [CommitOperationAdd(name, file) for name, file in files.items()]
        log.info(f"uploading {many(len(add), 'file')}, {human(sum(one.upload_info.size for one in add))}")
        message = f"Release {digest[:12]}"
        operations = [*add, *(CommitOperationDelete(name, is_folder=False) for name in deleted)]
        info = api.create_commit(to.repo, operations, commit_message=message, parent_commit=before)
        _compare(api, to, str(info.oid), sha256, files)
    return {"commit": info.oid, "before": before if others else None, "private": private, "deleted": deleted}


def _head(api: Any, to: Destination) -> tuple[str, list[str], bool]:
    """Commit, files (apart from the Hub's own) and privacy of the repository, which is created if it does not exist.

    Raises:
        InputError: it is public, and should be private.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(to.repo)
    except RepositoryNotFoundError:
        api.create_repo(to.repo, private=to.private or None)  # None: as the owner has set it, usually public
        info = api.model_info(to.repo)
    if to.private and not info.private:
        raise InputError(
            f"{to.repo} exists and is public, which --private does not change",
            "make it private on the Hub, or name another one",
        )
    others = [one.rfilename for one in info.siblings or () if one.rfilename not in OF_THE_HUB]
    return info.sha, others, bool(info.private)


def _compare(api: Any, to: Destination, commit: str, sha256: Mapping[str, str], files: Mapping[str, Path]) -> None:
    """Compare what the Hub lists at the commit with what was uploaded.

    Raises:
        PedigreeError: a file is missing or another one.
    """
    from huggingface_hub.utils.sha import git_hash

    there = {
        one.path: one for one in api.list_repo_tree(to.repo, recursive=True, revision=commit) if hasattr(one, "blob_id")
    }
    for name, expected in sha256.items():
        one = there.get(name)
        same = one is not None and (
            one.lfs.sha256 == expected if one.lfs else one.blob_id == git_hash(files[name].read_bytes())
        )
        if not same:
            raise PedigreeError(
                f"{to.repo}: {name} at commit {commit[:12]} is not the file that was sent",
                "run the same command again; if it stays so, look at the repository",
            )


@contextmanager
def _explained(to: Destination) -> Iterator[None]:
    """Replace errors of the Hub's client by messages.

    Raises:
        InputError: no permission, or a request that the Hub refuses.
        PedigreeError: the connection broke, or the repository changed meanwhile.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    again = (
        "run the same command again: files that were stored completely are not sent again;"
        " the repository has the whole commit or none of it"
    )
    try:
        yield
    except OfflineModeIsEnabled:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be uploaded", "unset it, or use --dry-run") from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        refusal = next((one for one in (error, error.__cause__) if isinstance(one, HfHubHTTPError)), None)
        status = refusal.response.status_code if refusal is not None and refusal.response is not None else None
        said = " ".join(str(error.__cause__ or error).split()).replace(to.token, "***")[:500]
        if status == 401:
            raise InputError(
                f"{to.endpoint} does not accept the token in {TOKEN} for {to.repo}",
                "make a token with write permission",
            ) from None
        if status == 403:
            raise InputError(
                f"the token in {TOKEN} may not write to {to.repo}",
                f"use a token of {to.repo.partition('/')[0]} with write permission",
            ) from None
        if status in {409, 412}:
            raise PedigreeError(
                f"{to.repo} changed meanwhile; no commit was made", "look at it, then run the same command again"
            ) from None
        if status is not None and status < 500:
            raise InputError(f"{to.endpoint} refuses {to.repo}: {said}", "see the message of the Hub") from None
        raise PedigreeError(f"the upload to {to.repo} was interrupted: {said}", again) from None


def human(count: float) -> str:
    """A number of bytes, for people."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def progress_bars() -> None:
    """Show the client's progress bars in a terminal only."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def as_text(document: Mapping[str, Any]) -> str:
    """What was uploaded, or would be, for the terminal."""
    return text("push", **document, human=human)
