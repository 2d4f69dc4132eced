"""Trainings in several processes, and what happens to them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from dagster_project.core.errors import PedigreeError
from dagster_project.core.params import Compute
from dagster_project.stages import adapter
from dagster_project.training.trainers.harness import distributed


def tune(
    folder: Path, model: Path, name: str, count: int, recipe: dict[str, Any], accumulation: int, data: str = "tokenized"
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
