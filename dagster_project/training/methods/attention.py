"""Attention for packed rows: the examples of a row are isolated from each other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.versions import require_version

if TYPE_CHECKING:
    import torch


def attention_for(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Choose the attention implementation for training on packed rows: by_example, varlen or sdpa.

    On a CPU attention is computed per example, because most results under a block-diagonal mask are discarded (a third
    of a training step at 512 tokens a row). On a GPU one call is faster: torch's flash attention for variable lengths
    if supported, else a mask.

    Args:
        dtype: dtype of the computation; flash attention supports only bfloat16.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, attend in (("by_example", _attend_by_example), ("varlen", _attend_at_once)):
        if name not in AttentionInterface():  # `leave_uncompiled` may have changed it
            AttentionInterface.register(name, attend)
            AttentionMaskInterface.register(name, window_alone)
    if device.type == "cpu":
        return "by_example"
    return "varlen" if dtype == torch.bfloat16 and _has_varlen(device) else "sdpa"


def leave_uncompiled() -> None:
    """Keep torch.compile out of the attention per example: its sizes differ from example to example."""
    import torch
    from transformers import AttentionInterface

    AttentionInterface.register("by_example", torch.compiler.disable(_attend_by_example))


def attention_of(model: Any) -> str:
    """Name of the attention implementation that a transformers model uses."""
    require_version("transformers", ">=5.24,<6", "config._attn_implementation")  # set_attn_implementation has no getter
    return str(model.config._attn_implementation)


def _has_varlen(device: torch.device) -> bool:
    """Whether torch has the kernel and the GPU supports it (Ampere and later)."""
    import torch

    if not (torch.cuda.is_available() and torch.version.cuda and find_spec("torch.nn.attention.varlen")):
        return False
    from torch.nn.attention.varlen import varlen_attn

    has_options = {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
    return has_options and torch.cuda.get_device_capability(device) >= (8, 0)


def window_alone(*_: Any, local_size: int | None = None, **__: Any) -> int | None:
    """In the place of an attention mask: the tokens of its sliding window.

    Not every model gives these to its attention as an argument (PhiMoE).
    """
    return local_size


def _bounds(cu_seq_lens_q: torch.Tensor | None, attention_mask: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Bounds of the examples, for a model whose attention needs no more than the implementations below compute.

    Raises:
        InputError: the model uses logit soft-capping, attention sinks or a mask of its own (Doge), or does not pass the
            bounds on (Nemotron, StableLM).
    """
    if not isinstance(attention_mask, int | None):
        raise InputError(
            "data/base_model: its attention computes a mask of its own, which training on packed rows does not support",
            "use another model",
        )
    for name in ("softcap", "s_aux"):
        if arguments.get(name) is not None:
            raise InputError(
                f"data/base_model: its attention needs `{name}`, which training on packed rows does not support",
                "use another model",
            )
    if cu_seq_lens_q is None:
        raise InputError(
            "data/base_model: its attention does not get the bounds of the examples in a packed row",
            "use another model",
        )
    return cu_seq_lens_q


def _attend_by_example(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: int | None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example, computed in float32: on a CPU its backward pass is twice as fast.

    Args:
        query: (1, heads, seq, head size); key and value may have fewer heads.
        attention_mask: from `window_alone`.
        cu_seq_lens_q: (examples + 1), int32, bounds of the examples.
    Returns:
        (1, seq, heads, head size) in the dtype of `query`, and None for the attention weights.
    """
    import torch
    from transformers.integrations.sdpa_attention import repeat_kv

    bounds, window = _bounds(cu_seq_lens_q, attention_mask, others), sliding_window or attention_mask or None
    lengths = bounds.diff().tolist()
    key, value = (repeat_kv(states, getattr(module, "num_key_value_groups", 1)) for states in (key, value))
    parts = zip(*(states.float().split(lengths, 2) for states in (query, key, value)), strict=True)
    outputs = [attend_causally(q, k, v, scaling, dropout, window) for q, k, v in parts]
    return torch.cat(outputs, 2).to(query.dtype).transpose(1, 2).contiguous(), None


def attend_causally(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, dropout: float, sliding_window: int | None
) -> torch.Tensor:
    """Causal attention of the last tokens of a text; k and v are those of all its tokens."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    n, all_tokens = q.shape[2], k.shape[2]
    windowed = sliding_window is not None and all_tokens > sliding_window
    if n == all_tokens and not windowed:
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
    seen = torch.ones(n, all_tokens, dtype=torch.bool, device=q.device).tril(all_tokens - n)
    if windowed:
        assert sliding_window
        seen = seen.triu(all_tokens - n + 1 - sliding_window)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling)


def _attend_at_once(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: int | None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As `_attend_by_example`, in one call of flash attention.

    Deterministic under torch.use_deterministic_algorithms, which is on.
    """
    import torch
    from torch.nn.attention.varlen import varlen_attn

    bounds = _bounds(cu_seq_lens_q, attention_mask, others)
    dtype = value.dtype  # with 4-bit weights float32, as rotated queries and keys may be
    query, key, value = (states[0].transpose(0, 1).to(torch.bfloat16) for states in (query, key, value))
    window, grouped = ((sliding_window or attention_mask or 0) - 1, 0), key.shape[1] != query.shape[1]
    output = varlen_attn(
        query, key, value, bounds, bounds, max_length_q, max_length_q,
        scale=scaling, window_size=window, enable_gqa=grouped,
    )  # fmt: skip
    return output[None].to(dtype), None
