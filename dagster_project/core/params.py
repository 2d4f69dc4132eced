"""params.yaml -> frozen, typed sections. Validated here, at the border; trusted everywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError

from dagster_project.core.errors import InputError


class Section(BaseModel):
    """Base of every section of params.yaml: frozen, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Compute(Section):
    """Section `compute`: what makes two runs the same run. Part of the identity of every model."""

    seed: int = 7
    """Seed of every random choice: splits, initial adapter weights, dropout, bootstrap."""
    threads: int = 2
    """CPU threads for torch. Another number gives other bits, so it is a parameter and not a guess."""
    dtype: str = "auto"
    """"auto" (bfloat16 where the hardware multiplies it natively, else float32), "bfloat16" or "float32"."""
    processes: int = Field(default=1, ge=1)
    """Processes that share the passes of each training step, one GPU each. On a CPU each has its own `threads`."""


S = TypeVar("S", bound=Section)
TAG = "form:"
"""Tags of a union's alternatives begin with this: pydantic puts the tag into the place of an error, and `parse` takes it out again."""


def read(root: Path) -> dict[str, Any]:
    """All of params.yaml as plain data.

    Raises:
        InputError: the file is missing, is not YAML, or is not a mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = root / "params.yaml"
    if not path.is_file():
        raise InputError(f"no params.yaml in {root}", "run the command from the project's folder")
    try:
        found = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (YAMLError, ValueError, KeyError, RecursionError) as error:  # ValueError: not UTF-8, or a date that no calendar has
        raise InputError(f"params.yaml is not valid YAML: {' '.join(str(error).split())}", "mend the line named") from None
    if not isinstance(found, dict):
        raise InputError("params.yaml must be a mapping of sections", "see docs/parameters.md")
    return found


def parse(model: type[S], values: Any, where: str, file: str = "params.yaml") -> S:
    """Validate one section.

    Args:
        model: the section's type.
        values: what params.yaml holds there (None means: all defaults).
        where: dotted place in params.yaml, used in messages, e.g. "adapter.lora".
    Raises:
        InputError: lists every unknown key, missing key and wrong value at once.
    """
    try:
        return model.model_validate({} if values is None else values)
    except ValidationError as error:
        lines, hints = [], []
        for problem in error.errors():
            place = _place(where, problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"{file}: {place}: unknown key")
                owner = _place(where, problem["loc"][:-1])
                keys = (field.alias or name for name, field in _at(model, problem["loc"][:-1]).model_fields.items())
                hints.append(f"keys of {owner}: {', '.join(keys)}")
            elif problem["type"] == "missing":
                lines.append(f"{file}: {place}: missing")
            else:
                lines.append(f"{file}: {place}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})")
        raise InputError("\n".join(lines), "; ".join(dict.fromkeys(hints)) or f"mend {file} and run again") from None


def _at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model a place inside `model` is parsed by: ("sources", 0) -> Source."""
    annotation: Any = None
    for name in location:
        if str(name).startswith(TAG):  # of the alternatives the one with this tag
            annotation = next((a for a in _inside(annotation) if Tag(str(name)) in getattr(a, "__metadata__", ())), annotation)
        elif name in model.model_fields:
            annotation = model.model_fields[str(name)].annotation
        else:
            continue
        model = next((a for a in _inside(annotation) if isinstance(a, type) and issubclass(a, BaseModel)), model)
    return model


def _inside(annotation: Any) -> list[Any]:
    """A type and all types in it: list[A | None]  ->  [list[A | None], A | None, A, None]"""
    return [annotation, *(inner for argument in get_args(annotation) for inner in _inside(argument))]


def _place(where: str, location: tuple[int | str, ...]) -> str:
    return ".".join([where, *(str(name) for name in location if not str(name).startswith(TAG))])


def inside(root: Path, path: str, where: str) -> Path:
    """A path named in params.yaml, resolved, once it is known to exist and to lie inside the project.

    Raises:
        InputError: the path leaves the project (also through a link) or does not exist.
    """
    if "\0" in path:
        raise InputError(f"params.yaml: {where}: {path!r} is not a path", "name a file")
    full = (root / path).resolve()
    if not full.is_relative_to(root.resolve()):
        raise InputError(f"params.yaml: {where}: {path} lies outside the project", "copy it under data/sources/ and name it there")
    if not full.exists():
        raise InputError(f"params.yaml: {where}: {path} does not exist", "put the file there, or name the right one")
    return full
