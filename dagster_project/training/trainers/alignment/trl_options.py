"""Further arguments of TRL's configurations that an entry may pass on with `trl`.

Only arguments that are verified to act on the passes and batches of this package in the same way as on TRL's own
(tests/test_trl_options.py) are accepted: others could be ignored without a message. To add one, add its field here and
its case there.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section, parse


class Optimizer(Section):
    """Of transformers' TrainingArguments, for all methods."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)


class DpoOptions(Optimizer):
    """Of TRL's DPOConfig."""

    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha_divergence_coef: float = Field(default=0.5, gt=0)


class SimpoOptions(Optimizer):
    """Of TRL's CPOConfig."""

    alpha: float = 0.0


class RlooOptions(Optimizer):
    """Of TRL's RLOOConfig."""

    epsilon_high: float = Field(default=0.2, gt=0)
    normalize_advantages: bool = False


class GrpoOptions(Optimizer):
    """Of TRL's GRPOConfig."""

    delta: float = Field(default=2.0, gt=1)
    use_bias_correction_kl: bool = True


OPTIONS: dict[str, type[Section]] = {
    "dpo": DpoOptions, "kto": Optimizer, "orpo": Optimizer, "simpo": SimpoOptions, "cpo": Optimizer, "gkd": Optimizer,
    "rloo": RlooOptions, "grpo": GrpoOptions, "online_dpo": Optimizer,
}  # fmt: skip
"""Method -> the arguments that its entry may pass on."""

CONTROLLED_BY = {
    "Pedigree decides where files are written": "output_dir logging_dir push_to_hub hub_model_id run_name",
    "set compute.seed, which all stages share": "seed data_seed full_determinism",
    "set compute.dtype": "bf16 fp16 tf32 use_cpu model_init_kwargs",
    "live curves, the page and answers/ have the figures": "report_to logging_steps logging_strategy log_completions",
    "set save_steps and save_total_limit in the entry: checkpoints are Pedigree's own, and resume to the same bytes": (
        "save_strategy save_steps save_total_limit resume_from_checkpoint load_best_model_at_end"
    ),
    "set it in the entry itself": (
        "learning_rate lr_scheduler_type num_train_epochs max_steps per_device_train_batch_size optim weight_decay"
        " max_grad_norm gradient_accumulation_steps gradient_checkpointing"
    ),
    "set warmup_ratio in the entry itself": "warmup_ratio warmup_steps",
    "set it in options, if the method has it": (
        "beta loss_type label_smoothing desirable_weight undesirable_weight num_generations max_completion_length"
        " temperature top_p epsilon num_iterations scale_rewards importance_sampling_level mask_truncated_completions"
        " cpo_alpha lmbda max_new_tokens"
    ),
    "set options.gamma of the method simpo": "simpo_gamma",
    "set options.teacher": "teacher_model_name_or_path teacher_model_init_kwargs teacher_model_revision",
    "set options.rpo_alpha": "loss_weights rpo_alpha",
    "set the weights in rewards": "reward_weights reward_funcs",
    "rows are tokenized before training, and none is truncated": "max_length truncation_mode max_prompt_length",
    "dropout is on only in rloo, grpo and online_dpo: set peft.lora_dropout there": "disable_dropout",
    "Pedigree makes the batches, see docs/alignment.md#speed": (
        "padding_free packing pad_to_multiple_of remove_unused_columns dataset_num_proc dataloader_num_workers"
        " train_sampling_strategy shuffle_dataset"
    ),
    "the reference is the SFT model, see docs/alignment.md": (
        "precompute_ref_log_probs precompute_ref_batch_size sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"
    ),
    "answers are sampled by Pedigree's own loop, with options.temperature and options.top_p": (
        "top_k min_p repetition_penalty generation_kwargs cache_implementation chat_template_kwargs"
        " generation_batch_size steps_per_generation use_transformers_paged use_transformers_continuous_batching"
    ),
    "not supported; for models larger than a GPU, set sharding in the entry": "trust_remote_code deepspeed fsdp",
}
"""Why Pedigree decides arguments, or the key in their place -> these arguments."""
CONTROLLED = {name: reason for reason, names in CONTROLLED_BY.items() for name in names.split()}
"""Argument that Pedigree decides -> why, or the key in its place."""


def refuse(
    method: str, given: Mapping[str, Any], options: Mapping[str, Any], optim: str, where: str, accumulated: int = 1
) -> None:
    """Check the arguments of an entry.

    Args:
        options: of the method.
        optim: the optimizer.
        accumulated: `gradient_accumulation_steps`.
    Raises:
        InputError: an argument cannot be passed on, has a wrong value, or no effect.
    """
    if not given:
        return
    if method not in OPTIONS:
        raise InputError(f"params.yaml: {where}: {method} is not trained by TRL", "its settings are keys of options")
    accepted = list(OPTIONS[method].model_fields)
    valid = f"keys that can be passed on to TRL for {method}: {', '.join(accepted)}"
    for name in (str(name) for name in given if name not in accepted):
        reason = "answers are sampled by Pedigree's own loop, not by vLLM" if "vllm" in name else CONTROLLED.get(name)
        place = f"params.yaml: {where}.{name}"
        if reason:
            raise InputError(f"{place}: Pedigree decides it", f"{reason}; {valid}")
        if name in options:
            raise InputError(f"{place}: it is an option of {method}", f"set options.{name}; {valid}")
        close = get_close_matches(name, [*accepted, *CONTROLLED], 1)
        guess = f"did you mean {close[0]}? " if close else ""
        raise InputError(f"{place}: unknown, or not verified to act on Pedigree's passes", guess + valid)
    parse(OPTIONS[method], dict(given), where)
    _refuse_without_effect(given, options, optim, where, accumulated)


DIVERGENCES = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"})
"""Losses of DPO for which TRL 1.16 implements other divergences."""
CLIPPED = frozenset({"grpo", "bnpo", "dr_grpo", "dapo", "luspo"})
"""Losses of GRPO that read `delta`."""


def _refuse_without_effect(
    given: Mapping[str, Any], options: Mapping[str, Any], optim: str, where: str, accumulated: int
) -> None:
    """Raise InputError if with the other settings of the entry an argument does nothing, or TRL refuses it."""
    loss, kind = options.get("loss_type"), given.get("f_divergence_type", "reverse_kl")
    unclipped = _unclipped(int(options.get("num_iterations") or 1), accumulated)
    problems = {"epsilon_high": unclipped, "delta": unclipped}
    if loss not in CLIPPED:
        problems["delta"] = f"has no effect on the loss {loss}"
    if kind != "reverse_kl" and loss not in DIVERGENCES:
        problems["f_divergence_type"] = f"not implemented for the loss {loss}"
    if kind != "alpha_divergence":
        problems["f_alpha_divergence_coef"] = "has an effect only with f_divergence_type: alpha_divergence"
    if not options.get("beta"):
        problems["use_bias_correction_kl"] = "has no effect with options.beta: 0"
    if not optim.startswith("adamw"):
        problems |= dict.fromkeys(Optimizer.model_fields, f"has no effect with optim: {optim}")
    for name in given:
        if problem := problems.get(name):
            raise InputError(f"params.yaml: {where}.{name}: {problem}", "leave it out, or change that setting")


def _unclipped(iterations: int, accumulated: int) -> str:
    """Why no ratio of probabilities is ever clipped; empty if it can be.

    TRL takes `iterations` passes on each batch of answers, and a step after `accumulated` passes: if no step ends
    between the passes on a batch, the policy is always the one that wrote it.
    """
    if accumulated % iterations:
        return ""
    settings = f"options.num_iterations: {iterations}"
    if iterations > 1:
        settings = f"gradient_accumulation_steps: {accumulated} and {settings}"
    why = "the weights do not change between the passes on a batch of answers, so there is nothing to clip"
    return f"has no effect with {settings}: {why}"
