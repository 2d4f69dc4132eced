"""The canonical record, its Parquet shards, the row ledger and the report: the formats that stages exchange."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, wraps
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import orjson

from dagster_project.core import messages as message_fields
from dagster_project.core import workers
from dagster_project.core.chat import is_text
from dagster_project.core.files import replacing
from dagster_project.core.imports import use_arrow_without_pandas
from dagster_project.core.messages import Messages, Tools
from dagster_project.core.stored_rows import StoredRows, decode
from dagster_project.core.text import json_text

if TYPE_CHECKING:
    # imported inside functions: Dagster loads every stage module, and importing Arrow takes longer than all of them
    import pyarrow as pa

P = ParamSpec("P")
T = TypeVar("T")


def uncollected(function: Callable[P, T]) -> Callable[P, T]:
    """Disable Python's cyclic garbage collector during a call: it would traverse millions of rows without cycles."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        collecting = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if collecting:
                gc.enable()

    return call


@cache
def record_schema() -> pa.Schema:
    """The canonical record."""
    import pyarrow as pa

    columns = [
        ("example_id", pa.string()),  # content hash of the canonical messages: the same on every machine
        ("source", pa.string()),  # path of the file it came from, relative to the project
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("category", pa.string()),  # nullable
        ("group_id", pa.string()),  # cluster of near-duplicates; null until `instructions` sets it
        ("meta", pa.string()),  # JSON: the fields of the source row other than the messages
    ]
    return pa.schema(columns)


@cache
def pair_schema() -> pa.Schema:
    """The canonical preference pair."""
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns = [
        ("example_id", pa.string()),  # content hash of prompt, chosen and rejected
        ("source", pa.string()),
        ("prompt", messages),  # ends with a user turn
        ("chosen", messages),  # the turns after the prompt, beginning with the assistant
        ("rejected", messages),
        ("margin", pa.float64()),  # nullable: how much better `chosen` is, in the source's unit
        ("category", pa.string()),  # nullable
        ("group_id", pa.string()),  # cluster of pairs with nearly the same prompt; null until `preferences` sets it
        ("meta", pa.string()),  # JSON: the other fields of the source row
    ]
    return pa.schema(columns)


@cache
def ledger_schema(repaired: bool = False) -> pa.Schema:
    """Outcome of each source row.

    Args:
        repaired: include the columns for repaired and edited rows.
    """
    import pyarrow as pa

    columns = [
        ("source", pa.string()),
        ("source_row", pa.int64()),  # 0-based row in the source file
        ("example_id", pa.string()),
        ("outcome", pa.string()),  # kept, dropped:<check>, a split's name, truncated, ...
        ("why", pa.string()),
    ]
    more = [
        ("source_id", pa.string()),  # example_id of the row as it was read; null where it is the same
        ("repaired", pa.list_(pa.string())),  # checks it was repaired for; null where it was not
    ]
    return pa.schema(columns + (more if repaired else []))


def example_id(messages: Messages, tools: Tools = None, plain_text: bool = False) -> str:
    """Content hash of everything that can change what is trained: sha256 over canonical JSON, 128 bits in hex.

    Records without tools, reasoning, calls or weights have the hash of [[role, content], ...].

    Args:
        plain_text: whether it is a text to continue (`chat.is_text`), which is trained on without a chat template. A
            conversation that has the same single message differs from it in its hash.
    """
    parts = message_fields.identity_parts(messages, tools)
    if not plain_text and [message["role"] for message in messages] == ["assistant"]:
        parts.append({"kind": "conversation"})
    return hashlib.sha256(_canonical(parts, is_plain=not tools and message_fields.is_plain(messages))).hexdigest()[:32]


def _canonical(parts: list[Any], is_plain: bool) -> bytes:
    """Canonical JSON in UTF-8.

    Args:
        is_plain: whether all values are texts, which orjson writes as `JSON` does.
    """
    if is_plain:
        try:
            return orjson.dumps(parts)
        except orjson.JSONEncodeError:  # an unpaired surrogate
            pass
    return message_fields.JSON.encode(parts).encode("utf-8", "surrogatepass")


def pair_id(prompt: Messages, chosen: Messages, rejected: Messages, tools: Tools = None) -> str:
    """Content hash of a preference pair."""
    turns = {"chosen": chosen, "rejected": rejected}
    sides = [{"role": side, "content": message_fields.JSON.encode(_ordered(said))} for side, said in turns.items()]
    return example_id([*prompt, *sides], tools)


def _ordered(messages: Messages) -> list[dict[str, Any]]:
    """Messages with their keys in canonical order, so that equal messages have equal JSON."""
    return [
        {key: message[key] for key in ("role", "content", *message_fields.FIELDS) if key in message}
        for message in messages
    ]


def content_id(record: Mapping[str, Any]) -> str:
    """`example_id` of a record or, for a pair in the form that checks use (`formats.as_record`), `pair_id`."""
    messages, prompt_length, tools = record["messages"], record.get("asked"), record.get("tools")
    if prompt_length is None:
        return example_id(messages, tools, is_text(record))
    return pair_id(messages[:prompt_length], messages[prompt_length:], record["rejected"], tools)


def prompt_text(messages: Messages) -> str:
    """Content of all user turns. System prompts are excluded, because whole sets share them."""
    return "\n".join(m["content"] for m in messages if m["role"] == "user")


def response_text(messages: Messages) -> str:
    """Content of the last message if it is the assistant's, else the empty string."""
    return messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""


def is_labeled(record: Mapping[str, Any]) -> bool:
    """Whether the response is the category, as in a classification set."""
    return bool(record.get("category")) and response_text(record["messages"]) == record["category"]


def subject_text(messages: Messages) -> str:
    """The text by which rows are compared: the prompt or, for plain text, the response."""
    return prompt_text(messages) or response_text(messages)


def _shards(rows: Iterable[T], id_of: Callable[[T], str]) -> Iterator[list[T]]:
    """The rows of each shard; one without rows if there are none.

    A boundary depends only on the row before it, so that a local edit changes few shards.
    """
    shard: list[T] = []
    is_first = True
    for row in rows:
        shard.append(row)
        if (len(shard) >= 256 and int(id_of(row)[:4] or "0", 16) % 1024 == 0) or len(shard) >= 8192:
            yield shard
            shard, is_first = [], False
    if shard or is_first:
        yield shard


ROW_GROUP = 1024 * 1024
"""Rows in a row group of a Parquet file: pyarrow's default. Only one group is in memory."""
BATCH = 8192
"""Rows that are Python objects at the same time while a table is read or written."""


def write_table(path: Path | io.BytesIO, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows to one Parquet file, on disk or in memory; the same rows give the same bytes."""
    import pyarrow as pa

    use_arrow_without_pandas()
    write_tables(path, (pa.Table.from_pylist(part, schema=schema) for part in _batches(rows)), schema)


def write_tables(path: Path | io.BytesIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """As `write_table`, of rows in tables of this schema.

    However they are divided into tables, the bytes are the same.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    use_arrow_without_pandas()
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    parts, size = [schema.empty_table()], 0
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=True) as writer:
        written = False
        for table in tables:
            parts.append(table)
            size += len(table)
            while size >= ROW_GROUP:
                whole = pa.concat_tables(parts)
                writer.write_table(whole.slice(0, ROW_GROUP).combine_chunks(), row_group_size=ROW_GROUP)
                parts, size, written = [whole.slice(ROW_GROUP)], size - ROW_GROUP, True
        if size or not written:
            writer.write_table(pa.concat_tables(parts).combine_chunks(), row_group_size=ROW_GROUP)


def read_lines(lines: Sequence[bytes], schema: pa.Schema) -> pa.Table:
    """Fields of rows that `stored_rows` encoded, by column, without Python objects for them.

    Those that a row lacks are null.

    Args:
        schema: of texts, integers, and lists and objects of them; without the columns of `rich_schema`.
    """
    import pyarrow as pa
    from pyarrow import json as arrow_json

    data = b"\n".join(lines)
    if 0 < len(data) < MOST_BYTES:
        options = arrow_json.ReadOptions(use_threads=False, block_size=len(data))
        parsing = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        try:
            return arrow_json.read_json(pa.BufferReader(data), options, parsing)
        except pa.ArrowInvalid:  # half of a surrogate pair, for example, which is an error below as well
            pass
    return pa.Table.from_pylist([*map(decode, lines)], schema=schema)


MOST_BYTES = 2**31 - 1
"""Bytes that Arrow parses at once."""


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    left = iter(rows)
    while batch := list(islice(left, BATCH)):
        yield batch


@uncollected
def write_records(
    folder: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema | None = None, rich: bool | None = None
) -> None:
    """Write a data set to a folder of shards, records-00000.parquet and so on, in the given order.

    Default schema: the canonical record.

    Args:
        rows: only one shard of them is kept in memory.
        rich: whether any of them `is_rich`; None: look at all of them before they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schema = schema or record_schema()
    rich = any(is_rich(row) for row in rows) if rich is None else rich
    schema = rich_schema(schema) if rich else schema
    for number, shard in enumerate(_shards(rows, lambda row: row["example_id"])):
        write_table(_shard_path(folder, number), map(_stored, shard) if rich else shard, schema)


class StoredPart(NamedTuple):
    """Some stored rows that become one data set."""

    folder: Path
    indices: Sequence[int]
    """Of the rows, in the order in which they are written."""
    rich: bool
    """Whether any of the rows `is_rich`."""
    more: Mapping[str, Sequence[str]]
    """Fields to add to each row, or to replace: their values in the order of `indices`."""


def write_stored_records(rows: StoredRows, ids: Sequence[str], schema: pa.Schema, parts: Iterable[StoredPart]) -> None:
    """As `write_records` for each part, with each shard encoded by one of the stage's workers.

    Args:
        ids: example_id of every stored row.
    """
    paths: list[Path] = []

    def shards() -> Iterator[_Shard]:
        for part in parts:
            part.folder.mkdir(parents=True, exist_ok=True)
            start = 0
            for number, shard in enumerate(_shards(part.indices, ids.__getitem__)):
                paths.append(_shard_path(part.folder, number))
                more = {name: [*values[start : start + len(shard)]] for name, values in part.more.items()}
                start += len(shard)
                yield _Shard(part.rich, more, [*rows.encoded(shard)])

    for number, data in enumerate(workers.current().map(_encoded_shard, schema, shards())):
        paths[number].write_bytes(data)


class _Shard(NamedTuple):
    rich: bool
    more: Mapping[str, Sequence[str]]
    lines: Sequence[bytes]


def _encoded_shard(schema: pa.Schema, shard: _Shard) -> bytes:
    """The bytes of a Parquet file with some stored rows."""
    import pyarrow as pa

    file = io.BytesIO()
    if shard.rich:
        rows = [decode(line) for line in shard.lines]
        for name, values in shard.more.items():
            for row, value in zip(rows, values, strict=True):
                row[name] = value
        write_table(file, map(_stored, rows), rich_schema(schema))
        return file.getvalue()
    table = read_lines(shard.lines, schema)
    for name, values in shard.more.items():
        at = schema.get_field_index(name)
        table = table.set_column(at, schema.field(at), pa.array(values, schema.field(at).type))
    write_tables(file, [table], schema)
    return file.getvalue()


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"records-{number:05d}.parquet"


CONVERSATIONS = ("messages", "prompt", "chosen", "rejected")
"""Columns with messages."""


def rich_schema(schema: pa.Schema) -> pa.Schema:
    """A schema of records or pairs with `tools` and the optional fields of messages.

    A data set has these columns if any of its rows needs them, so that sets of plain text keep their bytes.
    """
    import pyarrow as pa

    texts = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
    message = pa.struct([*((name, pa.string()) for name in texts), ("weight", pa.float64())])
    columns: list[tuple[str, pa.DataType]] = []
    for column in schema:
        columns.append((column.name, pa.list_(message) if column.name in CONVERSATIONS else column.type))
        if column.name in {"messages", "rejected"}:  # the last column with messages
            columns.append(("tools", pa.string()))  # JSON: the functions that the assistant may call; null for none
    return pa.schema(columns)


def is_rich(row: Mapping[str, Any]) -> bool:
    """Whether a row needs the columns of `rich_schema`."""
    conversations = (row[name] or () for name in CONVERSATIONS if name in row)
    return bool(row.get("tools")) or not all(map(message_fields.is_plain, conversations))


def _stored(row: Mapping[str, Any]) -> dict[str, Any]:
    sides = {name: message_fields.stored(row[name] or ()) for name in CONVERSATIONS if name in row}
    return {**row, **sides, "tools": message_fields.JSON.encode(row["tools"]) if row.get("tools") else None}


def loaded(row: dict[str, Any]) -> dict[str, Any]:
    """A row as `write_records` got it."""
    if "tools" not in row:
        return row
    sides = {name: message_fields.loaded(row[name] or ()) for name in CONVERSATIONS if name in row}
    tools = {"tools": json.loads(row["tools"])} if row["tools"] else {}
    return {key: value for key, value in row.items() if key != "tools"} | sides | tools


def read_arrow(file: Path | io.BytesIO, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a Parquet file, by default all. `read_table` of pyarrow would import pandas first.

    Raises:
        KeyError: a column that the file does not have.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        if missing := {*(columns or ())} - {*opened.schema_arrow.names}:
            raise KeyError(*sorted(missing))
        return opened.read(columns)


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file written by `write_table` or `write_records`.

    Args:
        columns: names of columns. `tools` may be missing from the file.
    """
    import pyarrow.parquet as pq

    if columns and "tools" in columns and "tools" not in pq.read_schema(path).names:
        columns = [name for name in columns if name != "tools"]
    table = read_arrow(path, columns)
    rows = table.to_pylist()
    return [loaded(row) for row in rows] if "tools" in table.column_names else rows


def iter_table(path: Path | io.BytesIO) -> Iterator[dict[str, Any]]:
    """As `read_table`, with one batch of rows in memory. The file may be in memory."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH):
            rows = batch.to_pylist()
            yield from map(loaded, rows) if "tools" in batch.schema.names else rows


def iter_records(folder: Path) -> Iterator[dict[str, Any]]:
    """As `read_records`, with one batch of rows in memory."""
    for shard in sorted(folder.glob("records-*.parquet")):
        yield from iter_table(shard)


@uncollected
def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read the rows written by `write_records`, in order."""
    return [row for shard in sorted(folder.glob("records-*.parquet")) for row in read_table(shard)]


PREFERENCE = ("example_id", "prompt", "chosen", "rejected", "tools", "margin", "category", "group_id")
"""Columns of a pair that a trainer reads."""


@uncollected
def read_preferences(folder: Path) -> list[dict[str, Any]]:
    """The pairs of a split of `preferences`, in TRL's conversational form.

    {"example_id": "5d41...", "prompt": [user "Hi"], "chosen": [assistant "Hello"], "rejected": [assistant "What?"],
     "margin": None, "category": None, "group_id": "5d41..."}
    """
    return [row for shard in sorted(folder.glob("records-*.parquet")) for row in read_table(shard, PREFERENCE)]


IGNORED = "ignored: "
"""Prefix of `why` in the ledgers of `raw_examples` and `raw_preferences` for a row with fields that are not used."""


def ignored_in(line: Mapping[str, Any]) -> dict[str, list[str]]:
    """The fields that a line of the ledger lists as ignored, as a record has them; empty if there are none."""
    why = line["why"] or ""
    return {"ignored": why.removeprefix(IGNORED).split(", ")} if why.startswith(IGNORED) else {}


READ, JOINED = "read", "joined"
"""Outcomes in the ledger of `raw_preferences`: the first row of a pair, and further rows of the same pair."""


def iter_pairs(folder: Path) -> Iterator[dict[str, Any]]:
    """The pairs that `raw_preferences` wrote, each with its `source_rows` and the first of them as `source_row`."""
    return with_source_rows(iter_records(folder), iter_ledger(folder))


def with_source_rows(pairs: Iterable[dict[str, Any]], ledger: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """As `iter_pairs`, of the rows of both tables."""
    rows: list[list[int]] = []
    ignored: list[dict[str, list[str]]] = []
    for line in ledger:
        if line["outcome"] == READ:
            rows.append([])
            ignored.append(ignored_in(line))
        rows[-1].append(line["source_row"])
    for pair, source_rows, names in zip(pairs, rows, ignored, strict=True):
        yield {**pair, "source_row": source_rows[0], "source_rows": source_rows, **names}


@uncollected
def write_ledger(folder: Path, rows: Iterable[dict[str, Any]], repaired: bool | None = None) -> None:
    """Args:
    repaired: whether any of the rows was repaired or edited; None: look at all rows before they are written.
    """
    if repaired is None:
        rows = rows if isinstance(rows, Sequence) else StoredRows(rows, folder.parent)
        repaired = any(line.get("source_id") for line in rows)
    write_table(folder / LEDGER, rows, ledger_schema(repaired))


def ledger_table(columns: Mapping[str, Any], repaired: bool = False) -> pa.Table:
    """A part of a ledger, by column. A text is the value of all rows, and `source_id` and `repaired` may be missing."""
    import pyarrow as pa

    schema, size = ledger_schema(repaired), len(columns["source_row"])
    arrays = []
    for name, type_ in zip(schema.names, schema.types, strict=True):
        values = columns.get(name)
        if values is None:
            values = pa.nulls(size, type_)
        elif isinstance(values, str):
            values = pa.repeat(pa.scalar(values, type_), size)
        elif not isinstance(values, pa.Array | pa.ChunkedArray):
            values = pa.array(values, type_)
        arrays.append(values)
    return pa.Table.from_arrays(arrays, schema=schema)


def ledger_line(record: Mapping[str, Any], source_row: int, outcome: str, why: str) -> dict[str, Any]:
    """Outcome of a source row that became a record, or part of one."""
    return {
        "source": record["source"],
        "source_row": source_row,
        "example_id": record["example_id"],
        "outcome": outcome,
        "why": why,
    }


@uncollected
def read_ledger(folder: Path) -> list[dict[str, Any]]:
    return read_table(folder / LEDGER)


def iter_ledger(folder: Path) -> Iterator[dict[str, Any]]:
    """As `read_ledger`, with one batch of rows in memory."""
    return iter_table(folder / LEDGER)


LEDGER = "ledger.parquet"


REWARD_METHODS = frozenset({"rloo", "grpo", "online_dpo", "ppo"})
"""Alignment methods that learn from the rewards of their own answers. The others only measure themselves by a reward
model."""


def learns_from_reward_model(aligned: Mapping[str, Any]) -> bool:
    """Whether a model is aligned by the scores of the reward model, not by pairs or rules alone.

    Args:
        aligned: its parameters or its report: "method", and "rewards" unless they are the default.
    """
    weights = aligned.get("rewards") or {"reward_model": 1}
    return aligned.get("method") in REWARD_METHODS and bool(weights.get("reward_model"))


def with_license(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A report's facts on a source or base model, with the current key: reports of earlier versions use `licence`."""
    return {"license" if key == "licence" else key: value for key, value in facts.items()}


@dataclass(frozen=True)
class CheckResult:
    """Result of one check of a stage, with the rows that violate it."""

    name: str
    passed: bool
    severity: str = "error"
    """"error", "warn" or "info"."""
    blocking: bool = False
    """A failed blocking check stops the stage before it writes its output."""
    count: int = 0
    """Rows that violate the check, including those dropped for it."""
    rows: list[str] = field(default_factory=list)
    """The first offending rows, as "source:row" (0-based)."""
    details: list[str] = field(default_factory=list)
    """Results in words, e.g. of the owner's expectations. Like `note` it quotes no row: git keeps reports for good."""
    note: str = ""
    dropped: int = 0
    """Rows dropped for this check and not for an earlier one."""
    waived: int = 0
    """Rows that violate it and are exempted by a waiver."""
    fixed: int = 0
    """Rows that violated it and were repaired and kept."""
    matches: list[dict[str, Any]] = field(default_factory=list)
    """The first overlaps, each with the places of both rows (curation/checks/findings.py)."""
    violations: list[dict[str, Any]] = field(default_factory=list)
    """Violated rules of the use policy: source, rows, rule and why (curation/sources/use_policy.py)."""

    def document(self) -> dict[str, Any]:
        """The fields other than the name, without empty ones."""
        optional = {"dropped", "waived", "fixed"}
        values = {key: value for key, value in asdict(self).items() if key != "name" and value not in ([], "")}
        return {key: value for key, value in values.items() if value or key not in optional}


@dataclass
class Report:
    """Report of a stage run. Written to data/reports/<stage>.json, which git tracks."""

    rows_in: int | None = None
    rows_out: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows. rows_in == rows_out + sum(dropped.values()), always."""
    fixed: dict[str, int] = field(default_factory=dict)
    """Check -> rows that were repaired for it and kept."""
    metrics: dict[str, Any] = field(default_factory=dict)
    checks: list[CheckResult] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    """Resources used by this run: bytes, seconds, tokens per second. Never in a tracked file, because it differs
    between runs."""

    def __post_init__(self) -> None:
        if self.rows_in is None or self.rows_out is None:
            return
        if self.rows_in != self.rows_out + sum(self.dropped.values()):
            raise AssertionError(f"rows lost: {self.rows_in} in, {self.rows_out} out, dropped {self.dropped}")

    @property
    def failures(self) -> list[CheckResult]:
        return [check for check in self.checks if check.blocking and not check.passed]

    def document(self) -> dict[str, Any]:
        """The JSON document, without empty parts; checks keyed by name."""
        document: dict[str, Any] = {}
        if self.rows_in is not None:
            document |= {"rows_in": self.rows_in, "rows_out": self.rows_out, "dropped": self.dropped}
        if self.fixed:
            document["fixed"] = self.fixed
        document |= self.metrics
        if self.checks:
            document["checks"] = {check.name: check.document() for check in self.checks}
        return document


def write_json(path: Path, document: Any) -> None:
    write_text(path, json_text(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write atomically, as `replacing`."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or folder if it exists. Symbolic links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
