"""Runs a training command: its output is logged line by line, and no process of it outlives it or the stage."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from dagster_project.core import waiting
from dagster_project.core.errors import InputError
from dagster_project.core.text import visible

log = logging.getLogger("pedigree")

LAST_LINES = 15
"""Lines of its output that a message about a failed command quotes."""
LONGEST_LINE = 500
KILLED = (
    "a SIGKILL comes from outside of the command, most often from the system because memory ran out: `dmesg` says so;"
    " make its batches smaller, or stop other programs, and run it again"
)
OURS = ("DAGSTER_PIPES_", "DVC_")
"""Prefixes of variables by which the stage talks to DVC and Dagster. A command does not get them."""


def environment(threads: int, seed: int, inputs: Path) -> dict[str, str]:
    """The user's environment, with the stage's interpreter first on PATH.

    Args:
        inputs: the document that describes the files.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    waiting.settle(kept, threads)
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}",
        "PEDIGREE_INPUTS": str(inputs),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONHASHSEED": str(seed),
    }


def run_command(words: Sequence[str], folder: Path, variables: Mapping[str, str], where: str) -> None:
    """Run a command until it ends.

    Args:
        words: the program and its arguments.
        folder: its working folder.
        variables: its environment.
        where: dotted path of the command in params.yaml, for messages.
    Raises:
        InputError: the program does not exist, or the command fails.
    """
    program = folder / words[0] if os.sep in words[0] else Path(shutil.which(words[0], path=variables["PATH"]) or "")
    if not (program.is_file() and os.access(program, os.X_OK)):
        problem = f"params.yaml: {where}: the program {words[0]!r} does not exist or is not executable"
        raise InputError(problem, "install it, or name a program on PATH, for example python")
    keeper = [sys.executable, "-I", str(Path(__file__).with_name("keeper.py"))]
    process = subprocess.Popen(
        [*keeper, *words], cwd=folder, env=dict(variables), start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin and process.stdout
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        for line in process.stdout:
            # of a progress bar, what a terminal would show
            text = visible(line.decode(errors="replace").rstrip().rpartition("\r")[2])[:LONGEST_LINE]
            last.append(text)
            log.info(f"{where.removesuffix('.command')}: {text}")
    finally:
        process.stdin.close()  # also after an interrupt: the keeper then ends the command and all its children
        code = process.wait()
        process.stdout.close()
    if code:
        by = f" ({signal.Signals(code - 128).name})" if code - 128 in {*signal.Signals} else ""
        shown = "; its last lines:" + "".join(f"\n  {line}" for line in last) if last else ", without output"
        hint = KILLED if code == 128 + signal.SIGKILL else "correct the command or its files"
        raise InputError(
            f"params.yaml: {where}: `{shlex.join(words)}` failed with exit code {code}{by}{shown}",
            f"{hint}; nothing was recorded",
        )
