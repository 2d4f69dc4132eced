"""Worked examples cover the labels, retrieval finds what is alike, and the classical classifier classifies."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from dagster_project.evaluation.baselines import classify, instruction, nearest, spread, with_shots
from dagster_project.evaluation.metrics import Task

TASK = Task(fields={"summary": [], "category": ["login", "billing"]}, score="category")


def record(name: str, question: str = "?", answer: str = "!") -> dict[str, Any]:
    return {"example_id": name, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


LABELS = ["login"] * 20 + ["billing"] * 3 + ["bug"] * 1
RECORDS = [record(f"{label}-{i}") for i, label in enumerate(LABELS)]


@pytest.mark.parametrize(
    ("n", "wanted"),
    [
        (3, {"login": 1, "billing": 1, "bug": 1}),
        (5, {"login": 2, "billing": 2, "bug": 1}),
        (8, {"login": 4, "billing": 3, "bug": 1}),
        (99, {"login": 20, "billing": 3, "bug": 1}),
    ],
)
def test_chosen_examples_cover_the_labels_as_evenly_as_can_be(n: int, wanted: dict[str, int]) -> None:
    names = [chosen["example_id"] for chosen in spread(RECORDS, LABELS, n, seed=7)]
    assert len(set(names)) == len(names)
    assert Counter(name.split("-")[0] for name in names) == wanted


def test_the_choice_depends_on_the_seed_and_not_on_the_order_of_the_records() -> None:
    chosen = spread(RECORDS, LABELS, 6, seed=7)
    assert spread(RECORDS[::-1], LABELS[::-1], 6, seed=7) == chosen
    assert spread(RECORDS, LABELS, 6, seed=8) != chosen


def test_the_most_similar_example_is_found_and_stands_last() -> None:
    train = [
        record("parcel", "my parcel has not arrived yet"),
        record("twin", "the invoice shows a charge I never made"),
        record("cousin", "the invoice is missing"),
        record("login", "cannot sign in with my password"),
    ]
    asked = [record("a", "the invoice shows a charge that I never made"), record("b", "password refused, cannot sign in")]
    found = nearest(train, asked, 2)
    assert [example["example_id"] for example in found[0]] == ["cousin", "twin"]
    assert found[1][-1]["example_id"] == "login"
    assert [len(row) for row in nearest(train, asked, 99)] == [4, 4]


def test_a_prompt_with_shots_shows_the_shots_and_never_the_answer_asked_for() -> None:
    shot, asked = record("shot", "Is it up?", "yes"), record("asked", "Is it down?", "the secret")
    assert with_shots(TASK, [shot], asked) == [
        {"role": "system", "content": instruction(TASK)},
        {"role": "user", "content": "Is it up?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Is it down?"},
    ]


def test_the_instruction_names_every_field_and_every_allowed_value() -> None:
    assert '"summary": a few words; "category": login or billing' in instruction(TASK)


def test_two_obvious_classes_are_told_apart() -> None:
    train = [record(f"l{i}", f"cannot sign in with password {i}") for i in range(5)]
    train += [record(f"b{i}", f"charged twice on invoice {i}") for i in range(5)]
    asked = [record("x", "invoice charged wrongly"), record("y", "my password will not sign me in")]
    assert classify(train, ["login"] * 5 + ["billing"] * 5, asked, seed=7) == ["billing", "login"]
