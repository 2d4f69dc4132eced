"""Scores equal scikit-learn's, labels are read as documented, and intervals are paired."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.metrics import f1_score

from dagster_project.evaluation.metrics import (
    NO_LABEL,
    Task,
    follows,
    label,
    macro_f1,
    macro_f1_difference,
    macro_f1_interval,
    parse,
    perplexity_ratio,
    score,
)

TASK = Task(fields={"summary": [], "category": ["login", "billing", "bug"]}, score="category")
TRUE = ["login", "billing", "bug"] * 20
GOOD = [*TRUE[:54], "login", "login", "login", "bug", "bug", NO_LABEL]
POOR = [*TRUE[:30], *["login"] * 30]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), min_size=1, max_size=30))
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    true, predicted = (np.array(column) for column in zip(*pairs, strict=True))
    wanted = f1_score(true, predicted, labels=range(4), average="macro", zero_division=np.nan)
    assert macro_f1(true, predicted, 4) == pytest.approx(wanted)


def test_macro_f1_of_many_draws_is_macro_f1_of_each() -> None:
    true, predicted = np.array([[0, 1, 2], [2, 2, 0]]), np.array([[0, 1, 1], [2, -1, 0]])
    assert macro_f1(true, predicted, 3).tolist() == [float(macro_f1(t, p, 3)) for t, p in zip(true, predicted, strict=True)]


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
def test_an_answer_follows_the_task_with_exactly_its_fields_and_allowed_values(value: dict[str, Any] | None, wanted: bool) -> None:
    assert follows(TASK, value) is wanted


@pytest.mark.parametrize("answer", ["", "no", "{", '"x"', "[{}]", "null", "[" * 100_000, "1" * 5000], ids=lambda answer: answer[:9])
def test_what_is_no_json_object_parses_to_none(answer: str) -> None:
    assert parse(answer) is None


def test_rates_count_over_all_answers() -> None:
    references = ['{"summary": "a", "category": "bug"}', '{"summary": "b", "category": "login"}'] * 2
    answers = ['{"summary": "z", "category": "bug"}', "login", '{"category": "bug"}', "who knows"]
    found = score(TASK, references, answers)
    assert {name: found[name] for name in ("n", "valid_json", "follows_schema", "accuracy", "fields")} == {
        "n": 4,
        "valid_json": 0.5,
        "follows_schema": 0.25,
        "accuracy": 0.75,
        "fields": {"category": 0.5},
    }
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-4)


@pytest.mark.parametrize("predicted", [GOOD, POOR, [NO_LABEL] * 60, TRUE], ids=["good", "poor", "none", "perfect"])
def test_an_interval_contains_its_point_estimate(predicted: list[str]) -> None:
    found = macro_f1_interval(TASK, TRUE, predicted)
    low, high = found["macro_f1_interval"]
    assert 0 <= low <= found["macro_f1"] <= high <= 1
    assert (low < high) == (predicted in (GOOD, POOR))


def test_a_system_does_not_differ_from_itself() -> None:
    assert macro_f1_difference(TASK, TRUE, POOR, POOR) == {"difference": 0, "interval": [0, 0]}


def test_a_difference_is_paired_and_changes_sign_with_its_sides() -> None:
    found, turned = macro_f1_difference(TASK, TRUE, GOOD, POOR), macro_f1_difference(TASK, TRUE, POOR, GOOD)
    points = [macro_f1_interval(TASK, TRUE, predicted)["macro_f1"] for predicted in (GOOD, POOR)]
    low, high = found["interval"]
    assert 0 < low <= found["difference"] <= high
    assert found["difference"] == pytest.approx(points[0] - points[1], abs=2e-4)
    assert (turned["difference"], turned["interval"]) == (-found["difference"], [-high, -low])


def test_the_perplexity_ratio_of_a_model_to_itself_is_one() -> None:
    scores = [(3.5, 4), (0.2, 1), (40.0, 9)]
    assert perplexity_ratio(scores, scores) == {"ratio": 1, "interval": [1, 1]}


def test_a_perplexity_ratio_is_that_of_the_two_perplexities() -> None:
    ours, theirs = [(1.0, 2), (4.0, 6)], [(3.0, 2), (6.0, 6)]
    found = perplexity_ratio(ours, theirs)
    assert found["ratio"] == pytest.approx(np.exp(5 / 8) / np.exp(9 / 8), abs=1e-4)
    assert found["interval"][0] <= found["ratio"] <= found["interval"][1] < 1


@pytest.mark.parametrize("scored", ["summary", "colour"])
def test_a_task_must_score_a_field_that_lists_its_labels(scored: str) -> None:
    with pytest.raises(ValidationError, match=f"'{scored}' must be one of `fields` and list its labels"):
        Task(fields=TASK.fields, score=scored)
