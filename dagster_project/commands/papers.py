"""`pedigree export MODEL --all FOLDER`: all exports and a page that lists them; with the files of a release, its attestations and a signature, the folder that is handed over."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from dagster_project.commands.extras import missing_extra
from dagster_project.commands.new_folder import new_folder
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_folder
from dagster_project.core.records import write_text
from dagster_project.lineage.export import registry
from dagster_project.lineage.export.folder import FOLDER, PAGE, all_formats
from dagster_project.lineage.history import listing_of
from dagster_project.lineage.signing import papers
from dagster_project.lineage.signing.keys import KEY_VARIABLE, PrivateKey, private_key
from dagster_project.lineage.signing.model_signature import (
    ATTESTATIONS,
    IGNORED,
    PUBLIC_KEY,
    SIGNATURE,
    Contents,
    bundle,
    contents,
    manifest,
)
from dagster_project.lineage.signing.target import Target, find, refuse_in_output
from dagster_project.views.papers import papers_page

RELEASE = "release"
NO_KEY = f"neither --key nor {KEY_VARIABLE} was given"


def write_exports(root: Path, model: str, folder: Path, rev: str | None, issued: date | None) -> dict[str, Any]:
    """Write all exports, and the page, to a folder. Other files there stay, apart from exports that are now missing.

    Returns:
        {"model", "issued", "commit", "exports", "missing", "folder", "page"}, as `folder.all_formats`.
    Raises:
        InputError: as `export`, or the folder cannot be written.
    """
    refuse_in_output(root, "--all", folder)
    texts, document = all_formats(root, model, rev, issued)
    document = _complete(document)
    try:
        _delete_others(folder.resolve(), texts)
        _write(folder.resolve(), texts, document)
    except OSError as error:
        raise InputError(f"--all {folder}: {error.strerror}", "name a folder that can be written") from None
    return {**document, "folder": str(folder), "page": PAGE}


def hand_over(root: Path, model: str, folder: Path, issued: date | None, key_file: str | None) -> dict[str, Any]:
    """Make the folder that is handed over: the files of a release, all exports, the page; with a key, the attestations and a signature of all files.

    Args:
        folder: that does not exist, or is empty. It appears when it is complete.
        key_file: of the private key; None: the one in the environment, or none.
    Returns:
        As `write_exports`, with "model_files": number, "attestations": {"file", "sha256", "stages", "remade"} or None, "signature": {"file", "files", "key"} or None.
    Raises:
        InputError: the model is not a release, or not the recorded one; no usable key; or the folder has files or cannot be written.
    """
    key = private_key(key_file) if key_file or os.environ.get(KEY_VARIABLE) else None
    target = _release(root, model, folder)
    texts, document = all_formats(root, model, None, issued)
    attested = _attestations(target, key) if key else None
    try:
        with new_folder(folder, "--all") as made:
            found = _copy(target, made)
            facts = _signed_facts(target, key, attested)
            document = _complete({**document, **facts, "model_files": len(found.files)}, found)
            _write(made, texts, document)
            if key and attested:
                (made / ATTESTATIONS).write_bytes(attested["content"])
                write_text(made / PUBLIC_KEY, key.public.pem.decode())
                signed = contents(made, IGNORED)
                write_text(made / SIGNATURE, bundle(manifest(folder.resolve().name, signed), key))
                document["signature"]["files"] = len(signed.files)
    except OSError as error:
        raise InputError(f"--all {folder}: {error.strerror}", "name a folder with enough space that can be written") from None
    return {**document, "folder": str(folder), "page": PAGE}


def _release(root: Path, model: str, folder: Path) -> Target:
    """Raises:
    InputError: the model is not a release, or not as it was recorded; or the folder cannot be its copy.
    """
    target = find(root, model)
    if target.address != RELEASE:
        raise InputError(
            f"{model}: --with-model copies a {RELEASE} only; other outputs have tables with texts, or with ids that can be computed from texts",
            f"name {RELEASE}, or leave out --with-model",
        )
    refuse_in_output(root, "--all", folder)
    if os.path.lexists(folder) and (not folder.is_dir() or folder.is_symlink() or any(folder.iterdir())):
        raise InputError(f"--all {folder}: it exists, and is not an empty folder", "name a new folder, so that nothing else is signed")
    if folder.resolve() == Path.cwd().resolve():
        raise InputError(f"--all {folder}: it is the current folder, which cannot be replaced", "name a new folder")
    target.refuse_unrecorded()
    found = contents(target.folder, IGNORED)
    if links := [name for name in found.other if (target.folder / name).is_symlink()]:
        raise InputError(
            f"{target.path}/{links[0]}: is a link, and only files are copied", "`dvc config cache.type copy`, then `dvc checkout --relink`"
        )
    if wrong := [*found.other, *found.ignored, *(name for name in found.files if name not in papers.files_of_model([name]))]:
        raise InputError(f"{target.path}/{wrong[0]}: a release does not contain this", f"make it again: `dvc repro {RELEASE}`")
    return target


def _copy(target: Target, made: Path) -> Contents:
    """Copy the files of the release, and compare the copy with the record.

    Raises:
        InputError: it changed while it was copied.
    """
    for name, file in contents(target.folder, IGNORED).files.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, made / name)
    recorded = next(out["md5"] for out in target.lock[target.address]["outs"] if out["path"] == target.path)
    if md5_of_folder(listing_of(made)) != recorded:
        raise InputError(f"{target.path} changed while it was copied", "run the command again")
    return contents(made, IGNORED)


def _attestations(target: Target, key: PrivateKey) -> dict[str, Any]:
    """Those of `pedigree attest` if they are by the key and still hold, otherwise new ones.

    Returns:
        {"content": bytes of the file, "stages": addresses, "remade": verdict or None}.
    """
    from dagster_project.commands.sign import stage_records
    from dagster_project.commands.verify_signatures import verify_signatures
    from dagster_project.lineage.signing import provenance

    assert target.root is not None
    file = target.signatures / ATTESTATIONS
    if file.is_file():
        content, document = file.read_bytes(), verify_signatures(target.root, target.address, None)
        if document["verdict"] == "verified" and document["key"] == key.public.fingerprint and document["attestations"]:
            return {"content": content, **{name: document["attestations"][name] for name in ("stages", "remade")}}
    records = stage_records(target)
    lines = provenance.lines([provenance.statement(record) for record in records], key)
    return {"content": lines.encode(), "stages": [record.address for record in records], "remade": None}


def _signed_facts(target: Target, key: PrivateKey | None, attested: Mapping[str, Any] | None) -> dict[str, Any]:
    if key is None or attested is None:
        return {"attestations": None, "signature": None}
    return {
        "attestations": {
            "file": ATTESTATIONS,
            "sha256": hashlib.sha256(attested["content"]).hexdigest(),
            "stages": attested["stages"],
            "remade": attested["remade"],
        },
        "signature": {"file": SIGNATURE, "public_key": PUBLIC_KEY, "key": key.public.fingerprint},
    }


def _complete(document: Mapping[str, Any], found: Contents | None = None) -> dict[str, Any]:
    """Add what `verify --signatures` compares in each export, the papers in the files of a release, and what is missing.

    Args:
        found: the files of the release; None for a folder of exports alone.
    """
    exports = [{**one, "compared": papers.compared_in(one["file"])} for one in document["exports"]]
    missing = [_with_extra(one) for one in document["missing"]]
    if found is None:
        return {**document, "exports": exports, "missing": missing}
    if not document["signature"]:
        missing.append({"paper": "signature, attestations", "why": NO_KEY, "next": "run the command again with --key FILE"})
    inside = [{"file": name, "compared": papers.compared_in(name)} for name in found.files]
    return {**document, "exports": exports, "release": inside, "missing": missing}


def _with_extra(missing: Mapping[str, Any]) -> dict[str, Any]:
    """Name the extra that installs the library of a format."""
    package = missing.get("package")
    error = missing_extra(ModuleNotFoundError(name=package), "export") if package else None
    return {**missing, "next": error.hint.partition(";")[0].replace("`", "")} if error else {**missing}


def _delete_others(folder: Path, texts: Mapping[str, str]) -> None:
    """Delete exports of an earlier run that this one does not have: the page would not list them."""
    for file in (f"{FOLDER}/{registry.find(form).file}" for form in registry.formats()):
        if file not in texts:
            (folder / file).unlink(missing_ok=True)


def _write(folder: Path, texts: Mapping[str, str], document: Mapping[str, Any]) -> None:
    for name, text in {**texts, PAGE: papers_page(document)}.items():
        write_text(folder / name, text)


def as_text(document: Mapping[str, Any]) -> str:
    """What was written, for the terminal."""
    folder = document["folder"]
    lines = [f"{folder}/{name}" for name in [*(one["file"] for one in document["exports"]), document["page"]]]
    if "model_files" in document:
        lines.insert(0, f"{folder}: {document['model_files']} files of {document['model']['stage']}")
    if attested := document.get("attestations"):
        remade = f"made again from the sources: {attested['remade']}" if attested["remade"] else "not made again"
        lines.append(f"{folder}/{attested['file']}: {len(attested['stages'])} stages; {remade}")
    if signed := document.get("signature"):
        lines.append(f"{folder}/{signed['file']}: {signed['files']} files, key sha256 {signed['key'][:16]}")
        lines.append(f"check it: pedigree verify {folder} --signatures --key PUB")
    return "\n".join([*lines, *(f"missing: {one['paper']}: {one['why']}; {one['next']}" for one in document["missing"])])
