"""Processes of llama.cpp and its converter: without the user's tokens, and offline for the Hub's libraries.

They end with this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

STARTER = Path(__file__).with_name("exec_with_parent.py")
LEFT_OUT = ("PYTHONPATH", "NO_LOCAL_GGUF")
"""Variables that would give the converter other libraries than its own."""


def run_python(arguments: Sequence[str], given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run Python with these arguments, with an empty home of the Hub's libraries.

    Args:
        given: standard input.
    """
    from dagster_project.commands.serve import environment_of

    with tempfile.TemporaryDirectory(prefix="pedigree-") as home:
        environment = {name: value for name, value in environment_of(Path(home)).items() if name not in LEFT_OUT}
        command = [sys.executable, "-P", str(STARTER), str(os.getpid()), sys.executable, *arguments]
        return subprocess.run(command, input=given, env=environment, cwd=home, capture_output=True, check=False)


def reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """Why a process failed: the signal that ended it, else the last line with an error, else the last line."""
    if done.returncode < 0:
        return f"it was ended by {signal.Signals(-done.returncode).name}, as the system does when memory runs out"
    lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower()]
    return (named or lines or [f"exit code {done.returncode}"])[-1][:300]
