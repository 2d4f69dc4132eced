"""The content of a model's exports, independent of the format. Built from
reports alone, so that a stage can write a card, too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID, uuid5

from dagster_project.core.records import REWARD_METHODS, learns_from_reward_model, with_license
from dagster_project.curation.sources.declarations import with_unknown
from dagster_project.curation.sources.use_policy import judged
from dagster_project.lineage.export.licenses import summarize_licenses

NAMESPACE = UUID("6f1d7c1e-2f0b-5f5e-9a53-0f0c6b1f2a90")
"""Of all ids in exports: uuid5 of the content, so that the same thing has the same id in every export."""


def from_reports(
    address: str,
    reports: Mapping[str, Mapping[str, Any]],
    released: str = "",
    waivers: Sequence[Mapping[str, Any]] = (),
    teachers: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The lineage of a model as recorded in reports: a stage has these, but neither git nor dvc.lock.

    Args:
        address: the model's stage, e.g. merged@lora.
        reports: in flow order, the report of every stage upstream of the model,
            its own if it exists yet, and those of its evaluation.
        released: for a release, its variant; stages of other variants are left out.
        waivers: of checks of the release.
        teachers: as recorded in dvc.lock; None: those of the reports.
    Returns:
        {"model", "sources", "base_model", "licenses", "stages", "training", "environment", "metrics",
        "checks_of_metrics", "untuned", "advice"}, as in `export.summarize`; and "use_policy", the verdict, if the
        project has a use policy; "teachers", the larger models that alignments learned from, "own_answers", the
        alignments that learned from answers of the model that they trained, and "started_from", the training before an
        alignment, if any.
    """
    variant = released or address.partition("@")[2]
    if released:
        reports = {name: reports[name] for name in chain(released, reports)}
    own, training = reports.get(address, {}), _training(address, variant, reports)
    measured = {
        name: report
        for name, report in reports.items()
        if name.startswith("evaluation") and name.partition("@")[2] == variant
    }
    base = with_license(reports.get("base_model", {}))
    whole = next(
        (reports[name] for name in (f"merged_aligned@{released}", f"merged@{released}") if name in reports), own
    )
    sources, read_by = _named_sources(reports)
    taught = _teachers(reports) if teachers is None else teachers
    online = _own_answers(reports)
    return {
        "model": {
            "stage": address,
            "sha256": own.get("output_sha256"),
            "stands_alone": whole.get("merged", _is_complete(address, own)),
        },
        "sources": sources,
        "base_model": {key: base[key] for key in ("origin", "license", "parameters", "dtype", "sha256") if key in base},
        "licenses": summarize_licenses(base, sources, taught),
        "stages": {
            name: _stage(report, read_by.get(name, ()))
            for name, report in reports.items()
            if name not in measured and name not in {"baselines", "comparison"}
        },
        "training": {key: training[key] for key in TRAINING if key in training},
        "environment": training.get("environment", {}),
        "metrics": (
            {
                name: {key: value for key, value in report.items() if key not in NOT_METRICS}
                for name, report in measured.items()
            }
            | (
                {address: {key: own[key] for key in OF_REWARDS if key in own}}
                if address == REWARD_MODEL and own.get("accuracy") is not None
                else {}
            )
        ),
        "checks_of_metrics": {name: _checks(report) for name, report in measured.items()},
        "untuned": reports.get("baselines", {}).get("base", {}),
        "advice": [] if address == REWARD_MODEL else reports.get("comparison", {}).get("advice", []),
        **({"teachers": taught} if taught else {}),
        **({"own_answers": online} if online else {}),
        **_started_from(training, reports),
        **judged([report for name, report in reports.items() if name not in measured], waivers),
    }


def _training(address: str, variant: str, reports: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The report of the training that ended in the model. The last of `reports`
    may be one of the adapters that it was merged of."""
    trained = {name: report for name, report in reports.items() if "environment" in report}
    own = next(
        (trained[name] for name in (address, f"aligned@{variant}", f"adapter@{variant}") if name in trained), None
    )
    return own or next(reversed(trained.values()), {})


def _started_from(training: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the training of the SFT variant took that an alignment started from; empty for other trainings."""
    name = f"adapter@{training.get('adapter')}"
    before = reports.get(name, {})
    taken = {key: before[key] for key in ("method", "steps", "tokens") if key in before}
    return {"started_from": {"training": name, **taken}} if taken else {}


def _is_complete(address: str, own: Mapping[str, Any]) -> bool:
    """Whether the output of a stage that is not one of `merged` is a model that transformers loads, not an adapter."""
    return address in ("release", REWARD_MODEL) or str(own.get("method", "")).lower() in ("full", "bitfit")


def task_of(summary: Mapping[str, Any]) -> str:
    """What the model does, as the Hugging Face Hub names tasks: a reward model
    and a classifier's head generate no text."""
    return "text-classification" if summary["model"]["stage"] == REWARD_MODEL or is_head(summary) else "text-generation"


def is_head(summary: Mapping[str, Any]) -> bool:
    """Whether the model is the head of a classifier."""
    return str(summary["training"].get("method", "")).lower() == "feature_extraction"


def _named_sources(reports: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """The facts on each source, and the sources that each stage read.

    Where stages read several versions of a source, the hash is appended to the name of all but the first, as in audits.
    """
    sources: dict[str, dict[str, Any]] = {}
    read_by: dict[str, list[str]] = {}
    for stage, report in reports.items():
        for path, facts in report.get("sources", {}).items():
            sha256 = facts.get("sha256")
            name = path if sources.get(path, facts).get("sha256") == sha256 else f"{path} {(sha256 or 'unknown')[:8]}"
            sources[name] = with_unknown(facts, path)
            read_by.setdefault(stage, []).append(name)
    return sources, read_by


def _teachers(reports: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"training": name, **report["teacher"]} for name, report in reports.items() if "teacher" in report]


def _own_answers(reports: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of online methods, and of distillations that sampled answers. Their
    number is None in reports of versions that did not count them."""
    return [
        {"training": name, "method": report["method"], "answers": report.get("sampled", {}).get("answers")}
        for name, report in reports.items()
        if report.get("method") in REWARD_METHODS or (report.get("method") == "gkd" and "sampled" in report)
    ]


def chain(variant: str, reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The stages among `reports` that contributed to one variant."""
    aligned = reports.get(f"aligned@{variant}")
    judge = str(reports.get("reward_model", {}).get("model", "")).removeprefix("merged/")
    learns = aligned is not None and learns_from_reward_model(aligned)
    own = {variant, aligned["adapter"], *([judge] if learns else [])} if aligned else {variant}

    merged, has_pairs = _merged_of(own, reports), aligned is not None and aligned.get("reward_target") != "response"

    def contributes(stage: str, of: str) -> bool:
        if stage == "reward_model":
            return learns
        if stage == "adapter" and of in merged:
            return True
        return (
            of == variant or (of in own and stage in {"adapter", "merged"})
            if of
            else has_pairs or learns or stage not in PREFERENCE_STAGES
        )

    # "splits 5d41402a", "adapter@lora 5d41402a": audits name the second version of a stage with its hash
    addresses = {name: name.partition(" ")[0].partition("@") for name in reports}
    return [name for name, (stage, _, of) in addresses.items() if contributes(stage, of)]


def _merged_of(variants: set[str], reports: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The adapters that those of some variants are merged of, also through others."""
    parents = {parent for name in variants for parent in reports.get(f"adapter@{name}", {}).get("merge_of", ())}
    return parents | (_merged_of(parents, reports) if parents else set())


PREFERENCE_STAGES = {"raw_preferences", "preferences"}
"""Stages that only aligned models depend on."""
TRAINING = (
    "method",
    "merge_of",
    "distance_from_weighted_sum",
    "trainable_parameters",
    "trainable_percent",
    "steps",
    "tokens",
    "trained_tokens",
    "dtype",
    "device",
    "loss",
    "validation_loss",
)
REWARD_MODEL = "reward_model"
OF_REWARDS = ("accuracy", "accuracy_interval", "pairs", "by_category")
"""Figures in the report of a reward model that measure it on held-out pairs."""
NOT_METRICS = {"checks", "machine", "passed", "output_sha256"}
NO_CATEGORIES = {"(none)", "(others)"}
"""Names in `by_category` of examples without a category, and of those in rare ones (evaluation/evaluator.py)."""


def _stage(report: Mapping[str, Any], sources: Iterable[str]) -> dict[str, Any]:
    kept = {
        key: report[key]
        for key in ("rows_in", "rows_out", "dropped", "train", "validation", "test", "augmented")
        if key in report
    }
    checks = _checks(report)
    read = {"sources": sorted(sources)} if "sources" in report else {}
    return {"sha256": report.get("output_sha256"), **read, **kept, **({"checks": checks} if checks else {})}


def rows_written(stage: Mapping[str, Any]) -> int | None:
    """Rows in the output of a stage, with the copies that `splits.augment` added; None for other outputs."""
    rows = stage.get("rows_out")
    return None if rows is None else int(rows) + sum(stage.get("augmented", {}).values())


def _checks(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {key: check[key] for key in ("passed", "count", "note") if key in check}
        for name, check in report.get("checks", {}).items()
    }


ROW = re.compile(r".+:\d+")
"""A row as source:row, the form of a waived row that holds no hash of its text."""


def published_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded parameters without ids of records: waivers name rows by the
    beginning of an id, too, and ids are hashes of texts."""

    def published(row: str) -> str:
        return row if ROW.fullmatch(row) else "a record"

    def waiver(given: Mapping[str, Any]) -> dict[str, Any]:
        rows = {"rows": [published(row) for row in given["rows"]]} if given.get("rows") else {}
        pairs = {"pairs": [[published(row) for row in pair] for pair in given["pairs"]]} if given.get("pairs") else {}
        return {**given, **rows, **pairs}

    return {
        name: (
            {**value, "waivers": [waiver(given) for given in value["waivers"]]}
            if isinstance(value, dict) and value.get("waivers")
            else value
        )
        for name, value in parameters.items()
    }


def identity(*parts: Any) -> UUID:
    return uuid5(NAMESPACE, json.dumps(parts, sort_keys=True))


def results(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each measure that has an interval: {"stage", "name", "value", "low", "high"}."""
    return [
        {
            "stage": stage,
            "name": name,
            "value": value,
            "low": figures[f"{name}_interval"][0],
            "high": figures[f"{name}_interval"][1],
        }
        for stage, figures in summary["metrics"].items()
        for name, value in figures.items()
        if f"{name}_interval" in figures
    ]


def limits(summary: Mapping[str, Any]) -> list[str]:
    """Known weaknesses of the model, and what was not measured."""
    lines = []
    for figures in summary["metrics"].values():
        if "test_examples" in figures:
            parts = ["perplexity on all of them"] if figures.get("perplexity") is not None else []
            parts += [f"scores on {figures['n']} answers"] if "n" in figures else []
            lines.append(
                f"Measured on {figures['test_examples']} test examples from the same sources as the training data"
                f"{': ' * bool(parts)}{', '.join(parts)}. On other data: unknown."
            )
        if "pairs" in figures:
            lines.append(
                f"Accuracy is the share of {figures['pairs']['test']} held-out pairs, from the same sources as the"
                " training data, whose chosen answer has the higher reward. On other data: unknown."
            )
        scored = {
            name: group
            for name, group in figures.get("by_category", {}).items()
            if "accuracy" in group and name not in NO_CATEGORIES
        }
        if scored:
            worst = min(scored, key=lambda name: (scored[name]["accuracy"], name))
            what = "pairs" if "pairs" in scored[worst] else "answered"
            lines.append(
                f"Weakest category: {worst}, accuracy {scored[worst]['accuracy']:.3f} on {scored[worst][what]}"
                f" {'answers' if what == 'answered' else what}."
            )
        if "general_knowledge" in figures:
            before = summary["untuned"].get("general_knowledge")
            lines.append(
                f"General knowledge: {figures['general_knowledge']:.3f}"
                + ("." if before is None else f", {before:.3f} before tuning.")
            )
    measured = summary.get("checks_of_metrics", {})
    failed = [
        f"{name} ({stage}): {check.get('note') or check['count']}"
        for stage, checks in [
            *((stage, facts.get("checks", {})) for stage, facts in summary["stages"].items()),
            *measured.items(),
        ]
        for name, check in checks.items()
        if not check["passed"]
    ]
    lines += [f"Check that did not pass: {one}" for one in failed]
    lines += [
        f"{one['training']} learned from {one['folder']}, a larger model: what that was trained on is not recorded."
        for one in summary.get("teachers", ())
    ]
    lines += summary["licenses"]["problems"]
    if not summary["metrics"]:
        lines.append("It was not evaluated.")
    return [*lines, "Safety, bias and toxicity were not measured."]
