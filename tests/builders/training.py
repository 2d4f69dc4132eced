"""A small LoRA training: random packed examples, the parameters, the stage, and a child process to run it in."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from builders.files import contents
from dagster_project.core.chat import IGNORE
from dagster_project.training.trainers.harness import checkpoint

PACKAGE = Path(checkpoint.__file__).parents[3]
_code_of = checkpoint.code_of
_code_of_package = cache(_code_of)
# parsing the code that identifies a run takes a third of the time of a small training; this working tree does not
# change while tests run
checkpoint.code_of = lambda module, root: _code_of_package(module, root) if root == PACKAGE else _code_of(module, root)

LORA: dict[str, Any] = {
    "method": "lora",
    "peft": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "target_modules": ["v_proj", "q_proj", "down_proj"]},
    "learning_rate": 1e-2,
    "num_train_epochs": 3,
    "gradient_accumulation_steps": 2,
    "neftune_noise_alpha": 5.0,
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "save_steps": 2,
}
PACKED_ROWS = 7
"""Forward passes of an epoch: three steps of two, and a fourth of one. Twelve steps in all."""


def make_data(folder: Path, rows: int = PACKED_ROWS, threads: int = 1) -> None:
    """Packed rows of random examples; for two threads long enough that they share the work."""
    from dagster_project.core.records import write_table
    from dagster_project.stages.tokenized import row_schema

    dice = random.Random(3)

    def row(name: str) -> dict[str, Any]:
        lengths = [dice.randint(8, 12) if threads == 1 else dice.randint(80, 120) for _ in range(4)]
        ids = [dice.randrange(3, 60) for _ in range(sum(lengths))]
        labels = [token if dice.random() < 0.7 else IGNORE for token in ids]
        return {
            "example_ids": [f"{name}.{i}" for i in range(4)],
            "lengths": lengths,
            "input_ids": ids,
            "labels": labels,
            "weights": [float(label != IGNORE) for label in labels],
        }

    for split, count in (("train", rows), ("validation", 2)):
        write_table(folder / "tokenized" / f"{split}.parquet", [row(f"{split}{n}") for n in range(count)], row_schema())


def example(ids: list[int], answer_from: int, weight: float = 1.0) -> dict[str, Any]:
    """A row of one example, trained on from a position on."""
    labels = [IGNORE] * answer_from + ids[answer_from:]
    weights = [weight * (x != IGNORE) for x in labels]
    return {"example_ids": ["-"], "input_ids": ids, "labels": labels, "weights": weights, "lengths": [len(ids)]}


def packed(*examples: dict[str, Any]) -> dict[str, Any]:
    """A packed row."""
    return {column: [value for one in examples for value in one[column]] for column in examples[0]}


def train_adapter(
    folder: Path, model: Path, name: str, params: dict[str, Any], threads: int = 1, live: Path | None = None
) -> None:
    """Run the stage `adapter`: outputs under folder/name, checkpoints under folder/checkpoints/name."""
    from dagster_project.core.params import Compute
    from dagster_project.stages import adapter

    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    compute = Compute(threads=threads, dtype="float32")
    report = adapter.produce(
        "x",
        adapter.Params(**params),
        compute,
        folder / "tokenized",
        model,
        out,
        out / "loss.csv",
        folder / "checkpoints" / name,
        live=live,
    )
    (out / "report.json").write_text(json.dumps(report.document()))


def output_files(folder: Path, name: str) -> dict[str, bytes]:
    return contents(folder / name)


def exclude_loaded_from_garbage_collection() -> None:
    """Exclude what loaded libraries hold, here and in forked children: each
    training ends with full collections, which take 0.3 s with them."""
    gc.collect()
    gc.freeze()


def ready_to_fork() -> None:
    """Do here, once, what each forked training would do: parse the code that
    identifies it, and skip the libraries in garbage collection."""
    for module in ("stages/adapter.py", "stages/reward_model.py", "stages/aligned.py", "training/trainers/sft/fit.py"):
        assert checkpoint.code_of(PACKAGE / module, PACKAGE)
    exclude_loaded_from_garbage_collection()


def start_child(work: Callable[[], None], log: Path) -> int:
    """Start `work` in a forked child, its stderr appended to `log`. Returns the process id."""
    child = os.fork()
    if not child:
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 2)
            work()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:  # noqa: BLE001  any failure must reach the parent
            import traceback

            try:
                traceback.print_exc()
            finally:  # even if nothing can be written
                os._exit(1)
        os._exit(0)
    return child


def exit_code(child: int) -> int:
    """Wait for a child. Returns the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_in_child(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a forked child, its stderr appended to `log`. Returns the exit code, negative for a signal."""
    return exit_code(start_child(work, log))
