"""PPO: formulas match hand computations, gradients match finite differences,
known optima are reached, and runs repeat byte for byte.

Run as a script this file is where runs are killed and shared: it loads the libraries once and forks a child for each.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.processes import run_main
from builders.training import ready_to_fork, run_in_child
from conftest import ROOT

from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.training.inference import sampling
from dagster_project.training.inference.decoding import decode
from dagster_project.training.inference.sampling import draw, sampled
from dagster_project.training.trainers.alignment import ppo
from dagster_project.training.trainers.harness import launch as launching
from dagster_project.training.trainers.harness.checkpoint import Checkpoints
from dagster_project.training.trainers.harness.launch import launch, start_others
from dagster_project.training.trainers.harness.session import Interrupted
from dagster_project.training.trainers.harness.sharding import ShardedModel
from dagster_project.training.trainers.harness.weight_audit import sha256_of_tensors, trainable

COMPUTE = Compute(threads=1, dtype="float32")
QUESTIONS = ["Hi", "Where is my parcel?", "No, thank you", "I was charged twice"]
SMALL = ppo.Settings(
    total_episodes=96,
    batch_size=32,
    response_length=8,
    learning_rate=3e-3,
    kl_coef=0.02,
    missing_eos_penalty=0.1,
    gradient_accumulation_steps=1,
)


def policy(folder: Path, louder: float = 10, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """The tiny model, its weights louder, under a fresh adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in base.parameters():
            if weight.dim() == 2:
                weight.mul_(louder)
    torch.manual_seed(0)
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    return get_peft_model(base.to(dtype), LoraConfig(**adapter), autocast_adapter_dtype=False).to(dtype)


def whole(model: Any) -> ShardedModel:
    """A model that is not divided among processes."""
    return ShardedModel(model, None, model.device)


def prompts_of(tokenizer: Any) -> list[list[int]]:
    return [
        tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n") for question in QUESTIONS
    ]


def small_letters(rows: Sequence[int], texts: Sequence[str], _: Any = None) -> list[float]:
    """The share of small letters: 0.1 by chance."""
    return [sum(character.islower() for character in text) / max(1, len(text)) for text in texts]


def settings(**changes: Any) -> ppo.Settings:
    return SMALL.model_copy(update=changes)


# formulas
# ----------------------------------------------------------------------------------------------------------------------


def test_advantages_equal_manually_computed_values() -> None:
    rewards, values = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]]), torch.tensor([[0.5, 1.0, 1.5], [1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages, returns = ppo.generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    # deltas 1 + 0.5 - 0.5 = 1, 0 + 0.75 - 1 = -0.25, 2 - 1.5 = 0.5; each counts a quarter of the next
    assert advantages.tolist() == [[1 - 0.25 / 4 + 0.5 / 16, -0.25 + 0.5 / 4, 0.5], [2, 0, 0]]
    assert returns.tolist() == [[1.46875, 0.875, 2.0], [3, 0, 0]]


def test_advantages_are_the_sum_that_the_paper_writes() -> None:
    dice = torch.Generator().manual_seed(0)
    lengths, gamma, lam = [5, 1, 7, 3], 0.9, 0.8
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(4, 7, dtype=torch.float64, generator=dice) * mask for _ in range(2))
    advantages, _ = ppo.generalized_advantages(rewards, values, mask, gamma, lam)
    for e, n in enumerate(lengths):
        v = [*values[e, :n].tolist(), 0.0]
        delta = [float(rewards[e, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        wanted = [sum((gamma * lam) ** later * delta[t + later] for later in range(n - t)) for t in range(n)]
        assert advantages[e].tolist() == pytest.approx([*wanted, *[0.0] * (7 - n)])


def test_losses_equal_manually_computed_values() -> None:
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1])
    gains = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    values, before, returns = (
        torch.tensor(x) for x in ([1.0, 0.1, -1.0, 0.0, 0.0], [0.0] * 5, [2.0, 1.0, 1.0, 0.0, 0.1])
    )
    policy, value, ratio = ppo.losses(ratios.log() - 2, values, torch.full((5,), -2.0), before, gains, returns, SMALL)
    # more of a good token pays up to 1.2, less of a bad one down to 0.8; what makes things worse is never clipped
    assert policy.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8, -2.2])
    # 1.0 for 2.0, but not further than 0.2 from 0: (0.2 - 2)^2 / 2; 0.1 for 1; -1 for 1, worse than -0.2; 0 for 0; 0
    # for 0.1
    assert value.tolist() == pytest.approx([1.62, 0.405, 2.0, 0.0, 0.005])
    assert ratio.tolist() == pytest.approx(ratios.tolist())


def rollout_of(prompts: list[list[int]], answers: list[list[int]], finished: list[bool]) -> ppo.Rollout:
    mask = torch.arange(max(map(len, answers))) < torch.tensor([len(answer) for answer in answers])[:, None]
    return ppo.Rollout(list(range(len(prompts))), prompts, answers, mask, torch.tensor(finished))


def test_a_tokens_reward_is_its_kl_penalty_and_for_the_last_one_the_score() -> None:
    rollout = rollout_of([[1], [1]], [[5, 6], [2]], [False, True])
    log_probs, reference = torch.tensor([[-1.0, -3.0], [-0.5, 0.0]]), torch.tensor([[-1.5, -2.0], [-1.5, 0.0]])
    plain = settings(missing_eos_penalty=1.0)
    rewards = ppo.rewards_per_token(log_probs - reference, rollout, torch.tensor([2.0, 3.0]), 0.1, plain)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1 + 2 - 1], [-0.1 + 3, 0.0]]))
    assert ppo.kl_per_answer(log_probs, reference) == pytest.approx(((0.5 - 1.0) + 1.0) / 2)
    scaled = ppo.rewards_per_token(
        log_probs - reference,
        rollout,
        torch.tensor([2.0, 3.0]),
        0.1,
        settings(whiten_rewards=True, missing_eos_penalty=1.0),
    )
    mean = (-0.05 + 1.1 + 2.9) / 3
    spread = math.sqrt(sum((x - mean) ** 2 for x in (-0.05, 1.1, 2.9)) / 3)
    expected = [[(x - mean) / spread + mean for x in row] for row in ([-0.05, 1.1], [2.9])]
    torch.testing.assert_close(scaled, torch.tensor([expected[0], [*expected[1], 0.0]]))
    assert float(scaled[rollout.mask].mean()) == pytest.approx(mean), "the mean of rewards stays"


def test_the_penalty_follows_kl_to_its_target() -> None:
    adaptive = settings(target_kl=6.0, horizon=640)
    assert ppo.next_kl_coef(0.1, 6.6, 64, adaptive) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert ppo.next_kl_coef(0.1, 60, 64, adaptive) == pytest.approx(0.1 * (1 + 0.1 * 0.2))
    assert ppo.next_kl_coef(0.1, -1, 64, adaptive) == pytest.approx(0.1 * (1 - 0.1 * 0.2))
    assert ppo.next_kl_coef(0.1, 60, 64, settings(target_kl=None)) == 0.1


def test_whitened_values_have_mean_0_and_variance_1_without_padding() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    found = ppo.whitened(torch.tensor([[1.0, 2.0], [6.0, 0.0]]), mask)
    spread = math.sqrt(14 / 3)
    torch.testing.assert_close(found, torch.tensor([[-2 / spread, -1 / spread], [3 / spread, 0.0]]))


def test_explained_variance_of_perfect_and_of_constant_values() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert ppo.explained_variance(returns + 3, returns) == pytest.approx(1)
    assert ppo.explained_variance(torch.ones(3), returns) == 0
    assert ppo.explained_variance(returns, torch.ones(3)) == 0


def test_every_prompt_is_sampled_once_per_pass_and_every_episode_used_once_per_epoch() -> None:
    chosen = settings(total_episodes=20, batch_size=8)
    drawn = [draw for step in (1, 2, 3) for draw in ppo.prompt_schedule(7, step, chosen, seed=7)]
    assert len(drawn) == 20
    passes = [[row for epoch, row in drawn if epoch == e] for e in (1, 2, 3)]
    assert [sorted(p) for p in passes[:2]] == [list(range(7))] * 2
    assert passes[0] != passes[1]
    steps = list(ppo.mini_batches(8, 3, 2, "seed"))
    assert [len(step) for step in steps] == [3, 3, 2] * 2
    assert all(sorted(e for step in epoch for e in step) == list(range(8)) for epoch in (steps[:3], steps[3:]))


@pytest.mark.parametrize("mini_batch_size", [1, 4], ids=["accumulated", "at once"])
def test_the_gradient_of_the_total_loss_matches_finite_differences(mini_batch_size: int) -> None:
    """In float64, against central differences of a loss that is computed token by token, each episode by itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # whose layer norms do not round to float32

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        max_position_embeddings=32,
    )
    lora = LoraConfig(
        r=2, target_modules=["query_key_value", "dense_4h_to_h"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(GPTNeoXForCausalLM(config).double(), lora, autocast_adapter_dtype=False).double().eval()
    head = ppo.value_head(model)
    assert head.weight.dtype == torch.float64
    with torch.no_grad():
        head.weight.normal_()
    rollout = rollout_of(
        [[1, 5, 6], [1, 7], [1, 8, 9, 4], [3]], [[4, 5, 2], [6], [7, 8, 9, 10], [11, 2]], [True, False, False, True]
    )
    noise, before, gains, returns = (torch.randn(4, 4, dtype=torch.float64) for _ in range(4))
    old = torch.zeros_like(noise)
    with torch.no_grad():
        old[rollout.mask] = ppo.forward(model, head, rollout, [0, 1, 2, 3], 0.7)[0]
    old += noise / 4 * rollout.mask  # so that some ratios are clipped and some are not
    chosen = settings(
        temperature=0.7,
        vf_coef=0.3,
        mini_batch_size=mini_batch_size,
        gradient_accumulation_steps=4,
        num_ppo_epochs=1,
        max_grad_norm=1e9,
        max_kl=None,
    )

    def loss() -> float:
        total, tokens = 0.0, 0
        with torch.no_grad():
            for e, (prompt, answer) in enumerate(zip(rollout.prompts, rollout.answers, strict=True)):
                hidden = (
                    model.get_base_model().base_model(input_ids=torch.tensor([prompt + answer])).last_hidden_state[0]
                )
                scores = (model.get_base_model().get_output_embeddings()(hidden) / 0.7).log_softmax(-1)
                for t, token in enumerate(answer):
                    at = len(prompt) + t - 1
                    ratio = math.exp(float(scores[at, token] - old[e, t]))
                    gain, wanted, was = (float(x[e, t]) for x in (gains, returns, before))
                    value = float(head(hidden[at]))
                    total += max(-ratio * gain, -min(max(ratio, 0.8), 1.2) * gain)
                    close = was + min(max(value - was, -0.2), 0.2)
                    total += 0.3 * 0.5 * max((value - wanted) ** 2, (close - wanted) ** 2)
                    tokens += 1
        return total / tokens

    weights = {**trainable(model), **dict(head.named_parameters())}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    slopes = {}
    for name, weight in weights.items():
        direction = torch.randn_like(weight)
        around = []
        for sign in (1, -1):
            weight.data = start[name] + sign * 1e-5 * direction
            around.append(loss())
        weight.data = start[name].clone()
        slopes[name] = (direction, (around[0] - around[1]) / 2e-5)
    wanted, judged = loss(), ppo.TokenValues(old, before, torch.zeros_like(old))
    found = ppo.update(
        whole(model), head, torch.optim.SGD(weights.values()), 1.0, rollout, judged, gains, returns, chosen, "seed"
    )
    assert found["updates"] == 1
    assert 0 < found["clip_fraction"] < 1
    assert found["policy_loss"] + 0.3 * found["value_loss"] == pytest.approx(wanted, abs=1e-10)
    for name, (direction, slope) in slopes.items():
        gradient = start[name] - weights[name].detach()
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8), name


# answers
# ----------------------------------------------------------------------------------------------------------------------


def test_sampling_frequencies_match_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 2.0, -torch.inf, 1.0, -1.0]])
    numbers = [(i + 0.5) / 1000 for i in range(1000)]
    for temperature in (1.0, 2.0):
        tokens = draw(logits.expand(1000, -1), numbers, temperature)
        wanted = (1000 * (logits[0] / temperature).softmax(-1)).tolist()
        assert [tokens.count(token) for token in range(5)] == pytest.approx(wanted, abs=1)
        assert 2 not in tokens
    assert draw(logits, [1 - 1e-16], 1.0) == [4]


@pytest.mark.parametrize(
    "changes", [{"rollout_batch_size": 1}, {"rollout_batch_size": 3}, {"response_length": 5}], ids=str
)
def test_sampled_answers_do_not_depend_on_batch_padding_or_length_limit(
    tiny_model: Path, tiny_tokenizer: Any, changes: dict[str, int]
) -> None:
    model, prompts = policy(tiny_model).eval(), prompts_of(tiny_tokenizer) * 2
    rows, ending = list(range(8)), copy.deepcopy(tiny_tokenizer)
    unended = ppo.roll_out(whole(model), tiny_tokenizer, rows, prompts, settings(response_length=24), "7 1").answers
    ending.eos_token = tiny_tokenizer.convert_ids_to_tokens(unended[0][9])  # so that an answer leaves the batch early
    wanted = ppo.roll_out(whole(model), ending, rows, prompts, settings(response_length=24), "7 1")
    found = ppo.roll_out(whole(model), ending, rows, prompts, settings(**{"response_length": 24, **changes}), "7 1")
    assert found.answers == [answer[: changes.get("response_length", 24)] for answer in wanted.answers]
    assert len({len(answer) for answer in wanted.answers}) > 1, "all end together, so nothing leaves the batch"
    assert len({*map(tuple, wanted.answers)}) == 8, "a prompt that comes twice is answered twice"
    assert wanted.finished.tolist() == [
        answer[-1] in {tiny_tokenizer.eos_token_id, ending.eos_token_id} for answer in wanted.answers
    ]
    assert wanted.mask.sum(1).tolist() == [len(answer) for answer in wanted.answers]


def test_sampling_matches_the_logits_without_cache_or_padding(tiny_model: Path, tiny_tokenizer: Any) -> None:
    model, prompts = policy(tiny_model).eval(), prompts_of(tiny_tokenizer)
    numbers = [[0.1, 0.9, 0.5, 0.3, 0.7]] * 4
    found = decode(model.get_base_model(), prompts, sampled(numbers, 1.3), 5, (), 0)
    for prompt, answer in zip(prompts, found, strict=True):
        for t, token in enumerate(answer):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer[:t]])).logits[:, -1]
            assert draw(logits, [numbers[0][t]], 1.3) == [token]


def test_values_of_a_sample_do_not_depend_on_other_samples_or_padding(tiny_model: Path, tiny_tokenizer: Any) -> None:
    from dagster_project.training.methods.attention import attention_for

    model, prompts = policy(tiny_model, init_lora_weights=False).eval(), prompts_of(tiny_tokenizer)
    head = ppo.value_head(model)
    torch.nn.init.normal_(head.weight)
    rollout = ppo.roll_out(whole(model), tiny_tokenizer, [0, 1, 2, 3], prompts, SMALL, "7 1")
    plain = []
    for prompt, answer in zip(prompts, rollout.answers, strict=True):  # padded on the left, with a mask
        ids, mask = torch.tensor([[0] * 9 + prompt + answer]), torch.tensor([[0] * 9 + [1] * len(prompt + answer)])
        with torch.no_grad():
            hidden = model.get_base_model().base_model(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
            )
            states = hidden.last_hidden_state[0, -len(answer) - 1 : -1]
            scores = (model.get_base_model().lm_head(states) / 0.9).log_softmax(-1)
        plain.append((scores.gather(1, torch.tensor(answer)[:, None])[:, 0], head(states)[:, 0]))
    for attention in (attention_for(torch.device("cpu")), "sdpa"):
        model.get_base_model().set_attn_implementation(attention)
        for episodes in ([0], [3, 0, 1], [0, 1, 2, 3]):
            with torch.no_grad():
                log_probs, values, _ = ppo.forward(model, head, rollout, episodes, 0.9)
            torch.testing.assert_close(log_probs, torch.cat([plain[e][0] for e in episodes]), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values, torch.cat([plain[e][1] for e in episodes]), atol=1e-4, rtol=1e-5)


# learning
# ----------------------------------------------------------------------------------------------------------------------


def test_ppo_solves_a_bandit() -> None:
    """One token, an arm each: with a KL penalty the best policy is pi_ref exp(r
    / beta), normalized (arXiv 2305.18290, equation 4)."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    arms = ["</s>", *"abcdefg"]
    raw = Tokenizer(models.WordLevel({arm: number for number, arm in enumerate(arms)}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>", model_max_length=8)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    won = torch.tensor([0, 0.2, 1, 0, 0.5, 0.8, 0.1, 0.3])

    def chances() -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([[1]])).logits[0, -1].softmax(-1)

    start = chances()
    optimum = start * (won / 0.3).exp()
    optimum /= optimum.sum()
    chosen = settings(
        total_episodes=256 * 16,
        batch_size=256,
        mini_batch_size=64,
        rollout_batch_size=256,
        response_length=1,
        kl_coef=0.3,
        missing_eos_penalty=0.0,
        learning_rate=2e-2,
        max_kl=None,
    )
    ppo.train(
        whole(model),
        tokenizer,
        [[1]],
        lambda _, texts, __: [float(won[arms.index(text or "</s>")]) for text in texts],
        chosen,
        COMPUTE,
    )
    assert float((optimum - start).abs().sum()) / 2 > 0.2
    assert float((optimum - chances()).abs().sum()) / 2 < 0.05


@pytest.fixture(scope="module")
def learnt(tiny_model: Path, tiny_tokenizer: Any) -> ppo.PPOHistory:
    """The small fixed run that docs/ppo.md shows."""
    chosen = settings(
        total_episodes=768,
        batch_size=64,
        mini_batch_size=32,
        num_ppo_epochs=4,
        learning_rate=5e-3,
        kl_coef=0.02,
        target_kl=10.0,
        horizon=64,
        vf_coef=0.5,
    )
    return ppo.train(
        whole(policy(tiny_model)), tiny_tokenizer, prompts_of(tiny_tokenizer), small_letters, chosen, COMPUTE
    )


def test_the_mean_reward_rises_and_kl_stays_under_its_target(learnt: ppo.PPOHistory) -> None:
    rewards = [point["reward"] for point in learnt.curve]
    assert sum(rewards[-2:]) / 2 > 2 * sum(rewards[:2]) / 2
    assert max(point["kl"] for point in learnt.curve) < 10.0
    assert (learnt.stopped, len(learnt.curve), len(learnt.seen)) == ("", 12, 768)


def test_before_the_first_update_policy_and_reference_are_equal(learnt: ppo.PPOHistory) -> None:
    assert learnt.curve[0]["kl"] == 0.0
    assert learnt.curve[1]["kl"] != 0.0


def test_the_kl_coefficient_follows_the_controller(learnt: ppo.PPOHistory) -> None:
    for point, after in zip(learnt.curve, learnt.curve[1:], strict=False):
        error = min(max(point["kl"] / 10.0 - 1, -0.2), 0.2)
        assert after["kl_coef"] == pytest.approx(point["kl_coef"] * (1 + error))


FIGURES = (
    "reward",
    "kl",
    "kl_coef",
    "entropy",
    "response_length",
    "policy_loss",
    "value_loss",
    "clip_fraction",
    "explained_variance",
    "updates",
)


def test_the_docs_show_the_small_run_as_it_is(learnt: ppo.PPOHistory) -> None:
    text = (ROOT / "docs" / "ppo.md").read_text()
    lines = [
        f"| {point['step']} | " + " | ".join(f"{point[name]:.4g}" for name in FIGURES) + " |" for point in learnt.curve
    ]
    shown = re.findall(r"^\| \d+ \|.*\|$", text, re.MULTILINE)
    assert f"| iteration | {' | '.join(FIGURES)} |" in text
    numbers = [[float(cell) for cell in line.strip("| ").split(" | ")] for line in (*shown, *lines)]
    assert len(shown) == len(lines) and numbers[: len(shown)] == [
        pytest.approx(row, rel=0.05, abs=0.01) for row in numbers[len(shown) :]
    ], "\n".join(lines)


def test_ppo_trains_in_bfloat16(tiny_model: Path, tiny_tokenizer: Any) -> None:
    model = policy(tiny_model, dtype=torch.bfloat16)
    for weight in trainable(model).values():
        weight.data = weight.data.float()
    course = ppo.train(
        whole(model), tiny_tokenizer, prompts_of(tiny_tokenizer), small_letters, settings(total_episodes=64), COMPUTE
    )
    assert (course.curve[0]["kl"], course.stopped) == (0.0, "")
    assert all(math.isfinite(value) for point in course.curve for value in point.values())
    assert course.curve[0]["approx_kl"] > 0


def test_updates_stop_once_the_policy_has_moved_too_far(tiny_model: Path, tiny_tokenizer: Any) -> None:
    chosen = settings(total_episodes=32, num_ppo_epochs=4, learning_rate=3e-2)
    free, held = (
        ppo.train(
            whole(policy(tiny_model)),
            tiny_tokenizer,
            prompts_of(tiny_tokenizer),
            small_letters,
            chosen.model_copy(update=change),
            COMPUTE,
        )
        for change in ({"max_kl": None}, {"max_kl": 0.02})
    )
    assert free.curve[0]["updates"] == 16
    assert 1 <= held.curve[0]["updates"] < 16
    assert held.curve[0]["approx_kl"] <= 0.02 < free.curve[0]["approx_kl"]


# what would be in vain
# --------------------------------------------------------------------------------------------------------------------


def refusal(
    folder: Path,
    tokenizer: Any,
    reward: ppo.Reward = small_letters,
    model: Any = None,
    prompts: Any = None,
    **changes: Any,
) -> str:
    model = model or policy(folder)
    before = sha256_of_tensors(trainable(model))
    with pytest.raises(InputError) as refused:
        ppo.train(
            whole(model),
            tokenizer,
            prompts_of(tokenizer) if prompts is None else prompts,
            reward,
            settings(**changes),
            COMPUTE,
        )
    assert sha256_of_tensors(trainable(model)) == before
    return str(refused.value)


def test_a_reward_that_is_not_finite_is_refused_with_the_answer(tiny_model: Path, tiny_tokenizer: Any) -> None:
    said = refusal(tiny_model, tiny_tokenizer, lambda rows, *_: [math.nan] * len(rows))
    assert re.match(r"ppo: the reward of an answer to prompt \d is nan: '.+'\nhint: fix the reward", said)


def test_a_reward_that_never_varies_is_refused_unless_allowed(tiny_model: Path, tiny_tokenizer: Any) -> None:
    said = refusal(tiny_model, tiny_tokenizer, lambda rows, *_: [0.25] * len(rows))
    assert said.startswith(
        "ppo: all 32 answers of the first iteration have the same reward, 0.25: there is nothing to learn\nhint: "
    )
    chosen = settings(total_episodes=32, allow_constant_reward=True)
    constant = ppo.train(
        whole(policy(tiny_model)),
        tiny_tokenizer,
        prompts_of(tiny_tokenizer),
        lambda rows, *_: [0.25] * len(rows),
        chosen,
        COMPUTE,
    )
    assert constant.curve[0]["reward"] == 0.25


def test_a_reward_of_too_few_numbers_is_refused(tiny_model: Path, tiny_tokenizer: Any) -> None:
    assert refusal(tiny_model, tiny_tokenizer, lambda *_: [1.0]).startswith(
        "ppo: the reward gave 1 numbers for 32 answers"
    )


def test_a_policy_with_only_empty_answers_is_refused(
    tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "draw", lambda logits, *_: [tiny_tokenizer.eos_token_id] * len(logits))
    said = refusal(tiny_model, tiny_tokenizer)
    assert said.startswith(
        "ppo: every answer of the first iteration is empty: the policy ends its turn immediately\nhint: look at the SFT"
        " adapter"
    )


def test_prompts_too_long_for_an_answer_are_refused_and_the_first_is_named(
    tiny_model: Path, tiny_tokenizer: Any
) -> None:
    said = refusal(tiny_model, tiny_tokenizer, prompts=[[5], [5] * 1017, [5] * 2000])
    assert said.startswith(
        "ppo: 2 of 3 prompts leave no room for 8 tokens in a context of 1024 (first: prompt 1 with 1017 tokens)\nhint:"
        " lower"
    )
    assert refusal(tiny_model, tiny_tokenizer, prompts=[]).startswith("ppo: there are no prompts\nhint: ")


def test_an_adapter_that_is_not_fresh_is_refused(tiny_model: Path, tiny_tokenizer: Any) -> None:
    said = refusal(tiny_model, tiny_tokenizer, model=policy(tiny_model, init_lora_weights=False))
    assert re.match(r"ppo: before the first update the policy is \S+ nats per token from its reference", said)


def test_exploding_kl_ends_the_run_with_the_previous_weights(tiny_model: Path, tiny_tokenizer: Any) -> None:
    wild = settings(learning_rate=3e-2, max_kl=None, explode_kl=1.5, total_episodes=320, lr_scheduler_type="constant")
    model = policy(tiny_model)
    course = ppo.train(whole(model), tiny_tokenizer, prompts_of(tiny_tokenizer), small_letters, wild, COMPUTE)
    found = re.match(
        r"ppo: iteration (\d+): KL from the reference is (\S+) nats per answer, over explode_kl 1.5. The weights"
        r" at the start of iteration (\d+) are kept;"
        r" lower learning_rate",
        course.stopped,
    )
    assert found, course.stopped
    step, kl, kept = int(found[1]), float(found[2]), int(found[3])
    assert kl > 1.5 and (len(course.curve), kept) == (step - 1, step - 1)
    assert {at for at, _, _ in course.seen} == {*range(1, kept)}, "the update of the iteration before is undone"
    last = policy(tiny_model)
    if kept > 1:
        calm = wild.model_copy(update={"total_episodes": 32 * (kept - 1), "explode_kl": 1e9})
        ppo.train(whole(last), tiny_tokenizer, prompts_of(tiny_tokenizer), small_letters, calm, COMPUTE)
    assert sha256_of_tensors(trainable(model)) == sha256_of_tensors(trainable(last))


@pytest.mark.parametrize("rate", [1e3, math.inf], ids=["weights far away", "weights that are no numbers"])
def test_exploding_kl_in_the_last_update_is_detected(tiny_model: Path, tiny_tokenizer: Any, rate: float) -> None:
    model = policy(tiny_model)
    before = sha256_of_tensors(trainable(model))
    chosen = settings(
        total_episodes=32, learning_rate=rate, max_kl=None, explode_kl=5.0, mini_batch_size=32, num_ppo_epochs=1
    )
    course = ppo.train(whole(model), tiny_tokenizer, prompts_of(tiny_tokenizer), small_letters, chosen, COMPUTE)
    kl = "KL of the policy before its updates from the policy after them is"
    assert re.match(rf"ppo: iteration 1: {kl} .* The weights at the start of iteration 1 are kept", course.stopped), (
        course.stopped
    )
    assert sha256_of_tensors(trainable(model)) == before


def test_the_kl_of_the_last_update_is_of_the_sampling_policy_from_the_final_one(
    tiny_model: Path, tiny_tokenizer: Any
) -> None:
    prompts = prompts_of(tiny_tokenizer)
    chosen = settings(total_episodes=32, learning_rate=3e-2, max_kl=None, explode_kl=1e-3)
    stopped = ppo.train(whole(policy(tiny_model)), tiny_tokenizer, prompts, small_letters, chosen, COMPUTE).stopped
    said = float(stopped.partition("after them is ")[2].split()[0])
    final = policy(tiny_model)
    free = chosen.model_copy(update={"explode_kl": 1e9})
    assert not ppo.train(whole(final), tiny_tokenizer, prompts, small_letters, free, COMPUTE).stopped
    rows = [row for _, row in ppo.prompt_schedule(len(prompts), 1, chosen, COMPUTE.seed)]
    sampling = policy(tiny_model)
    asked = [prompts[row] for row in rows]
    rollout = ppo.roll_out(whole(sampling), tiny_tokenizer, rows, asked, chosen, f"{COMPUTE.seed} 1")
    gaps = []
    for prompt, answer in zip(asked, rollout.answers, strict=True):
        of_answer = []
        for model in (sampling, final):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1] / chosen.temperature
            of_answer.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()))
        gaps.append(of_answer[0] - of_answer[1])
    assert said == pytest.approx(sum(gaps) / len(gaps), rel=1e-3) and said > 1e-3


# the same bytes
# ----------------------------------------------------------------------------------------------------------------------


def result(folder: Path, model: Any, course: ppo.PPOHistory, name: str) -> None:
    found = {"weights": sha256_of_tensors(trainable(model)), **dataclasses.asdict(course), "seconds": 0}
    (folder / f"{name}.json").write_text(json.dumps(found))


def run(folder: Path, tiny_model: Path, name: str, reward: ppo.Reward = small_letters, keep: bool = True) -> None:
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    model, tokenizer = policy(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    checkpoints = Checkpoints(folder / name, {"of": "ppo"}) if keep else None
    chosen = settings(total_episodes=128, target_kl=1.0, horizon=32, save_steps=2)
    course = ppo.train(whole(model), tokenizer, prompts_of(tokenizer), reward, chosen, COMPUTE, checkpoints)
    result(folder, model, course, name)


def first_process(work: dict[str, str]) -> None:
    start_others(work, "__main__")
    run(Path(work["folder"]), Path(work["model"]), "two")


def other_process(work: dict[str, str]) -> None:
    run(Path(work["folder"]), Path(work["model"]), "other", keep=False)


def main() -> None:
    """One run; one that is killed in its fourth iteration and started again; one that two processes share."""
    import peft  # noqa: F401

    folder, tiny_model = Path(sys.argv[1]), Path(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    launching.START_METHOD = "fork"
    ready_to_fork()
    asked = 0

    def killing(rows: Sequence[int], texts: Sequence[str], _: Any) -> list[float]:
        nonlocal asked
        asked += 1
        if asked == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return small_letters(rows, texts)

    def shared() -> None:
        launch(2, "__main__", {"folder": str(folder), "model": str(tiny_model)})

    log = folder / "log"
    ends = [
        run_in_child(partial(run, folder, tiny_model, "one"), log),
        run_in_child(partial(run, folder, tiny_model, "killed", killing), log),
        run_in_child(partial(run, folder, tiny_model, "killed"), log),
        run_in_child(shared, log),
    ]
    (folder / "ends.json").write_text(json.dumps(ends))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ppo")
    run_main(__file__, folder, tiny_model)
    log = (folder / "log").read_text()
    assert json.loads((folder / "ends.json").read_text()) == [0, -signal.SIGKILL, 0, 0], log
    return {
        "log": log,
        **{name: json.loads((folder / f"{name}.json").read_text()) for name in ("one", "killed", "two", "other")},
    }


@pytest.mark.long
def test_a_killed_run_resumes_and_ends_in_the_same_bytes(ran: dict[str, Any]) -> None:
    assert "ppo: resuming from the checkpoint of iteration 2 of 4" in ran["log"]
    assert ran["killed"] == ran["one"]


@pytest.mark.long
def test_two_runs_give_the_same_bytes(ran: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    run(tmp_path, tiny_model, "again", keep=False)
    assert json.loads((tmp_path / "again.json").read_text()) == ran["one"]


@pytest.mark.long
def test_two_processes_learn_like_one(ran: dict[str, Any]) -> None:
    assert ran["two"] == ran["other"]
    for one, two in zip(ran["one"]["curve"], ran["two"]["curve"], strict=True):
        assert two == pytest.approx(one, rel=1e-2, abs=1e-3)


@pytest.mark.long
def test_an_interrupted_run_saves_and_resumes_to_the_same_bytes(
    ran: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    asked = 0

    def stopping(rows: Sequence[int], texts: Sequence[str], _: Any) -> list[float]:
        nonlocal asked
        asked += 1
        if asked == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return small_letters(rows, texts)

    with pytest.raises(Interrupted, match="interrupted at iteration 3; the next run resumes from there"):
        run(tmp_path, tiny_model, "stopped", stopping)
    run(tmp_path, tiny_model, "stopped")
    assert json.loads((tmp_path / "stopped.json").read_text()) == ran["one"]


if __name__ == "__main__":
    main()
