"""Answers of a language model to many prompts at once, one token after another."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Choose = Callable[["torch.Tensor", Sequence[int], int], list[int]]
"""(logits (rows, vocabulary), number of each row's prompt, place in the answer from 0) -> a token for each row."""

TOKENS_AT_ONCE = {"cpu": 1024}
"""Tokens, padding included, of the texts that one pass reads: more of them leave a CPU's caches and take longer. Elsewhere there is no such limit.
What stands before the texts does not count."""


def groups(lengths: Sequence[int], most: int, device: str) -> Iterator[list[int]]:
    """Numbers of the texts that one pass reads: neighbours in length, at most `most`, and as few as the device reads fastest."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and (len(group) == most or lengths[i] * (len(group) + 1) > TOKENS_AT_ONCE.get(device, float("inf"))):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def decode(
    model: Any, prompts: Sequence[Sequence[int]], choose: Choose, longest: int, eos: int | None, pad: int | None, behind: Any = None
) -> list[list[int]]:
    """Token ids of the answer to each prompt, at most `longest`, the end of turn included.

    Prompts are padded on the left, and on a CPU read a few at a time. Answers that have ended leave the batch, once they are a quarter of it.

    Args:
        model: a causal language model of transformers.
        behind: a cache of one row: tokens that stand before every prompt. For one prompt only, where the model does not keep all.
    """
    import torch

    answers: list[list[int]] = [[] for _ in prompts]
    rows, ended = list(range(len(prompts))), set[int]()
    with torch.no_grad():
        hidden, mask, cache = _read_all(model, prompts, longest, pad or 0, behind)
        for place in range(longest):
            head = model.get_output_embeddings()
            chosen = choose(head(hidden.to(head.weight.dtype)), rows, place)
            for i, token in zip(rows, chosen, strict=True):
                if i not in ended:
                    answers[i].append(token)
                if token == eos:
                    ended.add(i)
            if len(ended) == len(prompts) or place + 1 == longest:
                break
            going = [k for k, i in enumerate(rows) if i not in ended]
            if 4 * len(going) <= 3 * len(rows):
                kept = torch.tensor(going, device=model.device)
                cache.reorder_cache(kept)
                mask, rows, chosen = mask[kept], [rows[k] for k in going], [chosen[k] for k in going]
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), 1)
            hidden = _run(model, torch.tensor(chosen, device=model.device)[:, None], mask, cache)
    return answers


def read(model: Any, ids: Sequence[int], behind: Any = None) -> Any:
    """A cache of one row with these tokens, behind those that `behind` holds already."""
    import torch

    cache = _empty(model) if behind is None else copy.deepcopy(behind)
    seen = [1] * (cache.get_seq_length() + len(ids))
    with torch.no_grad():
        _run(model, torch.tensor([ids], device=model.device), torch.tensor([seen], device=model.device), cache)
    return cache


def _run(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
    """The last hidden state of each row (rows, size), behind what the cache holds, to which `ids` (rows, tokens) are added."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
    return out.last_hidden_state[:, -1]


def _read_all(model: Any, prompts: Sequence[Sequence[int]], longest: int, pad: int, behind: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The last hidden state of each prompt (prompts, size), a mask (prompts, tokens), and a cache of the prompts, with room where it is plain."""
    import torch
    from transformers import DynamicCache

    start = _empty(model) if behind is None else behind
    before = behind.get_seq_length() if behind is not None else 0

    def masked(some: Sequence[int]) -> torch.Tensor:
        width = max(len(prompts[i]) for i in some)
        return torch.tensor([[1] * before + [0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in some], device=model.device)

    def run(some: Sequence[int]) -> tuple[torch.Tensor, Any]:
        cache, mask = copy.deepcopy(start), masked(some)
        if before and len(some) > 1:
            cache.batch_repeat_interleave(len(some))
        width = mask.shape[1] - before
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in some], device=model.device)
        return _run(model, ids, mask, cache), cache

    mask = masked(range(len(prompts)))
    if not _plain(start):
        return (found := run(range(len(prompts))))[0], mask, found[1]
    cache, hidden = DynamicCache(), dict[int, torch.Tensor]()
    for group in groups([len(prompt) for prompt in prompts], len(prompts), model.device.type):
        last, part = run(group)
        hidden |= dict(zip(group, last, strict=True))
        first = not cache.layers
        for k in range(len(part.layers)):
            filled, part.layers[k] = part.layers[k], None  # so that a layer at a time is held twice
            if first:
                cache.layers.append(_roomy()(filled, *mask.shape, longest))
            layer, gap = cache.layers[k], mask.shape[1] - filled.keys.shape[2]
            for whole, some in ((layer.keys, filled.keys), (layer.values, filled.values)):
                whole[group, :, :before] = some[:, :, :before]
                whole[group, :, before + gap :] = some[:, :, before:]
    return torch.stack([hidden[i] for i in range(len(prompts))]), mask, cache


def _plain(cache: Any) -> bool:
    """Has it nothing but layers that keep all keys and values?"""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _empty(model: Any) -> Any:
    """A cache that keeps every token, for a window is the mask's business; or the model's own, where there is more to keep than keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    own = DynamicCache(config=model.config)
    return DynamicCache() if all(type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in own.layers) else own


def keeps_all(model: Any) -> bool:
    """Does every layer keep all keys and values? Of what stands before several prompts, a window would let go too early, and a state knows no padding."""
    from transformers import DynamicCache

    return _plain(DynamicCache(config=model.config))


@functools.cache
def _roomy() -> type:
    """A layer of a cache with room for the tokens to come: another token moves none that is there."""
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):
        def __init__(self, like: Any, rows: int, filled: int, more: int) -> None:
            """Args:
            like: a layer with keys and values (rows, heads, tokens, size).
            filled, more: tokens of each row, and those that may come.
            """
            super().__init__()
            self.lazy_initialization(like.keys, like.values)
            self.all = [some.new_zeros(rows, some.shape[1], filled + more, some.shape[3]) for some in (like.keys, like.values)]
            self._show(filled)

        def _show(self, tokens: int) -> None:
            self.keys, self.values = (whole[:, :, :tokens] for whole in self.all)

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            begin = self.get_seq_length()
            end = begin + key_states.shape[2]
            for whole, new in zip(self.all, (key_states, value_states), strict=True):
                whole[:, :, begin:end] = new
            self._show(end)
            return self.keys, self.values

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            tokens = self.get_seq_length()
            self.all = [whole[beam_idx] for whole in self.all]
            self._show(tokens)

    return Roomy
