"""Values and types in Python's notation, as some function-calling sets have them.

Text is parsed and never evaluated.
"""

from __future__ import annotations

import ast
import math
import re
from typing import Any

CONSTANTS = {"true": True, "false": False, "null": None}
"""JSON's names, which are not Python's."""


def python_value(text: str) -> Any:
    """The JSON value of a Python literal: "{'unit': 'cm', 'round': true}"  ->  {"unit": "cm", "round": True}

    Raises:
        ValueError: it is not a literal, or not one that JSON can hold.
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a Python literal: {error}") from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() as text):
            text.encode()  # half of a surrogate pair is a UnicodeEncodeError, which is a ValueError
            return text
        case ast.Constant(value=None | bool() | int() as value):
            return value
        case ast.Constant(value=float() as number) if math.isfinite(number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)) if math.isfinite(number):
            return -number
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
            return [_value(part) for part in parts]
        case ast.Dict(keys=keys, values=values) if all(map(_is_text, keys)):
            found = {_value(key): _value(value) for key, value in zip(keys, values, strict=True) if key}
            if len(found) < len(keys):
                raise ValueError("a key is given twice")
            return found
    raise ValueError("not a literal that JSON can hold")


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def python_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Calls in ToolACE's notation, whose names may have spaces: "[Get Weather(days=2)]"  ->  [("Get Weather", {...})]

    Raises:
        ValueError: it is not a list of calls with named arguments.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError("not a list of calls")
    return [_call(call) for call in _divided(text[1:-1])]


def _call(text: str) -> tuple[str, dict[str, Any]]:
    name, opening, rest = text.strip().partition("(")
    if not (opening and name.strip() and rest.endswith(")")):
        raise ValueError("not a call")
    arguments = {}
    for argument in _divided(rest[:-1]):
        key, sign, value = argument.partition("=")
        if not sign or not key.strip():
            raise ValueError("an argument without a name")
        if key.strip() in arguments:
            raise ValueError("an argument is given twice")
        arguments[key.strip()] = python_value(value)
    return name.strip(), arguments


_MARKS = re.compile(r"""\\.|["'\[\](){},]""", re.DOTALL)


def _divided(text: str) -> list[str]:
    """Parts between the commas that are outside brackets and quotes."""
    parts, start, depth, quote = [], 0, 0, ""
    for found in _MARKS.finditer(text):
        mark = found[0]
        if quote:
            quote = "" if mark == quote else quote
        elif mark in "\"'":
            quote = mark
        elif mark in "[({":
            depth += 1
        elif mark in "])}":
            depth -= 1
        elif mark == "," and not depth:
            parts.append(text[start : found.start()])
            start = found.end()
        if depth < 0:
            break
    if depth or quote:
        raise ValueError("brackets or quotes that are not closed")
    parts.append(text[start:])
    return parts if len(parts) > 1 or text.strip() else []


TYPES = {
    "str": "string", "string": "string", "char": "string", "int": "integer", "integer": "integer", "long": "integer",
    "float": "number", "double": "number", "number": "number", "bool": "boolean", "boolean": "boolean", "list": "array",
    "array": "array", "tuple": "array", "set": "array", "sequence": "array", "iterable": "array", "dict": "object",
    "object": "object", "mapping": "object", "hashmap": "object", "none": "null", "null": "null",
}  # fmt: skip
"""Name of a type in lower case -> JSON Schema's."""


def json_type(text: str) -> tuple[dict[str, Any], bool]:
    """The JSON Schema of a type in Python's notation, and whether it is optional.

    What has no counterpart is in `x-type`, as it was written.

    "List[int], optional"  ->  ({"type": "array", "items": {"type": "integer"}}, True)
    "np.ndarray"           ->  ({"x-type": "np.ndarray"}, False)
    """
    name, *words = [part.strip() for part in _divided_type(text)]
    optional = any(word.lower().startswith(("optional", "default")) for word in words)
    if outer := re.fullmatch(r"Optional\[(.*)\]", name, re.DOTALL):
        name, optional = outer[1], True
    schema, exact = _type(name)
    exact = exact and all(word.lower() in {"", "optional"} for word in words)  # a default may be among the words
    return schema if exact else {**schema, "x-type": text}, optional


def _divided_type(text: str) -> list[str]:
    try:
        return _divided(text) or [text]
    except ValueError:
        return [text]


def _type(name: str) -> tuple[dict[str, Any], bool]:
    """The JSON Schema of a type, and whether it says all that the type does."""
    outer, bracket, inner = name.strip().partition("[")
    kind = outer.strip().removeprefix("typing.").lower()
    written = map(str.strip, _divided_type(inner.rpartition("]")[0])) if bracket else ()
    parts = [part for part in written if part not in {"", "..."}]
    if kind == "union" and parts:
        read = [_type(part) for part in parts]
        return {"anyOf": [schema for schema, _ in read]}, all(exact for _, exact in read)
    if kind not in TYPES:
        return {}, kind == "any" and not bracket
    found: dict[str, Any] = {"type": TYPES[kind]}
    if not bracket:
        return found, kind not in {"char", "set"}
    exact = False
    if TYPES[kind] == "array" and parts and len(set(parts)) == 1:
        items, exact = _type(parts[0])
        found |= {"items": items} if items else {}
        exact = exact and len(parts) == 1 and kind not in {"tuple", "set"}
    return found, exact
