"""Who is at work: one stage command at a time, which dies with the DVC that started it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}
PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def hold(root: Path, address: str, busy: Callable[[str], None]) -> Iterator[None]:
    """Hold a stage's lock, which the system frees when its holder dies; wait while another process has it.

    Args:
        busy: told once who holds the lock; may raise, and then there is no waiting.
    """
    path = root / ".dvc" / "tmp" / "pedigree" / "locks" / address
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    busy(_holder(path))
                    told = True
                time.sleep(0.2)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "command": " ".join(sys.argv)}))
        file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} ({found['command']})"
    except (OSError, ValueError, KeyError):
        return "another process"


def die_with_parent() -> None:
    """If DVC started this process, end with it, so that no orphan writes after its DVC was killed."""
    if "DVC_STAGE" not in os.environ:
        return
    parent = psutil.Process().parent()
    while parent is not None and parent.name() in SHELLS:
        parent = parent.parent()
    if parent is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        end_with(parent)


def end_with(parent: psutil.Process) -> None:
    """End when another process does, which is an ancestor of this one."""
    if sys.platform == "linux" and parent.pid == os.getppid():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it died before the signal was asked for
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def end_command(address: str) -> None:
    """Interrupt the stage command that a DVC in this process has started; end it if it has not put things right after twenty seconds."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.environ().get("DVC_STAGE") == address:
                child.send_signal(signal.SIGINT)
                found.append(child)
    for child in psutil.wait_procs(found, timeout=20)[1]:
        child.kill()


def _watch(parent: psutil.Process) -> None:
    while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
