"""RLOO and GRPO read each prompt once for all answers to it, and learn what a plain loop over single answers learns."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import random_policy
from builders.gradients import assert_close, trained_gradients
from builders.live_bytes import LiveBytes

from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.training.inference import decoding
from dagster_project.training.inference.sampling import draw, sampled, uniform_numbers
from dagster_project.training.methods.build import causal
from dagster_project.training.planning.answer_groups import AnswerPass, answer_pass
from dagster_project.training.planning.memory import TrainingSpec
from dagster_project.training.trainers.alignment import preference
from dagster_project.training.trainers.alignment.sampled_answers import SampledAnswers
from dagster_project.training.trainers.alignment.trl_trainers import answer_groups, shared_prompts, training
from dagster_project.training.trainers.alignment.trl_trainers.pair_attention import attending_by_pair
from dagster_project.training.trainers.harness.checkpoint import Checkpoints
from dagster_project.training.trainers.harness.params import PreferenceParams
from dagster_project.training.trainers.harness.sharding import ShardedModel
from dagster_project.training.trainers.harness.weight_audit import trainable

COMPUTE = Compute(seed=3, threads=1, dtype="float32")
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
PROMPTS = [[5, 6, 7, 8, 9], [21] * 17, [5, 6, 7, 8, 9], [7], [5, 6, 7, 8, 9], [21] * 17]
ANSWERS = [[10, 11, 12], [30, 31], [10, 11], [50], [40, 41, 42, 43, 44], [30, 31]]
WIDTH, LONGEST = 6, 5
ROWS = [{"prompt": prompt, "pair": i} for i, prompt in enumerate([[5, 6, 7, 8, 9], [21] * 17, [7, 8], [9, 30, 31, 32]])]


@pytest.fixture
def policy(tiny_model: Path) -> Any:
    return random_policy(tiny_model, LORA)


def plain(
    model: Any, prompt: Sequence[int], answer: Sequence[int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of an answer's tokens and entropies, from one pass over its own text."""
    ids = torch.tensor([[*prompt, *answer]])
    scores = (model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return scores.gather(-1, ids[0, len(prompt) :, None])[:, 0], -(scores.exp() * scores).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_a_group_has_the_log_probabilities_entropies_and_gradients_of_single_answers(
    policy: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prompts, "CHUNK", 5)
    weights = torch.linspace(-1, 2, len(ANSWERS) * WIDTH).view(len(ANSWERS), WIDTH)
    with attending_by_pair(causal(policy)):
        found, entropies = shared_prompts.of_answers(policy, PROMPTS, ANSWERS, WIDTH, temperature, with_entropy=True)
        assert entropies is not None
        (found * weights).sum().backward()
    gradients = trained_gradients(policy)
    expected = [plain(policy, p, a, temperature) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    sum((values * row[: len(values)]).sum() for (values, _), row in zip(expected, weights, strict=True)).backward()  # type: ignore[union-attr]
    for row, (log_probs, entropy) in enumerate(expected):
        rest = [0.0] * (WIDTH - len(entropy))
        assert found[row].tolist() == pytest.approx([*log_probs.tolist(), *rest], abs=1e-4)
        assert entropies[row].tolist() == pytest.approx([*entropy.tolist(), *rest], abs=1e-4)
    assert_close(gradients, trained_gradients(policy), 1e-5)


def test_the_row_has_each_prompt_once_and_does_not_depend_on_the_order_of_answers() -> None:
    order = [3, 1, 0, 5, 4, 2]
    first, second = (
        shared_prompts.collate_answers([PROMPTS[i] for i in some], [ANSWERS[i] for i in some], WIDTH)
        for some in (range(6), order)
    )
    assert (
        first["packed_ids"].tolist() == second["packed_ids"].tolist()
        and first["pair_lengths"] == second["pair_lengths"]
    )
    tokens = first["packed_ids"][0].tolist()
    # 17 and two equal answers, of which each keeps its last token; 5 and two beginnings that differ from the third; 1
    # and 1
    assert tokens.count(21) == 17 and tokens.count(5) == 1 and tokens.count(7) == 2
    assert sorted(first["slot"].tolist()) == sorted(
        row * WIDTH + i for row, answer in enumerate(ANSWERS) for i in range(len(answer))
    )


def test_equal_prompts_are_read_once_and_answered_each_for_itself(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read, run, model = [], decoding._run, causal(policy)

    def counted(model: Any, ids: torch.Tensor, *others: Any) -> torch.Tensor:
        read.append(tuple(ids.shape))
        return run(model, ids, *others)

    numbers = uniform_numbers("7", range(len(PROMPTS)), LONGEST)
    alone = [
        decoding.decode(model, [p], sampled([u], 1.0), LONGEST, (), 0)[0] for p, u in zip(PROMPTS, numbers, strict=True)
    ]
    monkeypatch.setattr(decoding, "_run", counted)
    assert decoding.decode(model, PROMPTS, sampled(numbers, 1.0), LONGEST, (), 0) == alone
    assert read == [(3, 17), *[(6, 1)] * (LONGEST - 1)]
    assert len({*map(tuple, alone)}) == len(alone), "equal answers to equal prompts show nothing"


def test_top_p_leaves_the_most_likely_tokens_with_their_relative_frequencies() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]]).log()
    numbers = [(i + 0.5) / 1000 for i in range(1000)]
    found = {p: draw(logits.expand(1000, -1), numbers, 1.0, p) for p in (0.3, 0.6, 0.7, 1.0)}
    counts = {p: [tokens.count(token) for token in range(5)] for p, tokens in found.items()}
    assert counts[0.3] == [0, 1000, 0, 0, 0]
    assert counts[0.6] == pytest.approx([0, 615, 0, 385, 0], abs=1)
    assert counts[0.7] == pytest.approx([0, 471, 0, 294, 235], abs=1)
    assert counts[1.0] == pytest.approx([100, 400, 50, 250, 200], abs=1)


# ---- training
# ----------------------------------------------------------------------------------------------------------------------


class Rewarded:
    """The part of an AlignmentRun that online methods read: rewards a share of the answers, and notes them."""

    def __init__(self) -> None:
        self.sampled = SampledAnswers()
        self.batches: list[list[tuple[int, list[int], float]]] = []

    def reward(self, rows: Sequence[int], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[float]:
        rewards = [sum(token % 3 == 0 for token in answer) / len(answer) for answer in ids]
        self.batches.append([(row, list(answer), value) for row, answer, value in zip(rows, ids, rewards, strict=True)])
        return rewards


LOSSES: dict[str, dict[str, Any]] = {
    "rloo": {},
    "grpo": {},
    "grpo of the paper": {"loss_type": "grpo", "epsilon_high": 0.28},
    "Dr. GRPO": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "GSPO": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}
"""Name -> options. TRL's default loss is that of DAPO."""


def loss_of(
    name: str, model: Any, batch: list[tuple[int, list[int], float]], old: list[torch.Tensor] | None, beta: float
) -> Any:
    """Loss of a batch of answers, two to a prompt, and the log-probabilities of the policy (RLOO arXiv 2402.14740; GRPO
    2402.03300; DAPO 2503.14476; Dr. GRPO 2503.20783; GSPO 2507.18071)."""
    options = LOSSES[name]
    log_probs = [plain(model, ROWS[row]["prompt"], answer, 1.0)[0] for row, answer, _ in batch]  # type: ignore[arg-type]
    with torch.no_grad(), model.disable_adapter():
        reference = [plain(model, ROWS[row]["prompt"], answer, 1.0)[0] for row, answer, _ in batch]  # type: ignore[arg-type]
    now = [values.detach() for values in log_probs]
    old = old or now
    rewards = torch.tensor([reward for _, _, reward in batch])
    if name == "rloo":
        rewards = rewards - beta * torch.stack([(a - b).sum() for a, b in zip(old, reference, strict=True)])
        others = rewards.view(-1, 2).flip(1).reshape(-1)
        ratios = torch.stack([(new - was).sum().exp() for new, was in zip(log_probs, old, strict=True)])
        advantages = rewards - others
        return -torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages).mean(), now
    groups = rewards.view(-1, 2)
    advantages = groups - groups.mean(1, keepdim=True)
    if options.get("scale_rewards") != "none":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    losses = []
    for new, was, ref, advantage in zip(log_probs, old, reference, advantages.view(-1), strict=True):
        ratio = (new - was).mean().exp() if name == "GSPO" else (new - was).exp()
        kl = ((ref - new).exp() - (ref - new) - 1) * ratio  # TRL's default, arXiv 2512.02556
        clipped = ratio.clamp(0.8, 1 + options.get("epsilon_high", 0.2))
        losses.append(-torch.minimum(ratio * advantage, clipped * advantage) + beta * kl)
    if options.get("loss_type") == "grpo":
        return torch.stack([loss.mean() for loss in losses]).mean(), now
    total = torch.cat(losses).sum()
    return total / (len(batch) * LONGEST if options else sum(len(answer) for _, answer, _ in batch)), now


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_training_is_that_of_a_plain_loop(name: str, iterations: int, policy: Any, tiny_tokenizer: Any) -> None:
    assert shared_prompts.reads_prompts_once(policy, "cpu")
    other, run, beta = copy.deepcopy(policy), Rewarded(), 0.3
    options = {"num_generations": 2, "max_completion_length": LONGEST, "beta": beta, "num_iterations": iterations}
    method = preference.METHODS["rloo" if name == "rloo" else "grpo"]
    spec = method(**options, **LOSSES[name]).trainer_spec(run)  # type: ignore[attr-defined]
    params = PreferenceParams(
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        warmup_ratio=0,
        per_device_train_batch_size=4,
        max_steps=4,
        weight_decay=0,
    )
    history = training.train(
        spec, ShardedModel(policy, None, torch.device("cpu")), tiny_tokenizer, ROWS, [], params, COMPUTE
    )
    assert len(run.batches) == 4 // iterations
    assert all(len({tuple(answer) for _, answer, _ in batch}) > 2 for batch in run.batches), (
        "answers are equal, so little is shown"
    )
    weights = [weight for weight in other.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=params.learning_rate, weight_decay=0)
    expected = []
    for batch in run.batches:
        old = None
        for _ in range(iterations):
            loss, now = loss_of(name, other, batch, old, beta)
            old = old or now
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights, params.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            expected.append([float(loss), float(norm)])
    found = [[point["loss"], point["grad_norm"]] for point in history.curve]
    assert found == [pytest.approx(point, rel=5e-4, abs=1e-5) for point in expected]
    own, plainly = ({name: w.detach() for name, w in m.named_parameters() if w.requires_grad} for m in (policy, other))
    assert_close(own, plainly, 1e-3)


@pytest.mark.parametrize(
    ("name", "iterations", "accumulated", "step"),
    [
        pytest.param("rloo", 1, 1, 3, id="in the second epoch"),
        pytest.param("grpo", 3, 2, 1, id="between passes on the same answers"),
    ],
)
def test_a_resumed_training_learns_the_same_from_the_same_answers(
    name: str, iterations: int, accumulated: int, step: int, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    options = {"num_generations": 2, "max_completion_length": LONGEST, "num_iterations": iterations}
    params = PreferenceParams(
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulated,
        max_steps=5,
        save_steps=1,
    )

    def learned() -> Any:
        run, model = Rewarded(), random_policy(tiny_model, LORA)
        spec, shared = (
            preference.METHODS[name](**options).trainer_spec(run),
            ShardedModel(model, None, torch.device("cpu")),
        )  # type: ignore[attr-defined]
        history = training.train(
            spec, shared, tiny_tokenizer, ROWS, [], params, COMPUTE, Checkpoints(tmp_path, {}, keep=5)
        )
        return (
            history.curve,
            history.seen,
            {key: weight.tolist() for key, weight in trainable(model).items()},
            run.batches,
        )

    *whole, batches = learned()
    for later in range(step + 1, 6):
        shutil.rmtree(tmp_path / f"step-{later:08d}")
    *resumed, more = learned()
    assert resumed == whole and more == batches[-len(more) :]


def test_a_policy_reads_its_answers_once_before_it_learns_from_them(
    policy: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[bool, bool]] = []

    def counted(model: Any, *given: Any, **named: Any) -> Any:
        off = any(getattr(module, "disable_adapters", False) is True for module in model.modules())
        passes.append((torch.is_grad_enabled(), off))
        return of_answers(model, *given, **named)

    of_answers = shared_prompts.of_answers
    monkeypatch.setattr(shared_prompts, "of_answers", counted)
    options = {"num_generations": 2, "max_completion_length": LONGEST}
    spec = preference.Rloo(**options).trainer_spec(Rewarded())  # type: ignore[arg-type]
    params = PreferenceParams(per_device_train_batch_size=4, max_steps=2)
    training.train(spec, ShardedModel(policy, None, torch.device("cpu")), tiny_tokenizer, ROWS, [], params, COMPUTE)
    assert passes == [(True, False), (False, True)] * 2
    passes.clear()
    checkpointed = params.model_copy(update={"gradient_checkpointing": True, "max_steps": 1})
    training.train(
        spec, ShardedModel(policy, None, torch.device("cpu")), tiny_tokenizer, ROWS, [], checkpointed, COMPUTE
    )
    assert passes == [(False, False), (False, True), (True, False)]


@pytest.mark.parametrize(("ended", "learns"), [(0, False), (1, True)])
def test_unfinished_answers_can_be_left_out_of_the_loss(
    ended: int, learns: bool, policy: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four answers, `ended` ones have an end of turn."""
    monkeypatch.setattr(answer_groups, "decode", lambda *_: [[30, 31 + i, 2 if i < ended else 9] for i in range(4)])
    spec = preference.Grpo(num_generations=2, max_completion_length=3, mask_truncated_completions=True).trainer_spec(
        Rewarded()
    )  # type: ignore[arg-type]
    params = PreferenceParams(per_device_train_batch_size=4, max_steps=1)
    history = training.train(
        spec, ShardedModel(policy, None, torch.device("cpu")), tiny_tokenizer, ROWS, [], params, COMPUTE
    )
    assert (history.curve[0]["grad_norm"] > 0) == learns and history.curve[0]["unfinished"] == 1 - ended / 4


def test_models_that_cannot_read_groups_read_padded_batches(tiny_tokenizer: Any) -> None:
    spec = preference.Grpo().trainer_spec(Rewarded())  # type: ignore[arg-type]
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 90,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    for kind, reads in (("llama", True), ("mixtral", False), ("granite", False)):
        extra = {"logits_scaling": 2.0} if kind == "granite" else {}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **extra))
        for weight in model.parameters():
            weight.requires_grad_(False)
        assert (
            training.TrlSession(spec, model, tiny_tokenizer, PreferenceParams(), COMPUTE, None, None).reads_groups
            is reads
        ), kind


# ---- planning
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rloo", {}),
        ("rloo", {"beta": 0.0}),
        ("grpo", {}),
        ("grpo", {"num_iterations": 2}),
        ("online_dpo", {}),
        ("checkpointed rloo", {}),
    ],
)
def test_predicted_memory_is_what_a_real_training_has_at_the_same_time(
    name: str,
    options: dict[str, Any],
    policy: Any,
    tiny_model: Path,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of the trainer on answers of the longest length, whose logits matter more than its other tensors."""
    longest, sizes = 40, (120, 70)
    checkpointing, name = name.startswith("checkpointed"), name.rpartition(" ")[2]
    method: Any = preference.METHODS[name](num_generations=4, max_completion_length=longest, **options)
    params = PreferenceParams(per_device_train_batch_size=8, max_steps=1, gradient_checkpointing=checkpointing)
    largest = answer_pass(method, params, sizes, 1)
    assert sorted(largest.lengths) == [(size, *[longest] * 4) for size in sorted(sizes)]
    assert (largest.tokens, largest.answer_tokens) == (-(-(sum(sizes) + 8 * longest) // 16) * 16, 8 * longest)
    spec = TrainingSpec(
        "cpu",
        torch.float32,
        tiny_model,
        "lora",
        LORA,
        [largest.tokens],
        largest.answer_tokens,
        gradient_checkpointing=checkpointing,
        timed=False,
        answers=largest,
    )
    predicted = spec.prediction.memory

    def decoded(model: Any, prompts: Any, *_: Any) -> list[list[int]]:
        return [[3 + number] * (longest - 1) + [2] for number in range(len(prompts))]

    monkeypatch.setattr(answer_groups, "decode", decoded)
    rows = [{"prompt": [9 + number] * size, "pair": number} for number, size in enumerate(sizes)]
    trainer, model = method.trainer_spec(Rewarded()), ShardedModel(policy, None, torch.device("cpu"))
    with LiveBytes() as live:
        training.train(trainer, model, tiny_tokenizer, rows, [], params, COMPUTE)
    assert predicted.activations + predicted.logits + predicted.gradients == pytest.approx(live.peak, rel=0.1)


def test_the_policys_first_pass_is_kept_where_training_keeps_it() -> None:
    def keeps(name: str, accumulated: int = 1, **options: Any) -> bool:
        params = PreferenceParams(gradient_accumulation_steps=accumulated)
        return answer_pass(preference.METHODS[name](**options), params, [10] * 4, 1).keeps_graph  # type: ignore[arg-type]

    assert [
        keeps("rloo"),
        keeps("grpo"),
        keeps("online_dpo"),
        keeps("grpo", num_iterations=2),
        keeps("grpo", 2, num_iterations=2),
    ] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert AnswerPass(((3, 2, 2),), True, True).tokens == 16


def test_the_planned_steps_and_texts_are_those_of_a_training(policy: Any, tiny_tokenizer: Any) -> None:
    """Of 11 prompts in passes of two one is left out, and the third step of an
    epoch has fewer passes than the others."""
    run, method = Rewarded(), preference.Grpo(num_generations=2, max_completion_length=2, num_iterations=2)
    params = PreferenceParams(per_device_train_batch_size=4, gradient_accumulation_steps=4, num_train_epochs=2)
    rows = [{"prompt": [5 + number, 6], "pair": number} for number in range(11)]
    shared = ShardedModel(policy, None, torch.device("cpu"))
    history = training.train(method.trainer_spec(run), shared, tiny_tokenizer, rows, [], params, COMPUTE)  # type: ignore[arg-type]
    assert history.step == method.steps(11, params) == 6
    assert 2 * sum(map(len, run.batches)) == 2 * method.texts_per_epoch(11, params) == 80
    method.refuse_few_prompts(2, params, "aligned.x")
    with pytest.raises(
        InputError, match=r"aligned\.x\.per_device_train_batch_size: .* 2 prompts, .* 1\nhint: set it to 2 or less"
    ):
        method.refuse_few_prompts(1, params, "aligned.x")


def test_planned_steps_of_ppo_are_its_iterations_as_in_the_report() -> None:
    ppo = preference.Ppo(
        total_episodes=20, batch_size=16, mini_batch_size=2, gradient_accumulation_steps=2, num_ppo_epochs=3
    )
    assert ppo.steps(9, PreferenceParams()) == 2 and ppo.texts_per_epoch(9, PreferenceParams()) == 60


def test_a_further_model_counts_as_weights(tiny_model: Path) -> None:
    spec = TrainingSpec("cpu", torch.float32, tiny_model, "lora", LORA, [64], 32, timed=False)
    with_judge = TrainingSpec(
        "cpu", torch.float32, tiny_model, "lora", LORA, [64], 32, timed=False, other_weights=10**6
    )
    assert with_judge.prediction.memory.weights == spec.prediction.memory.weights + 10**6
    assert with_judge.needed == spec.needed + 10**6
