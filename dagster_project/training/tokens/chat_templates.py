"""The chat template of training: the base model's, a built-in one, or a Jinja file of the project.

It is rendered in another process with limited time and memory (`core.bounded_templates`), and first tested on four
small conversations.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dagster_project.core.bounded_templates import TemplateLimit
from dagster_project.core.chat import examples_of
from dagster_project.core.errors import InputError
from dagster_project.core.named_templates import NAMED, written_for
from dagster_project.core.params import inside
from dagster_project.core.rendering import with_constant_date
from dagster_project.core.text import shortened

FILE = "chat_template.jinja"
"""Name of the template in a model's folder, as transformers reads and writes it."""
FOLDER = "data/templates"
"""Folder of the project's templates, tracked by DVC."""
WHERE = "params.yaml: tokenized.chat_template"

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
PROBES = (
    [USER, ANSWER],
    [{"role": "system", "content": "Be kind."}, USER, ANSWER],
    [USER, ANSWER, USER, ANSWER],
    [USER, ANSWER, {"role": "tool", "content": "42"}, ANSWER],
)
"""Every template must render the first. It may refuse the others (many refuse system or tool turns), but must
terminate."""


def locate(root: Path, name: str | None) -> Path | None:
    """The file of a template given by its path; None for the base model's template and those of NAMED.

    Raises:
        InputError: no such name or file, or a file that DVC does not track.
    """
    if name is None or name in NAMED:
        return None
    if "/" not in name:
        hint = f"use {', '.join(NAMED)}, or a file in {FOLDER}/ by its path"
        raise InputError(f"{WHERE}: {name!r} is not a known template", hint)
    path = inside(root, name, "tokenized.chat_template")
    if not path.is_relative_to((root / FOLDER).resolve()) or not path.is_file():
        raise InputError(f"{WHERE}: {name} is not a file in {FOLDER}/", f"move it to {FOLDER}/, which DVC tracks")
    return path


def use(tokenizer: Any, root: Path, name: str | None) -> str | None:
    """Check a template and set it as the tokenizer's.

    Returns:
        The template's text; None if the base model has none and none is configured.
    Raises:
        InputError: it is not Jinja, accesses private attributes, is not deterministic, fails, takes too long, or does
            not write the assistant's content followed by the end-of-turn token.
    """
    path = locate(root, name)
    where = f"{WHERE}: {name}" if name else "data/base_model: its chat template"
    if path is not None:
        try:
            # without a byte order mark, which would begin every conversation
            tokenizer.chat_template = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"{where}: is not UTF-8 text", "save it as UTF-8") from None
    elif name is not None:
        tokenizer.chat_template = written_for(tokenizer, name, where)
    elif not tokenizer.chat_template:
        return None
    source = tokenizer.chat_template = with_constant_date(str(tokenizer.get_chat_template()))
    refuse_unsafe(source, where)
    try_template(tokenizer, where)
    return source


def refuse_unsafe(source: str, where: str) -> None:
    """Refuse templates that are not deterministic, or access private attributes, which the sandbox renders as nothing.

    Today's date in a constant format is replaced before (`rendering.with_constant_date`).

    Raises:
        InputError: such a template, or one that is not Jinja.
    """
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    generation = r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}"  # a tag that transformers adds
    try:
        tree = environment.parse(re.sub(generation, "", source))
    except TemplateSyntaxError as error:
        raise InputError(f"{where}: line {error.lineno}: {shortened(str(error.message))}", "fix the template") from None
    except RecursionError:
        raise InputError(f"{where}: is nested too deeply", "fix the template") from None
    accessed = [(node.lineno, node.attr) for node in tree.find_all(nodes.Getattr)]
    items = tree.find_all(nodes.Getitem)
    accessed += [(node.lineno, node.arg.value) for node in items if isinstance(node.arg, nodes.Const)]
    called = [(node.lineno, node.node.name) for node in tree.find_all(nodes.Call) if isinstance(node.node, nodes.Name)]
    called += [(node.lineno, node.name) for node in tree.find_all(nodes.Filter)]
    for line, name in sorted((line, name) for line, name in accessed if str(name).startswith("_")):
        problem = f"line {line}: accesses the private attribute `{name}`, which templates may not use"
        raise InputError(f"{where}: {problem}", "fix the template")
    for line, name in sorted(called):
        if name == "attr":
            problem = f"line {line}: `attr` accesses attributes by name, which templates may not use"
            raise InputError(f"{where}: {problem}", "fix the template")
        if name in {"strftime_now", "random", "lipsum"}:
            raise InputError(
                f"{where}: line {line}: `{name}` is not deterministic, so two runs would not give the same bytes",
                f"copy the template to {FOLDER}/, replace it by a constant, and set tokenized.chat_template to the"
                " file",
            )


def try_template(tokenizer: Any, where: str) -> None:
    """Render PROBES.

    Raises:
        InputError: the template fails on the first one, takes too long, or needs too much memory.
    """
    for probe in PROBES:
        try:
            examples_of(tokenizer, {"messages": probe})
        except TemplateLimit as error:
            raise InputError(f"{where}: {error.what}", "fix the template, or use another one") from None
        except InputError as error:
            if probe is PROBES[0]:
                raise InputError(f"{where}: {error.what}", "fix the template, or use another one") from None
