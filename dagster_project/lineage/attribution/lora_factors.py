"""The factors of LoRA's gradients, in place of the gradients themselves.

Those of A and B of a layer (Hu et al. 2021, section 4.1) are sums over tokens of outer products of what enters and
what returns:

    dA = scaling (dy B)^T x        dB = scaling dy^T (x A^T)

One product of x with A and the projection of dA's columns, and one of dy with B and the projection of dB's rows, give
what the passes through the layer need and the projected factors. Importing this file imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dagster_project.lineage.attribution.gradients import TrainedModel
from dagster_project.lineage.attribution.projection import Projection
from dagster_project.training.methods.build import causal
from dagster_project.training.methods.fused_lora import is_applied

Receive = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Called with the name of a weight and the factors of its gradient G = left^T right:
(tokens, rows) and (tokens, columns) float32, projected if there is a projection."""


@dataclass(frozen=True)
class Layer:
    """A plain LoRA layer: y = W x + scaling B A x."""

    module: Any
    a: str
    b: str
    """Names of its weights."""


def layers_of(trained: TrainedModel) -> list[Layer]:
    """The layers whose A and B are trained, except the output layer.

    That computes only the tokens with labels, so its tokens are not those of the row.
    """
    weights, output = trained.weights, causal(trained.prepared.model).get_output_embeddings()
    names = {id(weight): name for name, weight in weights.items()}
    layers = []
    for module in trained.prepared.model.modules():
        if is_applied(module) and module is not output:
            pair = [weight for weight in _pair(module) if id(weight) in names]
            if len(pair) == 2:
                layers.append(Layer(module, *(names[id(weight)] for weight in pair)))
    return layers


@contextmanager
def giving_factors(layers: Sequence[Layer], projection: Projection | None, receive: Receive) -> Iterator[None]:
    """Within the block, a backward pass through the layers calls `receive` for A and B of each, and computes no
    gradient of them."""
    before = [layer.module.forward for layer in layers]
    for layer in layers:
        layer.module.forward = _Forward(layer, projection, receive)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.module.forward = forward


class _Forward:
    """The forward pass of a layer whose backward pass gives factors."""

    def __init__(self, layer: Layer, projection: Projection | None, receive: Receive) -> None:
        self.layer, self.receive = layer, receive
        self.a, self.b = (weight.detach() for weight in _pair(layer.module))
        (adapter,) = layer.module.lora_A
        self.scaling = layer.module.scaling[adapter]

        def sides(name: str, weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            return projection.sides(name, tuple(weight.shape), weight.device) if projection else (None, None)

        self.left_of_a, self.right_of_a = sides(layer.a, self.a)
        self.left_of_b, self.right_of_b = sides(layer.b, self.b)

    def __call__(self, x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        result = self.layer.module.base_layer(x, *arguments, **keywords)
        needs_gradient = _pair(self.layer.module)[0]
        return _Update.apply(result, x.to(result.dtype), needs_gradient, self)


class _Update(torch.autograd.Function):
    """`fused_lora.update`, with the factors of the gradients of A and B in place of these."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, x: torch.Tensor, _: torch.Tensor, layer: _Forward) -> torch.Tensor:
        rank = len(layer.a)
        flat = x.reshape(-1, x.shape[-1])
        both = flat @ _joined(layer.a, layer.right_of_a, x.dtype).T
        down = both[:, :rank]
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(down, flat if layer.right_of_a is None else both[:, rank:])
        out = torch.addmm(result.reshape(-1, result.shape[-1]), down, layer.b.to(x.dtype).T, alpha=layer.scaling)
        return out.view(result.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, rank = ctx.layer, len(ctx.layer.a)
        down, of_x = ctx.saved_tensors
        up = gradient.reshape(-1, gradient.shape[-1])
        both = up @ _joined(layer.b.T, layer.left_of_b, up.dtype).T
        through = both[:, :rank] * layer.scaling
        of_y = (up if layer.left_of_b is None else both[:, rank:]).float() * layer.scaling
        layer.receive(layer.layer.a, _projected(through, layer.left_of_a), of_x.float())
        layer.receive(layer.layer.b, of_y, _projected(down, layer.right_of_b))
        to_x = (through @ layer.a.to(up.dtype)).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return gradient, to_x, None, None


def _pair(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) of a layer."""
    (adapter,) = module.lora_A
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight


def _joined(weight: torch.Tensor, side: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a weight, and below them those of a projection of the same input."""
    return (weight if side is None else torch.cat((weight, side))).to(dtype)


def _projected(factor: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
    return factor.float() if side is None else factor.float() @ side.T
