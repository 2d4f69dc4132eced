"""One training -> one HTML page: its curves, what was trained, from what, by which settings, and the memory that it took and was predicted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dagster_project.core.context import Documents
from dagster_project.core.curves import Point, thinned
from dagster_project.core.records import write_text
from dagster_project.core.text import many, number
from dagster_project.views.html import Figure, Plot, Shape, Table, brief, render, shape

HIGH = 170
"""Pixels of a plot."""
SPANS = 5
"""Examples shown."""


def draw_training(documents: Documents) -> None:
    """data/pages/adapter/<variant>/training.html: curves, what was trained, memory, what the loss counted, settings."""
    training, run = documents.read(documents.out / "training.json"), documents.read(documents.pages / "run.json")
    history = documents.read(documents.pages / "history.json")
    if training is None or run is None or history is None:
        return
    audit = documents.read(documents.root / "data" / "tokenized" / "audit.json") or {"examples": []}
    text = training_page(documents.variant, training, history["curve"], run["measured"], run.get("memory"), audit["examples"])
    write_text(documents.pages / "training.html", text)


def training_page(
    variant: str,
    training: Mapping[str, Any],
    curve: Sequence[Point],
    measured: Mapping[str, float],
    predicted: Mapping[str, int] | None,
    examples: Sequence[Mapping[str, Any]],
) -> str:
    """Args:
    training: the document of training.json.
    curve: of history.json.
    measured: memory, time and speed of the run.
    predicted: bytes by part; None: not predictable.
    examples: of the audit of labels; trained spans are marked by ⟦⟧ in their "text".
    """
    sections = {
        "Curves": _curves(curve, training.get("best_step")),
        "Memory": _memory(predicted, int(measured["peak_memory_bytes"]), training["device"]),
        "Weights": _weights(training),
        "Examples": [{"source": one["source"], "pieces": re.split("[⟦⟧]", one["text"])} for one in examples[:SPANS]],
        "Settings": _settings(training),
    }
    how = f"{training['settings']['method']}, {training['dtype']} on {training['device']}"
    return render("training.jinja", f"Training of {variant}", sections, variant=variant, how=how, figures=_figures(training, measured))


def _figures(training: Mapping[str, Any], measured: Mapping[str, float]) -> list[tuple[str, str, str]]:
    loss, watched = training["loss"], training["validation"]
    falls = [("loss", loss["first"], loss["last"])]
    falls += [("validation loss", watched[0]["validation_loss"], watched[-1]["validation_loss"])] if watched else []
    return [
        ("steps", number(training["steps"]), f"of {number(training['planned_steps'])}"),
        ("tokens", number(training["tokens"]), f"{number(training['trained_tokens'])} trained on"),
        *((name, f"{last:.3f}", f"from {first:.3f}") for name, first, last in falls),
        ("speed", number(round(measured["tokens_per_second"])), "tokens/s") if "tokens_per_second" in measured else ("speed", "–", ""),
        ("memory", f"{measured['peak_memory_bytes'] / 1e6:,.0f}", "MB at the peak"),
    ]


SMOOTHED = "smoothed_loss"
SMOOTHING = 0.9
"""Share of the earlier average in each point of the smoothed loss: about the last ten steps count."""
RISE = 0.01
"""Share by which the validation loss must lie above its lowest value to count as risen: smaller moves are noise of a small validation split."""
NAMES = {
    "loss": "training loss of a step",
    SMOOTHED: "training loss, smoothed",
    "validation_loss": "validation loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "reward": "reward",
    "reward_chosen": "chosen answers",
    "reward_rejected": "rejected answers",
    "accuracy": "training",
    "validation_accuracy": "validation",
    "margin": "training",
    "validation_margin": "validation",
    "kl": "KL",
    "response_length": "tokens",
}
"""Figure of a curve -> its name in a legend."""
FEW = 40
"""Points up to which a line also marks each of them: a single one would be invisible."""


def smoothed(curve: Sequence[Point]) -> list[Point]:
    """The loss of each step as an exponential moving average, without bias to the first (as Adam corrects its own).

    >>> [round(point["smoothed_loss"], 3) for point in smoothed([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])]
    [2.0, 1.474]
    """
    found: list[Point] = []
    mean, weight = 0.0, 0.0
    for point in curve:
        if "loss" in point and math.isfinite(point["loss"]):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * point["loss"]
            weight = SMOOTHING * weight + (1 - SMOOTHING)
            found.append({"step": point["step"], SMOOTHED: mean / weight})
    return found


def overfitting_since(curve: Sequence[Point]) -> int | None:
    """The step of the lowest validation loss, if the last one lies above it by more than RISE while the smoothed training loss fell; else None."""
    watched = [(point["step"], point["validation_loss"]) for point in curve if "validation_loss" in point]
    if not watched:
        return None
    best, lowest = min(watched, key=lambda point: point[1])
    last = watched[-1][1]
    averages = smoothed(curve)
    if not averages or last <= lowest + RISE * abs(lowest):
        return None
    then = ([point for point in averages if point["step"] <= best] or averages)[-1 if best else 0]
    return int(best) if averages[-1][SMOOTHED] < then[SMOOTHED] else None


def meaning(curve: Sequence[Point], kept: int | None = None) -> str:
    """What the curves of losses say, in one or two sentences.

    Args:
        kept: the step whose weights were kept, where that is not the last.
    """
    watched = [(int(point["step"]), point["validation_loss"]) for point in curve if "validation_loss" in point]
    if len(watched) < 2:
        return "There is no validation loss, so these curves cannot tell learning from memorizing: set splits.validation above 0."
    best, lowest = min(watched, key=lambda point: point[1])
    last = watched[-1][1]
    if (since := overfitting_since(curve)) is not None:
        return (
            f"Overfitting since step {since:,}: the validation loss rose from {lowest:.3f} to {last:.3f} while the training loss went on falling. "
            + (
                "Train fewer epochs, or keep the best weights (load_best_model_at_end: true)."
                if kept is None
                else f"The weights of step {kept:,} were kept."
            )
        )
    if last > watched[0][1]:
        return f"Not learning: the validation loss rose from {watched[0][1]:.3f} to {last:.3f}. Lower learning_rate."
    if last <= lowest + RISE * abs(lowest):
        flat = len(watched) > 2 and watched[-2][1] - last <= RISE * abs(lowest)
        more = "it hardly changes any more" if flat else "it was still falling at the end: more steps may help"
        return f"No overfitting: the validation loss fell from {watched[0][1]:.3f} to {last:.3f}, and {more}."
    return f"Unstable: the validation loss was lowest at step {best:,} ({lowest:.3f}) and ended at {last:.3f}, and the training loss rose with it."


def _curves(curve: Sequence[Point], kept: int | None) -> dict[str, Any]:
    plots = (
        ("Loss", "of each step, smoothed over about ten steps, and of the validation split", ("loss", SMOOTHED, "validation_loss")),
        ("Learning rate", "as the schedule has it", ("learning_rate",)),
        ("Gradient norm", "before it is clipped", ("grad_norm",)),
        ("Speed", "tokens a second over the last twenty steps, on this machine", ("tokens_per_second",)),
    )
    points = [*curve, *smoothed(curve)]
    figures = [curve_figure(title, note, points, names) for title, note, names in plots]
    return {"meaning": meaning(curve, kept), "figures": [figure for figure in figures if figure]}


def axis(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis on which every value is visible: from 0 where that costs less than half of the height.

    >>> axis([2.0, 10.0]), axis([8.0, 10.0]), axis([-3.0, 1.0]), axis([-10.0, -2.0]), axis([5.0])
    ((0.0, 10.0), (8.0, 10.0), (-3.0, 1.0), (-10.0, 0.0), (0.0, 5.0))
    """
    low, high = min(values), max(values)
    if low == high:
        return min(low, 0.0), max(high, 0.0) or float(low == 0)
    if 0 < low < high / 2:
        low = 0.0
    if low / 2 < high < 0:
        high = 0.0
    return low, high


def curve_figure(title: str, note: str, curve: Sequence[Point], names: Sequence[str]) -> Figure | None:
    """Lines over steps, with a legend where there are several; None without a value. The plot stretches with its column, its letters do not.

    Values that are not finite are left out, and counted in the note.
    """
    finite = {name: [point for point in curve if name in point and math.isfinite(point[name])] for name in names}
    lines = {name: thinned(found, 500) for name, found in finite.items() if found}
    if not lines:
        return None
    missing = sum(name in point for name in names for point in curve) - sum(map(len, finite.values()))
    last = max(found[-1]["step"] for found in lines.values())
    low, high = axis([point[name] for name, found in lines.items() for point in found])

    def y(value: float) -> float:
        return 8 + HIGH * (high - value) / (high - low)

    words = "; ".join(f"{NAMES.get(name, name)} from {found[0][name]:.4g} to {found[-1][name]:.4g}" for name, found in lines.items())
    columns = [
        (point["step"], NAMES.get(name, name), f"{point[name]:.4g}") for name, found in lines.items() for point in thinned(found, 20)
    ]
    return Figure(
        title,
        note + (f"; {many(missing, 'value')} not finite, not drawn" if missing else ""),
        Plot(f"{title} over {last:,} steps: {words}", HIGH + 32, [*_grid(low, high, last, y), *_lines(lines, last, y)]),
        Table(title, ["step", "", "value"], columns),
        legend=[(_kind(name, lines), NAMES.get(name, name)) for name in lines] if len(lines) > 1 else [],
    )


def _grid(low: float, high: float, last: float, y: Callable[[float], float]) -> list[Shape]:
    """Lines across at both ends, in the middle and, where the axis crosses it, at 0; steps below."""
    values = [low, (low + high) / 2, high]
    if low < 0 < high:  # 0 takes the place of a line that its letters would cover
        values = [*(value for value in values if abs(y(value) - y(0)) > 14), 0.0]
    body = []
    for value in values:
        kind = "grid zero" if value == 0 and low < 0 else "grid"
        body.append(shape("line", class_=kind, x1="12%", x2="100%", y1=f"{y(value):.1f}", y2=f"{y(value):.1f}"))
        body.append(shape("text", brief(value), class_="tick", x="11%", y=f"{y(value) + 4:.1f}", text_anchor="end"))
    for step, anchor, at in ((0, "start", 12), (last / 2, "middle", 56), (last, "end", 100)):
        if step in {0, last} or last >= 2:
            body.append(shape("text", number(round(step)), class_="tick", x=f"{at}%", y=HIGH + 26, text_anchor=anchor))
    return body


def _lines(lines: Mapping[str, Sequence[Point]], last: float, y: Callable[[float], float]) -> list[Shape]:
    drawn, marks = [], []
    for name, found in lines.items():
        kind, words = _kind(name, lines), shape("title", NAMES.get(name, name))
        places = [(100 * point["step"] / max(1, last), y(point[name])) for point in found]
        points = " ".join(f"{x:.2f},{at:.1f}" for x, at in places)
        drawn.append(shape("polyline", words, class_=f"line {kind}", points=points))
        if len(places) <= FEW:
            marks += [shape("circle", class_=f"dot {kind}", cx=f"{12 + 0.88 * x:.2f}%", cy=f"{at:.1f}", r="2.5") for x, at in places]
    box = {"viewBox": f"0 0 100 {HIGH + 16}", "preserveAspectRatio": "none"}
    return [shape("svg", *drawn, x="12%", width="88%", height=HIGH + 16, **box), *marks]


def _kind(name: str, lines: Mapping[str, Any]) -> str:
    """The class of a line: blue for the first, orange for the second; a raw line behind its smoothed one is faint."""
    if SMOOTHED in lines and name == "loss":
        return "of-0 raw"
    order = [other for other in lines if not (SMOOTHED in lines and other == "loss")]
    return f"of-{order.index(name)}"


def _memory(predicted: Mapping[str, int] | None, peak: int, device: str) -> Figure:
    """A bar for each part as predicted, their sum, and what was measured."""
    what = "resident in the process" if device == "cpu" else "allocated by torch"
    total = sum((predicted or {}).values())
    bars = [*(predicted or {}).items(), *([("predicted", total)] if predicted else []), ("measured", peak)]
    most, body = max(size for _, size in bars), []
    for i, (name, size) in enumerate(bars):
        y, kind = 36 * i, "bar" if name == "measured" else "bar all"
        body += [
            shape("text", name, x="0", y=y + 15, class_="name"),
            shape("text", f"{size / 1e6:,.0f} MB", x="100%", y=y + 15, class_="soft", text_anchor="end"),
            shape("rect", class_="track", x="0", y=y + 21, width="100%", height="7", rx="2"),
            shape("rect", class_=kind, x="0", y=y + 21, width=f"{100 * size / most:.3f}%", height="7", rx="2"),
        ]
    note = f"{100 * (total / peak - 1):+.1f} % off what was measured" if predicted else "this method's cannot be predicted"
    table = Table("Memory", ["", "bytes"], [(name, number(size)) for name, size in bars])
    plot = Plot(f"Memory: {peak / 1e6:,.0f} MB measured; {note}", 36 * len(bars), body)
    return Figure("Peak memory", f"by part as predicted, {what}; {note}", plot, table)


def _weights(training: Mapping[str, Any]) -> dict[str, Any]:
    frozen = training["frozen"]
    kept = "the same before and after" if frozen["sha256_before"] == frozen["sha256_after"] else "changed, which they must not"
    rows = [(kind, group["tensors"], group["moved"], number(group["norm_of_change"])) for kind, group in training["trained"].items()]
    table = Table("What learnt", ["weights", "tensors", "moved", "norm of change"], rows, folded=False)
    return {"table": table, "frozen": f"{many(frozen['tensors'], 'frozen tensor')}: {kept}."}


def _settings(training: Mapping[str, Any]) -> Table:
    settings = {**training["settings"], **{name: training[name] for name in ("seed", "threads", "dtype", "device")}}
    settings |= {f"version of {name}": value for name, value in training["versions"].items()}
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in settings.items()]
    return Table("Settings as they were resolved", ["name", "value"], rows, folded=False)
