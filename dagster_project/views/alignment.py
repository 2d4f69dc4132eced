"""aligned@X -> its page: held-out answers before and after, curves, and signs of reward hacking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster_project.core.context import Documents
from dagster_project.core.records import read_table, write_text
from dagster_project.core.text import many
from dagster_project.views.html import Table, render, share
from dagster_project.views.training import curve_figure, overfitting_since

PLOTS = (
    (
        "Reward",
        "mean of the batch; for pairs, the implicit reward of the policy",
        ("reward", "reward_chosen", "reward_rejected"),
    ),
    ("Accuracy", "share of pairs whose chosen answer has the higher reward", ("accuracy", "validation_accuracy")),
    ("Margin", "between the rewards of a pair", ("margin", "validation_margin")),
    ("KL", "divergence from the reference", ("kl",)),
    ("Length", "tokens per answer", ("response_length",)),
    ("Own answers", "share of passes that learn from answers of the policy", ("on_policy",)),
    ("Likelihood", "negative log-likelihood per token, in nats", ("nll", "validation_nll")),
    ("Loss", "of each step, and on the validation split", ("loss", "validation_loss")),
)
KL_BY_METHOD = {
    "kto": "in nats per answer, estimated on answers to other prompts, or 0 if the estimate is below 0",
    "ppo": "in nats per answer",
}
"""What the KL curve of a method is; that of the others is in nats per token."""
WITHOUT_REFERENCE = (
    "mean of the batch: beta times the log-probability of an answer, as the loss compares it, without a reference"
)
SHOWN = 8
"""Answers shown from each end of the list."""
SAMPLED = 2
"""Answers shown from each end of a step's answers."""


def draw_alignment(documents: Documents) -> None:
    """Write data/pages/aligned/<variant>/alignment.html: metrics, signs of
    reward hacking, curves, and answers before and after."""
    history, metrics = documents.read(documents.pages / "history.json"), documents.report
    if history is None or "watch" not in metrics:
        return
    points = history["curve"]
    components = history.get("components", [])
    by_component = ("Rewards", "mean of the batch for each reward, before its weight", components)
    rewards = (PLOTS[0][0], WITHOUT_REFERENCE if "reference" in metrics else PLOTS[0][1], PLOTS[0][2])
    units = {"KL": f"divergence from the reference, {KL_BY_METHOD.get(metrics['method'], 'in nats per token')}"}
    plots = [(title, units.get(title, note), names) for title, note, names in (rewards, by_component, *PLOTS[1:])]
    figures = [curve_figure(title, note, points, names) for title, note, names in plots]
    sections = {
        "Watch": _watch(metrics["watch"], history["signs"], "reward_model" in metrics, metrics.get("held_out", {})),
        "Curves": {"overfitting_since": overfitting_since(points), "figures": [figure for figure in figures if figure]},
        "Answers": _answers(read_table(documents.out / "samples.parquet")),
    }
    if shards := sorted((documents.out / "answers").glob("*.parquet")):
        sections["Sampled"] = _sampled(shards, components)
    reliable = metrics["checks"].get("reward_model_is_reliable", {"passed": True})
    text = render(
        "alignment.jinja", f"Alignment of {documents.variant}", sections, variant=documents.variant, metrics=metrics,
        warning="" if reliable["passed"] else reliable["note"], figures=_key_figures(metrics),
    )  # fmt: skip
    write_text(documents.pages / "alignment.html", text)


def _key_figures(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    watch, figures = metrics["watch"], []
    if "preference" in metrics:
        agreement = metrics["preference"]["accuracy"]
        figures = [("agreement", share(agreement["aligned"]), f"of held-out pairs, from {share(agreement['sft'])}")]
    if "reward" in watch:
        by = "the rewards" if "held_out" in metrics else "the reward model"
        figures += [
            ("reward", f"{watch['reward']['aligned']:.2f}", f"from {watch['reward']['sft']:.2f}"),
            ("win rate", share(watch["win_rate"]["value"]), f"over the SFT model, by {by}; a tie counts half"),
        ]
    return [
        *figures,
        ("length", f"{watch['tokens']['aligned']:.0f}", f"tokens, from {watch['tokens']['sft']:.0f}"),
        ("distinct word runs", share(watch["distinct"]["aligned"]), f"from {share(watch['distinct']['sft'])}"),
        (
            "KL",
            f"{watch['kl_per_token']:.3f}",
            "nats per token, from the SFT model" if "reference" in metrics else "nats per token",
        ),
    ]


def _watch(watch: Mapping[str, Any], signs: Sequence[str], alone: bool, held_out: Mapping[str, Any]) -> dict[str, Any]:
    """Args:
    alone: whether no reward model scores answers.
    held_out: rewards of tasks, by name.
    """
    named = {
        "reward": "reward",
        "tokens": "tokens per answer",
        "distinct": "share of distinct word runs",
        "unfinished": "share of unfinished answers",
    }
    measured = [(words, watch[name]) for name, words in named.items() if name in watch]
    measured += [(f"reward {name}", found) for name, found in held_out.items() if name != "reward"]
    rows = []
    for words, found in measured:
        low, high = found["interval"]
        difference, interval = f"{found['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}"
        rows.append((words, found["sft"], found["aligned"], difference, interval))
    unmeasured = (
        "There is no reward model: only the answers themselves are watched. " if alone else "No reward was measured. "
    )
    unmeasured = "" if "reward" in watch else unmeasured
    metrics = "Length" if unmeasured else "Reward, length"
    verdict = (
        f"Possible reward hacking: {'; '.join(signs)}."
        if signs
        else f"{metrics}, repetition and unfinished answers show no sign of reward hacking."
    )
    columns = ["", "before", "after", "difference", "95 % interval"]
    table = Table(f"Held-out answers to {many(watch['prompts'], 'prompt')}", columns, rows, folded=False)
    return {"verdict": unmeasured + verdict, "table": table}


def _sampled(shards: Sequence[Path], components: Sequence[str]) -> dict[str, Any]:
    """Answers that the policy learned from in the first, the middle and the last step with any: those with the lowest
    and the highest rewards or, where answers are not rewarded, the shortest and the longest."""
    counts = Counter(row["step"] for shard in shards for row in read_table(shard, ["step"]))
    steps = sorted(counts)
    shown = {steps[i]: list[dict[str, Any]]() for i in (0, len(steps) // 2, -1)}
    for row in (row for shard in shards for row in read_table(shard) if row["step"] in shown):
        shown[row["step"]].append(row)

    by = "reward" if components else "tokens"

    def answer(row: Mapping[str, Any]) -> tuple[str, str, str]:
        parts = ", ".join(f"{name} {row[name]:.3g}" for name in components)
        reward = f"reward {row['reward']:.3g} ({parts}), " if components else ""
        end = ", unfinished" if row["unfinished"] else ""
        text = f"[{row['reasoning']}] {row['answer']}" if row["reasoning"] else row["answer"]
        return f"{reward}{many(row['tokens'], 'token')}{end}:", text, row["example_id"]

    def ends(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
        order = sorted(rows, key=lambda row: float(row[by]))
        return [answer(row) for row in (order if len(order) <= 2 * SAMPLED else [*order[:SAMPLED], *order[-SAMPLED:]])]

    steps_shown = [(step, len(rows), ends(rows)) for step, rows in shown.items()]
    return {"answers": sum(counts.values()), "by": by, "steps": steps_shown}


def _answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Answers before and after to the prompts with the largest changes in reward or, without rewards, in length."""
    by, words = ("reward", "reward") if all(row["aligned_reward"] is not None for row in rows) else ("tokens", "length")
    order = sorted(rows, key=lambda row: row[f"aligned_{by}"] - row[f"sft_{by}"])
    shown = order if len(order) <= 2 * SHOWN else [*order[:SHOWN], *order[-SHOWN:]]

    def answer(row: Mapping[str, Any], who: str, when: str) -> tuple[str, str]:
        reward = "" if row[f"{who}_reward"] is None else f", reward {row[f'{who}_reward']:.2f}"
        return f"{when}{reward}, {row[f'{who}_tokens']} tokens:", row[f"{who}_answer"]

    pairs = [(row["prompt"], [answer(row, "sft", "before"), answer(row, "aligned", "after")]) for row in shown]
    return {"words": words, "rows": pairs}
