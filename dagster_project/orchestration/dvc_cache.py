"""DVC's cache: outputs that are restored from it or added to it, and outputs that were tampered with.

Its objects as files are in `lineage.history.Objects`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from shutil import move
from typing import Any

from dagster_project.core.git import git_bytes
from dagster_project.core.hashing import md5_of_bytes, md5_of_file
from dagster_project.core.records import remove
from dagster_project.lineage.history import Objects
from dagster_project.lineage.notes import parsed_yaml
from dagster_project.orchestration.dvc import (
    declared_stages,
    main_output,
    open_repo,
    stage_among,
    stage_named,
    status_of,
)
from dagster_project.orchestration.private_api import private_module


def run_record(path: Path) -> dict[str, Any] | None:
    """A record of DVC's run cache, in the format of an entry in dvc.lock; None if it is damaged.

    Its name is the hash of its content, without sizes.
    """
    record = parsed_yaml(path.read_bytes())
    if record is None:
        return None
    try:
        name = private_module("dvc.utils").dict_sha256(record, exclude=["size", "nfiles"])
    except (ValueError, TypeError, RecursionError):
        return None
    return record if path.name == name else None


def restore_outputs(root: Path, address: str) -> None:
    """Restore from the cache, and reports also from the latest commit, what DVC
    removed before it ran a stage that then failed.

    Without waiting: an interrupted stage command is killed if it does not end soon.
    """
    with open_repo(root, wait=False) as repo:
        stage = stage_among(declared_stages(repo), address)
        for out in stage.outs if stage is not None else []:
            if out.exists or not out.hash_info:
                continue
            if out.use_cache:
                if not out.changed_cache():
                    out.checkout(force=True)
                continue
            cached = Path(repo.cache.local.oid_to_path(out.hash_info.value))
            path = Path(out.fs_path)
            content = cached.read_bytes() if cached.is_file() else None
            if content is None:  # in a clone, only git may have a report
                content = git_bytes(root, "show", f"HEAD:./{path.relative_to(repo.root_dir).as_posix()}")
            if content is not None and md5_of_bytes(content) == out.hash_info.value:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def recorded_files(root: Path, address: str) -> dict[str, Path]:
    """Cache file of each file of a stage's main output as recorded in dvc.lock, by its path in the output.

    Empty if it is not cached, or its listing is damaged.
    """
    with open_repo(root) as repo:
        out = main_output(stage_named(repo, address))
        whole, cache = out.hash_info.value if out.hash_info else "", Objects(root)
    listing = cache.listing(whole) if whole.endswith(".dir") else None
    return {name: cache.at(oid) for name, oid in (listing or {}).items()}


def isolate_project(root: Path, cache: Path | str = "cache", remote: Mapping[str, str] | None = None) -> None:
    """Make a copy of a project's files an independent DVC project: without git, and with a separate cache.

    Args:
        remote: url and other options of its remote.
    """
    (root / ".dvc").mkdir(exist_ok=True)
    core = ["no_scm = true", "analytics = false", f"site_cache_dir = {_quoted(root / '.dvc' / 'site')}"]
    config = ["[cache]", f"dir = {_quoted(cache)}", 'type = "reflink,hardlink,copy"']
    if remote is not None:
        core.append("remote = carrier")
        config += ["['remote \"carrier\"']", *(f"{key} = {_quoted(value)}" for key, value in remote.items())]
    (root / ".dvc" / "config.local").write_text("\n".join(["[core]", *core, *config, ""]))


def _quoted(value: Path | str) -> str:
    """A value in DVC's configuration, in which a comma would separate two values, and " #" begin a comment."""
    return f"'{value}'" if '"' in str(value) else f'"{value}"'


def add_to_cache(root: Path, paths: Iterable[str]) -> None:
    """Add outputs from the workspace to the cache. dvc.lock is not changed."""
    requested = set(paths)
    with open_repo(root) as repo:
        for out in (out for stage in declared_stages(repo) for out in stage.outs):
            if out.use_cache and os.path.relpath(out.fs_path, root) in requested:
                out.commit()


def set_aside(root: Path, address: str, differs: Callable[[Path], bool], locked: bool) -> list[str] | None:
    """Move a stage's main output, and each tampered object of it in the cache, to .dvc/tmp/pedigree/set_aside.

    DVC then reports the output as deleted.

    Args:
        differs: called again while no other process can write the output.
        locked: whether that is already so; otherwise DVC's lock of the path is taken.
    Returns:
        Names of the tampered objects; None if another process uses the output, or it does not differ any more.
    """
    aside = root / ".dvc" / "tmp" / "pedigree" / "set_aside"
    aside.mkdir(parents=True, exist_ok=True)
    with open_repo(root) as repo, ExitStack() as stack:
        out = main_output(stage_named(repo, address))
        if not locked:
            lock = private_module("dvc.rwlock").rwlock(repo.tmp_dir, repo.fs, "pedigree", [], [out.fs_path], False)
            try:
                stack.enter_context(lock)
            except private_module("dvc.lock").LockError:
                return None
        if status_of(out) or not differs(Path(out.fs_path)):
            return None
        whole, cache = out.hash_info.value, Objects(root)
        tampered = []
        # the listing may be tampered with, too
        for oid in dict.fromkeys([whole, *(cache.unverified_listing(whole) or {}).values()]):
            path = cache.at(oid)
            if not path.is_file():
                continue
            intact = md5_of_file(path) == oid.removesuffix(".dir")
            if not intact:
                tampered.append(oid)
            # without the whole, the run cache cannot restore an output that no stage published
            if not intact or oid == whole:
                _move(path, aside / oid)
        target = aside / address
        remove(target)
        if out.exists:
            _move(Path(out.fs_path), target)
    return tampered


def _move(path: Path, target: Path) -> None:
    """Move a file or folder, in place of what is there. The cache may be on another file system than the project."""
    remove(target)
    move(path, target)
