"""What rewards that can be verified add to supervised tuning. usage: python benchmarks/verifiable.py [TRAINING...]
[--seeds N...] [--data-seed N] [--project FOLDER] [--work FOLDER] [--out FILE]

The data are those of parcel_notes.py. All trainings are the pipeline's own
stages, each in its own process with one thread:

    sft       supervised, on the 32 records of `few`: the model that the online methods start from, with the same seed
    grpo, rloo  online from there (`reward_target: response`, reward `exact_match`): 4 answers to each of the 256
    records of `train`, once sft_more  supervised, from the base model, on all 288 records. Its 200 steps are meant to
    take at least the processor time of an online method with its
              `sft`; the last column of the table tells whether they did

All answer the 240 held-out records greedily. The interval is a bootstrap over these records, of the mean over seeds of
what each record gained. Processor seconds are user and system time of a training with loading the model, without
measuring the answers. With --out the table replaces the one in docs/alignment.md.

A training that is in measured.jsonl of the work folder is not repeated: one with the same seeds, settings, data, models
and processor. An interrupted benchmark goes on when it is started again, from the start of the training that was
interrupted. Use another folder after a change of the code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from measurements import Measurements, content  # noqa: E402
from seeds import gain, spread, training_seconds  # noqa: E402
from tables import machine, show  # noqa: E402

from dagster_project.core.hashing import sha256_of_text  # noqa: E402

TRAININGS = ("sft", "grpo", "rloo", "sft_more")
ONLINE = ("grpo", "rloo")
LONGEST = 8
"""Tokens of an answer."""
SUPERVISED: dict[str, Any] = {"method": "lora", "learning_rate": 1e-3, "save_strategy": "no"}
STEPS = {"sft": 24, "sft_more": 200}
"""Of supervised trainings."""
REWARDED: dict[str, Any] = {
    "adapter": "sft",
    "reward_target": "response",
    "rewards": {"exact_match": 1.0},
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 16,
    "options": {"num_generations": 4, "max_completion_length": LONGEST},
    "samples": 240,
    "max_new_tokens": LONGEST,
}
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
    entry = parse(
        adapter.Params, SUPERVISED | {"num_train_epochs": epochs, "max_steps": STEPS[training]}, f"adapter.{training}"
    )
    began = time.process_time()
    report = adapter.produce(
        training, entry, compute, work / "tokenized", base, work / "adapter", work / "loss.csv", work / "checkpoints"
    )
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

    from dagster_project.training.inference.generate import generate_ids
    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.methods.load import load_base
    from dagster_project.training.tokens.preference_pairs import prompt_ids
    from dagster_project.training.trainers.alignment.rewards import Rewards

    model, tokenizer = load_base(model_folder, *prepare(compute)).eval(), AutoTokenizer.from_pretrained(model_folder)
    prompts = [prompt_ids(tokenizer, task) for task in tasks]
    generated = generate_ids(model, tokenizer, prompts, LONGEST, 16, "held-out answers")
    answers = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in generated]
    rewards = Rewards(REWARDED["rewards"], None)
    total = rewards.total(
        rewards.components(tasks, [{"role": "assistant", "content": answer} for answer in answers], alone=True)
    )
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
            method,
            entry,
            Compute(seed=seed, threads=1, dtype="bfloat16"),
            aligned.Sources(work / "no pairs", None, sft / "merged", splits=work / "splits"),
            work / "aligned",
            work / "curve.csv",
            work / "checkpoints",
        )
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
        (
            f"Exact answers to {held_out} held-out records, bfloat16, one thread, {machine()}; mean over the seeds and,"
            " in brackets, minimum and maximum. The interval is paired, over the held-out records."
        ),
        "",
        (
            "| training | seeds | solved | gain over SFT on 32, points, 95 % interval | gain of each seed | steps |"
            " sampled answers | CPU seconds of training |"
        ),
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


def child(training: str, seed: int, data_seed: int, project: Path, folder: Path, sft: Path) -> dict[str, Any]:
    """One training and its measurement, in this process.

    Args:
        folder: for the training; what an interrupted one left there is removed.
        sft: folder of the supervised training that an online one starts from.
    """
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    if training in ONLINE:
        found = online(training, folder, sft, seed, data_seed)
    else:
        found = supervised(training, project, folder, seed, data_seed)
    return {
        "training": training,
        "seed": seed,
        "data_seed": data_seed,
        **found,
        "all_cpu_seconds": time.process_time() - start,
    }


def identity(training: str, seed: int, data_seed: int, project: Path) -> dict[str, Any]:
    """What the result of a training depends on."""
    import parcel_notes

    shared = {
        "training": training,
        "seed": seed,
        "data_seed": data_seed,
        "longest": LONGEST,
        "rewards": REWARDED["rewards"],
    }
    shared |= {"data": sha256_of_text(json.dumps(parcel_notes.records(data_seed)))}
    if training in ONLINE:
        return {**shared, "entry": REWARDED, "start": identity("sft", seed, data_seed, project)}
    settings = {"entry": SUPERVISED, "steps": STEPS[training], "tokenized": TOKENIZED}
    return {**shared, **settings, "base_model": content(project / "data" / "base_model"), "machine": machine()}


def folder_of(work: Path, of: Mapping[str, Any]) -> Path:
    """Folder of a training: another one for other settings, so that an online
    training cannot start from the model of other ones."""
    return (
        work
        / f"{of['data_seed']}-{of['seed']}"
        / f"{of['training']}-{sha256_of_text(json.dumps(of, sort_keys=True))[:12]}"
    )


def with_starts(trainings: Sequence[str]) -> list[str]:
    """The trainings in the order of the table, with the one that online ones
    start from, which every row is compared with.

    Raises:
        SystemExit: one is unknown.
    """
    if unknown := [name for name in trainings if name not in TRAININGS]:
        print(f"{', '.join(unknown)}: unknown training; name some of {', '.join(TRAININGS)}", file=sys.stderr)
        raise SystemExit(2)
    return [name for name in TRAININGS if name == "sft" or name in trainings]


def run_of(training: str, seed: int, data_seed: int, project: Path, work: Path) -> dict[str, Any]:
    """A training as it was measured, or else in a process of its own."""
    kept, of = Measurements(work / "measured.jsonl"), identity(training, seed, data_seed, project)
    folder, sft = folder_of(work, of), folder_of(work, of.get("start", of))
    found = kept.find(of)
    if found is not None and (training != "sft" or (folder / "merged" / "config.json").is_file()):
        return found
    print(f"{training}, seed {seed}", file=sys.stderr, flush=True)
    given = {
        "training": training,
        "seed": seed,
        "data_seed": data_seed,
        "project": str(project),
        "folder": str(folder),
        "sft": str(sft),
    }
    return kept.add(of, measure(given))


def measure(given: Mapping[str, Any]) -> dict[str, Any]:
    """`child` in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(given)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(
            f"{given['training']}, seed {given['seed']}: exit code {done.returncode}; start again to go on from here",
            file=sys.stderr,
        )
        raise SystemExit(1)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", nargs="*", help=f"sft is always one of them; default: {' '.join(TRAININGS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument(
        "--data-seed", type=int, default=0, help="of the data; settings were chosen on others (default: %(default)s)"
    )
    parser.add_argument("--project", type=Path, default=ROOT, help="with data/base_model")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "verifiable",
        help="models, and measured.jsonl, whose trainings are not repeated (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="put the table between the markers of this Markdown file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folders = {name: Path(options.child[name]) for name in ("project", "folder", "sft")}
        print(json.dumps(child(**{**options.child, **folders})))
        return 0
    trainings = with_starts(options.trainings or TRAININGS)
    project = options.project.resolve()
    work = options.work.resolve()
    if not (project / "data/base_model/config.json").is_file():
        parser.error(
            f"{options.project}: no data/base_model; run `dvc repro base_model` there, or name another --project"
        )
    seeds = dict.fromkeys(options.seeds)
    shown = table(
        [run_of(training, seed, options.data_seed, project, work) for seed in seeds for training in trainings]
    )
    show(options.out, "verifiable", shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
