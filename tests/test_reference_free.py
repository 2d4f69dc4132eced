"""ORPO, SimPO and CPO: losses, margins, gradients and weights are those of the formulas in their papers, computed in
float64 from the log-probability of each answer on its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.gradients import assert_close
from torch.nn.functional import logsigmoid

from dagster_project.core.params import Compute
from dagster_project.stages import aligned
from dagster_project.training.trainers.alignment import preference
from dagster_project.training.trainers.alignment.trl_trainers import shared_prompts, training
from dagster_project.training.trainers.harness.params import PreferenceParams
from dagster_project.training.trainers.harness.sharding import ShardedModel

COMPUTE = Compute(seed=3, threads=1, dtype="float32")
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
PARAMS = PreferenceParams(
    learning_rate=1e-3,
    num_train_epochs=2,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    lr_scheduler_type="constant",
)
PAIRS = [
    ([5, 6, 7, 8, 9], [10, 11, 12], [13]),
    ([21] * 17, [30, 31, 32, 33], [30, 31, 40, 41, 42, 43, 44, 45]),  # both answers begin alike
    ([7], [50, 51], [52, 53]),
    ([60, 61, 62], [70, 71], [70, 71, 72]),  # one answer begins with the other
    ([60, 61, 63], [75], [76, 77, 78, 79, 80, 81, 82]),
    ([9, 8, 7, 6], [5, 4], [5, 3]),
]
ROWS = [
    {"prompt_ids": p, "chosen_ids": chosen, "rejected_ids": rejected, "pair": i}
    for i, (p, chosen, rejected) in enumerate(PAIRS)
]
PAIR_TOKENS = sum(2 * len(p) + len(chosen) + len(rejected) for p, chosen, rejected in PAIRS)

Logs = list[torch.Tensor]
"""Log-probabilities of the tokens of each text of a batch."""
Losses = Callable[[Logs, Logs, Logs], tuple[torch.Tensor, torch.Tensor]]
"""(chosen answers, rejected answers, prompt and chosen answer) -> loss, and the rewards' margin of each pair."""


def stacked(function: Callable[[torch.Tensor], torch.Tensor], texts: Logs) -> torch.Tensor:
    return torch.stack([function(text) for text in texts])


def per_token(texts: Logs) -> torch.Tensor:
    """Negative log-likelihood per token of a batch."""
    return -torch.cat(texts).mean()


def orpo(beta: float) -> Losses:
    """arXiv 2403.07691, equations 3, 4, 6 and 7: P is the geometric mean of the
    tokens' probabilities, odds(P) = P / (1 - P)."""

    def loss(good: Logs, bad: Logs, whole: Logs) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = (stacked(torch.mean, side).exp() for side in (good, bad))
        ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
        return per_token(whole) + beta * -ratio.log().sigmoid().log().mean(), beta * (chosen.log() - rejected.log())

    return loss


def simpo(beta: float, gamma: float, alpha: float, smoothing: float = 0) -> Losses:
    """arXiv 2405.14734, equation 6, with the terms that TRL adds: likelihood of
    the chosen answer, and smoothed labels."""

    def loss(good: Logs, bad: Logs, _: Logs) -> tuple[torch.Tensor, torch.Tensor]:
        margin = beta * (stacked(torch.mean, good) - stacked(torch.mean, bad))
        compared = -(1 - smoothing) * logsigmoid(margin - gamma) - smoothing * logsigmoid(gamma - margin)
        return compared.mean() + alpha * per_token(good), margin

    return loss


def cpo(beta: float, alpha: float, kind: str = "sigmoid") -> Losses:
    """arXiv 2401.08417, equation 5; the likelihood of the chosen answer is per token, as in the code of its authors.
    hinge: arXiv 2305.10425; ipo: arXiv 2310.12036, equation 17, of means over tokens."""

    def loss(good: Logs, bad: Logs, _: Logs) -> tuple[torch.Tensor, torch.Tensor]:
        of = torch.mean if kind == "ipo" else torch.sum
        ratio = stacked(of, good) - stacked(of, bad)
        losses = {
            "sigmoid": -logsigmoid(beta * ratio),
            "hinge": (1 - beta * ratio).clamp(min=0),
            "ipo": (ratio - 1 / (2 * beta)) ** 2,
        }
        return losses[kind].mean() + alpha * per_token(good), beta * ratio

    return loss


CASES: dict[str, tuple[preference.ReferenceFree, Losses]] = {
    "orpo": (preference.Orpo(), orpo(0.1)),
    "orpo, beta": (preference.Orpo(beta=0.7), orpo(0.7)),
    "simpo": (preference.Simpo(), simpo(2.0, 1.0, 0.0)),
    "simpo, all options": (
        preference.Simpo(beta=0.5, gamma=0.3, cpo_alpha=0.4, label_smoothing=0.2),
        simpo(0.5, 0.3, 0.4, 0.2),
    ),
    "cpo": (preference.Cpo(), cpo(0.1, 1.0)),
    "cpo, no likelihood": (preference.Cpo(beta=0.5, cpo_alpha=0.0), cpo(0.5, 0.0)),
    "cpo, hinge": (preference.Cpo(loss_type="hinge", cpo_alpha=0.3), cpo(0.1, 0.3, "hinge")),
    "cpo, ipo": (preference.Cpo(loss_type="ipo", beta=0.6), cpo(0.6, 1.0, "ipo")),
}


@pytest.fixture(scope="module")
def built(tiny_model: Path) -> Any:
    """A policy whose adapter has an effect."""
    torch.manual_seed(1)
    model = preference.policy(tiny_model, LORA, torch.device("cpu"), torch.float32, "aligned.mine", "lora").model
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data + 0.1 * torch.randn_like(weight)
    return model


def plainly(model: Any, losses: Losses, rows: Sequence[int]) -> tuple[torch.Tensor, float, dict[str, float]]:
    """Loss and mean margin of a pass, from one text at a time, and the negative
    log-likelihood per token of what each method imitates."""

    def tokens(prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + answer])
        return model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]

    good, bad, whole = [], [], []
    for prompt, chosen, rejected in (PAIRS[row] for row in rows):
        whole.append(tokens(prompt, chosen))
        good.append(whole[-1][len(prompt) - 1 :])
        bad.append(tokens(prompt, rejected)[len(prompt) - 1 :])
    loss, margin = losses(good, bad, whole)
    return (
        loss,
        float(margin.detach().mean()),
        {"orpo": float(per_token(whole).detach()), "other": float(per_token(good).detach())},
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["each pair once", "padded by TRL"])
def test_the_training_is_that_of_the_papers_formula_in_float64(
    padded: bool, case: str, built: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, losses = CASES[case]
    if padded:
        monkeypatch.setattr(shared_prompts, "reads_prompts_once", lambda *_: False)
    policy, plain = copy.deepcopy(built), copy.deepcopy(built).double()
    spec = method.trainer_spec(None)  # type: ignore[arg-type]
    history = training.train(
        spec, ShardedModel(policy, None, torch.device("cpu")), tiny_tokenizer, ROWS, ROWS[:3], PARAMS, COMPUTE
    )

    curve = [point for point in history.curve if "loss" in point]
    weights = [weight for weight in plain.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PARAMS.learning_rate, weight_decay=0)
    for point in curve:
        rows = [row for step, _, row in history.seen if step == point["step"]]
        passes = [rows[start : start + 2] for start in range(0, len(rows), 2)]
        found = [plainly(plain, losses, some) for some in passes]
        for loss, *_ in found:
            (loss / len(passes)).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, PARAMS.max_grad_norm)
        imitated = "orpo" if method.name == "orpo" else "other"
        expected = {"loss": sum(float(loss.detach()) for loss, *_ in found) / len(passes), "grad_norm": float(norm),
                    "margin": sum(margin for _, margin, _ in found) / len(passes)}  # fmt: skip
        if getattr(method, "cpo_alpha", 1):
            expected["nll"] = sum(nll[imitated] for *_, nll in found) / len(passes)
        assert ("nll" in point) == ("nll" in expected), "TRL logs 0 where it is not computed"
        assert {name: point[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5), point["step"]
        optimizer.step()
        optimizer.zero_grad()
    own, other = (
        {name: w.detach().float() for name, w in m.named_parameters() if w.requires_grad} for m in (policy, plain)
    )
    assert_close(own, other, 1e-3)
    *_, last = (point for point in history.curve if "validation_loss" in point)
    two, one = (plainly(plain, losses, rows) for rows in ([0, 1], [2]))
    for name, place in {"loss": 0, "margin": 1}.items():  # a pass counts by its rows
        expected_value = (2 * float(two[place]) + float(one[place])) / 3
        assert last[f"validation_{name}"] == pytest.approx(expected_value, rel=1e-4, abs=1e-5), name
    assert len(curve) == 4 and history.tokens == 2 * PAIR_TOKENS
    assert not any("kl" in name for point in history.curve for name in point)


def test_the_accuracy_is_the_share_of_pairs_whose_chosen_answer_has_the_higher_reward(
    built: Any, tiny_tokenizer: Any
) -> None:
    policy, plain = copy.deepcopy(built), copy.deepcopy(built).double()
    method, losses = CASES["simpo"]
    spec = method.trainer_spec(None)  # type: ignore[arg-type]
    params = PARAMS.model_copy(update={"max_steps": 1, "num_train_epochs": 1})
    history = training.train(
        spec, ShardedModel(policy, None, torch.device("cpu")), tiny_tokenizer, ROWS, [], params, COMPUTE
    )
    margins = [plainly(plain, losses, [row])[1] for _, _, row in history.seen]
    assert history.curve[0]["accuracy"] == sum(margin > 0 for margin in margins) / len(margins)


def test_trl_still_says_that_these_trainers_are_experimental() -> None:
    import trl

    assert not {"ORPOTrainer", "CPOTrainer", "SimPOTrainer"} & set(dir(trl))
    assert preference.Orpo().trl_classes()[0].__module__.startswith("trl.experimental.")


def test_no_metric_of_the_curve_claims_a_reference() -> None:
    without = {name for name, method in preference.METHODS.items() if not method.has_reference}
    assert without == {"orpo", "simpo", "cpo", "gkd"}
    for name in without:
        assert not {"kl", "reference"} & {*preference.METHODS[name].figures}
        assert name in aligned.CHECK_DESCRIPTIONS["starts_as_the_reference"]
