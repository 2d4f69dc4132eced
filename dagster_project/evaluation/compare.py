"""Results side by side, and what follows from them in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.evaluation.metrics import Task, macro_f1_interval

NAMES = {
    "zero_shot": "base model, instruction only",
    "few_shot": "base model, worked examples in the prompt",
    "retrieved": "base model, retrieved examples in the prompt",
    "tfidf_logistic": "TF-IDF + logistic regression",
}


def board(task: Task | None, true: Sequence[str], labels: Mapping[str, Sequence[str]], compared: Mapping[str, Any]) -> list[str]:
    """A Markdown table, best first where there is a label to score, else by perplexity."""
    if task and labels:
        scored = {name: macro_f1_interval(task, true, found) for name, found in labels.items()}
        order = sorted(scored, key=lambda name: -scored[name]["macro_f1"])
        hits = {name: sum(a == b for a, b in zip(true, labels[name], strict=True)) / len(true) for name in order}
        return [f"| {len(true)} test examples | macro-F1 | 95 % interval | accuracy |", "| --- | ---: | :---: | ---: |"] + [
            f"| {NAMES.get(name, f'**{name}**, tuned')} | {scored[name]['macro_f1']:.3f} | {scored[name]['macro_f1_interval'][0]:.3f} to {scored[name]['macro_f1_interval'][1]:.3f} | {hits[name]:.3f} |"
            for name in order
        ]
    order = sorted(
        (name for name in compared if "perplexity_to_base" in compared[name]),
        key=lambda name: compared[name]["perplexity_to_base"]["ratio"],
    )
    return ["| variant | perplexity as a share of the base model's | 95 % interval |", "| --- | ---: | :---: |"] + [
        f"| **{name}**, tuned | {c['ratio']:.3f} | {c['interval'][0]:.3f} to {c['interval'][1]:.3f} |"
        for name in order
        for c in [compared[name]["perplexity_to_base"]]
    ]


def advice(compared: Mapping[str, Any]) -> list[str]:
    """For each variant one sentence: worth it, not worth it, or not shown; with the figures that say so."""
    return [_verdict(name, found) for name, found in compared.items()]


def _verdict(name: str, found: Mapping[str, Any]) -> str:
    against = found.get("macro_f1_to")
    if against:
        rival = min(against, key=lambda other: against[other]["difference"])
        gap, (low, high) = against[rival]["difference"], against[rival]["interval"]
        figures = f"{100 * gap:+.1f} points of macro-F1 over the best alternative, {NAMES[rival]} (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    elif "perplexity_to_base" not in found:
        return f"{name} names labels, and there are none to compare."
    else:
        ratio = found["perplexity_to_base"]
        gap, low, high = 1 - ratio["ratio"], 1 - ratio["interval"][1], 1 - ratio["interval"][0]
        figures = f"perplexity {100 * gap:.1f} % below the base model's (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    if low > 0:
        return f"Tuning {name} is worth it: {figures}."
    if high < 0:
        return f"Tuning {name} made it worse: {figures}."
    return f"Tuning {name} shows no sure gain: {figures}."
