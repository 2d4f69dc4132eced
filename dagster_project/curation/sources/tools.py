"""Tool definitions and tool calls of a source -> OpenAI's form, whose arguments are parsed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dagster_project.core.messages import JSON
from dagster_project.curation.sources.files import parse_json
from dagster_project.curation.sources.python_values import json_type, python_value

Tools = list[dict[str, Any]]
TOOL_KEYS = ("tools", "functions")
"""Keys of a row for tool definitions. The first that holds any is read."""
SCHEMA_KEYS = ("input_schema", "inputSchema", "parametersJsonSchema", "parameters_json_schema")
"""Keys of a tool for its `parameters`: Anthropic's, that of the Model Context Protocol, and Gemini's for a JSON
Schema."""
DECLARATIONS = ("functionDeclarations", "function_declarations", "toolSpec")
"""Keys of Gemini for the functions of a tool, and of Amazon Bedrock for a tool."""
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
"""Keys of a call for its arguments: OpenAI's, Llama's, LangChain's and Anthropic's. The first that holds any is
read."""


def definitions(value: Any) -> Tools | None:
    """Tool definitions in OpenAI's form: '[{"name": "add"}]'  ->  [{"type": "function", "function": {"name": "add"}}]

    Args:
        value: a list of definitions or one definition, or JSON text of these. None, "", [] and {} mean no tools.
    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = parse_json(value)
        except ValueError:
            raise ValueError("tools is text that is not JSON") from None
    if value is None or value == [] or value == {}:
        return None
    if isinstance(value, dict):
        value = value["tools"] if isinstance(value.get("tools"), list) and "name" not in value else [value]
    if not isinstance(value, list):
        raise ValueError(f"tools must be a list of functions, found {type(value).__name__}")
    return [_definition(tool) for given in value for tool in _declared(given)] or None


def _declared(tool: Any) -> list[Any]:
    """The functions of one tool of Gemini or Bedrock; any other tool as it is."""
    key = next((key for key in DECLARATIONS if isinstance(tool, dict) and key in tool), "")
    if not key:
        return [tool]
    if any(value not in (None, "", [], {}) for name, value in tool.items() if name != key):
        raise ValueError("tools holds a tool that is not a function")
    given = tool[key] if isinstance(tool[key], list) else [tool[key]]
    return [_in_json_schema(function) if isinstance(function, dict) else function for function in given]


def _in_json_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function with JSON Schemas: Gemini's types are in capitals, and Bedrock's schema is under `json`."""
    found = dict(function)
    for key in ("parameters", "response"):
        if isinstance(found.get(key), dict):
            found[key] = with_json_types(found[key])
    schema = found.get("inputSchema")
    return {**found, "inputSchema": schema["json"]} if isinstance(schema, dict) and set(schema) == {"json"} else found


def _definition(tool: Any) -> dict[str, Any]:
    if isinstance(tool, str):
        try:
            tool = parse_json(tool)
        except ValueError:
            raise ValueError("tools holds text that is not JSON") from None
    if not isinstance(tool, dict):
        raise ValueError(f"each of tools must be an object, found {type(tool).__name__}")
    if isinstance(tool.get("function"), dict):
        wrapped = {"type": "function", **tool} if "type" not in tool else tool
    elif tool.get("type") in (None, "function"):
        wrapped = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    elif isinstance(tool.get("name"), str) and isinstance(tool.get("parameters", {}), dict):
        wrapped = {"type": "function", "function": tool}
    else:
        raise ValueError("tools holds a tool that is not a function")
    function = wrapped["function"]
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("tools holds a function without a name")
    if "parameters" not in function and (given := next((key for key in SCHEMA_KEYS if key in function), "")):
        function = {("parameters" if key == given else key): value for key, value in function.items()}
    parameters = function.get("parameters")
    if isinstance(parameters, str) and isinstance(parsed := _json_or_none(parameters), dict):
        function, parameters = {**function, "parameters": parsed}, parsed  # a table has one type for all schemas
    if isinstance(parameters, dict) and _is_untyped(parameters):
        function = {**function, "parameters": _schema(parameters)}
    return wrapped if function is wrapped["function"] else {**wrapped, "function": function}


def _json_or_none(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _is_untyped(parameters: Mapping[str, Any]) -> bool:
    """Whether parameters are listed by name, as in xLAM's data, and not in a JSON Schema."""
    typed = [isinstance(one, dict) and isinstance(one.get("type"), str) for one in parameters.values()]
    return bool(typed) and all(typed)


def _schema(parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A JSON Schema for parameters with Python's types:

    {"n": {"type": "int"}, "unit": {"type": "str, optional"}}  ->
    {"type": "object", "properties": {"n": {"type": "integer"}, "unit": {"type": "string"}}, "required": ["n"]}

    What JSON Schema cannot say is kept as `x-type` and `x-required`.
    """
    properties, required = {}, []
    for name, parameter in parameters.items():
        kind, optional = json_type(parameter["type"])
        declared = parameter.get("required")
        odd = {} if isinstance(declared, bool | None) else {"x-required": declared}
        rest = {key: value for key, value in parameter.items() if key not in {"type", "required"}}
        properties[name] = {**kind, **odd, **rest}
        if declared is True or (declared is None and not optional and "default" not in parameter):
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def with_json_types(schema: Any) -> Any:
    """A schema whose `type`s are JSON Schema's: {"type": "dict", "required": None}  ->  {"type": "object"}"""
    if isinstance(schema, list):
        return [with_json_types(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties" and isinstance(value, dict):
            found[key] = {name: with_json_types(one) for name, one in value.items()}
        elif key == "type" and isinstance(value, str):
            found |= json_type(value)[0]
        elif key in {"items", "parameters", "anyOf"}:
            found[key] = with_json_types(value)
        elif not (key == "required" and value is None):
            found[key] = value
    return found


def calls(value: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Tool calls in OpenAI's form, and the keys of calls that are not used.

    Args:
        value: a list of calls or one call, or JSON text of these. A call is {"function": {"name", "arguments"}} or
            {"name", "arguments"}.
    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        if not value.strip():
            return [], []
        value = _parsed(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"expected tool calls, found {type(value).__name__}")
    unused: list[str] = []
    return [_call(call, unused) for call in value], unused


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        pass
    try:
        return python_value(text)
    except ValueError:
        raise ValueError("a tool call is text that is not JSON") from None


def _call(call: Any, unused: list[str]) -> dict[str, Any]:
    if isinstance(call, str):
        call = _parsed(call)
    if not isinstance(call, dict):
        raise ValueError(f"a tool call must be an object, found {type(call).__name__}")
    rest = dict(call)
    function = rest.pop("function", None)
    inner = dict(function) if isinstance(function, dict) else rest
    identity = rest.pop("id", None)
    if rest.pop("type", None) not in (None, "", "function"):
        unused.append("tool_calls[].type")
    name = inner.pop("name", function if isinstance(function, str) else None)
    if not isinstance(function, dict) and function not in (None, "", name):
        unused.append("tool_calls[].function")
    if not isinstance(name, str) or not name:
        raise ValueError("a tool call has no name")
    arguments = next((held for key in ARGUMENT_KEYS if (held := inner.pop(key, None)) is not None), None)
    unused += [f"tool_calls[].{key}" for key, held in rest.items() if held is not None]
    if inner is not rest:
        unused += [f"tool_calls[].function.{key}" for key, held in inner.items() if held is not None]
    return call_of(name, arguments, identity)


def call_of(name: str, arguments: Any, identity: Any = None) -> dict[str, Any]:
    """A canonical call.

    Arguments are an object; where they are none, their text, which the check invalid_tool_call reports.
    """
    if identity is not None and not isinstance(identity, str | int):
        raise ValueError(f"the id of a tool call must be text, found {type(identity).__name__}")
    known = {} if identity is None or identity == "" else {"id": str(identity)}
    return {"type": "function", **known, "function": {"name": name, "arguments": _arguments(arguments)}}


def _arguments(value: Any) -> Any:
    if value is None:
        return {}
    if isinstance(value, str):
        if not value.strip():
            return {}
        try:
            parsed = parse_json(value)
        except ValueError:
            return value
        return parsed if isinstance(parsed, dict) else value
    return value if isinstance(value, dict) else JSON.encode(value)


def result_text(value: Any) -> str:
    """The content of a tool result, which may be an object: {"ok": true}  ->  '{"ok": true}'"""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
