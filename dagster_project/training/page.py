"""One training -> one HTML page (markup.py): its curves, what learnt, from what, by which settings, and what it took beside what was told."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from dagster_project import markup
from dagster_project.training.curve import Point, thinned
from dagster_project.training.memory import Memory

HIGH = 170
"""Pixels of a plot."""
SPANS = 5
"""Examples shown."""


def page(
    variant: str,
    training: Mapping[str, Any],
    curve: Sequence[Point],
    measured: Mapping[str, float],
    predicted: Memory | None,
    examples: Sequence[Mapping[str, Any]],
) -> str:
    """Args:
    training: the document of training.json.
    curve: as `sft.Course` has it.
    measured: what the run took, by its name.
    examples: of the audit of labels; what is trained on stands in ⟦⟧ in their "text".
    """
    sections = {
        "Curves": _curves(curve),
        "Memory": _memory(predicted, int(measured["peak_memory_bytes"]), training["device"]),
        "Weights": _weights(training),
        "Examples": _examples(examples),
        "Settings": _settings(training),
    }
    return markup.page(f"Training of {variant}", _head(variant, training, measured), sections, "Made by <b>pedigree run</b>.")


def _head(variant: str, training: Mapping[str, Any], measured: Mapping[str, float]) -> str:
    loss, watched = training["loss"], training["validation"]
    falls = [("loss", loss["first"], loss["last"])]
    falls += [("validation loss", watched[0]["validation_loss"], watched[-1]["validation_loss"])] if watched else []
    figures = [
        ("steps", markup.number(training["steps"]), f"of {markup.number(training['planned_steps'])}"),
        ("tokens", markup.number(training["tokens"]), f"{markup.number(training['trained_tokens'])} trained on"),
        *((name, f"{last:.3f}", f"from {first:.3f}") for name, first, last in falls),
        ("speed", markup.number(round(measured["tokens_per_second"])), "tokens/s")
        if "tokens_per_second" in measured
        else ("speed", "–", ""),
        ("memory", f"{measured['peak_memory_bytes'] / 1e6:,.0f}", "MB at the peak"),
    ]
    tiles = "".join(f"<div><dt>{name}</dt><dd><b>{value}</b> <span>{unit}</span></dd></div>" for name, value, unit in figures)
    how = f"{training['settings']['method']}, {training['dtype']} on {training['device']}"
    return (
        f'<header class="head"><p class="over">Training · {markup.bdi(how)}</p><h1>{markup.bdi(variant)}</h1>'
        f'<dl class="tiles three">{tiles}</dl></header>'
    )


def _curves(curve: Sequence[Point]) -> str:
    plots = (
        ("Loss", "a step's training loss; the validation loss in the other colour", ("loss", "validation_loss")),
        ("Learning rate", "as the schedule has it", ("learning_rate",)),
        ("Gradient norm", "before it is clipped", ("grad_norm",)),
        ("Speed", "tokens a second over the last twenty steps, on this machine", ("tokens_per_second",)),
    )
    return f'<div class="plots">{"".join(plot(title, note, curve, names) for title, note, names in plots)}</div>'


def plot(title: str, note: str, curve: Sequence[Point], names: Sequence[str]) -> str:
    """Lines over steps. The plot stretches with its column, its letters do not."""
    lines = {name: found for name in names if (found := thinned([point for point in curve if name in point], 500))}
    if not lines:
        return ""
    values = [point[name] for name, found in lines.items() for point in found]
    last = max(found[-1]["step"] for found in lines.values())
    low, high = min(values), max(values)
    low = 0.0 if low < high / 2 else low
    high = high if high > low else low + 1

    def y(value: float) -> float:
        return 8 + HIGH * (high - value) / (high - low)

    body, drawn = "", ""
    for value in (low, (low + high) / 2, high):
        body += f'<line class="grid" x1="12%" x2="100%" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        body += f'<text class="tick" x="11%" y="{y(value) + 4:.1f}" text-anchor="end">{markup.brief(value)}</text>'
    for step, anchor, at in ((0, "start", 12), (last / 2, "middle", 56), (last, "end", 100)):
        body += f'<text class="tick" x="{at}%" y="{HIGH + 26}" text-anchor="{anchor}">{markup.number(round(step))}</text>'
    for number, (name, found) in enumerate(lines.items()):
        places = " ".join(f"{100 * point['step'] / max(1, last):.2f},{y(point[name]):.1f}" for point in found)
        drawn += f'<polyline class="line of-{number}" points="{places}"><title>{name}</title></polyline>'
    body += f'<svg x="12%" width="88%" height="{HIGH + 16}" viewBox="0 0 100 {HIGH + 16}" preserveAspectRatio="none">{drawn}</svg>'
    told = "; ".join(f"{name} from {found[0][name]:.4g} to {found[-1][name]:.4g}" for name, found in lines.items())
    columns = [(point["step"], name, f"{point[name]:.4g}") for name, found in lines.items() for point in thinned(found, 20)]
    return markup.figure(
        title,
        note,
        markup.svg(f"{title} over {last:,} steps: {told}", HIGH + 32, body),
        markup.table(title, ["step", "", "value"], columns),
    )


def _memory(predicted: Memory | None, peak: int, device: str) -> str:
    """A bar for each part as predicted, their sum, and what was measured."""
    what = "resident in the process" if device == "cpu" else "allocated by torch"
    bars = [*(asdict(predicted).items() if predicted else []), *([("predicted", predicted.total)] if predicted else []), ("measured", peak)]
    most, body = max(size for _, size in bars), ""
    for i, (name, size) in enumerate(bars):
        y = 36 * i
        body += f'<text x="0" y="{y + 15}" class="name">{name}</text>'
        body += f'<text x="100%" y="{y + 15}" class="soft" text-anchor="end">{size / 1e6:,.0f} MB</text>'
        body += f'<rect class="track" x="0" y="{y + 21}" width="100%" height="7" rx="2"/>'
        kind = "bar" if name == "measured" else "bar all"
        body += f'<rect class="{kind}" x="0" y="{y + 21}" width="{100 * size / most:.3f}%" height="7" rx="2"/>'
    note = f"{100 * (predicted.total / peak - 1):+.1f} % off what was measured" if predicted else "this method's cannot be predicted"
    table = markup.table("Memory", ["", "bytes"], [(name, markup.number(size)) for name, size in bars])
    label = f"Memory: {peak / 1e6:,.0f} MB measured; {note}"
    return markup.figure("Peak memory", f"by part as predicted, {what}; {note}", markup.svg(label, 36 * len(bars), body), table)


def _weights(training: Mapping[str, Any]) -> str:
    frozen = training["frozen"]
    kept = "the same before and after" if frozen["sha256_before"] == frozen["sha256_after"] else "changed, which they must not"
    rows = [(kind, group["tensors"], group["moved"], markup.number(group["norm_of_change"])) for kind, group in training["trained"].items()]
    return (
        "<figure>"
        + markup.table("What learnt", ["weights", "tensors", "moved", "norm of change"], rows, unfolded=True)
        + f'<p class="sum">{markup.many(frozen["tensors"], "frozen tensor")}: {kept}.</p></figure>'
    )


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    listed = ""
    for example in examples[:SPANS]:
        parts = re.split("[⟦⟧]", example["text"])
        shown = "".join(f"<mark>{escape(markup.visible(p))}</mark>" if i % 2 else escape(markup.visible(p)) for i, p in enumerate(parts))
        listed += f'<li><code>{markup.bdi(example["source"])}</code><p class="text"><bdi dir="auto">{shown}</bdi></p></li>'
    return f'<p class="lead">What the loss counts is <mark>marked</mark>.</p><ul class="edits">{listed}</ul>' if listed else ""


def _settings(training: Mapping[str, Any]) -> str:
    settings = {**training["settings"], **{name: training[name] for name in ("seed", "threads", "dtype", "device")}}
    settings |= {f"version of {name}": value for name, value in training["versions"].items()}
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in settings.items()]
    return f"<figure>{markup.table('Settings as they were resolved', ['name', 'value'], rows, unfolded=True)}</figure>"
