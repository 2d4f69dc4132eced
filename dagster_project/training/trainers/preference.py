"""Alignment: an SFT model learns to prefer, from pairs (DPO, KTO) or from rewards of its own answers (RLOO, GRPO through TRL, PPO by ppo.py).

| method | learns from | source |
| --- | --- | --- |
| dpo | pairs, offline; the reward is beta log(policy / reference) | Rafailov et al. 2023, arXiv 2305.18290, eq. 7; its other losses as TRL names them |
| kto | answers called good or bad, offline | Ethayarajh et al. 2024, arXiv 2402.01306 |
| rloo | rewards of several answers to a prompt, each against the mean of the others | Ahmadian et al. 2024, arXiv 2402.14740 |
| grpo | the same, against mean and spread of the group | Shao et al. 2024, arXiv 2402.03300 |
| ppo | rewards of one answer to a prompt, against a learnt value | Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155 |

The reference is the SFT policy, without a second copy of the model: the weights that the SFT adapter was merged into are frozen, and a fresh adapter learns on
top of them. It begins with no effect, so that policy and reference are one at step 0; switched off it is the reference, at any step.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dagster_project.core.chat import Messages
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_files
from dagster_project.core.params import Compute, Section, parse
from dagster_project.training.methods import build
from dagster_project.training.methods.build import PreparedModel
from dagster_project.training.tokens.preference_pairs import both
from dagster_project.training.trainers import ppo
from dagster_project.training.trainers.checkpoint import params_identity, run_identity
from dagster_project.training.trainers.history import TrainingHistory
from dagster_project.training.trainers.params import NON_SEMANTIC_PARAMS, PreferenceParams
from dagster_project.training.trainers.reward_model import Rewards
from dagster_project.training.trainers.trl_training import TrainerSpec
from dagster_project.training.trainers.weight_audit import LIBRARIES, WeightChange, versions

if TYPE_CHECKING:
    import torch

Method = Literal["dpo", "kto", "rloo", "grpo", "ppo"]

ONLINE = ("rloo", "grpo", "ppo")
"""Methods that answer prompts themselves, and need rewards."""


class Dpo(Section):
    """Options of dpo."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is kept close to the reference: temperature of the implicit reward."""
    loss_type: Literal[
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
        "discopop", "sigmoid_norm",
    ] = "sigmoid"  # fmt: skip
    """The loss, by TRL's name; `sigmoid` is the loss of the DPO paper."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed probability that chosen and rejected are swapped (cDPO, robust DPO). exo_pair requires more than 0."""
    rpo_alpha: float = Field(default=0.0, ge=0)
    """Weight of the negative log-likelihood of the chosen answer in the loss, so that its likelihood does not fall
    (arXiv 2404.19733)."""


class Kto(Section):
    """Options of kto."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is kept close to the reference."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the loss of good answers."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the loss of bad answers."""


class Online(Section):
    """Options of rloo and grpo."""

    num_generations: int = Field(default=4, ge=2)
    """Answers to each prompt, which are compared with each other. Must divide `per_device_train_batch_size`."""
    max_completion_length: int = Field(default=64, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that together have this probability."""
    beta: float = Field(default=0.05, ge=0)
    """Weight of the KL divergence from the reference."""
    epsilon: float = Field(default=0.2, gt=0)
    """Largest relative change of a token's probability in one update (clipping range)."""
    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps on each batch of answers."""


OPTIONS: dict[str, type[Section]] = {"dpo": Dpo, "kto": Kto, "rloo": Online, "grpo": Online, "ppo": ppo.Settings}

PAIRS = {
    "rewards/accuracies": "accuracy", "rewards/margins": "margin", "rewards/chosen": "reward_chosen", "rewards/rejected": "reward_rejected", "kl": "kl",
}  # fmt: skip
ANSWERS = {
    "reward": "reward", "kl": "kl", "entropy": "entropy", "completions/mean_length": "response_length", "completions/clipped_ratio": "unfinished",
}  # fmt: skip
"""What TRL logs -> what we call it."""
FIGURES = tuple(dict.fromkeys([*PAIRS.values(), *ANSWERS.values(), "kl_coef", "value_loss", "clip_fraction", "explained_variance"]))
"""What a curve may tell beside its loss."""


@dataclass
class Stopped(TrainingHistory):
    """A course that ended before its end, with the last weights that were sound."""

    stopped: str = ""
    """Why, and what to change."""


def from_ppo(found: ppo.PPOHistory) -> TrainingHistory:
    """As the courses of the other methods: an iteration is a step, and the policy's loss the loss.

    Raises:
        InputError: it stopped before anything was learnt.
    """
    curve = [{**point, "loss": point["policy_loss"]} for point in found.curve]
    if found.stopped and not curve:
        raise InputError(found.stopped, "change what it says in the entry's options")
    kept = TrainingHistory(curve=curve, seen=found.seen, tokens=found.tokens, seconds=found.seconds)
    return Stopped(**vars(kept), stopped=found.stopped) if found.stopped else kept


def unused(method: str) -> set[str]:
    """Keys of an entry that do nothing for a method. ppo takes its steps by its options."""
    return set(NON_SEMANTIC_PARAMS) | (set(PreferenceParams.model_fields) - {"save_total_limit"} if method == "ppo" else set())


def check(method: str, options: Mapping[str, Any], batch: int, where: str, named: Collection[str] = ()) -> Section:
    """The method's options, once they are sound.

    Args:
        named: keys that the entry itself names.
    Raises:
        InputError: unknown keys or wrong values; numbers that do not go together.
    """
    found = parse(OPTIONS[method], dict(options), f"{where}.options")
    if vain := sorted((unused(method) - NON_SEMANTIC_PARAMS) & set(named)):
        known = f"its options: {', '.join(OPTIONS[method].model_fields)}"
        raise InputError(f"params.yaml: {where}: {', '.join(vain)}: {method} takes its steps by its options", known)
    if isinstance(found, Dpo) and found.loss_type == "exo_pair" and not found.label_smoothing:
        raise InputError(f"params.yaml: {where}.options.label_smoothing: exo_pair needs it above 0", "its paper has 0.001")
    if (
        isinstance(found, ppo.Settings)
        and found.target_kl is not None
        and found.horizon <= 0.2 * min(found.batch_size, found.total_episodes)
    ):
        raise InputError(
            f"params.yaml: {where}.options.horizon: {found.horizon:g} would move beta below zero at {found.batch_size} answers an iteration",
            f"use more than a fifth of them, e.g. {10 * found.batch_size}",
        )
    if isinstance(found, Online) and batch % found.num_generations:
        raise InputError(
            f"params.yaml: {where}.per_device_train_batch_size: {batch} answers are no whole number of groups of {found.num_generations}",
            f"use a multiple of num_generations, e.g. {found.num_generations * max(1, batch // found.num_generations)}",
        )
    return found


def policy(sft: Path, peft: Mapping[str, Any], device: torch.device, dtype: torch.dtype, where: str, named: str) -> PreparedModel:
    """The SFT model with a fresh LoRA adapter.

    Args:
        sft: a model that stands alone.
        peft: keys of LoRA.
        named: what the adapter's configuration calls that model.
    """
    return build.build("lora", peft, sft, device, dtype, where, packs=False, named=named)


def trainer_spec(method: str, options: Section, prompts: Sequence[Messages], rewards: Rewards | None) -> TrainerSpec:
    """What TRL is to do.

    Args:
        prompts: of the training split, by the number of their row; online methods answer them.
    """
    import trl

    keys = options.model_dump()
    if isinstance(options, Dpo):
        alpha, loss = keys.pop("rpo_alpha"), keys["loss_type"]
        mixed = {"loss_type": [loss, "sft"], "loss_weights": [1.0, alpha]} if alpha else {"loss_type": [loss]}
        return TrainerSpec(method, trl.DPOTrainer, trl.DPOConfig, {**keys, **mixed, "max_length": None}, PAIRS)
    if isinstance(options, Kto):
        return TrainerSpec(method, trl.KTOTrainer, trl.KTOConfig, {**keys, "max_length": None}, PAIRS)
    assert rewards

    def reward(completions: Sequence[Messages], row: Sequence[int], **_: Any) -> list[float]:
        return rewards([prompts[number] for number in row], [completion[0]["content"] for completion in completions])

    trainer, config = (trl.RLOOTrainer, trl.RLOOConfig) if method == "rloo" else (trl.GRPOTrainer, trl.GRPOConfig)
    return TrainerSpec(method, trainer, config, {**keys, "steps_per_generation": 1}, ANSWERS, {"reward_funcs": reward})


def rows(method: str, tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pairs as the method's trainer reads them, and by `pair` which one a row is of."""
    if method in ONLINE:
        return [{"prompt": list(pair["prompt"]), "pair": i} for i, pair in enumerate(pairs)]
    ids = both(tokenizer, pairs)
    if method == "dpo":
        return [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "pair": i}
            for i, (prompt, chosen, rejected) in enumerate(ids)
        ]
    answers = [
        {"prompt_ids": prompt, "completion_ids": answer, "label": label, "pair": i}
        for i, (prompt, chosen, rejected) in enumerate(ids)
        for answer, label in ((chosen, True), (rejected, False))
    ]
    return [{**row, "KL_completion_ids": _unmatched(answers, i)["completion_ids"]} for i, row in enumerate(answers)]


def _unmatched(answers: Sequence[Mapping[str, Any]], i: int) -> Mapping[str, Any]:
    """The nearest answer before the i-th, the last before the first, that is as good and to another prompt: KL is estimated on such (arXiv 2402.01306,
    section 4.2). Where all prompts are one, the one before."""
    mine = answers[i]
    for back in range(2, len(answers), 2):
        if answers[i - back]["prompt_ids"] != mine["prompt_ids"]:
            return answers[i - back]
    return answers[i - 2]


def passes(steps: PreferenceParams, options: Section) -> tuple[int, int]:
    """(pairs or answers in a forward pass, forward passes per optimizer step)."""
    if isinstance(options, ppo.Settings):
        return options.mini_batch_size, options.gradient_accumulation_steps
    return steps.per_device_train_batch_size, steps.gradient_accumulation_steps


def planned(rows: int, steps: PreferenceParams, method: str, options: Section) -> int:
    """Optimizer steps of a run."""
    at_once, times = passes(steps, options)
    batch = at_once * times
    if isinstance(options, ppo.Settings):
        return ppo.iterations(options) * options.num_ppo_epochs * -(-options.batch_size // batch)
    each = rows * options.num_generations * options.num_iterations // batch if isinstance(options, Online) else -(-rows // batch)
    return min(max(1, each) * steps.num_train_epochs, steps.max_steps or 10**9)


def source(adapter: str) -> str:
    """Where the model of an SFT adapter lies, as dvc.yaml names it."""
    assert re.fullmatch(r"[\w-]+", adapter)
    return f"data/merged/{adapter}"


def preference_identity(
    params: PreferenceParams,
    compute: Compute,
    device: torch.device,
    dtype: torch.dtype,
    data: Path,
    folders: Mapping[str, Path],
    module: Path,
) -> dict[str, str]:
    """What must be equal for a training to resume from a checkpoint.

    Args:
        data: folder of the pairs.
        folders: models that it reads, by name for messages.
        module: the stage's own file.
    """
    return {
        "preferences": sha256_of_files(sorted(data.rglob("*.parquet"))),
        **{name: sha256_of_files(sorted(file for file in folder.iterdir() if file.suffix != ".md")) for name, folder in folders.items()},
        **params_identity(params, compute),
        **run_identity(module, compute, device, dtype, LIBRARIES),
    }


def document_of(
    history: TrainingHistory, change: WeightChange, settings: Mapping[str, Any], compute: Compute, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """training.json of a training on preferences."""
    return {
        "trained": change.groups,
        "frozen": change.frozen,
        "steps": history.step,
        "tokens": history.tokens,
        "loss": {"first": history.losses[0], "last": history.losses[-1]},
        "validation": [point for point in history.curve if "validation_loss" in point],
        "settings": settings,
        "seed": compute.seed,
        "threads": compute.threads,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "versions": versions(LIBRARIES),
    }
