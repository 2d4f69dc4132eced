"""Attention for pairs and groups of texts whose common beginning is in a packed row once (`collate_shared`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dagster_project.core.versions import require_version
from dagster_project.training.methods.attention import attend_causally, attention_of, window_alone

if TYPE_CHECKING:
    import torch

BY_PAIR = "by_pair"


@contextmanager
def attending_by_pair(model: Any) -> Iterator[None]:
    """While open, a transformers model reads batches of `collate_shared`, and no others."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(BY_PAIR, _attend_by_pair)
    AttentionMaskInterface.register(BY_PAIR, window_alone)
    before = attention_of(model)
    model.set_attn_implementation(BY_PAIR)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def attending_plainly(model: Any) -> Iterator[None]:
    """While open, a transformers model reads texts with a cache, and padded ones."""
    before = attention_of(model)
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def can_attend_by_pair(model: Any) -> bool:
    """Whether a transformers model computes the same for a batch of `collate_shared` as for its texts one by one.

    Tokens must meet only in attention, which `_attend_by_pair` computes, and their order be known only from their
    positions.
    """
    config = model.config.get_text_config()
    require_version("transformers", ">=5.24,<6", "_supports_attention_backend, _is_stateful")
    if not model._supports_attention_backend or model._is_stateful:
        return False
    plain_layers = set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    softcap = getattr(config, "attn_logit_softcapping", None)
    return plain_layers and not sinks and softcap is None and _gets_arguments(model)


class _Reached(Exception):
    """The first attention of a pass was called. Internal."""


def _gets_arguments(model: Any) -> bool:
    """Whether the attention of a model gets further arguments of a forward pass, and no mask of the model's own.

    The layers of some leave the arguments out (Nemotron), others have a mask (Doge, DeepSeek-V3.2). The pass ends at
    the first attention.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(
        _: Any, query: Any, key: Any, value: Any, attention_mask: Any, pair_lengths: Any = None, **__: Any
    ) -> None:
        raise _Reached(pair_lengths is not None and isinstance(attention_mask, int | None))

    AttentionInterface.register("arguments", attend)
    AttentionMaskInterface.register("arguments", window_alone)
    before, ids = attention_of(model), torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model.set_attn_implementation("arguments")
    try:
        read = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pair_lengths": ((0, 1, 0),)}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.base_model(**read, use_cache=False)
    except _Reached as reached:
        return bool(reached.args[0])
    except (AttributeError, TypeError):  # of its own code for masks
        return False
    finally:
        model.set_attn_implementation(before)
    return False


def _attend_by_pair(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: int | None,
    scaling: float,
    pair_lengths: Sequence[Sequence[int]],
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each text of groups whose common beginning is stored once.

    It is computed in float32, whose backward pass is twice as fast as bfloat16 on a CPU.

    Args:
        query: (1, heads, seq, head size); key and value may have fewer heads.
        attention_mask: from `window_alone`.
        pair_lengths: for each group the tokens of the beginning and of the rest of each text, in this order.
    Returns:
        (1, seq, heads, head size) in the dtype of `query`, and None for the attention weights.
    """
    import torch
    from transformers.integrations.sdpa_attention import repeat_kv

    assert all(others.get(name) is None for name in ("softcap", "s_aux")), "can_attend_by_pair"
    key, value = (repeat_kv(states, getattr(module, "num_key_value_groups", 1)) for states in (key, value))
    sizes = [size for shared, first, *others_own in pair_lengths for size in (shared + first, *others_own)]
    parts = zip(*(states.float().split(sizes, 2) for states in (query, key, value)), strict=True)
    outputs, window = [], sliding_window or attention_mask or None
    for shared, _, *others_own in pair_lengths:
        q, k, v = next(parts)
        outputs.append(attend_causally(q, k, v, scaling, dropout, window))
        beginning = k[:, :, :shared], v[:, :, :shared]
        for own in others_own:
            q, *own_states = next(parts)
            if own:
                keys, values = (torch.cat(states, 2) for states in zip(beginning, own_states, strict=True))
                outputs.append(attend_causally(q, keys, values, scaling, dropout, window))
    return torch.cat(outputs, 2).to(query.dtype).transpose(1, 2).contiguous(), None
