"""Proximal policy optimization: a policy is trained on rewards of its answers, and kept close to its first state.

One iteration (`Training.run_iteration`):

1. **roll out**: the policy pi answers a batch of prompts, one sampled token at a time. An answer is an episode, a token
   is an action.
2. **reward**: a score for each whole answer; lower if the answer did not end.
3. **evaluate**: log-probabilities of every token under pi and under the reference pi_ref, and the values V before each
   token, in one forward pass each. pi_ref is the same network with the adapter disabled, so they are equal at the
   start.
4. **advantages**: a token's reward is -beta (log pi - log pi_ref), plus the score for the last one; the advantage
   compares the rewards with V.
5. **update**: a few passes over the episodes in mini-batches, with clipped ratios, until pi is too far from the policy
   that sampled them.

Sources: PPO arXiv 1707.06347, GAE 1506.02438, the penalty per token and its controller 1909.08593 (sections 2 and 2.2),
what implementations add to both (rewards at the end, whitening, clipped values, the EOS penalty) 2403.17031. Estimates
of KL: joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute, Section
from dagster_project.core.progress import Progress
from dagster_project.core.rendering import end_ids
from dagster_project.training.inference.decoding import decode
from dagster_project.training.inference.sampling import sampled, uniform_numbers
from dagster_project.training.methods.attention import attention_for, attention_of
from dagster_project.training.methods.build import causal
from dagster_project.training.methods.isolation import refuse_mixing
from dagster_project.training.methods.logits import logits_of
from dagster_project.training.tokens.collators import SIZES, batches_by_length, collate_packed
from dagster_project.training.trainers.alignment.sampled_answers import SampledAnswers
from dagster_project.training.trainers.harness import checkpoint, distributed, sharding
from dagster_project.training.trainers.harness.checkpoint import Checkpoints
from dagster_project.training.trainers.harness.curve import live_writer
from dagster_project.training.trainers.harness.session import Interrupted, newest, stop_on_request
from dagster_project.training.trainers.harness.sharding import ShardedModel, in_step
from dagster_project.training.trainers.harness.weight_audit import trainable

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pedigree")

Reward = Callable[[Sequence[int], Sequence[str], Sequence[Sequence[int]]], list[float]]
"""(numbers of the prompts, the answer to each without special tokens and outer blanks, its token ids) -> a finite
number for each."""


LIVE = (
    "reward", "kl", "kl_coef", "entropy", "response_length", "policy_loss", "value_loss", "clip_fraction",
    "learning_rate", "grad_norm",
)  # fmt: skip
"""Metrics of the live curve."""


class Settings(Section):
    """Options of ppo, named as in TRL's former PPOConfig."""

    total_episodes: int = Field(default=256, ge=2)
    """Answers to learn from, over the whole run."""
    batch_size: int = Field(default=64, ge=2)
    """Answers per iteration: sampled from one policy, then trained on."""
    rollout_batch_size: int = Field(default=32, ge=1)
    """Answers generated at the same time, for speed and memory. Each answer has its own random numbers, so in float32
    the answers practically do not depend on it; in bfloat16 rounding can change some."""
    mini_batch_size: int = Field(default=8, ge=1)
    """Answers per forward pass of scoring and training."""
    gradient_accumulation_steps: int = Field(default=2, ge=1)
    """Forward passes per optimizer step. Every token counts equally, as in one large pass."""
    num_ppo_epochs: int = Field(default=2, ge=1)
    """Passes over an iteration's answers."""
    response_length: int = Field(default=48, ge=1)
    """Longest answer in tokens, including its end of turn."""
    temperature: float = Field(default=1.0, gt=0)
    """Divisor of the logits, in sampling and in training."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Subtracted from the score of an answer that did not end within `response_length`."""
    kl_coef: float = Field(default=0.05, ge=0)
    """beta: penalty per nat of KL from the reference, in units of the reward. With `target_kl` only the starting
    value."""
    target_kl: float | None = Field(default=None, gt=0)
    """KL from the reference, in nats per answer, towards which beta is adjusted. null: beta is constant."""
    horizon: float = Field(default=640, gt=0)
    """With `target_kl`: how slowly beta is adjusted, in answers. An iteration changes beta by (its answers / horizon)
    times the error; 640 at 64 answers is the paper's 0.1."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount factor per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """lambda of GAE: 0 relies on the value estimates, 1 on the rewards received."""
    whiten_rewards: bool = False
    """Scale the tokens' rewards to variance 1 around their mean over the iteration, which does not change, as in TRL's
    former PPO."""
    whiten_advantages: bool = True
    """Shift and scale the advantages to mean 0 and variance 1 over the iteration's tokens."""
    cliprange: float = Field(default=0.2, gt=0)
    """epsilon: range around 1 beyond which a larger probability ratio gains nothing."""
    cliprange_value: float = Field(default=0.2, gt=0)
    """Range around the old value estimate beyond which a further change gains nothing."""
    vf_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss relative to the policy loss."""
    max_kl: float | None = Field(default=0.1, gt=0)
    """KL from the policy that sampled the answers, in nats per token, above which an iteration's updates end. null: no
    limit."""
    explode_kl: float = Field(default=50.0, gt=0)
    """KL from the reference, in nats per answer, above which the run ends with the weights of the previous iteration.
    It is measured on the answers of an iteration, before its updates. After the last iteration, the KL of the policy
    that sampled its answers from the final one has the same limit."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate of the optimizer (Adam) in the first iteration."""
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    """Shape of the learning rate. `linear` falls towards 0 after the last iteration."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm. A larger gradient is scaled down to it."""
    allow_constant_reward: bool = False
    """Continue if all answers of the first iteration, or of `constant_reward_steps` iterations in a row, get the same
    reward. Such a reward teaches nothing."""
    save_steps: int = Field(default=1, ge=1)
    """Iterations between two checkpoints."""


@dataclass
class PPOHistory:
    """Record of a training, in order."""

    curve: list[dict[str, float]] = field(default_factory=list)
    """For each iteration with updates, from 1: reward (mean score, without penalties), kl (nats per answer, of the
    sampling policy from the reference), kl_coef, entropy (nats per token), response_length (mean, in tokens),
    unfinished (share of answers without an end), explained_variance (of the returns by the values); policy_loss,
    value_loss, clip_fraction (share of tokens), approx_kl (nats per token, from the sampling policy), grad_norm: means
    over the updates; updates (optimizer steps), learning_rate, tokens (so far)."""
    seen: list[tuple[int, int, int]] = field(default_factory=list)
    """(iteration from 1, pass over the prompts from 1, number of the prompt) of each episode."""
    tokens: int = 0
    """Tokens of prompts and answers, each episode once."""
    stopped: str = ""
    """Why the run ended early, which weights were kept, and what to change; empty if it did not."""
    seconds: float = 0.0
    """Wall time, including earlier parts of an interrupted training. For the log only."""


@dataclass(frozen=True)
class Rollout:
    """A batch of episodes."""

    rows: list[int]
    """Number of each episode's prompt."""
    prompts: list[list[int]]
    answers: list[list[int]]
    """Token ids, including the end of turn."""
    mask: torch.Tensor
    """(episodes, longest answer), true where there is a token. Values per token have this shape, with zeros
    elsewhere."""
    finished: torch.Tensor
    """(episodes): whether it ended with an end of turn."""


@dataclass(frozen=True)
class TokenValues:
    """Evaluation of a rollout's tokens by a policy, (episodes, longest answer) each."""

    log_probs: torch.Tensor
    values: torch.Tensor
    """Estimated return before the token."""
    entropy: torch.Tensor
    """Of the distribution from which the token was sampled, in nats."""


class Collapsed(Exception):
    """The run cannot continue with its current weights. Internal: `Training` records it in the history."""


def iterations(settings: Settings) -> int:
    return math.ceil(settings.total_episodes / settings.batch_size)


def train(
    shared: ShardedModel,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    reward: Reward,
    settings: Settings,
    compute: Compute,
    checkpoints: Checkpoints | None = None,
    live: Path | None = None,
    begin: Callable[[], None] = lambda: None,
    sampled_answers: SampledAnswers | None = None,
) -> PPOHistory:
    """Train a policy in place, from its newest checkpoint if it has one.

    The value head is a linear layer on the backbone's last hidden state. It is zero at first, is trained with the
    adapter, and is not part of the model. Dropout is off, so that a ratio measures only the updates. Random numbers
    depend only on seed, iteration and episode.

    Several processes share the batches of the rollout and the episodes of each forward pass, and sum their results, so
    all have the same weights. Results equal those of one process up to rounding.

    Args:
        shared: a PeftModel with an adapter that has no effect yet. It is divided here, with the value head, if it has
            settings for that, and stays so.
        prompts: token ids of each, including the assistant's header.
        checkpoints: where to keep them; None to keep none.
        live: folder for the live curve; None to write none.
        begin: called once the model is divided, before its weights change or those of a checkpoint are read.
        sampled_answers: those that `reward` keeps.
    Raises:
        InputError: prompts, model or reward that cannot be trained with.
        Interrupted: SIGINT or SIGTERM came; a checkpoint has been written.
    """
    model = shared.model
    refuse_mistakes(model, tokenizer, prompts, settings)
    model.eval()
    attention = attention_of(causal(model))
    if shared.settings is None:
        causal(model).set_attn_implementation(attention_for(shared.device, model.dtype))
        states = partial(last_hidden_states, causal(model).base_model)
        refuse_mixing(model, states, settings.mini_batch_size > 1, "set mini_batch_size: 1")
    answers = sampled_answers or SampledAnswers()
    training = Training(shared, tokenizer, prompts, reward, settings, compute, checkpoints, live, begin, answers)
    with stop_on_request() as requested:
        stop_requested = requested if shared.root is None else sharding.asked_first(requested)
        for step in range(training.done + 1, training.total + 1):
            if training.history.stopped:
                break
            training.run_iteration(step)
            stop, last = stop_requested(), step == training.total or bool(training.history.stopped)
            if checkpoints and (step % settings.save_steps == 0 or last or stop):
                training.save(checkpoints, step)
            if stop and not last:
                problem = f"interrupted at iteration {step}; the next run resumes from there"
                raise Interrupted(problem, "run the same command again")
    causal(model).set_attn_implementation(attention)
    training.show(training.history.curve, now=True)
    return training.history


@dataclass(frozen=True)
class Experience:
    """An iteration's episodes, before anything is learned from them."""

    schedule: list[tuple[int, int]]
    """(pass over the prompts from 1, number of the prompt) of each episode."""
    rollout: Rollout
    scores: torch.Tensor
    """(episodes) float32, without penalties."""
    policy: TokenValues
    reference: torch.Tensor
    """Log-probabilities under the reference, (episodes, longest answer)."""
    kl: float
    """KL of the policy from the reference, in nats per answer."""


class Training:
    """State of one training: weights, optimizer, beta, history, and the weights to restore after a collapse."""

    def __init__(
        self,
        shared: ShardedModel,
        tokenizer: Any,
        prompts: Sequence[list[int]],
        reward: Reward,
        settings: Settings,
        compute: Compute,
        checkpoints: Checkpoints | None,
        live: Path | None,
        begin: Callable[[], None],
        sampled_answers: SampledAnswers,
    ) -> None:
        """Resume from the newest checkpoint, if there is one. Arguments are those of `train`."""
        import torch

        self.shared, self.model, self.tokenizer = shared, shared.model, tokenizer
        self.prompts, self.reward, self.sampled_answers = prompts, reward, sampled_answers
        self.settings, self.seed, self.total = settings, compute.seed, iterations(settings)
        self.head = value_head(self.model)
        for weight in self._trained().values():
            distributed.from_first(weight.data)
        shared.divide(self.head)
        begin()
        self.weights = self._trained()
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=settings.learning_rate, eps=1e-5)
        self.history, self.kl_coef, self.good = PPOHistory(), settings.kl_coef, _copy_weights(self.weights)
        self.done = self.good_step = self._resume(checkpoints)
        self._began, self._earlier = time.monotonic(), self.history.seconds
        self.progress = Progress("ppo", self.total, "iteration", every=0)
        self.progress.done, self.progress.start = self.done, self.progress.start - self._earlier
        self.show = live_writer(live, names=LIVE) if live else lambda curve, now=False: None

    def _trained(self) -> dict[str, torch.Tensor]:
        head = {f"value_head.{name}": weight for name, weight in self.head.named_parameters()}
        return {**trainable(self.model), **head}

    def _resume(self, checkpoints: Checkpoints | None) -> int:
        """Iteration of the newest checkpoint of the first process, which every process loads; 0 without one."""
        _, saved = newest(checkpoints)
        if not saved:
            return 0
        state = saved.state(self.shared.device)
        seen = [(step, epoch, row) for step, epoch, row in state["seen"].tolist()]
        self.history = PPOHistory(**saved.document("course"), seen=seen)
        self.kl_coef = state["kl_coef"]
        self.sampled_answers.restore(state["answers"])
        checkpoint.restore_optimizer(self.optimizer, state["optimizer"])
        if self.shared.root is None:
            self.good = saved.tensors("good")
            _set_weights(self.weights, saved.tensors("weights"))
        else:
            parts = sharding.join_optimizer(self.optimizer, state["optimizer"])
            sharding.read(saved.folder, parts | self._named_weights())
        log.info(f"ppo: resuming from the checkpoint of iteration {saved.step} of {self.total}")
        return saved.step

    def _named_weights(self) -> dict[str, torch.Tensor]:
        return sharding.named("weights", self.weights) | sharding.named("good", self.good)

    def run_iteration(self, step: int) -> None:
        """Learn from one iteration. After a collapse, restore the last good weights and record the reason."""
        try:
            experience = self._collect(step)
            self.good, self.good_step = _copy_weights(self.weights), step
            advantages, returns = self._advantages(experience)
            figures = self._update(step, experience, advantages, returns)
        except Collapsed as collapsed:
            _set_weights(self.weights, self.good)
            # what the kept weights learned from
            self.history.seen = [seen for seen in self.history.seen if seen[0] < self.good_step]
            self.history.stopped = (
                f"ppo: iteration {step}: {collapsed}. The weights at the start of iteration {self.good_step} are kept;"
                " lower learning_rate, num_ppo_epochs or max_kl, or raise kl_coef"
            )
            log.warning(self.history.stopped)
        else:
            self._record(step, experience, returns, figures)
            if self.sampled_answers.is_stalled() and not self.settings.allow_constant_reward:
                self.history.stopped = f"ppo: iteration {step}: {self.sampled_answers.stalled_text()}"
                log.warning(self.history.stopped)
        self.history.seconds = self._earlier + time.monotonic() - self._began

    def _collect(self, step: int) -> Experience:
        """Steps 1 to 3: roll out, reward, evaluate.

        Raises:
            Collapsed: the policy gives empty answers, or is too far from the reference.
        """
        settings, shared = self.settings, self.shared
        schedule = prompt_schedule(len(self.prompts), step, settings, self.seed)
        rows = [row for _, row in schedule]
        prompts = [self.prompts[row] for row in rows]
        rollout = roll_out(shared, self.tokenizer, rows, prompts, settings, f"{self.seed} {step}")
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in rollout.answers]
        refuse_silence(texts, first=step == 1)
        self.sampled_answers.step = step
        scores = rewarded(self.reward, rollout, texts, settings, first=step == 1)
        self.sampled_answers.share()
        policy = evaluate(shared, self.head, rollout, settings)
        with self.model.disable_adapter():
            reference = evaluate(shared, self.head, rollout, settings, with_entropy=False).log_probs
        kl = kl_per_answer(policy.log_probs, reference)
        if step == 1:
            refuse_other_reference(policy.log_probs, reference, rollout.mask, self.model.dtype)
        refuse_explosion(kl, settings)
        return Experience(schedule, rollout, scores, policy, reference, kl)

    def _advantages(self, experience: Experience) -> tuple[torch.Tensor, torch.Tensor]:
        """Step 4: advantages and returns, (episodes, longest answer) each."""
        settings, rollout, policy = self.settings, experience.rollout, experience.policy
        log_ratio = policy.log_probs - experience.reference
        rewards = rewards_per_token(log_ratio, rollout, experience.scores, self.kl_coef, settings)
        advantages, returns = generalized_advantages(rewards, policy.values, rollout.mask, settings.gamma, settings.lam)
        return whitened(advantages, rollout.mask) if settings.whiten_advantages else advantages, returns

    def _update(
        self, step: int, experience: Experience, advantages: torch.Tensor, returns: torch.Tensor
    ) -> dict[str, float]:
        """Step 5: change the weights.

        Returns:
            Figures of the updates for the curve.
        Raises:
            Collapsed: a loss or gradient is not finite, or the final policy is too far from the sampling policy.
        """
        shared, head, settings = self.shared, self.head, self.settings
        rollout, policy, seed = experience.rollout, experience.policy, f"{self.seed} {step}"
        rate = learning_rate(step, self.total, settings)
        figures = update(shared, head, self.optimizer, rate, rollout, policy, advantages, returns, settings, seed)
        if step == self.total:  # no later rollout measures how far the policy moved
            moved = evaluate(shared, head, rollout, settings, with_entropy=False).log_probs
            kl = kl_per_answer(policy.log_probs, moved)
            refuse_explosion(kl, settings, "of the policy before its updates from the policy after them ")
        return {**figures, "learning_rate": rate}

    def _record(self, step: int, experience: Experience, returns: torch.Tensor, figures: Mapping[str, float]) -> None:
        """Add the iteration to the history, report progress, and set beta for the next iteration."""
        history, rollout, policy, kl = self.history, experience.rollout, experience.policy, experience.kl
        count = len(rollout.rows)
        history.seen += [(step, epoch, row) for epoch, row in experience.schedule]
        history.tokens += sum(map(len, [*rollout.prompts, *rollout.answers]))
        point = {
            "step": step,
            "reward": float(experience.scores.mean()),
            "kl": kl,
            "kl_coef": self.kl_coef,
            "entropy": float(policy.entropy[rollout.mask].mean()),
            "response_length": sum(map(len, rollout.answers)) / count,
            "unfinished": 1 - float(rollout.finished.double().mean()),
            "explained_variance": explained_variance(policy.values[rollout.mask], returns[rollout.mask]),
            **figures,
            "tokens": history.tokens,
        }
        history.curve.append(point)
        note = "reward {reward:.3f}, KL {kl:.2f}, {response_length:.0f} tokens an answer".format(**point)
        self.progress.advance(note=note)
        self.show(history.curve)
        self.kl_coef = next_kl_coef(self.kl_coef, kl, count, self.settings)

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        """Write a checkpoint in the first process; of a divided model all processes write their parts."""
        import torch

        first = distributed.place().rank == 0
        document = {name: value for name, value in vars(self.history).items() if name != "seen"}
        optimizer, parts = checkpoint.optimizer_state(self.optimizer), dict[str, torch.Tensor]()
        if self.shared.root is not None:
            optimizer, parts = sharding.split_optimizer(optimizer)
            parts |= self._named_weights()
        state = {
            "optimizer": optimizer,
            "kl_coef": self.kl_coef,
            "answers": self.sampled_answers.state(),
            "seen": torch.tensor(self.history.seen, dtype=torch.int32).view(-1, 3),
        }
        tensors = {} if parts else {"weights": self.weights, "good": self.good}
        if parts:
            save = partial(checkpoints.save, step, state, tensors, {"course": document}) if first else None
            sharding.save(parts, checkpoints.unfinished(step), save)
        elif first:
            checkpoints.save(step, state, tensors, {"course": document})


# ---- 1. roll out


def prompt_schedule(count: int, step: int, settings: Settings, seed: int) -> list[tuple[int, int]]:
    """(pass over the prompts from 1, number of the prompt) of each episode of an iteration.

    Each pass has its own order.
    """
    first = (step - 1) * settings.batch_size
    episodes = range(first, min(first + settings.batch_size, settings.total_episodes))
    orders = {
        epoch: random.Random(f"{seed} prompts {epoch}").sample(range(count), count)
        for epoch in {episode // count for episode in episodes}
    }
    return [(episode // count + 1, orders[episode // count][episode % count]) for episode in episodes]


def roll_out(
    shared: ShardedModel, tokenizer: Any, rows: list[int], prompts: list[list[int]], settings: Settings, seed: str
) -> Rollout:
    """Sample an answer to each prompt, in batches of prompts of similar length.

    A token is sampled by inverting the distribution function at a number u ~ U[0, 1) that depends only on the seed, the
    episode and the position in the answer. So neither batch, padding nor `response_length` affects the answers.
    """
    import torch

    longest, here, ends = settings.response_length, distributed.place(), end_ids(tokenizer)
    model, device = causal(shared.model), shared.device
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    model.set_attn_implementation("sdpa")

    def sample() -> None:
        for number, batch in enumerate(batches_by_length(prompts, settings.rollout_batch_size)):
            if here.does(number):
                choose = sampled(uniform_numbers(seed, batch, longest), settings.temperature)
                some = [prompts[e] for e in batch]
                batch_answers = decode(model, some, choose, longest, ends, tokenizer.pad_token_id)
                for e, answer in zip(batch, batch_answers, strict=True):
                    tokens[e, : len(answer)] = torch.tensor(answer, device=device)
                    lengths[e] = len(answer)

    in_step([shared], sample)
    distributed.summed(tokens)
    distributed.summed(lengths)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    finished = torch.isin(tokens.gather(1, lengths[:, None] - 1)[:, 0], torch.tensor(sorted(ends), device=device))
    answers = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    return Rollout(rows, prompts, answers, mask, finished)


# ---- 2. reward


def rewarded(reward: Reward, rollout: Rollout, texts: Sequence[str], settings: Settings, first: bool) -> torch.Tensor:
    """The score of each answer by `reward`, (episodes) float32.

    Raises:
        InputError: not one finite number for each; in the first iteration, the same number for all.
    """
    import torch

    here = distributed.place()
    mine = list(range(here.rank, len(texts), here.size))
    given = reward([rollout.rows[e] for e in mine], [texts[e] for e in mine], [rollout.answers[e] for e in mine])
    if len(given) != len(mine):
        raise InputError(f"ppo: the reward gave {len(given)} numbers for {len(mine)} answers", "return one for each")
    for e, score in zip(mine, given, strict=True):
        if not math.isfinite(score):
            raise InputError(
                f"ppo: the reward of an answer to prompt {rollout.rows[e]} is {score}: {texts[e][:80]!r}",
                "fix the reward: look at its report, and at its value for this answer",
            )
    scores = torch.zeros(len(texts), device=rollout.mask.device)
    scores[mine] = torch.tensor(given, dtype=torch.float32, device=scores.device)
    distributed.summed(scores)
    if first and not settings.allow_constant_reward and bool((scores == scores[0]).all()):
        raise InputError(
            f"ppo: all {len(texts)} answers of the first iteration have the same reward, {float(scores[0]):g}: there is"
            " nothing to learn",
            "fix the reward, raise temperature or batch_size, or set allow_constant_reward: true",
        )
    return scores


# ---- 3. evaluate


def value_head(model: Any) -> Any:
    """A linear layer from the last hidden state to one number, zero at first, in float32 or better."""
    import torch

    output = causal(model).get_output_embeddings().weight
    dtype = torch.promote_types(output.dtype, torch.float32)
    head = torch.nn.Linear(output.shape[1], 1, device=output.device, dtype=dtype)
    with torch.no_grad():
        for weight in head.parameters():
            weight.zero_()
    return head


def forward(
    model: Any, head: Any, rollout: Rollout, episodes: Sequence[int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pass over episodes as one packed row, without padding between them.

    Returns:
        Log-probabilities of their answers' tokens (tokens), values before them (tokens), and logits (tokens,
        vocabulary): only of answers, concatenated in the given order. `rollout.mask[episodes]` separates them.
    """
    from torch.nn.functional import cross_entropy

    rows = []
    for e in episodes:
        prompt, answer = rollout.prompts[e], rollout.answers[e]
        ids, labels = prompt + answer, [IGNORE] * len(prompt) + answer
        rows.append({"input_ids": ids, "labels": labels, "weights": [1.0] * len(ids), "lengths": [len(ids)]})
    batch = collate_packed(rows, SIZES)
    device, base = model.device, causal(model)
    labels = batch["labels"].to(device)[:, 1:]
    counted = labels != IGNORE
    hidden = last_hidden_states(base.base_model, batch)[:, :-1][counted]
    output = base.get_output_embeddings()
    logits = wide(logits_of(base, hidden.to(output.weight.dtype))) / temperature
    return -cross_entropy(logits, labels[counted], reduction="none"), head(wide(hidden))[:, 0], logits


def last_hidden_states(decoder: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Last hidden states (1, seq, hidden) of a batch of `collate_packed`."""
    found: torch.Tensor = decoder(
        input_ids=batch["input_ids"].to(decoder.device),
        position_ids=batch["position_ids"].to(decoder.device),
        cu_seq_lens_q=batch["cu_seq_lens_q"].to(decoder.device),
        max_length_q=batch["max_length_q"],
        use_cache=False,
    ).last_hidden_state
    return found


def evaluate(
    shared: ShardedModel, head: Any, rollout: Rollout, settings: Settings, with_entropy: bool = True
) -> TokenValues:
    """Evaluation of every token by the policy, or by the reference while the adapter is disabled.

    Both use the same passes, so equal policies give equal bits.

    Args:
        with_entropy: otherwise it is 0, which takes less time.
    """
    import torch

    here, model, device = distributed.place(), shared.model, shared.device
    causal(model).set_attn_implementation(attention_for(device, model.dtype))
    evaluated = torch.zeros((3, *rollout.mask.shape), dtype=head.weight.dtype, device=device)

    def pass_all() -> None:
        for episodes in _parts(range(len(rollout.rows)), settings.mini_batch_size):
            if mine := episodes[here.rank :: here.size]:
                log_probs, values, logits = forward(model, head, rollout, mine, settings.temperature)
                entropy = torch.zeros_like(values)
                if with_entropy:
                    entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
                part = torch.zeros_like(evaluated[:, mine])
                part[:, rollout.mask[mine]] = torch.stack((log_probs, values, entropy))
                evaluated[:, mine] = part

    with torch.no_grad():
        in_step([shared], pass_all)
    return TokenValues(*distributed.summed(evaluated))


def kl_per_answer(log_probs: torch.Tensor, others: torch.Tensor) -> float:
    """KL between a policy and another over whole answers, in nats, estimated on answers sampled from the first one.

    It is the mean over episodes of the sum over tokens of the difference of their log-probabilities.
    """
    return float((log_probs - others).sum(1).mean())


# ---- 4. advantages


def rewards_per_token(
    log_ratio: torch.Tensor, rollout: Rollout, scores: torch.Tensor, kl_coef: float, settings: Settings
) -> torch.Tensor:
    """r_t = -beta (log pi - log pi_ref), plus the score at the last token (arXiv 1909.08593, equation 2).

    The score is lowered by the penalty if the answer has no end.

        beta 0.1, log pi - log pi_ref [0.5, -1.0], score 2, penalty 1, no end -> [-0.05, 0.1 + 2 - 1]
    """
    rewards = -kl_coef * log_ratio
    for e, answer in enumerate(rollout.answers):
        rewards[e, len(answer) - 1] += scores[e] - settings.missing_eos_penalty * ~rollout.finished[e]
    return whitened(rewards, rollout.mask, shift=False) if settings.whiten_rewards else rewards


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (arXiv 1506.02438, equation 16) and returns, (episodes, longest answer); zero where there is no token.

    A_t = sum over l >= 0 of (gamma lambda)^l delta_{t+l}, with delta_t = r_t + gamma V_{t+1} - V_t, and V = 0 after the
    last token. Returns are A + V.
    """
    import torch

    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])  # A_{t+1}; V_{t+1} is zero where there is no token
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whitened(values: torch.Tensor, mask: torch.Tensor, shift: bool = True) -> torch.Tensor:
    """Values where there are tokens scaled to variance 1 around their mean; zero elsewhere.

    Args:
        shift: whether their mean becomes 0, else it stays.
    """
    counted = values[mask]
    mean, scale = counted.mean(), (counted.var(correction=0) + 1e-8).rsqrt()
    scaled = (values - mean) * scale
    return (scaled if shift else scaled + mean) * mask


def next_kl_coef(kl_coef: float, kl: float, episodes: int, settings: Settings) -> float:
    """beta for the next iteration (arXiv 1909.08593, section 2.2).

    It is multiplied by 1 + K e, where e = (KL - target) / target within 0.2 of zero and K = episodes / horizon.
    """
    if settings.target_kl is None:
        return kl_coef
    error = min(max(kl / settings.target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / settings.horizon)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for perfect values, 0 for a constant, and 0 if all returns are equal."""
    spread = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / spread if spread else 0.0


# ---- 5. update


def learning_rate(step: int, total: int, settings: Settings) -> float:
    if settings.lr_scheduler_type == "linear":
        return settings.learning_rate * (1 - (step - 1) / total)
    return settings.learning_rate


def update(
    shared: ShardedModel,
    head: Any,
    optimizer: Any,
    rate: float,
    rollout: Rollout,
    evaluated: TokenValues,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    settings: Settings,
    seed: str,
) -> dict[str, float]:
    """Update the policy on an iteration's episodes, in several passes in mini-batches, each in its own order.

    The loss of an optimizer step is the mean over its tokens, independent of the number of passes and processes.

    Returns:
        policy_loss, value_loss, clip_fraction, approx_kl and grad_norm, means over the steps, and updates, their
        number.
    Raises:
        Collapsed: a loss or a gradient is not finite.
    """
    import torch

    here = distributed.place()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = rate
    per_step = settings.mini_batch_size * settings.gradient_accumulation_steps
    taken: list[list[float]] = []

    def run_pass(mine: Sequence[int], count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a pass, and its sums of policy loss, value loss, clipped tokens and KL."""
        at = rollout.mask[mine]
        log_probs, values, _ = forward(shared.model, head, rollout, mine, settings.temperature)
        old = evaluated.log_probs[mine][at], evaluated.values[mine][at]
        policy, value, ratio = losses(log_probs, values, *old, advantages[mine][at], returns[mine][at], settings)
        with torch.no_grad():
            clipped = (ratio - 1).abs() > settings.cliprange
            sums = torch.stack([each.double().sum() for each in (policy, value, clipped, ratio - 1 - ratio.log())])
        return (policy + settings.vf_coef * value).sum() / count, sums

    for episodes in mini_batches(len(rollout.rows), per_step, settings.num_ppo_epochs, seed):
        count = rollout.mask[episodes].sum()
        sums = torch.zeros(4, dtype=torch.float64, device=shared.device)
        optimizer.zero_grad(set_to_none=True)
        for part in _parts(episodes, settings.mini_batch_size):
            if mine := part[here.rank :: here.size]:
                loss, of_pass = shared.compute(partial(run_pass, mine, count))
                loss.backward()
                sums += of_pass
            elif shared.root is not None:  # a pass without effect: gathering a layer needs every process
                (shared.compute(partial(run_pass, part[:1], count))[0] * 0).backward()
        policy_loss, value_loss, clip_fraction, approx_kl = (distributed.summed(sums) / count).tolist()
        if not math.isfinite(policy_loss + value_loss):
            raise Collapsed(f"the loss is {policy_loss + value_loss}")
        if taken and settings.max_kl is not None and approx_kl > settings.max_kl:
            break
        if shared.root is None:
            distributed.sum_gradients(weights)
        norm = float(sharding.norm_value(torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)))
        if not math.isfinite(norm):
            raise Collapsed(f"the gradient is {norm}")
        optimizer.step()
        taken.append([policy_loss, value_loss, clip_fraction, approx_kl, norm])
    optimizer.zero_grad(set_to_none=True)
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "grad_norm")
    means = [sum(column) / len(taken) for column in zip(*taken, strict=True)]
    return {**dict(zip(names, means, strict=True)), "updates": len(taken)}


def losses(
    log_probs: torch.Tensor,
    values: torch.Tensor,
    old_log_probs: torch.Tensor,
    old_values: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Policy loss, value loss and ratio pi / pi_old of each token.

    Policy: -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A) (arXiv 1707.06347, equation 7). Value: half the
    larger of (V - R)^2 and (V_old + clip(V - V_old, -epsilon_V, epsilon_V) - R)^2 (2403.17031, detail 13).
    """
    import torch

    ratio = (log_probs - old_log_probs).exp()
    near = ratio.clamp(1 - settings.cliprange, 1 + settings.cliprange)
    policy = -torch.minimum(ratio * advantages, near * advantages)
    close = old_values + (values - old_values).clamp(-settings.cliprange_value, settings.cliprange_value)
    value = 0.5 * torch.maximum((values - returns) ** 2, (close - returns) ** 2)
    return policy, value, ratio


def mini_batches(count: int, per_step: int, epochs: int, seed: str) -> Iterator[list[int]]:
    """The episodes of each optimizer step: each one once per epoch, in a new order."""
    for epoch in range(epochs):
        yield from _parts(random.Random(f"{seed} update {epoch}").sample(range(count), count), per_step)


# ---- validation before training


def refuse_mistakes(model: Any, tokenizer: Any, prompts: Sequence[list[int]], settings: Settings) -> None:
    """Raise InputError if there are no prompts, prompts too long for the context, or no end of turn."""
    if not prompts:
        raise InputError("ppo: there are no prompts", "add preferences, or lower the shares of the held-out splits")
    if tokenizer.eos_token_id is None:
        problem = "ppo: the tokenizer has no end of turn, so no answer would ever end"
        raise InputError(problem, "name its eos_token in data/base_model")
    refuse_long_prompts("ppo", model, tokenizer, prompts, settings.response_length, "response_length")


def refuse_long_prompts(
    name: str, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], longest: int, key: str
) -> None:
    """Check that each prompt and an answer fit into the context together.

    Args:
        name: of the method.
        longest: tokens of an answer, by the option `key`.
    Raises:
        InputError: they do not.
    """
    positions = getattr(causal(model).config.get_text_config(), "max_position_embeddings", None)
    context = min(tokenizer.model_max_length, positions or math.inf)
    if long := [row for row, prompt in enumerate(prompts) if len(prompt) > context - longest]:
        raise InputError(
            f"{name}: {len(long)} of {len(prompts)} prompts leave no room for {longest} tokens in a context of"
            f" {context} (first: prompt {long[0]} with {len(prompts[long[0]])} tokens)",
            f"lower {key}, or leave these prompts out",
        )


def refuse_silence(texts: Sequence[str], first: bool) -> None:
    """Check that not all answers are empty.

    Raises:
        InputError: in the first iteration, all are.
        Collapsed: in a later one.
    """
    if any(texts):
        return
    if first:
        raise InputError(
            "ppo: every answer of the first iteration is empty: the policy ends its turn immediately",
            "look at the SFT adapter's answers: was it trained with the chat template of these prompts?",
        )
    raise Collapsed("every answer is empty: the policy has learned to end its turn immediately")


def refuse_other_reference(
    log_probs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype
) -> None:
    """Raise InputError if the policy differs from the reference at the start."""
    import torch

    apart = float((log_probs - reference).abs()[mask].mean())
    if not apart <= torch.finfo(dtype).eps ** 0.5:
        raise InputError(
            f"ppo: before the first update the policy is {apart:.3g} nats per token from its reference, which is the"
            " same model with the adapter disabled",
            "start with an adapter without effect: remove peft.init_lora_weights",
        )


def refuse_explosion(kl: float, settings: Settings, of: str = "from the reference ") -> None:
    """Raise Collapsed if a KL is too large, or NaN.

    Args:
        of: between which policies, for the message.
    """
    if not kl <= settings.explode_kl:
        raise Collapsed(f"KL {of}is {kl:.4g} nats per answer, over explode_kl {settings.explode_kl:g}")


# ---- helpers


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, or unchanged if float64."""
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))


def _parts(items: Sequence[int], size: int) -> Iterator[list[int]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def _copy_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU; parts of a divided model where they are."""
    kept = {name: weight.detach() for name, weight in weights.items()}
    return {name: (weight if sharding.is_sharded(weight) else weight.cpu()).clone() for name, weight in kept.items()}


def _set_weights(weights: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])
