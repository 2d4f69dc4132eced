"""Online DPO: the best and the worst of the policy's answers to a prompt are a pair, and the loss is that of DPO,
computed here from its formula in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import random_policy
from builders.gradients import assert_close

from dagster_project.core.params import Compute
from dagster_project.training.trainers.alignment import preference
from dagster_project.training.trainers.alignment.sampled_answers import SampledAnswers
from dagster_project.training.trainers.alignment.trl_trainers import online_pairs, training
from dagster_project.training.trainers.harness.params import PreferenceParams
from dagster_project.training.trainers.harness.sharding import ShardedModel

COMPUTE = Compute(seed=3, threads=1, dtype="float32")
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
ROWS = [{"prompt": prompt, "pair": i} for i, prompt in enumerate([[5, 6, 7, 8, 9], [21] * 17, [7, 8], [9, 30, 31, 32]])]
LONGEST, BETA = 5, 0.3

Answers = list[tuple[int, list[int], float]]


@pytest.fixture
def policy(tiny_model: Path) -> Any:
    return random_policy(tiny_model, LORA)


class Rewarded:
    """The part of an AlignmentRun that online methods read: rewards are so
    coarse that some answers to a prompt have the same."""

    def __init__(self) -> None:
        self.sampled = SampledAnswers()
        self.batches: list[Answers] = []

    def reward(self, rows: Sequence[int], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[float]:
        rewards = [float(sum(token % 3 == 0 for token in answer) > 1) for answer in ids]
        self.batches.append([(row, list(answer), value) for row, answer, value in zip(rows, ids, rewards, strict=True)])
        return rewards


def log_probability(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *answer]])
    scores = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scores.gather(-1, ids[0, len(prompt) :, None]).sum()


def pairs_of(batch: Answers, size: int) -> list[tuple[int, list[int], list[int]]]:
    """Row, best and worst answer of each group whose rewards differ."""
    groups = [batch[start : start + size] for start in range(0, len(batch), size)]
    found = []
    for group in groups:
        assert len({row for row, _, _ in group}) == 1
        rewards = [reward for _, _, reward in group]
        if max(rewards) > min(rewards):
            found.append((group[0][0], group[rewards.index(max(rewards))][1], group[rewards.index(min(rewards))][1]))
    return found


def loss_of(model: Any, batch: Answers, size: int, loss_type: str) -> tuple[Any, list[float]]:
    """Mean loss of the pairs of a batch, and their margins without beta (arXiv 2402.04792, eq. 2 and 3)."""
    total, margins = torch.zeros((), dtype=torch.float64), []
    for row, best, worst in pairs_of(batch, size):
        prompt: Any = ROWS[row]["prompt"]
        with torch.no_grad(), model.disable_adapter():
            reference = log_probability(model, prompt, best) - log_probability(model, prompt, worst)
        margin = log_probability(model, prompt, best) - log_probability(model, prompt, worst) - reference
        total = total + (
            torch.log1p(torch.exp(-BETA * margin)) if loss_type == "sigmoid" else (margin - 1 / (2 * BETA)) ** 2
        )
        margins.append(float(margin.detach()))
    return total / max(1, len(margins)), margins


@pytest.mark.parametrize(
    ("loss_type", "size", "accumulated"), [("sigmoid", 2, 1), ("sigmoid", 4, 1), ("ipo", 2, 1), ("sigmoid", 2, 2)]
)
def test_training_is_that_of_a_plain_loop_in_float64(
    loss_type: str, size: int, accumulated: int, policy: Any, tiny_tokenizer: Any
) -> None:
    other, run = copy.deepcopy(policy).double(), Rewarded()
    method = preference.OnlineDpo(num_generations=size, max_completion_length=LONGEST, beta=BETA, loss_type=loss_type)  # type: ignore[arg-type]
    params = PreferenceParams(
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        warmup_ratio=0,
        per_device_train_batch_size=8 // accumulated,
        max_steps=4,
        weight_decay=0,
        gradient_accumulation_steps=accumulated,
    )
    spec = method.trainer_spec(run)  # type: ignore[arg-type]
    history = training.train(
        spec, ShardedModel(policy, None, torch.device("cpu")), tiny_tokenizer, ROWS, [], params, COMPUTE
    )
    assert len(run.batches) == 4 * accumulated
    numbers = [len(pairs_of(batch, size)) for batch in run.batches]
    assert sum(numbers) > 4 and (size > 2 or min(numbers) < 8 // accumulated // size), (
        "no rewards are equal, so that case is not shown"
    )
    weights = [weight for weight in other.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=params.learning_rate, weight_decay=0)
    for step, point in enumerate(history.curve):
        losses, margins = [], []
        for batch in run.batches[step * accumulated : (step + 1) * accumulated]:
            loss, of_pairs = loss_of(other, batch, size, loss_type)
            margins += [sum(of_pairs) / len(of_pairs)] if of_pairs else []
            losses.append(float(loss.detach()))
            if of_pairs:
                (loss / accumulated).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, params.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert point["loss"] == pytest.approx(sum(losses) / accumulated, rel=1e-3, abs=1e-5)
        assert point["grad_norm"] == pytest.approx(float(norm), rel=1e-3, abs=1e-5)
        if margins:
            assert point["margin"] == pytest.approx(BETA * sum(margins) / len(margins), rel=1e-3, abs=1e-5)
    own, plainly = (
        {name: w.detach().double() for name, w in m.named_parameters() if w.requires_grad} for m in (policy, other)
    )
    assert_close(own, plainly, 1e-3)


def test_answers_whose_rewards_are_equal_are_no_pair() -> None:
    ratios = torch.tensor([[0.5, -1.0, 2.0], [1.0, 2.0, 3.0], [0.25, 0.5, 0.75]])
    rewards = torch.tensor([[1.0, 3.0, 2.0], [7.0, 7.0, 7.0], [0.0, 0.0, 1.0]])
    assert online_pairs.best_minus_worst(ratios, rewards).tolist() == [-1.5, 0.5]
    for loss_type, of_margin in {
        "sigmoid": lambda m: math.log1p(math.exp(-0.2 * m)),
        "ipo": lambda m: (m - 1 / (2 * 0.2)) ** 2,
    }.items():
        found = online_pairs.losses(torch.tensor([-1.5, 0.5], dtype=torch.float64), 0.2, loss_type).tolist()
        assert found == pytest.approx([of_margin(-1.5), of_margin(0.5)], rel=1e-12)


def test_a_policy_equal_to_its_reference_begins_at_ln_2(tiny_model: Path, tiny_tokenizer: Any) -> None:
    model = preference.policy(tiny_model, LORA, torch.device("cpu"), torch.float32, "aligned.mine", "lora").model
    run = Rewarded()
    spec = preference.OnlineDpo(max_completion_length=LONGEST).trainer_spec(run)  # type: ignore[arg-type]
    params = PreferenceParams(per_device_train_batch_size=8, max_steps=1)
    history = training.train(
        spec, ShardedModel(model, None, torch.device("cpu")), tiny_tokenizer, ROWS, [], params, COMPUTE
    )
    assert pairs_of(run.batches[0], 2)
    assert history.losses == [pytest.approx(math.log(2), abs=1e-6)]
