"""Undocumented parts of torch that predictions use, each behind one function that checks the version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dagster_project.core.torch_imports import load_meta_kernels
from dagster_project.core.versions import require_version

TORCH = ">=2.9,<3"
"""Versions of torch that this file was written for."""


def intercepted(value: Any, run: Callable[[Any, Any, Any], Any] | None = None) -> Any:
    """A context in which reading the value of a meta tensor, which has none, gives `value`.

    torch's notes on extending it document TorchDispatchMode, but its module is private.

    Args:
        run: called instead of every other operation, with the operation, its arguments and keywords.
    """
    require_version("torch", TORCH, "torch.utils._python_dispatch.TorchDispatchMode, aten::_local_scalar_dense")
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    load_meta_kernels()  # otherwise some operations would count as others

    class Interception(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
                return value
            return run(func, args, kwargs or {}) if run else func(*args, **(kwargs or {}))

    return Interception()


_results: dict[Any, tuple[Any, Any, Any]] = {}


def run_on_meta(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the meta device, where computing the shape of the result takes half of a step's time.

    It is computed once for each set of arguments, if the result is a new tensor.
    """
    import torch

    def described(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.shape, value.stride(), value.dtype, value.device
        return tuple(map(described, value)) if isinstance(value, (list, tuple)) else (type(value), value)

    key = (func, described(args), described(tuple(kwargs.items())))
    if key in _results:
        size, stride, dtype = _results[key]
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")
    out = func(*args, **kwargs)
    inputs = {id(tensor.untyped_storage()) for tensor in meta_tensors((args, kwargs))}
    if inputs and isinstance(out, torch.Tensor) and id(storage := out.untyped_storage()) not in inputs:
        shape = out.shape, out.stride(), out.dtype
        alone = torch.empty_strided(*shape[:2], dtype=shape[2], device="meta")
        if storage.nbytes() == alone.untyped_storage().nbytes():
            _results[key] = shape
    return out


def meta_tensors(values: Any) -> list[Any]:
    """The tensors on the meta device in nested lists, tuples and dicts."""
    import torch

    return [value for value in flatten(values)[0] if isinstance(value, torch.Tensor) and value.device.type == "meta"]


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
