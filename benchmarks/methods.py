"""Compare all methods on the project's own data. usage: python benchmarks/methods.py [METHOD...] [--steps N] [--project
FOLDER] [--out FILE]

Each method is built with its defaults, trained by the project's own trainer on data/tokenized, and evaluated on the
test split; each in its own process, to measure its peak memory. No setting is chosen by the result. The table replaces
the one in docs/methods.md.

Tokens per second exclude padding and virtual tokens, and cover only training; with one thread they are computed from
CPU time, which does not depend on other load. Peak memory is that of the whole process while it trains. There is one
learning rate per family, below; none was tuned.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tables import replace

from dagster_project.training.tokens.collators import SIZES, collate_packed, collate_padded

ROOT = Path(__file__).resolve().parents[1]

ORDER = [
    "lora",
    "rslora",
    "dora",
    "qlora",
    "qdora",
    "adalora",
    "ia3",
    "loha",
    "lokr",
    "oft",
    "boft",
    "vera",
    "hra",
    "fourierft",
    "miss",
    "randlora",
    "layernorm",
    "prefix_tuning",
    "prompt_tuning",
    "p_tuning",
    "full",
    "feature_extraction",
]

RATES = {
    "full": 1e-4,
    "rslora": 5e-4,
    "adalora": 2e-3,
    "ia3": 5e-3,
    "layernorm": 2e-3,
    "prefix_tuning": 1e-2,
    "prompt_tuning": 3e-2,
    "p_tuning": 3e-3,
    "vera": 1e-2,
    "fourierft": 1e-2,
    "hra": 2e-3,
    "oft": 2e-3,
    "boft": 5e-3,
}


def one(method: str, project: Path, steps: int, answers: int, threads: int | None) -> dict[str, Any]:
    """Train and measure one method in this process."""
    from datasets import Dataset

    from dagster_project.core import params
    from dagster_project.core.params import Compute
    from dagster_project.core.records import read_records, read_table, response_text
    from dagster_project.evaluation.evaluator import Settings, with_task_answers
    from dagster_project.evaluation.metrics import measures, score
    from dagster_project.training.inference.generate import generate_ids
    from dagster_project.training.methods import feature_extraction
    from dagster_project.training.methods.build import build
    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.methods.load import load
    from dagster_project.training.methods.options import quantization_of, why_not_merged
    from dagster_project.training.trainers.harness.params import SftParams
    from dagster_project.training.trainers.sft.sft import train

    values = params.read(project)
    settings = params.parse(Settings, values.get("evaluation"), "evaluation")
    compute = params.parse(Compute, values.get("compute"), "compute")
    compute = compute.model_copy(update={"threads": threads or compute.threads})
    device, dtype = prepare(compute)
    from transformers import AutoTokenizer

    base_model = project / "data" / "base_model"
    tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    records = {split: read_records(project / "data" / "splits" / split) for split in ("train", "validation", "test")}
    category = {record["example_id"]: record["category"] for split in records.values() for record in split}
    rows = {split: read_table(project / "data" / "tokenized" / f"{split}.parquet") for split in ("train", "validation")}
    for row in [row for split in rows.values() for row in split]:
        row["categories"] = [category.get(name) for name in row["example_ids"]]
    known = [name for row in rows["train"] for name in row["categories"] if name]
    merge = not why_not_merged(method, {}, quantization_of(method, None))
    tunable = build(
        method, {}, base_model, device, dtype, f"adapter.{method}", merge=merge, total_steps=steps, categories=known
    )
    tokens = sum(map(sum, (row["lengths"] for row in rows["train"])))
    recipe = SftParams(learning_rate=RATES.get(method, 1e-3), num_train_epochs=1, max_steps=steps)
    clock = time.process_time if compute.threads == 1 and device.type == "cpu" else time.perf_counter
    start = clock()
    if tunable.fit is None:
        columns = ("input_ids", "labels", "weights", "lengths")
        data = Dataset.from_list([{name: row[name] for name in columns} for row in rows["train"]])
        train(tunable, tokenizer, data, None, recipe, compute)
        tokens = round(tokens / len(rows["train"]) * steps)
        seconds = clock() - start
        loss = validation_loss(tunable, rows["validation"])
    else:
        curve = tunable.fit(rows["train"], rows["validation"])
        seconds = clock() - start
        loss = curve[-1]["validation_loss"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    asked = with_task_answers(records["test"], settings.task)[:answers]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tunable.save(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        prompts = [record["messages"][:-1] for record in asked]
        if feature_extraction.is_head(folder):
            said = feature_extraction.load(folder, base_model, device, dtype).predict(prompts)
        else:
            from dagster_project.core.chat import encode_prompt

            ids = [encode_prompt(tokenizer, messages) for messages in prompts]
            model = load(folder, base_model, device, dtype)
            answers = generate_ids(model, tokenizer, ids, settings.max_new_tokens, settings.batch_size, method)
            said = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    references = [response_text(record["messages"]) for record in asked]
    scores = (
        score(measures(settings.task, {}, writes=tunable.fit is None), references, said)
        if settings.task and asked
        else {}
    )
    return {
        "method": method,
        "trainable_percent": 100 * tunable.trainable / tunable.total,
        "stored_mb": size / 1e6,
        "peak_gb": peak,
        "tokens_per_second": tokens / seconds,
        "validation_loss": loss,
        "macro_f1": scores.get("macro_f1"),
        "asked": len(asked),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": compute.threads,
        "rate": None if tunable.fit else recipe.learning_rate,
    }


def validation_loss(tunable: Any, rows: list[dict[str, Any]]) -> float:
    """The plain mean cross entropy per answer token."""
    import torch
    from torch.nn.functional import cross_entropy

    from dagster_project.core.chat import IGNORE

    causal = tunable.model.get_base_model() if hasattr(tunable.model, "get_base_model") else tunable.model
    tunable.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = collate_packed([row], SIZES) if tunable.packs else collate_padded([row])
            batch = {
                name: value.to(causal.device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            labels = batch["labels"][:, 1:]
            counted = labels != IGNORE
            logits = causal.get_output_embeddings()(tunable.hidden_states(batch)[:, :-1][counted]).float()
            total += float(cross_entropy(logits, labels[counted], reduction="sum"))
            count += int(counted.sum())
    return total / max(1, count)


def table(found: list[dict[str, Any]], steps: int) -> str:
    lines = [
        (
            f"{steps} steps of the project's own rows on a {found[0]['device']}, {found[0]['dtype']};"
            f" {found[0]['threads']} thread(s); macro-F1 of {found[0]['asked']} test examples."
        ),
        "feature_extraction has no such steps; its loss is that of the category, not of tokens.",
        "",
        "| method | trainable % | stored MB | peak GiB | tokens/s | learning rate | validation loss | macro-F1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        if "error" in row:
            lines.append(f"| {row['method']} | failed: {row['error']} | | | | | | |")
            continue
        f1 = "" if row["macro_f1"] is None else f"{row['macro_f1']:.3f}"
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        lines.append(
            f"| {row['method']} | {row['trainable_percent']:.3f} | {row['stored_mb']:.2f} | {row['peak_gb']:.2f} |"
            f" {row['tokens_per_second']:.0f} | {rate} | {row['validation_loss']:.3f} | {f1} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=ORDER)
    parser.add_argument(
        "--steps", type=int, default=120, help="optimizer steps of a packed row each (default: %(default)s)"
    )
    parser.add_argument("--answers", type=int, default=120, help="test examples to be answered (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="instead of compute.threads; 1 on a busy machine")
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "methods.md")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.methods[0], given.project, given.steps, given.answers, given.threads)))
        return
    found = []
    for method in given.methods:
        command = [
            sys.executable,
            __file__,
            method,
            "--one",
            "--steps",
            str(given.steps),
            "--answers",
            str(given.answers),
            "--project",
            str(given.project),
        ]
        command += ["--threads", str(given.threads)] if given.threads else []
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        found.append(
            json.loads(last) if done.returncode == 0 else {"method": method, "error": f"exit {done.returncode}"}
        )
        print(found[-1], flush=True)
    measured = [row for row in found if "error" not in row]
    if not measured:
        raise SystemExit("no method could be measured; see the messages above")
    found.sort(key=lambda row: "error" in row)
    replace(given.out, "methods", table(found, given.steps))


if __name__ == "__main__":
    main()
