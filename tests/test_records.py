"""Records are read back unchanged, the same rows give the same bytes, and a report cannot lose a row."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core import frames, records
from dagster_project.core.records import (
    CheckResult,
    Report,
    StoredPart,
    example_id,
    prompt_text,
    read_ledger,
    read_lines,
    read_records,
    read_table,
    record_schema,
    remove,
    response_text,
    write_ledger,
    write_records,
    write_stored_records,
    write_table,
    write_tables,
)
from dagster_project.core.stored_rows import StoredRows, encode, encode_finite

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
messages = st.lists(st.fixed_dictionaries({"role": text, "content": text}), max_size=4)
record = st.fixed_dictionaries(
    {"example_id": st.integers(0, 2**128 - 1).map("{:032x}".format), "source": text, "messages": messages,
     "category": st.none() | text, "group_id": st.none() | text, "meta": text}
)  # fmt: skip
calm = settings(deadline=None, max_examples=40)


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def rows(n: int, *, ends_a_shard: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """n records; those named have an id after which a shard may end, the others do not."""
    return [
        {
            "example_id": f"{0 if i in ends_a_shard else 1:04x}{i:028x}",
            "source": "rows.jsonl",
            "messages": said(("user", f"text {i}")),
            "category": None,
            "group_id": None,
            "meta": "{}",
        }
        for i in range(n)
    ]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_id_is_stable() -> None:
    assert example_id(said(("user", "Grüße 你好"), ("assistant", "Hello"))) == "66b4e333bc9981c814a182de0e9fe1fa"


def test_an_id_depends_on_no_order_of_keys_and_on_no_other_key() -> None:
    plain = example_id(said(("user", "Hi"), ("assistant", "Hello")))
    assert (
        example_id([{"content": "Hi", "role": "user", "mood": "good"}, {"content": "Hello", "role": "assistant"}])
        == plain
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
tool_calls = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": text, "arguments": st.dictionaries(text, json_values, max_size=3) | text}
            ),
        },
        optional={"id": text},
    ),
    min_size=1,
    max_size=2,
)
rich_message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": text},
    optional={
        "reasoning_content": text,
        "tool_calls": tool_calls,
        "tool_call_id": text,
        "name": text,
        "weight": st.just(0.0),
    },
)
rich_messages = st.lists(rich_message, max_size=4)
tools = st.none() | st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": text, "parameters": json_values})}
    ),
    min_size=1,
    max_size=2,
)


@calm
@given(rich_messages, tools, rich_messages, tools)
def test_conversations_that_differ_in_any_field_never_share_an_id(
    one: list[dict[str, Any]], tools_one: Any, other: list[dict[str, Any]], tools_other: Any
) -> None:
    same = json.dumps([one, tools_one], sort_keys=True) == json.dumps([other, tools_other], sort_keys=True)
    assert same or example_id(one, tools_one) != example_id(other, tools_other)
    for i, message in enumerate(one):
        for key in message.keys() - {"role"}:
            without = [
                *one[:i],
                {k: v for k, v in message.items() if k != key}
                | ({"content": message["content"] + "."} if key == "content" else {}),
                *one[i + 1 :],
            ]
            assert example_id(without, tools_one) != example_id(one, tools_one)


@calm
@given(st.lists(st.tuples(record, rich_messages, tools), max_size=5))
def test_records_with_calls_reasoning_and_weights_are_read_back_unchanged(
    given_rows: list[tuple[dict[str, Any], Any, Any]],
) -> None:
    records = [
        {**row, "messages": turns} | ({"tools": defined} if defined else {}) for row, turns, defined in given_rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder), records)
        assert read_records(Path(folder)) == frames.read_records(Path(folder)) == records


@pytest.mark.parametrize(
    "other",
    [
        said(("user", "Hi"), ("assistant", "Hello ")),
        said(("system", "Hi"), ("assistant", "Hello")),
        said(("assistant", "Hello"), ("user", "Hi")),
        said(("user", "HiHello"), ("assistant", "")),
        said(("user", "Hi")),
    ],
)
def test_different_content_has_a_different_id(other: list[dict[str, str]]) -> None:
    assert example_id(other) != example_id(said(("user", "Hi"), ("assistant", "Hello")))


def test_the_prompt_is_the_user_turns_and_the_response_the_last_answer() -> None:
    talk = said(
        ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")
    )
    assert (prompt_text(talk), response_text(talk)) == ("Hi\nBye", "See you")
    assert response_text(talk[:-1]) == response_text([]) == ""


@given(st.lists(record, max_size=8))
@calm
def test_records_are_read_back_unchanged(given_rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder), given_rows)
        assert read_records(Path(folder)) == frames.read_records(Path(folder)) == given_rows


@given(st.lists(record, max_size=8))
@calm
def test_the_same_rows_make_the_same_bytes(given_rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        write_records(Path(one), given_rows)
        write_records(Path(two), given_rows)
        assert shards(Path(one)) == shards(Path(two))


@given(st.lists(record, max_size=8))
@calm
def test_encoded_rows_are_read_by_column_as_they_were(given_rows: list[dict[str, Any]]) -> None:
    expected = pa.Table.from_pylist(given_rows, schema=record_schema())
    for encoded in (encode, encode_finite):
        lines = [encoded({"source_row": i, **row, "repaired": ["a"]}) for i, row in enumerate(given_rows)]
        table = read_lines(lines, record_schema())
        table.validate(full=True)
        assert table.equals(expected) and table.schema.equals(record_schema(), check_metadata=True)


def test_what_is_no_text_is_refused_as_before() -> None:
    row = {**rows(1)[0], "category": "half of \ud83d"}
    with pytest.raises(UnicodeEncodeError):
        pa.Table.from_pylist([row], schema=record_schema())
    with pytest.raises(UnicodeEncodeError):
        read_lines([encode(row)], record_schema())


@given(st.lists(record, min_size=1, max_size=8), st.lists(st.integers(0, 7)), st.booleans())
@calm
def test_stored_rows_are_written_as_rows_are(given_rows: list[dict[str, Any]], chosen: list[int], rich: bool) -> None:
    indices = [i % len(given_rows) for i in chosen]
    groups = [f"group of {i}" for i in range(len(indices))]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        ids = [row["example_id"] for row in given_rows]
        write_stored_records(
            StoredRows(given_rows), ids, record_schema(), [StoredPart(Path(one), indices, rich, {"group_id": groups})]
        )
        expected = [{**given_rows[i], "group_id": group} for i, group in zip(indices, groups, strict=True)]
        write_records(Path(two), expected, rich=rich)
        assert shards(Path(one)) == shards(Path(two))


@given(st.lists(record, max_size=12), st.lists(st.integers(0, 12), max_size=4), st.integers(1, 5))
@calm
def test_a_table_has_the_same_bytes_however_it_is_divided(
    given_rows: list[dict[str, Any]], cuts: list[int], group: int
) -> None:
    bounds = [0, *sorted(min(cut, len(given_rows)) for cut in cuts), len(given_rows)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "ROW_GROUP", group)
        write_table(Path(folder, "rows"), given_rows, record_schema())
        parts = (pa.Table.from_pylist(given_rows[a:b], schema=record_schema()) for a, b in pairwise(bounds))
        write_tables(Path(folder, "tables"), parts, record_schema())
        assert Path(folder, "rows").read_bytes() == Path(folder, "tables").read_bytes()
        assert read_table(Path(folder, "tables")) == given_rows
        assert pq.read_metadata(Path(folder, "tables")).num_row_groups == max(1, -(-len(given_rows) // group))


def test_a_set_of_many_shards_keeps_its_order(tmp_path: Path) -> None:
    many = rows(700, ends_a_shard=(299, 600))
    write_records(tmp_path, many)
    assert list(shards(tmp_path)) == ["records-00000.parquet", "records-00001.parquet", "records-00002.parquet"]
    assert read_records(tmp_path) == many


def test_a_shard_does_not_end_before_256_rows(tmp_path: Path) -> None:
    write_records(tmp_path, rows(200, ends_a_shard=(10, 20)))
    assert len(shards(tmp_path)) == 1


def test_appending_rows_does_not_change_earlier_shards(tmp_path: Path) -> None:
    many = rows(700, ends_a_shard=(299, 600))
    write_records(tmp_path / "before", many[:650])
    write_records(tmp_path / "after", many)
    before, after = shards(tmp_path / "before"), shards(tmp_path / "after")
    assert [name for name in before if before[name] != after[name]] == ["records-00002.parquet"]


def test_an_edit_changes_only_its_own_shard(tmp_path: Path) -> None:
    many = rows(700, ends_a_shard=(299, 600))
    write_records(tmp_path / "before", many)
    write_records(tmp_path / "after", [*many[:5], *many[6:]])
    before, after = shards(tmp_path / "before"), shards(tmp_path / "after")
    assert [name for name in before if before[name] != after[name]] == ["records-00000.parquet"]


def test_an_empty_set_is_still_a_table(tmp_path: Path) -> None:
    write_records(tmp_path, [])
    assert frames.read_records(tmp_path) == []
    assert (list(shards(tmp_path)), read_records(tmp_path)) == (["records-00000.parquet"], [])


def test_a_ledger_keeps_its_columns_and_no_others(tmp_path: Path) -> None:
    row = {"source": "a.jsonl", "source_row": 3, "example_id": "ab", "outcome": "kept", "why": ""}
    write_ledger(tmp_path, [{**row, "messages": []}])
    assert read_ledger(tmp_path) == frames.read_ledger(tmp_path) == [row]


def test_a_report_refuses_lost_rows() -> None:
    assert Report(rows_in=5, rows_out=3, dropped={"pii": 1, "encoding": 1}).rows_out == 3
    with pytest.raises(AssertionError, match=r"rows lost: 5 in, 3 out, dropped \{'pii': 1\}"):
        Report(rows_in=5, rows_out=3, dropped={"pii": 1})


def test_a_report_refuses_unaccounted_rows() -> None:
    with pytest.raises(AssertionError, match="rows lost: 2 in, 3 out"):
        Report(rows_in=2, rows_out=3)


def test_only_failed_blocking_checks_are_failures() -> None:
    checks = [
        CheckResult("a", passed=False),
        CheckResult("b", passed=True, blocking=True),
        CheckResult("c", passed=False, blocking=True),
    ]
    assert [check.name for check in Report(checks=checks).failures] == ["c"]


def test_a_report_document_has_no_empty_parts() -> None:
    assert Report(metrics={"loss": 1.5}).document() == {"loss": 1.5}
    checked = Report(rows_in=1, rows_out=1, checks=[CheckResult("pii", passed=True)]).document()
    assert checked == {
        "rows_in": 1,
        "rows_out": 1,
        "dropped": {},
        "checks": {"pii": {"passed": True, "severity": "error", "blocking": False, "count": 0}},
    }


def test_removing_a_link_keeps_its_target(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove(tmp_path / "link")
    assert (tmp_path / "kept" / "file").is_file()
    assert not (tmp_path / "link").exists()
    remove(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
