"""The check document -> text for the terminal: findings, worst first, each with
rows, the best overlaps and the next step."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dagster_project.core.text import listed, many, visible
from dagster_project.views.data_quality import WORDS
from dagster_project.views.texts import text

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

COLORS = {"error": "bold red", "warn": "bold yellow", "info": "bold cyan"}


def check_text(document: Mapping[str, Any], color: bool = False, width: int = 120) -> str:
    """Text of the document of `findings.document`.

    Args:
        document: may have the parts `changes` and `thirteen_grams`.
        color: use ANSI colors.
        width: columns of the terminal.
    """
    from rich.console import Console, Group
    from rich.text import Text

    parts: list[Any] = _summary(document)
    parts += [Text(), _table(document)] if document["findings"] else []
    for finding in document["findings"]:
        parts += _finding_parts(finding)
    changes = text("data_changes", thirteen=document.get("thirteen_grams"), changes=document.get("changes"), line=_line)
    parts += [Text(line, no_wrap=True, overflow="ellipsis") for line in changes.split("\n")] if changes else []
    parts += _other_notes(document)
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


def _summary(document: Mapping[str, Any]) -> list[Any]:
    """Rows and findings by number, and the profile."""
    from rich.text import Text

    counts = Counter(finding["severity"] for finding in document["findings"])
    findings = ", ".join(many(counts[name], word) for name, word in WORDS.items() if counts[name]) or "no findings"
    first = f"{many(document['rows'], 'row')} ({document['format']}), {document['kept']:,} would be kept; {findings}"
    parts = [Text(first, style="bold")]
    for outcome in ("dropped", "fixed"):
        if rows := document.get(outcome):
            words = f"would be {'repaired' if outcome == 'fixed' else outcome}: "
            parts.append(Text(words + ", ".join(f"{name} {n:,}" for name, n in rows.items())))
    profile = text(
        "profile",
        profile=document.get("profile") or {},
        kept=document["kept"],
        boilerplate=document.get("similarity", {}).get("boilerplate", []),
        low_diversity=any(finding["check"] == "low_diversity" for finding in document["findings"]),
        fields=document.get("fields", {}),
        most_fields=FIELDS,
        line=_line,
    )
    return parts + [Text(line, style="dim") for line in profile.split("\n") if line]


def _table(document: Mapping[str, Any]) -> Table:
    """A row per finding."""
    from rich.table import Table
    from rich.text import Text

    table, has_fixed = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0)), bool(document.get("fixed"))
    columns = ["", "check", "rows", "dropped", *(["fixed"] if has_fixed else []), "first rows, from 0"]
    for name in columns:
        table.add_column(name, justify="right" if name in {"rows", "dropped", "fixed"} else "left")
    for finding in document["findings"]:
        table.add_row(
            Text(finding["severity"], style=COLORS[finding["severity"]]),
            finding["check"],
            "the set" if finding["count"] and not finding["rows"] else f"{finding['count']:,}",
            f"{finding['dropped']:,}" if finding["dropped"] else "",
            *([f"{finding['fixed']:,}" if finding.get("fixed") else ""] if has_fixed else []),
            listed(finding["rows"], 6),
        )
    return table


def _other_notes(document: Mapping[str, Any]) -> list[Any]:
    """Notes of checks without findings."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    names = {finding["check"] for finding in document["findings"]}
    notes = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for name, note in document["notes"].items():
        if name not in names:
            notes.add_row(Text(name, style="dim"), Text(_line(note, 1000), style="dim"))
    if not notes.row_count:
        return []
    return [Text("\nnotes of checks without findings", style="dim"), Padding(notes, (0, 0, 0, 6))]


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


def _line(text: str, most: int = 200) -> str:
    """Text from data on one line, with hidden characters written out.

    A line break in a name must not start a new line.
    """
    shown = " ".join(visible(text[:most].replace("\n", "\\n")).split())
    return shown if len(text) <= most else f"{shown} …"


FIELDS = 12
"""Fields of the source rows that are shown in a line."""
AROUND = 60
"""Characters shown before and after the words that two rows share."""


def _marked_span(text: str, span: Sequence[int]) -> Text:
    """The shared span, with some context."""
    from rich.text import Text

    start, end = span
    before, shared, after = text[max(0, start - AROUND) : start], text[start:end], text[end : end + AROUND]
    if len(shared) > 4 * AROUND:
        shared = f"{shared[: 2 * AROUND]} … {shared[-2 * AROUND :]}"
    line = Text("… " if start > AROUND else "")
    for piece, style in ((before, ""), (shared, "reverse"), (after, "")):
        line.append(visible(piece).replace("\n", " ").replace("\t", " "), style=style)
    return line
