"""Evaluation of a tuned or base model: likelihoods, answers, slices, and the results table."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag

from dagster_project.core.chat import encode_prompt, encode_record, is_text
from dagster_project.core.params import TAG, Compute, Section
from dagster_project.core.records import prompt_text, response_text, subject_text
from dagster_project.evaluation.labels import LabelSet, LabelTask, label_set
from dagster_project.evaluation.metrics import Task, is_answer, label, perplexity
from dagster_project.evaluation.paired.bootstrap import rounded
from dagster_project.training.inference.generate import generate
from dagster_project.training.inference.likelihood import negative_log_likelihood
from dagster_project.training.methods import feature_extraction
from dagster_project.training.methods.hardware import prepare
from dagster_project.training.methods.load import load

log = logging.getLogger("pedigree")

if TYPE_CHECKING:
    import pyarrow as pa


@cache
def result_schema() -> pa.Schema:
    """One row per system and test example."""
    import pyarrow as pa

    return pa.schema(
        [
            ("system", pa.string()),  # zero_shot, few_shot, ..., or a variant's name
            ("example_id", pa.string()),
            ("answer", pa.string()),  # generated answer; null if none was generated
            ("label", pa.string()),  # label of the answer; null for free text
            ("prompt_tokens", pa.int64()),  # tokens of the prompt; null for systems other than language models
            ("nll", pa.float64()),  # nats, summed over the reference response; null for systems other than language models
            ("tokens", pa.int64()),  # of the reference response
        ]
    )


def _task_kind(value: Any) -> str:
    """Tag of the kind of `task` that a value specifies."""
    return f"{TAG}labels" if isinstance(value, LabelTask) or (isinstance(value, dict) and "labels" in value) else f"{TAG}fields"


class Settings(Section):
    """How answers are scored, the same for every variant. See docs/evaluation.md."""

    task: Annotated[Annotated[Task, Tag(f"{TAG}fields")] | Annotated[LabelTask, Tag(f"{TAG}labels")], Discriminator(_task_kind)] | None = (
        None
    )
    """What a correct answer looks like: a label (`labels`), or one JSON object (`fields` and `score`). null, or no test
    example with such an answer: answers are free text."""
    metrics: list[str] = []
    """Measures of your own: `file.function` of a Python file in data/metrics/."""
    max_examples: int = Field(default=200, ge=1)
    """Most test examples that are answered, chosen by content, so that every system and every run answers the same
    ones. Perplexity covers all test examples."""
    benchmarks: list[str] = []
    """Multiple-choice files in data/sources/benchmarks/, to measure what tuning made the model forget."""
    forgetting: float = Field(default=0.05, ge=0, le=1)
    """Loss of accuracy on the benchmarks above which `comparison` warns."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = Field(default=40, ge=1)
    """Prompts that are answered at the same time."""


class EvaluatedModel:
    """A loaded model with the operations that evaluation needs."""

    def __init__(self, folder: Path, compute: Compute, settings: Settings, base_model: Path | None = None) -> None:
        """Args:
        folder: a complete model; or an adapter or a classification head, which needs `base_model`.
        """
        device, dtype = prepare(compute)
        from transformers import AutoTokenizer

        alone = base_model is None or not (feature_extraction.is_head(folder) or (folder / "adapter_config.json").is_file())
        self.tokenizer = AutoTokenizer.from_pretrained(folder if alone else base_model, trust_remote_code=False)
        for template in folder.glob("chat_template.jinja"):
            self.tokenizer.chat_template = template.read_text(encoding="utf-8")
        self.head = (
            feature_extraction.load(folder, base_model, device, dtype) if base_model and feature_extraction.is_head(folder) else None
        )
        self.model = None if self.head else load(folder, base_model, device, dtype)
        self.settings = settings

    @property
    def writes(self) -> bool:
        """Whether the model generates text. A classifier only predicts labels: it has no perplexity and no benchmark scores."""
        return self.head is None

    def likelihood(self, records: Sequence[dict[str, Any]], what: str) -> list[tuple[float, int]]:
        """(negative log-likelihood in nats, tokens) of each record's responses. Records longer than the context are truncated at the end."""
        room = self.tokenizer.model_max_length
        encoded = [encode_record(self.tokenizer, record) for record in records]
        examples = [(ids[:room], labels[:room]) for parts in encoded for ids, labels in parts]
        scores = iter(
            negative_log_likelihood(self.model, self.tokenizer.pad_token_id, examples, self.settings.batch_size, f"{what}: perplexity")
        )
        of_records = [list(islice(scores, len(parts))) for parts in encoded]
        return [(sum(nats for nats, _ in parts), sum(tokens for _, tokens in parts)) for parts in of_records]

    def answer(self, prompts: Sequence[list[dict[str, str]]], what: str, thinking_tokens: int = 0) -> list[str]:
        """The answer to each prompt; for a classifier the predicted label. Prompts longer than the context are truncated at the beginning.

        Args:
            thinking_tokens: additional tokens for reasoning before the answer.
        """
        if self.head is not None:
            return self.head.predict(prompts, f"{what}: answers")
        longest = self.settings.max_new_tokens + thinking_tokens
        room = max(1, self.tokenizer.model_max_length - longest)
        ids = [encode_prompt(self.tokenizer, messages)[-room:] for messages in prompts]
        return generate(self.model, self.tokenizer, ids, longest, self.settings.batch_size, f"{what}: answers")

    def prompt_tokens(self, prompts: Sequence[list[dict[str, str]]]) -> list[int] | None:
        """Tokens of each prompt; None for a classifier, which is not prompted."""
        return [len(encode_prompt(self.tokenizer, messages)) for messages in prompts] if self.writes else None


def select_questions(
    records: Sequence[dict[str, Any]], settings: Settings, train: Sequence[dict[str, Any]] = ()
) -> tuple[Task | LabelSet | None, list[dict[str, Any]]]:
    """Select the test examples to answer. Returns the task (None for free text) and the examples.

    Args:
        records: the test split.
        train: the training split, whose responses are the labels of `labels: auto`.
    """
    task: Task | LabelSet | None
    if isinstance(settings.task, LabelTask):
        task = label_set(
            settings.task, *([response_text(r["messages"]) for r in with_prompt_and_response(split)] for split in (train, records))
        )
    else:
        task = settings.task
    answerable = with_task_answers(records, task)
    if isinstance(task, Task) and records and not answerable:
        log.warning(
            f"params.yaml: evaluation.task: none of {len(records)} test answers is a JSON object with the fields {', '.join(task.fields)}"
            " and allowed values; answers are scored as free text. Remove evaluation.task, or describe your own answers"
        )
    task = task if answerable else None
    answerable = answerable or with_prompt_and_response(records)
    chosen = set(sorted(record["example_id"] for record in answerable)[: settings.max_examples])
    return task, [record for record in answerable if record["example_id"] in chosen]


def with_task_answers(records: Sequence[dict[str, Any]], task: Task | LabelSet | None) -> list[dict[str, Any]]:
    """The records whose reference response is an answer to the task."""
    return [record for record in records if task and is_answer(task, response_text(record["messages"]))]


def with_prompt_and_response(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversations with both a prompt and a response."""
    return [r for r in records if not is_text(r) and prompt_text(r["messages"]) and response_text(r["messages"])]


def result_rows(
    system: str,
    records: Sequence[dict[str, Any]],
    task: Task | LabelSet | None,
    answers: Sequence[str | None] | None = None,
    prompt_tokens: Sequence[int | None] | None = None,
    likelihoods: Sequence[tuple[float | None, int | None]] = (),
) -> list[dict[str, Any]]:
    """A system's rows of the results table, with null for missing answers, prompts or likelihoods."""
    nothing = [None] * len(records)
    return [
        {
            "system": system,
            "example_id": record["example_id"],
            "answer": answer,
            "label": label(task, answer) if task and answer is not None else None,
            "prompt_tokens": length,
            "nll": nll,
            "tokens": n,
        }
        for record, answer, length, (nll, n) in zip(
            records, answers or nothing, prompt_tokens or nothing, likelihoods or [(None, None)] * len(records), strict=True
        )
    ]


MOST_SLICES = 20
OTHERS = "(others)"
NO_CATEGORY = "(none)"


def slices(
    records: Sequence[dict[str, Any]], likelihoods: Sequence[tuple[float, int]], scored: str, values: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Test examples, perplexity and mean score of answered examples, by category and by prompt length.

    Args:
        likelihoods: (nats, tokens) of the records; empty for a classifier.
        scored: name of the score.
        values: example_id -> score.
    """
    categories = [record["category"] or NO_CATEGORY for record in records]
    most = {name for name, _ in Counter(sorted(categories)).most_common(MOST_SLICES)}
    groupings = {
        "by_category": [name if name in most else OTHERS for name in categories],
        "by_prompt_words": thirds([len(subject_text(record["messages"]).split()) for record in records]),
    }
    return {
        grouping: {
            name: _slice([i for i, other in enumerate(names) if other == name], records, likelihoods, scored, values)
            for name in sorted(set(names))
        }
        for grouping, names in groupings.items()
    }


def _slice(
    members: Sequence[int],
    records: Sequence[dict[str, Any]],
    likelihoods: Sequence[tuple[float, int]],
    scored: str,
    values: Mapping[str, float],
) -> dict[str, Any]:
    import numpy as np

    scores = [values[records[i]["example_id"]] for i in members if records[i]["example_id"] in values]
    return {
        "n": len(members),
        **({"perplexity": rounded(perplexity(np.array([likelihoods[i] for i in members]).sum(0)))} if likelihoods else {}),
        **({"answered": len(scores), scored: rounded(sum(scores) / len(scores))} if scores else {}),
    }


def thirds(lengths: Sequence[int]) -> list[str]:
    """Name of the tercile (short, medium, long) of each length, with its bounds."""
    ordered = sorted(lengths)
    low, high = (ordered[max(0, len(ordered) * k // 3 - 1)] for k in (1, 2))
    return [
        f"short, up to {low}" if n <= low else f"medium, {low + 1} to {high}" if n <= high else f"long, {high + 1} and more"
        for n in lengths
    ]
