"""Classes `disk`, `readonly` and `memory`: a full disk, files that cannot grow,
folders that cannot be written, and too little memory."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults import project
from faults.case import Case, Play, Violation
from faults.kills import earlier

PAGE = 4096
SHARES = (0.0, 0.2, 0.5, 0.9)
"""Space left on the disk, as a share of what the stage adds."""
FILE_SIZES = {
    "base_model": (8, 64, 128),
    "raw_examples": (8, 16),
    "instructions": (6, 12, 24),
    "splits": (8, 16, 24),
    "tokenized": (6, 12, 24, 48),
}
"""Limits of the size of a file, in KiB, that some file of the stage exceeds."""
FOLDERS = (
    "",
    "data",
    "data/reports",
    "data/pages",
    ".dvc",
    ".dvc/cache",
    ".dvc/cache/files/md5",
    ".dvc/tmp",
    ".dvc/tmp/pedigree",
    ".dvc/tmp/pedigree/locks",
    ".dagster",
)
FIXED = {("data", "run"), (".dvc/tmp/pedigree", "sync")}
"""Folders and commands of the fixed part."""
MEMORY = (1, 4, 16, 48, 96)
"""MiB of address space that a stage may add to what it has when it begins."""
CAPABILITY_VERSION, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 0x20080522, 1, 2
"""linux/capability.h"""


def disk(projects: project.Projects, fixed: bool) -> Iterator[Case]:
    for stage in ("splits",) if fixed else project.STAGES:
        for size in FILE_SIZES[stage][:1] if fixed else FILE_SIZES[stage]:
            yield Case(f"disk/{stage}/files-of-{size}-KiB", earlier(stage), _no_larger_files(stage, size * 1024))
        if os.geteuid() == 0 and not fixed:
            for share in SHARES:
                yield Case(f"disk/{stage}/{share:.0%}-left", earlier(stage), _full_disk(stage, share))
    if os.geteuid() == 0 and not fixed:
        for words in (
            ("pedigree", "sync"),
            ("pedigree", "run", "--all"),
            ("pedigree", "audit", "tokenized"),
            ("pedigree", "verify", "--integrity"),
        ):
            yield Case(f"disk/nothing-left/{'-'.join(words)}", project.DONE, _full_disk_for(words))


def _no_larger_files(stage: str, size: int) -> Callable[[Play], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the call fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def play(at_work: Play) -> None:
        failed = at_work.explained(at_work.run("dvc", "repro", stage, in_stage=limit))
        if failed.code == 0:
            raise Violation(f"the limit of {size} bytes stopped nothing")
        if not any(
            reason in failed.text for reason in ("File too large", "Input/output error")
        ):  # SQLite's word for it
            raise Violation(f"no message gives the reason:\n{failed.text}")
        at_work.recovers(stage)

    return play


def _full_disk(stage: str, share: float) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        states = at_work.projects.states
        added = max(_pages(states[stage].root) - _pages(states[earlier(stage)].root), 8) * PAGE
        with _on_a_disk(at_work, int(share * added)) as grow:
            failed = at_work.explained(at_work.run("dvc", "repro", stage))
            if failed.code != 0 and not any(
                reason in failed.text for reason in ("No space left on device", "GiB free at")
            ):
                raise Violation(f"no message gives the reason:\n{failed.text}")
            grow()
            at_work.recovers(stage)

    return play


def _full_disk_for(words: tuple[str, ...]) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        with _on_a_disk(at_work, 0) as grow:
            at_work.explained(at_work.run(*words))
            grow()
            at_work.recovers(project.DONE, "pedigree", "run", "--all")

    return play


@contextmanager
def _on_a_disk(at_work: Play, left: int) -> Iterator[Callable[[], None]]:
    """Move the project to a disk of its own with this many bytes left; the function that is yielded enlarges it."""
    root = at_work.root
    aside = root.with_name("aside")
    root.rename(aside)
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(root)], check=True)
    try:
        subprocess.run(["cp", "-a", f"{aside}/.", str(root)], check=True)
        used = os.statvfs(root)
        size = (used.f_blocks - used.f_bfree) * used.f_frsize + left // PAGE * PAGE
        subprocess.run(["mount", "-o", f"remount,size={size}", str(root)], check=True)
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(root)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def _pages(root: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def readonly(projects: project.Projects, fixed: bool) -> Iterator[Case]:
    commands: dict[str, tuple[str, tuple[str, ...]]] = {
        "repro": ("instructions", ("dvc", "repro", "splits")),
        "run": ("instructions", ("pedigree", "run", "splits")),
        "all": ("splits", ("pedigree", "run", "--all")),
        "sync": (project.DONE, ("pedigree", "sync")),
        "verify": (project.DONE, ("pedigree", "verify", "--integrity")),
        "audit": (project.DONE, ("pedigree", "audit", "tokenized")),
    }
    for folder in FOLDERS:
        for name, (state, words) in commands.items():
            if fixed and (folder, name) not in FIXED:
                continue
            yield Case(f"readonly/{folder or 'project'}/{name}", state, _not_writable(folder, words))


def _not_writable(folder: str, words: tuple[str, ...]) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        locked = at_work.root / folder
        locked.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:  # permissions do not bind root
            at_work.before = _bound_by_permissions
        mode = locked.stat().st_mode
        locked.chmod(0o555)
        at_work.explained(at_work.run(*words))
        locked.chmod(mode)
        if words[:2] == ("pedigree", "sync"):
            synced = at_work.run(*words)
            if synced.code:
                raise Violation(synced.text)
        goal = "splits" if "splits" in words else project.DONE
        at_work.recovers(goal, *(() if goal == "splits" else ("pedigree", "run", "--all")))

    return play


def _bound_by_permissions() -> None:
    """Drop the capabilities by which root writes where permissions do not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, sets) == 0
    for place in (0, 1):
        sets[place] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    assert libc.capset(header, sets) == 0


def memory(projects: project.Projects, fixed: bool) -> Iterator[Case]:
    for stage in ("splits",) if fixed else project.STAGES:
        for mebibytes in MEMORY[:1] if fixed else MEMORY:
            yield Case(f"memory/{stage}/{mebibytes}-MiB", earlier(stage), _little_memory(stage, mebibytes))


def _little_memory(stage: str, mebibytes: int) -> Callable[[Play], None]:
    def limit() -> None:
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        allowed = has + mebibytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))

    def play(at_work: Play) -> None:
        at_work.explained(at_work.run("dvc", "repro", stage, in_stage=limit))
        at_work.recovers(stage)

    return play


CLASSES: dict[str, Any] = {"disk": disk, "readonly": readonly, "memory": memory}
