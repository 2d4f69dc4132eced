"""Did tuning make the model forget? Multiple-choice questions, by lm-evaluation-harness, base against tuned."""

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
from dagster_project.curation.sources.benchmarks import Item, read_multiple_choice
from dagster_project.evaluation.paired.bootstrap import difference, rounded

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

AT_ONCE = 16
"""Most choices that are read at the same time: lm-eval holds the logits of all their tokens, (choices, tokens, vocabulary)."""

CLEARLY = math.log(2)
"""Nats that a right answer has lost when it is half as likely."""


@cache
def retention_schema() -> pa.Schema:
    """One question of a benchmark, as one model answers it."""
    import pyarrow as pa

    return pa.schema(
        [
            ("benchmark", pa.string()),  # file name without its ending
            ("question", pa.int64()),  # row in the file, from 0
            ("subject", pa.string()),  # the row's subject or category; the benchmark where it has none
            ("gold_logprob", pa.float64()),  # nats, summed over the tokens of the right choice
            ("correct", pa.bool_()),  # the right choice is the most likely one: lm-eval's `acc`
        ]
    )


def read_benchmarks(root: Path, paths: Sequence[str]) -> dict[str, list[Item]]:
    """The questions of each benchmark, by file name without its ending.

    Raises:
        InputError: a question without its right choice (`unlabelled`), or two files of one name.
    """
    found: dict[str, list[Item]] = {}
    for path in paths:
        name = Path(path).stem
        if name in found:
            raise InputError(f"params.yaml: evaluation.benchmarks: two files are called {name}", "rename one: scores go by this name")
        found[name] = read_multiple_choice(inside(root, path, "evaluation.benchmarks"))
    return found


def ask(model: Any, tokenizer: Any, benchmarks: Mapping[str, Sequence[Item]], batch_size: int, what: str) -> list[dict[str, Any]]:
    """How the model answers each question; rows of `retention_schema`.

    Equal to lm-eval's command line with `softmax_dtype=float32` on the same file, the task's `doc_to_text` being `Item.prompt`. What exceeds the
    context is cut at the beginning, and lm-eval says so.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    log = logging.getLogger("lm_eval")
    said = log.level
    log.setLevel(logging.ERROR)  # it warns that a loaded model is no name
    scorer = HFLM(pretrained=_Asked(model), tokenizer=tokenizer, batch_size=min(batch_size, AT_ONCE), softmax_dtype="float32")
    log.setLevel(said)
    rows = []
    for benchmark, items in benchmarks.items():
        progress = Progress(f"{what}: {benchmark}", len(items), "question")
        for start in range(0, len(items), 64):
            some = items[start : start + 64]
            requests = [
                Instance("loglikelihood", {}, (item.prompt, f" {choice}"), n) for item in some for n, choice in enumerate(item.choices)
            ]
            scores = iter(scorer.loglikelihood(requests, disable_tqdm=True))
            for item in some:
                nats = [next(scores)[0] for _ in item.choices]
                rows.append(
                    {
                        "benchmark": benchmark,
                        "question": item.row,
                        "subject": item.subject or benchmark,
                        "gold_logprob": nats[item.answer or 0],
                        "correct": nats.index(max(nats)) == item.answer,
                    }
                )
            progress.advance(len(some))
    return rows


class _Asked:
    """What lm-eval asks of a model, of any that `tuned.load` gives. Not a module, so that lm-eval does not tie weights that tuning took apart."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.device = model, model.config, model.device

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids, use_cache=False)


def accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of the questions answered rightly, by benchmark."""
    by: dict[str, list[bool]] = {}
    for row in rows:
        by.setdefault(row["benchmark"], []).append(row["correct"])
    return {name: rounded(sum(correct) / len(correct)) for name, correct in by.items()}


def retained(base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tuning did to the answers, over all questions (`overall`) and by subject; nothing where none were asked.

    The log-likelihood is that of the right choices, in nats a question, so that a change shows before an answer flips.

    Args:
        base, tuned: rows of `retention_schema`.
    """
    import numpy as np

    if not base or not tuned:
        return {}
    of_base = {(row["benchmark"], row["question"]): row for row in base}
    pairs = [(of_base[row["benchmark"], row["question"]], row) for row in tuned]
    groups = {"overall": pairs} | {
        subject: [pair for pair in pairs if pair[1]["subject"] == subject]
        for subject in sorted({row["subject"] for row in tuned} - {"overall"})
    }

    def statistics(members: Sequence[tuple[Mapping[str, Any], ...]], side: int, column: str) -> np.ndarray:
        return np.array([(pair[side][column], 1) for pair in members], dtype=float)

    found: dict[str, Any] = {}
    for name, members in groups.items():
        right, nats = ([statistics(members, side, column) for side in (0, 1)] for column in ("correct", "gold_logprob"))
        found[name] = {
            "accuracy": {
                **{who: rounded(_mean(sums.sum(0))) for who, sums in zip(("base", "tuned"), right, strict=True)},
                **difference(_mean, right[1], right[0]),
            },
            "gold_log_likelihood": difference(_mean, nats[1], nats[0]),
            "questions": len(members),
        }
    return found


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def forgot(name: str, found: Mapping[str, Any], forgetting: float) -> list[str]:
    """A warning with what can be done, if a variant lost more accuracy than `forgetting`, or right answers are surely less likely and half as likely or less.

    Args:
        found: of `retained`.
    """
    if not found:
        return []
    accuracy, nats = found["overall"]["accuracy"], found["overall"]["gold_log_likelihood"]
    signs = []
    if accuracy["difference"] < -forgetting:
        low, high = accuracy["interval"]
        signs.append(
            f"accuracy fell from {100 * accuracy['base']:.1f} % to {100 * accuracy['tuned']:.1f} % "
            f"(95 % interval of the change {100 * low:+.1f} to {100 * high:+.1f} points)"
        )
    if nats["difference"] < -CLEARLY and nats["interval"][1] < 0:
        low, high = nats["interval"]
        signs.append(
            f"the right answers are {math.exp(nats['difference']):.2f} times as likely as before "
            f"(95 % interval {math.exp(low):.2f} to {math.exp(high):.2f})"
        )
    if not signs:
        return []
    return [
        f"{name} forgot: on {found['overall']['questions']} benchmark questions {' and '.join(signs)}. "
        "What helps: a lower learning_rate, fewer num_train_epochs, general data mixed in by tokenized.replay (a larger share), a smaller peft.r."
    ]
