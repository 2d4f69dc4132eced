"""base_model + splits -> baselines. What the untuned model and a classical classifier reach on the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.params import Compute, Section
from dagster_project.core.records import Report, read_records, response_text, write_table
from dagster_project.evaluation.baselines import THINK, classify, conclusion, instruction, nearest, spread, with_shots
from dagster_project.evaluation.custom_metrics import own_measures
from dagster_project.evaluation.evaluator import Settings, Subject, asked, conversations, labelled, result_rows, result_schema
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
    task, questions = asked(test, settings, train)
    subject = Subject(base_model, compute, settings)
    known = labelled(train, task) if task else conversations(train)
    own = own_measures(root, settings.metrics)
    references = [response_text(record["messages"]) for record in questions]
    likelihoods = subject.likelihood(test, "base")
    rows = result_rows("base", test, task, likelihoods=likelihoods)
    kept = ask(subject.model, subject.tokenizer, benchmarks, settings.batch_size, "base")
    metrics: dict[str, Any] = {"base": {**(perplexity_interval(likelihoods) if test else {}), **accuracies(kept)}}
    if questions:
        told = params.system_prompt or (instruction(task) if task else "")
        prompts = {"zero_shot": [with_shots("", [], record) for record in questions]}
        if told:
            prompts["system_prompt"] = [with_shots(told, [], record) for record in questions]
        if task:
            prompts["chain_of_thought"] = [with_shots(instruction(task, THINK), [], record) for record in questions]
        if known:
            labels = [label(task, response_text(record["messages"])) if task else record["category"] or "" for record in known]
            shots = spread(known, labels, params.few_shot, compute.seed)
            prompts["few_shot"] = [with_shots(told, shots, record) for record in questions]
            alike = nearest(known, questions, params.retrieved)
            prompts["retrieved"] = [with_shots(told, found, record) for found, record in zip(alike, questions, strict=True)]
        for name, asked_so in prompts.items():
            if name == "chain_of_thought":
                answers = [conclusion(said) for said in subject.answer(asked_so, name, params.thinking_tokens)]
            else:
                answers = subject.answer(asked_so, name)
            metrics[name] = score(measures(task, own), references, answers) | by_label(task, references, answers)
            rows += result_rows(name, questions, task, answers, subject.prompt_tokens(asked_so))
        if task and known:
            answers = classify(known, labels, questions, compute.seed)
            metrics["tfidf_logistic"] = score(measures(task, own, writes=False), references, answers) | by_label(task, references, answers)
            rows += result_rows("tfidf_logistic", questions, task, answers)
    write_table(out / "results.parquet", rows, result_schema())
    write_table(out / "retention.parquet", kept, retention_schema())
    return Report(metrics=metrics)
