"""The document of `pedigree bisect` -> one page: the versions that were
searched, with their answers, and the records of the commit that was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster_project.core.text import listed, many, number
from dagster_project.views.html import Table, render
from dagster_project.views.why_diff import record_view

VERDICTS = {
    "found": ("error", "✕", "The answer changed with this commit."),
    "always": ("good", "✓", "Every version that was asked gives the expected answer, the newest too."),
    "never": (
        "warn",
        "–",
        "The oldest version does not give the expected answer either: no commit of this search changed it.",
    ),
}
"""Verdict -> class, sign, sentence."""


def bisect_page(document: Mapping[str, Any]) -> str:
    """The page.

    Args:
        document: of `commands/bisect.py`.
    """
    kind, sign, sentence = VERDICTS[document["verdict"]]
    first, records = document.get("first"), document.get("records")
    commit, title = (first["commit"][:12], first["title"]) if first else ("none", "in this search")
    figures = [
        ("versions", number(len(document["versions"])), f"{number(document['evaluations'])} asked"),
        ("first commit without it", commit, title),
        ("records", "unknown" if first and records is None else number(len(records or ())), _among(document)),
    ]
    others = [
        f"{name.replace('_', ' ')}: {listed(names, 12)}" for name, names in document.get("also_differ", {}).items()
    ]
    sections = {
        "Versions": _versions(document),
        "Records": {"found": [record_view(one) for one in records or ()], "among": _among(document)} if first else None,
        "Notes": [*(f"Also different, and not explained by records: {line}" for line in others), *document["notes"]],
    }
    verdict = {"kind": kind, "sign": sign, "text": sentence}
    view = {
        "asked": document["asked"],
        "model": document["model"],
        "first": first,
        "verdict": verdict,
        "figures": figures,
    }
    return render("bisect.jinja", "The commit that changed an answer", sections, **view)


def _among(document: Mapping[str, Any]) -> str:
    """Of how many records the list is the first part."""
    if document.get("records") is None:
        return "" if document.get("first") is None else "not ranked"
    return f"of {many(document['among'], 'record')} that one of the two versions alone was trained on"


def _versions(document: Mapping[str, Any]) -> Table:
    """All versions of the search from the oldest to the newest, each with its answer if it was asked."""
    answers = {one["commit"]: one for one in document["answers"]}
    first, last = (document.get(name, {}).get("commit") for name in ("first", "last_good"))
    newest = document["versions"][-1]["commit"]
    marks = {newest: "" if newest in answers or not first else ": taken as wrong"} | {
        first: ", the first such version",
        last: ", the last such version" if last in answers else ": taken as right (--good)",
    }
    rows = [
        [
            one["commit"][:12],
            one["title"],
            one["md5"][:12],
            _verdict(answers.get(one["commit"])) + marks.get(one["commit"], ""),
            answers.get(one["commit"], {}).get("answer", ""),
        ]
        for one in document["versions"]
    ]
    caption = f"Versions of {document['versions'][-1]['stage']}, the oldest first"
    return Table(caption, ["commit", "title", "md5", "answer is", "answer"], rows, folded=False, region=caption)


def _verdict(answer: Mapping[str, Any] | None) -> str:
    if answer is None:
        return "not asked"
    return "✓ as expected" if answer["as_expected"] else "✕ not as expected"
