"""base_model + splits -> baselines. Scores of the untuned model and of a classical classifier on the test split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute, Section
from dagster_project.core.records import Report, read_records, response_text, write_table
from dagster_project.evaluation.alarms import answers_are_not_empty
from dagster_project.evaluation.baselines import classify, conclusion, nearest, prompted, spread
from dagster_project.evaluation.custom_metrics import custom_measures
from dagster_project.evaluation.evaluator import (
    BASE,
    EvaluatedModel,
    Settings,
    result_rows,
    select_questions,
    with_prompt_and_response,
    with_task_answers,
    write_results,
)
from dagster_project.evaluation.final_answers import FinalAnswer
from dagster_project.evaluation.metrics import label, perplexity_interval
from dagster_project.evaluation.paired.bootstrap import unit
from dagster_project.evaluation.retention import accuracies, ask, read_benchmarks, retention_schema
from dagster_project.evaluation.scoring import Scoring
from dagster_project.training.inference.answers import Answer

log = logging.getLogger("pedigree")

CHECK_DESCRIPTIONS = {"answers_are_not_empty": "No prompt to the base model gives only empty answers."}


class Params(Section):
    """Scores of the untuned model with prompts alone. See docs/evaluation.md."""

    few_shot: int = Field(default=8, ge=1)
    """Worked examples in the prompt, the same for every question."""
    retrieved: int = Field(default=4, ge=1)
    """Worked examples in the prompt, those most similar to the question (BM25)."""
    system_prompt: str | None = None
    """System prompt of the base model. null: the task with every allowed value or label; none for free text, which then
    has no baseline of this name."""
    thinking_tokens: int = Field(default=64, ge=1)
    """Tokens for step-by-step reasoning before the answer. The last line is the answer."""


def validate(params: Params, ctx: ValidationContext) -> None:
    """Only types are validated."""


def run(ctx: StageContext) -> Report:
    params, settings = ctx.params("baselines", Params), ctx.params("evaluation", Settings)
    base_model, splits = ctx.output_of("base_model"), ctx.output_of("splits")
    return produce(ctx.root, params, settings, ctx.compute, base_model, splits, ctx.out)


def produce(
    root: Path, params: Params, settings: Settings, compute: Compute, base_model: Path, splits: Path, out: Path
) -> Report:
    benchmarks = read_benchmarks(root, settings.benchmarks)
    train, test = read_records(splits / "train"), read_records(splits / "test")
    task, questions = select_questions(test, settings, train)
    model = EvaluatedModel(base_model, compute, settings)
    examples = with_task_answers(train, task) if task else with_prompt_and_response(train)
    scoring = Scoring(questions, task, custom_measures(root, settings.metrics))
    labelled = task is not None and not isinstance(task, FinalAnswer)
    likelihoods = _likelihoods(model, test)
    rows = result_rows(BASE, test, task, likelihoods=likelihoods)
    retention = ask(model.model, model.tokenizer, benchmarks, settings.batch_size, BASE)
    metrics: dict[str, Any] = {BASE: {**_perplexity(likelihoods, test), **accuracies(retention)}}
    prompted_answers: dict[str, list[Answer]] = {}
    if questions:
        if task and labelled:
            labels = [label(task, response_text(record["messages"])) for record in examples]
        else:
            labels = [record["category"] or "" for record in examples]
        shots = spread(examples, labels, params.few_shot, compute.seed)
        similar = nearest(examples, questions, params.retrieved) if examples else []
        for name, messages in prompted(params.system_prompt, task, questions, shots, similar).items():
            if model.refuses(messages, scoring.offers, name):
                continue
            reasons = name == "chain_of_thought"
            thinking = params.thinking_tokens if reasons else 0
            answers = model.answer(messages, name, thinking, scoring.offers)
            if reasons and task and labelled:
                answers = [replace(answer, content=conclusion(answer.content, task)) for answer in answers]
            prompted_answers[name] = answers
            metrics[name] = scoring.score(answers)
            lengths = model.prompt_tokens(messages, scoring.offers, thinking)
            rows += result_rows(name, questions, task, answers, lengths)
        if labelled and examples:
            answers = [Answer(text) for text in classify(examples, labels, questions, compute.seed)]
            metrics["tfidf_logistic"] = scoring.score(answers, writes=False)
            rows += result_rows("tfidf_logistic", questions, task, answers)
    write_results(out / "results.parquet", rows)
    write_table(out / "retention.parquet", retention, retention_schema())
    return Report(metrics=metrics, checks=[answers_are_not_empty(prompted_answers, "warn")])


def _likelihoods(model: EvaluatedModel, test: Sequence[dict[str, Any]]) -> list[tuple[float, int]]:
    """Those of the base model; empty if its own chat template refuses a test example.

    Variants are then trained with another template.
    """
    try:
        return model.likelihood(test, BASE)
    except InputError as error:
        log.warning(f"the perplexity of the base model is left out: {error.what}")
        return []


def _perplexity(likelihoods: Sequence[tuple[float, int]], test: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return perplexity_interval(likelihoods, [unit(record) for record in test]) if likelihoods else {}
