"""baselines + evaluation@* -> comparison.

The comparison table of all variants, and advice: whether tuning was worth it, and which variant to use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.params import Section
from dagster_project.core.records import Report, read_records, read_table, write_json, write_text
from dagster_project.core.text import NAMES
from dagster_project.evaluation.alarms import scores_differ
from dagster_project.evaluation.comparison import SIMULTANEOUS, advice, best_alternative, board, headline, recommended
from dagster_project.evaluation.custom_metrics import custom_measures
from dagster_project.evaluation.evaluator import BASE, Settings, select_questions, turn_key
from dagster_project.evaluation.metrics import perplexity
from dagster_project.evaluation.paired.bootstrap import (
    difference,
    drawn_differences,
    drawn_ratios,
    ratio,
    simultaneous_intervals,
    summed,
    unit,
)
from dagster_project.evaluation.retention import forgot, retained
from dagster_project.evaluation.samples import sample
from dagster_project.evaluation.scoring import Scoring
from dagster_project.training.inference.answers import Answer, of_row

if TYPE_CHECKING:
    import numpy as np

LIKELIHOOD = "perplexity_to_base"
CHECK_DESCRIPTIONS = {"scores_differ": "No measure gives every answer of every system the same score."}


@dataclass(frozen=True)
class Variant:
    """Paths and status of one variant."""

    evaluation: Path
    """Folder of its evaluation results."""
    model: Path
    """Folder of the model that would be used."""
    training: Path
    """training.json of its training."""
    before: Path | None = None
    """training.json of the training it started from, if any."""
    trained: str = "adapter"
    """Stage that trained it: adapter or aligned."""
    failed_checks: Sequence[str] = ()
    """Failed checks of the stages that produced and evaluated it, with stage and note."""


class Params(Section):
    """No parameters: the stage uses the section `evaluation`."""


def validate(params: Params, ctx: ValidationContext) -> None:
    """Nothing to check."""


FOLDERS = {"adapter": ("evaluation", "merged"), "aligned": ("evaluation_aligned", "merged_aligned")}
"""Training stage -> the stages with a variant's results and its model."""


def run(ctx: StageContext) -> Report:
    variants: dict[str, Variant] = {}
    for trained, (evaluation, merged) in FOLDERS.items():
        for name, entry in ctx.values[trained].items():
            trainings = _trainings(trained, name, entry, ctx.values["adapter"])
            before = ctx.outputs_of("adapter") / entry["adapter"] / "training.json" if trained == "aligned" else None
            variants[name] = Variant(
                evaluation=ctx.outputs_of(evaluation) / name,
                model=ctx.outputs_of(merged) / name,
                training=ctx.outputs_of(trained) / name / "training.json",
                before=before,
                trained=trained,
                failed_checks=_failed_checks(ctx, [*trainings, f"{merged}@{name}", f"{evaluation}@{name}"]),
            )
    settings, scores_file = ctx.params("evaluation", Settings), ctx.plot("scores")
    splits, baselines, base_model = ctx.output_of("splits"), ctx.output_of("baselines"), ctx.output_of("base_model")
    return produce(ctx.root, settings, variants, splits, baselines, base_model, ctx.out, scores_file, ctx.pages)


def _trainings(trained: str, name: str, entry: Mapping[str, Any], adapters: Mapping[str, Any]) -> list[str]:
    """Stages that trained a variant; for an aligned one, including those of the SFT variant it started from."""
    if trained == "adapter":
        return [*_merged_of(adapters, name), f"adapter@{name}"]
    first = entry["adapter"]
    return [*_merged_of(adapters, first), f"adapter@{first}", f"merged@{first}", f"aligned@{name}"]


def _merged_of(adapters: Mapping[str, Any], name: str) -> list[str]:
    """The stages of the adapters that an adapter is merged of, also through others."""
    parents = (adapters[name] or {}).get("merge_of") or {}
    return list(dict.fromkeys(stage for one in parents for stage in (*_merged_of(adapters, one), f"adapter@{one}")))


def _failed_checks(ctx: StageContext, addresses: Sequence[str]) -> list[str]:
    """The failed checks of stages, e.g. "learned of adapter@lora: validation loss 1.2 -> 1.4"."""
    failed: list[str] = []
    for address in addresses:
        for check, result in ctx.report(address).get("checks", {}).items():
            if not result["passed"]:
                failed.append(f"{check} of {address}: {result.get('note') or result['count']}")
    return failed


def produce(
    root: Path,
    settings: Settings,
    variants: Mapping[str, Variant],
    splits: Path,
    baselines: Path,
    base_model: Path,
    out: Path,
    scores_file: Path,
    pages: Path,
) -> Report:
    """Compare all variants with baselines and each other; write table, advice and samples.

    Args:
        variants: the variants to compare, by name.
    """
    train, validation, test = (read_records(splits / name) for name in ("train", "validation", "test"))
    task, questions = select_questions(test, settings, train)
    scoring = Scoring(questions, task, custom_measures(root, settings.metrics))
    results_of = _results([baselines, *(variant.evaluation for variant in variants.values())])
    answers: dict[str, list[Answer]] = {}
    scores: dict[str, dict[str, Any]] = {}
    writes: dict[str, bool] = {}
    for name in (*NAMES, *variants):
        found = [results_of[name][turn_key(record)] for record in questions] if name in results_of else []
        if found and all(row["answer"] is not None for row in found):
            lengths = [row["prompt_tokens"] for row in found]
            writes[name], answers[name] = None not in lengths, [of_row(row) for row in found]
            cost = {"prompt_tokens": round(sum(lengths) / len(lengths), 1)} if writes[name] else {}
            scores[name] = scoring.score(answers[name], writes[name]) | cost

    compared: dict[str, Any] = {}
    likelihoods = {name: sums for name in variants if (sums := _likelihoods(results_of[name], results_of[BASE], test))}
    for name, variant in variants.items():
        compared[name] = {LIKELIHOOD: ratio(perplexity, *likelihoods[name])} if name in likelihoods else {}
        if name in scores:
            others = [other for other in scores if other != name]
            compared[name]["to"] = {other: _differences(scoring, answers, writes, name, other) for other in others}
        of_base, of_variant = (read_table(file / "retention.parquet") for file in (baselines, variant.evaluation))
        if kept := retained(of_base, of_variant):
            compared[name]["retention"] = kept
        if variant.failed_checks:
            compared[name]["failed_checks"] = list(variant.failed_checks)
    first, second, *_ = scoring.names()
    _add_simultaneous_intervals(first, scoring, answers, writes, compared, likelihoods)
    costs = {name: _cost(name, scores, base_model, variants) for name in dict.fromkeys((*scores, *variants))}
    trained = {record["group_id"] for record in train + validation}
    test_counts = _test_counts(test, scoring, len(questions), first, trained)
    unknown = {"tokens": math.inf}  # an unknown cost does not count as low
    dearest = {name: unknown | cost if name in variants else cost for name, cost in costs.items()}
    document: dict[str, Any] = {
        "test": test_counts,
        "shown": [first, second],
        "scores": scores,
        "compared": compared,
        "costs": costs,
        "advice": advice(first, scores, compared, test_counts),
        "recommended": recommended(first, scores, compared, dearest, test_counts),
    }
    kept = {name: compared[name].get("retention", {}) for name in compared}
    document["advice"] += [line for name, found in kept.items() for line in forgot(name, found, settings.forgetting)]
    write_text(out / "board.md", _board(document))
    write_json(out / "comparison.json", document)
    write_text(scores_file, _plot(first, scores, compared))
    marks = {name: scoring.marks(answers[name], writes[name]) for name in scores}
    samples = [
        sample(record, {name: answers[name][i] for name in scores}, {name: marks[name][i] for name in scores})
        for i, record in enumerate(questions)
    ]
    by_stage = {name: variant.trained for name, variant in variants.items()}
    write_json(pages / "samples.json", {"headline": headline(document), "trained": by_stage, "samples": samples})
    shown = {name: {key: found[key] for key in (first, second)} for name, found in scores.items()}
    facts = {key: document[key] for key in ("compared", "costs", "recommended", "advice")}
    return Report(metrics={"scores": shown, **facts}, checks=[scores_differ(_values(scoring, answers, writes))])


def _results(folders: Iterable[Path]) -> dict[str, dict[tuple[str, int], dict[str, Any]]]:
    """System -> its rows of the results tables, by `turn_key`."""
    results_of: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for folder in folders:
        for row in read_table(folder / "results.parquet"):
            results_of.setdefault(row["system"], {})[turn_key(row)] = row
    return results_of


def _board(document: Mapping[str, Any]) -> str:
    """The table of scores, the advice and the recommendation, in Markdown."""
    recommendation = document["recommended"]
    decided = recommendation["sure"] or not recommendation["variant"]
    last = f"Recommended: {recommendation['variant'] or 'no variant'}." if decided else headline(document)
    table = board(document["shown"], document["scores"], document["compared"], document["test"].get("questions"))
    return "\n".join([*table, "", *document["advice"], f"{last} {recommendation['why']}"]) + "\n"


def _test_counts(
    test: Sequence[Mapping[str, Any]], scoring: Scoring, questions: int, deciding: str, trained: Collection[str]
) -> dict[str, int]:
    """How many test examples there are, and on how many the comparison rests.

    Args:
        questions: how many were asked.
        deciding: the measure that decides.
        trained: groups with examples that were trained on.
    """
    answered = set(scoring.examples)  # of equal examples, which a policy may keep, each one counts
    counts = {"examples": len(test), "answered": sum(record["example_id"] in answered for record in test)}
    decided = scoring.examples_of(deciding)  # those that the deciding measure covers, near-copies counted once
    if decided < counts["answered"]:
        counts["decided"] = decided
    covered = scoring.questions_of(deciding)  # those that the deciding measure covers
    if covered < questions:
        counts["questions"] = covered
    independent = len({unit(record) for record in test})  # near-copies counted once
    if independent < len(test):
        counts["independent"] = independent
    return counts | {"seen": sum(record["group_id"] in trained for record in test)}


def _likelihoods(
    rows: Mapping[tuple[str, int], Mapping[str, Any]],
    base: Mapping[tuple[str, int], Mapping[str, Any]],
    test: Sequence[Mapping[str, Any]],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Nats and tokens of a variant and of the base model by unit, (units, 2); None if they cannot be compared.

    A classifier has no perplexity; those of two chat templates are not comparable if one of them omits traces or calls.
    Examples without tokens, whose prompts alone fill the context, do not count.

    Args:
        rows: the variant's rows of the results table, by `turn_key`.
        base: those of the base model.
        test: the test split; each of several equal examples counts.
    """
    import numpy as np

    keys = [turn_key(record) for record in test]
    ours, theirs = (
        np.array([(found[key]["nll"], found[key]["tokens"]) for key in keys], dtype=float) for found in (rows, base)
    )
    counted = theirs[:, 1] > 0
    if not np.isfinite([ours, theirs]).all() or (ours[:, 1] != theirs[:, 1]).any() or not counted.any():
        return None
    drawn = [unit(record) for record, has_tokens in zip(test, counted, strict=True) if has_tokens]
    return summed(ours[counted], drawn), summed(theirs[counted], drawn)


def _add_simultaneous_intervals(
    decides: str,
    scoring: Scoring,
    answers: Mapping[str, Sequence[Answer]],
    writes: Mapping[str, bool],
    compared: Mapping[str, Any],
    likelihoods: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Where several variants are compared: of each with its best alternative, with each other, and with the base model
    by likelihood.

    Args:
        compared: variant -> its comparisons, which get the intervals.
        likelihoods: variant -> as `_likelihoods` gives them.
    """

    def drawn(name: str, other: str) -> np.ndarray:
        ours, theirs = (scoring.statistics(decides, answers[system], writes[name]) for system in (name, other))
        return drawn_differences(scoring.combine(decides, writes[name]), ours, theirs)

    alternatives = {name: other for name in compared if (other := best_alternative(decides, compared[name]))}
    between = [(a, b) for a, b in combinations(compared, 2) if b in compared[a].get("to", {})]
    for pairs in ([*alternatives.items()], between):
        found = simultaneous_intervals([drawn(*pair) for pair in pairs]) if len(pairs) > 1 else []
        for (name, other), (low, high) in zip(pairs, found, strict=False):
            compared[name]["to"][other][decides][SIMULTANEOUS] = [low, high]
            if other in compared:
                compared[other]["to"][name][decides][SIMULTANEOUS] = [0.0 - high, 0.0 - low]  # not -0.0
    if len(likelihoods) > 1:
        found = simultaneous_intervals([drawn_ratios(perplexity, *sums) for sums in likelihoods.values()])
        for name, interval in zip(likelihoods, found, strict=True):
            compared[name][LIKELIHOOD][SIMULTANEOUS] = interval


def _values(
    scoring: Scoring, answers: Mapping[str, Sequence[Answer]], writes: Mapping[str, bool]
) -> dict[str, list[np.ndarray]]:
    """Measure -> for each system that has it, the contribution of each of its answers.

    Only measures that are compared between systems.
    """
    values: dict[str, list[np.ndarray]] = {}
    for system, of_system in answers.items():
        for name, paired in scoring.names(writes[system]).items():
            if paired:
                values.setdefault(name, []).append(scoring.values(name, of_system, writes[system]))
    return values


def _differences(
    scoring: Scoring, answers: Mapping[str, Sequence[Answer]], writes: Mapping[str, bool], name: str, other: str
) -> dict[str, Any]:
    """Paired differences of a variant to another system, by measure."""
    theirs = scoring.names(writes[other])
    differences: dict[str, Any] = {}
    for key, paired in scoring.names(writes[name]).items():
        if paired and key in theirs:
            of_both = (scoring.statistics(key, answers[system], writes[name]) for system in (name, other))
            differences[key] = difference(scoring.combine(key, writes[name]), *of_both)
    return differences


TAKEN = ("tokens", "trained_tokens", "steps")
"""What a training takes; of an adapter that is merged of others, their trainings. A training command may not record it,
and alignment counts no `trained_tokens`."""


def _cost(
    name: str, scores: Mapping[str, Mapping[str, Any]], base_model: Path, variants: Mapping[str, Variant]
) -> dict[str, float]:
    """Costs of a system: tokens per prompt, bytes on disk, training tokens. Empty for the classical classifier.

    A variant that was not merged needs the base model, too.
    """
    prompt = {"prompt_tokens": scores[name]["prompt_tokens"]} if "prompt_tokens" in scores.get(name, {}) else {}
    if name not in variants:
        return {**prompt, "bytes": _size(base_model)} if prompt else {}
    files = [file for file in (variants[name].before, variants[name].training) if file]
    trainings = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    taken = {key: sum(one[key] for one in trainings) for key in TAKEN if all(key in one for one in trainings)}
    folder = variants[name].model
    needed = [folder] if _stands_alone(folder) else [folder, base_model]
    return {**prompt, "bytes": sum(map(_size, needed)), **taken}


def _stands_alone(folder: Path) -> bool:
    """Whether a folder is a complete model, and neither an adapter nor the head of a classifier."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _plot(decides: str, scores: Mapping[str, Mapping[str, Any]], compared: Mapping[str, Any]) -> str:
    """The scores for `dvc plots`, best first: by the deciding measure, or by perplexity relative to the base model."""
    rows: list[tuple[str, str, float, float, float]]
    if scores:
        rows = [(name, decides, found[decides], *found[f"{decides}_interval"]) for name, found in scores.items()]
        rows.sort(key=lambda row: -row[2])
    else:
        measure = LIKELIHOOD
        ratios = {name: found[measure] for name, found in compared.items() if measure in found}
        rows = [(name, measure, found["ratio"], *found["interval"]) for name, found in ratios.items()]
        rows.sort(key=lambda row: row[2])
    lines = [("system", "measure", "score", "low", "high"), *rows]
    return "".join(f"{','.join(map(str, line))}\n" for line in lines)
