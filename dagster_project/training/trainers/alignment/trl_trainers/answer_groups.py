"""RLOO and GRPO: TRL's trainers with answers by our own loop, and passes that read each prompt once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dagster_project.core.rendering import end_ids
from dagster_project.training.inference.decoding import decode
from dagster_project.training.inference.sampling import sampled, uniform_numbers
from dagster_project.training.methods.build import causal
from dagster_project.training.trainers.alignment.trl_trainers import shared_prompts
from dagster_project.training.trainers.alignment.trl_trainers.pair_attention import attending_plainly

if TYPE_CHECKING:
    import torch

OVERRIDDEN = (
    "_get_train_sampler",
    "_prepare_inputs",
    "_tokenize_prompts",
    "_generate_single_turn",
    "_get_per_token_logps_and_entropies",
)
"""Private methods of TRL."""


@cache
def _sampler_class() -> type:
    import torch
    from trl.trainer.utils import RepeatSampler

    class EpochSampler(RepeatSampler):
        """The order of an epoch depends only on the seed and the epoch.

        TRL's generator continues from epoch to epoch, but not in a resumed training.
        """

        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
            return super().__iter__()

    return EpochSampler


@cache
def group_trainer(base: type, gives_log_probs: bool) -> type:
    """TRL's trainer on prompts that are tokenized already.

    Args:
        base: TRL's RLOOTrainer or GRPOTrainer.
        gives_log_probs: whether its answers come with log-probabilities, which only vLLM computes.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    if missing := [name for name in OVERRIDDEN if not hasattr(base, name)]:
        raise AssertionError(f"written for trl 1.16: {version('trl')} has no {base.__name__}.{', '.join(missing)}")

    class GroupTrainer(base):
        session: Any
        """A TrlSession."""
        _step: int
        _buffered_inputs: Any
        batches = (0, 0)
        """The current step, and how many batches of answers were generated in it."""
        kept: tuple[list[Any], torch.Tensor, torch.Tensor] | None = None
        """Answers, and their log-probabilities and entropies as the policy's first pass computed them, with its graph.
        """

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            group, passes = self.num_generations, self.num_iterations * self.args.steps_per_generation
            rows = self.train_dataset if dataset is None else dataset
            return _sampler_class()(rows, group, self.args.generation_batch_size // group, passes, seed=self.args.seed)

        def _prepare_inputs(self, batch: Any) -> Any:
            """A resumed training goes on with the answers of the checkpoint if these have several passes."""
            if not self._step:
                self._step, self._buffered_inputs = self.session.answers_in_use
            return super()._prepare_inputs(batch)

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            batch = self._buffered_inputs if self._step % self.num_iterations else None
            self.session.answers_in_use = (self._step, batch)
            return loss

        def _tokenize_prompts(self, prompts: Any) -> tuple[list[list[int]], None, dict[str, Any]]:
            """TRL 1.16 would render all of them with the same tools."""
            return [list(ids) for ids in prompts], None, {}

        def _generate_single_turn(self, prompts: list[list[int]], *_: Any, **__: Any) -> Any:
            """Sampled answers, without dropout.

            Random numbers depend only on seed, step and the place of an answer in its step.
            """
            self.eos_token_ids = sorted(end_ids(self.session.tokenizer))
            answers = own_answers(self, prompts, next_seed(self), self.max_completion_length, self.top_p)
            return (answers, None) if gives_log_probs else answers

        def _get_per_token_logps_and_entropies(
            self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, *others: Any,
            compute_entropy: bool = False, **named: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
            """Log-probabilities and entropies of the answers' tokens, (answers, longest answer) each; no router's loss.

            If the weights do not change between answering and learning, the pass before the answers are rewarded is the
            one that is learned from: its graph is kept.
            """
            if not self.session.reads_groups:
                return super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, *others, compute_entropy=compute_entropy, **named
                )
            prompts, answers = _tokens(input_ids, attention_mask, logits_to_keep)
            rows = list(zip(prompts, answers, strict=True))
            if torch.is_grad_enabled() and self.kept is not None:
                known, log_probs, entropies = self.kept
                self.kept = None
                order = torch.tensor([known.index(row) for row in rows])
                return log_probs[order], entropies[order], None
            is_reference = any(layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer))
            keeps = not (torch.is_grad_enabled() or is_reference or self.args.gradient_checkpointing)
            with torch.set_grad_enabled(torch.is_grad_enabled() or keeps):
                log_probs, entropies = shared_prompts.of_answers(
                    model, prompts, answers, logits_to_keep, self.temperature, compute_entropy or keeps
                )
            if keeps:
                assert entropies is not None
                self.kept = rows, log_probs, entropies
            return log_probs.detach() if keeps else log_probs, entropies, None

    return GroupTrainer


def next_seed(trainer: Any) -> str:
    """Seed of the trainer's next batch of answers; it depends only on seed, step and the batch's place in its step."""
    step = trainer.state.global_step
    number = trainer.batches[1] if trainer.batches[0] == step else 0
    trainer.batches = step, number + 1
    return f"{trainer.args.seed} {step} {number}"


def own_answers(
    trainer: Any, prompts: Sequence[Sequence[int]], seed: str, longest: int, top_p: float = 1.0
) -> list[list[int]]:
    """Token ids of the policy's sampled answer to each prompt, without dropout."""
    model, tokenizer = causal(trainer.model), trainer.session.tokenizer
    choose = sampled(uniform_numbers(seed, range(len(prompts)), longest), trainer.temperature, top_p)
    trains = trainer.model.training
    trainer.model.eval()
    with attending_plainly(model):
        answers = decode(model, prompts, choose, longest, end_ids(tokenizer), tokenizer.pad_token_id)
    trainer.model.train(trains)
    return answers


def _tokens(ids: torch.Tensor, mask: torch.Tensor, width: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts, padded on the left, and answers, in the last `width` columns and padded on the right."""
    halves = ((ids[:, some].tolist(), mask[:, some].bool().tolist()) for some in (slice(-width), slice(-width, None)))
    prompts, answers = ([_chosen(*row) for row in zip(*half, strict=True)] for half in halves)
    return prompts, answers


def _chosen(ids: Sequence[int], mask: Sequence[bool]) -> list[int]:
    return [token for token, is_text in zip(ids, mask, strict=True) if is_text]
