"""Bytes -> rows: every file type gives the same rows, bad bytes make only their
own row malformed, and hostile files cost little."""

from __future__ import annotations

import datetime
import gzip
import json
import tracemalloc
from csv import field_size_limit as csv_limit
from pathlib import Path
from typing import Any

import pytest
from builders.files import FILE_WRITERS, arrow_table
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core.errors import InputError
from dagster_project.curation.sources import files, table_limits
from dagster_project.curation.sources.files import READERS, read_rows

ROWS = [{"prompt": "Hi", "completion": "Hello"}, {"prompt": 'Grüße, "du"\n', "completion": "你好"}]


def jsonl(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert caught.value.hint, "an error says what to do next"
    return caught.value.what


def test_every_file_type_is_written_here() -> None:
    assert set(FILE_WRITERS) == set(READERS)


@pytest.mark.parametrize("suffix", [suffix for suffix in FILE_WRITERS if suffix != ".txt"])
def test_every_file_type_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.b{suffix}"
    FILE_WRITERS[suffix](path, ROWS)
    assert [(row.source_row, row.value, row.problem) for row in read_rows(path)] == [(0, ROWS[0], ""), (1, ROWS[1], "")]


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
A_LINE = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\ufeff"), min_size=1, max_size=20
).filter(str.strip)


@pytest.mark.parametrize("suffix", READERS)
def test_rows_written_in_a_file_type_are_read_back_equal(suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("round") / f"a{suffix}"
    texts = st.lists(A_LINE, min_size=1, max_size=3).map(lambda lines: {"text": "\n".join(lines)})
    pairs = st.fixed_dictionaries({"prompt": ANY_TEXT, "completion": ANY_TEXT})

    @settings(max_examples=60, deadline=None)
    @given(st.lists(texts if suffix == ".txt" else pairs, min_size=1, max_size=4))
    def holds(rows: list[dict[str, str]]) -> None:
        FILE_WRITERS[suffix](path, rows)
        assert [(row.source_row, row.value, row.problem) for row in read_rows(path)] == [
            (i, row, "") for i, row in enumerate(rows)
        ]

    holds()


def test_a_paragraph_of_plain_text_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"One\ntwo\n\n \nthree\n")
    assert [row.value for row in read_rows(tmp_path / "a.txt")] == [{"text": "One\ntwo"}, {"text": "three"}]


@pytest.mark.parametrize("suffix", READERS)
def test_an_empty_file_is_refused(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").touch()
    assert refused(tmp_path / f"a{suffix}") == f"a{suffix}: the file has no rows"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".txt", ".jsonl.gz", ".json.gz"])
def test_a_file_of_blank_lines_is_refused(suffix: str, tmp_path: Path) -> None:
    blank = b"\xef\xbb\xbf\n  \r\n\n" if suffix != ".csv" else b"\n\n"
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(blank, mtime=0) if suffix.endswith(".gz") else blank)
    assert refused(tmp_path / f"a{suffix}") == f"a{suffix}: the file has no rows"


def test_the_next_step_for_an_empty_file_also_fits_outside_of_a_project(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / "a.jsonl")
    assert caught.value.hint == "put at least one example in it, or leave it out"


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(arrow_table(ROWS).slice(0, 0), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("prompt,completion\n")
    assert [refused(tmp_path / name) for name in ("a.parquet", "a.csv")] == [
        "a.parquet: the file has no rows",
        "a.csv: the file has no rows",
    ]


GOOD = b'{"prompt": "Hi"}'
BAD_LINES = [
    (b'{"prompt": "H', "line is not JSON: Unterminated string starting at: column 12 (line 3)"),
    (b'{"prompt": "H\x00"}', "line is not JSON: Invalid control character at: column 14 (line 3)"),
    (b"\x00" * 100, "line is not JSON: Expecting value: column 1 (line 3)"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8 at byte 15 (line 3)"),
    (b'{"prompt": "cut \\ud83d off"}', "text has half of a surrogate pair, which is not a character (line 3)"),
    (b'{"prompt": "a", "prompt": "b"}', "key 'prompt' is duplicated in one object (line 3)"),
    (b'{"prompt": [{"a": 1, "a": 1}]}', "key 'a' is duplicated in one object (line 3)"),
    (b'{"prompt": NaN}', "NaN is not a number that JSON supports (line 3)"),
    (b'{"prompt": [-Infinity]}', "-Infinity is not a number that JSON supports (line 3)"),
    (b'{"prompt": 1e999}', "1e999 is too large for a 64-bit number (line 3)"),
    (b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}", "nested more than 200 deep (line 3)"),
    (b"[" * 100_000, "nested more than 200 deep (line 3)"),
    (b"3", "expected an object, found int (line 3)"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_a_bad_line_makes_only_its_own_row_malformed(line: bytes, problem: str, tmp_path: Path) -> None:
    rows = read_rows(jsonl(tmp_path / "a.jsonl", GOOD, b"", line, GOOD))
    assert [(row.source_row, row.problem) for row in rows] == [(0, ""), (1, problem), (2, "")]
    assert [row.value for row in rows[::2]] == [{"prompt": "Hi"}] * 2
    text = line.decode("utf-8", "backslashreplace")
    assert [row.raw for row in rows] == ["", text if rows[1].value is None else "", ""]


def test_a_row_without_a_value_has_its_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.csv").write_bytes(b'prompt,completion\n"a, ""b""\nc"\ncaf\xe9,d\ne,f\n')
    (tmp_path / "a.json").write_bytes(b'[{"prompt": NaN}, {"prompt": "Hi"}, ["x", 1]]')
    (tmp_path / "a.txt").write_bytes(b"One\n\ntwo\ncaf\xe9\nthree\n")
    pq.write_table(
        pa.table({"prompt": ["a", "b"], "score": [float("nan"), 1.0], "code": [b"\xff", b"ok"]}), tmp_path / "a.parquet"
    )
    found = {name: [row.raw for row in read_rows(tmp_path / f"a.{name}")] for name in ("csv", "json", "txt", "parquet")}
    assert found == {
        "csv": ['"a, ""b""\nc"', r"caf\xe9,d", ""],
        "json": ['{"prompt": NaN}', "", '["x", 1]'],
        "txt": ["", "two\ncaf\\xe9\nthree"],
        "parquet": ['{"prompt": "a", "score": NaN, "code": "\\\\xff"}', ""],
    }


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": [{"a": 1, "a": 1}]}',
        b'{"prompt": NaN}',
        b'{"prompt": 1e999}',
        b'{"prompt": ' + b"1" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"prompt": "cut \\ud83d off"}',
        b"3",
    ],
)
def test_json_beyond_the_standard_makes_only_its_own_element_malformed(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[" + b" ,\n".join([GOOD, line, GOOD]) + b"]\n")
    assert [bool(row.problem) for row in read_rows(tmp_path / "a.json")] == [False, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}', "a.json: not JSON: Expecting ',' delimiter: line 1 column 10 (char 9)"),
        (b'[{"a": 1} {"a": 2}]', "a.json: not JSON: Expecting ',' delimiter: line 1 column 11 (char 10)"),
        (b'[{"a": 1},]', "a.json: not JSON: Expecting value: line 1 column 11 (char 10)"),
        (b'[{"a": 1}] x', "a.json: not JSON: Extra data: line 1 column 12 (char 11)"),
        (b"[", "a.json: not JSON: Expecting value: line 1 column 2 (char 1)"),
        (b"[" * 100_000, "a.json: not JSON: maximum recursion depth exceeded"),
        (b"{", "a.json: not JSON: Expecting property name"),
    ],
)
def test_a_list_that_cannot_be_divided_into_rows_is_refused_with_the_position(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert refused(tmp_path / "a.json").startswith(message)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


def test_a_list_is_read_as_json_reads_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(JSON_VALUES, min_size=1, max_size=4),
        st.sampled_from([None, 0, 3]),
        st.booleans(),
        st.sampled_from([1, 10, 2**20]),
    )
    def holds(values: list[Any], indent: int | None, ascii_only: bool, piece: int) -> None:
        path.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "MEGABYTE", piece)
            rows = read_rows(path)
        assert [row.value for row in rows] == [value if isinstance(value, dict) else None for value in values]

    holds()


def test_late_columns_and_late_types_are_kept_unchanged(tmp_path: Path) -> None:
    lines = [{"a": "x"}] * 500 + [{"a": 3}, {"b": None}, {"a": "x", "c": [1.5]}]
    rows = read_rows(jsonl(tmp_path / "a.jsonl", *(json.dumps(line).encode() for line in lines)))
    assert [row.value for row in rows] == lines


def test_a_line_above_the_limit_is_never_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100_000)
    fits = b'{"prompt": "' + b"a" * (100_000 - 15) + b'"}'
    path = jsonl(tmp_path / "a.jsonl", fits, b'{"prompt": "' + b"a" * 30_000_000 + b'"}', GOOD)
    tracemalloc.start()
    rows = read_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.problem for row in rows] == ["", "longer than 100000 bytes (line 2)", ""]
    assert peak < 2_000_000


def test_a_paragraph_of_too_many_lines_is_malformed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(b"One\n\n" + b"two words\n" * 20 + b"\ncaf\xe9\nno\n\nthree")
    assert [(row.value, row.problem) for row in read_rows(tmp_path / "a.txt")] == [
        ({"text": "One"}, ""),
        (None, "longer than 100 bytes (line 13)"),
        (None, "not UTF-8 at byte 3 (line 24)"),
        ({"text": "three"}, ""),
    ]


LONG = [
    b'{"prompt": "' + b"a" * 900 + b'"}',
    b'{"prompt": "' + b'\\"]}' * 300 + b'\\\\"}',
    b'{"prompt": ' + b"[[], {}, " * 90 + b"0" + b"]" * 90 + b"}",
    b'{"prompt": "' + "é".encode() * 300 + b'"}',
    b'"' + b"a" * 900 + b'"',
    b"1" * 900,
]


@pytest.mark.parametrize("long", LONG)
@pytest.mark.parametrize("piece", [1, 7, 100, 2**20])
def test_a_too_long_list_element_alone_is_malformed(
    long: bytes, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 500)
    monkeypatch.setattr(files, "MEGABYTE", piece)
    (tmp_path / "a.json").write_bytes(b"[" + b" ,\n".join([GOOD, long, GOOD]) + b"]\n")
    rows = read_rows(tmp_path / "a.json")
    assert [(row.source_row, row.problem) for row in rows] == [(0, ""), (1, "longer than 500 bytes"), (2, "")]
    assert [row.value for row in rows] == [{"prompt": "Hi"}, None, {"prompt": "Hi"}]


def test_a_long_list_element_is_never_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100_000)
    monkeypatch.setattr(files, "MEGABYTE", 100_000)
    (tmp_path / "a.json").write_bytes(b"[" + b'{"prompt": "' + b"a" * 30_000_000 + b'"},' + GOOD + b"]")
    tracemalloc.start()
    rows = read_rows(tmp_path / "a.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.problem for row in rows] == ["longer than 100000 bytes", ""]
    assert peak < 3_000_000


MANY = ", ".join(f'{{"é": {i}}}' for i in range(40))


@pytest.mark.parametrize("piece", [1, 100, 2**20])
@pytest.mark.parametrize(
    "content",
    [
        f'[{MANY}, {{"b" 2}}, {MANY}]',
        f'[{MANY},\n {MANY}\n, {{"b": 2]]',
        f"[{MANY} {MANY}]",
        f"[{MANY}] [",
        f"[{MANY}, \n\n ]",
        f"[{MANY}, \n",
        f"[\n{MANY}",
        f'[{MANY}, "',
    ],
)
def test_error_positions_refer_to_the_whole_file(
    content: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 60)
    monkeypatch.setattr(files, "MEGABYTE", piece)
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(content)
    error = caught.value
    if "trailing comma" in error.msg:  # Python 3.13 and newer name the comma, this reader the missing value
        error = json.JSONDecodeError("Expecting value", content, content.rindex("]"))
    assert refused(tmp_path / "a.json") == f"a.json: not JSON: {error}"


def test_the_byte_that_is_not_utf_8_is_counted_from_the_start_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 60)
    monkeypatch.setattr(files, "MEGABYTE", 1)
    before = f"[{MANY}".encode()
    for broken in (b"\xff", b"\xe4\xbd", b"\xe4\xbdx"):
        (tmp_path / "a.json").write_bytes(before + broken)
        assert refused(tmp_path / "a.json") == f"a.json: not UTF-8 at byte {len(before)}"


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz"])
def test_a_gzip_bomb_is_refused_and_what_compresses_well_is_not(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(
        gzip.compress(
            b"[" + b",".join([GOOD] * 100_000) + b"]" if suffix == ".json.gz" else b"\n".join([GOOD] * 100_000)
        )
    )
    assert len(read_rows(path)) == 100_000, "below the free bytes the ratio does not matter"
    monkeypatch.setattr(files, "GZIP_FREE_BYTES", 1_000_000)
    assert refused(path) == f"a{suffix}: decompresses to more than 200 times its size"


# CSV


def csv(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_only_the_bad_csv_row_is_malformed(tmp_path: Path) -> None:
    rows = read_rows(
        csv(tmp_path / "a.csv", b'\xef\xbb\xbfa,b\r\n1,2\r\n1\r\n1,2,3\r\n\r\n"caf\xe9\nx",2\r\n\x00,"x\r\ny"\r\n')
    )
    assert [(row.source_row, row.problem) for row in rows] == [
        (0, ""),
        (1, "1 fields where the header has 2 (line 3)"),
        (2, "3 fields where the header has 2 (line 4)"),
        (3, "not UTF-8 (line 7)"),
        (4, ""),
    ]
    assert [row.value for row in rows if row.value] == [{"a": "1", "b": "2"}, {"a": "\x00", "b": "x\r\ny"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'a,b\n1,"2\n3,4\n5,6\n', "a.csv: not CSV: unexpected end of data, near line 4"),
        (b'a,b\n1,"2"x\n', "a.csv: not CSV: ',' expected after '\"', near line 2"),
        (b"a,a\n1,2\n", "a.csv: column 'a' is duplicated"),
        (b"caf\xe9,a\n1,2\n", "a.csv: the column names are not UTF-8"),
        (b'"a";"b"\n"1; 2";"3, 4"\n', "a.csv: not CSV: columns are separated by ';'"),
        (b'a;b\n"1; 2";3\n', "a.csv: not CSV: columns are separated by ';'"),
        ("a,b\n1,2\n".encode("utf-16"), "a.csv: the file is UTF-16"),
        (b"a,b\r1,2\r", "a.csv: not CSV: a line ends with a carriage return alone, near line 1"),
        (b"a,b\ncaf\xe9,2\n", "a.csv: no row can be read: not UTF-8 (line 2)"),
        (b"a,b\n1,2,\n", "a.csv: no row can be read: 3 fields where the header has 2 (line 2)"),
        (b"a\n" + b"x" * 300 + b"\n", "a.csv: not CSV: longer than 200 bytes (line 2), near line 1"),
        (b'a\n"' + b"x\n" * 300 + b'"\n', "a.csv: not CSV: field larger than field limit (200), near line 102"),
    ],
)
def test_a_csv_file_with_ambiguous_rows_is_refused(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 200)
    limit = csv_limit()
    assert refused(csv(tmp_path / "a.csv", content)) == message
    assert csv_limit() == limit, "the limit is the process's own"


def test_a_csv_row_whose_fields_are_too_long_together_is_malformed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100)
    rows = read_rows(csv(tmp_path / "a.csv", b'a,b\n1,2\n"' + b"x\n" * 40 + b'","' + b"y\n" * 40 + b'"\n3,4\n'))
    assert [(row.problem, row.line) for row in rows] == [("", 2), ("longer than 100 bytes (line 83)", 83), ("", 84)]


# Tables


def test_a_table_of_which_no_row_can_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a", "b"], "score": [float("nan")] * 2}), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet").startswith(
        "a.parquet: no row can be read: column 'score': a value that JSON cannot hold: Out of range float values"
    )


def test_a_column_of_values_that_json_cannot_hold_can_also_be_left_out(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"], "score": [float("inf")]}), tmp_path / "a.parquet")
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / "a.parquet")
    assert caught.value.hint == "fix the rows, or leave the column out"


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("long", ["a" * 600, ["a" * 30] * 20, {"b": "a" * 600}])
def test_a_too_long_table_row_alone_is_malformed(
    suffix: str, long: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(files, "MAX_ROW_BYTES", 500)
    short = type(long)()
    table = pa.table({"n": range(300), "text": [long if n == 7 else short for n in range(300)]})
    if suffix == ".parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    rows = read_rows(tmp_path / f"a{suffix}")
    assert [row.problem for row in rows if row.problem] == ["longer than 500 bytes"]
    assert [row.value["n"] if row.value else None for row in rows] == [n if n != 7 else None for n in range(300)]


@pytest.mark.parametrize("depth", [files.MAX_DEPTH + 1, 100_000])
def test_too_deeply_nested_json_in_a_table_is_malformed(depth: int) -> None:
    deep: Any = "x"
    for _ in range(depth):
        deep = [deep]
    rows = files.table_rows([arrow_table(ROWS)], lambda row: {"prompt": deep} if row["prompt"] == "Hi" else row)
    assert [files.TOO_DEEP in row.problem for row in rows] == [True, False]


def test_a_table_value_without_json_form_is_converted_or_makes_its_row_malformed(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.Array.from_buffers(
        pa.utf8(),
        5,
        [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0\4\0\0\0\5\0\0\0"), pa.py_buffer(b"ab\xe9de")],
    )
    table = pa.table(
        {
            "text": text,
            "day": [datetime.date(2024, 1, i) for i in range(1, 6)],
            "raw": [b"x", b"\xff", b"x", b"x", b"x"],
            "score": [1.0, 1.0, 1.0, float("nan"), None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert [bool(row.problem) for row in rows] == [False, True, True, True, False]
    assert [row.value for row in rows[::4]] == [
        {"text": "a", "day": "2024-01-01", "raw": "x", "score": 1.0},
        {"text": "e", "day": "2024-01-05", "raw": "x", "score": None},
    ]


@pytest.mark.parametrize(("suffix", "kind"), [(".parquet", "Parquet"), (".arrow", "Arrow"), (".feather", "Arrow")])
@pytest.mark.parametrize("keep", [7, 0.5, -10])
def test_a_cut_table_is_refused(suffix: str, kind: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    FILE_WRITERS[suffix](path, [{"text": "One"}, {"text": "two"}] if suffix == ".txt" else ROWS)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else int(keep)])
    assert refused(path).startswith(f"a{suffix}: not {kind}: ")


def test_arrow_files_of_polars_have_the_rows_of_its_parquet_files(tmp_path: Path) -> None:
    import polars as pl

    said = [{"role": "user", "content": "Where does the river begin, and where does it end?"}]
    frame = pl.DataFrame(
        {
            "text": ["One", None],
            "messages": [said, []],
            "label": pl.Series(["a", "b"], dtype=pl.Categorical),
            "raw": [b"1", b"2"],
        }
    )
    frame.write_parquet(tmp_path / "a.parquet")
    frame.write_ipc(tmp_path / "a.arrow")
    frame.write_ipc(tmp_path / "a.feather", compression="zstd")
    parquet, *others = (read_rows(tmp_path / f"a{suffix}") for suffix in (".parquet", ".arrow", ".feather"))
    assert others == [parquet, parquet]
    assert parquet[0].value == {"text": "One", "messages": said, "label": "a", "raw": "1"}


def test_many_views_of_one_text_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import pyarrow as pa

    monkeypatch.setattr(table_limits, "MAX_BATCH_BYTES", 2**28)
    views = np.tile(np.array([10**6, int.from_bytes(b"xxxx", "little"), 0, 0], np.int32), (4000, 1))
    texts = pa.Array.from_buffers(
        pa.string_view(), len(views), [None, pa.py_buffer(views.tobytes()), pa.py_buffer(b"x" * 10**6)]
    )
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema([("text", pa.string_view())])) as writer:
        writer.write_batch(pa.record_batch([texts], ["text"]))
    assert refused(tmp_path / "a.arrow") == "a.arrow: the next rows need more than 0.25 GiB of memory"


def test_an_arrow_batch_that_points_outside_itself_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    wild = pa.Array.from_buffers(
        pa.utf8(), 2, [None, pa.py_buffer(b"\0\0\0\0\xff\xff\xff\x7f\1\0\0\0"), pa.py_buffer(b"a")]
    )
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema([("text", pa.utf8())])) as writer,
    ):
        writer.write_batch(pa.record_batch([wild], ["text"]))
    assert refused(tmp_path / "a.arrow").startswith("a.arrow: not Arrow: ")


# Folders


def test_a_folder_is_read_in_the_order_of_its_paths_and_numbered_through(tmp_path: Path) -> None:
    (tmp_path / "set/b").mkdir(parents=True)
    jsonl(tmp_path / "set/c.jsonl", b'{"n": 3}')
    jsonl(tmp_path / "set/b/z.jsonl", b'{"n": 1}', b"broken")
    (tmp_path / "set/b/README.md").write_text("no examples")
    (tmp_path / "set/a.csv").write_text("n\n0\n")
    rows = read_rows(tmp_path / "set")
    assert [(row.source_row, (row.value or {}).get("n")) for row in rows] == [(0, "0"), (1, 1), (2, None), (3, 3)]
    assert rows[2].problem == "b/z.jsonl: line is not JSON: Expecting value: column 1 (line 2)"


def test_a_folder_without_examples_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("none")
    monkeypatch.chdir(tmp_path)
    assert refused(tmp_path) == refused(Path()) == f"{tmp_path.name}: no file of examples in the folder"


@pytest.mark.parametrize("target", ["outside.jsonl", "outside", "nowhere.jsonl"])
def test_a_link_out_of_a_folder_is_refused_and_one_inside_is_followed(target: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "outside").mkdir()
    jsonl(tmp_path / "outside.jsonl", GOOD)
    jsonl(tmp_path / "set/a.jsonl", GOOD)
    (tmp_path / "set/b.jsonl").symlink_to("a.jsonl")
    assert len(read_rows(tmp_path / "set")) == 2
    (tmp_path / "set" / target).symlink_to(tmp_path / target)
    assert refused(tmp_path / "set") == f"set/{target}: a link that is broken or points outside its folder"


# Any bytes at all

BYTES = st.binary(max_size=300) | st.lists(
    st.sampled_from([b"{", b"}", b'"a":', b"1", b",", b"\n", b"[", b"]", b'"', b"\x00", b"\xff"])
).map(b"".join)


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("start", [b"", b"start"])
def test_of_any_bytes_each_row_is_accounted_for_or_the_file_is_refused(
    suffix: str, start: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With `start`, the bytes follow the beginning of a good file."""
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    FILE_WRITERS[suffix](path, [{"text": "One"}, {"text": "two"}] if suffix == ".txt" else ROWS)
    good = path.read_bytes()

    @settings(max_examples=60, deadline=None)
    @given(BYTES, st.integers(0, len(good)))
    def holds(content: bytes, cut: int) -> None:
        content = good[:cut] + content if start else content
        path.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith(".gz") and not start else content)
        try:
            rows = read_rows(path)
        except InputError:
            return
        assert [row.source_row for row in rows] == [*range(len(rows))]
        assert all(isinstance(row.value, dict) or row.problem for row in rows)
        if suffix == ".jsonl":
            assert len(rows) == sum(bool(line.decode("utf-8", "replace").strip()) for line in content.split(b"\n"))

    holds()
