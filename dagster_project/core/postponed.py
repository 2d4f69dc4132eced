"""Modules that libraries import without need, imported when something of them is used."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextmanager
def postponed(package: str, **names: Any) -> Iterator[None]:
    """While open, importing a package gives a module with these names alone; the package is imported when another name
    of it is used. Nothing is changed if it was imported before, or is not installed."""
    one = postpone({package: names}) if find_spec(package) else None
    try:
        yield
    finally:
        if one:
            one.remove()


def postpone(modules: Mapping[str, Mapping[str, Any]]) -> Postponed | None:
    """From now on importing these modules gives ones with these names alone, until another name, or another module of
    the same packages, is used: then all of them are imported.

    Returns:
        None where one of them was imported before, which changes nothing.
    """
    if any(name in sys.modules for name in modules):
        return None
    one = Postponed(modules)
    sys.modules.update(one.modules)
    sys.meta_path.insert(0, one)
    return one


def loaded(name: str) -> ModuleType:
    """A module, which is imported now if it was postponed."""
    module = import_module(name)
    return module.postponed.load(name) if isinstance(module, _Waiting) else module


class Postponed:
    """Modules that wait. It is a finder of imports while they do."""

    def __init__(self, modules: Mapping[str, Mapping[str, Any]]) -> None:
        self.modules = {name: _Waiting(name, names, self) for name, names in modules.items()}

    def remove(self) -> None:
        """Let the modules be imported as usual."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            for name, module in self.modules.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]

    def load(self, name: str) -> ModuleType:
        """Import a module, and with it the others: whoever holds the waiting ones gets the names of the real ones."""
        self.remove()
        for one, waiting in self.modules.items():
            waiting.__dict__.update({key: value for key, value in vars(import_module(one)).items() if key[:2] != "__"})
        return import_module(name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Called by an import of any other module."""
        if not any(name.startswith(f"{module}.") for module in self.modules):
            return None
        module = self.load(name)
        del sys.modules[name]  # the import adds it again; it would execute a module that is there once more
        return ModuleSpec(name, _Loaded(module))


class _Waiting(ModuleType):
    __path__: list[str] = []
    """It may be a package."""

    def __init__(self, name: str, names: Mapping[str, Any], postponed: Postponed) -> None:
        super().__init__(name)
        self.__dict__.update(names)
        self.postponed = postponed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.postponed.load(self.__name__), name)


class _Loaded(Loader):
    """Loader of a module that has been imported already."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
