"""params.yaml -> frozen, typed sections. Validated once, here, and trusted everywhere else."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError, model_validator

from dagster_project.core.errors import InputError

log = logging.getLogger("pedigree")


class Section(BaseModel):
    """Base of every section of params.yaml: frozen, no unknown keys, no silent type conversion. The docstring beneath a
    field is its description in docs/parameters.md; `make docs` reads it, because reading the source of every class
    would take a third of a second in each process."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)  # JSON has neither


class Licensed(Section):
    """A section with a key `license`. Files of earlier versions spell it `licence`."""

    @model_validator(mode="before")
    @classmethod
    def _accept_licence(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "licence" not in values or "license" in values:
            return values
        _hint_at_license()
        return {"license" if key == "licence" else key: value for key, value in values.items()}


@cache
def _hint_at_license() -> None:
    """Logged once per process."""
    log.warning("params.yaml: the key `licence` is deprecated: write `license`")


class Compute(Section):
    """Reproducibility settings. Every value is part of a model's identity."""

    seed: int = Field(default=7, ge=0, lt=2**32)
    """Seed of every random choice: splits, initial adapter weights, dropout, sampling, bootstrap."""
    threads: int = Field(default=2, ge=1)
    """CPU threads that torch uses. Part of a model's identity, because another number of threads gives different
    bits."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the computation: `auto`, `bfloat16` or `float32`. `auto` is bfloat16 where the hardware
    multiplies it natively (AMX, AVX512-BF16, GPUs from Ampere on), otherwise float32; GPUs before Ampere (Turing,
    Volta) have no native bfloat16."""
    processes: int = Field(default=1, ge=1)
    """Processes that train one adapter together, one GPU each; on a CPU each process uses its own `threads`. An
    optimizer step then covers this many times more rows. See docs/methods.md."""


S = TypeVar("S", bound=Section)
MOST_VALUES = 1_000_000
_SHORT = Repr()
"""Values in messages; those of the user's mistakes are short."""
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxdict = _SHORT.maxlist = 20
_SHORT.maxlevel = 3
TAG = "form:"
"""Prefix of the tags of a union's alternatives: pydantic adds the tag to the location of an error, and `parse` removes
it."""


def read(root: Path) -> dict[str, Any]:
    """All of params.yaml as plain data.

    Raises:
        InputError: the file is missing, is not YAML, or is not a mapping; or a key is not text.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = root / "params.yaml"
    if not path.is_file():
        raise InputError(f"no params.yaml in {root}", "run the command from the project's folder")
    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        count = _values_in(values, "", {})
    except (YAMLError, ValueError, LookupError, TypeError, RecursionError) as error:
        # also not UTF-8, an invalid date, too many brackets
        what = f"params.yaml is not valid YAML: {' '.join(str(error).split())}"
        raise InputError(what, "fix the line named in the message") from None
    if not isinstance(values, dict):
        raise InputError("params.yaml must be a mapping of sections", "see docs/parameters.md")
    if count > MOST_VALUES:
        what = f"params.yaml has {count:,} values with its aliases written out"
        raise InputError(what, f"the most is {MOST_VALUES:,}")
    return values


def _values_in(value: Any, where: str, known: dict[int, int | None]) -> int:
    """Number of values in a part of params.yaml, with every alias written out.

    Args:
        known: number by identity of the parts counted so far; None while it is counted.
    Raises:
        InputError: an alias contains itself; a key is a number, date, truth value or nothing: YAML reads `16:` and
            `null:` so; or an integer is outside of ±(2^63 - 1), the range of stored numbers.
    """
    if isinstance(value, int) and value.bit_length() > 63:
        raise InputError(
            f"params.yaml: {where}: an integer of {value.bit_length()} bits",
            f"use at most {2**63 - 1}, or quote it, if it is a text",
        )
    if not isinstance(value, dict | list):
        return 1
    if id(value) in known:
        count = known[id(value)]
        if count is None:
            raise InputError(f"params.yaml: {where}: an alias contains itself", "write the values out")
        return count
    known[id(value)] = None
    total = 0
    if isinstance(value, list):
        total = sum(_values_in(item, where, known) for item in value)
    else:
        for key, item in value.items():
            if not isinstance(key, str):
                name, kind = str(key).lower(), type(key).__name__
                raise InputError(
                    f"params.yaml: {where or 'top level'}: YAML reads the key {name} as {kind}, not as text",
                    "write it in quotes, or rename it",
                )
            total += _values_in(item, f"{where}.{key}".lstrip("."), known)
    known[id(value)] = total + 1
    return total + 1


def parse(model: type[S], values: Any, where: str, file: str = "params.yaml") -> S:
    """Validate one section.

    Args:
        model: the section's type.
        values: the section's content (None: all defaults).
        where: dotted path in params.yaml for messages, e.g. "adapter.lora".
        file: name of the file for messages.
    Raises:
        InputError: lists every unknown key, missing key and wrong value at once.
    """
    try:
        return model.model_validate({} if values is None else values)
    except ValidationError as error:
        lines, hints = [], []
        for problem in error.errors():
            location, reason = problem["loc"], problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                parent = location[:-1]
                keys = [field.alias or name for name, field in _model_at(model, parent).model_fields.items()]
                hints.append(f"keys of {_dotted(where, parent)}: {', '.join(keys)}")
                reason = "unknown key"
            elif problem["type"] == "missing":
                reason = "missing"
            else:
                reason = f"{reason} (got {_SHORT.repr(problem['input'])})"
            lines.append(f"{file}: {_dotted(where, location)}: {reason}")
        raise InputError("\n".join(lines), "; ".join(dict.fromkeys(hints)) or f"fix {file} and run again") from None


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that parses a location inside `model`: ("sources", 0) -> Source."""
    annotation: Any = None
    for name in location:
        if str(name).startswith(TAG):
            tagged = (a for a in _inside(annotation) if Tag(str(name)) in getattr(a, "__metadata__", ()))
            annotation = next(tagged, annotation)
        elif name in model.model_fields:
            annotation = model.model_fields[str(name)].annotation
        else:
            continue
        model = next((a for a in _inside(annotation) if isinstance(a, type) and issubclass(a, BaseModel)), model)
    return model


def _inside(annotation: Any) -> list[Any]:
    """A type and all types nested in it: list[A | None]  ->  [list[A | None], A | None, A, None]"""
    return [annotation, *(inner for argument in get_args(annotation) for inner in _inside(argument))]


def _dotted(where: str, location: tuple[int | str, ...]) -> str:
    return ".".join([where, *(str(name) for name in location if not str(name).startswith(TAG))])


def inside(root: Path, path: str, where: str) -> Path:
    """Resolve a path named in params.yaml, which must exist and be inside the project.

    Raises:
        InputError: the path leaves the project (also through a link), does not exist, or cannot be one.
    """
    try:
        full = (root / path).resolve()
        exists = full.exists()
    except (ValueError, OSError, RuntimeError) as error:  # it has a null character, is too long, or is a link to itself
        reason = getattr(error, "strerror", None) or str(error)
        what = f"params.yaml: {where}: {path[:100]!r} is not a path: {reason}"
        raise InputError(what, "use the path of a file") from None
    if not full.is_relative_to(root.resolve()):
        raise InputError(
            f"params.yaml: {where}: {path} is outside the project",
            "copy it into the project, e.g. into data/sources/, and give that path",
        )
    if not exists:
        raise InputError(f"params.yaml: {where}: {path} does not exist", "add the file, or correct the path")
    return full


def is_variant_name(name: str) -> bool:
    """Whether it has only letters, digits, - and _: it is part of paths and of stage names."""
    return name.replace("_", "").replace("-", "").isalnum()


def refuse_names_of_one_file(names: Iterable[str], section: str) -> None:
    """Raises:
    InputError: two names differ in case or Unicode form only. Some file systems have one file for both.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise InputError(
                f"params.yaml: {section}: {other} and {name} differ in case or Unicode form only",
                "rename one: some file systems have one file for both",
            )


def variant_names(values: Mapping[str, Any], section: str, required: bool) -> list[str]:
    """Names of the variants in a section of params.yaml.

    Raises:
        InputError: the section is not a mapping, or empty although `required`; a name has other characters than
            letters, digits, - and _; or two names would be one file on some file systems.
    """
    found = values.get(section)
    if not isinstance(found, dict) or (required and not found):
        raise InputError(
            f"params.yaml: {section}: must {'name at least one variant' if required else 'be a mapping of variants'}",
            "add an entry such as `lora: {method: lora}`" if required else f"write `{section}: {{}}` for none",
        )
    for name in found:
        if not is_variant_name(str(name)):
            raise InputError(
                f"params.yaml: {section}.{name}: a variant's name may contain letters, digits, - and _", "rename it"
            )
    refuse_names_of_one_file(map(str, found), section)
    return list(map(str, found))
