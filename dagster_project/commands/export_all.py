"""`pedigree export MODEL --all [FOLDER]`: all exports and a page that lists them; with the files of a release, its
attestations and a signature, the folder that is handed over, which can be data/release itself."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dagster_project.commands.extras import missing_extra
from dagster_project.commands.new_folder import new_folder, refuse_used
from dagster_project.core.errors import Busy, InputError
from dagster_project.core.records import write_text
from dagster_project.lineage.export import registry
from dagster_project.lineage.export.folder import FOLDER, PAGE, all_formats
from dagster_project.lineage.exports_in_place import FORMER, IGNORE_FILE, IGNORE_LINES, NAMES, delete, missing_lines
from dagster_project.lineage.exports_in_place import RELEASE as RELEASE_FOLDER
from dagster_project.lineage.history import md5_on_disk
from dagster_project.lineage.signing import claims
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
    together,
)
from dagster_project.lineage.signing.target import Target, find, refuse_in_output
from dagster_project.orchestration import locks
from dagster_project.views.exports import exports_page
from dagster_project.views.texts import text

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
    """Make the folder that is handed over: the files of a release, all exports,
    the page; with a key, the attestations and a signature of all files.

    Args:
        folder: that does not exist, or is empty. It appears when it is complete.
        key_file: of the private key; None: the one in the environment, or none.
    Returns:
        As `write_exports`, with "model_files": number, "attestations": {"file", "sha256", "stages", "remade"} or None,
        "signature": {"file", "files", "key"} or None.
    Raises:
        InputError: the model is not a release, or not the recorded one; no
            usable key; or the folder has files or cannot be written.
    """
    key = _key(key_file)
    target = _release(
        root, model, f"--with-model copies a {RELEASE} only", f"name {RELEASE}, or leave out --with-model", folder
    )
    exports = _Exports.of(target, model, issued, key)
    with new_folder(folder, "--all") as made:
        document = exports.write(made, _copy(target, made), folder.resolve().name)
    return {**document, "folder": str(folder), "page": PAGE}


def write_in_place(root: Path, model: str, issued: date | None, key_file: str | None) -> dict[str, Any]:
    """Write the exports of a release beside its files, over those of an earlier export.

    The files of the release stay as they are, and DVC ignores the exports.

    Args:
        key_file: as for `hand_over`.
    Returns:
        As `hand_over`.
    Raises:
        InputError: as `hand_over`, or DVC would report the exports as a change of the release.
        Busy: the release is being run, or another export writes its exports.
    """
    key, only = _key(key_file), f"--all without a folder writes beside the files of a {RELEASE} only"
    target = _release(root, model, only, "name a folder: --all FOLDER")
    if key:
        target.refuse_other_key(key.public)
    elif os.path.lexists(target.folder / SIGNATURE):
        raise InputError(
            f"{target.path}/{SIGNATURE} signs the exports there, and exports without a key would replace them",
            f"name the key (--key FILE), or delete {SIGNATURE} first",
        )
    _refuse_unignored(root)
    exports = _Exports.of(target, model, issued, key)
    scratch_of_project = root / ".dvc" / "tmp" / "pedigree"
    try:
        scratch_of_project.mkdir(parents=True, exist_ok=True)
        with (
            locks.hold(root, target.address, _refuse_busy),
            tempfile.TemporaryDirectory(prefix="exports.", dir=scratch_of_project) as scratch,
        ):
            document = exports.write(
                Path(scratch), contents(target.folder, (*IGNORED, *target.exports)), target.folder.name, target.folder
            )
            delete(root)
            if not target.folder.is_dir():  # DVC removes an output before its stage takes the lock
                _refuse_busy("DVC")
            # last: without it, nothing passes for signed
            for name in (*(name for name in NAMES if name != SIGNATURE), SIGNATURE):
                if (Path(scratch) / name).exists():
                    shutil.move(Path(scratch) / name, target.folder / name)  # data/ can be on another file system
    except OSError as error:
        if not target.folder.exists():
            _refuse_busy("DVC")
        raise InputError(
            f"{target.path}: {error.strerror}", "make space, or see who may write there; then run the command again"
        ) from None
    try:
        target.refuse_unrecorded()
    except InputError:  # the release changed meanwhile
        delete(root)
        raise
    return {**document, "folder": target.path, "page": PAGE}


def _refuse_busy(holder: str) -> None:
    raise Busy(f"{RELEASE_FOLDER} is being used by {holder}", "wait for it to end, then run the same command again")


def is_release(root: Path, model: str, folder: str) -> bool:
    """Whether a folder is that of the release whose exports are asked for."""
    return Path(folder).resolve() == (root / RELEASE_FOLDER).resolve() and find(root, model).address == RELEASE


def of_another_version(root: Path, md5: str) -> str:
    """A line about exports beside the files of the release that an earlier version of Pedigree wrote, or that are those
    of another release, as `dvc checkout` leaves them.

    Empty if there are none.

    Args:
        md5: content hash of the release.
    """
    then = f"`pedigree export {RELEASE} --all` replaces them"
    if former := [f"{RELEASE_FOLDER}/{name}" for name in FORMER if os.path.lexists(root / RELEASE_FOLDER / name)]:
        return f"{' and '.join(former)}: exports by an earlier version of Pedigree, which are not compared: {then}"
    page = root / RELEASE_FOLDER / PAGE
    read = claims.read(PAGE, page.read_bytes()) if page.is_file() and page.stat().st_size <= claims.LARGEST else None
    stated = [value for subject, key, value in read or () if (subject, key) == (claims.THE_MODEL, "md5")]
    if not stated or stated[0] == md5.removesuffix(".dir"):
        return ""
    return f"{RELEASE_FOLDER}/{PAGE} and the exports it lists are of another release (md5 {stated[0][:12]}): {then}"


def _refuse_unignored(root: Path) -> None:
    """Raises:
    InputError: DVC would report the exports as a change of the release.
    """
    if find_spec("dvc") is None:
        missing = missing_lines(root)
    else:
        from dagster_project.orchestration import dvc

        missing = [f"/{path}" for path in dvc.not_ignored(root, [line.removeprefix("/") for line in IGNORE_LINES])]
    if missing:
        raise InputError(
            f"{IGNORE_FILE} does not list {', '.join(missing)},"
            " so DVC would report exports there as a change of the release",
            f"add a line for each at the end of {IGNORE_FILE},"
            " as `pedigree upgrade` does in a project with an installed package",
        )


def _key(key_file: str | None) -> PrivateKey | None:
    return private_key(key_file) if key_file or os.environ.get(KEY_VARIABLE) else None


@dataclass(frozen=True)
class _Exports:
    """The exports of a release."""

    target: Target
    texts: Mapping[str, str]
    document: Mapping[str, Any]
    key: PrivateKey | None
    attested: Mapping[str, Any] | None

    @classmethod
    def of(cls, target: Target, model: str, issued: date | None, key: PrivateKey | None) -> _Exports:
        assert target.root is not None
        texts, document = all_formats(target.root, model, None, issued)
        return cls(target, texts, document, key, _attestations(target, key) if key else None)

    def write(self, folder: Path, found: Contents, name: str, of_release: Path | None = None) -> dict[str, Any]:
        """Write the exports to a folder, and sign it if there is a key.

        Args:
            found: the files of the release.
            name: of the folder, for its signature.
            of_release: the folder with these files; None: they are in the same one.
        Returns:
            The document of the page.
        """
        facts = _signed_facts(self.key, self.attested)
        document = _complete({**self.document, **facts, "model_files": len(found.files)}, found)
        _write(folder, self.texts, document)
        if self.key and self.attested:
            (folder / ATTESTATIONS).write_bytes(self.attested["content"])
            write_text(folder / PUBLIC_KEY, self.key.public.pem.decode())
            signed = contents(folder, IGNORED)
            signed = signed if of_release is None else together(found, signed)
            write_text(folder / SIGNATURE, bundle(manifest(name, signed), self.key))
            document["signature"]["files"] = len(signed.files)
        return document


def _release(root: Path, model: str, only: str, then: str, folder: Path | None = None) -> Target:
    """Args:
        only, then: message and next step if the model is not a release.
        folder: for a copy of it.
    Raises:
        InputError: the model is not a release, or not as it was recorded; or the folder cannot be its copy.
    """
    target = find(root, model)
    if target.address != RELEASE or target.path != RELEASE_FOLDER:
        raise InputError(
            f"{model}: {only}; other outputs have tables with texts, or with ids that can be computed from texts", then
        )
    if folder is not None:
        _refuse_place(root, folder)
    target.refuse_unrecorded()
    found = contents(target.folder, (*IGNORED, *target.exports))
    if links := [name for name in found.other if (target.folder / name).is_symlink()]:
        raise InputError(
            f"{target.path}/{links[0]}: is a link, and only files are copied",
            "`dvc config cache.type copy`, then `dvc checkout --relink`",
        )
    if wrong := [*found.other, *(name for name in found.ignored if name not in target.exports)]:
        raise InputError(
            f"{target.path}/{wrong[0]}: a release does not contain this", f"make it again: `dvc repro {RELEASE}`"
        )
    return target


def _refuse_place(root: Path, folder: Path) -> None:
    """Raises:
    InputError: the folder cannot be a copy of the release.
    """
    refuse_in_output(root, "--all", folder)
    refuse_used("--all", folder, "name a new folder, so that nothing else is signed")
    if folder.resolve() == Path.cwd().resolve():
        raise InputError(f"--all {folder}: it is the current folder, which cannot be replaced", "name a new folder")


def _copy(target: Target, made: Path) -> Contents:
    """Copy the files of the release, and compare the copy with the record.

    Raises:
        InputError: it changed while it was copied.
    """
    for name, file in contents(target.folder, (*IGNORED, *target.exports)).files.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, made / name)
    if md5_on_disk(made) != target.md5:
        raise InputError(f"{target.path} changed while it was copied", "run the command again")
    return contents(made, IGNORED)


def _attestations(target: Target, key: PrivateKey) -> dict[str, Any]:
    """Those of `pedigree attest` if they are by the key and still hold, otherwise new ones.

    Returns:
        {"content": bytes of the file, "stages": addresses, "remade": verdict or None}.
    """
    from dagster_project.commands.sign import stage_records
    from dagster_project.commands.verify_signatures import verify_target
    from dagster_project.lineage.signing import provenance

    assert target.root is not None
    file = target.signatures / ATTESTATIONS
    if file.is_file():
        content, document = file.read_bytes(), verify_target(target, None)
        if document["verdict"] == "verified" and document["key"] == key.public.fingerprint and document["attestations"]:
            return {"content": content, **{name: document["attestations"][name] for name in ("stages", "remade")}}
    records = stage_records(target)
    lines = provenance.lines([provenance.statement(record) for record in records], key)
    return {"content": lines.encode(), "stages": [record.address for record in records], "remade": None}


def _signed_facts(key: PrivateKey | None, attested: Mapping[str, Any] | None) -> dict[str, Any]:
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
    """Add what `verify --signatures` compares in each export, the exports in the
    files of a release, and what is missing.

    Args:
        found: the files of the release; None for a folder of exports alone.
    """
    exports = [{**one, "compared": claims.compared_in(one["file"])} for one in document["exports"]]
    missing = [_with_extra(one) for one in document["missing"]]
    if found is None:
        return {**document, "exports": exports, "missing": missing}
    if not document["signature"]:
        missing.append(
            {"name": "signature, attestations", "why": NO_KEY, "next": "run the command again with --key FILE"}
        )
    inside = [{"file": name, "compared": claims.compared_in(name)} for name in found.files]
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
    for name, content in {**texts, PAGE: exports_page(document)}.items():
        write_text(folder / name, content)


def as_text(document: Mapping[str, Any]) -> str:
    """What was written, for the terminal."""
    return text(
        "exports", **{"attestations": None, "signature": None, **document}, quoted=shlex.quote(str(document["folder"]))
    )
