"""Gradients of a trained adapter: of the loss of a record, as training computed
it, and of the log-probability of a part of an answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.lineage.attribution.records import Example
from dagster_project.training.methods.attention import attention_for
from dagster_project.training.methods.build import PreparedModel, build, causal
from dagster_project.training.methods.hardware import adding_adapters, prepare
from dagster_project.training.methods.isolation import refuse_mixing
from dagster_project.training.methods.load import AdapterInfo, load_base
from dagster_project.training.methods.logits import logits_of
from dagster_project.training.methods.options import STARTS_FROM_WEIGHTS
from dagster_project.training.tokens.collators import SIZES, collate_packed

if TYPE_CHECKING:
    import torch

OWN_WEIGHTS = ("full", "bitfit")
"""Methods that train the base model's own weights, whose folders are complete models."""
REFUSED = {
    **dict.fromkeys(
        ("prefix_tuning", "prompt_tuning", "p_tuning", "cartridge"),
        "it trains virtual tokens and leaves every weight as it is, so there is no gradient of a weight to compare",
    ),
    "adaption_prompt": "it trains prompts inside the attention and leaves every weight as it is",
    "feature_extraction": (
        "it is a classifier without optimizer steps: it predicts a label and has no log-probability of a text"
    ),
}
"""Method -> why its answers cannot be attributed."""
STRENGTH = 0.5
"""Share of what an adapter adds, at which gradients are taken. A power of two,
so that weights are multiplied exactly. Chosen in docs/decisions/062."""
ADDS = re.compile(r"\.lora_(embedding_)?B\.")
"""Names of the weights that are multiplied: B of LoRA, DoRA and AdaLoRA."""


@dataclass(frozen=True)
class TrainedModel:
    """An adapter with its base model, ready for gradients of its trained weights."""

    prepared: PreparedModel
    label_smoothing: float
    scales: Mapping[str, torch.Tensor] | None = field(default=None, kw_only=True)
    """What each number of a gradient is multiplied by, by name of the weight; None: nothing."""
    is_weakened: bool = field(default=False, kw_only=True)

    @classmethod
    def load(
        cls,
        folder: Path,
        base_model: Path,
        compute: Compute,
        where: str,
        label_smoothing: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> TrainedModel:
        """Args:
            folder: the adapter, or the complete model of a method that trains the base model's own weights.
            where: name of the model, for messages.
            options: `peft` of the variant; for `full`, `trainable` selects the weights.
        Raises:
            InputError: its method cannot be attributed.
        """
        info = AdapterInfo.read(folder)
        if info.method in REFUSED:
            raise InputError(
                f"{where}: answers of {info.method} cannot be attributed: {REFUSED[info.method]}", "ask another variant"
            )
        device, dtype = prepare(compute)
        if info.method in OWN_WEIGHTS:
            prepared = build(info.method, options or {}, folder, device, dtype, where)
        else:
            prepared = with_adapter(folder, base_model, info, device, dtype)
        prepared.model.eval()
        return cls(prepared, label_smoothing)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights by name."""
        named = self.prepared.model.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    @property
    def device(self) -> torch.device:
        found: torch.device = causal(self.prepared.model).device
        return found

    def twins(self, count: int) -> list[TrainedModel]:
        """This and other models that share all tensors with it, one for each thread: a forward pass may change the
        modules of a model."""
        model = self.prepared.model
        while len(self._twins) < count - 1:
            shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            twin = replace(self, prepared=replace(self.prepared, model=deepcopy(model, shared)))
            vars(twin)["mixes_examples"] = self.mixes_examples  # as computed once
            self._twins.append(twin)
        return [self, *self._twins[: count - 1]]

    @cached_property
    def _twins(self) -> list[TrainedModel]:
        return []

    @cached_property
    def mixes_examples(self) -> bool:
        """Whether the examples of a packed row influence each other, as in Mamba, which trains on one in a pass."""
        try:
            refuse_mixing(self.prepared.model, self.prepared.hidden_states, True, "")
        except InputError:
            return True
        return False

    def at(self, weights: Mapping[str, torch.Tensor] | None, scales: Mapping[str, torch.Tensor] | None) -> TrainedModel:
        """This model with other values of its trained weights, which replace those in memory; None: as they are.

        Raises:
            InputError: the weights are not those of this model.
        """
        assert not self.is_weakened
        for given in filter(None, (weights, scales)):
            if {name: tuple(tensor.shape) for name, tensor in given.items()} != self.shapes:
                raise InputError(
                    "the checkpoints of this method have other weights than its adapter", "ask about the end alone"
                )
        own = self.weights
        for name, weight in (weights or {}).items():
            own[name].data.copy_(weight)
        device = next(iter(own.values())).device
        return replace(self, scales=scales and {name: scale.to(device) for name, scale in scales.items()})

    def weakened(self) -> TrainedModel:
        """This model with B multiplied by `STRENGTH` in memory, also in that of the given object, which must not be
        used any more. Unchanged if the adapter has no B, or began with one that added something. Other trained weights,
        such as DoRA's magnitudes, stay as they are.
        """
        if self.is_weakened:
            return self
        self._multiply(STRENGTH)
        return replace(self, is_weakened=True)

    def _multiply(self, factor: float) -> None:
        """Multiply B."""
        starts = [
            getattr(config, "init_lora_weights", True)
            for config in getattr(self.prepared.model, "peft_config", {}).values()
        ]
        if not any(start is False or STARTS_FROM_WEIGHTS.search(str(start)) for start in starts):
            for name, weight in self.weights.items():
                if ADDS.search(name):
                    weight.data.mul_(factor)

    @contextmanager
    def _as_it_answers(self) -> Iterator[None]:
        """Undo `weakened` within the block."""
        if self.is_weakened:
            self._multiply(1 / STRENGTH)
        try:
            yield
        finally:
            if self.is_weakened:
                self._multiply(STRENGTH)

    def of_record(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Gradient of the weighted mean loss over the tokens of a record's examples, by name of the weight."""
        return self._gradient(self.sum_of_losses([examples]))

    def of_span(self, example: Example) -> tuple[float, dict[str, torch.Tensor]]:
        """Log-probability in nats of the labeled tokens as the model answers,
        and the gradient of its negative, by name of the weight.

        The sign is that of a loss, so that a cosine above 0 with the gradient
        of a record means: a step on the record makes the tokens more likely.
        """
        as_it_answers = self.log_probability(example) if self.is_weakened else None
        loss = self._nats(example)
        return -float(loss.detach()) if as_it_answers is None else as_it_answers, self._gradient(loss)

    def log_probability(self, example: Example) -> float:
        """Log-probability in nats of the labeled tokens as the model answers."""
        import torch

        with torch.no_grad(), self._as_it_answers():
            return -float(self._nats(example))

    def _nats(self, example: Example) -> torch.Tensor:
        uniform = Example(example.input_ids, example.labels, tuple(float(label != IGNORE) for label in example.labels))
        return self._weighted_sum([uniform], 0.0)

    def _gradient(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        weights = self.weights
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(weights.items(), found, strict=True)
        }
        if self.scales is None:
            return gradients
        return {name: gradient * self.scales[name] for name, gradient in gradients.items()}

    def sum_of_losses(self, records: Sequence[Sequence[Example]]) -> torch.Tensor:
        """Sum of the losses of several records, in one packed row.

        A loss is the weighted mean over the tokens, as in `trainers/sft/sft.py`; 0 if none has a weight.
        """
        scaled = []
        for examples in records:
            total = max(sum(weight for example in examples for weight in _counted(example)), 1e-30)
            scaled += [
                replace(example, weights=tuple(weight / total for weight in example.weights)) for example in examples
            ]
        return self._weighted_sum(scaled, self.label_smoothing)

    def _weighted_sum(self, examples: Sequence[Example], label_smoothing: float) -> torch.Tensor:
        """Sum of weight x loss over the tokens of examples in one packed row."""
        losses, weights, _ = self.token_losses(examples, label_smoothing)
        return (losses * weights).sum()

    def token_losses(
        self, examples: Sequence[Example], label_smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss and weight of each token with a label, and the number of its
        example, from one packed row if examples are isolated there; (tokens,) each."""
        import torch
        from torch.nn.functional import cross_entropy

        if len(examples) > 1 and self.mixes_examples:
            alone = [self.token_losses([example], label_smoothing) for example in examples]
            losses, weights, zeros = (torch.cat(parts) for parts in zip(*alone, strict=True))
            sizes = torch.tensor([len(losses_of_one) for losses_of_one, _, _ in alone], device=zeros.device)
            return losses, weights, torch.arange(len(alone), device=zeros.device).repeat_interleave(sizes)
        device = self.device
        row = {
            name: [value for example in examples for value in getattr(example, name)]
            for name in ("input_ids", "labels", "weights")
        }
        batch = collate_packed([row | {"lengths": [len(example.input_ids) for example in examples]}], multiple=SIZES)
        batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
        labels = batch["labels"][:, 1:]
        counted = labels != IGNORE
        hidden = self.prepared.hidden_states(batch)[:, :-1][counted]
        logits = logits_of(causal(self.prepared.model), hidden).float()
        losses = cross_entropy(logits, labels[counted], reduction="none", label_smoothing=label_smoothing)
        numbers = torch.tensor([i for i, example in enumerate(examples) for _ in example.input_ids], device=device)
        owners = numbers[counted[0].nonzero()[:, 0] + 1]
        return losses, batch["weights"][:, 1:][counted], owners


def _counted(example: Example) -> list[float]:
    """Weights of the tokens that the loss counts: the first token has no context."""
    return [weight for weight, label in zip(example.weights[1:], example.labels[1:], strict=True) if label != IGNORE]


def with_adapter(
    folder: Path, base_model: Path, info: AdapterInfo, device: torch.device, dtype: torch.dtype
) -> PreparedModel:
    """A base model with a trained adapter of PEFT, whose weights are trainable in float32, as in `methods/build.py`."""
    import torch
    from peft import PeftModel

    from dagster_project.training.methods.fused_lora import fuse

    base = load_base(base_model, device, dtype, info.quantization, attention_for(device, dtype))
    with adding_adapters():
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    for name, weight in model.named_parameters():
        if ".ranknum." in name:  # a counter of AdaLoRA
            weight.requires_grad_(False)
    low = [weight for weight in model.parameters() if weight.requires_grad and weight.dtype != torch.float32]
    for weight in low:
        weight.data = weight.data.float()
    fuse(model)
    trainable, total = model.get_nb_trainable_parameters()
    return PreparedModel(model, trainable, total, lambda _: None, autocast=dtype if low else None)
