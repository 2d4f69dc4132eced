"""The data-quality checks: their names (the same in code, reports, UI and command line), pandera schemas, and policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from dagster_project.curation.facts import gather, mask
from dagster_project.params import Section
from dagster_project.records import CheckResult, prompt_text

if TYPE_CHECKING:
    import pandera.polars as pa
    import polars as pl

Action = Literal["drop", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    truth: str
    """What holds for good data. Shown as the check's description."""
    severity: Literal["error", "warn", "info"]
    action: Action
    """What a stage does with a row that breaks it, unless params.yaml says otherwise."""


ROW_CHECKS: dict[str, Check] = {
    "malformed_row": Check("Every row can be read in its format.", "error", "drop"),
    "invalid_roles": Check("Roles are system (optional), then user and assistant in turns.", "error", "drop"),
    "ends_on_user_turn": Check("Every conversation ends with the assistant's answer.", "error", "drop"),
    "empty_prompt": Check("Every prompt has text.", "error", "drop"),
    "empty_response": Check("Every response has text.", "error", "drop"),
    "placeholder_input": Check("No input merely says that there is none.", "warn", "drop"),
    "special_tokens_in_text": Check("No text holds a chat template's control tokens.", "error", "drop"),
    "encoding": Check("No text shows encoding damage.", "warn", "drop"),
    "pii": Check("No text holds an e-mail address.", "warn", "drop"),
    "exact_duplicates": Check("No two rows are identical.", "warn", "drop"),
    "benchmark_leakage": Check("No prompt overlaps a held-out benchmark.", "error", "drop"),
    "conflicting_responses": Check("The same prompt never has two different responses.", "warn", "warn"),
    "near_duplicates": Check("No two prompts are nearly the same.", "warn", "warn"),
}
"""In the order in which a row is judged: it is dropped for the first check it breaks."""

SET_CHECKS: dict[str, Check] = {
    "schema": Check("The set has rows, and each column the canonical type.", "error", "fail"),
    "small_dataset": Check("The set is large enough to learn from.", "warn", "warn"),
    "unbalanced_categories": Check("No category is far more frequent than another.", "warn", "warn"),
}

CHECKS = {**ROW_CHECKS, **SET_CHECKS}


class Rules(Section):
    """How strictly a set is judged."""

    policy: dict[str, Action] = {}
    """Check -> `drop` the row, keep it and `warn`, or `fail` the stage. Checks not named keep their default."""
    balance_ratio: float = 5.0
    """The largest category may be at most this many times as frequent as the smallest."""
    min_rows: int = 100
    """Sets smaller than this get `small_dataset`."""

    @field_validator("policy")
    @classmethod
    def _known(cls, policy: dict[str, Action]) -> dict[str, Action]:
        for name, action in policy.items():
            if name not in CHECKS:
                raise ValueError(f"unknown check {name!r}; checks: {', '.join(CHECKS)}")
            if name in SET_CHECKS and action == "drop":
                raise ValueError(f"{name} judges the set as a whole: warn or fail, not drop")
        return policy

    def action(self, name: str) -> Action:
        return self.policy.get(name, CHECKS[name].action)


def _is_true(name: str) -> pa.Column:
    import pandera.polars as pa
    import polars as pl

    return pa.Column(pl.Boolean, pa.Check(lambda data: data.lazyframe.select(pl.col(data.key)), name=name))


def _is_null(name: str, dtype: Any) -> pa.Column:
    import pandera.polars as pa
    import polars as pl

    return pa.Column(
        dtype, pa.Check(lambda data: data.lazyframe.select(pl.col(data.key).is_null()), name=name, ignore_na=False), nullable=True
    )


def row_schema() -> pa.DataFrameSchema:
    """What must be true of every row of `facts.gather`. Each check carries the name it is reported under."""
    import pandera.polars as pa
    import polars as pl

    return pa.DataFrameSchema(
        {
            "problem": _is_null("malformed_row", pl.String),
            "roles_valid": _is_true("invalid_roles"),
            "ends_with_assistant": _is_true("ends_on_user_turn"),
            "has_prompt": _is_true("empty_prompt"),
            "has_response": _is_true("empty_response"),
            "input_is_real": _is_true("placeholder_input"),
            "special_token": _is_null("special_tokens_in_text", pl.String),
            "damage": _is_null("encoding", pl.String),
            "email": _is_null("pii", pl.String),
            "repeats": _is_null("exact_duplicates", pl.Int64),
            "leaks": _is_null("benchmark_leakage", pl.Int64),
            "conflicts_with": _is_null("conflicting_responses", pl.Int64),
            "near_copy_of": _is_null("near_duplicates", pl.Int64),
        },
        strict=True,
    )


def violations(frame: pl.DataFrame, schema: pa.DataFrameSchema) -> dict[str, list[int]]:
    """Check name -> indices of the rows that break it, in order. The frame is eager, so data checks really run."""
    import pandera.polars as pa

    found: dict[str, list[int]] = {}
    try:
        schema.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases
        broken = cases.filter(cases["index"].is_null())
        if len(broken):
            raise AssertionError(f"the facts table itself is wrong: {broken.to_dicts()}") from None
        for case in cases.select("check", "index").iter_rows(named=True):
            found.setdefault(case["check"], []).append(case["index"])
    return {name: sorted(set(rows)) for name, rows in found.items()}


def balance_schema(ratio: float, rows: int) -> pa.DataFrameSchema:
    """What must be true of the set as a whole: one row per category with its `rows` and its `share`.

    Args:
        ratio: the largest category may be at most this many times as frequent as the smallest.
        rows: fewest rows in all.
    """
    import pandera.polars as pa
    import polars as pl

    def balanced(data: Any) -> Any:
        return data.lazyframe.select(pl.col(data.key).max() <= ratio * pl.col(data.key).min())

    def enough(data: Any) -> Any:
        return data.lazyframe.select(pl.col(data.key).sum() >= rows)

    return pa.DataFrameSchema(
        {
            "category": pa.Column(pl.String),
            "rows": pa.Column(pl.Int64, pa.Check(enough, name="small_dataset")),
            "share": pa.Column(pl.Float64, [pa.Check.in_range(0, 1), pa.Check(balanced, name="unbalanced_categories")]),
        },
        strict=True,
    )


def set_failures(categories: Sequence[str | None], ratio: float, rows: int) -> dict[str, str]:
    """Which of the checks on the whole set fail, with the figures. Uncategorised rows are one category of their own if there is no other."""
    import pandera.polars as pa
    import polars as pl

    counted = Counter(category for category in categories if category is not None)
    uncategorised = len(categories) - sum(counted.values())
    table = sorted(counted.items()) or [("(none)", uncategorised)]
    frame = pl.DataFrame(
        {"category": [name for name, _ in table], "rows": [n for _, n in table], "share": [n / max(1, len(categories)) for _, n in table]},
        schema={"category": pl.String, "rows": pl.Int64, "share": pl.Float64},
    )
    notes = {
        "small_dataset": f"{len(categories)} rows; fewer than {rows} rarely teach more than format",
        "unbalanced_categories": ", ".join(f"{name} {n}" for name, n in sorted(table, key=lambda item: -item[1])),
    }
    try:
        balance_schema(ratio, rows - (uncategorised if counted else 0)).validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        return {name: notes[name] for name in notes if name in set(errors.failure_cases["check"])}
    return {}


@dataclass(frozen=True)
class Judgement:
    """What the checks found in a set of records."""

    reason: list[str | None]
    """For each record the check it is dropped for, or None if it is kept."""
    cluster: list[int]
    """For each record the first record of its near-duplicate cluster."""
    broken: dict[str, list[int]]
    """Check -> indices of the records that break it."""
    results: list[CheckResult]


def judge(records: Sequence[dict[str, Any]], held_out: Sequence[str], rules: Rules) -> Judgement:
    """Run every check on canonical records (with `source` and `source_row`).

    Args:
        held_out: texts that must not be trained on; empty where there are none, and `benchmark_leakage` says so.
    """
    facts, cluster = gather(records, held_out)
    broken = violations(facts, row_schema()) if records else {}
    reason: list[str | None] = [None] * len(records)
    for name in ROW_CHECKS:
        if rules.action(name) == "drop":
            for i in broken.get(name, []):
                reason[i] = reason[i] or name
    kept = [record["category"] for record, why in zip(records, reason, strict=True) if why is None]
    whole = {"schema": "no rows are left"} if not kept else set_failures(kept, rules.balance_ratio, rules.min_rows)
    results = [_result(name, rules.action(name), broken.get(name, []), reason, records) for name in ROW_CHECKS]
    results = [
        replace(r, note="nothing held out to compare with") if r.name == "benchmark_leakage" and not held_out else r for r in results
    ]
    results += [_result(name, rules.action(name), [], reason, records, whole.get(name)) for name in SET_CHECKS]
    return Judgement(reason, cluster, broken, results)


def _result(
    name: str,
    action: Action,
    broken: Sequence[int],
    reason: Sequence[str | None],
    records: Sequence[dict[str, Any]],
    failure: str | None = None,
) -> CheckResult:
    """A check's outcome. It passes if no row that is kept breaks it, and says how many were dropped for it."""
    dropped = sum(why == name for why in reason)
    return CheckResult(
        name=name,
        passed=failure is None and all(reason[i] is not None for i in broken),
        severity="error" if action == "fail" else CHECKS[name].severity,
        blocking=action == "fail",
        count=len(broken),
        rows=[f"{records[i]['source']}:{records[i]['source_row']}" for i in broken[:20]],
        examples=[excerpt(records[i]) for i in broken[:3]],
        note=failure or (f"{dropped} dropped" if dropped else ""),
    )


def excerpt(record: dict[str, Any], width: int = 120) -> str:
    """The first words of a record for a person to recognise it by, e-mail addresses masked."""
    text = prompt_text(record["messages"]) or " ".join(m["content"] for m in record["messages"]) or record["meta"]
    return mask(" ".join(text.split()))[:width]
