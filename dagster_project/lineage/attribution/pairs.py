"""Gradients of models that were trained on preference pairs: of the loss of a
pair, as training computed it, for policies of DPO and for reward models.

    DPO            -log sigmoid(beta ((log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r))))
                   Rafailov et al. 2023, arXiv 2305.18290, eq. 7
    reward model   -log sigmoid(reward(c) - reward(r) - margin)
                   Ouyang et al. 2022, arXiv 2203.02155, section 3.5

c and r are the chosen and the rejected answer. The examples of a pair are these two, each after the prompt, in this
order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.core.records import read_preferences
from dagster_project.core.text import many
from dagster_project.lineage.attribution.gradients import TrainedModel
from dagster_project.lineage.attribution.per_record import projected_gradients
from dagster_project.lineage.attribution.projection import Projection
from dagster_project.lineage.attribution.records import Example, TrainedRecord, seen_ids
from dagster_project.training.methods.build import peft_config
from dagster_project.training.methods.hardware import adding_adapters, prepare
from dagster_project.training.tokens.preference_pairs import both

if TYPE_CHECKING:
    import torch


def pair_records(
    trained: Path, preferences: Path, tokenizer: Any
) -> tuple[list[TrainedRecord], dict[str, dict[str, Any]]]:
    """Exactly the pairs that were in a training step, by id, and all pairs of the training split by id.

    Args:
        trained: folder of the policy or reward model, with `examples.parquet`.
        tokenizer: with the chat template of the training.
    Raises:
        InputError: a pair of a training step is not in the preferences.
    """
    pairs = {pair["example_id"]: pair for pair in read_preferences(preferences / "train")}
    names = sorted(seen_ids(trained))
    if lost := [name for name in names if name not in pairs]:
        raise InputError(
            f"{len(lost)} of {many(len(names), 'pair')} of the training are not in {preferences.name}:"
            " it is not the data of this training",
            "restore it with `dvc checkout --force`, then run the same command again",
        )
    encoded = both(tokenizer, [pairs[name] for name in names])
    return [
        TrainedRecord(name, (_answered(prompt, chosen), _answered(prompt, rejected)))
        for name, (prompt, chosen, rejected) in zip(names, encoded, strict=True)
    ], pairs


def _answered(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """An answer after its prompt; all tokens of the answer have a label."""
    weights = (0.0,) * len(prompt) + (1.0,) * len(answer)
    return Example((*prompt, *answer), (IGNORE,) * len(prompt) + tuple(answer), weights)


WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save\.default)\.")
"""What PEFT adds to the names of weights."""
REVERSE_KL = "reverse_kl"
"""The divergence from the reference in the loss of the DPO paper."""


@dataclass(frozen=True)
class DpoLoss:
    """Options of DPO that its loss depends on."""

    beta: float
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str) -> DpoLoss:
        """Args:
            settings: of the variant's training, complete.
        Raises:
            InputError: the loss is another one, whose gradients are not supported.
        """
        options, divergence = settings["options"], settings.get("trl", {}).get("f_divergence_type", REVERSE_KL)
        others = {
            f"options.loss_type {options['loss_type']}": options["loss_type"] != "sigmoid",
            "options.rpo_alpha above 0": options["rpo_alpha"],
            f"trl.f_divergence_type {divergence}": divergence != REVERSE_KL,
        }
        if what := next((name for name, is_used in others.items() if is_used), None):
            raise InputError(
                f"{where} was trained with {what}, whose gradients are not supported: only those of DPO's own loss are",
                "ask a variant that was trained without it, or the supervised model that it started from",
            )
        return cls(options["beta"], options["label_smoothing"])


@dataclass(frozen=True)
class AlignedModel(TrainedModel):
    """A policy of DPO. Its adapter, switched off, leaves the reference."""

    loss: DpoLoss
    reference: dict[Example, float] = field(default_factory=dict, repr=False, compare=False)
    """Log-probability of answers under the reference, as far as it was computed."""

    @classmethod
    def aligned(cls, folder: Path, sft: Path, compute: Compute, where: str, loss: DpoLoss) -> AlignedModel:
        """Args:
        folder: the adapter.
        sft: the merged model that it was trained on.
        """
        loaded = TrainedModel.load(folder, sft, compute, where)
        return cls(loaded.prepared, 0.0, loss)

    def of_record(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Gradient of the loss of a pair, by name of the weight."""
        self.compare([examples])
        return self._gradient(self.sum_of_losses([examples]))

    def compare(self, pairs: Sequence[Sequence[Example]]) -> None:
        """Compute the log-probabilities of pairs under the reference, which their loss needs."""
        import torch

        with torch.no_grad(), self.prepared.model.disable_adapter():
            for examples in pairs:
                if any(example not in self.reference for example in examples):
                    self.reference.update(zip(examples, self._log_probabilities(examples).tolist(), strict=True))

    def sum_of_losses(self, records: Sequence[Sequence[Example]]) -> torch.Tensor:
        """Sum of the losses of several pairs, in one packed row, after `compare`."""
        import torch
        from torch.nn.functional import logsigmoid

        examples = [example for pair in records for example in pair]
        likely = self._log_probabilities(examples)
        change = likely - torch.tensor([self.reference[example] for example in examples], device=likely.device)
        margin = self.loss.beta * (change[0::2] - change[1::2])
        swapped = self.loss.label_smoothing
        return -((1 - swapped) * logsigmoid(margin) + swapped * logsigmoid(-margin)).sum()

    def _log_probabilities(self, examples: Sequence[Example]) -> torch.Tensor:
        """Log-probability in nats of each answer, (examples,) float32."""
        import torch

        losses, _, owners = self.token_losses(examples, 0.0)
        return -torch.zeros(len(examples), device=losses.device).index_add(0, owners, losses)


def gradients_of_pairs(model: AlignedModel, projection: Projection, pairs: Sequence[Sequence[Example]]) -> torch.Tensor:
    """Projected gradient of the loss of each pair, (pairs, width) float32."""
    model.compare(pairs)
    return projected_gradients(model, projection, pairs)


@dataclass(frozen=True)
class RewardedModel:
    """A reward model.

    Its adapter was merged when it was saved, so the gradient is that of the weights that the adapter was on.
    """

    model: Any
    weights: Mapping[str, torch.Tensor]
    """The trained weights by name."""
    margins: Mapping[str, float]
    """Id of a pair -> its margin, if the training required them."""
    center: float
    """`center_rewards_coefficient`, or 0."""

    @classmethod
    def load(
        cls, folder: Path, settings: Mapping[str, Any], compute: Compute, margins: Mapping[str, float], where: str
    ) -> RewardedModel:
        """Args:
        folder: of the reward model.
        settings: of its training.
        """
        import torch
        from transformers import AutoModelForSequenceClassification

        device, dtype = prepare(compute)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=dtype, use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa"
        ).to(device)
        model.eval()
        names = None if settings["method"] == "full" else trained_names(model, settings["peft"], where)
        model.score.weight.data = model.score.weight.data.float()
        model.score.register_forward_pre_hook(lambda _, given: (given[0].float(),))  # as it was trained
        for name, weight in model.named_parameters():
            weight.requires_grad_(names is None or name in names)
        assert dtype in {torch.float32, torch.bfloat16, torch.float16}
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        return cls(model, weights, margins, settings["center_rewards_coefficient"] or 0.0)

    def of_record(self, record: TrainedRecord) -> dict[str, torch.Tensor]:
        """Gradient of the loss of a pair, by name of the weight."""
        from torch.nn.functional import logsigmoid

        chosen, rejected = (self.reward(example) for example in record.examples)
        loss = (
            -logsigmoid(chosen - rejected - self.margins.get(record.example_id, 0.0))
            + self.center * (chosen + rejected) ** 2
        )
        return self._gradient(loss)

    def of_answer(self, example: Example) -> tuple[float, dict[str, torch.Tensor]]:
        """Reward of an answer, and the gradient of its negative.

        A cosine above 0 with that of a pair means that a step on the pair raises it.
        """
        reward = self.reward(example)
        return float(reward.detach()), self._gradient(-reward)

    def reward(self, example: Example) -> torch.Tensor:
        """Reward of an answer after its prompt, read at its last token, as in training.

        What the chat template writes after it is left out.
        """
        import torch

        end = max(i for i, label in enumerate(example.labels) if label != IGNORE) + 1
        ids = torch.tensor([example.input_ids[:end]], device=self.model.device)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        return self.model.score(hidden)[0, 0].float()

    def _gradient(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        found = torch.autograd.grad(loss, list(self.weights.values()))
        return dict(zip(self.weights, found, strict=True))


def trained_names(model: Any, peft: Mapping[str, Any], where: str) -> set[str]:
    """Names of the weights that LoRA was trained on, of those that it trained in place, and of the output layer.

    PEFT itself finds them, in a copy of the model without values.

    Args:
        peft: keys of LoRA.
    """
    import torch
    from peft import TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        empty = AutoModelForSequenceClassification.from_config(model.config)
        with adding_adapters():
            config = peft_config("lora", deepcopy(dict(peft)), where, empty)  # PEFT extends the list `modules_to_save`
            config.task_type = TaskType.SEQ_CLS
            adapted = get_peft_model(empty, config)
    whole = adapted.get_base_model()
    trained = {WRAPPERS.sub(".", name) for name, weight in whole.named_parameters() if weight.requires_grad}
    in_place = {name for name, _ in model.named_parameters() if name in trained}  # of `bias` and `modules_to_save`
    return {
        "score.weight",
        *in_place,
        *(
            WRAPPERS.sub(".", f"{name}.{getattr(module, 'parameter_name', 'weight')}")  # of `target_parameters`
            for name, module in whole.named_modules()
            if hasattr(module, "lora_A") or hasattr(module, "token_adapter")
        ),
    }
