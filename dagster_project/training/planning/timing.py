"""Time of a training step's operations on this machine, measured on tensors of their shapes.

No overall rate of the machine is assumed. A step has thousands of operations but only a few hundred distinct ones,
because layers repeat, so the measurement takes about as long as one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dagster_project.training.planning.torch_internals import flatten, fused_adamw, unflatten

SHORT = 0.01
"""Seconds after which an operation is no longer repeated."""


@dataclass(frozen=True)
class Shape:
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any
    on_device: bool
    """False: on the CPU whatever the device, e.g. scalars and sequence bounds."""

    def filled(self, device: Any) -> Any:
        """A tensor of ones, which are fast in every kernel and valid pivots of a matrix.

        Of zeros for dtypes that may be indices.
        """
        import torch

        place = device if self.on_device else "cpu"
        tensor = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=place)
        return tensor.fill_(1 if self.dtype.is_floating_point or self.dtype == torch.int32 else 0)


@dataclass
class Operations:
    """The distinct operations of a step and their counts."""

    counts: dict[Any, float] = field(default_factory=dict)
    _runs: dict[Any, tuple[Callable[..., Any], Any, list[Any]]] = field(default_factory=dict)

    def note(self, run: Callable[..., Any], *arguments: Any, times: float = 1, **keywords: Any) -> None:
        """Count a call. Its tensors may be on the meta device."""
        import torch

        def shape(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return Shape(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device.type == "meta")

        leaves, tree = flatten((arguments, keywords))
        shapes = list(map(shape, leaves))
        key = (run, str(tree), str(shapes))
        self._runs.setdefault(key, (run, tree, shapes))
        self.counts[key] = self.counts.get(key, 0) + times

    def multiply(self, times: float) -> None:
        self.counts = {key: n * times for key, n in self.counts.items()}

    def with_counts(self, counts: dict[Any, float]) -> Operations:
        """The same operations with other counts."""
        return Operations(counts, self._runs)

    def note_optimizer(self, parameters: Iterable[Any]) -> None:
        """Count gradient clipping and a step of AdamW for each parameter."""
        import torch

        for weight in (parameter.detach() for parameter in parameters):
            self.note(torch.linalg.vector_norm, weight)
            self.note(torch.Tensor.mul_, weight, 1.0)
            step = torch.empty((), device="meta")
            self.note(
                fused_adamw(), [weight], [weight], [weight], [weight], [], [step],
                lr=0.0, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip

    def seconds(
        self, device: Any, known: dict[Any, tuple[float, float]], clock: Callable[[], float] = time.perf_counter
    ) -> tuple[float, float]:
        """Seconds of a step: with each operation at its fastest, and with each in memory that is new to the process.

        Args:
            known: measured operations -> seconds; extended in place.
            clock: time.thread_time measures CPU seconds, which are valid on a busy machine with one thread.
        """
        for key in self.counts.keys() - known.keys():
            known[key] = _time(*self._runs[key], device, clock)
        return tuple(sum(n * known[key][i] for key, n in self.counts.items()) for i in (0, 1))  # type: ignore[return-value]


def _time(
    run: Callable[..., Any], tree: Any, shapes: Iterable[Any], device: Any, clock: Callable[[], float]
) -> tuple[float, float]:
    """Run an operation: (least seconds, seconds in memory that is new to the process)."""
    import torch

    def real(leaf: Any) -> Any:
        if isinstance(leaf, Shape):
            return leaf.filled(device)
        return device if leaf == torch.device("meta") else leaf

    arguments, keywords = unflatten([real(leaf) for leaf in shapes], tree)
    outputs: list[Any] = []  # kept, so that every run allocates new memory
    times: list[float] = []
    while len(times) < 2 or (sum(times[1:]) < SHORT and len(times) < 5):  # the first run warms up
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        try:
            out = run(*arguments, **keywords)
        except RuntimeError as error:
            if "memory" in str(error).lower():
                raise
            # the operation checks values, which are meaningless here; such a check takes no time
            return 0.0, 0.0
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
        outputs.append(out)
    fresh = times[1]
    del outputs[:]
    return min(times[1:]), fresh


def attention(query: Any, key: Any, value: Any, bias: Any, causal: bool) -> Any:
    """Scaled dot product attention, forward."""
    from torch.nn.functional import scaled_dot_product_attention

    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, bias, is_causal=causal, enable_gqa=grouped)


def attention_and_back(query: Any, key: Any, value: Any, bias: Any, causal: bool) -> Any:
    """Scaled dot product attention, forward and backward."""
    import torch

    query, key, value = inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = attention(query, key, value, bias, causal)
    return torch.autograd.grad(out, inputs, torch.ones_like(out))
