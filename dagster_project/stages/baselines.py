"""base_model + splits -> baselines. Scores of the untuned model and of a classical classifier on the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.params import Compute, Section
from dagster_project.core.records import Report, read_records, response_text, write_table
from dagster_project.evaluation.baselines import THINK, classify, conclusion, instruction, nearest, spread, with_shots
from dagster_project.evaluation.custom_metrics import custom_measures
from dagster_project.evaluation.evaluator import (
    EvaluatedModel,
    Settings,
    result_rows,
    result_schema,
    select_questions,
    with_prompt_and_response,
    with_task_answers,
)
from dagster_project.evaluation.metrics import by_label, label, measures, perplexity_interval, score
from dagster_project.evaluation.retention import accuracies, ask, read_benchmarks, retention_schema


class Params(Section):
    """What the untuned model reaches with prompts alone. See docs/evaluation.md."""

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
    """Nothing beyond types."""


def run(ctx: StageContext) -> Report:
    return produce(
        ctx.root, ctx.params("baselines", Params), ctx.params("evaluation", Settings), ctx.compute,
        ctx.output_of("base_model"), ctx.output_of("splits"), out=ctx.out,
    )  # fmt: skip


def produce(root: Path, params: Params, settings: Settings, compute: Compute, base_model: Path, splits: Path, out: Path) -> Report:
    benchmarks = read_benchmarks(root, settings.benchmarks)
    train, test = read_records(splits / "train"), read_records(splits / "test")
    task, questions = select_questions(test, settings, train)
    model = EvaluatedModel(base_model, compute, settings)
    examples = with_task_answers(train, task) if task else with_prompt_and_response(train)
    custom = custom_measures(root, settings.metrics)
    references = [response_text(record["messages"]) for record in questions]
    likelihoods = model.likelihood(test, "base")
    rows = result_rows("base", test, task, likelihoods=likelihoods)
    retention = ask(model.model, model.tokenizer, benchmarks, settings.batch_size, "base")
    metrics: dict[str, Any] = {"base": {**(perplexity_interval(likelihoods) if test else {}), **accuracies(retention)}}
    if questions:
        system_prompt = params.system_prompt or (instruction(task) if task else "")
        prompts = {"zero_shot": [with_shots("", [], record) for record in questions]}
        if system_prompt:
            prompts["system_prompt"] = [with_shots(system_prompt, [], record) for record in questions]
        if task:
            prompts["chain_of_thought"] = [with_shots(instruction(task, THINK), [], record) for record in questions]
        if examples:
            labels = [label(task, response_text(record["messages"])) if task else record["category"] or "" for record in examples]
            shots = spread(examples, labels, params.few_shot, compute.seed)
            prompts["few_shot"] = [with_shots(system_prompt, shots, record) for record in questions]
            similar = nearest(examples, questions, params.retrieved)
            prompts["retrieved"] = [
                with_shots(system_prompt, retrieved, record) for retrieved, record in zip(similar, questions, strict=True)
            ]
        for name, messages in prompts.items():
            if name == "chain_of_thought":
                answers = [conclusion(text) for text in model.answer(messages, name, params.thinking_tokens)]
            else:
                answers = model.answer(messages, name)
            metrics[name] = score(measures(task, custom), references, answers) | by_label(task, references, answers)
            rows += result_rows(name, questions, task, answers, model.prompt_tokens(messages))
        if task and examples:
            answers = classify(examples, labels, questions, compute.seed)
            metrics["tfidf_logistic"] = score(measures(task, custom, writes=False), references, answers) | by_label(
                task, references, answers
            )
            rows += result_rows("tfidf_logistic", questions, task, answers)
    write_table(out / "results.parquet", rows, result_schema())
    write_table(out / "retention.parquet", retention, retention_schema())
    return Report(metrics=metrics)
