"""findings.json of a checked data set -> one HTML page. JavaScript only filters pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from dagster_project.core.context import Documents
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.layout import report_of
from dagster_project.core.records import write_text
from dagster_project.core.severity import Shown, shown
from dagster_project.core.text import common_prefix, many, number, visible
from dagster_project.views.conversations import conversation
from dagster_project.views.declared import declared_table, violations_table
from dagster_project.views.html import Figure, Plot, Shape, Table, bars, brief, cut, label, render, shape, share
from dagster_project.views.suspects import suspect_row

PAGE = 20
"""Pairs shown at once; without JavaScript, pairs shown of each finding. data_quality.js has the same number."""
WHOLE, AROUND, INSIDE = 2_400, 400, 1_200
"""Characters: texts up to WHOLE are shown in full, longer ones with AROUND
before and after the shared words, and INSIDE of them."""
READ_BY = {"instructions": "raw_examples", "preferences": "raw_preferences"}
"""Stage that checks rows -> the one that reads their sources."""
BARS = 10
"""Bars in a chart. Its table has all values."""
LISTED = 20
"""Places listed for a finding."""
NAMED = 6
"""Checks named in the verdict."""
WORDS = {"error": "error", "warn": "warning", "info": "remark"}
"""Severity -> its noun."""
RANK = {"error": 0, "warn": 1, "info": 2}
SIGNS = {"error": "✕", "warn": "!", "info": "i"}
"""Symbol of each severity, for readers who cannot distinguish the colors."""


def around_span(text: str, span: Sequence[int], whole: int = WHOLE, around: int = AROUND) -> tuple[str, str, str, int]:
    """The shown parts of a text: before, inside and after the span; and the number of characters that are not shown."""
    start, end = sorted(span)
    before, inside, after = text[:start], text[start:end], text[end:]
    if len(text) <= whole:
        return visible(before), visible(inside), visible(after), 0
    head, middle, tail = before[max(0, len(before) - around) :], inside[:INSIDE], after[:around]
    first, second, third = "…" * (head != before), "…" * (middle != inside), "…" * (tail != after)
    return (
        first + visible(head),
        visible(middle) + second,
        visible(tail) + third,
        len(text) - len(head) - len(middle) - len(tail),
    )


def draw_data_quality(documents: Documents) -> None:
    """Write data/pages/<stage>/report.html: the findings of the checks."""
    document = documents.read(documents.out / "findings.json")
    if document is not None:
        changes, expectations = (
            documents.read(documents.pages / f"{name}.json") for name in ("changes", "expectations")
        )
        reading = documents.read(documents.root / report_of(READ_BY[documents.stage]))
        suspects = _suspects_of(documents)
        document = documents.quoted(documents, document)
        write_text(
            documents.pages / "report.html", data_quality_page(document, changes, expectations, reading, suspects)
        )


def data_quality_page(
    document: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    expectations: Mapping[str, Any] | None = None,
    reading: Mapping[str, Any] | None = None,
    suspects: Mapping[str, Any] | None = None,
) -> str:
    """The page of a data set. The same documents give the same bytes.

    Args:
        document: the check document.
        changes: differences from the previous version; None if there is none.
        expectations: results of the owner's Great Expectations suite
            (curation/checks/expectations.py); None if there is no suite.
        reading: report of the stage that read the rows, with what is declared for their sources; None if there is none.
        suspects: queue of `pedigree why --suspects` for these rows; None if there is none.
    """
    findings = sorted(document["findings"], key=lambda finding: (RANK[_shown_severity(finding)], -finding["count"]))
    judged = sorted(
        [*findings, *_expectation_findings(expectations)], key=lambda finding: RANK[_shown_severity(finding)]
    )
    sections = {
        "Changes": _changes(changes) if changes else None,
        "Rows": _flow(document) if document["rows"] else None,
        "Findings": _findings(findings, document.get("notes") or {}),
        "Conversations": [(one["place"], conversation(one)) for one in document.get("conversations", [])],
        "Expectations": _expectations(expectations) if expectations else None,
        "Similarity": _similarity(document.get("similarity") or {}),
        "Suspects": (
            {"model": suspects["model"]["stage"], "rows": [suspect_row(one) for one in suspects["suspects"]]}
            if suspects
            else None
        ),
        "Pairs": _pairs(findings),
        "Sources": _sources(reading) if reading and reading.get("sources") else None,
        "Profile": _profile(document.get("profile") or {}, document["kept"]),
    }
    return render(
        "data_quality.jinja", f"Data quality of {document['name']}", sections, "data_quality.js",
        document=document, verdict=_verdict(document, judged), figures=_key_figures(document, judged),
    )  # fmt: skip


def _suspects_of(documents: Documents) -> dict[str, Any] | None:
    """The queue of `pedigree why --suspects`, if it was made for these very findings."""
    found = documents.read(documents.pages / "suspects.json")
    return found if found and found["of"] == sha256_of_file(documents.out / "findings.json") else None


def _expectation_findings(expectations: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The check `expectations` as a finding: its severity is that of the worst expectation that fails."""
    failed = [one["severity"] for one in expectations["expectations"] if not one["passed"]] if expectations else []
    if not failed:
        return []
    worst = min(failed, key=lambda severity: RANK[severity])
    none_of_them = dict.fromkeys(("dropped", "elsewhere", "waived"), 0)
    return [{"check": "expectations", "severity": worst, "passed": False, "count": len(failed), **none_of_them}]


def _unresolved(finding: Mapping[str, Any]) -> int:
    """Rows that violate a check and are kept unchanged."""
    return max(
        0, int(finding["count"]) - int(finding["dropped"]) - int(finding["elsewhere"]) - int(finding.get("fixed", 0))
    )


def _passed(finding: Mapping[str, Any]) -> bool:
    """Whether the check passed; derived from the counts if the finding does not include it."""
    return bool(finding.get("passed", not _unresolved(finding)))


def _shown_severity(finding: Mapping[str, Any]) -> Shown:
    """Displayed severity. Waived findings are remarks."""
    return shown(finding["severity"], _passed(finding), finding["count"]) or "info"


def _verdict(document: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Severity, verdict, its reason with the checks, and the outcome of resolved errors."""
    open_ = {s: [f for f in findings if f["severity"] == s and not _passed(f)] for s in RANK}
    errors = sum(f["severity"] == "error" for f in findings)
    fixed = any(f["severity"] == "error" and f.get("fixed") for f in findings)
    resolved = (
        f" The rows that {many(errors, 'check')} of severity error found are"
        f" {'repaired or dropped' if fixed else 'dropped'}."
        if errors
        else ""
    )
    if not document["kept"]:
        severity, words, why, resolved = "error", "Nothing to train on", "No row is left.", ""
    elif open_["error"]:
        severity = "error"
        words = "Not ready to train on"
        why = f"{many(len(open_['error']), 'check')} of severity error not resolved"
        resolved = ""
    elif open_["warn"]:
        severity = "warn"
        words = "Usable, but review the warnings"
        why = f"{many(len(open_['warn']), 'check')} of severity warning to review"
    elif findings:
        severity, words = "good", "Ready to train on"
        why = "Every row that violates a check is repaired, dropped or waived, or the finding is only a remark."
    else:
        severity, words, why = "good", "Ready to train on", "No check found anything."
    named = [f["check"] for f in open_["error"] or open_["warn"]] if document["kept"] else []
    return {
        "severity": severity, "sign": SIGNS.get(severity, "✓"), "words": words, "why": why, "checks": named[:NAMED],
        "more": max(0, len(named) - NAMED), "resolved": resolved,
    }  # fmt: skip


def _key_figures(
    document: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]
) -> list[tuple[str, int, str, Mapping[str, int]]]:
    """Name, number, unit, and the repaired rows by check."""
    rows, kept = document["rows"], document["kept"]
    found = {word: sum(_shown_severity(f) == name for f in findings) for name, word in WORDS.items()}
    return [
        ("read", rows, "rows", {}),
        ("kept", kept, share(kept, rows), document.get("fixed", {})),
        ("dropped", rows - kept, share(rows - kept, rows), {}),
        ("findings", len(findings), ", ".join(many(n, word) for word, n in found.items() if n) or "none", {}),
    ]


def _flow(document: Mapping[str, Any]) -> dict[str, Any]:
    """Flow of the rows. The width of a ribbon is its share, but at least visible; the numbers are exact."""
    rows, kept, dropped = document["rows"], document["kept"], {name: n for name, n in document["dropped"].items() if n}
    ribbons, labels, left, right = [], [], 30.0, 30.0
    for kind, name, n in [("kept", "kept", kept), *(("gone", name, n) for name, n in dropped.items())]:
        thick = max(2.5, 150 * n / rows) if n else 0.0
        roomy = thick > 30
        top = right if roomy else right + 24  # the label is inside a thick ribbon, above a thin one
        curve = (
            f"M0,{left:g}C60,{left:g} 40,{top:g}"
            f" 100,{top:g}V{top + thick:g}C40,{top + thick:g} 60,{left + thick:g} 0,{left + thick:g}Z"
        )
        ribbons.append(shape("path", class_=kind, d=curve))
        node = shape("rect", class_=f"{kind} node", x="-5", width="5", height=f"{thick:g}")
        words = (
            shape("tspan", label(name), class_="name"),
            shape("tspan", number(n), dx="8"),
            shape("tspan", share(n, rows), class_="soft", dx="8"),
        )
        y = f"{top + (thick / 2 + 5 if roomy else -6):g}"
        labels.append(shape("svg", node, x="100%", y=f"{top:g}", class_="end"))
        labels.append(shape("text", *words, x="100%", dx="-14", y=y, text_anchor="end", class_=kind))
        left, right = left + thick, top + thick + 4
    height = max(left, right)
    picture = [
        shape(
            "svg",
            *ribbons,
            width="100%",
            height=f"{height:g}",
            viewBox=f"0 0 100 {height:g}",
            preserveAspectRatio="none",
        ),
        shape("rect", class_="node", x="0", y="30", width="5", height=f"{left - 30:g}"),
        shape("text", shape("tspan", "read", class_="name"), shape("tspan", number(rows), dx="8"), x="0", y="18"),
        *labels,
    ]
    parts = " + ".join([f"{number(kept)} kept", *(f"{number(n)} {cut(name)}" for name, n in dropped.items())])
    equation = f"{number(rows)} read = {parts}"
    table = [(name, number(n), share(n, rows)) for name, n in [("kept", kept), *dropped.items()]]
    figure = Figure(
        "From read to kept",
        "a row is dropped for the first check it violates",
        Plot(equation, height, picture, "flow"),
        Table("Rows by outcome", ["", "rows", "share"], table),
    )
    return {"figure": figure, "equation": equation}


def _findings(findings: Sequence[Mapping[str, Any]], notes: Mapping[str, str]) -> dict[str, Any]:
    """A card for each finding, worst first; then the notes of the other checks."""
    names = {finding["check"] for finding in findings}
    quiet = {name: note for name, note in notes.items() if note and name not in names}
    return {"cards": [_card(i, finding) for i, finding in enumerate(findings)], "quiet": quiet}


def _card(number_: int, finding: Mapping[str, Any]) -> dict[str, Any]:
    severity = _shown_severity(finding)
    count = finding["count"]
    left = _unresolved(finding)
    examples = finding.get("examples", [])
    of_set = count and not finding.get("rows") and not finding.get("places")
    facts = [
        ("dropped", "dropped by this check", finding["dropped"]),
        ("elsewhere", "dropped by another check", finding["elsewhere"]),
    ]
    facts += [
        ("fixed", "repaired", finding.get("fixed", 0)),
        ("left", "kept unchanged" if finding.get("fixed") else "kept", left),
    ]
    facts = [] if of_set else facts
    start, bar = 0.0, []
    for kind, _, n in facts:
        width = 100 * n / max(1, count)
        if n:
            bar.append(shape("rect", class_=kind, x=f"{start:.4g}%", width=f"{width:.4g}%", height="8"))
        start += width
    facts = [fact for fact in facts if fact[2] or fact[0] in {"dropped", "left"}]
    facts += [("waived", "waived", finding["waived"])] if finding["waived"] else []
    places = finding.get("places") or [f"row {row}" for row in finding.get("rows", [])]
    shown = [one and conversation(one) for one in finding.get("conversations") or [None] * len(examples)]
    quotes, places = list(zip(places, examples, shown, strict=False)), places[:LISTED]
    rest = places[len(examples) :]
    more = f" (the first {len(places)} of {number(count)} are listed)" if count > len(places) else ""
    return {
        "number": number_,
        "severity": severity,
        "sign": SIGNS[severity],
        "finding": finding,
        "count": "the set" if of_set else number(count),
        "bar": bar,
        "facts": facts,
        "quotes": quotes,
        "rest": rest,
        "rest_words": many(len(rest), "more place" if quotes else "place") + more,
        "pairs": len(finding.get("matches") or []),
    }


def _expectations(found: Mapping[str, Any]) -> dict[str, Any]:
    """Results of the owner's expectations of the whole set, in the order of the suite."""
    results = found["expectations"]
    columns = ["expectation", "result", "found", "rows that violate it"]
    rows = []
    for one in results:
        result = "passed" if one["passed"] else f"failed ({one['severity']})"
        rows.append((one["words"], result, one["seen"], ", ".join(one["places"])))
    passed = sum(one["passed"] for one in results)
    return {
        "suite": found["suite"],
        "words": (
            f"{passed} of {many(len(results), 'expectation')} passed"
            f" on {many(found['rows'], 'kept row')}, evaluated by Great Expectations"
        ),
        "table": Table("Expectations", columns, rows, folded=False, region="Expectations"),
    }


def _similarity(similarity: Mapping[str, Any]) -> dict[str, Any] | None:
    if not similarity.get("histogram"):
        return None
    gates = {f"{name} ≥ {number(value)}": value for name, value in similarity.get("gate", {}).items()}
    note = (
        "all compared pairs of prompts, by the share of the shorter prompt's 3-word shingles that the other contains;"
        " equal prompts are left out" + ("; near-copies in blue" if "near" in similarity["histogram"][0] else "")
    )
    figure = _histogram("Similarity of prompts", note, similarity["histogram"], "pairs", gates, 190)
    return {"figure": figure, "common": similarity.get("boilerplate") or []}


def _histogram(
    title: str, note: str, bins: Sequence[Mapping[str, Any]], key: str, marks: Mapping[str, float], size: float = 120
) -> Figure:
    """Bars of equal width, one per bin, with labeled lines at `marks`.

    On a log scale if counts differ by more than a factor of 100.

    The part "near" of a bin's count is drawn in front.
    """
    counts = [int(bin_[key]) for bin_ in bins]
    top, low = max([1, *counts]), min([n for n in counts if n], default=1)
    log = top > 100 * low
    most = _ceiling(top, log)
    floor, first, wide = 8 + 15 * len(marks) + size, 9.0, 88.0
    across = wide / len(bins)

    def high(n: float) -> float:
        return size * ((math.log10(n) + 0.3) / (math.log10(most) + 0.3) if log and n else n / most)

    body: list[Shape] = []
    for value in [10.0**k for k in range(round(math.log10(most)) + 1)] if log else [0, most / 2, most]:
        y = floor - high(value)
        body.append(shape("line", class_="grid", x1=f"{first}%", x2=f"{first + wide}%", y1=f"{y:.1f}", y2=f"{y:.1f}"))
        body.append(shape("text", brief(value), class_="tick", x=f"{first - 1}%", y=f"{y + 4:.1f}", text_anchor="end"))
    for i, (bin_, n) in enumerate(zip(bins, counts, strict=True)):
        near = bin_.get("near")
        for kind, of in (("bar", n),) if near is None else (("bar all", n), ("bar", near)):
            tall = max(1.5, high(of)) if of else 0
            words = f"{number(bin_['from'])} to {number(bin_['to'])}: {number(of)}{' near' * (of is near)} {key}"
            place = {"x": f"{first + across * (i + 0.06):.3f}%", "y": f"{floor - tall:.1f}"}
            bar = {"class_": kind, **place, "width": f"{across * 0.88:.3f}%", "height": f"{tall:.1f}"}
            body.append(shape("rect", *([shape("title", words)] if of else []), **bar))
    for i in range(0, len(bins) + 1, math.ceil(len(bins) / 6)):
        edge = bins[i]["from"] if i < len(bins) else bins[-1]["to"]
        body.append(
            shape(
                "text",
                brief(edge),
                class_="tick",
                x=f"{first + across * i:.3f}%",
                y=f"{floor + 17:g}",
                text_anchor="middle",
            )
        )
    names = [label(name, 40) for name in marks]
    for i, (name, value) in enumerate(zip(names, marks.values(), strict=True)):
        at = _position(value, bins)
        x = f"{first + wide * at:.3f}%"
        y = 11 + 15 * i
        anchor = "end" if at > 0.6 else "start"
        aside = -5 if at > 0.6 else 5
        body.append(shape("line", class_="mark", x1=x, x2=x, y1=f"{y - 9:g}", y2=f"{floor:g}"))
        body.append(shape("text", name, class_="marked", x=x, dx=aside, y=f"{y:g}", text_anchor=anchor))
    scale = "; counts on a log scale" if log else ""
    described = f"{title}: histogram of {number(sum(counts))} {key}{scale}. {'; '.join(names)}"
    columns = ["from", "to", key, *(["near"] if "near" in bins[0] else [])]
    table = Table(title, columns, [[number(bin_[column]) for column in columns] for bin_ in bins])
    return Figure(title, f"{note}{scale}", Plot(described, floor + 24, body), table)


def _ceiling(top: int, log: bool) -> float:
    """Upper limit of an axis: a round number not below `top`, whose half is round as well."""
    if log:
        return 10.0 ** math.ceil(math.log10(top))
    unit = 10.0 ** math.floor(math.log10(top))
    return next(unit * factor for factor in (1, 2, 3, 4, 6, 8, 10) if unit * factor >= top and unit * factor % 2 == 0)


def _position(value: float, bins: Sequence[Mapping[str, Any]]) -> float:
    """Position of a value on an axis of equally wide bins, from 0 to 1."""
    for i, bin_ in enumerate(bins):
        if value < bin_["to"]:
            return (i + max(0.0, (value - bin_["from"]) / (bin_["to"] - bin_["from"]))) / len(bins)
    return 1.0


def _pairs(findings: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The pairs of each finding: all as JSON for the filter, the first ones for readers without JavaScript."""
    groups = [
        {
            "number": i,
            "check": finding["check"],
            "pairs": [_pair_view(i, finding["check"], match) for match in finding["matches"]],
        }
        for i, finding in enumerate(findings)
        if finding.get("matches")
    ]
    if not groups:
        return None
    data = [pair for group in groups for pair in group["pairs"]]
    empty = {
        "check": "",
        "rule": "",
        "part": "",
        "score": 0,
        "sides": [{"place": "", "text": ["", "", ""], "cut": 0}] * 2,
    }
    return {
        "groups": groups,
        "most": PAGE,
        "rules": list(dict.fromkeys(pair["rule"] for pair in data)),
        "data": data,
        "empty": empty,
    }


def _pair_view(number_: int, check: str, match: Mapping[str, Any]) -> dict[str, Any]:
    """A pair as data_quality.js reads it: texts are already cut, and hidden characters written out."""
    sides = []
    for place, text, span in (("place", "text", "span"), ("other", "other_text", "other_span")):
        before, inside, after, hidden = around_span(match[text], match[span])
        sides.append({"place": visible(cut(match[place])), "text": [before, inside, after], "cut": hidden})
    words = {name: visible(cut(match[name])) for name in ("rule", "part")}
    return {"number": number_, "check": visible(cut(check)), "score": match["score"], **words, "sides": sides}


def _bars(title: str, note: str, counts: Mapping[str, int], whole: int, unit: str = "rows") -> Figure:
    """One bar per name, with its label above."""
    most = max(1, *counts.values())
    rows = [
        ((label(name), shape("title", cut(name))), f"{number(n)} · {share(n, whole)}", 100 * n / most, "bar")
        for name, n in islice(counts.items(), BARS)
    ]
    more = f"; {len(counts) - BARS} more in the table" if len(counts) > BARS else ""
    first, count = next(iter(counts.items()))
    words = f"{title}: bars of {len(counts)} names, the largest {cut(first)} with {number(count)}"
    table = Table(title, ["", unit, "share"], [(name, number(n), share(n, whole)) for name, n in counts.items()])
    return Figure(title, f"{note}{more}", bars(words, rows), table)


def _sources(reading: Mapping[str, Any]) -> dict[str, Any]:
    """What is declared for the sources, and the verdict of the use policy if there is one."""
    check = reading.get("checks", {}).get("use_policy", {}) if "use_policy" in reading else {}
    return {
        "table": declared_table(reading["sources"]),
        "policy": f"{'passed' if check['passed'] else 'not passed'}: {check.get('note', '')}" if check else "",
        "violations": violations_table(check["violations"]) if check.get("violations") else None,
    }


def _profile(profile: Mapping[str, Any], kept: int) -> dict[str, Any] | None:
    """Statistics of the kept rows."""
    diversity = profile.get("diversity") or {}
    spread = (
        f"entropy {number(profile['entropy'])} bits, equivalent to {number(profile['effective_categories'])} categories"
        f" of equal size; {number(profile['singletons'])} with one row"
        if "entropy" in profile
        else ""
    )
    parts = (
        ("categories", "Categories", spread), ("sources", "Sources", "rows by file"),
        ("scripts", "Scripts", "of the letters in prompts"), ("roles", "Conversations", "sequence of roles"),
    )  # fmt: skip
    repeated = (
        ("top_openings", "Openings", "the first words of prompts, most frequent"),
        ("top_responses", "Repeated responses", "most frequent"),
    )
    plots = [
        *(_bars(title, note, profile[key], kept) for key, title, note in parts if profile.get(key)),
        *_tool_calls(profile.get("tool_calls") or {}),
        *(_length(part, length) for part, length in (profile.get("lengths") or {}).items() if length.get("histogram")),
        *_readability(profile.get("readability") or {}),
        *(_bars(title, note, diversity[key], kept) for key, title, note in repeated if diversity.get(key)),
    ]
    figures = {
        name.replace("_", " "): number(value) for name, value in diversity.items() if isinstance(value, int | float)
    }
    return {"plots": plots, "diversity": figures} if plots or figures else None


def _tool_calls(calling: Mapping[str, Any]) -> list[Figure]:
    if not calling.get("by_tool"):
        return []
    note = f"by tool; in {many(calling['rows'], 'row')}, with {many(calling['results'], 'result')}"
    return [_bars("Tool calls", note, calling["by_tool"], calling["calls"], "calls")]


def _length(part: str, length: Mapping[str, Any]) -> Figure:
    marks = {f"{name} {number(length[name])}": length[name] for name in ("median", "p95") if name in length}
    note = f"{cut(length.get('unit', 'words'), 40)}; the longest has {number(length.get('max', 0))}"
    return _histogram(f"Length of the {cut(part, 40)}", note, length["histogram"], "rows", marks)


def _readability(reading: Mapping[str, Any]) -> list[Figure]:
    if not reading.get("histogram"):
        return []
    hard = (
        f"; {100 * reading['share_hard']:.1f} % of {many(reading['rows'], 'scored prompt')} are hard to read"
        if "share_hard" in reading
        else ""
    )
    marks = {f"{name} {number(reading[name])}": reading[name] for name in ("p10", "median", "p90") if name in reading}
    return [
        _histogram("Readability", f"Flesch reading ease: 0 hard, 100 easy{hard}", reading["histogram"], "rows", marks)
    ]


def _changes(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Differences from the previous version: rows, then findings."""
    rows, examples, findings = changes["rows"], changes.get("examples") or {}, changes.get("findings") or {}
    signs = {"added": "+", "removed": "−", "changed": "±", "unchanged": "="}
    counts = {
        "new": lambda e: number(e["count"]),
        "gone": lambda e: f"was {number(e['count'])}",
        "changed": lambda e: f"{number(e['before'])} → {number(e['after'])}",
    }
    return {
        "previous": changes["previous"],
        "tiles": [(kind, sign, number(rows.get(kind, 0))) for kind, sign in signs.items()],
        "findings": [
            (kind, entry["check"], words(entry)) for kind, words in counts.items() for entry in findings.get(kind, [])
        ],
        "rows": [
            {
                "kind": kind,
                "words": f"{len(examples[kind])} of {many(rows.get(kind, 0), 'row')} {kind}",
                "entries": [{**entry, "edit": _edit(entry) if kind == "changed" else None} for entry in examples[kind]],
            }
            for kind in ("added", "removed", "changed")
            if examples.get(kind)
        ],
    }


def _edit(entry: Mapping[str, Any]) -> list[tuple[str, str, str, str, int]]:
    """Both texts of a changed row: HTML element, text before, inside and after
    the difference, and number of characters not shown."""
    before, after = entry["before"], entry["after"]
    same = common_prefix(before, after)
    # whole words, if there are any
    start = same if same - before.rfind(" ", 0, same) > 30 else before.rfind(" ", 0, same) + 1
    last = common_prefix(before[same:][::-1], after[same:][::-1])
    step = before.find(" ", len(before) - last) - (len(before) - last) if last else 0
    last -= step if 0 <= step <= 30 else 0
    return [
        (tag, *around_span(text, (start, len(text) - last), 2 * AROUND, AROUND // 2))
        for tag, text in (("del", before), ("ins", after))
    ]
