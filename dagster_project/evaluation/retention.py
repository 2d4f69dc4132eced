"""Measures forgetting: multiple-choice benchmarks with lm-evaluation-harness, base model against tuned model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.params import inside
from dagster_project.core.progress import Progress
from dagster_project.core.text import many
from dagster_project.curation.sources.benchmarks import Item, read_multiple_choice
from dagster_project.evaluation.paired.bootstrap import difference, rate, rounded

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

MAX_BATCH = 16
"""Most choices per batch: lm-eval keeps the logits of all their tokens in memory, (choices, tokens, vocabulary)."""

CLEAR_LOSS = math.log(2)
"""Loss of log-likelihood, in nats, at which a correct answer is half as likely."""


@cache
def retention_schema() -> pa.Schema:
    """One row per benchmark question, for one model."""
    import pyarrow as pa

    columns = [
        ("benchmark", pa.string()),  # file name without extension
        ("question", pa.int64()),  # row in the file, from 0
        ("subject", pa.string()),  # the row's subject or category; else the benchmark
        ("gold_logprob", pa.float64()),  # nats, summed over the tokens of the correct choice
        ("correct", pa.bool_()),  # the correct choice is the most likely one: lm-eval's `acc`
    ]
    return pa.schema(columns)


def read_benchmarks(root: Path, paths: Sequence[str]) -> dict[str, list[Item]]:
    """The questions of each benchmark, by file name without extension.

    Raises:
        InputError: a question without its correct choice (`unlabelled`), or two files with the same name.
    """
    benchmarks: dict[str, list[Item]] = {}
    for path in paths:
        name = Path(path).stem
        if name in benchmarks:
            problem = f"params.yaml: evaluation.benchmarks: two files are named {name}"
            raise InputError(problem, "rename one: scores are reported by this name")
        benchmarks[name] = read_multiple_choice(inside(root, path, "evaluation.benchmarks"))
    return benchmarks


def ask(
    model: Any, tokenizer: Any, benchmarks: Mapping[str, Sequence[Item]], batch_size: int, what: str
) -> list[dict[str, Any]]:
    """Score the model on each question; rows of `retention_schema`.

    Equal to lm-eval's command line with `softmax_dtype=float32` on the same file, with `Item.prompt` as the task's
    `doc_to_text`. Prompts longer than the context are truncated at the beginning, with a warning from lm-eval.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about a model object instead of a name
    most = min(batch_size, MAX_BATCH)
    scorer = HFLM(pretrained=_LmEvalModel(model), tokenizer=tokenizer, batch_size=most, softmax_dtype="float32")
    log.setLevel(level)
    rows = []
    for benchmark, items in benchmarks.items():
        progress = Progress(f"{what}: {benchmark}", len(items), "question")
        for start in range(0, len(items), 64):
            batch = items[start : start + 64]
            requests = [
                Instance("loglikelihood", {}, (item.prompt, f" {choice}"), n)
                for item in batch
                for n, choice in enumerate(item.choices)
            ]
            scores = iter(scorer.loglikelihood(requests, disable_tqdm=True))
            for item in batch:
                nats = [next(scores)[0] for _ in item.choices]
                gold, correct = nats[item.answer or 0], nats.index(max(nats)) == item.answer
                question = {"benchmark": benchmark, "question": item.row, "subject": item.subject or benchmark}
                rows.append({**question, "gold_logprob": gold, "correct": correct})
            progress.advance(len(batch))
    return rows


class _LmEvalModel:
    """Adapter from a loaded model to the interface of lm-eval.

    Not a torch module, so that lm-eval does not re-tie weights that tuning untied.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.device = model, model.config, model.device

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids, use_cache=False)


def accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of questions answered correctly, by benchmark."""
    by_benchmark: dict[str, list[bool]] = {}
    for row in rows:
        by_benchmark.setdefault(row["benchmark"], []).append(row["correct"])
    return {name: rounded(sum(correct) / len(correct)) for name, correct in by_benchmark.items()}


def retained(base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Change of accuracy and log-likelihood by tuning, `overall` and by subject; empty without questions.

    The log-likelihood is that of the correct choices, in nats per question, so that a change is visible before an
    answer flips.

    Args:
        base, tuned: rows of `retention_schema`.
    """
    import numpy as np

    if not base or not tuned:
        return {}
    by_question = {(row["benchmark"], row["question"]): row for row in base}
    pairs = [(by_question[row["benchmark"], row["question"]], row) for row in tuned]
    groups = {"overall": pairs}
    for subject in sorted({row["subject"] for row in tuned} - {"overall"}):
        groups[subject] = [pair for pair in pairs if pair[1]["subject"] == subject]

    def statistics(members: Sequence[tuple[Mapping[str, Any], ...]], column: str) -> list[np.ndarray]:
        return [np.array([(pair[side][column], 1) for pair in members], dtype=float) for side in (0, 1)]

    changes: dict[str, Any] = {}
    for name, members in groups.items():
        before, after = statistics(members, "correct")
        shares = {"base": rounded(rate(before.sum(0))), "tuned": rounded(rate(after.sum(0)))}
        nats_before, nats_after = statistics(members, "gold_logprob")
        changes[name] = {
            "accuracy": {**shares, **difference(rate, after, before)},
            "gold_log_likelihood": difference(rate, nats_after, nats_before),
            "questions": len(members),
        }
    return changes


def forgot(name: str, changes: Mapping[str, Any], forgetting: float) -> list[str]:
    """A warning with remedies, if the variant forgot what the benchmarks ask.

    That is, accuracy fell by more than `forgetting`, or correct answers are significantly and at least two times less
    likely.

    Args:
        changes: result of `retained`.
        forgetting: tolerated loss of accuracy.
    """
    if not changes:
        return []
    accuracy, nats = changes["overall"]["accuracy"], changes["overall"]["gold_log_likelihood"]
    signs = []
    if accuracy["difference"] < -forgetting:
        low, high = accuracy["interval"]
        signs.append(
            f"accuracy fell from {100 * accuracy['base']:.1f} % to {100 * accuracy['tuned']:.1f} % "
            f"(95 % interval of the change {100 * low:+.1f} to {100 * high:+.1f} points)"
        )
    if nats["difference"] < -CLEAR_LOSS and nats["interval"][1] < 0:
        low, high = nats["interval"]
        signs.append(
            f"the right answers are {math.exp(nats['difference']):.2f} times as likely as before "
            f"(95 % interval {math.exp(low):.2f} to {math.exp(high):.2f})"
        )
    if not signs:
        return []
    return [
        f"{name} forgot: on {many(changes['overall']['questions'], 'benchmark question')} {' and '.join(signs)}. What"
        " helps: a lower learning_rate, fewer num_train_epochs, general data mixed in by tokenized.replay (a larger"
        " share), a smaller peft.r."
    ]
