"""preferences + a model -> reward_model.

A model that scores answers, trained on preference pairs; tested on held-out pairs, and compared with answer length as a
predictor.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.messages import full_text
from dagster_project.core.params import Compute
from dagster_project.core.records import (
    CheckResult,
    Report,
    read_preferences,
    remove,
    write_json,
    write_table,
    write_text,
)
from dagster_project.evaluation.paired.bootstrap import difference, independent, rate, rounded, summed, unit, wilson
from dagster_project.training.methods import options as methods
from dagster_project.training.methods.hardware import (
    import_libraries,
    peak_memory,
    prepare,
    return_large_blocks,
    reuse_large_blocks,
)
from dagster_project.training.tokens.preference_pairs import both, refuse_misfits
from dagster_project.training.trainers.alignment import reward_model
from dagster_project.training.trainers.alignment.trl_trainers.training import document_of, preference_identity, train
from dagster_project.training.trainers.harness import sharding, weight_audit
from dagster_project.training.trainers.harness.checkpoint import Checkpoints, refuse_full_disk
from dagster_project.training.trainers.harness.curve import write_curve
from dagster_project.training.trainers.harness.distributed import claim_gpu, document_from_first, place
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.launch import (
    portable,
    report_document,
    report_of_group,
    settings_document,
    start_others,
)
from dagster_project.training.trainers.harness.params import PreferenceParams, refuse_unmerged, refuse_warmup
from dagster_project.training.trainers.harness.session import Diverged, Interrupted, advice_on_memory
from dagster_project.training.trainers.harness.sharding import ShardedModel
from dagster_project.training.trainers.harness.weight_audit import WeightAudit, WeightChange

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pedigree")

CHECK_DESCRIPTIONS = {
    "learned": "Every loss and every trained weight is finite.",
    "trained_what_it_should": "Every group of trainable weights moved, and no frozen weight did.",
    "prefers_as_people_do": "The accuracy on held-out pairs is at least `min_accuracy`.",
    "rewards_differ": "Not all held-out answers have the same reward.",
    "better_than_length": "The lower limit of this accuracy's interval is above the accuracy of choosing by length.",
}

BINS = 10
CURVE = ("loss", "accuracy", "margin", "learning_rate", "grad_norm")
"""Columns of the training curve, between step and tokens."""


class Params(PreferenceParams):
    """How the reward model is trained on preference pairs. See docs/alignment.md."""

    model: str = Field(pattern=r"^(base_model|merged/[\w-]+)$")
    """The model to start from: `base_model`, or `merged/NAME`, the model of an SFT variant."""
    method: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter and the output layer, and merges them. `full` trains every weight."""
    peft: dict[str, Any] = {}
    """Keys of LoRA, as PEFT names them."""
    margins: bool = False
    """Require the rewards of a pair to differ by at least its `margin` (Touvron et al. 2023, arXiv 2307.09288, eq. 2).
    Every pair needs a margin, which is not negative."""
    center_rewards_coefficient: float | None = Field(default=None, gt=0)
    """Weight of the squared sum of a pair's rewards in the loss, which moves their mean to 0; 0.01 is usual. null:
    none."""
    min_accuracy: float = Field(default=0.6, ge=0, le=1)
    """Held-out pair accuracy below which rloo, grpo, online_dpo and ppo refuse to use it. Methods that learn from given
    pairs continue, and their reports say so."""


def validate(params: Params, ctx: ValidationContext) -> None:
    if params.model != "base_model":
        refuse_unmerged(ctx.values["adapter"], params.model.removeprefix("merged/"), "reward_model.model")
    refuse_warmup(params, "reward_model")
    methods.refuse_untrained(params.peft, "reward_model")
    methods.check("lora", params.peft, params.quantization, True, "reward_model")
    if params.peft.get("lora_dropout"):
        problem = "has no effect, it is trained without dropout"
        raise InputError(f"params.yaml: reward_model.peft.lora_dropout: {problem}", "leave it out")
    if params.method == "full":
        if params.peft:
            problem = "params.yaml: reward_model.peft: full trains every weight, without an adapter"
            raise InputError(problem, "leave it out, or use method: lora")
        methods.check("full", {}, params.quantization, True, "reward_model")
    sharding.check(params, ctx.compute, "reward_model", params.method)


def run(ctx: StageContext) -> Report:
    params = ctx.params("reward_model", Params)
    return produce(
        params,
        ctx.compute,
        ctx.output_of("preferences"),
        ctx.root / "data" / params.model,
        out=ctx.out,
        curve_file=ctx.plot("reward"),
        calibration_file=ctx.plot("calibration"),
        checkpoints=ctx.checkpoints,
        live=ctx.live,
    )


def produce(
    params: Params,
    compute: Compute,
    preferences: Path,
    folder: Path,
    out: Path,
    curve_file: Path,
    calibration_file: Path,
    checkpoints: Path,
    live: Path | None = None,
) -> Report:
    """Train the reward model, in several processes if the parameters say so, and evaluate it on held-out pairs.

    No failed check blocks: whether the reward model is good enough is decided by the stage that uses it (`aligned`).

    Args:
        folder: the model to start from.
        checkpoints: the stage's folder, which survives a killed run. It is removed at the end.
    """
    if params.sharding and compute.processes > 1 and place().size == 1:
        read = {"preferences": preferences, "folder": folder}
        written = {"out": out, "curve_file": curve_file, "calibration_file": calibration_file}
        kept = {"checkpoints": checkpoints, "live": live}
        return report_of_group(__name__, params, compute, {**read, **written, **kept})
    import_libraries()
    claim_gpu()
    device, dtype = prepare(compute)
    reuse_large_blocks()
    pairs = {split: read_preferences(preferences / split) for split in ("train", "validation", "test")}
    if not any(pairs.values()):
        return _without_pairs(out, curve_file, calibration_file)
    _refuse(pairs, params, folder)
    advice = ""
    if params.model == "base_model":
        advice = "use base_model.chat_template: hermes, or reward_model.model: merged/NAME with tokenized.chat_template"
    refuse_misfits(reward_model.tokenizer_of(folder), pairs, params.model, advice)
    with advice_on_memory():
        shared = _build(params, folder, device, dtype)
    model = shared.model
    trained = sum(weight.nbytes for weight in weight_audit.trainable(model).values())
    needs = {checkpoints: trained * (1 + 3 * (params.save_total_limit + 1))}
    refuse_full_disk(needs | {out: 2 * sum(weight.nbytes for weight in model.parameters())}, "reward_model")
    audit = WeightAudit(model, checkpoints)
    identity = preference_identity(params, compute, device, dtype, preferences, {"model": folder}, Path(__file__))
    resumable = Checkpoints(checkpoints, identity, params.save_total_limit, sharded=params.sharding is not None)
    inputs = {"preferences": preferences, "folder": folder, "checkpoints": checkpoints}
    folders = {name: portable(path) for name, path in inputs.items()}
    start_others(settings_document(params, compute) | {"folders": folders}, __name__)
    history = _train(shared, reward_model.tokenizer_of(folder), pairs, params, compute, resumable, live)
    document_from_first({"evaluates": not isinstance(history, CheckResult)})
    if isinstance(history, CheckResult):
        remove(checkpoints)
        return _without_weights(history, out, curve_file, calibration_file)
    change = audit.change()
    document = document_of(history, change, params.settings(), compute, device, dtype)
    if place().size > 1:
        document["processes"] = place().size
    write_json(out / "training.json", document)
    seen = weight_audit.seen_examples(history.seen, [[pair["example_id"]] for pair in pairs["train"]])
    write_table(out / "examples.parquet", seen, weight_audit.seen_schema())
    write_curve(curve_file, history.curve, CURVE)
    if params.quantization != "none":
        model = reward_model.unquantized(model, folder, params.peft)
    reward_model.save(model, folder, out)
    del model, shared
    return_large_blocks()
    scorer = reward_model.RewardModel(out, device, dtype, params.sharding)
    quality = sharding.in_step([scorer.shared], lambda: _evaluate(scorer, pairs, calibration_file))
    metrics = {
        "model": params.model,
        "method": params.method,
        "steps": history.step,
        "tokens": history.tokens,
        "loss": round(history.losses[-1], 4),
        "pairs": {split: len(of_split) for split, of_split in pairs.items()},
        **quality,
        "environment": document["versions"],
    }
    checks = _checks(history, change, quality, len(pairs["test"]), params)
    measured = {"training_seconds": round(history.seconds, 1), "peak_memory_bytes": peak_memory(device.type)}
    reward_model.write_quality(out, checks)
    remove(checkpoints)
    return Report(metrics=metrics, checks=checks, measured=measured)


def first_process(work: Mapping[str, Any]) -> dict[str, Any]:
    """Work of the first process of a group: all of the stage."""
    params, compute = Params.model_validate(work["params"]), Compute.model_validate(work["compute"])
    return report_document(produce(params, compute, **{name: Path(path) for name, path in work["folders"].items()}))


def other_process(work: Mapping[str, Any]) -> None:
    """Work of the other processes: the same training, then the passes of the evaluation.

    They write nothing but parts of checkpoints.
    """
    params, compute = Params.model_validate(work["params"]), Compute.model_validate(work["compute"])
    folders = {name: Path(path) for name, path in work["folders"].items()}
    preferences, folder, checkpoints = folders["preferences"], folders["folder"], folders["checkpoints"]
    device, dtype = prepare(compute)
    reuse_large_blocks()
    pairs = {split: read_preferences(preferences / split) for split in ("train", "validation")}
    shared = _build(params, folder, device, dtype)
    with suppress(Interrupted):  # the first process reports it
        _train(shared, reward_model.tokenizer_of(folder), pairs, params, compute, Checkpoints(checkpoints, {}), None)
        if document_from_first()["evaluates"]:
            del shared
            return_large_blocks()
            scorer = reward_model.RewardModel(folder, device, dtype, params.sharding)
            sharding.in_step([scorer.shared], lambda: None)


def _build(params: Params, folder: Path, device: torch.device, dtype: torch.dtype) -> ShardedModel:
    """The untrained model."""
    import torch

    peft = params.peft if params.method == "lora" else None
    whole_at = torch.device("cpu") if params.sharding and params.quantization == "none" else device
    model = reward_model.build(folder, peft, whole_at, dtype, "reward_model", params.quantization)
    return ShardedModel(model, params.sharding, device)


def _train(
    shared: ShardedModel,
    tokenizer: Any,
    pairs: Mapping[str, Sequence[Any]],
    params: Params,
    compute: Compute,
    checkpoints: Checkpoints,
    live: Path | None,
) -> TrainingHistory | CheckResult:
    """Train the model in place; it is whole in the first process afterwards.

    Returns the failed check `learned` if a loss or a trained weight is not finite.
    """
    spec = reward_model.trainer_spec(params.center_rewards_coefficient)
    rows = {split: _rows(tokenizer, pairs[split], params.margins) for split in ("train", "validation")}
    try:
        history = train(spec, shared, tokenizer, rows["train"], rows["validation"], params, compute, checkpoints, live)
    except Diverged as diverged:
        ids = [pairs["train"][row]["example_id"] for row in diverged.rows]
        note = f"{diverged}; lower reward_model.learning_rate, and look at the pairs of that step"
        return CheckResult("learned", passed=False, count=len(ids), rows=ids[:20], note=note)
    shared.join()
    weights = weight_audit.trainable(shared.model).values() if place().rank == 0 else ()
    finite_weights = (bool(weight.isfinite().all()) for weight in weights)
    if not (all(map(math.isfinite, history.losses)) and all(finite_weights)):
        note = "a loss or a trained weight is not finite; lower reward_model.learning_rate"
        return CheckResult("learned", passed=False, note=note)
    return history


def _checks(
    history: TrainingHistory, change: WeightChange, quality: Mapping[str, Any], test_pairs: int, params: Params
) -> list[CheckResult]:
    accuracy, (low, high) = quality["accuracy"], quality["accuracy_interval"]
    rule, length, spread = quality["length_rule"], quality["length_rule_says"], quality["reward"]["spread"]
    fell = f"loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f}"
    found = f"accuracy {accuracy:.3f} ({low:.3f} to {high:.3f}) on {test_pairs} pairs"
    least = f"reward_model.min_accuracy is {params.min_accuracy}"
    spreads = f"standard deviation {spread:g} of the rewards of held-out answers"
    by_length = f"accuracy {accuracy:.3f}, at least {low:.3f}; the {length} answer is the chosen one in {rule:.3f}"
    return [
        CheckResult("learned", passed=True, note=fell),
        replace(change.check(), blocking=False),
        CheckResult("prefers_as_people_do", passed=accuracy >= params.min_accuracy, note=f"{found}, {least}"),
        CheckResult("rewards_differ", passed=spread > 0, note=spreads),
        CheckResult("better_than_length", passed=low > rule, severity="warn", note=by_length),
    ]


def _without_pairs(out: Path, curve_file: Path, calibration_file: Path) -> Report:
    """The outputs of a project without preferences: every file of dvc.yaml, without rows."""
    write_json(out / "training.json", {"pairs": 0})
    write_curve(curve_file, [], CURVE)
    _write_calibration(calibration_file, [])
    checks = [CheckResult(name, passed=True, note="there are no preferences") for name in CHECK_DESCRIPTIONS]
    return Report(metrics={"pairs": 0}, checks=checks)


def _without_weights(failed: CheckResult, out: Path, curve_file: Path, calibration_file: Path) -> Report:
    """The outputs of a training that ended with unusable weights: every file of dvc.yaml."""
    reward_model.write_quality(out, [failed])
    write_curve(curve_file, [], CURVE)
    _write_calibration(calibration_file, [])
    return Report(checks=[failed])


def _write_calibration(path: Path, bins: Sequence[tuple[float, float, int]]) -> None:
    """Write mean confidence, accuracy and number of held-out pairs of each bin that has any."""
    write_text(path, "\n".join(["confidence,accuracy,pairs", *(f"{c:.4f},{a:.4f},{n}" for c, a, n in bins)]) + "\n")


def _refuse(pairs: Mapping[str, Sequence[Any]], params: Params, folder: Path) -> None:
    """Find faults before a model is loaded that would otherwise fail late.

    Raises:
        InputError: there is one.
    """
    for split in ("train", "test"):
        if not pairs[split]:
            hint = "name more pairs in raw_preferences.sources"
            raise InputError(f"data/preferences: no pair in the {split} split", hint)
    if not (folder / "config.json").is_file():
        problem = f"params.yaml: reward_model.model: {params.model} is not a standalone model"
        raise InputError(problem, "name a variant that is merged, or base_model")
    if params.margins and (without := sum(pair["margin"] is None for split in pairs.values() for pair in split)):
        raise InputError(f"params.yaml: reward_model.margins: {without} pairs have no margin", "set margins: false")
    if params.margins and (below := sum(pair["margin"] < 0 for split in pairs.values() for pair in split)):
        problem = f"{below} pairs have a margin below 0, as if the rejected answer were better"
        hint = "swap the answers of these pairs in their source, or set margins: false"
        raise InputError(f"params.yaml: reward_model.margins: {problem}", hint)


def _rows(tokenizer: Any, pairs: Sequence[Mapping[str, Any]], margins: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for pair, (prompt, chosen, rejected) in zip(pairs, both(tokenizer, pairs), strict=True):
        margin = {"margin": pair["margin"]} if margins else {}
        rows.append({"chosen_ids": [*prompt, *chosen], "rejected_ids": [*prompt, *rejected], **margin})
    return rows


def _evaluate(
    model: reward_model.RewardModel, pairs: Mapping[str, Sequence[Mapping[str, Any]]], calibration_file: Path
) -> dict[str, Any]:
    """Held-out accuracy, the accuracy of choosing by length, and the calibration of the model."""
    import numpy as np

    test = pairs["test"]
    conversations = [[*pair["prompt"], *pair[side]] for side in ("chosen", "rejected") for pair in test]
    tools = [pair.get("tools") for pair in test] * 2
    rewards = model(conversations, what="reward model, held-out pairs", tools=tools)
    chosen, rejected = np.array(rewards[: len(test)]), np.array(rewards[len(test) :])
    right = (chosen > rejected) + 0.5 * (chosen == rejected)

    def longer(split: Sequence[Mapping[str, Any]]) -> np.ndarray:
        lengths = [[len(full_text(pair[side][-1:])) for side in ("chosen", "rejected")] for pair in split]
        return np.array([(a > b) + 0.5 * (a == b) for a, b in lengths])

    shorter = longer(pairs["train"]).mean() < 0.5  # the training pairs determine the rule: longer or shorter
    rule = 1 - longer(test) if shorter else longer(test)

    units = [unit(pair) for pair in test]

    def counted(values: np.ndarray) -> np.ndarray:
        return summed(np.stack([values, np.ones(len(values))], 1), units)

    accuracy = rounded(right.mean())
    sure = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    bins = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    inside = [bins == b for b in range(BINS) if (bins == b).any()]
    filled = [(float(sure[mask].mean()), float(right[mask].mean()), int(mask.sum())) for mask in inside]
    _write_calibration(calibration_file, filled)
    quality: dict[str, Any] = {
        "accuracy": accuracy,
        "accuracy_interval": [rounded(bound) for bound in wilson(accuracy, independent(units))],
        "length_rule": rounded(rule.mean()),
        "length_rule_says": "shorter" if shorter else "longer",
        "over_length_rule": difference(rate, counted(right), counted(rule)),
        "calibration_error": rounded(sum(n * abs(c - a) for c, a, n in filled) / len(test)),
        "reward": {
            "chosen": rounded(chosen.mean()),
            "rejected": rounded(rejected.mean()),
            "spread": rounded(np.std(rewards)),
        },
    }
    for name in sorted({pair["category"] for pair in test if pair["category"]}):
        mask = np.array([pair["category"] == name for pair in test])
        found = {"accuracy": rounded(right[mask].mean()), "pairs": int(mask.sum())}
        quality.setdefault("by_category", {})[name] = found
    return quality
