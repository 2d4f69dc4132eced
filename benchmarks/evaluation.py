"""Compare batched answers with one `model.generate` per prompt. usage: python benchmarks/evaluation.py [--project
FOLDER] [--rows N] [--rounds N] [--threads N] [--out FILE]

Same model (data/base_model), same prompts (of the test split: the question alone, with worked examples shared by all
prompts, with examples retrieved for each prompt; the same number as in the stage `baselines`), same maximum of new
tokens, both greedy, in one process:

    alone   transformers' `generate`, one prompt at a time
    ours    training/inference/generate.py as the stages call it, in batches of evaluation.batch_size

Tokens per second count the answers without the end of turn; the ratio compares both in the same round; medians over
rounds. The table also has the seconds of ours for the number of rows that a stage answers by default, and the share of
prompts with equal answers: all of them in float32; in bfloat16 the choice between two almost equally likely tokens may
differ.
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

from tables import replace  # noqa: E402


def prompts(project: Path, tokenizer: Any, rows: int, longest: int) -> dict[str, list[list[int]]]:
    """System -> token ids of each of `rows` prompts, at most `longest`; the test split is repeated if it is shorter."""
    from dagster_project.core import params
    from dagster_project.core.chat import encode_prompt
    from dagster_project.core.records import read_records
    from dagster_project.evaluation.baselines import nearest, with_shots
    from dagster_project.evaluation.evaluator import with_prompt_and_response
    from dagster_project.stages.baselines import Params

    chosen = params.parse(Params, params.read(project).get("baselines"), "baselines")
    known, asked = (with_prompt_and_response(read_records(project / "data" / "splits" / split)) for split in ("train", "test"))
    asked = list(islice(cycle(asked), rows))
    shots = known[: chosen.few_shot]
    found = {
        "zero_shot": [with_shots("", [], record) for record in asked],
        "few_shot": [with_shots("", shots, record) for record in asked],
        "retrieved": [with_shots("", alike, record) for record, alike in zip(asked, nearest(known, asked, chosen.retrieved), strict=True)],
    }
    return {name: [encode_prompt(tokenizer, messages)[-longest:] for messages in each] for name, each in found.items()}


def alone(model: Any, tokenizer: Any, ids: list[list[int]], max_new_tokens: int) -> list[str]:
    """One call of `generate` per prompt."""
    import torch

    answers = []
    for prompt in ids:
        rows = torch.tensor([prompt], device=model.device)
        out = model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=max_new_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        answers.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip())
    return answers


def timed(answer: Callable[..., list[str]], *given: Any) -> tuple[list[str], float]:
    begin = time.perf_counter()
    answers = answer(*given)  # as texts, so that the computation has ended
    return answers, time.perf_counter() - begin


def tokens_of(tokenizer: Any, answers: list[str]) -> int:
    return max(1, sum(len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers))


def measure(project: Path, rows: int, many: int, rounds: int, max_new_tokens: int, threads: int | None) -> list[dict[str, Any]]:
    """One row of the table for each system."""
    from dagster_project.core import params
    from dagster_project.core.params import Compute
    from dagster_project.evaluation.evaluator import EvaluatedModel, Settings
    from dagster_project.training.inference.generate import generate

    values = params.read(project)
    settings = params.parse(Settings, values.get("evaluation"), "evaluation")
    compute = params.parse(Compute, values.get("compute"), "compute")
    compute = compute.model_copy(update={"threads": threads or compute.threads})
    subject = EvaluatedModel(project / "data" / "base_model", compute, settings)
    model, tokenizer = subject.model, subject.tokenizer

    def ours(ids: list[list[int]]) -> list[str]:
        return generate(model, tokenizer, ids, max_new_tokens, settings.batch_size, "ours")

    def theirs(ids: list[list[int]]) -> list[str]:
        return alone(model, tokenizer, ids, max_new_tokens)

    found = []
    for system, asked in prompts(project, tokenizer, max(rows, many), tokenizer.model_max_length - max_new_tokens).items():
        some = asked[:rows]
        for warm in (ours, theirs):
            warm(some[:2])
        speeds, seconds, same = [], [], 0.0
        for _ in range(rounds):
            (batched, short), (single, long) = timed(ours, some), timed(theirs, some)
            speeds.append((tokens_of(tokenizer, batched) / short, tokens_of(tokenizer, single) / long))
            same = sum(a == b for a, b in zip(batched, single, strict=True)) / rows
            seconds.append(timed(ours, asked[:many])[1])
        found.append(
            {
                "system": system,
                "prompt_tokens": sum(map(len, some)) / rows,
                "ours": statistics.median(fast for fast, _ in speeds),
                "alone": statistics.median(slow for _, slow in speeds),
                "ratio": statistics.median(fast / slow for fast, slow in speeds),
                "seconds": statistics.median(seconds),
                "same": same,
                "setup": f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}, {compute.threads} thread(s), batches of {settings.batch_size}",
            }
        )
        print(found[-1], file=sys.stderr, flush=True)
    return found


def table(found: list[dict[str, Any]], rows: int, many: int, rounds: int, max_new_tokens: int) -> str:
    lines = [
        f"{rows} prompts, at most {max_new_tokens} new tokens each, on a {found[0]['setup']}; medians over {rounds} round(s).",
        "",
        f"| system | prompt tokens | ours, tokens/s | alone, tokens/s | ratio | ours, seconds for {many} rows | equal answers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        lines.append(
            f"| `{row['system']}` | {row['prompt_tokens']:.0f} | {row['ours']:.0f} | {row['alone']:.0f} | {row['ratio']:.1f} | {row['seconds']:.0f} "
            f"| {100 * row['same']:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--rows", type=int, default=60, help="prompts that both answer (default: %(default)s)")
    parser.add_argument("--many", type=int, default=200, help="rows that ours is timed on (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="instead of compute.threads")
    parser.add_argument("--out", type=Path, help="put the table between the markers of this Markdown file")
    given = parser.parse_args()
    size = (given.rows, given.many, given.rounds, given.max_new_tokens)
    made = table(measure(given.project, *size, given.threads), *size)
    print(made)
    if given.out:
        replace(given.out, "evaluation", made)


if __name__ == "__main__":
    main()
