"""The data-quality checks: names (the same in code, reports, UI and command line), pandera schemas, and policy."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from dagster_project.core import row_cache
from dagster_project.core.imports import import_pandera
from dagster_project.core.messages import Message, conversation_text
from dagster_project.core.records import uncollected
from dagster_project.core.stored_rows import Selected, StoredRows, decode
from dagster_project.curation.checks import profile as profiles
from dagster_project.curation.checks.check import Action, Check, DataSet, Kind, Limits, Rows, Severity
from dagster_project.curation.checks.features import Features, columns, features
from dagster_project.curation.checks.overlaps import Overlaps, find_overlaps
from dagster_project.curation.checks.repair import REPAIRS, RepairResult, repair
from dagster_project.curation.checks.review import (
    REVIEWED,
    Decision,
    Waived,
    Waiver,
    edited,
    ids_of,
    not_found,
    resolve,
)
from dagster_project.curation.checks.row_checks import ROW_CHECKS, gather, row_schema, set_violations, violations
from dagster_project.curation.checks.token_counts import ESTIMATED, Tokens
from dagster_project.curation.sources.benchmarks import Item

if TYPE_CHECKING:
    import pandera.polars as pa
    import polars as pl

_SET_CHECKS = (
    Check(
        "schema",
        "The set has rows, and each column the canonical type.",
        "error",
        "See the rows dropped by the checks above.",
        "fail",
    ),
    Check(
        "small_dataset",
        "The set is large enough to learn from.",
        "warn",
        "Add examples, or compare with a good prompt first.",
        "warn",
    ),
    Check(
        "unbalanced_categories",
        "No category is far more frequent than another.",
        "warn",
        "Add rows of rare categories, or remove rows of frequent ones.",
        "warn",
    ),
    Check(
        "low_diversity",
        "Tasks, wording and answers vary.",
        "warn",
        "Vary the wording of the examples: from copies of one template a model learns the template.",
        "warn",
    ),
    Check(
        "length_bias",
        "Response length does not predict the chosen response.",
        "warn",
        "Add pairs in which the response of the other length was chosen.",
        "warn",
        kind="preferences",
    ),
)
SET_CHECKS = {check.name: check for check in _SET_CHECKS}
CHECKS: dict[str, Check] = {**ROW_CHECKS, **SET_CHECKS}


def checks_of(kind: Kind) -> dict[str, Check]:
    """The checks that apply to one kind of data."""
    return {name: check for name, check in CHECKS.items() if check.kind in {None, kind}}


class Rules(profiles.Limits):
    """Policy, severities and limits of the checks."""

    policy: dict[str, Action] = {}
    """Check -> what to do with rows that fail it. `fix` repairs the row, or drops it where no repair is possible;
    `drop` removes it; `review` keeps it until a person decides in the `review` file; `warn` keeps it and reports it;
    `fail` stops the stage. See docs/checks.md."""
    severity: dict[str, Severity] = {}
    """Check -> severity, to replace the default. A check with policy `fail` is always an error."""
    max_tokens: int = Field(default=2048, ge=16)
    """Tokens of the base model's tokenizer that a conversation may have. Longer ones fail `too_long`."""
    min_response_tokens: int = Field(default=2, ge=0)
    """Responses with fewer tokens fail `short_response`."""
    near_duplicate_similarity: float = Field(default=0.65, ge=0, le=1)
    """Jaccard index of three-word shingles at or above which two prompts fail `near_duplicates`. Near-copies from 0.3
    on share a `group_id` and stay in one split, reported or not."""
    max_longer_share: float = Field(default=0.65, ge=0.5, le=1)
    """Preferences: largest share of pairs whose chosen response may be the longer one, or the shorter one; above it
    `length_bias` fails. 0.5 means no bias."""
    waivers: list[Waiver] = []
    """Rows and pairs that may fail a check, each with a reason and an expiry date. See docs/checks.md."""

    @field_validator("policy", "severity")
    @classmethod
    def _check_names(cls, values: dict[str, str]) -> dict[str, str]:
        for name, value in values.items():
            if name not in CHECKS:
                raise ValueError(f"unknown check {name!r}; checks: {', '.join(CHECKS)}")
            if value == "fix" and name not in REPAIRS:
                raise ValueError(f"{name} has no repair; checks that can be fixed: {', '.join(REPAIRS)}")
            if name in SET_CHECKS and value in {"drop", "review"}:
                raise ValueError(f"{name} applies to the set as a whole: use warn or fail, not {value}")
        return values

    @field_validator("waivers")
    @classmethod
    def _known_checks(cls, waivers: list[Waiver]) -> list[Waiver]:
        for waiver in waivers:
            if waiver.check not in ROW_CHECKS:
                raise ValueError(f"{waiver.check!r} is not a check on rows; checks on rows: {', '.join(ROW_CHECKS)}")
        return waivers

    def fixed(self) -> list[str]:
        """The checks with policy `fix`, in the order of repair."""
        return [name for name in REPAIRS if self.action(name) == "fix"]

    def action(self, name: str) -> Action:
        return self.policy.get(name, CHECKS[name].action)

    def severity_of(self, name: str) -> Severity:
        return "error" if self.action(name) == "fail" else self.severity.get(name, CHECKS[name].severity)


def length_schema(most: float) -> pa.DataFrameSchema:
    """Schema of a table with one row: the accuracy of choosing by length, the longer or the shorter response."""
    pa = import_pandera()
    import polars as pl

    return pa.DataFrameSchema(
        {"length_rule_accuracy": pa.Column(pl.Float64, pa.Check.le(most, error="length_bias"))}, strict=True
    )


@dataclass(frozen=True)
class Verdict:
    """Result of one check."""

    name: str
    action: Action
    severity: Severity
    broken: list[int]
    """Indices of the rows that violate it, or did before their repair; without waived ones."""
    dropped: int
    """Rows dropped by it, and not by an earlier check."""
    waived: int
    passed: bool
    """No kept row violates it; for a check on the set: it holds."""
    note: str
    fixed: int = 0
    """Rows repaired for it that are kept."""


@dataclass(frozen=True)
class Judgement:
    """Result of all checks on a set of records."""

    records: StoredRows
    """With the edits of the review file and the repairs applied. Repaired records have `repaired` and `source_id`
    (curation/checks/repair.py), edited ones `source_id`."""
    reason: list[str | None]
    """For each record the check that drops it, or None if it is kept."""
    facts: Mapping[str, Mapping[int, Any]]
    """Check -> index of each row that violates it -> the fact about it."""
    overlaps: Overlaps
    verdicts: dict[str, Verdict]
    """By check, in the order of `CHECKS`."""
    profile: dict[str, Any]
    """Of the rows that are kept."""
    said: dict[int, str] = field(default_factory=dict)
    """Index -> a person's reason for waiving, editing, accepting or dropping the row."""
    waiting: list[tuple[int, str]] = field(default_factory=list)
    """(index, check) of rows that are kept until a person reviews them."""
    repaired: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Check -> index of each row repaired for it -> description of the fault."""
    edited: Collection[int] = ()
    """Indices of the rows that the review file edits."""
    rich: Sequence[int] = ()
    """Indices of the records with tools, or with a message that has more than role and content."""
    identities: pl.DataFrame | None = None
    """Digest of each record's `example_id`, in two columns."""
    read: Sequence[dict[str, Any]] = ()
    """The records as they were given, without edits and repairs."""
    special: Collection[str] = ()
    """The base model's special tokens."""

    @property
    def dropped(self) -> dict[str, int]:
        """Check, or `REVIEWED`, -> rows dropped for it, in the order of `CHECKS`."""
        counts = Counter(why for why in self.reason if why)
        return {name: counts[name] for name in (*CHECKS, REVIEWED) if counts[name]}

    @property
    def fixed(self) -> dict[str, int]:
        """Check -> rows repaired for it that are kept."""
        return {name: verdict.fixed for name, verdict in self.verdicts.items() if verdict.fixed}

    @property
    def cluster(self) -> Sequence[int]:
        return self.overlaps.cluster

    @property
    def broken(self) -> dict[str, list[int]]:
        return {name: verdict.broken for name, verdict in self.verdicts.items() if verdict.broken}


@uncollected
def judge(
    records: Sequence[dict[str, Any]],
    held_out: Sequence[Item],
    rules: Rules,
    tokens: Tokens = ESTIMATED,
    decisions: Sequence[Decision] = (),
    kind: Kind = "examples",
    divide: Callable[[Sequence[dict[str, Any]], Overlaps, list[int]], dict[int, str]] | None = None,
) -> Judgement:
    """Run every check on canonical records or pairs (with `source` and `source_row`).

    Args:
        held_out: questions that must not be trained on; if empty, `benchmark_leakage` notes it.
        tokens: the base model's tokenizer and template.
        decisions: the filled-in lines of the review file.
        divide: assigns the rows to keep, given by index, to splits; returns index -> reason for those dropped by
            `split_leakage`.
    """
    stored = records if isinstance(records, StoredRows) else StoredRows(records)
    limits = Limits(tokens, rules.max_tokens, rules.min_response_tokens, rules.near_duplicate_similarity)
    records, edits, waived, repaired = _prepared(stored, held_out, rules, tokens, decisions)
    facts = _row_facts(records, held_out, limits, waived, repaired, rules)
    overlaps, found, broken = facts.overlaps, {name: [*rows] for name, rows in facts.found.items()}, facts.broken
    for name, spared in _spared(records, broken, overlaps, rules, decisions).items():
        for table in (found, broken):
            table[name] = [i for i in table[name] if i not in spared]
    reason, why = _drop(records, broken, rules, decisions)
    comments = {i: f"waived for {check}: {text}" for (check, i), text in waived.reasons.items()}
    comments |= {i: f"edited: {text}" for i, text in edits.items()} | why
    kept = [i for i, check in enumerate(reason) if check is None]
    if divide and kept:
        leaking = divide(records, overlaps, kept)
        comments |= leaking
        for i in leaking:
            reason[i] = "split_leakage"
        for table in (found, broken):
            table["split_leakage"] = sorted({*table.get("split_leakage", ()), *leaking})
        kept = [i for i in kept if i not in leaking]
    reviewed = [name for name in ROW_CHECKS if rules.action(name) == "review"]
    waiting = [(i, name) for name in reviewed for i in broken.get(name, []) if reason[i] is None]

    near_copies = _near_copies(overlaps, waived, reason)
    profile, notes, failures = _check_set(Selected(records, kept), near_copies, rules, tokens, kind)
    notes |= facts.notes
    fixed, dropped = repaired.counts(reason), Counter(check for check in reason if check)
    verdicts = {}
    for name in checks_of(kind):
        rows = broken.get(name, [])
        verdicts[name] = Verdict(
            name,
            rules.action(name),
            _severity(name, rules, rows, facts),
            sorted({*rows, *repaired.found.get(name, ())}),
            dropped[name],
            len({*found.get(name, []), *overlaps.waived.get(name, ())}) - len(rows),
            passed=name not in failures and all(reason[i] is not None for i in rows),
            note=notes.get(name, ""),
            fixed=fixed.get(name, 0),
        )
    return Judgement(
        records,
        reason,
        facts.found,
        overlaps,
        verdicts,
        profile,
        comments,
        waiting,
        repaired.found,
        edits.keys(),
        facts.features.rich.tolist(),
        facts.features.table.select("identity_0", "identity_1"),
        stored,
        tokens.special,
    )


@dataclass(frozen=True)
class _RowFacts:
    features: Features
    overlaps: Overlaps
    found: dict[str, dict[int, Any]]
    """Check -> index of each row that violates it -> the fact about it."""
    broken: dict[str, list[int]]
    """Indices without those of the rows for which the check is waived."""
    notes: dict[str, str]


def _row_facts(
    records: StoredRows, held_out: Sequence[Item], limits: Limits, waived: Waived, repaired: RepairResult, rules: Rules
) -> _RowFacts:
    """Run every check on rows: those that depend on one row each in blocks of rows, then those that compare rows."""
    table = row_cache.facts(_block_facts, limits, records, limits.identity)
    found = _found(table)
    dropping = [name for name in found if rules.action(name) in {"drop", "fix"}]
    dropped = {i for name in dropping for i in found[name] if i not in waived.rows.get(name, ())}
    data = DataSet(records, features(table), held_out, waived, limits, dropped)
    del table
    found |= set_violations(data)
    broken = {name: [i for i in facts if i not in waived.rows.get(name, ())] for name, facts in found.items()}
    notes = {}
    for name, check in ROW_CHECKS.items():
        of_rows = [found[name][i] for i in broken.get(name, ())]
        notes[name] = "; ".join(check.note(data, [*of_rows, *repaired.found.get(name, {}).values()]))
    if waived.unknown:
        notes["schema"] = f"waived or reviewed, but not in the set: {', '.join(sorted(set(waived.unknown))[:5])}"
    notes = {name: note for name, note in notes.items() if note}
    return _RowFacts(data.features, data.shared(find_overlaps), found, broken, notes)


def _block_facts(limits: Limits, lines: Sequence[bytes]) -> pl.DataFrame:
    """The `features.columns` of a block of encoded records, and `found`: the facts that violate checks, as JSON."""
    import polars as pl

    rows = Rows([decode(line) for line in lines], limits)
    schema = _cached_schema(limits.max_tokens, limits.min_response_tokens)
    found: dict[int, dict[str, Any]] = {}
    for name, of in violations(gather(rows, schema), schema).items():
        for i, fact in of.items():
            found.setdefault(i, {})[name] = fact
    texts = [json.dumps(found[i]) if i in found else None for i in range(len(lines))]
    return columns(rows).with_columns(found=pl.Series(texts, dtype=pl.String))


def _found(table: pl.DataFrame) -> dict[str, dict[int, Any]]:
    """Check -> index of each row that violates it, in order -> the fact about it."""
    found: dict[str, dict[int, Any]] = {name: {} for name in ROW_CHECKS}
    indices = table["found"].is_not_null().arg_true()
    for i, text in zip(indices.to_list(), table["found"].gather(indices).to_list(), strict=True):
        for name, fact in json.loads(text).items():
            found[name][i] = fact
    return {name: of for name, of in found.items() if of}


@cache
def _cached_schema(max_tokens: int, min_response_tokens: int) -> pa.DataFrameSchema:
    return row_schema(Limits(ESTIMATED, max_tokens, min_response_tokens, 0))


def _drop(
    records: StoredRows, broken: Mapping[str, list[int]], rules: Rules, decisions: Sequence[Decision]
) -> tuple[list[str | None], dict[int, str]]:
    """For each record the check that drops it, or None; and index -> comment of the reviewer who dropped it."""
    reason: list[str | None] = [None] * len(records)
    for name in ROW_CHECKS:
        if rules.action(name) in {"drop", "fix"}:
            for i in broken.get(name, []):
                reason[i] = reason[i] or name
    comments = {}
    by_id = {d.example_id: d for d in decisions if d.decision == "drop"}
    for i, record in enumerate(records) if by_id else ():
        decision = next((by_id[one] for one in ids_of(record) if one in by_id), None)
        if decision and reason[i] is None:
            reason[i], comments[i] = decision.check, f"dropped: {decision.reason}"
    return reason, comments


REPEATS = ("conflicting_responses", "near_duplicates")
"""Checks that find a row because of an earlier one that says nearly the same."""


def _spared(
    records: StoredRows,
    broken: Mapping[str, list[int]],
    overlaps: Overlaps,
    rules: Rules,
    decisions: Sequence[Decision],
) -> dict[str, set[int]]:
    """The rows that repeat nothing that is left, by check: all rows that they repeat are dropped for other reasons.

    Only of `split_leakage`, and of those of `REPEATS` that drop rows or leave them to a person.
    """
    deciding = [name for name in REPEATS if rules.action(name) in {"drop", "review"} and broken.get(name)]
    deciding += ["split_leakage"] if broken.get("split_leakage") else []
    if not deciding:
        return {}
    others = {name: rows for name, rows in broken.items() if name not in {*REPEATS, "split_leakage"}}
    gone = {i for i, check in enumerate(_drop(records, others, rules, decisions)[0]) if check}
    spared: dict[str, set[int]] = {}
    for name in deciding:
        earlier: dict[int, list[int | str]] = defaultdict(list)
        for link in overlaps.links[name]:
            earlier[link.row].append(link.other)
        rows = [i for i in broken[name] if i not in gone and gone.issuperset(earlier[i])]
        if name == "conflicting_responses":
            # those with the same earlier row conflict with each other, so one of them is left
            rows = [*{earlier[i][0]: i for i in reversed(rows)}.values()]
        spared[name] = set(rows)
    return spared


def _near_copies(overlaps: Overlaps, waived: Waived, reason: Sequence[str | None]) -> int:
    """Kept rows that share a cluster with an earlier one, exact repeats and waived rows not counted.

    The earlier one need not be nearly the same: a third row may link both.
    """
    repeats = {link.row for link in overlaps.links["exact_duplicates"]}
    exempt = {*waived.rows.get("near_duplicates", ()), *overlaps.waived.get("near_duplicates", ())}
    count, seen = 0, set[int]()
    for i, cluster in enumerate(overlaps.cluster):
        if i not in repeats:
            count += cluster in seen and reason[i] is None and i not in exempt
            seen.add(cluster)
    return count


def _check_set(
    kept: Selected, near_copies: int, rules: Rules, tokens: Tokens, kind: Kind
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Profile of the kept records, and notes and failures (check -> reason) of the checks on the set."""
    counts = None
    if 0 < len(kept) <= COUNTED and not tokens.estimated:
        counts = row_cache.facts(_count_block, tokens, kept, tokens.identity and [tokens.identity])["tokens"]
    profile = profiles.profile(kept, counts)
    failures = profiles.failures(profile, rules, near_copies) if kept else {"schema": "no rows are left"}
    notes = profiles.notes(profile, rules, near_copies) | failures
    if kind == "preferences" and kept:
        profile |= (length := _length(kept))
        accuracy, share, which = length["length_rule_accuracy"], length["chosen_longer_share"], "longer"
        if accuracy < 0.5:
            accuracy, share = (round(1 - one, 4) for one in (accuracy, 2 * accuracy - share))
            which = "shorter"
        often = "that often" if accuracy == share else f"in {accuracy:.0%}, counting half of those of equal length"
        notes["length_bias"] = (
            f'chosen is {which} in {share:.0%} of pairs, so "the {which} one wins" would be right {often}'
        )
        failures |= _set_failures("length_rule_accuracy", accuracy, length_schema(rules.max_longer_share), notes)
    return profile, notes, failures


def _prepared(
    records: StoredRows, held_out: Sequence[Item], rules: Rules, tokens: Tokens, decisions: Sequence[Decision]
) -> tuple[StoredRows, dict[int, str], Waived, RepairResult]:
    """The records to check, with the edits of the review file and, unless waived, repairs; and the edits' reasons.

    The review file shows rows as they were repaired, so edits are looked up before the repair and after it, and edited
    rows are repaired as well.
    """
    items = {item.place for item in held_out}
    changed, edits = edited(records, decisions)
    exempt = resolve(rules.waivers, decisions, changed, items).rows
    repaired = first = repair(changed, rules.fixed(), exempt, tokens.special)
    again, more = edited(repaired.records, decisions)
    if more:
        repaired = repair(again, rules.fixed(), exempt, tokens.special, repaired)
    waived = resolve(rules.waivers, decisions, repaired.records, items)
    missing = not_found(decisions, records, first.records)
    return repaired.records, edits | more, replace(waived, unknown=[*waived.unknown, *missing]), repaired


def _severity(name: str, rules: Rules, rows: Sequence[int], facts: _RowFacts) -> Severity:
    """Severity by the rules. By default, overlaps with held-out text are a warning if none of them is a copy."""
    if not rows or name in rules.severity or rules.action(name) == "fail":
        return rules.severity_of(name)
    if worst := CHECKS[name].worst:
        return worst([facts.found[name][i] for i in rows])
    if name == "benchmark_leakage":
        copied = {link.row for link in facts.overlaps.links[name] if not link.partial}
        if copied.isdisjoint(rows):
            return "warn"
    return rules.severity_of(name)


def _count_block(tokens: Tokens, lines: Sequence[bytes]) -> pl.DataFrame:
    """`tokens`: those of each conversation, without a template."""
    import polars as pl

    texts = [conversation_text(record["messages"], record.get("tools")) for record in map(decode, lines)]
    return pl.DataFrame({"tokens": pl.Series(tokens.count(texts) if texts else [], dtype=pl.Int64)})


COUNTED = 50_000
"""Maximum number of rows for which the profile counts the tokens of every conversation. Limits are checked in sets of
any size."""


def _length(pairs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of pairs whose chosen response has more characters; and the accuracy of "the longer one wins".

    Equal lengths count as half a point.
    """
    longer = equal = 0
    for pair in pairs:
        chosen, rejected = (sum(map(_size, side)) for side in (pair["messages"][pair["asked"] :], pair["rejected"]))
        longer += chosen > rejected
        equal += chosen == rejected
    return {
        "chosen_longer_share": round(longer / len(pairs), 4),
        "length_rule_accuracy": round((longer + equal / 2) / len(pairs), 4),
    }


def _size(message: Message) -> int:
    return len(message["content"]) if len(message) == 2 else len(conversation_text([message]))


def _set_failures(column: str, value: float, schema: pa.DataFrameSchema, notes: dict[str, str]) -> dict[str, str]:
    pa = import_pandera()
    import polars as pl

    try:
        schema.validate(pl.DataFrame({column: [value]}), lazy=True)
    except pa.errors.SchemaErrors as errors:
        return {name: notes[name] for name in errors.failure_cases["check"]}
    return {}
