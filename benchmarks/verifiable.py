"""What rewards that can be verified add to supervised tuning. usage: python benchmarks/verifiable.py [TRAINING...] [--seeds N...] [--data-seed N]
[--project FOLDER] [--work FOLDER] [--out FILE]

The data are those of parcel_notes.py. All trainings are the pipeline's own stages, each in its own process with one thread:

    sft       supervised, on the 32 records of `few`: the model that the online methods start from, with the same seed
    grpo, rloo  online from there (`reward_target: response`, reward `exact_match`): 4 answers to each of the 256 records of `train`, once
    sft_more  supervised, from the base model, on all 288 records. Its 200 steps are meant to take at least the processor time of an online method with its
              `sft`; the last column of the table tells whether they did

All answer the 240 held-out records greedily. The interval is a bootstrap over these records, of the mean over seeds of what each record gained. Processor seconds are
user and system time of a training with loading the model, without measuring the answers. The table replaces the one in docs/alignment.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from seeds import gain, spread, training_seconds  # noqa: E402
from tables import machine, replace  # noqa: E402

TRAININGS = ("sft", "grpo", "rloo", "sft_more")
ONLINE = ("grpo", "rloo")
LONGEST = 8
"""Tokens of an answer."""
SUPERVISED: dict[str, Any] = {"method": "lora", "learning_rate": 1e-3, "save_strategy": "no"}
STEPS = {"sft": 24, "sft_more": 200}
"""Of supervised trainings."""
REWARDED: dict[str, Any] = {
    "adapter": "sft", "reward_target": "response", "rewards": {"exact_match": 1.0}, "learning_rate": 3e-4, "per_device_train_batch_size": 16,
    "options": {"num_generations": 4, "max_completion_length": LONGEST}, "samples": 240, "max_new_tokens": LONGEST,
}  # fmt: skip
TOKENIZED = {"max_length": 128, "packed_length": 256}


def write_splits(folder: Path, data_seed: int, train: Sequence[str], validation: Sequence[str]) -> None:
    """A folder of splits, from files of parcel_notes.py."""
    import parcel_notes

    from dagster_project.core.records import example_id, ledger_line, write_ledger, write_records

    files, lines = parcel_notes.records(data_seed), []
    for split, names in (("train", train), ("validation", validation), ("test", ())):
        records = []
        for name in names:
            for number, row in enumerate(files[name]):
                identity = example_id(row["messages"])
                record = {"example_id": identity, "source": f"{name}.jsonl", "group_id": identity, "meta": "{}", **row}
                records.append(record)
                lines.append(ledger_line(record, number, split, ""))
        write_records(folder / split, sorted(records, key=lambda record: record["example_id"]))
    write_ledger(folder, lines)


def supervised(training: str, project: Path, work: Path, seed: int, data_seed: int) -> dict[str, Any]:
    """Train, merge, and answer the held-out records."""
    from dagster_project.core.params import Compute, parse
    from dagster_project.stages import adapter, merged, tokenized

    base, compute = project / "data" / "base_model", Compute(seed=seed, threads=1, dtype="bfloat16")
    for name in ("tokenized", "adapter"):
        (work / name).mkdir(parents=True, exist_ok=True)
    write_splits(work / "splits", data_seed, ["few", "train"] if training == "sft_more" else ["few"], [])
    tokenized.produce(project, tokenized.Params(**TOKENIZED), seed, work / "splits", base, work / "tokenized")
    epochs = 1000  # max_steps ends it
    entry = parse(adapter.Params, SUPERVISED | {"num_train_epochs": epochs, "max_steps": STEPS[training]}, f"adapter.{training}")
    began = time.process_time()
    report = adapter.produce(training, entry, compute, work / "tokenized", base, work / "adapter", work / "loss.csv", work / "checkpoints")
    seconds = time.process_time() - began
    refuse_failed(training, report)
    refuse_failed(training, merged.produce(compute, base, work / "adapter", out=work / "merged"))
    return {
        "cpu_seconds": seconds,
        "steps": report.metrics["steps"],
        "solved": solved_by(work / "merged", compute, read_held_out(work / "held_out", data_seed)),
    }


def read_held_out(folder: Path, data_seed: int) -> list[dict[str, Any]]:
    """The held-out records, as the tasks of an online method.

    Args:
        folder: for the splits.
    """
    from dagster_project.training.trainers.alignment.tasks import tasks_of

    write_splits(folder, data_seed, ["train"], ["validation"])
    return tasks_of(folder, {})[0]["test"]


def solved_by(model_folder: Path, compute: Any, tasks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Task -> reward of the model's greedy answer."""
    from transformers import AutoTokenizer

    from dagster_project.training.inference.generate import generate
    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.methods.load import load_base
    from dagster_project.training.tokens.preference_pairs import prompt_ids
    from dagster_project.training.trainers.alignment.rewards import Rewards

    model, tokenizer = load_base(model_folder, *prepare(compute)).eval(), AutoTokenizer.from_pretrained(model_folder)
    answers = generate(model, tokenizer, [prompt_ids(tokenizer, task) for task in tasks], LONGEST, 16, "held-out answers")
    rewards = Rewards(REWARDED["rewards"], None)
    total = rewards.total(rewards.components(tasks, [{"role": "assistant", "content": answer} for answer in answers], alone=True))
    return {task["example_id"]: reward for task, reward in zip(tasks, total, strict=True)}


def online(method: str, work: Path, sft: Path, seed: int, data_seed: int) -> dict[str, Any]:
    """Train from the SFT model; the stage answers the held-out records before and after."""
    from dagster_project.core.params import Compute, parse
    from dagster_project.core.records import read_table
    from dagster_project.stages import aligned

    write_splits(work / "splits", data_seed, ["train"], ["validation"])
    entry = parse(aligned.Params, {"method": method, **REWARDED}, f"aligned.{method}")
    with training_seconds() as seconds:
        report = aligned.produce(
            method, entry, Compute(seed=seed, threads=1, dtype="bfloat16"), work / "no pairs", None, sft / "merged", work / "aligned",
            work / "curve.csv", work / "checkpoints", splits=work / "splits",
        )  # fmt: skip
    refuse_failed(method, report)
    samples = read_table(work / "aligned" / "samples.parquet")
    return {
        "cpu_seconds": seconds[0],
        "steps": report.metrics["steps"],
        "answers": report.metrics["sampled"]["answers"],
        "before": {row["example_id"]: row["sft_reward"] for row in samples},
        "solved": {row["example_id"]: row["aligned_reward"] for row in samples},
        "kl_per_token": report.metrics["watch"]["kl_per_token"],
        "checks": {check.name: check.passed for check in report.checks},
    }


def refuse_failed(training: str, report: Any) -> None:
    if report.failures:
        raise SystemExit(f"{training}: {'; '.join(f'{check.name}: {check.note}' for check in report.failures)}")


LABELS = {
    "sft": "SFT on 32 records",
    "grpo": "then GRPO, rewarded on 256 others",
    "rloo": "then RLOO, rewarded on 256 others",
    "sft_more": "SFT on all 288 records",
}


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Args:
    runs: of all seeds.
    """
    of = {name: {run["seed"]: run for run in runs if run["training"] == name} for name in TRAININGS}
    starts = {seed: run["solved"] for seed, run in of["sft"].items()}
    held_out = len(next(iter(starts.values())))
    lines = [
        f"Exact answers to {held_out} held-out records, bfloat16, one thread, {machine()}; mean over the seeds and, in brackets, minimum and maximum. "
        "The interval is paired, over the held-out records.",
        "",
        "| training | seeds | solved | gain over SFT on 32, points, 95 % interval | gain of each seed | steps | sampled answers | CPU seconds of training |",
        "| --- | ---: | --- | --- | --- | ---: | ---: | --- |",
    ]
    for name in TRAININGS:
        mine = {seed: run for seed, run in of[name].items() if seed in starts}
        if not mine:
            continue
        shares = {seed: 100 * statistics.mean(run["solved"].values()) for seed, run in mine.items()}
        own = [shares[seed] - 100 * statistics.mean(starts[seed].values()) for seed in sorted(mine)]
        change = gain({seed: run["solved"] for seed, run in mine.items()}, starts)
        low, high = (100 * bound for bound in change["interval"])
        first = next(iter(mine.values()))
        cells = [
            LABELS[name],
            str(len(mine)),
            f"{spread(shares.values(), 1)} %",
            "" if name == "sft" else f"{100 * change['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
            "" if name == "sft" else ", ".join(f"{one:+.1f}" for one in own),
            str(first["steps"]),
            str(first.get("answers", "")),
            spread([run["cpu_seconds"] for run in mine.values()], 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def child(training: str, seed: int, data_seed: int, project: Path, work: Path) -> dict[str, Any]:
    """One training and its measurement, in this process."""
    folder = work / f"{data_seed}-{seed}"
    start = time.process_time()
    if training in ONLINE:
        found = online(training, folder / training, folder / "sft", seed, data_seed)
    else:
        found = supervised(training, project, folder / training, seed, data_seed)
    return {"training": training, "seed": seed, "data_seed": data_seed, **found, "all_cpu_seconds": time.process_time() - start}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", nargs="*", default=TRAININGS, help=f"default: {' '.join(TRAININGS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--data-seed", type=int, default=0, help="of the data; settings were chosen on others (default: %(default)s)")
    parser.add_argument("--project", type=Path, default=ROOT, help="with data/base_model")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/verifiable"), help="models, and measured.json, whose trainings are not repeated"
    )
    parser.add_argument("--out", type=Path, help="put the table between the markers of this Markdown file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], int(options.child[1]), options.data_seed, options.project, options.work)))
        return 0
    measured = options.work / "measured.json"
    kept: list[dict[str, Any]] = json.loads(measured.read_text()) if measured.is_file() else []
    for seed in options.seeds:
        for training in options.trainings:
            if any((run["training"], run["seed"], run["data_seed"]) == (training, seed, options.data_seed) for run in kept):
                continue
            print(f"{training}, seed {seed}", file=sys.stderr, flush=True)
            command = [sys.executable, "-W", "ignore", __file__, "--child", training, str(seed), "--data-seed", str(options.data_seed)]
            command += ["--project", str(options.project.resolve()), "--work", str(options.work.resolve())]
            env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            kept.append(json.loads(done.stdout.splitlines()[-1]))
            options.work.mkdir(parents=True, exist_ok=True)
            measured.write_text(json.dumps(kept))
    shown = table([run for run in kept if run["data_seed"] == options.data_seed and run["seed"] in options.seeds])
    if options.out:
        replace(options.out, "verifiable", shown)
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
