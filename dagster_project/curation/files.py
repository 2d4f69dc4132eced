"""Bytes -> rows. One reader per file type; a row that cannot be read keeps its place and says why, with the line it stands on."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from dagster_project.errors import InputError

MEGABYTE = 2**20
MAX_ROW_BYTES = 16 * MEGABYTE
"""Longest line, paragraph or CSV field. A longer one is never held in memory."""
MAX_DEPTH = 200
"""Deepest nesting of lists and objects in a row, well below where Python's own recursion ends."""
MAX_GZIP_RATIO = 200
"""Decompressed over compressed bytes, looked at once more than `GZIP_FREE_BYTES` came out. JSON of text stays below 30."""
GZIP_FREE_BYTES = 64 * MEGABYTE


@dataclass(frozen=True)
class Row:
    """One row of a source file, parsed or not."""

    source_row: int
    """0-based: the element of a list or table, the line of a JSONL file (blank lines are not rows), the paragraph of a text."""
    value: dict[str, Any] | None
    problem: str = ""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, or of all files of the known types in a folder, sorted by relative path and numbered through.

    A broken row is a row with a problem, not an end:
    {"prompt": "Hi"}⏎{"prompt": "H  ->  Row(0, {"prompt": "Hi"}), Row(1, None, "line is not JSON: ... (line 2)")

    Raises:
        InputError: another file type, an empty file, a file that cannot be told into rows, or one in which nothing is JSON.
    """
    if path.is_dir():
        return _folder(path)
    suffix = _suffix(path)
    if suffix not in READERS:
        raise InputError(f"{path.name}: unknown file type {suffix or '(none)'}", f"use {', '.join(READERS)}")
    rows = READERS[suffix](path) if path.stat().st_size else []
    if not rows:
        raise InputError(f"{path.name}: the file is empty", "put at least one example in it, or take it out of params.yaml")
    return rows


def _suffix(path: Path) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _folder(folder: Path) -> list[Row]:
    rows: list[Row] = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        for row in read_rows(path):
            rows.append(replace(row, source_row=len(rows), problem=row.problem and f"{name}: {row.problem}"))
    if not rows:
        raise InputError(f"{folder.name}: no file of examples in the folder", f"file types: {', '.join(READERS)}")
    return rows


def _files(folder: Path) -> list[Path]:
    """Links are looked at before anything is read: one that leads out could bring in any file of the machine."""
    found = []
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in [*folders, *names]):
            if path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(folder.resolve())):
                raise InputError(
                    f"{path.relative_to(folder.parent)}: a link that leads out of its folder or nowhere", "copy the file there instead"
                )
        found += [path for path in (Path(place, name) for name in names) if _suffix(path) in READERS]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _pieces(path: Path) -> Iterator[bytes]:
    """The content, decompressed: each line, or what fits in `MAX_ROW_BYTES` of it and then the rest in such pieces."""
    out, most = 0, max(GZIP_FREE_BYTES, MAX_GZIP_RATIO * path.stat().st_size)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            while piece := stream.readline(MAX_ROW_BYTES + 1):
                out += len(piece)
                if path.suffix == ".gz" and out > most:
                    raise InputError(
                        f"{path.name}: decompresses to more than {MAX_GZIP_RATIO} times its size", "decompress it yourself if you trust it"
                    )
                yield piece
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path.name}: broken gzip file: {error}", "compress it again") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number, from 1; None for one that is too long. A byte order mark is not part of the first."""
    number, inside = 0, False
    for piece in _pieces(path):
        if not inside:
            number += 1
            line = piece.removeprefix(codecs.BOM_UTF8) if number == 1 else piece
            yield number, line if len(piece) <= MAX_ROW_BYTES else None
        inside = not piece.endswith(b"\n")


def _text_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Each line's number, its text, and what is wrong with it."""
    for number, line in _lines(path):
        try:
            yield (number, line.decode(), "") if line is not None else (number, "", f"longer than {MAX_ROW_BYTES} bytes (line {number})")
        except UnicodeDecodeError as error:
            yield number, "", f"not UTF-8 at byte {error.start} (line {number})"


def _jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line, problem in _text_lines(path):
        if problem:
            rows.append(Row(len(rows), None, problem))
        elif line.strip():
            rows.append(_line(len(rows), line, number))
    if rows and all(row.value is None for row in rows):
        raise InputError(f"{path.name}: not JSON: {rows[0].problem}", "each line must be one JSON object")
    return rows


def _line(source_row: int, line: str, number: int) -> Row:
    try:
        row = _row(source_row, STRICT.decode(line.rstrip("\r\n")), line)
    except json.JSONDecodeError as error:
        row = Row(source_row, None, f"line is not JSON: {error.msg}: column {error.colno}")
    except ValueError as error:
        row = Row(source_row, None, str(error))
    except RecursionError:
        row = Row(source_row, None, TOO_DEEP)
    return replace(row, problem=f"{row.problem} (line {number})") if row.problem else row


def _json(path: Path) -> list[Row]:
    content = b"".join(_pieces(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 at byte {error.start}", "save the file as UTF-8") from None
    if not text.strip():
        return []
    try:
        if not text.lstrip().startswith("["):
            json.loads(text)
            raise InputError(f"{path.name}: a .json file must hold a list of rows", "wrap the rows in [ ]")
        rows = list(_elements(text.rstrip(" \t\r\n")))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name}: not JSON: {error}", "mend the file; one object a line is .jsonl") from None
    if not rows:
        raise InputError(f"{path.name}: the list is empty", "put at least one example in it")
    return rows


def _elements(text: str) -> Iterator[Row]:
    """The elements of a JSON list one by one, so that what JSON forbids or leaves open in one of them spoils no other."""

    def skip(at: int) -> int:
        while text[at : at + 1] in {" ", "\t", "\r", "\n"}:
            at += 1
        return at

    at, number = skip(text.index("[") + 1), 0
    while number or text[at : at + 1] != "]":
        try:
            value, end = STRICT.raw_decode(text, at)
            row = _row(number, value, text[at:end])
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            _, end = LENIENT.raw_decode(text, at)
            row = Row(number, None, str(error))
        yield row
        at, number = skip(end), number + 1
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = skip(at + 1)
    if at + 1 != len(text):
        raise json.JSONDecodeError("Extra data", text, skip(at + 1))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"key {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} stands twice in one object")
    return value


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no number that JSON can hold")
    return value


STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
LENIENT = json.JSONDecoder(parse_int=len)
"""Only finds where an element ends; `len` because Python refuses to convert integers of thousands of digits."""
TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
HALF = "text holds half of a surrogate pair, which is no character"


def _row(source_row: int, value: Any, text: str) -> Row:
    """Args:
    text: the JSON it was parsed from, which tells cheaply whether the costly looks are needed.
    """
    if not isinstance(value, dict):
        return Row(source_row, None, f"expected an object, found {type(value).__name__}")
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    if re.search(r"\\u[dD]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Row(source_row, value, HALF)
    return Row(source_row, value)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [inner for v in level if isinstance(v, dict | list) for inner in (v.values() if isinstance(v, dict) else v)]:
        depth += 1
    return depth


def _csv(path: Path) -> list[Row]:
    """Column names from the first line; every value is text. One quote left open would swallow all that follows, so the file is refused."""

    def lines() -> Iterator[str]:
        for number, line in _lines(path):
            if line is None:
                raise csv.Error(f"longer than {MAX_ROW_BYTES} bytes (line {number})")
            yield line.decode("utf-8", "surrogateescape")

    rows: list[Row] = []
    reader = csv.reader(lines(), strict=True)
    usual = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        table = (fields for fields in reader if fields)
        header = next(table, [])
        _named_once(path, header)
        for fields in table:
            if any(not field.isascii() and re.search("[\udc80-\udcff]", field) for field in fields):
                problem = f"not UTF-8 (line {reader.line_num})"
            elif len(fields) != len(header):
                problem = f"{len(fields)} fields where the header has {len(header)} (line {reader.line_num})"
            else:
                problem = ""
            rows.append(Row(len(rows), None if problem else dict(zip(header, fields, strict=True)), problem))
    except csv.Error as error:
        raise InputError(
            f"{path.name}: not CSV: {error}, near line {reader.line_num}", "close every quote; double quotes inside one"
        ) from None
    finally:
        csv.field_size_limit(usual)
    return rows


def _named_once(path: Path, columns: list[str]) -> None:
    for name, count in Counter(columns).items():
        if count > 1:
            raise InputError(f"{path.name}: column {name!r} stands twice", "give each column its own name")
        if re.search("[\ud800-\udfff]", name):
            raise InputError(f"{path.name}: the column names are not UTF-8", "save the file as UTF-8")


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _named_once(path, file.schema_arrow.names)
            return _table(file.iter_batches(batch_size=1024))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path.name}: not Parquet: {error}", "write the file again") from None


def _arrow(path: Path) -> list[Row]:
    """An Arrow IPC file or stream. Each batch is validated in full: Arrow trusts the offsets it finds."""
    import pyarrow as pa

    def batches(reader: Any) -> Iterator[Any]:
        stream = reader if isinstance(reader, pa.RecordBatchReader) else map(reader.get_batch, range(reader.num_record_batches))
        for batch in stream:
            batch.validate(full=True)
            yield batch

    try:
        with pa.OSFile(str(path)) as file:
            magic = file.read(6)
            file.seek(0)
            reader = pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)
            _named_once(path, reader.schema.names)
            return _table(batches(reader))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path.name}: not Arrow: {error}", "write the file again") from None


def _table(batches: Iterable[Any]) -> list[Row]:
    """Values as JSON would hold them: dates and decimals as text, bytes as the text they spell."""
    rows: list[Row] = []
    for value in chain.from_iterable(map(_values, batches)):
        try:
            if isinstance(value, Exception):
                raise value
            rows.append(Row(len(rows), json.loads(json.dumps(value, default=_spelt, allow_nan=False))))
        except (ValueError, TypeError, OverflowError) as error:
            rows.append(Row(len(rows), None, f"a value that JSON cannot hold: {error}"))
    return rows


def _values(batch: Any) -> list[Any]:
    """The batch's rows; for one that Python cannot hold (text that is not UTF-8, a date out of range), the error."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        return [error] if batch.num_rows == 1 else [value for i in range(batch.num_rows) for value in _values(batch.slice(i, 1))]


def _spelt(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _paragraphs(path: Path) -> list[Row]:
    """Plain text, one row per paragraph: "One⏎two⏎⏎three"  ->  {"text": "One⏎two"}, {"text": "three"}"""
    rows: list[Row] = []
    lines: list[str] = []
    size, problem = 0, ""
    for number, line, flaw in chain(_text_lines(path), [(0, "", "")]):
        if flaw or line.strip():
            size += len(line.encode())
            problem = problem or flaw or ("" if size <= MAX_ROW_BYTES else f"longer than {MAX_ROW_BYTES} bytes (line {number})")
            if not problem or not lines:
                lines.append(line.rstrip("\r\n"))
        elif lines:
            rows.append(Row(len(rows), None if problem else {"text": "\n".join(lines)}, problem))
            lines, size, problem = [], 0, ""
    return rows


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _json,
    ".json.gz": _json,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
    ".txt": _paragraphs,
}
