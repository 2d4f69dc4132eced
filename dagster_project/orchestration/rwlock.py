"""DVC's locks: the one of a project, and its table of locked paths, with the process that reads or writes each."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.lineage.history import is_within
from dagster_project.orchestration.private_api import private_module
from dagster_project.orchestration.processes import runs_one_of

log = logging.getLogger("pedigree")

TABLE = Path(".dvc", "tmp", "rwlock")
OWNERS = ("python", "dvc", "pedigree", "dagster")
"""Every process that makes entries has one of these words in its command line."""


def _table(root: Path) -> dict[str, Any] | None:
    """The table, empty without one; None if it is not one that DVC reads."""
    rwlock = private_module("dvc.rwlock")
    try:
        table: dict[str, Any] = rwlock.SCHEMA(json.loads((root / TABLE).read_bytes()))
    except FileNotFoundError:
        return {}
    except (ValueError, rwlock.Invalid):
        return None
    return table


def repair(root: Path) -> None:
    """Delete DVC's table of locked paths if it is invalid, as SIGKILL can leave it: DVC then refuses every command.

    Remove the entries of ended processes: DVC counts a killed process as running as long as its parent does not collect
    it, which the first process of a container may never do, and after a restart of the machine if another program has
    its number.

    Raises:
        InputError: something else is in the place of one of DVC's locks.
    """
    path = root / TABLE
    for lock in (path.with_name("rwlock.lock"), path.with_name("lock")):
        if lock.is_symlink() or lock.is_dir():
            raise InputError(
                f"{lock} is a {'link' if lock.is_symlink() else 'folder'}, not the file that DVC locks", "remove it"
            )
    table = _table(root)
    if table is not None and _of_running(table) == table:
        return
    make_lock = private_module("dvc.lock").make_lock
    with make_lock(
        str(path.with_name("rwlock.lock")), tmp_dir=str(path.parent), hardlink_lock=locks_by_hard_links(root), wait=True
    ):
        table = _table(root)
        if table is None:  # no other process was writing it
            path.unlink()
            log.warning("deleted .dvc/tmp/rwlock, DVC's table of locked paths, which was invalid")
        elif (kept := _of_running(table)) != table:
            path.write_text(json.dumps(kept))


def locks_by_hard_links(root: Path) -> bool:
    """Whether DVC locks by hard links here (its setting core.hardlink_lock)."""
    from dvc.config import Config, ConfigError

    try:
        return bool(Config(dvc_dir=str(root / ".dvc"))["core"].get("hardlink_lock", False))
    except ConfigError:  # DVC refuses every command then, so none holds a lock
        return False


def lock_holder(root: Path) -> str:
    """The process that keeps DVC's lock of the project for more than three seconds; empty if none does.

    Commands such as `dvc add` and `dvc push` hold it until they end, and `dvc repro` while it hashes an output.
    """
    path = (root / TABLE).with_name("lock")
    if not path.parent.is_dir():  # DVC has never run here
        return ""
    lock = private_module("dvc.lock")
    try:
        with lock.make_lock(str(path), tmp_dir=str(path.parent), hardlink_lock=locks_by_hard_links(root)):
            return ""
    except lock.LockError:
        pid = path.read_text().strip()
        return f"process {pid}" if pid.isdigit() else "another process"


def _of_running(table: dict[str, Any]) -> dict[str, Any]:
    """The table without the entries of ended processes."""
    runs = cache(_runs)

    def is_running(owner: dict[str, Any]) -> bool:
        return runs(owner["pid"], str(owner.get("cmd", "")))

    kept = dict(table)
    if "write" in table:
        kept["write"] = {path: owner for path, owner in table["write"].items() if is_running(owner)}
    if "read" in table:
        readers = {path: [owner for owner in owners if is_running(owner)] for path, owners in table["read"].items()}
        kept["read"] = {path: owners for path, owners in readers.items() if owners}
    return kept


def _runs(pid: int, cmd: str) -> bool:
    """Whether the process of an entry runs.

    If another program has its number now, its command line has neither a word of `OWNERS` nor the first word of the
    entry.
    """
    return runs_one_of(pid, (*OWNERS, cmd.partition(" ")[0]))


def writer_of(root: Path, paths: Iterable[str]) -> str:
    """The process that is writing one of these paths, from DVC's table of locked paths; empty if there is none."""
    wanted = [str(root / path) for path in paths]
    for locked, owner in _writers(root).items():
        if any(is_within(locked, path) or is_within(path, locked) for path in wanted):
            return f"process {owner['pid']} ({owner['cmd']})"
    return ""


def written(root: Path) -> list[str]:
    """Paths, relative to the project, that other processes are writing, e.g. the outputs of a running stage."""
    return sorted(os.path.relpath(path, root) for path in _writers(root))


def _writers(root: Path) -> dict[str, dict[str, Any]]:
    """Path that another process has locked for writing -> that process."""
    table = _of_running(_table(root) or {})
    return {path: owner for path, owner in table.get("write", {}).items() if owner["pid"] != os.getpid()}
