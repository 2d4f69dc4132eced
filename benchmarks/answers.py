"""Compare answers with transformers' batched `generate`, and with themselves at other batch sizes. usage: python
benchmarks/answers.py [--project FOLDER] [--rows N] [--rounds N] [--threads N] [--system NAME ...] [--out FILE]

Same model (data/base_model), same prompts (of the test split: the question alone, with worked examples shared by all
prompts, with examples retrieved for each prompt; the same number as in the stage `baselines`), same maximum of new
tokens, all greedy, in one process, in batches of evaluation.batch_size:

    ours      training/inference/generate.py as the stages call it
    dynamic   transformers' `generate`: prompts sorted by length, padded on the left, with a DynamicCache
    static    the same with its StaticCache

CPU seconds are user and system time of the process: they are comparable on a busy machine. The setups take turns;
medians over rounds. Equal answers have the same token ids. The second table has the share of prompts with the same
answer in batches of 1 and of 16: all of them in float32; in bfloat16 the choice between two almost equally likely
tokens may differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tables import machine, show  # noqa: E402

SYSTEMS = ("zero_shot", "few_shot", "retrieved")
THEIRS = {"dynamic": None, "static": "static"}
"""Setup -> `cache_implementation` of transformers."""
FEW, MANY = 1, 16
"""Batch sizes whose answers are compared."""

Answers = list[list[int]]
"""Token ids, with the end of turn."""


def prompts(
    project: Path, tokenizer: Any, rows: int, longest: int, systems: tuple[str, ...]
) -> dict[str, list[list[int]]]:
    """System -> token ids of each of `rows` prompts, at most `longest`; the test split is repeated if it is shorter."""
    from dagster_project.core import params
    from dagster_project.core.chat import encode_prompt
    from dagster_project.core.records import read_records
    from dagster_project.evaluation.baselines import nearest, with_shots
    from dagster_project.evaluation.evaluator import with_prompt_and_response
    from dagster_project.stages.baselines import Params

    chosen = params.parse(Params, params.read(project).get("baselines"), "baselines")
    known, asked = (
        with_prompt_and_response(read_records(project / "data" / "splits" / split)) for split in ("train", "test")
    )
    asked = list(islice(cycle(asked), rows))
    shots = known[: chosen.few_shot]
    found = {
        "zero_shot": [with_shots("", [], record) for record in asked],
        "few_shot": [with_shots("", shots, record) for record in asked],
        "retrieved": [
            with_shots("", alike, record)
            for record, alike in zip(asked, nearest(known, asked, chosen.retrieved), strict=True)
        ],
    }
    return {name: [encode_prompt(tokenizer, messages)[-longest:] for messages in found[name]] for name in systems}


def batched(
    model: Any, tokenizer: Any, ids: list[list[int]], max_new_tokens: int, batch_size: int, cache: str | None
) -> Answers:
    """Answers by `generate` of transformers."""
    import torch

    answers: Answers = [[] for _ in ids]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        width = max(len(ids[i]) for i in some)
        padded = torch.tensor(
            [[tokenizer.pad_token_id] * (width - len(ids[i])) + ids[i] for i in some], device=model.device
        )
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in some], device=model.device)
        out = model.generate(
            padded, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, cache_implementation=cache,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for i, answer in zip(some, out[:, width:].tolist(), strict=True):
            ended = answer.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in answer else len(answer)
            answers[i] = answer[:ended]
    return answers


def timed(answer: Callable[[list[list[int]]], Answers], asked: list[list[int]]) -> tuple[Answers, float]:
    """Answers, and the CPU seconds that they took."""
    begin = time.process_time()
    answers = answer(asked)
    return answers, time.process_time() - begin


def equal(some: Answers, others: Answers) -> float:
    """Share of equal answers."""
    return sum(a == b for a, b in zip(some, others, strict=True)) / len(some)


def load(project: Path, threads: int | None, dtype: str | None = None) -> tuple[Any, Any, int, int]:
    """Model, tokenizer, batch size and threads as in the stages of a project;
    `dtype` instead of that of its parameters."""
    from dagster_project.core import params
    from dagster_project.core.params import Compute
    from dagster_project.evaluation.evaluator import EvaluatedModel, Settings

    values = params.read(project)
    settings = params.parse(
        Settings, {**values.get("evaluation", {}), **({"dtype": dtype} if dtype else {})}, "evaluation"
    )
    compute = params.parse(Compute, values.get("compute"), "compute")
    compute = compute.model_copy(update={"threads": threads or compute.threads})
    evaluated = EvaluatedModel(project / "data" / "base_model", compute, settings)
    return evaluated.model, evaluated.tokenizer, settings.batch_size, compute.threads


def measure(
    project: Path, rows: int, rounds: int, max_new_tokens: int, threads: int | None, systems: tuple[str, ...]
) -> list[str]:
    """The table of speeds."""
    from dagster_project.training.inference.generate import generate_ids

    model, tokenizer, batch_size, threads = load(project, threads)
    lines = [
        (
            f"{rows} prompts, at most {max_new_tokens} new tokens each, {str(model.dtype).removeprefix('torch.')},"
            f" batches of {batch_size}, {threads} thread(s), {machine()}; CPU seconds, medians over {rounds} round(s)."
        ),
        "",
        (
            "| system | prompt tokens | answer tokens | ours | `generate`, dynamic cache | `generate`, static cache |"
            " ratio to the faster one | equal answers |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for system, asked in prompts(
        project, tokenizer, rows, tokenizer.model_max_length - max_new_tokens, systems
    ).items():

        def ours(ids: list[list[int]]) -> Answers:
            return generate_ids(model, tokenizer, ids, max_new_tokens, batch_size, "ours")

        setups: dict[str, Callable[[list[list[int]]], Answers]] = {"ours": ours} | {
            name: lambda ids, cache=cache: batched(model, tokenizer, ids, max_new_tokens, batch_size, cache)  # type: ignore[misc]
            for name, cache in THEIRS.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in setups}
        found: dict[str, Answers] = {}
        for answer in setups.values():
            answer(asked[:2])
        for _ in range(rounds):
            for name, answer in setups.items():
                found[name], took = timed(answer, asked)
                seconds[name].append(took)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        best = min(THEIRS, key=lambda name: middle[name])
        lines.append(
            f"| `{system}` | {sum(map(len, asked)) / rows:.0f} | {sum(map(len, found['ours'])) / rows:.0f} |"
            f" {middle['ours']:.1f} | {middle['dynamic']:.1f} | {middle['static']:.1f} |"
            f" {middle[best] / middle['ours']:.1f} | {100 * equal(found['ours'], found[best]):.0f} % |"
        )
        print(lines[-1], seconds, file=sys.stderr, flush=True)
    return lines


def independence(
    project: Path, rows: int, max_new_tokens: int, threads: int | None, systems: tuple[str, ...]
) -> list[str]:
    """The table of equal answers at two batch sizes."""
    from dagster_project.training.inference.generate import generate_ids

    shares: dict[str, list[str]] = {system: [] for system in systems}
    for dtype in ("bfloat16", "float32"):
        model, tokenizer, _, _ = load(project, threads, dtype)
        for system, asked in prompts(
            project, tokenizer, rows, tokenizer.model_max_length - max_new_tokens, systems
        ).items():
            few, many = (generate_ids(model, tokenizer, asked, max_new_tokens, size, "ours") for size in (FEW, MANY))
            shares[system].append(f"{100 * equal(few, many):.0f} %")
            print(system, dtype, shares[system][-1], file=sys.stderr, flush=True)
    return [
        f"Share of {rows} prompts with the same answer in batches of {FEW} and of {MANY}:",
        "",
        "| system | bfloat16 | float32 |",
        "| --- | ---: | ---: |",
        *(f"| `{system}` | {' | '.join(values)} |" for system, values in shares.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--rows", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="instead of compute.threads")
    parser.add_argument("--system", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument(
        "--part", nargs="+", choices=["speed", "batches"], default=["speed", "batches"], help="default: both"
    )
    parser.add_argument("--out", type=Path, help="put the tables between the markers of this Markdown file")
    given = parser.parse_args()
    systems = tuple(given.system)
    speed = (
        measure(given.project, given.rows, given.rounds, given.max_new_tokens, given.threads, systems)
        if "speed" in given.part
        else []
    )
    same = (
        independence(given.project, given.rows, given.max_new_tokens, given.threads, systems)
        if "batches" in given.part
        else []
    )
    made = "\n".join([*speed, "", *same]).strip() + "\n"
    show(given.out, "answers", made)


if __name__ == "__main__":
    main()
