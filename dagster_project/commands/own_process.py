"""Settings of a process that runs one command. They count only if they are made before the first import of torch or transformers."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median_low

from dagster_project.core.imports import lean_imports

POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
"""How long threads of OpenMP that wait for each other spin before they sleep."""
OURS = "PEDIGREE_WAITING"
"""Names the variable that a process of Pedigree set, and the user did not: processes that it starts decide for themselves."""
SHORT_SPIN = "3000"
"""About 40 microseconds: as fast as endless spinning if nothing else runs, and less harmful once something else does (docs/time.md)."""
COMPUTING = frozenset({"run", "chat", "serve", "why", "bisect", "plan"})
"""Commands for which it is worth 20 ms to look at what else runs. `plan` times operations, so its threads must wait in the same way as those of a training."""
ONLY_TOKENIZERS = frozenset({"tokenized"})
"""Stages that use tokenizers of transformers, which imports torch wherever it is installed."""


def prepare(arguments: Sequence[str]) -> None:
    """Prepare this process for its command.

    Args:
        arguments: of the command line, e.g. ["run", "adapter@lora"].
    """
    set_waiting(os.environ, looks=9 if COMPUTING & {*arguments[:1]} else 0)
    if arguments[:1] == ["run"] and ONLY_TOKENIZERS & {*arguments}:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it does without torch
        with suppress(ModuleNotFoundError), lean_imports("torch"):
            from transformers.utils import is_torch_available

            is_torch_available()  # it looks once


def set_waiting(environment: MutableMapping[str, str], looks: int, stat: Path = Path("/proc/stat")) -> None:
    """Let threads of OpenMP spin briefly on a quiet machine, and sleep at once beside other work: a spinning thread takes the CPU from the
    thread that it waits for. What is computed does not depend on it. A setting of the user is kept.

    Args:
        environment: of this process and those that it starts.
        looks: how often to look at what else runs, 2.5 ms apart; 0: not at all, so threads sleep.
    """
    if OURS in environment:
        environment.pop(environment.pop(OURS), None)
    if POLICY in environment or SPINS in environment:
        return
    name, value = (SPINS, SHORT_SPIN) if looks and is_quiet(looks, stat) else (POLICY, "passive")
    environment.update({name: value, OURS: name})


def is_quiet(looks: int, stat: Path) -> bool:
    """Whether one thread runs or waits for a CPU, this one, in most looks at the kernel's counter. Without that counter, or if it is always 0: no."""
    running: list[int] = []
    with suppress(OSError, ValueError, IndexError):
        for _ in range(looks):
            running.append(int(stat.read_text().split("procs_running ")[1].split()[0]))
            time.sleep(0.0025)
    return len(running) == looks and median_low(running) == 1
