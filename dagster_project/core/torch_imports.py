"""torch without parts of it that this project rarely uses, which take as long to import as half of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from dagster_project.core.imports import lean_imports
from dagster_project.core.postponed import loaded, postpone

COMPILER = "torch._dynamo"
_TRACING = f"{COMPILER}._trace_wrapped_higher_order_op"


@contextmanager
def lean_torch_imports(*unused: str) -> Iterator[None]:
    """`lean_imports` of libraries that import torch: its compiler only when it is used, and without distributed tensors
    unless this process is one of a group."""
    _postpone_compiler()
    with lean_imports(*unused):
        _hide_groups()
        yield


def load_compiler() -> None:
    """Import torch's compiler: before a model is built that it shall compile, so that functions are marked."""
    loaded(COMPILER)


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


def _hide_groups() -> None:
    """From now on torch says that it has process groups where this process is in one: otherwise libraries import
    distributed tensors, and with them the compiler's symbols (sympy)."""
    import torch

    if torch.distributed.is_available():  # not in every build
        torch.distributed.is_available = torch.distributed.is_initialized


def _mark(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return (lambda marked: marked) if function is None else function
