"""Linear layers of a bfloat16 model on a CPU, prepared for many small products with the same weights.

torch brings a weight into the layout of oneDNN's kernels in every product. With the few rows of a decoding step that
takes a quarter to a half of the product. LoRA's layers cast their weights each time, too. Here both are done once. The
kernels and so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

AT_MOST = 2**30
"""Bytes of weights: the prepared ones are a second copy."""


@contextmanager
def packed_weights(model: Any) -> Iterator[None]:
    """While open, linear layers without bias compute with prepared weights.

    These do not follow changes of the weights and have no gradients.
    """
    from dagster_project.training.methods.fused_lora import applied, is_applied

    layers = _layers(model)
    kept: list[tuple[Any, Callable[..., Any] | None]] = []

    def replace(module: Any, forward: Callable[..., Any]) -> None:
        kept.append((module, vars(module).get("forward")))
        module.forward = forward

    try:
        for layer in layers:
            replace(layer, _packed(layer))
        for module in model.modules():
            if is_applied(module) and module.base_layer in layers:
                replace(module, applied(module))
        yield
    finally:
        for module, forward in reversed(kept):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _layers(model: Any) -> list[Any]:
    """The linear layers whose weights can be prepared; none without a kernel for it, or if they are too large."""
    import torch

    kernels = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return []
    # private: without them everything is as before
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    if not (all(hasattr(kernels, name) for name in names) and kernels._is_mkldnn_bf16_supported()):
        return []
    found = [module for module in model.modules() if type(module) is torch.nn.Linear and _is_plain(module)]
    return found if sum(layer.weight.nbytes for layer in found) <= AT_MOST else []


def _is_plain(layer: Any) -> bool:
    import torch

    weight = layer.weight
    return (
        layer.bias is None
        and type(weight) is torch.nn.Parameter  # not a part of a divided model
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and "forward" not in vars(layer)
    )


def _packed(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
    return partial(_product, weight)


def _product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    import torch

    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found
