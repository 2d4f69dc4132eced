"""Compare LoRA on short examples by plain TRL and by the pipeline's trainer. usage: python benchmarks/training.py
[--setup NAME ...] [--seeds N] [--examples N] [--out FILE]

Same model (data/base_model), same examples and labels (data/tokenized, unpacked), same LoRA (r 16, alpha 32, dropout
0.05, all linear layers), same optimizer, rate, schedule and number of steps, about 8 examples per optimizer step; each
run in its own process. The setups differ in:

    trl             TRL's defaults: float32 as TRL loads a model, 8 examples padded to the longest, gradient
    checkpointing trl_...         its settings that could be faster: no checkpointing, bfloat16, packing, no padding,
    compiled; the fastest of those measured is TRL's best ours            training/trainers/sft/sft.py as `adapter@X`
    calls it ours_float32    the same in float32, to show the effect of bfloat16 ours_compiled   the same with `compile:
    layers`, warm: steps that compile are left out

Tokens per second exclude padding and the first few steps; median over seeds. The validation loss is the plain mean per
trained token over examples that were not trained on, computed by the same code for all, in float32. The share of the
peak is the rate of LoRA's required matrix products (forward, and backward to the activations; the output layer only for
labels), divided by the best rate of a large matrix product of the same dtype on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from children import result_of  # noqa: E402
from tables import show  # noqa: E402

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
SHARED = {"learning_rate": 5e-4, "lr_scheduler_type": "cosine", "optim": "adamw_torch_fused"}
BATCH = 8
"""Examples per optimizer step, TRL's default."""

PLAIN = {"packing": True, "max_length": "row", "per_device_train_batch_size": 1, "gradient_checkpointing": False}
TRL: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl_packed": {"dtype": "bfloat16", **PLAIN},
    "trl_packed_float32": {**PLAIN},
    "trl_unpacked": {"dtype": "bfloat16", "gradient_checkpointing": False},
    "trl_padding_free": {
        "dtype": "bfloat16",
        "padding_free": True,
        "max_length": None,
        "gradient_checkpointing": False,
    },
    "trl_packed_compiled": {"dtype": "bfloat16", "torch_compile": True, **PLAIN},
}
"""Name -> settings of TRL's SFTConfig; `dtype`: of the model."""
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours_float32": {"dtype": "float32"},
    "ours_compiled": {"compile": "layers"},
}
"""Name -> keys of the adapter's entry; `dtype`: of `compute`."""


def examples(limit: int) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """(to train on, to validate with): input_ids and labels of each example;
    the first `limit` of the training split, and at most 100 that are left."""
    from dagster_project.core.records import read_table

    found = []
    for row in read_table(ROOT / "data" / "tokenized" / "train.parquet", ["lengths", "input_ids", "labels"]):
        for start, stop in pairwise([0, *accumulate(row["lengths"])]):
            found.append({"input_ids": list(row["input_ids"][start:stop]), "labels": list(row["labels"][start:stop])})
    return found[:limit], found[limit:][-100:]


def room(found: list[dict[str, list[int]]]) -> int:
    """Tokens of a packed row such that there are no more rows than padded batches: packed and padded runs take the same
    number of steps."""
    from dagster_project.core.chat import pack

    lengths = [len(example["input_ids"]) for example in found]
    batches = -(-len(found) // BATCH)
    return next(
        size for size in count(max(max(lengths), sum(lengths) // batches)) if len(pack(lengths, size)) <= batches
    )


def train_trl(name: str, found: list[dict[str, list[int]]], seed: int, epochs: int, stamps: list[float]) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = dict(TRL[name])
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    if settings.get("max_length") == "row":
        settings["max_length"] = room(found)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "base_model")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(ROOT / "data" / "base_model", dtype=dtype),
            args=SFTConfig(
                output_dir=scratch,
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available() and dtype == torch.float32,
                seed=seed,
                num_train_epochs=epochs,
                warmup_steps=0.1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=1000,
                **SHARED,
                **settings,
            ),
            train_dataset=Dataset.from_list(found),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
            callbacks=[stamping(stamps)],
        )
        trainer.train()
    return trainer.model


def train_ours(name: str, found: list[dict[str, list[int]]], seed: int, epochs: int, stamps: list[float]) -> Any:
    from dataclasses import replace

    from datasets import Dataset
    from transformers import AutoTokenizer

    from dagster_project.core.chat import pack
    from dagster_project.core.params import Compute
    from dagster_project.training.methods.build import build
    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.trainers.harness.params import SftParams
    from dagster_project.training.trainers.sft.sft import train

    settings = dict(OURS[name])
    compute = Compute(seed=seed, threads=int(os.environ["OMP_NUM_THREADS"]), dtype=settings.pop("dtype", "auto"))
    device, dtype = prepare(compute)
    rows = []
    for row in pack([len(example["input_ids"]) for example in found], room(found)):
        parts = [found[i] for i in row]
        labels = [label for part in parts for label in part["labels"]]
        ids = [token for part in parts for token in part["input_ids"]]
        rows.append(
            {
                "input_ids": ids,
                "labels": labels,
                "weights": [1.0] * len(ids),
                "lengths": [len(p["input_ids"]) for p in parts],
            }
        )
    tunable = build("lora", LORA, ROOT / "data" / "base_model", device, dtype, "benchmark")
    tunable = replace(tunable, callbacks=[*tunable.callbacks, stamping(stamps)])
    recipe = SftParams(**SHARED, warmup_ratio=0.1, num_train_epochs=epochs, **settings)
    train(
        tunable,
        AutoTokenizer.from_pretrained(ROOT / "data" / "base_model"),
        Dataset.from_list(rows),
        None,
        recipe,
        compute,
    )
    return tunable.model


def stamping(stamps: list[float]) -> Any:
    """A callback that records the time at the end of each optimizer step."""
    import torch
    from transformers import TrainerCallback

    class Stamp(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    return Stamp()


def validation_loss(model: Any, held: list[dict[str, list[int]]]) -> float:
    """Plain mean per trained token, one example at a time."""
    import torch
    from torch.nn.functional import cross_entropy

    model.eval()
    nats, counted = 0.0, 0
    with torch.inference_mode():
        for example in held:
            ids, labels = (torch.tensor([example[name]], device=model.device) for name in ("input_ids", "labels"))
            extra = {
                "cu_seq_lens_q": torch.tensor([0, ids.shape[1]], dtype=torch.int32, device=model.device),
                "max_length_q": ids.shape[1],
            }
            scores = model(
                input_ids=ids,
                position_ids=torch.arange(ids.shape[1], device=model.device)[None],
                use_cache=False,
                **extra,
            ).logits[0, :-1]
            nats += float(cross_entropy(scores.float(), labels[0, 1:], ignore_index=-100, reduction="sum"))
            counted += int((labels[0, 1:] != -100).sum())
    return nats / counted


def one(name: str, seed: int, limit: int, epochs: int, skip: int) -> dict[str, Any]:
    """Train once, in this process."""
    import torch

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    (found, held), stamps = examples(limit), []
    tokens = epochs * sum(len(example["input_ids"]) for example in found)
    model = (train_ours if name in OURS else train_trl)(name, found, seed, epochs, stamps)
    seconds, steps = stamps[-1] - stamps[skip - 1], len(stamps) - skip
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    config = model.config
    head = config.vocab_size * config.hidden_size
    layers = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n)
    counted = epochs * sum(label != -100 for example in found for label in example["labels"])
    return {
        "setup": name,
        "seed": seed,
        "steps": len(stamps),
        "tokens": tokens,
        "tokens_per_second": tokens * steps / len(stamps) / seconds,
        "flops_per_second": (4 * layers * tokens + 4 * head * counted) * steps / len(stamps) / seconds,
        "peak_bytes": peak,
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "validation_loss": validation_loss(model.float(), held),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def matmul_peak() -> dict[str, float]:
    """Operations per second of the fastest of a few large matrix products, by dtype."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype, device=device)
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / min(times)
    return found


def report(found: list[dict[str, Any]], peak: dict[str, float], threads: int) -> str:
    """The table and the ratios."""
    by_setup: dict[str, list[dict[str, Any]]] = {}
    for run in found:
        by_setup.setdefault(run["setup"], []).append(run)
    speed = {name: statistics.median(run["tokens_per_second"] for run in runs) for name, runs in by_setup.items()}
    first = found[0]
    lines = [
        (
            f"{first['tokens']:,} tokens in {first['steps']} steps; {first['device']}, {threads} threads; matrix"
            f" products reach at most {peak['float32'] / 1e9:,.0f} GFLOP/s in float32 and {peak['bfloat16'] / 1e9:,.0f}"
            " in bfloat16."
        ),
        "",
        "| setup | dtype | real tokens/s | share of peak | peak memory | validation loss by seed |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for name, runs in by_setup.items():
        share = statistics.median(run["flops_per_second"] for run in runs) / peak[runs[0]["dtype"]]
        memory = statistics.median(run["peak_bytes"] for run in runs) / 1e9
        losses = ", ".join(f"{run['validation_loss']:.3f}" for run in runs)
        lines.append(
            f"| `{name}` | {runs[0]['dtype']} | {speed[name]:,.0f} | {100 * share:.0f} % | {memory:.2f} GB | {losses} |"
        )
    best = max((name for name in speed if name in TRL and name != "trl"), key=speed.__getitem__, default=None)
    ratios = [
        f"{name} {speed[name] / speed[other]:.2f} x `{other}`"
        for name in OURS
        if name in speed
        for other in ("trl", best)
        if other in speed
    ]
    return "\n".join([*lines, "", "; ".join(ratios)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = ["trl", "trl_packed", "trl_padding_free", *OURS]
    parser.add_argument("--setup", nargs="+", choices=[*TRL, *OURS], default=usual, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--examples", type=int, default=160, help="of the training split (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--skip", type=int, default=6, help="first steps, which are not timed (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="put the table between the markers of this Markdown file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(json.dumps(matmul_peak()))
        return
    if given.one:
        name, seed = given.one.split(",")
        print(json.dumps(one(name, int(seed), given.examples, given.epochs, given.skip)))
        return
    size = ["--examples", str(given.examples), "--epochs", str(given.epochs), "--skip", str(given.skip)]
    variables = {"OMP_NUM_THREADS": str(given.threads), "TOKENIZERS_PARALLELISM": "false"}
    found = []
    for seed in range(
        1, given.seeds + 1
    ):  # setups in turns, so that a busy moment of the machine does not affect only one
        for name in given.setup:
            found.append(result_of(__file__, "--one", f"{name},{seed}", *size, variables=variables))
            print(found[-1], file=sys.stderr, flush=True)
    table = report(found, result_of(__file__, "--peak", variables=variables), given.threads)
    show(given.out, "training", table)


if __name__ == "__main__":
    main()
