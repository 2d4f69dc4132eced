"""Decisions of people on single rows: waivers in params.yaml, and the review file.

Both name rows and give a reason; reports count them.
"""

from __future__ import annotations

import csv
import datetime
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from pydantic import Field, field_validator, model_validator

from dagster_project.core.context import ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message, conversation_text
from dagster_project.core.params import Section
from dagster_project.core.records import content_id, is_labeled, prompt_text, response_text
from dagster_project.core.stored_rows import StoredRows, encode
from dagster_project.core.text import cell
from dagster_project.curation.sources.files import MAX_ROW_BYTES
from dagster_project.curation.sources.reading import locate

Decide = Literal["accept", "drop", "edit"]
REVIEWED = "reviewed"
"""In the column `check`: no check found the row, a person did. Such a row can be dropped or edited."""
COLUMNS = ("example_id", "place", "check", "prompt", "response", "decision", "reason", "new_prompt", "new_response")


class Exemption(Section):
    """What every waiver must state."""

    check: str
    """Name of the check."""
    reason: str = Field(min_length=1)
    """Why the check may fail, in words. Reports show it with the check."""
    expires: datetime.date
    """Last day on which the waiver is valid, in quotes, because DVC cannot parse YAML dates. After this day params.yaml
    is refused until the waiver is renewed or removed."""

    @field_validator("expires", mode="before")
    @classmethod
    def _in_quotes(cls, expires: Any) -> Any:
        return datetime.date.fromisoformat(expires) if isinstance(expires, str) else expires


class Waiver(Exemption):
    """Rows or pairs that may violate a check, with the reason."""

    rows: list[str] = []
    """Rows, each as `source:row` (0-based) or as the first 8 or more characters of its `example_id`."""
    pairs: list[list[str]] = []
    """Pairs of rows, for checks that compare two: each is a list of two rows, or of a row and a benchmark item, as
    named in the finding."""

    @field_validator("pairs")
    @classmethod
    def _check_pairs(cls, pairs: list[list[str]]) -> list[list[str]]:
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a pair is a list of two rows")
        return pairs

    @model_validator(mode="after")
    def _check_names(self) -> Waiver:
        if not self.rows and not self.pairs:
            raise ValueError("names neither rows nor pairs")
        return self


def refuse_expired(waivers: Sequence[Exemption], where: str, today: datetime.date) -> None:
    """A stage's result never depends on the day: an expired waiver is bad input; it does not silently stop working.

    Raises:
        InputError: names every waiver that has expired.
    """
    expired = [(i, waiver) for i, waiver in enumerate(waivers) if waiver.expires < today]
    if expired:
        lines = [f"{where}.{i}: the waiver for {waiver.check} expired on {waiver.expires}" for i, waiver in expired]
        raise InputError("\n".join(lines), "renew it with a new reason and date, or remove it")


def check_waivers(waivers: Sequence[Exemption], ctx: ValidationContext) -> None:
    """Raises:
    InputError: a waiver has expired, or its date is not quoted in params.yaml, where DVC cannot parse YAML dates.
    """
    for i, written in enumerate((ctx.value or {}).get("waivers", ())):
        if not isinstance(written["expires"], str):
            raise InputError(
                f"params.yaml: {ctx.section}.waivers.{i}.expires: DVC cannot parse YAML dates",
                f'quote the value: "{written["expires"]}"',
            )
    refuse_expired(waivers, f"params.yaml: {ctx.section}.waivers", datetime.date.today())


def refuse_missing_files(params: Any, ctx: ValidationContext) -> None:
    """Validate waivers, review file and benchmarks of a stage that checks rows.

    Raises:
        InputError: as `check_waivers`; or a file is missing or outside its folder.
    """
    check_waivers(params.waivers, ctx)
    if params.review:
        locate(ctx.root, params.review, f"{ctx.section}.review", "data/sources/review")
    for path in params.benchmarks:
        locate(ctx.root, path, f"{ctx.section}.benchmarks", "data/sources/benchmarks")


@dataclass(frozen=True)
class Decision:
    """One filled-in line of the review file."""

    example_id: str
    check: str
    decision: Decide
    reason: str
    new_prompt: str = ""
    new_response: str = ""


def ids_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A record's `example_id` and, if it was repaired or edited, its original one. Reviewers may use either."""
    return tuple(dict.fromkeys((record["example_id"], record.get("source_id") or record["example_id"])))


class RowIndex:
    """The rows of a set that have some names that reviewers use."""

    def __init__(self, records: Iterable[dict[str, Any]], names: Iterable[str]) -> None:
        self._places: dict[str, list[int]] = {name: [] for name in names}
        hashes = [name for name in self._places if re.fullmatch(r"[0-9a-f]{8,32}", name)]
        self._prefixes: dict[str, list[tuple[str, int]]] = {name[:8]: [] for name in hashes}
        for i, record in enumerate(records):
            if (place := f"{record['source']}:{record['source_row']}") in self._places:
                self._places[place].append(i)
            for identity in ids_of(record):
                if identity[:8] in self._prefixes:
                    self._prefixes[identity[:8]].append((identity, i))

    def rows(self, name: str) -> list[int]:
        """Indices of the records with a name: a place names those of one source row, a content hash all copies."""
        found = (i for identity, i in self._prefixes.get(name[:8], ()) if identity.startswith(name))
        return self._places[name] or [*dict.fromkeys(found)]


@dataclass(frozen=True)
class Waived:
    """Waivers, resolved on the rows of a set."""

    rows: Mapping[str, set[int]]
    """Check -> indices of waived rows."""
    pairs: Mapping[str, set[tuple[int | str, int | str]]]
    """Check -> waived pairs, in both orders; a benchmark item is given by its name."""
    reasons: Mapping[tuple[str, int], str]
    unknown: Sequence[str]
    """Names that match no row of the set."""


def resolve(
    waivers: Iterable[Waiver], decisions: Iterable[Decision], records: Iterable[dict[str, Any]], held_out: set[str]
) -> Waived:
    """Args:
    decisions: those that accept a row waive the named check.
    held_out: places of the benchmark items.
    """
    waivers, accepted = list(waivers), [d for d in decisions if d.decision == "accept"]
    rows: dict[str, set[int]] = {}
    pairs: dict[str, set[tuple[int | str, int | str]]] = {}
    reasons: dict[tuple[str, int], str] = {}
    unknown: list[str] = []
    if not waivers and not accepted:
        return Waived(rows, pairs, reasons, unknown)
    exempt = [(w.check, row, w.reason) for w in waivers for row in w.rows]
    exempt += [(d.check, d.example_id, d.reason) for d in accepted]
    compared = [name for w in waivers for pair in w.pairs for name in pair]
    named = RowIndex(records, [*(name for _, name, _ in exempt), *compared])
    for check, name, reason in exempt:
        found = named.rows(name)
        unknown += [] if found else [name]
        rows.setdefault(check, set()).update(found)
        reasons |= {(check, i): reason for i in found}
    for waiver in waivers:
        for pair in waiver.pairs:
            sides: list[list[int | str]] = [
                [*named.rows(name)] or ([name] if name in held_out else []) for name in pair
            ]
            unknown += [name for name, side in zip(pair, sides, strict=True) if not side]
            for a in sides[0]:
                for b in sides[1]:
                    pairs.setdefault(waiver.check, set()).update({(a, b), (b, a)})
    return Waived(rows, pairs, reasons, unknown)


def not_found(decisions: Iterable[Decision], *sets: Iterable[dict[str, Any]]) -> list[str]:
    """The rows to drop or edit that are in none of some sets: of an earlier version, or with a typing error."""
    missing = {d.example_id: True for d in decisions if d.decision != "accept"}
    for records in sets if missing else ():
        for record in records:
            for name in ids_of(record):
                missing.pop(name, None)
    return [*missing]


def read_decisions(path: Path, checks: Collection[str]) -> list[Decision]:
    """The filled-in lines of a review file; lines without a decision are skipped.

    Args:
        checks: names of the checks of the set.
    Raises:
        InputError: lists every line with an unknown decision or check, without a reason, with nothing to edit or
            accept, or with more fields than columns.
    """
    lines = _review_lines(path)
    missing = {"example_id", "check", "decision", "reason"} - set(lines[0] if lines else COLUMNS)
    if missing:
        raise InputError(f"{path.name}: no column {', '.join(sorted(missing))}", f"columns: {', '.join(COLUMNS)}")
    decisions, problems = [], []
    earlier = _Earlier({}, {}, {})
    for number, line in enumerate(lines, 1):
        values = {name: line.get(name) or "" for name in COLUMNS}
        decision = values["decision"].strip().lower()
        if None in line:
            problem = "more fields than columns; put texts with commas in double quotes"
        elif not decision:
            continue
        else:
            problem = _decision_problem(values, decision, checks) or earlier.contradiction(values, decision)
        if problem:
            problems.append(f"{path.name}: row {number}: {problem}")
        else:
            texts = values["reason"].strip(), values["new_prompt"], values["new_response"]
            key = values["example_id"].strip(), values["check"].strip()
            decisions.append(Decision(*key, cast(Decide, decision), *texts))
    if problems:
        raise InputError("\n".join(problems), "fill in decision (accept, drop or edit) and reason, or leave both empty")
    return decisions


def _review_lines(path: Path) -> list[dict[str | None, Any]]:
    usual = csv.field_size_limit(MAX_ROW_BYTES)  # prompts are as long as rows may be
    try:
        text = path.read_text(encoding="utf-8-sig")
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 at byte {error.start}", "save the file as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path.name}: not CSV: {error}", "close every quote; double quotes inside one") from None
    finally:
        csv.field_size_limit(usual)


def _decision_problem(values: Mapping[str, str], decision: str, checks: Collection[str]) -> str:
    """What is wrong with a filled-in line by itself; empty if nothing is."""
    check = values["check"].strip()
    if decision not in get_args(Decide):
        return f"{decision!r} is none of {', '.join(get_args(Decide))}"
    if check not in {*checks, REVIEWED}:
        return f"{check!r} is not a check of this set; for what no check found, write {REVIEWED}"
    if decision == "accept" and check == REVIEWED:
        return f"accept, but {REVIEWED} is not a check that the row could violate"
    if not values["reason"].strip():
        return "no reason"
    if decision == "edit" and not (values["new_prompt"].strip() or values["new_response"].strip()):
        return "edit, but new_prompt and new_response are both empty"
    return ""


class _Earlier(NamedTuple):
    """What earlier lines of a review file decide."""

    decisions: dict[tuple[str, str], str]
    """(example_id, check) -> decision."""
    changes: dict[str, str]
    """example_id -> drop or edit."""
    texts: dict[tuple[str, str], str]
    """(example_id, column) -> new text."""

    def contradiction(self, values: Mapping[str, str], decision: str) -> str:
        """How a line contradicts earlier ones; empty if it does not, in which case it becomes one of them."""
        identity, check = values["example_id"].strip(), values["check"].strip()
        if self.decisions.setdefault((identity, check), decision) != decision:
            return f"{identity} was already decided otherwise for {check}"
        if decision != "accept" and self.changes.setdefault(identity, decision) != decision:
            return f"{identity} is both dropped and edited"
        for column in ("new_prompt", "new_response") if decision == "edit" else ():
            text = values[column]
            if text.strip() and self.texts.setdefault((identity, column), text) != text:
                return f"{identity} was already edited otherwise"
        return ""


def edited(records: StoredRows, decisions: Sequence[Decision]) -> tuple[StoredRows, dict[int, str]]:
    """The records with the edits applied, and index -> reason of each edit.

    An edited row gets a new `example_id`, and as `source_id` that of the row as it was read.
    """
    edits: dict[str, Decision] = {}
    for d in decisions:
        if d.decision == "edit":  # a row may be edited in the lines of several checks
            first = edits.get(d.example_id, d)
            prompt = d.new_prompt if d.new_prompt.strip() else first.new_prompt
            response = d.new_response if d.new_response.strip() else first.new_response
            edits[d.example_id] = replace(d, new_prompt=prompt, new_response=response)
    changed: list[tuple[int, bytes]] = []
    reasons: dict[int, str] = {}
    for i, record in enumerate(records) if edits else ():
        if edit := edits.get(record["example_id"]):
            changed.append((i, encode(_edit(record, edit))))
            reasons[i] = edit.reason
    return records.with_changes(changed) if changed else records, reasons


def _edit(record: dict[str, Any], edit: Decision) -> dict[str, Any]:
    """The record with new texts.

    A new prompt replaces the last question; in a pair, whose answers may have questions too, that of its prompt. A new
    response that is a label is the category, too.
    """
    messages = [dict(message) for message in record["messages"]]
    for role, text, end in (("user", edit.new_prompt, record.get("asked")), ("assistant", edit.new_response, None)):
        at = max((k for k, message in enumerate(messages[:end]) if message["role"] == role), default=None)
        if text.strip() and at is not None:
            messages[at]["content"] = text
    new = {**record, "messages": messages}
    if is_labeled(record) and edit.new_response.strip():
        new["category"] = response_text(messages).strip()
    identity = content_id(new)
    if identity == record["example_id"]:
        return new
    return {**new, "example_id": identity, "source_id": record.get("source_id") or record["example_id"]}


def queue(records: Sequence[dict[str, Any]], waiting: Iterable[tuple[int, str]]) -> str:
    """The review file for rows that no rule can decide, as CSV: a person fills in decision, reason and new texts.

    Args:
        waiting: (index of a record, check).
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for i, check in waiting:
        record = records[i]
        place = f"{record['source']}:{record['source_row']}"
        said = (prompt_text(record["messages"]), conversation_text(_answer(record["messages"])))
        writer.writerow([record["example_id"], place, check, *map(cell, said), "", "", "", ""])
    return file.getvalue()


def _answer(messages: Sequence[Message]) -> Sequence[Message]:
    """The response, with its reasoning and calls. An edit in `new_response` replaces its content only."""
    return messages[-1:] if messages and messages[-1]["role"] == "assistant" else ()
