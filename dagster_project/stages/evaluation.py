"""merged@X + splits -> evaluation@X. Scores of the tuned model on the test split, and its benchmark results."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.core.records import CheckResult, Report, read_records, write_table
from dagster_project.core.text import NAMES, cell
from dagster_project.curation.sources.reading import locate
from dagster_project.evaluation.alarms import answers_are_not_empty, answers_differ, scored_something
from dagster_project.evaluation.custom_metrics import custom_measures, locate_measure
from dagster_project.evaluation.evaluator import (
    BASE,
    EvaluatedModel,
    Settings,
    result_rows,
    select_questions,
    slices,
    turn_key,
    write_results,
)
from dagster_project.evaluation.final_answers import FinalAnswer
from dagster_project.evaluation.metrics import label, perplexity_interval
from dagster_project.evaluation.paired.bootstrap import unit
from dagster_project.evaluation.retention import accuracies, ask, read_benchmarks, retention_schema
from dagster_project.evaluation.scoring import Scoring, mean_by_example
from dagster_project.training.inference.answers import Answer

CHECK_DESCRIPTIONS = {
    "test_is_unseen": "No example of the test split, nor a near-copy of one, was trained on.",
    "scored_something": "At least one test example was answered, or its likelihood measured.",
    "answers_are_not_empty": "Not all answers are empty.",
    "answers_differ": "Not all questions have the same answer, unless they should.",
}

FIGURES = (
    "test_examples",
    "n",
    "n_text",
    "n_calls",
    "perplexity",
    "perplexity_unknown",
    "by_label",
    "by_category",
    "by_prompt_words",
)
"""Names of figures in the report that are neither measures of answers nor benchmarks."""

Params = Settings


def validate(params: Params, ctx: ValidationContext) -> None:
    for section in ("adapter", "aligned"):
        for name in ctx.values.get(section) or {}:
            if name in {BASE, *NAMES}:  # results are read by the name of their system
                problem = f"params.yaml: {section}.{name}: the base model's scores have this name"
                raise InputError(problem, "rename the variant")
    for measure in params.metrics:
        locate_measure(ctx.root, measure)
    for path in params.benchmarks:
        locate(ctx.root, path, "evaluation.benchmarks", "data/sources/benchmarks")


def run(ctx: StageContext) -> Report:
    suffix = "_aligned" if ctx.stage == "evaluation_aligned" else ""
    variant, settings = str(ctx.variant), ctx.params("evaluation", Params)
    merged, base_model, splits = (ctx.output_of(name) for name in (f"merged{suffix}", "base_model", "splits"))
    confusion_file = ctx.plot(f"confusion{suffix}")
    return produce(ctx.root, variant, settings, ctx.compute, merged, base_model, splits, ctx.out, confusion_file)


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
    passed, shown, note = bool(test) and not seen, sorted(seen)[:20], "" if test else "the test split is empty"
    unseen = CheckResult("test_is_unseen", passed=passed, blocking=True, count=len(seen), rows=shown, note=note)
    if not unseen.passed:
        return Report(checks=[unseen])
    benchmarks = read_benchmarks(root, settings.benchmarks)
    task, questions = select_questions(test, settings, train)
    scoring = Scoring(questions, task, custom_measures(root, settings.metrics))
    refuse_names(benchmarks, scoring.names())
    model = EvaluatedModel(merged, compute, settings, base_model)
    likelihoods: list[tuple[float, int]] = []
    retention: list[dict[str, Any]] = []
    answers: list[Answer] = []
    metrics: dict[str, Any] = {"test_examples": len(test)}
    if model.writes:
        likelihoods = model.likelihood(test, variant)
        retention = ask(model.model, model.tokenizer, benchmarks, settings.batch_size, variant)
        metrics |= {**perplexity_interval(likelihoods, [unit(record) for record in test]), **accuracies(retention)}
    rows = {turn_key(row): row for row in result_rows(variant, test, task, likelihoods=likelihoods)}
    confusion, values = [("actual", "predicted")], {}
    if questions and scoring.names(model.writes):
        prompts = [record["messages"][:-1] for record in questions]
        answers = model.answer(prompts, variant, offers=scoring.offers)
        for row in result_rows(variant, questions, task, answers, model.prompt_tokens(prompts, scoring.offers)):
            found = rows.setdefault(turn_key(row), row)
            found |= {name: value for name, value in row.items() if name not in {"nll", "tokens"}}
        metrics |= scoring.score(answers, model.writes)
        values = mean_by_example(questions, scoring.marks(answers, model.writes))
        if task and not isinstance(task, FinalAnswer):
            texts = zip(scoring.texts(scoring.references), scoring.texts(answers), strict=True)
            confusion += [(label(task, reference), label(task, answer)) for reference, answer in texts]
    metrics |= slices(test, likelihoods, scoring.mark_name, values)
    write_results(out / "results.parquet", list(rows.values()))
    write_table(out / "retention.parquet", retention, retention_schema())
    _write_csv(confusion_file, confusion)
    alarms = [
        scored_something(answers, likelihoods),
        answers_are_not_empty({variant: answers}, "error"),
        answers_differ(scoring.references, answers),
    ]
    return Report(metrics=metrics, checks=[unseen, *alarms])


def refuse_names(benchmarks: Iterable[str], measures: Iterable[str]) -> None:
    """Check that no benchmark has the name of another figure of the report: one of them would replace the other.

    Raises:
        InputError: one has.
    """
    names = {*FIGURES, *measures}
    if same := sorted({*benchmarks} & {*names, *(f"{name}_interval" for name in names)}):
        problem = f"params.yaml: evaluation.benchmarks: {same[0]} is the name of another figure in the report"
        raise InputError(problem, "rename the file: its score is reported by this name")


def _write_csv(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Labels with commas, quotes and line breaks are quoted, and none is a formula."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(map(cell, row) for row in rows)
