"""Rows -> canonical records and preference pairs.

Layouts are in layouts.py and pair_layouts.py; every row and every field is accounted for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dagster_project.core.errors import InputError
from dagster_project.core.records import example_id
from dagster_project.curation.sources.call_texts import Think
from dagster_project.curation.sources.detection import (
    SPLITS,
    Shapes,
    canonical_split,
    choose,
    detect,
    is_known,
    kind,
    shapes_of,
    split_of_file,
)
from dagster_project.curation.sources.fields import FieldAccount
from dagster_project.curation.sources.files import Row
from dagster_project.curation.sources.layouts import (
    LAYOUTS,
    RECORD_FIELDS,
    Layout,
    is_text,
    mapped,
    mapping_problem,
    merged,
)
from dagster_project.curation.sources.pair_layouts import PAIR_FIELDS, PAIR_LAYOUTS, PairLayout, mapped_pairs
from dagster_project.curation.sources.pairing import HALF, Halves, as_record, entries_of, joined
from dagster_project.curation.sources.row_reading import category_of, kept_of, noted, raw_text, read, read_example
from dagster_project.curation.sources.tools import TOOL_KEYS

__all__ = [
    "FROM_FILE_NAMES", "LAYOUTS", "PAIR_FIELDS", "PAIR_LAYOUTS", "RECORD_FIELDS", "SPLITS", "TOOL_KEYS", "Conversion",
    "Layout", "PairLayout", "Think", "as_record", "canonical_split", "conversion_of", "converted", "detect", "is_known",
    "is_text", "kind", "mapping_problem", "pairs_of", "records_of", "split_of_file",
]  # fmt: skip

FROM_FILE_NAMES = "from_file_names"


class Conversion(NamedTuple):
    """How the rows of a file become records. It can be sent to another process."""

    pairs: bool
    """Preference pairs; else examples."""
    layout: str
    """Name of the layout, or "mapping" for a custom one."""
    mapping: Mapping[str, str] | None
    """Field (`RECORD_FIELDS` or `PAIR_FIELDS`) -> column, for a custom layout:
    {"prompt": "q", "response": "a"} reads {"q": "Hi", "a": "Hello"} as user "Hi", assistant "Hello"."""
    source: str
    split: str | None
    """Label for every row."""
    think: Think
    """What to do with traces at the beginning of answers."""


def conversion_of(
    shapes: Shapes,
    pairs: bool,
    name: str,
    source: str,
    layout: str = "auto",
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    think: Think = "auto",
) -> Conversion:
    """Detect the layout of a file.

    Args:
        shapes: of its rows.
        name: of the file, for messages.
    Raises:
        InputError: no layout fits, or the mapping is invalid.
    """
    if pairs:
        custom_pairs = mapped_pairs(_validated(mapping, PAIR_FIELDS, name)) if mapping else None
        layout, _ = choose(shapes, name, layout, PAIR_LAYOUTS, custom_pairs)
    else:
        custom = mapped(_validated(mapping, RECORD_FIELDS, name)) if mapping else None
        layout, _ = choose(shapes, name, layout, LAYOUTS, custom)
    return Conversion(pairs, layout, mapping, source, split, think)


def _validated(mapping: Mapping[str, str], fields: Mapping[str, bool], name: str) -> Mapping[str, str]:
    if problem := mapping_problem(mapping, fields):
        raise InputError(f"{name}: mapping: {problem}", "map each field to a different column")
    return mapping


def converted(how: Conversion, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Convert every row to canonical records, or to entries of pairs (`pairing.entries_of`); nothing is dropped.

    An unreadable row has no messages, and `meta.problem`:
    {"instruction": "Hi", "output": 3}  ->  messages [], meta {"problem": "expected text, found int (line 1)"}

    Yields:
        `record_schema` (or `rich_schema` if a row needs it) or `pair_schema`, with `source_row`, the `fields` of the
        row, and names of those `ignored`, if any.
    """
    if how.pairs:
        form = mapped_pairs(how.mapping) if how.mapping else PAIR_LAYOUTS[how.layout]
        yield from entries_of(rows, how.source, form, how.split, how.think)
        return
    layout = mapped(how.mapping) if how.mapping else LAYOUTS[how.layout]
    account = FieldAccount()
    for row in rows:
        for part in _parts(row, layout):
            yield _record(part, how.source, layout, how.split, how.think, account)


def records_of(
    rows: list[Row],
    name: str,
    source: str,
    layout: str = "auto",
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """The layout of rows in memory, and their records. Empties the list, so that rows are not in memory twice."""
    how = conversion_of(shapes_of(rows), False, name, source, layout, mapping, split)
    return how.layout, list(converted(how, _consumed(rows)))


def pairs_of(
    rows: list[Row],
    name: str,
    source: str,
    layout: str = "auto",
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """As `records_of`, for preference pairs.

    Every row is in the `source_rows` of at least one pair; a tree may give several, and two KTO rows form one:

    {"prompt": "Hi", "completion": "Hello", "label": true}, {"prompt": "Hi", "completion": "What?", "label": false}  ->
    {"source_rows": [0, 1], "prompt": [user "Hi"], "chosen": [assistant "Hello"], "rejected": [assistant "What?"], ...}

    An unreadable row has no messages, and a KTO row without a counterpart has one empty side. `meta.problem` has the
    reason.
    """
    how = conversion_of(shapes_of(rows), True, name, source, layout, mapping, split)
    entries = list(converted(how, _consumed(rows)))
    halves, second = Halves(), dict[int, int]()
    for number, entry in enumerate(entries):
        if HALF in entry and (first := halves.partner(entry[HALF], number)) is not None:
            second[first] = number
    others = set(second.values())
    pairs = []
    for number, entry in enumerate(entries):
        if number not in others:
            pairs.append(joined(entry, entries[second[number]] if number in second else None))
    return how.layout, pairs


def _consumed(rows: list[Row]) -> Iterator[Row]:
    rows.reverse()
    while rows:
        yield rows.pop()


def _parts(row: Row, layout: Layout) -> list[Row]:
    """The row, or one row per example in it. A row that cannot be split is malformed."""
    if layout.parts is None or row.value is None:
        return [row]
    parts, problem = read(row, layout.parts)
    if parts is None:
        return [row._replace(problem=problem["problem"])]
    return [
        row._replace(value=part) if isinstance(part, dict) else _no_instance(row, part, number)
        for number, part in enumerate(parts)
    ]


def _no_instance(row: Row, part: Any, number: int) -> Row:
    where = f" (line {row.line})" if row.line else ""
    problem = f"instance {number}: expected an object, found {type(part).__name__}{where}"
    return row._replace(value={**(row.value or {}), "instances": [part]}, problem=problem)


def _record(
    row: Row, source: str, layout: Layout, split: str | None, think: Think, account: FieldAccount
) -> dict[str, Any]:
    found, problem = read(row, lambda value: read_example(value, layout, think))
    value = row.value or {}
    messages = found.pairs[0].chosen if found else []
    if found is None:
        meta: dict[str, Any] = {**problem, "row": value, **raw_text(row)}
    else:
        more, meta = found.meta, kept_of(row, layout, found)
        if label := canonical_split(meta.get("split")):
            meta["split"] = label
        if split:
            more = {**more, "split": split}
        meta = merged(meta, more)
        if not layout.alone and is_text(messages, meta):  # a field of the row: the answer is no text to continue
            meta = merged(meta, {"kind": "conversation"})
    tools = {"tools": found.tools} if found and found.tools else {}
    hashed, category = messages, category_of(row, layout.category)
    if not messages:
        text = row.raw or json.dumps(value, ensure_ascii=False, sort_keys=True)
        hashed = [{"role": "malformed", "content": text}]
    elif layout.labels:
        category = messages[-1]["content"] or None
    return {
        "example_id": example_id(hashed, tools.get("tools"), is_text(messages, meta)),
        "source": source,
        "source_row": row.source_row,
        "messages": messages,
        **tools,
        "category": category,
        "group_id": None,
        "meta": (ASCII if problem else JSON).encode(meta) if meta else "{}",
        **noted(row, layout, meta, found, account),
    }


JSON, ASCII = json.JSONEncoder(ensure_ascii=False, sort_keys=True), json.JSONEncoder(sort_keys=True)
