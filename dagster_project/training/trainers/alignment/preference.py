"""Alignment methods: an SFT model is trained on preferences, or by a larger model.

It learns from pairs (DPO, KTO; without a reference ORPO, SimPO, CPO), from rewards of its own answers (RLOO, GRPO and
Online DPO through TRL, PPO by ppo.py) or from the distributions of a larger model (GKD).

A method is one class below: its fields are its options; training, reports and planning use only its attributes and
functions. To add one, write its class and list it in METHODS. docs/alignment.md says what each learns from. Sources:

    dpo         Rafailov et al. 2023, arXiv 2305.18290, eq. 7; its other losses as TRL names them
    kto         Ethayarajh et al. 2024, arXiv 2402.01306
    orpo        Hong et al. 2024, arXiv 2403.07691, eq. 6
    simpo       Meng et al. 2024, arXiv 2405.14734, eq. 6
    cpo         Xu et al. 2024, arXiv 2401.08417, eq. 5
    gkd         Agarwal et al. 2024, arXiv 2306.13649, algorithm 1
    rloo        Ahmadian et al. 2024, arXiv 2402.14740
    grpo        Shao et al. 2024, arXiv 2402.03300
    online_dpo  Guo et al. 2024, arXiv 2402.04792
    ppo         Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155

The reference of methods that have one is the SFT policy, without a second copy of the model: the weights that the SFT
adapter was merged into are frozen, and a fresh adapter learns on top of them. It begins with no effect, so that policy
and reference are one at step 0; switched off it is the reference, at any step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message
from dagster_project.core.params import Compute, Section, parse
from dagster_project.core.rendering import end_ids
from dagster_project.training.inference.answers import read_parts
from dagster_project.training.methods import build
from dagster_project.training.methods.build import PreparedModel, causal
from dagster_project.training.methods.options import Quantization
from dagster_project.training.tokens.preference_pairs import both, prompt_ids, reply
from dagster_project.training.trainers.alignment import ppo
from dagster_project.training.trainers.alignment.rewards import Rewards
from dagster_project.training.trainers.alignment.sampled_answers import SampledAnswers
from dagster_project.training.trainers.alignment.teacher import Teacher
from dagster_project.training.trainers.alignment.trl_trainers import shared_prompts, training
from dagster_project.training.trainers.alignment.trl_trainers.answer_groups import group_trainer
from dagster_project.training.trainers.alignment.trl_trainers.distillation import collate_rows, student_trainer
from dagster_project.training.trainers.alignment.trl_trainers.online_pairs import online_pair_trainer
from dagster_project.training.trainers.alignment.trl_trainers.reference_free import experimental, pair_trainer
from dagster_project.training.trainers.alignment.trl_trainers.training import TrainerSpec
from dagster_project.training.trainers.harness.checkpoint import Checkpoints
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.params import NON_SEMANTIC_PARAMS, PreferenceParams
from dagster_project.training.trainers.harness.sharding import ShardedModel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AlignmentRun:
    """Model and data of an alignment."""

    shared: ShardedModel
    """A PeftModel with an adapter that has no effect yet, to be divided among the processes if it has settings for
    that."""
    tokenizer: Any
    pairs: Mapping[str, Sequence[Mapping[str, Any]]]
    """Split -> its pairs."""
    rewards: Rewards | None
    """For methods that learn from rewards."""
    params: PreferenceParams
    compute: Compute
    checkpoints: Checkpoints
    live: Path | None = None
    begin: Callable[[], None] = lambda: None
    """Called once the model is divided, before its weights change or those of a checkpoint are read."""
    sampled: SampledAnswers = field(default_factory=SampledAnswers)
    """The answers that were rewarded, or learned from without rewards."""
    teacher: Callable[[], Any] | None = None
    """Loads the model whose distributions the policy learns, for methods with one."""
    trl: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of TRL's configuration, see trl_options.py."""

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids of the prompts of the training split, by the number of their pair."""
        return [prompt_ids(self.tokenizer, pair) for pair in self.pairs["train"]]

    def reward(self, rows: Sequence[int], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[float]:
        """Reward of each answer to the prompts of these pairs, which are kept.

        Args:
            texts: the answers without special tokens.
            ids: their token ids, from which traces and calls are read.
        """
        assert self.rewards
        pairs, answers = self._read(rows, [self.prompts[row] for row in rows], texts, ids)
        rewards, components = self.rewards(pairs, answers)
        self.sampled.add(pairs, answers, components, rewards, ids, end_ids(self.tokenizer))
        return rewards

    def keep(
        self, step: int, rows: Sequence[int], prompts: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
    ) -> None:
        """Keep answers that are learned from without rewards.

        Args:
            step: of the training, from 1.
            rows: numbers of the pairs.
            prompts, ids: token ids of prompts and answers.
        """
        self.sampled.step = step
        pairs, answers = self._read(rows, prompts, self.tokenizer.batch_decode(ids, skip_special_tokens=True), ids)
        self.sampled.add(pairs, answers, {}, [None] * len(ids), ids, end_ids(self.tokenizer))

    def _read(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> tuple[list[Mapping[str, Any]], list[Message]]:
        """The pairs of these rows, and their answers as messages."""
        pairs = [self.pairs["train"][row] for row in rows]
        answers = []
        for pair, prompt, text, tokens in zip(pairs, prompts, texts, ids, strict=True):
            parts = read_parts(self.tokenizer, prompt, tokens, pair.get("tools"))
            answers.append(parts.message if parts else reply(text)[0])
        return pairs, answers


class AlignmentMethod(Section):
    """An alignment method: an instance holds the options of one variant."""

    name: ClassVar[str]
    """Value of `method` in params.yaml."""
    learns_from_rewards: ClassVar[bool] = False
    """Whether it trains on rewards of sampled answers; else it trains on the answers of the pairs."""
    shares_processes: ClassVar[bool] = False
    """Whether several processes share one training without `sharding`."""
    has_reference: ClassVar[bool] = True
    """Whether the loss compares the policy with the SFT model."""
    trains_prompts: ClassVar[bool] = False
    """Whether the loss also counts the tokens of prompts."""
    can_shard: ClassVar[bool] = False
    """Whether the model can be divided among processes: no process needs it as a whole."""
    checkpoint_size: ClassVar[int] = 3
    """Size of a checkpoint, in multiples of the trainable weights."""
    ignored_params: ClassVar[frozenset[str]] = frozenset()
    """Keys of an entry that this method does not use."""
    can_train_output_layer: ClassVar[bool] = True
    """Whether the loss applies an adapter of `lm_head`."""
    drops_out: ClassVar[bool] = False
    """Whether dropout is on in training, as it is by TRL's defaults in methods that sample answers."""
    reads_pairs: ClassVar[bool] = False
    """Whether a pass reads both answers of its pairs together, see shared_prompts.py, and the reference, if there is
    one, once."""
    rows_per_pair: ClassVar[int] = 1
    """Training rows per pair."""
    figures: ClassVar[Sequence[str]]
    """Columns of the training curve after the loss, if measured."""

    def sampled_answers(self, patience: int | None) -> SampledAnswers:
        """The table of an online method's answers, which says when there is nothing to learn from them.

        Args:
            patience: steps in a row without it after which training stops; None: never.
        """
        return SampledAnswers(patience)

    @property
    def accepts_constant_rewards(self) -> bool:
        return False

    @property
    def given_teacher(self) -> Teacher | None:
        """The larger model that the policy learns from."""
        return None

    @property
    def samples_answers(self) -> bool:
        """Whether answers are generated in training, whose time is not predicted."""
        return self.learns_from_rewards

    def refuse_contradictions(self, params: PreferenceParams, where: str) -> None:
        """Raise InputError if options contradict each other, or the entry."""

    def refuse_few_prompts(self, prompts: int, params: PreferenceParams, where: str) -> None:
        """Raise InputError if the training split has fewer prompts than a forward pass takes."""

    def train(self, run: AlignmentRun) -> TrainingHistory:
        """Train the model in place, from its newest checkpoint if it has one."""
        raise NotImplementedError

    def check_first_loss(self, loss: float, has_router: bool) -> tuple[bool, str]:
        """Whether the loss before the first step is that of a policy equal to its reference, and a note for the report.

        Args:
            has_router: whether the loss of a router is part of it.
        """
        return True, ""

    def passes(self, params: PreferenceParams) -> tuple[int, int]:
        """(pairs or answers in a forward pass, forward passes per optimizer step)."""
        return params.per_device_train_batch_size, params.gradient_accumulation_steps

    def steps(self, pairs: int, params: PreferenceParams) -> int:
        """Optimizer steps of a training."""
        return min(max(1, self.steps_per_epoch(pairs, params)) * params.num_train_epochs, params.max_steps or 10**9)

    def steps_per_epoch(self, pairs: int, params: PreferenceParams) -> int:
        return -(-pairs // math.prod(self.passes(params)))

    def texts_per_epoch(self, texts: int, params: PreferenceParams) -> int:
        """Texts that an epoch trains on.

        Args:
            texts: of the training split.
        """
        return texts

    def sequence_lengths(self, prompt: int, answers: Sequence[int]) -> list[tuple[int, int]]:
        """(tokens, tokens of the answer) of each sequence that a pair adds to a forward pass, for planning.

        Args:
            prompt: tokens of the pair's prompt.
            answers: tokens of each of its answers.
        """
        return [(prompt + answer, answer) for answer in answers]


class TrlMethod(AlignmentMethod):
    """A method implemented by one of TRL's trainers."""

    can_train_output_layer = False
    metrics: ClassVar[Mapping[str, str]]
    """Metric as TRL logs it -> its name in the curve."""

    def trl_classes(self) -> tuple[type, type]:
        """The trainer and the class of its arguments."""
        raise NotImplementedError

    def trl_arguments(self) -> dict[str, Any]:
        """The options under TRL's names."""
        return self.model_dump()

    def trainer_spec(self, run: AlignmentRun) -> TrainerSpec:
        raise NotImplementedError

    def rows(self, tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows in the format of the trainer; `pair` is the number of a row's pair."""
        raise NotImplementedError

    def train(self, run: AlignmentRun) -> TrainingHistory:
        if self.has_reference:
            refuse_other_losses(run.shared.model, self.name)
        rows, validation = (self.rows(run.tokenizer, run.pairs[split]) for split in ("train", "validation"))
        spec = self.trainer_spec(run)
        spec = replace(spec, arguments={**spec.arguments, **run.trl})
        return training.train(
            spec, run.shared, run.tokenizer, rows, [] if self.learns_from_rewards else validation, run.params,
            run.compute, run.checkpoints, run.live, run.begin,
        )  # fmt: skip


def refuse_other_losses(model: Any, method: str) -> None:
    """Check that TRL's own output layer and loss of a router, which methods with a reference use, fit a model.

    Raises:
        InputError: TRL 1.16 leaves out a scale of its logits (Inkling), or reads a key that its configuration does not
            have (Granite MoE).
    """
    config, scale = causal(model).config.get_text_config(), "logits_mup_width_multiplier"
    hint = "use ppo, orpo, simpo or cpo, or another model"
    what = f"data/base_model: TRL's trainer of {method}"
    if getattr(config, scale, None) not in (None, 1):
        raise InputError(f"{what} leaves out {scale} of {config.model_type}: its loss is wrong", hint)
    missing = [key for key in ("num_experts", "num_experts_per_tok") if not hasattr(config, key)]
    if method != OnlineDpo.name and shared_prompts.has_router(model) and missing:
        problem = f"cannot compute the router's loss of {config.model_type}, which has no {missing[0]}"
        raise InputError(f"{what} {problem}", hint)


def _pair_rows(tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Token ids of each pair."""
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "pair": i}
        for i, (prompt, chosen, rejected) in enumerate(both(tokenizer, pairs))
    ]


PAIR_METRICS = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "kl": "kl",
}
"""Metrics of methods that learn from pairs, as TRL logs them -> name in the curve."""
ONLINE_FIGURES = ("kl", "reward", "entropy", "response_length", "unfinished")
"""Metrics in the curve of methods that learn from rewards."""


class Dpo(TrlMethod):
    """Options of dpo."""

    name = "dpo"
    reads_pairs = True
    can_shard = True
    metrics = PAIR_METRICS
    figures = tuple(PAIR_METRICS.values())

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is kept close to the reference: temperature of the implicit reward."""
    loss_type: Literal[
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sigmoid_norm",
    ] = "sigmoid"  # fmt: skip
    """The loss, as named by TRL; `sigmoid` is the loss of the DPO paper."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed probability that chosen and rejected are swapped: sigmoid becomes cDPO; read by robust, exo_pair, which
    requires more than 0, aot and aot_unpaired, too."""
    rpo_alpha: float = Field(default=0.0, ge=0)
    """Weight of the negative log-likelihood of the chosen answer in the loss, so that its likelihood does not fall
    (arXiv 2404.19733)."""

    def refuse_contradictions(self, params: PreferenceParams, where: str) -> None:
        place = f"params.yaml: {where}.options.label_smoothing"
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise InputError(f"{place}: exo_pair needs it above 0", "its paper uses 0.001")
        smoothed = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
        if self.label_smoothing and self.loss_type not in smoothed:
            hint = f"leave it out, or use {', '.join(smoothed)}"
            raise InputError(f"{place}: has no effect on the loss {self.loss_type}", hint)

    def trainer_spec(self, run: AlignmentRun) -> TrainerSpec:
        import trl

        losses, swapped = {str(self.loss_type): 1.0}, self.label_smoothing
        if self.loss_type == "sigmoid" and swapped:
            # TRL's sigmoid, L of x = beta times the margin, has no smoothing. cDPO is L + swapped x, and robust L -
            # swapped x / (1 - 2 swapped)
            losses = {"sigmoid": 2 - 2 * swapped, "robust": 2 * swapped - 1}
        if self.rpo_alpha:
            losses["sft"] = self.rpo_alpha
        weights = {"loss_weights": [*losses.values()]} if len(losses) > 1 else {}
        arguments = {**self.model_dump(exclude={"rpo_alpha"}), "loss_type": [*losses], **weights, "max_length": None}
        spec = TrainerSpec(self.name, trl.DPOTrainer, trl.DPOConfig, arguments, self.metrics)
        return replace(spec, outputs=shared_prompts.log_probabilities, has_reference=True)

    def rows(self, tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return _pair_rows(tokenizer, pairs)

    def check_first_loss(self, loss: float, has_router: bool) -> tuple[bool, str]:
        """ln 2 with the paper's loss: both answers are equally likely."""
        known = self.loss_type == "sigmoid" and not self.rpo_alpha and not has_router
        return not known or abs(loss - math.log(2)) < 1e-5, f", loss {loss:.6f}"


class Kto(TrlMethod):
    """Options of kto."""

    name = "kto"
    can_shard = True
    metrics = PAIR_METRICS
    figures = tuple(PAIR_METRICS.values())
    rows_per_pair = 2

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is kept close to the reference."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the loss of good answers."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the loss of bad answers."""

    def refuse_contradictions(self, params: PreferenceParams, where: str) -> None:
        if params.per_device_train_batch_size < 2:
            problem = "kto estimates KL on the answers of a forward pass, and one is not enough"
            raise InputError(f"params.yaml: {where}.per_device_train_batch_size: {problem}", "set it to 2 or more")

    def trainer_spec(self, run: AlignmentRun) -> TrainerSpec:
        import trl

        arguments = {**self.model_dump(), "max_length": None}
        return TrainerSpec(self.name, trl.KTOTrainer, trl.KTOConfig, arguments, self.metrics)

    def rows(self, tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for i, (prompt, chosen, rejected) in enumerate(both(tokenizer, pairs)):
            rows.append({"prompt_ids": prompt, "completion_ids": chosen, "label": True, "pair": i})
            rows.append({"prompt_ids": prompt, "completion_ids": rejected, "label": False, "pair": i})
        for i, row in enumerate(rows):
            room = max(1, tokenizer.model_max_length - len(row["prompt_ids"]))
            row["KL_completion_ids"] = _unmatched(rows, i)["completion_ids"][:room]
        return rows


def _unmatched(answers: Sequence[Mapping[str, Any]], i: int) -> Mapping[str, Any]:
    """The nearest earlier answer (before the first: the last) with the same label and another prompt.

    KL is estimated on such answers (arXiv 2402.01306, section 4.2). If all prompts are the same, it is the previous
    answer with the same label.
    """
    for back in range(2, len(answers), 2):
        if answers[i - back]["prompt_ids"] != answers[i]["prompt_ids"]:
            return answers[i - back]
    return answers[i - 2]


class ReferenceFree(TrlMethod):
    """Options of methods on pairs without a reference model, by TRL's experimental trainers."""

    has_reference = False
    can_train_output_layer = True
    reads_pairs = True
    metrics = {theirs: ours for theirs, ours in PAIR_METRICS.items() if ours != "kl"} | {"nll_loss": "nll"}
    figures = tuple(metrics.values())

    def trainer_spec(self, run: AlignmentRun) -> TrainerSpec:
        trainer, config = self.trl_classes()
        arguments, measured = {**self.trl_arguments(), "max_length": UNLIMITED}, dict(self.metrics)
        if arguments.get("cpo_alpha") == 0:
            del measured["nll_loss"]  # TRL logs 0
        spec = TrainerSpec(self.name, pair_trainer(trainer, self.trains_prompts), config, arguments, measured)
        return replace(spec, outputs=shared_prompts.log_probabilities, trains_prompts=self.trains_prompts)

    def rows(self, tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return _pair_rows(tokenizer, pairs)

    def sequence_lengths(self, prompt: int, answers: Sequence[int]) -> list[tuple[int, int]]:
        """Padded passes of TRL compute logits at every position."""
        return [(prompt + answer, prompt + answer) for answer in answers]


UNLIMITED = 10**9
"""Longest text for TRL, which has no way to say that there is no limit."""


class Orpo(ReferenceFree):
    """Options of orpo."""

    name = "orpo"
    trains_prompts = True

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio in the loss, the paper's lambda. The rest of the loss is the negative log-likelihood per
    token of prompts and chosen answers, as in the code of its authors."""

    def trl_classes(self) -> tuple[type, type]:
        orpo = experimental("orpo")
        return orpo.ORPOTrainer, orpo.ORPOConfig


class Simpo(ReferenceFree):
    """Options of simpo."""

    name = "simpo"

    beta: float = Field(default=2.0, gt=0)
    """Scale of the reward, which is the mean log-probability of an answer's tokens. The paper uses 2 to 2.5, its
    authors later 10."""
    gamma: float = Field(default=1.0, ge=0)
    """Target margin between the rewards of both answers, `simpo_gamma` of TRL.
    The authors tune its ratio to beta; 0.5 is theirs for Llama 3."""
    cpo_alpha: float = Field(default=0.0, ge=0)
    """Weight of the negative log-likelihood per token of the chosen answer. 0 is the paper's loss; 1 is TRL's default,
    known as CPO-SimPO."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed probability that chosen and rejected are swapped."""

    def trl_classes(self) -> tuple[type, type]:
        cpo = experimental("cpo")
        return cpo.CPOTrainer, cpo.CPOConfig

    def trl_arguments(self) -> dict[str, Any]:
        return {**self.model_dump(exclude={"gamma"}), "simpo_gamma": self.gamma, "loss_type": "simpo"}


class Cpo(ReferenceFree):
    """Options of cpo."""

    name = "cpo"

    beta: float = Field(default=0.1, gt=0)
    """Scale of the difference of both answers' log-probabilities."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of that difference, as named by TRL; `sigmoid` is the paper's. TRL's `simpo` is the method simpo."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of the negative log-likelihood per token of the chosen answer."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed probability that chosen and rejected are swapped, for the loss sigmoid."""

    def refuse_contradictions(self, params: PreferenceParams, where: str) -> None:
        if self.loss_type != "sigmoid" and self.label_smoothing:
            problem = f"params.yaml: {where}.options.label_smoothing: has no effect on the loss {self.loss_type}"
            raise InputError(problem, "leave it out, or use sigmoid")

    def trl_classes(self) -> tuple[type, type]:
        cpo = experimental("cpo")
        return cpo.CPOTrainer, cpo.CPOConfig


class Gkd(TrlMethod):
    """Options of gkd."""

    name = "gkd"
    has_reference = False
    metrics = {"on_policy": "on_policy", "length": "response_length"}
    figures = tuple(metrics.values())

    teacher: Teacher
    """The larger model: `folder` inside the project, and `sha256` of each of its files. It must have the SFT model's
    tokenizer."""
    lmbda: float = Field(default=0.5, ge=0, le=1)
    """Share of the forward passes that learn from answers of the policy itself, the paper's lambda; the others learn
    from chosen answers. 0: none."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Divergence: 0 is the KL divergence of the teacher from the policy, 1 that of the policy from the teacher, between
    them the generalized Jensen-Shannon divergence."""
    temperature: float = Field(default=0.9, gt=0)
    """Temperature at which the policy's answers are sampled."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest of these answers, in tokens."""

    @property
    def given_teacher(self) -> Teacher:
        return self.teacher

    @property
    def samples_answers(self) -> bool:
        return self.lmbda > 0

    def sampled_answers(self, patience: int | None) -> SampledAnswers:
        """There are no rewards that could be equal."""
        return SampledAnswers()

    def trainer_spec(self, run: AlignmentRun) -> TrainerSpec:
        assert run.teacher
        collate = partial(collate_rows, pad=run.tokenizer.pad_token_id)
        constructor = {"teacher_model": run.teacher(), "data_collator": collate}
        arguments, gkd = {**self.model_dump(exclude={"teacher"}), "max_length": None}, experimental("gkd")
        trainer = student_trainer(gkd.GKDTrainer)
        spec = TrainerSpec(self.name, trainer, gkd.GKDConfig, arguments, self.metrics, constructor)
        return replace(spec, sampled=run.sampled, keep=run.keep) if self.samples_answers else spec

    def rows(self, tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        encoded = enumerate(both(tokenizer, pairs))
        return [{"prompt_ids": prompt, "answer_ids": chosen, "pair": i} for i, (prompt, chosen, _) in encoded]

    def train(self, run: AlignmentRun) -> TrainingHistory:
        if self.samples_answers:
            refuse_long_prompts(self.name, run, self.max_new_tokens, "max_new_tokens")
        return super().train(run)

    def sequence_lengths(self, prompt: int, answers: Sequence[int]) -> list[tuple[int, int]]:
        longest = max(answers[0], self.max_new_tokens if self.samples_answers else 0)
        return [(prompt + longest, longest)]


class AnswerGroups(TrlMethod):
    """Options of methods that compare several answers to a prompt by their rewards."""

    learns_from_rewards = True
    drops_out = True
    metrics = {
        "reward": "reward",
        "kl": "kl",
        "entropy": "entropy",
        "completions/mean_length": "response_length",
        "completions/clipped_ratio": "unfinished",
    }
    figures = ONLINE_FIGURES

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

    def refuse_contradictions(self, params: PreferenceParams, where: str) -> None:
        batch, group = params.per_device_train_batch_size, self.num_generations
        if batch % group:
            problem = f"{batch} answers cannot be divided into groups of {group}"
            hint = f"use a multiple of num_generations, e.g. {group * max(1, batch // group)}"
            raise InputError(f"params.yaml: {where}.per_device_train_batch_size: {problem}", hint)

    def trainer_spec(self, run: AlignmentRun) -> TrainerSpec:
        def reward(completions: Any, completion_ids: Any, row: Any, trainer_state: Any, **_: Any) -> list[float]:
            run.sampled.step = trainer_state.global_step + 1
            return run.reward(row, completions, completion_ids)

        arguments = {**self.trl_arguments(), "steps_per_generation": 1}
        spec = TrainerSpec(self.name, *self.trl_classes(), arguments, self.metrics, {"reward_funcs": reward})
        return replace(spec, answers_in_groups=True, sampled=run.sampled)

    def train(self, run: AlignmentRun) -> TrainingHistory:
        refuse_long_prompts(self.name, run, self.max_completion_length, "max_completion_length")
        history = super().train(run)
        if not run.sampled.is_stalled():
            return history
        stopped = f"{self.name}: step {history.step}: {run.sampled.stalled_text()}"
        return StoppedHistory(**vars(history), stopped=stopped)

    def rows(self, tokenizer: Any, pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{"prompt": prompt_ids(tokenizer, pair), "pair": i} for i, pair in enumerate(pairs)]

    def refuse_few_prompts(self, prompts: int, params: PreferenceParams, where: str) -> None:
        if prompts < (needed := params.per_device_train_batch_size // self.num_generations):
            raise InputError(
                f"params.yaml: {where}.per_device_train_batch_size: a forward pass takes answers to {needed} prompts,"
                f" and the training split has {prompts}",
                f"set it to {prompts * self.num_generations} or less, or add prompts",
            )

    def steps_per_epoch(self, pairs: int, params: PreferenceParams) -> int:
        batch, accumulated = self.passes(params)
        return -(-self.texts_per_epoch(pairs, params) // batch // accumulated)

    def texts_per_epoch(self, texts: int, params: PreferenceParams) -> int:
        """TRL leaves out the prompts of a pass that would not be full."""
        prompts = params.per_device_train_batch_size // self.num_generations
        return texts // prompts * prompts * self.num_generations

    def sequence_lengths(self, prompt: int, answers: Sequence[int]) -> list[tuple[int, int]]:
        return [(prompt + self.max_completion_length, self.max_completion_length)]


class GroupMethod(AnswerGroups):
    """Options of rloo and grpo."""

    epsilon: float = Field(default=0.2, gt=0)
    """Largest relative change of a token's probability in one update (clipping range)."""
    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps on each batch of answers."""

    def texts_per_epoch(self, texts: int, params: PreferenceParams) -> int:
        return super().texts_per_epoch(texts, params) * self.num_iterations


class Rloo(GroupMethod):
    name = "rloo"

    def trl_classes(self) -> tuple[type, type]:
        import trl

        return group_trainer(trl.RLOOTrainer, gives_log_probs=False), trl.RLOOConfig


class Grpo(GroupMethod):
    """Options of grpo."""

    name = "grpo"

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How the losses of tokens become one loss, as named by TRL: grpo is the mean of each answer's mean (the paper's),
    dapo and bnpo the mean over all tokens of a forward pass, which is a step without gradient accumulation, dr_grpo the
    sum divided by answers times max_completion_length; cispo, sapo, luspo and vespo change the clipping, too. A step is
    the mean over its passes."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by: of the group (the paper's), of the batch, or none (Dr. GRPO).
    """
    epsilon_high: float | None = Field(default=None, gt=0)
    """Upper end of the clipping range; by default epsilon. DAPO uses 0.28. With cispo, which requires it, the largest
    ratio itself; its paper uses 5."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whether a ratio of probabilities is of a token, or of a whole answer: sequence requires the loss_type grpo, which
    makes it GSPO, sapo or luspo; luspo requires it."""
    mask_truncated_completions: bool = False
    """Leave unfinished answers out of the loss (DAPO)."""

    def refuse_contradictions(self, params: PreferenceParams, where: str) -> None:
        super().refuse_contradictions(params, where)
        if self.loss_type == "cispo" and (self.epsilon_high or 0) <= 1:
            raise InputError(
                f"params.yaml: {where}.options.epsilon_high: with cispo it is the largest ratio of probabilities"
                " itself, and must be above 1",
                "set it, e.g. to 5, as its paper does",
            )
        unread = {"cispo": ["epsilon"], "sapo": ["epsilon", "epsilon_high"], "vespo": ["epsilon", "epsilon_high"]}
        useless = [name for name in unread.get(self.loss_type, []) if name in self.model_fields_set]
        if useless:
            problem = f"params.yaml: {where}.options.{useless[0]}: has no effect on the loss {self.loss_type}"
            raise InputError(problem, "leave it out")
        level, needed = self.importance_sampling_level, {"luspo": "sequence", "vespo": "token"}.get(self.loss_type)
        if needed and level != needed:
            problem = f"{self.loss_type} is defined for ratios of a {needed}"
            raise InputError(
                f"params.yaml: {where}.options.importance_sampling_level: {problem}", f"set it to {needed}"
            )
        if level == "sequence" and self.loss_type in {"bnpo", "dr_grpo", "dapo", "cispo"}:
            raise InputError(
                f"params.yaml: {where}.options.loss_type: with ratios of whole answers, {self.loss_type} would weight"
                " each answer by its length",
                "use grpo, which makes it GSPO, sapo or luspo",
            )

    def trl_classes(self) -> tuple[type, type]:
        import trl

        return group_trainer(trl.GRPOTrainer, gives_log_probs=True), trl.GRPOConfig


class OnlineDpo(AnswerGroups):
    """Options of online_dpo."""

    name = "online_dpo"
    metrics = {**AnswerGroups.metrics, "rewards/accuracies": "accuracy", "rewards/margins": "margin"}

    num_generations: int = Field(default=2, ge=2)
    """Answers to each prompt, of which the one with the highest reward is preferred to the one with the lowest. Must
    divide `per_device_train_batch_size`. Answers to a prompt whose rewards are equal are left out of the loss."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is kept close to the reference: temperature of the implicit reward."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """The loss, as named by TRL; `sigmoid` is the loss of the DPO paper."""

    def trl_classes(self) -> tuple[type, type]:
        import trl

        return online_pair_trainer(self.loss_type), trl.GRPOConfig

    def trl_arguments(self) -> dict[str, Any]:
        return self.model_dump(exclude={"loss_type"}) | {"scale_rewards": "none"}


class Ppo(AlignmentMethod, ppo.Settings):
    """Options of ppo, which the loop of ppo.py trains."""

    name = "ppo"
    learns_from_rewards = True
    shares_processes = True
    can_shard = True
    checkpoint_size = 4
    ignored_params = frozenset(PreferenceParams.model_fields) - {"save_total_limit", "quantization", "sharding"}
    figures = (*ONLINE_FIGURES, "kl_coef", "value_loss", "clip_fraction", "explained_variance")

    def refuse_contradictions(self, params: PreferenceParams, where: str) -> None:
        if self.target_kl is not None and self.horizon <= 0.2 * min(self.batch_size, self.total_episodes):
            problem = f"{self.horizon:g} would move beta below zero at {self.batch_size} answers an iteration"
            hint = f"use more than a fifth of them, e.g. {10 * self.batch_size}"
            raise InputError(f"params.yaml: {where}.options.horizon: {problem}", hint)

    def train(self, run: AlignmentRun) -> TrainingHistory:
        """Train by ppo.py, whose iterations are the steps of the history, and the policy's loss the loss.

        Raises:
            InputError: it stopped before the first update.
        """
        history = ppo.train(
            run.shared, run.tokenizer, run.prompts, run.reward, self, run.compute, run.checkpoints, run.live,
            run.begin, run.sampled,
        )  # fmt: skip
        if history.stopped and not history.curve:
            raise InputError(history.stopped, "change the options named above")
        curve = [{**point, "loss": point["policy_loss"]} for point in history.curve]
        trained = TrainingHistory(curve=curve, seen=history.seen, tokens=history.tokens, seconds=history.seconds)
        return StoppedHistory(**vars(trained), stopped=history.stopped) if history.stopped else trained

    def sampled_answers(self, patience: int | None) -> SampledAnswers:
        return SampledAnswers(patience, by_record=False, ends_count=self.missing_eos_penalty > 0)

    @property
    def accepts_constant_rewards(self) -> bool:
        return self.allow_constant_reward

    def passes(self, params: PreferenceParams) -> tuple[int, int]:
        return self.mini_batch_size, self.gradient_accumulation_steps

    def steps(self, pairs: int, params: PreferenceParams) -> int:
        """Iterations, as in the report and in examples.parquet."""
        return ppo.iterations(self)

    def texts_per_epoch(self, texts: int, params: PreferenceParams) -> int:
        return self.total_episodes * self.num_ppo_epochs

    def sequence_lengths(self, prompt: int, answers: Sequence[int]) -> list[tuple[int, int]]:
        return [(prompt + self.response_length, self.response_length)]


METHODS: dict[str, type[AlignmentMethod]] = {
    method.name: method for method in (Dpo, Kto, Orpo, Simpo, Cpo, Gkd, Rloo, Grpo, OnlineDpo, Ppo)
}

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


def refuse_long_prompts(method: str, run: AlignmentRun, longest: int, key: str) -> None:
    """As in ppo.py, for the prompts of a run."""
    ppo.refuse_long_prompts(method, run.shared.model, run.tokenizer, run.prompts, longest, key)


@dataclass
class StoppedHistory(TrainingHistory):
    """Record of a training that stopped early, with the last good weights."""

    stopped: str = ""
    """The reason, and what to change."""


def parse_method(
    name: str, options: Mapping[str, Any], params: PreferenceParams, where: str, given: Collection[str] = ()
) -> AlignmentMethod:
    """The method of an entry, with its options.

    Args:
        given: keys that the entry itself names.
    Raises:
        InputError: unknown keys or wrong values; options that contradict each other.
    """
    method = parse(METHODS[name], dict(options), f"{where}.options")
    if ignored := sorted((method.ignored_params - NON_SEMANTIC_PARAMS) & set(given)):
        known = f"its options: {', '.join(METHODS[name].model_fields)}"
        raise InputError(f"params.yaml: {where}: {', '.join(ignored)}: {name} sets its steps in its options", known)
    peft = getattr(params, "peft", {})
    if not method.can_train_output_layer and "lm_head" in str(peft.get("target_modules")):
        problem = f"params.yaml: {where}.peft.target_modules: TRL's trainer of {name} does not train lm_head"
        raise InputError(problem, "leave it out")
    if not method.drops_out and peft.get("lora_dropout"):
        problem = f"params.yaml: {where}.peft.lora_dropout: has no effect, {name} trains without dropout"
        raise InputError(problem, "leave it out")
    _refuse_other_start(method, peft, where)
    method.refuse_contradictions(params, where)
    return method


def _refuse_other_start(method: AlignmentMethod, peft: Mapping[str, Any], where: str) -> None:
    """Raise InputError if the model with its adapter switched off would not be the SFT model, or the policy at step 0.

    It is the reference, and what the answers of the policy are compared with. PEFT trains biases in the model itself,
    and takes some starts of an adapter out of its weights.
    """
    start, bias = str(peft.get("init_lora_weights", True)), peft.get("bias", "none")
    accepted = {"true", "gaussian"} if method.has_reference else {"true", "gaussian", "orthogonal"}  # but for rounding
    problem = ""
    if bias != "none":
        problem = f"bias: {bias} trains biases of the SFT model itself"
    elif start.lower() not in accepted:
        problem = f"init_lora_weights: {start} changes the weights of the SFT model, or begins with an effect"
    if problem:
        what = f"params.yaml: {where}.peft.{problem}; with the adapter switched off it must be the SFT model"
        raise InputError(what, "leave it out")


def policy(
    sft: Path,
    peft: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    where: str,
    adapter: str,
    quantization: Quantization = "none",
) -> PreparedModel:
    """The SFT model with a fresh LoRA adapter.

    Args:
        sft: a standalone model.
        peft: keys of LoRA.
        adapter: name of the SFT variant; the adapter's configuration names its model by the path in dvc.yaml.
    """
    assert re.fullmatch(r"[\w-]+", adapter)
    named = f"data/merged/{adapter}"
    prepared = build.build("lora", peft, sft, device, dtype, where, quantization, packs=False, named=named)
    build.refuse_unmatched(prepared.model, peft, where)
    return prepared
