"""The board ranks what was measured, and advice says no more than the intervals allow."""

from __future__ import annotations

from typing import Any

import pytest

from dagster_project.evaluation.compare import advice, board
from dagster_project.evaluation.metrics import Task, measures, score

TASK = Task(fields={"category": ["login", "billing"]}, score="category")
TABLE = measures(TASK, {})
SHOWN = list(TABLE)[:2]
TRUE = ["login", "billing"] * 4
SCORES: dict[str, dict[str, Any]] = {
    "lora": {"macro_f1": 0.8, "prompt_tokens": 40.0},
    "zero_shot": {"macro_f1": 0.1, "prompt_tokens": 40.0},
    "system_prompt": {"macro_f1": 0.7, "prompt_tokens": 95.4},
    "few_shot": {"macro_f1": 1.0, "prompt_tokens": 400.0},
    "tfidf_logistic": {"macro_f1": 0.7},
}


def to_base(ratio: float, low: float, high: float) -> dict[str, Any]:
    return {"perplexity_to_base": {"ratio": ratio, "interval": [low, high]}}


def to_rivals(**rivals: tuple[float, float, float]) -> dict[str, Any]:
    against = {name: {"macro_f1": {"difference": gap, "interval": [low, high]}} for name, (gap, low, high) in rivals.items()}
    return {**to_base(0.5, 0.4, 0.6), "to": against}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (
            to_rivals(few_shot=(0.3, 0.2, 0.4), tfidf_logistic=(0.1, 0.05, 0.15)),
            "Tuning lora is worth it: +10.0 points of macro-F1 over the best alternative, TF-IDF + logistic regression "
            "(95 % interval +5.0 to +15.0).",
        ),
        (
            to_rivals(few_shot=(-0.2, -0.3, -0.1), tfidf_logistic=(0.1, 0.05, 0.15)),
            "Tuning lora made it worse: -20.0 points of macro-F1 over the best alternative, base model, worked examples in the prompt "
            "(95 % interval -30.0 to -10.0). Base model, worked examples in the prompt reaches 125 % of the tuned score at no training cost, "
            "for 360 more tokens in each prompt.",
        ),
        (
            to_rivals(system_prompt=(0.1, -0.05, 0.25)),
            "Tuning lora shows no sure gain: +10.0 points of macro-F1 over the best alternative, base model, instruction only "
            "(95 % interval -5.0 to +25.0). Base model, instruction only reaches 88 % of the tuned score at no training cost, "
            "for 55 more tokens in each prompt.",
        ),
        (
            to_rivals(tfidf_logistic=(0.1, -0.05, 0.25)),
            "Tuning lora shows no sure gain: +10.0 points of macro-F1 over the best alternative, TF-IDF + logistic regression "
            "(95 % interval -5.0 to +25.0). TF-IDF + logistic regression reaches 88 % of the tuned score without tuning a model.",
        ),
        (to_base(0.5, 0.4, 0.6), "Tuning lora is worth it: perplexity 50.0 % below the base model's (95 % interval 40.0 to 60.0 %)."),
        (
            to_base(1.0, 0.9, 1.1),
            "Tuning lora shows no sure gain: perplexity 0.0 % below the base model's (95 % interval -10.0 to 10.0 %).",
        ),
        ({}, "lora names labels, and there are none to compare."),
    ],
    ids=["worth it", "worse", "no sure gain", "a classifier does", "worth it by perplexity", "no sure gain by perplexity", "nothing"],
)
def test_advice_says_what_the_interval_to_the_best_alternative_shows(found: dict[str, Any], wanted: str) -> None:
    assert advice("macro_f1", SCORES, {"lora": found}) == [wanted]


def test_free_text_is_told_in_likelihood_too() -> None:
    found = {**to_base(0.5, 0.4, 0.6), "to": {"few_shot": {"rouge_l": {"difference": 0.2, "interval": [0.1, 0.3]}}}}
    scores = {name: {"n": 4, "rouge_l": 0.5, "rouge_l_interval": [0.4, 0.6], "exact_match": 0.0} for name in ("lora", "few_shot")}
    [said] = advice("rouge_l", scores, {"lora": found})
    assert said.startswith("Tuning lora is worth it: +20.0 points of ROUGE-L over the best alternative, ")
    assert said.endswith(" By likelihood: perplexity 50.0 % below the base model's (95 % interval 40.0 to 60.0 %).")


def test_a_model_that_grew_worse_by_perplexity_is_called_worse() -> None:
    assert advice("macro_f1", {}, {"lora": to_base(1.5, 1.4, 1.6)})[0].startswith("Tuning lora made it worse: ")


def test_every_variant_gets_its_sentence_in_order() -> None:
    words = advice("macro_f1", {}, {"small": to_base(0.5, 0.4, 0.6), "large": to_base(1.5, 1.4, 1.6)})
    assert [line.split(":")[0] for line in words] == ["Tuning small is worth it", "Tuning large made it worse"]


@pytest.mark.parametrize(("low", "wanted"), [(0.01, "is better"), (-0.02, "is not surely better")])
def test_the_best_variant_is_compared_with_the_others(low: float, wanted: str) -> None:
    scores = {**SCORES, "dora": {"macro_f1": 0.9, "prompt_tokens": 40.0}}
    compared = {"lora": to_rivals(few_shot=(0.3, 0.2, 0.4)), "dora": to_rivals(few_shot=(0.3, 0.2, 0.4), lora=(0.1, low, 0.2))}
    said = advice("macro_f1", scores, compared)[2:]
    assert said == [f"dora {wanted}: +10.0 points of macro-F1 over lora (95 % interval {100 * low:+.1f} to +20.0)."]


def test_the_board_puts_the_best_first_with_what_each_prompt_costs() -> None:
    labels = {"system_prompt": ["login"] * 8, "lora": TRUE, "tfidf_logistic": [*TRUE[:6], "login", "login"]}
    scores = {name: score(TABLE, TRUE, found) for name, found in labels.items()}
    scores["lora"]["prompt_tokens"], scores["system_prompt"]["prompt_tokens"] = 40.4, 95.0
    head, rule, *lines = board(SHOWN, scores, {"lora": to_base(0.5, 0.4, 0.6)})
    assert (head.split("|")[1].strip(), rule.count("|")) == ("8 test examples", 6)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(name, f1, accuracy, tokens) for name, f1, _, accuracy, tokens in cells] == [
        ("**lora**, tuned", "1.000", "1.000", "40"),
        ("TF-IDF + logistic regression", "0.873", "0.875", ""),
        ("base model, instruction only", "0.333", "0.500", "95"),
    ]


def test_without_answers_the_board_ranks_by_perplexity() -> None:
    compared = {"worse": to_base(1.2, 1.1, 1.3), "best": to_base(0.5, 0.4, 0.6), "middle": to_base(0.9, 0.8, 1.1)}
    assert board(SHOWN, {}, compared)[2:] == [
        "| **best**, tuned | 0.500 | 0.400 to 0.600 |",
        "| **middle**, tuned | 0.900 | 0.800 to 1.100 |",
        "| **worse**, tuned | 1.200 | 1.100 to 1.300 |",
    ]
