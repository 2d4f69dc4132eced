"""Runs code that a model wrote, and the tests of a record, in a process of their own (code_process.py).

The process has limits and, with `sandbox`, no network, no other processes and no file that it can write.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

from dagster_project.core.errors import InputError
from dagster_project.training.trainers.alignment import code_process

FENCED = re.compile(r"^```[\w+-]*[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""A block of code in Markdown."""
WAITS = 10
"""Wall time that a run may take, in multiples of its processor time."""
STARTS = 60
"""Seconds that the process may take in addition, to start and to end."""


def code_in(text: str) -> str:
    """The last block of code of an answer, or all of it if there is none.

    >>> code_in("Like this:\\n```python\\nx = 1\\n```\\nDone."), code_in("x = 1")
    ('x = 1\\n', 'x = 1')
    """
    blocks: list[str] = FENCED.findall(text)
    return blocks[-1] if blocks else text


def passes(code: str, tests: str, sandbox: bool, seconds: int, memory: int) -> bool:
    """Whether all tests pass after the code ran.

    Args:
        sandbox: isolate it; without, it can do what you can do, within the limits.
        seconds: of processor time.
        memory: address space in bytes.
    Raises:
        InputError: the sandbox cannot be set up here.
    """
    wait = seconds * WAITS
    work = {"code": code, "tests": tests, "sandbox": sandbox, "seconds": seconds, "wait": wait, "memory": memory}
    command = [sys.executable, "-I", "-S", "-B", code_process.__file__]
    with (
        tempfile.TemporaryDirectory(prefix="pedigree-code-") as folder,
        # no tokens and keys in its environment
        subprocess.Popen(
            command, cwd=folder, env={"PYTHONHASHSEED": "0"}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as process,
    ):  # fmt: skip
        said = b""
        try:
            with suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(json.dumps(work).encode(), timeout=wait + STARTS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # without a sandbox, what it started may still run
    if process.returncode == code_process.UNABLE:
        raise InputError(
            f"unit_tests: there is no sandbox here: {said.decode('utf-8', 'replace').strip()}",
            "allow user namespaces (docs/security.md),"
            " or set run: unprotected in a container that has no secrets and no network",
        )
    return process.returncode == code_process.PASSED
