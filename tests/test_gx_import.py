"""Great Expectations is imported in less time, and is then the library that it is otherwise."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Optional, get_origin

import pytest
from conftest import ROOT
from pydantic import v1
from pydantic.v1.class_validators import Validator
from pydantic.v1.fields import FieldInfo, ModelField

from dagster_project.core.postponed import postponed
from dagster_project.curation.checks.gx_import import direct_copies, has_plain_state

COPIED = (FieldInfo, ModelField, Validator)


class Model(v1.BaseModel):
    plain: int = 1
    mutable: list[dict[str, int]] = v1.Field([{"a": 1}], description="a list", example={"more": [1]})
    either: Optional[Literal["a", "b"]] = None  # noqa: UP045  the old form of typing, as Great Expectations writes it
    nested: dict[str, list[Annotated[int, v1.Field(gt=0)]]] = {}

    @v1.validator("plain", pre=True)
    def _positive(cls, value: int) -> int:
        return abs(value)


def state(value: Any) -> Any:
    """Plain data that is equal for equal objects."""
    if isinstance(value, COPIED):
        slots = [name for base in type(value).__mro__ for name in base.__dict__.get("__slots__", ())]
        return type(value), {name: state(getattr(value, name)) for name in slots if hasattr(value, name)}
    if isinstance(value, dict):
        return {key: state(each) for key, each in value.items()}
    if get_origin(value) is not None:  # an annotation: its copy is equal only if nothing in it was copied
        return repr(value)
    return [state(each) for each in value] if isinstance(value, list | tuple) else value


def mutable_parts(value: Any) -> Iterator[int]:
    """Identities of everything in a field that could be changed."""
    if isinstance(value, COPIED):
        yield id(value)
        for name in (name for base in type(value).__mro__ for name in base.__dict__.get("__slots__", ())):
            yield from mutable_parts(getattr(value, name, None))
    elif isinstance(value, dict | list):
        yield id(value)
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from mutable_parts(each)


@pytest.mark.parametrize("name", Model.__fields__)
def test_a_field_that_is_copied_directly_is_copied_as_python_copies_it(name: str) -> None:
    field = Model.__fields__[name]
    by_python = copy.deepcopy(field)
    with direct_copies():
        assert "__deepcopy__" in ModelField.__dict__, (
            "the installed pydantic is one whose fields can be copied directly"
        )
        direct = copy.deepcopy(field)
    assert state(direct) == state(by_python) == state(field)
    assert set(mutable_parts(direct)).isdisjoint(mutable_parts(field))
    assert len({*mutable_parts(direct)}) == len({*mutable_parts(by_python)}), "the same parts are shared within a copy"
    assert not any("__deepcopy__" in kind.__dict__ for kind in COPIED)


def test_a_model_made_of_direct_copies_validates_as_its_base() -> None:
    with direct_copies():
        child = type("Child", (Model,), {"__annotations__": {"added": str}, "added": "x"})
    assert child(plain=-3).dict() == {**Model(plain=-3).dict(), "added": "x"}
    with pytest.raises(v1.ValidationError, match="unexpected value"):
        child(either="c")
    child.__fields__["mutable"].default.append({})
    assert Model.__fields__["mutable"].default == [{"a": 1}]


def test_only_classes_whose_state_is_in_their_slots_are_copied_directly() -> None:
    class Slots:
        __slots__ = ("a",)

    class Own(Slots):
        __slots__ = ()

        def __deepcopy__(self, memo: object) -> Own:
            return self

    class Free(Slots):
        pass

    class Private:
        __slots__ = ("__a",)

    assert [has_plain_state(kind) for kind in (Slots, Own, Free, Private, *COPIED)] == [
        True,
        False,
        False,
        False,
        True,
        True,
        True,
    ]


def test_a_library_that_is_used_later_is_imported_then(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawing_library.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    with postponed("drawing_library"), postponed("a_library_that_nobody_has"):
        import drawing_library as placeholder  # type: ignore[import-not-found]

        assert not hasattr(placeholder, "__file__"), "asked by whoever looks through all modules"
        assert "a_library_that_nobody_has" not in sys.modules
    assert "drawing_library" not in sys.modules
    assert placeholder.VALUE == 7
    real = sys.modules.pop("drawing_library")
    assert real is not placeholder and real.VALUE == 7


def test_a_chart_is_drawn_by_a_library_that_the_import_did_not_load() -> None:
    code = """import sys
from dagster_project.curation.checks.gx_import import quick_import
with quick_import():
    import great_expectations
    from great_expectations.expectations.core import expect_column_kl_divergence_to_be_less_than as drawn
print("altair" in sys.modules, drawn.alt.Chart.__module__.partition(".")[0], "altair" in sys.modules)"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "False altair True\n", done.stderr
