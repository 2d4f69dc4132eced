"""Tables read with polars: the rows that Arrow reads, and one kind of error for whatever is damaged."""

from __future__ import annotations

import io
import random
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dagster_project.core import frames
from dagster_project.core.errors import InputError
from dagster_project.core.records import IGNORED, ledger_line, write_ledger, write_records
from dagster_project.core.stored_rows import decode
from dagster_project.lineage import tables
from dagster_project.lineage.search import Pattern, normalized

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.float64())]))
COLUMNS = {
    "example_id": pa.array(["a", None, "", "d\u00e9"], pa.large_string()),
    "step": pa.array([1, None, -(2**31), 2**31 - 1], pa.int32()),
    "messages": pa.array(
        [[{"role": "user", "content": "Hi", "weight": 0.1}, None], [], None, [{"role": "user"}]], MESSAGES
    ),
    "why": pa.array(["x", "y", "x", None]).dictionary_encode(),
    "category": pa.nulls(4),
    "repaired": pa.array([["a"], None, [], [None]], pa.list_(pa.string())),
    "weights": pa.array([[0.1], None, [], [1e-9]], pa.list_(pa.float32())),
    "finished": pa.array([True, None, False, True]),
}


def test_odd_columns_have_the_values_that_arrow_reads(tmp_path: Path) -> None:
    path = tmp_path / "a[1]*?.parquet"  # not a pattern
    pq.write_table(pa.table(COLUMNS), path, row_group_size=3)
    assert frames.read_rows(path) == pq.read_table(pa.BufferReader(path.read_bytes())).to_pylist()
    assert list(frames.read_schema(path)) == [*COLUMNS]
    assert frames.read_frame(path, ["step", "example_id"]).columns == ["step", "example_id"]


def test_the_objects_in_lists_keep_their_order_and_number() -> None:
    sizes, fields = tables.flattened(pl.Series(COLUMNS["messages"].to_pylist()))
    assert sizes.tolist() == [2, 0, 0, 1]
    assert (fields["role"].to_list(), fields["content"].to_list()) == (["user", None, "user"], ["Hi", None, None])
    assert tables.flattened(pl.Series([["a"], []]))[1] == {}


def test_a_column_of_nulls_has_the_type_of_this_project_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"source_row": pa.nulls(2), "source": pa.nulls(2), "step": pa.array(["a", "b"])}), path)
    assert dict(tables.read(path, ["source_row", "source"]).schema) == {"source_row": pl.Int64, "source": pl.String}
    with pytest.raises(InputError, match=r"t\.parquet: damaged.*column step has type String"):
        tables.read(path, ["step"])
    with pytest.raises(InputError, match=r"t\.parquet: damaged.*no column epoch"):
        tables.read(path, ["epoch"])


@pytest.mark.parametrize("kind", ["plain", "ignored", "tools"])
def test_records_are_placed_by_their_ledger(kind: str, tmp_path: Path) -> None:
    texts = ["Hi", "caf\u00e9 \U0001f600", 'a "quote"\n\x00\u2028', ""]
    records = [
        {
            "example_id": f"{i:032x}",
            "source": "a.jsonl",
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Ho"}],
            **({"tools": [{"name": "find"}]} if kind == "tools" and i == 1 else {}),
            "category": None,
            "group_id": None,
            "meta": "{}",
        }
        for i, text in enumerate(texts * 100)
    ]
    names = [["images", "x"] if kind == "ignored" and i == 3 else [] for i in range(len(records))]
    write_records(tmp_path, records)
    lines = [
        {**ledger_line(record, 2 * i, "read", IGNORED + ", ".join(ignored) if ignored else "")}
        for i, (record, ignored) in enumerate(zip(records, names, strict=True))
    ]
    write_ledger(tmp_path, lines, repaired=False)
    expected = [
        {"source_row": 2 * i, **record, **({"ignored": ignored} if ignored else {})}
        for i, (record, ignored) in enumerate(zip(records, names, strict=True))
    ]
    assert [*map(decode, frames.placed_records(tmp_path))] == expected
    write_ledger(tmp_path, [*lines, lines[-1]], repaired=False)
    with pytest.raises(ValueError, match="400 records, and 401 lines"):
        list(frames.placed_records(tmp_path))


def test_damage_is_a_value_error_or_reads_as_arrow_does(tmp_path: Path) -> None:
    """Some damage makes polars panic, with an exception that is no Exception."""
    draw = random.Random(1)
    rows = [
        {"example_id": draw.randbytes(16).hex(), "step": i, "messages": [{"role": "user", "content": f"hello {i}"}]}
        for i in range(300)
    ]
    whole = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), whole, compression="zstd", store_schema=True)
    path, content, refused = tmp_path / "t.parquet", whole.getvalue(), 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged) - 1500, len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            read = frames.read_rows(path)
        except ValueError:
            refused += 1
            continue
        try:
            expected = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError, ValueError):
            expected = rows  # polars reads more of a damaged file, but nothing else
        assert read in (expected, rows)
    assert 40 < refused < 150


@pytest.mark.parametrize("regex", [False, True])
@pytest.mark.parametrize("query", ["kite shop", "KITE\u00a0shop", "k.te", "caf\u00e9", "a-b (c)", "#1", "\u212akite"])
def test_texts_match_as_python_matches_them(query: str, regex: bool) -> None:
    texts = [
        "the Kite  shop",
        "kiteshop",
        None,
        "",
        "kite\nshop.",
        "\u212aite shop",
        "the caf\u00e9",
        "CAFE\u0301!",
        "cafe",
        "x a-b (c)",
        "#1",
        "a#12",
        "KITE",
    ]
    pattern = Pattern(query, regex)
    flat = [None if text is None else " ".join(normalized(text).split()) for text in texts]
    expected = [i for i, text in enumerate(flat) if text is not None and pattern.python.search(text)]
    assert pattern.matches_of(pl.Series(texts)) == expected


@pytest.mark.parametrize(
    ("query", "found", "other"),
    [
        ("张三", ["客户张三说他的包裹丢了", "张三", "张 三".replace(" ", "\u200b")], "张小三"),
        ("さくら", ["昨日さくらさんに会った"], "さく ら"),
        ("สมชาย", ["คุณสมชายครับ"], "สมช"),
        ("김철수", ["김철수가 왔다"], "김 철수"),
        ("Ann", ["请联系Ann谢谢", "Ann。", "é Ann é"], "请联系Anna谢谢"),
        ("8817", ["订单8817号丢了"], "订单98817号丢了"),
        ("Zoë", ["Zoë Li"], "Zoës é"),
    ],
)
def test_a_name_is_found_in_scripts_without_spaces(query: str, found: list[str], other: str) -> None:
    pattern = Pattern(query, False)
    assert pattern.matches_of(pl.Series([other, *found])) == [*range(1, len(found) + 1)]
    assert all(query in pattern.excerpt(text) or query.casefold() in pattern.excerpt(text) for text in found)


def test_an_expression_that_cannot_be_searched_for_is_one_line() -> None:
    for text in ("(?<=a)b", "(", "a{1000}{1000}{1000}"):
        with pytest.raises(InputError, match="not a regular expression: ") as raised:
            Pattern(text, regex=True)
        assert str(raised.value).count("\n") == 1  # before the hint
