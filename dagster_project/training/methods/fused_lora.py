"""LoRA's update as one operation: the result of PEFT's layers, with fewer passes over memory.

Products are in the model's dtype. For torch.compile it is a custom operation (`compiled_lora.py`). Importing this file
imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch


def fuse(model: Any) -> None:
    """Make every plain LoRA layer of a PeftModel (LoRA, rsLoRA, QLoRA) use `EagerUpdate`.

    Other layers, names and saved files do not change.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        # embeddings, variants (DoRA) and other classes compute something else
        is_linear = isinstance(module, LoraLayer) and type(module).__name__ in {"Linear", "Linear4bit"}
        if is_linear and not module.lora_variant:
            (adapter,) = module.lora_A
            if module.lora_B[adapter].bias is None:
                module.forward = MethodType(_forward, module)


def _forward(layer: Any, x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
    if layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *arguments, **keywords)
    (adapter,) = layer.lora_A
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0) if layer.training else 0.0
    result = layer.base_layer(x, *arguments, **keywords)
    a, b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    x = x.to(result.dtype)
    if torch.compiler.is_compiling():
        return torch.ops.pedigree.lora_update(result, x, a, b, scaling, dropout)[0]
    return EagerUpdate.apply(result, x, a, b, scaling, dropout)


def is_applied(module: Any) -> bool:
    """Whether a module is a layer of `fuse` whose update has an effect, without dropout."""
    is_fused = getattr(vars(module).get("forward"), "__func__", None) is _forward
    if not is_fused or module.disable_adapters or module.merged:
        return False
    return not (module.training and any(getattr(dropout, "p", 0.0) for dropout in module.lora_dropout.values()))


def applied(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's forward pass without gradients: the same operations with its present weights, which are cast once."""
    (adapter,) = layer.lora_A
    dtype = layer.base_layer.weight.dtype
    a, b = (matrices[adapter].weight.detach().to(dtype).T for matrices in (layer.lora_A, layer.lora_B))
    scaling = layer.scaling[adapter]

    def forward(x: torch.Tensor) -> torch.Tensor:
        result = layer.base_layer(x)
        return torch.addmm(_flat(result), _flat(x) @ a, b, alpha=scaling).view(result.shape)

    return forward


class EagerUpdate(torch.autograd.Function):
    """`update` where nothing is compiled: with the same products, so the same bits, and less Python.

    A custom operation adds 0.1 ms to each forward and backward pass, of which a step has hundreds.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        output = update(*given)
        save_context(ctx, given, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, down, kept = ctx.saved_tensors
        of_x, of_a, of_b = gradients(gradient, x, a, b, down, kept, ctx.scaling, ctx.needs_input_grad[1])
        return gradient, of_x, of_a, of_b, None, None


def save_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, x, a, b, scaling, dropout = inputs
    ctx.save_for_backward(x, a, b, *output[1:])
    ctx.scaling = scaling / (1 - dropout)


def update(
    result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dropout: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """result + scaling dropout(x) A^T B^T (Hu et al. 2021, LoRA, section 4.1), products in the dtype of x.

    Args:
        result: (..., out).
        x: (..., in), in the dtype of result.
        a, b: (r, in) and (out, r), float32, as are their gradients.
    Returns:
        The sum (..., out); for the backward pass dropout(x) A^T (tokens, r) and the dropout mask (empty without
        dropout). x is saved unmasked, because layers with the same input share it.
    """
    kept = _dropout_mask(x, dropout) if dropout else x.new_empty(0, dtype=torch.int16)
    down = _flat(_apply_mask(x, kept)) @ a.to(x.dtype).T
    out = torch.addmm(_flat(result), down, b.to(x.dtype).T, alpha=scaling / (1 - dropout))
    return out.view(result.shape), down, kept


def gradients(
    gradient: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    down: torch.Tensor,
    kept: torch.Tensor,
    scaling: float,
    through_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients of x (None unless `through_x`), A and B, from that of the sum and what `update` returned."""
    up = _flat(gradient)
    through = (up @ b.to(x.dtype)).mul_(scaling)
    of_x = _apply_mask((through @ a.to(x.dtype)).view(x.shape), kept) if through_x else None
    return of_x, (through.T @ _flat(_apply_mask(x, kept))).float(), (up.T @ down).float().mul_(scaling)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def mask_dtype(x: torch.Tensor) -> torch.dtype:
    """The integers of `update`'s dropout mask, of the size of x's elements."""
    return torch.int16 if x.element_size() == 2 else torch.int32


def _dropout_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Dropout mask: integers of the size of x's elements, all bits set for kept elements and none for dropped ones.

    15 random bits per element; torch's dropout draws 64, which on a CPU takes longer than LoRA's products.
    """
    random = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = random.view(torch.int16)[: x.numel()]
    below = bits.bitwise_and(2**15 - 1).sub_(round(dropout * 2**15)).bitwise_right_shift_(15)  # the sign: -1 or 0
    return below.bitwise_not_().to(mask_dtype(x)).view(x.shape)


def _apply_mask(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(kept.dtype).bitwise_and(kept).view(x.dtype) if kept.numel() else x
