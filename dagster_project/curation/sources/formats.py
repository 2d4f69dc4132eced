"""Rows -> canonical records and preference pairs. Layouts are in layouts.py and pair_layouts.py; every row and every field is accounted for."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from dagster_project.core.errors import InputError
from dagster_project.core.records import example_id, pair_id
from dagster_project.curation.sources import fields
from dagster_project.curation.sources.call_texts import Think, is_marked, prompted_tools, split_traces, texts_as_calls
from dagster_project.curation.sources.detection import SPLITS, canonical_split, choose, detect, is_known, kind, split_of_file
from dagster_project.curation.sources.fields import FieldAccount, TurnShape, read_turns
from dagster_project.curation.sources.files import Row, files_of, read_rows
from dagster_project.curation.sources.layouts import LAYOUTS, RECORD_FIELDS, Layout, is_text, mapped, mapping_problem, merged
from dagster_project.curation.sources.message import UnsupportedContent
from dagster_project.curation.sources.pair_layouts import MISMATCH, PAIR_FIELDS, PAIR_LAYOUTS, Pair, PairLayout, mapped_pairs
from dagster_project.curation.sources.tools import TOOL_KEYS, Tools, definitions

__all__ = [
    "FROM_FILE_NAMES", "LAYOUTS", "PAIR_FIELDS", "PAIR_LAYOUTS", "RECORD_FIELDS", "SPLITS", "TOOL_KEYS", "Layout", "PairLayout", "Reader",
    "Think", "as_record", "canonical_split", "detect", "is_known", "is_text", "kind", "mapping_problem", "of_files", "pairs_of", "records_of",
    "split_of_file", "to_pairs", "to_records",
]  # fmt: skip
T = TypeVar("T")


def to_records(
    path: Path,
    source: str,
    layout: str = "auto",
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    think: Think = "auto",
) -> tuple[str, list[dict[str, Any]]]:
    """Convert every row of a file to a canonical record with its `source_row`; nothing is dropped.

    An unreadable row has no messages, and `meta.problem`:
    {"instruction": "Hi", "output": 3}  ->  messages [], meta {"problem": "expected text, found int (line 1)"}

    In a folder each file is a source: source "data/sources/mine", file "b/a.jsonl"  ->
    "data/sources/mine/b/a.jsonl".

    Args:
        mapping: field (`RECORD_FIELDS`) -> column, for a custom layout:
            {"prompt": "q", "response": "a"} reads {"q": "Hi", "a": "Hello"} as user "Hi", assistant "Hello".
        split: label for every row, or "from_file_names".
        think: what to do with traces at the beginning of answers.
    Returns:
        The layout ("mapping" for a custom one; several in a folder are joined by ", "), and the records (`record_schema`, or `rich_schema` if a
        row needs it) with their `source_row`, the `fields` of the row, and names of those `ignored`, if any.
    """
    return of_files(path, source, layout, mapping, split, records_of, think)


FROM_FILE_NAMES = "from_file_names"


class Reader(Protocol):
    """`records_of` or `pairs_of`."""

    def __call__(
        self,
        rows: list[Row],
        name: str,
        source: str,
        layout: str = "auto",
        mapping: Mapping[str, str] | None = None,
        split: str | None = None,
        think: Think = "auto",
    ) -> tuple[str, list[dict[str, Any]]]: ...


def of_files(
    path: Path,
    source: str,
    layout: str,
    mapping: Mapping[str, str] | None,
    split: str | None,
    read: Reader,
    think: Think = "auto",
) -> tuple[str, list[dict[str, Any]]]:
    """Apply `read` to a file, or to each file of a folder."""
    used: dict[str, None] = {}
    records: list[dict[str, Any]] = []
    labels = set()
    for file, name, file_source in _each(path, source):
        label = split_of_file(name) if split == FROM_FILE_NAMES else split
        labels.add(label)
        file_layout, file_records = read(read_rows(file), name, file_source, layout, mapping, label, think)
        used[file_layout] = None
        records += file_records
    if split == FROM_FILE_NAMES and labels == {None}:
        raise InputError(f"{path.name}: no file name contains a split", f"use the names {', '.join(SPLITS)}, or leave split out")
    return ", ".join(used), records


def _each(path: Path, source: str) -> list[tuple[Path, str, str]]:
    """Each file with its name for messages and its source."""
    if not path.is_dir():
        return [(path, path.name, source)]
    return [(file, f"{path.name}/{name}", f"{source.rstrip('/')}/{name}") for name, file in files_of(path)]


def records_of(
    rows: list[Row],
    name: str,
    source: str,
    layout: str = "auto",
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    think: Think = "auto",
) -> tuple[str, list[dict[str, Any]]]:
    """As `to_records`, for rows that are already read. Empties the list, so that rows are not in memory twice."""
    custom = mapped(_validated(mapping, RECORD_FIELDS, name)) if mapping else None
    layout, used = choose(rows, name, layout, LAYOUTS, custom)
    account = FieldAccount()
    return layout, [_record(part, source, used, split, think, account) for row in _consumed(rows) for part in _parts(row, used)]


def _parts(row: Row, layout: Layout) -> list[Row]:
    """The row, or one row per example in it. A row that cannot be split is malformed."""
    if layout.parts is None or row.value is None:
        return [row]
    parts, problem = _read(row, layout.parts)
    if parts is None:
        return [row._replace(problem=problem["problem"])]
    return [row._replace(value=part) if isinstance(part, dict) else _no_instance(row, part, number) for number, part in enumerate(parts)]


def _no_instance(row: Row, part: Any, number: int) -> Row:
    where = f" (line {row.line})" if row.line else ""
    value = {**(row.value or {}), "instances": [part]}
    return row._replace(value=value, problem=f"instance {number}: expected an object, found {type(part).__name__}{where}")


def _consumed(rows: list[Row]) -> Iterator[Row]:
    rows.reverse()
    while rows:
        yield rows.pop()


def to_pairs(
    path: Path,
    source: str,
    layout: str = "auto",
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    think: Think = "auto",
) -> tuple[str, list[dict[str, Any]]]:
    """Convert a file to preference pairs. Every row is in the `source_rows` of at least one pair; a tree may give several, and two KTO rows form one:

    {"prompt": "Hi", "completion": "Hello", "label": true}   ->  {"source_rows": [0, 1], "margin": None, "prompt": [user "Hi"],
    {"prompt": "Hi", "completion": "What?", "label": false}       "chosen": [assistant "Hello"], "rejected": [assistant "What?"], ...}

    An unreadable row has no messages, and a KTO row without a counterpart has one empty side. `meta.problem` has the reason.

    Args:
        mapping: field (prompt, chosen, rejected, category) -> column, for a custom layout.
        split: as for `to_records`. KTO rows of different splits are not paired.
    Returns:
        The layout, and the pairs (`pair_schema` plus `source_row`, the first of its `source_rows`).
    """
    return of_files(path, source, layout, mapping, split, pairs_of, think)


def pairs_of(
    rows: list[Row],
    name: str,
    source: str,
    layout: str = "auto",
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    think: Think = "auto",
) -> tuple[str, list[dict[str, Any]]]:
    """As `to_pairs`, for rows that are already read. Empties the list."""
    custom = mapped_pairs(_validated(mapping, PAIR_FIELDS, name)) if mapping else None
    layout, used = choose(rows, name, layout, PAIR_LAYOUTS, custom)
    account = FieldAccount()
    entries: list[dict[str, Any]] = []
    waiting: dict[tuple[str, str], deque[dict[str, Any]]] = defaultdict(deque)
    for row in _consumed(rows):
        form = used.form_of(row.value or {})
        read, problem = _read(row, partial(_read_pairs, form=form, think=think))
        row = row._replace(value=form.flat(row.value)) if read and row.value is not None else row
        kept = merged(_kept(row, form, read.tool_keys if read else ()), read.meta if read else {})
        label = split or canonical_split((row.value or {}).get("split"))
        labelled = {"split": label} if label and not problem else {}
        noted = _noted(row, form, kept, read, account)
        for pair in read.pairs if read else [Pair([], [], [])]:
            side, other = ("chosen", "rejected") if pair.chosen else ("rejected", "chosen")
            messages = {"chosen": pair.chosen, "rejected": pair.rejected}
            half = not problem and not messages[other]
            tools = {"tools": read.tools} if read and read.tools else {}
            same = json.dumps([label, pair.prompt, *tools.values()])
            if half and waiting[same, other]:
                entry = waiting[same, other].popleft()
                entry[side] = messages[side]
                entry["source_rows"].append(row.source_row)
                if (category := _category(row, form.category)) not in {None, entry["category"]}:
                    kept = {**kept, form.category: category}
                entry["meta"] = {other: entry["meta"][other], side: kept, **labelled}
                _join(entry, noted)
                continue
            missing = f"no {other} completion of the same prompt"
            meta = {**problem, "row": row.value} if problem else {side: kept, "problem": missing} if half else _labelled(kept, label)
            entry = {
                "source": source,
                "source_row": row.source_row,
                "source_rows": [row.source_row],
                "prompt": pair.prompt,
                **messages,
                **tools,
            }
            entry |= {"margin": pair.margin, "category": _category(row, form.category), "group_id": None, "meta": {**meta, **labelled}}
            entries.append(entry | noted)
            noted = {"fields": ()}  # a row is counted once
            if half:
                waiting[same, side].append(entries[-1])
    return layout, [{"example_id": _pair_id(entry), **entry, "meta": json.dumps(entry["meta"], sort_keys=True)} for entry in entries]


def _labelled(kept: Mapping[str, Any], label: str | None) -> dict[str, Any]:
    """What is kept of a row, with its split under the canonical name, or the label of its source instead."""
    own = canonical_split(kept.get("split"))
    return merged({**kept, "split": own} if own else kept, {"split": label} if label else {})


def _pair_id(entry: dict[str, Any]) -> str:
    """Content hash of a pair; of the row if it is unreadable."""
    prompt, chosen, rejected = entry["prompt"], entry["chosen"], entry["rejected"]
    if prompt or chosen or rejected:
        return pair_id(prompt, chosen, rejected, entry.get("tools"))
    return example_id([{"role": "malformed", "content": json.dumps(entry["meta"]["row"], ensure_ascii=False, sort_keys=True)}])


def as_record(pair: dict[str, Any]) -> dict[str, Any]:
    """Convert a pair to a record for the checks, whose `messages` end with the chosen answer:

    prompt [user "Hi"], chosen [assistant "Hello"]  ->  messages [user "Hi", assistant "Hello"], asked 1
    """
    messages = [*pair["prompt"], *pair["chosen"]]
    mismatch = not messages and str(json.loads(pair["meta"]).get("problem")).startswith(MISMATCH)
    if pair["chosen"] and pair["rejected"]:  # of several turns only the last are compared, so all others must be equal
        mismatch = pair["chosen"][:-1] != pair["rejected"][:-1]
    kept = {key: value for key, value in pair.items() if key not in {"prompt", "chosen"}}
    return {**kept, "messages": messages, "asked": len(pair["prompt"]), "same_prompt": not mismatch}


def _validated(mapping: Mapping[str, str], fields: Mapping[str, bool], name: str) -> Mapping[str, str]:
    if problem := mapping_problem(mapping, fields):
        raise InputError(f"{name}: mapping: {problem}", "map each field to a different column")
    return mapping


# --- one row -----------------------------------------------------------------------------------------------------------------------


class ReadRow(NamedTuple):
    """A row as its layout reads it."""

    pairs: list[Pair]
    """The pairs of a row of preferences. An example is the `chosen` side of its only pair."""
    tools: Tools | None
    tool_keys: tuple[str, ...]
    """Keys of the row for tools that were read, also those that hold none."""
    meta: dict[str, Any]
    """Further entries of `meta`."""
    shapes: Mapping[str, list[TurnShape]]
    ignored: list[str]


def _read_example(value: dict[str, Any], layout: Layout, think: Think) -> ReadRow:
    turns = read_turns(value, layout.turns)
    messages = layout.messages(turns.row)
    more = layout.meta(turns.row)
    unused: list[str] = []
    tools, keys = _tools_of(value, layout)
    if not layout.alone and is_marked(messages):
        if layout.turns:
            prompted = prompted_tools(messages)
            tools = tools or prompted.tools
            messages = texts_as_calls(prompted.messages, prompted.style, tools, unused)
            more |= prompted.meta
        messages = split_traces(messages, think)
    if layout is LAYOUTS["oasst"]:
        turns = fields.read_tree(value)
    return ReadRow([Pair([], messages, [])], tools, keys, more, turns.shapes, [*turns.ignored, *_named(unused, layout)])


def _read_pairs(value: dict[str, Any], form: PairLayout, think: Think) -> ReadRow:
    value = form.flat(value)
    turns = read_turns(value, form.turns)
    pairs = form.pairs(turns.row)
    tools, keys = _tools_of(value, form)
    more: dict[str, Any] = {}
    unused: list[str] = []
    found = []
    for pair in pairs:
        sides = [pair.prompt, pair.chosen, pair.rejected]
        if form.turns and any(map(is_marked, sides)):
            prompted = prompted_tools(pair.prompt)
            tools = tools or prompted.tools
            more |= prompted.meta
            sides = [texts_as_calls(side, prompted.style, tools, unused) for side in (prompted.messages, pair.chosen, pair.rejected)]
        prompt, chosen, rejected = (split_traces(side, think) for side in sides)
        found.append(Pair(prompt, chosen, rejected, pair.margin))
    if form is PAIR_LAYOUTS["oasst"]:
        turns = fields.read_tree(value)
    return ReadRow(found, tools, keys, more, turns.shapes, [*turns.ignored, *_named(unused, form)])


def _named(unused: list[str], layout: Layout | PairLayout) -> list[str]:
    """Names of keys of calls in text, as those of other keys of messages."""
    return [f"{[*layout.turns][-1]}[].{name}"[: fields.MAX_NAME] for name in unused]


def _tools_of(value: Mapping[str, Any], layout: Layout | PairLayout) -> tuple[Tools | None, tuple[str, ...]]:
    """Tool definitions of a row, and the keys that were read for them.

    In a layout of conversations a value that is no definition makes the row malformed; elsewhere `tools` may be any column.
    """
    keys: list[str] = []
    for key in layout.tool_keys:
        if key in value:
            try:
                found = definitions(value[key])
            except ValueError:
                if layout.turns or key in layout.used:
                    raise
                continue
            keys.append(key)
            if found:
                return found, tuple(keys)
    return None, tuple(keys)


def _read(row: Row, convert: Callable[[dict[str, Any]], T]) -> tuple[T | None, dict[str, Any]]:
    """The converted row, or None and entries of `meta` that say why it is unreadable."""
    if row.problem or row.value is None:
        return None, {"problem": row.problem}
    unsupported = False
    try:
        return convert(row.value), {}
    except KeyError as error:
        problem = f"no key {error}"
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        problem, unsupported = str(error), isinstance(error, UnsupportedContent)
    problem = f"{problem} (line {row.line})" if row.line else problem
    return None, {"problem": problem, **({"unsupported": True} if unsupported else {})}


def _category(row: Row, key: str) -> str | None:
    category = (row.value or {}).get(key)
    return category if isinstance(category, str) else None


def _kept(row: Row, layout: Layout | PairLayout, tool_keys: tuple[str, ...]) -> dict[str, Any]:
    """Values that are in no other column, including a category that is not text."""
    elsewhere = layout.used | ({layout.category} if isinstance((row.value or {}).get(layout.category), str | None) else set())
    return {key: value for key, value in (row.value or {}).items() if key not in elsewhere and key not in tool_keys}


def _noted(row: Row, layout: Layout | PairLayout, kept: Mapping[str, Any], read: ReadRow | None, account: FieldAccount) -> dict[str, Any]:
    """Where the fields of the row went, and names of those that are ignored though they hold something."""
    if read is None:
        return {"fields": (fields.kept_whole(row.value),)}
    ignored = [*read.ignored, *fields.important(kept)]
    found = account.of(row.value or {}, layout.used, (layout.category, *read.tool_keys), kept, read.shapes)
    return {"fields": (found,), **({"ignored": [*dict.fromkeys(ignored)]} if ignored else {})}


def _join(entry: dict[str, Any], noted: Mapping[str, Any]) -> None:
    """Add what was noted of the second row of a pair."""
    entry["fields"] += noted["fields"]
    if ignored := [*dict.fromkeys([*entry.get("ignored", ()), *noted.get("ignored", ())])]:
        entry["ignored"] = ignored


def _record(row: Row, source: str, layout: Layout, split: str | None, think: Think, account: FieldAccount) -> dict[str, Any]:
    read, problem = _read(row, lambda value: _read_example(value, layout, think))
    value = row.value or {}
    messages = read.pairs[0].chosen if read else []
    if read is None:
        meta: dict[str, Any] = {**problem, "row": value}
    else:
        more, meta = read.meta, _kept(row, layout, read.tool_keys)
        if label := canonical_split(meta.get("split")):
            meta["split"] = label
        if split:
            more = {**more, "split": split}
        meta = merged(meta, more)
    tools = {"tools": read.tools} if read and read.tools else {}
    malformed = [{"role": "malformed", "content": json.dumps(value, ensure_ascii=False, sort_keys=True)}] if not messages else []
    return {
        "example_id": example_id(messages or malformed, tools.get("tools"), is_text(messages, meta)),
        "source": source,
        "source_row": row.source_row,
        "messages": messages,
        **tools,
        "category": (messages[-1]["content"] or None) if layout.labels and messages else _category(row, layout.category),
        "group_id": None,
        "meta": (ASCII if problem else JSON).encode(meta) if meta else "{}",
        **_noted(row, layout, meta, read, account),
    }


JSON, ASCII = json.JSONEncoder(ensure_ascii=False, sort_keys=True), json.JSONEncoder(sort_keys=True)
