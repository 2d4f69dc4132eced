"""The largest pass of online trainings that read a prompt once for all answers, and such passes on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.training.methods.build import PreparedModel
from dagster_project.training.methods.load import load_base
from dagster_project.training.planning.pairs import largest_pass
from dagster_project.training.tokens.collators import SIZES
from dagster_project.training.trainers.alignment.trl_trainers.pair_attention import attending_by_pair
from dagster_project.training.trainers.alignment.trl_trainers.shared_prompts import of_answers

if TYPE_CHECKING:
    from dagster_project.training.trainers.alignment.preference import AnswerGroups
    from dagster_project.training.trainers.harness.params import PreferenceParams


@dataclass(frozen=True)
class AnswerPass:
    """A pass over groups of answers."""

    lengths: tuple[tuple[int, ...], ...]
    """Tokens of each prompt, and then of each answer to it."""
    has_reference: bool
    keeps_graph: bool
    """Whether the policy's first pass, before that of the reference, is the one that is learned from. Not with gradient
    checkpointing."""

    @property
    def tokens(self) -> int:
        """Tokens of the row that is read."""
        return -(-sum(map(sum, self.lengths)) // SIZES) * SIZES

    @property
    def answer_tokens(self) -> int:
        return sum(sum(answers) for _, *answers in self.lengths)


def answer_pass(method: AnswerGroups, params: PreferenceParams, prompts: Sequence[int], passes: int) -> AnswerPass:
    """The largest pass of a training, if all answers are as long as they may be.

    Args:
        prompts: tokens of each prompt of the training split.
        passes: of the training.
    """
    batch, accumulated = method.passes(params)
    answers = [method.max_completion_length] * method.num_generations
    rows = largest_pass([prompt + sum(answers) for prompt in prompts], batch // len(answers), passes)
    # TRL's GRPO needs log-probabilities before the first update only if weights change between passes over the answers
    keeps_graph = method.name == "rloo" or accumulated % getattr(method, "num_iterations", 1) != 0
    return AnswerPass(tuple((prompts[row], *answers) for row in rows), method.beta > 0, keeps_graph)


def answer_passes(
    ledger: Any, prepared: PreparedModel, base: Any, groups: AnswerPass, checkpointing: bool, passes: int
) -> None:
    """Run the passes of training/trainers/alignment/trl_trainers/answer_groups.py over the answers on the meta device.

    Sampling them needs less memory: no activations are kept.

    Args:
        ledger: of memory.py; it records them.
        checkpointing: whether activations are computed again in the backward pass.
    """
    import torch

    model = prepared.model
    # the answers to a prompt begin with different tokens
    prompts = [[number] * size for number, (size, *sizes) in enumerate(groups.lengths) for _ in sizes]
    answers = [[number] * size for _, *sizes in groups.lengths for number, size in enumerate(sizes)]
    keeps = groups.keeps_graph and not checkpointing

    def log_probabilities(entropies: bool) -> Any:
        return of_answers(model, prompts, answers, max(map(len, answers)), 1.0, entropies)[0]

    def of_reference() -> Any:
        with torch.no_grad(), model.disable_adapter():
            return log_probabilities(False)

    with attending_by_pair(base):
        for _ in range(passes):
            with torch.device("meta"), ledger.mode(), ledger.attention():
                reference = of_reference() if groups.has_reference and not keeps else None
                found = log_probabilities(True)
                reference = of_reference() if groups.has_reference and keeps else reference
                torch.autograd.backward(found.sum())
                del found, reference  # a reference that is kept would count as memory


def judge_bytes(base_model: Path, dtype: Any) -> int:
    """Bytes of the weights of a reward model that was trained from a model: the same ones without the output layer."""
    import torch

    model = load_base(base_model, torch.device("cpu"), dtype, weights=False)
    return sum(int(weight.numel()) * int(dtype.itemsize) for weight in model.base_model.parameters())
