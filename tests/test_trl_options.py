"""Arguments that an entry passes on to TRL: each acts on our passes as on TRL's
own, and all others are refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.training.trainers.alignment import preference, trl_options
from dagster_project.training.trainers.alignment.preference import AlignmentRun
from dagster_project.training.trainers.alignment.trl_trainers import shared_prompts
from dagster_project.training.trainers.alignment.trl_trainers.reference_free import experimental
from dagster_project.training.trainers.harness.params import PreferenceParams
from dagster_project.training.trainers.harness.sharding import ShardedModel

COMPUTE = Compute(seed=3, threads=1, dtype="float32")
PARAMS = PreferenceParams(
    learning_rate=5e-4, lr_scheduler_type="constant", warmup_ratio=0, per_device_train_batch_size=4, max_steps=3
)
GROUPS = {"num_generations": 2, "max_completion_length": 5, "beta": 0.3, "num_iterations": 2}
PAIRED = {"beta": 0.3}
OPTIONS: dict[str, dict[str, Any]] = dict.fromkeys(("dpo", "kto", "orpo", "simpo", "cpo"), PAIRED) | {
    "rloo": GROUPS,
    "grpo": GROUPS,
    "online_dpo": {"num_generations": 2, "max_completion_length": 5, "beta": 0.3},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {"f_divergence_type": "js_divergence"}),
    ("dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    ("dpo", {"adam_beta1": 0.5}),
    ("dpo", {"adam_beta2": 0.5}),
    ("dpo", {"adam_epsilon": 0.1}),
    ("kto", {"adam_beta1": 0.5}),
    ("orpo", {"adam_beta1": 0.5}),
    ("simpo", {"alpha": 0.3}),
    ("simpo", {"adam_beta2": 0.5}),
    ("cpo", {"adam_epsilon": 0.1}),
    ("rloo", {"epsilon_high": 1e-5}),
    ("rloo", {"normalize_advantages": True}),
    ("rloo", {"adam_beta1": 0.5}),
    ("grpo", {"delta": 1.0001}),
    ("grpo", {"use_bias_correction_kl": False}),
    ("grpo", {"adam_beta1": 0.5}),
    ("online_dpo", {"adam_beta1": 0.5}),
]
TEXTS = ["abc", "hello there", "zz", "b"]


class Rewarded(AlignmentRun):
    """A run whose rewards depend on token ids alone."""

    def reward(self, rows: Any, texts: Any, ids: Any) -> list[float]:
        return [sum(token % 3 == 0 for token in answer) / len(answer) for answer in ids]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Any:
    """A policy whose adapter has an effect."""
    torch.manual_seed(1)
    peft = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
    model = preference.policy(tiny_model, peft, torch.device("cpu"), torch.float32, "aligned.mine", "lora").model
    for weight in model.parameters():
        weight.data = weight.data + 0.05 * torch.randn_like(weight) if weight.requires_grad else weight.data * 2
    return model


@pytest.fixture(scope="module")
def curves(policy: Any, tiny_tokenizer: Any) -> Any:
    """Loss and gradient norm of each step, of one training for each distinct call."""
    known: dict[str, list[list[float]]] = {}

    def curve(name: str, given: dict[str, Any], as_trl: bool) -> list[list[float]]:
        key = f"{name} {given} {as_trl}"
        if key not in known:
            pairs = [
                {"example_id": str(i), "prompt": [{"role": "user", "content": text}], "tools": None}
                | {
                    side: [{"role": "assistant", "content": text * times}]
                    for side, times in (("chosen", 2), ("rejected", 3))
                }
                for i, text in enumerate(TEXTS)
            ]
            method = preference.METHODS[name](**OPTIONS[name])
            shared = ShardedModel(copy.deepcopy(policy), None, torch.device("cpu"))
            run = Rewarded(
                shared, tiny_tokenizer, {"train": pairs, "validation": []}, None, PARAMS, COMPUTE, None, trl=given
            )  # type: ignore[arg-type]
            with pytest.MonkeyPatch.context() as patched:
                if as_trl:
                    patched.setattr(shared_prompts, "reads_prompts_once", lambda *_: False)
                history = method.train(run)
            known[key] = [[point["loss"], point["grad_norm"]] for point in history.curve if "loss" in point]
        return known[key]

    return curve


@pytest.mark.parametrize(("name", "given"), CASES, ids=[f"{name}-{next(reversed(given))}" for name, given in CASES])
def test_an_argument_acts_on_our_passes_as_on_those_of_trl(name: str, given: dict[str, Any], curves: Any) -> None:
    options = preference.METHODS[name](**OPTIONS[name]).model_dump()
    trl_options.refuse(name, given, options, PARAMS.optim, "aligned.x.trl")
    ours, theirs, without = (
        torch.tensor(curves(name, *one))
        for one in ((given, False), (given, True), (dict([*given.items()][:-1]), False))
    )
    assert ours.shape == (3, 2)
    scale = ours.abs().amax(0).clamp(min=1e-3)  # the first loss of RLOO is 0
    difference, effect = (float(((ours - other).abs() / scale).max()) for other in (theirs, without))
    assert difference < min(1e-2, effect / 10), (difference, effect)


def test_every_accepted_argument_has_a_case() -> None:
    shared = set(trl_options.Optimizer.model_fields)
    for name, kind in trl_options.OPTIONS.items():
        assert (
            set(kind.model_fields) - shared
            == {key for method, given in CASES if method == name for key in given} - shared
        )
    assert shared <= {key for _, given in CASES for key in given}


def test_what_is_accepted_or_controlled_is_an_argument_of_trl() -> None:
    import trl

    configs = {
        "dpo": trl.DPOConfig,
        "kto": trl.KTOConfig,
        "rloo": trl.RLOOConfig,
        "grpo": trl.GRPOConfig,
        "online_dpo": trl.GRPOConfig,
    }
    configs |= {name: preference.METHODS[name]().trl_classes()[1] for name in ("orpo", "simpo", "cpo")}
    configs["gkd"] = experimental("gkd").GKDConfig  # type: ignore[attr-defined]
    for name, kind in trl_options.OPTIONS.items():
        assert set(kind.model_fields) <= set(configs[name].__dataclass_fields__)
    assert not set(trl_options.CONTROLLED) & {key for kind in trl_options.OPTIONS.values() for key in kind.model_fields}


@pytest.mark.parametrize(
    ("method", "given", "changed", "message"),
    [
        (
            "dpo",
            {"f_divergance_type": "js_divergence"},
            {},
            r"f_divergance_type: unknown.*did you mean f_divergence_type\?.*adam_beta1",
        ),
        (
            "dpo",
            {"output_dir": "/tmp"},
            {},
            "output_dir: Pedigree decides it\nhint: Pedigree decides where files are written",
        ),
        ("grpo", {"seed": 1}, {}, "hint: set compute.seed"),
        ("grpo", {"use_vllm": True}, {}, "sampled by Pedigree's own loop, not by vLLM"),
        ("grpo", {"top_k": 5}, {}, "options.top_p"),
        ("dpo", {"beta": 0.1}, {}, "set it in options"),
        ("dpo", {"bf16": True}, {}, "set compute.dtype"),
        ("simpo", {"simpo_gamma": 1.0}, {}, "set options.gamma of the method simpo"),
        ("cpo", {"alpha": 0.3}, {}, "alpha: unknown, or not verified"),
        ("orpo", {"max_length": 512}, {}, "rows are tokenized before training"),
        ("dpo", {"ld_alpha": 0.5}, {}, "unknown, or not verified to act on Pedigree's passes"),
        ("dpo", {"adam_beta1": 2.0}, {}, "adam_beta1: Input should be less than 1"),
        ("dpo", {"adam_beta1": "0.5"}, {}, "adam_beta1: Input should be a valid number"),
        ("dpo", {"f_alpha_divergence_coef": 0.3}, {}, "only with f_divergence_type: alpha_divergence"),
        (
            "dpo",
            {"f_divergence_type": "js_divergence"},
            {"loss_type": "nca_pair"},
            "not implemented for the loss nca_pair",
        ),
        ("grpo", {"delta": 2.0}, {"loss_type": "cispo"}, "no effect on the loss cispo"),
        ("grpo", {"delta": 2.0}, {}, "delta: has no effect with options.num_iterations: 1: the weights do not change"),
        ("rloo", {"epsilon_high": 0.3}, {}, "epsilon_high: has no effect with options.num_iterations: 1"),
        ("grpo", {"epsilon_high": 0.3}, {}, "epsilon_high: it is an option of grpo\nhint: set options.epsilon_high"),
        ("grpo", {"use_bias_correction_kl": False}, {"beta": 0.0}, "no effect with options.beta: 0"),
        ("kto", {"adam_beta1": 0.5}, {"optim": "sgd"}, "no effect with optim: sgd"),
        ("ppo", {"adam_beta1": 0.5}, {}, "ppo is not trained by TRL"),
    ],
)
def test_what_cannot_be_passed_on_is_refused_with_the_reason(
    method: str, given: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    optim = changed.pop("optim", "adamw_torch_fused") if "optim" in changed else "adamw_torch_fused"
    options = preference.METHODS[method](**changed).model_dump()
    with pytest.raises(InputError, match=rf"(?s)params\.yaml: aligned\.x\.trl.*{message}"):
        trl_options.refuse(method, given, options, optim, "aligned.x.trl")
