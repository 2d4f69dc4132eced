"""Files -> rows.

One reader per file type; an unreadable row keeps its index and has a problem, with its line number.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from dagster_project.core.errors import InputError
from dagster_project.core.text import finite_number, listed, shortened, visible
from dagster_project.curation.sources.class_labels import FolderLabels, Labels, named, of_metadata
from dagster_project.curation.sources.table_limits import bounded, decoded_bytes, without_views

MEGABYTE = 2**20
MAX_ROW_BYTES = 16 * MEGABYTE
"""Maximum bytes of a line, paragraph, CSV row, list element or table row. A longer one is malformed; its text is never
kept in memory."""
MAX_DEPTH = 200
"""Maximum nesting of lists and objects in a row, well below Python's recursion limit."""
MAX_GZIP_RATIO = 200
"""Maximum ratio of decompressed to compressed bytes, checked above `GZIP_FREE_BYTES`. Text in JSON stays below 30."""
GZIP_FREE_BYTES = 64 * MEGABYTE
MAX_ROWS_PER_BYTE, FREE_ROWS = 4, 1_000_000
"""Maximum rows per byte of a file, above as many rows. Lines of uncompressed text have at least 2 bytes each."""
LONGEST_NAME = 100
"""Characters of a name that messages show."""
SHOWN_FILES = 20
"""Names of files that messages and reports show."""
BATCH = 128
"""Rows of a Parquet file that are decoded at a time."""
BLOCK_ROWS, BLOCK_BYTES = 4096, 4 * MEGABYTE
"""A part of a file that is read, parsed and converted at once ends at either of these."""

T = TypeVar("T")
log = logging.getLogger("pedigree")


class Row(NamedTuple):
    """One row of a source, parsed or not."""

    source_row: int
    """0-based: the element of a list or table, the line of a JSONL file (blank lines are not rows), the paragraph of a
    text."""
    value: dict[str, Any] | None
    problem: str = ""
    line: int = 0
    """Number of its last line, from 1; 0 for files without lines."""
    raw: str = ""
    """Text of a row without a value, with escapes such as `\\xe9` for bytes that are not UTF-8; empty if it is too long
    or a table cannot be decoded."""
    classes: Sequence[str] = ()
    """Columns in which names replaced the numbers of classes."""


class Block(NamedTuple):
    """Consecutive rows of a file. It can be sent to another process."""

    parse: Callable[[Any], list[Row]]
    """Function of a module: content -> rows, numbered from 0. Raises InputError like `read_blocks`."""
    content: Any
    labels: Labels | None = None
    """Classes in its columns; None if the file does not say."""

    @property
    def lines(self) -> int:
        """Number of rows, or of lines if some of them may be blank."""
        if isinstance(self.content, _Batches):
            return sum(batch.num_rows for batch in self.content)
        return len(self.content)

    def rows(self) -> list[Row]:
        rows = self.parse(self.content)
        return [with_names(row, self.labels) for row in rows] if self.labels else rows


def with_names(row: Row, labels: Labels) -> Row:
    """A row with names instead of numbers of classes."""
    if row.value is None or row.problem:
        return row
    columns = [column for column in labels if row.value.get(column) is not None]
    value = dict(row.value)
    for column in columns:
        try:
            value[column] = named(value[column], labels[column])
        except ValueError as error:
            problem = f"{shortened(column, LONGEST_NAME)}: {error}"
            return row._replace(problem=f"{problem} (line {row.line})" if row.line else problem)
    return row._replace(value=value, classes=columns)


class Stored(Protocol):
    """A file that is not on this machine. A path of one that is has the same methods."""

    @property
    def name(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    @property
    def suffixes(self) -> Sequence[str]: ...
    @property
    def size(self) -> int: ...
    def open(self, mode: str) -> BinaryIO: ...


File = Path | Stored


def size_of(file: File) -> int:
    """Size in bytes."""
    return file.stat().st_size if isinstance(file, Path) else file.size


def read_blocks(file: File, declared: Callable[[], Labels] = dict) -> Iterator[Block]:
    """Read a file in parts. Only one of them is in memory.

    Args:
        declared: classes of a file whose own metadata declares none.
    Raises:
        InputError: unknown file type, or a file that cannot be separated into rows.
    """
    suffix = suffix_of(file)
    if suffix not in READERS:
        raise InputError(f"{file.name}: unknown file type {suffix or '(none)'}", f"use {', '.join(READERS)}")
    size = size_of(file)
    rows, most = 0, max(FREE_ROWS, MAX_ROWS_PER_BYTE * size)
    try:
        if 0 < size < LARGEST_POINTER:  # a pipe, which would block, has size 0
            _refuse_pointer(file)
        labels: Labels | None = None
        for block in READERS[suffix](file) if size else ():
            if labels is None:
                labels = declared() if block.labels is None else block.labels
            block = block._replace(labels=labels)
            rows += block.lines
            if rows > most:
                what = f"{file.name}: more than {most:,} rows in {size:,} bytes"
                raise InputError(what, "write it without compression if you trust it")
            yield block
    except OSError as error:
        what = f"{file.name}: cannot be read: {error.strerror or error}"
        raise InputError(what, "check the file's permissions and the disk") from None


LARGEST_POINTER = 1024
"""Bytes that are more than a pointer of Git LFS has."""
POINTERS = (b"version https://git-lfs.github.com/spec/v1\n", b"/annex/objects/")
"""How the files begin that Git LFS and git-annex put in place of data that were not fetched."""


def _refuse_pointer(file: File) -> None:
    with file.open("rb") as opened:
        if opened.read(max(map(len, POINTERS))).startswith(POINTERS):
            what = f"{file.name}: a pointer of Git LFS or git-annex, and not the data"
            raise InputError(what, "fetch them with `git lfs pull` or `git annex get`")


class Found(NamedTuple):
    """What is known of a file when all of it is read."""

    rows: int = 0
    readable: int = 0
    """Rows that have a value."""
    problem: str = ""
    """Of the first row."""


COLUMN, OR_COLUMN = "column ", ", or leave the column out"
"""How the problem of a value of a table begins, and the next step for it."""


def require_rows(name: str, found: Found) -> None:
    """Refuse a file without rows, or of which none can be read; of a list in JSON only one in another encoding.

    Raises:
        InputError: as described.
    """
    if not found.rows:
        raise InputError(f"{name}: the file has no rows", "put at least one example in it, or leave it out")
    is_json, is_encoded = name.lower().endswith((".jsonl", ".jsonl.gz")), not found.problem.startswith("not UTF-8")
    if not found.readable and not (is_encoded and name.lower().endswith((".json", ".json.gz"))):
        hint = "each line must be one JSON object" if is_json else "fix the rows"
        hint += OR_COLUMN if found.problem.startswith(COLUMN) else ""
        what = "not JSON" if is_json else "no row can be read"
        raise InputError(f"{name}: {what}: {found.problem}", hint if is_encoded else "save the file as UTF-8")


def read_rows(path: Path, declared: Callable[[], Labels] = dict) -> list[Row]:
    """Read a file, or all files of the known types in a folder, sorted by relative path and numbered consecutively.

    An unreadable row becomes a row with a problem:
    {"prompt": "Hi"}⏎{"prompt": "H  ->  Row(0, {"prompt": "Hi"}), Row(1, None, "line is not JSON: ... (line 2)")

    Args:
        declared: as in `read_blocks`.
    Raises:
        InputError: unknown file type, empty file, or a file that cannot be separated into rows or contains no JSON.
    """
    if path.is_dir():
        labels = FolderLabels(path)
        of_files = [(name, row) for name, file in files_of(path) for row in read_rows(file, partial(labels.of, name))]
        problems = [row.problem and f"{name}: {row.problem}" for name, row in of_files]
        return [row._replace(source_row=i, problem=problems[i]) for i, (_, row) in enumerate(of_files)]
    rows = rows_of(read_blocks(path, declared))
    require_rows(path.name, found_in(rows))
    return rows


def found_in(rows: Sequence[Row]) -> Found:
    return Found(len(rows), sum(row.value is not None for row in rows), rows[0].problem if rows else "")


def rows_of(blocks: Iterable[Block]) -> list[Row]:
    """The rows of all blocks of a file."""
    rows: list[Row] = []
    for block in blocks:
        rows += [row._replace(source_row=i) for i, row in enumerate(block.rows(), len(rows))]
    return rows


def _blocks(parse: Callable[[Any], list[Row]], parts: Iterable[tuple[int, T]]) -> Iterator[Block]:
    """Args:
    parts: rows or parts of a file, with their size in bytes.
    """
    content: list[T] = []
    size = 0
    for part_size, part in parts:
        content.append(part)
        size += part_size
        if len(content) >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield Block(parse, content)
            content, size = [], 0
    if content:
        yield Block(parse, content)


def as_parsed(rows: list[Row]) -> list[Row]:
    """For a `Block` whose content is its rows."""
    return rows


def suffix_of(path: File | PurePosixPath) -> str:
    """File type in lower case."""
    suffix = path.suffix.lower()
    return "".join(path.suffixes[-2:]).lower() if suffix == ".gz" else suffix


def files_of(folder: Path) -> list[tuple[str, Path]]:
    """Files of the known types in a folder, as (relative path, path), sorted.

    Hidden ones, such as copies by an editor, are left out, and so are files next to the data of a data set that
    `datasets` saved, such as its caches.

    Raises:
        InputError: there is none, a subfolder cannot be read, a link points outside the folder, to any file of the
            machine, or a file of a saved data set is missing.
    """

    def refuse(error: OSError) -> None:
        what = f"{error.filename}: cannot be read: {error.strerror}"
        raise InputError(what, "check the folder's permissions") from None

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if not name.startswith(".")]
        for path in (Path(parent, name) for name in [*folders, *names]):
            if path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(folder.resolve())):
                what = f"{path.relative_to(folder.parent)}: a link that is broken or points outside its folder"
                raise InputError(what, "copy the file there instead")
        kept = of_saved(Path(parent).name, names, partial(_json_object, Path(parent)))
        files += [path for path in (Path(parent, name) for name in kept) if suffix_of(path) in READERS]
    if not files:
        what = f"{folder.absolute().name}: no file of examples in the folder"
        raise InputError(what, f"file types: {', '.join(READERS)}")
    return sorted((path.relative_to(folder).as_posix(), path) for path in files)


def of_saved(folder: str, names: list[str], read: Callable[[str], Mapping[str, Any]]) -> list[str]:
    """The data files of a data set that `datasets.save_to_disk` wrote to a folder, by its `state.json`; of any other
    folder all files, except the list of splits above such folders.

    Args:
        read: returns the object in one of the files; empty if there is none.
    Raises:
        InputError: a file that `state.json` names is missing.
    """
    state = read("state.json") if {"state.json", "dataset_info.json"} <= set(names) else {}
    listed_files = state.get("_data_files")
    if isinstance(listed_files, list):
        data = [one.get("filename") for one in listed_files if isinstance(one, dict)]
        if missing := [str(name) for name in data if name not in names]:
            raise InputError(
                f"{folder}/state.json names {shortened(missing[0])}, which is not in the folder",
                "copy all files of the data set, or save it again",
            )
        return [name for name in names if name in data]
    if "dataset_dict.json" in names and isinstance(read("dataset_dict.json").get("splits"), list):
        return [name for name in names if name != "dataset_dict.json"]
    return names


def _json_object(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        return json_object(path.read_bytes()) if path.stat().st_size <= MEGABYTE else {}
    except OSError:
        return {}


def json_object(content: bytes) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        value = parse_json(content.decode())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def others_of(folder: Path) -> list[str]:
    """Relative paths of the files in a folder that `files_of` leaves out, as `unread`."""
    read = {PurePosixPath(name) for name, _ in files_of(folder)}
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    paths = (PurePosixPath(file.relative_to(folder)) for file in files)
    return unread(folder.absolute().name, (path for path in paths if path not in read), UNLISTED)


UNLISTED = "because they are not data of the saved data set"


def unread(place: str, paths: Iterable[PurePosixPath], unlisted: str = "") -> list[str]:
    """The files that are not read, sorted and logged: those of other types, and hidden ones of the known types.

    Files of DVC are not among them.

    Args:
        unlisted: why other files among the paths are not read; empty if they are.
    """
    found: dict[str, list[str]] = {"because of their types": [], "because they are hidden": [], unlisted: []}
    for path in paths:
        known = suffix_of(path) in READERS
        if is_hidden(path) and known:
            found["because they are hidden"].append(visible(str(path)))
        elif known and unlisted:
            found[unlisted].append(visible(str(path)))
        elif not is_hidden(path) and not known and path.suffix != ".dvc":
            found["because of their types"].append(visible(str(path)))
    for why, names in found.items():
        names.sort()
        if names:
            log.warning(f"{visible(place)}: not read, {why}: {listed(names, SHOWN_FILES)}")
    return sorted(chain.from_iterable(found.values()))


def is_hidden(path: PurePosixPath) -> bool:
    """Whether a file, or a folder above it, has a name that begins with a dot.

    Args:
        path: relative to the folder of a source.
    """
    return any(part.startswith(".") for part in path.parts)


def _pieces(path: File) -> Iterator[bytes]:
    """Yield the decompressed content line by line; lines above `MAX_ROW_BYTES` in several pieces."""
    packed = path.suffix.lower() == ".gz"
    out, most = 0, max(GZIP_FREE_BYTES, MAX_GZIP_RATIO * size_of(path))
    try:
        with path.open("rb") as file, gzip.open(file) if packed else file as stream:
            while piece := stream.readline(MAX_ROW_BYTES + 1):
                out += len(piece)
                if packed and out > most:
                    what = f"{path.name}: decompresses to more than {MAX_GZIP_RATIO} times its size"
                    raise InputError(what, "decompress it yourself if you trust it")
                yield piece
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path.name}: broken gzip file: {error}", "compress it again") from None


def _lines(path: File) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number, from 1; None for one that is too long. Removes a byte order mark."""
    number, inside = 0, False
    for piece in _pieces(path):
        if not inside:
            number += 1
            line = piece.removeprefix(codecs.BOM_UTF8) if number == 1 else piece
            yield number, line if len(piece) <= MAX_ROW_BYTES else None
        inside = not piece.endswith(b"\n")


def _text_lines(lines: Iterable[tuple[int, bytes | None]]) -> Iterator[tuple[int, str, str]]:
    """Yield the number, text and problem of each line."""
    for number, line in lines:
        try:
            yield (number, line.decode(), "") if line is not None else (number, "", _too_long(number))
        except UnicodeDecodeError as error:
            yield number, escaped(line or b""), f"not UTF-8 at byte {error.start} (line {number})"


def escaped(content: bytes) -> str:
    """Decode UTF-8, other bytes with an escape: b"caf\xe9"  ->  "caf\\xe9" """
    return content.decode("utf-8", "backslashreplace")


def _jsonl(path: File) -> Iterator[Block]:
    return _blocks(_json_lines, ((len(line or b""), (number, line)) for number, line in _lines(path)))


def _json_lines(lines: list[tuple[int, bytes | None]]) -> list[Row]:
    rows: list[Row] = []
    for number, line, problem in _text_lines(lines):
        if problem:
            rows.append(Row(len(rows), None, problem, number, line.rstrip("\r\n")))
        elif line.strip():
            rows.append(_line(len(rows), line, number))
    return rows


def _line(source_row: int, line: str, number: int) -> Row:
    try:
        row = _row(source_row, STRICT.decode(line.rstrip("\r\n")), line, number)
    except json.JSONDecodeError as error:
        row = Row(source_row, None, f"line is not JSON: {error.msg}: column {error.colno}", number)
    except ValueError as error:
        row = Row(source_row, None, _reason(error), number)
    except RecursionError:
        row = Row(source_row, None, TOO_DEEP, number)
    raw = line.rstrip("\r\n") if row.value is None else ""
    return row._replace(problem=f"{row.problem} (line {number})", raw=raw) if row.problem else row


class _Window:
    """The text of a JSON file, of which only the current part is in memory."""

    def __init__(self, path: File) -> None:
        self.path, self.pieces, self.decoder = path, _pieces(path), codecs.getincrementaldecoder("utf-8")()
        self.text, self.at = "", 0  # the part in memory, and the reading position in it
        self.bytes = 0  # read so far
        self.chars = self.lines = self.column = 0  # released so far; `column` counts from the last line break

    def more(self) -> bool:
        """Release the text before `at` and read more. False at the end of the file."""
        content = b"".join(self._megabyte())
        waiting = len(self.decoder.getstate()[0])
        try:
            text = self.decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            what = f"{self.path.name}: not UTF-8 at byte {self.bytes - waiting + error.start}"
            raise InputError(what, "save the file as UTF-8") from None
        if not content:
            return False
        self.chars, self.lines, self.column = self._position(self.at)
        self.text = self.text[self.at :] + (text if self.bytes else text.removeprefix("\ufeff"))
        self.bytes, self.at = self.bytes + len(content), 0
        return True

    def _megabyte(self) -> Iterator[bytes]:
        size = 0
        while size < MEGABYTE and (piece := next(self.pieces, b"")):
            size += len(piece)
            yield piece

    def _position(self, at: int) -> tuple[int, int, int]:
        """Characters and lines before a position in the text, and characters before it in its line."""
        lines = self.text.count("\n", 0, at)
        return self.chars + at, self.lines + lines, at - 1 - self.text.rfind("\n", 0, at) if lines else self.column + at

    def peek(self) -> str:
        """Peek at the next character that is not white space; empty at the end of the file."""
        while True:
            while self.text[self.at : self.at + 1] in {" ", "\t", "\r", "\n"}:
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def error_at(self, what: str, at: int) -> InputError:
        """The error for invalid JSON at a position."""
        chars, lines, column = self._position(at)
        where = f"line {lines + 1} column {column + 1} (char {chars})"
        return InputError(f"{self.path.name}: not JSON: {what}: {where}", "fix the file; one object per line is .jsonl")


def _json(path: File) -> Iterator[Block]:
    text = _Window(path)
    try:
        first = text.peek()
        if first and first != "[":
            _element(text)
            what = f"{path.name}: a .json file must hold a list of rows"
            raise InputError(what, "wrap the rows in [ ]; one object per line is .jsonl")
        if first:
            yield from _blocks(as_parsed, _elements(text))
    except RecursionError as error:
        raise InputError(f"{path.name}: not JSON: {error}", "fix the file; one object per line is .jsonl") from None


def _elements(text: _Window) -> Iterator[tuple[int, Row]]:
    """Yield the elements of a JSON list one by one, with their size: an invalid one does not affect the others."""
    text.at += 1
    number = 0
    while text.peek() != "]" or number:
        start = text.chars + text.at
        row = _element(text)
        yield text.chars + text.at - start, row
        number += 1
        if text.peek() == "]":
            break
        if text.peek() != ",":
            raise text.error_at("Expecting ',' delimiter", text.at)
        text.at += 1
    text.at += 1
    if text.peek():
        raise text.error_at("Extra data", text.at)
    if not number:
        raise InputError(f"{text.path.name}: the list is empty", "put at least one example in it")


def _element(text: _Window) -> Row:
    """Consume one element.

    One that does not parse may be incomplete, so more is read; one that is too long is skipped.
    """
    while True:
        start, end, row, flaw = text.at, 0, Row(0, None, _too_long()), None
        try:
            value, end = STRICT.raw_decode(text.text, start)
            row = _row(0, value, text.text[start:end])
        except json.JSONDecodeError as error:
            flaw = text.error_at(error.msg, error.pos)
        except ValueError as error:
            row = Row(0, None, _reason(error))
            try:
                _, end = LENIENT.raw_decode(text.text, start)
            except json.JSONDecodeError as broken:
                flaw = text.error_at(broken.msg, broken.pos)
        if flaw and len(text.text) - start > MAX_ROW_BYTES:
            if _skip(text) > MAX_ROW_BYTES:
                return Row(0, None, _too_long())
            raise flaw
        if 0 < end < len(text.text) or not text.more():
            break
    if flaw:
        raise flaw
    text.at = end
    too_long = 4 * (end - start) > MAX_ROW_BYTES and len(text.text[start:end].encode()) > MAX_ROW_BYTES
    if too_long:
        return Row(0, None, _too_long())
    return row._replace(raw=text.text[start:end]) if row.value is None else row


QUOTED, UNQUOTED = re.compile(r'\\.|"', re.DOTALL), re.compile(r'["\[\]{},]')


def _skip(text: _Window) -> int:
    """Consume an element by brackets and quotes, without keeping it in memory.

    Returns its length in characters, 0 if it has no end.
    """
    start, depth, quoted = text.chars + text.at, 0, False
    while True:
        while found := (QUOTED if quoted else UNQUOTED).search(text.text, text.at):
            mark = found[0]
            if not quoted and not depth and mark in ",]}":
                return text.chars + found.start() - start
            text.at = found.end()
            if mark == '"':
                quoted = not quoted
            elif not quoted:
                depth += (mark in "[{") - (mark in "]}")
        text.at = len(text.text) - text.text.endswith("\\")  # the escaped character is not read yet
        if not text.more():
            return 0


def _too_long(line: int = 0) -> str:
    return f"longer than {MAX_ROW_BYTES} bytes" + (f" (line {line})" if line else "")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {name[:LONGEST_NAME]!r} is duplicated in one object")
    return value


def _reason(error: ValueError) -> str:
    """Why a text is not a row.

    Python's own message for a very long whole number names one of its settings, so it is replaced.
    """
    return LONG_NUMBER if "int_max_str_digits" in str(error) else str(error)


LONG_NUMBER = f"a whole number has more than {sys.get_int_max_str_digits():,} digits"
STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=finite_number, parse_float=finite_number)
LENIENT = json.JSONDecoder(parse_int=len)
"""Finds only the end of an element; `len`, because Python refuses to convert integers of thousands of digits."""
TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
HALF = "text has half of a surrogate pair, which is not a character"


def parse_json(text: str) -> Any:
    """Parse JSON inside a row as strictly as the row itself.

    Raises:
        ValueError: it is not JSON, or holds what a row may not hold: a key twice, NaN, half of a surrogate pair, or
            nesting that is too deep.
    """
    try:
        value = STRICT.decode(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError(_reason(error)) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(HALF) from None
    return value


def _row(source_row: int, value: Any, text: str, line: int = 0) -> Row:
    """Check a parsed value.

    Args:
        text: the JSON source, which shows cheaply whether the expensive checks are needed.
    """
    if not isinstance(value, dict):
        return Row(source_row, None, f"expected an object, found {type(value).__name__}", line)
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    if re.search(r"\\u[dD]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Row(source_row, value, HALF, line)
    return Row(source_row, value, "", line)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while True:
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        if not (level := [*chain.from_iterable(inner)]):
            return depth
        depth += 1


def _csv(path: File) -> Iterator[Block]:
    """Read CSV: column names from the first line, unless it is an MMLU question; every value is text.

    An unclosed quote would include all that follows, so the file is refused.
    """
    return _blocks(as_parsed, _csv_rows(path))


def _csv_rows(path: File) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a CSV file with their size."""

    first = ""

    def lines() -> Iterator[str]:
        nonlocal first
        for number, line in _lines(path):
            if line is None:
                raise csv.Error(_too_long(number))
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                what = f"{path.name}: the file is UTF-16"
                raise InputError(what, "save the file as UTF-8, with commas between columns")
            text = line.decode("utf-8", "surrogateescape")
            first = first or text
            yield text

    reader = csv.reader(lines(), strict=True)
    usual = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        table: Iterator[tuple[list[str], int]] = ((fields, reader.line_num) for fields in reader if fields)
        begin = [*islice(table, 2)]
        if begin and all(is_mmlu(fields) for fields, _ in begin):
            header, table = MMLU_COLUMNS, chain(begin, table)
        else:
            header, table = (begin[0][0] if begin else []), chain(begin[1:], table)
        _named_once(path, header)
        if len(header) == 1:
            _require_commas(path, header[0])
        for fields, line in table:
            size = sum(map(len, fields))
            if any(not field.isascii() and re.search("[\udc80-\udcff]", field) for field in fields):
                problem = f"not UTF-8 (line {line})"
            elif size > MAX_ROW_BYTES:
                problem = _too_long(line)
            elif len(fields) != len(header):
                problem = f"{len(fields)} fields where the header has {len(header)} (line {line})"
            else:
                problem = ""
            raw = _csv_text(fields) if problem and size <= MAX_ROW_BYTES else ""
            yield size, Row(0, None if problem else dict(zip(header, fields, strict=True)), problem, line, raw)
    except csv.Error as error:
        if "," not in first:
            _require_commas(path, first)
        what, hint = str(error), "close every quote; double quotes inside one"
        if "new-line" in what:
            what = "a line ends with a carriage return alone"
            hint = "save the file with line ends of Unix or Windows"
        raise InputError(f"{path.name}: not CSV: {what}, near line {reader.line_num}", hint) from None
    finally:
        csv.field_size_limit(usual)


def _require_commas(path: File, header: str) -> None:
    """Refuse a file whose first line, without commas, has another separator."""
    if other := next((mark for mark in ";\t|" if mark in header), ""):
        what = f"{path.name}: not CSV: columns are separated by {other!r}"
        raise InputError(what, "save the file with commas between columns")


def _csv_text(fields: list[str]) -> str:
    """A row of a CSV file, as text: ["a", "b, c"]  ->  'a,"b, c"'"""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="").writerow(fields)
    return escaped(text.getvalue().encode("utf-8", "surrogateescape"))


MMLU_COLUMNS = ["question", "A", "B", "C", "D", "answer"]
"""Column names of MMLU's CSV files, which have no header."""


def is_mmlu(fields: list[str]) -> bool:
    """Whether a CSV line is an MMLU question: six fields, the last of which is the letter of the correct choice."""
    return len(fields) == len(MMLU_COLUMNS) and fields[-1] in MMLU_COLUMNS[1:5]


def _named_once(path: File, columns: list[str]) -> None:
    for name, count in Counter(columns).items():
        if count > 1:
            what = f"{path.name}: column {name[:LONGEST_NAME]!r} is duplicated"
            raise InputError(what, "give each column a unique name")
        if re.search("[\ud800-\udfff]", name):
            raise InputError(f"{path.name}: the column names are not UTF-8", "save the file as UTF-8")


def _parquet(path: File) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (
        _as_type(path.name, "Parquet"),
        pq.ParquetFile(path if isinstance(path, Path) else pa.PythonFile(path.open("rb"))) as file,
    ):
        _named_once(path, file.schema_arrow.names)
        yield from _table_blocks(path, "Parquet", file.schema_arrow, file.iter_batches(batch_size=BATCH))


def _arrow(path: File) -> Iterator[Block]:
    """Read an Arrow IPC file or stream. Each batch is fully validated, because Arrow does not check offsets."""
    import pyarrow as pa

    def batches(reader: Any) -> Iterator[Any]:
        is_stream = isinstance(reader, pa.RecordBatchReader)
        for batch in reader if is_stream else map(reader.get_batch, range(reader.num_record_batches)):
            batch.validate(full=True)
            for start in range(0, batch.num_rows, BLOCK_ROWS):
                yield without_views(batch.slice(start, BLOCK_ROWS))

    with (
        _as_type(path.name, "Arrow"),
        pa.OSFile(str(path)) if isinstance(path, Path) else pa.PythonFile(path.open("rb")) as file,
    ):
        magic = file.read(6)
        file.seek(0)
        reader = pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)
        _named_once(path, reader.schema.names)
        yield from _table_blocks(path, "Arrow", reader.schema, batches(reader))


@contextmanager
def _as_type(name: str, kind: str) -> Iterator[None]:
    """Raise InputError where a table is not of its type."""
    import pyarrow as pa

    try:
        yield
    except LookupError as error:  # of pytz and zoneinfo
        raise InputError(f"{name}: unknown time zone {shortened(str(error))}", "write times in UTC") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{name}: not {kind}: {shortened(str(error))}", "write the file again") from None


def _table_blocks(path: File, kind: str, schema: Any, batches: Iterable[Any]) -> Iterator[Block]:
    labels = of_metadata(schema.metadata)
    row = BLOCK_BYTES // BLOCK_ROWS  # a block of batches ends at BLOCK_ROWS too
    sized = ((max(size, row * batch.num_rows), batch) for size, batch in bounded(path.name, size_of(path), batches))
    for block in _blocks(as_parsed, sized):
        yield Block(partial(_batch_rows, path.name, kind), _Batches(block.content), labels)


class _Batches(list[Any]):
    """Arrow record batches.

    A part of a larger one would be sent to another process with all of it, except in Arrow's own format.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self[0].schema) as stream:
            for batch in self:
                stream.write_batch(batch)
        return _received, (sink.getvalue().to_pybytes(),)


def _received(content: bytes) -> _Batches:
    import pyarrow as pa

    with pa.ipc.open_stream(content) as stream:
        return _Batches(stream)


def _batch_rows(name: str, kind: str, batches: list[Any]) -> list[Row]:
    with _as_type(name, kind):
        return table_rows(batches)


def table_rows(batches: Iterable[Any], decode: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> list[Row]:
    """Convert values to those of JSON: dates and decimals as text, bytes decoded as UTF-8.

    Args:
        batches: Arrow record batches.
        decode: applied to each row first.
    """
    rows: list[Row] = []
    for value in chain.from_iterable(map(_values, batches)):
        try:
            if isinstance(value, Exception):
                raise value
            plain = json.dumps(decode(value) if decode else value, default=_as_text, allow_nan=False)
            rows.append(_row(len(rows), _as_sparse(json.loads(plain)), plain))
        except _TooLong as error:
            rows.append(Row(len(rows), None, str(error)))
        except RecursionError:
            rows.append(Row(len(rows), None, TOO_DEEP))
        except (ValueError, TypeError, OverflowError) as error:
            problem = f"{_unfit_column(value)}a value that JSON cannot hold: {shortened(str(error))}"
            rows.append(Row(len(rows), None, problem, raw=_table_text(value)))
    return rows


def _unfit_column(row: Any) -> str:
    """The beginning of a message about the first column whose value JSON cannot hold."""
    for name, value in row.items() if isinstance(row, dict) else ():
        try:
            json.dumps(value, default=_as_text, allow_nan=False)
        except (ValueError, TypeError, OverflowError):
            return f"{COLUMN}{shortened(str(name), LONGEST_NAME)!r}: "
    return ""


def _table_text(row: Any) -> str:
    """A row of a table that is not valid JSON, as text; empty if it could not be decoded."""
    if not isinstance(row, dict):
        return ""

    def as_text(value: Any) -> str:
        return escaped(value) if isinstance(value, bytes) else str(value)

    return json.dumps(row, ensure_ascii=False, default=as_text).encode("utf-8", "backslashreplace").decode()


CALL_COLUMNS = ("tools", "functions", "answers", "tool_calls", "function_call", "toolConfig")
PARTS = ("functionCall", "function_call", "functionResponse", "function_response", "toolUse", "toolResult", "input")
"""Keys of parts of a message of Gemini, Bedrock or Anthropic for calls and results."""


def _as_sparse(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose tools and calls have no keys with null: in a table, all objects of a column have the same keys."""
    for key, value in row.items():
        if key in CALL_COLUMNS or _are_functions(value):  # a mapping may give them another name
            row[key] = _without_nulls(value)
        elif key == "input" and isinstance(value, dict):  # OpenAI's preferences
            row[key] = _as_sparse(value)
        elif isinstance(value, list):
            for message in value:
                if isinstance(message, dict) and any(message.get(name) for name in CALL_COLUMNS):
                    message |= {name: _without_nulls(message[name]) for name in CALL_COLUMNS if name in message}
                for part in _parts_of(message):
                    part |= {name: _without_nulls(part[name]) for name in PARTS if name in part}
    return row


def _parts_of(message: Any) -> list[dict[str, Any]]:
    parts = (message.get("parts") or message.get("content")) if isinstance(message, dict) else None
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _are_functions(value: Any) -> bool:
    """Whether a value is a list of tools or calls in a form that `tools` reads."""
    return isinstance(value, list) and bool(value) and all(map(_is_function, value))


def _is_function(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    is_named = isinstance(value.get("name"), str)
    has_more = not value.keys().isdisjoint({"arguments", "parameters", "input_schema", "inputSchema"})
    return (is_named and has_more) or isinstance(value.get("function"), dict)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return value


class _TooLong(ValueError):
    pass


def _values(batch: Any) -> list[Any]:
    """Rows of a batch; an exception for those that Python cannot represent (not UTF-8, bad dates), or too long ones."""
    try:
        if decoded_bytes(batch) <= MAX_ROW_BYTES:
            return batch.to_pylist()
        unfit: Exception = _TooLong(_too_long())
    except (ValueError, OverflowError) as error:
        unfit = error
    half = batch.num_rows // 2
    return [*_values(batch.slice(0, half)), *_values(batch.slice(half))] if half else [unfit]


def _as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _paragraphs(path: File) -> Iterator[Block]:
    """Read plain text, one row per paragraph: "One⏎two⏎⏎three"  ->  {"text": "One⏎two"}, {"text": "three"}"""
    return _blocks(as_parsed, _paragraph_rows(path))


def _paragraph_rows(path: File) -> Iterator[tuple[int, Row]]:
    """Yield the paragraphs with their size."""
    lines: list[str] = []
    size, problem, last = 0, "", 0
    for number, line, flaw in chain(_text_lines(_lines(path)), [(0, "", "")]):
        if flaw or line.strip():
            size += len(line.encode()) if line else MAX_ROW_BYTES + 1  # of a line that is too long there is no text
            problem = problem or flaw or ("" if size <= MAX_ROW_BYTES else _too_long(number))
            last = number
            if size <= MAX_ROW_BYTES or not lines:
                lines.append(line.rstrip("\r\n"))
        elif lines:
            text = "\n".join(lines)
            raw = text if problem and size <= MAX_ROW_BYTES else ""
            yield size, Row(0, None if problem else {"text": text}, problem, last, raw)
            lines, size, problem = [], 0, ""


READERS: dict[str, Callable[[File], Iterator[Block]]] = {
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
