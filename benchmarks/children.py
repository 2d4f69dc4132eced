"""Measurements in new processes: what a library loads, allocates and sets in
one measurement does not affect the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Variables of a process that computes with one thread."""


def output_of(
    *arguments: str,
    python: str = sys.executable,
    cwd: Path = ROOT,
    variables: Mapping[str, str] = ONE_THREAD,
    given: str | None = None,
) -> str:
    """Standard output of a Python process that imports this clone and reads nothing from the Hub.

    Args:
        arguments: a script, or `-c` and code, and its arguments.
        python: of another environment.
        variables: of its environment, in addition to those of this process.
        given: standard input.
    Raises:
        SystemExit: it failed, with the end of its messages.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(
        [python, "-W", "ignore", *arguments],
        cwd=cwd,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def result_of(*arguments: str, **options: Any) -> Any:
    """The last line that such a process prints, which is JSON. Arguments and errors are those of `output_of`."""
    return json.loads(output_of(*arguments, **options).splitlines()[-1])
