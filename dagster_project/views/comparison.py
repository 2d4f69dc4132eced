"""The comparison -> one HTML page (markup.py): advice first, then the board, what it costs, what was kept, and the answers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dagster_project.core.context import Documents, measured
from dagster_project.core.records import write_text
from dagster_project.core.text import NAMES, TITLES
from dagster_project.views import html

HIGH = 220
"""Pixels of a plot."""
MOST = 200
"""Questions shown."""
ANSWER = 1_200
"""Characters of a text; the rest is cut."""

Measured = Mapping[str, Mapping[str, float]]
"""Variant -> what its training took on this machine, by name."""


@dataclass(frozen=True)
class Sample:
    """One test example and what every system answered."""

    prompt: str
    reference: str
    category: str | None
    answers: Mapping[str, tuple[str, float]]
    """System -> its answer, and that answer's score from 0 to 1."""


def draw(documents: Documents) -> None:
    """data/pages/comparison/comparison.html: advice, scores, costs, what was kept, and the answers side by side."""
    document, view = documents.read(documents.out / "comparison.json"), documents.read(documents.pages / "samples.json")
    if document is None or view is None:
        return
    samples = [Sample(**sample) for sample in view["samples"]]
    took = {variant: measured(documents.root, f"{stage}@{variant}") for variant, stage in view["trained"].items()}
    write_text(documents.pages / "comparison.html", page({**document, "headline": view["headline"]}, samples, took))


def page(document: Mapping[str, Any], samples: Sequence[Sample], took: Measured) -> str:
    """Args:
    document: of comparison.json, with its `headline`.
    samples: in any order.
    took: time and memory of each variant's training.
    """
    order = _order(document)
    sections = {
        "Board": _board(document, order, took),
        "Cost": _cost(document, order),
        "Retention": _retention(document["compared"], order),
        "Measures": _measures(document["scores"], order),
        "Labels": _labels(document["scores"], order),
        "Answers": _answers(document, order, samples),
    }
    script = resources.files(__package__).joinpath("comparison.js").read_text("utf-8")
    return html.page("Was tuning worth it?", _head(document), sections, "Made by <b>pedigree run comparison</b>.", script)


def _order(document: Mapping[str, Any]) -> list[str]:
    """The systems, best first; their place here is their number on the page."""
    scores, compared, first = document["scores"], document["compared"], document["shown"][0]
    likely = {name: found["perplexity_to_base"]["ratio"] for name, found in compared.items() if "perplexity_to_base" in found}
    return sorted(scores, key=lambda name: -scores[name][first]) if scores else sorted(likely, key=likely.__getitem__)


def _head(document: Mapping[str, Any]) -> str:
    found, test = document["recommended"], document["test"]
    kind = "good" if found["sure"] else "warn"
    verdict = html.bdi(document["headline"])
    words = "".join(f'<li class="note">{html.text(line, ANSWER)}</li>' for line in document["advice"] if line != found["why"])
    seen = "none of them seen in training" if not test["seen"] else f"{html.number(test['seen'])} of them seen in training"
    return (
        f'<header class="head"><p class="over">Comparison · {html.many(test["examples"], "test example")}, {seen}</p>'
        f'<h1>Was tuning worth it?</h1><p class="verdict {kind}"><span class="sign" aria-hidden="true">{"✓" if found["sure"] else "!"}</span>'
        f"<span><strong>{verdict}</strong> {html.text(found['why'], ANSWER)}</span></p><ul>{words}</ul></header>"
    )


def _board(document: Mapping[str, Any], order: Sequence[str], measured: Measured) -> str:
    """A bar for each system: its interval, and where in it the score lies. Then all there is to weigh, as a table."""
    if not order:
        return ""
    points = {name: _point(document, name) for name in order}
    most = max(1.0, *(high for _, _, high in points.values()))
    title = f"{TITLES[document['shown'][0]]} on {html.many(document['test']['answered'], 'question')}"
    note = "point and 95 % interval; variants in blue; in grey the base model with different prompts, and a classical classifier"
    if not document["scores"]:
        title, note = "Perplexity as a share of the base model's", "point and 95 % interval; less is better"
    body = ""
    for i, name in enumerate(order):
        y, kind, (value, low, high) = 38 * i, _kind(document, name), points[name]
        chosen = " · recommended" if document["recommended"]["sure"] and name == document["recommended"]["variant"] else ""
        chosen += " · failed checks" if document["compared"].get(name, {}).get("failed_checks") else ""
        body += f'<text x="0" y="{y + 15}" class="name">{i + 1} {html.label(_short(name), 36)}<tspan class="soft">{chosen}</tspan></text>'
        body += f'<text x="100%" y="{y + 15}" class="soft" text-anchor="end">{value:.3f}</text>'
        body += f'<rect class="track" x="0" y="{y + 23}" width="100%" height="7" rx="2"/>'
        body += f'<rect class="{kind} faint" x="{100 * low / most:.3f}%" y="{y + 23}" width="{100 * (high - low) / most:.3f}%" height="7"/>'
        body += f'<rect class="{kind}" x="{100 * value / most:.3f}%" y="{y + 20}" width="4" height="13" rx="2" transform="translate(-2)">'
        body += f"<title>{html.text(_title(name))}: {value:.3f}, {low:.3f} to {high:.3f}</title></rect>"
    label = f"{title}: " + "; ".join(f"{html.text(_title(name))} {points[name][0]:.3f}" for name in order)
    columns, rows = _rows(document, order, measured)
    return html.figure(
        title,
        note,
        html.svg(label, 38 * len(order), body),
        f'<div class="scroll" tabindex="0" role="region" aria-label="Board">{html.table("All there is to weigh", columns, rows, unfolded=True)}</div>',
    )


def _rows(document: Mapping[str, Any], order: Sequence[str], measured: Measured) -> tuple[list[str], list[list[str]]]:
    """The columns of the board that any system has something in, and a row for each system."""
    first, second = document["shown"]

    def cells(name: str) -> dict[str, str]:
        scores, costs = document["scores"].get(name, {}), document["costs"].get(name, {})
        took, kept = measured.get(name, {}), document["compared"].get(name, {}).get("retention", {}).get("overall", {})
        value, low, high = _point(document, name)
        return {
            TITLES[first] if scores else "perplexity": f"{value:.3f}",
            "95 % interval": f"{low:.3f} to {high:.3f}",
            "failed checks": _if(document["compared"].get(name, {}), "failed_checks", lambda failed: str(len(failed))),
            **({TITLES[second]: f"{scores[second]:.3f}"} if scores else {}),
            "prompt tokens": _if(costs, "prompt_tokens", lambda n: f"{n:,.0f}"),
            "on disk": _if(costs, "bytes", lambda n: f"{n / 1e6:,.0f} MB"),
            "trained with": _if(costs, "tokens", lambda n: f"{n:,} tokens"),
            "training": _if(took, "training_seconds", lambda n: f"{n:,.0f} s"),
            "peak memory": _if(took, "peak_memory_bytes", lambda n: f"{n / 1e6:,.0f} MB"),
            "benchmarks": _if(kept, "accuracy", lambda found: f"{found['tuned']:.3f} ({100 * found['difference']:+.1f} points)"),
        }

    table = {name: cells(name) for name in order}
    columns = [column for column in table[order[0]] if any(row[column] for row in table.values())]
    return ["", *columns], [[f"{i} {_title(name)}", *(table[name][c] for c in columns)] for i, name in enumerate(order, 1)]


def _if(found: Mapping[str, Any], key: str, words: Any) -> str:
    return words(found[key]) if key in found else ""


def _cost(document: Mapping[str, Any], order: Sequence[str]) -> str:
    """Score against what each answer costs and, between variants, against what each training cost."""
    costs = document["costs"]
    asked = _scatter(
        document,
        order,
        "prompt_tokens",
        "Score by tokens of the prompt",
        "what each answer costs; up and to the left is better and cheaper",
    )
    several = sum("tokens" in costs.get(name, {}) for name in order) > 1
    trained = _scatter(document, order, "tokens", "Score by tokens of training", "what each variant cost once") if several else ""
    return f'<div class="{"plots" if trained else ""}">{asked}{trained}</div>' if asked or trained else ""


def _scatter(document: Mapping[str, Any], order: Sequence[str], what: str, title: str, note: str) -> str:
    """Points over a logarithmic axis, with their intervals, numbered as on the board. What has no such cost is a line across."""
    costs = document["costs"]
    placed = [name for name in order if costs.get(name, {}).get(what)]
    if not document["scores"] or not placed:
        return ""
    free = [name for name in order if not costs.get(name)]
    least, most = (math.log(edge(costs[name][what] for name in placed)) for edge in (min, max))
    least, most = (least, most) if most > least else (least - 0.5, most + 0.5)
    top = max(1.0, *(_point(document, name)[2] for name in order))

    def x(value: float) -> float:
        return 14 + 80 * (math.log(value) - least) / (most - least)

    def y(value: float) -> float:
        return 24 + HIGH * (top - value) / top

    body = ""
    for value in (0, top / 4, top / 2, 3 * top / 4, top):
        body += f'<line class="grid" x1="10%" x2="100%" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        body += f'<text class="tick" x="9%" y="{y(value) + 4:.1f}" text-anchor="end">{html.brief(value)}</text>'
    for value in sorted({least, (least + most) / 2, most}):
        at = x(math.exp(value))
        body += f'<text class="tick" x="{at:.2f}%" y="{y(0) + 18:.1f}" text-anchor="middle">{html.number(round(math.exp(value)))}</text>'
    body += f'<text class="tick" x="54%" y="{y(0) + 36:.1f}" text-anchor="middle">{what.replace("_", " ")}, log scale</text>'
    for name in free:
        at = y(_point(document, name)[0])
        words = f"{order.index(name) + 1} {html.label(_short(name), 36)}"
        body += f'<line class="mark" x1="10%" x2="100%" y1="{at:.1f}" y2="{at:.1f}"/>'
        body += f'<text class="marked" x="100%" y="{at - 5:.1f}" text-anchor="end">{words}</text>'
    taken: list[tuple[float, float]] = []
    for name in sorted(placed, key=lambda name: costs[name][what]):
        (value, low, high), across, kind = _point(document, name), x(costs[name][what]), _kind(document, name)
        while any(abs(across - other) < 5 and abs(y(value) - place) < 19 for other, place in taken):
            across += 1  # what would hide another stands beside it
        taken.append((across, y(value)))
        body += f'<line class="{kind} whisker" x1="{across:.2f}%" x2="{across:.2f}%" y1="{y(low):.1f}" y2="{y(high):.1f}"/>'
        body += f'<circle class="{kind} spot" cx="{across:.2f}%" cy="{y(value):.1f}" r="9"><title>{html.text(_title(name))}: {value:.3f}</title></circle>'
        body += f'<text class="tick name" x="{across:.2f}%" y="{y(value) + 4:.1f}" text-anchor="middle">{order.index(name) + 1}</text>'
    rows = [(_title(name), f"{costs[name][what]:,}", f"{_point(document, name)[0]:.3f}") for name in placed]
    label = f"{title}: " + "; ".join(f"{html.text(name)} {value} at {cost}" for name, cost, value in rows)
    key = "".join(f"<li>{order.index(name) + 1} {html.bdi(_title(name))}</li>" for name in order if name in placed)
    return html.figure(
        title,
        note,
        html.svg(label, y(0) + 42, body),
        f'<ul class="places sum">{key}</ul>' + html.table(title, ["", what.replace("_", " "), "score"], rows),
    )


def _retention(compared: Mapping[str, Any], order: Sequence[str]) -> str:
    """A figure for each variant: how its accuracy on the benchmarks changed, overall and by subject."""
    figures = [_change(name, compared[name]["retention"]) for name in order if compared.get(name, {}).get("retention")]
    return f'<div class="{"plots" if len(figures) > 1 else ""}">{"".join(figures)}</div>' if figures else ""


def _change(variant: str, retention: Mapping[str, Any]) -> str:
    """A bar for each subject, around the line of no change: its interval, and where in it the change lies."""
    rows, body = [], ""
    widest = max(0.05, *(abs(edge) for found in retention.values() for edge in found["accuracy"]["interval"]))
    for i, (subject, found) in enumerate(retention.items()):
        y, accuracy, nats = 38 * i, found["accuracy"], found["gold_log_likelihood"]
        change, low, high = (50 + 50 * value / widest for value in (accuracy["difference"], *accuracy["interval"]))
        body += f'<text x="0" y="{y + 15}" class="name">{html.label(subject)}<tspan class="soft"> · {found["questions"]}</tspan></text>'
        body += f'<text x="100%" y="{y + 15}" class="soft" text-anchor="end">{100 * accuracy["difference"]:+.1f} points</text>'
        body += f'<rect class="track" x="0" y="{y + 23}" width="100%" height="7" rx="2"/>'
        body += f'<rect class="bar faint" x="{low:.3f}%" y="{y + 23}" width="{high - low:.3f}%" height="7"/>'
        body += f'<rect class="bar" x="{change:.3f}%" y="{y + 20}" width="4" height="13" rx="2" transform="translate(-2)"/>'
        intervals = ["{:+.3f} to {:+.3f}".format(*interval) for interval in (accuracy["interval"], nats["interval"])]
        before, after = f"{accuracy['base']:.3f}", f"{accuracy['tuned']:.3f}"
        rows.append((subject, found["questions"], before, after, intervals[0], f"{nats['difference']:+.3f}", intervals[1]))
    body += f'<line class="mark" x1="50%" x2="50%" y1="19" y2="{38 * len(retention) - 3}"/>'
    columns = ["", "questions", "base", "tuned", "95 % interval of the change", "nats for the right answer", "95 % interval"]
    title = f"Change of accuracy of {variant}"
    return html.figure(
        html.text(title),
        "on the benchmarks, against the base model; the line is no change, and the bar the 95 % interval",
        html.svg(f"{html.text(title)}: {100 * retention['overall']['accuracy']['difference']:+.1f} points", 38 * len(retention), body),
        f'<div class="scroll" tabindex="0" role="region" aria-label="Retention">{html.table(html.text(title), columns, rows)}</div>',
    )


def _measures(scores: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> str:
    """Every measure of every system, each with its interval."""
    if not scores:
        return ""
    names = list(dict.fromkeys(key for name in order for key in scores[name] if f"{key}_interval" in scores[name]))

    def cell(found: Mapping[str, Any], key: str) -> str:
        if key not in found:
            return ""
        low, high = found[f"{key}_interval"]
        return f"{found[key]:.3f} ({low:.3f} to {high:.3f})"

    rows = [[_title(name), *(cell(scores[name], key) for key in names)] for name in order]
    table = html.table(
        "Every measure, with its 95 % interval", ["", *(html.text(TITLES.get(key, key)) for key in names)], rows, unfolded=True
    )
    return f'<figure><div class="scroll" tabindex="0" role="region" aria-label="Measures">{table}</div></figure>'


def _labels(scores: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> str:
    """F1 of every label by every system; only a label task has these."""
    tables = [scores[name]["by_label"] for name in order if "by_label" in scores.get(name, {})]
    if not tables:
        return ""
    rows = [[label, figures["n"], *(f"{table[label]['f1']:.3f}" for table in tables)] for label, figures in tables[0].items()]
    table = html.table("F1 of each label", ["", "test examples", *map(_title, order)], rows, unfolded=True)
    return f'<figure><div class="scroll" tabindex="0" role="region" aria-label="Labels">{table}</div></figure>'


def _answers(document: Mapping[str, Any], order: Sequence[str], samples: Sequence[Sample]) -> str:
    """Questions side by side, the worst errors of the variant in question first: what it got wrong and most others got right."""
    if not samples:
        return ""
    variants = [name for name in order if name in document["compared"]]
    subject = document["recommended"]["variant"] if document["recommended"]["variant"] in order else (variants or order)[0]

    def badness(sample: Sample) -> tuple[float, float]:
        others = [value for name, (_, value) in sample.answers.items() if name != subject]
        return sample.answers[subject][1], -sum(others)

    worst = sorted(samples, key=badness)[:MOST]
    categories = sorted({sample.category for sample in worst if sample.category})
    options = "".join(f'<option value="{i}">{html.text(_title(name))}</option>' for i, name in enumerate(order))
    kinds = "".join(f'<option value="{i}">{html.text(name)}</option>' for i, name in enumerate(categories))
    shown = "".join(_sample(sample, order, categories) for sample in worst)
    more = f" The worst {MOST} of {html.number(len(samples))} are shown." if len(samples) > MOST else ""
    return (
        f'<p class="lead">Worst errors first: what {html.bdi(_title(subject))} got wrong and others got right.{more}</p>'
        '<div id="filter" role="search" aria-label="Filter answers" hidden>'
        f'<label>Wrong<select id="by-wrong"><option value="">any</option>{options}</select></label>'
        f'<label>Right<select id="by-right"><option value="">any</option>{options}</select></label>'
        f'<label>Category<select id="by-category"><option value="">all</option>{kinds}</select></label>'
        '<label>Words<input id="by-text" type="search" placeholder="in questions and answers" spellcheck="false"></label></div>'
        '<div id="pager" hidden><output id="hits" aria-live="polite" tabindex="-1"></output></div>'
        f'<div id="samples">{shown}</div><p class="more"><button id="more" type="button" hidden>Show more</button></p>'
    )


def _sample(sample: Sample, order: Sequence[str], categories: Sequence[str]) -> str:
    """One question. A score below 1/2 counts as wrong."""
    wrong = [i for i, name in enumerate(order) if sample.answers[name][1] < 0.5]
    place = categories.index(sample.category) if sample.category else ""
    chip = f'<span class="chip">{html.bdi(sample.category)}</span>' if sample.category else ""
    lines = ""
    for i, name in enumerate(order):
        answer, value = sample.answers[name]
        mark = ("✕ wrong" if i in wrong else "✓ right") if value in {0, 1} else f"{value:.2f}"
        kind = "bad" if i in wrong else "fine"
        lines += f'<li><span>{html.bdi(_short(name))} <small class="{kind}">{mark}</small></span><q>{html.bdi(answer, ANSWER)}</q></li>'
    return (
        f'<article class="pair" data-wrong="{" ".join(map(str, wrong))}" data-category="{place}"><header>{chip}</header>'
        f'<p class="text"><bdi dir="auto">{html.text(sample.prompt, ANSWER)}</bdi></p>'
        f'<ul class="quotes"><li><b>reference</b><q>{html.bdi(sample.reference, ANSWER)}</q></li>{lines}</ul></article>'
    )


def _point(document: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """A system's score and the ends of its interval, by what decides."""
    if document["scores"]:
        first, found = document["shown"][0], document["scores"][name]
        return found[first], *found[f"{first}_interval"]
    found = document["compared"][name]["perplexity_to_base"]
    return found["ratio"], *found["interval"]


def _title(name: str) -> str:
    return NAMES.get(name, name)


def _short(name: str) -> str:
    return _title(name).removeprefix("base model, ")


def _kind(document: Mapping[str, Any], name: str) -> str:
    """The class of a system's marks: variants in colour, what they are compared with in grey."""
    return "bar" if name in document["compared"] else "bar all"
