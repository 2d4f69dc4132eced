"""What is measured of a model, tuned or not, and the table in which results are kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dagster_project.chat import encode_prompt, encode_record
from dagster_project.curation.benchmarks import read_multiple_choice
from dagster_project.evaluation.generate import generate
from dagster_project.evaluation.likelihood import choose, negative_log_likelihood
from dagster_project.evaluation.metrics import Task, follows, label, parse
from dagster_project.params import Compute, Section, inside
from dagster_project.records import response_text
from dagster_project.training import head
from dagster_project.training.hardware import prepare
from dagster_project.training.tuned import load

if TYPE_CHECKING:
    import pyarrow as pa


@cache
def result_schema() -> pa.Schema:
    """One answer of one system to one test example."""
    import pyarrow as pa

    return pa.schema(
        [
            ("system", pa.string()),  # who answered: zero_shot, few_shot, ..., or a variant's name
            ("example_id", pa.string()),
            ("answer", pa.string()),  # what it wrote; null where it was not asked to write
            ("label", pa.string()),  # the label its answer gives; null where the example has none
            ("nll", pa.float64()),  # nats, summed over the reference response; null for systems that are no language model
            ("tokens", pa.int64()),  # of the reference response
        ]
    )


class Settings(Section):
    """Section `evaluation`: the same for every variant, so that scores compare."""

    task: Task | None = None
    """What a right answer looks like. null, or a test split without such answers, leaves perplexity and retention."""
    benchmarks: list[str] = []
    """Multiple-choice files, to see whether tuning made the model forget."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = Field(default=40, ge=1)
    """Prompts that are answered at the same time."""


class Subject:
    """A loaded model, ready to be measured."""

    def __init__(self, folder: Path, compute: Compute, settings: Settings, base_model: Path | None = None) -> None:
        """Args:
        folder: weights that stand alone; or an adapter, or a classifier's head, with the `base_model` it stands on.
        """
        device, dtype = prepare(compute)
        from transformers import AutoTokenizer

        alone = base_model is None or not (head.is_head(folder) or (folder / "adapter_config.json").is_file())
        self.tokenizer = AutoTokenizer.from_pretrained(folder if alone else base_model, trust_remote_code=False)
        for template in folder.glob("chat_template.jinja"):
            self.tokenizer.chat_template = template.read_text(encoding="utf-8")
        self.head = head.load(folder, base_model, device, dtype) if base_model and head.is_head(folder) else None
        self.model = None if self.head else load(folder, base_model, device, dtype)
        self.settings = settings

    @property
    def writes(self) -> bool:
        """Is it a language model? A classifier only names labels: it has no perplexity and answers no multiple-choice questions."""
        return self.head is None

    def likelihood(self, records: Sequence[dict[str, Any]], what: str) -> list[tuple[float, int]]:
        """Per record the negative log-likelihood of its responses, and their tokens. What exceeds the context is cut at the end."""
        room = self.tokenizer.model_max_length
        examples = [(ids[:room], labels[:room]) for ids, labels in (encode_record(self.tokenizer, record) for record in records)]
        return negative_log_likelihood(self.model, self.tokenizer.pad_token_id, examples, self.settings.batch_size, f"{what}: perplexity")

    def answer(self, prompts: Sequence[list[dict[str, str]]], what: str) -> list[str]:
        """What it answers to each prompt; a classifier's answer is the label alone, which `metrics.label` takes as it takes any."""
        if self.head is not None:
            return self.head.predict(prompts, f"{what}: answers")
        ids = [encode_prompt(self.tokenizer, messages) for messages in prompts]
        return generate(self.model, self.tokenizer, ids, self.settings.max_new_tokens, self.settings.batch_size, f"{what}: answers")

    def retention(self, root: Path, what: str) -> dict[str, float]:
        """Accuracy on each multiple-choice benchmark, by file name."""
        found = {}
        for path in self.settings.benchmarks:
            questions = list(read_multiple_choice(inside(root, path, "evaluation.benchmarks")))
            chosen = choose(self.model, self.tokenizer, questions, self.settings.batch_size, f"{what}: {Path(path).stem}")
            found[Path(path).stem] = round(sum(q["answer"] == c for q, c in zip(questions, chosen, strict=True)) / len(questions), 4)
        return found


def labelled(records: Sequence[dict[str, Any]], task: Task | None) -> list[dict[str, Any]]:
    """The records whose reference response is an answer as the task wants it."""
    return [record for record in records if task and follows(task, parse(response_text(record["messages"])))]


def result_rows(
    system: str,
    records: Sequence[dict[str, Any]],
    task: Task | None,
    answers: Sequence[str | None],
    likelihoods: Sequence[tuple[float | None, int | None]],
) -> list[dict[str, Any]]:
    return [
        {
            "system": system,
            "example_id": record["example_id"],
            "answer": answer,
            "label": label(task, answer) if task and answer is not None else None,
            "nll": nll,
            "tokens": n,
        }
        for record, answer, (nll, n) in zip(records, answers, likelihoods, strict=True)
    ]
