"""`pedigree sign` and `pedigree attest`: sign a model, and how each stage of its lineage was run.

Nothing is written into an output of the pipeline.
"""

from __future__ import annotations

import os
import posixpath
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.hashing import md5_of_file, md5_of_folder, sha256_of_file
from dagster_project.core.records import write_text
from dagster_project.lineage.export.folder import FOLDER, PAGE
from dagster_project.lineage.exports_in_place import names_in
from dagster_project.lineage.history import LOCK, Revision, is_within, report_at
from dagster_project.lineage.signing import model_signature, provenance
from dagster_project.lineage.signing.keys import KEY_VARIABLE, PASSWORD_VARIABLE, PrivateKey, private_key
from dagster_project.lineage.signing.model_signature import ATTESTATIONS, IGNORED, PUBLIC_KEY, SIGNATURE
from dagster_project.lineage.signing.target import Target, find
from dagster_project.views.texts import text


def sign(root: Path, model: str, key_file: str | None) -> dict[str, Any]:
    """Sign all files of a folder. Of a release with exports, its folder is signed in place, with the exports.

    Args:
        model: name of a stage, path of its output, content hash, or any folder.
        key_file: of the private key; None: from the environment.
    Returns:
        {"model", "folder", "files": number of files, "signature", "public_key":
        paths, "key": sha256 of the public key}.
    Raises:
        InputError: no such folder, no usable key, the output is not the recorded one, or the folder cannot be signed.
    """
    key, recorded = private_key(key_file), find(root, model)
    recorded.refuse_unrecorded()
    target = recorded
    if any(os.path.lexists(target.folder / name) for name in (PAGE, FOLDER) if name in target.exports):
        target = _with_exports(target)
    target.refuse_other_key(key.public)
    if key_file and Path(key_file).resolve().is_relative_to(target.folder.resolve()):
        raise InputError(
            f"--key {key_file}: the private key is in the folder to be signed",
            "keep it elsewhere: the folder may be published",
        )
    found = files_to_sign(target)
    text = model_signature.bundle(model_signature.manifest(target.folder.name, found), key)
    recorded.refuse_unrecorded()  # so it did not change while it was hashed
    return {**_written(target, SIGNATURE, text, key), "files": len(found.files)}


def _with_exports(target: Target) -> Target:
    """The folder of a release with its exports.

    Raises:
        InputError: these are not its exports.
    """
    from dagster_project.commands.verify_signatures import contradictions_in

    if found := contradictions_in(target.as_folder()):
        file, wrong = next(iter(found.items()))
        raise InputError(
            f"{file} {wrong}: nothing was signed",
            f"`pedigree export {target.address} --all` writes the exports of this {target.address}",
        )
    return target.as_folder()


def files_to_sign(target: Target) -> model_signature.Contents:
    """Raises:
    InputError: there are links among them, or there are none.
    """
    found = model_signature.contents(target.folder, (*IGNORED, *target.exports))
    if found.other:
        raise InputError(
            f"{target.path}/{found.other[0]}: neither a file nor a folder", "sign a copy without links: `cp -rL`"
        )
    if not found.files:
        raise InputError(f"{target.path}: it contains no files", "name the folder of a model")
    return found


def _written(target: Target, name: str, text: str, key: PrivateKey) -> dict[str, Any]:
    """Write a file of signatures, and the public key beside it."""
    write_text(target.signatures / PUBLIC_KEY, key.public.pem.decode())
    write_text(target.signatures / name, text)
    return {
        "model": target.label,
        "folder": target.path,
        {SIGNATURE: "signature", ATTESTATIONS: "attestations"}[name]: target.shown(target.signatures / name),
        "public_key": target.shown(target.signatures / PUBLIC_KEY),
        "key": key.public.fingerprint,
    }


def attest(root: Path, model: str, key_file: str | None, remade: bool = False) -> dict[str, Any]:
    """Sign one statement about each stage of a model's lineage.

    Args:
        model: name of a stage, path of its output, or content hash.
        remade: make all these stages again first, from the sources, and state the result.
    Returns:
        {"model", "folder", "stages": addresses in flow order, "remade": verdict
        or None, "attestations", "public_key": paths, "key"}.
    Raises:
        InputError: no such model, no usable key, or a file is not what dvc.lock recorded.
        CheckFailed: made again, an output differs.
    """
    key, target = private_key(key_file), find(root, model)
    if target.root is None:
        raise InputError(
            f"{model}: not an output in dvc.lock, so nothing is recorded about how it was made",
            "name a stage, or its output",
        )
    target.refuse_other_key(key.public)
    records = stage_records(target)
    verdict, results = None, dict[str, Any]()
    if remade:
        verdict, results = _made_again(target.root, target.address, records)
    signed = [provenance.statement(replace(record, remade=results.get(record.address))) for record in records]
    written = _written(target, ATTESTATIONS, provenance.lines(signed, key), key)
    return {**written, "stages": [record.address for record in records], "remade": verdict}


def stage_records(target: Target) -> list[provenance.StageRecord]:
    """What is recorded of each stage that an output was made with, in flow order.

    Raises:
        InputError: a file of the workspace is not what dvc.lock recorded.
    """
    assert target.root is not None
    return Lineage(target.root, target.lock, target.lock_text, target.address).records()


def _made_again(root: Path, address: str, records: Sequence[provenance.StageRecord]) -> tuple[str, dict[str, Any]]:
    """Verdict of `pedigree verify --deep`, and address -> what its statement says about it.

    The stages do not get the key.

    Raises:
        CheckFailed: made again, an output differs, or dvc.lock changed meanwhile.
    """
    from dagster_project.commands.verify import as_text, verify

    for name in (KEY_VARIABLE, PASSWORD_VARIABLE):
        os.environ.pop(name, None)
    document = verify(root, address, deep=True)
    if document["verdict"] == "different":
        raise CheckFailed(
            f"{as_text(document)}\n{address} could not be made again with the same bytes: nothing was signed",
            "see the causes",
        )
    recorded = {
        name: {posixpath.normpath(path): out["recorded"] for path, out in stage["outputs"].items()}
        for name, stage in document["stages"].items()
    }
    if recorded != {
        record.address: {out["path"]: out["md5"] for out in record.entry.get("outs", [])} for record in records
    }:
        raise CheckFailed(f"{LOCK} changed while {address} was made again: nothing was signed", "run the command again")
    return document["verdict"], {name: {"verdict": stage["verdict"]} for name, stage in document["stages"].items()}


def as_text(document: Mapping[str, Any]) -> str:
    """The document of `sign` or `attest` as text for the terminal."""
    return text("signed", **document, quoted=shlex.quote(document["model"]))


@dataclass(frozen=True)
class Present:
    """What is in the workspace at the paths of a lineage."""

    regular: Mapping[str, bool]
    """Path in the project -> whether it is a file, and not a link or something else."""
    made: frozenset[str]
    """Those in outputs."""
    listed: frozenset[str]
    """Those that DVC does not ignore."""


@dataclass(frozen=True)
class Lineage:
    """The stages that an output was made with, and their files in the workspace."""

    root: Path
    lock: Mapping[str, Any]
    lock_text: str
    """The text that `lock` was read from."""
    address: str
    _digests: dict[str, dict[str, str]] = field(default_factory=dict)

    def addresses(self) -> list[str]:
        """All upstream stages in flow order, and the stage itself."""
        from dagster_project.commands.outputs import ancestors

        return [*ancestors(Revision(self.root, None), self.lock, self.address), self.address]

    def texts(self) -> dict[str, str]:
        """Address -> text of its entry in dvc.lock."""
        return provenance.lock_texts(self.lock_text)

    def present(self, deps: Iterable[str], outs: Iterable[str]) -> Present:
        """Everything but folders at or in dependencies and outputs, whether DVC
        lists it or not, but no exports of a release. Links are not followed."""
        from dagster_project.orchestration import dvc

        paths, outs = {*deps, *outs}, set(outs)
        regular = dict[str, bool]()
        for path in paths:
            top = self.root / path
            if top.is_symlink() or not top.is_dir():
                regular |= {path: top.is_file() and not top.is_symlink()} if os.path.lexists(top) else {}
                continue
            found = model_signature.contents(top, names_in(top))
            regular |= {f"{path}/{name}": True for name in found.files} | {
                f"{path}/{name}": False for name in found.other
            }
        made = {name for name in regular if any(is_within(name, out) for out in outs)}
        return Present(regular, frozenset(made), frozenset(dvc.files_within(self.root, paths)))

    def digests(self, name: str) -> dict[str, str]:
        """md5 and sha256 of a file of the project. Each file is hashed once."""
        if name not in self._digests:
            self._digests[name] = {"md5": md5_of_file(self.root / name), "sha256": sha256_of_file(self.root / name)}
        return self._digests[name]

    def records(self) -> list[provenance.StageRecord]:
        """What is known of each stage.

        Raises:
            InputError: a file of the workspace is not what dvc.lock recorded.
        """
        addresses, texts = self.addresses(), self.texts()
        if unread := [name for name in addresses if name not in texts]:
            raise InputError(
                f"{LOCK}: the entry of {unread[0]} is not written as DVC writes it",
                f"restore it: `git checkout HEAD {LOCK}`",
            )
        items = {name: [*self.lock[name].get("deps", []), *self.lock[name].get("outs", [])] for name in addresses}
        names = self._recordable(addresses, items)
        for address in addresses:
            for item in items[address]:
                self._refuse_changed(address, item, [name for name in names if is_within(name, item["path"])])
        made = {out["path"]: name for name in addresses for out in self.lock[name].get("outs", [])}
        return [
            provenance.StageRecord(
                address,
                self.lock[address],
                texts[address],
                {
                    dep["path"]: sorted(
                        {one for out, one in made.items() if is_within(out, dep["path"]) or is_within(dep["path"], out)}
                    )
                    for dep in self.lock[address].get("deps", [])
                },
                {
                    name: self.digests(name)
                    for name in names
                    if any(is_within(name, item["path"]) for item in items[address])
                },
                report_at(Revision(self.root, None), address),
            )
            for address in addresses
        ]

    def _recordable(self, addresses: Sequence[str], items: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """All files of dependencies and outputs that DVC records.

        Raises:
            InputError: there is a link among them, or a file in an output that
                DVC ignores; or a path leads out of the project.
        """
        for address in addresses:
            for item in items[address]:
                if not provenance.is_inside(item["path"]):
                    raise InputError(
                        f"{address}: {item['path']} is not a path in the project",
                        "copy it into the project to attest the stage",
                    )
        outs = [out["path"] for name in addresses for out in self.lock[name].get("outs", [])]
        present = self.present([item["path"] for name in addresses for item in items[name]], outs)
        for name in sorted(present.made | present.listed):
            if not present.regular.get(name, True):
                raise InputError(
                    f"{name}: neither a file nor a folder", "replace a link by a copy of what it points to"
                )
            if name not in present.listed:
                raise InputError(
                    f"{name}: DVC ignores it, so dvc.lock does not record it", "delete it, or move it out of the output"
                )
        return sorted(present.listed)

    def _refuse_changed(self, address: str, item: Mapping[str, Any], names: Sequence[str]) -> None:
        path = item["path"]
        listing = {name[len(path) + 1 :]: self.digests(name)["md5"] for name in names}
        now = listing.get("") if "" in listing else md5_of_folder(listing) if (self.root / path).is_dir() else None
        if now != item.get("md5"):
            what = "is missing" if now is None else f"is not what dvc.lock recorded for {address}"
            raise InputError(
                f"{path} {what}",
                f"`dvc repro {self.address}` brings all up to date; `pedigree verify --integrity` names files",
            )
