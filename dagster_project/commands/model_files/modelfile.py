"""The Modelfile with which Ollama serves a GGUF file: its template in Ollama's
language, if the model's chat template can be written in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message
from dagster_project.core.rendering import end_tokens, render

ROLES = ("system", "user", "assistant")
_WORDS = {role: f"pedigree7{role}" for role in ROLES}


@dataclass(frozen=True)
class Parts:
    """A chat template that writes each message by itself: text before and after
    the content of each role, and before an answer."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    default_system: str = ""
    """Content of the system message that it adds to a conversation without one."""

    def text(self, messages: Sequence[Message]) -> str:
        """A conversation with the beginning of an answer, as Ollama renders it."""
        given = list(messages)
        if self.default_system and given[0]["role"] != "system":
            given = [{"role": "system", "content": self.default_system}, *given]
        text = ""
        for message in given:
            before, after = getattr(self, message["role"])
            text += before + message["content"] + after
        return text + self.answer


def parts_of(tokenizer: Any) -> Parts | None:
    """None: the template writes a message in a way that depends on others, or does not take all roles."""
    try:
        return _parts_of(tokenizer)
    except InputError:
        return None


def _parts_of(tokenizer: Any) -> Parts | None:
    system, user, assistant = ({"role": role, "content": _WORDS[role]} for role in ROLES)
    asked = render(tokenizer, [system, user], False)
    answered = render(tokenizer, [system, user, assistant], False)
    again = render(tokenizer, [system, user, assistant, user], False)
    opened = render(tokenizer, [system, user], True)
    first = render(tokenizer, [system], False)
    continued = ((asked, first), (answered, asked), (again, answered), (opened, asked))
    if not all(longer.startswith(text) for longer, text in continued):
        return None
    pieces = (first, again.removeprefix(answered), answered.removeprefix(asked))
    if any(piece.count(_WORDS[role]) != 1 for piece, role in zip(pieces, ROLES, strict=True)):
        return None
    around = [tuple(piece.split(_WORDS[role])) for piece, role in zip(pieces, ROLES, strict=True)]
    parts = Parts(around[0], around[1], around[2], opened.removeprefix(asked))  # type: ignore[arg-type]
    alone = render(tokenizer, [user], True)
    if alone != parts.text([user]):
        before, after = parts.system
        default = alone.removeprefix(before).removesuffix(after + parts.text([user]))
        parts = replace(parts, default_system=default)
    texts = (*parts.system, *parts.user, *parts.assistant, parts.answer, parts.default_system)
    if any(mark in text for text in texts for mark in ("{{", '"""')):
        return None
    probes = ([user], [system, user], [system, user, assistant, user], [user, assistant, user])
    return parts if all(parts.text(probe) == render(tokenizer, probe, True) for probe in probes) else None


def modelfile(tokenizer: Any, file: str) -> str:
    """Text of the Modelfile."""
    lines = [f"FROM ./{file}"]
    parts = parts_of(tokenizer)
    if parts is None:
        lines.append(
            "# The model's chat template is in the file."
            " It cannot be written in Ollama's language of templates: check what Ollama makes of it."
        )
    else:
        if _writes_tools(tokenizer):
            lines.append(
                "# TEMPLATE writes system, user and assistant messages only. The model's chat template, which is in the"
                " file, also writes tools: with Ollama their definitions, calls and results are left out."
            )
        lines.append(f'TEMPLATE """{_template(parts)}"""')
        lines += [f'SYSTEM """{parts.default_system}"""'] if parts.default_system else []
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in end_tokens(tokenizer)]
    # as in evaluation; by itself, Ollama penalizes repetitions by 1.1
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"


def _writes_tools(tokenizer: Any) -> bool:
    asked = [{"role": "user", "content": _WORDS["user"]}]
    tool = {"name": "pedigree7tool", "description": "", "parameters": {"type": "object", "properties": {}}}
    try:
        return "pedigree7tool" in render(tokenizer, asked, tools=[{"type": "function", "function": tool}])
    except InputError:  # the template refuses tools
        return False


def _template(parts: Parts) -> str:
    def of_role(role: str) -> str:
        before, after = getattr(parts, role)
        return f"{before}{{{{ .Content }}}}{after}"

    return (
        f'{{{{- range .Messages }}}}{{{{ if eq .Role "system" }}}}{of_role("system")}{{{{ else if eq .Role "user"'
        f' }}}}{of_role("user")}{{{{ else if eq .Role "assistant" }}}}{of_role("assistant")}{{{{ end }}}}{{{{ end'
        f" }}}}{parts.answer}"
    )
