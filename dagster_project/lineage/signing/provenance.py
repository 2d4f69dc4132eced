"""Attestations: how each stage of a lineage was run, as in-toto statements with
a SLSA Provenance predicate, and whether they fit together.

Everything comes from the stage's entry in dvc.lock, its report, and the files that the entry refers to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from pydantic import TypeAdapter

from dagster_project.lineage.export.summary import published_parameters
from dagster_project.lineage.history import is_within
from dagster_project.lineage.runs import teacher_of, unread_inputs, watched_inputs
from dagster_project.lineage.signing import envelope
from dagster_project.lineage.signing.envelope import STATEMENT_TYPE, SignatureError
from dagster_project.lineage.signing.keys import PrivateKey, PublicKey

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:pedigree:dvc-stage:1"
"""`externalParameters` then has: "stage", "cmd", "params" (without ids of records), "deps" (path -> the stages that
produced it; none for sources and code) and "outs" (paths)."""
BUILDER = "urn:pedigree:run"
REMADE = "pedigree verify --deep"
"""Name of the by-product that says with which result a stage was made again before it was signed."""

WATCHED = {"learned_from": False}
"""Annotation of files that a stage was only measured by or compared with, such
as a reward model during DPO, or did not open."""

_DIGESTS = {"md5": re.compile("[0-9a-f]{32}"), "sha256": re.compile("[0-9a-f]{64}")}

Files = Mapping[str, Mapping[str, str]]
"""Path in the project -> its digests by algorithm: "sha256", and "md5" as in DVC's cache."""


@dataclass(frozen=True)
class StageRecord:
    """What is known of one run of a stage."""

    address: str
    entry: Mapping[str, Any]
    """In dvc.lock."""
    text: str
    """Of the entry, with the beginning of dvc.lock (`lock_texts`)."""
    producers: Mapping[str, Sequence[str]]
    """Path of a dependency -> the stages that produced it."""
    files: Files
    """All files of its dependencies and outputs."""
    report: Mapping[str, Any]
    remade: Mapping[str, Any] | None = None
    """The result of making it again; None if that was not done."""


def lock_texts(text: str) -> dict[str, str]:
    """Address -> text of its entry in a dvc.lock, after what precedes all entries."""
    head, *pieces = re.split(r"^  (['\"]?)([\w@.-]+)\1:\n", text.replace("\r\n", "\n"), flags=re.MULTILINE)
    entries = zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
    return {name: f"{head}  {quote}{name}{quote}:\n{entry}" for quote, name, entry in entries}


def statement(record: StageRecord) -> dict[str, Any]:
    """The in-toto statement about one run. The same record gives the same statement."""
    deps = [dep["path"] for dep in record.entry.get("deps", [])]
    outs = [out["path"] for out in record.entry.get("outs", [])]
    external = {
        "stage": record.address,
        "cmd": record.entry["cmd"],
        "params": {file: published_parameters(values or {}) for file, values in record.entry.get("params", {}).items()},
        "deps": {path: list(record.producers.get(path, ())) for path in deps},
        "outs": outs,
    }
    watched = watched_inputs(record.address, record.entry) | unread_inputs(record.address, record.entry)
    read = [
        one | ({"annotations": WATCHED} if any(is_within(one["name"], path) for path in watched) else {})
        for one in _descriptors(record.files, deps)
    ]
    entry = {"uri": f"dvc.lock#{record.address}", "digest": {"sha256": _sha256(record.text)}}
    dependencies = [entry, *read, *_teacher(record)]
    details: dict[str, Any] = {"builder": _builder(record.report)}
    if record.remade is not None:
        details["byproducts"] = [{"name": REMADE, "annotations": record.remade}]
    return {
        "_type": STATEMENT_TYPE,
        "subject": _descriptors(record.files, outs),
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": external,
                "resolvedDependencies": dependencies,
            },
            "runDetails": details,
        },
    }


def _descriptors(files: Files, paths: Sequence[str]) -> list[dict[str, Any]]:
    names = sorted(name for name in files if any(is_within(name, path) for path in paths))
    return [{"name": name, "digest": dict(files[name])} for name in names]


def _teacher(record: StageRecord) -> list[dict[str, Any]]:
    """The files of a larger model that was learned from, whose hashes the stage compared.

    DVC does not know them, so they have no name in dvc.lock.
    """
    teacher = teacher_of(record.address, record.entry)
    if teacher is None:
        return []
    folder = quote(teacher["folder"])
    return [
        {"uri": f"file:{folder}/{quote(name)}", "digest": {"sha256": digest}}
        for name, digest in teacher["sha256"].items()
    ]


def _builder(report: Mapping[str, Any]) -> dict[str, Any]:
    """The environment that the report recorded; data stages record none."""
    builder: dict[str, Any] = {"id": BUILDER}
    if versions := report.get("environment"):
        builder["version"] = {str(name): str(version) for name, version in versions.items()}
    if machine := report.get("machine"):
        packages = (
            [{"name": "installed packages", "digest": {"sha256": machine["packages"]}}] if "packages" in machine else []
        )
        builder["builderDependencies"] = [*packages, {"name": "machine", "annotations": machine}]
    return builder


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def lines(statements: Sequence[Mapping[str, Any]], key: PrivateKey) -> str:
    """The signed statements as an in-toto bundle: one DSSE envelope on each line."""
    return "".join(_line(envelope.seal(one, key, key.public.fingerprint)) for one in statements)


def _line(sealed: Mapping[str, Any]) -> str:
    return json.dumps(sealed, separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class Attested:
    """What a verified statement says about one run of a stage."""

    address: str
    entry_sha256: str
    """`_sha256` of its text in dvc.lock."""
    deps: Mapping[str, Sequence[str]]
    outs: Sequence[str]
    read: Files
    made: Files
    remade: Literal["identical", "elsewhere"] | None
    """The verdict of making it again; None if that was not done."""

    def describes(self, text: str | None) -> bool:
        """Whether its entry in dvc.lock is still that one."""
        return text is not None and _sha256(text) == self.entry_sha256


def read(content: bytes, key: PublicKey) -> list[Attested]:
    """The statements of a bundle, if all of them are signed by this key, with the lineage in flow order.

    Raises:
        SignatureError: they are not, a byte of the file was changed, or lines
            are missing, repeated, added or in another order.
    """
    found = []
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            sealed = envelope.parsed(line)
            found.append(_attested(envelope.unseal(sealed, key)))
        except SignatureError as error:
            raise SignatureError(f"line {number} {error}") from None
        if _line(sealed).encode() != line or sealed["signatures"][0]["keyid"] != key.fingerprint:
            raise SignatureError(f"line {number} was changed: it is not written as `pedigree attest` writes it")
    if not found:
        raise SignatureError("is empty")
    _refuse_gaps(found)
    return found


def _attested(signed: Mapping[str, Any]) -> Attested:
    """Raises:
    SignatureError: it is a statement of another kind.
    """
    try:
        definition, details = signed["predicate"]["buildDefinition"], signed["predicate"]["runDetails"]
        if signed["predicateType"] != PREDICATE_TYPE or definition["buildType"] != BUILD_TYPE:
            raise SignatureError(f"is not a statement of {BUILD_TYPE}")
        external, [entry, *dependencies] = definition["externalParameters"], definition["resolvedDependencies"]
        found = {
            "address": external["stage"],
            "entry_sha256": entry["digest"]["sha256"],
            "deps": external["deps"],
            "outs": external["outs"],
            "read": {one["name"]: one["digest"] for one in dependencies if "name" in one},
            "made": {one["name"]: one["digest"] for one in signed["subject"]},
            "remade": next(
                (one["annotations"]["verdict"] for one in details.get("byproducts", []) if one["name"] == REMADE), None
            ),
        }
        attested = TypeAdapter(Attested).validate_python(found)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SignatureError(f"is not a statement of {BUILD_TYPE}") from None
    if any(not is_inside(path) for path in (*attested.deps, *attested.outs, *attested.read, *attested.made)):
        raise SignatureError("names a path that is not one in a project")
    for digests in (*attested.read.values(), *attested.made.values()):
        if digests.keys() != _DIGESTS.keys() or not all(
            _DIGESTS[name].fullmatch(digest) for name, digest in digests.items()
        ):
            raise SignatureError("names a file without its md5 and sha256")
    return attested


def is_inside(path: str) -> bool:
    """Whether a path is relative, does not lead out of its folder, and can be that of a file."""
    try:
        parts = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:
        return False
    return (
        "\0" not in path
        and len(path) < 4000
        and all(part not in (b"", b".", b"..") and len(part) <= 255 for part in parts)
    )


def _refuse_gaps(found: Sequence[Attested]) -> None:
    """Refuse lines that are not one lineage: each stage once, before its
    readers, and each but the last one read by another.

    Raises:
        SignatureError: they are not; or a stage read another file than its producer made.
    """
    before: dict[str, Attested] = {}
    for one in found:
        if one.address in before:
            raise SignatureError(f"has {one.address} twice")
        for path, producers in one.deps.items():
            if missing := [name for name in producers if name not in before]:
                raise SignatureError(f"lacks the statement about {missing[0]}, which {one.address} read ({path})")
            for name, digest in one.read.items():
                made = [
                    before[producer].made
                    for producer in producers
                    if any(is_within(name, out) for out in before[producer].outs)
                ]
                if is_within(name, path) and any(files.get(name) != digest for files in made):
                    raise SignatureError(
                        f"contradicts itself: {one.address} read another {name} than {', '.join(producers)} made"
                    )
        before[one.address] = one
    used = {name for one in found for producers in one.deps.values() for name in producers}
    if extra := [one.address for one in found[:-1] if one.address not in used]:
        raise SignatureError(
            f"has a statement about {extra[0]}, which is not part of the lineage of {found[-1].address}"
        )
