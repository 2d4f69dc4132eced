"""Held-out benchmarks are read in every supported layout; one that cannot be compared or scored is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.files import jsonl
from builders.layouts import BENCHMARK_ROWS

from dagster_project.core.errors import InputError
from dagster_project.curation.sources.benchmarks import PROMPT_COLUMNS, read_items, read_multiple_choice
from dagster_project.curation.sources.files import read_rows


@pytest.mark.parametrize("name", BENCHMARK_ROWS)
def test_a_benchmark_is_read_in_its_layout(name: str, tmp_path: Path) -> None:
    row, question, answer = BENCHMARK_ROWS[name]
    (item,) = read_items(jsonl(tmp_path / "b.jsonl", row), "b.jsonl")
    assert (item.place, item.question, item.text, item.labelled) == ("b.jsonl:0", question, answer, True)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mmlu", {"answer": None}),
        ("mmlu", {"answer": -1}),
        ("hellaswag", {"label": ""}),
        ("arc", {"answerKey": ""}),
        ("piqa", {"label": -1}),
        ("gsm8k", {"answer": None}),
    ],
)
def test_a_question_without_its_answer_is_unlabelled(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "b.jsonl", {**BENCHMARK_ROWS[name][0], **change})
    assert not read_items(path, "b.jsonl")[0].labelled


@pytest.mark.parametrize(
    "change",
    [
        {"answer": 2},
        {"answer": "E"},
        {"answer": "AB"},
        {"answer": True},
        {"choices": ["four"]},
        {"question": 4},
        {"choices": [1, 2]},
    ],
)
def test_a_row_that_does_not_fit_the_layout_is_refused_by_row_number(change: dict[str, Any], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "b.jsonl", BENCHMARK_ROWS["mmlu"][0], {**BENCHMARK_ROWS["mmlu"][0], **change})
    with pytest.raises(InputError, match=r"b\.jsonl: row 1 is not a mmlu question"):
        read_items(path, "b.jsonl")


def test_a_number_is_the_choice_of_that_name_if_there_is_one(tmp_path: Path) -> None:
    row, _, _ = BENCHMARK_ROWS["arc"]
    items = read_items(jsonl(tmp_path / "b.jsonl", *({**row, "answerKey": label} for label in (1, 2, "2"))), "b.jsonl")
    assert [item.text for item in items] == ["ice", "fire", "fire"]


def test_an_unknown_benchmark_layout_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a benchmark in a known layout") as refused:
        read_items(jsonl(tmp_path / "b.jsonl", {"text": "Hi"}), "b.jsonl")
    assert "hellaswag (ctx, endings)" in refused.value.hint


@pytest.mark.parametrize("column", PROMPT_COLUMNS)
def test_a_file_of_prompts_is_read_by_its_question_column(column: str, tmp_path: Path) -> None:
    for asked in (
        "Who is there?",
        ["Who is", "there?"],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is there?"}],
    ):
        (item,) = read_items(jsonl(tmp_path / "b.jsonl", {"id": 3, column: asked}), "b.jsonl")
        assert (" ".join(item.question.split()), item.text, item.labelled) == ("Who is there?", "", False)


@pytest.mark.parametrize("asked", [None, 3, "", [], [3]])
def test_a_row_without_a_question_is_refused_by_row_number(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"b\.jsonl: row 1 is not a prompts question: expected a prompt in one of the columns prompt, "
    ):
        read_items(jsonl(tmp_path / "b.jsonl", {"prompt": "Hi"}, {"prompt": asked}), "b.jsonl")


@pytest.mark.parametrize("written", [json.dumps, str, lambda texts: "[" + "\n ".join(map(repr, texts)) + "]"])
@pytest.mark.parametrize("texts", [["three", "it's four"], ['say "three"', "four,\nor more"], ["[three]", "a\\b'c\"d"]])
def test_choices_in_a_table_cell_are_read_in_json_python_and_numpy_notation(
    written: Any, texts: list[str], tmp_path: Path
) -> None:
    row = {"question": "Two and two?", "choices": written(texts), "answer": "1"}
    assert read_items(jsonl(tmp_path / "b.jsonl", row), "b.jsonl")[0].choices == tuple(texts)


@pytest.mark.parametrize("cell", ["[", "['a', 3]", "['a' + 'b']", "[__import__('os'), 'b']", "['\\x', 'b']", "a, b"])
def test_a_cell_without_a_list_of_strings_is_refused(cell: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a list of two choices or more"):
        read_items(jsonl(tmp_path / "b.jsonl", {"question": "Two?", "choices": cell, "answer": "1"}), "b.jsonl")


def test_mmlu_tables_without_a_header_lose_no_question(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text('"Two, and two?",3,4,5,5,B\nOne and two?,3,4,5,6,A\n')
    assert [(item.row, item.question, item.text) for item in read_items(tmp_path / "test.csv", "test.csv")] == [
        (0, "Two, and two?", "4"),
        (1, "One and two?", "3"),
    ]
    (tmp_path / "b.csv").write_text("id,question,A,B,C,answer\n7,Two?,1,2,3,B\n")
    assert read_rows(tmp_path / "b.csv")[0].value == {
        "id": "7",
        "question": "Two?",
        "A": "1",
        "B": "2",
        "C": "3",
        "answer": "B",
    }


def test_a_question_with_several_right_choices_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b\.jsonl:0 has several correct choices"):
        read_multiple_choice(jsonl(tmp_path / "b.jsonl", BENCHMARK_ROWS["agieval, several"][0]))


def test_only_labeled_choices_can_be_scored(tmp_path: Path) -> None:
    good = BENCHMARK_ROWS["mmlu"][0]
    assert [
        item.answer for item in read_multiple_choice(jsonl(tmp_path / "b.jsonl", good, {**good, "answer": "A"}))
    ] == [1, 0]
    with pytest.raises(InputError, match=r"b\.jsonl:1 is unlabelled"):
        read_multiple_choice(jsonl(tmp_path / "b.jsonl", good, {**good, "answer": None}))
    with pytest.raises(InputError, match=r"b\.jsonl:0 has no choices"):
        read_multiple_choice(jsonl(tmp_path / "b.jsonl", BENCHMARK_ROWS["gsm8k"][0]))


@pytest.mark.parametrize(
    ("name", "more", "subject"),
    [
        ("mmlu", {}, "sums"),
        ("hellaswag", {}, "Home"),
        ("piqa", {"category": "crafts"}, "crafts"),
        ("arc", {"subject": "physics"}, "physics"),
        ("arc", {}, ""),
    ],
)
def test_the_subject_is_read_from_the_subject_or_category_column(
    name: str, more: dict[str, str], subject: str, tmp_path: Path
) -> None:
    (item,) = read_items(jsonl(tmp_path / "b.jsonl", {**BENCHMARK_ROWS[name][0], **more}), "b.jsonl")
    assert item.subject == subject
