"""How model families write tool calls in their answers.

A new form is one function in FORMS, its test and its line in docs/evaluation.md.

    Hermes, Qwen2.5, Qwen3   <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>
    Llama 3.1                {"name": "weather", "parameters": {"city": "Oslo"}}
    LFM2, ToolACE            [weather(city="Oslo")]

Text is parsed and never executed. A call that cannot be read has an empty name, or its text instead of arguments, so
that it counts as invalid and not as missing.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dagster_project.core.messages import Call, Tools, tool_names


class Found(NamedTuple):
    """Calls in a text, and the text without them."""

    calls: list[Call]
    rest: str


Form = Callable[[str, Tools], Found | None]
"""(text, tools that were offered) -> the calls, or None if the text has none of this form."""

NAME_KEYS = ("name", "tool_name")
ARGUMENT_KEYS = ("arguments", "parameters")
IDENTITY_KEYS = ("id", "tool_call_id")


def _json_call(value: Any, source: str) -> Call:
    """A call from its JSON object; one without a name or arguments keeps its source."""
    if not isinstance(value, dict):
        return Call("", source, None)
    value = value["function"] if isinstance(value.get("function"), dict) else value
    name = next((value[key] for key in NAME_KEYS if isinstance(value.get(key), str)), "")
    identity = next((value[key] for key in IDENTITY_KEYS if isinstance(value.get(key), str)), None)
    arguments = next((value[key] for key in ARGUMENT_KEYS if key in value), None)
    if arguments is None:
        return Call(name, source, identity)
    return Call(name, _decoded(arguments) if isinstance(arguments, str) else arguments, identity)


def _decoded(text: str) -> Any:
    """Arguments from JSON; the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _json_calls(text: str) -> list[Call]:
    """Calls from an object, a list of objects, or objects separated by spaces, commas or semicolons."""
    decoder, calls, place = json.JSONDecoder(), list[Call](), 0
    text = text.strip()
    while place < len(text):
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return [*calls, Call("", text[place:], None)]
        for one in value if isinstance(value, list) else [value]:
            calls.append(_json_call(one, text[place:end]))
        place = end + len(text[end:]) - len(text[end:].lstrip(" \t\r\n;,"))
    return calls


def _blocks(pattern: str, read: Callable[[re.Match[str], Tools], list[Call]]) -> Form:
    """A form that marks each call, or each list of calls, by a pattern."""
    compiled = re.compile(pattern, re.DOTALL)

    def form(text: str, tools: Tools) -> Found | None:
        calls = [call for match in compiled.finditer(text) for call in read(match, tools)]
        return Found(calls, compiled.sub("", text)) if calls else None

    return form


def _body(match: re.Match[str], tools: Tools) -> list[Call]:
    return _json_calls(match["body"])


def _named_body(match: re.Match[str], tools: Tools) -> list[Call]:
    return [Call(match["name"], _decoded(match["body"].strip()) if match["body"].strip() else {}, None)]


def _schema(tools: Tools, name: str) -> Mapping[str, Any]:
    """JSON Schemas of a tool's arguments, by name."""
    functions = (tool.get("function", tool) for tool in tools or ())
    found = next((function.get("parameters") for function in functions if function.get("name") == name), None)
    properties = found.get("properties") if isinstance(found, dict) else None
    return properties if isinstance(properties, dict) else {}


def _kinds(schema: Any) -> list[Any]:
    """The types that a schema names, itself or as alternatives, as of an optional argument."""
    schemas = [schema] if isinstance(schema, dict) else []
    for key in ("anyOf", "oneOf"):
        alternatives = schemas[0].get(key) if schemas else None
        schemas += [one for one in alternatives if isinstance(one, dict)] if isinstance(alternatives, list) else []
    named = [one.get("type") for one in schemas]
    return [kind for kinds in named for kind in (kinds if isinstance(kinds, list) else [kinds])]


def _typed(text: str, schema: Any) -> Any:
    """An argument that is written without quotes: null or text where the tool's schema allows it, else JSON."""
    kinds = _kinds(schema)
    if "null" in kinds and text in {"null", "None"}:
        return None
    if "string" in kinds:
        return text
    value = _decoded(text)
    return {"True": True, "False": False, "None": None}.get(text, value) if isinstance(value, str) else value


def _tagged(argument: str, closed: Callable[[re.Match[str]], bool]) -> Callable[[re.Match[str], Tools], list[Call]]:
    """Reader of calls whose arguments are in tags with a name and a value."""
    tag = re.compile(argument, re.DOTALL)

    def read(match: re.Match[str], tools: Tools) -> list[Call]:
        name, body = match["name"].strip(), match["body"]
        if not closed(match) or tag.sub("", body).strip():
            return [Call(name, body.strip(), None)]  # cut, or with something other than arguments
        schema = _schema(tools, name)
        return [Call(name, {key: _typed(value, schema.get(key)) for key, value in tag.findall(body)}, None)]

    return read


MISTRAL_CALL = re.compile(r"(?P<name>[\w.-]+)(?:\[CALL_ID\](?P<id>[\w-]+))?(?:\[ARGS\])?\s*(?=\{)")


def _mistral(match: re.Match[str], tools: Tools) -> list[Call]:
    """`[{"name": ..., "arguments": ...}]`, or `name[ARGS]{...}`, as later versions write."""
    body = match["body"].strip()
    named = MISTRAL_CALL.match(body)
    if not named:
        return _json_calls(body)
    return [Call(named["name"], _decoded(body[named.end() :].strip()), named["id"])]


def _python(source: str, tools: Tools) -> list[Call] | None:
    """Calls from a list in Python's syntax, `[weather(city="Oslo", days=3)]`; None if it is not such a list.

    Names that are not Python's, such as "Market Trends API", are replaced while parsing.
    """
    aliases = {f"tool_{i}_": name for i, name in enumerate(tool_names(tools)) if not name.isidentifier()}
    for alias, name in sorted(aliases.items(), key=lambda item: -len(item[1])):
        source = source.replace(f"{name}(", f"{alias}(")
    try:
        tree = ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(tree, ast.List) or not tree.elts or not all(isinstance(node, ast.Call) for node in tree.elts):
        return None
    calls = []
    for node in tree.elts:
        assert isinstance(node, ast.Call)
        name = ast.unparse(node.func)
        try:
            if node.args or any(keyword.arg is None for keyword in node.keywords):
                raise ValueError("positional arguments have no name")
            arguments: Any = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
        except ValueError:
            arguments = ast.unparse(node)
        calls.append(Call(aliases.get(name, name), arguments, None))
    return calls


JSON_NAMES = {"true": True, "false": False, "null": None}


def _literal(node: ast.expr) -> Any:
    """The value of a Python or JSON literal.

    Raises:
        ValueError: anything else, e.g. a name or a nested call.
    """
    if isinstance(node, ast.Name) and node.id in JSON_NAMES:
        return JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        items = zip(node.keys, node.values, strict=True)
        return {_literal(key): _literal(value) for key, value in items if key is not None}
    try:
        value = ast.literal_eval(node)
    except (TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{value!r} is not JSON")
    return value


PYTHON_MARKED = re.compile(r"<\|tool_call_start\|>(?P<body>.*?)(?:<\|tool_call_end\|>|\Z)", re.DOTALL)


def _marked_python(text: str, tools: Tools) -> Found | None:
    bodies = [match["body"] for match in PYTHON_MARKED.finditer(text)]
    calls = [call for body in bodies for call in _python(body, tools) or _json_calls(body)]
    return Found(calls, PYTHON_MARKED.sub("", text)) if calls else None


def _bare_python(text: str, tools: Tools) -> Found | None:
    """The whole text is a list of calls, perhaps after `<|python_start|>` (Llama 4)."""
    calls = _python(re.sub(r"\A\s*<\|python_start\|>|<\|python_end\|>\s*\Z", "", text), tools)
    return Found(calls, "") if calls else None


QUOTE, NONE = '<|"|>', re.compile(r"(?<=[:,\[])None(?=[,}\]])")


def library_calls(message: Mapping[str, Any]) -> list[Call]:
    """The calls of a message that transformers parsed."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [Call(function["name"], function.get("arguments") or {}, None) for function in functions]


def _gemma(text: str, tools: Tools) -> Found | None:
    """Gemma 4: JSON with keys and texts in its own marks, and Python's None for null.

    TRL describes the marks and transformers parses them.
    """
    if "<|tool_call>call:" not in text:
        return None
    from transformers.utils.chat_parsing import parse_response
    from trl.chat_template_utils import gemma4_template

    try:
        parts = text.split(QUOTE)
        parts[::2] = [NONE.sub("null", part) for part in parts[::2]]  # the others are texts
        message = parse_response(QUOTE.join(parts), gemma4_template, prefix="", tools=list(tools or ()))
    except (ValueError, TypeError, RecursionError):
        return Found([Call("", text, None)], "")
    made = library_calls(message)
    return Found(made, message.get("content") or "") if made else None


BARE_JSON = re.compile(
    r"""\A\s*(?:<\|python_tag\|>)?\s*(?P<body>\[?\s*\{(?:\s*"(?:type|id)"\s*:\s*"[^"]*"\s*,)*(?:\s*"function"\s*:\s*\{)?
    \s*"name"\s*:\s*"[^"]*"\s*,\s*"(?:arguments|parameters)"\s*:.*)\Z""",
    re.DOTALL | re.VERBOSE,
)


def _bare_json(text: str, tools: Tools) -> Found | None:
    """The whole text is JSON that begins with a name and arguments. Other JSON is content."""
    match = BARE_JSON.match(text)
    return Found(_json_calls(match["body"]), "") if match else None


def _ends_with(ending: str) -> Callable[[re.Match[str]], bool]:
    return lambda match: match[0].rstrip().endswith(ending)


FORMS: dict[str, Form] = {
    "tool_call with function tags": _blocks(
        r"(?:<tool_call>\s*)?<function=(?P<name>[^>\n]+)>(?P<body>.*?)(?:</function>(?:\s*</tool_call>)?|\Z)",
        _tagged(r"<parameter=([^>\n]+)>\s?(.*?)\s?</parameter>", lambda match: "</function>" in match[0]),
    ),
    "tool_call with argument tags": _blocks(
        r"<tool_call>\s*(?P<name>[^\s<{\[]+)\s*(?P<body>.*?)(?:</tool_call>|\Z)",
        _tagged(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", _ends_with("</tool_call>")),
    ),
    "tool_call with JSON": _blocks(r"<tool_call>\s*(?P<body>[{\[].*?)(?:</tool_call>|\Z)", _body),
    "invoke": _blocks(
        r"(?:(?:<\|start\|>assistant)?\s*to=[^\s<]+<\|message\|>)?\s*(?:<(?:\w+:)?function_calls>\s*)?"
        r"<(?:\w+:)?invoke name=\"(?P<name>[^\"]+)\">(?P<body>.*?)"
        r"(?:</(?:\w+:)?invoke>(?:\s*</(?:\w+:)?function_calls>)?(?:<\|eom\|>)?|\Z)",
        _tagged(
            r"<(?:\w+:)?parameter name=\"([^\"]+)\">(.*?)</(?:\w+:)?parameter>", lambda match: "invoke>" in match[0]
        ),
    ),
    "tool_call list": _blocks(r"<\|tool_call\|>\s*(?P<body>\[.*?)(?:<\|/tool_call\|>|\Z)", _body),
    "TOOL_CALLS": _blocks(r"\[TOOL_CALLS\](?P<body>.*?)(?=\[TOOL_CALLS\]|\Z)", _mistral),
    "channels": _blocks(
        r"(?:<\|start\|>assistant)?\s*(?:<\|channel\|>commentary)?\s*"
        r"to=(?:functions\.)?(?P<name>[^\s<]+)[^{]*?<\|message\|>"
        r"(?P<body>.*?)(?:<\|call\|>|<\|end\|>|(?=<\|start\|>)|\Z)",
        _named_body,
    ),
    "DeepSeek": _blocks(
        r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^\s<]+?)(?:<｜tool▁sep｜>|\s)\s*(?:```json)?"
        r"(?P<body>.*?)(?:```)?\s*(?:<｜tool▁call▁end｜>|\Z)",
        _named_body,
    ),
    "action": _blocks(
        r"(?:<\|START_ACTION\|>|Action:\s*```json)\s*(?P<body>\[.*?)\s*(?:<\|END_ACTION\|>|```|\Z)", _body
    ),
    "Python list, marked": _marked_python,
    "Python list": _bare_python,
    "Gemma": _gemma,
    "JSON": _bare_json,
}


def find_calls(text: str, tools: Tools, names: Sequence[str] = ()) -> Found | None:
    """The calls in a text by the first form that has any.

    Args:
        tools: the tools that were offered; without tools nothing is a call.
        names: the forms to try; all if empty.
    """
    forms: Iterator[Form] = (FORMS[name] for name in names or FORMS)
    return next((found for form in forms if (found := form(text, tools))), None) if tools else None
