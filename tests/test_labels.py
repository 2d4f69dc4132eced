"""A table of text and label is a classification set: read without a mapping,
scored by its labels, compared like any other task."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders.records import said, stored, user
from builders.sources import to_records
from conftest import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from dagster_project.core.errors import InputError
from dagster_project.core.params import parse
from dagster_project.core.records import example_id, read_records, read_table
from dagster_project.curation.check_files import check_paths
from dagster_project.curation.sources.files import read_rows
from dagster_project.curation.sources.formats import kind, mapping_problem
from dagster_project.evaluation.baselines import THINK, instruction
from dagster_project.evaluation.evaluator import EvaluatedModel, Settings, select_questions
from dagster_project.evaluation.labels import NO_LABEL, LabelSet, LabelTask, label_set
from dagster_project.evaluation.metrics import by_label, label, measures, score
from dagster_project.stages import instructions, raw_examples, splits
from dagster_project.training.inference.answers import Answer

AUTO = LabelTask(labels="auto")
NAMES = LabelSet(("negative", "Not sure", "positive", "yes, please"))


def record(text: str, response: str) -> dict[str, Any]:
    return stored(user(text), said(response), category=response)


def write_csv(path: Path, *rows: tuple[str, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def read(path: Path, rows: list[dict[str, Any]], **how: Any) -> tuple[str, list[tuple[str, str | None, Any]]]:
    """The layout, and of each record the response (or problem), category and meta."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout, records = to_records(path, path.name, **how)
    metas = [json.loads(r["meta"]) for r in records]
    found = [
        r["messages"][-1]["content"] if r["messages"] else m["problem"] for r, m in zip(records, metas, strict=True)
    ]
    return layout, [(said, r["category"], meta) for said, r, meta in zip(found, records, metas, strict=True)]


# What an answer says


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("positive", "positive"),
        (" Positive.\n", "positive"),
        ('"POSITIVE".', "positive"),
        ("**positive**!!", "positive"),
        ("positive\n\nThe review praises the soup.", "positive"),
        ("not   sure…", "Not sure"),
        ("Yes, please!", "yes, please"),
        ("ｐｏｓｉｔｉｖｅ", "positive"),
        ("The label is positive", NO_LABEL),
        ("negative, positive", NO_LABEL),
        ("neutral", NO_LABEL),
        ("I think:\npositive", NO_LABEL),
        ("positives", NO_LABEL),
        ("", NO_LABEL),
        (" \n ", NO_LABEL),
        (".", NO_LABEL),
    ],
)
def test_an_answer_is_a_label_up_to_case_quotes_final_punctuation_and_further_lines(answer: str, wanted: str) -> None:
    assert label(NAMES, answer) == wanted


def test_a_label_of_punctuation_only_is_a_label() -> None:
    names = label_set(AUTO, ["?", "!", "?", "!"], [])
    assert (names.labels, label(names, "?"), label(names, ""), label(names, "?!")) == (
        ["!", "?"],
        "?",
        NO_LABEL,
        NO_LABEL,
    )


# Which labels there are


def test_auto_is_every_different_response_of_training_in_its_most_frequent_spelling() -> None:
    train = ["spam", "Spam", "spam.", "spam", "ham", "Ham ", "Ham", "ham", "Ham"]
    assert label_set(AUTO, train, ["ham"]) == LabelSet(("Ham", "spam"))


def test_a_label_only_in_the_test_split_is_scored_but_not_in_the_prompt() -> None:
    names = label_set(AUTO, ["spam", "ham"] * 3, ["spam", "Scam", "scam", "scam"])
    assert names == LabelSet(("ham", "spam"), ("scam",))
    assert "scam" not in instruction(names)
    found = score(measures(names, {}), ["spam", "scam", "scam"], ["spam", "spam", "Scam."])
    assert (found["accuracy"], found["valid_label"]) == (0.6667, 1.0)
    assert by_label(names, ["spam", "scam"], ["spam", "spam"])["by_label"]["scam"] == {
        "n": 1, "predicted": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([f"answer {i}" for i in range(201)] * 3, "201 different responses in the 603 examples"),
        (["yes", "yes", "a long story", "another one", "a third"], "4 different responses in the 5 examples"),
        ([], "0 different responses in the 0 examples"),
    ],
)
def test_auto_refuses_responses_that_are_not_labels(train: list[str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        label_set(AUTO, train, [])
    assert words in caught.value.what and "evaluation.task.labels" in caught.value.what
    assert "list the labels" in caught.value.hint and "leave evaluation.task out" in caught.value.hint
    assert len(label_set(AUTO, [f"answer {i}" for i in range(200)] * 2, []).labels) == 200


def test_the_refusal_names_the_most_frequent_responses_and_no_long_text() -> None:
    with pytest.raises(InputError) as caught:
        label_set(AUTO, ["no"] * 3 + ["yes"] * 2 + ["x" * 999] + [f"word {i}" for i in range(9)], [])
    assert "'no' (3), 'yes' (2)" in caught.value.what and len(caught.value.what) < 400


def test_a_response_without_a_label_is_refused() -> None:
    with pytest.raises(InputError, match=r"of the training split is reserved for answers without a label"):
        label_set(AUTO, ["(none)", "some"] * 4, [])
    with pytest.raises(InputError, match=r"of the test split is reserved for answers without a label"):
        label_set(AUTO, ["spam", "ham"] * 4, ["ham", " (None). "])  # else any answer without a label would be right


def test_a_label_list_that_matches_no_test_response_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"no response of the test split is one of 'spam', 'ham'; the most frequent are '1' \(2\), '0' \(1\)",
    ):
        select_questions(
            [record("a", "1"), record("b", "1"), record("c", "0")], Settings(task=LabelTask(labels=["spam", "ham"]))
        )


def test_with_a_list_of_labels_only_test_examples_with_a_label_are_used() -> None:
    rows = [record("a", "spam"), record("b", "Ham."), record("c", "Dear customer, thank you")]
    task, questions = select_questions(rows, Settings(task=LabelTask(labels=["spam", "ham"])))
    assert isinstance(task, LabelSet) and questions == rows[:2]


@pytest.mark.parametrize(
    ("task", "what"),
    [
        ({"labels": [0, 1]}, "evaluation.task.labels: must be `auto`, or a list of labels as text; quote numbers"),
        ({"labels": []}, "evaluation.task.labels: must be `auto`, or a list"),
        ({"labels": "all"}, "evaluation.task.labels: must be `auto`, or a list"),
        ({"labels": ["yes", "Yes."]}, "evaluation.task.labels: 'yes', 'Yes.' are one label"),
        ({"labels": ["(none)", "x"]}, "evaluation.task.labels: '(none)' is reserved for answers without a label"),
        ({"labels": "auto", "score": "x"}, "evaluation.task.score: unknown key\nhint: keys of evaluation.task: labels"),
        (
            {"fields": {"a": ["b"]}, "score": "a", "label": "c"},
            "evaluation.task.label: unknown key\nhint: keys of evaluation.task: fields, score",
        ),
        ({}, "evaluation.task.fields: missing"),
    ],
)
def test_a_wrong_task_is_one_message_with_its_place(task: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(Settings, {"task": task}, "evaluation")
    assert f"params.yaml: {what}" in str(caught.value) and "form:" not in str(caught.value)


# Scores

ANSWERS = {
    "negative": 0,
    "NEGATIVE.": 0,
    "Not sure": 1,
    '"not sure"': 1,
    "positive\nbecause": 2,
    "Yes, please.": 3,
    "": -1,
    "no idea": -1,
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES.labels), st.sampled_from(sorted(ANSWERS))), min_size=1, max_size=30))
def test_scores_of_a_label_task_are_those_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    true, said = ([*column] for column in zip(*pairs, strict=True))
    given_labels = [NAMES.labels[ANSWERS[answer]] if ANSWERS[answer] >= 0 else "invalid" for answer in said]
    found, table = score(measures(NAMES, {}), true, said), by_label(NAMES, true, said)["by_label"]
    occurring = [name for name in NAMES.labels if name in true or name in given_labels]
    assert found["macro_f1"] == pytest.approx(
        f1_score(true, given_labels, labels=occurring, average="macro", zero_division=0), abs=1e-4
    )
    assert found["accuracy"] == pytest.approx(accuracy_score(true, given_labels), abs=1e-4)
    assert found["valid_label"] == pytest.approx(sum(name != "invalid" for name in given_labels) / len(said), abs=1e-4)
    wanted = precision_recall_fscore_support(true, given_labels, labels=NAMES.labels, zero_division=0)
    for i, name in enumerate(NAMES.labels):
        figures = [table[name][key] for key in ("precision", "recall", "f1", "n")]
        assert figures == pytest.approx([column[i] for column in wanted], abs=1e-4)


def test_the_instruction_lists_the_labels_at_once_and_after_thinking() -> None:
    assert instruction(NAMES).endswith(
        "one of these labels and nothing else: negative; Not sure; positive; yes, please."
    )
    assert "step by step" in instruction(NAMES, THINK) and "yes, please." in instruction(NAMES, THINK)


# Reading


@pytest.mark.parametrize(
    ("row", "said", "meta"),
    [
        ({"text": "Hi", "label": "ham "}, "ham", {}),
        ({"text": "Hi", "label": 0}, "0", {}),
        ({"text": "Hi", "label": False}, "false", {}),
        ({"text": "Hi", "label": 2, "label_text": "neutral"}, "neutral", {"label": 2}),
        ({"text": "Hi", "label": 2, "label_text": None}, "2", {}),
        ({"text": "Hi", "label": "ham", "id": 7, "category": "mail"}, "ham", {"id": 7, "category": "mail"}),
    ],
)
def test_text_and_label_are_a_classification_set_and_the_label_is_the_category(
    row: Any, said: str, meta: Any, tmp_path: Path
) -> None:
    assert read(tmp_path / "a.jsonl", [row]) == ("classification", [(said, said, meta)])


@pytest.mark.parametrize("value", [None, 0.5, ["ham"]])
def test_an_invalid_label_makes_its_row_malformed(value: Any, tmp_path: Path) -> None:
    [good, bad] = read(tmp_path / "a.jsonl", [{"text": "Hi", "label": "ham"}, {"text": "Hi", "label": value}])[1]
    assert good[0] == "ham" and bad[0].startswith("expected a label (text, a whole number, true or false), found ")


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": "Hi", "completion": "Hello", "label": True, "text": "Hi Hello"}, "preferences"),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: A",
                "rejected": "\n\nHuman: Hi\n\nAssistant: B",
                "label": 1,
                "text": "x",
            },
            "preferences",
        ),
        ({"messages": record("Hi", "Hello")["messages"], "label": "ham", "text": "Hi"}, "messages"),
        ({"instruction": "Hi", "output": "Hello", "text": "x", "label": "y"}, "alpaca"),
        ({"prompt": "Hi", "completion": "Hello", "label": "spam"}, "prompt_completion"),
    ],
)
def test_a_label_column_in_another_layout_is_not_a_classification_set(
    row: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert (kind(read_rows(path)) if layout == "preferences" else to_records(path, "a.jsonl")[0]) == layout


def test_one_column_may_be_response_and_category(tmp_path: Path) -> None:
    mapping = {"prompt": "review", "response": "stars", "category": "stars"}
    rows = [{"review": "Great", "stars": 5, "shop": "x"}, {"review": "Bad", "stars": "1"}]
    assert read(tmp_path / "a.jsonl", rows, mapping=mapping) == ("mapping", [("5", "5", {"shop": "x"}), ("1", "1", {})])
    assert mapping_problem({**mapping, "prompt": "stars"}) == "column 'stars' is named twice"
    assert mapping_problem({"prompt": "a", "response": "b", "category": "a"}) == "column 'a' is named twice"


def test_check_reads_a_table_of_text_and_label_with_its_categories(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "r.csv",
        ("text", "label"),
        ("Where is it?", "1"),
        ("Thank you so much", "0"),
        ("It broke, twice", "1"),
    )
    document = check_paths([str(tmp_path / "r.csv")])
    assert (document["format"], document["kept"], document["profile"]["categories"]) == (
        "classification",
        3,
        {"1": 2, "0": 1},
    )


# From a table to a comparison

WORDS = {
    "positive": ["love", "great", "excellent", "wonderful", "happy"],
    "negative": ["awful", "broken", "terrible", "refund", "slow"],
    "yes, please": ["renew", "subscribe", "upgrade", "continue", "extend"],
}
THINGS = [
    "kettle",
    "hotel",
    "train",
    "novel",
    "camera",
    "jacket",
    "course",
    "garden",
    "piano",
    "bakery",
    "phone",
    "lamp",
]


@pytest.fixture
def split_reviews(tmp_path: Path, tiny_model: Path) -> Path:
    """A table of 180 reviews as splits, made by the stages."""
    rows = [
        (f"{thing} {word} {other} number {hash_of(thing, word, other)}", name)
        for name, words in WORDS.items()
        for i, thing in enumerate(THINGS)
        for word, other in [(words[i % 5], words[(i + k + 1) % 5]) for k in range(5)]
    ]
    write_csv(tmp_path / "data/sources/reviews.csv", ("text", "label"), *dict.fromkeys(rows))
    made_from = parse(raw_examples.Params, {"sources": [{"path": "data/sources/reviews.csv"}]}, "raw_examples")
    raw_examples.produce(tmp_path, made_from, tmp_path / "raw")
    instructions.produce(
        tmp_path, instructions.Params(), tmp_path / "raw", tiny_model, tmp_path / "checked", tmp_path / "pages", {}
    )
    splits.produce(tmp_path, splits.Params(validation=0.0), 7, tmp_path / "checked", tmp_path / "made")
    return tmp_path


def hash_of(*parts: str) -> str:
    return example_id([{"role": "user", "content": " ".join(parts)}])[:6]


def planted(prompts: list[list[dict[str, str]]], what: str) -> list[str]:
    """Right where the text names a word of the label, in odd forms; every fifth answer is no label."""
    answers = []
    for i, prompt in enumerate(prompts):
        text = prompt[-1]["content"]
        name = next(name for name, words in WORDS.items() if any(word in text for word in words))
        odd = [name, f'"{name.upper()}".', f"{name}\nbecause", f" {name}!"][i % 4]
        answers.append("I cannot say" if i % 5 == 4 else "positive" if what == "zero_shot" else odd)
    return answers


def test_a_table_of_text_and_label_is_trained_split_scored_and_compared_by_its_labels(
    split_reviews: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = (read_records(split_reviews / "made" / name) for name in ("train", "test"))
    assert {r["category"] for r in test} == set(WORDS) and {r["category"] for r in train} == set(WORDS)
    monkeypatch.setattr(
        EvaluatedModel,
        "answer",
        lambda self, prompts, what, *_, **__: [Answer(text) for text in planted(prompts, what)],
    )
    found = evaluate(split_reviews, tiny_model, Settings(task=AUTO, max_new_tokens=3), test, train)

    reached = found["baselines"]
    assert list(reached) == [
        "base",
        "zero_shot",
        "system_prompt",
        "chain_of_thought",
        "few_shot",
        "retrieved",
        "tfidf_logistic",
    ]
    assert reached["zero_shot"]["accuracy"] < 0.5 < reached["few_shot"]["accuracy"] == found["one"]["accuracy"]
    assert found["one"]["valid_label"] == pytest.approx(1 - (len(test) // 5) / len(test), abs=1e-4)
    assert "bleu" not in found["one"] and found["one"]["macro_f1_interval"][0] <= found["one"]["macro_f1"]
    assert reached["tfidf_logistic"]["accuracy"] > 0.9, "the words name the label"

    with (split_reviews / "one.csv").open(newline="") as file:
        pairs = [(row["actual"], row["predicted"]) for row in csv.DictReader(file)]
    assert {predicted for _, predicted in pairs} == {*WORDS, NO_LABEL} and len(pairs) == len(test)
    true, said = zip(*pairs, strict=True)
    assert found["one"]["macro_f1"] == pytest.approx(
        f1_score(true, said, labels=sorted(WORDS), average="macro"), abs=1e-4
    )
    assert {name: row["n"] for name, row in found["one"]["by_label"].items()} == {
        name: true.count(name) for name in sorted(WORDS)
    }
    assert {row["label"] for row in read_table(split_reviews / "evaluation/one/results.parquet")} == {*WORDS, NO_LABEL}

    assert found["board"].startswith(
        f"| {len(test)} test examples | macro-F1 | 95 % interval | accuracy | prompt tokens |"
    )
    assert any("points of macro-F1" in line for line in found["advice"])
    document = json.loads((split_reviews / "comparison/comparison.json").read_text())
    assert (
        document["shown"] == ["macro_f1", "accuracy"]
        and document["scores"]["one"]["by_label"] == found["one"]["by_label"]
    )
    page = (split_reviews / "pages/comparison.html").read_text()
    assert "F1 of each label" in page and "yes, please" in page


def test_a_random_model_gives_no_label_and_scores_0(split_reviews: Path, tiny_model: Path) -> None:
    train, test = (read_records(split_reviews / "made" / name) for name in ("train", "test"))
    found = evaluate(split_reviews, tiny_model, Settings(task=AUTO, max_new_tokens=2, max_examples=6), test, train)
    assert (found["one"]["n"], found["one"]["valid_label"], found["one"]["accuracy"], found["one"]["macro_f1"]) == (
        6,
        0,
        0,
        0,
    )
    assert found["recommended"]["variant"] is None and found["recommended"]["instead"] == "tfidf_logistic"


def test_dagster_shows_the_table_of_labels_and_a_matrix_of_odd_ones(tmp_path: Path) -> None:
    from dagster_project.orchestration.dagster.metadata import describe

    report = {
        "by_label": by_label(LabelSet(("a|b", "$x$", "l\nn")), ["a|b", "$x$"], ["a|b", "l n"])["by_label"],
        "accuracy": 0.5,
    }
    matrix = 'actual,predicted\n"$x^$","a,b"\nlate\x0bdelivery,"l\nn"\n'
    for path, text in (("data/reports/e.json", json.dumps(report)), ("data/plots/confusion/x.csv", matrix)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    state = SimpleNamespace(
        report="data/reports/e.json",
        out="data/e",
        version="v",
        address="evaluation@x",
        meta={},
        recorded=True,
        output_problem="",
    )
    found = describe(tmp_path, state)  # type: ignore[arg-type]
    assert (
        "| a\\|b | 1 | 1 | 1.0 | 1.0 | 1.0 |" in found["by_label"].md_str
        and "| l n | 0 | 1 |" in found["by_label"].md_str
    )
    assert found["confusion"].md_str.startswith("![confusion](data:image/png;base64,")
