"""`pedigree check`: data files of every type and layout, with every option.
Rows are counted by who wrote them, not by the readers under test."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import itertools
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builders.layouts import BENCHMARK_ROWS, LAYOUT_ROWS, PAIR_ROWS

from dagster_project.core.errors import InputError
from dagster_project.core.records import write_ledger, write_records
from dagster_project.core.stored_rows import StoredRows
from dagster_project.curation.check_files import KNOWN, load, read_mapping
from dagster_project.curation.checks.checks import CHECKS, Rules
from dagster_project.curation.checks.review import edited, read_decisions
from fuzz.base_model import tokenizer_folder
from fuzz.surface import STEERS, Case, Surface, answered, as_content, call, write_files
from fuzz.values import damaged, like, scalar, text, value

TOOL_ROW = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Is it cold?"}], "weight": 0},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "I look.",
            "weight": 1,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
            ],
        },
        {"role": "tool", "content": "-3", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "Yes, it is.", "weight": 0},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
        }
    ],
}
EXAMPLES = [*(row for row, _ in LAYOUT_ROWS.values()), TOOL_ROW]
ROWS = [*EXAMPLES, *itertools.chain(*PAIR_ROWS.values()), *(row for row, *_ in BENCHMARK_ROWS.values())]
SUFFIXES = (
    ".json",
    ".jsonl",
    ".jsonl",
    ".csv",
    ".txt",
    ".json.gz",
    ".jsonl.gz",
    ".parquet",
    ".parquet",
    ".arrow",
    ".feather",
)
ODD_SUFFIXES = (".JSONL", ".tsv", ".xml", "", ".gz", ".csv.gz", ".zip")
CHECKED = 0.12
"""Share of the files that the whole command checks, which takes most of the
time. The others are only read, row by row."""


# --- drawing


def draw(random: random.Random) -> Case:
    if random.random() < 0.04:
        return _draw_review(random)
    if random.random() < 0.03:
        return _draw_output(random)
    rows = draw_rows(random)
    suffix = random.choice(SUFFIXES if random.random() < 0.97 else ODD_SUFFIXES)
    content, count = written(random, suffix, rows)
    files = {f"a{suffix}": as_content(content)}
    if random.random() > CHECKED:
        return {"files": files, "data": f"a{suffix}", "rows": count, "options": None}
    options, more = _options(random, rows)
    for name, extra in more.items():
        files[name] = as_content(extra)
    return {"files": files, "data": f"a{suffix}", "rows": count, "options": options}


def draw_rows(random: random.Random) -> list[Any]:
    """One to twelve rows like those of one layout, seldom of several; seldom anything."""
    kind = random.random()
    if kind < 0.05:
        return [value(random) for _ in range(random.randint(0, 4))]
    examples = random.choices(ROWS, k=3) if kind < 0.15 else [random.choice(ROWS)]
    rate = random.choice([0.0, 0.05, 0.15, 0.4])
    rows = [like(random, random.choice(examples), rate) for _ in range(random.randint(1, 12))]
    return rows + random.choices(rows, k=random.choice([0, 0, 1, 3]))


def written(random: random.Random, suffix: str, rows: list[Any]) -> tuple[bytes, int | None]:
    """Content of a file with these rows, sometimes damaged, and how many rows it has.

    Returns:
        None for a number that only a reader could tell.
    """
    kind = suffix.lower().removesuffix(".gz")
    packed = suffix.lower().endswith(".gz")
    broken = random.random() < 0.3
    if kind in {".parquet", ".arrow", ".feather"}:
        content, count = _table(random, kind, rows)
        if broken:
            content, count = _damaged_table(random, kind, content, count)
        return content, count
    content = {".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _text}.get(kind, _jsonl)(random, rows)
    if broken and not (packed and random.random() < 0.5):
        content = damaged(random, content)
    count = COUNTERS.get(kind, lambda _: None)(content)
    if packed:
        content = gzip.compress(content, mtime=0)
        if broken and random.random() < 0.5:
            content, count = damaged(random, content), None
    return content, count


def _dumped(random: random.Random, row: Any) -> bytes:
    content = json.dumps(row, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    kind = random.random()
    if kind < 0.98:
        return content
    deep = random.choice([150, 900, 30_000])
    return content[:-1] + b', "x": ' + (b"NaN" if kind < 0.99 else b"[" * deep + b"]" * deep) + b"}"


def _jsonl(random: random.Random, rows: list[Any]) -> bytes:
    return random.choice([b"\n", b"\n", b"\r\n", b"\n\n \n"]).join(
        _dumped(random, row) for row in rows
    ) + random.choice([b"\n", b""])


def _json(random: random.Random, rows: list[Any]) -> bytes:
    if random.random() < 0.03:
        return _dumped(random, {"data": rows})
    return b"[" + random.choice([b",", b",\n  ", b"\t,\r\n"]).join(_dumped(random, row) for row in rows) + b"]"


def _csv(random: random.Random, rows: list[Any]) -> bytes:
    import csv

    stream = io.StringIO(newline="")
    columns = [*dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)] or ["a"]
    writer = csv.writer(
        stream, quoting=random.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), delimiter=random.choice(",,,,;\t")
    )
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(key, "") if isinstance(row, dict) else row for key in columns]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _text(random: random.Random, rows: list[Any]) -> bytes:
    return b"\n\n".join(random.choice([_dumped(random, row), text(random).encode()]) for row in rows)


# --- counting


def _count_lines(content: bytes) -> int:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return sum(bool(line.decode(errors="replace").strip()) for line in lines)


def _count_list(content: bytes) -> int | None:
    """None for anything but a list: it is refused."""
    decoder = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len, strict=True)
    try:
        found = decoder.decode(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return len(found) if isinstance(found, list) else None


def _count_csv(content: bytes) -> int | None:
    if any(mark in content for mark in (b'"', b"\r", b"\0")):
        return None
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line]
    return (
        None if any(line[-2:-1] == b"," for line in lines) else max(0, len(lines) - 1)
    )  # that may be MMLU, which has no header


def _count_paragraphs(content: bytes) -> int:
    blank = [not line.decode(errors="replace").strip() for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    return sum(not here and before for before, here in itertools.pairwise([True, *blank]))


COUNTERS: dict[str, Callable[[bytes], int | None]] = {
    ".json": _count_list,
    ".jsonl": _count_lines,
    ".csv": _count_csv,
    ".txt": _count_paragraphs,
}


# --- tables


def _table(random: random.Random, kind: str, rows: list[Any]) -> tuple[bytes, int]:
    """A table of the rows, or of columns of every type."""
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet as pq

    rows = [row if isinstance(row, dict) and row else {"text": json.dumps(row)} for row in rows] or [{"text": "a"}]
    try:
        if any(json.dumps(row).count("[") + json.dumps(row).count("{") > 50 for row in rows):
            raise ValueError("Arrow takes minutes for types that are so deep")
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, OverflowError, ValueError):
        table = pa.Table.from_pylist([{key: json.dumps(cell) for key, cell in row.items()} for row in rows])
    if random.random() < 0.4:
        for name, column in _odd_columns(random, len(rows)).items():
            table = table.append_column(name, column)
    sink = pa.BufferOutputStream()
    try:
        if kind == ".parquet":
            pq.write_table(
                table,
                sink,
                compression=random.choice(["none", "snappy", "zstd", "gzip"]),
                row_group_size=random.choice([1, 3, 1000]),
                use_dictionary=random.random() < 0.5,
                data_page_version=random.choice(["1.0", "2.0"]),
                store_schema=random.random() < 0.8,
            )
        elif kind == ".feather":
            pyarrow.feather.write_feather(table, sink, compression=random.choice(["lz4", "uncompressed", "zstd"]))
        else:
            new = pa.ipc.new_stream if random.random() < 0.5 else pa.ipc.new_file
            with new(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=random.choice([1, 3, 1000]))
    except (pa.ArrowException, ValueError):  # a type that this format does not have
        return _table(random, kind, [{"text": "a"}] * len(rows))
    return sink.getvalue().to_pybytes(), len(rows)


def _odd_columns(random: random.Random, rows: int) -> dict[str, Any]:
    """One to three columns of types that JSON does not have."""
    import pyarrow as pa

    day, now = datetime.date(2026, 2, 28), datetime.datetime(2026, 2, 28, 1, 2, 3, 4)
    zone = random.choice(["UTC", "Europe/Oslo", "America/Ciudad_Juarez", "+25:00", "Nowhere/Town", "", "é"])
    kinds: list[tuple[Any, list[Any]]] = [
        (pa.timestamp(random.choice(["s", "ms", "us", "ns"]), zone or None), [now, None]),
        (pa.timestamp("s"), [2**40, -(2**60), None]),
        (pa.date32(), [day, None]),
        (pa.date64(), [day]),
        (pa.date32(), [2**31 - 1, -(2**31)]),
        (pa.time64("ns"), [1, None]),
        (pa.duration("ms"), [10**12, None]),
        (pa.decimal128(38, 4), [decimal.Decimal("1.5"), None]),
        (pa.decimal256(70, 10), [decimal.Decimal("1.5"), None]),
        (pa.binary(), [b"\xff\xfe", b"", None]),
        (pa.large_binary(), [b"abc"]),
        (pa.binary(3), [b"abc", None]),
        (pa.large_string(), ["x", None]),
        (pa.string_view(), ["x", None]),
        (pa.float16(), [1.0, None]),
        (pa.float64(), [float("nan"), float("inf"), 1.0]),
        (pa.uint64(), [2**64 - 1, None]),
        (pa.null(), [None]),
        (pa.map_(pa.string(), pa.int64()), [[("a", 1), ("a", 2)], None]),
        (pa.list_(pa.string(), 2), [["a", None], None]),
        (pa.dictionary(pa.int8(), pa.string()), ["x", None]),
        (pa.struct([("a", pa.int8()), ("b", pa.list_(pa.null()))]), [{"a": 1}, None]),
        (pa.list_(pa.list_(pa.list_(pa.string()))), [[[["x"]], []], None]),
        (pa.month_day_nano_interval(), [(1, 2, 3), None]),
    ]
    found = {}
    for i in range(random.randint(1, 3)):
        kind, cells = random.choice(kinds)
        try:
            found[random.choice([f"x{i}", "category", "split", "meta", "id"])] = pa.array(
                random.choices(cells, k=rows), kind
            )
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            found[f"n{i}"] = pa.nulls(rows)
    return found


def _damaged_table(random: random.Random, kind: str, content: bytes, count: int) -> tuple[bytes, int | None]:
    """Damage before the footer of a Parquet file changes no count; the rest may."""
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    if kind == ".parquet" and footer > 8 and random.random() < 0.6:
        broken = bytearray(content)
        for _ in range(random.randint(1, 6)):
            broken[random.randrange(4, footer)] = random.randrange(256)
        return bytes(broken), count
    return damaged(random, content), None


# --- options


def _options(random: random.Random, rows: list[Any]) -> tuple[list[str], dict[str, bytes]]:
    """Options of the command, with the files that they name."""
    options: list[str] = []
    files: dict[str, bytes] = {}

    def other(name: str) -> str:
        suffix = random.choice(SUFFIXES)
        files[f"{name}{suffix}"] = written(random, suffix, random.choice([rows, draw_rows(random)]))[0]
        return f"{name}{suffix}"

    if random.random() < 0.15:
        options += ["--format", random.choice([*KNOWN, "nothing"])]
    if random.random() < 0.07:
        options += ["--mapping", _mapping(random, rows)]
    if random.random() < 0.15:
        options += ["--against", other("b"), *(["--thirteen-grams"] if random.random() < 0.3 else [])]
    if random.random() < 0.12:
        options += ["--since", other("c")]
    if random.random() < 0.15:
        files["policy.yaml"] = policy(random)
        options += ["--policy", "policy.yaml"]
    if random.random() < 0.2:
        options += ["--report", "page.html"]
    if random.random() < 0.25:
        options += ["--out", "out.jsonl", "--dropped", "dropped.jsonl"]
    if random.random() < 0.1:
        options += random.choice(
            [
                ["--show", "3"],
                ["--show-rows", "0,2"],
                ["--show", "1", "--template", random.choice(["chatml", "hermes", "alpaca", "x.jinja"])],
            ]
        )
        files["x.jinja"] = damaged(
            random, b"{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}\n{% endfor %}"
        )
    if random.random() < 0.1:
        options += ["--base-model", "model"]
        for name, content in tokenizer_folder().items():
            files[f"model/{name}"] = damaged(random, content) if random.random() < 0.15 else content
    return options, files


def _mapping(random: random.Random, rows: list[Any]) -> str:
    keys = [*dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)] or ["a"]
    fields = ["prompt", "response", "chosen", "rejected", "system", "category", "tools", "tool_calls", "reasoning", "x"]
    return ",".join(
        f"{field}={random.choice(keys)}" for field in random.choices([*fields[:2], *fields], k=random.randint(1, 4))
    )


def policy(random: random.Random) -> bytes:
    """A file for --policy: YAML like one, or anything."""
    checks = [*CHECKS, "nothing"]
    actions = ["drop", "warn", "fail", "review", "fix", "error", "info", None]
    waiver = {
        "check": random.choice(checks),
        "reason": text(random),
        "expires": random.choice(["2999-01-01", "2999-02-30", "2000-01-01", 3]),
    }
    waiver[random.choice(["rows", "pairs"])] = random.choice(
        [["a.jsonl:0"], [["a.jsonl:0", "a.jsonl:1"]], value(random, 2)]
    )
    found: dict[str, Any] = {
        "policy": {random.choice(checks): random.choice(actions) for _ in range(random.randint(0, 3))},
        "severity": {random.choice(checks): random.choice(actions)},
        "waivers": [waiver],
        **{random.choice([*Rules.model_fields]): scalar(random) for _ in range(random.randint(0, 2))},
    }
    found = {key: like(random, one, 0.05) for key, one in found.items() if random.random() < 0.5}
    content = json.dumps({"instructions": found} if random.random() < 0.2 else found, ensure_ascii=False)
    written = (
        content.replace('"2999-01-01"', "2999-01-01")
        .replace('"2999-02-30"', "2999-02-30")
        .encode("utf-8", "surrogatepass")
    )
    return damaged(random, written) if random.random() < 0.3 else written


def _draw_review(random: random.Random) -> Case:
    """A file of decisions, as people save it from a spreadsheet."""
    names = ["example_id", "check", "decision", "reason", "new_prompt", "new_response", "place", "x\n"]
    rows = [
        {
            name: random.choice([text(random), "accept", "drop", "edit", "Edit ", ""])
            for name in names
            if random.random() < 0.9
        }
        for _ in range(random.randint(0, 4))
    ]
    content = _csv(random, rows)
    return {
        "files": {"review.csv": as_content(damaged(random, content) if random.random() < 0.5 else content)},
        "review": "review.csv",
    }


def _draw_output(random: random.Random) -> Case:
    """An output of a stage, of which one file is damaged."""
    said = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    shared = {"source": "s", "messages": said, "category": None, "group_id": None, "meta": "{}"}
    ids = [f"{i:032x}" for i in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder), [{"example_id": one, **shared} for one in ids])
        write_ledger(
            Path(folder),
            [
                {"source": "s", "source_row": i, "example_id": one, "outcome": "kept", "why": None}
                for i, one in enumerate(ids)
            ],
        )
        files = {f"set/{path.name}": path.read_bytes() for path in sorted(Path(folder).iterdir())}
    name = random.choice([*files])
    files[name] = damaged(random, files[name])
    return {
        "files": {name: as_content(content) for name, content in files.items()},
        "data": "set",
        "rows": None,
        "options": None,
    }


# --- playing


def play(case: Case, folder: Path) -> str:
    write_files(case, folder)
    if "review" in case:
        return _play_review(Path(case["review"]))
    options, path = case["options"], case["data"]
    if options is None:
        return _play_reading(case)
    before = sorted(folder.rglob("*"))
    code, document = answered("check", path, *options)
    if document is None:
        assert code == 2
        assert sorted(folder.rglob("*")) == before, "refused, but a file was written"
        return "refused"
    assert document["rows"] == document["kept"] + sum(document["dropped"].values())
    assert code == int(any(one["severity"] == "error" and one["count"] for one in document["findings"]))
    for finding in document["findings"]:
        assert finding["dropped"] + finding["waived"] <= finding["count"] + finding["waived"] <= document["rows"] + 1
        for match in finding["matches"]:
            for name in ("", "other_"):
                assert 0 <= match[f"{name}span"][0] <= match[f"{name}span"][1] <= len(match[f"{name}text"])
    layout = options[options.index("--format") + 1] if "--format" in options else "auto"
    mapping = read_mapping(options[options.index("--mapping") + 1]) if "--mapping" in options else None
    found = load([path], layout, mapping)
    assert document["rows"] == len(found.records)
    _account(case, found.records)
    if "--out" in options:
        assert _count_lines(Path("out.jsonl").read_bytes()) == document["kept"]
        assert _count_lines(Path("dropped.jsonl").read_bytes()) == document["rows"] - document["kept"]
    if "--report" in options:
        html = Path("page.html").read_text("utf-8")
        assert html.startswith("<!DOCTYPE html>") and not STEERS.search(html.replace("\t", " "))
        assert html.count("<script") == 1 + ('id="pairs-data"' in html)
    if len(json.dumps(case)) % 4 == 0:  # the same without --json
        again, out, err = call("check", path, *options)
        assert again == code and out and not STEERS.search(out + err), "the text differs from the document"
    return "passed" if code == 0 else "failed checks"


def _play_reading(case: Case) -> str:
    try:
        found = load([case["data"]])
    except InputError as error:
        assert error.what and error.hint
        return "refused"
    _account(case, found.records)
    return "read"


def _account(case: Case, records: list[dict[str, Any]]) -> None:
    """Every row that was written is a record, a part of one, or malformed; and there is no other."""
    if case["rows"] is not None:
        rows = {row for record in records for row in record.get("source_rows", [record["source_row"]])}
        assert rows == set(range(case["rows"])), f"{case['rows']} rows were written, {len(rows)} are accounted for"


def _play_review(path: Path) -> str:
    try:
        found = read_decisions(path, CHECKS)
    except InputError as error:
        assert error.hint and path.name in error.what
        return "refused"
    said = [{"role": "user", "content": "Where?"}]
    records, why = edited(StoredRows([{"example_id": found[0].example_id if found else "", "messages": said}]), found)
    assert len(records) == 1 and set(why) <= {0}
    return "passed"


SURFACE = Surface("data_files", 10_000, draw, play)
