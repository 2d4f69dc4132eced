"""The data-quality checks: their names (the same in code, reports, UI and command line), pandera schemas, and policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import eq, gt
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from dagster_project.core.records import uncollected
from dagster_project.curation.checks import profile as profiles
from dagster_project.curation.checks.content import CONTENT_CHECKS
from dagster_project.curation.checks.facts import GROUPED, Facts, Link, gather
from dagster_project.curation.checks.repair import REPAIRS, Repaired, repair
from dagster_project.curation.checks.review import Decision, Waived, Waiver, edited, ids_of, resolve
from dagster_project.curation.checks.token_counts import ESTIMATED, Tokens
from dagster_project.curation.sources.benchmarks import Item

if TYPE_CHECKING:
    import pandera.polars as pa
    import polars as pl

Action = Literal["fix", "drop", "review", "warn", "fail"]
Severity = Literal["error", "warn", "info"]


@dataclass(frozen=True)
class Check:
    truth: str
    """What holds for good data. Shown as the check's description."""
    severity: Severity
    action: Action
    """What a stage does with a row that breaks it, unless params.yaml says otherwise."""
    next: str
    """What to do about it."""


ROW_CHECKS: dict[str, Check] = {
    "malformed_row": Check(
        "Every row can be read in its format.", "error", "drop", "Mend the rows; rows are counted from 0, lines from 1."
    ),
    "unpaired_answer": Check(
        "Every answer called good or bad has a counterpart to the same prompt.",
        "warn",
        "drop",
        "Add an answer of the other kind to the same prompt: alignment learns from pairs.",
    ),
    "unlabelled": Check("Every benchmark question has its answer.", "error", "drop", "Use the split of the benchmark that has labels."),
    "invalid_roles": Check(
        "Roles are system (optional), then user and assistant in turns.",
        "error",
        "drop",
        "Put the turns in order, or name the right format.",
    ),
    "ends_on_user_turn": Check(
        "Every conversation ends with the assistant's answer.", "error", "drop", "Add the answer, or cut the last question off."
    ),
    "empty_prompt": Check("Every prompt has text.", "error", "drop", "Write the prompt, or take the row out."),
    "empty_response": Check("Every response has text.", "error", "drop", "Write the response, or take the row out."),
    "placeholder_input": Check("No input merely says that there is none.", "warn", "fix", "Leave the input empty instead."),
    "prompt_mismatch": Check(
        "Chosen and rejected answer the same prompt; of sides with several turns only the last may differ.",
        "error",
        "drop",
        "Pair answers to one prompt.",
    ),
    "identical_pair": Check(
        "Chosen and rejected differ in more than case, white space, Unicode form or the final stop.",
        "error",
        "drop",
        "Take the pair out: it teaches nothing.",
    ),
    "tied_pair": Check("One of chosen and rejected is better.", "warn", "drop", "Take ties out, or have them judged again."),
    "short_response": Check(
        "No response is too short to teach anything.", "info", "warn", "Read a few; lower `min_response_tokens` if short answers are meant."
    ),
    "too_long": Check(
        "Every example fits into `max_tokens` tokens of the base model.",
        "warn",
        "warn",
        "Shorten or divide them, or raise `max_tokens` (of preferences `max_length`).",
    ),
    "special_tokens_in_text": Check(
        "No text holds a chat template's control tokens.", "error", "fix", "Take the markers out of the text; the template adds its own."
    ),
    "template_mismatch": Check(
        "Every conversation fits the base model's chat template.",
        "error",
        "drop",
        "Use the roles that the template knows, or another template.",
    ),
    "hidden_characters": Check(
        "No text holds a byte order mark or zero-width characters that join nothing.",
        "info",
        "fix",
        "Take them out: they split words into other tokens, and hide copies.",
    ),
    "unicode_form": Check(
        "Every text is in Unicode's composed form (NFC).", "info", "fix", "Compose it: the same word in two forms is two words to a model."
    ),
    "encoding": Check("No text shows encoding damage.", "warn", "drop", "Read the file again in its true encoding, and save it as UTF-8."),
    "secrets": Check(
        "No text holds a password, key or token.",
        "error",
        "drop",
        "Revoke the secret, then take it out of the source: a model can recite it.",
    ),
    "pii": Check(
        "No text holds personal data such as an e-mail address or a card number.",
        "warn",
        "drop",
        "Set the policy `pii: fix` to put placeholders such as [EMAIL] in its place, or take the row out.",
    ),
    **{check.name: Check(check.description, check.severity, "warn", check.hint) for check in CONTENT_CHECKS},
    "exact_duplicates": Check("No two rows are identical.", "warn", "drop", "Nothing to do: one of them is kept."),
    "benchmark_leakage": Check(
        "No row overlaps a held-out benchmark.",
        "error",
        "drop",
        "Take the row out of the source, or waive it if the overlap is a common phrase.",
    ),
    "split_leakage": Check(
        "No row stands in, or nearly in, two splits.", "error", "warn", "Take it out of the training split; `splits` does so."
    ),
    "conflicting_responses": Check(
        "The same prompt never has two different responses.",
        "warn",
        "review",
        "Keep the right one; in the pipeline, decide in the review file.",
    ),
    "near_duplicates": Check(
        "No two prompts are nearly the same.", "warn", "warn", "Read the pairs. They share a `group_id`, so `splits` keeps them together."
    ),
}
"""In the order in which a row is judged: it is dropped for the first check it breaks."""

SET_CHECKS: dict[str, Check] = {
    "schema": Check("The set has rows, and each column the canonical type.", "error", "fail", "See the rows dropped above for the reason."),
    "small_dataset": Check("The set is large enough to learn from.", "warn", "warn", "Add examples, or compare with a good prompt first."),
    "unbalanced_categories": Check(
        "No category is far more frequent than another.",
        "warn",
        "warn",
        "Add rows of the rare ones, or take some of the frequent ones out.",
    ),
    "low_diversity": Check(
        "Tasks, wording and answers vary.", "warn", "warn", "Write examples in other words; copies of one template teach the template."
    ),
    "length_bias": Check(
        "Which response is longer does not tell which was chosen.", "warn", "warn", "Add pairs in which the shorter response was chosen."
    ),
}

PAIRS_ONLY = frozenset({"unpaired_answer", "prompt_mismatch", "identical_pair", "tied_pair", "length_bias"})
BENCHMARKS_ONLY = frozenset({"unlabelled"})
CHECKS = {**ROW_CHECKS, **SET_CHECKS}
EXAMPLE_CHECKS = {name: check for name, check in CHECKS.items() if name not in PAIRS_ONLY | BENCHMARKS_ONLY}
"""The checks that judge a set of instructions."""


class Rules(profiles.Limits):
    """How strictly a set is judged."""

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
    """Jaccard index of three-word runs from which on two prompts fail `near_duplicates`. Near-copies from 0.3 on share
    a `group_id` and stay in one split, reported or not."""
    max_longer_share: float = Field(default=0.65, ge=0.5, le=1)
    """Preferences: largest share of pairs whose chosen response may be the longer one; above it `length_bias` fails.
    0.5 means no bias."""
    waivers: list[Waiver] = []
    """Rows and pairs that may fail a check, each with a reason and an expiry date. See docs/checks.md."""

    @field_validator("policy", "severity")
    @classmethod
    def _known(cls, values: dict[str, str]) -> dict[str, str]:
        for name, value in values.items():
            if name not in CHECKS:
                raise ValueError(f"unknown check {name!r}; checks: {', '.join(CHECKS)}")
            if value == "fix" and name not in REPAIRS:
                raise ValueError(f"{name} has no repair; checks that can be fixed: {', '.join(REPAIRS)}")
            if name in SET_CHECKS and value in {"drop", "review"}:
                raise ValueError(f"{name} judges the set as a whole: warn or fail, not {value}")
        return values

    @field_validator("waivers")
    @classmethod
    def _known_checks(cls, waivers: list[Waiver]) -> list[Waiver]:
        for waiver in waivers:
            if waiver.check not in ROW_CHECKS:
                raise ValueError(f"{waiver.check!r} is no check on rows; such checks: {', '.join(ROW_CHECKS)}")
        return waivers

    def fixed(self) -> list[str]:
        """The checks whose rows are repaired, in the order of repair."""
        return [name for name in REPAIRS if self.action(name) == "fix"]

    def action(self, name: str) -> Action:
        return self.policy.get(name, CHECKS[name].action)

    def severity_of(self, name: str) -> Severity:
        return "error" if self.action(name) == "fail" else self.severity.get(name, CHECKS[name].severity)


def _is_true(name: str) -> pa.Column:
    import pandera.polars as pa
    import polars as pl

    return pa.Column(pl.Boolean, pa.Check(lambda data: data.lazyframe.select(pl.col(data.key)), name=name))


def _is_null(name: str) -> pa.Column:
    import pandera.polars as pa
    import polars as pl

    return pa.Column(
        pl.String, pa.Check(lambda data: data.lazyframe.select(pl.col(data.key).is_null()), name=name, ignore_na=False), nullable=True
    )


def row_schema(max_tokens: int, min_response_tokens: int) -> pa.DataFrameSchema:
    """What must be true of every row of `facts.gather`. Each check carries the name it is reported under."""
    import pandera.polars as pa
    import polars as pl

    return pa.DataFrameSchema(
        {
            "problem": _is_null("malformed_row"),
            "paired": _is_true("unpaired_answer"),
            "labelled": _is_true("unlabelled"),
            "roles_valid": _is_true("invalid_roles"),
            "ends_with_assistant": _is_true("ends_on_user_turn"),
            "has_prompt": _is_true("empty_prompt"),
            "has_response": _is_true("empty_response"),
            "input_is_real": _is_true("placeholder_input"),
            "same_prompt": _is_true("prompt_mismatch"),
            "pair_is_real": _is_true("identical_pair"),
            "preferred": _is_true("tied_pair"),
            "response_tokens": pa.Column(pl.Int64, pa.Check.ge(min_response_tokens, error="short_response"), nullable=True),
            "tokens": pa.Column(pl.Int64, pa.Check.le(max_tokens, error="too_long"), nullable=True),
            "template_mark": _is_null("special_tokens_in_text"),
            "misfit": _is_null("template_mismatch"),
            "hidden": _is_null("hidden_characters"),
            "decomposed": _is_null("unicode_form"),
            "damage": _is_null("encoding"),
            "secret": _is_null("secrets"),
            "personal": _is_null("pii"),
            **{check.name: _is_null(check.name) for check in CONTENT_CHECKS},
            "repeats": _is_null("exact_duplicates"),
            "leaks": _is_null("benchmark_leakage"),
            "other_split": _is_null("split_leakage"),
            "conflicts_with": _is_null("conflicting_responses"),
            "near_copy_of": _is_null("near_duplicates"),
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
        for (name,), rows in cases.select("check", "index").group_by("check", maintain_order=True):
            found[str(name)] = sorted(set(rows["index"].to_list()))
    return found


def length_schema(most: float) -> pa.DataFrameSchema:
    """What must be true of a set of preference pairs: one row with the share of pairs whose chosen response is the longer one."""
    import pandera.polars as pa
    import polars as pl

    return pa.DataFrameSchema({"chosen_is_longer": pa.Column(pl.Float64, pa.Check.le(most, error="length_bias"))}, strict=True)


@dataclass(frozen=True)
class Verdict:
    """What one check found."""

    name: str
    action: Action
    severity: Severity
    broken: list[int]
    """Indices of the rows that break it, or did before they were repaired; waived ones left out."""
    dropped: int
    """Rows dropped for it, and not for a check before it."""
    waived: int
    passed: bool
    """No row that is kept breaks it, or, for a check on the set, it holds."""
    note: str
    fixed: int = 0
    """Rows repaired for it that are kept."""


@dataclass(frozen=True)
class Judgement:
    """What the checks found in a set of records."""

    records: list[dict[str, Any]]
    """As judged: with the edits of the review file made, and repaired. One that was repaired has `repaired` and `source_id` (curation/checks/repair.py)."""
    reason: list[str | None]
    """For each record the check it is dropped for, or None if it is kept."""
    facts: Facts
    verdicts: dict[str, Verdict]
    """By check, in the order of `CHECKS`."""
    profile: dict[str, Any]
    """Of the rows that are kept."""
    said: dict[int, str] = field(default_factory=dict)
    """Index -> what a person said about the row: why it was waived, edited, accepted or dropped."""
    waiting: list[tuple[int, str]] = field(default_factory=list)
    """(index, check) of rows that are kept until somebody decides about them."""
    repaired: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Check -> index of each row that was repaired for it -> what was wrong, in words."""

    @property
    def fixed(self) -> dict[str, int]:
        """Check -> rows repaired for it that are kept."""
        return {name: verdict.fixed for name, verdict in self.verdicts.items() if verdict.fixed}

    @property
    def cluster(self) -> list[int]:
        return self.facts.cluster

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
    kind: Literal["examples", "preferences", "benchmark"] = "examples",
    divide: Callable[[Sequence[dict[str, Any]], Facts, list[int]], dict[int, str]] | None = None,
) -> Judgement:
    """Run every check on canonical records or pairs (with `source` and `source_row`).

    Args:
        held_out: questions that must not be trained on; empty where there are none, and `benchmark_leakage` says so.
        tokens: the base model's tokenizer and template.
        decisions: what people wrote in the review file.
        divide: deals the rows that are kept (their indices are given) out to splits, and returns which of them are dropped for
            `split_leakage`, and why.
    """
    records, edits, waived, repaired = _prepared(records, held_out, rules, tokens, decisions)
    facts = gather(records, held_out, waived, tokens, rules.max_tokens, rules.min_response_tokens, rules.near_duplicate_similarity)
    found = violations(facts.frame, row_schema(rules.max_tokens, rules.min_response_tokens)) if records else {}
    broken = {name: [i for i in rows if i not in waived.rows.get(name, ())] for name, rows in found.items()}
    reason: list[str | None] = [None] * len(records)
    for name in ROW_CHECKS:
        if rules.action(name) in {"drop", "fix"}:
            for i in broken.get(name, []):
                reason[i] = reason[i] or name
    said = {
        **{i: f"waived for {check}: {why}" for (check, i), why in waived.reasons.items()},
        **{i: f"edited: {why}" for i, why in edits.items()},
    }
    out = {d.example_id: d for d in decisions if d.decision == "drop"}
    for i, record in enumerate(records) if out else ():
        if (decision := next((out[one] for one in ids_of(record) if one in out), None)) and reason[i] is None:
            reason[i], said[i] = decision.check, f"dropped: {decision.reason}"
    kept = [i for i, why in enumerate(reason) if why is None]
    if divide and kept:
        apart = divide(records, facts, kept)
        said |= apart
        for i in apart:
            reason[i] = "split_leakage"
        for table in (found, broken):
            table["split_leakage"] = sorted({*table.get("split_leakage", ()), *apart})
        kept = [i for i in kept if i not in apart]
    waiting = [(i, name) for name in ROW_CHECKS if rules.action(name) == "review" for i in broken.get(name, []) if reason[i] is None]

    counts = tokens.count([_text(records[i]) for i in kept]) if kept and len(kept) <= COUNTED and not tokens.estimated else None
    profile = profiles.profile([records[i] for i in kept], counts)
    similar = {link.row for name in ("near_duplicates", GROUPED) for link in facts.links[name]} - set(
        waived.rows.get("near_duplicates", ())
    )
    near = sum(1 for i in similar if reason[i] is None)
    failures = {"schema": "no rows are left"} if not kept else profiles.failures(profile, rules, near)
    notes = profiles.notes(profile, rules, near) | failures
    if kind == "preferences" and kept:
        profile |= (length := _length([records[i] for i in kept]))
        share = length["length_rule_accuracy"]
        notes["length_bias"] = f'chosen is longer in {share:.0%} of pairs, so "the longer one wins" would be right that often'
        failures |= _set_failures("chosen_is_longer", share, length_schema(rules.max_longer_share), notes)
    if not held_out:
        notes["benchmark_leakage"] = "nothing held out to compare with"
    notes |= _row_notes(facts, broken, reason, tokens, rules, waived, repaired)
    fixed = repaired.counts(reason)
    dropped = Counter(why for why in reason if why)
    verdicts = {}
    for name in CHECKS:
        if (name in PAIRS_ONLY and kind != "preferences") or (name in BENCHMARKS_ONLY and kind != "benchmark"):
            continue
        rows = broken.get(name, [])
        verdicts[name] = Verdict(
            name, rules.action(name), _severity(name, rules, rows, facts), sorted({*rows, *repaired.found.get(name, ())}), dropped[name],
            len({*found.get(name, []), *facts.waived.get(name, ())}) - len(rows),
            passed=name not in failures and all(reason[i] is not None for i in rows), note=notes.get(name, ""), fixed=fixed.get(name, 0),
        )  # fmt: skip
    return Judgement(records, reason, facts, verdicts, profile, said, waiting, repaired.found)


def _prepared(
    records: Sequence[dict[str, Any]], held_out: Sequence[Item], rules: Rules, tokens: Tokens, decisions: Sequence[Decision]
) -> tuple[list[dict[str, Any]], dict[int, str], Waived, Repaired]:
    """The records as they are judged: edited by people, and repaired but for those that are waived; and the reasons of the edits.

    The review file shows rows as they were repaired, so edits are looked up before the repair and after it, and what was edited then is repaired too.
    """
    items = {item.place for item in held_out}
    changed, edits = edited(records, decisions)
    exempt = resolve(rules.waivers, decisions, changed, items).rows
    repaired = repair(changed, rules.fixed(), exempt, tokens.special)
    again, more = edited(repaired.records, decisions)
    if more:
        repaired = repair(again, rules.fixed(), exempt, tokens.special, repaired)
    return repaired.records, edits | more, resolve(rules.waivers, decisions, repaired.records, items), repaired


def _severity(name: str, rules: Rules, rows: Sequence[int], facts: Facts) -> Severity:
    """As the rules say; overlaps with held-out text of which none is a copy are a warning, unless the rules say otherwise."""
    copied = {link.row for link in facts.links["benchmark_leakage"] if not link.partial} if name == "benchmark_leakage" else set()
    decided = name != "benchmark_leakage" or name in rules.severity or rules.action(name) == "fail"
    return rules.severity_of(name) if decided or not rows or not copied.isdisjoint(rows) else "warn"


def _leak_notes(leaks: Sequence[Link], frames: int) -> list[str]:
    copied = {link.row for link in leaks if not link.partial}
    partly = {link.row for link in leaks} - copied
    return [
        *([f"{len(copied):,} rows copy held-out text, {len(partly):,} overlap it in part"] if partly else []),
        *([f"{frames:,} pairs share only a common frame, which proves nothing"] if frames else []),
    ]


COUNTED = 50_000
"""Rows up to which the tokens of every conversation are counted for the profile; the limits are checked in sets of any size."""


def _text(record: dict[str, Any]) -> str:
    return "\n".join(m["content"] for m in record["messages"])


def _length(pairs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How often the chosen response has more characters, and how often "the longer one wins" is right, where a pair of equals counts one half."""
    sides = [[sum(len(m["content"]) for m in side) for side in (pair["messages"][pair["asked"] :], pair["rejected"])] for pair in pairs]
    longer, equal = (sum(of(*lengths) for lengths in sides) for of in (gt, eq))
    return {"chosen_longer_share": round(longer / len(pairs), 4), "length_rule_accuracy": round((longer + equal / 2) / len(pairs), 4)}


def _set_failures(column: str, value: float, schema: pa.DataFrameSchema, notes: dict[str, str]) -> dict[str, str]:
    import pandera.polars as pa
    import polars as pl

    try:
        schema.validate(pl.DataFrame({column: [value]}), lazy=True)
    except pa.errors.SchemaErrors as errors:
        return {name: notes[name] for name in errors.failure_cases["check"]}
    return {}


CHARACTERS = {"hidden_characters": "hidden", "unicode_form": "decomposed", "encoding": "damage"}
"""Check on characters -> its column."""


def _row_notes(
    facts: Facts,
    broken: dict[str, list[int]],
    reason: Sequence[str | None],
    tokens: Tokens,
    rules: Rules,
    waived: Waived,
    repaired: Repaired,
) -> dict[str, str]:
    """Figures in words for checks on rows."""
    notes: dict[str, list[str]] = {}
    if rows := broken.get("too_long"):
        counts = facts.frame["tokens"]
        notes["too_long"] = [
            f"{sum(counts[i] for i in rows):,} tokens in all, {sum(counts[i] - rules.max_tokens for i in rows):,} beyond {rules.max_tokens:,} each"
        ]
    if rows := broken.get("short_response"):
        notes["short_response"] = [
            f"fewer than {rules.min_response_tokens} tokens each, {sum(facts.frame['response_tokens'][i] for i in rows):,} in all"
        ]
    if tokens.estimated:
        for name in ("too_long", "short_response"):
            notes.setdefault(name, []).append("tokens estimated at four bytes each: no base model at hand")
    columns = {"secrets": "secret", "pii": "personal", "template_mismatch": "misfit", **CHARACTERS}
    for name, column in (*columns.items(), *((check.name, check.name) for check in CONTENT_CHECKS)):
        kinds = Counter(facts.frame[column][i].partition(":")[0] for i in broken.get(name, ())) + repaired.kinds(name)
        if kinds:
            notes[name] = [", ".join(f"{kind} {n}" for kind, n in kinds.most_common(5))]
    if facts.compared and facts.compared.boilerplate:
        text, count = facts.compared.boilerplate[0]
        more = f" and {len(facts.compared.boilerplate) - 1} more" if len(facts.compared.boilerplate) > 1 else ""
        notes["near_duplicates"] = [f'boilerplate, which proves nothing: "{text}" in {count} prompts{more}']
    leaks = facts.links["benchmark_leakage"]
    if leaks or facts.frames:
        notes["benchmark_leakage"] = _leak_notes(leaks, facts.frames)
    if facts.links[GROUPED]:
        notes.setdefault("near_duplicates", []).append(
            f"{len(facts.links[GROUPED]):,} pairs are less similar, or ask something else: they share a group_id and are not reported"
        )
    if facts.transcripts:
        notes.setdefault("special_tokens_in_text", []).append(f"{facts.transcripts} rows quote a transcript; they are kept")
    if waived.unknown:
        notes.setdefault("schema", []).append(f"waived or reviewed, but not in the set: {', '.join(sorted(set(waived.unknown))[:5])}")
    return {name: "; ".join(parts) for name, parts in notes.items()}
