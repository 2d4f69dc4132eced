"""Access to history: dvc.lock at every commit, files at any revision, and objects of DVC's cache by hash."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dagster_project.core.documents import damage
from dagster_project.core.errors import InputError
from dagster_project.core.git import git, git_bytes, refuse_without_git
from dagster_project.core.hashing import md5_of_bytes, md5_of_file, md5_of_folder
from dagster_project.core.layout import report_of
from dagster_project.core.text import listed
from dagster_project.lineage.exports_in_place import without_exports
from dagster_project.lineage.notes import parsed_yaml

LOCK = "dvc.lock"
LINK, SUBMODULE = "120000", "160000"
"""Modes of symbolic links and submodules in git trees."""
WHOLE_LOG = ("--no-replace-objects", "-c", "log.showRoot=true", "-c", "log.diffMerges=separate")
"""Options of git before `log -m`. Without them, `git replace` hides commits, and the user's settings decide whether the
files of merges and of the first commit are shown."""


def blobs(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Read the content of git objects by name ("<hash>" or "<commit>:./<path>") in one process.

    Missing objects are left out.
    """
    requested = list(dict.fromkeys(names))
    given = "".join(f"{name}\n" for name in requested).encode()
    output = git_bytes(root, "cat-file", "--batch", given=given) if requested else None
    contents, position = {}, 0
    for name in requested if output else ():
        assert output is not None
        end = output.index(b"\n", position)
        header = output[position:end].rsplit(b" ", 2)
        position = end + 1
        if len(header) == 3 and header[1] == b"blob":
            contents[name] = output[position : position + int(header[2])]
        if header[-1] != b"missing":
            position += int(header[2]) + 1
    return contents


def is_in_repository(root: Path) -> bool:
    return any((folder / ".git").exists() for folder in [root.absolute(), *root.absolute().parents])


def commit_of(root: Path, rev: str) -> str | None:
    if rev.startswith("^"):  # git's sign for "not reachable from"
        return None
    return (
        git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}") or ""
    ).strip() or None


def stages_of(text: str, where: str = LOCK) -> dict[str, Any]:
    """The stages of a dvc.lock.

    Raises:
        InputError: the text is not a valid dvc.lock.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        document = YAML(typ="safe").load(text)
        why = _wrong_shape(document) or (_wrong_entry(document.get("stages", {})) if where == LOCK else "")
    # also an invalid date, an unhashable key, too many brackets
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        why = "it has an unresolved merge conflict" if "\n<<<<<<< " in f"\n{text}" else " ".join(str(error).split())
    if why:
        raise InputError(
            f"{where} cannot be read: {why}", f"restore it with `git checkout HEAD {where}`, then run `dvc repro`"
        )
    return dict(document.get("stages", {}))


def _wrong_shape(document: Any) -> str:
    """Why a parsed dvc.lock or dvc.yaml has not the shape that DVC writes; empty if it has."""
    if not isinstance(document, dict):
        return "it is not a mapping"
    stages = document.get("stages", {})
    if not isinstance(stages, dict):
        return "its key `stages` is empty" if stages is None else "its key `stages` is not a mapping"
    for name, stage in stages.items():
        if not isinstance(name, str) or not isinstance(stage, dict):
            return f"{name} is not a mapping"
    return ""


def _wrong_entry(stages: Mapping[str, Any]) -> str:
    """Why a stage of a dvc.lock cannot be one that DVC wrote; empty if all can."""
    for name, stage in stages.items():
        for kind in ("deps", "outs"):
            items = stage.get(kind, [])
            if not isinstance(items, list) or not all(map(_is_item, items)):
                return f"{kind} of {name} are not a list of paths with hashes"
        params = stage.get("params") or {}
        if not isinstance(params, dict) or not all(isinstance(values, dict | None) for values in params.values()):
            return f"params of {name} are not values by file"
    return ""


def _is_item(item: Any) -> bool:
    """Whether it is a dependency or an output with a path and, if any, a hash."""
    return isinstance(item, dict) and isinstance(item.get("path"), str) and isinstance(item.get("md5", ""), str)


def lost_entries(root: Path) -> list[str]:
    """Stages of the committed dvc.lock that the one in the workspace lacks, or
    has only the beginning of, although dvc.yaml still declares them.

    DVC removes no entry of a declared stage. So the file was cut short, by a
    kill or a full disk, or it was taken from another commit.
    """
    committed = git_bytes(root, "show", f"HEAD:./{LOCK}")
    file = root / LOCK
    now = file.read_bytes() if file.is_file() else b""
    if not committed or committed == now:
        return []
    before, after = (_entries(content.decode("utf-8", "replace").replace("\r\n", "\n")) for content in (committed, now))
    lost = [
        name
        for name, text in before.items()
        if name not in after or (after[name] != text and text.startswith(after[name]))
    ]
    if not lost or parsed_yaml(committed) is None:  # e.g. a merge conflict was committed
        return []
    workspace = Revision(root, None)
    removed = undeclared(workspace, lost, otherwise=False)
    declared = (parsed_yaml(workspace.text("dvc.yaml") or "") or {}).get("stages") or {}

    def is_shortened(name: str) -> bool:
        return name in after and _is_shortened(before[name], after[name], declared.get(name.partition("@")[0]))

    return [name for name in lost if name not in removed and not is_shortened(name)]


def _is_shortened(before: str, after: str, declared: Any) -> bool:
    """Whether an entry is shorter because its last outputs were removed from dvc.yaml, and was not cut: it ends where
    an output ends, and has as many as dvc.yaml declares.

    Args:
        declared: the stage in dvc.yaml.
    """
    body = declared.get("do", declared) if isinstance(declared, dict) else None
    kinds = [body.get(kind) or [] for kind in ("outs", "metrics", "plots")] if isinstance(body, dict) else []
    recorded = after.partition("    outs:\n")[2].count("    - path: ")
    return before[len(after) :].startswith("    - path: ") and 0 < recorded == sum(map(len, kinds))


def _entries(text: str) -> dict[str, str]:
    """Address -> text of its entry in a dvc.lock."""
    pieces = re.split(r"^  ([\w@.-]+):\n", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def undeclared(at: Revision, addresses: Iterable[str], otherwise: bool = True) -> set[str]:
    """Those of some stages in dvc.lock that dvc.yaml no longer has, such as removed and renamed variants, whose entries
    DVC keeps.

    Args:
        otherwise: whether a stage counts as one that it has if dvc.yaml or params.yaml cannot be read, or lacks a key.
    """

    def document(name: str) -> Any:
        with suppress(OSError, UnicodeDecodeError):
            return parsed_yaml(at.text(name) or "")

    documents = document("dvc.yaml"), document("params.yaml")
    return {one for one in addresses if not _is_declared(one, documents, otherwise)}


def _is_declared(address: str, documents: tuple[Any, Any], otherwise: bool) -> bool:
    """Whether dvc.yaml has this stage, of a `foreach` over a section of params.yaml this variant."""
    stage, _, variant = address.partition("@")
    try:
        stages = documents[0]["stages"]
        if stage not in stages or not variant:
            return stage in stages
        items = stages[stage]["foreach"]
        if isinstance(items, str):  # "${section}"
            keys, items = items.removeprefix("${").removesuffix("}").split("."), documents[1]
            for key in keys:
                items = items[key]
        if isinstance(items, list) and any(isinstance(one, dict | list) for one in items):
            items = range(len(items))  # then DVC names the variants by their place
        return variant in (str(one).lower() if isinstance(one, bool) else str(one) for one in items)
    except (TypeError, KeyError, IndexError):
        return otherwise


def refuse_lost_entries(root: Path) -> None:
    """Refuse a dvc.lock that lacks entries of the committed one.

    Raises:
        InputError: it does, also after a moment: DVC does not replace the file in one step.
    """
    for attempt in range(3):
        if not (lost := lost_entries(root)):
            return
        if attempt < 2:
            time.sleep(0.2)
    raise InputError(lost_text(lost), LOST_HINT)


def lost_text(lost: Sequence[str]) -> str:
    return (
        f"dvc.lock has no complete entry of {listed(lost, 3)}, which the committed one has:"
        " it was cut short, or it is from another commit"
    )


LOST_HINT = (
    "`git checkout HEAD dvc.lock` restores the committed one,"
    " and `dvc repro` then restores what ran since, from DVC's run cache; to ask about another commit, use --rev"
)


@dataclass(frozen=True)
class Revision:
    """The project's files in the workspace (rev None) or at a commit.

    Raises:
        InputError: the name of the revision is an option of git.
    """

    root: Path
    rev: str | None

    def __post_init__(self) -> None:
        if self.rev and self.rev.startswith("-"):
            raise InputError(f"{self.rev} is not a git revision", "name a commit, branch or tag (see `git log`)")

    def text(self, path: str) -> str | None:
        if self.rev is None:
            file = self.root / path
            return file.read_text(encoding="utf-8") if file.is_file() else None
        return git(self.root, "show", "--end-of-options", f"{self.rev}:./{path}")

    def lock(self, partial: bool = False) -> dict[str, Any]:
        """The stages of dvc.lock.

        Args:
            partial: whether the one of the workspace may lack entries of the committed one.
        Raises:
            InputError: nothing has been run there, the revision does not exist, or the file is damaged.
        """
        if self.rev is not None and commit_of(self.root, self.rev) is None:
            refuse_without_git()
            raise InputError(f"no revision {self.rev!r} in this repository", "see `git log`")
        try:
            text = self.text(LOCK)
        except UnicodeDecodeError:
            raise InputError(
                f"{LOCK} cannot be read: it is not UTF-8", f"restore it with `git checkout HEAD {LOCK}`"
            ) from None
        stages = stages_of(text) if text else {}
        if self.rev is None and not partial:
            refuse_lost_entries(self.root)
        if self.rev is None and text is not None and not text.strip():  # DVC was killed while it wrote the first one
            raise InputError(
                f"{LOCK} is empty, and DVC refuses it",
                "delete it, then run `dvc repro`, which restores what ran from DVC's run cache",
            )
        if not text:
            raise InputError(
                f"no dvc.lock{f' at {self.rev}' if self.rev else ''}: nothing has been run", "run `dvc repro` first"
            )
        return stages


def bytes_of(at: Revision, path: str) -> bytes | None:
    """Content of a file at a revision; None if it does not exist."""
    if at.rev is None:
        file = at.root / path
        return file.read_bytes() if file.is_file() else None
    return git_bytes(at.root, "show", "--end-of-options", f"{at.rev}:./{path}")


def report_at(at: Revision, address: str) -> dict[str, Any]:
    """The report of a stage at a revision; empty if it is missing or damaged."""
    content = bytes_of(at, report_of(address))
    return {} if content is None or damage(content) else dict(json.loads(content))


def workspace_lock(root: Path) -> dict[str, Any]:
    """The stages of the dvc.lock in the workspace; empty on a branch without one.

    Raises:
        InputError: the file is damaged, or missing although the committed state has one.
    """
    if (root / LOCK).is_file():
        return Revision(root, None).lock()
    refuse_lost_entries(root)
    return {}


def resolve(lock: dict[str, Any], model: str) -> str:
    """The address of the stage that a name, a path or a content hash refers to.

    Raises:
        InputError: nothing matches, or more than one stage does.
    """
    target = model.rstrip("/").removeprefix("./")
    if target in lock:
        return target
    matches = [
        address
        for address, stage in lock.items()
        for out in stage.get("outs", [])
        if out["path"] == target or (len(target) >= 6 and out.get("md5", "").startswith(target.lower()))
    ]
    if len(set(matches)) == 1:
        return matches[0]
    if matches:
        raise InputError(
            f"{model} could be {', '.join(sorted(set(matches)))}", "give more of the hash, or the stage's name"
        )
    raise InputError(f"{model}: no such stage, output path or content hash in dvc.lock", f"known: {', '.join(lock)}")


@dataclass(frozen=True)
class History:
    """Every dvc.lock that git reaches."""

    first: Mapping[str, str]
    """Blob of a dvc.lock -> the first commit that contains it, with parents
    before children, over all branches, tags, stashes and experiments."""
    unreachable: Mapping[str, str]
    """The same for commits that only the reflog reaches, e.g. after an
    amendment or a rebase; without those in `first`."""
    workspace: str | None
    """Blob of the dvc.lock of the workspace, committed or not; None if there is none."""
    workspace_content: bytes
    """The bytes that `workspace` names: a stage may write the file meanwhile."""
    boundary: frozenset[str]
    """Commits at which a shallow clone ends: earlier history is unavailable."""
    moved: Mapping[str, str] = field(default_factory=dict)
    """Commits that moved the project here -> the dvc.lock that it had before. Commits before are not examined."""
    unreadable: bool = False
    """Whether the project is in a repository whose commits git cannot list: it
    is not installed, refuses the folder of another user, or lost objects."""

    @property
    def lost(self) -> list[str]:
        """What is missing of the history, other than in a shallow clone, and how to get it."""
        lost = ["the history in git (`git log --all` says why)"] if self.unreadable else []
        return lost + [
            f"the history before commit {sha[:12]}, which moved {old} here (ask at `git checkout {sha[:12]}^`)"
            for sha, old in self.moved.items()
        ]

    @property
    def shallow(self) -> bool:
        return bool(self.boundary)


def history(root: Path) -> History:
    """The history of all branches, tags, stashes and experiments, and of the reflog."""
    all_refs, reflog = _first_commits(root, "--all"), _first_commits(root, "--reflog", "--not", "--all")
    (first, added), (unreachable, added_there) = all_refs or ({}, []), reflog or ({}, [])
    lock, workspace, content = root / LOCK, None, b""
    if lock.is_file():
        content = lock.read_bytes()
        driver = (git(root, "check-attr", "filter", "--", LOCK) or "").strip().rpartition(": ")[2]
        # a driver is a program that the repository names
        form = ("--path", LOCK) if driver in {"unspecified", "unset"} else ("--no-filters",)
        filtered = git_bytes(root, "hash-object", "--stdin", *form, given=content)
        workspace = (
            filtered.decode().strip() if filtered else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        )
    grafts = git(root, "rev-parse", "--git-path", "shallow")
    shallow_file = root / grafts.strip() if grafts else None
    boundary = (
        frozenset(shallow_file.read_text().split()) if shallow_file and shallow_file.is_file() else frozenset[str]()
    )
    return History(
        first,
        {blob: commit for blob, commit in unreachable.items() if blob not in first},
        workspace,
        content,
        boundary,
        _moves(root, [*added, *added_there]),
        is_in_repository(root) and (all_refs is None or reflog is None),
    )


def _first_commits(root: Path, *revisions: str) -> tuple[dict[str, str], list[str]] | None:
    """Blob of a dvc.lock -> the first commit among some revisions that contains it; and the commits whose parent has no
    dvc.lock. None if git fails.
    """
    order = ("--full-history", "-m", "--date-order", "--reverse")
    format_options = ("--raw", "--no-abbrev", "--no-color", "--no-renames", "--no-show-signature", "--format=%x00%H")
    log = git(root, *WHOLE_LOG, "log", *order, *format_options, *revisions, "--", LOCK)
    if log is None:
        return None
    first, added = dict[str, str](), list[str]()
    for commit in log.split("\0")[1:]:
        sha, *changes = commit.split()
        for blob, status in re.findall(r" [0-9a-f]{40,64} ([0-9a-f]{40,64}) ([A-Z])", " ".join(["", *changes])):
            if set(blob) != {"0"}:
                first.setdefault(blob, sha)
            if status == "A":
                added.append(sha)
    return first, added


def _moves(root: Path, commits: Iterable[str]) -> dict[str, str]:
    """Commit -> the dvc.lock of another folder that it renamed to the project's, of those that did."""
    given = list(dict.fromkeys(commits))
    renames = ("--no-walk", "-m", "-M20%", "--diff-filter=R")
    options = (*renames, "--name-status", "-z", "--no-show-signature", "--format=commit %H")
    log = None
    if given:
        log = git(root, *WHOLE_LOG, "log", *options, *given, "--", f":(top,glob)**/{LOCK}")
    here = (git(root, "rev-parse", "--show-prefix") or "").strip() + LOCK if log else LOCK
    moves: dict[str, str] = {}
    commit = ""
    fields = iter((log or "").split("\0"))
    for one in fields:
        if one.strip().startswith("commit "):
            commit = one.split()[1]
        elif re.fullmatch(r"\s*R\d+", one):
            old, new = next(fields), next(fields)
            if new == here:
                moves.setdefault(commit, old)
    return moves


REMOTE = re.compile("'remote \"(.*)\"'")
"""A remote's section in DVC's configuration."""
VALUE = re.compile(r"""(?:"([^"]*)"|'([^']*)'|([^"'#][^#]*?)?)\s*(?:#.*)?""")
"""A setting in DVC's configuration, quoted if it contains a comma or a "#", and a comment after it."""


def _unquoted(value: str) -> str:
    """A setting as ConfigObj, with which DVC reads and writes them, understands it."""
    found = VALUE.fullmatch(value)
    return next(filter(None, found.groups()), "") if found else value


def config_files(root: Path) -> list[Path]:
    """The files with DVC's settings, the later ones over the earlier ones: of
    the machine, the user, the project and this clone."""
    from platformdirs import site_config_dir, user_config_dir

    machine = os.environ.get("DVC_SYSTEM_CONFIG_DIR") or site_config_dir("dvc", "iterative")
    user = os.environ.get("DVC_GLOBAL_CONFIG_DIR") or user_config_dir("dvc", "iterative")
    return [Path(machine, "config"), Path(user, "config"), root / ".dvc" / "config", root / ".dvc" / "config.local"]


@dataclass(frozen=True)
class Objects:
    """Content by DVC hash: from the cache, or from the workspace if it contains the same bytes."""

    root: Path
    _here: dict[str, dict[str, str]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Path of an output -> its current listing. Filled on demand, because hashing a model takes seconds."""

    @cached_property
    def cache(self) -> Path:
        """The folder of DVC's local cache, by DVC's settings of the machine, the user, the project and this clone.

        DVC itself is not asked: an audit works without it, and loading it takes longer than a question.

        Raises:
            InputError: they cannot be read.
        """
        folders: dict[str, Path] = {}  # name of a remote, "" for the setting cache.dir -> folder
        local = None
        for file in config_files(self.root):
            config = configparser.ConfigParser(interpolation=None, strict=False)
            try:
                config.read(file, encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"DVC's configuration {file} cannot be read: {error}", "write it as UTF-8") from None
            except configparser.ParsingError as error:  # its text quotes the line, which may be a credential
                line = getattr(error, "lineno", None) or error.errors[0][0]
                raise InputError(
                    f"DVC's configuration {file} cannot be read: line {line} is neither a section nor an option",
                    "fix that line",
                ) from None
            local = _unquoted(config.get("cache", "local", fallback="")) or local
            remotes = [
                (match.group(1), section, "url")
                for section in config.sections()
                if (match := REMOTE.fullmatch(section))
            ]
            for name, section, key in [("", "cache", "dir"), *remotes]:
                if configured := _unquoted(config.get(section, key, fallback="")):
                    folders[name] = file.parent / Path(configured).expanduser()
        return folders.get(local or "", self.root / ".dvc" / "cache") / "files" / "md5"

    @property
    def storage(self) -> Path:
        """The folder with `cache`, and with DVC's run cache in `runs`."""
        return self.cache.parent.parent

    def run_cache(self) -> list[Path]:
        """The entries of DVC's run cache, each a run that DVC may restore instead of running the stage again."""
        return finished_runs(self.storage)

    def folders(self) -> dict[Path, int]:
        """The folders of the project's own cache -> time of their last change, in nanoseconds.

        Of a cache that projects share: none, because most of its objects are not this project's.
        """
        if not self.cache.is_dir() or not self.cache.resolve().is_relative_to(self.root.resolve()):
            return {}
        with os.scandir(self.cache) as entries:
            return {Path(entry.path): entry.stat().st_mtime_ns for entry in entries if entry.is_dir()}

    def at(self, md5: str) -> Path:
        """Place of an object in the cache, where it may be missing, or tampered with."""
        return self.cache / md5[:2] / md5[2:]

    def path(self, md5: str, out: str = "") -> Path | None:
        """Path of a file with this hash; None if it is unavailable.

        Args:
            out: path of the output that contains it, if the workspace may be used.
        """
        if (cached := self.at(md5)).is_file():
            return cached
        in_workspace = {value: name for name, value in self.in_workspace(out).items()} if out else {}
        return self.root / out / in_workspace[md5] if md5 in in_workspace else None

    def unverified_listing(self, md5: str) -> dict[str, str] | None:
        """As `listing`, as the cache has it: its listing is not compared with its hash. None if missing or invalid."""
        with suppress(OSError):
            return _parsed(self.at(md5).read_bytes()) if md5.endswith(".dir") else {"": md5}
        return None

    def listing(self, md5: str, out: str = "") -> dict[str, str] | None:
        """Path in the output -> hash of every file ("" for an output that is one file).

        None if the output is unavailable.

        Args:
            out: path of the output, if the workspace may be used.
        """
        if not md5.endswith(".dir"):
            return {"": md5}
        content = cached.read_bytes() if (cached := self.at(md5)).is_file() else b""
        if f"{md5_of_bytes(content)}.dir" == md5 and (found := _parsed(content)) is not None:
            return found
        in_workspace = self.in_workspace(out) if out else {}
        return in_workspace if md5_of_folder(in_workspace) == md5 else None

    def in_workspace(self, out: str) -> dict[str, str]:
        if out not in self._here:
            self._here[out] = listing_of(self.root / out)
        return self._here[out]


def _parsed(listing: bytes) -> dict[str, str] | None:
    """Path -> hash of each file that a listing of DVC names; None if another program wrote it."""
    with suppress(ValueError, TypeError, KeyError):
        return {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(listing)}
    return None


def cached_runs(storage: Path) -> list[Path]:
    """The entries of the run cache in the folder of a cache or remote of DVC."""
    return sorted(path for path in (storage / "runs").glob("*/*/*") if path.is_file())


def finished_runs(storage: Path) -> list[Path]:
    """As `cached_runs`, without those that DVC is writing, or was writing when it was killed: they end in .tmp."""
    return [path for path in cached_runs(storage) if path.suffix != ".tmp"]


def listing_of(path: Path) -> dict[str, str]:
    """As `Objects.listing`, of a file or folder on disk, without the exports of a release.

    Empty if it does not exist.
    """
    if path.is_file():
        return {"": md5_of_file(path)}
    return {
        file.relative_to(path).as_posix(): md5_of_file(file)
        for file in without_exports(path, path.rglob("*"))
        if file.is_file()
    }


def md5_on_disk(folder: Path) -> str:
    """Hash of a folder on disk without the exports of a release, as DVC identifies it."""
    return md5_of_folder(listing_of(folder))


def path_exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long
        return False


def is_within(path: str, folder: str) -> bool:
    """Whether a path is that of a folder, or of something in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
