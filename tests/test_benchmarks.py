"""Held-out benchmarks are read in the layouts they come in; one that cannot be compared with or scored is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dagster_project.curation.benchmarks import read_items, read_multiple_choice
from dagster_project.errors import InputError

ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    # layout: (row, question, right answer)
    "mmlu": ({"question": "Two and two?", "choices": ["three", "four"], "answer": 1, "subject": "sums"}, "Two and two?", "four"),
    "mmlu, by letter": ({"question": "Two and two?", "choices": ["three", "four"], "answer": "B"}, "Two and two?", "four"),
    "hellaswag": (
        {"ctx": "She lights the", "endings": ["sea.", "lamp."], "label": "1", "activity_label": "Home"},
        "She lights the",
        "lamp.",
    ),
    "arc": ({"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"}, "Hot?", "fire"),
    "piqa": ({"goal": "Cut paper", "sol1": "Use scissors.", "sol2": "Use soup.", "label": 0}, "Cut paper", "Use scissors."),
    "gsm8k": ({"question": "How many eggs?", "answer": "2 + 2 = 4\n#### 4"}, "How many eggs?", "2 + 2 = 4\n#### 4"),
}


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
    "change", [{"answer": 2}, {"answer": "E"}, {"answer": True}, {"choices": ["four"]}, {"question": 4}, {"choices": [1, 2]}]
)
def test_a_row_that_is_no_question_of_the_layout_is_refused_by_row(change: dict[str, Any], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "b.jsonl", ROWS["mmlu"][0], {**ROWS["mmlu"][0], **change})
    with pytest.raises(InputError, match=r"b\.jsonl: row 1 is no mmlu question"):
        read_items(path, "b.jsonl")


def test_a_file_in_no_benchmarks_layout_is_refused_with_the_layouts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a benchmark in a known layout") as refused:
        read_items(jsonl(tmp_path / "b.jsonl", {"text": "Hi"}), "b.jsonl")
    assert "hellaswag (ctx, endings)" in refused.value.hint


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
