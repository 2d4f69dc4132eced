"""Becomes the command after the first argument, and ends when the process with that id ends, however it does (on
Linux). Imports nothing of this project."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it ended before the signal was requested
            raise SystemExit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
