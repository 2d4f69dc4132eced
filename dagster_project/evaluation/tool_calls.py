"""Measures of tool calls: whether they fit the tools, and whether they equal those of the reference."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from dagster_project.core.messages import Call, Tools
from dagster_project.training.inference.answers import Answer


def is_valid(answer: Answer, tools: Tools) -> bool:
    """Whether an answer has calls, and each one names a tool and has arguments that fit its JSON Schema."""
    return bool(answer.calls) and all(problem(call, tools) is None for call in answer.calls)


def problem(call: Call, tools: Tools) -> str | None:
    """Why a call does not fit the tools; None if it does. A tool without a schema, or with an invalid one, accepts any object."""
    functions = {tool.get("function", tool).get("name"): tool.get("function", tool) for tool in tools or ()}
    if call.name not in functions:
        return f"unknown tool {call.name!r}"
    if not isinstance(call.arguments, dict):
        return "arguments are not a JSON object"
    validator = _validator(json.dumps(functions[call.name].get("parameters") or {}, sort_keys=True))
    error = None if validator is None else next(iter(validator.iter_errors(call.arguments)), None)
    return None if error is None else f"{error.json_path}: {error.message}"


@cache
def _validator(schema: str) -> Any:
    """Validator of a JSON Schema, which may reference nothing outside itself; None if it is invalid."""
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    parsed = json.loads(schema)
    try:
        Draft202012Validator.check_schema(parsed)
        validator = Draft202012Validator(parsed, registry=Registry())
        list(validator.iter_errors({}))  # an unresolvable reference shows only here
    except (SchemaError, Unresolvable, RecursionError):
        return None
    return validator


def same_names(reference: Answer, answer: Answer) -> bool:
    """Whether an answer calls the same tools, each as often, in any order."""
    return Counter(call.name for call in reference.calls) == Counter(call.name for call in answer.calls)


def same_calls(reference: Answer, answer: Answer) -> bool:
    """Whether an answer makes the same calls with equal arguments, in any order."""
    return _multiset(reference.calls) == _multiset(answer.calls)


def _multiset(calls: Sequence[Call]) -> Counter[tuple[str, str]]:
    return Counter((call.name, json.dumps(_canonical(call.arguments), sort_keys=True)) for call in calls)


def _canonical(value: Any) -> Any:
    """A JSON value in which equal numbers are written equally: 3.0 is 3, as in JSON Schema."""
    if isinstance(value, dict):
        return {key: _canonical(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_canonical(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
