"""The files of a new project, as templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dagster_project.views.texts import environment

PLAIN = re.compile(r"[A-Za-z_/][\w./@+-]*", re.ASCII)
RESERVED = {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}


def rendered(file: str, /, **values: object) -> str:
    """The content of a file."""
    return TEMPLATES.get_template(f"{file}.jinja").render(values)


def flow(value: Any) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in RESERVED else as_yaml(value)
    return "1.0e-3" if value == 1e-3 else json.dumps(value)


def one_line(text: str) -> str:
    """The beginning of a text, for a comment."""
    return text if PLAIN.fullmatch(text) else as_yaml(text[:40])


def as_yaml(value: Any) -> str:
    """A value as JSON on one line that is YAML, too, which does not have JSON's escapes of characters such as emoji."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)


TEMPLATES = environment(Path(__file__).parent)
TEMPLATES.filters.update(flow=flow, one_line=one_line)
