"""The chat template of training: the base model's, a built-in one, or a Jinja file of the project.

transformers renders it in jinja2's ImmutableSandboxedEnvironment. Every template is first tested on four small conversations in a process
with limited time and memory.
"""

from __future__ import annotations

import os
import re
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import examples_of
from dagster_project.core.errors import InputError
from dagster_project.core.named_templates import NAMED, written_for
from dagster_project.core.params import inside
from dagster_project.core.rendering import with_constant_date

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

FILE = "chat_template.jinja"
"""Name of the template in a model's folder, as transformers reads and writes it."""
FOLDER = "data/templates"
"""Folder of the project's templates, tracked by DVC."""
WHERE = "params.yaml: tokenized.chat_template"

SECONDS = 5
"""Maximum processor seconds for rendering four small conversations."""
MEMORY = 1 << 30
"""Maximum additional bytes for rendering them."""

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
PROBES = (
    [USER, ANSWER],
    [{"role": "system", "content": "Be kind."}, USER, ANSWER],
    [USER, ANSWER, USER, ANSWER],
    [USER, ANSWER, {"role": "tool", "content": "42"}, ANSWER],
)
"""Every template must render the first. It may refuse the others (many refuse system or tool turns), but must terminate."""


def locate(root: Path, name: str | None) -> Path | None:
    """The file of a template given by its path; None for the base model's template and those of NAMED.

    Raises:
        InputError: no such name or file, or a file that DVC does not track.
    """
    if name is None or name in NAMED:
        return None
    if "/" not in name:
        raise InputError(f"{WHERE}: {name!r} is not a known template", f"use {', '.join(NAMED)}, or a file in {FOLDER}/ by its path")
    path = inside(root, name, "tokenized.chat_template")
    if not path.is_relative_to((root / FOLDER).resolve()) or not path.is_file():
        raise InputError(f"{WHERE}: {name} is not a file in {FOLDER}/", f"move it to {FOLDER}/, which DVC tracks")
    return path


def use(tokenizer: Any, root: Path, name: str | None) -> str | None:
    """Check a template and set it as the tokenizer's.

    Returns:
        The template's text; None if the base model has none and none is configured.
    Raises:
        InputError: it is not Jinja, accesses private attributes, is not deterministic, fails, takes too long, or does not write the
            assistant's content followed by the end-of-turn token.
    """
    path = locate(root, name)
    where = f"{WHERE}: {name}" if name else "data/base_model: its chat template"
    if path is not None:
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
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
    """Refuse templates that access private attributes, which the sandbox renders as nothing, or that are not deterministic.

    Today's date in a constant format is replaced before (`rendering.with_constant_date`).

    Raises:
        InputError: such a template, or one that is not Jinja.
    """
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", source))  # a tag that transformers adds
    except TemplateSyntaxError as error:
        raise InputError(f"{where}: line {error.lineno}: {error.message}", "fix the template") from None
    accessed = [(node.lineno, node.attr) for node in tree.find_all(nodes.Getattr)]
    accessed += [(node.lineno, node.arg.value) for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)]
    called = [(node.lineno, node.node.name) for node in tree.find_all(nodes.Call) if isinstance(node.node, nodes.Name)]
    called += [(node.lineno, node.name) for node in tree.find_all(nodes.Filter)]
    for line, name in sorted((line, name) for line, name in accessed if str(name).startswith("_")):
        raise InputError(f"{where}: line {line}: accesses the private attribute `{name}`, which templates may not use", "fix the template")
    for line, name in sorted(called):
        if name == "attr":
            raise InputError(f"{where}: line {line}: `attr` accesses attributes by name, which templates may not use", "fix the template")
        if name in {"strftime_now", "random", "lipsum"}:
            raise InputError(
                f"{where}: line {line}: `{name}` is not deterministic, so two runs would not give the same bytes",
                f"copy the template to {FOLDER}/, replace it by a constant, and set tokenized.chat_template to the file",
            )


def try_template(tokenizer: Any, where: str) -> None:
    """Render PROBES with limited time and memory.

    Raises:
        InputError: the template fails on the first one, takes too long, or needs too much memory.
    """
    import multiprocessing

    context = multiprocessing.get_context("fork")  # the child inherits the tokenizer, so nothing is imported or read again
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_render_probes, args=(tokenizer, sender), daemon=True)
    child.start()
    sender.close()
    try:
        problem = receiver.recv()
    except EOFError:
        child.join()
        slow = child.exitcode == -signal.SIGXCPU
        problem = (
            f"takes more than {SECONDS} s for a short conversation"
            if slow
            else f"terminates the process that renders it (exit code {child.exitcode})"
        )
    child.join()
    if problem:
        raise InputError(f"{where}: {problem}", "fix the template, or use another one")


def _render_probes(tokenizer: Any, sender: Connection) -> None:
    memory = Path("/proc/self/statm")
    if memory.exists():
        used = int(memory.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    problem = ""
    for probe in PROBES:
        try:
            examples_of(tokenizer, {"messages": probe})
        except InputError as error:
            if probe is PROBES[0]:
                problem = error.what
                break
    sender.send(problem)
