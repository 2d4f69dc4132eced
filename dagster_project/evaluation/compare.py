"""Results side by side, and what follows from them in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "zero_shot": "base model, the question alone",
    "system_prompt": "base model, instruction only",
    "chain_of_thought": "base model, told to think step by step",
    "few_shot": "base model, worked examples in the prompt",
    "retrieved": "base model, retrieved examples in the prompt",
    "tfidf_logistic": "TF-IDF + logistic regression",
}
"""The alternatives to tuning, in words."""

TITLES = {"macro_f1": "macro-F1", "accuracy": "accuracy", "rouge_l": "ROUGE-L", "exact_match": "exact match"}
"""The measures that the board shows, in words."""

Scores = Mapping[str, Mapping[str, Any]]
"""System -> its measures, and the mean tokens of its prompts if it is a language model."""


def board(shown: Sequence[str], scores: Scores, compared: Mapping[str, Any]) -> list[str]:
    """A Markdown table, best first; by perplexity where there are no answers to score.

    Args:
        shown: the measure that decides, and the one beside it.
    """
    if scores:
        first, second = shown
        n = next(iter(scores.values()))["n"]
        return [
            f"| {n} test examples | {TITLES[first]} | 95 % interval | {TITLES[second]} | prompt tokens |",
            "| --- | ---: | :---: | ---: | ---: |",
        ] + [
            f"| {NAMES.get(name, f'**{name}**, tuned')} | {s[first]:.3f} | {s[f'{first}_interval'][0]:.3f} to {s[f'{first}_interval'][1]:.3f} | {s[second]:.3f} | {_tokens(s)} |"
            for name, s in sorted(scores.items(), key=lambda item: -item[1][first])
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


def _tokens(score: Mapping[str, Any]) -> str:
    return f"{score['prompt_tokens']:.0f}" if "prompt_tokens" in score else ""


def advice(decides: str, scores: Scores, compared: Mapping[str, Any]) -> list[str]:
    """For each variant whether it is worth it, not worth it, or not shown, with the figures that say so; then the variants among themselves."""
    found = [_verdict(name, decides, scores, compared[name]) for name in compared]
    ranked = sorted((name for name in compared if name in scores), key=lambda name: -scores[name][decides])
    return found + [_between(ranked[0], other, decides, compared[ranked[0]]) for other in ranked[1:]]


def _verdict(name: str, decides: str, scores: Scores, found: Mapping[str, Any]) -> str:
    against = {other: differences[decides] for other, differences in found.get("to", {}).items() if other in NAMES}
    more = beside = ""
    if against:
        rival = min(against, key=lambda other: against[other]["difference"])
        gap, (low, high) = against[rival]["difference"], against[rival]["interval"]
        figures = _points(gap, low, high, decides, f"the best alternative, {NAMES[rival]}")
        more = f" {_instead(rival, decides, scores[name], scores[rival])}"
        if decides != "macro_f1" and (
            ratio := found.get("perplexity_to_base")
        ):  # free text has many right answers, and likelihood sees them all
            beside = f" By likelihood: {_below(ratio)[0]}."
    elif "perplexity_to_base" not in found:
        return f"{name} names labels, and there are none to compare."
    else:
        figures, low, high = _below(found["perplexity_to_base"])
    if low > 0:
        return f"Tuning {name} is worth it: {figures}.{beside}"
    if high < 0:
        return f"Tuning {name} made it worse: {figures}.{more}{beside}"
    return f"Tuning {name} shows no sure gain: {figures}.{more}{beside}"


def _below(ratio: Mapping[str, Any]) -> tuple[str, float, float]:
    """A ratio of perplexities in words, and the ends of its interval as a gain."""
    gap, low, high = 1 - ratio["ratio"], 1 - ratio["interval"][1], 1 - ratio["interval"][0]
    return f"perplexity {100 * gap:.1f} % below the base model's (95 % interval {100 * low:.1f} to {100 * high:.1f} %)", low, high


def _points(gap: float, low: float, high: float, decides: str, rival: str) -> str:
    return f"{100 * gap:+.1f} points of {TITLES[decides]} over {rival} (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"


def _instead(rival: str, decides: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What the best alternative reaches, and what it costs."""
    share = f"{100 * theirs[decides] / ours[decides]:.0f} % of" if ours[decides] else "at least"
    if "prompt_tokens" not in theirs:
        cost = "without tuning a model"
    else:
        longer = round(theirs["prompt_tokens"] - ours.get("prompt_tokens", 0))
        cost = "at no training cost" + (f", for {longer} more tokens in each prompt" if longer > 0 else "")
    return f"{NAMES[rival][0].upper()}{NAMES[rival][1:]} reaches {share} the tuned score {cost}."


def _between(best: str, other: str, decides: str, found: Mapping[str, Any]) -> str:
    gap, (low, high) = found["to"][other][decides]["difference"], found["to"][other][decides]["interval"]
    verdict = "is better" if low > 0 else "is not surely better"
    return f"{best} {verdict}: {_points(gap, low, high, decides, other)}."
