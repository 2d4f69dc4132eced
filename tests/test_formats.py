"""Source files -> canonical rows: every layout is read, every row keeps its place, every bad file is refused in words."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dagster_project.curation.checks import Rules, judge
from dagster_project.curation.formats import LAYOUTS, read_multiple_choice, to_records
from dagster_project.errors import InputError
from dagster_project.records import read_records
from dagster_project.stages import raw_examples

SYSTEM = ("system", "Be brief.")
ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "alpaca": (
        {"system": "Be brief.", "instruction": "Name it.", "input": "A bird.", "output": "Wren"},
        [SYSTEM, ("user", "Name it.\n\nA bird."), ("assistant", "Wren")],
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    "sharegpt": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
    ),
    "dolly": (
        {"instruction": "Name it.", "context": "A bird.", "response": "Wren"},
        [("user", "Name it.\n\nA bird."), ("assistant", "Wren")],
    ),
    "prompt_completion": (
        {"system": "Be brief.", "prompt": "Hi", "completion": "Hello"},
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
    ),
    "question_answer": (
        {"system": "Be brief.", "question": "Hi?", "answer": "Hello"},
        [SYSTEM, ("user", "Hi?"), ("assistant", "Hello")],
    ),
}
PAIR = {"prompt": "Hi", "completion": "Hello"}


def jsonl(path: Path, *lines: Any) -> Path:
    """A JSONL file: strings as they are, anything else as JSON."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record["messages"]]


def refused(path: Path, layout: str = "auto") -> str:
    with pytest.raises(InputError) as caught:
        to_records(path, path.name, layout)
    assert caught.value.hint, "an error says what to do next"
    return caught.value.what


def test_every_layout_has_an_example_here() -> None:
    assert set(ROWS) == set(LAYOUTS)


@pytest.mark.parametrize("layout", ROWS)
def test_each_layout_is_told_from_its_keys_and_read_in_full(layout: str, tmp_path: Path) -> None:
    row, expected = ROWS[layout]
    found, records = to_records(jsonl(tmp_path / "rows.jsonl", row), "rows.jsonl")
    assert (found, [turns(record) for record in records]) == (layout, [expected])


@pytest.mark.parametrize("layout", ROWS)
def test_a_named_layout_reads_the_same_as_a_detected_one(layout: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS[layout][0])
    assert to_records(path, "rows.jsonl", layout) == to_records(path, "rows.jsonl")


def test_an_empty_input_adds_nothing_to_the_prompt(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"instruction": "Sing.", "input": "", "output": "La"})
    assert turns(to_records(path, "rows.jsonl")[1][0]) == [("user", "Sing."), ("assistant", "La")]


def test_the_layout_that_most_rows_have_wins(tmp_path: Path) -> None:
    layout, records = to_records(jsonl(tmp_path / "rows.jsonl", ROWS["dolly"][0], PAIR, PAIR), "rows.jsonl")
    assert layout == "prompt_completion"
    assert [bool(record["messages"]) for record in records] == [False, True, True]


def test_what_is_no_message_is_kept_in_meta_and_the_category_in_its_own_column(tmp_path: Path) -> None:
    row = {"instruction": "Name it.", "input": "A bird.", "output": "Wren", "category": "zoo", "stars": 4}
    record = to_records(jsonl(tmp_path / "rows.jsonl", row), "a/rows.jsonl")[1][0]
    assert (record["source"], record["category"], json.loads(record["meta"])) == ("a/rows.jsonl", "zoo", {"input": "A bird.", "stars": 4})


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
def test_each_file_type_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "Grüße", "completion": "你好"}]
    path = tmp_path / name
    text = json.dumps(rows) if name == "rows.json" else "\n".join(map(json.dumps, rows))
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    records = to_records(path, name)[1]
    assert [turns(record)[0][1] for record in records] == ["Hi", "Grüße"]
    assert [record["source_row"] for record in records] == [0, 1]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert to_records(path, "rows.jsonl")[0] == "prompt_completion"


def test_blank_lines_are_not_rows(tmp_path: Path) -> None:
    records = to_records(jsonl(tmp_path / "rows.jsonl", "", PAIR, "  ", {**PAIR, "prompt": "Ho"}, ""), "rows.jsonl")[1]
    assert [(record["source_row"], turns(record)[0][1]) for record in records] == [(0, "Hi"), (1, "Ho")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "line is not JSON"),
        (["a", "list"], "expected an object, found list"),
        ({"prompt": "Hi"}, "no key 'completion'"),
        ({"prompt": "Hi", "completion": 3}, "expected text, found int"),
        ({"prompt": "Hi", "completion": None}, "expected text, found NoneType"),
    ],
)
def test_a_malformed_row_keeps_its_place_and_says_why(line: Any, problem: str, tmp_path: Path) -> None:
    records = to_records(jsonl(tmp_path / "rows.jsonl", PAIR, line, PAIR), "rows.jsonl")[1]
    assert [record["source_row"] for record in records] == [0, 1, 2]
    assert [bool(record["messages"]) for record in records] == [True, False, True]
    assert json.loads(records[1]["meta"])["problem"].startswith(problem)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": None},
        {"messages": []},
        {"messages": ["Hi"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": 1, "content": "Hi"}]},
    ],
)
def test_messages_of_another_shape_are_malformed(row: dict[str, Any], tmp_path: Path) -> None:
    records = to_records(jsonl(tmp_path / "rows.jsonl", ROWS["messages"][0], row), "rows.jsonl")[1]
    assert [bool(json.loads(record["meta"]).get("problem")) for record in records] == [False, True]


def test_a_column_named_problem_does_not_make_a_row_malformed(tmp_path: Path) -> None:
    records = to_records(jsonl(tmp_path / "rows.jsonl", {**PAIR, "problem": "2 + 2"}), "rows.jsonl")[1]
    assert judge(records, [], Rules()).reason == [None]


def test_half_a_surrogate_pair_spoils_its_row_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "data/sources").mkdir(parents=True)
    jsonl(tmp_path / "data/sources/rows.jsonl", PAIR, '{"prompt": "cut \\ud83d off", "completion": "Hello"}', PAIR)
    params = raw_examples.Params(sources=[raw_examples.Source(path="data/sources/rows.jsonl")])
    raw_examples.run(tmp_path, params, tmp_path / "out")
    assert [bool(record["messages"]) for record in read_records(tmp_path / "out")][::2] == [True, True]


def test_a_number_too_long_to_convert_spoils_its_row_and_no_other(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", PAIR, '{"prompt": ' + "1" * 5000 + "}", PAIR)
    assert [bool(record["messages"]) for record in to_records(path, "rows.jsonl")[1]] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.json", b" \n\n", "a.json: the file is empty"),
        ("a.json", b"[]", "a.json: the list is empty"),
        ("a.json", b'[{"prompt": ', "a.json: not JSON: "),
        ("a.jsonl", b"id,text\n1,Hi\n", "a.jsonl: not JSON: line is not JSON: "),
        ("a.jsonl", b"[1]\n[2]\n", "a.jsonl: not JSON: expected an object, found list"),
        ("a.json", b'{"prompt": "Hi"}', "a.json: a .json file must hold a list of rows"),
        ("a.json", b'[{"b": 1, "a": 2}]', "a.json: unknown format (keys of the first row: a, b)"),
        ("a.json", b"[{}]", "a.json: unknown format (keys of the first row: none)"),
        ("a.csv", b"id,text\n", "a.csv: unknown file type .csv"),
        ("a", b"[]", "a: unknown file type (none)"),
        ("a.json.gz", b"[]", "a.json.gz: unknown file type .json.gz"),
        ("a.jsonl", b'{"prompt": "caf\xe9"}', "a.jsonl: not UTF-8 at byte 15"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: broken gzip file: "),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "Hi"}')[:-9], "a.jsonl.gz: broken gzip file: "),
    ],
)
def test_a_bad_file_is_refused_by_name_and_reason(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith(message)


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    assert refused(jsonl(tmp_path / "a.jsonl", PAIR), "csv") == "a.jsonl: unknown format 'csv'"


def test_the_hint_for_an_unknown_format_lists_every_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        to_records(jsonl(tmp_path / "a.jsonl", {"x": 1}), "a.jsonl")
    assert all(f"{name}: {', '.join(sorted(layout.keys))}" in caught.value.hint for name, layout in LAYOUTS.items())


def test_a_json_list_without_a_single_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    assert refused(tmp_path / "a.json").startswith("a.json: ")


def test_a_gzip_file_with_damaged_content_is_refused(tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress(b'{"prompt": "Hi", "completion": "Hello"}\n' * 50))
    damaged[10:14] = bytes(byte ^ 0xFF for byte in damaged[10:14])
    (tmp_path / "a.jsonl.gz").write_bytes(damaged)
    assert refused(tmp_path / "a.jsonl.gz").startswith("a.jsonl.gz: broken gzip file: ")


QUESTION = {"question": "What is two and two?", "choices": ["three", "four"], "answer": 1, "subject": "sums"}


def test_labelled_questions_are_read_in_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", QUESTION, {**QUESTION, "answer": 0})
    assert [question["answer"] for question in read_multiple_choice(path)] == [1, 0]


@pytest.mark.parametrize(
    "change", [{"answer": None}, {"answer": 2}, {"answer": -1}, {"answer": "four"}, {"choices": ["four"]}, {"question": 4}]
)
def test_a_question_without_a_right_answer_is_refused_by_row(change: dict[str, Any], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", QUESTION, {**QUESTION, **change})
    with pytest.raises(InputError, match=r"q\.jsonl: row 1 is not a labelled multiple-choice question"):
        list(read_multiple_choice(path))
