"""Imports of large libraries in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
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


@contextmanager
def after_import(name: str, then: Callable[[ModuleType], None]) -> Iterator[None]:
    """While open, `then` is called with a module of this name when it has been imported, before others use it."""
    finder = _AfterImport(name, then)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


class _AfterImport(Loader):
    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        if (spec := find_spec(name)) and spec.loader:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.then(module)


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


LISTED = ("auto", "bloom")
"""Folders of transformers' models whose names are listed when it is imported; PEFT names a class of the second."""


def import_transformers() -> None:
    """Import transformers with its package of models, without reading the files of all models.

    To list the names that they define, transformers reads all these files when it is imported, and again when its
    package of models is. Here models are loaded by their modules, so few names are listed; the first use of another
    name lists all.
    """
    with after_import("transformers.utils.import_utils", _list_when_needed):
        import transformers.models  # noqa: F401


def _list_when_needed(import_utils: Any) -> None:
    """Make transformers and its package of models list all names when one is used that is not listed.

    Args:
        import_utils: transformers' module, of which these packages take two parts when they are imported.
    """
    from dagster_project.core.versions import require_version

    require_version("transformers", ">=5.24,<6", "transformers.utils.import_utils._LazyModule, define_import_structure")
    read = import_utils.define_import_structure
    kind: Any = import_utils._LazyModule
    models = Path(import_utils.__file__).parents[1] / "models"

    def few(path: str | Path, prefix: str | None = None) -> dict[Any, dict[str, Any]]:
        if Path(path) not in (models, models / "__init__.py"):
            return read(path, prefix)
        found: dict[Any, dict[str, Any]] = {}
        for folder in filter(lambda name: (models / name).is_dir(), LISTED):
            for required, modules in read(models / folder, prefix=f"{prefix}.{folder}" if prefix else folder).items():
                found.setdefault(required, {}).update(modules)
        return found

    class LazyModule(kind):
        _is_short = False

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._is_short = self.__name__ in ("transformers", "transformers.models")
            if self._is_short:
                del self.__all__

        def __getattr__(self, name: str) -> Any:
            if not self._is_short or self._lists(name):
                return super().__getattr__(name)
            if not name.isidentifier() or (name[:2] == "__" and name != "__all__"):
                raise AttributeError(name)
            if find_spec(module := f"{self.__name__}.{name}"):
                return import_module(module)
            self._list_all()
            return getattr(self, name)

        def _lists(self, name: str) -> bool:
            # for a tokenizer that transformers does not have by this name, it looks for others that it lists
            return name in self._objects or (name in self._class_to_module and not name.endswith("TokenizerFast"))

        def __dir__(self) -> list[str]:
            self._list_all()
            return super().__dir__()

        def _list_all(self) -> None:
            if not self._is_short:
                return
            structure = {required: dict(modules) for required, modules in read(models, prefix="models").items()}
            if self.__name__ == "transformers":
                others = {name: names for name, names in self._import_structure.items() if name[:7] != "models."}
                structure.setdefault(frozenset(), {}).update(others)
            else:
                structure = without_prefix("models.", structure)
            every = kind(self.__name__, self.__file__, structure)
            self.__dict__.update(_is_short=False, **{name: getattr(every, name) for name in _FROM_STRUCTURE})

    import_utils.define_import_structure, import_utils._LazyModule = few, LazyModule


_FROM_STRUCTURE = ("__all__", "_class_to_module", "_import_structure", "_modules", "_object_missing_backend")
"""Attributes of a package of transformers that follow from the names that it lists."""


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
