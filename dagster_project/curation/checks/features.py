"""Records -> what checks that compare rows need of each: digests, labels and marks, without the texts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from dagster_project.core.messages import Message, Messages, Tools, calls
from dagster_project.core.records import content_id
from dagster_project.curation.checks.check import Rows, part_text
from dagster_project.curation.checks.overlaps import FIELDS, HELD_OUT, OTHERS, is_long
from dagster_project.curation.checks.row_checks import marks, sides, valid_roles
from dagster_project.curation.checks.tool_checks import WITH, WITHOUT, has_answer, has_reasoning
from dagster_project.curation.sources.formats import is_text

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

DIGESTS = ("identity", "same", "context", "answer", "swapped")
"""Digests of 16 bytes, each in two columns of 64 bits, because of a record: its `example_id`; its messages and tools;
what was asked, with the tools; what was answered; for pairs the answer with its sides swapped. Two different values
have the same digest with a probability of 2^-128."""
DIGEST_COLUMNS = tuple([f"{name}_{half}" for name in DIGESTS for half in (0, 1)])


@dataclass(frozen=True)
class Features:
    """One entry per record, in order. About 100 bytes a record."""

    table: pl.DataFrame
    """The digests; `present`: has messages; `rank`: of `HELD_OUT`; `reasoning`: WITH, WITHOUT or 0; `shape`: hash of
    the features on which a chat template's behavior depends, 0 for none."""
    labels: Mapping[int, str]
    """Index -> split of a row in its upstream data set."""
    rich: np.ndarray
    """Indices of the records with tools, or with a message that has more than role and content."""
    long: Mapping[str, np.ndarray]
    """Part of `FIELDS` -> indices of the records in which its text is long enough to be compared."""
    transcripts: int
    """Number of records that quote a transcript of a chat."""


def columns(rows: Rows) -> pl.DataFrame:
    """The features of a block of records, one row each.

    Those of `Features.table`; `label` as JSON; `transcript`, `rich` and one column per part of `FIELDS`, which are true
    or false.
    """
    import numpy as np
    import polars as pl

    digests = bytearray()
    for record, meta in zip(rows.records, rows.metas, strict=True):
        digests += _digests(record, meta)
    words = np.frombuffer(bytes(digests), "<u8").reshape(len(rows.records), 2 * len(DIGESTS))
    labels = [label if isinstance(label := meta.get("split"), str) else None for meta in rows.metas]
    transcripts = [mark is not None and mark.startswith("transcript") for mark in rows.shared(marks)]
    rich = {*rows.rich}
    long = {part: {i for i in rich if is_long(part_text(rows.records[i], part))} for part in FIELDS}
    size = range(len(rows.records))
    table = {
        **{name: words[:, i] for i, name in enumerate(DIGEST_COLUMNS)},
        "present": pl.Series([bool(record["messages"]) for record in rows.records], dtype=pl.Boolean),
        "rank": pl.Series([HELD_OUT.get(label or "", OTHERS) for label in labels], dtype=pl.UInt8),
        "reasoning": pl.Series([_reasoning(rows, i, i in rich) for i in size], dtype=pl.UInt8),
        "shape": pl.Series(_shapes(rows), dtype=pl.UInt64),
        "label": pl.Series([None if label is None else json.dumps(label) for label in labels], dtype=pl.String),
        "transcript": pl.Series(transcripts, dtype=pl.Boolean),
        "rich": pl.Series([i in rich for i in size], dtype=pl.Boolean),
        **{part: pl.Series([i in found for i in size], dtype=pl.Boolean) for part, found in long.items()},
    }
    return pl.DataFrame(table)


def features(table: pl.DataFrame) -> Features:
    """The features of a set, of its `columns`."""
    labelled = table["label"].is_not_null().arg_true()
    labels = table["label"].gather(labelled).to_list()
    return Features(
        table.select(*DIGEST_COLUMNS, "present", "rank", "reasoning", "shape").rechunk(),
        {i: sys.intern(json.loads(label)) for i, label in zip(labelled.to_list(), labels, strict=True)},
        _places(table["rich"]),
        {part: _places(table[part]) for part in FIELDS},
        int(table["transcript"].sum()),
    )


def _places(column: pl.Series) -> np.ndarray:
    """Indices of the records for which a column is true, (records,) int64."""
    import numpy as np

    return column.arg_true().to_numpy().astype(np.int64)


def tools_of(record: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """The definitions of the functions that the assistant may call, in a normal form; "" for none.

    Like a system prompt, they are context and not part of the question.
    """
    given = record.get("tools") or meta.get("tools") or meta.get("functions")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = given.strip()
    return json.dumps(given, ensure_ascii=False, sort_keys=True) if given else ""


def _digests(record: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    """The values of `DIGESTS`, one after another; of those that a record lacks, zeros."""
    messages: Messages = record["messages"]
    tools = tools_of(record, meta)
    own = content_id({**record, "tools": None}) if record.get("tools") else record["example_id"]
    parts: list[Any] = [record["example_id"], [own, tools]]
    if "rejected" in record:
        prompt, chosen, rejected = messages[: record["asked"]], messages[record["asked"] :], record["rejected"]
        both = [[_key(_tidy(message)) for message in side] for side in (chosen, rejected)]
        parts += [_context(prompt, tools), both, both[::-1]]
    elif len(messages) > 1:
        parts += [_context(messages[:-1], tools), _key(_tidy(messages[-1]))]
    made = b"".join(blake2b(_ENCODED.encode(part).encode(), digest_size=16).digest() for part in parts)
    return made.ljust(16 * len(DIGESTS), b"\0")


_ENCODED = json.JSONEncoder(separators=(",", ":"))


def _context(messages: Messages, tools: str) -> list[Any]:
    return [tools, *([message["role"], _key(message)] for message in messages)]


def _key(message: Message) -> Any:
    """The compared part of a message: its content and, if present, its reasoning and calls.

    Ids of calls are ignored, because they are arbitrary.
    """
    made = [[call.name, json.dumps(call.arguments, ensure_ascii=False, sort_keys=True)] for call in calls(message)]
    reasoning = message.get("reasoning_content")
    return [message["content"], reasoning or "", made] if reasoning or made else message["content"]


def _tidy(message: Message) -> Message:
    """The message in Unicode's composed form, with single spaces and none at the ends of lines.

    So only other words are another answer. Indents stay, because they have a meaning in code.
    """
    tidied = {key: _tidied(message[key]) for key in ("content", "reasoning_content") if message.get(key)}
    return {**message, **tidied}


_SPACES = re.compile(r"(?<=\S)\s+")


def _tidied(text: str) -> str:
    lines = normalize("NFC", text).strip().split("\n")
    return "\n".join([_SPACES.sub(" ", line).rstrip() for line in lines])


def _reasoning(rows: Rows, i: int, rich: bool) -> int:
    record = rows.records[i]
    if rich and has_reasoning(record):
        return WITH
    return WITHOUT if has_answer(record) and rows.metas[i].get("kind") != "text" else 0


def _shapes(rows: Rows) -> list[int]:
    """Hash of the shape of each conversation that a chat template can render; 0 for the others."""
    if rows.limits.tokens.misfit is None:
        return [0] * len(rows.records)
    known: dict[Any, int] = {}
    found = []
    for record, meta, valid in zip(rows.records, rows.metas, rows.shared(valid_roles), strict=True):
        if not record["messages"] or not valid or is_text(record["messages"], meta):
            found.append(0)
            continue
        shape = tuple([_shape(side, record.get("tools")) for side in sides(record)])
        if shape not in known:
            known[shape] = int.from_bytes(blake2b(repr(shape).encode(), digest_size=8).digest(), "big") or 1
        found.append(known[shape])
    return found


def _shape(messages: Messages, tools: Tools) -> tuple[Any, ...]:
    """The features of a conversation on which a template's behavior depends, without its texts."""
    turns = [(m["role"], m["content"], m) for m in messages]
    plain = tuple([(role, text[:1].isspace(), text[-1:].isspace(), not text) for role, text, _ in turns])
    more = [(at, _fields(m)) for at, (_, _, m) in enumerate(turns) if len(m) > 2]
    return (*plain, *more, *([len(tools)] if tools else []))


def _fields(message: Mapping[str, Any]) -> tuple[Any, ...]:
    made = [(call.identity is None, isinstance(call.arguments, dict)) for call in calls(message)]
    return (*(key for key in message if key not in {"role", "content", "tool_calls"}), *made)
