"""Imports of large libraries in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any


@contextmanager
def lean_imports(*unused: str) -> Iterator[None]:
    """Import libraries without garbage collection, and without optional packages that the project does not use.

    Collections search all objects of the libraries again and again, and find nothing: a fifth of the time of an import.

    Args:
        unused: see `hidden`.
    """
    collected, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        with hidden(*unused):
            yield
    finally:
        if collected:
            if len(sys.modules) > before:
                gc.freeze()  # later collections skip what the libraries hold
            gc.enable()


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """While open, importing these packages raises ModuleNotFoundError, unless they were imported before.

    So libraries that import whatever they could use do without them. It acts on all threads.
    """
    added = [name for name in names if name not in sys.modules]
    # None: `import` raises ModuleNotFoundError, as Python documents
    sys.modules.update(dict.fromkeys(added))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """While open, these packages are not installed for imports, unless they were imported before. In contrast to
    `hidden`, also for compiled modules, and with the usual message."""
    finder = _Absent(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Absent:
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@cache
def use_arrow_without_pandas() -> None:
    """pyarrow imports pandas at its first conversion, to find out whether values are objects of pandas, which those of
    this project are not. Where pandas is asked for later, pyarrow imports it then."""
    import pyarrow as pa

    with absent("pandas"):
        pa.array([])


@cache
def import_pandera() -> Any:
    """`pandera.polars`, imported without pandas, and without hypothesis, by which it can make up tables."""
    with lean_imports(), absent("pandas", "hypothesis"):
        import pandera.polars
        import polars as pl
        from pandera.backends.register_checks import register_default_check_backends

        register_default_check_backends(pl.LazyFrame)  # otherwise the first check imports pandas
    return pandera.polars


def import_transformers() -> None:
    """Import transformers with its package of models, without reading the files of all models a second time.

    To list the names that they define, transformers reads these files when it is imported, and again when its package
    of models is.
    """
    import transformers
    from transformers.utils import import_utils

    read = import_utils.define_import_structure
    folder = Path(transformers.__file__).parent / "models"

    def define_import_structure(path: str | Path, prefix: str | None = None) -> Any:
        if prefix is not None or Path(path) != folder / "__init__.py":
            return read(path, prefix)
        return without_prefix("models.", read(folder, prefix="models"))  # transformers keeps this result

    import_utils.define_import_structure = define_import_structure
    try:
        import transformers.models
    finally:
        import_utils.define_import_structure = read


def without_prefix(prefix: str, structure: Mapping[Any, Mapping[str, Iterable[str]]]) -> dict[Any, dict[str, set[str]]]:
    """The modules of an import structure of transformers whose name has a prefix, without it.

    Args:
        structure: required packages -> module -> names.
    """
    found = {}
    for required, modules in structure.items():
        if chosen := [module for module in modules if module.startswith(prefix)]:
            found[required] = {module.removeprefix(prefix): set(modules[module]) for module in chosen}
    return found
