"""Data files of strangers: small files that unpack to large ones, and texts
that make searches slow, end in one message or in linear time."""

from __future__ import annotations

import gzip
import json
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dagster_project.__main__ import main
from dagster_project.core.errors import LONGEST, InputError
from dagster_project.curation.checks import content, damage, privacy
from dagster_project.curation.sources import call_texts, files, table_limits
from dagster_project.orchestration.dagster import metadata

MIB = 2**20


def repeated(value: Any, rows: int) -> pa.Table:
    """A table of rows with the same values, which are stored once."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    return pa.table({"prompt": column, "response": column})


def rows_in_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"{}\n" * 300_000))


def elements_in_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"[" + b"{}," * 300_000 + b"{}]"))


def blank_lines_in_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"\n" * 900_000))


def rows_of_parquet(path: Path) -> None:
    pq.write_table(repeated("a", 300_000), path)


def bytes_of_parquet(path: Path) -> None:
    pq.write_table(repeated("a" * 100_000, 3000), path, compression="zstd")


def one_batch_of_parquet(path: Path) -> None:
    table = repeated("a" * 32 * MIB, 80)
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30)


def bytes_of_arrow(path: Path) -> None:
    table = repeated("a" * 100_000, 3000)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def rows_of_arrow(path: Path) -> None:
    batch = pa.record_batch({"prompt": pa.nulls(2**31 - 1)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


BOMBS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "rows in gzip": (rows_in_gzip, "a.jsonl.gz", r"more than \d+,\d+ rows in \d"),
    "elements in gzip": (elements_in_gzip, "a.json.gz", r"more than \d+,\d+ rows in \d"),
    "blank lines in gzip": (blank_lines_in_gzip, "a.jsonl.gz", r"more than \d+,\d+ rows in \d"),
    "rows of Parquet": (rows_of_parquet, "a.parquet", r"more than \d+,\d+ rows in \d"),
    "rows of Arrow": (rows_of_arrow, "a.arrow", r"more than \d+,\d+ rows in \d"),
    "bytes of Parquet": (bytes_of_parquet, "a.parquet", r"its rows are more than \d+ MiB"),
    "bytes of Arrow": (bytes_of_arrow, "a.arrow", r"its rows are more than \d+ MiB"),
    "one batch of Parquet": (
        one_batch_of_parquet,
        "a.parquet",
        "the next rows need more than 0.25 GiB of memory|its rows are more than",
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_unpacks_to_a_large_one_is_refused_in_one_message(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "FREE_ROWS", 20_000)
    monkeypatch.setattr(table_limits, "TABLE_FREE_BYTES", 64 * MIB)
    monkeypatch.setattr(table_limits, "MAX_BATCH_BYTES", 256 * MIB)
    make, name, wanted = BOMBS[kind]
    make(tmp_path / name)
    assert (tmp_path / name).stat().st_size < MIB
    assert main(["check", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert re.search(wanted, said) and said.count("hint: ") == 1 and "Traceback" not in said


@pytest.mark.parametrize("kind", ["run ends", "dictionary of lists"])
def test_types_whose_rows_share_the_bytes_of_a_value_are_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = pa.array(["a" * MIB])
    if kind == "run ends":
        column = pa.RunEndEncodedArray.from_arrays(pa.array([1000], pa.int32()), value)
    else:
        column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([["a"] * 1000]))
    table = pa.table({"prompt": column, "completion": pa.array(["b"] * 1000)})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert main(["check", str(tmp_path / "a.arrow")]) == 2
    assert "are not supported" in capsys.readouterr().err


def test_repeated_values_are_read_as_before(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    table = repeated("a" * 1000, 300)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    rows = files.read_rows(tmp_path / "a.parquet")
    assert [row.value for row in rows] == [{"prompt": "a" * 1000, "response": "a" * 1000}] * 300
    assert files.read_rows(tmp_path / "a.arrow") == rows
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_long_value_of_a_dictionary_makes_rows_too_long_but_not_their_neighbors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 1], pa.int32()), pa.array(["short", "a" * 2000]))
    table = pa.table({"prompt": column, "response": ["b"] * 4})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    rows = files.read_rows(tmp_path / "a.arrow")
    assert [row.value and row.value["prompt"] for row in rows] == ["short", None, "short", None]


def test_bytes_are_counted_as_if_values_were_written_out() -> None:
    nested = pa.array([[{"x": "ab"}, {"x": "ab"}], [{"x": "abc"}]]).cast(
        pa.list_(pa.struct([("x", pa.dictionary(pa.int32(), pa.string()))]))
    )
    batch = pa.record_batch({"a": nested, "b": pa.array(["x" * 50, None]).dictionary_encode()})
    assert table_limits.decoded_bytes(batch) == 2 + 2 + 3 + 2 * 4 + 50


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_an_unknown_time_zone_is_one_message(suffix: str, tmp_path: Path) -> None:
    times = pa.array([0], pa.timestamp("us", tz="Nowhere/Land"))
    table = pa.table({"prompt": ["a"], "response": ["b"], "when": times})
    if suffix == "parquet":
        pq.write_table(table, tmp_path / f"a.{suffix}")
    else:
        with pa.OSFile(str(tmp_path / f"a.{suffix}"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError, match=rf"^a\.{suffix}: unknown time zone 'Nowhere/Land'"):
        files.read_rows(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("name", ["$", "$x^{$", "a$b$c", r"\frac{", "\x1b[2J", "_^{}"])
def test_names_are_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"validation": [{"step": 1, "validation_loss": 1.0}]}))
    rows = {"actual": name, "predicted": "b", "step": "1", "confidence": "0.5", "accuracy": "0.5"}
    for plots in metadata.PLOTS.values():
        for _, draw in plots:
            assert draw([{"step": "1", name: "0.5"}] if draw is metadata._draw_curves else [rows], tmp_path)


@pytest.mark.parametrize("count", [1, 3, 5, 10])
def test_each_curve_is_drawn_once_and_nothing_else(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_png", lambda figure: figure)
    names = [f"c{n}" for n in range(count)]
    figure: Any = metadata._draw_curves([{"step": "1", **dict.fromkeys(names, "0.5"), "tokens": "9"}], tmp_path)
    assert [axes.get_title() for axes in figure.axes] == names


KEYS = [
    "k" * 100_000,
    "\x1b" * 100_000,
]


@pytest.mark.parametrize("key", KEYS, ids=["long", "control characters"])
@pytest.mark.parametrize(
    "row",
    [
        '{"KEY": 1, "KEY": 2}',
        '{"prompt": 1KEY0.5e999}',
        '{"KEY": "a"}',
        '{"prompt": {"KEY": 1}, "response": ["KEY"]}',
        '{"messages": "KEY"}',
    ],
    ids=["twice", "number", "name", "nested", "text"],
)
def test_no_message_repeats_a_long_value(
    row: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = row.replace("KEY", "9" * 100_000 if "1KEY" in row else json.dumps(key)[1:-1])
    (tmp_path / "a.jsonl").write_text(f'{text}\n{{"prompt": "Hi", "response": "Yes"}}\n')
    assert main(["check", str(tmp_path / "a.jsonl")]) in {0, 1, 2}
    assert sum(map(len, capsys.readouterr())) < LONGEST


def test_a_message_of_an_error_is_cut() -> None:
    error = InputError("x" * 10 * LONGEST, "use less")
    assert len(str(error)) < LONGEST + 100 and str(error).endswith("hint: use less")


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def answered(text: str) -> object:
    messages = [{"role": "user", "content": "Where does the river begin?"}, {"role": "assistant", "content": text}]
    return content.content_facts([{"messages": messages}])


SLOW: dict[str, Callable[[str], object]] = {
    "BEGIN ENCRYPTED PRIVATE KEY:": lambda text: privacy.scan([text]),
    "Comment: BEGIN ENCRYPTED PRIVATE KEY\n": lambda text: privacy.scan([text]),
    "PuTTY-User-Key-File-2: ": lambda text: privacy.scan([text]),
    "<tool_call> ": lambda text: call_texts._split_at_tags(text, "<tool_call>", call_texts.END_OF_CALL),
    "<functioncall>": lambda text: call_texts._split_at_tags(text, "<functioncall>", call_texts.END_OF_FUNCTION_CALL),
    "<tools>[": lambda text: call_texts._hermes(text),
    "list of functions in JSON format ": lambda text: call_texts._toolace(text),
    '"arguments": \'': lambda text: call_texts._with_json_text(text),
    "?": lambda text: content._SENTENCE.split(text),
    "\t": lambda text: content._ITEM.sub("", text, count=1),
    "\n": lambda text: content._is_code(text + "x"),
    "a ": lambda text: answered(text + "b"),
    "aa": lambda text: answered(f"```\na\n``` b c d e {text}1"),
    "PRIVATE KEY": lambda text: answered(text),
    "As an AI ": lambda text: answered(text),
    "{{": lambda text: answered(text),
    "<!--": lambda text: answered("<br>" + text),
    "é": lambda text: damage.damage([text]),
    "<s>a</s>": lambda text: damage.template_marks([text]),
    "éÀ\n": lambda text: damage.damage([text]),
}


@pytest.mark.parametrize("unit", SLOW)
def test_a_megabyte_of_one_pattern_takes_two_seconds_at_most(unit: str) -> None:
    text = unit * (MIB // len(unit))
    assert cpu_seconds(lambda: SLOW[unit](text)) < 2
    assert cpu_seconds(lambda: SLOW[unit](f"{unit}{' ' * MIB}x")) < 2


@pytest.mark.parametrize(
    "unit",
    [
        "DE12 ",
        "://a:b@",
        "tel ",
        "+49 ",
        "4 ",
        "a@b.",
        "aws key = ",
        "eyJa.",
        "xoxb-1-2-",
        "GR1348941",
        "1.1.",
        "//",
        "030 123456 ",
        "1123-45-67890 ",
    ],
)
def test_searches_for_private_values_are_linear(unit: str) -> None:
    ends = " _authToken=" if unit == "//" else ""  # else a search does not begin
    short, long = (cpu_seconds(lambda: privacy.scan([unit * (size // len(unit)) + ends])) for size in (25_000, 200_000))  # noqa: B023
    assert long < 8 * 2.5 * short + 0.2
