"""Processes on this host: the stage command that DVC starts (the driver), and its parents.

Where a stage computes is decided in executors/.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from dagster_project.core.errors import INNER

SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}
PR_SET_PDEATHSIG = 1
CLEAN_UP = 20.0
"""Seconds for an interrupted stage command to restore outputs, and for its executor to stop the stage."""


def is_running(pid: int, since: float | None = None, start: str = "") -> bool:
    """Whether a process exists.

    Args:
        since: time at which it was running; a later process with the same id does not count.
        start: its `start_of`, which holds also if the clock was set forward meanwhile, as it is when a virtual machine
            goes on that was paused: the process then seems to have started after `since`.
    """
    try:
        process = psutil.Process(pid)
        is_same = since is None or process.create_time() <= since + 1 or (start != "" and start == start_of(pid))
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_of(pid: int) -> str:
    """The start of this machine, the id of a process, and the time from one to the other, in ticks; empty if it does
    not run, or the system is not Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {pid} {Path(f'/proc/{pid}/stat').read_text(errors='replace').rpartition(')')[2].split()[19]}"
    except OSError:
        return ""


def this_process() -> str:
    """This process, for `has_ended` in another one; empty if the system is not Linux."""
    start = start_of(os.getpid())
    return start and f"{platform.node()} {start}"


def has_ended(process: str) -> bool:
    """Whether a process of this host has ended; False for one of another host, which cannot be asked.

    Args:
        process: its `this_process`.
    """
    host, _, start = process.partition(" ")
    return host == platform.node() and start != "" and start_of(int(start.split()[1])) != start


def runs_one_of(pid: int, programs: Iterable[str]) -> bool:
    """Whether a process exists and one of these words is in its command, or this user may not read that."""
    try:
        return is_running(pid) and any(
            program in word for word in psutil.Process(pid).cmdline() for program in programs
        )
    except (psutil.NoSuchProcess, ValueError):  # ValueError: a negative number
        return False
    except psutil.AccessDenied:
        return True


def descends_from(pid: int) -> bool:
    """Whether a process started this one, directly or through others."""
    return any(parent.pid == pid for parent in psutil.Process().parents())


def end_with_starter() -> None:
    """If DVC or `pedigree verify` started this process, end with it, so that no
    orphan goes on, or writes outputs, after that was killed."""
    if "DVC_STAGE" not in os.environ and INNER not in os.environ:
        return
    found = _dvc()
    _end_with(found if found is not None and _can_be_starter(found.pid) else None)


def _can_be_starter(pid: int) -> bool:
    """Whether the parent of this process may have started it: commands are started in the session of their starter.

    If that was killed while this process was starting, the parent is one that adopted it, such as init.
    """
    session = os.getsid(0)
    try:
        return session in (os.getpid(), os.getsid(pid))
    except OSError:  # the parent has ended, or this user may not ask
        return False


def command_of_dvc() -> list[str]:
    """Command line of the DVC process that started this one; empty if DVC did not."""
    found = _dvc() if "DVC_STAGE" in os.environ else None
    return found.cmdline() if found is not None else []


def _dvc() -> psutil.Process | None:
    """The process that started this one, or the shell that did."""
    parent = psutil.Process().parent()
    while parent is not None and parent.name() in SHELLS:
        parent = parent.parent()
    return parent


def end_with_parent() -> None:
    """End when the process that started this one ends, or now if it already has."""
    _end_with(psutil.Process().parent())


def end_with(pid: int, since: float | None) -> None:
    """End this process when another one ends, or now if that one already has.

    Args:
        since: time at which it was running; None if it certainly is the one that is meant.
    """
    if not is_running(pid, since):
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=_exit_with, args=(psutil.Process(pid),), daemon=True).start()


def _end_with(ancestor: psutil.Process | None) -> None:
    if ancestor is None:
        os.kill(os.getpid(), signal.SIGKILL)
    elif sys.platform == "linux" and ancestor.pid == os.getppid():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != ancestor.pid:  # it died before the signal was requested
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        threading.Thread(target=_exit_with, args=(ancestor,), daemon=True).start()


def _exit_with(ancestor: psutil.Process) -> None:
    while ancestor.is_running() and ancestor.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def next_step(code: int) -> str:
    """What to do after a stage command that failed.

    Args:
        code: its exit code, or that of its shell.
    """
    number = -code if code < 0 else code - 128
    if number == signal.SIGINT or number not in {*signal.Signals}:
        return "see its own message above"
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return (
            f"{name} ended it, as the system does when memory runs out (`dmesg` shows it):"
            " let it use less memory, or end other programs, then run it again"
        )
    return f"{name} ended it: run it again, and if that repeats, see its own messages above"


@contextlib.contextmanager
def ended_with_its_children(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """After an exception, such as an interrupt, which a shell may not pass on, a process and all that it started are
    killed: the files that they use are going to be removed."""
    try:
        yield process
    except BaseException:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()
        raise


def interrupt_command(address: str) -> None:
    """Interrupt the stage command that DVC started in this process.

    Kill it if it is still running after `CLEAN_UP` seconds.

    Its exit status is left for DVC. psutil's `wait` would take it: DVC would
    then see exit code 0 and record a run that was interrupted.
    """
    _interrupt([os.getpid()], lambda stage: stage == address)


def interrupt_commands_of(starters: Iterable[int]) -> bool:
    """As `interrupt_command`, for all stage commands that these processes of DVC started. Returns whether there were
    any."""
    return _interrupt(starters, bool)


def _interrupt(starters: Iterable[int], is_meant: Callable[[str], bool]) -> bool:
    interrupted = []
    for starter in starters:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(starter).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if is_meant(child.environ().get("DVC_STAGE", "")):
                        child.send_signal(signal.SIGINT)
                        interrupted.append(child)
    now, until = time.time(), time.monotonic() + CLEAN_UP
    while any(is_running(child.pid, now) for child in interrupted) and time.monotonic() < until:
        time.sleep(0.05)
    for child in interrupted:
        if is_running(child.pid, now):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    return bool(interrupted)
