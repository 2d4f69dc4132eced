"""A killed or stopped training resumes and ends in the same bytes.

Run as a script this file loads the libraries once and forks a process for each
training; what is killed is always a process, by SIGKILL.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders.training import (
    LORA,
    PACKED_ROWS,
    exit_code,
    make_data,
    output_files,
    ready_to_fork,
    run_in_child,
    start_child,
    train_adapter,
)  # fmt: skip
from builders.training_pipeline import wait_at_pass

from dagster_project.core.errors import PedigreeError

ROOT = Path(__file__).resolve().parents[1]

PASSES = PACKED_ROWS * 3


# the process that trains
# ------------------------------------------------------------------------------------------------------------------


def kill_at_pass(number: int) -> None:
    """Arrange for SIGKILL at the end of a forward and backward pass, counted from 1."""
    from transformers import Trainer

    whole, done = Trainer.training_step, 0

    def step(*arguments: Any, **named: Any) -> Any:
        nonlocal done
        found = whole(*arguments, **named)
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Trainer.training_step = step


def kill_at_write(save: int, boundary: int | None, count: Path | None = None) -> None:
    """Arrange for SIGKILL before or after one of the system's writes in the
    n-th save; JSON files are torn in the middle.

    Args:
        count: where to write how many boundaries the save has, if nothing is to be killed.
    """
    import pathlib

    import safetensors.torch

    from dagster_project.training.trainers.harness.checkpoint import Checkpoints

    saves, passed, active = 0, 0, False
    whole = Checkpoints.save

    def at_boundary() -> None:
        nonlocal passed
        if active:
            if passed == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            passed += 1

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            at_boundary()
            found = function(*arguments, **named)
            at_boundary()
            return found

        return call

    def saving(*arguments: Any) -> None:
        nonlocal saves, active
        saves += 1
        active = saves == save
        whole(*arguments)
        if active and count:
            count.write_text(str(passed))
        active = False

    honest = pathlib.Path.write_text

    def torn(path: Path, text: str, *rest: Any, **named: Any) -> int:
        if active:
            honest(path, text[: len(text) // 2])
        at_boundary()
        return honest(path, text, *rest, **named)

    Checkpoints.save = saving  # type: ignore[method-assign]
    pathlib.Path.write_text = torn  # type: ignore[assignment, method-assign]
    safetensors.torch.save_file = watched(safetensors.torch.save_file)
    os.fsync, os.replace, os.unlink = watched(os.fsync), watched(os.replace), watched(os.unlink)


def main() -> None:
    """Run the orders that arrive on standard input, each in a child. Its
    process id and then its exit code are printed."""
    import datasets  # noqa: F401  what each run needs, loaded once
    import peft  # noqa: F401
    import torch
    import trl

    from dagster_project.stages import adapter  # noqa: F401

    assert trl.SFTTrainer and torch.get_num_threads()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ready_to_fork()
    for line in sys.stdin:
        order = json.loads(line)
        child = start_child(partial(carry_out, **order), Path(order["folder"]) / f"{order['name']}.log")
        print(child, flush=True)
        print(exit_code(child), flush=True)


def carry_out(
    folder: str,
    model: str,
    name: str,
    threads: int = 1,
    recipe: dict[str, Any] | None = None,
    wait: dict[str, Any] | None = None,
    **kills: Any,
) -> None:
    os.dup2(2, 1)  # standard output has process ids and exit codes only
    chosen = {**LORA, **(recipe or {})}
    if wait:
        wait_at_pass(wait["number"], Path(wait["gate"]))
    if kills:
        kill_and_resume(Path(folder), Path(model), name, chosen, threads, kills)
        return
    try:
        train_adapter(Path(folder), Path(model), name, chosen, threads, live=Path(folder) / "live" / name)
    except PedigreeError as error:
        logging.error(str(error))
        sys.exit(error.exit_code)


def kill_and_resume(
    folder: Path, model: Path, result: str, recipe: dict[str, Any], threads: int, order: dict[str, Any]
) -> None:
    """Train `whole`, and for each kill of an order a training that is killed
    and run again. What happened is written to folder/result."""
    found, save = {}, order.get("save")

    def uninterrupted() -> None:
        if save:
            kill_at_write(save, None, folder / "boundaries")
        train_adapter(folder, model, "whole", recipe, threads)

    assert run_in_child(uninterrupted, folder / "whole.log") == 0, (folder / "whole.log").read_text()
    kills: dict[str, Callable[[], None]] = {f"pass {n}": lambda n=n: kill_at_pass(n) for n in order.get("passes", [])}  # type: ignore[misc]
    if save:
        boundaries = range(int((folder / "boundaries").read_text()))
        chosen = (
            boundaries if order.get("boundaries") is None else random.Random(5).sample(boundaries, order["boundaries"])
        )
        kills |= {f"write {n}": lambda n=n: kill_at_write(save, n) for n in chosen}  # type: ignore[misc]
    for name, arrange in kills.items():

        def killed(name: str = name, arrange: Callable[[], None] = arrange) -> None:
            arrange()
            train_adapter(folder, model, name, recipe, threads)

        ends = [run_in_child(killed, folder / f"{name}.log")]
        if order.get("damage"):
            newest = max((folder / "checkpoints" / name).glob("step-????????"))
            (newest / "weights.safetensors").write_bytes((newest / "weights.safetensors").read_bytes()[:-1])
        ends.append(
            run_in_child(lambda name=name: train_adapter(folder, model, name, recipe, threads), folder / f"{name}.log")
        )  # type: ignore[misc]
        said = (folder / f"{name}.log").read_text()
        found[name] = {
            "ends": ends,
            "same": output_files(folder, name) == output_files(folder, "whole"),
            "resumed": "resuming from the checkpoint" in said,
            "left": (folder / "checkpoints" / name).exists(),
            "log": said[-2000:],
        }
    (folder / result).write_text(json.dumps(found))


# the tests
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_data(tmp_path)
    return tmp_path


class Trainer:
    """This file as a script, which trains one model at a time."""

    def __init__(self, model: Path, hash_seed: int) -> None:
        self.model = model
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(hash_seed),
            "PYTHONPATH": str(ROOT),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, folder: Path, name: str, **order: Any) -> int:
        """Returns: the id of the process that trains."""
        assert self.process.stdin
        print(
            json.dumps({"folder": str(folder), "model": str(self.model), "name": name, **order}),
            file=self.process.stdin,
            flush=True,
        )
        return self._number()

    def finish(self) -> int:
        """Returns: the exit code of the training that was started last."""
        return self._number()

    def train(self, folder: Path, name: str, **order: Any) -> int:
        self.start(folder, name, **order)
        return self.finish()

    def _number(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def trainer(tiny_model: Path) -> Iterator[Trainer]:
    trainer = Trainer(tiny_model, hash_seed=0)
    with trainer.process:
        yield trainer


def kills(trainer: Trainer, folder: Path, **order: Any) -> dict[str, dict[str, Any]]:
    assert trainer.train(folder, "kills", **order) == 0, (folder / "kills.log").read_text()
    found: dict[str, dict[str, Any]] = json.loads((folder / "kills").read_text())
    for name, one in found.items():
        assert one["ends"] == [-signal.SIGKILL, 0], (name, one)
        assert one["same"], (name, one)
        assert not one["left"]
    return found


@pytest.mark.parametrize(
    ("threads", "strategy"),
    [
        pytest.param(1, {"save_strategy": "steps", "save_steps": 2}, id="one thread"),
        pytest.param(2, {"save_strategy": "epoch"}, id="two threads", marks=pytest.mark.long),
    ],
)
def test_a_killed_training_ends_in_the_same_bytes(
    trainer: Trainer, folder: Path, threads: int, strategy: dict[str, Any]
) -> None:
    """At some of the passes, chosen at random; PEDIGREE_FUZZ=1: at all of them."""
    make_data(folder, threads=threads)
    every = range(1, PASSES + 1)
    passes = [*every] if os.environ.get("PEDIGREE_FUZZ") else sorted(random.Random(threads).sample(every, 3))
    found = kills(trainer, folder, threads=threads, recipe=strategy, passes=passes)
    first = 4 if "save_steps" in strategy else PACKED_ROWS  # passes before the first checkpoint
    assert [one["resumed"] for one in found.values()] == [n > first for n in passes] and min(passes) <= first < max(
        passes
    )


@pytest.mark.parametrize(
    ("threads", "boundaries"),
    [pytest.param(1, 6, id="one thread", marks=pytest.mark.long), pytest.param(2, 2, id="two threads")],
)
def test_a_kill_at_any_write_loses_at_most_that_checkpoint(
    trainer: Trainer, folder: Path, threads: int, boundaries: int
) -> None:
    """At some of the writes, chosen at random; PEDIGREE_FUZZ=1: at all of them."""
    make_data(folder, threads=threads)
    every = os.environ.get("PEDIGREE_FUZZ")
    found = kills(trainer, folder, threads=threads, save=3, boundaries=None if every else boundaries)
    assert len(found) >= (25 if every else boundaries)
    assert all(one["resumed"] for one in found.values())


def test_a_damaged_newest_checkpoint_resumes_from_the_previous_one(trainer: Trainer, folder: Path) -> None:
    [found] = kills(trainer, folder, recipe={"save_strategy": "steps"}, passes=[12], damage=True).values()
    assert "checkpoint step-00000006 is damaged" in found["log"]
    assert "resuming from the checkpoint of step 4 of 12" in found["log"]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adafactor", "adagrad", "rmsprop", "sgd"])
def test_every_optimizer_resumes_exactly(trainer: Trainer, folder: Path, optim: str) -> None:
    assert kills(trainer, folder, recipe={"optim": optim, "num_train_epochs": 1}, passes=[6])["pass 6"]["resumed"]


@pytest.mark.parametrize(
    "recipe",
    [
        {
            "method": "adalora",
            "peft": {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "target_modules": ["q_proj", "v_proj"]},
            "load_best_model_at_end": True,
        },
        {"method": "qlora"},
        {"method": "prefix_tuning", "peft": {"num_virtual_tokens": 3}, "neftune_noise_alpha": None},
    ],
    ids=lambda recipe: recipe["method"],
)
def test_other_methods_than_lora_resume_exactly(trainer: Trainer, folder: Path, recipe: dict[str, Any]) -> None:
    assert kills(trainer, folder, recipe={**recipe, "merge": False, "num_train_epochs": 2}, passes=[PACKED_ROWS + 3])[
        f"pass {PACKED_ROWS + 3}"
    ]["resumed"]


def test_early_stopping_and_grouping_by_length_resume_exactly(trainer: Trainer, folder: Path) -> None:
    from dagster_project.core.records import read_table, write_table
    from dagster_project.stages.tokenized import row_schema

    path = folder / "tokenized" / "train.parquet"
    rows = [
        {**row, "example_ids": row["example_ids"][:1], "lengths": [sum(row["lengths"])]} for row in read_table(path)
    ]
    write_table(path, rows, row_schema())
    recipe = {
        "num_train_epochs": 9,
        "learning_rate": 0.3,
        "early_stopping_patience": 1,
        "group_by_length": True,
        "save_strategy": "epoch",
    }
    found = kills(trainer, folder, recipe=recipe, passes=[PACKED_ROWS + 2])
    assert found[f"pass {PACKED_ROWS + 2}"]["resumed"]
    assert len(json.loads((folder / "whole" / "report.json").read_text())["validation_loss"]) < 10, (
        "it did not stop early"
    )


@pytest.mark.long
def test_a_training_killed_during_or_after_the_sweep_ends_in_the_same_bytes(trainer: Trainer, folder: Path) -> None:
    recipe = {"learning_rate": "auto", "max_steps": 4}
    assert trainer.train(folder, "probe", recipe=recipe) == 0, (folder / "probe.log").read_text()
    trials = (
        len(json.loads((folder / "probe" / "training.json").read_text())["sweep"]) - 1
    )  # the first point is from before training
    assert trials > 1
    in_sweep, after = PACKED_ROWS + 3, trials * PACKED_ROWS + 6  # each trial takes the epoch that the training takes
    found = kills(trainer, folder, recipe=recipe, passes=[in_sweep, after])
    assert [one["resumed"] for one in found.values()] == [False, True]
    begun = [(folder / f"{name}.log").read_text().count("training: step 0, validation loss") for name in found]
    assert begun == [1 + trials + 1, trials + 1], "a trial that was killed is begun again, and one that ended is not"


@pytest.fixture(scope="module")
def other_trainer(tiny_model: Path) -> Iterator[Trainer]:
    """A process whose sets have another order."""
    trainer = Trainer(tiny_model, hash_seed=1)
    with trainer.process:
        yield trainer


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
def test_two_processes_give_identical_bytes(
    trainer: Trainer, other_trainer: Trainer, folder: Path, threads: int
) -> None:
    make_data(folder, threads=threads)
    for process, name in ((trainer, "first"), (other_trainer, "second")):
        assert process.train(folder, name, threads=threads) == 0, (folder / f"{name}.log").read_text()
    first, second = output_files(folder, "first"), output_files(folder, "second")
    assert {"adapter_model.safetensors", "training.json", "examples.parquet", "loss.csv", "report.json"} < set(first)
    assert first == second


STOPPED: dict[str, Any] = {"threads": 2, "recipe": {"num_train_epochs": 2, "save_strategy": "no"}}


@pytest.fixture(scope="module")
def whole(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the training `whole` on long rows, of eight steps."""
    folder = tmp_path_factory.mktemp("stopped")
    make_data(folder, threads=2)
    assert trainer.train(folder, "whole", **STOPPED) == 0, (folder / "whole.log").read_text()
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_saves_a_checkpoint_and_logs_its_step(
    trainer: Trainer, whole: Path, number: signal.Signals
) -> None:
    """The signal comes after the first of eight steps, and before the end of the third."""
    folder, name = whole, f"stopped by {number.name}"
    live, gate = folder / "live" / name, folder / f"{name}.gate"
    log = folder / f"{name}.log"
    process = trainer.start(folder, name, **STOPPED, wait={"number": 6, "gate": str(gate)})
    while not (log.exists() and "training: 1/8 steps" in log.read_text()) and psutil.pid_exists(process):
        time.sleep(0.05)
    os.kill(process, number)
    gate.touch()
    code = trainer.finish()
    assert code == 130, log.read_text()
    [checkpoint] = (folder / "checkpoints" / name).glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert f"interrupted at step {step}; the next run resumes from there" in log.read_text()
    assert 1 <= step <= 3
    assert list((folder / name).iterdir()) == []
    assert trainer.train(folder, name, **STOPPED) == 0, log.read_text()
    assert {path.stem for path in live.iterdir()} == {
        "loss",
        "validation_loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
    }
    resuming = f"resuming from the checkpoint of step {step} of 8"
    assert resuming in log.read_text() and resuming not in (folder / "whole.log").read_text()
    assert output_files(folder, name) == output_files(folder, "whole")


if __name__ == "__main__":
    main()
