"""records -> records, repaired where the policy of a check is `fix`.

A row that a repair does not fix is left unchanged.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from dagster_project.core import row_cache
from dagster_project.core.messages import Message
from dagster_project.core.records import content_id, is_labeled
from dagster_project.core.stored_rows import Selected, StoredRows, decode, encode
from dagster_project.curation.checks import damage, privacy
from dagster_project.curation.checks.check import named_text_of, text_of
from dagster_project.curation.checks.row_checks import inputs_of, is_placeholder

if TYPE_CHECKING:
    import polars as pl

Record = dict[str, Any]
Find = Callable[[Sequence[Record]], list[str | None]]
"""For each record a description of its fault, without personal data, or None."""


@dataclass(frozen=True)
class Repair:
    """How the rows that violate one check are repaired."""

    does: str
    """Its effect on a row, for the documentation."""
    make: Callable[[Collection[str]], tuple[Find, Callable[[Record], Record]]]
    """The base model's special tokens -> function that finds the rows, and function that repairs one."""


@dataclass
class RepairResult:
    """The repairs of a set."""

    records: StoredRows
    """In the given order. Repaired records have `repaired`, the names of the checks, and `source_id`, their original
    `example_id`."""
    found: dict[str, dict[int, str]] = field(default_factory=dict)
    """Check -> index of each row repaired for it -> description of the fault."""

    def counts(self, reason: Sequence[str | None]) -> dict[str, int]:
        """Check -> rows repaired for it that are kept."""
        kept = {name: sum(reason[i] is None for i in rows) for name, rows in self.found.items()}
        return {name: n for name, n in kept.items() if n}

    def kinds(self, name: str) -> Counter[str]:
        """The faults of the rows repaired for a check, by kind."""
        return Counter(wrong.partition(":")[0] for wrong in self.found.get(name, {}).values())


def repair(
    records: StoredRows,
    checks: Sequence[str],
    exempt: Mapping[str, Collection[int]],
    special_tokens: Collection[str] = (),
    earlier: RepairResult | None = None,
) -> RepairResult:
    """Repair each row that violates one of the checks, in the given order, each on the result of the one before.

    Args:
        records: canonical records or pairs; they are not modified.
        checks: names in `REPAIRS`.
        exempt: check -> indices of rows that are not repaired, because the check is waived for them.
        special_tokens: of the base model.
        earlier: previous repairs of these records.
    """
    found = {name: dict(rows) for name, rows in (earlier.found if earlier else {}).items()}
    if not checks:
        return RepairResult(records, found)
    few: dict[tuple[str, ...], list[int]] = {}  # of rows with a waiver: the checks that they are repaired for -> rows
    waived = {i for name in checks for i in exempt.get(name, ())}
    for i in sorted(waived):
        few.setdefault(tuple([name for name in checks if i not in exempt.get(name, ())]), []).append(i)
    others = [i for i in range(len(records)) if i not in waived] if waived else range(len(records))
    new: dict[str, dict[int, str]] = {}
    changed: list[tuple[int, bytes]] = []
    special = tuple(sorted(special_tokens))
    for names, rows in ((tuple(checks), others), *few.items()):
        table = row_cache.facts(_repair_block, (names, special), Selected(records, rows), (names, special))
        hits = table.with_row_index("row").drop_nulls("line").select("row", "line", "faults").rows()
        indices = [rows[k] for k, _, _ in hits]
        for i, old, (_, line, faults) in zip(indices, records.encoded(indices), hits, strict=True):
            changed.append((i, row_cache.numbered(line, old)))
            for name, fault in json.loads(faults).items():
                new.setdefault(name, {})[i] = fault
    for name in checks:
        if name in new:
            found.setdefault(name, {}).update(sorted(new[name].items()))
    return RepairResult(records.with_changes(sorted(changed)), found)


def _repair_block(shared: tuple[Sequence[str], Collection[str]], lines: Sequence[bytes]) -> pl.DataFrame:
    """Of each row of a block: `line`, encoded, if it was repaired, and `faults`: check -> description, as JSON.

    Args:
        shared: checks and special tokens, as in `repair`.
    """
    import polars as pl

    checks, special_tokens = shared
    records = [decode(line) for line in lines]
    found: dict[int, dict[str, str]] = {}
    for name in checks:
        find, repaired = REPAIRS[name].make(special_tokens)
        rows = {i: wrong for i, wrong in enumerate(find(records)) if wrong}
        tried = {i: repaired(records[i]) for i in rows}
        for i, left in zip(tried, find([*tried.values()]), strict=True):
            if left is None:
                records[i] = _add_names(tried[i], records[i], name)
                found.setdefault(i, {})[name] = rows[i]
    size = range(len(lines))
    return pl.DataFrame(
        {
            "line": pl.Series([encode(records[i]) if i in found else None for i in size], dtype=pl.Binary),
            "faults": pl.Series([json.dumps(found[i]) if i in found else None for i in size], dtype=pl.String),
        }
    )


def _add_names(new: Record, old: Record, check: str) -> Record:
    """The repaired record with its new content hash, and the names of its repairs."""
    names = dict.fromkeys([*old.get("repaired", ()), check])
    return {
        **new,
        "example_id": content_id(new),
        "source_id": old.get("source_id", old["example_id"]),
        "repaired": [*names],
    }


def _rewritten(
    record: Record, change: Callable[[str], str], whole: bool = False, argument: Callable[[str, str], str] | None = None
) -> Record:
    """The record with `change` applied to every message, to copies in `meta`, and to a category that is the response.

    Args:
        whole: apply it also to every text and number in `meta`, to any category, and to the names of speakers.
        argument: changes a text in the arguments of a call or in `meta`, given its name and the text; `change` unless
            given.
    """
    given = argument or (lambda _, text: change(text))
    new = {**record, "messages": [_changed_message(m, change, given, whole) for m in record["messages"]]}
    if record.get("rejected"):
        new["rejected"] = [_changed_message(m, change, given, whole) for m in record["rejected"]]
    if is_labeled(record) or (whole and record.get("category")):
        new["category"] = change(record["category"])
    meta = json.loads(record["meta"])
    changed = _changed_argument(meta, given) if whole else meta
    if "input" in meta and (not whole or isinstance(meta["input"], str)):
        changed = {**changed, "input": _change_texts(meta["input"], change)}  # as in the question
    return new if changed == meta else {**new, "meta": _dumped(changed)}


def _changed_message(
    message: Message, change: Callable[[str], str], argument: Callable[[str, str], str], whole: bool
) -> Message:
    """Content, reasoning and arguments changed, and with `whole` the name; all other fields unchanged."""
    new = {**message, "content": change(message["content"])}
    if message.get("reasoning_content"):
        new["reasoning_content"] = change(message["reasoning_content"])
    if whole and message.get("name"):
        new["name"] = change(message["name"])
    if message.get("tool_calls"):
        new["tool_calls"] = []
        for call in message["tool_calls"]:
            arguments = _changed_argument(call["function"]["arguments"], argument)
            new["tool_calls"].append({**call, "function": {**call["function"], "arguments": arguments}})
    return new


def _changed_argument(value: Any, change: Callable[[str, str], str], name: str = "") -> Any:
    """A changed number, such as that of a card, becomes text."""
    if isinstance(value, dict):
        return {key: _changed_argument(one, change, key) for key, one in value.items()}
    if isinstance(value, list):
        return [_changed_argument(one, change, name) for one in value]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    new = change(name, str(value))
    return value if new == str(value) else new


def _change_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_change_texts(one, change) for one in value]
    return {key: _change_texts(one, change) for key, one in value.items()} if isinstance(value, dict) else value


def _dumped(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, ensure_ascii=False, sort_keys=True)


def _of_texts(find: Callable[[Sequence[str]], list[str | None]], text: Callable[[Record], str] = text_of) -> Find:
    return lambda records: find([text(record) for record in records])


def _characters(
    find: Callable[[Sequence[str]], list[str | None]], change: Callable[[str], str]
) -> Callable[[Collection[str]], tuple[Find, Callable[[Record], Record]]]:
    return lambda _: (_of_texts(find), lambda record: _rewritten(record, change))


def _marks(special: Collection[str]) -> tuple[Find, Callable[[Record], Record]]:
    def find(texts: Sequence[str]) -> list[str | None]:
        found = damage.template_marks(texts, special)
        return [None if mark and mark.startswith("transcript") else mark for mark in found]

    return _of_texts(find), lambda record: _rewritten(record, lambda text: damage.without_end_marks(text, special))


def _values(secret: bool) -> Callable[[Collection[str]], tuple[Find, Callable[[Record], Record]]]:
    """Personal data, or secrets. They are removed from `meta` and the category, too."""

    def find(texts: Sequence[str]) -> list[str | None]:
        found: list[str | None] = [None] * len(texts)
        for hit in privacy.scan(texts):
            if hit.secret is secret:
                found[hit.row] = found[hit.row] or f"{hit.kind}: {hit.excerpt}"
        return found

    def redact(text: str) -> str:
        return privacy.redact(text, secret)

    def argument(name: str, text: str) -> str:
        """The name may identify the value: "phone: 0151 1234567" is a phone number, "0151 1234567" may be an order."""
        prefix = f"{name}: " if name else ""
        named = redact(f"{prefix}{text}")
        return named.removeprefix(prefix) if named.startswith(prefix) else redact(text)

    def repaired(record: Record) -> Record:
        return _rewritten(record, redact, whole=True, argument=argument)

    return lambda _: (_of_texts(find, named_text_of), repaired)


def _find_placeholders(records: Sequence[Record]) -> list[str | None]:
    given = [next((text for text in inputs_of(record) if is_placeholder(text)), None) for record in records]
    return [None if text is None else f"placeholder: '{text.strip()}'" for text in given]


def _without_input(record: Record) -> Record:
    """The record with an empty input: in the Alpaca layout, the input follows a blank line at the question's end."""
    meta = json.loads(record["meta"])
    given = meta.get("input")
    if not (isinstance(given, str) and is_placeholder(given)):
        return record
    messages = [dict(message) for message in record["messages"]]
    for message in messages:
        if message["role"] == "user" and message["content"].endswith(f"\n\n{given}"):
            message["content"] = message["content"].removesuffix(f"\n\n{given}")
            del meta["input"]
            return {**record, "messages": messages, "meta": _dumped(meta)}
    return record


REPAIRS: dict[str, Repair] = {
    "hidden_characters": Repair(
        "removes byte order marks and zero-width characters", _characters(damage.hidden, damage.without_hidden)
    ),
    "unicode_form": Repair("composes it (NFC)", _characters(damage.decomposed, lambda text: normalize("NFC", text))),
    "placeholder_input": Repair(
        "empties an input that only says that there is none", lambda _: (_find_placeholders, _without_input)
    ),
    "special_tokens_in_text": Repair(
        "removes end tokens from the end of a text, and start tokens from its start", _marks
    ),
    "encoding": Repair("undoes mojibake", _characters(damage.damage, damage.repaired_encoding)),
    "secrets": Repair("replaces each one by a typed placeholder such as `[AWS_KEY]`", _values(secret=True)),
    "pii": Repair("replaces each value by a typed placeholder such as `[EMAIL]`", _values(secret=False)),
}
"""In the order in which a row is repaired: characters first, so that later repairs apply to the final text."""
