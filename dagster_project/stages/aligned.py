"""preferences + reward_model + merged@SFT -> aligned@X. An SFT model learns to prefer; what it was is its reference, and what it writes is watched."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from dagster_project.core.chat import Messages, encode_prompt
from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.core.records import CheckResult, Report, read_preferences, remove, write_json, write_table, write_text
from dagster_project.evaluation import alignment
from dagster_project.training.methods import build as methods
from dagster_project.training.methods.build import PreparedModel
from dagster_project.training.methods.hardware import peak_memory, prepare, reuse_large_blocks
from dagster_project.training.tokens.preference_pairs import both
from dagster_project.training.trainers import ppo, preference, weight_audit
from dagster_project.training.trainers import reward_model as reward
from dagster_project.training.trainers.checkpoint import Checkpoints, refuse_full_disk
from dagster_project.training.trainers.curve import write_curve
from dagster_project.training.trainers.distributed import claim_gpus, process_group
from dagster_project.training.trainers.harness import Diverged, advice_on_memory
from dagster_project.training.trainers.history import TrainingHistory
from dagster_project.training.trainers.params import PreferenceParams, refuse_unmerged
from dagster_project.training.trainers.preference import document_of, preference_identity
from dagster_project.training.trainers.reward_model import MODEL, RewardModel, Rewards, failed_checks, tokenizer_of
from dagster_project.training.trainers.trl_training import train
from dagster_project.training.trainers.weight_audit import WeightAudit

log = logging.getLogger("pedigree")

CHECK_DESCRIPTIONS = {
    "starts_as_the_reference": "Before the first step policy and SFT model are one: KL 0 and, for dpo, loss ln 2.",
    "learned": "Every loss and every trained weight is finite.",
    "trained_what_it_should": "Every group of trainable weights moved, and no frozen weight did.",
    "prefers_as_people_do": "On held-out pairs the chosen answer is the likelier one per token more often than not, surely.",
    "reward_is_not_gamed": "Held-out answers got no better reward by length, repetition or lack of an end.",
    "reward_model_is_reliable": "The reward model that it learns from, or is monitored with, passed its checks.",
}


ASKED_AT_ONCE = 16
"""Answers in a forward pass that only looks."""


class Params(PreferenceParams):
    """One entry per variant; no adapter may have its name. The name becomes `aligned@NAME`, `merged_aligned@NAME` and
    `evaluation_aligned@NAME`. `aligned: {}` for none. See docs/alignment.md."""

    method: preference.Method
    """The alignment method."""
    adapter: str = Field(pattern=r"^[\w-]+$")
    """Name of the SFT variant that training starts from and uses as its reference. It must be merged."""
    options: dict[str, Any] = {}
    """The method's own keys, listed below. For ppo they include learning rate, batch size and checkpoints, which are then
    refused in the entry itself."""
    peft: dict[str, Any] = {}
    """Keys of LoRA for the new adapter, as PEFT names them."""
    rewards: dict[str, float] = {MODEL: 1.0}
    """Rewards of online methods, each with its weight: reward_model; valid_json, 1 for an answer that is JSON;
    distinct, the share of three-word runs that are not repeated; brief, falling from 1 to 0 at a hundred words."""
    samples: int = Field(default=64, ge=1)
    """Held-out prompts that are answered before and after training."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Longest of these answers, in tokens."""


def validate(params: Params, ctx: ValidationContext) -> None:
    where = ctx.section
    if ctx.name in ctx.values["adapter"]:
        raise InputError(f"params.yaml: {where}: adapter.{ctx.name} has the same name", "rename one of them")
    refuse_unmerged(ctx.values["adapter"], params.adapter, f"{where}.adapter")
    methods.check("lora", params.peft, None, True, where)
    preference.check(params.method, params.options, params.per_device_train_batch_size, where, ctx.value)
    if params.method in preference.ONLINE:
        reward.check(params.rewards, f"{where}.rewards")
    elif "rewards" in ctx.value:
        raise InputError(f"params.yaml: {where}.rewards: {params.method} learns from pairs alone", "leave it out")


def run(ctx: StageContext) -> Report:
    params = ctx.variant_params("aligned", Params)
    return produce(
        str(ctx.variant),
        params,
        ctx.compute,
        ctx.output_of("preferences"),
        ctx.output_of("reward_model"),
        ctx.outputs_of("merged") / params.adapter,
        out=ctx.out,
        curve_file=ctx.plot("alignment"),
        checkpoints=ctx.checkpoints,
        live=ctx.live,
        pages=ctx.pages,
    )


def produce(
    variant: str,
    params: Params,
    compute: Compute,
    preferences: Path,
    reward_model: Path,
    sft: Path,
    out: Path,
    curve_file: Path,
    checkpoints: Path,
    live: Path | None = None,
    pages: Path | None = None,
) -> Report:
    """Args:
    sft: the model of the SFT variant, which stands alone.
    checkpoints: a folder of this variant's own that outlives a killed run. It is removed once nothing blocks.
    """
    where = f"aligned.{variant}"
    pairs = {split: read_preferences(preferences / split) for split in ("train", "validation", "test")}
    options = preference.check(params.method, params.options, params.per_device_train_batch_size, where)
    _refuse(pairs, params, sft, where)
    usable, reliable = _examine(reward_model, sft, params, where)
    if reliable.blocking and not reliable.passed:
        return Report(checks=[reliable])
    gpus = claim_gpus(compute.processes if params.method == "ppo" else 1)
    device, dtype = prepare(compute)
    reuse_large_blocks()
    with advice_on_memory():
        tunable = preference.policy(sft, params.peft, device, dtype, where, preference.source(params.adapter))
        judge = RewardModel(reward_model, device, dtype) if usable else None
    tokenizer = tokenizer_of(sft)
    learning = sum(weight.nbytes for weight in weight_audit.trainable(tunable.model).values())
    refuse_full_disk(
        {checkpoints: learning * (1 + (4 if params.method == "ppo" else 3) * (params.save_total_limit + 1)), out: 2 * learning}, where
    )
    policies = alignment.Policies(tunable.model, tokenizer, ASKED_AT_ONCE)
    apart = _apart(policies, pairs["train"][:8])
    audit = WeightAudit(tunable.model, checkpoints)
    named = {"SFT model": sft, **({"reward model": reward_model} if params.method in preference.ONLINE else {})}
    kept = Checkpoints(
        checkpoints, preference_identity(params, compute, device, dtype, preferences, named, Path(__file__)), params.save_total_limit
    )
    try:
        with process_group(gpus, partial(worker_main, params, compute, preferences, reward_model, sft, checkpoints)):
            history = _learn(tunable, tokenizer, pairs, params, options, compute, judge, kept, live)
    except Diverged as diverged:
        examples = [pairs["train"][row]["example_id"] for row in diverged.rows if row < len(pairs["train"])]
        note = f"{diverged}; lower learning_rate, or raise beta"
        return Report(checks=[CheckResult("learned", passed=False, blocking=True, count=len(examples), rows=examples[:20], note=note)])
    finite = all(map(math.isfinite, history.losses)) and all(
        bool(weight.isfinite().all()) for weight in weight_audit.trainable(tunable.model).values()
    )
    settings = params.model_dump(exclude=preference.unused(params.method)) | {"options": options.model_dump()}
    change = audit.change()
    document = document_of(history, change, settings, compute, device, dtype)
    if len(gpus) > 1:
        document["processes"] = len(gpus)
    tunable.save(out)
    write_json(out / "training.json", document | {"step_0": apart})
    write_table(
        out / "examples.parquet", weight_audit.seen_examples(history.seen, _ids(params.method, pairs["train"])), weight_audit.seen_schema()
    )
    for template in sft.glob("chat_template.jinja"):
        write_text(out / template.name, template.read_text(encoding="utf-8"))
    figures = [name for name in preference.FIGURES if any(name in point for point in history.curve)]
    write_curve(curve_file, history.curve, ("loss", *dict.fromkeys(figures)))

    prompts = list({str(pair["prompt"]): pair for pair in pairs["test"]}.values())[: params.samples]
    rows, watch = alignment.samples(policies, prompts, judge, params.max_new_tokens)
    write_table(out / "samples.parquet", rows, alignment.sample_schema())
    metrics: dict[str, Any] = {
        "method": params.method,
        "adapter": params.adapter,
        "steps": history.step,
        **({"stopped": history.stopped} if isinstance(history, preference.Stopped) else {}),
        "tokens": history.tokens,
        "trainable_parameters": tunable.trainable,
        "preference": alignment.preference(policies, pairs["test"]),
        "watch": watch,
        "environment": document["versions"],
    }
    if pages:
        write_json(pages / "history.json", {"curve": history.curve, "signs": alignment.gamed(watch)})
    accuracy, signs = metrics["preference"]["accuracy"], alignment.gamed(watch)
    report = Report(
        metrics=metrics,
        checks=[
            _starts(apart, history, params.method, options),
            _learned(history, finite),
            change.check(),
            CheckResult(
                "prefers_as_people_do",
                passed=accuracy["aligned_interval"][0] > 0.5,
                severity="warn",
                note="{aligned:.3f} of {n} held-out pairs ({low:.3f} to {high:.3f}), {sft:.3f} before".format(
                    **accuracy, n=len(pairs["test"]), low=accuracy["aligned_interval"][0], high=accuracy["aligned_interval"][1]
                ),
            ),
            CheckResult(
                "reward_is_not_gamed",
                passed=not signs,
                severity="warn",
                note="; ".join(signs)
                or ("reward {sft:.3f} -> {aligned:.3f}".format(**watch["reward"]) if judge else "rewards were not measured"),
            ),
            reliable,
        ],
        measured={"training_seconds": round(history.seconds, 1), "peak_memory_bytes": peak_memory(device.type)},
    )
    if not report.failures:
        remove(checkpoints)
    return report


def _learn(
    tunable: PreparedModel,
    tokenizer: Any,
    pairs: Mapping[str, Sequence[Mapping[str, Any]]],
    params: Params,
    options: Any,
    compute: Compute,
    judge: RewardModel | None,
    kept: Checkpoints,
    live: Path | None,
) -> TrainingHistory:
    prompts = [list(pair["prompt"]) for pair in pairs["train"]]
    rewards = Rewards(params.rewards, judge) if params.method in preference.ONLINE else None
    if isinstance(options, ppo.Settings):
        assert rewards
        return preference.from_ppo(_ppo(tunable, tokenizer, prompts, rewards, options, compute, kept, live))
    rows = {split: preference.rows(params.method, tokenizer, pairs[split]) for split in ("train", "validation")}
    watched = [] if rewards else rows["validation"]
    return train(
        preference.trainer_spec(params.method, options, prompts, rewards),
        tunable.model,
        tokenizer,
        rows["train"],
        watched,
        params,
        compute,
        kept,
        live,
    )


def _ppo(
    tunable: PreparedModel,
    tokenizer: Any,
    prompts: Sequence[Messages],
    rewards: Rewards,
    options: ppo.Settings,
    compute: Compute,
    kept: Checkpoints,
    live: Path | None = None,
) -> ppo.PPOHistory:
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return ppo.train(tunable.model, tokenizer, ids, partial(_reward, rewards, prompts), options, compute, kept, live)


def worker_main(params: Params, compute: Compute, preferences: Path, reward_model: Path, sft: Path, checkpoints: Path) -> None:
    """What the other processes of PPO do: the same, without writing anything."""
    device, dtype = prepare(compute)
    reuse_large_blocks()
    options = preference.check(params.method, params.options, params.per_device_train_batch_size, "aligned")
    assert isinstance(options, ppo.Settings)
    prompts = [list(pair["prompt"]) for pair in read_preferences(preferences / "train")]
    tunable = preference.policy(sft, params.peft, device, dtype, "aligned", preference.source(params.adapter))
    rewards = Rewards(params.rewards, RewardModel(reward_model, device, dtype) if params.rewards.get(MODEL) else None)
    _ppo(tunable, tokenizer_of(sft), prompts, rewards, options, compute, Checkpoints(checkpoints, {}))


def _reward(rewards: Rewards, prompts: Sequence[Messages], rows: Sequence[int], answers: Sequence[str]) -> list[float]:
    return rewards([prompts[row] for row in rows], answers)


def _ids(method: str, pairs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The pair that each row of the training is of."""
    return [[pair["example_id"]] for pair in pairs for _ in range(2 if method == "kto" else 1)]


def _apart(policies: alignment.Policies, pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How far policy and reference lie apart before the first step."""
    examples = [(prompt, answer) for prompt, *answers in both(policies.tokenizer, pairs) for answer in answers]
    found = [policies.log_probabilities(who, examples, f"step 0, {who}") for who in ("sft", "aligned")]
    return {
        "largest_log_probability_difference": max(abs(a - b) for (a, _), (b, _) in zip(*found, strict=True)),
        "kl_per_token": policies.divergence(examples[:4]),
    }


def _learned(history: TrainingHistory, finite: bool) -> CheckResult:
    note = f"loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f}"
    if isinstance(history, preference.Stopped):  # the weights are the last good ones, and whoever reads the report decides about them
        return CheckResult("learned", passed=False, severity="warn", note=history.stopped)
    return CheckResult("learned", passed=finite, blocking=True, note=note)


def _starts(apart: Mapping[str, float], history: TrainingHistory, method: str, options: Any) -> CheckResult:
    first = history.validation[0][1] if history.validation and history.validation[0][0] == 0 else history.losses[0]
    loss = "" if method != "dpo" else f", loss {first:.6f}"
    right = method != "dpo" or options.loss_type != "sigmoid" or options.rpo_alpha > 0 or abs(first - math.log(2)) < 1e-5
    return CheckResult(
        "starts_as_the_reference",
        passed=right and not any(apart.values()),
        blocking=True,
        note=f"KL {apart['kl_per_token']:g} nats a token, log-probabilities differ by {apart['largest_log_probability_difference']:g}{loss}",
    )


def _examine(reward_model: Path, sft: Path, params: Params, where: str) -> tuple[bool, CheckResult]:
    """Whether the reward model can score answers at all, and the check `reward_model_is_reliable`.

    The check blocks what learns from the reward model's scores. Other methods are only monitored with it: they go on and report the failure.

    Raises:
        InputError: the method learns from a reward model of another tokenizer.
    """
    learns = params.method in preference.ONLINE and bool(params.rewards.get(MODEL))
    usable = (reward_model / "config.json").is_file()
    failed = failed_checks(reward_model)
    problems = [f"{name}: {note}" for name, note in failed.items()]
    tokenizer = reward_model / "tokenizer.json"
    if tokenizer.is_file() and tokenizer.read_bytes() != (sft / "tokenizer.json").read_bytes():
        problem = f"the reward model has another tokenizer than {params.adapter}"
        if learns:
            raise InputError(f"params.yaml: {where}: {problem}", "make it from the same base model: reward_model.model")
        usable, problems = False, [*problems, problem]
    if not problems:
        return usable, CheckResult("reward_model_is_reliable", passed=True, severity="error" if learns else "warn", blocking=learns)
    said = f"the reward model failed its checks ({'; '.join(problems)})"
    if learns:
        lower = "lower reward_model.min_accuracy if that accuracy is enough, " if "prefers_as_people_do" in failed else ""
        note = (
            f"{params.method} learns from its rewards, and {said}. In params.yaml: {lower}train a better one (reward_model.model, more pairs "
            f"in raw_preferences.sources), or reward by rules alone, {where}.rewards: {{distinct: 1.0}}"
        )
        return usable, CheckResult("reward_model_is_reliable", passed=False, blocking=True, count=len(problems), note=note)
    shown = "the rewards on held-out answers come from it" if usable else "no rewards of held-out answers were measured"
    note = f"{params.method} does not learn from the reward model and went on; {shown}; {said}"
    return usable, CheckResult("reward_model_is_reliable", passed=False, severity="warn", count=len(problems), note=note)


def _refuse(pairs: Mapping[str, Sequence[Any]], params: Params, sft: Path, where: str) -> None:
    """Raises:
    InputError: what would fail late, before a model is loaded.
    """
    for split in ("train", "test"):
        if not pairs[split]:
            raise InputError(f"data/preferences: no pair in the {split} split", "name more pairs in raw_preferences.sources")
    if not (sft / "config.json").is_file():
        raise InputError(f"params.yaml: {where}.adapter: {params.adapter} does not stand alone", "name a variant that is merged")
