"""The folder that a command signs or verifies: the output of a stage, whose
signatures are in data/signatures/, or any folder, which contains them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_folder
from dagster_project.core.layout import PLOTS, REPORTS
from dagster_project.lineage.exports_in_place import names_in
from dagster_project.lineage.history import LOCK, Objects, Revision, listing_of, path_exists, resolve, stages_of
from dagster_project.lineage.scratch_folder import FOLDERS
from dagster_project.lineage.signing.keys import PublicKey
from dagster_project.lineage.signing.model_signature import ATTESTATIONS, PUBLIC_KEY, SIGNATURE
from dagster_project.lineage.working_folders import from_project, working_folders

SIGNATURES = "data/signatures"


@dataclass(frozen=True)
class Target:
    """What is signed."""

    root: Path | None
    """The project; None for a folder that is not one of its outputs."""
    address: str
    """The stage; empty for such a folder."""
    path: str
    """Of the folder, in the project, or as it was given."""
    folder: Path
    lock: Mapping[str, Any]
    """Stages of dvc.lock."""
    lock_text: str
    """The text that `lock` was read from."""

    @property
    def label(self) -> str:
        """A name by which `find` finds it: the stage's, unless it has several outputs."""
        return self.path if not self.address or len(_outputs(self.lock[self.address])) > 1 else self.address

    @property
    def md5(self) -> str:
        """Content hash of the output, as dvc.lock recorded it."""
        return str(next(out["md5"] for out in self.lock[self.address]["outs"] if out["path"] == self.path))

    @property
    def signatures(self) -> Path:
        """Folder of the signature, the attestations and the public key. Each of several outputs has one."""
        if self.root is None:
            return self.folder
        folder = self.root / SIGNATURES / self.address.replace("@", "/")
        return folder if self.label == self.address else folder / self.path

    @property
    def exports(self) -> tuple[str, ...]:
        """Names in the folder that are not part of the output: exports of a release, which have a signature in the
        folder. None of another folder, where they are part of it."""
        return () if self.root is None else names_in(self.folder)

    def as_folder(self) -> Target:
        """The folder of an output with the signatures in it, as one that was handed over."""
        return Target(None, "", self.path, self.folder, {}, "")

    def shown(self, file: Path) -> str:
        """The path of a file as messages name it."""
        if self.root is not None and file.is_relative_to(self.root):
            return file.relative_to(self.root).as_posix()
        return (
            f"{self.path}/{file.relative_to(self.folder).as_posix()}" if file.is_relative_to(self.folder) else str(file)
        )

    def refuse_unrecorded(self) -> None:
        """Raises:
        InputError: the output in the workspace is not the one that dvc.lock recorded.
        """
        if self.root is None:
            return
        now = listing_of(self.folder)
        if md5_of_folder(now) == self.md5:
            return
        before = Objects(self.root).listing(self.md5)
        names = [] if before is None else sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        differs = (
            f"{self.path}/{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" if names else self.path
        )
        raise InputError(
            f"{differs}: not what dvc.lock recorded for {self.address}",
            f"`dvc checkout --force {self.path}` restores it",
        )

    def refuse_other_key(self, key: PublicKey) -> None:
        """Raises:
        InputError: the signatures here are by another key.
        """
        file = self.signatures / PUBLIC_KEY
        if file.is_file() and (file.stat().st_size != len(key.pem) or file.read_bytes() != key.pem):
            files = [self.signatures / name for name in (SIGNATURE, ATTESTATIONS, PUBLIC_KEY)]
            names = ", ".join(self.shown(one) for one in files if one.exists())
            raise InputError(
                f"{self.shown(file)}: {self.label} has signatures of another key",
                f"delete {names} to sign with this one (sha256 {key.fingerprint[:16]})",
            )


def folders_naming(root: Path, paths: Iterable[str]) -> list[Path]:
    """Folders of `SIGNATURES` with attestations that state the hash of one of these files, sorted.

    No key is needed to read them.
    """
    names = [json.dumps(path).encode() for path in paths]
    found = set()
    for file in (root / SIGNATURES).rglob(ATTESTATIONS):
        payloads = [*map(_payload, file.read_bytes().splitlines())]
        if any(name in payload for payload in payloads for name in names):
            found.add(file.parent)
    return sorted(found)


def _payload(line: bytes) -> bytes:
    """What an envelope contains; of another line the line itself."""
    try:
        return base64.b64decode(json.loads(line)["payload"])
    except (ValueError, KeyError, TypeError):
        return line


def refuse_in_output(root: Path, option: str, folder: Path, kind: str = "folder", may_be_source: bool = False) -> None:
    """Args:
        folder: or file, if `kind` is "file".
        may_be_source: whether it may lie in what a stage reads, as new data for it.
    Raises:
        InputError: the folder is an output of the project, lies in one, or contains one; or it
            lies in what a stage reads, or where git, DVC and signatures have their files; or
            it is a file of the pipeline. Files written there would change what DVC recorded.
    """
    hint = f"name another {kind}"
    given, lock = folder.resolve(), _recorded(root)[0]
    for name, out, path in _places(root, lock, "outs"):
        if given.is_relative_to(path) or path.is_relative_to(given):
            where = "contains" if path.is_relative_to(given) and path != given else _where(given, path)
            raise InputError(f"{option} {folder}: it {where} {out}, an output of {name}", hint)
    for name, dep, path in () if may_be_source else _places(root, lock, "deps"):
        if given.is_relative_to(path):
            raise InputError(f"{option} {folder}: it {_where(given, path)} {dep}, which {name} reads", hint)
    for kept in (".git", ".dvc", SIGNATURES, "dvc.yaml", LOCK, "params.yaml"):
        path = (root / kept).resolve()
        if (
            given.is_relative_to(path) and (root / FOLDERS).resolve() not in given.parents
        ):  # the copy that `push` uploads
            raise InputError(f"{option} {folder}: it {_where(given, path)} {kept}, which is not for exports", hint)


def _where(folder: Path, path: Path) -> str:
    return "is" if folder == path else "lies in"


def _places(root: Path, lock: Mapping[str, Any], kind: str) -> Iterator[tuple[str, str, Path]]:
    """(stage, path as recorded, its place) of all that stages made, `outs`, or read, `deps`."""
    for name, stage in lock.items():
        for one in stage.get(kind, []):
            yield name, one["path"], (root / one["path"]).resolve()


def find(root: Path, model: str) -> Target:
    """The output or folder that a name, path or content hash refers to.

    Args:
        root: folder that may be a project.
    Raises:
        InputError: there is none, it is a file, or it contains or lies in an output without being one.
    """
    given = Path(model)
    lock, text = _recorded(root)
    folder = given.resolve() if path_exists(given) and given.is_dir() else None
    if lock and folder == root.resolve() and model not in lock:
        raise InputError(f"{model or '.'}: this is the project", "name a stage, its output, or the folder of a model")
    outs = {path: name for name, _, path in _places(root, lock, "outs")}
    if model in lock or folder is None or folder in outs:
        if not lock and (root / "dvc.yaml").is_file():
            raise InputError(f"{model}: no such folder, and no {LOCK}: nothing has been run", "run `dvc repro` first")
        if not lock:
            raise InputError(
                f"{model}: no such folder, and no project with results in {root}",
                "name a folder, or give --project FOLDER",
            )
        address = model if model in lock else resolve(lock, model) if folder is None else outs[folder]
        path = _output(root, lock, address, model, folder)
        target = Target(root, address, path, root / path, lock, text)
    else:
        for project in dict.fromkeys([root, folder, *folder.parents]):
            _refuse_part(model, folder, project, _recorded(project)[0] if project != root else lock)
        target = Target(None, "", model.rstrip("/") or "/", folder, {}, "")
    if not target.folder.is_dir() or target.folder == target.root:
        raise InputError(
            f"{target.path or model}: no such folder",
            f"restore it with `dvc checkout {target.path}`, or run `dvc repro {target.address}`",
        )
    return target


def _output(root: Path, lock: Mapping[str, Any], address: str, model: str, folder: Path | None) -> str:
    """The output of a stage that a name, path or content hash refers to; empty if the stage has none.

    Raises:
        InputError: the stage has several, and was named itself.
    """
    outs = _outputs(lock[address])
    meant = [
        out["path"]
        for out in (outs if model not in lock else ())
        if (root / out["path"]).resolve() in {folder, (root / model).resolve()}
        or out.get("md5", "").startswith(model.lower())
    ]
    if len(outs) > 1 and len(meant) != 1:
        names = ", ".join(out["path"] for out in outs)
        raise InputError(f"{model}: {address} has several outputs: {names}", "name one of them by its path")
    return str(next(iter(meant or [out["path"] for out in outs]), ""))


def _outputs(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of an entry of dvc.lock, without the report and plots."""
    return [out for out in entry.get("outs", []) if not out["path"].startswith((REPORTS, PLOTS))]


def _recorded(project: Path) -> tuple[dict[str, Any], str]:
    """The stages of a project's dvc.lock, with paths from its folder in their shortest form, and the text, both from
    one reading.

    Empty if the folder is not a project with results.
    """
    if not ((project / "dvc.yaml").is_file() and (project / LOCK).is_file()):
        return {}, ""
    revision = Revision(project, None)
    revision.lock()  # refuses lost entries, and text that cannot be read
    text = revision.text(LOCK) or ""
    folders = working_folders((project / "dvc.yaml").read_bytes())
    return {name: from_project(name, entry, folders) for name, entry in stages_of(text).items()}, text


def _refuse_part(model: str, folder: Path, project: Path, lock: Mapping[str, Any]) -> None:
    """Raises:
    InputError: the folder contains an output of a project, is one, or lies in one.
    """
    for name, out, path in _places(project, lock, "outs"):
        if path == folder:
            raise InputError(f"{model}: it is the output of {name} in {project}", f"give --project {project}")
        if path.is_relative_to(folder) or folder.is_relative_to(path):
            where = "contains" if path.is_relative_to(folder) else "lies in"
            raise InputError(
                f"{model}: it {where} {out}, an output of {name}", "name that stage, or a copy of the folder"
            )
