"""Compare DPO and reward-model training by plain TRL and by the pipeline. usage: python benchmarks/preference.py
[--task dpo reward] [--setup NAME ...] [--seeds N] [--steps N] [--out FILE]

Same model (data/base_model), same pairs (data/preferences), same LoRA, rate, schedule, pairs per step and number of
steps; each run in its own process with one thread, the setups in turns. The setups differ in:

    trl             TRL's defaults: float32, padded batches, gradient checkpointing
    trl_...         its settings that could be faster: no checkpointing,
    bfloat16, the reference computed in advance; the fastest of those
                    measured is TRL's best (TRL 1.16 has no padding-free DPO)
    ours            training/trainers/alignment/trl_trainers as `aligned@X` and `reward_model` call it
    ours_float32    the same in float32

CPU seconds are user and system time of the process while the trainer is constructed and
trains, without imports and loading the model: they are comparable on a busy machine. Peak
memory is the maximum resident size of the process. The loss is that of held-out pairs after
the last step, two plain forward passes in float32 for each answer, by the same code for all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from children import result_of  # noqa: E402
from tables import show  # noqa: E402

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
SHARED = {"lr_scheduler_type": "cosine", "optim": "adamw_torch_fused", "per_device_train_batch_size": 8}
RATES = {"dpo": 2.5e-4, "reward": 3e-4}
BETA = 0.1
HELD_OUT = 8

FASTER = {"dtype": "bfloat16", "gradient_checkpointing": False}
SETUPS: dict[str, dict[str, dict[str, Any]]] = {
    "dpo": {
        "trl": {},
        "trl_bfloat16": FASTER,
        "trl_reference_first": {**FASTER, "precompute_ref_log_probs": True},
        "ours": {},
        "ours_float32": {"dtype": "float32"},
    },
    "reward": {"trl": {}, "trl_bfloat16": FASTER, "ours": {}, "ours_float32": {"dtype": "float32"}},
}
"""Task -> name -> settings of TRL's configuration, or `dtype` of `compute`."""

Pair = tuple[list[int], list[int], list[int]]
"""Ids of the prompt, the chosen and the rejected answer."""


def pairs_of(split: str, limit: int) -> list[Pair]:
    from transformers import AutoTokenizer

    from dagster_project.core.records import read_preferences
    from dagster_project.training.tokens.preference_pairs import both

    rows = read_preferences(ROOT / "data" / "preferences" / split)[:limit]
    return both(AutoTokenizer.from_pretrained(ROOT / "data" / "base_model"), rows)


def rows_of(task: str, pairs: list[Pair]) -> list[dict[str, Any]]:
    """Rows in the format of TRL's trainers."""
    if task == "dpo":
        return [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected} for prompt, chosen, rejected in pairs
        ]
    return [{"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected} for prompt, chosen, rejected in pairs]


def train_trl(task: str, name: str, pairs: list[Pair], seed: int) -> tuple[Any, float]:
    """A trained model, and the CPU seconds that it took."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    settings = dict(SETUPS[task][name])
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "base_model")
    torch.manual_seed(seed)
    if task == "dpo":
        trainer_class, config, lora = trl.DPOTrainer, trl.DPOConfig, LoraConfig(task_type="CAUSAL_LM", **LORA)
        model = AutoModelForCausalLM.from_pretrained(ROOT / "data" / "base_model", dtype=dtype)
        settings["beta"] = BETA
    else:
        trainer_class, config = trl.RewardTrainer, trl.RewardConfig
        lora = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA)
        model = AutoModelForSequenceClassification.from_pretrained(
            ROOT / "data" / "base_model", dtype=dtype, num_labels=1
        )
        model.config.pad_token_id = tokenizer.pad_token_id

    class Tokenized(trainer_class):
        """TRL's trainer on rows that are tokenized already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    with tempfile.TemporaryDirectory() as scratch:
        began = time.process_time()
        trainer = Tokenized(
            model=model,
            args=config(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                seed=seed,
                num_train_epochs=1,
                warmup_steps=0.1,
                max_length=None,
                learning_rate=RATES[task],
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=1,
                **SHARED,
                **settings,
            ),
            train_dataset=Dataset.from_list(rows_of(task, pairs)),
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.train()
        return trainer.model, time.process_time() - began


def train_ours(task: str, name: str, pairs: list[Pair], seed: int) -> tuple[Any, float]:
    import torch
    from transformers import AutoTokenizer

    from dagster_project.core.params import Compute
    from dagster_project.training.methods.hardware import prepare, reuse_large_blocks
    from dagster_project.training.trainers.alignment import preference, reward_model
    from dagster_project.training.trainers.alignment.trl_trainers import training
    from dagster_project.training.trainers.harness.params import PreferenceParams
    from dagster_project.training.trainers.harness.sharding import ShardedModel

    compute = Compute(seed=seed, threads=1, dtype=SETUPS[task][name].get("dtype", "bfloat16"))
    device, dtype = prepare(compute)
    reuse_large_blocks()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "base_model")
    params = PreferenceParams(learning_rate=RATES[task], **SHARED)
    torch.manual_seed(seed)
    if task == "dpo":
        spec = preference.Dpo(beta=BETA).trainer_spec(None)
        model = preference.policy(ROOT / "data" / "base_model", LORA, device, dtype, "benchmark", "lora").model
    else:
        spec = reward_model.trainer_spec(None)
        model = reward_model.build(ROOT / "data" / "base_model", LORA, device, dtype, "benchmark")
    began = time.process_time()
    rows = [{**row, "pair": number} for number, row in enumerate(rows_of(task, pairs))]
    training.train(spec, ShardedModel(model, None, device), tokenizer, rows, [], params, compute)
    return model, time.process_time() - began


def held_out_loss(task: str, model: Any, pairs: list[Pair]) -> float:
    """Mean loss of pairs: plain passes over one answer at a time, in float32."""
    import torch

    model = model.eval().float()

    def score(prompt: list[int], answer: list[int]) -> float:
        ids = torch.tensor([prompt + answer])
        output = model(input_ids=ids, use_cache=False).logits
        if task == "reward":
            return float(output[0, 0])
        log_probabilities = output[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return float(log_probabilities[len(prompt) - 1 :].sum())

    with torch.inference_mode():
        difference = torch.tensor(
            [score(prompt, chosen) - score(prompt, rejected) for prompt, chosen, rejected in pairs]
        )
        if task == "dpo":
            with model.disable_adapter():
                difference -= torch.tensor(
                    [score(prompt, chosen) - score(prompt, rejected) for prompt, chosen, rejected in pairs]
                )
            difference *= BETA
    return float(-torch.nn.functional.logsigmoid(difference).mean())


def one(task: str, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train once, in this process."""
    import torch

    from dagster_project.training.methods.hardware import peak_memory

    torch.set_num_threads(1)
    pairs, held = pairs_of("train", steps * SHARED["per_device_train_batch_size"]), pairs_of("validation", HELD_OUT)
    model, seconds = (train_ours if name.startswith("ours") else train_trl)(task, name, pairs, seed)
    peak = peak_memory("cpu")
    tokens = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs)
    return {
        "task": task,
        "setup": name,
        "seed": seed,
        "pairs": len(pairs),
        "tokens": tokens,
        "cpu_seconds": seconds,
        "peak_bytes": peak,
        "loss": held_out_loss(task, model, held),
    }


def report(found: list[dict[str, Any]]) -> str:
    """The table and the ratios, for each task."""
    lines: list[str] = []
    for task in dict.fromkeys(run["task"] for run in found):
        runs = [run for run in found if run["task"] == task]
        by_setup = {
            name: [run for run in runs if run["setup"] == name] for name in dict.fromkeys(run["setup"] for run in runs)
        }
        seconds = {name: statistics.median(run["cpu_seconds"] for run in mine) for name, mine in by_setup.items()}
        steps = math.ceil(runs[0]["pairs"] / SHARED["per_device_train_batch_size"])
        lines += [
            (
                f"{task}: {runs[0]['pairs']} pairs, {runs[0]['tokens']:,} tokens in {steps} steps, one thread; medians"
                f" over {len(next(iter(by_setup.values())))} seeds, the loss in brackets with minimum and maximum."
            ),
            "",
            "| setup | CPU seconds | peak memory, GB | loss of held-out pairs |",
            "| --- | --- | --- | --- |",
        ]
        for name, mine in by_setup.items():
            losses = [run["loss"] for run in mine]
            peak = statistics.median(run["peak_bytes"] for run in mine) / 1e9
            lines.append(
                f"| {name} | {seconds[name]:.1f} | {peak:.2f} | {statistics.median(losses):.4f} ({min(losses):.4f} to"
                f" {max(losses):.4f}) |"
            )
        theirs = {name: value for name, value in seconds.items() if name.startswith("trl")}
        if theirs and "ours" in seconds:
            best = min(theirs, key=lambda name: theirs[name])
            defaults = f"{theirs['trl'] / seconds['ours']:.1f} x TRL's defaults and " if "trl" in theirs else ""
            lines += [
                "",
                (
                    f"Ours is {defaults}{theirs[best] / seconds['ours']:.1f} x `{best}`, the fastest of TRL's setups"
                    " measured here."
                ),
                "",
            ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(SETUPS), default=list(SETUPS), help="default: both")
    parser.add_argument("--setup", nargs="+", help="default: all of the task")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="put the table between the markers of this Markdown file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        task, name, seed = given.one.split(",")
        print(json.dumps(one(task, name, int(seed), given.steps)))
        return
    found = []
    for task in given.task:
        for seed in range(
            1, given.seeds + 1
        ):  # setups in turns, so that a busy moment of the machine does not affect only one
            for name in SETUPS[task]:
                if not given.setup or name in given.setup:
                    found.append(result_of(__file__, "--one", f"{task},{name},{seed}", "--steps", str(given.steps)))
                    print(found[-1], file=sys.stderr, flush=True)
    table = report(found)
    show(given.out, "preference", table)


if __name__ == "__main__":
    main()
