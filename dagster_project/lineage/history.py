"""What git and DVC remember: dvc.lock at every commit, files at any revision, and objects of DVC's cache by their hash."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.git import git, git_bytes
from dagster_project.core.hashing import md5_of_file, md5_of_folder

LOCK = "dvc.lock"
LINK, SUBMODULE = "120000", "160000"
"""Modes of git's entries."""


def blobs(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The content of git objects, by name ("<hash>" or "<commit>:./<path>"); those that git does not hold are left out. One process for all."""
    asked = list(dict.fromkeys(names))
    told = git_bytes(root, "cat-file", "--batch", given="".join(f"{name}\n" for name in asked).encode()) if asked else None
    found, place = {}, 0
    for name in asked if told else ():
        assert told is not None
        end = told.index(b"\n", place)
        head = told[place:end].rsplit(b" ", 2)
        place = end + 1
        if len(head) == 3 and head[1] == b"blob":
            found[name] = told[place : place + int(head[2])]
        if head[-1] != b"missing":
            place += int(head[2]) + 1
    return found


def commit_of(root: Path, rev: str) -> str | None:
    return (git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}") or "").strip() or None


def stages_of(text: str, where: str = LOCK) -> dict[str, Any]:
    """The stages of a dvc.lock.

    Raises:
        InputError: it is no such file.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return dict(YAML(typ="safe").load(text).get("stages", {}))
    except (YAMLError, AttributeError) as error:
        raise InputError(
            f"{where} cannot be read: {' '.join(str(error).split())}", "resolve the merge, or restore it with `git checkout dvc.lock`"
        ) from None


@dataclass(frozen=True)
class Revision:
    """The project's files as they are in the workspace (rev None) or were at a commit."""

    root: Path
    rev: str | None

    def text(self, path: str) -> str | None:
        if self.rev is None:
            file = self.root / path
            return file.read_text(encoding="utf-8") if file.is_file() else None
        return git(self.root, "show", f"{self.rev}:./{path}")

    def json(self, path: str) -> dict[str, Any]:
        return json.loads(self.text(path) or "{}")

    def lock(self) -> dict[str, Any]:
        """The stages of dvc.lock.

        Raises:
            InputError: nothing was ever run there, or the revision does not exist.
        """
        if self.rev is not None and commit_of(self.root, self.rev) is None:
            raise InputError(f"no revision {self.rev!r} in this repository", "see `git log`")
        text = self.text(LOCK)
        if not text:
            raise InputError(f"no dvc.lock{f' at {self.rev}' if self.rev else ''}: nothing has been run", "run `dvc repro` first")
        return stages_of(text)


def resolve(lock: dict[str, Any], model: str) -> str:
    """The address of the stage that a name, a path or a content hash stands for.

    Raises:
        InputError: nothing, or more than one thing, matches.
    """
    wanted = model.rstrip("/").removeprefix("./")
    if wanted in lock:
        return wanted
    found = [
        address
        for address, stage in lock.items()
        for out in stage.get("outs", [])
        if out["path"] == wanted or (len(wanted) >= 6 and out["md5"].startswith(wanted))
    ]
    if len(set(found)) == 1:
        return found[0]
    if found:
        raise InputError(f"{model} could be {', '.join(sorted(set(found)))}", "give more of the hash, or the stage's name")
    raise InputError(f"{model}: no such stage, output path or content hash in dvc.lock", f"known: {', '.join(lock)}")


@dataclass(frozen=True)
class History:
    """Every dvc.lock that git can reach."""

    first: Mapping[str, str]
    """Blob of a dvc.lock -> the first commit that holds it, in an order in which parents come before children."""
    workspace: str | None
    """Blob of the dvc.lock of the workspace, committed or not; None if there is none."""
    boundary: frozenset[str]
    """Commits at which a shallow clone ends: what came before is not here."""

    @property
    def shallow(self) -> bool:
        return bool(self.boundary)


def history(root: Path) -> History:
    """All branches, tags and experiments. Commits that nothing refers to any more, as after a rebase, are not among them."""
    order = ("--all", "--full-history", "-m", "--date-order", "--reverse")
    shown = ("--raw", "--no-abbrev", "--no-color", "--no-renames", "--no-show-signature", "--format=%x00%H")
    told = git(root, "-c", "log.showRoot=true", "log", *order, *shown, "--", LOCK)
    first: dict[str, str] = {}
    for commit in (told or "").split("\0")[1:]:
        sha, *changes = commit.split()
        for blob in re.findall(r" [0-9a-f]{40,64} ([0-9a-f]{40,64}) [A-Z]", " ".join(["", *changes])):
            if set(blob) != {"0"}:
                first.setdefault(blob, sha)
    lock, workspace = root / LOCK, None
    if lock.is_file():
        content = lock.read_bytes()
        filtered = git_bytes(root, "hash-object", "--stdin", "--path", LOCK, given=content)
        workspace = filtered.decode().strip() if filtered else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    grafts = git(root, "rev-parse", "--git-path", "shallow")
    edge = root / grafts.strip() if grafts else None
    return History(first, workspace, frozenset(edge.read_text().split()) if edge and edge.is_file() else frozenset())


@dataclass(frozen=True)
class Objects:
    """Content by its DVC hash: from the cache, or from the workspace where the same bytes lie there."""

    root: Path

    @cached_property
    def cache(self) -> Path:
        """The folder of DVC's local cache."""
        found = self.root / ".dvc" / "cache"
        for name in ("config", "config.local"):
            config = configparser.ConfigParser(interpolation=None, strict=False)
            config.read(self.root / ".dvc" / name, encoding="utf-8")
            if folder := config.get("cache", "dir", fallback=""):
                found = self.root / ".dvc" / Path(folder).expanduser()
        return found / "files" / "md5"

    @cached_property
    def _here(self) -> dict[str, dict[str, str]]:
        """Path of an output -> listing of what lies there now. Filled as it is asked for: a model takes seconds to hash."""
        return {}

    def path(self, md5: str, out: str = "") -> Path | None:
        """Where the bytes with this hash lie, if they do.

        Args:
            out: path of the output that they are part of, if they may lie in the workspace.
        """
        kept = self.cache / md5[:2] / md5[2:]
        if kept.is_file():
            return kept
        found = {value: name for name, value in self.in_workspace(out).items()} if out else {}
        return self.root / out / found[md5] if md5 in found else None

    def listing(self, md5: str, out: str = "") -> dict[str, str] | None:
        """Path in the output -> hash, of every file in it ("" for an output that is one file); None if the output is not here.

        Args:
            out: path of the output, if it may lie in the workspace.
        """
        if not md5.endswith(".dir"):
            return {"": md5}
        kept = self.cache / md5[:2] / md5[2:]
        if kept.is_file():
            return {entry["relpath"]: entry["md5"] for entry in json.loads(kept.read_bytes())}
        found = self.in_workspace(out) if out else {}
        return found if md5_of_folder(found) == md5 else None

    def in_workspace(self, out: str) -> dict[str, str]:
        if out not in self._here:
            self._here[out] = listing_of(self.root / out)
        return self._here[out]


def listing_of(place: Path) -> dict[str, str]:
    """What `Objects.listing` would say of a file or folder on disk; empty if there is none."""
    if place.is_file():
        return {"": md5_of_file(place)}
    return {file.relative_to(place).as_posix(): md5_of_file(file) for file in place.rglob("*") if file.is_file()}


def files_at(version: str, paths: Sequence[Path], folder: Path) -> list[Path]:
    """Another version of `paths`: the path named `version`, or what git holds at the revision `version`, written into `folder`.

    Raises:
        InputError: there is neither such a path nor such a revision, or git does not hold one of the paths there.
    """
    if version and is_there(Path(version)):
        return [Path(version)]
    if missing := [path for path in paths if not is_there(path)]:
        raise InputError(f"--since {version}: {missing[0]} does not exist here", "name a file or folder with the earlier version")
    found = []
    commit = commit_of(Path.cwd(), version) if version else None
    if not commit:
        raise InputError(
            f"--since {version}: no such path, and no such revision in git", "name a file, a folder, or a revision (see `git log`)"
        )
    for number, path in enumerate(paths):
        real = path.resolve()
        top = real if real.is_dir() else real.parent
        listed = git_bytes(top, "ls-tree", "-r", "-z", commit, "--", str(real))
        entries = [entry.split("\t", 1) for entry in os.fsdecode(listed or b"").split("\0") if entry]
        if not entries:
            raise InputError(
                f"--since {version}: git does not hold {path} at that revision", "name a file or folder with the earlier version"
            )
        place = folder / str(number) / (real.name or "root")
        for what, name in entries:
            mode, _, digest = what.split()
            target = place / name if real.is_dir() else place.parent / name
            if mode == SUBMODULE or ".." in target.parts:
                continue
            content = git_bytes(top, "cat-file", "blob", digest) or b""
            target.parent.mkdir(parents=True, exist_ok=True)
            if mode == LINK:
                target.symlink_to(os.fsdecode(content))
            else:
                target.write_bytes(content)
        found.append(place)
    return found


def is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a file
        return False
