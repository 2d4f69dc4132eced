"""Takes rows out of a file of examples.

Text files keep the bytes of all other rows; Parquet and gzip files are written again. Either way the rows read from the
result are compared with the original ones.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
from collections.abc import Callable, Collection, Iterator
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.text import many
from dagster_project.curation.sources.files import LENIENT, MAX_ROW_BYTES, is_mmlu, read_blocks, rows_of, suffix_of
from dagster_project.curation.sources.table_limits import written_out
from dagster_project.lineage.scratch_folder import scratch_folder

Rows = Collection[int]


def without(path: Path, rows: Rows, name: str, may_be_empty: bool = False, root: Path | None = None) -> bytes:
    """The content of a file without some rows.

    Args:
        rows: as a ledger numbers them (`source_row`).
        name: of the file, for messages.
        may_be_empty: whether a file without rows can be read.
        root: project in whose folder a temporary copy is written; None: that of the file.
    Raises:
        InputError: the file type is not supported, no row would be left, or the
            result would not have exactly the other rows.
    """
    suffix = suffix_of(path)
    if suffix not in WRITERS:
        raise InputError(
            f"{name}: rows cannot be taken out of a file of type {suffix}",
            "write it as .jsonl or .parquet, and run the pipeline",
        )
    before = rows_of(read_blocks(path))
    if outside := sorted(row for row in rows if row >= len(before)):
        raise InputError(
            f"{name} has {many(len(before), 'row')}, and no row {outside[0]}", "run the pipeline, then ask again"
        )
    kept = [row for row in before if row.source_row not in rows]
    if not kept and not may_be_empty:
        raise InputError(
            f"{name}: all of its rows would be taken out",
            "take the source out of params.yaml and delete the file, run the pipeline, then ask again",
        )
    content = WRITERS[suffix](path.read_bytes(), rows)
    with scratch_folder(root or path.parent) as folder:
        copy = folder / path.name
        copy.write_bytes(content)
        after = rows_of(read_blocks(copy))
    if [(row.value, row.raw) for row in after] != [(row.value, row.raw) for row in kept]:
        raise InputError(
            f"{name}: its rows cannot be taken out without a change of others",
            "take them out by hand, run the pipeline, then ask again",
        )
    return content


def _unzipped(writer: Callable[[bytes, Rows], bytes]) -> Callable[[bytes, Rows], bytes]:
    return lambda content, rows: gzip.compress(writer(gzip.decompress(content), rows), mtime=0)


def _lines(content: bytes) -> Iterator[tuple[bytes, bool]]:
    """Each line, and whether the reader counts it as blank: only the first one can have a byte order mark."""
    for number, line in enumerate(_by_newline(content)):
        text = line if number else line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line, len(line) <= MAX_ROW_BYTES and not text.decode().strip()
        except UnicodeDecodeError:
            yield line, False


def _json_lines(content: bytes, rows: Rows) -> bytes:
    kept, number = [], -1
    for line, is_blank in _lines(content):
        number += not is_blank
        if is_blank or number not in rows:
            kept.append(line)
    return b"".join(kept)


def _by_newline(content: bytes) -> Iterator[bytes]:
    """Lines as the reader has them: only a newline ends one."""
    yield from io.BytesIO(content)


def _json_list(content: bytes, rows: Rows) -> bytes:
    """Elements of a list, each with the comma and the white space before the
    next one; of the last ones with those after the one before."""
    text = content.removeprefix(codecs.BOM_UTF8).decode()
    spans: list[tuple[int, int]] = []
    at = _next(text, _next(text, 0) + 1)
    while text[at] != "]":
        _, end = LENIENT.raw_decode(text, at)
        spans.append((at, end))
        at = _next(text, end)
        at = _next(text, at + 1) if text[at] == "," else at
    kept = [span for number, span in enumerate(spans) if number not in rows]
    if not kept:
        return content
    between = [text[end:start] for (_, end), (start, _) in pairwise(spans)]
    numbers = [number for number in range(len(spans)) if number not in rows]
    parts = [text[: spans[0][0]], text[slice(*kept[0])]]
    for before, number in pairwise(numbers):
        parts += [between[before], text[slice(*spans[number])]]
    return b"".join(
        [
            codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b"",
            "".join([*parts, text[spans[-1][1] :]]).encode(),
        ]
    )


def _next(text: str, at: int) -> int:
    """Position of the next character that is not white space."""
    while text[at] in " \t\r\n":
        at += 1
    return at


def _csv(content: bytes, rows: Rows) -> bytes:
    lines = [*_by_newline(content)]
    first = lines[0].removeprefix(codecs.BOM_UTF8) if lines else b""
    reader = csv.reader((line.decode("utf-8", "surrogateescape") for line in [first, *lines[1:]]), strict=True)
    records, start = [], 0
    usual = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        for fields in reader:
            if fields:
                records.append((start, reader.line_num, fields))
            start = reader.line_num
    finally:
        csv.field_size_limit(usual)
    has_header = not (records and all(is_mmlu(fields) for _, _, fields in records[:2]))
    removed = {
        line
        for number, (begin, end, _) in enumerate(records[has_header:])
        if number in rows
        for line in range(begin, end)
    }
    return b"".join(line for number, line in enumerate(lines) if number not in removed)


def _paragraphs(content: bytes, rows: Rows) -> bytes:
    """Paragraphs with the blank lines after them."""
    kept, number, inside = [], -1, False
    for line, is_blank in _lines(content):
        number += not is_blank and not inside
        inside = not is_blank
        if number not in rows:
            kept.append(line)
    return b"".join(kept)


def _parquet(content: bytes, rows: Rows) -> bytes:
    """The table without the rows, with its schema, and the compression of its first column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(content))
    packed = file.metadata.row_group(0).column(0).compression.lower() if file.metadata.num_row_groups else "zstd"
    sink = io.BytesIO()
    pq.write_table(_filtered(file.read(), rows), sink, compression="none" if packed == "uncompressed" else packed)
    return sink.getvalue()


def _arrow(content: bytes, rows: Rows) -> bytes:
    """The table without the rows, with its schema, as a file or stream as it was, and without compression.

    The file does not say which it had.
    """
    import pyarrow as pa

    is_file = content.startswith(b"ARROW1")
    with pa.ipc.open_file(content) if is_file else pa.ipc.open_stream(content) as reader:
        table = _filtered(reader.read_all(), rows)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) if is_file else pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _filtered(table: Any, rows: Rows) -> Any:
    """A table without rows, and without their values in what its columns share.

    Views, which share too, are written out.
    """
    import pyarrow as pa

    kept = [number not in rows for number in range(table.num_rows)]
    mask = pa.array(kept, pa.bool_())
    columns = [
        (
            pa.array(
                [*compress(column.to_pylist(), kept)], written_out(column.type)
            )  # filtered, such a column would still have all values
            if _shares(column.type)
            else column.filter(mask).combine_chunks()
        )
        for column in table.columns
    ]
    schema = pa.schema([field.with_type(written_out(field.type)) for field in table.schema], table.schema.metadata)
    return pa.Table.from_arrays(columns, schema=schema)


def _shares(kind: Any) -> bool:
    """Whether rows of a column refer to values that are stored once, at any depth."""
    import pyarrow as pa

    shared = (pa.types.is_dictionary, pa.types.is_string_view, pa.types.is_binary_view)
    return any(test(kind) for test in shared) or any(_shares(kind.field(i).type) for i in range(kind.num_fields))


WRITERS: dict[str, Callable[[bytes, Rows], bytes]] = {
    ".json": _json_list,
    ".json.gz": _unzipped(_json_list),
    ".jsonl": _json_lines,
    ".jsonl.gz": _unzipped(_json_lines),
    ".csv": _csv,
    ".txt": _paragraphs,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}
