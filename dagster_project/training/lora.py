"""LoRA's update as one operation: what PEFT's layers compute, in the model's dtype and in fewer passes over memory."""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def fuse(model: Any) -> None:
    """Let every plain LoRA layer of a PeftModel (LoRA, rsLoRA, QLoRA) compute its update by `update`. Layers of other methods stay PEFT's own.

    Weights, names and what is saved do not change.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        # a layer that merges with others, is an embedding, or has a variant (DoRA) computes something else
        if isinstance(module, LoraLayer) and type(module).__name__ in {"Linear", "Linear4bit"} and not module.lora_variant:
            (adapter,) = module.lora_A
            if module.lora_B[adapter].bias is None:
                module.forward = MethodType(_forward, module)


def _forward(layer: Any, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    import torch

    if layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *arguments, **named)
    (adapter,) = layer.lora_A
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0) if layer.training else 0.0
    result = layer.base_layer(x, *arguments, **named)
    a, b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    if torch.compiler.is_compiling():  # which fuses by itself
        x = torch.nn.functional.dropout(x.to(result.dtype), dropout)
        return result + scaling * ((x @ a.T.to(x.dtype)) @ b.T.to(x.dtype))
    return _update().apply(result, x.to(result.dtype), a, b, scaling, dropout)


@cache
def _update() -> Any:
    import torch

    class Update(torch.autograd.Function):
        """result + scaling dropout(x) A^T B^T (Hu et al. 2021, LoRA, section 4.1), products in the dtype of x.

        Shapes: result (..., out), x (..., in), A (r, in), B (out, r). x is kept for the backward pass as it is, since layers that read the
        same x share it, and beside it which elements were dropped. A and B are float32, and so are their gradients.
        """

        @staticmethod
        def forward(
            ctx: Any, result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dropout: float
        ) -> torch.Tensor:
            kept = _kept(x, dropout) if dropout else None
            scaling = scaling / (1 - dropout)
            a, b = a.to(x.dtype), b.to(x.dtype)
            down = _flat(_masked(x, kept)) @ a.T
            ctx.save_for_backward(x, kept, a, b, down)
            ctx.scaling = scaling
            return torch.addmm(_flat(result), down, b.T, alpha=scaling).view(result.shape)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            x, kept, a, b, down = ctx.saved_tensors
            up = _flat(gradient)
            through = (up @ b).mul_(ctx.scaling)
            of_a = through.T @ _flat(_masked(x, kept))
            of_b = (up.T @ down).float().mul_(ctx.scaling)
            of_x = _masked((through @ a).view(x.shape), kept) if ctx.needs_input_grad[1] else None
            return gradient, of_x, of_a.float(), of_b, None, None

    return Update


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _kept(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Which elements of x dropout keeps: integers of their size, all bits set for a kept one and none for a dropped one.

    15 random bits decide on each: torch's own dropout draws 64 for it, which on a CPU takes longer than LoRA's products.
    """
    import torch

    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None).view(torch.int16)[: x.numel()]
    below = bits.bitwise_and(2**15 - 1).sub_(round(dropout * 2**15)).bitwise_right_shift_(15)  # the sign: -1 or 0
    return below.bitwise_not_().to(torch.int16 if x.element_size() == 2 else torch.int32).view(x.shape)


def _masked(x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    return x if kept is None else x.view(kept.dtype).bitwise_and(kept).view(x.dtype)
