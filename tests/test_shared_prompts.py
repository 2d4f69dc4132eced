"""DPO and reward models read what two answers have in common once; losses,
margins, gradients and weights are those of plain passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.gradients import assert_close, trained_gradients
from builders.live_bytes import LiveBytes
from torch.nn.functional import logsigmoid

from dagster_project.core.params import Compute
from dagster_project.training.methods.build import build, causal
from dagster_project.training.planning.memory import TrainingSpec
from dagster_project.training.planning.pairs import largest_pass, lengths_of
from dagster_project.training.tokens.collators import SIZES
from dagster_project.training.trainers.alignment import preference, reward_model
from dagster_project.training.trainers.alignment.trl_trainers import shared_prompts, training
from dagster_project.training.trainers.alignment.trl_trainers.pair_attention import attending_by_pair
from dagster_project.training.trainers.alignment.trl_trainers.shared_prompts import collate_shared
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.params import PreferenceParams
from dagster_project.training.trainers.harness.sharding import ShardedModel

Pair = tuple[list[int], list[int], list[int]]

COMPUTE = Compute(seed=3, threads=1, dtype="float32")
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
PAIRS: list[Pair] = [
    ([5, 6, 7, 8, 9], [10, 11, 12], [13]),
    ([21] * 17, [30, 31, 32, 33], [30, 31, 40, 41, 42, 43, 44, 45]),  # both answers begin alike
    ([7], [50, 51], [52, 53]),
    ([60, 61, 62], [70, 71], [70, 71, 72]),  # one answer begins with the other
    ([60, 61, 63], [75], [76, 77, 78, 79, 80, 81, 82]),
    ([9, 8, 7, 6], [5, 4], [5, 4]),
]
BETA = 0.3


def rows_of(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": p, "chosen_ids": chosen, "rejected_ids": rejected, "pair": i}
        for i, (p, chosen, rejected) in enumerate(pairs)
    ]


def judged_rows_of(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {"chosen_ids": p + chosen, "rejected_ids": p + rejected, "margin": 0.1 * i}
        for i, (p, chosen, rejected) in enumerate(pairs)
    ]


def randomized(model: Any, seed: int = 5) -> Any:
    """A model whose trained weights have an effect."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data + 0.1 * torch.randn_like(weight)
    return model


@pytest.fixture
def policy(tiny_model: Path) -> Any:
    torch.manual_seed(1)
    return preference.policy(tiny_model, LORA, torch.device("cpu"), torch.float32, "aligned.mine", "lora").model


@pytest.fixture
def judge(tiny_model: Path) -> Any:
    torch.manual_seed(1)
    return reward_model.build(tiny_model, LORA, torch.device("cpu"), torch.float32, "reward_model")


def plain_log_probability(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of an answer, from one pass over its own text."""
    ids = torch.tensor([prompt + answer])
    scores = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return scores.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def plain_reward(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    reward: torch.Tensor = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, 0]
    return reward


def test_a_common_beginning_is_in_the_row_once_and_positions_go_on_from_it() -> None:
    batch, places = collate_shared([([5, 6, 7], [5, 6, 8, 9]), ([1], [1])])
    spare = SIZES - 7
    assert batch["packed_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1] + [0] * spare]
    assert batch["packed_positions"].tolist() == [[0, 1, 2, 2, 3, 0, 0, *range(spare)]]
    assert batch["pair_lengths"] == [(2, 1, 2), (0, 1, 1), (spare, 0, 0)]
    assert [places[0].place(side, i) for side, n in ((0, 3), (1, 4)) for i in range(n)] == [0, 1, 2, 0, 1, 3, 4]


def test_log_probabilities_and_gradients_are_those_of_one_pass_for_each_answer(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = randomized(policy), shared_prompts.collate_pairs(rows_of(PAIRS))
    monkeypatch.setattr(shared_prompts, "CHUNK", 5)
    weights = torch.linspace(-1, 2, 2 * len(PAIRS))  # each answer with its own gradient
    width = max(len(p) + len(answer) for p, *answers in PAIRS for answer in answers)
    with attending_by_pair(causal(model)):
        found = shared_prompts.log_probabilities(
            model, input_ids=torch.zeros(2 * len(PAIRS), width), **batch
        ).log_probs.sum(1)
        (found * weights).sum().backward()
    gradients = trained_gradients(model)
    expected = torch.stack([plain_log_probability(model, p, answers[side]) for side in (0, 1) for p, *answers in PAIRS])
    (expected * weights).sum().backward()
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert_close(gradients, trained_gradients(model), 1e-5)


def test_rewards_and_gradients_are_those_of_one_pass_for_each_answer(judge: Any) -> None:
    model, batch = randomized(judge), shared_prompts.collate_pairs(judged_rows_of(PAIRS))
    weights = torch.linspace(-1, 2, 2 * len(PAIRS))
    with attending_by_pair(causal(model)):
        found = shared_prompts.rewards(model, **batch).logits[:, 0]
        (found * weights).sum().backward()
    gradients = trained_gradients(model)
    expected = torch.stack([plain_reward(model, p, answers[side]) for side in (0, 1) for p, *answers in PAIRS])
    (expected * weights).sum().backward()
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert_close(gradients, trained_gradients(model), 1e-5)


ROUNDED = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen3": {"head_dim": 8},
    "phimoe": {"sliding_window": 3, "num_local_experts": 2},
}
PADDED = {
    "doge": {},
    "gemma2": {"head_dim": 8},
    "granite": {"logits_scaling": 2.0},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron": {"head_dim": 8},
}


def small(kind: str, **settings: Any) -> Any:
    """A random model of two layers; those of PADDED support no other attention than the plain one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90, "pad_token_id": 0}
    if kind != "mamba2":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes | settings), attn_implementation="eager" if kind in PADDED else "sdpa"
    )
    for weight in model.parameters():
        weight.data *= 4
        weight.requires_grad_(False)
    return model.eval()


@pytest.mark.parametrize("kind", ROUNDED)
def test_models_with_other_attention_compute_the_same(kind: str) -> None:
    model = small(kind, **ROUNDED[kind])
    assert shared_prompts.reads_prompts_once(model, "cpu") and not shared_prompts.reads_prompts_once(model, "cuda")
    width = max(len(p) + len(answer) for p, *answers in PAIRS for answer in answers)
    with attending_by_pair(model):
        batch = shared_prompts.collate_pairs(rows_of(PAIRS))
        found = shared_prompts.log_probabilities(
            model, input_ids=torch.zeros(2 * len(PAIRS), width), **batch
        ).log_probs.sum(1)
    expected = [float(plain_log_probability(model, p, answers[side])) for side in (0, 1) for p, *answers in PAIRS]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", PADDED)
def test_models_that_cap_or_scale_scores_or_keep_a_state_read_padded_batches(kind: str) -> None:
    model = small(kind, **PADDED[kind])
    assert not shared_prompts.reads_prompts_once(model, "cpu")
    assert model.config._attn_implementation == "eager"


def test_a_model_whose_output_layer_is_trained_reads_padded_batches(tiny_model: Path) -> None:
    keys = {"r": 4, "target_modules": ["q_proj", "lm_head"]}
    model = build("lora", keys, tiny_model, torch.device("cpu"), torch.float32, "a", merge=False, packs=False)
    assert not shared_prompts.reads_prompts_once(model.model, "cpu")


# ---- planning
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dpo", "orpo", "reward model"])
def test_predicted_memory_is_what_a_real_pass_has_at_the_same_time(
    kind: str, tiny_model: Path, policy: Any, judge: Any
) -> None:
    pairs = [
        ([7 + n] * shared, [20] * first, [30] * second)
        for n, (shared, first, second) in enumerate([(40, 31, 25), (3, 60, 90), (50, 9, 70)])
    ]
    sizes = tuple(map(lengths_of, pairs))
    assert sizes == ((40, 31, 25), (3, 60, 90), (50, 9, 70))
    counted = sum(len(answer) for _, *answers in pairs for answer in answers) if kind != "reward model" else 0
    counted += sum(len(prompt) - 1 for prompt, *_ in pairs) if kind == "orpo" else 0
    lengths = [sum(size) for size in sizes]
    spec = TrainingSpec(
        "cpu", torch.float32, tiny_model, "lora", LORA, lengths, counted, pair_lengths=sizes, timed=False
    )
    predicted = spec.prediction.memory
    model, rows = (policy, rows_of(pairs)) if counted else (judge, judged_rows_of(pairs))
    batch = shared_prompts.collate_pairs(rows, kind == "orpo")
    assert not counted or len(batch["target"]) == counted
    batch["input_ids"] = torch.zeros(
        2 * len(pairs), max(len(p) + len(answer) for p, *answers in pairs for answer in answers)
    )
    with attending_by_pair(causal(model)), LiveBytes() as live:
        if counted:
            shared_prompts.log_probabilities(model, **batch).log_probs.sum().backward()
        else:
            shared_prompts.rewards(model, **batch).logits.sum().backward()
    assert predicted.activations + predicted.logits + predicted.gradients == pytest.approx(live.peak, rel=0.1)


def test_the_largest_pass_is_that_of_a_typical_order() -> None:
    sizes = [1] * 90 + [50] * 10
    group = largest_pass(sizes, 4, 25)
    assert (
        len(set(group)) == 4 and 2 * 50 <= sum(sizes[row] for row in group) < 4 * 50
    )  # neither four mean ones nor the four largest
    assert sorted(largest_pass(sizes, 100, 1)) == list(range(100))


# ---- training
# ----------------------------------------------------------------------------------------------------------------------


PARAMS = PreferenceParams(
    learning_rate=1e-2,
    num_train_epochs=2,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    lr_scheduler_type="constant",
)


def train_plainly(
    model: Any, history: TrainingHistory, loss_of: Callable[[Sequence[int]], tuple[torch.Tensor, float]]
) -> list[list[float]]:
    """Loss, margin and gradient norm of each step of a plain loop over the same rows, in the same order.

    Args:
        loss_of: rows of a forward pass -> loss and margin.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PARAMS.learning_rate, weight_decay=0)
    found = []
    for step in sorted({step for step, _, _ in history.seen}):
        rows = [row for of_step, _, row in history.seen if of_step == step]
        passes = [rows[start : start + 2] for start in range(0, len(rows), 2)]
        values = []
        for some in passes:
            loss, margin = loss_of(some)
            (loss / len(passes)).backward()
            values.append((float(loss), margin))
        norm = torch.nn.utils.clip_grad_norm_(weights, PARAMS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append([sum(value) / len(passes) for value in zip(*values, strict=True)] + [float(norm)])
    return found


def assert_same_training(
    history: TrainingHistory, expected: list[list[float]], model: Any, plain: Any, steps: int = 4
) -> None:
    curve = [[point[name] for name in ("loss", "margin", "grad_norm")] for point in history.curve if "loss" in point]
    assert len(curve) == steps and curve == [pytest.approx(point, rel=1e-4, abs=1e-5) for point in expected]
    own, other = ({name: w.detach() for name, w in m.named_parameters() if w.requires_grad} for m in (model, plain))
    assert_close(own, other, 1e-3)


def test_the_rate_of_a_single_step_is_not_zero(policy: Any, tiny_tokenizer: Any) -> None:
    params = PARAMS.model_copy(update={"max_steps": 1, "lr_scheduler_type": "cosine"})
    shared = ShardedModel(policy, None, torch.device("cpu"))
    spec = preference.Dpo().trainer_spec(None)  # type: ignore[arg-type]
    history = training.train(spec, shared, tiny_tokenizer, rows_of(PAIRS), [], params, COMPUTE)
    assert [point["learning_rate"] for point in history.curve] == [params.learning_rate]


@pytest.mark.parametrize(
    ("kind", "rates"), [("seed_oss", {"head_dim": 8, "residual_dropout": 0.5}), ("gpt_bigcode", {"attn_pdrop": 0.5})]
)
def test_dpo_trains_without_dropout_that_is_not_a_layer(kind: str, rates: dict[str, Any], tiny_tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small(kind, **rates), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    shared, spec = ShardedModel(model, None, torch.device("cpu")), preference.Dpo().trainer_spec(None)  # type: ignore[arg-type]
    history = training.train(
        spec, shared, tiny_tokenizer, rows_of(PAIRS), [], PARAMS.model_copy(update={"learning_rate": 1e-9}), COMPUTE
    )
    assert history.losses == pytest.approx([math.log(2)] * 4, abs=1e-5)


@pytest.mark.parametrize(("loss_type", "swapped"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_dpo_is_the_training_of_a_plain_loop(loss_type: Any, swapped: float, policy: Any, tiny_tokenizer: Any) -> None:
    """cDPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf, eq. 3), if labels are assumed to be swapped."""
    assert shared_prompts.reads_prompts_once(policy, "cpu")
    plain, device = copy.deepcopy(policy), torch.device("cpu")
    spec = preference.Dpo(beta=BETA, loss_type=loss_type, label_smoothing=swapped).trainer_spec(None)  # type: ignore[arg-type]
    history = training.train(
        spec, ShardedModel(policy, None, device), tiny_tokenizer, rows_of(PAIRS), rows_of(PAIRS[:3]), PARAMS, COMPUTE
    )

    def loss_of(rows: Sequence[int]) -> tuple[torch.Tensor, float]:
        losses, margins = [], []
        for prompt, chosen, rejected in (PAIRS[row] for row in rows):
            with torch.no_grad(), plain.disable_adapter():
                reference = [plain_log_probability(plain, prompt, answer) for answer in (chosen, rejected)]
            good, bad = (
                plain_log_probability(plain, prompt, a) - r for a, r in zip((chosen, rejected), reference, strict=True)
            )
            margins.append(BETA * float(good - bad))
            ipo = (good / len(chosen) - bad / len(rejected) - 1 / (2 * BETA)) ** 2
            smoothed = -(1 - swapped) * logsigmoid(BETA * (good - bad)) - swapped * logsigmoid(BETA * (bad - good))
            losses.append(smoothed if loss_type == "sigmoid" else ipo)
        return torch.stack(losses).mean(), sum(margins) / len(margins)

    expected = train_plainly(plain, history, loss_of)
    assert_same_training(history, expected, policy, plain)
    *_, last = (point for point in history.curve if "validation_loss" in point)
    for name, values in zip(
        ("loss", "margin"), zip(*map(loss_of, ([0, 1], [2])), strict=True), strict=True
    ):  # a pass counts by its rows
        assert last[f"validation_{name}"] == pytest.approx(
            (2 * float(values[0]) + float(values[1])) / 3, rel=1e-4, abs=1e-5
        ), name


def _exo(x: torch.Tensor, swapped: float) -> torch.Tensor:
    """KL divergence of softmax(x, 0) from (1 - swapped, swapped) (arXiv 2402.00856, eq. 16)."""
    good = torch.sigmoid(x)
    return good * torch.log(good / (1 - swapped)) + (1 - good) * torch.log((1 - good) / swapped)


def _discopop(x: torch.Tensor) -> torch.Tensor:
    """arXiv 2406.08414, eq. 5, with the paper's temperature."""
    share = torch.sigmoid(x / 0.05)
    return (1 - share) * torch.log1p(torch.exp(-x)) + share * torch.exp(-x)


FORMULAS: dict[str, Callable[..., torch.Tensor]] = {
    "hinge": lambda a, b, **_: torch.relu(1 - BETA * (a - b)),
    "exo_pair": lambda a, b, swapped, **_: _exo(BETA * (a - b), swapped),
    "robust": lambda a, b, swapped, **_: (
        (1 - swapped) * torch.log1p(torch.exp(BETA * (b - a))) - swapped * torch.log1p(torch.exp(BETA * (a - b)))
    ) / (1 - 2 * swapped),
    "nca_pair": lambda a, b, **_: (
        torch.log1p(torch.exp(-BETA * a))
        + 0.5 * torch.log1p(torch.exp(BETA * a)) + 0.5 * torch.log1p(torch.exp(BETA * b))
    ),
    "bco_pair": lambda a, b, **_: torch.log1p(torch.exp(-BETA * a)) + torch.log1p(torch.exp(BETA * b)),
    "sppo_hard": lambda a, b, **_: (a - 1 / (2 * BETA)) ** 2 + (b + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda a, b, **_: 1 - torch.sigmoid(BETA * a) + torch.sigmoid(BETA * b),
    "apo_down": lambda a, b, **_: torch.sigmoid(BETA * a) + 1 - torch.sigmoid(BETA * (a - b)),
    "discopop": lambda a, b, **_: _discopop(BETA * (a - b)),
    "sigmoid_norm": lambda a, b, lengths, **_: torch.log1p(torch.exp(BETA * (b / lengths[1] - a / lengths[0]))),
}  # fmt: skip
"""Loss of a pair by the log-ratios of its chosen and its rejected answer, as its paper writes it."""


@pytest.mark.parametrize(
    ("loss_type", "swapped", "rpo_alpha"),
    [*((name, 0.2 if name in {"exo_pair", "robust"} else 0.0, 0.0) for name in FORMULAS), ("hinge", 0.0, 0.5)],
)
def test_each_loss_of_dpo_is_that_of_its_paper(
    loss_type: Any, swapped: float, rpo_alpha: float, policy: Any, tiny_tokenizer: Any
) -> None:
    plain = copy.deepcopy(policy)
    method = preference.Dpo(beta=BETA, loss_type=loss_type, label_smoothing=swapped, rpo_alpha=rpo_alpha)
    shared = ShardedModel(policy, None, torch.device("cpu"))
    spec = method.trainer_spec(None)  # type: ignore[arg-type]
    history = training.train(spec, shared, tiny_tokenizer, rows_of(PAIRS), [], PARAMS, COMPUTE)

    def loss_of(rows: Sequence[int]) -> tuple[torch.Tensor, float]:
        losses, margins, nats, tokens = [], [], [], 0
        for prompt, *answers in (PAIRS[row] for row in rows):
            with torch.no_grad(), plain.disable_adapter():
                reference = [plain_log_probability(plain, prompt, answer) for answer in answers]
            found = [plain_log_probability(plain, prompt, answer) for answer in answers]
            good, bad = (of_policy - of_sft for of_policy, of_sft in zip(found, reference, strict=True))
            losses.append(FORMULAS[loss_type](good, bad, swapped=swapped, lengths=[*map(len, answers)]))
            margins.append(BETA * float(good - bad))
            nats.append(-found[0])
            tokens += len(answers[0])
        likelihood = torch.stack(nats).sum() / tokens
        return torch.stack(losses).mean() + rpo_alpha * likelihood, sum(margins) / len(margins)

    assert_same_training(history, train_plainly(plain, history, loss_of), policy, plain)


def test_kto_is_the_training_of_a_plain_loop(policy: Any, tiny_tokenizer: Any) -> None:
    """Ethayarajh et al. 2024, eq. 7 and 8, with KL of the answers to other prompts in a pass, not below 0."""
    plain, params = copy.deepcopy(policy), PARAMS.model_copy(update={"num_train_epochs": 1})
    weights, rows = {True: 1.5, False: 0.5}, list[dict[str, Any]]()
    for i, (prompt, *answers) in enumerate(PAIRS):
        for answer, other, label in zip(answers, PAIRS[i - 1][1:], (True, False), strict=True):
            rows.append({"prompt_ids": prompt, "completion_ids": answer, "label": label, "KL_completion_ids": other})
    method = preference.Kto(beta=BETA, desirable_weight=weights[True], undesirable_weight=weights[False])
    shared = ShardedModel(policy, None, torch.device("cpu"))
    spec = method.trainer_spec(None)  # type: ignore[arg-type]
    history = training.train(spec, shared, tiny_tokenizer, rows, [], params, COMPUTE)

    def ratio(prompt: list[int], answer: list[int]) -> torch.Tensor:
        with torch.no_grad(), plain.disable_adapter():
            reference = plain_log_probability(plain, prompt, answer)
        return plain_log_probability(plain, prompt, answer) - reference

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, float]:
        some = [rows[number] for number in numbers]
        kl = torch.stack([ratio(row["prompt_ids"], row["KL_completion_ids"]) for row in some]).mean().detach()
        losses, rewards = [], {True: [], False: []}  # type: ignore[var-annotated]
        for row in some:
            above = ratio(row["prompt_ids"], row["completion_ids"]) - kl.clamp(min=0)
            losses.append(weights[row["label"]] * (1 - torch.sigmoid(BETA * above * (1 if row["label"] else -1))))
            rewards[row["label"]].append(BETA * float(above))
        return torch.stack(losses).mean(), sum(rewards[True]) - sum(rewards[False])

    assert_same_training(history, train_plainly(plain, history, loss_of), policy, plain, steps=3)


def test_a_reward_model_is_the_training_of_a_plain_loop(judge: Any, tiny_tokenizer: Any) -> None:
    assert shared_prompts.reads_prompts_once(judge, "cpu")
    plain, device = copy.deepcopy(judge), torch.device("cpu")
    rows = judged_rows_of(PAIRS)
    spec = reward_model.trainer_spec(center_rewards_coefficient=0.05)
    history = training.train(spec, ShardedModel(judge, None, device), tiny_tokenizer, rows, rows[:2], PARAMS, COMPUTE)

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, float]:
        values = [[plain_reward(plain, PAIRS[n][0], answer) for answer in PAIRS[n][1:]] for n in numbers]
        losses = [
            -logsigmoid(a - b - rows[n]["margin"]) + 0.05 * (a + b) ** 2
            for n, (a, b) in zip(numbers, values, strict=True)
        ]
        return torch.stack(losses).mean(), float(sum(a - b for a, b in values)) / len(values)

    assert_same_training(history, train_plainly(plain, history, loss_of), judge, plain)


def test_the_reference_is_computed_once(policy: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    read: list[int] = []

    def counted(model: Any, **inputs: Any) -> Any:
        if (
            not any(module.training for module in model.modules())
            and model.base_model.disable_adapter_layers
            and _is_off(model)
        ):
            read.append(len(inputs["last_token"]) // 2)
        return outputs(model, **inputs)

    def _is_off(model: PeftModel) -> bool:
        return any(getattr(module, "disable_adapters", False) is True for module in model.modules())

    outputs = shared_prompts.log_probabilities
    monkeypatch.setattr(shared_prompts, "log_probabilities", counted)
    spec = preference.Dpo().trainer_spec(None)  # type: ignore[arg-type]
    training.train(
        spec,
        ShardedModel(policy, None, torch.device("cpu")),
        tiny_tokenizer,
        rows_of(PAIRS),
        rows_of(PAIRS[:3]),
        PARAMS,
        COMPUTE,
    )
    assert sum(read) == len(PAIRS) + 3  # of two epochs and three validations
