"""Attention for packed rows: each example attends to itself alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError

if TYPE_CHECKING:
    import torch


def attention_for(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Which attention to load a model with for training on packed rows: by_example, varlen or sdpa.

    On a CPU each example attends by itself: a block-diagonal mask over a whole row computes mostly what it then throws away
    (a third of a training step at 512 tokens a row). On a GPU one call is faster than many small ones: that of torch's flash
    attention for rows of several lengths where the GPU has it, else one with a mask.

    Args:
        dtype: in which the model computes; flash attention takes bfloat16 only.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    # calls of as many sizes as there are examples are nothing to compile
    for name, attend in (("by_example", torch.compiler.disable(_attend_by_example)), ("varlen", _attend_at_once)):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, lambda *_, **__: None)
    if device.type == "cpu":
        return "by_example"
    return "varlen" if dtype == torch.bfloat16 and _has_varlen(device) else "sdpa"


def _has_varlen(device: torch.device) -> bool:
    """Has torch the kernel, and can the GPU run it (Ampere and later)?"""
    import torch

    if not (torch.cuda.is_available() and torch.version.cuda and find_spec("torch.nn.attention.varlen")):
        return False
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return {"scale", "window_size", "enable_gqa"} <= set(known) and torch.cuda.get_device_capability(device) >= (8, 0)


def _refuse(named: Mapping[str, Any]) -> None:
    """Raises:
    InputError: the model's attention does what neither way below computes.
    """
    for name in ("softcap", "s_aux"):
        if named.get(name) is not None:
            raise InputError(
                f"data/base_model: its attention needs `{name}`, which training on packed rows does not compute", "take another model"
            )


def _attend_by_example(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example. query (1, heads, tokens, size), key and value with fewer heads -> (1, tokens, heads, size).

    In float32 whatever comes in: the kernel's backward pass in bfloat16 takes twice as long on a CPU.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import repeat_kv

    _refuse(others)
    lengths = cu_seq_lens_q.diff().tolist()
    key, value = (repeat_kv(states, getattr(module, "num_key_value_groups", 1)) for states in (key, value))
    parts = zip(*(states.float().split(lengths, 2) for states in (query, key, value)), strict=True)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        if sliding_window is None or n <= sliding_window:
            return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        near = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
        return scaled_dot_product_attention(q, k, v, attn_mask=near, dropout_p=dropout, scale=scaling)

    found = [attend(*part) for part in parts]
    return torch.cat(found, 2).to(query.dtype).transpose(1, 2).contiguous(), None


def _attend_at_once(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The same in one call of flash attention. Its backward pass is deterministic where torch.use_deterministic_algorithms is on, as it is here."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    _refuse(others)
    whole, half = value.dtype, torch.bfloat16  # rotated queries and keys may be float32, and all three beside 4-bit weights
    query, key, value = (states[0].transpose(0, 1).to(half) for states in (query, key, value))
    found = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=((sliding_window or 0) - 1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return found[None].to(whole), None
