"""Held-out benchmarks are read in the layouts they come in; one that cannot be compared with or scored is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dagster_project.core.errors import InputError
from dagster_project.curation.sources.benchmarks import PROMPT_COLUMNS, read_items, read_multiple_choice
from dagster_project.curation.sources.files import read_rows

ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    # layout: (row, question, right answer)
    "mmlu": ({"question": "Two and two?", "choices": ["three", "four"], "answer": 1, "subject": "sums"}, "Two and two?", "four"),
    "mmlu, by letter": ({"question": "Two and two?", "choices": ["three", "four"], "answer": "B"}, "Two and two?", "four"),
    "hellaswag": (
        {"ctx": "She lights the", "endings": ["sea.", "lamp."], "label": "1", "activity_label": "Home"},
        "She lights the",
        "lamp.",
    ),
    "mmlu, in columns": ({"question": "Two and two?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "B", "subject": "sums"}, "Two and two?", "4"),
    "mmlu, in capitals": ({"Question": "Two and two?", "A": "3", "B": "4", "C": "5", "D": "6", "Answer": "B"}, "Two and two?", "4"),
    "mmlu_pro": ({"question": "Two and two?", "options": ["three", "four"], "answer": "B", "answer_index": 1, "category": "math"}, "Two and two?", "four"),
    "agieval": (
        {"passage": "There are two pairs.", "question": "How many?", "options": ["(A)three", "(B)four"], "label": "B", "answer": None, "other": None},
        "There are two pairs.\n\nHow many?", "four",
    ),
    "agieval, several": ({"passage": None, "question": "Red?", "options": ["(A)rose", "(B)grass", "(C)fire"], "label": ["A", "C"]}, "Red?", "rose\nfire"),
    "agieval, in words": ({"passage": None, "question": "How many?", "options": None, "label": None, "answer": "30", "other": {"level": 4}}, "How many?", "30"),
    "ifeval": ({"key": 1000, "prompt": "Write without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "Write without commas.", ""),
    "arc": ({"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"}, "Hot?", "fire"),
    "piqa": ({"goal": "Cut paper", "sol1": "Use scissors.", "sol2": "Use soup.", "label": 0}, "Cut paper", "Use scissors."),
    "gsm8k": ({"question": "How many eggs?", "answer": "2 + 2 = 4\n#### 4"}, "How many eggs?", "2 + 2 = 4\n#### 4"),
}  # fmt: skip


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmark_is_read_in_its_layout(name: str, tmp_path: Path) -> None:
    row, question, answer = ROWS[name]
    (item,) = read_items(jsonl(tmp_path / "b.jsonl", row), "b.jsonl")
    assert (item.place, item.question, item.text, item.labelled) == ("b.jsonl:0", question, answer, True)


@pytest.mark.parametrize(
    ("name", "change"),
    [("mmlu", {"answer": None}), ("mmlu", {"answer": -1}), ("hellaswag", {"label": ""}), ("arc", {"answerKey": ""}), ("piqa", {"label": -1}), ("gsm8k", {"answer": None})],
)  # fmt: skip
def test_a_question_without_its_answer_is_unlabelled(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "b.jsonl", {**ROWS[name][0], **change})
    assert not read_items(path, "b.jsonl")[0].labelled


@pytest.mark.parametrize(
    "change",
    [{"answer": 2}, {"answer": "E"}, {"answer": "AB"}, {"answer": True}, {"choices": ["four"]}, {"question": 4}, {"choices": [1, 2]}],
)
def test_a_row_that_is_no_question_of_the_layout_is_refused_by_row(change: dict[str, Any], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "b.jsonl", ROWS["mmlu"][0], {**ROWS["mmlu"][0], **change})
    with pytest.raises(InputError, match=r"b\.jsonl: row 1 is not a mmlu question"):
        read_items(path, "b.jsonl")


def test_a_file_in_no_benchmarks_layout_is_refused_with_the_layouts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a benchmark in a known layout") as refused:
        read_items(jsonl(tmp_path / "b.jsonl", {"text": "Hi"}), "b.jsonl")
    assert "hellaswag (ctx, endings)" in refused.value.hint


@pytest.mark.parametrize("column", PROMPT_COLUMNS)
def test_a_file_of_prompts_alone_is_read_by_the_column_that_asks(column: str, tmp_path: Path) -> None:
    for asked in (
        "Who is there?",
        ["Who is", "there?"],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is there?"}],
    ):
        (item,) = read_items(jsonl(tmp_path / "b.jsonl", {"id": 3, column: asked}), "b.jsonl")
        assert (" ".join(item.question.split()), item.text, item.labelled) == ("Who is there?", "", False)


@pytest.mark.parametrize("asked", [None, 3, "", [], [3]])
def test_a_row_that_asks_nothing_is_refused_by_row(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b\.jsonl: row 1 is not a prompts question: expected a prompt in one of the columns prompt, "):
        read_items(jsonl(tmp_path / "b.jsonl", {"prompt": "Hi"}, {"prompt": asked}), "b.jsonl")


@pytest.mark.parametrize("written", [json.dumps, str, lambda texts: "[" + "\n ".join(map(repr, texts)) + "]"])
@pytest.mark.parametrize("texts", [["three", "it's four"], ['say "three"', "four,\nor more"], ["[three]", "a\\b'c\"d"]])
def test_choices_in_a_cell_of_a_table_are_read_as_json_python_and_numpy_print_them(written: Any, texts: list[str], tmp_path: Path) -> None:
    row = {"question": "Two and two?", "choices": written(texts), "answer": "1"}
    assert read_items(jsonl(tmp_path / "b.jsonl", row), "b.jsonl")[0].choices == tuple(texts)


@pytest.mark.parametrize("cell", ["[", "['a', 3]", "['a' + 'b']", "[__import__('os'), 'b']", "['\\x', 'b']", "a, b"])
def test_a_cell_that_is_no_list_of_texts_is_refused(cell: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a list of two choices or more"):
        read_items(jsonl(tmp_path / "b.jsonl", {"question": "Two?", "choices": cell, "answer": "1"}), "b.jsonl")


def test_mmlus_own_tables_have_no_header_and_lose_no_question(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text('"Two, and two?",3,4,5,5,B\nOne and two?,3,4,5,6,A\n')
    assert [(item.row, item.question, item.text) for item in read_items(tmp_path / "test.csv", "test.csv")] == [
        (0, "Two, and two?", "4"),
        (1, "One and two?", "3"),
    ]
    (tmp_path / "b.csv").write_text("id,question,A,B,C,answer\n7,Two?,1,2,3,B\n")
    assert read_rows(tmp_path / "b.csv")[0].value == {"id": "7", "question": "Two?", "A": "1", "B": "2", "C": "3", "answer": "B"}


def test_a_question_with_several_right_choices_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b\.jsonl:0 has several correct choices"):
        read_multiple_choice(jsonl(tmp_path / "b.jsonl", ROWS["agieval, several"][0]))


def test_only_labelled_choices_can_be_scored(tmp_path: Path) -> None:
    good = ROWS["mmlu"][0]
    assert [item.answer for item in read_multiple_choice(jsonl(tmp_path / "b.jsonl", good, {**good, "answer": "A"}))] == [1, 0]
    with pytest.raises(InputError, match=r"b\.jsonl:1 is unlabelled"):
        read_multiple_choice(jsonl(tmp_path / "b.jsonl", good, {**good, "answer": None}))
    with pytest.raises(InputError, match=r"b\.jsonl:0 has no choices"):
        read_multiple_choice(jsonl(tmp_path / "b.jsonl", ROWS["gsm8k"][0]))


@pytest.mark.parametrize(
    ("name", "more", "subject"),
    [("mmlu", {}, "sums"), ("hellaswag", {}, "Home"), ("piqa", {"category": "crafts"}, "crafts"), ("arc", {"subject": "physics"}, "physics"), ("arc", {}, "")],
)  # fmt: skip
def test_a_subject_is_what_the_row_calls_subject_or_category(name: str, more: dict[str, str], subject: str, tmp_path: Path) -> None:
    (item,) = read_items(jsonl(tmp_path / "b.jsonl", {**ROWS[name][0], **more}), "b.jsonl")
    assert item.subject == subject
