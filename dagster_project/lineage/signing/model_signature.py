"""The signature of a folder in the form of OpenSSF Model Signing, version 1.0:
a Sigstore bundle with the sha256 of every file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dagster_project.core.hashing import sha256_of_file
from dagster_project.lineage.signing import envelope
from dagster_project.lineage.signing.envelope import STATEMENT_TYPE, SignatureError
from dagster_project.lineage.signing.keys import PrivateKey, PublicKey

SIGNATURE, ATTESTATIONS, PUBLIC_KEY = "model.sig", "model.intoto.jsonl", "model.pub"
"""Files about a model, beside it or in its folder. They are not part of it."""
IGNORED = (".git", ".gitattributes", ".github", ".gitignore", ATTESTATIONS, PUBLIC_KEY, SIGNATURE)
"""Paths in a folder that its signature leaves out: those of git, as the
`model_signing` command does by default, and the files above."""
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What a signature says about a folder."""

    name: str
    files: Mapping[str, str]
    """Path in the folder -> sha256."""
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """The files of a folder."""

    files: Mapping[str, Path]
    other: tuple[str, ...]
    """Symbolic links, and everything else that is neither a file nor a folder."""
    ignored: tuple[str, ...]
    """Ignored paths that exist."""


def contents(folder: Path, ignored: Iterable[str]) -> Contents:
    """All files of a folder by their path in it, without ignored paths. Symbolic links are not followed."""
    excluded, files, other, skipped, pending = set(ignored), dict[str, Path](), list[str](), list[str](), [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                if name in excluded:
                    skipped.append(name)
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    files[name] = folder / name
                else:
                    other.append(name)
    return Contents(
        {name: files[name] for name in sorted(files, key=PurePosixPath)}, tuple(sorted(other)), tuple(sorted(skipped))
    )


def together(first: Contents, second: Contents) -> Contents:
    """The files of two folders, as if they were in one."""
    files = {**first.files, **second.files}
    return Contents({name: files[name] for name in sorted(files, key=PurePosixPath)}, first.other + second.other, ())


def manifest(name: str, found: Contents) -> Manifest:
    """Hash the files of a folder."""
    return Manifest(name, {path: sha256_of_file(file) for path, file in found.files.items()}, IGNORED)


def bundle(described: Manifest, key: PrivateKey) -> str:
    """The content of the signature's file."""
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": described.name, "digest": {"sha256": _root(described.files.values())}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(described.ignored),
            },
            "resources": [
                {"name": name, "algorithm": "sha256", "digest": digest} for name, digest in described.files.items()
            ],
        },
    }
    document = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": key.public.fingerprint}, "tlogEntries": []},
        "dsseEnvelope": envelope.seal(statement, key, keyid=""),
    }
    return json.dumps(document, separators=(",", ":"))


def read_bundle(content: bytes, key: PublicKey) -> Manifest:
    """What a signature says, if it is by this key.

    Raises:
        SignatureError: it is not, or it is not a signature that is supported.
    """
    document = envelope.parsed(content)
    if not isinstance(document, dict) or set(document) != {"mediaType", "verificationMaterial", "dsseEnvelope"}:
        raise SignatureError("is not a Sigstore bundle with a DSSE envelope")
    if document["mediaType"] != MEDIA_TYPE:
        raise SignatureError("is a Sigstore bundle of another version")
    material = document["verificationMaterial"]
    if material != {"publicKey": {"hint": key.fingerprint}, "tlogEntries": []}:
        if not isinstance(material, dict) or set(material) != {"publicKey", "tlogEntries"}:
            raise SignatureError(
                "is signed with a certificate, which is not supported: `model_signing verify` reads it"
            )
        raise SignatureError(f"is signed by another key than this one (sha256 {key.fingerprint[:16]}), or was changed")
    statement = envelope.unseal(document["dsseEnvelope"], key)
    if document["dsseEnvelope"]["signatures"][0]["keyid"] != "":  # it is not signed, and no tool writes one here
        raise SignatureError("was changed: it names another key beside its signature")
    return _manifest_in(statement)


def _manifest_in(statement: Mapping[str, Any]) -> Manifest:
    """The manifest in a statement whose signature was verified; it may come from another tool.

    Raises:
        SignatureError: it has another form, or contradicts itself.
    """
    if statement.get("predicateType") != PREDICATE_TYPE:
        raise SignatureError("does not have the form of OpenSSF Model Signing 1.0")
    try:
        [subject], predicate = statement["subject"], statement["predicate"]
        serialization, resources = predicate["serialization"], predicate["resources"]
        files = {one["name"]: one["digest"] for one in resources}
        method = (
            serialization["method"],
            serialization["hash_type"],
            {one["algorithm"] for one in resources} - {"sha256"},
        )
        ignored = tuple(map(str, serialization.get("ignore_paths", ())))
        sound = len(files) == len(resources) and all(isinstance(text, str) for text in (*files, *files.values()))
        sound = sound and all(map(_SHA256.fullmatch, files.values()))
        sound = sound and _root(files.values()) == subject["digest"]["sha256"]
        name = str(subject["name"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SignatureError("does not have the form of OpenSSF Model Signing 1.0") from None
    if method != ("files", "sha256", set()):
        raise SignatureError(
            "hashes shards, or not with sha256, which is not supported: `model_signing verify` reads it"
        )
    if not sound:
        raise SignatureError("contradicts itself: its list of files does not give its hash")
    return Manifest(name, files, ignored)


def _root(digests: Iterable[str]) -> str:
    """sha256 over the digests of all files, in the order of the list."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def differences(
    expected: Mapping[str, str], found: Contents, sha256: Callable[[Path], str], done: str
) -> dict[str, str]:
    """Path in a folder -> what is wrong, for every file that is not what was signed or attested.

    Args:
        expected: path in the folder -> sha256.
        sha256: hashes a file.
        done: "signed" or "attested".
    """
    wrong = dict.fromkeys(found.other, "is neither a file nor a folder")
    wrong |= dict.fromkeys(found.files.keys() - expected.keys(), f"was added since it was {done}")
    for name, digest in expected.items():
        if name not in found.files:
            wrong.setdefault(name, f"is missing, and was {done}")
        elif sha256(found.files[name]) != digest:
            wrong[name] = f"is not what was {done}"
    return dict(sorted(wrong.items()))
