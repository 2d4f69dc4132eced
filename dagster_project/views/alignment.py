"""aligned@X -> its page: held-out answers before and after, curves, and signs of a gamed reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dagster_project.core.context import Documents
from dagster_project.core.records import read_table, write_text
from dagster_project.views import html
from dagster_project.views.training import overfitting_since, plot

PLOTS = (
    ("Reward", "mean of the batch; for pairs, what the policy implies", ("reward", "reward_chosen", "reward_rejected")),
    ("Accuracy", "share of pairs whose chosen answer has the higher reward", ("accuracy", "validation_accuracy")),
    ("Margin", "between the rewards of a pair", ("margin", "validation_margin")),
    ("KL", "divergence from the reference, in nats", ("kl",)),
    ("Length", "tokens of an answer", ("response_length",)),
    ("Loss", "of each step, and of the validation split", ("loss", "validation_loss")),
)
SHOWN = 8
"""Answers shown from either end of the list."""


def draw(documents: Documents) -> None:
    """data/pages/aligned/<variant>/alignment.html: did it help, is the reward gamed, how it went, and answers before and after."""
    history = documents.read(documents.pages / "history.json")
    if history is None or "watch" not in documents.report:
        return
    points = history["curve"]
    since = overfitting_since(points)
    words = f"Overfitting since step {since}: the validation loss rose while the training loss went on falling."
    lead = f'<p class="lead">{words}</p>' if since is not None else ""
    sections = {
        "Watch": _watch(documents.report["watch"], history["signs"]),
        "Curves": f'{lead}<div class="plots">{"".join(plot(title, note, points, names) for title, note, names in PLOTS)}</div>',
        "Answers": _answers(read_table(documents.out / "samples.parquet")),
    }
    head = _head(documents.variant, documents.report)
    text = html.page(f"Alignment of {documents.variant}", head, sections, "Made by <b>pedigree run</b>.")
    write_text(documents.pages / "alignment.html", text)


def _head(variant: str, metrics: Mapping[str, Any]) -> str:
    reliable = metrics["checks"]["reward_model_is_reliable"]
    doubt = "" if reliable["passed"] else reliable["note"]
    watch, told = metrics["watch"], metrics["preference"]["accuracy"]
    tiles = [("liked as people do", f"{told['aligned']:.0%}", f"of held-out pairs, from {told['sft']:.0%}")]
    if "reward" in watch:
        tiles += [
            ("reward", f"{watch['reward']['aligned']:.2f}", f"from {watch['reward']['sft']:.2f}"),
            ("better answers", f"{watch['win_rate']['value']:.0%}", "by the reward model"),
        ]
    tiles += [
        ("length", f"{watch['tokens']['aligned']:.0f}", f"tokens, from {watch['tokens']['sft']:.0f}"),
        ("not repeated", f"{watch['distinct']['aligned']:.0%}", f"from {watch['distinct']['sft']:.0%}"),
        ("KL", f"{watch['kl_per_token']:.3f}", "nats a token"),
    ]
    warning = (
        '<p class="verdict warn"><span class="sign" aria-hidden="true">!</span>'
        f"<span><strong>The reward model is not reliable.</strong> {html.text(doubt, 1_200)}</span></p>"
        if doubt
        else ""
    )
    return (
        f'<header class="head"><p class="over">Alignment · {html.text(metrics["method"])} on {html.text(metrics["adapter"])}</p>'
        f"<h1>{html.bdi(variant)}</h1>{warning}"
        f'<dl class="tiles three">{"".join(f"<div><dt>{n}</dt><dd><b>{v}</b> <span>{u}</span></dd></div>" for n, v, u in tiles)}</dl></header>'
    )


def _watch(watch: Mapping[str, Any], signs: Sequence[str]) -> str:
    named = {
        "reward": "reward",
        "tokens": "tokens of an answer",
        "distinct": "share of word runs not repeated",
        "unfinished": "share unfinished",
    }
    figures = [
        (
            words,
            watch[name]["sft"],
            watch[name]["aligned"],
            f"{watch[name]['difference']:+.3f}",
            "{:+.3f} to {:+.3f}".format(*watch[name]["interval"]),
        )
        for name, words in named.items()
        if name in watch
    ]
    unmeasured = "" if "reward" in watch else "No reward was measured. "
    shown = "Length" if unmeasured else "Reward, length"
    verdict = unmeasured + (
        f"Look closely: {'; '.join(signs)}."
        if signs
        else f"{shown}, repetition and unfinished answers side by side show no sign of a gamed reward."
    )
    caption = f"Held-out answers to {watch['prompts']} prompts"
    table = html.table(caption, ["", "before", "after", "difference", "95 % interval"], figures, unfolded=True)
    return f'<figure><p class="lead">{escape(verdict)}</p>{table}</figure>'


def _answers(rows: Sequence[Mapping[str, Any]]) -> str:
    """The answers of a few prompts, before and after: by the change of their reward or, without rewards, of their length."""
    by, words = ("reward", "reward") if all(row["aligned_reward"] is not None for row in rows) else ("tokens", "length")
    order = sorted(rows, key=lambda row: row[f"aligned_{by}"] - row[f"sft_{by}"])
    shown = order if len(order) <= 2 * SHOWN else [*order[:SHOWN], *order[-SHOWN:]]

    def answer(row: Mapping[str, Any], who: str, word: str) -> str:
        reward = "" if row[f"{who}_reward"] is None else f", reward {row[f'{who}_reward']:.2f}"
        said = f"{word}{reward}, {row[f'{who}_tokens']} tokens:"
        return f'<p class="text"><span>{said}</span> {html.bdi(row[f"{who}_answer"], 900)}</p>'

    listed = "".join(
        f'<li><p class="text"><b>{html.bdi(row["prompt"], 600)}</b></p>{answer(row, "sft", "before")}{answer(row, "aligned", "after")}</li>'
        for row in shown
    )
    return f'<p class="lead">Those whose {words} fell most, then those whose {words} rose most.</p><ul class="edits">{listed}</ul>'
