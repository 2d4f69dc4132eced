"""Files of a source -> rows in a scratch file -> canonical records or pairs.

Only a few parts of a file are in memory, in any number of processes.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from dagster_project.core import workers
from dagster_project.core.errors import InputError
from dagster_project.core.records import is_rich
from dagster_project.core.stored_rows import StoredRows, decode, encode, encode_finite
from dagster_project.core.strings import Strings
from dagster_project.curation.sources.call_texts import Think
from dagster_project.curation.sources.detection import SPLITS, Shapes, shapes_of, split_of_file
from dagster_project.curation.sources.fields import FieldCounts, Fields, numbered
from dagster_project.curation.sources.files import MEGABYTE, Block, Found, Row, require_rows
from dagster_project.curation.sources.formats import FROM_FILE_NAMES, Conversion, conversion_of, converted
from dagster_project.curation.sources.pairing import HALF, Halves, joined

SMALL = 8 * MEGABYTE
"""A source below this size, in bytes, is read in this process: starting others takes longer."""


class SourceFile(NamedTuple):
    """A file of a source, or a split on the Hub."""

    name: str
    """In messages."""
    source: str
    """Of its rows."""
    blocks: Iterable[Block]
    """Read once."""
    size: int = 0
    """In bytes. 0 if another process cannot take part in reading it."""


class How(NamedTuple):
    """How a source is read."""

    name: str
    """Of the source, in messages."""
    pairs: bool
    """Preference pairs; else examples."""
    layout: str
    """Name of the layout, or `auto`: detected for each file."""
    mapping: Mapping[str, str]
    split: str | None
    """Label for every row, or "from_file_names"."""
    think: Think


@dataclass
class Facts:
    """What a report says about the rows of a source."""

    layout: str = ""
    """Of all files, joined by ", "."""
    records: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    """Source of each file -> rows of it that are in records."""
    fields: FieldCounts = field(default_factory=FieldCounts)
    unreadable: int = 0
    unsupported: int = 0
    """Rows with images and the like."""
    problems: dict[bool, list[str]] = field(default_factory=lambda: {True: [], False: []})
    """Whether it is unsupported -> the first three rows without messages."""


class Records:
    """Records of several sources in a scratch file, and in memory what their ledger says."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: for scratch files.
        """
        self._folder = folder
        self._stored = StoredRows(folder=folder)
        self._second: dict[int, int] = {}
        """Number of a half of a pair -> number of the half that forms a pair with it."""
        self._has_halves = False
        self.is_rich = False
        """Whether any of them needs the columns of `rich_schema`."""
        self.ids = Strings()
        """`example_id` of each record; empty for a half of a pair."""
        self.ignored: dict[int, list[str]] = {}
        """Number of a record -> its fields that are ignored."""
        self._sources: list[tuple[int, str]] = []
        """Number of the first record of each file, and the source of its rows."""
        self._source_rows = array("Q")

    def __len__(self) -> int:
        return len(self._stored)

    def rows(self) -> StoredRows:
        """All records, in order. Halves of pairs are joined."""
        if not self._has_halves:
            return self._stored
        return StoredRows(self._pairs(), self._folder)

    def _pairs(self) -> Iterator[dict[str, Any]]:
        others = set(self._second.values())
        for number, entry in enumerate(self._stored):
            if number not in others:
                yield joined(entry, self._stored[self._second[number]] if number in self._second else None)

    def places(self) -> Iterator[tuple[str, int]]:
        """Source and source row of each record, in order."""
        ends = chain((start for start, _ in self._sources[1:]), [len(self)])
        for (start, source), end in zip(self._sources, ends, strict=False):
            for number in range(start, end):
                yield source, self._source_rows[number]

    def add(self, part: ConvertedPart, index: int) -> None:
        """Store a record of a part, or a half of a pair, in order."""
        number = len(self._stored)
        self._stored.append_encoded(part.lines[index])
        self._source_rows.append(part.rows[index])
        self.ids.append(part.ids[index])
        self.is_rich |= index in part.rich
        if index in part.ignored:
            self.ignored[number] = part.ignored[index]

    def read(self, files: Sequence[SourceFile], how: How, limit: int | None) -> Facts:
        """Add the records of a source.

        Args:
            limit: number of records to add.
        Raises:
            InputError: a file is empty, not of its type, or in an unknown layout.
        """
        parsed = Parsed(self._folder)
        conversions = parsed.read(files, how)
        if how.split == FROM_FILE_NAMES and not any(each.split for each in conversions):
            what = f"{how.name}: no file name contains a split"
            raise InputError(what, f"use the names {', '.join(SPLITS)}, or leave split out")
        facts = Facts(", ".join(dict.fromkeys(each.layout for each in conversions)))
        pool = workers.current() if parsed.size >= SMALL else workers.THIS_PROCESS
        adding = _Adding(self, self._second, facts, limit)
        for part in pool.map(convert, None, parsed.parts(conversions)):
            if not self._sources or self._sources[-1][1] != conversions[part.file].source:
                self._sources.append((len(self._source_rows), conversions[part.file].source))
            adding.add(part, conversions[part.file])
            self._has_halves |= bool(part.halves)
            if adding.is_full and not how.pairs:  # a later half may belong to an earlier one
                break
        return facts


# --- files -> rows


class ParsedBlock(NamedTuple):
    file: int
    lines: list[bytes] = []
    """Encoded rows."""
    shapes: Shapes = Counter()
    problem: str = ""
    """Of the first row."""
    error: InputError | None = None
    is_end: bool = False
    """Nothing follows of this file."""


def parse(_: None, item: tuple[int, Block | InputError | None]) -> ParsedBlock:
    """Parse a part of a file, in any process.

    Args:
        item: number of the file, and its part; None at its end; the error that ended reading.
    """
    file, block = item
    if block is None:
        return ParsedBlock(file, is_end=True)
    if isinstance(block, InputError):
        return ParsedBlock(file, error=block)
    try:
        rows = block.rows()
    except InputError as error:
        return ParsedBlock(file, error=error)
    fields = [
        {"value": row.value, "problem": row.problem, "line": row.line, "raw": row.raw, "classes": row.classes}
        for row in rows
    ]
    lines = [encode_finite(one) for one in fields]  # no reader yields infinite numbers
    return ParsedBlock(file, lines, shapes_of(rows), rows[0].problem if rows else "")


def _items(files: Sequence[SourceFile]) -> Iterator[tuple[int, Block | InputError | None]]:
    """The parts of all files.

    Errors are passed on in their place: those of files before come first, in any number of processes.
    """
    for number, file in enumerate(files):
        try:
            for block in file.blocks:
                yield number, block
        except InputError as error:
            yield number, error
            return
        yield number, None


class Parsed:
    """The parsed rows of a source in a scratch file."""

    def __init__(self, folder: Path) -> None:
        self.rows = StoredRows(folder=folder)
        self.size = 0
        """Of the file, in bytes."""
        self._ends = array("Q")
        self._files = array("Q")
        """Of each part: the number of its last row plus 1, and of its file."""

    def read(self, files: Sequence[SourceFile], how: How) -> list[Conversion]:
        """Read all rows.

        Returns:
            The conversion of each file.
        """
        conversions: list[Conversion] = []
        shapes, found = Shapes(), Found()
        pool = workers.current() if sum(file.size for file in files) >= SMALL else workers.THIS_PROCESS
        for block in pool.map(parse, None, _items(files)):
            if block.error:
                raise block.error
            if block.is_end:
                file = files[block.file]
                require_rows(file.name, found)
                label = split_of_file(file.name) if how.split == FROM_FILE_NAMES else how.split
                conversions.append(
                    conversion_of(shapes, how.pairs, file.name, file.source, how.layout, how.mapping, label, how.think)
                )
                shapes, found = Shapes(), Found()
                continue
            shapes.update(block.shapes)
            rows, readable = found.rows + len(block.lines), found.readable + block.shapes.total()
            found = Found(rows, readable, found.problem if found.rows else block.problem)
            self._add(block)
        return conversions

    def _add(self, block: ParsedBlock) -> None:
        for line in block.lines:
            self.rows.append_encoded(line)
            self.size += len(line)
        self._ends.append(len(self.rows))
        self._files.append(block.file)

    def parts(self, conversions: Sequence[Conversion]) -> Iterator[Part]:
        """Args:
        conversions: of each file.
        """
        start, row, file = 0, 0, -1
        for end, number in zip(self._ends, self._files, strict=True):
            row = row if number == file else 0
            yield Part(number, conversions[number], row, [*self.rows.encoded(range(start, end))])
            row += end - start
            start, file = end, number


# --- rows -> records


class Part(NamedTuple):
    """Consecutive rows of a file."""

    file: int
    how: Conversion
    first: int
    """Number of the first row in the file."""
    lines: list[bytes]


class ConvertedPart(NamedTuple):
    """Records of consecutive rows of a file, or entries of pairs."""

    file: int
    lines: list[bytes]
    """Encoded."""
    rows: list[int]
    """Number of the source row of each."""
    ids: list[str]
    """`example_id` of each; empty for a half of a pair."""
    ignored: dict[int, list[str]]
    """Index of a record -> its fields that are ignored."""
    rich: set[int]
    """Indices of the records that need the columns of `rich_schema`."""
    distinct: list[Fields]
    fields: list[list[int]]
    """Of each record: indices in `distinct`."""
    halves: dict[int, dict[str, str]]
    """Index of an entry -> what it says about its other half."""
    problems: dict[int, tuple[bool, str]]
    """Index of a record without messages -> whether its content is unsupported, and what is wrong."""


def convert(_: None, part: Part) -> ConvertedPart:
    """Convert rows, in any process."""
    rows = (_row(part.first + index, line) for index, line in enumerate(part.lines))
    records = list(converted(part.how, rows))
    distinct, fields = numbered(records)
    halves = {index: record[HALF] for index, record in enumerate(records) if HALF in record}
    problems = {index: _problem(record) for index, record in enumerate(records) if _is_empty(record)}
    ignored = {index: record["ignored"] for index, record in enumerate(records) if "ignored" in record}
    rich = {index for index, record in enumerate(records) if is_rich(record)}
    numbers, ids = [record["source_row"] for record in records], [record.get("example_id", "") for record in records]
    plain = set() if part.how.pairs else {*range(len(records))} - rich  # all values are texts and integers
    lines = [encode_finite(record) if index in plain else encode(record) for index, record in enumerate(records)]
    return ConvertedPart(part.file, lines, numbers, ids, ignored, rich, distinct, fields, halves, problems)


def _row(number: int, line: bytes) -> Row:
    row = decode(line)
    return Row(number, **row)


def _is_empty(record: Mapping[str, Any]) -> bool:
    return not any(record.get(name) for name in ("messages", "prompt", "chosen", "rejected"))


def _problem(record: Mapping[str, Any]) -> tuple[bool, str]:
    meta = json.loads(record["meta"])
    return "unsupported" in meta, f"  {record['source']}:{record['source_row']}: {meta.get('problem', '')}"


class _Adding:
    """Adds the records of one source."""

    def __init__(self, records: Records, second: dict[int, int], facts: Facts, limit: int | None) -> None:
        self._records, self._second, self._facts, self._limit = records, second, facts, limit
        self._halves, self._file, self._last = Halves(), -1, -1

    @property
    def is_full(self) -> bool:
        return self._limit is not None and self._facts.records >= self._limit

    def add(self, part: ConvertedPart, how: Conversion) -> None:
        if part.file != self._file:
            self._halves, self._file, self._last = Halves(), part.file, -1
        shapes: Counter[int] = Counter()
        for index, row in enumerate(part.rows):
            if not self._keep(part, index):
                continue
            shapes.update(part.fields[index])
            if row != self._last:
                self._facts.rows[how.source] += 1
                self._last = row
            if index in part.problems:
                self._refused(*part.problems[index])
        for index, rows in shapes.items():
            self._facts.fields.add(part.distinct[index], rows)

    def _keep(self, part: ConvertedPart, index: int) -> bool:
        """Store a record, or a half of a pair, unless it is beyond the limit.

        The number of a half that is not stored is -1.
        """
        number, half = -1 if self.is_full else len(self._records), part.halves.get(index)
        partner = self._halves.partner(half, number) if half else None
        if partner is None and number >= 0:
            self._facts.records += 1
        elif partner is not None and partner >= 0:
            self._second[partner] = len(self._records)
        else:
            return False
        self._records.add(part, index)
        return True

    def _refused(self, is_unsupported: bool, problem: str) -> None:
        if is_unsupported:
            self._facts.unsupported += 1
        else:
            self._facts.unreadable += 1
        if len(first := self._facts.problems[is_unsupported]) < 3:
            first.append(problem)
