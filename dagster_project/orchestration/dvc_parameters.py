"""Values of the parameters that stages read.

DVC parses the whole file for each stage and each question, which is quadratic in the number of variants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dagster_project.orchestration.private_api import private_module

_GLOB = re.compile(r"[*?\[\]!]")


class ParameterFiles:
    """Parameter files as they are on disk, each parsed once."""

    def __init__(self) -> None:
        self._parsed: dict[str, Any] = {}

    def values(self, dep: Any) -> dict[str, Any]:
        """What `read_params` of one of DVC's dependencies on parameters returns: value by key.

        A key that the file does not have is left out.

        Raises:
            dvc.exceptions.DvcException: the file cannot be read, or is a folder.
        """
        if not dep.params or not dep.exists or dep.isdir():
            return dict(dep.read_params())
        if dep.fs_path not in self._parsed:
            serialize = private_module("dvc.utils.serialize")
            try:
                self._parsed[dep.fs_path] = serialize.load_path(dep.fs_path, dep.repo.fs)
            except serialize.ParseError:
                return dict(dep.read_params())  # raises, in DVC's words
        found = {key: _value(self._parsed[dep.fs_path], key) for key in dep.params}
        return {key: value for key, value in found.items() if value is not _ABSENT}

    def changed(self, dep: Any) -> bool:
        """Whether `status` of such a dependency is not empty: a key has another
        value than dvc.lock, or is in one of the two only."""
        recorded = dep.hash_info.value
        if not dep.exists or recorded is None:
            return True
        values = self.values(dep)
        return any(
            key not in values or key not in recorded or not _same(values[key], recorded[key])
            for key in dep.params or {**values, **recorded}
        )


_ABSENT = object()


def _value(parsed: Any, key: str) -> Any:
    """The value at a key such as "adapter.lora"; `_ABSENT` if there is none."""
    found = parsed
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found or _GLOB.search(part):
            return _searched(parsed, key)
        found = found[part]
    return found


def _searched(parsed: Any, key: str) -> Any:
    """The same by the search that DVC uses: the key is a pattern, and a part of it may be a number."""
    return private_module("dvc.dependency.param").dpath.get(parsed, key, separator=".", default=_ABSENT)


def _same(value: Any, recorded: Any) -> bool:
    """As DVC compares them: a tuple, of a Python file, is recorded as a list."""
    return bool(value == recorded or (isinstance(value, tuple) and list(value) == recorded))
