"""Compare RLOO, GRPO and PPO by plain TRL and by the pipeline. usage: python benchmarks/online.py [--method rloo grpo
ppo] [--project FOLDER] [--seeds N] [--episodes N] [--trl-with-ppo PYTHON] [--out FILE]

Same model (data/base_model), same prompts (data/preferences), same LoRA, rate, answers per step, reward and maximum of
new tokens; each run in its own process with one thread, the setups in turns:

    trl     TRL's trainer in bfloat16 without gradient checkpointing. PPO needs
    a TRL that has it (up to 1.12) in an environment of its
            own, whose interpreter is PYTHON: `python -m venv FOLDER` and `FOLDER/bin/pip install trl==1.12.0 peft`; its
            value model, which ours does not have, gets the same LoRA
    ours    the code of `aligned@X`

RLOO and GRPO: 4 answers to each of 2 prompts a step; the reward is the rule `distinct`.
PPO: 32 answers an iteration, two passes over them in passes of 8 and steps of 16; the
reward is that of a reward model (the base model with a random output layer).

CPU seconds are user and system time of the process while the trainer is
constructed and trains, without imports and loading models,
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from children import ONE_THREAD, result_of  # noqa: E402
from tables import machine, show  # noqa: E402

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
LENGTH, BETA, RATE = 48, 0.05, 2e-4
GROUP = {"num_generations": 4, "max_completion_length": LENGTH, "temperature": 1.0, "beta": BETA, "epsilon": 0.2}
ANSWERS_PER_STEP = 8
SILENT = {**ONE_THREAD, "TRL_EXPERIMENTAL_SILENCE": "1"}
ITERATION, PASS = 32, 8
"""Answers of an iteration of PPO, and of a forward pass."""
COUNTED = 256
"""Answers that the seconds of a table are for."""


def prompts_of(project: Path, limit: int) -> list[list[int]]:
    """Token ids of prompts of the training pairs."""
    from transformers import AutoTokenizer

    from dagster_project.core.records import read_preferences
    from dagster_project.training.tokens.preference_pairs import prompt_ids

    tokenizer = AutoTokenizer.from_pretrained(project / "data" / "base_model")
    return [
        prompt_ids(tokenizer, pair) for pair in read_preferences(project / "data" / "preferences" / "train")[:limit]
    ]


def distinct(answer: str) -> float:
    """The rule of the pipeline, for an environment without it."""
    words = answer.split()
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(set(runs)) / len(runs) if runs else 1.0


def judge_of(model: Path, folder: Path) -> Path:
    """Write a reward model with a random output layer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.bfloat16)
    judge.config.pad_token_id = AutoTokenizer.from_pretrained(model).pad_token_id
    judge.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def group_by_trl(method: str, model_folder: Path, prompts: list[list[int]], seed: int) -> tuple[float, float]:
    """CPU seconds, and the mean length of an answer."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, config = {"rloo": (trl.RLOOTrainer, trl.RLOOConfig), "grpo": (trl.GRPOTrainer, trl.GRPOConfig)}[method]
    lengths: list[int] = []

    class Tokenized(base):  # type: ignore[misc, valid-type]
        """TRL's trainer on prompts that are tokenized already."""

        def _tokenize_prompts(self, rows: Any) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [list(ids) for ids in rows], None, {}

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [distinct(answer.strip()) for answer in completions]

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.process_time()
        trainer = Tokenized(
            model=model,
            reward_funcs=reward,
            args=config(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                seed=seed,
                learning_rate=RATE,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=1,
                gradient_checkpointing=False,
                per_device_train_batch_size=ANSWERS_PER_STEP,
                max_steps=len(prompts) * GROUP["num_generations"] // ANSWERS_PER_STEP,
                **GROUP,
            ),
            train_dataset=Dataset.from_list([{"prompt": ids} for ids in prompts]),
            processing_class=AutoTokenizer.from_pretrained(model_folder),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        )
        trainer.train()
        return time.process_time() - began, statistics.mean(lengths)


def group_by_us(method: str, model_folder: Path, prompts: list[list[int]], seed: int) -> tuple[float, float]:
    from transformers import AutoTokenizer

    from dagster_project.core.params import Compute
    from dagster_project.training.methods.hardware import prepare, reuse_large_blocks
    from dagster_project.training.trainers.alignment import preference
    from dagster_project.training.trainers.alignment.sampled_answers import SampledAnswers
    from dagster_project.training.trainers.alignment.trl_trainers import training
    from dagster_project.training.trainers.harness.params import PreferenceParams
    from dagster_project.training.trainers.harness.sharding import ShardedModel

    class Rewarded:
        """The part of an AlignmentRun that these methods read."""

        lengths: list[int] = []
        sampled = SampledAnswers()

        def reward(self, rows: Sequence[int], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[float]:
            self.lengths.extend(map(len, ids))
            return [distinct(text.strip()) for text in texts]

    compute = Compute(seed=seed, threads=1, dtype="bfloat16")
    device, dtype = prepare(compute)
    reuse_large_blocks()
    run = Rewarded()
    spec = preference.METHODS[method](**GROUP).trainer_spec(run)  # type: ignore[attr-defined]
    model = preference.policy(model_folder, LORA, device, dtype, "benchmark", "lora").model
    params = PreferenceParams(
        learning_rate=RATE, lr_scheduler_type="linear", warmup_ratio=0, per_device_train_batch_size=ANSWERS_PER_STEP,
        max_steps=len(prompts) * GROUP["num_generations"] // ANSWERS_PER_STEP,
    )  # fmt: skip
    began = time.process_time()
    rows = [{"prompt": ids, "pair": i} for i, ids in enumerate(prompts)]
    training.train(
        spec, ShardedModel(model, None, device), AutoTokenizer.from_pretrained(model_folder), rows, [], params, compute
    )
    return time.process_time() - began, statistics.mean(run.lengths)


def ppo_by_trl(model_folder: Path, judge: Path, prompts: list[list[int]], seed: int) -> tuple[float, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    torch.manual_seed(seed)
    policy = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    scores, values = (
        AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1, dtype=torch.bfloat16) for _ in range(2)
    )
    values = inject_adapter_in_model(LoraConfig(task_type="SEQ_CLS", **LORA), values)
    values.score.weight.requires_grad_(True)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.process_time()
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                seed=seed,
                learning_rate=RATE,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=False,
                total_episodes=len(prompts),
                per_device_train_batch_size=PASS,
                gradient_accumulation_steps=ITERATION // PASS,
                num_mini_batches=2,
                local_rollout_forward_batch_size=ITERATION,
                num_ppo_epochs=2,
                response_length=LENGTH,
                stop_token="eos",
                kl_coef=BETA,
                num_sample_generations=0,
            ),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=scores,
            value_model=values,
            train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        )
        trainer.train()
        return time.process_time() - began, LENGTH


def ppo_by_us(model_folder: Path, judge: Path, prompts: list[list[int]], seed: int) -> tuple[float, float]:
    from transformers import AutoTokenizer

    from dagster_project.core.params import Compute
    from dagster_project.training.methods.hardware import prepare, reuse_large_blocks
    from dagster_project.training.trainers.alignment import ppo, preference
    from dagster_project.training.trainers.alignment.reward_model import RewardModel
    from dagster_project.training.trainers.harness.sharding import ShardedModel

    compute = Compute(seed=seed, threads=1, dtype="bfloat16")
    device, dtype = prepare(compute)
    reuse_large_blocks()
    scores = RewardModel(judge, device, dtype)
    lengths: list[int] = []

    def reward(rows: Sequence[int], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[float]:
        lengths.extend(map(len, ids))
        return scores._score([(prompts[row], list(answer)) for row, answer in zip(rows, ids, strict=True)])

    settings = ppo.Settings(
        total_episodes=len(prompts),
        batch_size=ITERATION,
        rollout_batch_size=ITERATION,
        mini_batch_size=PASS,
        gradient_accumulation_steps=2,
        num_ppo_epochs=2,
        response_length=LENGTH,
        kl_coef=BETA,
        learning_rate=RATE,
        max_kl=None,
    )
    model = preference.policy(model_folder, LORA, device, dtype, "benchmark", "lora").model
    whole, began = ShardedModel(model, None, device), time.process_time()
    ppo.train(whole, AutoTokenizer.from_pretrained(model_folder), prompts, reward, settings, compute)
    return time.process_time() - began, statistics.mean(lengths)


def one(method: str, setup: str, given: dict[str, Any]) -> dict[str, Any]:
    """Train once, in this process."""
    import torch

    torch.set_num_threads(1)
    model, prompts, seed = Path(given["model"]), given["prompts"], given["seed"]
    if method == "ppo":
        seconds, length = (ppo_by_trl if setup == "trl" else ppo_by_us)(model, Path(given["judge"]), prompts, seed)
        answers = len(prompts)
    else:
        seconds, length = (group_by_trl if setup == "trl" else group_by_us)(method, model, prompts, seed)
        answers = len(prompts) * GROUP["num_generations"]
    return {
        "method": method,
        "setup": setup,
        "seed": seed,
        "answers": answers,
        "cpu_seconds": seconds / answers * COUNTED,
        "length": length,
    }


def report(found: list[dict[str, Any]]) -> str:
    lines = [
        (
            f"CPU seconds for {COUNTED} answers of at most {LENGTH} tokens, bfloat16, one thread, {machine()}; medians"
            " over the seeds, in brackets minimum and maximum."
        ),
        "",
        "| method | answers in a run | seeds | TRL | ours | ratio | tokens of an answer, TRL and ours |",
        "| --- | ---: | ---: | --- | --- | ---: | --- |",
    ]
    for method in dict.fromkeys(run["method"] for run in found):
        cells, middle, lengths = [], {}, []
        for setup in ("trl", "ours"):
            mine = [run for run in found if (run["method"], run["setup"]) == (method, setup)]
            seconds = [run["cpu_seconds"] for run in mine]
            middle[setup] = statistics.median(seconds) if seconds else float("nan")
            cells.append(f"{middle[setup]:.0f} ({min(seconds):.0f} to {max(seconds):.0f})" if seconds else "")
            lengths.append(f"{statistics.mean(run['length'] for run in mine):.0f}" if mine else "")
        runs = [run for run in found if run["method"] == method]
        lines.append(
            f"| {method} | {runs[0]['answers']} | {len({run['seed'] for run in runs})} | {' | '.join(cells)} |"
            f" {middle['trl'] / middle['ours']:.1f} | {' and '.join(lengths)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--method", nargs="+", choices=["rloo", "grpo", "ppo"], default=["rloo", "grpo", "ppo"], help="default: all"
    )
    parser.add_argument("--setup", nargs="+", choices=["trl", "ours"], default=["trl", "ours"], help="default: both")
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--episodes",
        type=int,
        default=64,
        help="answers of a run, a multiple of 8, for PPO of 32 (default: %(default)s)",
    )
    parser.add_argument("--trl-with-ppo", help="interpreter of an environment with trl 1.12")
    parser.add_argument("--out", type=Path, help="put the table between the markers of this Markdown file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one, json.load(sys.stdin))))
        return
    model, found = options.project / "data" / "base_model", []
    with tempfile.TemporaryDirectory() as scratch:
        judge = judge_of(model, Path(scratch) / "judge") if "ppo" in options.method else Path()
        for method in options.method:
            asked = prompts_of(
                options.project,
                options.episodes if method == "ppo" else options.episodes // int(GROUP["num_generations"]),
            )
            if method == "ppo":
                asked = asked[: len(asked) // ITERATION * ITERATION]  # TRL would complete the last iteration
            for seed in range(
                1, options.seeds + 1
            ):  # setups in turns, so that a busy moment of the machine does not affect only one
                for setup in options.setup:
                    python = options.trl_with_ppo if (method, setup) == ("ppo", "trl") else sys.executable
                    if python:
                        given = {"model": str(model.resolve()), "judge": str(judge), "prompts": asked, "seed": seed}
                        found.append(
                            result_of(
                                __file__,
                                "--one",
                                method,
                                setup,
                                python=python,
                                variables=SILENT,
                                given=json.dumps(given),
                            )
                        )
                        print(found[-1], file=sys.stderr, flush=True)
    table = report(found)
    show(options.out, "online", table)


if __name__ == "__main__":
    main()
