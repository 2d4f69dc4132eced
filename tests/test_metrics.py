"""Scores equal scikit-learn's, labels are read as documented, and intervals are paired."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.metrics import f1_score

from dagster_project.core.records import write_json
from dagster_project.evaluation.metrics import (
    NO_LABEL,
    Task,
    follows,
    label,
    macro_f1,
    measures,
    parse,
    perplexity,
    perplexity_interval,
    rouge_l,
    score,
    token_f1,
)
from dagster_project.evaluation.paired.bootstrap import (
    difference,
    drawn_differences,
    estimate,
    rate,
    ratio,
    simultaneous_intervals,
)

TASK = Task(fields={"summary": [], "category": ["login", "billing", "bug"]}, score="category")
TABLE, TEXT = measures(TASK, {}), measures(None, {})
TRUE = ["login", "billing", "bug"] * 20
GOOD = [*TRUE[:54], "login", "login", "login", "bug", "bug", NO_LABEL]
POOR = [*TRUE[:30], *["login"] * 30]
SAID = ["the parcel is late", "please wait a day", "", "it is on its way to you", "no"]
WANTED = ["your parcel is late", "please wait for a day", "hello there", "it is on its way", "no"]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), min_size=1, max_size=30))
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    true, predicted = (np.array(column) for column in zip(*pairs, strict=True))
    wanted = f1_score(true, predicted, labels=range(4), average="macro", zero_division=np.nan)
    task = Task(fields={"letter": list("abcd")}, score="letter")
    names = [["abcd"[k] if k >= 0 else NO_LABEL for k in column] for column in (true, predicted)]
    assert macro_f1(measures(task, {})["macro_f1"].statistics(*names).sum(0)) == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["macro_f1", "bleu", "chrf", "rouge_l", "summary.token_f1", "category.precision"])
def test_an_interval_is_that_of_resampled_examples(name: str) -> None:
    """By the book: draw examples with replacement, score the drawn ones, take the central 95 %."""
    references = [f'{{"summary": "{text}", "category": "{kind}"}}' for text, kind in zip(WANTED, TRUE, strict=False)]
    answers = [f'{{"summary": "{text}", "category": "{kind}"}}' for text, kind in zip(SAID, GOOD[::-1], strict=False)]
    measure = TABLE[name]
    drawn = np.random.default_rng(0).integers(0, 5, (2000, 5))
    by_hand = [
        measure.combine(measure.statistics([references[i] for i in d], [answers[i] for i in d]).sum(0))
        for d in drawn[:40]
    ]
    statistics = measure.statistics(references, answers)
    scores = measure.combine(np.stack([np.bincount(draw, minlength=5) for draw in drawn]) @ statistics)
    assert scores[:40] == pytest.approx(np.array(by_hand))
    value, (low, high) = estimate(measure.combine, statistics)
    assert [low, high] == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=1e-4)
    assert low <= value <= high and low < high


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    from sacrebleu import corpus_bleu, corpus_chrf

    found = score(TEXT, WANTED, SAID)
    assert found["bleu"] == pytest.approx(corpus_bleu(SAID, [WANTED]).score, abs=1e-4)
    assert found["chrf"] == pytest.approx(corpus_chrf(SAID, [WANTED]).score, abs=1e-4)


@pytest.mark.parametrize(
    ("reference", "answer", "tokenizer"),
    [
        ("退款将在五个工作日内到账，请重启 WordPress。", "退款会在五个工作日内到账，请重启 WordPress。", "zh"),
        ("今日は天気がいいので、公園へ行きましょう。", "今日は天気がいいから、公園へ行きましょう。", "char"),
        ("กรุณารีสตาร์ทเครื่อง", "กรุณารีสตาร์ทเครื่องใหม่", "char"),
        ("오늘은 날씨가 아주 좋아요.", "오늘은 날씨가 아주 나빠요.", "13a"),
        ("Please restart your router, 王先生.", "Please restart the router, 王先生.", "13a"),
    ],
)
def test_bleu_of_scripts_without_spaces_is_not_that_of_whole_sentences(
    reference: str, answer: str, tokenizer: str
) -> None:
    from sacrebleu import corpus_bleu

    found = score(TEXT, [reference, reference], [answer, reference])["bleu"]
    assert found == pytest.approx(
        corpus_bleu([answer, reference], [[reference, reference]], tokenize=tokenizer).score, abs=1e-4
    )
    assert 50 < found < 100


@pytest.mark.parametrize(
    ("reference", "answer", "rouge", "tokens"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75, 0.75),
        ("police killed the gunman", "the gunman killed police", 0.5, 1.0),
        ("Police killed, the gunman!", "police killed the gunman", 1.0, 1.0),
        ("a b a b", "b a b a", 0.75, 1.0),
        ("a", "a a a", 0.5, 0.5),
        ("fährt über", "er fährt", 0.5, 0.5),
        ("something", "", 0.0, 0.0),
        ("...", "", 0.0, 0.0),
        ("", " ", 1.0, 1.0),
        ("👍", "👎", 0.0, 0.0),
        ("👍", "👍\n", 1.0, 1.0),
        ("请重启路由器。", "重启路由器", 10 / 11, 10 / 11),
        ("ルーター", "ルータ、", 6 / 7, 6 / 7),
        ("กัน", "กิน", 2 / 3, 2 / 3),
        ("설정을 바꾸세요", "설정 바꾸세요", 12 / 13, 12 / 13),
        ("重启 router_2", "router_2", 0.5, 0.5),
        ("उसने की", "उसने का", 0.5, 0.5),
        ("كِتَاب", "كُتَّاب", 0.0, 0.0),
        ("r\u00e9sum\u00e9", "re\u0301sume\u0301", 1.0, 1.0),
    ],
)
def test_rouge_l_keeps_the_order_of_words_and_token_f1_does_not(
    reference: str, answer: str, rouge: float, tokens: float
) -> None:
    assert (rouge_l(reference, answer), token_f1(reference, answer)) == (rouge, tokens)


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_rouge_l_finds_the_longest_common_subsequence(ours: list[str], theirs: list[str]) -> None:
    longest = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, a in enumerate(ours):
        for j, b in enumerate(theirs):
            longest[i + 1][j + 1] = longest[i][j] + 1 if a == b else max(longest[i][j + 1], longest[i + 1][j])
    wanted = 2 * longest[-1][-1] / (len(ours) + len(theirs)) if ours or theirs else 1
    assert rouge_l(" ".join(ours), " ".join(theirs)) == wanted


def test_a_classifier_is_measured_by_its_labels_alone() -> None:
    assert list(measures(TASK, {}, writes=False)) == ["macro_f1", "accuracy"] == list(TABLE)[:2]
    assert measures(None, {}, writes=False) == {}


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ('{"summary": "a billing bug", "category": "login"}', "login"),
        ('{"category": "bug"}', "bug"),
        ("It is a Billing matter, not a bug.", "billing"),
        ('{"summary": "a bug", "category": "weather"}', "bug"),
        ('{"category": ["login"]}', "login"),
        ("[1, 2]", NO_LABEL),
        ("debugging", NO_LABEL),
        ("", NO_LABEL),
    ],
    ids=[
        "field before text",
        "field alone",
        "first named",
        "no such label",
        "field of another type",
        "no object",
        "part of a word",
        "nothing",
    ],
)
def test_a_label_is_the_json_field_else_the_first_label_named_else_none(answer: str, wanted: str) -> None:
    assert label(TASK, answer) == wanted


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"summary": "anything", "category": "bug"}, True),
        ({"category": "bug", "summary": ""}, True),
        ({"summary": "x", "category": "weather"}, False),
        ({"summary": 3, "category": "bug"}, False),
        ({"category": "bug"}, False),
        ({"summary": "x", "category": "bug", "more": "y"}, False),
        (None, False),
    ],
)
def test_an_answer_follows_the_task_with_exactly_its_fields_and_allowed_values(
    value: dict[str, Any] | None, wanted: bool
) -> None:
    assert follows(TASK, value) is wanted


@pytest.mark.parametrize("labels", [["bug", "bug report", ""], ["", "bug report", "bug"]])
def test_of_labels_at_the_same_place_the_longest_is_named_and_the_empty_one_never(labels: list[str]) -> None:
    task = Task(fields={"category": labels}, score="category")
    assert label(task, "It is a bug report.") == "bug report"
    assert label(task, "It is a bug.") == "bug"
    assert label(task, '{"kind": 1}') == NO_LABEL
    assert label(task, '{"category": ""}') == ""


@pytest.mark.parametrize("labels", [["Bug", "bug"], ["bug", "Bug"]])
def test_the_label_in_the_same_case_counts_if_labels_differ_only_in_case(labels: list[str]) -> None:
    """The classical classifier answers with a label alone."""
    task = Task(fields={"category": labels}, score="category")
    for name in labels:
        assert [label(task, text) for text in (name, f"It is a {name}.", json.dumps({"category": name}))] == [name] * 3


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("我要退款。", "退款"),
        ("这是bug问题", "bug"),
        ("debug", NO_LABEL),
        ("非退款不可", "非退款"),
        ('{"category": "Bug", "summary": "退款"}', "bug"),
        ("वह हाँ कहता है", NO_LABEL),
        ("उत्तर: हा।", "हा"),
    ],
    ids=[
        "in a sentence",
        "between Chinese characters",
        "part of a word",
        "longer",
        "other case",
        "before a vowel sign",
        "in Hindi",
    ],
)
def test_labels_are_found_without_spaces_around_them_and_in_another_case(answer: str, wanted: str) -> None:
    task = Task(fields={"category": ["bug", "退款", "非退款", "हा"], "summary": []}, score="category")
    assert label(task, answer) == wanted


@pytest.mark.parametrize(
    "answer",
    ["", "no", "{", '"x"', "[{}]", "null", '{"a": NaN}', '{"a": -1e999}', "[" * 100_000, "1" * 5000],
    ids=lambda answer: answer[:9],
)
def test_text_without_a_json_object_parses_to_none(answer: str) -> None:
    assert parse(answer) is None


def test_rates_count_over_all_answers_and_precision_over_those_that_give_an_allowed_value() -> None:
    references = ['{"summary": "a", "category": "bug"}', '{"summary": "b c", "category": "login"}'] * 2
    answers = [
        '{"summary": "z", "category": "bug"}',
        "login",
        '{"category": "bug"}',
        '{"summary": "c", "category": "weather"}',
    ]
    found = score(TABLE, references, answers)
    assert {name: found[name] for name in ("n", "valid_json", "follows_schema", "accuracy", "exact_match")} == {
        "n": 4,
        "valid_json": 0.75,
        "follows_schema": 0.25,
        "accuracy": 0.75,
        "exact_match": 0.0,
    }
    assert (found["category.accuracy"], found["category.precision"]) == (0.5, 1.0)
    assert found["summary.token_f1"] == pytest.approx((2 / 3) / 4, abs=1e-4)
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-4)


def test_an_answer_without_a_field_is_wrong_where_the_reference_leaves_it_empty() -> None:
    references = ['{"summary": "", "category": "bug"}', '{"summary": "0", "category": "bug"}']
    scores = [
        score(TABLE, references, answers)["summary.token_f1"]
        for answers in (["bug"] * 2, ['{"summary": ""}', '{"summary": 0}'])
    ]
    assert scores == [0.0, 1.0]


@pytest.mark.parametrize("predicted", [GOOD, POOR, [NO_LABEL] * 60, TRUE], ids=["good", "poor", "none", "perfect"])
def test_an_interval_contains_its_point_estimate(predicted: list[str]) -> None:
    found = score(TABLE, TRUE, predicted)
    for name in ("macro_f1", "accuracy"):
        low, high = found[f"{name}_interval"]
        assert 0 <= low <= found[name] <= high <= 1
        assert (low < high) == (predicted in (GOOD, POOR))


def apart(ours: list[str], theirs: list[str]) -> dict[str, Any]:
    measure = TABLE["macro_f1"]
    return difference(measure.combine, measure.statistics(TRUE, ours), measure.statistics(TRUE, theirs))


def accuracies(shares: list[float], examples: int, seed: int) -> list[np.ndarray]:
    """Right answers and examples of systems whose answers are right independently of each other, each (examples, 2)."""
    right = np.random.default_rng(seed).random((len(shares), examples)) < np.array(shares)[:, None]
    return [np.stack([one, np.ones(examples)], 1) for one in right.astype(float)]


def simulated(variants: int) -> dict[str, float]:
    """Share of 200 test sets on which one of several variants seems to differ from the alternative, which is no worse
    and no better than any: by intervals that are each at 95 %, and by simultaneous ones."""
    wrong = {"alone": 0, "simultaneous": 0}
    for seed in range(200):
        alternative, *systems = accuracies([0.7] * (variants + 1), 120, seed)
        drawn = [drawn_differences(rate, system, alternative) for system in systems]
        alone = [difference(rate, system, alternative)["interval"] for system in systems]
        for kind, intervals in (("alone", alone), ("simultaneous", simultaneous_intervals(drawn))):
            wrong[kind] += any(low > 0 or high < 0 for low, high in intervals)
    return {kind: count / 200 for kind, count in wrong.items()}


def test_of_many_equal_variants_one_rarely_seems_to_differ_by_simultaneous_intervals() -> None:
    found = simulated(12)
    assert found["alone"] > 0.2, "each alone at 95 %, some of many differ by chance"
    assert found["simultaneous"] < 0.09  # 0.05 and twice the standard error of 200 trials


def test_simultaneous_intervals_contain_most_draws_at_once_and_each_interval_alone() -> None:
    alternative, *systems = accuracies([0.6, 0.6, 0.7, 0.8], 90, 1)
    drawn = [drawn_differences(rate, system, alternative) for system in systems]
    found = simultaneous_intervals(drawn)
    within = np.all(
        [(low - 1e-4 <= one) & (one <= high + 1e-4) for one, (low, high) in zip(drawn, found, strict=True)], axis=0
    )
    assert within.mean() == pytest.approx(0.95, abs=0.02)
    for system, (low, high) in zip(systems, found, strict=True):
        alone = difference(rate, system, alternative)["interval"]
        assert low <= alone[0] < alone[1] <= high


def test_the_same_comparison_twice_is_as_sure_as_once() -> None:
    alternative, system = accuracies([0.6, 0.7], 90, 1)
    drawn = drawn_differences(rate, system, alternative)
    alone = difference(rate, system, alternative)["interval"]
    assert simultaneous_intervals([drawn]) == simultaneous_intervals([drawn] * 2)[:1] == [alone]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_few_different_values_do_not_make_an_interval_narrower_than_alone(wrong: int) -> None:
    alternative, system = np.ones((30, 2)), np.ones((30, 2))
    system[:wrong, 0] = 0
    alone = difference(rate, system, alternative)["interval"]
    assert simultaneous_intervals([drawn_differences(rate, system, alternative)]) == [alone]


def test_a_system_does_not_differ_from_itself() -> None:
    assert apart(POOR, POOR) == {"difference": 0, "interval": [0, 0]}


def test_a_difference_is_paired_and_changes_sign_with_its_sides() -> None:
    found, turned = apart(GOOD, POOR), apart(POOR, GOOD)
    points = [score(TABLE, TRUE, predicted)["macro_f1"] for predicted in (GOOD, POOR)]
    low, high = found["interval"]
    assert 0 < low <= found["difference"] <= high
    assert found["difference"] == pytest.approx(points[0] - points[1], abs=2e-4)
    assert (turned["difference"], turned["interval"]) == (-found["difference"], [-high, -low])


def test_the_perplexity_ratio_of_a_model_to_itself_is_one() -> None:
    scores = np.array([(3.5, 4), (0.2, 1), (40.0, 9)])
    assert ratio(perplexity, scores, scores) == {"ratio": 1, "interval": [1, 1]}


def test_a_perplexity_without_a_finite_likelihood_is_null_and_states_why() -> None:
    found = perplexity_interval([(1.0, 2), (math.nan, 3), (math.inf, 1), (0.0, 0)], ["a", "b", "c", "d"])
    why = "the likelihood of 2 of 3 test answers is not a finite number"
    assert found == {"perplexity": None, "perplexity_unknown": why}


def test_a_document_has_null_instead_of_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    document = {"loss": math.nan, "curve": [{"step": 1, "loss": -math.inf}], "accuracy": 0.5}
    write_json(tmp_path / "a.json", document)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "loss": None,
        "curve": [{"step": 1, "loss": None}],
        "accuracy": 0.5,
        "not_finite": {"loss": "nan", "curve[0].loss": "-inf"},
    }


def test_a_perplexity_ratio_is_that_of_the_two_perplexities() -> None:
    ours, theirs = np.array([(1.0, 2), (4.0, 6)]), np.array([(3.0, 2), (6.0, 6)])
    found = ratio(perplexity, ours, theirs)
    assert found["ratio"] == pytest.approx(np.exp(5 / 8) / np.exp(9 / 8), abs=1e-4)
    assert found["interval"][0] <= found["ratio"] <= found["interval"][1] < 1


def independent(scores: list[tuple[float, int]]) -> dict[str, Any]:
    return perplexity_interval(scores, [str(i) for i in range(len(scores))])


def test_perplexity_weighs_every_token_the_same_and_has_an_interval() -> None:
    found = independent([(float(np.log(2)), 1), (float(3 * np.log(4)), 3)])
    assert found == {"perplexity": pytest.approx(2**0.25 * 4**0.75, abs=1e-4), "perplexity_interval": [2.0, 4.0]}


def test_answers_without_tokens_do_not_count_in_a_perplexity() -> None:
    scores = [(2.0, 1), (0.5, 1)]
    assert independent([*scores, *[(0.0, 0)] * 20]) == independent(scores)
    assert independent([(0.0, 0)]) == independent([]) == {}


def test_a_label_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="category lists 'bug' more than once"):
        Task(fields={"category": ["bug", "idea", "bug"]}, score="category")


def test_the_name_for_answers_without_a_label_is_refused_as_a_label() -> None:
    with pytest.raises(ValidationError, match=r"category: '\(none\)' is reserved for answers without a label"):
        Task(fields={"category": ["bug", NO_LABEL]}, score="category")
    Task(fields={"category": ["bug"], "summary": [NO_LABEL, "some"]}, score="category")


@pytest.mark.parametrize("scored", ["summary", "colour"])
def test_a_task_must_score_a_field_that_lists_its_labels(scored: str) -> None:
    with pytest.raises(ValidationError, match=f"'{scored}' must be one of `fields` and list its labels"):
        Task(fields=TASK.fields, score=scored)
