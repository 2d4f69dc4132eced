"""Attention for packed rows: each example attends to itself alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def attention_for(device: torch.device) -> str:
    """Which attention to load a model with for training on packed rows.

    On a CPU each example attends by itself: a block-diagonal mask over a whole row computes mostly what it then throws away
    (a third of a training step at 512 tokens a row). On a GPU one masked call is faster than many small ones.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    # calls of as many sizes as there are examples are nothing to compile
    AttentionInterface.register("by_example", torch.compiler.disable(_attend_by_example))
    AttentionMaskInterface.register("by_example", lambda *_, **__: None)
    return "by_example" if device.type == "cpu" else "sdpa"


def _attend_by_example(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example. query (1, heads, tokens, size), key and value with fewer heads -> (1, tokens, heads, size).

    In float32 whatever comes in: the kernel's backward pass in bfloat16 takes twice as long on a CPU.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import repeat_kv

    lengths = cu_seq_lens_q.diff().tolist()
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    parts = zip(*(states.float().split(lengths, 2) for states in (query, key, value)), strict=True)
    found = [scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling) for q, k, v in parts]
    return torch.cat(found, 2).to(query.dtype).transpose(1, 2).contiguous(), None
