"""The use policy: what a release may rest on.

Judges what is declared for the sources that a model was made from, and its base model's license.

`raw_examples` warns, `release` refuses (docs/decisions/032). A date decides only if it is given: nothing here reads the
clock.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import chain
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field

from dagster_project.core.params import Section, parse
from dagster_project.core.records import CheckResult, with_license
from dagster_project.core.text import many
from dagster_project.curation.sources.declarations import Date, Declared, Text, declared_of

NAME = "use_policy"
"""Of the check, of the key in params.yaml and of that in reports."""
DESCRIPTION = "The declarations of the sources and the license of the base model meet the use policy."
NO_POLICY = "no use policy is given (raw_examples.use_policy)"
BASE = "base model"
"""What a violation names instead of a source."""
LONGEST = 1_000
"""Characters of a license expression; longer texts are not parsed."""
OWN_LICENSE = re.compile(r"(DocumentRef-[\w.-]+:)?LicenseRef-[\w.-]+", re.ASCII | re.IGNORECASE)
LISTED = 5
"""Violations that the note of a check names."""


def _expression(text: str) -> str:
    if _parsed(text) is None:
        raise ValueError(
            "not an SPDX license or expression;"
            " for terms of your own write LicenseRef-NAME, here and as the license of the source"
        )
    return text


Expression = Annotated[str, AfterValidator(_expression)]


class Policy(Section):
    """What a release may rest on. What is unknown is not allowed where a rule asks for it. See docs/checks.md."""

    licenses: list[Expression] | None = None
    """Licenses that sources may have, as SPDX expressions. Of `A OR B` one must be allowed, of `A AND B` both. null:
    any."""
    base_licenses: list[Expression] | None = None
    """The same for the license of the base model. null: any."""
    require_permission: bool = False
    """Whether `permission` must be declared for every source."""
    purposes: list[Text] = []
    """Purposes that every source must declare, all of them."""
    max_synthetic: float | None = Field(default=None, ge=0, le=1)
    """Largest share of synthetic text: of the rows read from all sources, those of sources of category `synthetic` or
    with a `generator`, or whose category is unknown. null: any."""
    as_of: Date | None = None
    """The day for which `retain_until` is judged, in quotes: a source may be used up to and including its last day.
    Required if a source declares one, because no result depends on the current date."""

    @property
    def given(self) -> dict[str, Any]:
        """The rules as written, for a report."""
        return self.model_dump(mode="json", exclude_unset=True)


class ReadSource(NamedTuple):
    """A source that a stage read."""

    name: str
    rows: int
    """Read from it, before any check dropped some."""
    declared: Declared


def read_by(reports: Iterable[Mapping[str, Any]]) -> list[ReadSource]:
    """The sources that reports name. One that two stages read is there twice, because each declares it for itself.

    Raises:
        InputError: a report declares what this version does not know.
    """
    sources = [one for report in reports for one in report.get("sources", {}).items()]
    return [ReadSource(name, int(facts.get("rows", 0)), declared_of(facts, name)) for name, facts in sources]


def recorded_policy(reports: Iterable[Mapping[str, Any]]) -> Policy | None:
    """The policy that the report of `raw_examples` states; None if it had none.

    Raises:
        InputError: it has rules that this version does not know.
    """
    found = [report[NAME] for report in reports if NAME in report]
    return parse(Policy, found[-1], NAME, file="report") if found else None


def judge(policy: Policy, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Judge a model by the reports of the runs that it was made from.

    Returns:
        {"policy", "sources": count, "rows", "synthetic": {"rows", "unknown"}, "refused_rows", "violations": [{"source",
        "rows", "rule", "why"}, ...]}; the base model has no rows.
    """
    sources = read_by(reports)
    rows = sum(source.rows for source in sources)
    counts = {"synthetic": 0, "unknown": 0}
    for source in sources:
        if kind := _synthetic(source.declared):
            counts[kind] += source.rows
    excess = _excess(policy, sum(counts.values()), rows)
    found = [_violations(policy, source, excess) for source in sources]
    of_bases = [with_license(report) for report in reports if {"origin", "sha256"} <= report.keys()]
    bases = [facts.get("license", "unknown") for facts in of_bases]
    return {
        "policy": policy.given,
        "sources": len(sources),
        "rows": rows,
        "synthetic": {"rows": counts["synthetic"], "unknown": counts["unknown"]},
        "refused_rows": sum(source.rows for source, violations in zip(sources, found, strict=True) if violations),
        "violations": [*chain.from_iterable(found), *_base_violations(policy, bases)],
    }


def judged(
    reports: Sequence[Mapping[str, Any]], waivers: Iterable[Mapping[str, Any]] = (), as_of: datetime.date | None = None
) -> dict[str, Any]:
    """The verdict on a model by the policy that its own run of `raw_examples` stated.

    Args:
        reports: of the runs that it was made from, in flow order.
        waivers: of checks, as in params.yaml.
        as_of: the day for which `retain_until` is judged, instead of the policy's.
    Returns:
        {"use_policy": of `judge`, with "waiver" if there is one that has not expired by `as_of`}; empty if no policy
        was stated.
    """
    policy = recorded_policy(reports)
    if policy is None:
        return {}
    if as_of:
        policy = policy.model_copy(update={"as_of": as_of})
    verdict = judge(policy, reports)
    own = [one for one in waivers if one.get("check") == NAME]
    if valid := [one for one in own if as_of is None or str(one.get("expires")) >= str(as_of)]:
        verdict["waiver"] = dict(valid[0])
    return {NAME: verdict}


def lines(verdict: Mapping[str, Any] | None) -> list[str]:
    """The verdict in words: the result, a line for each violation, and the waiver; nothing without a policy."""
    if verdict is None:
        return []
    if not verdict["violations"]:
        return [f"passed: {in_words(verdict)}"]
    waiver = verdict.get("waiver")
    waived = [f"waived until {waiver['expires']}: {waiver['reason']}"] if waiver else []
    day = f", as of {verdict['policy']['as_of']}" if verdict["policy"].get("as_of") else ""
    return [
        f"not passed: {_refused(verdict)} not allowed{day}",
        *(f"{_named(one)}: {one['why']}" for one in verdict["violations"]),
        *waived,
    ]


def check(verdict: Mapping[str, Any] | None) -> CheckResult:
    """The check as a warning.

    Args:
        verdict: of `judge`; None without a policy.
    """
    if verdict is None:
        return CheckResult(NAME, passed=True, severity="warn", note=NO_POLICY)
    violations, count, note = verdict["violations"], verdict["refused_rows"], in_words(verdict)
    return CheckResult(NAME, not violations, "warn", count=count, note=note, violations=violations)


def in_words(verdict: Mapping[str, Any]) -> str:
    """The verdict in one line: the first violations, each with its source and its rows."""
    day = verdict["policy"].get("as_of")
    if not verdict["violations"]:
        text = f"{many(verdict['sources'], 'source')} with {many(verdict['rows'], 'row')}"
        return f"{text}, as of {day}" if day else text
    named = [f"{_named(one)}: {one['why']}" for one in verdict["violations"][:LISTED]]
    more = len(verdict["violations"]) - LISTED
    return "; ".join([*named, *([f"and {more} more"] if more > 0 else [])])


def _refused(verdict: Mapping[str, Any]) -> str:
    """What is not allowed, with its verb: sources with the number of their rows, the base model, or both."""
    rules = [one["rule"] == "base_licenses" for one in verdict["violations"]]
    sources = [] if all(rules) else [f"sources with {verdict['refused_rows']:,} of {verdict['rows']:,} rows"]
    named = [*sources, *(["the base model"] if any(rules) else [])]
    return f"{' and '.join(named)} {'are' if sources else 'is'}"


def _named(violation: Mapping[str, Any]) -> str:
    name = violation["source"]
    return name if name == BASE else f"{name} ({many(violation['rows'], 'row')})"


def allows(allowed: Sequence[str], license: str) -> bool:
    """Whether a license satisfies a list of allowed ones. A text that is not an SPDX expression does not."""
    tree = _parsed(license)
    known = {_key(expression) for text in allowed if (expression := _parsed(text)) is not None}
    return tree is not None and _satisfied(tree, known)


def _satisfied(tree: Any, allowed: set[str]) -> bool:
    licensing = _licensing()
    if _key(tree) in allowed:
        return True
    if isinstance(tree, licensing.OR):
        return any(_satisfied(part, allowed) for part in tree.args)
    return isinstance(tree, licensing.AND) and all(_satisfied(part, allowed) for part in tree.args)


def _key(tree: Any) -> str:
    return str(tree.simplify().render()).casefold()


@cache
def _licensing() -> Any:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


@cache
def _parsed(text: str) -> Any:
    """The tree of an SPDX expression, whose licenses are SPDX identifiers or LicenseRef-...; None for other texts."""
    from license_expression import ExpressionError

    if len(text) > LONGEST:
        return None
    try:
        tree = _licensing().parse(text, strict=True)
    except (ExpressionError, RecursionError):
        return None
    if tree is None or any(not OWN_LICENSE.fullmatch(key) for key in _licensing().unknown_license_keys(tree)):
        return None
    return tree


def _violations(policy: Policy, source: ReadSource, excess: str) -> list[dict[str, Any]]:
    """Args:
    excess: why the sources whose rows count as synthetic have too many of them; empty if they have not.
    """
    declared, found = source.declared, []
    if policy.licenses is not None and not allows(policy.licenses, declared.license):
        found.append(("licenses", _license_problem(declared.license)))
    if policy.require_permission and declared.permission is None:
        found.append(("require_permission", "no permission is declared"))
    if missing := [purpose for purpose in policy.purposes if purpose not in (declared.purposes or [])]:
        refused = f"may not be used for {', '.join(missing)}"
        found.append(("purposes", "purposes are unknown" if declared.purposes is None else refused))
    if declared.retain_until and (why := _lapsed(policy.as_of, declared.retain_until)):
        found.append(("retain_until", why))
    if excess and source.rows and (kind := _synthetic(declared)):
        what = "synthetic" if kind == "synthetic" else "of unknown category, which counts as synthetic"
        found.append(("max_synthetic", f"{what}: {excess}"))
    return [_violation(source.name, source.rows, rule, why) for rule, why in found]


def _base_violations(policy: Policy, licenses: Iterable[str]) -> list[dict[str, Any]]:
    if policy.base_licenses is None:
        return []
    refused = [license for license in licenses if not allows(policy.base_licenses, license)]
    return [_violation(BASE, 0, "base_licenses", _license_problem(license)) for license in refused]


def _license_problem(license: str) -> str:
    why = "" if _parsed(license) is not None else ", as it is not an SPDX expression"
    return f"license {license} is not allowed{why}"


def _lapsed(as_of: datetime.date | None, until: datetime.date) -> str:
    if as_of is None:
        return f"may be used until {until}, which cannot be judged without as_of in the policy"
    return f"may be used until {until}, and the policy is judged as of {as_of}" if as_of > until else ""


def _synthetic(declared: Declared) -> str:
    """ "synthetic", "unknown", or "" for text by people."""
    if declared.category == "synthetic" or declared.generator is not None:
        return "synthetic"
    return "unknown" if declared.category is None else ""


def _excess(policy: Policy, synthetic: int, rows: int) -> str:
    """Why there are too many rows that count as synthetic; empty if there are not."""
    if policy.max_synthetic is None or synthetic <= Fraction(str(policy.max_synthetic)) * rows:
        return ""
    return f"{synthetic:,} of {rows:,} rows count as synthetic, at most {100 * policy.max_synthetic:g} % are allowed"


def _violation(source: str, rows: int, rule: str, why: str) -> dict[str, Any]:
    return {"source": source, "rows": rows, "rule": rule, "why": why}
