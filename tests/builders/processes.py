"""Trainings in several processes, and what happens to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
from conftest import ROOT

from builders.training import run_in_child
from dagster_project.core.errors import PedigreeError
from dagster_project.core.params import Compute
from dagster_project.stages import adapter
from dagster_project.training.trainers.harness import distributed

Trained = tuple[Path, dict[str, list[int]]]
"""The folder of trainings, and the exit codes of the runs of each."""


def tune(
    folder: Path, model: Path, name: str, count: int, accumulation: int, recipe: dict[str, Any], data: str = "tokenized"
) -> None:
    """Run the stage. Its outputs, its report and the message of its error are written to folder/name*."""
    out = folder / name
    out.mkdir(exist_ok=True)
    compute = Compute(threads=1, dtype="float32", processes=count)
    params = adapter.Params(**{**recipe, "gradient_accumulation_steps": accumulation})
    try:
        report = adapter.produce(
            "x", params, compute, folder / data, model, out, out / "loss.csv", folder / "checkpoints" / name
        )
    except PedigreeError as error:
        (folder / f"{name}.said").write_text(str(error))
        os._exit(error.exit_code)
    (out / "report.json").write_text(json.dumps(report.document()))


def train_all(folder: Path, trainings: Iterable[tuple[str, Callable[[], None] | None, Callable[[], None]]]) -> None:
    """Run trainings one after the other, each in a child, and print the exit codes by name, as `run_main` returns them.

    Args:
        trainings: (name, what is done in the child first, the training).
    """
    found: dict[str, list[int]] = {}
    for name, arrange, train in trainings:

        def work(arrange: Callable[[], None] | None = arrange, train: Callable[[], None] = train) -> None:
            if arrange:
                arrange()
            train()

        found.setdefault(name, []).append(run_in_child(work, folder / f"{name}.log"))
    print(json.dumps(found))


def run_main(module: str, *arguments: Path) -> str:
    """Run the `main` of a test module in a process of its own. Returns the last line that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


def weights(trained: Trained, name: str) -> dict[str, Any]:
    """The weights that the last run of a name wrote."""
    from safetensors.torch import load_file

    folder, ends = trained
    assert ends[name][-1] == 0, printed(folder, name)
    [file] = (folder / name).glob("*model.safetensors")
    return load_file(file)


def printed(folder: Path, name: str) -> str:
    """The log of the runs of a name and the message of their last error, for the message of a failing test."""
    return "\n".join(path.read_text() for path in (folder / f"{name}.log", folder / f"{name}.said") if path.exists())


def at_pass(number: int, do: Callable[[], None]) -> None:
    """Call `do` in the first process after its n-th pass, counted from 1."""
    from transformers import Trainer

    whole, done = Trainer.training_step, 0

    def step(*arguments: Any, **named: Any) -> Any:
        nonlocal done
        found = whole(*arguments, **named)
        done += 1
        if done == number and distributed.place().rank == 0:
            do()
        return found

    Trainer.training_step = step


def group() -> list[psutil.Process]:
    """In the first process of a group: the launcher, and the processes in the order of their ranks."""
    launcher = psutil.Process(os.getppid())
    return [launcher, *sorted(launcher.children(), key=lambda process: process.pid)]
