"""The check document -> text for the terminal: findings, worst first, each with
rows, the best overlaps and the next step."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dagster_project.core.text import many, number, visible

if TYPE_CHECKING:
    from rich.text import Text

WORDS = {"error": "error", "warn": "warning", "info": "remark"}
COLORS = {"error": "bold red", "warn": "bold yellow", "info": "bold cyan"}


def check_text(document: Mapping[str, Any], color: bool = False, width: int = 120) -> str:
    """Text of the document of `findings.document`.

    Args:
        document: may have the parts `changes` and `thirteen_grams`.
        color: use ANSI colors.
        width: columns of the terminal.
    """
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    counts = Counter(finding["severity"] for finding in document["findings"])
    findings = ", ".join(many(counts[name], word) for name, word in WORDS.items() if counts[name]) or "no findings"
    first = f"{many(document['rows'], 'row')} ({document['format']}), {document['kept']:,} would be kept; {findings}"
    parts: list[Any] = [Text(first, style="bold")]
    if document["dropped"]:
        parts.append(Text("would be dropped: " + ", ".join(f"{name} {n:,}" for name, n in document["dropped"].items())))
    if document.get("fixed"):
        parts.append(Text("would be repaired: " + ", ".join(f"{name} {n:,}" for name, n in document["fixed"].items())))
    parts += [Text(line, style="dim") for line in _profile_lines(document)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = [("", "left"), ("check", "left"), ("rows", "right"), ("dropped", "right")]
    columns += [("fixed", "right")] if document.get("fixed") else []
    for name, justify in [*columns, ("first rows, from 0", "left")]:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for finding in document["findings"]:
        table.add_row(
            Text(finding["severity"], style=COLORS[finding["severity"]]),
            finding["check"],
            "the set" if finding["count"] and not finding["rows"] else f"{finding['count']:,}",
            f"{finding['dropped']:,}" if finding["dropped"] else "",
            *([f"{finding['fixed']:,}" if finding.get("fixed") else ""] if document.get("fixed") else []),
            _first_rows(finding["rows"]),
        )
    parts += [Text(), table] if document["findings"] else []
    for finding in document["findings"]:
        parts += _finding_parts(finding)
    if "thirteen_grams" in document:
        parts += [Text(line, no_wrap=True, overflow="ellipsis") for line in _thirteen_lines(document["thirteen_grams"])]
    if "changes" in document:
        parts += [Text(line, no_wrap=True, overflow="ellipsis") for line in _change_lines(document["changes"])]
    quiet = {
        name: note
        for name, note in document["notes"].items()
        if name not in {finding["check"] for finding in document["findings"]}
    }
    if quiet:
        notes = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for name, note in quiet.items():
            notes.add_row(Text(name, style="dim"), Text(_line(note, 1000), style="dim"))
        parts += [Text("\nnotes of checks without findings", style="dim"), Padding(notes, (0, 0, 0, 6))]
    console = Console(
        file=io.StringIO(),
        force_terminal=color,
        no_color=not color,
        width=max(40, width),
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(Group(*parts))
    return re.sub(r"[ \t]+$", "", console.file.getvalue(), flags=re.M).rstrip("\n")  # type: ignore[attr-defined]


def _finding_parts(finding: Mapping[str, Any]) -> list[Any]:
    """Heading, note, best overlaps or first rows, and next step of a finding."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    head = Text(f"\n{finding['check']}", style=COLORS[finding["severity"]])
    head.append(f"  {finding['truth']}", style="not bold")
    lines: list[Any] = [Text(_line(finding["note"], 1000))] if finding["note"] else []
    lines += [Text(f"{many(finding['waived'], 'row')} waived")] if finding["waived"] else []
    for match in finding["matches"][:2]:
        places = f"{_line(match['place'])} ~ {_line(match['other'])}"
        lines += [
            Text(f"{places}   {match['part']}, {match['rule']} {match['score']:.2f}", style="dim"),
            _marked_span(match["text"], match["span"]),
            *([_marked_span(match["other_text"], match["other_span"])] if match["other_text"] != match["text"] else []),
        ]
    if not finding["matches"]:
        lines += [
            Text(f"{_line(where)}  {_line(text, 300)}", no_wrap=True, overflow="ellipsis")
            for where, text in zip(finding["places"][:2], finding["examples"][:2], strict=False)
        ]
    lines.append(Text(f"next: {finding['next']}", style="italic"))
    return [head, Padding(Group(*lines), (0, 0, 0, 6))]


def _first_rows(rows: Sequence[int], most: int = 6) -> str:
    more = f" and {len(rows) - most:,} more" if len(rows) > most else ""
    return ", ".join(map(str, rows[:most])) + more


def _line(text: str, most: int = 200) -> str:
    """Text from data on one line, with hidden characters written out.

    A line break in a name must not start a new line.
    """
    shown = " ".join(visible(text[:most].replace("\n", "\\n")).split())
    return shown if len(text) <= most else f"{shown} …"


def _profile_lines(document: Mapping[str, Any]) -> list[str]:
    profile = document.get("profile") or {}
    lines = []
    if profile.get("category_count"):
        named = {name: n for name, n in profile["categories"].items() if name != "(others)"}
        others = profile["category_count"] + ("(none)" in named) - len(named)
        lines.append(f"categories: {_first_counts(named, 8, others)}")
    if calling := profile.get("tool_calls"):
        made = (
            f"{many(calling['calls'], 'tool call')} in {many(calling['rows'], 'row')},"
            f" {many(calling['results'], 'result')}"
        )
        lines.append(f"{made}; {many(calling['rows_with_tools'], 'row')} with tools")
    if traces := profile.get("reasoning"):
        lines.append(f"reasoning in {many(traces['answers'], 'answer')} of {many(traces['rows'], 'row')}")
    if untrained := profile.get("untrained_answers"):
        lines.append(f"{many(untrained, 'answer')} with weight 0")
    for part, length in profile.get("lengths", {}).items():
        if document["kept"]:
            lines.append(
                f"{part}: median {number(length['median'])},"
                f" 95 % up to {math.ceil(length['p95']):,}, longest {length['max']:,} {length['unit']}"
            )
    boilerplate = document.get("similarity", {}).get("boilerplate", [])
    if boilerplate:
        passages = "; ".join(
            f'"{_line(passage["text"])}" in {many(passage["rows"], "prompt")}' for passage in boilerplate[:3]
        )
        lines.append(f"boilerplate: {passages}" + (f"; {len(boilerplate) - 3} more" if len(boilerplate) > 3 else ""))
    if any(finding["check"] == "low_diversity" for finding in document["findings"]):
        for part, name in (("top_openings", "openings"), ("top_responses", "responses")):
            frequent = [
                f'"{_line(text, 60)}" {rows:,}'
                for text, rows in list(profile.get("diversity", {}).get(part, {}).items())[:3]
            ]
            lines += [f"most frequent {name}: {', '.join(frequent)}"] if frequent else []
    for place, counts in document.get("fields", {}).items():
        lines.append(f"fields {place}: {_first_counts(counts, FIELDS)}")
    return lines


def _first_counts(counts: Mapping[str, int], most: int, others: int = 0) -> str:
    """The first names with their counts, and the number of names that are left out.

    Args:
        others: number of names that `counts` does not have.
    """
    shown = [f"{_line(name, 40)} {count:,}" for name, count in list(counts.items())[:most]]
    more = max(0, len(counts) - most) + others
    return ", ".join([*shown, *([f"{more:,} more"] if more else [])])


FIELDS = 12
"""Fields of the source rows that are shown in a line."""


def _thirteen_lines(document: Mapping[str, Any]) -> list[str]:
    lines = [f"\n13 shared words, the common rule: {many(document['rows'], 'row')}, {many(document['pairs'], 'pair')}"]
    return lines + [
        f"  {_line(one['place'])} ~ {_line(one['other'])}   {_line(one['shared'], 90)}"
        for one in document["matches"][:3]
    ]


def _marked_span(text: str, span: Sequence[int], around: int = 60) -> Text:
    """The shared span, with some context."""
    from rich.text import Text

    start, end = span
    before, shared, after = text[max(0, start - around) : start], text[start:end], text[end : end + around]
    if len(shared) > 4 * around:
        shared = f"{shared[: 2 * around]} … {shared[-2 * around :]}"
    line = Text("… " if start > around else "")
    for piece, style in ((before, ""), (shared, "reverse"), (after, "")):
        line.append(visible(piece).replace("\n", " ").replace("\t", " "), style=style)
    return line


def _change_lines(changes: Mapping[str, Any]) -> list[str]:
    rows = changes["rows"]
    lines = [
        f"\nrows since {_line(changes['previous'])}: "
        + ", ".join(f"{rows[kind]:,} {kind}" for kind in ("added", "removed", "changed", "unchanged"))
    ]
    for kind in ("added", "removed"):
        lines += [f"  {kind:8} {_line(e['place'])}  {_line(e['text'], 90)}" for e in changes["examples"][kind][:3]]
    for edit in changes["examples"]["changed"][:3]:
        lines += [
            f"  changed  {_line(edit['place'])}",
            *(f"    {sign} {_line(edit[side], 200)}" for sign, side in (("-", "before"), ("+", "after"))),
        ]
    for kind, words in (("new", "new findings"), ("gone", "findings that are gone")):
        if changes["findings"][kind]:
            lines.append(
                f"  {words}: " + ", ".join(f"{one['check']} {one['count']}" for one in changes["findings"][kind])
            )
    if changes["findings"]["changed"]:
        lines.append(
            "  "
            + ", ".join(f"{one['check']} {one['before']} -> {one['after']}" for one in changes["findings"]["changed"])
        )
    return lines
