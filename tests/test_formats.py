"""Source files -> canonical rows: every layout is read, every row keeps its
number, every bad file is refused with a message."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.files import jsonl
from builders.layouts import LAYOUT_ROWS, PAIR, PAIR_ROWS, SYSTEM
from builders.sources import to_pairs, to_records
from conftest import SHARED_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core.errors import InputError
from dagster_project.core.params import parse
from dagster_project.core.records import read_records
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.sources.files import Row, read_rows
from dagster_project.curation.sources.formats import (
    LAYOUTS,
    PAIR_LAYOUTS,
    RECORD_FIELDS,
    SPLITS,
    detect,
    is_text,
    kind,
    records_of,
    split_of_file,
)
from dagster_project.curation.sources.formats import pairs_of as pairs_in_memory
from dagster_project.stages import raw_examples


def turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record["messages"]]


def refused(path: Path, layout: str = "auto") -> str:
    with pytest.raises(InputError) as caught:
        to_records(path, path.name, layout)
    assert caught.value.hint, "an error says what to do next"
    return caught.value.what


def test_every_layout_has_an_example_here() -> None:
    assert set(LAYOUT_ROWS) == set(LAYOUTS)


ODD_VALUES: list[Any] = [
    None, 1, 1.5, True, "x", [], [1], [None], [[]], {}, {"a": 1}, {"role": ["user"], "content": "x"},
    [{"role": ["user"], "content": "x"}], [{"from": {}, "value": 1}], [{"type": [], "role": "user"}],
    [{"role": "user", "content": {"a": 1}}], [{"role": "user", "content": [{"type": ["text"]}]}],
    [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": ["f"], "arguments": []}}]}],
]  # fmt: skip


def with_odd_values(value: Any) -> list[Any]:
    """Copies of a row, each with one of the values in the place of something in it."""
    copies = list(ODD_VALUES)
    if isinstance(value, dict):
        copies += [{**value, key: odd} for key in value for odd in with_odd_values(value[key])]
    elif isinstance(value, list):
        copies += [[*value[:i], odd, *value[i + 1 :]] for i, part in enumerate(value) for odd in with_odd_values(part)]
    return copies


@pytest.mark.parametrize("layout", [*LAYOUT_ROWS, *PAIR_ROWS])
def test_the_reason_of_a_malformed_row_is_not_a_message_of_python(layout: str) -> None:
    """Rows with one value of another type, at each place."""
    rows = [LAYOUT_ROWS[layout][0]] if layout in LAYOUT_ROWS else []
    examples = [copy for row in rows for copy in with_odd_values(row) if isinstance(copy, dict)]
    pairs = [copy for row in PAIR_ROWS.get(layout, ()) for copy in with_odd_values(row) if isinstance(copy, dict)]
    records = records_of([Row(i, row) for i, row in enumerate(examples)], "a.jsonl", "a", layout)[1] if examples else []
    records += pairs_in_memory([Row(i, row) for i, row in enumerate(pairs)], "a.jsonl", "a", layout)[1] if pairs else []
    reasons = {problem for record in records if (problem := json.loads(record["meta"]).get("problem"))}
    of_python = re.compile(r"object (has no|is not|cannot)|unhashable|indices must|operand|unexpected keyword")
    assert reasons and not {*filter(of_python.search, reasons)}


@pytest.mark.parametrize("layout", LAYOUT_ROWS)
def test_each_layout_is_detected_by_its_keys_and_read_in_full(layout: str, tmp_path: Path) -> None:
    row, expected = LAYOUT_ROWS[layout]
    found, records = to_records(jsonl(tmp_path / "rows.jsonl", row), "rows.jsonl")
    assert (found, [turns(record) for record in records]) == (layout, [expected])


@pytest.mark.parametrize("layout", LAYOUT_ROWS)
def test_a_named_layout_reads_the_same_as_a_detected_one(layout: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", LAYOUT_ROWS[layout][0])
    assert to_records(path, "rows.jsonl", layout) == to_records(path, "rows.jsonl")


COLUMNS = {"prompt": "[]", "response_a": "[]", "response_b": "[]", "winner_model_a": 1, "winner_model_b": 0}


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        (
            "arena",
            {**COLUMNS, "prompt": '["Hi"]'},
            "prompt, response_a and response_b must have the same number of turns",
        ),
        ("arena", {**COLUMNS, "prompt": "[Hi]"}, "the turns of a side are text that begins with [ and is not JSON"),
        ("arena", {**COLUMNS, "prompt": '["\\ud800"]'}, "text has half of a surrogate pair, which is not a character"),
        ("arena", {**COLUMNS, "prompt": f"[{'1' * 5000}]"}, "a whole number has more than 4,300 digits"),
        ("preference", {"margin": 10**400}, f"expected a finite number, found 1{'0' * 39}…"),
    ],
)
def test_the_reason_of_a_malformed_pair_names_what_is_wrong(layout: str, row: dict[str, Any], reason: str) -> None:
    complete = row if layout == "arena" else {**PAIR_ROWS[layout][0], **row}
    [pair] = pairs_in_memory([Row(0, complete)], "a.jsonl", "a", layout)[1]
    assert json.loads(pair["meta"])["problem"] == reason


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_row_with_a_number_that_is_too_long_says_so(suffix: str, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "Hi", "response": "Hello"})
    long = row.replace('"Hi"', "1" * 5000)
    path = tmp_path / f"rows.{suffix}"
    path.write_text(f"{row}\n{long}\n" if suffix == "jsonl" else f"[{row}, {long}]")
    good, bad = to_records(path, path.name)[1]
    where = " (line 2)" if suffix == "jsonl" else ""
    assert (
        good["messages"] and json.loads(bad["meta"])["problem"] == f"a whole number has more than 4,300 digits{where}"
    )


def test_plain_text_is_detected_by_its_only_key_and_marked(tmp_path: Path) -> None:
    layout, (record,) = to_records(jsonl(tmp_path / "rows.jsonl", {"text": "Wrens are small."}), "rows.jsonl")
    assert (layout, json.loads(record["meta"])) == ("text", {"kind": "text"})
    assert is_text(record["messages"], json.loads(record["meta"]))
    path = jsonl(tmp_path / "rows.jsonl", {"text": "Wrens are small.", "id": 3, "kind": "bird"})
    assert refused(path) == "rows.jsonl: unknown format (keys of the first row: id, kind, text)"
    record = to_records(path, "rows.jsonl", "text")[1][0]
    assert json.loads(record["meta"]) == {
        "kind": "text",
        "id": 3,
        "row": {"kind": "bird"},
    }, "nothing of the row is lost"


def test_a_text_file_is_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One\ntwo\n\nthree\n")
    layout, records = to_records(tmp_path / "a.txt", "a.txt")
    assert (layout, [turns(record) for record in records]) == (
        "text",
        [[("assistant", "One\ntwo")], [("assistant", "three")]],
    )


def test_no_conversation_counts_as_plain_text(tmp_path: Path) -> None:
    record = to_records(jsonl(tmp_path / "rows.jsonl", {**PAIR, "kind": "text"}), "rows.jsonl")[1][0]
    assert not is_text(record["messages"], json.loads(record["meta"]))
    alone = {"messages": [{"role": "assistant", "content": "Hello"}]}
    plain, named = to_records(jsonl(tmp_path / "rows.jsonl", alone, {**alone, "kind": "text"}), "rows.jsonl")[1]
    assert json.loads(named["meta"]) == {"kind": "conversation", "row": {"kind": "text"}}
    assert not is_text(named["messages"], json.loads(named["meta"])) and named["example_id"] == plain["example_id"]


def test_an_empty_instruction_adds_nothing_to_the_prompt(tmp_path: Path) -> None:
    record, *_ = to_records(jsonl(tmp_path / "a.jsonl", {"instruction": "", "input": "Hi", "output": "Hello"}), "a")[1]
    assert turns(record) == [("user", "Hi"), ("assistant", "Hello")]


def test_an_empty_input_adds_nothing_to_the_prompt(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"instruction": "Sing.", "input": "", "output": "La"})
    assert turns(to_records(path, "rows.jsonl")[1][0]) == [("user", "Sing."), ("assistant", "La")]


def test_the_layout_that_most_rows_have_wins(tmp_path: Path) -> None:
    layout, records = to_records(jsonl(tmp_path / "rows.jsonl", LAYOUT_ROWS["dolly"][0], PAIR, PAIR), "rows.jsonl")
    assert layout == "prompt_completion"
    assert [bool(record["messages"]) for record in records] == [False, True, True]


def test_other_columns_are_kept_in_meta_and_the_category_in_a_column(tmp_path: Path) -> None:
    row = {"instruction": "Name it.", "input": "A bird.", "output": "Wren", "category": "zoo", "stars": 4}
    record = to_records(jsonl(tmp_path / "rows.jsonl", row), "a/rows.jsonl")[1][0]
    assert (record["source"], record["category"], json.loads(record["meta"])) == (
        "a/rows.jsonl",
        "zoo",
        {"input": "A bird.", "stars": 4},
    )


def test_turns_of_wildchat_and_lmsys_are_messages_and_their_other_fields_are_named(tmp_path: Path) -> None:
    plain = LAYOUT_ROWS["messages"][0]["messages"]
    more = {"country": "Norway", "toxic": False, "turn_identifier": 7, "language": None}
    row = {"conversation_hash": "a1", "model": "gpt-4", "turn": 1, "conversation": [{**m, **more} for m in plain]}
    layout, (record,) = to_records(jsonl(tmp_path / "a.jsonl", row), "a.jsonl")
    same = to_records(jsonl(tmp_path / "b.jsonl", {"messages": plain}), "a.jsonl")[1][0]
    assert layout == "conversation"
    assert (record["messages"], record["example_id"]) == (same["messages"], same["example_id"])
    assert json.loads(record["meta"]) == {"conversation_hash": "a1", "model": "gpt-4", "turn": 1}
    assert record["ignored"] == [f"conversation[].{name}" for name in ("country", "toxic", "turn_identifier")]


def test_an_empty_category_is_none_as_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion,category\nHi,Hello,\nHo,Hello,zoo\n")
    assert [record["category"] for record in to_records(tmp_path / "rows.csv", "rows.csv")[1]] == [None, "zoo"]
    pairs = [{**PAIR_ROWS["preference"][0], "category": category} for category in ("", "zoo")]
    assert [pair["category"] for pair in to_pairs(jsonl(tmp_path / "pairs.jsonl", *pairs), "pairs.jsonl")[1]] == [
        None,
        "zoo",
    ]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
def test_each_file_type_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "Grüße", "completion": "你好"}]
    path = tmp_path / name
    text = json.dumps(rows) if name == "rows.json" else "\n".join(map(json.dumps, rows))
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode())
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
def test_a_malformed_row_keeps_its_number_and_states_the_reason(line: Any, problem: str, tmp_path: Path) -> None:
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
    records = to_records(jsonl(tmp_path / "rows.jsonl", LAYOUT_ROWS["messages"][0], row), "rows.jsonl")[1]
    assert [bool(json.loads(record["meta"]).get("problem")) for record in records] == [False, True]


def test_a_column_named_problem_does_not_make_a_row_malformed(tmp_path: Path) -> None:
    records = to_records(jsonl(tmp_path / "rows.jsonl", {**PAIR, "problem": "2 + 2"}), "rows.jsonl")[1]
    assert judge(records, [], Rules()).reason == [None]


def test_half_a_surrogate_pair_makes_only_its_row_malformed(tmp_path: Path) -> None:
    (tmp_path / "data/sources").mkdir(parents=True)
    jsonl(tmp_path / "data/sources/rows.jsonl", PAIR, '{"prompt": "cut \\ud83d off", "completion": "Hello"}', PAIR)
    params = raw_examples.Params(sources=[raw_examples.Source(path="data/sources/rows.jsonl")])
    raw_examples.produce(tmp_path, params, tmp_path / "out")
    assert [bool(record["messages"]) for record in read_records(tmp_path / "out")][::2] == [True, True]


def test_a_number_too_long_to_convert_makes_only_its_row_malformed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", PAIR, '{"prompt": ' + "1" * 5000 + "}", PAIR)
    assert [bool(record["messages"]) for record in to_records(path, "rows.jsonl")[1]] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file has no rows"),
        ("a.json", b" \n\n", "a.json: the file has no rows"),
        ("a.json", b"[]", "a.json: the list is empty"),
        ("a.json", b'[{"prompt": ', "a.json: not JSON: "),
        ("a.jsonl", b"id,text\n1,Hi\n", "a.jsonl: not JSON: line is not JSON: "),
        ("a.jsonl", b"[1]\n[2]\n", "a.jsonl: not JSON: expected an object, found list"),
        ("a.json", b'{"prompt": "Hi"}', "a.json: a .json file must hold a list of rows"),
        ("a.json", b'[{"b": 1, "a": 2}]', "a.json: unknown format (keys of the first row: a, b)"),
        ("a.json", b"[{}]", "a.json: unknown format (keys of the first row: none)"),
        ("a.xlsx", b"id,text\n", "a.xlsx: unknown file type .xlsx"),
        ("a", b"[]", "a: unknown file type (none)"),
        ("a.csv.gz", b"[]", "a.csv.gz: unknown file type .csv.gz"),
        ("a.json.gz", b"[]", "a.json.gz: broken gzip file: "),
        ("a.json", b'[{"prompt": "caf\xe9"}]', "a.json: not UTF-8 at byte 16"),
        ("a.jsonl", b'{"prompt": "caf\xe9"}', "a.jsonl: not JSON: not UTF-8 at byte 15 (line 1)"),
        ("a.csv", b"prompt,response\ncaf\xe9,b\nth\xe9,c\n", "a.csv: no row can be read: not UTF-8 (line 2)"),
        ("a.txt", b"caf\xe9\nth\xe9\n", "a.txt: no row can be read: not UTF-8 at byte 3 (line 1)"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: broken gzip file: "),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "Hi"}', mtime=0)[:-9], "a.jsonl.gz: broken gzip file: "),
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
    damaged = bytearray(gzip.compress(b'{"prompt": "Hi", "completion": "Hello"}\n' * 50, mtime=0))
    damaged[10:14] = bytes(byte ^ 0xFF for byte in damaged[10:14])
    (tmp_path / "a.jsonl.gz").write_bytes(damaged)
    assert refused(tmp_path / "a.jsonl.gz").startswith("a.jsonl.gz: broken gzip file: ")


def user(*said: str) -> list[dict[str, str]]:
    """Messages of a conversation in turns, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def answer(said: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": said}]


def called(name: str, arguments: Any, identity: str | None = None) -> dict[str, Any]:
    """A canonical tool call."""
    return {
        "type": "function",
        **({"id": identity} if identity else {}),
        "function": {"name": name, "arguments": arguments},
    }


def message(role: str, text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), **more}


def tree(*said: str) -> dict[str, Any]:
    """An OpenAssistant tree whose best thread is `said`; each turn has a worse
    sibling, and a prompter leaf hangs on the last."""
    node = message(("prompter", "assistant")[len(said) % 2], "leaf")
    for i, text in reversed([*enumerate(said)]):
        worse = [message(node["role"], "worse", rank=7)] if i + 1 < len(said) else []
        node = message(("prompter", "assistant")[i % 2], text, *worse, node, rank=1)
    return {"message_tree_id": "t", "prompt": node}


FROM = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
GEMINI_ROLES = {"assistant": "model", "tool": "function"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SINGLE = st.lists(TEXT, min_size=2, max_size=2).map(lambda said: user(*said))
WITH_SYSTEM = st.tuples(TEXT, SINGLE).map(lambda both: [{"role": "system", "content": both[0]}, *both[1]])
EVEN = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3).map(
    lambda both: user(*(said for pair in both for said in pair))
)
ANY = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(sorted(FROM)), TEXT),
    min_size=1,
    max_size=5,
)


def single(prompt: str, completion: str) -> Callable[[list[dict[str, str]]], dict[str, Any]]:
    """Writes one turn each of user and assistant, and the system prompt if there is one, as columns."""

    def write(messages: list[dict[str, str]]) -> dict[str, Any]:
        said = {m["role"]: m["content"] for m in messages}
        return {
            prompt: said["user"],
            completion: said["assistant"],
            **({"system": said["system"]} if "system" in said else {}),
        }

    return write


WRITERS: dict[str, tuple[st.SearchStrategy[Any], Callable[[list[dict[str, str]]], dict[str, Any]]]] = {
    "alpaca": (SINGLE | WITH_SYSTEM, single("instruction", "output")),
    "messages": (ANY, lambda messages: {"messages": messages}),
    "sharegpt": (
        ANY,
        lambda messages: {"conversations": [{"from": FROM[m["role"]], "value": m["content"]} for m in messages]},
    ),
    "conversation": (ANY, lambda messages: {"conversation": messages}),
    "openorca": (SINGLE, single("question", "response")),
    "responses": (
        ANY.map(lambda messages: [*user("Hi"), *messages]),
        lambda messages: {
            "input": messages[0]["content"],
            "output": [
                {
                    "type": "message",
                    **m,
                    "content": [
                        {"type": "output_text" if m["role"] == "assistant" else "input_text", "text": m["content"]}
                    ],
                }
                for m in messages[1:]
            ],
        },
    ),
    "gemini": (
        ANY,
        lambda messages: {
            "contents": [
                {"role": GEMINI_ROLES.get(m["role"], m["role"]), "parts": [{"text": m["content"]}]} for m in messages
            ]
        },
    ),
    "bedrock": (
        ANY,
        lambda messages: {
            "schemaVersion": "bedrock-conversation-2024",
            "messages": [{**m, "content": [{"text": m["content"]}]} for m in messages],
        },
    ),
    "anthropic": (WITH_SYSTEM, lambda messages: {"system": messages[0]["content"], "messages": messages[1:]}),
    "dolly": (SINGLE, single("instruction", "response")),
    "prompt_completion": (SINGLE | WITH_SYSTEM, single("prompt", "completion")),
    "prompt_response": (SINGLE | WITH_SYSTEM, single("prompt", "response")),
    "instances": (
        SINGLE,
        lambda messages: {
            "instruction": messages[0]["content"],
            "instances": [{"input": "", "output": messages[1]["content"]}],
        },
    ),
    "question_answer": (SINGLE | WITH_SYSTEM, single("question", "answer")),
    "flan": (SINGLE | WITH_SYSTEM, single("inputs", "targets")),
    "ultrachat": (EVEN, lambda messages: {"data": [m["content"] for m in messages]}),
    "xlam": (
        TEXT.map(
            lambda asked: [
                *user(asked),
                {"role": "assistant", "content": "", "tool_calls": [called("clock", {"zone": asked})]},
            ]
        ),
        lambda messages: {
            "query": messages[0]["content"],
            "tools": json.dumps([{"name": "clock", "parameters": {"zone": {"type": "str"}}}]),
            "answers": json.dumps([call["function"] for call in messages[1]["tool_calls"]]),
        },
    ),
    "glaive": (
        st.lists(TEXT.map(str.strip).filter(bool), min_size=2, max_size=2).map(lambda said: user(*said)),
        lambda messages: {
            "system": "",
            "chat": "\n\n\n".join(f"{m['role'].upper()}: {m['content']}" for m in messages),
        },
    ),
    "oasst": (EVEN, lambda messages: tree(*(m["content"] for m in messages))),
    "classification": (
        st.tuples(TEXT, TEXT).map(lambda both: user(both[0], both[1].strip())),
        lambda messages: {"text": messages[0]["content"], "label": messages[1]["content"]},
    ),
    "text": (TEXT.map(answer), lambda messages: {"text": messages[0]["content"]}),
}


def test_every_layout_has_a_round_trip() -> None:
    assert set(WRITERS) == set(LAYOUTS)


@pytest.mark.parametrize("layout", WRITERS)
def test_messages_written_in_a_layout_are_read_back_equal(
    layout: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    strategy, write = WRITERS[layout]
    path = tmp_path_factory.mktemp(layout) / "rows.jsonl"

    @settings(max_examples=30, deadline=None)
    @given(st.lists(strategy, min_size=1, max_size=4))
    def holds(conversations: list[Any]) -> None:
        records = to_records(jsonl(path, *map(write, conversations)), "rows.jsonl", layout)[1]
        assert [record["messages"] for record in records] == conversations

    holds()


def test_a_message_without_content_and_call_is_malformed(tmp_path: Path) -> None:
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}
    assert problem_of(to_records(jsonl(tmp_path / "a.jsonl", row), "a.jsonl")[1][0]) == "expected text, found NoneType"


def problem_of(record: dict[str, Any]) -> str:
    """Without the line, which every problem of a file that has lines names at its end."""
    problem, found, _ = json.loads(record["meta"]).get("problem", "").partition(" (line ")
    assert found or not problem or problem.startswith("no ")
    return problem


def test_a_problem_names_the_line_number_also_after_blank_lines(tmp_path: Path) -> None:
    records = to_records(jsonl(tmp_path / "a.jsonl", PAIR, "", "", {"prompt": "Hi"}), "a.jsonl")[1]
    assert (records[1]["source_row"], json.loads(records[1]["meta"])["problem"]) == (1, "no key 'completion' (line 4)")


def test_a_tree_accounts_for_every_message(tmp_path: Path) -> None:
    gone = message("assistant", "removed", message("prompter", "Why?"), rank=0, deleted=True)
    row = LAYOUT_ROWS["oasst"][0]
    row = {**row, "prompt": {**row["prompt"], "replies": [gone, *row["prompt"]["replies"]]}}
    record = to_records(jsonl(tmp_path / "a.jsonl", row), "a.jsonl")[1][0]
    assert turns(record) == LAYOUT_ROWS["oasst"][1], "a deleted reply is no reply"
    assert json.loads(record["meta"])["tree"] == {"messages": 6, "kept": 2, "unanswered": 1, "other_branches": 3}


@pytest.mark.parametrize(
    ("layout", "row", "problem"),
    [
        ("oasst", {"prompt": "Hi"}, "expected a message, found str"),
        ("oasst", {"prompt": message("prompter", "Hi", "Hello")}, "expected a message, found str"),  # type: ignore[arg-type]
        ("oasst", {"prompt": {**message("prompter", "Hi"), "replies": 3}}, "replies must be a list, found int"),
        ("nectar", {"answers": [3, 4]}, "expected an answer with its rank, found int"),
        (
            "preference",
            {"chosen": [{"role": "assistant", "content": [{"type": ["text"], "text": "Hello"}]}]},
            "the type of a content part must be text, found list",
        ),
    ],
)
def test_a_value_of_another_type_is_named(layout: str, row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (pair,) = pairs_of(tmp_path, {**PAIR_ROWS[layout][0], **row}, layout=layout)
    assert problem_of(pair) == problem


def test_a_rank_that_is_no_number_is_not_compared_as_text(tmp_path: Path) -> None:
    replies = [message("assistant", text, rank=rank) for text, rank in (("Good", "9"), ("Bad", "10"))]
    row = {"message_tree_id": "t", "prompt": message("prompter", "Hi", *replies)}
    assert problem_of(to_records(jsonl(tmp_path / "a.jsonl", row), "a.jsonl", "oasst")[1][0]) == (
        "rank must be a number, found str"
    )


def test_of_unranked_turns_the_one_that_was_answered_is_followed(tmp_path: Path) -> None:
    follow_ups = [message("prompter", "Bye"), message("prompter", "Why?", message("assistant", "Because."))]
    row = {"message_tree_id": "t", "prompt": message("prompter", "Hi", message("assistant", "Hello", *follow_ups))}
    assert [text for _, text in turns(to_records(jsonl(tmp_path / "a.jsonl", row), "a.jsonl")[1][0])] == [
        "Hi",
        "Hello",
        "Why?",
        "Because.",
    ]


def test_a_tree_without_a_reply_is_malformed(tmp_path: Path) -> None:
    row = {"message_tree_id": "t", "prompt": message("prompter", "Hi")}
    assert (
        problem_of(to_records(jsonl(tmp_path / "a.jsonl", row), "a.jsonl")[1][0]) == "the tree has no assistant reply"
    )


# Splits that a file brings with it


@pytest.mark.parametrize(
    ("label", "kept"), [*SPLITS.items(), ("Test ", "test"), ("DEV", "validation"), ("fold 3", "fold 3"), (3, 3)]
)
def test_a_rows_own_split_is_kept_in_one_spelling(label: Any, kept: Any, tmp_path: Path) -> None:
    record = to_records(jsonl(tmp_path / "a.jsonl", {**PAIR, "split": label}), "a.jsonl")[1][0]
    assert json.loads(record["meta"]) == {"split": kept}


def test_the_split_of_a_source_overrides_that_of_a_row_which_is_kept_in_meta(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", PAIR, {**PAIR, "split": "train"}, {**PAIR, "split": "test"}, "broken")
    records = to_records(path, "a.jsonl", split="test")[1]
    assert [json.loads(record["meta"]) for record in records[:3]] == [
        {"split": "test"},
        {"split": "test", "row": {"split": "train"}},
        {"split": "test"},
    ]
    assert problem_of(records[3])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("a/b/Test.jsonl.gz", "test"),
        ("data/validation-00000-of-00002.parquet", "validation"),
        ("data/test-00000-of-00001-a09b74b3ef9c3b56.parquet", "test"),
        ("set/test/data-00000-of-00002.arrow", "test"),
        ("validation/dataset.arrow", "validation"),
        ("mine/data-00000-of-00002.arrow", None),
        ("val.csv", "validation"),
        ("training_notes.jsonl", None),
        ("test/a.jsonl", None),
        ("latest.jsonl", None),
    ],
)
def test_a_file_is_named_after_a_split_or_not(name: str, split: str | None) -> None:
    assert split_of_file(name) == split


def test_files_named_after_splits_label_their_rows_if_requested(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl", "more.jsonl"):
        jsonl(tmp_path / name, PAIR)
    for split, expected in [("from_file_names", ["validation", None, "train"]), (None, [None] * 3)]:
        records = to_records(tmp_path, "set", split=split)[1]
        assert [json.loads(record["meta"]).get("split") for record in records] == expected
    with pytest.raises(InputError, match=r"more\.jsonl: no file name contains a split"):
        to_records(tmp_path / "more.jsonl", "more.jsonl", split="from_file_names")


# Folders


def test_each_file_of_a_folder_is_a_source_with_its_own_layout(tmp_path: Path) -> None:
    (tmp_path / "set/b").mkdir(parents=True)
    jsonl(tmp_path / "set/b/a.jsonl", LAYOUT_ROWS["dolly"][0], {"instruction": 3, "response": "x"})
    jsonl(tmp_path / "set/a.jsonl", PAIR, PAIR)
    layout, records = to_records(tmp_path / "set", "data/sources/set/")
    assert layout == "prompt_completion, dolly"
    assert [(record["source"], record["source_row"]) for record in records] == [
        ("data/sources/set/a.jsonl", 0),
        ("data/sources/set/a.jsonl", 1),
        ("data/sources/set/b/a.jsonl", 0),
        ("data/sources/set/b/a.jsonl", 1),
    ]
    assert [bool(record["messages"]) for record in records] == [True, True, True, False]


def test_a_file_of_a_folder_that_is_refused_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set/a.jsonl", PAIR)
    jsonl(tmp_path / "set/b.jsonl", {"x": 1})
    assert refused(tmp_path / "set") == "set/b.jsonl: unknown format (keys of the first row: x)"


def test_preferences_of_a_folder_have_their_file_as_source(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        jsonl(tmp_path / name, *PAIR_ROWS["kto"])
    assert [(pair["source"], pair["source_rows"]) for pair in to_pairs(tmp_path, "set")[1]] == [
        ("set/a.jsonl", [0, 1]),
        ("set/b.jsonl", [0, 1]),
    ]


# Columns of one's own


def test_a_mapping_reads_custom_columns(tmp_path: Path) -> None:
    row = {"q": "Hi", "a": "Hello", "who": "Be brief.", "topic": "zoo", "prompt": "kept", "category": "kept too"}
    mapping = {"prompt": "q", "response": "a", "system": "who", "category": "topic"}
    layout, records = to_records(jsonl(tmp_path / "a.jsonl", row), "a.jsonl", mapping=mapping)
    assert (layout, turns(records[0]), records[0]["category"]) == (
        "mapping",
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
        "zoo",
    )
    assert json.loads(records[0]["meta"]) == {"prompt": "kept", "category": "kept too"}


def test_an_unnamed_index_column_is_not_a_system_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",q,a\n0,Hi,Hello\n1,Ho,Hey\n")
    records = to_records(tmp_path / "a.csv", "a.csv", mapping={"prompt": "q", "response": "a"})[1]
    assert [turns(record) for record in records] == [
        [("user", "Hi"), ("assistant", "Hello")],
        [("user", "Ho"), ("assistant", "Hey")],
    ]


def test_a_row_without_a_mapped_column_is_malformed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"q": "Hi", "a": "Hello"}, {"q": "Hi"})
    records = to_records(path, "a.jsonl", mapping={"prompt": "q", "response": "a"})[1]
    assert [problem_of(record) for record in records] == ["", "no key 'a'"]


@pytest.mark.parametrize(
    ("layout", "mapping", "message"),
    [
        (
            "auto",
            {"prompt": "q", "answer": "a"},
            f"a.jsonl: mapping: unknown field 'answer'; fields: {', '.join(RECORD_FIELDS)}",
        ),
        ("auto", {"prompt": "q"}, "a.jsonl: mapping: no column for response"),
        ("auto", {"prompt": "q", "response": "q"}, "a.jsonl: mapping: column 'q' is named twice"),
        ("auto", {"prompt": "q", "response": "b"}, "a.jsonl: mapping: no row has the columns b, q"),
        ("alpaca", {"prompt": "q", "response": "a"}, "a.jsonl: both a format (alpaca) and a mapping"),
    ],
)
def test_a_wrong_mapping_is_refused(layout: str, mapping: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        to_records(jsonl(tmp_path / "a.jsonl", {"q": "Hi", "a": "Hello"}), "a.jsonl", layout, mapping)
    assert caught.value.what == message
    assert caught.value.hint


def test_a_source_takes_a_mapping_and_refuses_a_wrong_one(tmp_path: Path) -> None:
    (tmp_path / "data/sources").mkdir(parents=True)
    jsonl(tmp_path / "data/sources/a.jsonl", {"q": "Hi", "a": "Hello"})
    source = {"path": "data/sources/a.jsonl", "mapping": {"prompt": "q", "response": "a"}}
    report = raw_examples.produce(
        tmp_path, parse(raw_examples.Params, {"sources": [source]}, "raw_examples"), tmp_path / "out"
    )
    assert report.metrics["sources"]["data/sources/a.jsonl"]["format"] == "mapping"
    assert turns(read_records(tmp_path / "out")[0]) == [("user", "Hi"), ("assistant", "Hello")]
    with pytest.raises(
        InputError, match=r"raw_examples\.sources\.0\.mapping: unknown field 'question'; fields: prompt"
    ):
        parse(raw_examples.Params, {"sources": [{**source, "mapping": {"question": "q"}}]}, "raw_examples")


# Preference pairs


def pairs_of(path: Path, *rows: Any, layout: str = "auto") -> list[dict[str, Any]]:
    return to_pairs(jsonl(path / "a.jsonl", *rows), "a.jsonl", layout)[1]


def sides(pair: dict[str, Any]) -> tuple[Any, Any, Any]:
    return pair["prompt"], pair["chosen"], pair["rejected"]


def test_every_pair_layout_has_an_example_here() -> None:
    assert set(PAIR_ROWS) == set(PAIR_LAYOUTS)


@pytest.mark.parametrize("layout", PAIR_ROWS)
def test_each_pair_layout_is_detected_by_its_keys_and_read_in_full(layout: str, tmp_path: Path) -> None:
    found, pairs = to_pairs(jsonl(tmp_path / "a.jsonl", *PAIR_ROWS[layout]), "a.jsonl")
    assert (found, [sides(pair) for pair in pairs]) == (layout, [(user("Hi"), answer("Hello"), answer("What?"))])
    assert [row for pair in pairs for row in pair["source_rows"]] == [*range(len(PAIR_ROWS[layout]))]


TEXTS = {
    "orca_dpo": ("question", "chosen", "rejected"),
    "helpsteer": ("response1", "response2"),
    "nectar": ("prompt",),
    "pku_saferlhf": ("prompt", "response_0", "response_1"),
    "shp": ("history", "human_ref_A", "human_ref_B"),
}
"""Columns that are text in every row of a layout."""


@pytest.mark.parametrize(("layout", "key"), [(layout, key) for layout, keys in TEXTS.items() for key in keys])
def test_messages_in_a_column_of_texts_are_refused(layout: str, key: str, tmp_path: Path) -> None:
    """No reader would bring them into the canonical form, nor account for their fields."""
    (row,) = PAIR_ROWS[layout]
    (pair,) = pairs_of(tmp_path, {**row, key: [{"role": "human", "content": "Hi", "id": 7}]}, layout=layout)
    assert sides(pair) == ([], [], []) and problem_of(pair) == "expected text, found list"


@pytest.mark.parametrize("layout", PAIR_ROWS)
def test_a_malformed_preference_keeps_its_place(layout: str, tmp_path: Path) -> None:
    broken = dict.fromkeys(PAIR_ROWS[layout][0], 3)
    pairs = pairs_of(tmp_path, broken, *PAIR_ROWS[layout], layout=layout)
    assert sides(pairs[0]) == ([], [], [])
    assert problem_of(pairs[0])
    assert sides(pairs[1])[0] == user("Hi")


TREES = ["oasst"]
"""Layouts that hold examples and preferences alike."""


@pytest.mark.parametrize("layout", PAIR_ROWS)
def test_preferences_are_read_as_examples_only_with_an_explicit_format(layout: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *PAIR_ROWS[layout])
    assert kind(read_rows(path)) == ("examples" if layout in TREES else "preferences")
    if layout not in TREES:
        keys = ", ".join(sorted(PAIR_LAYOUTS[layout].keys))
        assert refused(path) == f"a.jsonl: the rows are preferences ({layout}: {keys}), not examples to imitate"


def test_the_refusal_of_preferences_names_the_way_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *PAIR_ROWS["kto"])
    with pytest.raises(InputError) as caught:
        to_records(path, "a.jsonl")
    assert (
        caught.value.hint
        == "list the file under raw_preferences; to imitate all of it nevertheless, set format: prompt_completion"
    )
    layout, records = to_records(path, "a.jsonl", "prompt_completion")
    assert (layout, [json.loads(record["meta"])["label"] for record in records]) == ("prompt_completion", [True, False])


@pytest.mark.parametrize("layout", LAYOUT_ROWS)
def test_examples_are_not_taken_for_preferences(layout: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", LAYOUT_ROWS[layout][0])
    assert kind(read_rows(path)) == "examples"
    if layout not in TREES:
        with pytest.raises(InputError, match=rf"a\.jsonl: the rows are examples \({layout}: .*\), not preferences"):
            to_pairs(path, "a.jsonl")


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{**PAIR, "label": "spam"}], "examples"),
        ([{**PAIR, "label": True}] * 2 + [{**PAIR, "label": None}], "preferences"),
        ([{**PAIR, "label": True}] + [PAIR] * 2, "examples"),
        ([{**PAIR, "chosen": None, "rejected": None}], "examples"),
        ([{"messages": user("Hi", "Hello"), **PAIR_ROWS["preference"][0]}], "preferences"),
        ([{"messages": user("Hi", "Hello"), "system": "Be brief.", "label": True}], "preferences"),
        ([{"messages": user("Hi", "Hello"), "system": "Be brief.", "kto_tag": False}], "preferences"),
        ([{"messages": user("Hi", "Hello"), "system": "Be brief.", "label": "spam"}], "examples"),
        ([{"x": 1}], "examples"),
    ],
)
def test_the_majority_of_rows_decides_the_kind(rows: list[dict[str, Any]], found: str, tmp_path: Path) -> None:
    assert kind(read_rows(jsonl(tmp_path / "a.jsonl", *rows))) == found


@pytest.mark.parametrize("layouts", [LAYOUTS, PAIR_LAYOUTS])
def test_rows_in_no_layout_are_refused_with_all_layouts(layouts: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl: unknown format \(keys of the first row: x\)") as caught:
        detect(read_rows(jsonl(tmp_path / "a.jsonl", {"x": 1})), "a.jsonl", layouts)
    assert all(name in caught.value.hint for name in layouts)
    assert caught.value.hint.startswith("for other columns set a mapping, e.g. `mapping: {prompt: q, ")


def pair_writers(prompt: list[str], good: str, bad: str) -> dict[str, list[dict[str, Any]]]:
    """The pair in every layout that can say it. `prompt` is turns, the user first and last."""
    asked = user(*prompt)
    conversation = [{"from": FROM[m["role"]], "value": m["content"]} for m in asked]
    transcript = "".join(
        f"\n\n{ {'user': 'Human', 'assistant': 'Assistant'}[m['role']] }: {m['content']}" for m in asked
    )
    best, *others = reversed([*enumerate(prompt)])
    node = message("prompter", best[1], message("assistant", bad, rank=3), message("assistant", good, rank=1))
    for i, text in others:
        node = message(("prompter", "assistant")[i % 2], text, node)
    return {
        "preference": [{"prompt": asked, "chosen": answer(good), "rejected": answer(bad)}],
        "sharegpt": [
            {
                "conversations": conversation,
                "chosen": {"from": "gpt", "value": good},
                "rejected": {"from": "gpt", "value": bad},
            }
        ],
        "transcripts": [
            {"chosen": f"{transcript}\n\nAssistant: {good}", "rejected": f"{transcript}\n\nAssistant: {bad}"}
        ],
        "kto": [
            {"prompt": asked, "completion": bad, "label": False},
            {"prompt": asked, "completion": good, "label": True},
        ],
        "openai_dpo": [
            {"input": {"messages": asked}, "preferred_output": answer(good), "non_preferred_output": answer(bad)}
        ],
        "alpaca_dpo": [
            {
                "history": [list(turns) for turns in zip(prompt[:-1:2], prompt[1::2], strict=True)],
                "instruction": prompt[-1],
                "chosen": good,
                "rejected": bad,
            }
        ],
        "gemini": [
            {
                "contents": [
                    {"role": GEMINI_ROLES.get(m["role"], m["role"]), "parts": [{"text": m["content"]}]} for m in asked
                ],
                "completions": [
                    {"score": score, "completion": {"role": "model", "parts": [{"text": said}]}}
                    for score, said in ((1, good), (0.0, bad))
                ],
            }
        ],
        "oasst": [{"message_tree_id": "t", "prompt": node}],
        "arena": [
            {"winner": "model_a", "conversation_a": [*asked, *answer(good)], "conversation_b": [*asked, *answer(bad)]}
        ],
        "helpsteer": [{"context": asked, "response1": bad, "response2": good, "overall_preference": 3}],
        **(
            {
                "alpaca_eval": [{"instruction": prompt[0], "output_1": good, "output_2": bad, "preference": 1}],
                "orca_dpo": [{"question": prompt[0], "chosen": good, "rejected": bad}],
                "pku_saferlhf": [{"prompt": prompt[0], "response_0": good, "response_1": bad, "better_response_id": 0}],
                "shp": [{"history": prompt[0], "human_ref_A": bad, "human_ref_B": good, "labels": 0}],
                "nectar": [
                    {
                        "prompt": prompt[0],
                        "answers": [{"answer": bad, "rank": 3}, {"answer": good, "rank": 1}],
                        "num_responses": 2,
                    }
                ],
            }
            if len(prompt) == 1
            else {}
        ),
    }


ONE_TURN = {"alpaca_eval", "orca_dpo", "pku_saferlhf", "shp", "nectar"}


@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
def test_a_pair_written_in_a_layout_is_read_back_equal(layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp(layout)
    turns_of_prompt = st.lists(TEXT, min_size=1, max_size=1 if layout in ONE_TURN else 5).filter(
        lambda said: len(said) % 2 == 1
    )

    @settings(max_examples=30, deadline=None)
    @given(turns_of_prompt, TEXT, TEXT)
    def holds(prompt: list[str], good: str, bad: str) -> None:
        pairs = pairs_of(folder, *pair_writers(prompt, good, bad)[layout], layout=layout)
        assert [sides(pair) for pair in pairs] == [(user(*prompt), answer(good), answer(bad))]

    holds()


def test_a_prompt_repeated_in_both_completions_is_removed(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "chosen": user("Hi", "Hello"), "rejected": user("Hi", "What?"), "margin": 2}
    assert [(sides(pair), pair["margin"]) for pair in pairs_of(tmp_path, row)] == [
        ((user("Hi"), answer("Hello"), answer("What?")), 2.0)
    ]


def test_pairs_in_the_columns_of_alpaca_are_those_of_the_preference_layout(tmp_path: Path) -> None:
    more = {"system": "Be brief.", "margin": 2, "category": "zoo", "stars": 4}
    rows = [
        {"instruction": "Name it.", "input": "A bird.", "chosen": "Wren", "rejected": "Dog", **more},
        {"instruction": "Name it.", "input": "", "chosen": "Wren", "rejected": "Dog", **more},
        {"instruction": "Name it.", "chosen": answer("Wren"), "rejected": answer("Dog"), **more},
    ]
    same = [{"prompt": "Name it.", "chosen": "Wren", "rejected": "Dog", **more}] * 3
    same[0] = {**same[0], "prompt": "Name it.\n\nA bird."}
    found = to_pairs(jsonl(tmp_path / "a.jsonl", *rows), "a.jsonl")
    assert found[1] == to_pairs(jsonl(tmp_path / "b.jsonl", *same), "a.jsonl")[1]
    assert found[0] == "alpaca_dpo" and json.loads(found[1][0]["meta"]) == {"stars": 4}


def test_the_history_of_llama_factory_is_the_beginning_of_the_conversation(tmp_path: Path) -> None:
    row = {
        "system": "Be brief.",
        "instruction": "Name it.",
        "input": "A bird.",
        "history": [["Hi", "Hello"], ["Bye", "No!"]],
    }
    system, before = (
        {"role": "system", "content": "Be brief."},
        user("Hi", "Hello", "Bye", "No!", "Name it.\n\nA bird."),
    )
    (record,) = to_records(jsonl(tmp_path / "a.jsonl", {**row, "output": "Wren"}), "a.jsonl")[1]
    same = {"messages": [system, *before, *answer("Wren")]}
    assert record["example_id"] == to_records(jsonl(tmp_path / "b.jsonl", same), "a.jsonl")[1][0]["example_id"]
    assert (record["messages"], json.loads(record["meta"])) == (same["messages"], {"input": "A bird."})
    assert "ignored" not in record
    expected = ([system, *before], answer("Wren"), answer("Dog"))
    (pair,) = pairs_of(tmp_path, {**row, "chosen": "Wren", "rejected": "Dog"})
    kto = [{**row, "output": said, "kto_tag": good} for said, good in (("Dog", False), ("Wren", True))]
    assert sides(pair) == expected == sides(pairs_of(tmp_path, *kto)[0])
    odd = {**row, "history": "Hi", "chosen": "Wren", "rejected": "Dog"}
    assert problem_of(pairs_of(tmp_path, odd)[0]) == "history must be a list of pairs of texts"
    empty = to_records(jsonl(tmp_path / "a.jsonl", {"instruction": "Hi", "history": [], "output": "Hello"}), "a.jsonl")
    assert turns(empty[1][0]) == [("user", "Hi"), ("assistant", "Hello")]


def test_pairs_of_messages_with_two_answers_are_those_of_the_preference_layout(tmp_path: Path) -> None:
    asked, good, bad = user("Hi", "Hello", "Bye"), answer("Bye!"), answer("What?")
    rows = [{"chosen": good[0], "rejected": bad[0]}, {"chosen": [*asked, *good], "rejected": [*asked, *bad]}]
    found = to_pairs(jsonl(tmp_path / "a.jsonl", *[{"messages": asked, **row} for row in rows]), "a.jsonl")
    same = to_pairs(jsonl(tmp_path / "b.jsonl", *[{"prompt": asked, **row} for row in rows]), "a.jsonl")
    assert (found[0], found[1]) == ("sharegpt", same[1]) and [sides(pair) for pair in found[1]] == [
        (asked, good, bad)
    ] * 2
    whole = {"messages": [*asked, *good], "chosen": [*asked, *good], "rejected": [*asked, *bad]}
    assert problem_of(pairs_of(tmp_path, whole)[0]), "the prompt has an answer already"


def test_a_system_prompt_that_only_the_completions_have_is_that_of_the_prompt(tmp_path: Path) -> None:
    system, other = ({"role": "system", "content": text} for text in ("Be brief.", "Be long."))
    row = {"prompt": "Hi", "chosen": [system, *user("Hi", "Hello")], "rejected": [system, *user("Hi", "What?")]}
    assert sides(pairs_of(tmp_path, row)[0]) == ([system, *user("Hi")], answer("Hello"), answer("What?"))
    refused = [
        {**row, "rejected": [other, *user("Hi", "What?")]},
        {**row, "prompt": "Ho"},
        {**row, "prompt": [other, *user("Hi")]},
    ]
    assert {problem_of(pair) for pair in pairs_of(tmp_path, *refused)} == {
        "chosen and rejected do not answer the same prompt"
    }


def test_the_prompt_of_a_pair_is_the_common_part_of_both_conversations(tmp_path: Path) -> None:
    row = {"chosen": user("Hi", "Hello", "Bye", "Bye!"), "rejected": user("Hi", "What?", "Well", "Hm")}
    pair = pairs_of(tmp_path, row)[0]
    assert (pair["prompt"], len(pair["chosen"]), len(pair["rejected"])) == (user("Hi"), 3, 3)


def test_a_prompt_ends_with_a_user_turn_if_conversations_diverge_there(tmp_path: Path) -> None:
    row = {"chosen": user("Hi", "Hello", "Bye", "Bye!"), "rejected": user("Hi", "Hello", "What?", "Hm")}
    pair = pairs_of(tmp_path, row)[0]
    assert (pair["prompt"], len(pair["chosen"]), len(pair["rejected"])) == (user("Hi"), 3, 3)


@pytest.mark.parametrize("margin", [10**400, "two", "nan", "1e999", True])
def test_a_margin_that_is_not_a_number_is_malformed(margin: Any, tmp_path: Path) -> None:
    assert problem_of(pairs_of(tmp_path, {**PAIR_ROWS["preference"][0], "margin": margin})[0])


def test_transcripts_of_different_prompts_are_malformed(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Ho\n\nAssistant: Hello"}
    assert problem_of(pairs_of(tmp_path, row)[0]) == "chosen and rejected do not answer the same prompt"


@pytest.mark.parametrize(
    ("preference", "chosen", "margin"), [(1, "A", 1.0), (2, "B", 1.0), (1.5, "A", 0.0), (0, "A", 0.0), (1.75, "B", 0.5)]
)
def test_the_preferred_output_is_chosen_and_a_tie_has_no_margin(
    preference: float, chosen: str, margin: float, tmp_path: Path
) -> None:
    row = {"instruction": "Hi", "output_1": "A", "output_2": "B", "preference": preference}
    assert [(pair["chosen"], pair["margin"]) for pair in pairs_of(tmp_path, row)] == [(answer(chosen), margin)]


@pytest.mark.parametrize("preference", [None, 0.5, 3, False, "one", ""])
def test_a_preference_for_neither_output_is_malformed(preference: Any, tmp_path: Path) -> None:
    row = {"instruction": "Hi", "output_1": "A", "output_2": "B", "preference": preference}
    assert problem_of(pairs_of(tmp_path, row)[0])


def test_good_and_bad_completions_of_a_prompt_are_paired_and_the_others_reported(tmp_path: Path) -> None:
    labels = [("Hi", "a", True), ("Ho", "b", False), ("Hi", "c", True), ("Hi", "d", False)]
    rows = [
        {"prompt": prompt, "completion": text, "label": label, "stars": i}
        for i, (prompt, text, label) in enumerate(labels)
    ]
    pairs = pairs_of(tmp_path, *rows)
    assert [pair["source_rows"] for pair in pairs] == [[0, 3], [1], [2]]
    assert sides(pairs[0]) == (user("Hi"), answer("a"), answer("d"))
    assert json.loads(pairs[0]["meta"]) == {"chosen": {"stars": 0}, "rejected": {"stars": 3}}
    assert [problem_of(pair) for pair in pairs[1:]] == [
        "no chosen completion of the same prompt",
        "no rejected completion of the same prompt",
    ]


KTO_ROWS: dict[str, Callable[[str], dict[str, Any]]] = {
    "TRL": lambda said: {"prompt": "Hi", "completion": said},
    "TRL, conversational": lambda said: {"prompt": user("Hi"), "completion": answer(said)},
    "LLaMA-Factory, messages": lambda said: {"messages": user("Hi", said)},
    "LLaMA-Factory, conversations": lambda said: {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": said}]
    },
}


@pytest.mark.parametrize("form", KTO_ROWS)
@pytest.mark.parametrize("layout", ["auto", "kto"])
def test_answers_called_good_or_bad_are_preferences_in_each_form(form: str, layout: str, tmp_path: Path) -> None:
    rows = [{**KTO_ROWS[form]("Hello"), "label": True, "stars": 4}, {**KTO_ROWS[form]("What?"), "label": False}]
    (found,) = pairs_of(tmp_path, *rows, layout=layout)
    assert (sides(found), found["source_rows"]) == ((user("Hi"), answer("Hello"), answer("What?")), [0, 1])
    assert json.loads(found["meta"]) == {"chosen": {"stars": 4}, "rejected": {}}


@pytest.mark.parametrize("judged", ["label", "kto_tag"])
def test_answers_called_good_or_bad_are_refused_as_examples_and_the_refusal_names_raw_preferences(
    judged: str, tmp_path: Path
) -> None:
    rows = [{"messages": user("Hi", said), judged: good} for said, good in (("Hello", True), ("What?", False))]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert refused(path) == f"a.jsonl: the rows are preferences (kto: {judged}, messages), not examples to imitate"
    with pytest.raises(InputError) as caught:
        to_records(path, "a.jsonl")
    assert caught.value.hint.startswith("list the file under raw_preferences")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": user("Hi", "Hello"), "label": "spam"},
        {"messages": user("Hi", "Hello"), "label": 1},
        {"instruction": "Hi", "output": "A", "label": True},
    ],
)
def test_another_label_does_not_make_examples_preferences(row: dict[str, Any], tmp_path: Path) -> None:
    assert kind(read_rows(jsonl(tmp_path / "a.jsonl", row))) == "examples"


def test_true_and_false_of_a_table_are_judgements(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,label\nHi,Hello,True\nHi,What?,False\n")
    assert refused(tmp_path / "a.csv").startswith("a.csv: the rows are preferences (kto: ")
    assert [sides(pair) for pair in to_pairs(tmp_path / "a.csv", "a.csv")[1]] == [
        (user("Hi"), answer("Hello"), answer("What?"))
    ]


@pytest.mark.parametrize("labels", [(1, 0), (1.0, 0.0), ("1", "0"), (True, 0)])
def test_ones_and_zeros_are_judgements(labels: tuple[Any, Any], tmp_path: Path) -> None:
    good, bad = (
        {**PAIR_ROWS["kto"][0], "completion": said, "label": label}
        for said, label in zip(("Hello", "What?"), labels, strict=True)
    )
    rows = [good, bad, {**bad, "label": 0}, {**good, "label": 1}]
    found = pairs_of(tmp_path, *rows)
    assert [sides(pair)[1:] for pair in found] == [(answer("Hello"), answer("What?"))] * 2
    path = jsonl(tmp_path / "a.jsonl", *rows, {**good, "label": ""})
    assert kind(read_rows(path)) == "preferences"
    assert refused(path).startswith("a.jsonl: the rows are preferences (kto: ")


@pytest.mark.parametrize("labels", [(0, 1, 2), (1, 1, 1), (0, 1, "spam"), (0, 1, None, 0.5)])
def test_other_numbers_are_classes_of_examples(labels: tuple[Any, ...], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({**PAIR, "label": label} for label in labels))
    assert (kind(read_rows(path)), to_records(path, "a.jsonl")[0]) == ("examples", "prompt_completion")


def test_a_mapped_column_named_system_or_margin_is_only_what_it_is_mapped_to(tmp_path: Path) -> None:
    row = {"system": "Hi", "good": "Hello", "bad": "What?", "margin": "greeting"}
    mapping = {"prompt": "system", "chosen": "good", "rejected": "bad", "category": "margin"}
    (pair,) = to_pairs(jsonl(tmp_path / "a.jsonl", row), "a.jsonl", mapping=mapping)[1]
    assert (sides(pair), pair["category"], pair["margin"], pair["meta"]) == (
        (user("Hi"), answer("Hello"), answer("What?")),
        "greeting",
        None,
        "{}",
    )


def test_numbers_of_a_table_are_margins_and_preferences(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,margin\nHi,Hello,What?,0.5\nHi,Hello,No,2\nHi,Hello,Hm,\n")
    assert [pair["margin"] for pair in to_pairs(tmp_path / "a.csv", "a.csv")[1]] == [0.5, 2.0, None]
    (tmp_path / "b.csv").write_text("instruction,output_1,output_2,preference\nHi,A,B,1.75\n")
    assert [(pair["chosen"], pair["margin"]) for pair in to_pairs(tmp_path / "b.csv", "b.csv")[1]] == [
        (answer("B"), 0.5)
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": user("Hi", "Hello", "Bye"), "label": True},
            "the conversation must end with an answer of the assistant, after a prompt",
        ),
        (
            {"messages": answer("Hello"), "label": True},
            "the conversation must end with an answer of the assistant, after a prompt",
        ),
        ({"messages": user("Hi", "Hello"), "label": 2}, "label must be true or false, or 1 or 0, found 2"),
        ({"messages": user("Hi", "Hello")}, "no key 'label'"),
    ],
)
def test_an_unreadable_labeled_conversation_states_the_reason(
    row: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    assert problem_of(pairs_of(tmp_path, row, layout="kto")[0]) == problem


def test_each_instance_of_an_instruction_is_a_record_of_the_same_source_row(tmp_path: Path) -> None:
    row = {
        "instruction": "Add.",
        "topic": "sums",
        "input": "outer",
        "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "0", "stars": 4}],
    }
    records = to_records(jsonl(tmp_path / "a.jsonl", LAYOUT_ROWS["instances"][0], row), "a.jsonl")[1]
    assert [(record["source_row"], turns(record)) for record in records[1:]] == [
        (1, [("user", "Add.\n\n1 2"), ("assistant", "3")]),
        (1, [("user", "Add."), ("assistant", "0")]),
    ]
    assert [json.loads(record["meta"]) for record in records[1:]] == [
        {"topic": "sums", "instance": 0, "input": "1 2", "row": {"input": "outer"}},
        {"topic": "sums", "instance": 1, "stars": 4, "row": {"input": "outer"}},
    ]


def test_an_unreadable_instance_is_counted_and_the_others_kept(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "instances": ["1 2", {"input": "1 2"}, {"input": "1 2", "output": "3"}]}
    records = to_records(jsonl(tmp_path / "a.jsonl", row, {"instruction": "Add.", "instances": []}), "a.jsonl")[1]
    assert [(record["source_row"], problem_of(record)) for record in records] == [
        (0, "instance 0: expected an object, found str"),
        (0, "no key 'output'"),
        (0, ""),
        (1, "`instances` must be a list with at least one instance"),
    ]
    assert json.loads(records[0]["meta"])["row"]["instances"] == ["1 2"]


def test_the_report_of_a_source_counts_its_rows_and_the_examples_in_them(tmp_path: Path) -> None:
    (tmp_path / "data/sources").mkdir(parents=True)
    row = {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "3 4", "output": "7"}]}
    jsonl(tmp_path / "data/sources/a.jsonl", row, row)
    report = raw_examples.produce(
        tmp_path, raw_examples.Params(sources=[raw_examples.Source(path="data/sources/a.jsonl")]), tmp_path / "out"
    )
    facts = report.metrics["sources"]["data/sources/a.jsonl"]
    assert (facts["rows"], facts["examples"], report.rows_in, report.rows_out) == (2, 4, 4, 4)


def test_the_best_reply_is_compared_with_each_that_is_ranked_below_it(tmp_path: Path) -> None:
    replies = [
        message("assistant", text, **({"rank": rank} if rank is not None else {}))
        for text, rank in [("c", 2), ("a", 0), ("b", 1), ("tied", 0), ("x", None)]
    ]
    pairs = pairs_of(tmp_path, {"message_tree_id": "t", "prompt": message("prompter", "Hi", *replies)})
    assert [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in pairs] == [
        (answer("a"), answer("b"), 1.0),
        (answer("a"), answer("c"), 2.0),
    ]


def test_a_mapping_reads_pairs_from_custom_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"q": "Hi", "good": "Hello", "bad": "What?", "stars": 4})
    layout, pairs = to_pairs(path, "a.jsonl", mapping={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert (layout, sides(pairs[0])) == ("mapping", (user("Hi"), answer("Hello"), answer("What?")))
    assert json.loads(pairs[0]["meta"]) == {"stars": 4}


# Rows of any shape

NAMES = ["role", "content", "from", "value", "text", "replies", "rank", "tool_calls", "category"]
SHAPES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.sampled_from(["", "user", "human", "assistant", "prompter", "\n\nHuman: Hi"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("read", "layout", "keys"),
    [(to_records, name, sorted(layout.used)) for name, layout in LAYOUTS.items()]
    + [(to_pairs, name, sorted(layout.used)) for name, layout in PAIR_LAYOUTS.items()],
)
def test_a_row_of_any_shape_is_read_or_malformed_and_never_lost(
    read: Callable[..., Any], layout: str, keys: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp(layout) / "a.jsonl"

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys([*keys, "category"], SHAPES)), min_size=1, max_size=4)
    )
    def holds(rows: list[dict[str, Any]]) -> None:
        found = read(jsonl(path, *rows), "a.jsonl", layout)[1]
        if read is to_records:
            assert [*dict.fromkeys(record["source_row"] for record in found)] == [*range(len(rows))]
        else:
            assert {row for pair in found for row in pair["source_rows"]} == set(range(len(rows)))
        for entry in found:
            told = (
                entry["messages"] if read is to_records else entry["chosen"] and entry["rejected"] and entry["prompt"]
            )
            assert bool(told) != bool(problem_of(entry))

    holds()


@pytest.mark.parametrize(
    ("value", "category"), [(3, "3"), (0, "0"), (True, "true"), ("3", "3"), (2.5, None), (["a"], None)]
)
def test_a_whole_number_is_a_category_as_in_csv_and_other_values_stay_in_meta(
    value: Any, category: str | None, tmp_path: Path
) -> None:
    mapping = {"prompt": "prompt", "response": "completion", "category": "topic"}
    for key, more in (("category", {}), ("topic", {"mapping": mapping})):
        record = to_records(jsonl(tmp_path / "a.jsonl", {**PAIR, key: value}), "a.jsonl", **more)[1][0]
        assert (record["category"], json.loads(record["meta"])) == (category, {key: value} if category is None else {})


# Data that nobody here wrote

real = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data, the real data sets, is missing")


@real
def test_every_row_of_a_real_alpaca_file_is_read() -> None:
    layout, records = to_records(SHARED_DATA / "alpaca_en_demo.json", "alpaca_en_demo.json")
    assert (layout, len(records), [record for record in records if not record["messages"]]) == ("alpaca", 999, [])


@real
def test_every_row_of_a_real_preference_file_is_a_pair() -> None:
    layout, pairs = to_pairs(SHARED_DATA / "dpo_en_demo.json", "dpo_en_demo.json")
    assert (layout, len(pairs), [pair for pair in pairs if not pair["prompt"]]) == ("sharegpt", 300, [])
    assert {(pair["prompt"][-1]["role"], pair["chosen"][0]["role"], pair["rejected"][0]["role"]) for pair in pairs} == {
        ("user", "assistant", "assistant")
    }


@real
def test_every_real_tree_ends_on_the_assistant_and_accounts_for_its_messages() -> None:
    layout, records = to_records(SHARED_DATA / "oasst_en_100_tree.jsonl", "oasst")
    assert (layout, len(records), {record["messages"][-1]["role"] for record in records}) == (
        "oasst",
        100,
        {"assistant"},
    )
    total: Counter[str] = Counter()
    for record in records:
        total.update(json.loads(record["meta"])["tree"])
    assert total["messages"] == 1167 == total["kept"] + total["unanswered"] + total["other_branches"]
    assert total["kept"] == sum(len(record["messages"]) for record in records)


@real
def test_every_ranked_reply_of_the_real_trees_except_the_best_is_rejected_once() -> None:
    layout, pairs = to_pairs(SHARED_DATA / "oasst_en_100_tree.jsonl", "oasst")
    ranks: Counter[bool] = Counter()
    messages = [row.value["prompt"] for row in read_rows(SHARED_DATA / "oasst_en_100_tree.jsonl") if row.value]
    for found in messages:
        messages += found["replies"]
        ranks[found.get("rank", 0) > 0] += 1
    assert (layout, len([pair for pair in pairs if pair["prompt"]])) == ("oasst", ranks[True])
    assert {row for pair in pairs for row in pair["source_rows"]} == set(range(100))


@real
@pytest.mark.parametrize(("name", "rows"), [("gsm8k_train.jsonl", 7473), ("gsm8k_test.jsonl", 1319)])
def test_every_row_of_a_real_question_file_is_read(name: str, rows: int) -> None:
    layout, records = to_records(SHARED_DATA / name, name)
    assert (layout, len(records), [record for record in records if not record["messages"]]) == (
        "question_answer",
        rows,
        [],
    )
