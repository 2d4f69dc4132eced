"""Runs one command, and ends it with everything that it has started as soon as standard input closes.

That is when the stage stops it, or dies itself. A script of its own, run as `python -I keeper.py COMMAND...`, with the
exit code of the command (128 + n for signal n).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
import time

import psutil

PR_SET_CHILD_SUBREAPER = 36
GRACE = 10.0
"""Seconds between the request to end and the kill."""


def main() -> int:
    if sys.platform == "linux":  # processes that leave their parent become children of this one, so that they are found
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_at_eof, daemon=True).start()
    code = command.wait()
    end_descendants()
    return code if code >= 0 else 128 - code


def _end_at_eof() -> None:
    os.read(0, 1)  # nothing is ever written
    end_descendants()


def end_descendants() -> None:
    """End all processes that descend from this one, also those that start meanwhile."""
    until = time.monotonic() + GRACE
    asked = set[int]()
    while running := [one for one in psutil.Process().children(recursive=True) if _runs(one)]:
        for one in running:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() > until:
                    one.kill()
                elif one.pid not in asked:
                    asked.add(one.pid)
                    one.terminate()
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    sys.exit(main())
