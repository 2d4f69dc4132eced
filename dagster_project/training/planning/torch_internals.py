"""Undocumented parts of torch that the memory and time predictions use, each behind one function that checks the version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dagster_project.core.versions import require_version

TORCH = ">=2.9,<3"
"""Versions of torch that this file was written for."""


def intercepted(value: Any, note: Callable[[Any, Any, Any, Any], None] = lambda *_: None) -> Any:
    """A context in which reading the value of a meta tensor, which has none, gives `value`. torch's notes on extending it document
    TorchDispatchMode, but its module is private.

    Args:
        note: called after every other operation, with the operation, its arguments and keywords, and what it returned.
    """
    require_version("torch", TORCH, "torch.utils._python_dispatch.TorchDispatchMode, aten::_local_scalar_dense")
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Interception(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
                return value
            out = func(*args, **(kwargs or {}))
            note(func, args, kwargs or {}, out)
            return out

    return Interception()


def flatten(values: Any) -> tuple[list[Any], Any]:
    """Leaves of nested lists, tuples and dicts, and the structure that `unflatten` needs."""
    require_version("torch", TORCH, "torch.utils._pytree")
    from torch.utils._pytree import tree_flatten

    return tree_flatten(values)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """Inverse of `flatten`."""
    from torch.utils._pytree import tree_unflatten

    return tree_unflatten(leaves, structure)


def fused_adamw() -> Callable[..., None]:
    """The kernel of torch.optim.AdamW(fused=True)."""
    require_version("torch", TORCH, "torch._fused_adamw_")
    import torch

    return torch._fused_adamw_


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module or class for the duration of a `with` block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
