"""What an exported file says about its origin: made from dvc.lock and git when
the file is written, and read from any file later, as a claim."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dagster_project.commands.model_files import gguf_metadata, safetensors_metadata
from dagster_project.commands.model_files.safetensors_metadata import NAMESPACE
from dagster_project.core.errors import InputError
from dagster_project.core.git import git_bytes
from dagster_project.core.hashing import sha256_of_bytes, sha256_of_file, sha256_of_text
from dagster_project.lineage import lineage
from dagster_project.lineage.history import LOCK
from dagster_project.lineage.index import Index

AUDITED = ("model", "sources", "other_files", "base_model", "records", "parameters", "waivers")
"""Parts of an audit that its hash covers. Code, machine and metrics are left
out: what is known of them in a clone depends on its commits and caches."""
LONGEST = 500
"""Characters of a value that are read from a file."""
WEIGHTS = "*.safetensors"
GGUF = "*.gguf"
TABLES = ".parquet"
"""Tables of records and texts beside the weights, which do not leave the
project. Those of a release name records by published ids, and are part of it."""
RELEASE = "release"
"""Stage of the release."""


@dataclass(frozen=True)
class Claim:
    """Origin of a model. Empty: not known, or not stated."""

    model: str = ""
    """Content hash of the model's output, as in dvc.lock."""
    stage: str = ""
    """Its stage, such as merged@lora."""
    dvc_lock: str = ""
    """sha256 of the dvc.lock that records it: at `commit`, else in the workspace."""
    commit: str = ""
    """The first commit that records it."""
    audit_sha256: str = ""
    """sha256 of the audit's record (`audit_hash`)."""
    quantization: str = ""
    """Number format of a GGUF file."""

    def as_fields(self) -> dict[str, str]:
        """Keys and values for a file's metadata."""
        return {f"{NAMESPACE}{name}": value for name, value in asdict(self).items() if value}

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> Claim:
        """The claim in a file's metadata; other keys are ignored."""
        given = {name: fields.get(f"{NAMESPACE}{name}", "")[:LONGEST] for name in cls.__dataclass_fields__}
        return cls(**given)


def audit_hash(document: Mapping[str, Any]) -> str:
    """Args:
    document: of `lineage.document`.
    """
    return sha256_of_text(json.dumps({name: document[name] for name in AUDITED}, sort_keys=True, ensure_ascii=False))


def lock_hash(root: Path, commit: str | None) -> str:
    """sha256 of dvc.lock at a commit; in the workspace for None. Empty if it does not exist."""
    if commit is None:
        return sha256_of_file(root / LOCK) if (root / LOCK).is_file() else ""
    content = git_bytes(root, "show", "--no-textconv", f"{commit}:./{LOCK}")
    return "" if content is None else sha256_of_bytes(content)


def make(root: Path, model: str) -> Claim:
    """The claim for a model of the workspace.

    Raises:
        InputError: dvc.lock does not have it.
    """
    index = Index(root)
    subject = lineage.find(index, model)
    commit = index.first_commit_with(subject.run)
    audited = audit_hash(lineage.document(subject))
    return Claim(subject.run.md5, subject.run.address, lock_hash(root, commit), commit or "", audited)


@dataclass(frozen=True)
class ClaimingFile:
    """A file or folder that says where it is from."""

    path: Path
    form: str
    """gguf, or safetensors: a folder of a model, or one file of it."""
    claim: Claim


def read(path: Path) -> ClaimingFile | None:
    """The claim in a GGUF or safetensors file, or in a folder with such files.

    None if there is nothing of the kind, or it has no claim.

    Raises:
        InputError: a file is damaged, the files of a folder claim different
            origins, or a folder has several GGUF files.
    """
    if path.is_dir():
        ggufs, weights = sorted(path.glob(GGUF)), sorted(path.glob(WEIGHTS))
        if len(ggufs) > 1 and not weights:
            raise InputError(f"{path}: it has {len(ggufs)} GGUF files", f"name one, such as {ggufs[0]}")
        if ggufs and not weights:
            return read(ggufs[0])
        claims = {Claim.from_fields(safetensors_metadata.own_metadata(file)) for file in weights if file.is_file()}
        claims.discard(Claim())
        if len(claims) > 1:
            raise InputError(f"{path}: its files claim to be parts of different models", "copy the folder again")
        return ClaimingFile(path, "safetensors", claims.pop()) if claims else None
    if _is_safetensors(path):
        claim = Claim.from_fields(safetensors_metadata.own_metadata(path))
        return None if claim == Claim() else ClaimingFile(path, "safetensors", claim)
    if not (path.is_file() and gguf_metadata.is_gguf(path)):
        return None
    fields = gguf_metadata.read(path).fields
    claim = Claim.from_fields({name: field.value for name, field in fields.items() if isinstance(field.value, str)})
    return None if claim == Claim() else ClaimingFile(path, "gguf", claim)


def _is_safetensors(path: Path) -> bool:
    return path.is_file() and fnmatch(path.name, WEIGHTS)


def is_model_file(path: Path) -> bool:
    """Whether a path is a GGUF or safetensors file, or a folder with weights."""
    if path.is_dir():
        return any(path.glob(GGUF)) or any(path.glob(WEIGHTS))
    return _is_safetensors(path) or (path.is_file() and gguf_metadata.is_gguf(path))
