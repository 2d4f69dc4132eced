"""The comparison table ranks what was measured, and advice claims no more than the intervals allow."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from builders.browser import CHROMIUM, needs_chromium

from dagster_project.__main__ import main
from dagster_project.cli.parser import parser
from dagster_project.core.context import Documents
from dagster_project.core.layout import measured_path, report_of
from dagster_project.core.records import write_json, write_records
from dagster_project.evaluation.comparison import advice, board, headline, recommended
from dagster_project.evaluation.metrics import Task, measures, score
from dagster_project.evaluation.paired.bootstrap import FEWEST
from dagster_project.evaluation.samples import sample
from dagster_project.lineage.attribution.gradients import REFUSED
from dagster_project.training.inference.answers import Answer
from dagster_project.views.comparison import NOT_ASKED, Sample, Why, _measured, _why, comparison_page, draw_comparison

TASK = Task(fields={"category": ["login", "billing"]}, score="category")
TABLE = measures(TASK, {})
SHOWN = list(TABLE)[:2]
TEST = {"examples": 90, "answered": 80, "seen": 0}
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
    against = {
        name: {"macro_f1": {"difference": gap, "interval": [low, high]}} for name, (gap, low, high) in rivals.items()
    }
    return {**to_base(0.5, 0.4, 0.6), "to": against}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (
            to_rivals(few_shot=(0.3, 0.2, 0.4), tfidf_logistic=(0.1, 0.05, 0.15)),
            (
                "Tuning lora is worth it: +10.0 points of macro-F1 over the best alternative, TF-IDF + logistic"
                " regression (95 % interval +5.0 to +15.0)."
            ),
        ),
        (
            to_rivals(few_shot=(-0.2, -0.3, -0.1), tfidf_logistic=(0.1, 0.05, 0.15)),
            (
                "Tuning lora made it worse: -20.0 points of macro-F1 over the best alternative, base model, worked"
                " examples in the prompt (95 % interval -30.0 to -10.0). Base model, worked examples in the prompt"
                " reaches 125 % of the tuned score at no training cost, for 360 more tokens in each prompt."
            ),
        ),
        (
            to_rivals(system_prompt=(0.1, -0.05, 0.25)),
            (
                "Tuning lora shows no sure gain: +10.0 points of macro-F1 over the best alternative, base model,"
                " instruction only (95 % interval -5.0 to +25.0). Base model, instruction only reaches 88 % of the"
                " tuned score at no training cost, for 55 more tokens in each prompt."
            ),
        ),
        (
            to_rivals(tfidf_logistic=(0.1, -0.05, 0.25)),
            (
                "Tuning lora shows no sure gain: +10.0 points of macro-F1 over the best alternative, TF-IDF + logistic"
                " regression (95 % interval -5.0 to +25.0). TF-IDF + logistic regression reaches 88 % of the tuned"
                " score without tuning a model."
            ),
        ),
        (
            to_base(0.5, 0.4, 0.6),
            "Tuning lora is worth it: perplexity 50.0 % below the base model's (95 % interval 40.0 to 60.0 %).",
        ),
        (
            to_base(1.0, 0.9, 1.1),
            "Tuning lora shows no sure gain: perplexity 0.0 % below the base model's (95 % interval -10.0 to 10.0 %).",
        ),
        ({}, "lora names labels, and there are none to compare."),
    ],
    ids=[
        "worth it",
        "worse",
        "no sure gain",
        "a classifier does",
        "worth it by perplexity",
        "no sure gain by perplexity",
        "nothing",
    ],
)
def test_advice_follows_from_the_interval_to_the_best_alternative(found: dict[str, Any], wanted: str) -> None:
    assert advice("macro_f1", SCORES, {"lora": found}, TEST) == [wanted]


def test_one_of_something_is_not_written_in_the_plural() -> None:
    scores = {"lora": {"macro_f1": 0.8, "prompt_tokens": 40.0}, "few_shot": {"macro_f1": 0.8, "prompt_tokens": 41.4}}
    [said] = advice("macro_f1", scores, {"lora": to_rivals(few_shot=(0.0, -0.1, 0.1))}, TEST)
    assert said.endswith("at no training cost, for 1 more token in each prompt.")
    one = score(TABLE, TRUE[:1], TRUE[:1])
    assert board(SHOWN, {"lora": one}, {})[0].startswith("| 1 test example |")
    assert board(SHOWN, {"lora": {**one, "n_calls": 1}}, {})[0].startswith("| 1 answer |")


def test_advice_on_free_text_includes_likelihood() -> None:
    found = {**to_base(0.5, 0.4, 0.6), "to": {"few_shot": {"rouge_l": {"difference": 0.2, "interval": [0.1, 0.3]}}}}
    scores = {
        name: {"n": 4, "rouge_l": 0.5, "rouge_l_interval": [0.4, 0.6], "exact_match": 0.0}
        for name in ("lora", "few_shot")
    }
    said, _ = advice("rouge_l", scores, {"lora": found}, TEST)
    assert said.startswith("Tuning lora is worth it: +20.0 points of ROUGE-L over the best alternative, ")
    assert said.endswith(" By likelihood: perplexity 50.0 % below the base model's (95 % interval 40.0 to 60.0 %).")


def test_a_higher_perplexity_is_reported_as_worse() -> None:
    assert advice("macro_f1", {}, {"lora": to_base(1.5, 1.4, 1.6)}, TEST) == [
        "Tuning lora made it worse: perplexity 50.0 % above the base model's (95 % interval 40.0 to 60.0 %)."
    ]


def test_every_variant_gets_its_sentence_in_order() -> None:
    words = advice("macro_f1", {}, {"small": to_base(0.5, 0.4, 0.6), "large": to_base(1.5, 1.4, 1.6)}, TEST)
    assert [line.split(":")[0] for line in words] == ["Tuning small is worth it", "Tuning large made it worse"]


@pytest.mark.parametrize(("low", "wanted"), [(0.01, "is better"), (-0.02, "shows no sure gain")])
def test_the_best_variant_is_compared_with_the_others(low: float, wanted: str) -> None:
    scores = {**SCORES, "dora": {"macro_f1": 0.9, "prompt_tokens": 40.0}}
    compared = {
        "lora": to_rivals(few_shot=(0.3, 0.2, 0.4)),
        "dora": to_rivals(few_shot=(0.3, 0.2, 0.4), lora=(0.1, low, 0.2)),
    }
    said = advice("macro_f1", scores, compared, TEST)[2:]
    assert said == [f"dora {wanted}: +10.0 points of macro-F1 over lora (95 % interval {100 * low:+.1f} to +20.0)."]


def test_the_comparison_table_ranks_the_best_first_with_prompt_lengths() -> None:
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


def test_without_answers_the_comparison_table_ranks_by_perplexity() -> None:
    compared = {"worse": to_base(1.2, 1.1, 1.3), "best": to_base(0.5, 0.4, 0.6), "middle": to_base(0.9, 0.8, 1.1)}
    assert board(SHOWN, {}, compared)[2:] == [
        "| **best**, tuned | 0.500 | 0.400 to 0.600 |",
        "| **middle**, tuned | 0.900 | 0.800 to 1.100 |",
        "| **worse**, tuned | 1.200 | 1.100 to 1.300 |",
    ]


COSTS = {
    "lora": {"prompt_tokens": 40.0, "bytes": 9, "tokens": 100},
    "dora": {"prompt_tokens": 40.0, "bytes": 9, "tokens": 200},
}
SURE, UNSURE, WORSE = (0.3, 0.2, 0.4), (0.1, -0.1, 0.3), (-0.1, -0.2, -0.05)


def two(
    lora: tuple[float, float, float], dora: tuple[float, float, float], between: tuple[float, float, float]
) -> dict[str, Any]:
    """Two variants beside worked examples; dora's score is `between` above lora's."""
    gap, low, high = between
    return {"lora": to_rivals(few_shot=lora, dora=(-gap, -high, -low)), "dora": to_rivals(few_shot=dora, lora=between)}


@pytest.mark.parametrize(
    ("compared", "variant", "why"),
    [
        (
            {"lora": to_rivals(few_shot=SURE)},
            "lora",
            "It is surely better than base model, worked examples in the prompt, the best alternative to tuning.",
        ),
        (
            two(SURE, (0.4, 0.3, 0.5), (0.1, 0.05, 0.2)),
            "dora",
            "the best alternative to tuning, and has the best score of the variants.",
        ),
        (
            two(SURE, (0.4, 0.3, 0.5), (0.1, -0.05, 0.2)),
            "lora",
            "dora scores more, but perhaps by chance (+10.0"
            " points of macro-F1 over lora (95 % interval -5.0 to"
            " +20.0)), and costs more.",
        ),
        (
            two((0.4, 0.3, 0.5), SURE, (-0.1, -0.2, 0.05)),
            "lora",
            "tuning. It has the best score; dora may be as good, and cost no less.",
        ),
        (two(SURE, UNSURE, (-0.2, -0.3, -0.1)), "lora", "and has the best score of the variants."),
        (
            {"lora": to_rivals(few_shot=UNSURE)},
            "lora",
            "It has the best score, but is not surely better than base"
            " model, worked examples in the prompt, which costs no"
            " training.",
        ),
        (
            {"lora": to_rivals(few_shot=WORSE)},
            None,
            "Use base model, worked examples in the prompt: no variant is better, and it costs no training.",
        ),
        (
            {"lora": to_base(0.5, 0.4, 0.6), "dora": to_base(0.4, 0.3, 0.5)},
            "dora",
            "the best alternative to tuning,"
            " and has the lowest perplexity of"
            " the variants, which were not"
            " compared with each other.",
        ),
        ({"lora": to_base(1.2, 1.1, 1.3)}, None, "Use the base model: no variant is better, and it costs no training."),
        ({"lora": {}}, None, "No variant has answers or a perplexity to compare."),
    ],
    ids=[
        "one",
        "the better of two",
        "by chance: the cheaper",
        "by chance: the better",
        "only one is sure",
        "none is sure",
        "worse",
        "by perplexity",
        "worse by perplexity",
        "nothing",
    ],
)
def test_the_recommended_variant_is_significantly_best_or_equal_and_cheaper(
    compared: dict[str, Any], variant: str | None, why: str
) -> None:
    found = recommended("macro_f1", SCORES, compared, COSTS, TEST)
    assert found["variant"] == variant and found["why"].endswith(why)
    assert found["sure"] == (variant is not None and "not surely" not in why)


FAILED = "learned of adapter@lora: validation loss 1.2 -> 1.4"


def test_failed_checks_are_named_and_never_called_worth_it() -> None:
    compared = {"lora": {**to_rivals(few_shot=SURE), "failed_checks": [FAILED]}}
    said = advice("macro_f1", SCORES, compared, TEST)[0]
    assert (
        said.startswith("Tuning lora gained, but its checks failed: +30.0 points")
        and FAILED in said
        and "worth it" not in said
    )
    found = recommended("macro_f1", SCORES, compared, COSTS, TEST)
    assert (found["variant"], found["sure"]) == ("lora", False) and FAILED in found["why"]
    assert headline({"compared": compared, "recommended": found}) == "Failed checks: look into lora first."


def test_a_variant_that_passed_its_checks_is_recommended_before_a_better_one_that_did_not() -> None:
    compared = two(SURE, (0.4, 0.3, 0.5), (0.1, 0.05, 0.2))
    compared["dora"]["failed_checks"] = [FAILED]
    found = recommended("macro_f1", SCORES, compared, COSTS, TEST)
    assert (found["variant"], found["sure"]) == ("lora", True)


@pytest.mark.parametrize("gap", [UNSURE, WORSE])
def test_failed_checks_are_named_also_without_a_gain(gap: tuple[float, float, float]) -> None:
    [said] = advice("macro_f1", SCORES, {"lora": {**to_rivals(few_shot=gap), "failed_checks": [FAILED]}}, TEST)
    assert said.endswith(f"Failed checks: {FAILED}.")


@pytest.mark.parametrize(
    ("answered", "found"),
    [(FEWEST - 1, to_rivals(few_shot=SURE)), (1, to_base(0.5, 0.4, 0.6)), (0, to_base(1.5, 1.4, 1.6))],
)
def test_nothing_is_concluded_from_a_few_answers(answered: int, found: dict[str, Any]) -> None:
    test = {"examples": answered, "answered": answered, "seen": 0}
    said = advice("macro_f1", SCORES if "to" in found else {}, {"lora": found}, test)
    assert said[0].startswith(f"Nothing can be concluded from {answered} test example") and "splits.test" in said[0]
    assert not any(word in line for line in said for word in ("worth it", "is better", "made it worse"))
    told = recommended("macro_f1", SCORES, {"lora": found}, COSTS, test)
    assert (told["variant"], told["sure"]) == (None, False) and told["why"].startswith("Nothing can be concluded")
    scores = SCORES if "to" in found else {}
    assert headline({"compared": {}, "recommended": told, "test": test, "scores": scores}) == "No conclusion."


def test_from_the_fewest_answers_on_a_gain_counts() -> None:
    test = {"examples": FEWEST, "answered": FEWEST, "seen": 0}
    assert advice("macro_f1", SCORES, {"lora": to_rivals(few_shot=SURE)}, test)[0].startswith("Tuning lora is worth it")


def test_among_several_variants_the_simultaneous_interval_decides() -> None:
    compared = {name: to_rivals(few_shot=SURE) for name in ("lora", "dora")}
    compared["lora"]["to"]["dora"] = compared["dora"]["to"]["lora"] = to_rivals(dora=SURE)["to"]["dora"]
    scores = {**SCORES, "dora": SCORES["lora"]}
    assert recommended("macro_f1", scores, compared, COSTS, TEST)["sure"]
    for found in compared.values():
        for by_measure in found["to"].values():
            by_measure["macro_f1"]["simultaneous_interval"] = [-0.01, 0.5]
    said = advice("macro_f1", scores, compared, TEST)
    assert [line.split(":")[0] for line in said] == [
        "Tuning lora shows no sure gain",
        "Tuning dora shows no sure gain",
        "lora shows no sure gain",
    ]
    assert all("(simultaneous 95 % interval -1.0 to +50.0)" in line for line in said)
    assert not recommended("macro_f1", scores, compared, COSTS, TEST)["sure"]


def test_by_likelihood_too_the_simultaneous_interval_decides() -> None:
    found = to_base(0.9, 0.8, 0.95)
    assert advice("macro_f1", {}, {"lora": found}, TEST)[0].startswith("Tuning lora is worth it")
    found["perplexity_to_base"]["simultaneous_interval"] = [0.75, 1.01]
    [said] = advice("macro_f1", {}, {"lora": found}, TEST)
    assert said == (
        "Tuning lora shows no sure gain: perplexity 10.0 % below the base model's (simultaneous 95 % interval -1.0 to"
        " 25.0 %)."
    )


def test_a_recommendation_from_an_interval_that_includes_0_names_the_uncertainty() -> None:
    compared = {"lora": to_rivals(few_shot=UNSURE)}
    found = recommended("macro_f1", SCORES, compared, COSTS, TEST)
    assert headline({"compared": compared, "recommended": found}) == "No sure gain: lora." and not found["sure"]


def test_open_text_names_ballots_and_a_judge_as_the_next_step_and_labels_do_not() -> None:
    scores = {name: {"rouge_l": 0.5} for name in ("lora", "few_shot")}
    found = {"to": {"few_shot": {"rouge_l": {"difference": 0.2, "interval": [0.1, 0.3]}}}}
    assert "`pedigree ballots export`" in advice("rouge_l", scores, {"lora": found}, TEST)[-1]
    assert "pedigree judge" in advice("rouge_l", scores, {"lora": found}, TEST)[-1]
    assert "ballots" not in "".join(advice("macro_f1", SCORES, {"lora": to_rivals(few_shot=SURE)}, TEST))


RETENTION = {
    "overall": {
        "accuracy": {"base": 0.8, "tuned": 0.75, "difference": -0.05, "interval": [-0.1, 0.0]},
        "gold_log_likelihood": {"difference": -0.2, "interval": [-0.3, -0.1]},
        "questions": 60,
    }
}
HOSTILE = "</script><script>alert(1)</script><img src=http://x onerror=alert(1)>"


def document(**more: Any) -> dict[str, Any]:
    labels = {"few_shot": ["login"] * 8, "lora": [*TRUE[:7], "login"]}
    scores = {name: score(TABLE, TRUE, found) | {"prompt_tokens": 40.0} for name, found in labels.items()}
    whole = {
        "test": {"examples": 9, "answered": 8, "seen": 0},
        "shown": SHOWN,
        "scores": scores,
        "compared": {"lora": {**to_rivals(few_shot=SURE), "retention": RETENTION}},
        "costs": {"few_shot": {"prompt_tokens": 400.0, "bytes": 10**6}, "lora": COSTS["lora"]},
        "advice": [HOSTILE],
        "recommended": {"variant": "lora", "sure": True, "instead": "few_shot", "why": "It is better."},
        **more,
    }
    return {"headline": headline(whole), **whole}


def samples() -> list[Sample]:
    """Of lora's three answers one is right, one wrong as all are, and one wrong that another system gets right."""
    marks = {"right": (1.0, 1.0), "wrong as all are": (0.0, 0.0), "wrong alone": (0.0, 1.0)}
    return [
        Sample(name, HOSTILE, HOSTILE, {"lora": (HOSTILE, ours), "few_shot": ("x", theirs)})
        for name, (ours, theirs) in marks.items()
    ]


def test_the_page_shows_advice_scores_costs_and_the_worst_errors_first() -> None:
    shown = comparison_page(document(), samples(), {"lora": {"training_seconds": 150.2, "peak_memory_bytes": 1.4e9}})
    text = re.sub("<[^>]+>", "|", shown)
    assert "|Use lora.|" in text and "9 test examples, none of them seen in training; 8 of them scored" in text
    assert "scored" not in comparison_page(document(test={"examples": 9, "answered": 9, "seen": 0}), samples(), {})
    for figure in ("0.873", "400", "100 tokens", "150 s", "1,400 MB", "0.750 (-5.0 points)", "1 MB"):
        assert f"|{figure}|" in text, figure
    assert "|-5.0 points|" in text and "|-0.100 to +0.000|" in text and "|-0.300 to -0.100|" in text
    places = [text.index(f"|{sample.prompt}|") for sample in samples()]
    assert places[2] < places[1] < places[0], "wrong where another is right, wrong where all are, right"
    assert re.findall('data-wrong="([^"]*)"', shown) == ["0", "0 1", ""]
    assert shown == comparison_page(
        document(), samples()[::-1], {"lora": {"training_seconds": 150.2, "peak_memory_bytes": 1.4e9}}
    )


def test_the_page_names_no_classifier_category_or_wrong_answer_where_there_is_none() -> None:
    """Free text has many right answers, and its score is only a similarity to one of them."""
    of_text = {"n": 8, "rouge_l": 0.4, "rouge_l_interval": [0.3, 0.5], "exact_match": 0.0, "prompt_tokens": 9.0}
    free = document(shown=["rouge_l", "exact_match"], scores=dict.fromkeys(("lora", "few_shot"), of_text))
    plain = [Sample("Hi", "Hello", None, {"lora": ("Bye", 0.0), "few_shot": ("Hey", 0.25)})]
    shown, labels = comparison_page(free, plain, {}), comparison_page(document(), samples(), {})
    for words in ("Category", "✕ wrong", "Worst errors", "Wrong<select", "classical classifier"):
        assert words not in shown, words
    assert "|0.00|" in re.sub("<[^>]+>", "|", shown) and "Lowest scores of" in shown
    assert "Category<select" in labels and "✕ wrong" in labels and "Worst errors of" in labels
    calls = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    assert "✕ wrong" in comparison_page(free, [replace(plain[0], reference_message=calls)], {})
    scores = {**document()["scores"], "tfidf_logistic": document()["scores"]["lora"]}
    answered = [replace(one, answers={**one.answers, "tfidf_logistic": ("x", 1.0)}) for one in samples()]
    assert "classical classifier, in gray" in comparison_page(document(scores=scores), answered, {})


def test_the_title_of_the_scores_counts_questions_not_test_examples() -> None:
    """Of a conversation with tools several turns are asked, and the deciding measure covers some of them."""
    scores = {name: {**found, "n": 21} for name, found in document()["scores"].items()}
    shown = comparison_page(document(scores=scores), samples(), {})
    assert "macro-F1 on 21 questions" in shown and "on 8 questions" not in shown
    test = {**document()["test"], "questions": 13}
    scores = {name: {**found, "n_text": 13, "n_calls": 8} for name, found in scores.items()}
    assert "macro-F1 on 13 questions" in comparison_page(document(scores=scores, test=test), samples(), {})
    assert board(SHOWN, {"lora": {**score(TABLE, TRUE[:1], TRUE[:1]), "n_calls": 8}}, {}, 13)[0].startswith(
        "| 13 answers |"
    )


def test_the_page_names_failed_checks_and_does_not_call_the_variant_the_one_to_use() -> None:
    compared = {"lora": {**to_rivals(few_shot=SURE), "failed_checks": [FAILED]}}
    told = {"variant": "lora", "sure": False, "instead": "few_shot", "why": f"Its checks failed: {FAILED}."}
    shown = comparison_page(document(compared=compared, recommended=told), samples(), {})
    text = re.sub("<[^>]+>", "|", shown)
    assert "look into lora first" in text and "validation loss 1.2 -&gt; 1.4" in text and "|failed checks|" in text
    assert "Use lora" not in text and 'class="verdict warn"' in shown


def test_the_page_escapes_all_text_and_needs_no_network() -> None:
    shown = comparison_page(document(), samples(), {})
    assert shown.count("<script") == 1 and "<img" not in shown and "src=" not in re.sub("&lt;.*?&gt;", "", shown)
    assert "training |" not in shown and "peak memory" not in shown, "what was not measured here has no column"


def test_wrong_answers_of_supervised_variants_come_with_the_command_that_asks_why() -> None:
    """The command line asks this very question, and the page of its answer is linked once it exists."""
    rows = [
        Sample("Where's it?", "x", None, {"lora": ("$(rm) `a`", 0.0), "few_shot": ("y", 0.0)}),
        Sample("right", "x", None, {"lora": ("x", 1.0), "few_shot": ("x", 1.0)}),
        Sample("hidden\u200b", "x", None, {"lora": ("z", 0.0), "few_shot": ("y", 0.0)}),
        Sample("empty", "x", None, {"lora": (" ", 0.0), "few_shot": ("y", 0.0)}),
        Sample("several turns", "x", None, {"lora": ("z", 0.0), "few_shot": ("y", 0.0)}),
    ]
    systems = {(row.prompt, "x"): "Be brief.\nUse JSON." for row in rows[:-1]}
    shown = comparison_page(document(), rows, {}, Why({"lora": "0" * 64}, systems))
    [command] = commands(shown)
    parts = shlex.split(command)
    page = parts.pop()
    assert parts == [
        *("pedigree", "why", "merged@lora", "--system", "Be brief.\nUse JSON.", "--prompt", "Where's it?"),
        *("--answer", "$(rm) `a`", "--index", "--html"),
    ]
    assert page.startswith("data/pages/why/") and "<a href=" not in shown.partition('id="samples"')[2]
    name = page.rpartition("/")[2]
    assert f'<a href="../why/{name}">' in comparison_page(
        document(), rows, {}, Why({"lora": "0" * 64}, systems, frozenset({name}))
    )
    assert f"../why/{name}" not in comparison_page(
        document(), rows, {}, Why({"lora": "1" * 64}, systems, frozenset({name}))
    ), "the page is of an earlier model"
    assert "pedigree why " not in comparison_page(document(), rows, {}, Why({}, systems)), (
        "an aligned variant cannot be asked"
    )


def commands(page: str) -> list[str]:
    """Those that ask why, on a comparison page."""
    return [html.unescape(found) for found in re.findall("<code>(pedigree why .*?)</code>", page, re.DOTALL)]


def test_the_command_has_the_system_prompt_of_the_test_question_and_is_understood(tmp_path: Path) -> None:
    """From the files of a project. Questions that the command line cannot ask,
    and variants that have no training, have none."""

    def record(i: int, *messages: tuple[str, str]) -> dict[str, Any]:
        turns = [{"role": role, "content": text} for role, text in [*messages, ("assistant", "x")]]
        return {"example_id": f"{i:032}", "source": "a.jsonl", "messages": turns, "category": None, "meta": "{}"}

    triage, user = ("system", "Triage."), "user"
    asked = [
        record(0, triage, (user, "-one")),
        record(1, (user, "two")),
        record(2, triage, (user, "a"), ("assistant", "b"), (user, "c")),
        record(3, triage, (user, "four")),
        record(4, ("system", "Reply."), (user, "four")),
    ]
    write_records(tmp_path / "data/splits/test", asked)
    variants = {
        "lora": {"steps": 1},
        "both": {"merge_of": {"lora": 1}},
        "own": {"command": "python train.py"},
        "words": {"steps": 1},
    }
    for name, training in variants.items():
        write_json(tmp_path / f"data/adapter/{name}/training.json", training)
        write_json(
            tmp_path / f"data/adapter/{name}/method.json", {"method": "prompt_tuning" if name == "words" else "lora"}
        )
        write_json(tmp_path / f"data/reports/merged/{name}.json", {"output_sha256": name})
    samples = [
        sample(one, {name: Answer("-z") for name in ("lora", "few_shot")}, {"lora": 0.0, "few_shot": 0.0})
        for one in asked
    ]
    out, pages = tmp_path / "data/comparison", tmp_path / "data/pages/comparison"
    write_json(out / "comparison.json", document())
    trained = dict.fromkeys(variants, "adapter") | {"dpo": "aligned"}
    write_json(pages / "samples.json", {"headline": "", "trained": trained, "samples": samples})
    draw_comparison(Documents(tmp_path, "comparison", out, pages, {}))
    found = [
        parser().parse_args(shlex.split(command)[1:]) for command in commands((pages / "comparison.html").read_text())
    ]
    assert sorted((one.prompt, one.system, one.answer, one.model, one.index) for one in found) == [
        ("-one", "Triage.", "-z", "merged@lora", True),
        ("two", "", "-z", "merged@lora", True),
    ]
    view = _why(Documents(tmp_path, "comparison", out, pages, {}), {"trained": trained})
    assert view.models == {"lora": "lora"}
    assert REFUSED.keys() == NOT_ASKED, "methods that the command refuses have none on the page"


def test_the_time_of_a_variant_is_that_of_the_trainings_whose_tokens_are_counted(tmp_path: Path) -> None:
    """An aligned variant starts from an SFT variant, and a merged one from its parents."""

    def ran(address: str, seconds: float, memory: float, **report: Any) -> None:
        write_json(tmp_path / report_of(address), {"output_sha256": "0", **report})
        times = {"training_seconds": seconds} if seconds else {}
        write_json(measured_path(tmp_path, address), {"output_sha256": "0", "peak_memory_bytes": memory, **times})

    ran("adapter@lora", 620.2, 3e9)
    ran("adapter@dora", 100.0, 4e9)
    write_json(tmp_path / report_of("adapter@both"), {"output_sha256": "0", "merge_of": {"dora": 1, "lora": 1}})
    write_json(tmp_path / report_of("adapter@soup"), {"output_sha256": "0", "merge_of": {"both": 1, "lora": 1}})
    ran("aligned@dpo", 260.7, 2e9, adapter="lora")
    ran("aligned@kto", 10.0, 1e9, adapter="both")
    ran("adapter@unknown", 0, 1e9)
    ran("aligned@lost", 10.0, 1e9, adapter="unknown")
    ran("aligned@damaged", 10.0, 1e9, adapter="lora")
    (tmp_path / report_of("aligned@damaged")).write_text("{")
    documents = Documents(tmp_path, "comparison", tmp_path, tmp_path, {})
    assert _measured(documents, "aligned@damaged") == {}
    found = {
        address: tuple(_measured(documents, address).values())
        for address in (
            "adapter@lora",
            "adapter@both",
            "adapter@soup",
            "aligned@dpo",
            "aligned@kto",
            "aligned@lost",
            "adapter@new",
        )
    }
    assert found == {
        "adapter@lora": (620.2, 3e9),
        "adapter@both": (pytest.approx(720.2), 4e9),
        "adapter@soup": (pytest.approx(720.2), 4e9),
        "aligned@dpo": (pytest.approx(880.9), 3e9),
        "aligned@kto": (pytest.approx(730.2), 4e9),
        "aligned@lost": (1e9,),
        "adapter@new": (),
    }


def test_without_answers_the_page_compares_perplexities() -> None:
    compared = {"lora": to_base(0.5, 0.4, 0.6), "dora": to_base(0.4, 0.3, 0.5)}
    shown = comparison_page(document(scores={}, compared=compared), [], {})
    assert shown.index("1 dora") < shown.index("2 lora") and "0.300 to 0.500" in shown and 'id="samples"' not in shown


@pytest.mark.browser
@needs_chromium
def test_in_a_browser_answers_are_filtered_without_a_request_or_an_error_and_nothing_is_wider_than_a_phone(
    tmp_path: Path,
) -> None:
    from playwright.sync_api import sync_playwright

    (tmp_path / "page.html").write_text(comparison_page(document(), samples() * 5, {}), encoding="utf-8")
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 400, "height": 900})
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
        tab.goto((tmp_path / "page.html").as_uri())
        visible = tab.locator("#samples > article:visible")
        assert (visible.count(), tab.locator("#hits").inner_text()) == (10, "10 of 15 questions")
        tab.get_by_role("button", name="Show more").click()
        assert visible.count() == 15 and not tab.get_by_role("button", name="Show more").is_visible()
        tab.get_by_label("Wrong").select_option("lora")
        assert visible.count() == 10
        tab.get_by_label("Right").select_option("base model, worked examples in the prompt")
        assert visible.count() == 5 and all("wrong alone" in text for text in visible.all_inner_texts())
        tab.get_by_label("Words").fill("as all are")
        assert (visible.count(), tab.locator("#hits").inner_text()) == (0, "No question fits the filter")
        assert tab.evaluate("document.documentElement.scrollWidth") == 400
        browser.close()
    assert wrong == []


NEAR = {  # system -> score, tokens of a prompt, tokens of the training
    "lora": (0.807, 57, 95_000), "dora": (0.806, 57, 95_000), "dpo": (0.805, 57, 95_010), "loha": (0.805, 58, 94_000),
    "vera": (0.804, 57, 95_000), "ia3": (0.684, 57, 91_000), "an-adapter-with-a-rather-long-name": (0.676, 57, 90_000),
    "tfidf_logistic": (0.679,), "retrieved": (0.363, 57), "few_shot": (0.03, 59), "zero_shot": (0.01, 57),
}  # fmt: skip


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [360, 1000])
def test_in_a_browser_systems_with_nearly_equal_scores_and_costs_cover_neither_each_other_nor_a_label(
    width: int, tmp_path: Path
) -> None:
    from playwright.sync_api import sync_playwright

    scores = {
        name: {"n": 192, **dict.fromkeys(SHOWN, value), "macro_f1_interval": [max(0.0, value - 0.06), value + 0.05]}
        for name, (value, *_) in NEAR.items()
    }
    costs = {name: dict(zip(("prompt_tokens", "tokens"), of, strict=False)) for name, (_, *of) in NEAR.items()}
    compared = {name: to_rivals(few_shot=SURE) for name, of in NEAR.items() if len(of) == 3}
    page = comparison_page(document(scores=scores, costs=costs, compared=compared), [], {})
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.goto((tmp_path / "page.html").as_uri())
        plots = tab.evaluate("""() => [...document.querySelectorAll("svg:has(.spot)")].map((plot) => {
            const box = (shape) => ["left", "right", "top", "bottom"].map((at) => shape.getBoundingClientRect()[at]);
            return { all: box(plot), spots: [...plot.querySelectorAll(".spot")].map(box),
                     labels: [...plot.querySelectorAll(".marked")].map(box) };
        })""")
        browser.close()
    assert [(len(plot["spots"]), len(plot["labels"])) for plot in plots] == [(10, 1), (7, 1)]
    for plot in plots:
        for one, other in combinations([*plot["spots"], *plot["labels"]], 2):
            apart = one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]
            assert apart, (one, other)
        assert all(plot["all"][0] <= one[0] and one[1] <= plot["all"][1] for one in plot["spots"])


def test_compare_prints_the_table_or_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dvc.yaml").write_text("")
    assert main(["compare", "--project", str(tmp_path)]) == 2
    assert "`dvc repro comparison` makes it" in capsys.readouterr().err
    (tmp_path / "data/comparison").mkdir(parents=True)
    (tmp_path / "data/comparison/board.md").write_text("| a board |\n\nUse it.\n")
    (tmp_path / "data/comparison/comparison.json").write_text(json.dumps({"scores": {}}))
    assert main(["compare", "--project", str(tmp_path)]) == 0 and capsys.readouterr().out == "| a board |\n\nUse it.\n"
    assert main(["compare", "--json", "--project", str(tmp_path)]) == 0 and json.loads(capsys.readouterr().out) == {
        "scores": {}
    }
