"""Rows of shards and training evidence -> sorted chunks of keys, from which the index looks up records and texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.messages import argument_texts, calls
from dagster_project.lineage import tables

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

EVIDENCE = "examples.parquet"
"""Training evidence in a model's folder: the examples it was trained on, with step and epoch."""
ANSWERS = "answers/"
"""In a model's folder: the answers that it sampled and was rewarded for, as tables."""
ANSWER_COLUMNS = ("step", "example_id", "answer", "reasoning", "reward", "tokens", "unfinished")
"""Their columns; the others are the components of the reward."""
ORDER_UNKNOWN = "order_unknown.json"
"""In its place if the user's own training command did not record the order of the examples."""
LEDGER, OVERLAPS = "ledger.parquet", "overlaps.parquet"
"""Tables in a data set's folder: the outcome of every row, and the pairs of rows that repeat each other."""
AUGMENTED, COPY_OF = "augmented:", "copy of "
"""How the ledger of `splits` describes a copy: its outcome, with the kind of
copy, and its reason, with the id of the original."""
EDITED = "edited"
"""How an index names a record that a review file edited, and the beginning of
its reason in the ledger of `instructions` or `preferences`."""
CHUNK = 256
"""Rows per chunk: the amount that one lookup reads."""


def record_key(example_id: str) -> bytes:
    """16-byte key of a record: its example_id, a hexadecimal hash, as bytes."""
    with suppress(ValueError):
        if len(example_id) == 32:
            return bytes.fromhex(example_id)
    return hashlib.sha256(example_id.encode()).digest()[:16]


def _record_keys(ids: Sequence[str]) -> bytes:
    with suppress(ValueError):
        if set(map(len, ids)) <= {32}:
            return bytes.fromhex("".join(ids))
    return b"".join(map(record_key, ids))


def text_key(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).digest()[:16]


def canonical_json(text: str) -> str:
    """A JSON object or list in one spelling; other texts as they are."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.dumps(json.loads(text), ensure_ascii=False, sort_keys=True)
    except (ValueError, RecursionError):
        return text


def call_texts(tool_calls: str) -> Iterator[str]:
    """The arguments of each call, and each text in them: '[{"function":
    {"arguments": {"city": "Oslo"}}}]'  ->  '{"city": "Oslo"}', "Oslo"."""
    for call in calls({"tool_calls": json.loads(tool_calls)}):
        if isinstance(call.arguments, str):
            yield call.arguments
            continue
        yield json.dumps(call.arguments, ensure_ascii=False, sort_keys=True)
        yield from (text for _, text in argument_texts(call.arguments) if isinstance(text, str))


def equal(keys: bytes, key: bytes) -> np.ndarray:
    import numpy as np

    return (np.frombuffer(keys, np.uint64).reshape(-1, 2) == np.frombuffer(key, np.uint64)).all(axis=1)


class RowCollector:
    """Collects rows of many files and writes them as sorted chunks."""

    def __init__(self) -> None:
        self.size = 0
        self._records: list[tuple[bytes, Any, Any, Any]] = []
        self._texts: list[tuple[bytes, bytes]] = []
        self._text_keys: dict[str, bytes] = {}

    def add_evidence(self, path: Path, content: int) -> dict[str, int]:
        import numpy as np

        table = tables.read(path, ["example_id", "step", "epoch"])
        steps, epochs = (table[name].to_numpy().astype(np.int32) for name in ("step", "epoch"))
        self._add_records(table["example_id"].to_list(), content, steps, epochs)
        return {}

    def add_shard(self, path: Path, content: int) -> dict[str, int]:
        """Add the rows of a shard. Returns source -> number of rows."""
        import numpy as np

        names = tables.column_names(path)
        text_columns = [name for name in ("messages", "prompt", "chosen", "rejected") if name in names]
        table = tables.read(path, ["example_id", *(["source"] if "source" in names else []), *text_columns])
        ids = table["example_id"].to_list()
        keys = self._add_records(ids, content, np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32))
        for name in text_columns:
            self._add_texts(keys, table[name])
        if "source" not in names:
            return {}
        return {str(source): rows for source, rows in table.group_by("source", maintain_order=True).len().iter_rows()}

    def _add_records(self, ids: list[str], content: int, steps: np.ndarray, epochs: np.ndarray) -> bytes:
        import numpy as np

        keys = _record_keys(ids)
        self._records.append((keys, np.full(len(ids), content, np.int32), steps, epochs))
        self.size += len(ids)
        return keys

    def _add_texts(self, keys: bytes, column: pl.Series) -> None:
        """Add the texts of a column of messages or strings: of messages also reasoning and arguments of calls."""
        import numpy as np
        import polars as pl

        if not isinstance(column.dtype, pl.List):
            self._add_owned(np.frombuffer(keys, "V16"), column.to_list())
            return
        sizes, fields = tables.flattened(column)
        owners = np.repeat(np.frombuffer(keys, "V16"), sizes)
        for name in fields:
            if name in {"content", "reasoning_content"}:
                self._add_owned(owners, fields[name].to_list())
        if "tool_calls" in fields:
            given = [[*call_texts(text)] if text else [] for text in fields["tool_calls"].to_list()]
            self._add_owned(
                np.repeat(owners, [len(texts) for texts in given]), [text for texts in given for text in texts]
            )

    def _add_owned(self, owners: np.ndarray, texts: Sequence[str | None]) -> None:
        """Add texts, each with the key of the record that it is in."""
        import numpy as np

        text_keys = self._text_keys
        for text in texts:
            if text and text not in text_keys:
                text_keys[text] = text_key(text)
        nonempty = np.array([bool(text) for text in texts], np.bool_)
        self._texts.append((b"".join(text_keys[text] for text in texts if text), owners[nonempty].tobytes()))
        if len(text_keys) > 100_000:
            text_keys.clear()

    def record_chunks(self) -> Iterator[tuple[bytes, ...]]:
        import numpy as np

        columns = [np.concatenate(column) for column in zip(*(row[1:] for row in self._records), strict=True)]
        yield from _chunks(b"".join(row[0] for row in self._records), columns)

    def text_chunks(self) -> Iterator[tuple[bytes, ...]]:
        import numpy as np

        yield from _chunks(
            b"".join(row[0] for row in self._texts), [np.frombuffer(b"".join(row[1] for row in self._texts), "V16")]
        )


def _chunks(keys: bytes, columns: Sequence[np.ndarray]) -> Iterator[tuple[bytes, ...]]:
    """(first 8 bytes, keys, column, ...) per chunk, with rows sorted by key.

    Rows with the same key are in the same chunk.
    """
    import numpy as np

    if not keys:
        return
    records = np.frombuffer(keys, "V16")
    leading = np.frombuffer(keys, ">u8")[::2].astype(np.uint64)
    order = np.argsort(leading, kind="stable")
    leading = leading[order]
    key_starts = np.flatnonzero(np.diff(leading, prepend=~leading[:1]))  # first row of each distinct key
    starts = np.unique(key_starts[np.searchsorted(key_starts, np.arange(0, len(leading), CHUNK), side="right") - 1])
    for start, stop in zip(starts, [*starts[1:], len(leading)], strict=True):
        rows = order[start:stop]
        chunk_keys = records[rows].tobytes()
        yield (chunk_keys[:8], chunk_keys, *(column[rows].tobytes() for column in columns))


def rewarded_answers(shards: Sequence[Path]) -> dict[str, Any]:
    """How many answers to how many records a model learned from, in how many steps, and the names of the rewards."""
    import polars as pl

    table = pl.concat([tables.read(path, ["example_id", "step"]) for path in shards])
    rewards = [name for name in tables.column_names(shards[0]) if name not in ANSWER_COLUMNS]
    return {
        "answers": table.height,
        "records": table["example_id"].n_unique(),
        "steps": table["step"].n_unique(),
        "rewards": rewards,
    }


def summarize_training(evidence: Path, shards: Mapping[str, Path]) -> list[tuple[str, str, int, int, int]]:
    """(shard hash, source, records, first step, last step) of a model's training on each shard and source."""
    import polars as pl

    parts = [
        tables.read(path, ["example_id", "source"]).with_columns(shard=pl.lit(md5)) for md5, path in shards.items()
    ]
    first, last = pl.col("step").min().alias("first"), pl.col("step").max().alias("last")
    steps = tables.read(evidence, ["example_id", "step"]).group_by("example_id").agg(first, last)
    joined = pl.concat(parts).join(steps, on="example_id").group_by("shard", "source")
    rows = joined.agg(pl.col("example_id").n_unique(), pl.col("first").min(), pl.col("last").max())
    return sorted(rows.rows(), key=str)


def contributions(path: Path, name: str) -> tuple[list[tuple[str, int, bytes]], list[tuple[bytes, bytes, str]]]:
    """What a ledger or a table of overlaps says about rows that contributed to a record of another row.

    Returns:
        (source, source_row, key of the record) of every copy that was dropped; and (key of the
        row, key of the record, how) of every record that was made from another one: repaired,
        copied, paraphrased, or kept in place of a copy; and of every edited record itself.
    """
    import polars as pl

    if name == OVERLAPS:
        table = tables.read(path, ["check", "source", "source_row", "example_id", "other"])
        rows = table.filter(pl.col("check") == "exact_duplicates").rows(named=True)
        credits = [(row["source"], row["source_row"], record_key(row["other"])) for row in rows]
        different = [row for row in rows if row["example_id"] != row["other"]]
        return credits, [(record_key(row["example_id"]), record_key(row["other"]), "kept instead") for row in different]
    names = tables.column_names(path)
    table = tables.read(path, ["example_id", "outcome", "why", *(["source_id"] if "source_id" in names else [])])
    added = table.filter(pl.col("outcome").str.starts_with(AUGMENTED)).rows(named=True)
    derived = [
        (
            record_key(row["why"].removeprefix(COPY_OF)),
            record_key(row["example_id"]),
            row["outcome"].removeprefix(AUGMENTED),
        )
        for row in added
        if row["why"].startswith(COPY_OF)
    ]
    if "source_id" in names:
        repaired = table.filter(pl.col("source_id").is_not_null()).rows(named=True)
        derived += [(record_key(row["source_id"]), record_key(row["example_id"]), "repaired") for row in repaired]
    edited = map(record_key, table.filter(pl.col("why").str.starts_with(f"{EDITED}: "))["example_id"].to_list())
    derived += [(key, key, EDITED) for key in edited]
    return [], derived
