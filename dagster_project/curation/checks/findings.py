"""Results of the checks as one document. The terminal, --json, the report, Dagster and the page all show this
document."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice, takewhile
from typing import Any

from dagster_project.core.messages import conversation_text
from dagster_project.core.records import CheckResult, prompt_text
from dagster_project.core.stored_rows import Selected
from dagster_project.curation.checks import conversations
from dagster_project.curation.checks.check import part_text
from dagster_project.curation.checks.checks import CHECKS, Judgement, Verdict
from dagster_project.curation.checks.overlaps import FIELDS, Link
from dagster_project.curation.checks.privacy import mask
from dagster_project.curation.similarity.overlap import BINS, CONTAINMENT, JACCARD, shared_span, words
from dagster_project.curation.sources.benchmarks import Item

ROWS, MATCHES, WIDTH = 20, 200, 2000
"""Rows listed in a report, which git tracks; overlaps shown for each check; characters shown of a text around the
shared words."""
SEARCHED = 4000
"""Characters of a text that are searched for words shared with a held-out one."""
ORDER = {"error": 0, "warn": 1, "info": 2}


def document(
    name: str, layout: str, judged: Judgement, held_out: Sequence[Item], matches: int = MATCHES, width: int = WIDTH
) -> dict[str, Any]:
    """The findings, worst first; see docs/checks.md for the form. No secret, address or number is in it: texts are masked.

    Args:
        name: of the data set.
        layout: of its rows.
        matches, width: overlaps per check, and characters per text.
    """
    items = {item.place: item for item in held_out}
    findings = [
        finding(verdict, judged, items, matches, width)
        for verdict in judged.verdicts.values()
        if verdict.broken or not verdict.passed or verdict.waived
    ]
    numbers = RowNumbers(judged.records)
    for one in findings:
        one["rows"] = [numbers.of(record) for record in Selected(judged.records, one["rows"])]
        one["matches"] = [{**found, "row": numbers.of(judged.records[found["row"]])} for found in one["matches"]]
    dropped = Counter(why for why in judged.reason if why)
    compared = judged.overlaps.compared
    rich = conversations.chosen(Selected(judged.records, [i for i in judged.rich if judged.reason[i] is None]))
    return {
        "name": name,
        "format": layout,
        "rows": len(judged.records),
        "kept": judged.reason.count(None),
        "dropped": {check: dropped[check] for check in CHECKS if dropped[check]},
        **({"fixed": judged.fixed} if judged.fixed else {}),
        "findings": sorted(findings, key=lambda f: (ORDER[f["severity"]], -f["count"], f["check"])),
        **({"conversations": [{"place": place(record), **conversations.shown(record)} for record in rich]} if rich else {}),
        "similarity": {
            "gate": {"jaccard": JACCARD, "containment": CONTAINMENT},
            "histogram": [
                {"from": i / BINS, "to": (i + 1) / BINS, "pairs": apart + near, "near": near}
                for i, (apart, near) in enumerate(compared.scores)
            ],
            "boilerplate": [{"text": mask(text), "rows": rows} for text, rows in compared.boilerplate],
        },
        "profile": judged.profile,
        "notes": {verdict.name: verdict.note for verdict in judged.verdicts.values() if verdict.note},
    }


class RowNumbers:
    """Source rows of a set, numbered consecutively across sources. A row may yield several records, and two rows one."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        rows: dict[str, int] = {}
        for record in records:
            last = max(record.get("source_rows") or [record["source_row"]])
            rows[record["source"]] = max(rows.get(record["source"], 0), last + 1)
        self._starts = dict(zip(rows, accumulate(rows.values(), initial=0), strict=False))

    def of(self, record: Mapping[str, Any]) -> int:
        number: int = self._starts[record["source"]] + record["source_row"]
        return number


def finding(
    verdict: Verdict, judged: Judgement, items: Mapping[str, Item], matches: int, width: int, places: int | None = None
) -> dict[str, Any]:
    """The finding of one check; `rows` are indices of records. A failed check on the whole set counts 1.

    Args:
        matches, width: overlaps, and characters per text.
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
        "examples": [_example(verdict.name, judged, i) for i in rows[:3]],
        **_conversations([judged.records[i] for i in rows[:3]]),
        "truth": check.description,
        "note": verdict.note,
        "next": check.hint,
        "matches": [match(link, judged.records, items, width, verdict.name == "conflicting_responses") for link in links],
    }


def _conversations(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The records of `examples` in full, None for plain-text records; empty if all are plain text."""
    shown = [conversations.shown(record) if conversations.is_rich(record) else None for record in records]
    return {"conversations": shown} if any(shown) else {}


def _example(check: str, judged: Judgement, i: int) -> str:
    """The fault of a row as the check quotes it or, if it quotes none, the beginning of the row."""
    if wrong := judged.repaired.get(check, {}).get(i):
        return wrong[:200]
    return str(judged.facts[check][i])[:200] if CHECKS[check].quotes else excerpt(judged.records[i])


def check_result(verdict: Verdict, judged: Judgement, held_out: Sequence[Item]) -> CheckResult:
    """The finding in short form for a stage's report, which git tracks."""
    found = finding(verdict, judged, {item.place: item for item in held_out}, matches=5, width=240, places=ROWS)
    done = ", ".join(f"{n} {what}" for n, what in ((verdict.dropped, "dropped"), (verdict.fixed, "fixed")) if n)
    return CheckResult(
        verdict.name, verdict.passed, verdict.severity, verdict.action == "fail", len(verdict.broken), found["places"], found["examples"],
        "; ".join(part for part in (done, verdict.note) if part), verdict.dropped, verdict.waived, verdict.fixed, found["matches"],
    )  # fmt: skip


def place(record: Mapping[str, Any]) -> str:
    return f"{record['source']}:{record['source_row']}"


def excerpt(record: Mapping[str, Any], width: int = 120) -> str:
    """The first words of a record, masked; for a record that could not be read, the reason and its content."""
    if record["messages"]:
        text = prompt_text(record["messages"]) or " ".join(m["content"] for m in record["messages"])
    else:
        meta = json.loads(record["meta"])
        text = f"{meta.get('problem', '')}  {json.dumps(meta['row'], ensure_ascii=False) if meta.get('row') else ''}"
    return " ".join(mask(text[: 20 * width]).split())[:width]


def match(link: Link, records: Sequence[dict[str, Any]], items: Mapping[str, Item], width: int, answered: bool = False) -> dict[str, Any]:
    """Both texts of an overlap, with the longest run of words that they share.

    Args:
        answered: show prompts with their responses, which differ.
    """
    record = records[link.row]
    text = _part(record, link.part, answered)
    if isinstance(link.other, int):
        other, theirs = place(records[link.other]), _part(records[link.other], link.part, answered)
    else:
        item = items[link.other]
        other = item.place
        said = (item.question, item.with_choices) if link.part == "prompt" else (item.text, item.question, item.with_choices)
        if link.part in FIELDS:
            text = _most_similar_part(text, "\n".join(said), SEARCHED)
        theirs = max(said, key=lambda t: _shared(text, t))
    if link.part in FIELDS:  # reasoning is long
        text, theirs = _most_similar_part(text, theirs, 10 * width), _most_similar_part(theirs, text, 10 * width)
    text, theirs = mask(text[: 10 * width]), mask(theirs[: 10 * width])
    mine_span, other_span = shared_span(text, theirs)
    text, mine_span = _window(text, mine_span, width)
    theirs, other_span = _window(theirs, other_span, width)
    return {
        "row": link.row, "place": place(record), "other": other, "part": link.part, "rule": link.rule, "score": link.score,
        "text": text, "span": list(mine_span), "other_text": theirs, "other_span": list(other_span),
    }  # fmt: skip


def _part(record: Mapping[str, Any], part: str, answered: bool) -> str:
    text = part_text(record, part)
    return f"{text}\n\n{conversation_text(record['messages'][-1:])}" if answered else text


def _most_similar_part(text: str, other: str, size: int) -> str:
    """The part of a text, of a given size and masked, with the most three-word shingles in common with another text."""
    text = mask(text)
    if len(text) <= size:
        return text
    runs = _runs(other)
    return max(
        (text[start : start + size] for start in range(0, len(text) - size // 2, size // 2)), key=lambda part: len(_runs(part) & runs)
    )


def _runs(text: str) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {*zip(tokens, tokens[1:], tokens[2:], strict=False)}


def _shared(a: str, b: str) -> int:
    (start, end), _ = shared_span(a[:SEARCHED], b[:SEARCHED])
    return end - start


def _window(text: str, span: tuple[int, int], width: int) -> tuple[str, tuple[int, int]]:
    """At most `width` characters of the text, with the start of the span in them."""
    if len(text) <= width:
        return text, span
    start = max(0, min(span[0] - width // 4, len(text) - width))
    head = "… " if start else ""
    tail = " …" if start + width < len(text) else ""
    cut = text[start : start + width]
    begin = span[0] - start + len(head)
    return head + cut + tail, (begin, min(span[1] - start + len(head), len(head) + len(cut)))


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
    return {
        "previous": previous,
        "rows": {"added": len(added), "removed": len(removed), "changed": len(changed), "unchanged": unchanged},
        "examples": {
            "added": [{"place": place(b), "text": excerpt(b, 300)} for b in Selected(new, added[:ROWS])],
            "removed": [{"place": f"{place(a)} (before)", "text": excerpt(a, 300)} for a in Selected(old, removed[:ROWS])],
            "changed": [{"place": place(new[b]), **_edit(old[a], new[b])} for a, b in changed[:ROWS]],
        },
    }


def _gaps(before: Sequence[tuple[int, str]], after: Sequence[tuple[int, str]]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """The rows that only one version has, for each version, by the number of shared rows before them. Copies count
    individually.

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
    texts = [conversation_text(record["messages"], record.get("tools")) or excerpt(record, WIDTH) for record in (before, after)]
    first = max(0, _common_prefix(*texts) - 5 * WIDTH)  # a secret that begins before the difference is masked as a whole
    texts = [mask(text[first : first + 10 * WIDTH]) for text in texts]
    start = _common_prefix(*texts)
    rest = _common_prefix(*(text[start:][::-1] for text in texts))
    old, new = (text[max(0, start - around) : len(text) - rest + around][:WIDTH] for text in texts)
    return {"before": old, "after": new}


def _common_prefix(a: str, b: str) -> int:
    """Length of the common prefix of two texts."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False)))


def finding_changes(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Checks with new findings, checks without findings any more, and checks with another number of rows."""
    before, after = ({f["check"]: f["count"] for f in found} for found in (old, new))
    return {
        "new": [{"check": name, "count": after[name]} for name in after if name not in before],
        "gone": [{"check": name, "count": before[name]} for name in before if name not in after],
        "changed": [
            {"check": name, "before": before[name], "after": after[name]}
            for name in after
            if name in before and after[name] != before[name]
        ],
    }
