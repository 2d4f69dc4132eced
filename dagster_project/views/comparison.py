"""The comparison -> one HTML page: advice, comparison table, costs, retention, and answers side by side."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagster_project.core.context import Documents, measured
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.layout import report_of
from dagster_project.core.messages import Message, is_plain
from dagster_project.core.records import iter_records, write_text
from dagster_project.core.text import NAMES, TITLES, many, number, visible
from dagster_project.views.conversations import conversation, parts
from dagster_project.views.html import Figure, Plot, Shape, Table, brief, cut, label, render, shape

PLOT_HEIGHT = 220
"""Pixels of a plot."""
PLOT_LEFT = 10
"""Percent of the width of a plot in which its axis is written."""
SPOT = 22
"""Pixels that a point takes in a plot, with the gap to the next one."""
WIDTHS = (300.0, 700.0)
"""Pixels that a plot is wide on a phone and on a screen."""
MAX_QUESTIONS = 200
"""Questions shown on the page."""
MAX_CHARACTERS = 1_200
"""Characters shown of a text."""
MAX_COMMAND = 4_000
"""Characters of the texts in a command that asks why."""
WHY = "data/pages/why"
"""Folder of the pages that `pedigree why` writes for the commands on this page."""
NOT_ASKED = frozenset(
    {"prefix_tuning", "prompt_tuning", "p_tuning", "cartridge", "adaption_prompt", "feature_extraction"}
)
"""Methods whose answers `pedigree why` refuses to attribute, `REFUSED` in lineage/attribution/gradients.py."""

Measured = Mapping[str, Mapping[str, float]]
"""Variant -> measurements of its training on this machine, by name."""


@dataclass(frozen=True)
class Sample:
    """One test example and the answers of all systems."""

    prompt: str
    reference: str
    category: str | None
    answers: Mapping[str, tuple[str, float]]
    """System -> its answer, and the score of the answer from 0 to 1."""
    conversation: Mapping[str, Any] | None = None
    """`messages` before the answer, and `tools`, where there is more than text."""
    reference_message: Message | None = None
    """The reference, where it has a trace or calls."""
    messages: Mapping[str, Message] = field(default_factory=dict)
    """System -> its answer, where that has a trace or calls."""


def draw_comparison(documents: Documents) -> None:
    """Write data/pages/comparison/comparison.html."""
    document, view = documents.read(documents.out / "comparison.json"), documents.read(documents.pages / "samples.json")
    if document is None or view is None:
        return
    samples = [Sample(**sample) for sample in view["samples"]]
    measurements = {variant: _measured(documents, f"{stage}@{variant}") for variant, stage in view["trained"].items()}
    write_text(
        documents.pages / "comparison.html",
        comparison_page({**document, "headline": view["headline"]}, samples, measurements, _why(documents, view)),
    )


def _measured(documents: Documents, address: str) -> dict[str, float]:
    """Seconds and peak memory of all trainings whose tokens `comparison` adds up for a variant; nothing if those of
    one are unknown."""
    found = [measured(documents.root, one) for one in _trainings(documents, address)]
    return {
        name: together(one[name] for one in found)
        for name, together in (("training_seconds", sum), ("peak_memory_bytes", max))
        if all(name in one for one in found)
    }


def _trainings(documents: Documents, address: str) -> list[str]:
    """The training of a variant and those that it started from: the SFT variant's, or those of merged adapters."""
    try:
        report = documents.read(documents.root / report_of(address)) or {}
    except InputError:  # its time and memory are unknown, too
        return [address]
    if address.startswith("aligned@"):
        return [*(_trainings(documents, f"adapter@{report['adapter']}") if "adapter" in report else []), address]
    parents = report.get("merge_of") or ()
    found = [one for parent in parents for one in _trainings(documents, f"adapter@{parent}")]
    return [*dict.fromkeys(found)] or [address]  # two of the merged adapters may be merged of the same one


@dataclass(frozen=True)
class Why:
    """What `pedigree why` can be asked, and the pages that it has written."""

    models: Mapping[str, str] = field(default_factory=dict)
    """Variant that can be asked -> hash of its model."""
    systems: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(prompt, reference) of a test question of one turn -> its system prompt; empty if it has none."""
    pages: frozenset[str] = frozenset()

    def of(self, sample: Sample, name: str) -> dict[str, str] | None:
        """The command that asks why a system gave its answer, and its page if there is one.

        None for what a command line cannot ask.
        """
        answer, system = sample.answers[name][0], self.systems.get((sample.prompt, sample.reference))
        if name not in self.models or name in sample.messages or system is None or not answer.strip():
            return None
        text = f"{system}{sample.prompt}{answer}"
        if len(text) > MAX_COMMAND or visible(text) != text:
            return None
        asked = [
            f"merged@{name}",
            *_option("system", system),
            *_option("prompt", sample.prompt),
            *_option("answer", answer),
        ]
        page = f"{sha256_of_text(json.dumps([self.models[name], *asked]))[:12]}.html"
        command = shlex.join(["pedigree", "why", *asked, "--index", "--html", f"{WHY}/{page}"])
        return {"command": command, "page": f"../why/{page}" if page in self.pages else ""}


def _option(name: str, value: str) -> list[str]:
    """An option of a command line. A value that begins with a dash would be read as an option itself."""
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def _why(documents: Documents, view: Mapping[str, Any]) -> Why:
    """What can be asked: supervised variants that were trained here, and
    questions of the test split with one turn and without tools."""
    models = {}
    for variant in (name for name, stage in view["trained"].items() if stage == "adapter"):
        training = documents.read(documents.root / "data" / "adapter" / variant / "training.json")
        report = documents.read(documents.root / report_of(f"merged@{variant}"))
        method = (documents.read(documents.root / "data" / "adapter" / variant / "method.json") or {}).get("method")
        if training and report and method not in NOT_ASKED and not training.keys() & {"command", "merge_of"}:
            models[variant] = report.get("output_sha256", "")
    systems: dict[tuple[str, str], set[str]] = {}
    for record in iter_records(documents.root / "data" / "splits" / "test") if models else ():
        *prompt, response = record["messages"]
        has_one_turn = [one["role"] for one in prompt] in (["user"], ["system", "user"])
        if has_one_turn and is_plain(prompt) and not record.get("tools"):
            system = prompt[0]["content"] if len(prompt) == 2 else ""
            systems.setdefault((prompt[-1]["content"], response["content"]), set()).add(system)
    only = {asked: found.pop() for asked, found in systems.items() if len(found) == 1}
    return Why(models, only, frozenset(path.name for path in (documents.root / WHY).glob("*.html")))


def comparison_page(
    document: Mapping[str, Any], samples: Sequence[Sample], measurements: Measured, why: Why | None = None
) -> str:
    """The page of a comparison.

    Args:
        document: of comparison.json, with its `headline`.
        samples: in any order.
        measurements: time and memory of each variant's training.
        why: what can be asked about wrong answers.
    """
    order = _order(document)
    sections = {
        "Comparison": _comparison_table(document, order, measurements) if order else None,
        "Cost": _cost(document, order),
        "Retention": [
            _change(name, found) for name in order if (found := document["compared"].get(name, {}).get("retention"))
        ],
        "Measures": _measures(document["scores"], order) if document["scores"] else None,
        "Labels": _labels(document["scores"], order),
        "Answers": _answers(document, order, samples, why or Why()) if samples else None,
    }
    found, test = document["recommended"], document["test"]
    seen = "none of them seen in training" if not test["seen"] else f"{number(test['seen'])} of them seen in training"
    return render(
        "comparison.jinja",
        "Was tuning worth it?",
        sections,
        "comparison.js",
        document=document,
        limit=MAX_CHARACTERS,
        tested=f"{many(test['examples'], 'test example')}, {seen}{_scored(document)}",
        advice=[line for line in document["advice"] if line != found["why"]],
    )


def _scored(document: Mapping[str, Any]) -> str:
    """How many test examples have scores, if not all do: those whose reference does not fit the task have none."""
    test = document["test"]
    if not document["scores"] or test["answered"] >= test["examples"]:
        return ""
    return f"; {number(test['answered'])} of them scored"


def _order(document: Mapping[str, Any]) -> list[str]:
    """The systems, best first. Their position is their number on the page."""
    scores, compared, first = document["scores"], document["compared"], document["shown"][0]
    likely = {
        name: found["perplexity_to_base"]["ratio"] for name, found in compared.items() if "perplexity_to_base" in found
    }
    return sorted(scores, key=lambda name: -scores[name][first]) if scores else sorted(likely, key=likely.__getitem__)


def _comparison_table(document: Mapping[str, Any], order: Sequence[str], measurements: Measured) -> Figure:
    """Score and interval of each system as bars, and the comparison table."""
    points = {name: _point(document, name) for name in order}
    most = max(1.0, *(high for _, _, high in points.values()))
    if document["scores"]:
        questions = document["test"].get("questions", document["scores"][order[0]]["n"])
        title = f"{TITLES[document['shown'][0]]} on {many(questions, 'question')}"
        gray = "base model with different prompts"
        gray += ", and classical classifier," if "tfidf_logistic" in order else ""
        note = f"point and 95 % interval; variants in blue; {gray} in gray"
    else:
        title, note = "Perplexity relative to the base model", "point and 95 % interval; lower is better"
    body = []
    for i, name in enumerate(order):
        y, kind, (value, low, high) = 38 * i, _kind(document, name), points[name]
        chosen = (
            " · recommended" if document["recommended"]["sure"] and name == document["recommended"]["variant"] else ""
        )
        chosen += " · failed checks" if document["compared"].get(name, {}).get("failed_checks") else ""
        words = f"{cut(_title(name))}: {value:.3f}, {low:.3f} to {high:.3f}"
        numbered = f"{i + 1} {label(_short(name), 36)}"
        body += [
            shape("text", numbered, shape("tspan", chosen, class_="soft"), x="0", y=y + 15, class_="name"),
            shape("text", f"{value:.3f}", x="100%", y=y + 15, class_="soft", text_anchor="end"),
            *_interval(y, kind, value / most, low / most, high / most, shape("title", words)),
        ]
    words = f"{title}: " + "; ".join(f"{cut(_title(name))} {points[name][0]:.3f}" for name in order)
    columns, rows = _rows(document, order, measurements)
    table = Table("Comparison table", columns, rows, folded=False, region="Comparison table")
    return Figure(title, note, Plot(words, 38 * len(order), body), table)


def _interval(y: int, kind: str, value: float, low: float, high: float, *title: Shape) -> list[Shape]:
    """The bar of an interval and a mark at its point, on a track from 0 to 1."""
    place = {
        "x": f"{100 * value:.3f}%",
        "y": y + 20,
        "width": "4",
        "height": "13",
        "rx": "2",
        "transform": "translate(-2)",
    }
    return [
        shape("rect", class_="track", x="0", y=y + 23, width="100%", height="7", rx="2"),
        shape(
            "rect",
            class_=f"{kind} faint",
            x=f"{100 * low:.3f}%",
            y=y + 23,
            width=f"{100 * (high - low):.3f}%",
            height="7",
        ),
        shape("rect", *title, class_=kind, **place),
    ]


def _rows(
    document: Mapping[str, Any], order: Sequence[str], measurements: Measured
) -> tuple[list[str], list[list[str]]]:
    """The columns of the comparison table that are not empty, and a row for each system."""
    first, second = document["shown"]

    def cells(name: str) -> dict[str, str]:
        scores, costs = document["scores"].get(name, {}), document["costs"].get(name, {})
        measured = measurements.get(name, {})
        retained = document["compared"].get(name, {}).get("retention", {}).get("overall", {})
        value, low, high = _point(document, name)
        return {
            TITLES[first] if scores else "perplexity": f"{value:.3f}",
            "95 % interval": f"{low:.3f} to {high:.3f}",
            "failed checks": _text_if_present(
                document["compared"].get(name, {}), "failed_checks", lambda failed: str(len(failed))
            ),
            **({TITLES[second]: f"{scores[second]:.3f}"} if scores else {}),
            "prompt tokens": _text_if_present(costs, "prompt_tokens", lambda n: f"{n:,.0f}"),
            "on disk": _text_if_present(costs, "bytes", lambda n: f"{n / 1e6:,.0f} MB"),
            "trained on": _text_if_present(costs, "tokens", lambda n: f"{n:,} tokens"),
            "training": _text_if_present(measured, "training_seconds", lambda n: f"{n:,.0f} s"),
            "peak memory": _text_if_present(measured, "peak_memory_bytes", lambda n: f"{n / 1e6:,.0f} MB"),
            "benchmarks": _text_if_present(
                retained, "accuracy", lambda found: f"{found['tuned']:.3f} ({100 * found['difference']:+.1f} points)"
            ),
        }

    table = {name: cells(name) for name in order}
    columns = [column for column in table[order[0]] if any(row[column] for row in table.values())]
    return ["", *columns], [
        [f"{i} {_title(name)}", *(table[name][c] for c in columns)] for i, name in enumerate(order, 1)
    ]


def _text_if_present(values: Mapping[str, Any], key: str, text: Any) -> str:
    return text(values[key]) if key in values else ""


def _cost(document: Mapping[str, Any], order: Sequence[str]) -> list[dict[str, Any]]:
    """Score against the cost of an answer and, for variants, against the cost of training."""
    costs = document["costs"]
    note = "cost of an answer; better and cheaper systems are at the top left"
    plots = [_scatter(document, order, "prompt_tokens", "Score by prompt tokens", note)]
    if sum("tokens" in costs.get(name, {}) for name in order) > 1:
        plots.append(_scatter(document, order, "tokens", "Score by training tokens", "one-time cost of each variant"))
    return [plot for plot in plots if plot]


def _scatter(
    document: Mapping[str, Any], order: Sequence[str], what: str, title: str, note: str
) -> dict[str, Any] | None:
    """Points and intervals over a logarithmic axis, numbered as in the comparison table.

    Systems without costs are horizontal lines.
    """
    costs = document["costs"]
    placed = [name for name in order if costs.get(name, {}).get(what)]
    if not document["scores"] or not placed:
        return None
    points = {name: _point(document, name) for name in order}
    least, most = (math.log(edge(costs[name][what] for name in placed)) for edge in (min, max))
    least, most = (least, most) if most > least else (least - 0.5, most + 0.5)
    top = max(1.0, *(high for _, _, high in points.values()))

    def x(value: float) -> float:
        return 14 + 80 * (math.log(value) - least) / (most - least)

    def y(value: float) -> float:
        return 24 + PLOT_HEIGHT * (top - value) / top

    body = []
    for value in (0, top / 4, top / 2, 3 * top / 4, top):
        body.append(
            shape("line", class_="grid", x1=f"{PLOT_LEFT}%", x2="100%", y1=f"{y(value):.1f}", y2=f"{y(value):.1f}")
        )
        body.append(shape("text", brief(value), class_="tick", x="9%", y=f"{y(value) + 4:.1f}", text_anchor="end"))
    for value in sorted({least, (least + most) / 2, most}):
        tick, at = number(round(math.exp(value))), f"{x(math.exp(value)):.2f}%"
        body.append(shape("text", tick, class_="tick", x=at, y=f"{y(0) + 18:.1f}", text_anchor="middle"))
    unit = what.replace("_", " ")
    body.append(shape("text", f"{unit}, log scale", class_="tick", x="54%", y=f"{y(0) + 36:.1f}", text_anchor="middle"))
    spots = _spots({name: (x(costs[name][what]), y(points[name][0])) for name in placed})
    half = SPOT / 2
    boxes = [
        (width, spot.x(width) - half, spot.x(width) + half, spot.y - half, spot.y + half)
        for spot in spots.values()
        for width in WIDTHS
    ] + [(width, 0.0, width, y(0) + 4, math.inf) for width in WIDTHS]  # and what is below the axis
    for name in (name for name in order if not costs.get(name)):
        body += _marked_line(y(points[name][0]), f"{order.index(name) + 1} {label(_short(name), 36)}", boxes)
    for name, spot in spots.items():  # before all circles: it would cross their numbers
        (_, low, high), kind = points[name], f"{_kind(document, name)} whisker"
        body.append(shape("line", class_=kind, y1=f"{y(low):.1f}", y2=f"{y(high):.1f}", **spot.at("x1", "x2")))
    for name, spot in spots.items():
        exact, kind = shape("title", f"{cut(_title(name))}: {points[name][0]:.3f}"), f"{_kind(document, name)} spot"
        body.append(shape("circle", exact, class_=kind, cy=f"{spot.y:.1f}", r="9", **spot.at("cx")))
        place, low_y = str(order.index(name) + 1), f"{spot.y + 4:.1f}"
        body.append(shape("text", place, class_="tick name", y=low_y, text_anchor="middle", **spot.at("x")))
    if any(spot.right for spot in spots.values()):
        note += "; points that would cover each other are moved sideways"
    rows = [(_title(name), f"{costs[name][what]:,}", f"{points[name][0]:.3f}") for name in placed]
    words = f"{title}: " + "; ".join(f"{cut(name)} {value} at {cost}" for name, cost, value in rows)
    figure = Figure(title, note, Plot(words, y(0) + 42, body), Table(title, ["", unit, "score"], rows))
    return {"figure": figure, "key": [(order.index(name) + 1, _title(name)) for name in placed]}


@dataclass(frozen=True)
class _Spot:
    """The place of a point in a plot."""

    across: float
    """Percent of the plot's width."""
    y: float
    right: int = 0
    """Pixels by which it is moved to the right; negative: to the left."""

    def x(self, width: float) -> float:
        return self.across / 100 * width + self.right

    def at(self, *names: str) -> dict[str, str]:
        """Attributes of a shape there, of which `names` are its horizontal positions."""
        moved = {"transform": f"translate({self.right})"} if self.right else {}
        return {**dict.fromkeys(names, f"{self.across:.2f}%"), **moved}

    def is_apart(self, other: _Spot) -> bool:
        """Whether neither covers the other, on a phone and on wider plots: there they are farther apart if the left
        one has the lower percent."""
        left, right = sorted((self, other), key=lambda spot: (spot.across, spot.right))
        distance = (right.across - left.across) / 100 * WIDTHS[0] + right.right - left.right
        return abs(self.y - other.y) >= SPOT or distance >= SPOT


def _spots(places: Mapping[str, tuple[float, float]]) -> dict[str, _Spot]:
    """(percent, pixels) of each point -> its place, moved sideways where it would cover another one."""
    found: dict[str, _Spot] = {}

    def is_free(spot: _Spot) -> bool:
        inside = PLOT_LEFT / 100 * WIDTHS[0] + SPOT / 2 <= spot.x(WIDTHS[0]) <= WIDTHS[0] - SPOT / 2
        return inside and all(map(spot.is_apart, found.values()))

    moves = sorted(range(-300, 301, SPOT), key=lambda right: (abs(right), right < 0))
    # from both edges to the middle, where there is room
    for name, place in sorted(places.items(), key=lambda item: abs(item[1][0] - 54), reverse=True):
        found[name] = next(filter(is_free, (_Spot(*place, right) for right in moves)), _Spot(*place))
    return found


_Box = tuple[float, float, float, float, float]
"""Width of a plot; left, right, top and bottom of something in it."""


def _marked_line(y: float, words: str, boxes: list[_Box]) -> list[Shape]:
    """A horizontal line with a label at one of its ends, above or below it: where it covers the fewest of `boxes`, to
    which it is added."""
    line = shape("line", class_="mark", x1=f"{PLOT_LEFT}%", x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}")
    length, labels = 6.6 * len(words), []
    for below in (-5, 14):
        for at, anchor in (("100%", "end"), (f"{PLOT_LEFT + 0.5}%", "start")):
            lefts = [(width, width - length if anchor == "end" else PLOT_LEFT / 100 * width) for width in WIDTHS]
            own = [(width, left, left + length, y + below - 11, y + below + 3) for width, left in lefts]
            covered = sum(_overlap(one, other) for one in own for other in boxes)
            text = shape("text", words, class_="marked", x=at, y=f"{y + below:.1f}", text_anchor=anchor)
            labels.append((covered, text, own))
    _, text, own = min(labels, key=lambda found: found[0])
    boxes += own
    return [line, text]


def _overlap(one: _Box, other: _Box) -> bool:
    (width, left, right, top, bottom), (other_width, other_left, other_right, other_top, other_bottom) = one, other
    return (
        width == other_width and left < other_right and other_left < right and top < other_bottom and other_top < bottom
    )


def _change(variant: str, retention: Mapping[str, Any]) -> Figure:
    """Change of a variant's accuracy on the benchmarks: a bar for each subject, around the line of no change."""
    rows, body = [], []
    widest = max(0.05, *(abs(edge) for found in retention.values() for edge in found["accuracy"]["interval"]))
    for i, (subject, found) in enumerate(retention.items()):
        y, accuracy, nats = 38 * i, found["accuracy"], found["gold_log_likelihood"]
        change, low, high = (0.5 + 0.5 * value / widest for value in (accuracy["difference"], *accuracy["interval"]))
        questions = shape("tspan", f" · {found['questions']}", class_="soft")
        points = f"{100 * accuracy['difference']:+.1f} points"
        body += [
            shape("text", label(subject), questions, x="0", y=y + 15, class_="name"),
            shape("text", points, x="100%", y=y + 15, class_="soft", text_anchor="end"),
            *_interval(y, "bar", change, low, high),
        ]
        intervals = ["{:+.3f} to {:+.3f}".format(*interval) for interval in (accuracy["interval"], nats["interval"])]
        before, after = f"{accuracy['base']:.3f}", f"{accuracy['tuned']:.3f}"
        rows.append(
            (subject, found["questions"], before, after, intervals[0], f"{nats['difference']:+.3f}", intervals[1])
        )
    body.append(shape("line", class_="mark", x1="50%", x2="50%", y1="19", y2=38 * len(retention) - 3))
    change, nats = "95 % interval of the change", "nats for the right answer"
    columns = ["", "questions", "base", "tuned", change, nats, "95 % interval"]
    title = f"Change of accuracy of {cut(variant)}"
    return Figure(
        title,
        "on the benchmarks, against the base model; the line marks no change, and the bar the 95 % interval",
        Plot(f"{title}: {100 * retention['overall']['accuracy']['difference']:+.1f} points", 38 * len(retention), body),
        Table(title, columns, rows, region="Retention"),
    )


def _measures(scores: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> Table:
    """Every measure of every system, each with its interval."""
    names = list(dict.fromkeys(key for name in order for key in scores[name] if f"{key}_interval" in scores[name]))

    def cell(found: Mapping[str, Any], key: str) -> str:
        if key not in found:
            return ""
        low, high = found[f"{key}_interval"]
        return f"{found[key]:.3f} ({low:.3f} to {high:.3f})"

    columns = ["", *(TITLES.get(key, key) for key in names)]
    rows = [[_title(name), *(cell(scores[name], key) for key in names)] for name in order]
    return Table("Every measure, with its 95 % interval", columns, rows, folded=False, region="Measures")


def _labels(scores: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> Table | None:
    """F1 of every label by every system; only a label task has these."""
    tables = [scores[name]["by_label"] for name in order if "by_label" in scores.get(name, {})]
    if not tables:
        return None
    rows = [
        [label, figures["n"], *(f"{table[label]['f1']:.3f}" for table in tables)]
        for label, figures in tables[0].items()
    ]
    return Table("F1 of each label", ["", "test examples", *map(_title, order)], rows, folded=False, region="Labels")


def _answers(document: Mapping[str, Any], order: Sequence[str], samples: Sequence[Sample], why: Why) -> dict[str, Any]:
    """Answers to each question, worst ones of the recommended variant first:
    those that most other systems answered better."""
    variants = [name for name in order if name in document["compared"]]
    subject = (
        document["recommended"]["variant"] if document["recommended"]["variant"] in order else (variants or order)[0]
    )

    def badness(sample: Sample) -> tuple[float, float]:
        others = [value for name, (_, value) in sample.answers.items() if name != subject]
        return sample.answers[subject][1], -sum(others)

    worst = sorted(samples, key=badness)[:MAX_QUESTIONS]
    categories = sorted({sample.category for sample in worst if sample.category})
    return {
        "subject": _title(subject),
        "graded": all(_is_graded(document, sample) for sample in worst),
        "more": (
            f" The worst {MAX_QUESTIONS} of {number(len(samples))} are shown." if len(samples) > MAX_QUESTIONS else ""
        ),
        "systems": [_title(name) for name in order],
        "categories": categories,
        "samples": [_sample(document, sample, order, categories, why) for sample in worst],
    }


def _is_graded(document: Mapping[str, Any], sample: Sample) -> bool:
    """Whether an answer is right or wrong: under a task, and for tool calls. Free text is only more or less similar to
    its reference."""
    some = next(iter(document["scores"].values()))
    return "accuracy" in some or bool((sample.reference_message or {}).get("tool_calls"))


def _sample(
    document: Mapping[str, Any], sample: Sample, order: Sequence[str], categories: Sequence[str], why: Why
) -> dict[str, Any]:
    """One question. A score below 1/2 counts as wrong."""
    graded = _is_graded(document, sample)
    wrong = [i for i, name in enumerate(order) if sample.answers[name][1] < 0.5]
    answers = []
    for i, name in enumerate(order):
        answer, value = sample.answers[name]
        kind, reason = ("bad", why.of(sample, name)) if i in wrong else ("fine", None)
        mark = ("✕ wrong" if i in wrong else "✓ right") if graded else f"{value:.2f}"
        rich = parts(sample.messages[name]) if name in sample.messages else []
        answers.append((_short(name), kind, mark, answer, rich, reason))
    return {
        "prompt": sample.prompt,
        "reference": sample.reference,
        "reference_parts": parts(sample.reference_message) if sample.reference_message else [],
        "conversation": conversation(sample.conversation) if sample.conversation else None,
        "category": sample.category,
        "place": categories.index(sample.category) if sample.category else "",
        "wrong": " ".join(map(str, wrong)),
        "answers": answers,
    }


def _point(document: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """A system's score and the limits of its interval, by the deciding measure."""
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
    """CSS class of a system's marks: variants in color, baselines in gray."""
    return "bar" if name in document["compared"] else "bar all"
