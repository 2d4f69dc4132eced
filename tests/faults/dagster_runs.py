"""Class `dagster`: SIGKILL of the process of a run, of the stage command below it, and of the daemon."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from builders.warm import Outcome

from faults import project
from faults.case import Case, Play, Violation
from faults.kills import Calls, wait_for_group

MOMENTS = 6
SCRATCH = Path(".dvc/tmp/pedigree/scratch")


def cases(projects: project.Projects, fixed: bool) -> Iterator[Case]:
    for number in range(1 if fixed else MOMENTS):
        yield Case(f"dagster/run-worker-{number}", "raw_examples", _run_killed(number))
    if fixed:
        return
    for number in (3, 20, 35):
        yield Case(f"dagster/stage-call-{number}", "raw_examples", _stage_killed(number))
    for alone in (True, False):
        yield Case(f"dagster/daemon{'' if alone else '-and-its-processes'}", "raw_examples", _daemon_killed(alone))


def _run_killed(number: int) -> Callable[[Play], None]:
    """Kill when the run's first stage runs (0), or that many tenths of a CPU second later."""

    def play(at_work: Play) -> None:
        command = at_work.start("materialize", "instructions", "splits")
        until = time.monotonic() + 300
        while (
            command.poll() is None
            and not (at_work.root / SCRATCH / "instructions").exists()
            and time.monotonic() < until
        ):
            time.sleep(0.01)
        began = _cpu(command.pid)
        while command.poll() is None and _cpu(command.pid) < began + number / 30 and time.monotonic() < until:
            time.sleep(0.01)
        if command.poll() is None:
            os.kill(command.pid, signal.SIGKILL)
        at_work.ended(command)
        wait_for_group(command.pid)
        _runs_again(at_work, killed=True)

    return play


def _stage_killed(number: int) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        ended = at_work.run("materialize", "instructions", "splits", in_stage=Calls(at_work.root, number))
        if ended.code != 1 or not re.search(r"exited with (-9|137)", ended.text):
            raise Violation(f"exit code {ended.code}:\n{ended.text[-3000:]}")
        _runs_again(at_work, killed=False)

    return play


def _runs_again(at_work: Play, killed: bool) -> None:
    """Sync ends what is dead, the same run succeeds, and both front ends agree."""
    synced = at_work.run("pedigree", "sync")
    if synced.code or (killed and "was killed" not in synced.text):
        raise Violation(f"sync after the kill:\n{synced.text}")
    done = at_work.run("materialize", "instructions", "splits")
    if done.code:
        raise Violation(f"the run after the kill:\n{done.text[-3000:]}")
    at_work.clear_temporary_files()
    at_work.is_undisturbed("splits")


def _cpu(pid: int) -> float:
    try:
        used = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return float("inf")
    return used.user + used.system


def _daemon_killed(alone: bool) -> Callable[[Play], None]:
    """Launch a run that waits in the queue, start the daemon, kill it while the run is at work, and start it again."""

    def play(at_work: Play) -> None:
        (at_work.root / ".dagster").mkdir(exist_ok=True)
        at_work.run("pedigree", "sync")
        launch = _dagster(at_work, "dagster", "job", "launch", "-w", "workspace.yaml", "-j", "data", "-l", "pedigree")
        said = launch.communicate()[0]
        if launch.returncode:
            raise Violation(said.decode())
        first = _dagster(at_work, "dagster-daemon", "run", "-w", "workspace.yaml")
        try:
            _until(lambda: any((at_work.root / SCRATCH).glob("*/*")), "no stage of the queued run began")
        finally:
            _end(first, alone)
        second = _dagster(at_work, "dagster-daemon", "run", "-w", "workspace.yaml")
        try:
            _until(lambda: not _runs_in(at_work.root, "dagster_project"), "a stage of the killed run does not end")
        finally:
            _end(second, alone=False)
        _until(lambda: not _runs_in(at_work.root, "grpc"), "a code server without a daemon does not end")
        at_work.run("pedigree", "sync")
        at_work.clear_temporary_files()
        at_work.recovers(project.DONE)

    return play


def _dagster(at_work: Play, *words: str) -> subprocess.Popen[bytes]:
    environment = {**at_work.place.environment(), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    at_work.outcomes.append(Outcome(words, 0, "", ""))
    return subprocess.Popen(
        command,
        cwd=at_work.root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes], alone: bool) -> None:
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for one in [] if alone else below:
        one.kill()
    process.kill()
    process.communicate()


def _runs_in(root: Path, word: str) -> bool:
    """Whether a process in this folder has this word in its command."""
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(root) and word in process.cmdline():
                return True
        except psutil.Error:
            continue
    return False


def _until(holds: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + 300
    while not holds():
        if time.monotonic() > until:
            raise Violation(otherwise)
        time.sleep(0.1)


CLASSES = {"dagster": cases}
