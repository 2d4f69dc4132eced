"""The comparison table, and advice derived from it: whether tuning was worth it, and which variant to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagster_project.core.text import NAMES, TITLES, many
from dagster_project.evaluation.paired.bootstrap import FEWEST

Scores = Mapping[str, Mapping[str, Any]]
"""System -> its measures, and the mean tokens of its prompts if it is a language model."""


def board(shown: Sequence[str], scores: Scores, compared: Mapping[str, Any], questions: int | None = None) -> list[str]:
    """The comparison table in Markdown, best first; by perplexity if there are no answers to score.

    Args:
        shown: the deciding measure and a second one.
        questions: those that these measures cover, if not all.
    """
    if not scores:
        return _perplexity_board(compared)
    first, second = shown
    some = next(iter(scores.values()))
    counted = many(questions or some["n"], "answer" if "n_calls" in some else "test example")
    lines = [
        f"| {counted} | {TITLES[first]} | 95 % interval | {TITLES[second]} | prompt tokens |",
        "| --- | ---: | :---: | ---: | ---: |",
    ]
    for name, score in sorted(scores.items(), key=lambda item: -item[1][first]):
        title = NAMES.get(name, f"**{name}**, tuned")
        low, high = score[f"{first}_interval"]
        tokens = f"{score['prompt_tokens']:.0f}" if "prompt_tokens" in score else ""
        lines.append(f"| {title} | {score[first]:.3f} | {low:.3f} to {high:.3f} | {score[second]:.3f} | {tokens} |")
    return lines


def _perplexity_board(compared: Mapping[str, Any]) -> list[str]:
    ratios = {name: found["perplexity_to_base"] for name, found in compared.items() if "perplexity_to_base" in found}
    lines = ["| variant | perplexity as a share of the base model's | 95 % interval |", "| --- | ---: | :---: |"]
    for name in sorted(ratios, key=lambda name: ratios[name]["ratio"]):
        low, high = ratios[name]["interval"]
        lines.append(f"| **{name}**, tuned | {ratios[name]['ratio']:.3f} | {low:.3f} to {high:.3f} |")
    return lines


def advice(decides: str, scores: Scores, compared: Mapping[str, Any], test: Mapping[str, int]) -> list[str]:
    """Verdict on each variant, comparisons between variants, and the next step if the result is inconclusive.

    Args:
        compared: variant -> differences to other systems, `perplexity_to_base` and `failed_checks`, each if available.
        test: numbers of test `examples` and of `answered` ones; of those `decided` by the deciding measure, near-copies
            counted once, if there are fewer; and of `independent` examples, near-copies counted once, if any are
            near-copies.
    """
    found = [_verdict(name, decides, scores, compared[name], test) for name in compared]
    ranked = sorted((name for name in compared if name in scores), key=lambda name: -scores[name][decides])
    few = measured(scores, test)
    if few < FEWEST and compared:
        return [f"{_too_few_examples(few, test)} {MORE}", *found]
    found += [_between(ranked[0], other, decides, compared[ranked[0]]) for other in ranked[1:]]
    return found + ([OPEN_TEXT] if ranked and decides == OPEN else [])


def measured(scores: Mapping[str, Any], test: Mapping[str, int]) -> int:
    """Test examples that a conclusion rests on.

    Where some references are text and others tool calls, the deciding measure does not cover all; near-copies count
    once.

    Args:
        scores: empty if the conclusion rests on perplexity.
    """
    return test.get("decided", test["answered"]) if scores else test.get("independent", test["examples"])


SIMULTANEOUS = "simultaneous_interval"
"""Key of an interval that holds together with those of the same comparison of the other variants."""
OPEN = "rouge_l"
"""The deciding measure for open text (`metrics.measures`)."""
OPEN_TEXT = (
    "Open text has many right answers, and ROUGE-L compares with one of them. Next step: let people vote blindly"
    " between two systems (`pedigree ballots export`), or a judge model (`pedigree judge --endpoint URL --model NAME`)."
)
MORE = "Add examples, or raise splits.test or evaluation.max_examples in params.yaml."


def _too_few_examples(answers: int, test: Mapping[str, int]) -> str:
    examples = many(answers, "test example") + counted_once(test)
    return f"Nothing can be concluded from {examples}: at least {FEWEST} are needed."


def counted_once(test: Mapping[str, int]) -> str:
    """How test examples are counted, in a sentence, if any are near-copies."""
    return ", near-copies counted once" if "independent" in test else ""


@dataclass(frozen=True)
class Gain:
    """Gain of a tuned variant over the best alternative to tuning."""

    rival: str
    """The alternative, one of NAMES; "" is the base model, by likelihood."""
    gap: float
    low: float
    high: float
    """Ends of the 95 % interval of `gap`, of all variants at once if there are several."""
    words: str
    examples: int
    """Test examples it was measured on."""

    @property
    def enough(self) -> bool:
        return self.examples >= FEWEST

    @property
    def sure(self) -> bool:
        return self.enough and self.low > 0


def best_alternative(decides: str, found: Mapping[str, Any]) -> str | None:
    """The alternative to tuning, one of NAMES, that a variant is compared with; None if no answers were compared.

    Args:
        found: the variant's comparisons.
    """
    against = {other: by_measure for other, by_measure in found.get("to", {}).items() if other in NAMES}
    return min(against, key=lambda other: against[other][decides]["difference"], default=None)


def _interval(compared: Mapping[str, Any]) -> tuple[float, float]:
    """The interval that decides about a comparison: if several variants are compared, that of all at once."""
    low, high = compared.get(SIMULTANEOUS, compared["interval"])
    return low, high


def _level(compared: Mapping[str, Any]) -> str:
    """What the interval is, in words."""
    return "simultaneous 95 % interval" if SIMULTANEOUS in compared else "95 % interval"


def gain(decides: str, found: Mapping[str, Any], test: Mapping[str, int]) -> Gain | None:
    """Gain of a variant by the deciding measure, or by perplexity without scored answers; None if neither exists.

    Args:
        found: the variant's comparisons.
        test: as in `advice`.
    """
    if rival := best_alternative(decides, found):
        gap = found["to"][rival][decides]
        words = _points(gap, decides, f"the best alternative, {NAMES[rival]}")
        return Gain(rival, gap["difference"], *_interval(gap), words, measured(found["to"], test))
    if "perplexity_to_base" in found:
        return Gain("", *_perplexity_gain(found["perplexity_to_base"]), measured({}, test))
    return None


def _verdict(name: str, decides: str, scores: Scores, found: Mapping[str, Any], test: Mapping[str, int]) -> str:
    gained = gain(decides, found, test)
    failed = found.get("failed_checks", ())
    checks = f" Failed checks: {'; '.join(failed)}." if failed else ""
    if gained is None:
        return f"{name} names labels, and there are none to compare.{checks}"
    more = beside = ""
    if gained.rival:
        more = f" {_instead(gained.rival, decides, scores[name], scores[gained.rival])}"
        # free text has many correct answers; likelihood covers them all
        if decides == OPEN and (ratio := found.get("perplexity_to_base")):
            beside = f" By likelihood: {_perplexity_gain(ratio)[-1]}."
    if not gained.enough and (gained.low > 0 or gained.high < 0):
        chance = "which may be chance with so few examples"
        return f"Nothing can be concluded on tuning {name}: {gained.words}, {chance}.{checks}"
    if gained.sure and failed:
        step = "Look into them before you use it."
        return f"Tuning {name} gained, but its checks failed: {gained.words}.{beside}{checks} {step}"
    if gained.sure:
        return f"Tuning {name} is worth it: {gained.words}.{beside}"
    if gained.high < 0:
        return f"Tuning {name} made it worse: {gained.words}.{more}{beside}{checks}"
    return f"Tuning {name} shows no sure gain: {gained.words}.{more}{beside}{checks}"


def recommended(
    decides: str,
    scores: Scores,
    compared: Mapping[str, Any],
    cost: Mapping[str, Mapping[str, float]],
    test: Mapping[str, int],
) -> dict[str, Any]:
    """The variant to use, if any, and the reason.

    It is the best one that is significantly better than the best alternative and passed its checks; of variants whose
    difference may be chance, the cheapest.

    Args:
        cost: system -> costs, compared in the order of COSTS.
        test: as in `advice`.
    Returns:
        {"variant": name or None, "sure": significantly better than the best alternative, with no failed check,
        "instead": the best alternative, "why"}
    """
    gains = {name: found for name in compared if (found := gain(decides, compared[name], test))}
    if not gains:
        why = "No variant has answers or a perplexity to compare."
        return {"variant": None, "sure": False, "instead": None, "why": why}
    better = {name: found for name, found in gains.items() if found.sure}
    sure = {name: found for name, found in better.items() if not compared[name].get("failed_checks")}
    best = max(sure or better or gains, key=lambda name: gains[name].gap)
    rival = NAMES.get(gains[best].rival, "the base model")
    common: dict[str, Any] = {"variant": best, "sure": bool(sure), "instead": gains[best].rival or None}
    if not gains[best].enough:
        return {**common, "variant": None, "why": f"{_too_few_examples(gains[best].examples, test)} {MORE}"}
    if not better and gains[best].gap <= 0:
        return {**common, "variant": None, "why": f"Use {rival}: no variant is better, and it costs no training."}
    if not better:
        why = f"It has the best score, but is not surely better than {rival}, which costs no training."
        return {**common, "why": why}
    if not sure:
        failed = "; ".join(compared[best]["failed_checks"])
        return {**common, "why": f"It is surely better than {rival}, but its checks failed: {failed}."}
    why = f"It is surely better than {rival}, the best alternative to tuning"
    alike = [name for name in sure if name == best or _may_be_chance(compared[best], name, decides)]
    costs = {name: tuple(cost.get(name, {}).get(what, 0) for what in COSTS) for name in alike}
    cheapest = min(alike, key=lambda name: (costs[name], name != best))
    if cheapest != best:
        figures = _points(compared[best]["to"][cheapest][decides], decides, cheapest)
        why += f". {best} scores more, but perhaps by chance ({figures}), and costs more."
        return {**common, "variant": cheapest, "why": why}
    if others := ", ".join(name for name in alike if name != best):
        return {**common, "why": f"{why}. It has the best score; {others} may be as good, and cost no less."}
    if len(compared) > 1 and gains[best].rival:
        why += ", and has the best score of the variants"
    elif len(compared) > 1:
        why += ", and has the lowest perplexity of the variants, which were not compared with each other"
    return {**common, "why": f"{why}."}


def headline(document: Mapping[str, Any]) -> str:
    """The recommendation in a few words.

    Args:
        document: content of comparison.json.
    """
    compared, name = document["compared"], document["recommended"]["variant"]
    if document["recommended"]["sure"]:
        return f"Use {name}."
    if name is None:
        few = measured(document["scores"], document["test"]) < FEWEST
        return "No conclusion." if few else "Use no variant."
    if compared[name].get("failed_checks"):
        return f"Failed checks: look into {name} first."
    return f"No sure gain: {name}."


COSTS = ("prompt_tokens", "bytes", "tokens")
"""Costs in order of importance: tokens per prompt, bytes on disk, training tokens."""


def _may_be_chance(best: Mapping[str, Any], other: str, decides: str) -> bool:
    """Whether the interval of the difference between the best variant and another includes 0."""
    return other in best.get("to", {}) and _interval(best["to"][other][decides])[0] <= 0


def _perplexity_gain(ratio: Mapping[str, Any]) -> tuple[float, float, float, str]:
    """A perplexity ratio as a gain, the ends of its interval, and a description."""
    first, last = _interval(ratio)
    gap, low, high = 1 - ratio["ratio"], 1 - last, 1 - first
    where, shown = ("above", (-gap, -high, -low)) if gap < 0 else ("below", (gap, low, high))
    value, nearer, farther = (f"{100 * part:.1f}" for part in shown)
    level = _level(ratio)
    return gap, low, high, f"perplexity {value} % {where} the base model's ({level} {nearer} to {farther} %)"


def _points(gap: Mapping[str, Any], decides: str, rival: str) -> str:
    low, high = _interval(gap)
    interval = f"{_level(gap)} {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{100 * gap['difference']:+.1f} points of {TITLES[decides]} over {rival} ({interval})"


def _instead(rival: str, decides: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Score and cost of the best alternative."""
    share = f"{100 * theirs[decides] / ours[decides]:.0f} % of" if ours[decides] else "at least"
    if "prompt_tokens" not in theirs:
        cost = "without tuning a model"
    else:
        longer = round(theirs["prompt_tokens"] - ours.get("prompt_tokens", 0))
        cost = "at no training cost" + (f", for {many(longer, 'more token')} in each prompt" if longer > 0 else "")
    return f"{NAMES[rival][0].upper()}{NAMES[rival][1:]} reaches {share} the tuned score {cost}."


def _between(best: str, other: str, decides: str, found: Mapping[str, Any]) -> str:
    gap = found["to"][other][decides]
    verdict = "is better" if _interval(gap)[0] > 0 else "shows no sure gain"
    return f"{best} {verdict}: {_points(gap, decides, other)}."
