"""Results of the checks as one document. The terminal, --json, the report, Dagster and the page all show this document.

It names rows by their place and content. Texts are added where people read them (quotes.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any

from dagster_project.core.messages import conversation_text
from dagster_project.core.records import CheckResult
from dagster_project.core.stored_rows import Selected
from dagster_project.core.text import common_prefix
from dagster_project.curation.checks import conversations, quotes
from dagster_project.curation.checks.checks import CHECKS, Judgement, Verdict
from dagster_project.curation.checks.overlaps import Link
from dagster_project.curation.checks.privacy import mask
from dagster_project.curation.checks.quotes import WIDTH, excerpt
from dagster_project.curation.checks.references import Reference, place
from dagster_project.curation.similarity.overlap import BINS, CONTAINMENT, JACCARD
from dagster_project.curation.sources.benchmarks import Item

ROWS, MATCHES = 20, 200
"""Rows listed in a report, which git tracks; overlaps named for each check."""
SHOWN = 3
"""Rows that views quote for each check."""
ORDER = {"error": 0, "warn": 1, "info": 2}


def document(
    name: str, layout: str, judged: Judgement, held_out: Sequence[Item], matches: int = MATCHES, width: int = WIDTH
) -> dict[str, Any]:
    """The findings with the texts of the rows, for the terminal and the page of `pedigree check`. Nothing keeps it.

    Args:
        name, layout, matches: as for `references`.
        width: characters per text of an overlap.
    """

    def find(wanted: set[Reference]) -> quotes.Found:
        found: dict[Reference, Mapping[str, Any] | Item] = {Reference.of_item(item): item for item in held_out}
        for records in (judged.records, judged.read):
            if wanted - found.keys():
                found |= {reference: record for record in records if (reference := Reference.of(record)) in wanted}
        return found

    return quotes.quoted(references(name, layout, judged, held_out, matches), find, lambda: judged.special, width)


def references(
    name: str, layout: str, judged: Judgement, held_out: Sequence[Item], matches: int = MATCHES
) -> dict[str, Any]:
    """The findings, worst first, without text of a row; see docs/checks.md for the form.

    Args:
        name: of the data set.
        layout: of its rows.
        matches: overlaps per check.
    """
    items = {item.place: item for item in held_out}
    findings = [
        finding(verdict, judged, items, matches)
        for verdict in judged.verdicts.values()
        if verdict.broken or not verdict.passed or verdict.waived
    ]
    numbers = RowNumbers(judged.records)
    for one in findings:
        one["rows"] = [numbers.of(record) for record in Selected(judged.records, one["rows"])]
        one["matches"] = [{**found, "row": numbers.of(judged.records[found["row"]])} for found in one["matches"]]
    compared = judged.overlaps.compared
    rich = conversations.chosen(Selected(judged.records, [i for i in judged.rich if judged.reason[i] is None]))
    return {
        "name": name,
        "format": layout,
        "rows": len(judged.records),
        "kept": judged.reason.count(None),
        "dropped": judged.dropped,
        **({"fixed": judged.fixed} if judged.fixed else {}),
        "findings": sorted(findings, key=lambda f: (ORDER[f["severity"]], -f["count"], f["check"])),
        **({"conversations": [Reference.of(record)._asdict() for record in rich]} if rich else {}),
        "similarity": {
            "gate": {"jaccard": JACCARD, "containment": CONTAINMENT},
            "histogram": [
                {"from": i / BINS, "to": (i + 1) / BINS, "pairs": apart + near, "near": near}
                for i, (apart, near) in enumerate(compared.scores)
            ],
            "boilerplate": [
                {**_reference(judged, one.row)._asdict(), "start": one.start, "words": one.words, "rows": one.texts}
                for one in compared.boilerplate
            ],
        },
        "profile": judged.profile,
        "notes": {verdict.name: verdict.note for verdict in judged.verdicts.values() if verdict.note},
    }


class RowNumbers:
    """Source rows of a set, numbered consecutively across sources.

    A row may yield several records, and two rows one.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        rows: dict[str, int] = {}
        for record in records:
            last = max(record.get("source_rows") or [record["source_row"]])
            rows[record["source"]] = max(rows.get(record["source"], 0), last + 1)
        self._starts = dict(zip(rows, accumulate(rows.values(), initial=0), strict=False))

    def of(self, record: Mapping[str, Any]) -> int:
        return self._starts[record["source"]] + record["source_row"]


def finding(
    verdict: Verdict, judged: Judgement, items: Mapping[str, Item], matches: int, places: int | None = None
) -> dict[str, Any]:
    """The finding of one check; `rows` are indices of records. A failed check on the whole set counts 1.

    Args:
        matches: overlaps.
        places: number of rows whose places are listed; None: all.
    """
    check, rows, broken = CHECKS[verdict.name], verdict.broken, set(verdict.broken)
    links = islice((link for link in judged.overlaps.links.get(verdict.name, ()) if link.row in broken), matches)
    return {
        "check": verdict.name,
        "severity": verdict.severity if rows or not verdict.passed else "info",  # every violation is waived
        "passed": verdict.passed,
        "count": len(rows) or int(not verdict.passed),
        "dropped": verdict.dropped,
        **({"fixed": verdict.fixed} if verdict.fixed else {}),
        "elsewhere": sum(judged.reason[i] is not None for i in rows) - verdict.dropped,
        "waived": verdict.waived,
        "rows": rows,
        "places": [place(record) for record in Selected(judged.records, rows[:places])],
        "shown": [_shown(verdict.name, judged, i) for i in rows[:SHOWN]],
        "truth": check.description,
        "note": verdict.note,
        "next": check.hint,
        "matches": [match(link, judged, items) for link in links],
    }


def _shown(check: str, judged: Judgement, i: int) -> dict[str, Any]:
    """Reference to a row that views quote; where it was repaired for the check, to the row before its repair."""
    repaired = i in judged.repaired.get(check, {})
    return {**_reference(judged, i, repaired)._asdict(), **({"repaired": True} if repaired else {})}


def _reference(judged: Judgement, i: int, as_read: bool = False) -> Reference:
    """A dropped row is only in the data as they were read, before any repair."""
    return Reference.of(judged.records[i], as_read or judged.reason[i] is not None)


def check_result(verdict: Verdict, judged: Judgement, held_out: Sequence[Item]) -> CheckResult:
    """The finding in short form for a stage's report, which git tracks."""
    found = finding(verdict, judged, {item.place: item for item in held_out}, matches=5, places=ROWS)
    done = ", ".join(f"{n} {what}" for n, what in ((verdict.dropped, "dropped"), (verdict.fixed, "fixed")) if n)
    shown = ("row", "place", "other", "part", "rule", "score")
    matches = [{key: one[key] for key in shown} for one in found["matches"]]
    return CheckResult(
        verdict.name,
        verdict.passed,
        verdict.severity,
        verdict.action == "fail",
        len(verdict.broken),
        found["places"],
        note="; ".join(part for part in (done, verdict.note) if part),
        dropped=verdict.dropped,
        waived=verdict.waived,
        fixed=verdict.fixed,
        matches=matches,
    )


def match(link: Link, judged: Judgement, items: Mapping[str, Item]) -> dict[str, Any]:
    """References to both sides of an overlap, and how they overlap."""
    other = _reference(judged, link.other) if isinstance(link.other, int) else Reference.of_item(items[link.other])
    return {
        "row": link.row, **_reference(judged, link.row)._asdict(), "other": other.place, "other_id": other.example_id,
        "part": link.part, "rule": link.rule, "score": link.score,
    }  # fmt: skip


def changes(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], previous: str) -> dict[str, Any]:
    """Differences between two versions of a data set, by content: a row that only moved is unchanged.

    A removed and an added row in the same gap between unchanged rows of one source are one changed row:
    a, b, c  ->  a, B, c, d   is   changed b/B, added d
    """
    by_source: dict[str, tuple[list[tuple[int, str]], list[tuple[int, str]]]] = {}
    for side, records in enumerate((old, new)):
        for i, record in enumerate(records):
            by_source.setdefault(record["source"], ([], []))[side].append((i, record["example_id"]))
    unchanged, added, removed, changed = 0, list[int](), list[int](), list[tuple[int, int]]()
    for before, after in by_source.values():
        here, there = _gaps(before, after)
        unchanged += len(before) - sum(map(len, here.values()))
        for gap in sorted(here.keys() | there.keys()):
            gone, come = here.get(gap, []), there.get(gap, [])
            changed += zip(gone, come, strict=False)
            removed += gone[len(come) :]
            added += come[len(gone) :]
    gone_rows, new_rows = Selected(old, removed[:ROWS]), Selected(new, added[:ROWS])
    return {
        "previous": previous,
        "rows": {"added": len(added), "removed": len(removed), "changed": len(changed), "unchanged": unchanged},
        "examples": {
            "added": [{"place": place(row), "text": excerpt(row, 300)} for row in new_rows],
            "removed": [{"place": f"{place(row)} (before)", "text": excerpt(row, 300)} for row in gone_rows],
            "changed": [{"place": place(new[b]), **_edit(old[a], new[b])} for a, b in changed[:ROWS]],
        },
    }


def _gaps(
    before: Sequence[tuple[int, str]], after: Sequence[tuple[int, str]]
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """The rows that only one version has, for each version, by the number of shared rows before them.

    Copies count individually.

    Args:
        before, after: index and `example_id` of each row.
    """
    left = Counter(identity for _, identity in after)
    gone: dict[int, list[int]] = defaultdict(list)
    come: dict[int, list[int]] = defaultdict(list)
    spare: Counter[str] = Counter()
    seen = 0
    for i, identity in before:
        if left[identity]:
            left[identity] -= 1
            spare[identity] += 1
            seen += 1
        else:
            gone[seen].append(i)
    seen = 0
    for i, identity in after:
        if spare[identity]:
            spare[identity] -= 1
            seen += 1
        else:
            come[seen].append(i)
    return gone, come


def _edit(before: dict[str, Any], after: dict[str, Any], around: int = 100) -> dict[str, str]:
    """Both versions of a row, masked and shortened to their difference."""
    both = (before, after)
    texts = [conversation_text(row["messages"], row.get("tools")) or excerpt(row, WIDTH) for row in both]
    first = max(0, common_prefix(*texts) - 5 * WIDTH)  # a secret that begins before the difference is masked as a whole
    texts = [mask(text[first : first + 10 * WIDTH]) for text in texts]
    start = common_prefix(*texts)
    rest = common_prefix(*(text[start:][::-1] for text in texts))
    old, new = (text[max(0, start - around) : len(text) - rest + around][:WIDTH] for text in texts)
    return {"before": old, "after": new}


def finding_changes(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Checks with new findings, checks without findings any more, and checks with another number of rows."""
    before, after = ({f["check"]: f["count"] for f in found} for found in (old, new))
    changed = [name for name in after if name in before and after[name] != before[name]]
    return {
        "new": [{"check": name, "count": after[name]} for name in after if name not in before],
        "gone": [{"check": name, "count": before[name]} for name in before if name not in after],
        "changed": [{"check": name, "before": before[name], "after": after[name]} for name in changed],
    }
