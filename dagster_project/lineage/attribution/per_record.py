"""Projected gradients of many records: for plain LoRA from packed passes, for other methods, and for models whose
packed examples influence each other, one record at a time.

Both give the same numbers, up to rounding.

The gradients of A and B of a LoRA layer (Hu et al. 2021, section 4.1) are sums
over tokens of outer products of what enters and what returns:

    dA = scaling (dy B)^T x        dB = scaling dy^T (x A^T)

Packed examples do not attend to each other, so the sum over the tokens of a record is the gradient of its own loss.
Both factors are projected before they are multiplied, as LoGRA does, so the gradients themselves are never formed,
unless each of their numbers is scaled by the second moments of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from dagster_project.lineage.attribution.gradients import TrainedModel
from dagster_project.lineage.attribution.projection import Projection
from dagster_project.lineage.attribution.records import Example
from dagster_project.training.methods.build import causal

if TYPE_CHECKING:
    import torch

ROOM = 1024
"""Tokens of a packed pass, unless one record has more."""


def projected_gradients(
    trained: TrainedModel, projection: Projection, records: Sequence[Sequence[Example]]
) -> torch.Tensor:
    """Projected gradient of the loss of each record, (records, width) float32.

    A row depends on the other records by rounding only.

    Args:
        records: the examples of each record.
    """
    import torch

    layers = None if trained.mixes_examples else lora_layers(trained)
    if layers is None:
        return torch.stack([projection.project(trained.of_record(examples)) for examples in records])
    return torch.cat(
        [_of_pass(trained, projection, layers, [records[i] for i in numbers]) for numbers in _passes(records)]
    )


def _passes(records: Sequence[Sequence[Example]]) -> Iterator[list[int]]:
    """Consecutive records that fit into one pass."""
    numbers: list[int] = []
    tokens = 0
    for i, examples in enumerate(records):
        size = sum(len(example.input_ids) for example in examples)
        if numbers and tokens + size > ROOM:
            yield numbers
            numbers, tokens = [], 0
        numbers.append(i)
        tokens += size
    if numbers:
        yield numbers


@dataclass(frozen=True)
class Layer:
    """A plain LoRA layer: y = W x + scaling B A x."""

    module: Any
    a: str
    b: str
    """Names of its weights."""


def lora_layers(trained: TrainedModel) -> list[Layer] | None:
    """The layers that hold all trained weights; None if some weight is in another kind of layer.

    The output layer is one: it computes only the tokens with labels, so its tokens are not those of the row.
    """
    from dagster_project.training.methods.fused_lora import is_applied

    weights, output = trained.weights, causal(trained.prepared.model).get_output_embeddings()
    names = {id(weight): name for name, weight in weights.items()}
    layers = []
    for module in trained.prepared.model.modules():
        if is_applied(module) and module is not output:
            (adapter,) = module.lora_A
            pair = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            if all(id(weight) in names for weight in pair):
                layers.append(Layer(module, *(names[id(weight)] for weight in pair)))
    return layers if {name for layer in layers for name in (layer.a, layer.b)} == weights.keys() else None


def _of_pass(
    trained: TrainedModel, projection: Projection, layers: Sequence[Layer], records: Sequence[Sequence[Example]]
) -> torch.Tensor:
    """Projected gradients of records in one packed row, (records, width) float32."""
    import torch

    owners = [i for i, examples in enumerate(records) for _ in examples]
    sizes = [len(example.input_ids) for examples in records for example in examples]
    segments = list(zip(owners, pairwise(accumulate(sizes, initial=0)), strict=True))
    places = _places(trained, projection)
    found = torch.zeros(len(records), sum(rows * columns for _, rows, columns in places.values()))

    def add(name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the products of two factors, (tokens, rows) and (tokens, columns), over the tokens of each example.

        Factors are projected before, unless the gradient itself is needed, because its numbers are scaled.
        """
        first, rows, columns = places[name]
        for owner, (start, stop) in segments:
            product = left[start:stop].T @ right[start:stop]
            if trained.scales is None:
                part = product.flatten()
            else:
                part = projection.of_weight(name, product * trained.scales[name])
            found[owner, first : first + rows * columns] += part.cpu()

    hooks = [layer.module.register_forward_hook(_Capture(layer, trained, projection, add)) for layer in layers]
    try:
        trained.sum_of_losses(records).backward()
    finally:
        for hook in hooks:
            hook.remove()
        trained.prepared.model.zero_grad(set_to_none=True)
    return found


def _places(trained: TrainedModel, projection: Projection) -> dict[str, tuple[int, int, int]]:
    """Weight -> position in the projected gradient, rows and columns there."""
    places, first = {}, 0
    for name, weight in sorted(trained.shapes.items()):
        rows, columns = projection.shape(weight)
        places[name] = first, rows, columns
        first += rows * columns
    return places


class _Capture:
    """A forward hook of a LoRA layer that projects what enters it and, in the backward pass, what returns."""

    def __init__(self, layer: Layer, trained: TrainedModel, projection: Projection, add: Any) -> None:
        self.layer, self.add = layer, add
        (adapter,) = layer.module.lora_A
        self.a, self.b = (matrices[adapter].weight.detach() for matrices in (layer.module.lora_A, layer.module.lora_B))
        self.scaling = layer.module.scaling[adapter]
        self.sides_a, self.sides_b = (
            projection.sides(name, tuple(weight.shape), weight.device) if trained.scales is None else (None, None)
            for name, weight in ((layer.a, self.a), (layer.b, self.b))
        )

    def __call__(self, module: Any, given: tuple[Any, ...], output: torch.Tensor) -> None:
        x = given[0].detach().reshape(-1, given[0].shape[-1]).float()
        of_a = x if self.sides_a[1] is None else x @ self.sides_a[1].T
        down = x @ self.a.T
        of_b = down if self.sides_b[1] is None else down @ self.sides_b[1].T

        def returned(gradient: torch.Tensor) -> None:
            up = gradient.detach().reshape(-1, gradient.shape[-1]).float() * self.scaling
            through = up @ self.b
            self.add(self.layer.a, through if self.sides_a[0] is None else through @ self.sides_a[0].T, of_a)
            self.add(self.layer.b, up if self.sides_b[0] is None else up @ self.sides_b[0].T, of_b)

        output.register_hook(returned)
