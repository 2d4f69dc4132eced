"""Calls against the JSON Schemas of tools' arguments, with the names of types that data sets use."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from dagster_project.core.messages import JSON, Call, Tools

TYPES: dict[str, str | None] = {
    **{name: name for name in ("object", "array", "string", "integer", "number", "boolean", "null")},
    "dict": "object", "map": "object", "mapping": "object", "list": "array", "tuple": "array", "set": "array",
    "str": "string", "int": "integer", "long": "integer", "float": "number", "double": "number", "bool": "boolean",
    "none": "null", "any": None, "optional": None, "union": None, "callable": None,
}  # fmt: skip
"""Type in a tool's definition, in lower case -> JSON Schema's name for it, or
None for any type. ToolACE and xLAM use Python's names."""

BROKEN = "broken schema"
"""Kind of fault of a schema that cannot be used."""


@dataclass(frozen=True)
class ArgumentsSchema:
    """Validates arguments by one JSON Schema."""

    schema: Any
    """A `jsonschema` validator; None if the schema is broken."""
    broken: str = ""
    """What is wrong with the schema."""

    def problem(self, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
        """(kind of fault, fault)."""
        from jsonschema.exceptions import best_match
        from referencing.exceptions import Unresolvable

        if self.schema is None:
            return BROKEN, self.broken
        try:
            error = best_match(self.schema.iter_errors(arguments))
        except (Unresolvable, RecursionError, re.error) as unusable:
            return BROKEN, " ".join(str(unusable).split()) or type(unusable).__name__
        return None if error is None else ("arguments do not fit", f"{error.json_path}: {error.message}")


def call_problem(call: Call, tools: Tools) -> str | None:
    """Why a call does not fit the tools; None if it does.

    A tool without a schema, or with a broken one, accepts any object.
    """
    functions = {tool.get("function", tool).get("name"): tool.get("function", tool) for tool in tools or ()}
    if call.name not in functions:
        return f"unknown tool {call.name!r}"
    if not isinstance(call.arguments, dict):
        return "arguments are not a JSON object"
    parameters = functions[call.name].get("parameters")
    found = _cached_schema(JSON.encode(parameters)).problem(call.arguments) if parameters is not None else None
    return None if found is None or found[0] == BROKEN else found[1]


@cache
def _cached_schema(parameters: str) -> ArgumentsSchema:
    return arguments_schema(json.loads(parameters))


def counted(calls: Sequence[Call]) -> Counter[tuple[str, str]]:
    """How often each call is made, by name and arguments.

    Two answers make the same calls, in any order, if these are equal.
    """
    return Counter((call.name, json.dumps(_canonical_value(call.arguments), sort_keys=True)) for call in calls)


def _canonical_value(value: Any) -> Any:
    """A JSON value in which equal numbers are written equally: 3.0 is 3, as in JSON Schema."""
    if isinstance(value, dict):
        return {key: _canonical_value(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_canonical_value(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def arguments_schema(parameters: Any) -> ArgumentsSchema:
    """The schema of a tool's `parameters`."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY

    if not isinstance(parameters, dict):
        return ArgumentsSchema(None, f"expected an object, found {type(parameters).__name__}")
    try:
        schema = _standard(parameters)
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
        # without a registry, jsonschema would download remote references
        return ArgumentsSchema(_with_cheap_patterns(kind)(schema, registry=REGISTRY))
    except SchemaError as error:
        return ArgumentsSchema(None, f"{error.json_path}: {error.message}")
    except RecursionError:
        return ArgumentsSchema(None, "nested too deep")


MAX_STEPS = 10**7
"""Maximum steps of matching a pattern, estimated. A pattern may need exponentially many, so those that could are not
checked."""


def is_cheap(pattern: str, length: int) -> bool:
    """Whether a text of this length is matched in a limited number of steps.

    A cheap pattern repeats no group, and few parts without a limit.

    >>> is_cheap("^[^@]+@[^@]+$", 100), is_cheap("^(a+)+$", 100)
    (True, False)
    """
    repetitions = len(re.findall(r"[*+]|\{\d*,\d*\}", pattern))
    optional = len(re.findall(r"(?<![(*+?}\\])\?", pattern))
    steps = (length + 1) ** repetitions * 2**optional * (pattern.count("|") + 1) ** (pattern.count("(") + 1)
    return not re.search(r"\)[*+{]|\\[1-9]|\(\?P=", pattern) and steps <= MAX_STEPS


@lru_cache(maxsize=8)
def _with_cheap_patterns(kind: Any) -> Any:
    """A jsonschema validator class that leaves out patterns that are not cheap."""
    from jsonschema.validators import extend

    def pattern(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if not isinstance(instance, str) or not isinstance(value, str) or is_cheap(value, len(instance)):
            yield from kind.VALIDATORS["pattern"](validator, value, instance, schema) or ()

    def by_name(check: Callable[..., Iterable[Any] | None]) -> Callable[..., Iterator[Any]]:
        def checked(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
            names = instance if isinstance(instance, dict) else {}
            if all(is_cheap(one, len(name)) for one in schema.get("patternProperties", {}) for name in names):
                yield from check(validator, value, instance, schema) or ()

        return checked

    names = ("patternProperties", "additionalProperties", "unevaluatedProperties")
    checks = {name: by_name(kind.VALIDATORS[name]) for name in names if name in kind.VALIDATORS}
    return extend(kind, {"pattern": pattern, **checks})


def _standard(schema: Any) -> Any:
    """A schema with JSON Schema's names of types: {"type": "dict"} -> {"type": "object"}. Unknown types are kept."""
    if isinstance(schema, list):
        return [_standard(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            name = re.split(r"[\[,( ]", value.strip().lower(), maxsplit=1)[0]
            if (standard := TYPES.get(name, value)) is not None:
                result[key] = standard
        elif key in {"properties", "patternProperties", "$defs", "definitions"} and isinstance(value, dict):
            result[key] = {name: _standard(one) for name, one in value.items()}
        else:
            result[key] = value if key in {"enum", "const", "default", "examples"} else _standard(value)
    return result
