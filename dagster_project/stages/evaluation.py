"""merged@X + splits -> evaluation@X. What the tuned model reaches on the test split, and whether it forgot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dagster_project.evaluation.likelihood import perplexity
from dagster_project.evaluation.measure import Settings, Subject, labelled, result_rows, result_schema
from dagster_project.evaluation.metrics import label, score
from dagster_project.params import Compute
from dagster_project.records import CheckResult, Report, read_records, response_text, write_table

TRUTHS = {"test_is_unseen": "No example of the test split, nor a near-copy of one, was trained on."}


def run(
    root: Path,
    variant: str,
    settings: Settings,
    compute: Compute,
    merged: Path,
    base_model: Path,
    splits: Path,
    out: Path,
    confusion_file: Path,
) -> Report:
    train, test = read_records(splits / "train") + read_records(splits / "validation"), read_records(splits / "test")
    seen = {record["group_id"] for record in train} & {record["group_id"] for record in test}
    unseen = CheckResult(
        "test_is_unseen",
        passed=bool(test) and not seen,
        blocking=True,
        count=len(seen),
        rows=sorted(seen)[:20],
        note="" if test else "the test split is empty",
    )
    if not unseen.passed:
        return Report(checks=[unseen])
    subject = Subject(merged, compute, settings, base_model)
    task, asked = settings.task, labelled(test, settings.task)
    likelihoods: list[tuple[float | None, int | None]] = [(None, None)] * len(test)
    metrics: dict[str, Any] = {"test_examples": len(test)}
    if subject.writes:
        found = subject.likelihood(test, variant)
        likelihoods = [*found]
        metrics |= {"perplexity": round(perplexity(found), 4), **subject.retention(root, variant)}
    answers: dict[str, str] = {}
    confusion = [("actual", "predicted")]
    if task and asked:
        said = subject.answer([record["messages"][:-1] for record in asked], variant)
        answers = {record["example_id"]: answer for record, answer in zip(asked, said, strict=True)}
        references = [response_text(record["messages"]) for record in asked]
        metrics |= score(task, references, said)
        confusion += [(label(task, reference), label(task, answer)) for reference, answer in zip(references, said, strict=True)]
    rows = result_rows(variant, test, task, [answers.get(record["example_id"]) for record in test], likelihoods)
    write_table(out / "results.parquet", rows, result_schema())
    confusion_file.parent.mkdir(parents=True, exist_ok=True)
    confusion_file.write_text("".join(f"{actual},{predicted}\n" for actual, predicted in confusion))
    return Report(metrics=metrics, checks=[unseen])
