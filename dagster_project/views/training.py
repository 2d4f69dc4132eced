"""A training -> one HTML page: curves, trained weights, examples, settings, and measured and predicted memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dagster_project.core.context import Documents
from dagster_project.core.curves import Point, thinned
from dagster_project.core.records import write_text
from dagster_project.core.text import many, number
from dagster_project.views.html import Figure, Plot, Shape, Table, bars, brief, render, shape
from dagster_project.views.trained_examples import TrainedExample, legend, trained_examples

PLOT_HEIGHT = 170
"""Pixels of a plot."""


def draw_training(documents: Documents) -> None:
    """Write data/pages/adapter/<variant>/training.html: curves, memory, trained weights, tokens in the loss, settings.

    An adapter that is merged of others has none.
    """
    training, run = documents.read(documents.out / "training.json"), documents.read(documents.pages / "run.json")
    history = documents.read(documents.pages / "history.json")
    if training is None or run is None or history is None or "merge_of" in training:
        return
    audit = documents.read(documents.root / "data" / "tokenized" / "audit.json") or {"examples": []}
    examples = trained_examples(documents.root, audit)
    text = training_page(documents.variant, training, history["curve"], run["measured"], run.get("memory"), examples)
    write_text(documents.pages / "training.html", text)


def training_page(
    variant: str,
    training: Mapping[str, Any],
    curve: Sequence[Point],
    measured: Mapping[str, float],
    predicted: Mapping[str, int] | None,
    examples: Sequence[TrainedExample],
) -> str:
    """The page of a training.

    Args:
        training: the document of training.json.
        curve: of history.json.
        measured: memory, time and speed of the run.
        predicted: bytes by part; None if they cannot be predicted.
        examples: some of the examples that it was trained on.
    """
    sections = {
        "Curves": _curves(curve, training.get("best_step")),
        "Memory": _memory(predicted, int(measured["peak_memory_bytes"]), _kind_of_memory(training)),
        "Weights": _weights(training),
        "Examples": {"shown": examples, "legend": legend(examples)} if examples else None,
        "Settings": _settings(training),
    }
    how = f"{training['settings']['method']}, {training['dtype']} on {training['device']}"
    return render(
        "training.jinja",
        f"Training of {variant}",
        sections,
        variant=variant,
        how=how,
        figures=_key_figures(training, measured),
    )


def _key_figures(training: Mapping[str, Any], measured: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Of a training command some are unknown. The validation loss is that of the weights that were kept."""
    loss, validation = training.get("loss"), training["validation"]
    losses = [("loss", loss["first"], loss["last"])] if loss else []
    if validation:
        kept = next((point for point in validation if point["step"] == training.get("best_step")), validation[-1])
        losses.append(("validation loss", validation[0]["validation_loss"], kept["validation_loss"]))
    steps = number(training["steps"]) if "steps" in training else "unknown"
    planned = f"of {number(training['planned_steps'])}" if "planned_steps" in training else ""
    tokens, speed = ("tokens", "unknown", ""), ("speed", "–", "")
    if "tokens" in training:
        tokens = ("tokens", number(training["tokens"]), f"{number(training['trained_tokens'])} in the loss")
    if "tokens_per_second" in measured:
        speed = ("speed", number(round(measured["tokens_per_second"])), "tokens/s")
    return [
        ("steps", steps, planned),
        tokens,
        *((name, f"{last:.3f}", f"from {first:.3f}") for name, first, last in losses),
        speed,
        ("memory", f"{measured['peak_memory_bytes'] / 1e6:,.0f}", "MB at the peak"),
    ]


SMOOTHED = "smoothed_loss"
SMOOTHING = 0.9
"""Decay of the exponential moving average of the loss: it covers about the last ten steps."""
RISE = 0.01
"""Relative rise of the validation loss above its minimum that counts as a rise:
smaller ones are noise of a small validation split."""
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
    "on_policy": "share",
    "nll": "training",
    "validation_nll": "validation",
    "kl": "KL",
    "response_length": "tokens",
}
"""Name of a metric -> its name in a legend."""
MARKED_POINTS = 40
"""Lines with at most this many points also mark each of them: a single point would be invisible."""


def _is_finite(value: Any) -> bool:
    """Whether a value of a curve can be drawn. Documents have null instead of NaN and infinity."""
    return value is not None and math.isfinite(value)


def smoothed(curve: Sequence[Point]) -> list[Point]:
    """Exponential moving average of the loss, with bias correction as in Adam.

    >>> [round(point["smoothed_loss"], 3) for point in smoothed([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])]
    [2.0, 1.474]
    """
    points: list[Point] = []
    mean, weight = 0.0, 0.0
    for point in curve:
        if _is_finite(point.get("loss")):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * point["loss"]
            weight = SMOOTHING * weight + (1 - SMOOTHING)
            points.append({"step": point["step"], SMOOTHED: mean / weight})
    return points


def overfitting_since(curve: Sequence[Point]) -> int | None:
    """Step of the lowest validation loss, if the loss then rose by more than
    RISE while the smoothed training loss fell; else None."""
    validation = [(point["step"], point["validation_loss"]) for point in curve if "validation_loss" in point]
    if not validation:
        return None
    best, lowest = min(validation, key=lambda point: point[1])
    last = validation[-1][1]
    averages = smoothed(curve)
    if not averages or last <= lowest + RISE * abs(lowest):
        return None
    at_best = ([point for point in averages if point["step"] <= best] or averages)[-1 if best else 0]
    return int(best) if averages[-1][SMOOTHED] < at_best[SMOOTHED] else None


def diagnosis(curve: Sequence[Point], kept: int | None = None) -> str:
    """Interpretation of the loss curves, in one or two sentences.

    Args:
        kept: the step whose weights were kept, if it is not the last one.
    """
    validation = [(int(point["step"]), point["validation_loss"]) for point in curve if "validation_loss" in point]
    if not validation:
        return "There is no validation loss, so overfitting cannot be detected: set splits.validation above 0."
    if len(validation) == 1:
        return "The validation loss was measured once, so overfitting cannot be detected."
    best, lowest = min(validation, key=lambda point: point[1])
    last = validation[-1][1]
    if (since := overfitting_since(curve)) is not None:
        return (
            f"Overfitting since step {since:,}:"
            f" the validation loss rose from {lowest:.3f} to {last:.3f} while the training loss kept falling. "
            + (
                "Train fewer epochs, or keep the best weights (load_best_model_at_end: true)."
                if kept is None
                else f"The weights of step {kept:,} were kept."
            )
        )
    if f"{last:.3f}" == f"{validation[0][1]:.3f}" and last <= lowest + RISE * abs(lowest):
        return f"No change: the validation loss is {last:.3f} at the beginning and at the end."
    if last > validation[0][1]:
        return f"Not learning: the validation loss rose from {validation[0][1]:.3f} to {last:.3f}. Lower learning_rate."
    if last <= lowest + RISE * abs(lowest):
        flat = len(validation) > 2 and validation[-2][1] - last <= RISE * abs(lowest)
        trend = "it has converged" if flat else "it was still falling at the end: more steps may help"
        return f"No overfitting: the validation loss fell from {validation[0][1]:.3f} to {last:.3f}, and {trend}."
    return (
        f"Unstable: the validation loss was lowest at step {best:,}"
        f" ({lowest:.3f}) and ended at {last:.3f}, and the training loss rose with it."
    )


def _curves(curve: Sequence[Point], kept: int | None) -> dict[str, Any]:
    plots = (
        (
            "Loss",
            "of each step, smoothed over about ten steps, and of the validation split",
            ("loss", SMOOTHED, "validation_loss"),
        ),
        ("Learning rate", "as scheduled", ("learning_rate",)),
        ("Gradient norm", "before clipping", ("grad_norm",)),
        ("Speed", "tokens per second over the last twenty steps, on this machine", ("tokens_per_second",)),
    )
    points = [*curve, *smoothed(curve)]
    figures = [curve_figure(title, note, points, names) for title, note, names in plots]
    return {"diagnosis": diagnosis(curve, kept), "figures": [figure for figure in figures if figure]}


def axis(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis with all values; it includes 0 if that takes less than half of the height.

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
    """Lines over steps, with a legend if there are several; None if there are no values.

    Values that are not finite are not drawn, but counted in the note.
    """
    finite = {name: [point for point in curve if _is_finite(point.get(name))] for name in names}
    lines = {name: thinned(points, 500) for name, points in finite.items() if points}
    if not lines:
        return None
    missing = sum(name in point for name in names for point in curve) - sum(map(len, finite.values()))
    last = max(points[-1]["step"] for points in lines.values())
    low, high = axis([point[name] for name, points in lines.items() for point in points])

    def y(value: float) -> float:
        return 8 + PLOT_HEIGHT * (high - value) / (high - low)

    words = "; ".join(
        f"{NAMES.get(name, name)} from {points[0][name]:.4g} to {points[-1][name]:.4g}"
        for name, points in lines.items()
    )
    rows = [
        (point["step"], NAMES.get(name, name), f"{point[name]:.4g}")
        for name, points in lines.items()
        for point in thinned(points, 20)
    ]
    return Figure(
        title,
        note + (f"; {many(missing, 'value')} not finite, not drawn" if missing else ""),
        Plot(
            f"{title} over {last:,} steps: {words}",
            PLOT_HEIGHT + 32,
            [*_grid(low, high, last, y), *_lines(lines, last, y)],
        ),
        Table(title, ["step", "", "value"], rows),
        legend=[(_kind(name, lines), NAMES.get(name, name)) for name in lines] if len(lines) > 1 else [],
    )


def _grid(low: float, high: float, last: float, y: Callable[[float], float]) -> list[Shape]:
    """Horizontal lines at both limits, in the middle and, if the axis includes it, at 0; steps below."""
    values = [low, (low + high) / 2, high]
    if low < 0 < high:  # 0 replaces a line that its label would overlap
        values = [*(value for value in values if abs(y(value) - y(0)) > 14), 0.0]
    body = []
    for value, text in zip(values, _ticks(values), strict=True):
        kind = "grid zero" if value == 0 and low < 0 else "grid"
        body.append(shape("line", class_=kind, x1="12%", x2="100%", y1=f"{y(value):.1f}", y2=f"{y(value):.1f}"))
        body.append(shape("text", text, class_="tick", x="11%", y=f"{y(value) + 4:.1f}", text_anchor="end"))
    for step, anchor in ((0, "start"), (round(last / 2), "middle"), (last, "end")):
        if anchor == "start" or step:
            x = f"{12 + 88 * step / max(1, last):.4g}%"
            body.append(shape("text", number(round(step)), class_="tick", x=x, y=PLOT_HEIGHT + 26, text_anchor=anchor))
    return body


def _ticks(values: Sequence[float]) -> list[str]:
    """Labels of an axis, with as many digits as different values need to look different, up to eight.

    >>> _ticks([0.69297, 0.69311, 0.69325]), _ticks([0.0, 5000.0, 10000.0])
    (['0.693', '0.6931', '0.6933'], ['0', '5k', '10k'])
    """
    texts, digits = [brief(value) for value in values], 3
    while len(set(texts)) < len(set(values)) and digits < 8:
        digits += 1
        texts = [f"{value:,.{digits}g}" for value in values]
    return texts


def _lines(lines: Mapping[str, Sequence[Point]], last: float, y: Callable[[float], float]) -> list[Shape]:
    drawn, marks = [], []
    for name, line in lines.items():
        kind, words = _kind(name, lines), shape("title", NAMES.get(name, name))
        places = [(100 * point["step"] / max(1, last), y(point[name])) for point in line]
        points = " ".join(f"{x:.2f},{at:.1f}" for x, at in places)
        drawn.append(shape("polyline", words, class_=f"line {kind}", points=points))
        if len(places) <= MARKED_POINTS:
            marks += [
                shape("circle", class_=f"dot {kind}", cx=f"{12 + 0.88 * x:.2f}%", cy=f"{at:.1f}", r="2.5")
                for x, at in places
            ]
    box = {"viewBox": f"0 0 100 {PLOT_HEIGHT + 16}", "preserveAspectRatio": "none"}
    return [shape("svg", *drawn, x="12%", width="88%", height=PLOT_HEIGHT + 16, **box), *marks]


def _kind(name: str, lines: Mapping[str, Any]) -> str:
    """CSS class of a line: blue for the first, orange for the second; a raw line behind its smoothed one is faint."""
    if SMOOTHED in lines and name == "loss":
        return "of-0 raw"
    order = [other for other in lines if not (SMOOTHED in lines and other == "loss")]
    return f"of-{order.index(name)}"


def _kind_of_memory(training: Mapping[str, Any]) -> str:
    if "command" in training:
        return "resident in the largest process of the command"
    return "resident in the process" if training["device"] == "cpu" else "allocated by torch"


def _memory(predicted: Mapping[str, int] | None, peak: int, kind_of_memory: str) -> Figure:
    """Bars of the predicted parts, their sum, and the measured peak."""
    total = sum((predicted or {}).values())
    sizes = [*(predicted or {}).items(), *([("predicted", total)] if predicted else []), ("measured", peak)]
    most = max(size for _, size in sizes)
    rows = [
        ((name,), f"{size / 1e6:,.0f} MB", 100 * size / most, "bar" if name == "measured" else "bar all")
        for name, size in sizes
    ]
    note = "not predictable for this method"
    if predicted:
        note = f"{100 * (total / peak - 1):+.1f} % compared with the measurement"
    table = Table("Memory", ["", "bytes"], [(name, number(size)) for name, size in sizes])
    plot = bars(f"Memory: {peak / 1e6:,.0f} MB measured; {note}", rows)
    return Figure("Peak memory", f"predicted by part, {kind_of_memory}; {note}", plot, table)


def _weights(training: Mapping[str, Any]) -> dict[str, Any]:
    frozen = training["frozen"]
    state = "unchanged" if frozen["sha256_before"] == frozen["sha256_after"] else "changed, which is an error"
    rows = [
        (kind, group["tensors"], group["moved"], number(group["norm_of_change"]))
        for kind, group in training["trained"].items()
    ]
    rows += [
        (kind, tensors, "unknown: random start", "") for kind, tensors in training.get("start_unknown", {}).items()
    ]
    table = Table("Trained weights", ["weights", "tensors", "changed", "norm of change"], rows, folded=False)
    return {"table": table, "frozen": f"{many(frozen['tensors'], 'frozen tensor')}: {state}."}


def _settings(training: Mapping[str, Any]) -> Table:
    command = {name: training[name] for name in ("command", "files", "order") if name in training}
    settings = {
        **command,
        **training["settings"],
        **{name: training[name] for name in ("seed", "threads", "dtype", "device")},
    }
    settings |= {f"version of {name}": value for name, value in training["versions"].items()}
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in settings.items()]
    return Table("Resolved settings", ["name", "value"], rows, folded=False)
