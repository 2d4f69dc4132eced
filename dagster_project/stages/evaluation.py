"""merged@X + splits -> evaluation@X. Scores of the tuned model on the test split, and its benchmark results."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.params import Compute
from dagster_project.core.records import CheckResult, Report, read_records, response_text, write_table
from dagster_project.curation.sources.reading import locate
from dagster_project.evaluation.custom_metrics import custom_measures
from dagster_project.evaluation.evaluator import EvaluatedModel, Settings, result_rows, result_schema, select_questions, slices
from dagster_project.evaluation.metrics import by_label, label, measures, perplexity_interval, score
from dagster_project.evaluation.retention import accuracies, ask, read_benchmarks, retention_schema

CHECK_DESCRIPTIONS = {"test_is_unseen": "No example of the test split, nor a near-copy of one, was trained on."}


Params = Settings


def validate(params: Params, ctx: ValidationContext) -> None:
    for path in params.benchmarks:
        locate(ctx.root, path, "evaluation.benchmarks", "data/sources/benchmarks")


def run(ctx: StageContext) -> Report:
    merged, confusion = {
        "evaluation": ("merged", "confusion"),
        "evaluation_aligned": ("merged_aligned", "confusion_aligned"),
    }[ctx.stage]
    return produce(
        ctx.root,
        str(ctx.variant),
        ctx.params("evaluation", Params),
        ctx.compute,
        ctx.output_of(merged),
        ctx.output_of("base_model"),
        ctx.output_of("splits"),
        out=ctx.out,
        confusion_file=ctx.plot(confusion),
    )


def produce(
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
    train, validation, test = (read_records(splits / name) for name in ("train", "validation", "test"))
    seen = {record["group_id"] for record in train + validation} & {record["group_id"] for record in test}
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
    benchmarks = read_benchmarks(root, settings.benchmarks)
    task, questions = select_questions(test, settings, train)
    model = EvaluatedModel(merged, compute, settings, base_model)
    table = measures(task, custom_measures(root, settings.metrics), model.writes)
    likelihoods: list[tuple[float, int]] = []
    retention: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {"test_examples": len(test)}
    if model.writes:
        likelihoods = model.likelihood(test, variant)
        retention = ask(model.model, model.tokenizer, benchmarks, settings.batch_size, variant)
        metrics |= {**perplexity_interval(likelihoods), **accuracies(retention)}
    rows = {row["example_id"]: row for row in result_rows(variant, test, task, likelihoods=likelihoods)}
    confusion, scored, values = [("actual", "predicted")], "accuracy" if task else "rouge_l", {}
    if table and questions:
        prompts = [record["messages"][:-1] for record in questions]
        answers = model.answer(prompts, variant)
        for row in result_rows(variant, questions, task, answers, model.prompt_tokens(prompts)):
            rows[row["example_id"]] |= {name: row[name] for name in ("answer", "label", "prompt_tokens")}
        references = [response_text(record["messages"]) for record in questions]
        metrics |= score(table, references, answers) | by_label(task, references, answers)
        values = dict(zip((record["example_id"] for record in questions), table[scored].statistics(references, answers)[:, 0], strict=True))
        if task:
            confusion += [(label(task, reference), label(task, answer)) for reference, answer in zip(references, answers, strict=True)]
    metrics |= slices(test, likelihoods, scored, values)
    write_table(out / "results.parquet", list(rows.values()), result_schema())
    write_table(out / "retention.parquet", retention, retention_schema())
    _write_csv(confusion_file, confusion)
    return Report(metrics=metrics, checks=[unseen])


def _write_csv(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Labels with commas, quotes and line breaks are quoted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
