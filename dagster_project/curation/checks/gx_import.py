"""The import of Great Expectations in less time.

It loads whatever it could use, and half of the time is pydantic copying fields of models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

from dagster_project.core.imports import lean_imports
from dagster_project.core.postponed import postponed

_OTHER_PLACES = ("sqlalchemy", "psycopg2", "google", "grpc", "boto3", "botocore")
"""Optional libraries by which Great Expectations reads tables of data bases and clouds. The table of a set is a data
frame."""
_ATOMIC = frozenset({type(None), bool, int, float, complex, str, bytes, type, FunctionType, BuiltinFunctionType})
"""Types whose objects `copy.deepcopy` returns as they are."""


@contextmanager
def quick_import() -> Iterator[None]:
    """While open, `import great_expectations` loads no database drivers.

    Libraries that single expectations use are imported on first use.
    """
    # scipy.stats: three of its expectations load it when they are evaluated; altair draws charts of one expectation on
    # its own pages; requests sends notifications
    with (
        lean_imports(*_OTHER_PLACES, "rfc3987_syntax", "chardet"),
        postponed("scipy.stats"),
        postponed("altair"),
        postponed("requests"),
        direct_copies(),
    ):
        yield


@contextmanager
def direct_copies() -> Iterator[None]:
    """While open, `copy.deepcopy` copies fields of old pydantic models (`pydantic.v1`) by slots, with the same result.

    Otherwise it asks each for its state, and copies the names of all slots and every None as if they were objects: a
    class of Great Expectations has copies of the fields of all its bases. Classes with a copying method of their own
    keep that.
    """
    from pydantic.v1.class_validators import Validator
    from pydantic.v1.fields import FieldInfo, ModelField

    classes: list[Any] = [each for each in (FieldInfo, ModelField, Validator) if has_plain_state(each)]
    for each in classes:
        each.__deepcopy__ = _copied
    try:
        yield
    finally:
        for each in classes:
            del each.__deepcopy__


def has_plain_state(kind: type) -> bool:
    """Whether the state of an object is in its slots only, and `copy.deepcopy` would find it there."""
    methods = ("deepcopy", "reduce", "reduce_ex", "getstate", "setstate", "getnewargs", "getnewargs_ex", "setattr")
    own = [f"__{name}__" for name in methods]
    slots = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
    named = all(isinstance(names, tuple) and not any(name.startswith("__") for name in names) for names in slots)
    inherited = all(getattr(kind, name, None) is getattr(object, name, None) for name in own)
    return named and inherited and kind.__dictoffset__ == 0


def _copied(self: Any, memo: dict[int, Any]) -> Any:
    kind: Any = type(self)
    twin = object.__new__(kind)
    memo[id(self)] = twin
    for name in _slots(kind):
        try:
            value = getattr(self, name)
        except AttributeError:  # not set
            continue
        setattr(twin, name, value if type(value) in _ATOMIC else copy.deepcopy(value, memo))
    if hasattr(self, "__dict__"):  # of a subclass
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return twin


@cache
def _slots(kind: type) -> tuple[str, ...]:
    return tuple([name for base in kind.__mro__ for name in base.__dict__.get("__slots__", ())])
