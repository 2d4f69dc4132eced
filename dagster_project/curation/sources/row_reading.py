"""One row of a source, as its layout reads it: messages or pairs, tools, and where its fields went."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from dagster_project.curation.sources import fields
from dagster_project.curation.sources.call_texts import Think, is_marked, prompted_tools, split_traces, texts_as_calls
from dagster_project.curation.sources.fields import FieldAccount, TurnShape, read_turns, without_rest
from dagster_project.curation.sources.files import Row
from dagster_project.curation.sources.layouts import Layout, as_label
from dagster_project.curation.sources.message import UnsupportedContent
from dagster_project.curation.sources.pair_layouts import Pair, PairLayout
from dagster_project.curation.sources.tools import Tools, definitions

T = TypeVar("T")


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
    unread: frozenset[str] = frozenset()
    """Keys that the layout reads in other rows, and keeps of this one."""
    defining: frozenset[str] = frozenset()
    """The key of `tool_keys` that holds the tools, which is used even if `meta` keeps it, too."""


def read_example(value: dict[str, Any], layout: Layout, think: Think) -> ReadRow:
    turns = read_turns(value, layout.turns)
    messages = layout.messages(turns.row)
    more, unread = layout.meta(turns.row), layout.unread(turns.row)
    unused: list[str] = []
    tools, keys = _tools_of(value, layout)
    defining = frozenset(keys[-1:] if tools else ())
    if not layout.alone and is_marked(messages):
        messages = split_traces(messages, think)  # first: a trace may quote calls
        if layout.turns:
            prompted = prompted_tools(messages)
            tools = tools or prompted.tools
            messages = texts_as_calls(prompted.messages, prompted.style, tools, unused)
            more |= prompted.meta
    if layout.of_tree:
        turns = fields.read_tree(value, layout.of_tree(value))
    ignored = [*turns.ignored, *_named(unused, layout)]
    return ReadRow([Pair([], messages, [])], tools, keys, more, turns.shapes, ignored, unread, defining)


def read_pairs(value: dict[str, Any], form: PairLayout, think: Think) -> ReadRow:
    value = form.flat(value)
    turns = read_turns(value, form.turns)
    pairs = form.pairs(turns.row)
    turns = without_rest(value, turns, form.turns, form.used_turns(turns.row))
    tools, keys = _tools_of(value, form)
    more: dict[str, Any] = {}
    unused: list[str] = []
    found = []
    for pair in pairs:
        # first: a trace may quote calls
        sides = [split_traces(side, think) for side in (pair.prompt, pair.chosen, pair.rejected)]
        if form.turns and any(map(is_marked, sides)):
            prompted = prompted_tools(sides[0])
            tools = tools or prompted.tools
            more |= prompted.meta
            sides = [texts_as_calls(side, prompted.style, tools, unused) for side in (prompted.messages, *sides[1:])]
        prompt, chosen, rejected = sides
        found.append(Pair(prompt, chosen, rejected, pair.margin))
    if form.of_tree:
        turns = fields.read_tree(value, form.of_tree(value))
    return ReadRow(found, tools, keys, more, turns.shapes, [*turns.ignored, *_named(unused, form)])


def _named(unused: list[str], layout: Layout | PairLayout) -> list[str]:
    """Names of keys of calls in text, as those of other keys of messages."""
    return [f"{[*layout.turns][-1]}[].{name}"[: fields.MAX_NAME] for name in unused]


def _tools_of(value: Mapping[str, Any], layout: Layout | PairLayout) -> tuple[Tools | None, tuple[str, ...]]:
    """Tool definitions of a row, and the keys that were read for them.

    In a layout of conversations a value that is not a definition makes the row malformed; elsewhere `tools` may be any
    column.
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


def read(row: Row, convert: Callable[[dict[str, Any]], T]) -> tuple[T | None, dict[str, Any]]:
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


def raw_text(row: Row) -> dict[str, str]:
    """The entry of `meta` with the text of a row that has no value."""
    return {"raw": row.raw} if row.raw else {}


def category_of(row: Row, key: str) -> str | None:
    """The category as text: a whole number, true and false as in a CSV file.

    An empty one, as in a cell of a CSV file, is none.
    """
    category = (row.value or {}).get(key)
    if isinstance(category, int):
        return as_label(category)
    return (category or None) if isinstance(category, str) else None


def kept_of(row: Row, layout: Layout | PairLayout, read: ReadRow | None) -> dict[str, Any]:
    """Values that are in no other column, including a category that is a fraction, a list or an object."""
    values = row.value or {}
    elsewhere = {*layout.used, *(read.tool_keys if read else ())}
    if isinstance(values.get(layout.category), str | int | None):
        elsewhere.add(layout.category)
    elsewhere -= read.unread if read else frozenset()
    return {key: value for key, value in values.items() if key not in elsewhere}


def noted(
    row: Row, layout: Layout | PairLayout, kept: Mapping[str, Any], read: ReadRow | None, account: FieldAccount
) -> dict[str, Any]:
    """Where the fields of the row went, and names of those that are ignored though they hold something."""
    if read is None:
        return {"fields": (fields.kept_whole(row.value, row.classes),)}
    # of the row only: of a system prompt whose tools are used, a reader keeps the text as `system_prompt`
    ignored = [*read.ignored, *[key for key in fields.important(kept) if key in (row.value or {})]]
    columns = (layout.category, *read.tool_keys)
    used = layout.used - read.unread | read.defining
    found = account.of(row.value or {}, used, columns, kept, read.shapes, row.classes)
    return {"fields": (found,), **({"ignored": [*dict.fromkeys(ignored)]} if ignored else {})}
