"""Autoregressive decoding of a batch of prompts with a KV cache."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.training.inference.packed_weights import packed_weights
from dagster_project.training.methods.logits import logits_of

if TYPE_CHECKING:
    import torch

Choose = Callable[["torch.Tensor", Sequence[int], int], list[int]]
"""(logits (batch, vocabulary), index of each row's prompt, position in the answer from 0) -> a token id for each row.
"""

TOKENS_AT_ONCE = {"cpu": 1024}
"""Device -> maximum number of prompt tokens, with padding, in a pass: more exceed a CPU's caches. A shared prefix does
not count."""


COUNTS_PADDING = frozenset(
    {"bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart", "trocr"}
)
"""Decoder halves of translation models, which ignore the given positions and count padding as tokens."""


def groups(lengths: Sequence[int], most: int, device: str) -> Iterator[list[int]]:
    """Yield the indices of the texts of each pass: similar in length, at most `most`, and within TOKENS_AT_ONCE."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        tokens = lengths[i] * (len(group) + 1)
        if group and (len(group) == most or tokens > TOKENS_AT_ONCE.get(device, float("inf"))):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    longest: int,
    ends: Container[int],
    pad: int | None,
    prefix: Any = None,
) -> list[list[int]]:
    """Generate the answer to each prompt.

    Prompts are padded on the left; a CPU reads a few at a time, and each of equal prompts once. Finished answers are
    removed once they are a quarter of the batch.

    Args:
        model: causal language model of transformers.
        prompts: token ids of each prompt.
        choose: selects the next tokens.
        longest: maximum number of tokens of an answer.
        ends: end-of-turn tokens.
        prefix: cache with one row of tokens that precede every prompt. Without `keeps_all_tokens`, only one prompt is
            supported.
    Returns:
        Token ids of each answer, including the end-of-turn token.
    Raises:
        InputError: the model cannot answer several prompts of different lengths at once, or has a cache of its own.
    """
    import torch

    if model.config.model_type in COUNTS_PADDING and len(set(map(len, prompts))) > 1:
        raise InputError(
            f"{model.config.model_type} models count padding as tokens in transformers, so that answers to several"
            " prompts at once are wrong",
            "use another model, or set evaluation.batch_size: 1",
        )
    answers: list[list[int]] = [[] for _ in prompts]
    rows, ended = list(range(len(prompts))), set[int]()
    with torch.no_grad(), packed_weights(model):
        hidden, mask, cache = _read_all(model, prompts, longest, pad or 0, prefix)
        for position in range(longest):
            head = model.get_output_embeddings()
            chosen = choose(logits_of(model, hidden.to(head.weight.dtype)), rows, position)
            for i, token in zip(rows, chosen, strict=True):
                if i not in ended:
                    answers[i].append(token)
                if token in ends:
                    ended.add(i)
            if len(ended) == len(prompts) or position + 1 == longest:
                break
            unfinished = [k for k, i in enumerate(rows) if i not in ended]
            if 4 * len(unfinished) <= 3 * len(rows):
                kept = torch.tensor(unfinished, device=model.device)
                cache.reorder_cache(kept)
                mask, rows, chosen = mask[kept], [rows[k] for k in unfinished], [chosen[k] for k in unfinished]
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), 1)
            hidden = _run(model, torch.tensor(chosen, device=model.device)[:, None], mask, cache)
    return answers


def prefill(model: Any, ids: Sequence[int], prefix: Any = None) -> Any:
    """A cache with one row of these tokens, after those of `prefix`."""
    import torch

    cache = _empty(model) if prefix is None else copy.deepcopy(prefix)
    attended = [1] * (cache.get_seq_length() + len(ids))
    with torch.no_grad():
        _run(model, torch.tensor([ids], device=model.device), torch.tensor([attended], device=model.device), cache)
    return cache


def _run(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
    """Last hidden state of each row, (batch, hidden).

    Adds `ids` (batch, seq) to the cache; `mask` (batch, cached + seq) covers both.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
    return out.last_hidden_state[:, -1]


def _read_all(
    model: Any, prompts: Sequence[Sequence[int]], longest: int, pad: int, prefix: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Read the prompts: last hidden states (prompts, hidden), mask (prompts, seq), and a cache.

    The cache is preallocated if its layers are plain. Equal prompts are read once.
    """
    import torch
    from transformers import DynamicCache

    start = _empty(model) if prefix is None else prefix
    before = prefix.get_seq_length() if prefix is not None else 0

    def padded(group: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (group, width) and mask (group, before + width)."""
        width = max(len(prompts[i]) for i in group)
        gaps = [(width - len(prompts[i]), prompts[i]) for i in group]
        ids = [[pad] * gap + list(prompt) for gap, prompt in gaps]
        mask = [[1] * before + [0] * gap + [1] * len(prompt) for gap, prompt in gaps]
        return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)

    def run(group: Sequence[int]) -> tuple[torch.Tensor, Any]:
        cache = copy.deepcopy(start)
        if before and len(group) > 1:
            cache.batch_repeat_interleave(len(group))
        return _run(model, *padded(group), cache), cache

    _, mask = padded(range(len(prompts)))
    if not _has_plain_layers(start):
        hidden, cache = run(range(len(prompts)))
        return hidden, mask, cache
    equal: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        equal.setdefault(tuple(prompt), []).append(i)
    distinct = list(equal.values())
    cache, states = DynamicCache(), dict[int, torch.Tensor]()
    for group in groups([len(prompt) for prompt in equal], len(prompts), model.device.type):
        last, part = run([distinct[k][0] for k in group])
        rows, sources = map(list, zip(*((i, n) for n, k in enumerate(group) for i in distinct[k]), strict=True))
        states |= {i: last[n] for i, n in zip(rows, sources, strict=True)}
        first = not cache.layers
        for k in range(len(part.layers)):
            filled, part.layers[k] = part.layers[k], None  # so that only one layer at a time exists twice
            if first:
                cache.layers.append(_preallocated_layer()(filled, *mask.shape, longest))
            layer, gap = cache.layers[k], mask.shape[1] - filled.keys.shape[2]
            for target, source in ((layer.keys, filled.keys), (layer.values, filled.values)):
                target[rows, :, :before] = source[sources, :, :before]
                target[rows, :, before + gap :] = source[sources, :, before:]
    return torch.stack([states[i] for i in range(len(prompts))]), mask, cache


def _has_plain_layers(cache: Any) -> bool:
    """Whether all layers of a cache keep all keys and values."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _empty(model: Any) -> Any:
    """A cache that keeps every token, or the model's own cache if it has other state.

    Sliding windows are applied by the mask.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if model.config.model_type == "minimax":
        problem = "minimax models have a cache of their own in transformers, which generation does not support"
        raise InputError(problem, "use another model")
    own = DynamicCache(config=model.config)
    if all(type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in own.layers):
        # not none: a model that runs its layers several times (Dory) adds copies of them
        own.layers = [DynamicLayer() for _ in own.layers]
    return own


def keeps_all_tokens(model: Any) -> bool:
    """Whether every layer keeps all keys and values, as a shared prefix requires.

    Windows drop tokens, and recurrent states ignore padding.
    """
    from transformers import DynamicCache

    return _has_plain_layers(DynamicCache(config=model.config))


@functools.cache
def _preallocated_layer() -> type:
    """Class of cache layers with memory for all tokens to come, so that appending a token copies nothing."""
    from transformers.cache_utils import DynamicLayer

    class Preallocated(DynamicLayer):
        def __init__(self, like: Any, rows: int, filled: int, more: int) -> None:
            """
            Args:
                like: layer with keys and values (batch, heads, seq, head size).
                filled, more: number of tokens of each row, and of those to come.
            """
            super().__init__()
            self.lazy_initialization(like.keys, like.values)
            self.all = [
                states.new_zeros(rows, states.shape[1], filled + more, states.shape[3])
                for states in (like.keys, like.values)
            ]
            self._show(filled)

        def _show(self, tokens: int) -> None:
            self.keys, self.values = (whole[:, :, :tokens] for whole in self.all)

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
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

    return Preallocated
