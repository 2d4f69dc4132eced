"""Undocumented parts of torch that the memory and time predictions use, each behind one function that checks the version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dagster_project.core.versions import require_version

TORCH = ">=2.9,<3"
"""Versions of torch that this file was written for."""


def dispatch_mode() -> type:
    """Base class of modes that intercept every operation. torch's notes on extending it document the class, but its module is private."""
    require_version("torch", TORCH, "torch.utils._python_dispatch.TorchDispatchMode")
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def flatten(values: Any) -> tuple[list[Any], Any]:
    """Leaves of nested lists, tuples and dicts, and the structure that `unflatten` needs."""
    require_version("torch", TORCH, "torch.utils._pytree")
    from torch.utils._pytree import tree_flatten

    return tree_flatten(values)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """Inverse of `flatten`."""
    require_version("torch", TORCH, "torch.utils._pytree")
    from torch.utils._pytree import tree_unflatten

    return tree_unflatten(leaves, structure)


def fused_adamw() -> Callable[..., None]:
    """The kernel of torch.optim.AdamW(fused=True)."""
    require_version("torch", TORCH, "torch._fused_adamw_")
    import torch

    return torch._fused_adamw_


def reads_meta_value(operation: Any, arguments: Sequence[Any]) -> bool:
    """Whether an intercepted operation is `item()` of a meta tensor, which has no value."""
    require_version("torch", TORCH, "aten::_local_scalar_dense")
    import torch

    return operation is torch.ops.aten._local_scalar_dense.default and arguments[0].device.type == "meta"


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module or class for the duration of a `with` block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
