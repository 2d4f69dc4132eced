"""`pedigree erase`, in parts: rows leave files of every type, a scan finds what
was hidden in any container, tombstones refuse what comes back."""

from __future__ import annotations

import bz2
import codecs
import dataclasses
import gzip
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import sqlite3
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders.files import FILE_WRITERS, jsonl
from builders.history import Project, entry, identity, messages, out, table
from conftest import ROOT, run
from cryptography.hazmat.primitives.asymmetric import ed25519

from dagster_project.__main__ import main
from dagster_project.commands.erase import as_text, exit_code
from dagster_project.commands.erase_certificate import (
    EVENT_LOG_ELSEWHERE,
    certificate,
    certificate_text,
    free_name,
    write,
)
from dagster_project.core.errors import Busy, InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.params import parse
from dagster_project.core.records import READ, Report, example_id, ledger_schema, record_schema
from dagster_project.curation.sources import erased
from dagster_project.curation.sources.files import read_rows
from dagster_project.lineage.erasure import scan, tombstones
from dagster_project.lineage.erasure.needles import Needles, fragments, needles_of
from dagster_project.lineage.erasure.records import Finder, Found, Raw, Request, read_request, texts_of
from dagster_project.lineage.erasure.removal import WRITERS, without
from dagster_project.lineage.erasure.scan import Scanner
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.impact.text import as_text as impact_text
from dagster_project.lineage.index import Index
from dagster_project.lineage.rows import record_key
from dagster_project.lineage.signing import provenance
from dagster_project.lineage.signing.keys import PrivateKey
from dagster_project.lineage.signing.model_signature import ATTESTATIONS, PUBLIC_KEY, SIGNATURE
from dagster_project.lineage.signing.target import folders_naming
from dagster_project.orchestration import locks
from dagster_project.orchestration.dvc import ALWAYS, Input, StageState
from dagster_project.orchestration.dvc_run import reproduce
from dagster_project.orchestration.erasure import event_log, steps
from dagster_project.orchestration.erasure import plan as plans
from dagster_project.orchestration.erasure.exclusive import LOCK, no_stage_runs, one_erasure
from dagster_project.orchestration.erasure.objects import Own, to_remove
from dagster_project.orchestration.erasure.plan import found_in_models, models_of, usable_key
from dagster_project.orchestration.erasure.steps import Erasure
from dagster_project.orchestration.integrity import KNOWN_HASHES
from dagster_project.stages import raw_examples, raw_preferences

KEY = "5f" * 32
SECRET = "Zephyrine Okonkwo of Larkspur Lane says \"no\" to the <lantern> & sends it back, été"  # fmt: skip


def rows(n: int = 6) -> list[dict[str, Any]]:
    return [{"text": f'Line {i}, "quoted", with a comma\nand a second line'} for i in range(n)]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("gone", [{0}, {5}, {2, 3}, {0, 1, 4, 5}])
def test_rows_leave_a_file_of_any_type_and_the_others_stay(tmp_path: Path, suffix: str, gone: set[int]) -> None:
    path = tmp_path / f"a{suffix}"
    FILE_WRITERS[suffix](path, rows())
    before = [row.value for row in read_rows(path)]
    path.write_bytes(without(path, gone, "a"))
    assert [row.value for row in read_rows(path)] == [value for i, value in enumerate(before) if i not in gone]


def test_other_lines_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a":  1}\r\n\r\n{"a": 2}\n \n{"a" : 3}')
    assert without(path, {1}, "a") == b'\xef\xbb\xbf{"a":  1}\r\n\r\n \n{"a" : 3}'
    path = tmp_path / "a.json"
    path.write_text('[ {"a": 1} ,\n  {"a": 2},{"a":3} ]\n')
    assert without(path, {1}, "a") == b'[ {"a": 1} ,\n  {"a":3} ]\n'
    assert without(path, {2}, "a") == b'[ {"a": 1} ,\n  {"a": 2} ]\n'


@pytest.mark.parametrize(
    "blank", ["", " ", "\u00a0", "\u2003\u3000", "\x1c", "\x85", "\ufeff", "\ufeff\u00a0", "\u200b"]
)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_rows_are_numbered_as_the_reader_numbers_them_whatever_is_between_them(
    tmp_path: Path, blank: str, bom: str
) -> None:
    """A line with only a byte order mark is blank for the reader as the first one of a file only."""
    for suffix, first, second in ((".jsonl", '{"text": "One"}', '{"text": "Two"}'), (".txt", "One", "Two")):
        path = tmp_path / f"a{suffix}"
        path.write_text("\n".join([bom, "", first, "", blank, "", second, "", ""]), encoding="utf-8", newline="")
        values = [row.value for row in read_rows(path)]
        path.write_bytes(without(path, {len(values) - 1}, "a"))
        assert [row.value for row in read_rows(path)] == values[:-1] and b"Two" not in path.read_bytes()


def test_what_cannot_be_done_whole_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *rows(2))
    with pytest.raises(InputError, match="all of its rows"):
        without(path, {0, 1}, "a.jsonl")
    with pytest.raises(InputError, match="no row 7"):
        without(path, {7}, "a.jsonl")
    with pytest.raises(InputError, match=r"of type \.xlsx"):
        without(tmp_path / "a.xlsx", {0}, "a.xlsx")


def shared_columns(views: bool) -> pa.Table:
    """Columns whose rows refer to values that are stored once."""
    texts = [SECRET, "of somebody else", None]
    word = pa.dictionary(pa.int32(), pa.string())
    columns: dict[str, pa.Array] = {
        "text": pa.array(["one", "two", "three"]),
        "word": pa.array(texts, word),
        "inner": pa.array([{"words": [text]} for text in texts], pa.struct([("words", pa.list_(word))])),
    }
    if views:
        columns |= {
            "view": pa.array(texts, pa.string_view()),
            "views": pa.array([[text] for text in texts], pa.list_(pa.binary_view())),
        }
        columns["word of view"] = columns["word"].cast(pa.dictionary(pa.int32(), pa.string_view()))
    return pa.table(columns)


def write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="none")


def write_arrow(new: Any) -> Callable[[Path, pa.Table], None]:
    def write(path: Path, table: pa.Table) -> None:
        with new(str(path), table.schema) as writer:
            writer.write_table(table)

    return write


@pytest.mark.parametrize(
    ("suffix", "write"),
    [(".parquet", write_parquet), (".arrow", write_arrow(pa.ipc.new_file)), (".arrow", write_arrow(pa.ipc.new_stream))],
    ids=["parquet", "file", "stream"],
)
def test_values_that_rows_share_leave_a_table_with_the_row(
    tmp_path: Path, suffix: str, write: Callable[[Path, pa.Table], None]
) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, shared_columns(views=suffix == ".arrow"))
    content = without(path, {0}, "a")
    part = SECRET[:24].encode()
    assert part in path.read_bytes() and part not in content
    path.write_bytes(content)
    assert [row.value["inner"]["words"] for row in read_rows(path) if row.value] == [
        ["of somebody else"],
        [None],
    ]


def hidden(path: Path, text: str) -> dict[str, Path]:
    """The same text in files of many kinds."""
    import pandas as pd

    pd.DataFrame({"m": [[{"content": text}], []]}).to_parquet(path / "a.parquet", compression="zstd")
    (path / "a.json").write_text(json.dumps([{"inner": json.dumps(text)}]))
    (path / "a.html").write_text(text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&#34;"))
    (path / "a.txt").write_text(f"first\n{text}", encoding="utf-16")  # as Notepad and PowerShell write it
    (path / "a.csv.gz").write_bytes(gzip.compress(codecs.BOM_UTF16_BE + text.encode("utf-16-be")))
    (path / "a.gz").write_bytes(gzip.compress(gzip.compress(text.encode())))
    (path / "a.bz2").write_bytes(bz2.compress(b"first") + bz2.compress(text.encode()))
    (path / "a.xz").write_bytes(lzma.compress(b"first") + lzma.compress(text.encode()))
    for codec, suffix in (("zstd", "zst"), ("lz4", "lz4")):
        (path / f"a.jsonl.{suffix}").write_bytes(
            b"".join(pa.compress(part, codec, asbytes=True) for part in (b"first" * 9, text.encode()))
        )
    with zipfile.ZipFile(path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", text)
    with sqlite3.connect(path / "a.db") as db:
        db.execute("CREATE TABLE t (x)")
        db.execute("INSERT INTO t VALUES (?)", (text,))
    FILE_WRITERS[".feather"](path / "a.feather", [{"t": text}])
    stream = pa.table({"t": [text] * 9})
    with pa.ipc.new_stream(
        str(path / "a.arrow"), stream.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(stream)
    big = io.BytesIO(b"." * (16 * 2**20 - 20))  # the text crosses the end of what is searched at once
    (path / "a.bin").write_bytes(big.getvalue() + text.encode())
    return {file.name: file for file in sorted(path.iterdir())}


def test_a_text_is_found_in_every_container_and_another_text_in_none(tmp_path: Path) -> None:
    needles = needles_of([SECRET], [], ["Somebody else of Larkspur Lane says it was fine"])
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
    scanner = Scanner(needles)
    assert [name for name, path in hidden(tmp_path / "with", SECRET).items() if not scanner.file(path)] == []
    other = "Somebody else of Larkspur Lane says it was fine, in every way"
    assert [name for name, path in hidden(tmp_path / "without", other).items() if scanner.file(path)] == []
    assert scanner.unreadable == []


def test_many_files_are_searched_at_once_and_each_holds_what_it_holds_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of patterns take longer to prepare than a small file takes to search."""
    scanner = Scanner(needles_of([SECRET], [], []))
    paths = [*hidden(tmp_path, SECRET).values(), tmp_path / "gone"]
    for i in range(300):
        paths.insert(i % len(paths), tmp_path / f"{i}.txt")
        paths[i % len(paths)].write_text(SECRET if i % 7 == 0 else "another text")
    alone = [scanner.file(path) for path in paths]
    searches = []
    search_waiting = Scanner._search_waiting
    monkeypatch.setattr(Scanner, "_search_waiting", lambda self: searches.append(1) or search_waiting(self))  # type: ignore[func-returns-value]
    assert scanner.files(paths) == alone and alone.count(set()) == 258 and len(searches) <= 3
    assert scanner.contents(("", path.read_bytes()) for path in paths if path.exists()) == [
        kinds for path, kinds in zip(paths, alone, strict=True) if path.exists()
    ]


def test_an_archive_that_cannot_be_opened_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not a table")
    scanner = Scanner(needles_of([SECRET], [], []))
    assert scanner.file(tmp_path / "a.parquet") == set() and scanner.unreadable == [str(tmp_path / "a.parquet")]
    cut = bytes(pa.compress(os.urandom(9999), "zstd", asbytes=True))[:-99]
    for name, content in {"a.7z": b"7z\xbc\xaf\x27\x1c...", "a.xz": b"\xfd7zXZ\x00...", "a.zst": cut}.items():
        (tmp_path / name).write_bytes(content)
        assert scanner.file(tmp_path / name) == set() and scanner.unreadable[-1] == str(tmp_path / name)


def database(value: str) -> bytes:
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE t (x)")
        db.execute("INSERT INTO t VALUES (?)", (value,))
        db.commit()
        return db.serialize()


def test_a_text_that_sqlite_divides_between_pages_is_found(tmp_path: Path) -> None:
    text = "Zephyrine Okonkwo of Larkspur"
    scanner = Scanner(needles_of([text], [], []))
    contents = [database("." * start + text + "," * (20_000 - start)) for start in range(4200)]
    divided = [one for one in contents if text.encode() not in one]
    assert divided
    for content in divided:
        (tmp_path / "a.db").write_bytes(content)
        assert scanner.file(tmp_path / "a.db") and scanner.content(gzip.compress(content))
        (tmp_path / "a.tar").write_bytes(in_tar(content))
        assert scanner.file(tmp_path / "a.tar")
    assert scanner.unreadable == [] and sorted(path.name for path in tmp_path.iterdir()) == ["a.db", "a.tar"]


def test_a_database_in_utf_16_is_searched(tmp_path: Path) -> None:
    text = "Zephyrine Okonkwo of Larkspur"
    with closing(sqlite3.connect(tmp_path / "a.db")) as db:
        db.execute("PRAGMA encoding = 'UTF-16le'")
        db.execute("CREATE TABLE t (x, y)")
        db.execute("INSERT INTO t VALUES (?, ?)", (f"{text} wants her lantern back", "." * 60))
        db.commit()
    content = (tmp_path / "a.db").read_bytes()
    assert text.encode() not in content and text.encode("utf-16-le") in content
    scanner = Scanner(needles_of([text], [], []))
    assert scanner.file(tmp_path / "a.db") and scanner.content(gzip.compress(content)) and scanner.unreadable == []


def test_a_database_with_a_log_is_searched_and_not_changed(tmp_path: Path) -> None:
    text = "Zephyrine Okonkwo of Larkspur"
    with closing(sqlite3.connect(tmp_path / "a.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t (x)")
        db.executemany("INSERT INTO t VALUES (?)", [("." * start + text + "," * 9000,) for start in range(0, 4200, 40)])
        db.commit()
    before = (tmp_path / "a.db").read_bytes()
    scanner = Scanner(needles_of([text], [], []))
    assert scanner.file(tmp_path / "a.db") and scanner.content(before) and scanner.unreadable == []
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
    (tmp_path / "a.db").write_bytes(before[:4000])
    assert scanner.file(tmp_path / "a.db") == set() and scanner.unreadable == [str(tmp_path / "a.db")]


def packed(text: str, rows: int = 3) -> bytes:
    """A table whose statistics do not name a text in one of the rows between."""
    middle = [f"{number} {text}" for number in range(1, rows - 1)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["0", *middle, "9"]}), sink, compression="zstd")
    return sink.getvalue()


def in_tar(content: bytes, name: str = "a.parquet") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for member in ("before.txt", name):
            facts = tarfile.TarInfo(member)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return sink.getvalue()


def test_packed_files_in_tar_are_opened_and_one_that_is_damaged_is_counted(tmp_path: Path) -> None:
    scanner = Scanner(needles_of([SECRET], [], []))
    for content in (
        in_tar(packed(SECRET)),
        gzip.compress(in_tar(packed(SECRET))),
        in_tar(gzip.compress(in_tar(packed(SECRET)))),
    ):
        (tmp_path / "backup").write_bytes(content)
        assert SECRET.encode() not in content and scanner.file(tmp_path / "backup") == {"text", "sure"}
        assert scanner.content(content) == {"text", "sure"} and scanner.unreadable == []
    (tmp_path / "backup").write_bytes(in_tar(packed("somebody else")))
    assert scanner.file(tmp_path / "backup") == set() and scanner.unreadable == []
    cut = in_tar(packed(SECRET))
    (tmp_path / "cut").write_bytes(cut[: cut.index(b"PAR1") + 100])
    assert scanner.file(tmp_path / "cut") == set() and scanner.unreadable == [str(tmp_path / "cut")]


def test_an_archive_that_is_too_deep_in_others_is_counted() -> None:
    content, scanner = SECRET.encode(), Scanner(needles_of([SECRET], [], []))
    for depth in range(1, 8):
        content = gzip.compress(content)
        found = scanner.content(content, str(depth))
        assert bool(found) != (scanner.unreadable == [str(depth)]), "found, or said to be not searched"
        scanner.unreadable.clear()


def test_an_excerpt_is_found() -> None:
    text = "The quick brown fox jumps over the lazy dog and then naps under the old oak tree until noon."
    scanner = Scanner(needles_of([text], [], []))
    found = [bool(scanner.content(text[start : start + 48].encode())) for start in range(len(text) - 48)]
    assert all(found)


@pytest.mark.parametrize("text", ["Zephyrine Okonkwo, Larkspur Lane", "Потерян кобальтовый фонарь"])
def test_a_text_is_found_wherever_the_blocks_that_are_searched_begin(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanner, content = Scanner(needles_of([text], [], [])), json.dumps(text[:24]).encode()
    for block in (len(content) - 1, 2 * len(content)):
        monkeypatch.setattr(scan, "BLOCK", block)
        assert [start for start in range(2 * block) if not scanner.content(b"." * start + content + b"...")] == []


@pytest.mark.parametrize("text", ["Nguyễn Thị Minh Khai hỏi về hóa đơn điện", "Die Bürgermeisterin prüfte die Größe"])
@pytest.mark.parametrize("given", ["NFC", "NFD"])
def test_a_text_is_found_whether_its_letters_are_composed_or_not_and_as_windows_writes_it(
    text: str, given: Literal["NFC", "NFD"]
) -> None:
    scanner = Scanner(needles_of([unicodedata.normalize(given, text)], [], []))
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    for shown in (composed, decomposed, json.dumps(composed), json.dumps(decomposed)):
        assert "text" in scanner.content(shown.encode())
    if text.startswith("Die"):
        assert "text" in scanner.content(composed.encode("cp1252"))
    others = (unicodedata.normalize("NFC" if given == "NFD" else "NFD", f"{text}, everybody says"),)
    assert needles_of([unicodedata.normalize(given, text)], [], others).texts == (), "another record has it, too"
    assert needles_of([text, "é"], [], others).unsearchable == 2
    assert scanner.content("Die Bürgermeister prüften die Größen, và hóa đơn".encode()) == set()


def test_ids_are_found_as_text_and_as_bytes() -> None:
    scanner = Scanner(Needles(ids=("0123456789abcdef0123456789abcdef",)))
    assert scanner.content(b'"0123456789abcdef0123456789abcdef"') == {"id", "sure"}
    assert scanner.content(b"..\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef..") == {"id", "sure"}
    assert scanner.content(b"0123456789abcdef0123456789abcdee") == set()


def test_what_other_records_say_too_is_not_searched_for() -> None:
    assert needles_of(["You are a helpful assistant."], [], ["You are a helpful assistant."]).texts == ()
    assert needles_of(["You are a helpful assistant.", "ok"], [], ["You are a helpful assistant."]).unsearchable == 2
    assert fragments("short") == []


def conversation(prompt: str, answer: str, system: str | None = None) -> dict[str, Any]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


CALL = [
    {
        "type": "function",
        "function": {"name": "find", "arguments": {"phone": 4915112345678, "by": {"Zephyrine Okonkwo": 7301}}},
    }
]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        (
            {
                "messages": [
                    {"role": "user", "name": "Zephyrine Okonkwo", "content": "Hi"},
                    {"role": "assistant", "content": "Yes?"},
                ]
            },
            ["Zephyrine Okonkwo"],
        ),
        (
            conversation("Hi", "Yes?") | {"phone": 4915112345678, "order": 7301, "by": {"Zephyrine Okonkwo": 1}},
            ["4915112345678", "7301", "Zephyrine Okonkwo"],
        ),
        (conversation("Hi", "Yes?") | {"category": "Zephyrine Okonkwo"}, ["Zephyrine Okonkwo"]),
        (
            conversation("Hi", "Yes?")
            | {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "find", "description": "asks Zoë Okonkwo", "parameters": {}},
                    }
                ]
            },
            ["Zoë Okonkwo"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "", "tool_calls": CALL},
                    {"role": "tool", "content": "1"},
                    {"role": "assistant", "content": "Yes?"},
                ]
            },
            ["4915112345678", "7301", "Zephyrine Okonkwo"],
        ),
    ],
    ids=["name", "other fields", "category", "tools", "call"],
)
def test_a_request_finds_a_text_in_every_field_of_a_row(tmp_path: Path, row: dict[str, Any], texts: list[str]) -> None:
    read(tmp_path, row, conversation("Hello", "Order 17301 of Okonkwo, Zephyrine"))
    toy = Project(tmp_path / "project")
    raw = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
    toy.commit({"raw_examples": entry("raw_examples", {"data/sources/a.jsonl": "1" * 32}, toy.put(raw))})
    for text in texts:
        found = Finder(Index(toy.root), bytes.fromhex(KEY)).find(Request(containing=(text,)), ())
        assert found.rows == {"data/sources/a.jsonl": {0}}, text
        assert {*found.needles.texts} == {texts[0], text} - {"Zoë Okonkwo", "7301"}, "without those that are too short"


def test_a_request_finds_a_row_that_cannot_be_read(tmp_path: Path) -> None:
    broken = '{"messages": [{"role": "user", "content": "Zephyrine Okonkwo asks"},]}'
    escaped = r'{"messages": "Zo\u00eb\nOkonkwo \ud83c\udfee cut'
    read(
        tmp_path,
        conversation("Hi", "Yes?"),
        conversation("Ho", "No?"),
        broken,
        '{"messages": "cut',
        escaped,
        conversation("Hm", "So?"),
    )
    toy = Project(tmp_path / "project")
    raw = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
    toy.commit({"raw_examples": entry("raw_examples", {"data/sources/a.jsonl": "1" * 32}, toy.put(raw))})
    found = Finder(Index(toy.root), bytes.fromhex(KEY)).find(Request(containing=("Zephyrine Okonkwo",)), ())
    assert found.rows == {"data/sources/a.jsonl": {2}}
    finder = Finder(Index(toy.root), bytes.fromhex(KEY))
    assert finder.find(Request(containing=("Zoë Okonkwo \N{IZAKAYA LANTERN}",)), ()).rows == {
        "data/sources/a.jsonl": {4}
    }
    assert len(found.tombstones) == 1, "the other row that cannot be read has another id"
    assert {*found.needles.texts} == {"Zephyrine Okonkwo", "Zephyrine Okonkwo asks"}, "not the words of the reason"
    assert without(tmp_path / "data/sources/a.jsonl", {2}, "a.jsonl").splitlines()[2:4] == [
        b'{"messages": "cut',
        escaped.encode(),
    ]


def test_the_text_of_a_request_is_searched_for_also_where_no_row_was_read(tmp_path: Path) -> None:
    read(
        tmp_path,
        conversation("Where does Zephyrine Okonkwo live, the lady in blue?", "Yes?"),
        conversation("Ho", "No?"),
    )
    toy = Project(tmp_path / "project")
    raw = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
    toy.commit({"raw_examples": entry("raw_examples", {"data/sources/a.jsonl": "1" * 32}, toy.put(raw))})
    finder = Finder(Index(toy.root), bytes.fromhex(KEY))
    by_text, by_row = (
        finder.find(one, ())
        for one in (Request(containing=("Zephyrine Okonkwo",)), Request(sources=("data/sources/a.jsonl:0",)))
    )
    unlisted = b'{"prompt": "Who rang?", "completion": "Zephyrine Okonkwo did."}'
    assert [Scanner(found.needles).content(unlisted) for found in (by_text, by_row)] == [{"text"}, set()]


def test_the_reason_why_a_pair_has_one_side_is_not_searched_for() -> None:
    meta = json.dumps({"chosen": {"note": "of the lantern"}, "problem": "no rejected completion of the same prompt"})
    half = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Yes?"}],
        "rejected": [],
        "meta": meta,
    }
    assert [*texts_of(half)] == ["Hi", "Yes?", "of the lantern"]
    row = conversation("Hi", "Yes?") | {"meta": json.dumps({"problem": "2 + 2"})}
    assert [*texts_of(row)] == ["Hi", "Yes?", "2 + 2"], "a column of a source with this name"


def test_what_only_shares_a_prompt_is_no_copy() -> None:
    """Also if the assistant said something in the prompt, and the answer has no
    words: a call, or the side that an unpaired row lacks."""
    key = bytes.fromhex(KEY)
    prompt = [*conversation("Where is it?", "Which parcel?")["messages"], {"role": "user", "content": "The blue one."}]
    said = [[{"role": "assistant", "content": text}] for text in ("On its way.", "Lost.")]
    unpaired = [erased.text_marks(key, {"prompt": prompt, "chosen": answer, "rejected": None}) for answer in said]
    assert [len(marks) for marks in unpaired] == [1, 1] and unpaired[0] != unpaired[1]
    assert erased.text_marks(key, {"messages": [*prompt, *said[0]]}) == unpaired[0]
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {}}}],
    }
    assert erased.text_marks(key, {"messages": [*prompt, call]}) == []
    assert erased.text_marks(key, {"messages": [*prompt, call, {"role": "tool", "content": "{}"}, *said[0]]}) != []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project from which one record was erased."""
    (tmp_path / "data/keys").mkdir(parents=True)
    (tmp_path / "data/keys/record_ids.key").write_text(KEY)
    record = conversation("Where is my lantern?", "On its way to you.")
    mark = {"record": erased.record_mark(bytes.fromhex(KEY), example_id(record["messages"])),
            "texts": erased.text_marks(bytes.fromhex(KEY), record)}  # fmt: skip
    jsonl(tmp_path / erased.TOMBSTONES, {**mark, "key": erased.key_id(bytes.fromhex(KEY)), "date": "2026-01-01"})
    return tmp_path


def read(root: Path, *records: Any) -> Report:
    jsonl(root / "data/sources/a.jsonl", *records)
    return raw_examples.produce(
        root, parse(raw_examples.Params, {"sources": [{"path": "data/sources/a.jsonl"}]}, "raw_examples"), root / "out"
    )


@pytest.mark.parametrize(
    "again",
    [
        conversation("Where is my lantern?", "On its way to you."),
        conversation("where is  my LANTERN?", "On its way\nto you.", "Be kind."),
        {"instruction": "Where is my lantern?", "input": "", "output": "On its way to you."},
    ],
)
def test_an_erased_record_is_refused_when_it_comes_back(root: Path, again: dict[str, Any]) -> None:
    other = (
        {"instruction": "Where is my kite?", "input": "", "output": "On its way."}
        if "output" in again
        else conversation("Kite?", "Here.")
    )
    assert read(root, other).failures == []
    failures = read(root, other, again).failures
    assert [(check.name, check.count, check.rows) for check in failures] == [
        ("erased_record", 1, ["data/sources/a.jsonl:1"])
    ]
    assert read(root, conversation("Where is my lantern?", "It was lost.")).failures == []


def test_an_erased_record_is_refused_as_a_side_of_a_pair(root: Path) -> None:
    jsonl(
        root / "data/sources/p.jsonl",
        {"prompt": "Where is my lantern?", "chosen": "On its way to you.", "rejected": "What?"},
    )
    params = parse(raw_preferences.Params, {"sources": [{"path": "data/sources/p.jsonl"}]}, "raw_preferences")
    assert [check.rows for check in raw_preferences.produce(root, params, root / "pairs").failures] == [
        ["data/sources/p.jsonl:0"]
    ]


def test_without_tombstones_every_record_passes_and_no_key_is_needed(root: Path) -> None:
    (root / erased.TOMBSTONES).unlink()
    (root / "data/keys/record_ids.key").unlink()
    checks = {
        check.name: check for check in read(root, conversation("Where is my lantern?", "On its way to you.")).checks
    }
    assert checks["erased_record"].passed and checks["erased_record"].blocking


def test_tombstones_with_another_key_or_damaged_are_refused(root: Path) -> None:
    (root / "data/keys/record_ids.key").write_text("60" * 32)
    with pytest.raises(InputError, match="another key"):
        read(root, conversation("a", "b"))
    (root / erased.TOMBSTONES).write_text("{}\n")
    with pytest.raises(InputError, match="line 1: not a tombstone"):
        read(root, conversation("a", "b"))


def test_a_tombstone_cannot_be_tested_without_the_key(root: Path) -> None:
    text = (root / erased.TOMBSTONES).read_text()
    plain = example_id(conversation("Where is my lantern?", "On its way to you.")["messages"])
    other = erased.record_mark(bytes.fromhex("60" * 32), plain)
    assert plain not in text and other not in text and "lantern" not in text


def test_the_index_forgets_a_record_and_nothing_else(tmp_path: Path) -> None:
    toy = Project(tmp_path)
    texts = [f"text number {i} of many" for i in range(700)]
    toy.commit(toy.lock([(text, "train", "data/sources/a.jsonl") for text in texts]))
    index = Index(tmp_path)
    index.read_records()
    gone = [identity(texts[i]) for i in (0, 1, 350, 699)]
    before = {text: len(index.record_uses([record_key(identity(text))])) for text in texts}
    assert index.forget(gone) == 4 * 4  # in a shard, in the evidence of the model, and its two texts
    path = tmp_path / ".dvc/tmp/pedigree/index.sqlite3"
    content = b"".join(file.read_bytes() for file in path.parent.glob("index.sqlite3*"))
    assert not any(record_key(one) in content or record_key(one)[:8] in content for one in gone)
    again = Index(tmp_path)
    again.read_records()
    assert {t: len(again.record_uses([record_key(identity(t))])) for t in texts} == {
        t: 0 if identity(t) in gone else n for t, n in before.items()
    }
    assert all(bool(again.records_with_text(f"All about {text}.")) != (identity(text) in gone) for text in texts)


def test_models_that_were_trained_on_a_record_are_retired_with_what_was_made_from_them(tmp_path: Path) -> None:
    toy = Project(tmp_path)
    source = "data/sources/a.jsonl"
    old = toy.lock([("secret", "train", source), ("common", "train", source)])
    tested = toy.lock([("secret", "test", source), ("common", "train", source)], seed=1)
    new = toy.lock([("common", "train", source), ("more", "train", source)])
    for lock in (old, tested, new):
        toy.commit(lock)
    index = Index(tmp_path)
    index.read_records()
    models, unknown, retired = models_of(index, Found(own_ids=[identity("secret")]))
    assert unknown == []
    md5 = {
        (name, when): lock[name]["outs"][0]["md5"]
        for when, lock in (("old", old), ("tested", tested), ("new", new))
        for name in lock
    }
    outcomes = {model["md5"]: model["outcome"] for model in models}
    assert outcomes == {
        md5[name, when]: outcome
        for when, outcome in (("old", "retire"), ("tested", "keep"))
        for name in ("adapter@lora", "merged@lora")
    }
    assert retired == {md5["adapter@lora", "old"], md5["merged@lora", "old"]}
    assert {model["outcome"] for model in models_of(index, Found(own_ids=[identity("more")]))[0]} == {"remake"}


def test_a_model_that_learned_from_a_row_that_stays_is_not_retired(tmp_path: Path) -> None:
    toy = Project(tmp_path)
    source = "data/sources/a.jsonl"
    texts = ["same", "same", "alone"]
    ledger = [
        {"source": source, "source_row": i, "example_id": identity(text), "outcome": READ, "why": ""}
        for i, text in enumerate(texts)
    ]
    records = [
        {"example_id": identity(text), "source": source, "messages": messages(text), "meta": "{}"} for text in texts
    ]
    raw = {"records-00000.parquet": table(records, record_schema()), "ledger.parquet": table(ledger, ledger_schema())}
    locks = [
        {"raw_examples": entry("raw_examples", {source: "1" * 32}, toy.put(raw)), **toy.lock(rows)}
        for rows in ([("same", "train", source)], [("alone", "train", source)], [("other", "train", source)])
    ]
    for lock in locks:
        toy.commit(lock)
    index = Index(tmp_path)
    index.read_records()
    retired = [
        models_of(index, Finder(index, bytes.fromhex(KEY)).find(Request(sources=(f"{source}:{row}",)), ()))[2]
        for row in range(len(texts))
    ]
    of_alone = {locks[1][name]["outs"][0]["md5"] for name in ("adapter@lora", "merged@lora")}
    assert retired == [set(), set(), of_alone]


def test_objects_that_the_workspace_or_other_outputs_need_stay() -> None:
    folders = {
        "old.dir": frozenset({"shard", "same", "ledger"}),
        "new.dir": frozenset({"shard2", "same"}),
        "model.dir": frozenset({"w", "tok"}),
        "other.dir": frozenset({"tok"}),
    }
    own = Own(frozenset({"old.dir", "single"}), frozenset({"shard", "same", "ledger"}), frozenset())
    gone = to_remove(folders, {"shard", "single"}, {"model.dir"}, {"new.dir", "shard2", "same"}, own)
    assert gone == {"old.dir", "shard", "ledger", "single", "model.dir", "w"}


def test_rows_of_an_event_log_go_and_no_page_of_the_file_keeps_them(tmp_path: Path) -> None:
    scanner = Scanner(needles_of([SECRET], [], []))
    path = tmp_path / "index.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE event_logs (id INTEGER PRIMARY KEY, event TEXT)")
        db.executemany(
            "INSERT INTO event_logs (event) VALUES (?)",
            [(json.dumps({"n": i, "t": SECRET * 200 if i % 50 == 7 else "fine"}),) for i in range(300)],
        )
        db.commit()
        db.execute("DELETE FROM event_logs WHERE id = 8")  # deleted before: its pages still have it
    db.close()
    event_log.clean(path, scanner, only_sure=True)
    assert scanner.file(path) == set() and b"Larkspur" not in path.read_bytes()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM event_logs").fetchone() == (294,)


def test_requests_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("record,containing\n,Zephyrine\n0123,\n")
    assert read_request(path).asked == [("record", "0123"), ("containing", "Zephyrine")]
    for text, message in (
        ("a,b\n1,2\n", "its columns are a, b"),
        ("record,source\nx,y\n", "line 2: 2 columns"),
        ("record\n", "no request"),
        ("containing\nZephyrine\nDoe, Jane\n", "line 3: more values than columns"),  # not all with "Doe"
        ("containing,containing\nAnna,Bert\n", "a column is named twice: containing, containing"),
        ('containing\n"Anna\nBert\n', "unexpected end of data"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_request(path)
    with pytest.raises(InputError, match=r"none\.csv: cannot be read: No such file or directory\n"):
        read_request(tmp_path / "none.csv")


def test_the_public_key_of_the_sample_project_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data/keys").mkdir(parents=True)
    (tmp_path / "data/keys/record_ids.key").write_bytes((ROOT / "data/keys/record_ids.key").read_bytes())
    with pytest.raises(InputError, match="the key of the sample project, which is public"):
        usable_key(tmp_path)


def test_a_removed_variant_whose_entry_dvc_keeps_is_retired_and_what_is_left_of_it_is_refused(tmp_path: Path) -> None:
    toy = Project(tmp_path)
    lock = toy.lock([("secret", "train", "data/sources/a.jsonl"), ("common", "train", "data/sources/a.jsonl")])
    toy.commit(lock)
    toy.write(lock)
    loops = {stage: {"foreach": "${adapter}", "do": {"cmd": "x"}} for stage in ("adapter", "merged")}
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {**{name: {"cmd": "x"} for name in lock}, **loops}}))
    removed = ["adapter@lora", "merged@lora"]
    for variants, outcome, exposed in (({"lora": {}}, "remake", removed), ({"other": {}}, "retire", [])):
        (tmp_path / "params.yaml").write_text(json.dumps({"adapter": variants}))
        index = Index(tmp_path)
        index.read_records()
        models, _, retired = models_of(index, Found(own_ids=[identity("secret")]))
        assert [(one["stage"], one["outcome"]) for one in models] == [(name, outcome) for name in removed]
        assert retired == {lock[name]["outs"][0]["md5"] for name in removed}
        assert found_in_models(tmp_path, [identity("secret")]) == {"yes": exposed, "unknown": []}
        assert [*plans.models_now(tmp_path)] == exposed
    declared = lock.keys() - {*removed}
    shutil.rmtree(tmp_path / "data/merged", ignore_errors=True)
    plans._refuse_left(tmp_path, lock.keys())
    (tmp_path / "data/adapter/lora").mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=r"data/adapter/lora: left by a stage .*\nhint: .*`rm -r data/adapter/lora`"):
        plans._refuse_left(tmp_path, declared)
    shutil.rmtree(tmp_path / "data/adapter")
    plans._refuse_left(tmp_path, declared)


def test_of_a_model_that_nobody_can_decide_the_certificate_says_so(tmp_path: Path) -> None:
    toy = Project(tmp_path)
    source = "data/sources/a.jsonl"
    lock = toy.lock([("secret", "train", source), ("common", "train", source)])
    toy.commit(lock)
    toy.write(lock)
    assert found_in_models(tmp_path, [identity("secret")]) == {"yes": ["adapter@lora", "merged@lora"], "unknown": []}
    assert found_in_models(tmp_path, [identity("other")]) == {"yes": [], "unknown": []}
    for stage in ("splits", "adapter@lora"):
        out = toy.object(lock[stage]["outs"][0]["md5"])
        for file in json.loads(out.read_bytes()):
            toy.object(file["md5"]).unlink(missing_ok=True)
        out.unlink()
    shutil.rmtree(tmp_path / ".dvc/tmp")
    found = found_in_models(tmp_path, [identity("secret")])
    assert found == {"yes": [], "unknown": ["adapter@lora", "merged@lora"]}
    document = certificate({**PLAN, "seen by": found})
    assert document["impact"] == "cannot tell: adapter@lora, merged@lora" and exit_code(document) == 2


def test_nobody_is_sent_to_fetch_or_make_again_what_an_erasure_deleted(tmp_path: Path) -> None:
    toy = Project(tmp_path)
    source = "data/sources/a.jsonl"
    gone, other, now = (toy.lock([(text, "train", source)]) for text in ("secret", "common", "present"))
    for lock in (gone, other, now):
        toy.commit(lock)
    toy.collect_garbage(now)
    names = ("adapter@lora", "merged@lora")
    models = [{"stage": name, "md5": out(gone, name), "outcome": plans.RETIRE} for name in names]
    write(tmp_path, certificate({**PLAN, "models": models, "date": "2026-01-02"}), None, "0a")
    (tmp_path / "data/erasures/damaged.json").write_text("{")
    (tmp_path / "data/erasures/0b.dsse.json").write_text('{"payload": ""}')
    answer = impact(tmp_path, containing="anything")
    hints = {one["md5"]: one["fetch"] for one in answer["unknown"]}
    assert answer["verdict"] == "cannot tell" and len(hints) == 4
    nothing = "nothing, because the erasure of 2026-01-02 (data/erasures/0a.json) deleted the data"
    for name in names:
        assert hints[out(gone, name)] == nothing and "`dvc pull splits" in hints[out(other, name)]
    assert f"missing: data/splits, data/adapter/lora; fetch: {nothing}" in impact_text(answer)


def test_a_model_that_has_the_bytes_of_an_earlier_run_which_was_tested_on_the_record_did_not_see_it_now(
    tmp_path: Path,
) -> None:
    toy = Project(tmp_path)
    source = "data/sources/a.jsonl"
    tested = toy.lock([("secret", "test", source), ("common", "train", source)])
    toy.commit(tested)
    lock = toy.lock([("common", "train", source)])
    lock["adapter@lora"]["outs"] = tested["adapter@lora"]["outs"]
    lock["merged@lora"]["outs"] = tested["merged@lora"]["outs"]
    lock["merged@lora"]["deps"] = tested["merged@lora"]["deps"]
    toy.write(tested)
    assert found_in_models(tmp_path, [identity("secret")]) == {"yes": ["adapter@lora", "merged@lora"], "unknown": []}
    toy.write(lock)
    assert found_in_models(tmp_path, [identity("secret")]) == {"yes": [], "unknown": []}


PLAN: dict[str, Any] = {
    "date": "2026-01-01",
    "reason": "request 7",
    "key": "k",
    "asked": [],
    "records": 1,
    "made": 0,
    "sources": {},
    "relatives": {},
    "tombstones": [],
    "places": {},
    "files": [],
    "dagster": [],
    "models": [],
    "unknown": [],
    "after": {},
    "left": {},
    "remotes elsewhere": [],
    "shared cache": False,
    "blobs": ["0" * 40],
    "needles": {"unsearchable": 0},
    "searched": {"weights": 0, "unreadable": [], "unsearched": {}, "git objects": 1},
    "removed": {"objects": [], "runs": [], "remotes": {}},
    "seen by": {"yes": [], "unknown": []},
    "event log elsewhere": False,
    "losses before": {},
    "losses after": {},
}


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({}, 0),
        ({"left": {"git history": {"blobs": ["0"]}}}, 0),
        ({"left": {"outputs": {"files": 1, "bytes": 1}}}, 1),
        ({"seen by": {"yes": ["a"], "unknown": ["b"]}}, 1),
        ({"verify": {"a": "different"}}, 1),
        ({"seen by": {"yes": [], "unknown": ["b"]}}, 2),
    ],
)
def test_exit_codes(facts: dict[str, Any], code: int) -> None:
    assert exit_code(certificate({**PLAN, **facts})) == code


@pytest.mark.parametrize("name", ["exports", "papers"])
def test_the_certificate_counts_exports_also_in_the_plan_of_an_earlier_version(name: str) -> None:
    assert certificate({**PLAN, name: ["a", "b"]})["removed"]["exports in data/release, as a whole"] == 2


def test_hashes_of_git_blobs_stay_outside_what_git_tracks(tmp_path: Path) -> None:
    paths = write(tmp_path, certificate(PLAN), None, "0a")
    listed = [
        path.relative_to(tmp_path).as_posix()
        for path in tmp_path.rglob("*")
        if path.is_file() and "0" * 40 in path.read_text()
    ]
    assert listed == [paths["blobs of git history"]] and listed[0].startswith(".dvc/tmp/")


def test_a_second_erasure_of_the_same_request_on_one_day_keeps_the_first_certificate(tmp_path: Path) -> None:
    names = []
    for rows in (1, 2, 3):
        document = certificate({**PLAN, "records": rows})
        names.append(free_name(tmp_path, document))
        write(tmp_path, document, None, names[-1])
    assert names == [names[0], f"{names[0]}-2", f"{names[0]}-3"]
    kept = [json.loads((tmp_path / f"data/erasures/{name}.json").read_bytes()) for name in names]
    assert [one["erased"]["records"] for one in kept] == [1, 2, 3]


def test_files_that_are_left_are_named_to_the_user_and_only_counted_in_the_certificate() -> None:
    left = {"other files": {"files": 1, "bytes": 1, "paths": ["notes/okonkwo.md"]}, "git history": {"blobs": ["0"]}}
    document = certificate({**PLAN, "left": left})
    assert "okonkwo" not in certificate_text(document) + json.dumps(document)
    assert "\nLeft:\n  git history: 1 blob\n  other files: 1 file, 1 byte\n" in certificate_text(document)
    shown = as_text({**document, "files": {}, "left files": {"other files": ["notes/okonkwo.md"]}})
    assert shown.endswith("\nleft in other files: notes/okonkwo.md")


def test_attestations_that_state_hashes_of_a_source_before_are_removed_with_their_signatures(tmp_path: Path) -> None:
    key = PrivateKey(ed25519.Ed25519PrivateKey.generate())
    digests = {"md5": "0" * 32, "sha256": "1" * 64}
    for name, read in (
        ("adapter/lora", "data/sources/a.jsonl"),
        ("adapter/other", "data/sources/ab.jsonl"),
        ("base_model", "data/sources"),
    ):
        record = provenance.StageRecord(
            "raw_examples", {"cmd": "x", "deps": [{"path": read}], "outs": []}, "", {}, {read: digests}, {}
        )
        statement = provenance.statement(record)
        folder = tmp_path / "data/signatures" / name
        folder.mkdir(parents=True)
        (folder / ATTESTATIONS).write_text(provenance.lines([statement], key))
        for other in (SIGNATURE, PUBLIC_KEY, "mine.txt"):
            (folder / other).write_text("x")
    (tmp_path / "data/signatures/damaged").mkdir()
    (tmp_path / "data/signatures/damaged" / ATTESTATIONS).write_bytes(b"\xff\n[]\n")
    named = [
        folder.relative_to(tmp_path).as_posix()
        for folder in folders_naming(tmp_path, ["data/sources/a.jsonl", "data/sources/c.jsonl"])
    ]
    assert named == ["data/signatures/adapter/lora"] and folders_naming(tmp_path, []) == []
    plan = {**PLAN, "needles": {"texts": [], "groups": [], "ids": [], "unsearchable": 0}, "signatures": named}
    Erasure(tmp_path, plan, lambda root: None).files()
    left = {
        path.relative_to(tmp_path / "data/signatures").as_posix()
        for path in tmp_path.rglob("data/signatures/**/*")
        if path.is_file()
    }
    files = {
        f"{name}/{file}"
        for name in ("adapter/other", "base_model")
        for file in (ATTESTATIONS, SIGNATURE, PUBLIC_KEY, "mine.txt")
    }
    assert left == {*files, "adapter/lora/mine.txt", f"damaged/{ATTESTATIONS}"}
    assert certificate(plan)["removed"]["folders of signatures"] == 1


@pytest.mark.parametrize(
    ("settings", "elsewhere"),
    [(None, False), ("telemetry: {enabled: false}", False), ("storage: {postgres: {}}", True), ("a: [", True)],
)
def test_an_event_log_elsewhere_is_named_as_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str | None, elsewhere: bool
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    if settings is not None:
        (tmp_path / "dagster.yaml").write_text(settings)
    found = plans._has_event_log_elsewhere(tmp_path)
    assert found == elsewhere
    assert (EVENT_LOG_ELSEWHERE in certificate({**PLAN, "event log elsewhere": found})["not reached"]) == elsewhere


def test_models_in_what_cannot_be_read_are_named_as_not_reached() -> None:
    lost = ["the pipeline of other/dvc.lock", "0" * 40]
    assert [
        f"models in what cannot be read: {', '.join(lost)}" in certificate({**PLAN, "unreadable": one})["not reached"]
        for one in (lost, [])
    ] == [True, False]


def test_a_source_that_was_changed_after_its_rows_were_read_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data/sources/more"
    folder.mkdir(parents=True)
    for path in (jsonl(tmp_path / "data/sources/a.jsonl", *rows(3)), jsonl(folder / "b.jsonl", *rows(3))):
        name = path.relative_to(tmp_path).as_posix()
        digest = sha256_of_file(path)
        facts = (
            {"data/sources/a.jsonl": {"sha256": digest}}
            if path.parent.name == "sources"
            else {"data/sources/more": {"files": {"b.jsonl": {"sha256": digest}}}}
        )
        (tmp_path / "data/reports").mkdir(exist_ok=True)
        (tmp_path / "data/reports/raw_examples.json").write_text(json.dumps({"sources": facts}))
        read = plans._hashes_when_read(tmp_path)
        assert plans._change(tmp_path, name, [1], False, read)["before"] == digest
        jsonl(path, {"text": "a row before all others"}, *rows(3))
        with pytest.raises(InputError, match="was changed after its rows were read"):
            plans._change(tmp_path, name, [1], False, read)


def test_a_source_that_is_a_link_to_the_cache_can_be_cut_and_another_link_cannot(tmp_path: Path) -> None:
    (tmp_path / ".dvc/cache/files/md5/ab").mkdir(parents=True)
    (tmp_path / "data/sources").mkdir(parents=True)
    stored = jsonl(tmp_path / ".dvc/cache/files/md5/ab/cdef", *rows(3))
    other = jsonl(tmp_path / "data/other.jsonl", *rows(3))
    for target in (stored, other):
        link = tmp_path / f"data/sources/{target.stem}.jsonl"
        link.symlink_to(target)
        read = {f"data/sources/{link.name}": sha256_of_file(target)}
        if target == stored:
            assert plans._change(tmp_path, f"data/sources/{link.name}", [1], False, read)["rows"] == [1]
        else:
            with pytest.raises(InputError, match="not a file in data/sources"):
                plans._change(tmp_path, f"data/sources/{link.name}", [1], False, read)


def test_preferences_that_were_never_read_are_refused(tmp_path: Path) -> None:
    fresh = {"recorded": False, "address": "raw_preferences"}
    never = StageState(**{**dict.fromkeys(StageState.__dataclass_fields__), **fresh})
    (tmp_path / "params.yaml").write_text("raw_preferences: {sources: []}")
    plans._refuse_outdated(tmp_path, {"raw_preferences": never})
    (tmp_path / "params.yaml").write_text("raw_preferences: {sources: [{path: data/sources/p.jsonl}]}")
    with pytest.raises(InputError, match=r"raw_preferences is not up to date .never run."):
        plans._refuse_outdated(tmp_path, {"raw_preferences": never})


def test_a_variant_that_was_added_and_never_ran_is_made_where_a_stage_that_ran_reads_it() -> None:
    def state(recorded: bool, *producers: str) -> StageState:
        given = {"recorded": recorded, "inputs": tuple(Input(one, one, "", None) for one in producers)}
        return StageState(**{**dict.fromkeys(StageState.__dataclass_fields__), **given})

    states = {
        "splits": state(True),
        "a": state(True, "splits"),
        "new": state(False, "splits"),
        "unread": state(False, "splits"),
    }
    assert plans._to_make_again({**states, "comparison": state(True, "a", "new")}) == [
        "splits",
        "a",
        "new",
        "comparison",
    ]


def test_an_erasure_that_goes_on_makes_what_its_stages_read_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan is older than a variant that was added, and than one that was taken out."""

    def state(*producers: str) -> StageState:
        given = {"recorded": False, "inputs": tuple(Input(one, one, "", None) for one in producers)}
        return StageState(**{**dict.fromkeys(StageState.__dataclass_fields__), **given})

    states = {"splits": state(), "new": state("splits"), "unread": state("splits"), "comparison": state("new")}
    made: list[str] = []

    def run_all(*given: Any, only: list[str]) -> dict[str, Any]:
        made.extend(only)
        return {"interrupted": False, "passed": True}

    monkeypatch.setattr(steps.dvc, "read_stages", lambda root: states)
    monkeypatch.setattr(steps, "run_all", run_all)
    needles = {"texts": [], "groups": [], "ids": [], "unsearchable": 0}
    plan = {"needles": needles, "stages": ["splits", "gone", "comparison"]}
    Erasure(tmp_path, plan, lambda root: None).pipeline()
    assert made == ["splits", "new", "comparison"]


def test_an_erasure_is_refused_where_a_stage_is_frozen(tmp_path: Path) -> None:
    frozen = StageState(
        **{**dict.fromkeys(StageState.__dataclass_fields__), "address": "splits", "recorded": True, "frozen": True}
    )
    with pytest.raises(InputError, match=r"splits: frozen in dvc.yaml, so DVC would not make it again"):
        plans._refuse_outdated(tmp_path, {"splits": frozen})


def test_a_raw_data_set_that_dvc_reads_each_time_can_be_erased_from_while_it_is_as_recorded(tmp_path: Path) -> None:
    """With `always_changed`, e.g. for a source at an address, DVC would never call it up to date."""
    (tmp_path / "params.yaml").write_text("raw_examples: {}\n")
    recorded = {
        "address": "raw_examples",
        "recorded": True,
        "inputs": (),
        "definition_changes": (),
        "output_problem": ALWAYS,
    }
    raw = StageState(**{**dict.fromkeys(StageState.__dataclass_fields__), **recorded})
    plans._refuse_outdated(tmp_path, {"raw_examples": raw})
    edited = dataclasses.replace(raw, inputs=(Input(None, "data/sources/mine.jsonl", "now", "before"),))
    with pytest.raises(InputError, match=r"raw_examples is not up to date \(data/sources/mine.jsonl changed\)"):
        plans._refuse_outdated(tmp_path, {"raw_examples": edited})


@pytest.mark.parametrize(
    "reason",
    [
        "zephyrine  OKONKWO asked",
        "she said: Where is my lantern?",
        "0123456789ABCDEF0123456789abcdef",
        "of a5" + "a" * 30,
    ],
)
def test_a_reason_that_repeats_the_text_is_refused(reason: str) -> None:
    raw = Raw(
        "raw_examples",
        "a",
        (0,),
        {"example_id": "0123456789abcdef" * 2, **conversation("Where is my lantern?", "ok")},
        True,
    )
    found = Found(meant=[raw], made=["a5" + "a" * 30])
    plans._refuse_reason("request 7: ok", Request(containing=("Zephyrine Okonkwo",)), found)
    with pytest.raises(InputError, match="--reason: it repeats"):
        plans._refuse_reason(reason, Request(containing=("Zephyrine Okonkwo",)), found)


@pytest.mark.parametrize("options", [["--also", "near"], ["--not", "copies"], ["--reason", "x"]])
def test_options_of_the_plan_are_refused_with_resume(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["erase", "--resume", *options, "--project", str(ROOT)]) == 2
    assert "--resume cannot be combined with --also, --not and --reason" in capsys.readouterr().err


def test_one_erasure_at_a_time_and_stages_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Project(tmp_path)
    monkeypatch.setattr("sys.argv", ["pedigree", "erase", "--containing", SECRET])

    def refuse(holder: str) -> None:
        raise Busy(holder, "")

    with one_erasure(toy.root), no_stage_runs(toy.root, ["adapter@lora"], waits=False):
        for name in (LOCK, "adapter@lora"):
            with pytest.raises(Busy, match=r"process \d+ .pedigree erase."), locks.hold(toy.root, name, refuse):
                pass
        with pytest.raises(Busy, match="another erasure"), one_erasure(toy.root):
            pass
        assert not any("Larkspur" in path.read_text() for path in (toy.root / locks.LOCKS).iterdir())
    with (
        locks.hold(toy.root, "adapter@lora", refuse),
        pytest.raises(Busy, match="adapter@lora is being run"),
        no_stage_runs(toy.root, ["merged@lora", "adapter@lora"], waits=False),
    ):
        pass
    with one_erasure(toy.root), no_stage_runs(toy.root, ["adapter@lora"], waits=False):
        pass


def test_what_dvc_notes_about_the_process_does_not_repeat_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["pedigree", "erase", "--containing", "Larkspur"])
    for arguments in (
        ["git", "init", "-q"],
        ["dvc", "init", "-q"],
        ["dvc", "stage", "add", "-n", "copy", "-O", "seen", "cp .dvc/tmp/rwlock seen"],
    ):
        assert run(arguments, tmp_path).returncode == 0
    with one_erasure(tmp_path):
        process = multiprocessing.get_context("forkserver").Process(
            target=reproduce, args=(tmp_path, "copy", False, {}, print)
        )
        process.start()  # as `run_all` starts stages
        process.join()
    [owner] = json.loads((tmp_path / "seen").read_bytes())["write"].values()
    assert owner == {"pid": process.pid, "cmd": "pedigree erase"}
    assert sys.argv[-1] == "Larkspur"


def test_ids_that_a_row_that_stays_has_too_are_not_those_of_the_erased_record(tmp_path: Path) -> None:
    toy = Project(tmp_path)
    texts = ["same", "same", "raw  one", "raw one", "alone"]  # rows 2 and 3 are repaired to "fixed", row 4 to "better"
    repaired = {2: "fixed", 3: "fixed", 4: "better"}
    ledger = [
        {"source": "data/sources/a.jsonl", "source_row": i, "example_id": identity(text), "outcome": READ, "why": ""}
        for i, text in enumerate(texts)
    ]
    records = [
        {"example_id": identity(text), "source": "data/sources/a.jsonl", "messages": messages(text), "meta": "{}"}
        for text in texts
    ]
    raw = {"records-00000.parquet": table(records, record_schema()), "ledger.parquet": table(ledger, ledger_schema())}
    changed = [
        {
            **line,
            "outcome": "kept",
            "source_id": identity(texts[i]) if i in repaired else None,
            "example_id": identity(repaired.get(i, text)),
        }
        for i, (line, text) in enumerate(zip(ledger, texts, strict=True))
    ]
    fixed = [{**records[i], "example_id": identity(text), "messages": messages(text)} for i, text in repaired.items()]
    made = {
        "records-00000.parquet": table(fixed, record_schema()),
        "ledger.parquet": table(changed, ledger_schema(repaired=True)),
    }
    lock = {"raw_examples": entry("raw_examples", {"data/sources": "1" * 32 + ".dir"}, toy.put(raw))}
    lock["instructions"] = entry(
        "instructions", {"data/raw_examples": lock["raw_examples"]["outs"][0]["md5"]}, toy.put(made)
    )
    toy.commit(lock)
    index = Index(tmp_path)
    index.read_records()
    for row, ids, children in ((0, [], []), (2, ["raw  one"], []), (4, ["alone", "better"], ["better"])):
        found_by = Finder(index, bytes.fromhex(KEY))
        found = found_by.find(Request(sources=(f"data/sources/a.jsonl:{row}",)), [])
        assert found.own_ids == [*map(identity, ids)] == [*found.needles.ids], row
        assert found.made == [*map(identity, children)], row
        (tmp_path / erased.TOMBSTONES).unlink(missing_ok=True)
        tombstones.add(tmp_path, found.tombstones, {"key": found_by.key_id, "date": "2026-01-01"})
        days = [
            erased.erased_on(tmp_path, [bytes.fromhex(KEY)], identity(text))
            for text in ("same", "fixed", "alone", "better")
        ]
        assert days == [
            None,
            None,
            *(["2026-01-01"] * 2 if children else [None] * 2),
        ], "its repaired form has the day, too"
    for path in (
        "./data/sources/a.jsonl",
        "data//sources/../sources/a.jsonl",
        f"{tmp_path}/data/sources/a.jsonl",
    ):  # as `impact --source` reads it
        assert Finder(index, bytes.fromhex(KEY)).find(Request(sources=(f"{path}:4",)), []).own_ids == [
            *map(identity, ("alone", "better"))
        ]
    with pytest.raises(InputError, match="no record found"):
        Finder(index, bytes.fromhex(KEY)).find(Request(sources=("data/sources/a.jsonl:²",)), [])


@pytest.mark.parametrize("capitals", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_text_is_found_in_json_that_is_a_text_in_json(depth: int, capitals: bool) -> None:
    """As the arguments of tool calls are written, and rows in logs: each time all escapes are escaped again."""
    text = "Поставщик Виссарион просит заменить фарфоровый самовар 🦊 до пятницы"
    scanner, content = Scanner(needles_of([text], [], [])), text
    for _ in range(depth):
        content = json.dumps({"text": content})
    if capitals:
        content = re.sub("u[0-9a-f]{4}", lambda found: f"u{found[0][1:].upper()}", content)
    assert scanner.content(content.encode()) == {"text", "sure"}


@pytest.mark.parametrize("mark, escape", [("/", r"\/"), ("=", r"\u003d"), ("+", r"\u002b"), ("\u2028", r"\u2028")])
@pytest.mark.parametrize("letter", ["e", "\u00e9"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_text_is_found_in_json_of_programs_that_escape_more(mark: str, escape: str, letter: str, depth: int) -> None:
    """As PHP, Gson, .NET and Go write it; with other letters as they are, and escaped."""
    text = mark.join(["Zephyrine", f"Okonkwo{letter}", "wants", "her", f"lant{letter}rn", "of", "cobalt", "back"])
    scanner = Scanner(needles_of([text], [], []))
    for ascii_only in (False, True):
        content = json.dumps(text, ensure_ascii=ascii_only).replace(mark, escape)
        for _ in range(depth - 1):
            content = json.dumps({"text": content}, ensure_ascii=False)
        upper = re.sub(r"u[0-9a-f]{4}", lambda found: "u" + found[0][1:].upper(), content)
        assert all(map(scanner.content, (content.encode(), upper.encode()))), content


def test_a_text_with_capital_letters_in_its_escapes_is_found() -> None:
    """As System.Text.Json of .NET writes JSON."""
    text = "Потерян кобальтовый фонарь 🏮 без фитиля"
    lower = json.dumps(text)
    upper = re.sub(r"\\u[0-9a-f]{4}", lambda found: "\\u" + found[0][2:].upper(), lower)
    assert (
        lower != upper
        and [*map(Scanner(needles_of([text], [], [])).content, (lower.encode(), upper.encode()))]
        == [{"text", "sure"}] * 2
    )


def review_file(root: Path, *names: str) -> None:
    path = root / "data/sources/review/instructions.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "example_id,check,decision,reason\n" + "".join(f"{name},secrets,accept,a sample\n" for name in names)
    )


def test_a_decision_of_a_reviewer_about_a_row_by_its_number_does_not_become_one_about_another_row(
    tmp_path: Path,
) -> None:
    (tmp_path / "params.yaml").write_text("{}")
    review_file(tmp_path, "data/sources/a.jsonl:1", "0123456789ab", "data/sources/b.jsonl:9", "data/sources/a.jsonl:4")
    plans._refuse_shifted_names(tmp_path, {"data/sources/a.jsonl": {5}}, {})
    plans._refuse_shifted_names(
        tmp_path, {"data/sources/a.jsonl": {4}}, {"data/sources/review/instructions.csv": {3}}
    )  # this line goes
    with pytest.raises(InputError, match=r"review/instructions.csv: data/sources/a.jsonl:4 is the number of a row"):
        plans._refuse_shifted_names(tmp_path, {"data/sources/a.jsonl": {2}}, {})


@pytest.mark.parametrize("waiver", [{"rows": ["0123456789"]}, {"pairs": [["data/sources/b.jsonl:1", "0" * 8]]}])
def test_a_waiver_that_names_a_record_by_the_beginning_of_its_id_is_refused(
    waiver: dict[str, list[object]], tmp_path: Path
) -> None:
    given = {"check": "secrets", "reason": "a sample", "expires": "2999-01-01", **waiver}
    (tmp_path / "params.yaml").write_text(json.dumps({"instructions": {"waivers": [given]}}))
    plans._refuse_waived(tmp_path, ["f" * 32])
    with pytest.raises(InputError, match=r"params.yaml: instructions.waivers: 0[0-9]+ is the id of a record to erase"):
        plans._refuse_waived(tmp_path, ["0123456789abcdef" * 2, "0" * 32])


def test_lines_of_a_review_file_name_a_record_in_all_ways_of_reviewers(tmp_path: Path) -> None:
    toy = Project(tmp_path)
    raw = Raw(
        "raw_examples",
        "data/sources/a.jsonl",
        (7,),
        {"example_id": identity("lantern"), "messages": messages("lantern")},
        True,
    )
    names = [
        identity("lantern"),
        identity("lantern")[:8],
        "data/sources/a.jsonl:7",
        identity("wick"),
        identity("wick")[:8],
        "data/sources/a.jsonl:8",
        "",
    ]
    review_file(tmp_path, *names)
    found = Finder(Index(toy.root), bytes.fromhex(KEY))._notes(Found(meant=[raw]), "data/sources/review")
    assert found == {"data/sources/review/instructions.csv": {0, 1, 2}}


def test_paraphrases_name_the_prompt_of_a_record_by_all_of_its_turns_and_as_it_was_repaired(tmp_path: Path) -> None:
    toy = Project(tmp_path)
    turns = [
        {"role": "user", "content": "Where is my kite?"},
        {"role": "assistant", "content": "Which?"},
        {"role": "user", "content": "The red."},
    ]
    record = {"messages": [*turns, {"role": "assistant", "content": "In hall 3."}]}
    raw = Raw("raw_examples", "data/sources/a.jsonl", (7,), {"example_id": identity("c@ts"), **record}, True)
    lock = toy.splits([("cats", "train", "data/sources/a.jsonl")])
    line = {
        "source": "data/sources/a.jsonl",
        "source_row": 7,
        "example_id": identity("cats"),
        "outcome": "kept",
        "why": "",
        "source_id": identity("c@ts"),
    }
    made = toy.put({"ledger.parquet": table([line], ledger_schema(repaired=True))})
    toy.commit({"instructions": entry("instructions", {"data/raw_examples": "1" * 32}, made), **lock})
    prompts = ["Where is my kite?\nThe red.", "The red.", "What of cats?", "What of dogs?", ""]
    jsonl(tmp_path / "data/sources/paraphrases/p.jsonl", *({"prompt": prompt, "paraphrase": "x"} for prompt in prompts))
    index = Index(tmp_path)
    index.read_records()
    found = Finder(index, bytes.fromhex(KEY))._notes(Found(meant=[raw]), "data/sources/paraphrases")
    assert found == {"data/sources/paraphrases/p.jsonl": {0, 1, 2}}


def test_a_text_that_a_paraphrase_brought_into_records_is_found_and_the_row_of_the_source_stays(tmp_path: Path) -> None:
    toy, source = Project(tmp_path), "data/sources/a.jsonl"
    line = {"source": source, "source_row": 0, "example_id": identity("cats"), "outcome": READ, "why": ""}
    record = {"example_id": identity("cats"), "source": source, "messages": messages("cats"), "meta": "{}"}
    raw = toy.put(
        {"records-00000.parquet": table([record], record_schema()), "ledger.parquet": table([line], ledger_schema())}
    )
    curated = toy.curated([("cats", "train", source)], paraphrases={"cats": "Zephyrine Okonkwo"})
    lock = {"raw_examples": entry("raw_examples", {"data/sources": "1" * 32 + ".dir"}, raw), **curated}
    lock = toy.trained(lock, ["cats", "Zephyrine Okonkwo"])
    toy.commit(lock)
    jsonl(tmp_path / "data/sources/paraphrases/p.jsonl", {"prompt": "What of dogs?", "paraphrase": "And of dogs?"},
          {"prompt": "What of cats?", "paraphrase": "What of Zephyrine Okonkwo?"})  # fmt: skip
    index = Index(tmp_path)
    index.read_records()
    finder = Finder(index, bytes.fromhex(KEY))
    found = finder.find(Request(containing=("okonkwo",)), ("paraphrases", "review"))
    assert (found.rows, found.notes, found.made) == (
        {},
        {"data/sources/paraphrases/p.jsonl": {1}},
        [identity("Zephyrine Okonkwo")],
    )
    assert found.asked[0]["records"] == 1 and "Okonkwo" in "".join(found.needles.texts)
    models, unknown, _ = models_of(index, found)
    assert ([model["stage"] for model in models], unknown) == (["adapter@lora", "merged@lora"], [])
    both = finder.find(Request(sources=(f"{source}:0",)), ("paraphrases", "review"))
    assert both.rows == {source: {0}} and both.notes == {"data/sources/paraphrases/p.jsonl": {1}}
    with pytest.raises(InputError, match="no record found"):
        finder.find(Request(containing=("Larkspur",)), ())


def test_with_another_key_than_that_of_the_tombstones_nothing_is_begun(root: Path) -> None:
    (root / "data/keys/record_ids.key").write_text("60" * 32)
    with pytest.raises(InputError, match=r"line 1: made with another key"):
        plans.make(root, Request(records=(identity("lantern"),)), [], "")


def test_a_reason_that_is_not_utf_8_is_one_message() -> None:
    with pytest.raises(InputError, match="--reason: it has bytes that are not UTF-8"):
        plans._refuse_reason("\udcff", Request(), Found())


def test_hashes_of_files_that_are_no_longer_there_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / KNOWN_HASHES).parent.mkdir(parents=True)
    (tmp_path / KNOWN_HASHES).write_text(
        json.dumps({str(tmp_path / "data/raw_examples/records-00001.parquet"): [1, 2, 3, "0" * 64]})
    )
    Erasure(
        tmp_path, {**PLAN, "needles": {"texts": [], "groups": [], "ids": [], "unsearchable": 0}}, lambda root: None
    ).files()
    assert not (tmp_path / KNOWN_HASHES).exists()
