"""torch without parts of it that this project rarely uses, which take as long to import as half of torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from dagster_project.core.imports import lean_imports
from dagster_project.core.postponed import loaded, postpone
from dagster_project.core.versions import require_version

COMPILER = "torch._dynamo"
_TRACING = f"{COMPILER}._trace_wrapped_higher_order_op"
TENSORS = "torch.distributed.tensor"
_META_KERNELS = ("_meta_registrations", "_decomp", "_refs", "_prims")


@contextmanager
def lean_torch_imports(*unused: str) -> Iterator[None]:
    """`lean_imports` of libraries that import torch: its compiler and its kernels in Python only when they are used,
    and without distributed tensors unless this process is one of a group."""
    _postpone_compiler()
    with lean_imports(*unused):
        _import_without_meta_kernels()
        _hide_groups()
        yield


def load_compiler() -> None:
    """Import torch's compiler: before a model is built that it shall compile, so that functions are marked."""
    loaded(COMPILER)


def load_meta_kernels() -> None:
    """Import torch's kernels in Python: before operations on the meta device are counted."""
    loaded(f"torch.{_META_KERNELS[0]}")


def _postpone_compiler() -> None:
    """Import torch's compiler and torch.export only when something of them is used.

    torch and transformers import the compiler to mark functions that it shall leave as they are. These marks are left
    out until it is imported, see `load_compiler`. accelerate asks it whether a model is compiled: none is until then.
    """
    names = dict.fromkeys(("disable", "allow_in_graph", "assume_constant_result", "graph_break"), _mark)
    compiled = {"eval_frame": SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))}
    traced = "TransformGetItemToIndex"  # a class that transformers imports
    postpone({COMPILER: names | compiled, _TRACING: {traced: lambda: getattr(loaded(_TRACING), traced)()}})
    postpone({"torch.export": {}})


def _import_without_meta_kernels() -> None:
    """Import torch, and its kernels in Python only when something of them is used.

    They compute shapes on the meta device for operations that have no kernel in C++ there, and take the place of some
    that have: the initial values of an embedding, of which there are none, import sympy.
    """
    waiting = postpone({f"torch.{name}": {} for name in _META_KERNELS})
    import torch

    if waiting is None:  # torch was imported before
        return
    for name in _META_KERNELS:  # torch reads them as its attributes
        setattr(torch, name, sys.modules[f"torch.{name}"])
    if hasattr(torch._C, "_set_generator_metaclass"):  # of some versions; one of the kernels' modules calls it
        require_version("torch", "<3", "torch._C._set_generator_metaclass")
        from torch._opaque_base import OpaqueBaseMeta

        torch._C._set_generator_metaclass(OpaqueBaseMeta)
    _load_where_missing()


def _load_where_missing() -> None:
    """Import the kernels in Python when a model is built on the meta device by an operation that has no other: 5 of
    the 181 kinds of language models that transformers builds with its defaults have one."""
    require_version("torch", "<3", "torch.utils._device.DeviceContext")
    from torch.utils._device import DeviceContext

    run = DeviceContext.__torch_function__

    def run_again(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return run(self, func, types, args, kwargs)
        except NotImplementedError:
            DeviceContext.__torch_function__ = run
            load_meta_kernels()
        return run(self, func, types, args, kwargs)

    DeviceContext.__torch_function__ = run_again


def _hide_groups() -> None:
    """Without a process group, import distributed tensors only when something of them is used, and say that torch has
    groups when this process is in one: otherwise libraries import them, and the compiler's symbols (sympy) with them,
    to test whether a tensor is one."""
    import torch

    if not torch.distributed.is_available():  # not in every build
        return
    if not torch.distributed.is_initialized() and (waiting := postpone({TENSORS: {"DTensor": _DistributedTensor}})):
        torch.distributed.tensor = waiting.modules[TENSORS]
    torch.distributed.is_available = torch.distributed.is_initialized


class _OfDistributedTensors(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        kind = vars(sys.modules[TENSORS])["DTensor"]  # this one until the module is imported: so there are no instances
        return kind is not cls and isinstance(instance, kind)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(loaded(TENSORS).DTensor, name)


class _DistributedTensor(metaclass=_OfDistributedTensors):
    """The class of distributed tensors, for libraries that test whether a tensor is one."""


def _mark(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return (lambda marked: marked) if function is None else function
