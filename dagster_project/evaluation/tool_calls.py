"""Measures of tool calls: whether they fit the tools, and whether they equal those of the reference."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from dagster_project.core.messages import JSON, Call, Tools
from dagster_project.core.tool_schemas import BROKEN, ArgumentsSchema, arguments_schema
from dagster_project.training.inference.answers import Answer


def is_valid(answer: Answer, tools: Tools) -> bool:
    """Whether an answer has calls, and each one names a tool and has arguments that fit its JSON Schema."""
    return bool(answer.calls) and all(problem(call, tools) is None for call in answer.calls)


def problem(call: Call, tools: Tools) -> str | None:
    """Why a call does not fit the tools; None if it does. A tool without a schema, or with a broken one, accepts any object."""
    functions = {tool.get("function", tool).get("name"): tool.get("function", tool) for tool in tools or ()}
    if call.name not in functions:
        return f"unknown tool {call.name!r}"
    if not isinstance(call.arguments, dict):
        return "arguments are not a JSON object"
    parameters = functions[call.name].get("parameters")
    found = _schema(JSON.encode(parameters)).problem(call.arguments) if parameters is not None else None
    return None if found is None or found[0] == BROKEN else found[1]


@cache
def _schema(parameters: str) -> ArgumentsSchema:
    return arguments_schema(json.loads(parameters))


def same_names(reference: Answer, answer: Answer) -> bool:
    """Whether an answer calls the same tools, each as often, in any order."""
    return Counter(call.name for call in reference.calls) == Counter(call.name for call in answer.calls)


def same_calls(reference: Answer, answer: Answer) -> bool:
    """Whether an answer makes the same calls with equal arguments, in any order."""
    return _multiset(reference.calls) == _multiset(answer.calls)


def _multiset(calls: Sequence[Call]) -> Counter[tuple[str, str]]:
    return Counter((call.name, json.dumps(_canonical_value(call.arguments), sort_keys=True)) for call in calls)


def _canonical_value(value: Any) -> Any:
    """A JSON value in which equal numbers are written equally: 3.0 is 3, as in JSON Schema."""
    if isinstance(value, dict):
        return {key: _canonical_value(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_canonical_value(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
