"""LoRA's update as a custom operation of torch, into which torch.compile does not trace.

Importing this file registers it, which takes 0.05 s.
"""

from __future__ import annotations

from typing import Any

import torch

from dagster_project.training.methods import fused_lora


@torch.library.custom_op("pedigree::lora_update", mutates_args=())
def update(
    result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dropout: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return fused_lora.update(result, x, a, b, scaling, dropout)


@update.register_fake
def _(result: Any, x: Any, a: Any, b: Any, scaling: float, dropout: float) -> Any:
    kept = x.new_empty(x.shape if dropout else 0, dtype=fused_lora.mask_dtype(x) if dropout else torch.int16)
    return torch.empty_like(result), x.new_empty(x.numel() // x.shape[-1], a.shape[0]), kept


@torch.library.custom_op("pedigree::lora_update_backward", mutates_args=())
def backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    down: torch.Tensor,
    kept: torch.Tensor,
    scaling: float,
    through_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (nothing unless `through_x`), A and B."""
    of_x, of_a, of_b = fused_lora.gradients(gradient, x, a, b, down, kept, scaling, through_x)
    return x.new_empty(0) if of_x is None else of_x, of_a, of_b


@backward.register_fake
def _(gradient: Any, x: Any, a: Any, b: Any, down: Any, kept: Any, scaling: float, through_x: bool) -> Any:
    return torch.empty_like(x) if through_x else x.new_empty(0), torch.empty_like(a), torch.empty_like(b)


def _gradients(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    through_x = ctx.needs_input_grad[1]
    of_x, of_a, of_b = backward(gradient, *ctx.saved_tensors, ctx.scaling, through_x)
    return gradient, of_x if through_x else None, of_a, of_b, None, None


update.register_autograd(_gradients, setup_context=fused_lora.save_context)
