"""Class `kill`: SIGKILL at every rename, fsync, removal, new folder and file
opened for writing, of stages and of DVC; and at moments in between."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builders import warm
from builders.warm import Fault

from faults import project
from faults.case import KILLED, Case, Play, Violation

EVENTS = {
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "rmdir",
    "os.mkdir": "mkdir",
    "os.link": "link",
    "os.symlink": "symlink",
    "os.truncate": "truncate",
    "shutil.copyfile": "copy",
}
"""Python's audit events of calls that change files; each is raised before the
call. Files opened for writing and fsync are added to these."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OTHER_CALLS = {"in_stage": 3, "fault": 9}
"""Of all other calls, one in so many."""
MOMENTS = 12
"""Random moments for each command that is killed from outside."""


class Calls:
    """A fault that counts the calls of this process that change files in the
    project, and kills the process before one of them."""

    def __init__(self, root: Path, kill_at: int = 0, log: Path | None = None) -> None:
        """Args:
        kill_at: number of the call, from 1; 0: count only.
        log: gets the name of each call.
        """
        self.root, self.kill_at, self.log = root, kill_at, log
        self.count = 0

    def __call__(self) -> None:
        self.pid = os.getpid()
        fsync = os.fsync

        def counted(descriptor: Any) -> None:
            self._call("fsync")
            fsync(descriptor)

        os.fsync = counted
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            self._call(EVENTS[event])
        elif (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & WRITES
            and str(self.root) in str(arguments[0])
        ):
            self._call("write")

    def _call(self, name: str) -> None:
        if os.getpid() != self.pid:  # a process that this one has forked
            return
        self.count += 1
        if self.log is not None:
            log, self.log = self.log, None  # opening the log is no call of the project
            with log.open("a") as file:
                file.write(f"{name}\n")
            self.log = log
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def earlier(stage: str) -> str:
    at = project.STAGES.index(stage)
    return project.STAGES[at - 1] if at else ""


def calls_of(projects: project.Projects, stage: str, which: str) -> list[str]:
    """Names of the calls, in order, of the process of a stage (`in_stage`) or
    of DVC (`fault`), when the stage runs for the first time."""
    place = projects.copy(earlier(stage), f"count-{stage}-{which}")
    log = place.around / "calls"
    done = warm.run(place, "dvc", "repro", stage, **{which: Calls(place.root, 0, log)})
    assert done.code == 0, done.text
    return log.read_text().split()


def cases(projects: project.Projects, fixed: bool) -> Iterator[Case]:
    for stage in ("splits",) if fixed else project.STAGES:
        for which in ("in_stage", "fault"):
            numbered = [*enumerate(calls_of(projects, stage, which), 1)]
            chosen = [pair for pair in numbered if pair[1] in ("rename", "fsync")]
            chosen += numbered[:: OTHER_CALLS[which]]  # of the others, which DVC repeats for each file
            step = max(1, len(chosen) // 2) if fixed else 1
            for number, name in sorted(set(chosen))[::step]:
                victim = "stage" if which == "in_stage" else "dvc"
                yield Case(f"kill/{stage}/{victim}-{number}-{name}", earlier(stage), _killed_at(stage, which, number))
    yield from _at_moments(fixed)


def _killed_at(stage: str, which: str, number: int) -> Any:
    def play(at_work: Play) -> None:
        fault: Fault = Calls(at_work.root, number)
        ended = at_work.run("dvc", "repro", stage, **{which: fault})
        if ended.code == 0:
            raise Violation(f"nothing was killed: {ended.text}")
        at_work.recovers(stage)

    return play


def _at_moments(fixed: bool) -> Iterator[Case]:
    """Kill a command from outside, with all that it started, or alone."""
    draw = random.Random(24)
    commands = {
        "driver": ("pedigree", "run", "instructions"),
        "dvc": ("dvc", "repro", "instructions"),
        "all": ("pedigree", "run", "--all"),
    }
    for name, words in commands.items():
        for moment in range(int(name == "dvc") if fixed else MOMENTS):
            share, group = (moment + draw.random()) / MOMENTS, bool(moment % 2)
            yield Case(f"kill/moment/{name}-{moment}", "raw_examples", _killed_after(words, share, group))
    for moment in range(1 if fixed else MOMENTS):
        share = (moment + draw.random()) / MOMENTS
        yield Case(f"kill/moment/sync-{moment}", project.DONE, _killed_after(("pedigree", "sync"), share, False))


def _killed_after(words: tuple[str, ...], share: float, group: bool) -> Any:
    """Kill when the command has used a share of the CPU time that it needs;
    time alone would depend on the load of the machine."""

    def play(at_work: Play) -> None:
        command = at_work.start(*words)
        limit, until = share * 1.2, time.monotonic() + 300
        while command.poll() is None and _cpu_of_group(command.pid) < limit and time.monotonic() < until:
            time.sleep(0.005)
        if command.poll() is None:
            if group:
                command.kill_group()
            else:
                os.kill(command.pid, signal.SIGKILL)
        ended = at_work.ended(command)
        assert ended.code in (0, KILLED), ended.text
        wait_for_group(command.pid)
        goal = project.DONE if words[-1] in ("sync", "--all") else "instructions"
        if words[-1] == "sync":
            again = at_work.run("pedigree", "sync")
            if again.code:
                raise Violation(again.text)
            at_work.is_undisturbed()
        else:
            at_work.recovers(goal, *(words if words[-1] == "--all" else ()))

    return play


def _cpu_of_group(group: int) -> float:
    """CPU seconds of the living processes of a session."""
    import psutil

    total = 0.0
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == group:
                used = process.cpu_times()
                total += used.user + used.system
        except (psutil.Error, ProcessLookupError):
            continue
    return total


def wait_for_group(group: int) -> None:
    """Wait until no process of a session is left: a stage ends with DVC by itself."""
    import psutil

    until = time.monotonic() + 60
    while time.monotonic() < until:
        alive = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process.pid)
            except (psutil.Error, ProcessLookupError):
                continue
        if not alive:
            return
        time.sleep(0.05)
    raise Violation(f"processes still run a minute after their parent was killed: {alive}")
