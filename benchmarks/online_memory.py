"""Compare predicted and measured peak memory of RLOO, GRPO and Online DPO. usage: python benchmarks/online_memory.py
[METHOD...] [--project FOLDER] [--out FILE]

Each method takes two steps of 8 answers of at most 48 tokens to prompts of data/preferences, with the code of
`aligned@X`, data/base_model in bfloat16 and one thread, each in its own process; no reward model is loaded. Measured is
the maximum resident size of the process, with imports and loading; predicted is what `pedigree plan` would say of it,
for answers of the longest length. Before this script, a pass was predicted as a batch of padded texts: `padded`. Memory
figures are valid on a busy machine. With --out the table replaces the one in docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from children import output_of, result_of  # noqa: E402
from online import LENGTH, LORA, RATE, distinct, prompts_of  # noqa: E402
from tables import machine, show  # noqa: E402

STEPS, ANSWERS = 2, 8
METHODS = ("rloo", "grpo", "online_dpo")


def settings(method: str) -> tuple[Any, Any]:
    """The method with its options, and the parameters of its entry."""
    from dagster_project.training.trainers.alignment import preference
    from dagster_project.training.trainers.harness.params import PreferenceParams

    params = PreferenceParams(
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_ratio=0,
        per_device_train_batch_size=ANSWERS,
        max_steps=STEPS,
    )
    return preference.METHODS[method](max_completion_length=LENGTH), params


def prompts_for(method: Any, project: Path) -> list[list[int]]:
    return prompts_of(project, STEPS * ANSWERS // method.num_generations)


def measure(name: str, project: Path) -> dict[str, Any]:
    """Train in this process: its maximum resident size, and the mean length of an answer."""
    from transformers import AutoTokenizer

    from dagster_project.core.params import Compute
    from dagster_project.training.methods.hardware import prepare, reuse_large_blocks
    from dagster_project.training.trainers.alignment import preference
    from dagster_project.training.trainers.alignment.sampled_answers import SampledAnswers
    from dagster_project.training.trainers.alignment.trl_trainers import training
    from dagster_project.training.trainers.harness.sharding import ShardedModel

    class Rewarded:
        """The part of an AlignmentRun that these methods read."""

        lengths: list[int] = []
        sampled = SampledAnswers()

        def reward(self, rows: Any, texts: Any, ids: Any) -> list[float]:
            self.lengths.extend(map(len, ids))
            return [distinct(text.strip()) for text in texts]

    compute, base, run = Compute(seed=1, threads=1, dtype="bfloat16"), project / "data" / "base_model", Rewarded()
    device, dtype = prepare(compute)
    reuse_large_blocks()
    method, params = settings(name)
    rows = [{"prompt": ids, "pair": number} for number, ids in enumerate(prompts_for(method, project))]
    model = preference.policy(base, LORA, device, dtype, "benchmark", "lora").model
    tokenizer = AutoTokenizer.from_pretrained(base)
    training.train(method.trainer_spec(run), ShardedModel(model, None, device), tokenizer, rows, [], params, compute)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return {"method": name, "peak": peak, "answers": len(run.lengths), "length": sum(run.lengths) / len(run.lengths)}


def predict(name: str, project: Path, runtime: int) -> dict[str, int]:
    """Bytes that are predicted for this training, and those that were predicted for padded texts."""
    import torch

    from dagster_project.training.planning.answer_groups import answer_pass
    from dagster_project.training.planning.memory import TrainingSpec

    method, params = settings(name)
    lengths = [len(prompt) for prompt in prompts_for(method, project)]
    largest = answer_pass(method, params, lengths, STEPS)
    padded = TrainingSpec(
        "cpu",
        torch.bfloat16,
        project / "data" / "base_model",
        "lora",
        LORA,
        [max(lengths) + LENGTH] * ANSWERS,
        ANSWERS * LENGTH,
        runtime=runtime,
        timed=False,
    )
    spec = changed(padded, lengths=[largest.tokens], counted=largest.answer_tokens, answers=largest)
    return {"predicted": spec.needed, "padded": padded.needed}


def table(measured: list[dict[str, Any]]) -> str:
    lines = [
        (
            f"Peak memory in MB of {STEPS} steps of {ANSWERS} answers of at most {LENGTH} tokens, bfloat16, one thread,"
            f" {machine()}."
        ),
        "",
        "| method | tokens of an answer | measured | predicted | error | predicted for padded texts | its error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in measured:
        sizes = [f"{one['predicted'] / 1e6:,.0f}", f"{100 * (one['predicted'] / one['peak'] - 1):+.1f} %"]
        sizes += [f"{one['padded'] / 1e6:,.0f}", f"{100 * (one['padded'] / one['peak'] - 1):+.1f} %"]
        lines.append(f"| {one['method']} | {one['length']:.0f} | {one['peak'] / 1e6:,.0f} | {' | '.join(sizes)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--project", type=Path, default=ROOT, help="with data/base_model and data/preferences")
    parser.add_argument("--out", type=Path, help="put the table between the markers of this Markdown file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.child, given.project)))
        return
    if unknown := [name for name in given.methods if name not in METHODS]:
        parser.error(f"{', '.join(unknown)}: name some of {', '.join(METHODS)}")
    measured = []
    for name in (
        given.methods or METHODS
    ):  # all measurements first: the maximum resident size of a process starts with that of its parent
        print(f"training {name}", file=sys.stderr, flush=True)
        measured.append(result_of(__file__, "--project", str(given.project.resolve()), "--child", name))
        print(json.dumps(measured[-1]), file=sys.stderr, flush=True)
    runtime = int(output_of("-c", "from dagster_project.training.planning.memory import resident; print(resident())"))
    shown = table([{**one, **predict(one["method"], given.project, runtime)} for one in measured])
    show(given.out, "online_memory", shown)


if __name__ == "__main__":
    main()
