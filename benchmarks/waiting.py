"""Training beside other work, by how threads that wait for each other wait. usage: python benchmarks/waiting.py
[--project FOLDER] [--rounds N] [--rows N] [--out FILE]

LoRA as in the default run on the first rows of data/tokenized, two threads, one row a step, each run in its own
process, beside 0, 1 and 2 processes that never wait. The settings are run in turn:

    sleep        OMP_WAIT_POLICY=passive
    spin         OMP_WAIT_POLICY=active
    spin 3000    GOMP_SPINCOUNT=3000, whatever else runs
    ours         what a process of Pedigree does (`core/waiting.py`)
    ours, late   the same, and the other processes begin after the first steps

Tokens per second are the median of the rounds, without the first steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tables import machine, show  # noqa: E402

from dagster_project.commands import own_process  # noqa: E402
from dagster_project.core import waiting  # noqa: E402

LATE = "ours, late"
SETTINGS = {
    "sleep": {waiting.POLICY: "passive"},
    "spin": {waiting.POLICY: "active"},
    "spin 3000": {waiting.SPINS: waiting.SHORT_SPIN},
    "ours": {},
    LATE: {},
}
BEGUN, SKIPPED = 2, 6
"""Steps after which others begin in `ours, late`, and steps that are not
measured: memory is still being allocated, and the others are noticed."""
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "layers_to_transform": [*range(10, 30)],
}


def train(project: Path, rows: int) -> float:
    """Tokens per second of this process, in which torch has not been loaded yet."""
    own_process.prepare(["run"])
    from dataclasses import replace as changed

    from datasets import Dataset
    from training import stamping
    from transformers import AutoTokenizer

    from dagster_project.core.params import Compute
    from dagster_project.core.records import read_table
    from dagster_project.training.methods.build import build
    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.trainers.harness.params import SftParams
    from dagster_project.training.trainers.sft.sft import train as fine_tune

    compute, model, stamps = Compute(seed=7, threads=2), project / "data" / "base_model", list[float]()
    table = list(
        read_table(project / "data" / "tokenized" / "train.parquet", ["lengths", "input_ids", "labels", "weights"])
    )[:rows]
    prepared = build("lora", LORA, model, *prepare(compute), "benchmark")
    prepared = changed(prepared, callbacks=[*prepared.callbacks, stamping(stamps), announcing(BEGUN)])
    params = SftParams(learning_rate=1.5e-3, num_train_epochs=1)
    fine_tune(prepared, AutoTokenizer.from_pretrained(model), Dataset.from_list(table), None, params, compute)
    tokens = sum(len(row["input_ids"]) for row in table) / len(table) * (len(stamps) - SKIPPED)
    return tokens / (stamps[-1] - stamps[SKIPPED - 1])


def announcing(step: int) -> Any:
    """A callback that prints a line at the end of this step."""
    from transformers import TrainerCallback

    class Announce(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                print("begun", flush=True)

    return Announce()


@contextmanager
def busy(count: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(setting: str, others: int, project: Path, rows: int) -> float:
    hidden = {waiting.POLICY, waiting.SPINS, waiting.OURS, "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | SETTINGS[setting]
    command = [sys.executable, __file__, "--project", str(project), "--rows", str(rows), "--one"]
    late = setting == LATE
    with (
        nullcontext() if late else busy(others),
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        begun = any(line == "begun\n" for line in lines)
        with busy(others) if late and begun else nullcontext():
            last = deque(lines, maxlen=1)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}")
    return float(json.loads(last[0]))


def table(speeds: dict[tuple[str, int], float], rounds: int) -> str:
    lines = [f"Tokens per second on {machine()}, bfloat16, two threads; medians of {rounds} rounds.", ""]
    lines += [
        "| other processes that never wait | " + " | ".join(SETTINGS) + " |",
        "| ---: |" + " ---: |" * len(SETTINGS),
    ]
    lines += [
        f"| {count} | " + " | ".join(f"{speeds[name, count]:.0f}" for name in SETTINGS) + " |"
        for count in sorted({count for _, count in speeds})
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(options.project, options.rows)))
        return
    speeds = dict[tuple[str, int], float]()
    for count in (0, 1, 2):
        found: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(options.rounds):
            for name, values in found.items():
                values.append(measure(name, count, options.project, options.rows))
                print(f"{count} others, {name}: {values[-1]:.0f} tokens/s", file=sys.stderr, flush=True)
        speeds |= {(name, count): statistics.median(values) for name, values in found.items()}
    show(options.out, "waiting", table(speeds, options.rounds))


if __name__ == "__main__":
    main()
