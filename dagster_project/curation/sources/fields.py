"""Where each field of a source row goes: used by its layout, kept in `meta`, or ignored.

Fields of messages count as `messages[].name`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dagster_project.core.records import IGNORED, CheckResult
from dagster_project.curation.sources.layouts import TurnReader, all_replies
from dagster_project.curation.sources.message import EMPTY, ORDER_OF_CALLS

TurnShape = tuple[tuple[str, ...], tuple[str, ...]]
"""Keys of a message or turn, and those of them that are not used, with those of its content parts and calls
("content[].cache_control")."""

IMPORTANT = frozenset(
    {
        "weight", "weights", "train", "training", "train_on_turn", "train_detail", "loss", "loss_mask", "mask",
        "reasoning", "reasoning_content", "reasoning_details", "thinking", "tools", "functions", "tool_calls",
        "function_call", "tool_call_id", "images", "image", "audio", "audios", "video", "videos", "files", "system",
        "history", "system_prompt", "chat_template_kwargs", ORDER_OF_CALLS,
    }
)  # fmt: skip
"""Keys that usually change what is trained. Where a row has one that is not used, `ignored_fields` is a warning."""
MAX_NAME, MAX_NAMES = 80, 200
"""Characters of a field's name, and names of a source, that a report shows. Both are above what a set that is meant to
be read has."""
NAME = "ignored_fields"
DESCRIPTION = "Every field of the source rows is used or kept."


class Fields(NamedTuple):
    """Fields of one source row, with how often it has them."""

    used: Mapping[str, int]
    kept: Mapping[str, int]
    ignored: Mapping[str, int]
    class_labels: Mapping[str, int] = {}
    """Those of them in which names replaced the numbers of classes."""


class Turns(NamedTuple):
    """The messages of a row that were read, and what was not used of them."""

    row: dict[str, Any]
    """The row, with canonical messages instead of those of the source."""
    shapes: dict[str, list[TurnShape]]
    """Key of the row -> its messages."""
    ignored: list[str]
    """Fields that hold something and are not used."""


def read_turns(row: dict[str, Any], readers: Mapping[str, TurnReader]) -> Turns:
    """Read the messages of a row.

    Values that are neither a list nor a message are unchanged. Raises errors like a `TurnReader`.
    """
    shapes: dict[str, list[TurnShape]] = {}
    ignored: list[str] = []
    for key, read in readers.items():
        value = row.get(key)
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            continue
        messages = []
        shapes[key] = found = []
        for turn in value:
            message, unused = read(turn)
            messages.append(message)
            found.append((tuple(turn), unused))
            held = [name for name in unused if "[]" in name or turn.get(name) not in EMPTY]
            ignored += [f"{key}[].{name}"[:MAX_NAME] for name in held]
        row = {**row, key: messages}
    return Turns(row, shapes, ignored)


REST = "(later turns)"
"""Added to the names of fields of messages that a layout leaves out."""


def without_rest(
    row: Mapping[str, Any], turns: Turns, readers: Mapping[str, TurnReader], read: Mapping[str, int]
) -> Turns:
    """The account of a row whose layout uses only its first messages: all fields of the others are ignored.

    Args:
        row: the source row.
        turns: all of its messages, by the same readers.
        read: key of the row -> how many of its messages are used.
    """
    cut = {key: count for key, count in read.items() if count < len(turns.shapes.get(key, ()))}
    if not cut:
        return turns
    first = read_turns({**row, **{key: row[key][:count] for key, count in cut.items()}}, readers)
    shapes, ignored = dict(first.shapes), list(first.ignored)
    for key, count in cut.items():
        rest = [tuple([f"{name} {REST}" for name in names]) for names, _ in turns.shapes[key][count:]]
        shapes[key] = [*first.shapes[key], *[(names, names) for names in rest]]
        held = [name for turn in row[key][count:] for name, value in turn.items() if value not in EMPTY]
        ignored += [f"{key}[].{name} {REST}"[:MAX_NAME] for name in held]
    return Turns(turns.row, shapes, ignored)


TREE_KEYS = frozenset({"role", "text", "replies"})
"""Keys of a message of a tree that are used if it is in an example or pair."""
LEFT_OUT = "(left out)"
"""Added to the names of fields of messages of a tree that are in no example or pair."""


def read_tree(row: dict[str, Any], used: Iterable[dict[str, Any]]) -> Turns:
    """The messages of an OpenAssistant tree, which its layout reads by itself.

    Args:
        used: those that are in the record. `deleted` and, of several, `rank` chose among their replies.
    """
    in_record = {id(message) for message in used}
    found: list[tuple[dict[str, Any], frozenset[str]]] = [(row["prompt"], frozenset())]
    shapes: list[TurnShape] = []
    ignored: list[str] = []
    for message, read in found:
        is_used = id(message) in in_record
        name_of = {key: key if is_used or key in read else f"{key} {LEFT_OUT}" for key in message}
        unused = [key for key in message if key not in read and not (is_used and key in TREE_KEYS)]
        shapes.append((tuple(name_of.values()), tuple([name_of[key] for key in unused])))
        ignored += [f"prompt[].{name_of[key]}"[:MAX_NAME] for key in unused if message[key] not in EMPTY]
        replies = all_replies(message)
        several = sum(not reply.get("deleted") for reply in replies) > 1
        for reply in replies:
            compared = {"deleted", "rank"} if several and not reply.get("deleted") else {"deleted"}
            found.append((reply, frozenset(compared if is_used else ())))
    return Turns(row, {"prompt": shapes}, ignored)


def important(kept: Mapping[str, Any]) -> list[str]:
    """Keys of a row that are kept in `meta` and usually change what is trained."""
    return sorted([key for key in kept.keys() & IMPORTANT if kept[key] not in EMPTY]) if kept else []


class FieldAccount:
    """Assigns the fields of each row. Rows of the same shape share one object."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Fields, int]] = {}

    def of(
        self,
        row: Mapping[str, Any],
        used: frozenset[str],
        columns: tuple[str, ...],
        kept: Mapping[str, Any],
        shapes: Mapping[str, list[TurnShape]],
        classes: Sequence[str] = (),
    ) -> Fields:
        """The fields of a row that was read.

        Args:
            used: keys that the layout reads.
            columns: keys that are in columns of the record: the category and tools.
            kept: what is kept of the row.
            shapes: messages that were read, by the key of the row.
            classes: columns in which names replaced the numbers of classes.
        Raises:
            AssertionError: a field is in none of the places, or a message was not read.
        """
        turns = [(key, _multiset(found)) for key, found in shapes.items()]
        shape = (tuple(row), used, columns, tuple(kept), tuple(classes), *turns)
        if (found := self._known.get(shape)) is None:
            fields, total = _assigned(row, used, columns, kept, shapes)
            found = self._known[shape] = fields._replace(class_labels=dict.fromkeys(classes, 1)), total
        fields, total = found
        present = len(row) + sum([_fields_in(row[key], len(read)) for key, read in shapes.items()])
        if present != total:
            keys = ", ".join(row)
            raise AssertionError(f"a row has {present} fields, of which {total} are accounted for (keys: {keys})")
        return fields


def _multiset(turns: Sequence[TurnShape]) -> Any:
    """The shapes of the turns of a row without their order, so that few rows differ in it."""
    first = turns[0] if turns else None
    return (first, len(turns)) if turns.count(first) == len(turns) else frozenset(Counter(turns).items())


def _assigned(
    row: Mapping[str, Any],
    used: frozenset[str],
    columns: tuple[str, ...],
    kept: Mapping[str, Any],
    shapes: Mapping[str, list[TurnShape]],
) -> tuple[Fields, int]:
    """The fields of a row, and how many they are without those of content parts and calls."""
    places: dict[str, Counter[str]] = {"used": Counter(), "kept": Counter(), "ignored": Counter()}
    for key in row:
        if key not in used and key not in columns and key not in kept:
            raise AssertionError(f"field {key} is neither used nor kept")
        places["used" if key in used or key not in kept else "kept"][key] += 1
    total = len(row)
    for key, turns in shapes.items():
        for names, unused in turns:
            total += len(names)
            places["ignored"].update(f"{key}[].{name}" for name in unused)
            places["used"].update(f"{key}[].{name}" for name in names if name not in unused)
    return Fields(places["used"], places["kept"], places["ignored"]), total


def _fields_in(value: Any, messages: int) -> int:
    """Number of fields of a message, a list of messages, or a tree of replies.

    Args:
        messages: number of messages that were read. `replies` of a single message is a field like any other.
    """
    if isinstance(value, list):
        return sum(map(len, value))
    replies = value.get("replies") or () if messages > 1 else ()
    return len(value) + sum([_fields_in(reply, messages) for reply in replies])


def kept_whole(row: Mapping[str, Any] | None, classes: Sequence[str]) -> Fields:
    """The fields of a row that is malformed: all of it is kept."""
    return Fields({}, dict.fromkeys(row or {}, 1), {}, dict.fromkeys(classes, 1))


class FieldCounts:
    """Field -> number, by place, over all rows of a source, for its report."""

    def __init__(self) -> None:
        self._found: dict[str, Counter[str]] = {place: Counter() for place in Fields._fields}

    def add(self, fields: Fields, rows: int) -> None:
        """Add the fields of a number of rows of the same shape."""
        for place, counter in self._found.items():
            for name, times in getattr(fields, place).items():
                counter[name[:MAX_NAME]] += times * rows

    def shown(self) -> dict[str, dict[str, int]]:
        return {place: _shown(counter) for place, counter in self._found.items() if counter}


def numbered(records: Iterable[dict[str, Any]]) -> tuple[list[Fields], list[list[int]]]:
    """Remove `fields` from records.

    Returns:
        The distinct fields, and the indices of those of each record.
    """
    known: dict[int, int] = {}
    distinct: list[Fields] = []
    indices = []
    for record in records:
        found = record.pop("fields", ())
        for one in found:
            if id(one) not in known:
                known[id(one)] = len(distinct)
                distinct.append(one)
        indices.append([known[id(one)] for one in found])
    return distinct, indices


def taken(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """The fields of all records, for a report; empty for records that were not read from rows.

    Removes `fields` from the records.
    """
    distinct, indices = numbered(records)
    counts = FieldCounts()
    for index, rows in Counter(index for found in indices for index in found).items():
        counts.add(distinct[index], rows)
    return counts.shown()


def _shown(counter: Counter[str]) -> dict[str, int]:
    """The most frequent names in alphabetical order, and how often the others occur."""
    first = counter.most_common(MAX_NAMES)
    others = counter.total() - sum(count for _, count in first)
    return {**dict(sorted(first)), **({"(others)": others} if others else {})}


def severity(ignored: Iterable[str]) -> Literal["warn", "info"]:
    """`warn` if one of the fields usually changes what is trained."""
    return "warn" if any(name.rpartition(".")[2] in IMPORTANT for name in ignored) else "info"


def note(ignored: Iterable[Iterable[str]]) -> list[str]:
    """Number of rows with each field: [["id"], ["id", "images"]]  ->  ["id 2, images 1"]"""
    text = _note(Counter(name for names in ignored for name in names))
    return [text] if text else []


def _note(found: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.most_common(SHOWN))


SHOWN = 20


class IgnoredFields:
    """Collects the rows for the check `ignored_fields`, as the stages that read sources report it."""

    def __init__(self) -> None:
        self._rows = 0
        self._places: list[str] = []
        self._details: list[str] = []
        self._names: Counter[str] = Counter()

    def add(self, record: Mapping[str, Any]) -> None:
        if not (names := record.get("ignored")):
            return
        self._rows += 1
        self._names.update(names)
        if len(self._places) < SHOWN:
            self._places.append(f"{record['source']}:{record['source_row']}")
        if len(self._details) < 3:
            self._details.append(", ".join(names))

    def check(self) -> CheckResult:
        return CheckResult(
            NAME,
            not self._rows,
            severity(self._names),
            count=self._rows,
            rows=self._places,
            details=self._details,
            note=_note(self._names),
        )


def why(record: Mapping[str, Any]) -> str:
    """What the ledger says about a row that was read."""
    return IGNORED + ", ".join(record["ignored"]) if record.get("ignored") else ""
