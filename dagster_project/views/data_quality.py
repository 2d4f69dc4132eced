"""The check document -> one HTML page (markup.py), with JavaScript only to filter pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from dagster_project.core.context import Documents
from dagster_project.core.records import write_text
from dagster_project.core.severity import Shown, shown
from dagster_project.views import html

PAGE = 20
"""Pairs shown at once; without JavaScript, the pairs shown of each finding. data_quality.js has the same number."""
WHOLE, AROUND, INSIDE = 2_400, 400, 1_200
"""Characters. Longer texts are cut: this much is shown before and after the shared words, and of them."""
BARS = 10
"""Bars in a chart; its table has all."""
LISTED = 20
"""Places of a finding that are listed."""
RANK = {"error": 0, "warn": 1, "info": 2}
SIGNS = {"error": "✕", "warn": "!", "info": "i"}
"""What severity looks like where colour can't be told apart."""


def cut(text: str, span: Sequence[int], whole: int = WHOLE, around: int = AROUND) -> tuple[str, str, str, int]:
    """What is shown of a text: before, inside and after the span, visible; and how many characters are not shown."""
    start, end = sorted(span)
    before, inside, after = text[:start], text[start:end], text[end:]
    if len(text) <= whole:
        return html.visible(before), html.visible(inside), html.visible(after), 0
    head, middle, tail = before[max(0, len(before) - around) :], inside[:INSIDE], after[:around]
    first, second, third = "…" * (head != before), "…" * (middle != inside), "…" * (tail != after)
    return (
        first + html.visible(head),
        html.visible(middle) + second,
        html.visible(tail) + third,
        len(text) - len(head) - len(middle) - len(tail),
    )


def draw(documents: Documents) -> None:
    """data/pages/<stage>/report.html: what the checks found, from findings.json."""
    document = documents.read(documents.out / "findings.json")
    if document is not None:
        write_text(documents.pages / "report.html", page(document, documents.read(documents.pages / "changes.json")))


def page(document: dict[str, Any], changes: dict[str, Any] | None = None) -> str:
    """The page. The same document gives the same bytes.

    Args:
        document: the check document of a data set.
        changes: how the data set differs from its previous version, or None where there is none to compare with.
    """
    findings = sorted(document["findings"], key=lambda finding: (RANK[_shown(finding)], -finding["count"]))
    parts = {
        "Changes": _changes(changes) if changes else "",
        "Rows": _flow(document) if document["rows"] else "",
        "Findings": _findings(findings, document.get("notes") or {}),
        "Similarity": _similarity(document.get("similarity") or {}),
        "Pairs": _pairs(findings),
        "Profile": _profile(document.get("profile") or {}, document["kept"]),
    }
    return html.page(
        f"Data quality of {document['name']}",
        _head(document, findings),
        parts,
        "Made by <b>pedigree check</b>. Rows are counted from 0.",
        script=resources.files(__package__).joinpath("data_quality.js").read_text("utf-8"),
    )


def _left(finding: Mapping[str, Any]) -> int:
    """Rows that break a check and are kept as they are."""
    return max(0, int(finding["count"]) - int(finding["dropped"]) - int(finding["elsewhere"]) - int(finding.get("fixed", 0)))


def _passed(finding: Mapping[str, Any]) -> bool:
    """A finding that does not say whether its check passed is judged by its figures."""
    return bool(finding.get("passed", not _left(finding)))


def _shown(finding: Mapping[str, Any]) -> Shown:
    """What was found and waived is a remark."""
    return shown(finding["severity"], _passed(finding), finding["count"]) or "info"


def _verdict(document: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Severity, verdict and the reason for it."""
    open_ = {s: [f for f in findings if f["severity"] == s and not _passed(f)] for s in RANK}
    names = ", ".join(html.bdi(f["check"]) for f in (open_["error"] or open_["warn"])[:6])
    if not document["kept"]:
        return "error", "Nothing to learn from", "No row is left."
    if open_["error"]:
        return "error", "Not ready to train on", f"{html.many(len(open_['error']), 'error')} not dealt with: {names}."
    errors = sum(f["severity"] == "error" for f in findings)
    fixed = any(f["severity"] == "error" and f.get("fixed") for f in findings)
    dealt = f" The rows of {html.many(errors, 'error')} are {'repaired or dropped' if fixed else 'dropped'}." if errors else ""
    if open_["warn"]:
        return "warn", "Usable, with care", f"{html.many(len(open_['warn']), 'warning')} to look at: {names}.{dealt}"
    if findings:
        return (
            "good",
            "Ready to train on",
            f"Every row that breaks a check is repaired, dropped for it or waived, or is worth a remark only.{dealt}",
        )
    return "good", "Ready to train on", "No check found anything."


def _head(document: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> str:
    severity, verdict, why = _verdict(document, findings)
    rows, kept = document["rows"], document["kept"]
    found = {word: sum(_shown(f) == name for f in findings) for name, word in (("error", "error"), ("warn", "warning"), ("info", "remark"))}
    fixed = ", ".join(f"{html.bdi(name)} {html.number(n)}" for name, n in document.get("fixed", {}).items())
    figures = [
        ("read", html.number(rows), "rows"),
        ("kept", html.number(kept), "; ".join([html.share(kept, rows), *([f"repaired: {fixed}"] if fixed else [])])),
        ("dropped", html.number(rows - kept), html.share(rows - kept, rows)),
        ("findings", html.number(len(findings)), ", ".join(html.many(n, word) for word, n in found.items() if n) or "none"),
    ]
    tiles = "".join(f"<div><dt>{name}</dt><dd><b>{figure}</b> <span>{unit}</span></dd></div>" for name, figure, unit in figures)
    return (
        f'<header class="head"><p class="over">Data quality · format {html.bdi(document["format"])}</p><h1>{html.bdi(document["name"])}</h1>'
        f'<p class="verdict {severity}"><span class="sign" aria-hidden="true">{SIGNS.get(severity, "✓")}</span>'
        f'<span><strong>{verdict}.</strong> {why}</span></p><dl class="tiles">{tiles}</dl></header>'
    )


def _flow(document: Mapping[str, Any]) -> str:
    """Where the rows went. A ribbon is as thick as its share, but never too thin to be seen; the figures are exact."""
    rows, kept, dropped = document["rows"], document["kept"], {name: n for name, n in document["dropped"].items() if n}
    ribbons, labels, left, right = "", "", 30.0, 30.0
    for kind, name, n in [("kept", "kept", kept), *(("gone", name, n) for name, n in dropped.items())]:
        thick = max(2.5, 150 * n / rows) if n else 0.0
        roomy = thick > 30
        top = right if roomy else right + 24  # the label stands on a thin ribbon, in a thick one
        curve = f"M0,{left:g}C60,{left:g} 40,{top:g} 100,{top:g}V{top + thick:g}C40,{top + thick:g} 60,{left + thick:g} 0,{left + thick:g}Z"
        ribbons += f'<path class="{kind}" d="{curve}"/>'
        labels += f'<svg x="100%" y="{top:g}" class="end"><rect class="{kind} node" x="-5" width="5" height="{thick:g}"/></svg>'
        labels += f'<text x="100%" dx="-14" y="{top + (thick / 2 + 5 if roomy else -6):g}" text-anchor="end" class="{kind}"><tspan class="name">{html.label(name)}</tspan>'
        labels += f'<tspan dx="8">{html.number(n)}</tspan><tspan class="soft" dx="8">{html.share(n, rows)}</tspan></text>'
        left, right = left + thick, top + thick + 4
    height = max(left, right)
    start = f'<rect class="node" x="0" y="30" width="5" height="{left - 30:g}"/><text x="0" y="18"><tspan class="name">read</tspan><tspan dx="8">{html.number(rows)}</tspan></text>'
    sum_ = " + ".join([f"{html.number(kept)} kept", *(f"{html.number(n)} {html.text(name)}" for name, n in dropped.items())])
    picture = (
        f'<svg width="100%" height="{height:g}" viewBox="0 0 100 {height:g}" preserveAspectRatio="none">{ribbons}</svg>{start}{labels}'
    )
    table = [
        ("kept", html.number(kept), html.share(kept, rows)),
        *((name, html.number(n), html.share(n, rows)) for name, n in dropped.items()),
    ]
    return html.figure(
        "From read to kept", "a row is dropped for the first check it breaks", html.svg(f"{html.number(rows)} read = {sum_}", height, picture, "flow"),
        f'<p class="sum"><bdi>{html.number(rows)} read = {sum_}</bdi></p>' + html.table("Rows by what became of them", ["", "rows", "share"], table),
    )  # fmt: skip


def _findings(findings: Sequence[Mapping[str, Any]], notes: Mapping[str, str]) -> str:
    """A card each, worst first; then what the other checks have to say."""
    cards = "".join(_finding(i, finding) for i, finding in enumerate(findings)) or '<p class="lead">No check found anything.</p>'
    names = {finding["check"] for finding in findings}
    quiet = "".join(
        f"<div><dt>{html.bdi(name)}</dt><dd>{html.bdi(note, WHOLE)}</dd></div>"
        for name, note in notes.items()
        if note and name not in names
    )
    return cards + (f'<h3>Notes of checks that found nothing</h3><dl class="notes">{quiet}</dl>' if quiet else "")


def _finding(number: int, finding: Mapping[str, Any]) -> str:
    severity, count, left = _shown(finding), finding["count"], _left(finding)
    facts = [("dropped", "dropped for it", finding["dropped"]), ("elsewhere", "dropped for another check", finding["elsewhere"])]
    facts += [("fixed", "repaired", finding.get("fixed", 0)), ("left", "kept as they are" if finding.get("fixed") else "kept", left)]
    start, bar = 0.0, ""
    for kind, _, n in facts:
        width = 100 * n / max(1, count)
        bar += f'<rect class="{kind}" x="{start:.4g}%" width="{width:.4g}%" height="8"/>' if n else ""
        start += width
    facts = [fact for fact in facts if fact[2] or fact[0] in {"dropped", "left"}] + (
        [("waived", "waived", finding["waived"])] if finding["waived"] else []
    )
    words = "".join(f'<div class="{kind}"><dt>{name}</dt><dd>{html.number(n)}</dd></div>' for kind, name, n in facts)
    places = finding.get("places") or [f"row {row}" for row in finding.get("rows", [])]
    quotes = "".join(
        f"<li><code>{html.bdi(place)}</code><q>{html.bdi(text)}</q></li>"
        for place, text in zip(places, finding.get("examples", []), strict=False)
    )
    places = places[:LISTED]
    rest = places[len(finding.get("examples", [])) :]
    more = f" (the first {len(places)} of {html.number(count)} are listed)" if count > len(places) else ""
    listed = "".join(f"<li><code>{html.bdi(place)}</code></li>" for place in rest)
    matches = finding.get("matches") or []
    return (
        f'<article class="card {severity}" id="finding-{number}"><header><span class="badge"><span aria-hidden="true">{SIGNS[severity]}</span> {severity}'
        f'</span><h3>{html.bdi(finding["check"])}</h3><p class="count">{html.number(count)}</p></header><p class="truth">{html.bdi(finding["truth"], WHOLE)}</p>'
        f'<div class="dealt"><svg class="split" aria-hidden="true" width="100%" height="8">{bar}</svg><dl class="facts">{words}</dl></div>'
        + (f'<p class="note">{html.bdi(finding["note"], WHOLE)}</p>' if finding.get("note") else "")
        + (f'<p class="next"><b>Next</b> {html.bdi(finding["next"], WHOLE)}</p>' if finding.get("next") else "")
        + (f'<p class="more"><a href="#pairs-{number}">Look at {html.many(len(matches), "pair")}</a></p>' if matches else "")
        + (f'<ul class="quotes">{quotes}</ul>' if quotes else "")
        + (
            f'<details><summary>{html.many(len(rest), "more place" if quotes else "place")}{more}</summary><ul class="places">{listed}</ul></details>'
            if rest
            else ""
        )
        + "</article>"
    )


def _similarity(similarity: Mapping[str, Any]) -> str:
    if not similarity.get("histogram"):
        return ""
    gates = {f"{name} ≥ {html.number(value)}": value for name, value in similarity.get("gate", {}).items()}
    common = "".join(
        f"<li>{html.bdi(entry['text'])} <span>{html.many(entry['rows'], 'row')}</span></li>"
        for entry in similarity.get("boilerplate") or []
    )
    note = (
        "every pair of prompts that was compared, by the share of the shorter one's runs of three words that the other has; equal prompts left out"
        + ("; in blue those found to be near-copies" if "near" in similarity["histogram"][0] else "")
    )
    return _histogram("Similarity of prompts", note, similarity["histogram"], "pairs", gates, 190) + (
        f'<details><summary>Common phrases, which count for nothing</summary><ul class="quotes">{common}</ul></details>' if common else ""
    )


def _histogram(title: str, note: str, bins: Sequence[Mapping[str, Any]], key: str, marks: Mapping[str, float], size: float = 120) -> str:
    """Bars of equal width, one per bin, with labelled lines at `marks`; by logarithm where counts differ by more than 100 times.
    A bin's "near" is of its count, and drawn in front.
    """
    counts = [int(bin_[key]) for bin_ in bins]
    top, low = max([1, *counts]), min([n for n in counts if n], default=1)
    log = top > 100 * low
    most = _ceiling(top, log)
    floor, first, wide = 8 + 15 * len(marks) + size, 9.0, 88.0
    across = wide / len(bins)

    def high(n: float) -> float:
        return size * ((math.log10(n) + 0.3) / (math.log10(most) + 0.3) if log and n else n / most)

    body = ""
    for value in [10.0**k for k in range(round(math.log10(most)) + 1)] if log else [0, most / 2, most]:
        y = floor - high(value)
        body += f'<line class="grid" x1="{first}%" x2="{first + wide}%" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += f'<text class="tick" x="{first - 1}%" y="{y + 4:.1f}" text-anchor="end">{html.brief(value)}</text>'
    for i, (bin_, n) in enumerate(zip(bins, counts, strict=True)):
        near = bin_.get("near")
        for kind, of in (("bar", n),) if near is None else (("bar all", n), ("bar", near)):
            tall = max(1.5, high(of)) if of else 0
            body += f'<rect class="{kind}" x="{first + across * (i + 0.06):.3f}%" y="{floor - tall:.1f}" width="{across * 0.88:.3f}%" height="{tall:.1f}">'
            body += (
                f"<title>{html.number(bin_['from'])} to {html.number(bin_['to'])}: {html.number(of)}{' near' * (of is near)} {key}</title></rect>"
                if of
                else "</rect>"
            )
    step = math.ceil(len(bins) / 6)
    for i in range(0, len(bins) + 1, step):
        edge = bins[i]["from"] if i < len(bins) else bins[-1]["to"]
        body += f'<text class="tick" x="{first + across * i:.3f}%" y="{floor + 17:g}" text-anchor="middle">{html.brief(edge)}</text>'
    for i, (label, value) in enumerate(marks.items()):
        at = _place(value, bins)
        x, y, anchor, aside = first + wide * at, 11 + 15 * i, "end" if at > 0.6 else "start", -5 if at > 0.6 else 5
        body += f'<line class="mark" x1="{x:.3f}%" x2="{x:.3f}%" y1="{y - 9:g}" y2="{floor:g}"/>'
        body += f'<text class="marked" x="{x:.3f}%" dx="{aside}" y="{y:g}" text-anchor="{anchor}">{html.label(label, 40)}</text>'
    scale = "; counts on a log scale" if log else ""
    described = f"{title}: histogram of {html.number(sum(counts))} {key}{scale}. {'; '.join(html.label(label, 40) for label in marks)}"
    columns = {"from": "from", "to": "to", key: key, **({"near": "near"} if "near" in bins[0] else {})}
    table = html.table(title, list(columns), [[html.number(bin_[column]) for column in columns] for bin_ in bins])
    return html.figure(title, f"{note}{scale}", html.svg(described, floor + 24, body), table)


def _ceiling(top: int, log: bool) -> float:
    """The top of an axis: a round number not below `top`, whose half is round as well."""
    if log:
        return 10.0 ** math.ceil(math.log10(top))
    unit = 10.0 ** math.floor(math.log10(top))
    return next(unit * factor for factor in (1, 2, 3, 4, 6, 8, 10) if unit * factor >= top and unit * factor % 2 == 0)


def _place(value: float, bins: Sequence[Mapping[str, Any]]) -> float:
    """Where a value stands on an axis of equally wide bins, 0 to 1."""
    for i, bin_ in enumerate(bins):
        if value < bin_["to"]:
            return (i + max(0.0, (value - bin_["from"]) / (bin_["to"] - bin_["from"]))) / len(bins)
    return 1.0


def _pairs(findings: Sequence[Mapping[str, Any]]) -> str:
    """The filter, the pairs as JSON for it, and the first pairs of each finding for readers without JavaScript."""
    held = [(i, finding, finding["matches"]) for i, finding in enumerate(findings) if finding.get("matches")]
    if not held:
        return ""
    data, plain = [], ""
    for i, finding, matches in held:
        shown = [_side_by_side(i, finding["check"], match) for match in matches]
        data += shown
        told = f"the first {PAGE} of {html.number(len(matches))} pairs" if len(matches) > PAGE else html.many(len(matches), "pair")
        articles = "".join(_pair(pair) for pair in shown[:PAGE])
        plain += (
            f'<section id="pairs-{i}"><h3>{html.bdi(finding["check"])}</h3><p class="lead">{told}, best score first</p>{articles}</section>'
        )
    checks = "".join(f'<option value="{i}">{html.text(finding["check"])} ({len(matches)})</option>' for i, finding, matches in held)
    rules = "".join(f'<option value="{escape(rule)}">{escape(rule)}</option>' for rule in dict.fromkeys(pair["rule"] for pair in data))
    raw = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    empty = _pair({"check": "", "rule": "", "part": "", "score": 0, "sides": [{"place": "", "text": ["", "", ""], "cut": 0}] * 2})
    return (
        '<p class="lead">Overlapping rows side by side. The longest run of words that both share is <mark>marked</mark>.</p>'
        f'<div id="filter" role="search" aria-label="Filter pairs" hidden><label>Check<select id="by-check"><option value="">all</option>{checks}</select></label>'
        f'<label>Rule<select id="by-rule"><option value="">all</option>{rules}</select></label>'
        '<label>Score from<input id="by-score" type="number" min="0" max="1" step="0.05" value="0"></label>'
        '<label class="wide">Words<input id="by-text" type="search" placeholder="in texts and places" spellcheck="false"></label></div>'
        '<div id="pager" hidden><output id="hits" aria-live="polite" tabindex="-1"></output><span><button id="back" type="button">Previous</button>'
        '<button id="on" type="button">Next</button></span></div><div id="list"></div>'
        f'<div id="plain">{plain}</div><template id="pair">{empty}</template><script type="application/json" id="pairs-data">{raw}</script>'
    )


def _side_by_side(number: int, check: str, match: Mapping[str, Any]) -> dict[str, Any]:
    """A pair as page.js reads it: nothing in it needs cutting or making visible any more."""
    sides = []
    for place, text, span in (("place", "text", "span"), ("other", "other_text", "other_span")):
        before, inside, after, hidden = cut(match[text], match[span])
        sides.append({"place": html.visible(match[place][: html.SHORT]), "text": [before, inside, after], "cut": hidden})
    words = {name: html.visible(match[name][: html.SHORT]) for name in ("rule", "part")}
    return {"number": number, "check": html.visible(check[: html.SHORT]), "score": match["score"], **words, "sides": sides}


def _pair(pair: Mapping[str, Any]) -> str:
    """One pair. page.js fills an empty one."""
    sides = ""
    for side in pair["sides"]:
        before, inside, after = map(escape, side["text"])
        note = f"{html.many(side['cut'], 'character')} not shown" if side["cut"] else ""
        sides += f'<div class="side"><code><bdi dir="auto">{escape(side["place"])}</bdi></code><p><bdi dir="auto"><span>{before}</span><mark>{inside}</mark><span>{after}</span></bdi></p><small>{note}</small></div>'
    chips = "".join(
        f'<span class="chip {name}"><bdi dir="auto">{escape(str(pair[name]))}</bdi></span>' for name in ("check", "rule", "part")
    )
    return f'<article class="pair"><header><span class="score">{html.number(pair["score"])}</span>{chips}</header><div class="sides">{sides}</div></article>'


def _bars(title: str, note: str, counts: Mapping[str, int], whole: int, unit: str = "rows") -> str:
    """One bar per name, its label above it."""
    most, body = max([1, *counts.values()]), ""
    for i, (name, n) in enumerate(list(counts.items())[:BARS]):
        y = 36 * i
        body += f'<text x="0" y="{y + 15}" class="name">{html.label(name)}<title>{html.text(name)}</title></text>'
        body += f'<text x="100%" y="{y + 15}" class="soft" text-anchor="end">{html.number(n)} · {html.share(n, whole)}</text>'
        body += f'<rect class="track" x="0" y="{y + 21}" width="100%" height="7" rx="2"/><rect class="bar" x="0" y="{y + 21}" width="{100 * n / most:.3f}%" height="7" rx="2"/>'
    more = f"; {len(counts) - BARS} more in the table" if len(counts) > BARS else ""
    label = (
        f"{title}: bars of {len(counts)} names, the largest {html.text(next(iter(counts)))} with {html.number(next(iter(counts.values())))}"
    )
    table = html.table(title, ["", unit, "share"], [(name, html.number(n), html.share(n, whole)) for name, n in counts.items()])
    return html.figure(title, f"{note}{more}", html.svg(label, 36 * min(BARS, len(counts)), body), table)


def _profile(profile: Mapping[str, Any], kept: int) -> str:
    """What the kept rows are like."""
    plots = ""
    spread = (
        f"entropy {html.number(profile['entropy'])} bits, as many as {html.number(profile['effective_categories'])} equally large ones; "
        f"{html.number(profile['singletons'])} with one row"
        if "entropy" in profile else ""
    )  # fmt: skip
    for key, title, note in (
        ("categories", "Categories", spread), ("sources", "Sources", "rows by file"),
        ("scripts", "Scripts", "of the prompt's letters"), ("roles", "Conversations", "who speaks, in turn"),
    ):  # fmt: skip
        plots += _bars(title, note, profile[key], kept) if profile.get(key) else ""
    for part, length in (profile.get("lengths") or {}).items():
        if length.get("histogram"):
            unit = html.text(length.get("unit", "words"), 40)
            marks = {f"{name} {html.number(length[name])}": length[name] for name in ("median", "p95") if name in length}
            plots += _histogram(
                f"Length of the {html.text(part, 40)}",
                f"{unit}; the longest has {html.number(length.get('max', 0))}",
                length["histogram"],
                "rows",
                marks,
            )
    reading = profile.get("readability") or {}
    if reading.get("histogram"):
        hard = f"; {100 * reading['share_hard']:.1f} % of rows are hard to read" if "share_hard" in reading else ""
        marks = {f"{name} {html.number(reading[name])}": reading[name] for name in ("p10", "median", "p90") if name in reading}
        plots += _histogram("Readability", f"Flesch reading ease: 0 hard, 100 easy{hard}", reading["histogram"], "rows", marks)
    diversity = profile.get("diversity") or {}
    for key, title, note in (
        ("top_openings", "Openings", "the first words of prompts, most frequent"),
        ("top_responses", "Repeated responses", "most frequent"),
    ):
        plots += _bars(title, note, diversity[key], kept) if diversity.get(key) else ""
    figures = "".join(
        f"<div><dt>{html.text(name.replace('_', ' '))}</dt><dd>{html.number(value)}</dd></div>"
        for name, value in diversity.items() if isinstance(value, int | float)
    )  # fmt: skip
    plots += (
        f'<figure><figcaption><b>Diversity</b> <span>figures of the kept rows</span></figcaption><dl class="figures">{figures}</dl></figure>'
        if figures
        else ""
    )
    return f'<div class="plots">{plots}</div>' if plots else ""


def _changes(changes: Mapping[str, Any]) -> str:
    """What is new since the previous version: rows, then findings."""
    rows, examples, findings = changes["rows"], changes.get("examples") or {}, changes.get("findings") or {}
    signs = {"added": "+", "removed": "−", "changed": "±", "unchanged": "="}
    tiles = "".join(
        f'<div class="{kind}"><dt>{kind}</dt><dd><b>{sign} {html.number(rows.get(kind, 0))}</b> <span>rows</span></dd></div>'
        for kind, sign in signs.items()
    )
    told = "".join(
        f'<li class="{kind}"><b>{kind}</b> {html.bdi(entry["check"])} <span>{figures(entry)}</span></li>'
        for kind, figures in (
            ("new", lambda e: html.number(e["count"])), ("gone", lambda e: f"was {html.number(e['count'])}"),
            ("changed", lambda e: f"{html.number(e['before'])} → {html.number(e['after'])}"),
        )
        for entry in findings.get(kind, [])
    )  # fmt: skip
    shown = ""
    for kind in ("added", "removed", "changed"):
        entries = examples.get(kind, [])
        if entries:
            listed = "".join(
                f'<li><code>{html.bdi(entry["place"])}</code><div class="sides">{_edit(kind, entry)}</div></li>' for entry in entries
            )
            shown += f'<details{" open" if kind == "changed" else ""}><summary>{len(entries)} of {html.many(rows.get(kind, 0), "row")} {kind}</summary><ul class="edits">{listed}</ul></details>'
    return (
        f'<p class="lead">Since <code>{html.bdi(changes["previous"])}</code></p><dl class="tiles small">{tiles}</dl>'
        + (f'<h3>Findings</h3><ul class="deltas">{told}</ul>' if told else "")
        + (f"<h3>Rows</h3>{shown}" if shown else "")
    )


def _edit(kind: str, entry: Mapping[str, Any]) -> str:
    """The text of a row that came or went, or both texts of one that changed, what differs marked."""
    if kind != "changed":
        return f'<p class="text"><bdi dir="auto">{html.text(entry["text"], WHOLE)}</bdi></p>'
    before, after = entry["before"], entry["after"]
    same = _alike(before, after)
    start = same if same - before.rfind(" ", 0, same) > 30 else before.rfind(" ", 0, same) + 1  # whole words, where there are any
    last = _alike(before[same:][::-1], after[same:][::-1])
    step = before.find(" ", len(before) - last) - (len(before) - last) if last else 0
    last -= step if 0 <= step <= 30 else 0
    texts = ""
    for tag, text in (("del", before), ("ins", after)):
        first, inside, rest, hidden = cut(text, (start, len(text) - last), 2 * AROUND, AROUND // 2)
        note = f"{html.many(hidden, 'character')} not shown" if hidden else ""
        texts += f'<div><p class="text"><bdi dir="auto">{escape(first)}<{tag}>{escape(inside)}</{tag}>{escape(rest)}</bdi></p><small>{note}</small></div>'
    return texts


def _alike(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
