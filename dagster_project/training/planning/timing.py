"""How long the operations of a training step take on this machine: each distinct one is run for real, on tensors of its shapes.

No rate of the whole machine is assumed: a product of thin matrices, a copy that fits the cache or a 4-bit layer take what they take. Of a step's
thousands of operations a few hundred are distinct, since layers are alike; so this takes about as long as one layer does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

SHORT = 0.01
"""Seconds after which an operation is not repeated any more."""


@dataclass(frozen=True)
class Shape:
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any
    on_device: bool
    """False: on the CPU whatever the device, as scalars and bounds are."""

    def filled(self, device: Any) -> Any:
        """Ones, which no kernel is slow with, and from which the pivots of a matrix count; zeros where it may be an index."""
        import torch

        made = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device if self.on_device else "cpu")
        return made.fill_(1 if self.dtype.is_floating_point or self.dtype == torch.int32 else 0)


@dataclass
class Operations:
    """What a step does, each distinct operation with how often it is done."""

    counts: dict[Any, float] = field(default_factory=dict)
    _runs: dict[Any, tuple[Callable[..., Any], Any, list[Any]]] = field(default_factory=dict)

    def note(self, run: Callable[..., Any], *arguments: Any, times: float = 1, **keywords: Any) -> None:
        """Count a call; what it is given may lie on the meta device."""
        import torch
        from torch.utils._pytree import tree_flatten

        leaves, tree = tree_flatten((arguments, keywords))
        shapes = [
            Shape(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device.type == "meta")
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in leaves
        ]
        key = (run, str(tree), str(shapes))
        self._runs.setdefault(key, (run, tree, shapes))
        self.counts[key] = self.counts.get(key, 0) + times

    def multiply(self, times: float) -> None:
        self.counts = {key: n * times for key, n in self.counts.items()}

    def with_counts(self, counts: dict[Any, float]) -> Operations:
        """The same operations, done as often as `counts` says."""
        return Operations(counts, self._runs)

    def note_optimizer(self, parameters: Iterable[Any]) -> None:
        """Clipping of the gradients and a step of AdamW, for each parameter."""
        import torch

        for weight in (parameter.detach() for parameter in parameters):
            self.note(torch.linalg.vector_norm, weight)
            self.note(torch.Tensor.mul_, weight, 1.0)
            step = torch.empty((), device="meta")
            self.note(
                torch._fused_adamw_, [weight], [weight], [weight], [weight], [], [step],
                lr=0.0, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip

    def seconds(
        self, device: Any, known: dict[Any, tuple[float, float]], clock: Callable[[], float] = time.perf_counter
    ) -> tuple[float, float]:
        """Of a step: each operation at its fastest, and each in memory that is new to the process, as what is kept for the backward pass is.

        Args:
            known: what was measured before, to be added to.
            clock: time.thread_time for CPU seconds, which hold on a busy machine with one thread.
        """
        for key in self.counts.keys() - known.keys():
            known[key] = _time(*self._runs[key], device, clock)
        return tuple(sum(n * known[key][i] for key, n in self.counts.items()) for i in (0, 1))  # type: ignore[return-value]


def _time(run: Callable[..., Any], tree: Any, shapes: Iterable[Any], device: Any, clock: Callable[[], float]) -> tuple[float, float]:
    """(least seconds, seconds in new memory)."""
    import torch
    from torch.utils._pytree import tree_unflatten

    def real(leaf: Any) -> Any:
        return leaf.filled(device) if isinstance(leaf, Shape) else device if leaf == torch.device("meta") else leaf

    arguments, keywords = tree_unflatten([real(leaf) for leaf in shapes], tree)
    kept: list[Any] = []
    times: list[float] = []
    while len(times) < 2 or (sum(times[1:]) < SHORT and len(times) < 5):  # the first prepares what later ones find
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        try:
            out = run(*arguments, **keywords)
        except RuntimeError as error:
            if "memory" in str(error).lower():
                raise
            # it looks at values, and these are none: a check of what was computed, which takes no time
            return 0.0, 0.0
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
        kept.append(out)
    fresh = times[1]
    del kept[:]
    return min(times[1:]), fresh


def attention(query: Any, key: Any, value: Any, bias: Any, causal: bool) -> Any:
    """Scaled dot product attention, forward."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(query, key, value, bias, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1])


def attention_and_back(query: Any, key: Any, value: Any, bias: Any, causal: bool) -> Any:
    """Forward and backward."""
    import torch

    query, key, value = given = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = attention(query, key, value, bias, causal)
    return torch.autograd.grad(out, given, torch.ones_like(out))
