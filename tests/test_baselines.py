"""Few-shot examples cover the labels, retrieval finds similar examples, and the classical classifier classifies."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.core.records import read_table, write_records
from dagster_project.evaluation.baselines import (
    THINK,
    bm25,
    classify,
    conclusion,
    instruction,
    nearest,
    prompted,
    spread,
    with_shots,
)
from dagster_project.evaluation.evaluator import Settings, turn_key
from dagster_project.evaluation.labels import LabelSet
from dagster_project.evaluation.metrics import TERM, Task
from dagster_project.stages import baselines, comparison
from dagster_project.training.inference.answers import Answer

TASK = Task(fields={"summary": [], "category": ["login", "billing"]}, score="category")


def record(name: str, question: str = "?", answer: str = "!") -> dict[str, Any]:
    return {
        "example_id": name,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


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
def test_chosen_examples_cover_the_labels_evenly(n: int, wanted: dict[str, int]) -> None:
    names = [chosen["example_id"] for chosen in spread(RECORDS, LABELS, n, seed=7)]
    assert len(set(names)) == len(names)
    assert Counter(name.split("-")[0] for name in names) == wanted


def test_the_choice_depends_on_the_seed_and_not_on_the_order_of_the_records() -> None:
    chosen = spread(RECORDS, LABELS, 6, seed=7)
    assert spread(RECORDS[::-1], LABELS[::-1], 6, seed=7) == chosen
    assert spread(RECORDS, LABELS, 6, seed=8) != chosen


def test_the_most_similar_example_comes_last() -> None:
    train = [
        record("parcel", "my parcel has not arrived yet"),
        record("twin", "the invoice shows a charge I never made"),
        record("cousin", "the invoice is missing"),
        record("login", "cannot sign in with my password"),
    ]
    asked = [
        record("a", "the invoice shows a charge that I never made"),
        record("b", "password refused, cannot sign in"),
    ]
    found = nearest(train, asked, 2)
    assert [example["example_id"] for example in found[0]] == ["cousin", "twin"]
    assert found[1][-1]["example_id"] == "login"
    assert [len(row) for row in nearest(train, asked, 99)] == [4, 4]


def test_retrieval_ignores_order_and_gives_common_words_little_weight() -> None:
    train = [record(name, f"the {word}") for name, word in (("a", "cat"), ("b", "cat"), ("c", "dog"))]
    asked = [record("x", "the dog"), record("y", "nothing known")]
    found = [[example["example_id"] for example in row] for row in nearest(train, asked, 3)]
    assert found == [["b", "a", "c"], ["c", "b", "a"]]
    assert [[e["example_id"] for e in row] for row in nearest(train[::-1], asked, 3)] == found


def test_bm25_is_the_sum_over_words_of_rarity_times_saturated_count() -> None:
    """By hand, with k1 = 1.5 and b = 0.75: documents of 3 and 1 words, 2 on average."""
    [scores] = bm25(["Late, late parcel", "parcel"], ["late parcel?"])
    late, parcel = math.log(1 + 1.5 / 1.5), math.log(1 + 0.5 / 2.5)
    long, short = 1.5 * (0.25 + 0.75 * 3 / 2), 1.5 * (0.25 + 0.75 * 1 / 2)
    assert scores.tolist() == pytest.approx(
        [late * 2 * 2.5 / (2 + long) + parcel * 2.5 / (1 + long), parcel * 2.5 / (1 + short)]
    )


def test_retrieval_matches_parts_of_a_sentence_without_spaces() -> None:
    [scores] = bm25(["发票金额有误", "无法登录账户"], ["我的发票不见了"])
    assert scores[0] > scores[1] == 0


def test_texts_without_words_match_nothing() -> None:
    assert [scores.tolist() for scores in bm25(["?", "!"], ["...", "a"])] == [[0, 0], [0, 0]]


def test_a_prompt_with_shots_contains_the_shots_and_never_the_expected_answer() -> None:
    shot, asked = record("shot", "Is it up?", "yes"), record("asked", "Is it down?", "the secret")
    shown = [
        {"role": "user", "content": "Is it up?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Is it down?"},
    ]
    assert with_shots("Be brief.", [shot], asked) == [{"role": "system", "content": "Be brief."}, *shown]
    assert with_shots("", [shot], asked) == shown


def test_a_worked_example_of_several_turns_is_the_whole_conversation() -> None:
    """Its last answer alone, after all questions at once, is not what the conversation shows."""
    shot, asked = record("shot", "And lamps?", "Ten days."), record("asked")
    earlier = record("earlier", "Can I return a tent?", "Yes.")["messages"]
    own = {"role": "system", "content": "Own."}
    whole = [*earlier, *shot["messages"]]
    conversation = {**shot, "messages": [own, earlier[0], {**earlier[1], "weight": 0.0}, *shot["messages"]]}
    assert with_shots("", [conversation], asked) == [*whole, asked["messages"][0]]
    two_questions = {**shot, "messages": [earlier[0], *shot["messages"]]}
    assert with_shots("", [two_questions], asked)[0]["content"] == "Can I return a tent?\nAnd lamps?"


def test_the_zero_shot_prompt_has_no_system_prompt_of_the_record() -> None:
    asked = record("asked", "Is it down?", "the secret")
    asked["messages"].insert(0, {"role": "system", "content": "You are tuned."})
    assert with_shots("", [], asked) == [{"role": "user", "content": "Is it down?"}]


@pytest.mark.parametrize(
    ("system_prompts", "stated", "asked_as_variants"),
    [
        (["Opens at 9.", "Opens at 8."], "Be brief.", True),
        (["Opens at 9.", ""], "Be brief.", True),
        (["Opens at 9.", "Opens at 9."], None, True),
        (["Opens at 9.", "Opens at 9."], "Be brief.", False),
        (["", ""], None, False),
    ],
    ids=["different ones", "some have none", "the same, and no other one", "the same, and another one", "none"],
)
def test_the_base_model_gets_the_system_prompts_of_the_variants_too(
    system_prompts: list[str], stated: str | None, asked_as_variants: bool
) -> None:
    questions = [record(f"r{i}", "When?", "At 9.") for i in range(2)]
    for question, said in zip(questions, system_prompts, strict=True):
        question["messages"][:0] = [{"role": "system", "content": said}] if said else []
    asked = prompted(stated, None, questions, [], [[], []])
    assert ("same_prompt" in asked) == asked_as_variants
    if asked_as_variants:
        assert asked["same_prompt"] == [question["messages"][:-1] for question in questions]
    assert asked["zero_shot"] == [[{"role": "user", "content": "When?"}]] * 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(None, ["Opens at 9.", instruction(TASK)]), ("Be brief.", ["Be brief.", "Be brief."])],
    ids=["that of the question, or the task", "the one in params.yaml"],
)
def test_worked_examples_come_after_what_the_question_needs(given: str | None, wanted: list[str]) -> None:
    shot, *questions = (record(f"r{i}", "When?", "At 9.") for i in range(3))
    questions[0]["messages"].insert(0, {"role": "system", "content": "Opens at 9."})
    asked = prompted(given, TASK, questions, [shot], [[shot], [shot]])
    for name in ("few_shot", "retrieved"):
        assert [turns[0]["content"] for turns in asked[name]] == wanted
        assert all([turn["role"] for turn in turns] == ["system", "user", "assistant", "user"] for turns in asked[name])


@pytest.mark.parametrize("said", [instruction(TASK), instruction(TASK, THINK)], ids=["at once", "after thinking"])
def test_the_instruction_names_every_field_and_every_allowed_value(said: str) -> None:
    assert '"summary": a few words; "category": login or billing' in said
    assert ("step by step" in said) == ("nothing else" not in said)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ('It is not login.\n{"category": "billing"}', '{"category": "billing"}'),
        ('First\n{"category": "login"}\n\n{"category": "billing"} \nDone.\n', '{"category": "billing"}'),
        ("Not login.\nBilling.", "Billing."),
        (" \n", ""),
        (
            'So:\n```json\n{\n  "category": "billing",\n  "summary": "x"\n}\n```\n',
            '{\n"category": "billing",\n"summary": "x"\n}',
        ),
        ('{"category": "login"} or\n{"category": "billing"} it is.\nYes.', '{"category": "billing"} it is.'),
        ('{\n"category": "billing",', '{\n"category": "billing",'),
    ],
)
def test_what_counts_after_thinking_is_the_last_line(answer: str, wanted: str) -> None:
    assert conclusion(answer, TASK) == wanted


def test_a_label_after_thinking_is_on_the_last_line_also_where_a_line_of_code_is_above_it() -> None:
    assert conclusion('The message is\n{"a": 1}\nspam', LabelSet(("ham", "spam"))) == "spam"


def test_the_classifier_of_prompts_without_words_predicts_the_most_frequent_label() -> None:
    train = [record(name, name) for name in ("1", "2", "3", "?", "a b")]
    assert (
        classify(train, ["odd", "even", "odd", "even", "odd"], [record("x", "4"), record("y", "some words")], seed=7)
        == ["odd"] * 2
    )
    assert classify(train[:2], ["odd", "even"], [record("x", "4")], seed=7) == ["even"], (
        "of equally frequent ones the first by code point"
    )


def test_the_classifier_separates_two_obvious_classes() -> None:
    train = [record(f"l{i}", f"cannot sign in with password {i}") for i in range(5)]
    train += [record(f"b{i}", f"charged twice on invoice {i}") for i in range(5)]
    asked = [record("x", "invoice charged wrongly"), record("y", "my password will not sign me in")]
    assert classify(train, ["login"] * 5 + ["billing"] * 5, asked, seed=7) == ["billing", "login"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("{}の請求書を再発行してください。", "{}がまだ届きません。"),
        ("请重新开具{}的发票。", "{}还没有送到。"),
        ("ขอใบแจ้งหนี้ของ{}อีกครั้ง", "{}ยังไม่มาถึง"),
    ],
    ids=["ja", "zh", "th"],
)
def test_the_classifier_separates_classes_in_scripts_without_spaces(first: str, second: str) -> None:
    """A sentence there is one word to sklearn, so no prompt would have a word of another."""
    train = [record(f"{i}", text.format(thing)) for i, thing in enumerate("傘机靴本車") for text in (first, second)]
    asked = [record("x", second.format("箱")), record("y", first.format("箱"))]
    assert classify(train, ["billing", "delivery"] * 5, asked, seed=7) == ["delivery", "billing"]


def test_terms_of_the_classifier_are_the_words_of_sklearn_in_scripts_with_spaces() -> None:
    text = "it's a_b x 42 naïve e\u0301lan straße दान दिन العَرَبِيَّة עִבְרִית слово"
    assert re.findall(TERM, text) == re.findall(r"(?u)\b\w\w+\b", text)


class Refusing:
    """A base model whose chat template knows no system prompts."""

    model = tokenizer = None

    def __init__(self, *_: Any) -> None:
        pass

    def likelihood(self, *_: Any) -> list[Any]:
        raise InputError("the chat template refuses it: no system role", "use another chat template")

    def refuses(self, prompts: list[Any], *_: Any) -> bool:
        return any(message["role"] == "system" for prompt in prompts for message in prompt)

    def answer(self, prompts: list[Any], *_: Any) -> list[Answer]:
        return [Answer("!")] * len(prompts)

    def prompt_tokens(self, prompts: list[Any], *_: Any) -> list[int]:
        return [3] * len(prompts)


def test_a_template_that_refuses_the_test_examples_leaves_out_the_perplexity_of_the_base_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [record(f"{i}") | {"source": "s", "category": None, "group_id": None, "meta": "{}"} for i in range(3)]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    write_records(tmp_path / "splits/test", rows)
    (tmp_path / "splits/train").mkdir()
    monkeypatch.setattr(baselines, "EvaluatedModel", Refusing)
    monkeypatch.setattr(baselines, "ask", lambda *_: [])
    with caplog.at_level(logging.WARNING, "pedigree"):
        report = baselines.produce(
            tmp_path, baselines.Params(), Settings(), Compute(), tmp_path, tmp_path / "splits", tmp_path / "out"
        )
    assert "the perplexity of the base model is left out: the chat template refuses it: no system role" in caplog.text
    assert report.metrics["base"] == {} and report.metrics["zero_shot"]["exact_match"] == 1.0
    base = {turn_key(row): row for row in read_table(tmp_path / "out/results.parquet") if row["system"] == "base"}
    tuned = {key: {**row, "nll": 1.0, "tokens": 2} for key, row in base.items()}
    assert len(base) == 3 and comparison._likelihoods(tuned, base, rows) is None
