"""base_model + splits -> baselines. What the untuned model and a classical classifier reach on the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from dagster_project.evaluation.baselines import classify, nearest, spread, with_shots
from dagster_project.evaluation.likelihood import perplexity
from dagster_project.evaluation.measure import Settings, Subject, labelled, result_rows, result_schema
from dagster_project.evaluation.metrics import label, score
from dagster_project.params import Compute, Section
from dagster_project.records import Report, read_records, response_text, write_table


class Params(Section):
    few_shot: int = Field(default=8, ge=1)
    """Worked examples in the prompt, the same for every question."""
    retrieved: int = Field(default=4, ge=1)
    """Worked examples in the prompt, those most similar to the question."""


def run(root: Path, params: Params, settings: Settings, compute: Compute, base_model: Path, splits: Path, out: Path) -> Report:
    subject = Subject(base_model, compute, settings)
    train, test = read_records(splits / "train"), read_records(splits / "test")
    task, asked, known = settings.task, labelled(test, settings.task), labelled(train, settings.task)
    likelihoods = subject.likelihood(test, "base")
    rows = result_rows("base", test, None, [None] * len(test), likelihoods)
    metrics: dict[str, Any] = {"base": {"perplexity": round(perplexity(likelihoods), 4), **subject.retention(root, "base")}}
    if task and asked and known:
        labels = [label(task, response_text(record["messages"])) for record in known]
        shots = spread(known, labels, params.few_shot, compute.seed)
        systems = {
            "zero_shot": subject.answer([with_shots(task, [], record) for record in asked], "zero_shot"),
            "few_shot": subject.answer([with_shots(task, shots, record) for record in asked], "few_shot"),
            "retrieved": subject.answer(
                [with_shots(task, found, record) for found, record in zip(nearest(known, asked, params.retrieved), asked, strict=True)],
                "retrieved",
            ),
            "tfidf_logistic": classify(known, labels, asked, compute.seed),
        }
        references = [response_text(record["messages"]) for record in asked]
        for name, answers in systems.items():
            metrics[name] = score(task, references, answers)
            rows += result_rows(name, asked, task, answers, [(None, None)] * len(asked))
    write_table(out / "results.parquet", rows, result_schema())
    return Report(metrics=metrics)
