"""The chat template a model is taught with: the base model's, one named here, or a Jinja file of the project.

Rendered by transformers alone, whose environment is jinja2's ImmutableSandboxedEnvironment. Whatever is named is first tried on four small
conversations in a process that may take only so much time and memory.
"""

from __future__ import annotations

import os
import re
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import adds_bos, pieces
from dagster_project.core.errors import InputError
from dagster_project.core.params import inside

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

FILE = "chat_template.jinja"
"""Name of the template in a model's folder, as transformers reads and writes it."""
FOLDER = "data/templates"
"""Where the project's own templates lie; DVC watches it."""
WHERE = "params.yaml: tokenized.chat_template"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% if message['role'] == 'assistant' and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""OpenAI's Chat Markup Language. Where the model ends a text with another token, that one follows the assistant's `<|im_end|>`, so that generation stops."""

ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\n### Instruction:\\n' + message['content'] }}"
    "{% elif message['role'] == 'tool' %}{{ '\\n\\n### Input:\\n' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\n### Response:\\n' + message['content'] + eos_token }}"
    "{% elif not loop.first %}{{ raise_exception('a system turn must come first') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
"""The prompt of Stanford Alpaca (Taori et al. 2023), its turns repeated for a conversation; the end-of-text token ends every response."""

NAMED = {"alpaca": ALPACA, "chatml": CHATML}

SECONDS = 5
"""Processor time that rendering four small conversations may take."""
MEMORY = 1 << 30
"""Bytes it may take beyond what the process has."""

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
PROBES = (
    [USER, ANSWER],
    [{"role": "system", "content": "Be kind."}, USER, ANSWER],
    [USER, ANSWER, USER, ANSWER],
    [USER, ANSWER, {"role": "tool", "content": "42"}, ANSWER],
)
"""The first must fit any template; the others only must not hang it, since many refuse system or tool turns."""


def locate(root: Path, name: str | None) -> Path | None:
    """The file of a template that is named by its path; None for the base model's own and for those of NAMED.

    Raises:
        InputError: no such name and no such file, or a file where DVC does not watch it.
    """
    if name is None or name in NAMED:
        return None
    if "/" not in name:
        raise InputError(f"{WHERE}: {name!r} is no template", f"use {', '.join(NAMED)}, or a file in {FOLDER}/ by its path")
    path = inside(root, name, "tokenized.chat_template")
    if not path.is_relative_to((root / FOLDER).resolve()) or not path.is_file():
        raise InputError(f"{WHERE}: {name} is not a file in {FOLDER}/", f"move it to {FOLDER}/, which DVC watches for changes")
    return path


def use(tokenizer: Any, root: Path, name: str | None) -> str | None:
    """Give the tokenizer its template, once it is known to be harmless and to let labels be placed.

    Returns: the template's text; None if the base model has none and none is named.
    Raises:
        InputError: it is not Jinja, reaches for attributes that are none of its business, reads the clock, fails, takes too long, or does
            not write the assistant's words and the end-of-turn token behind them.
    """
    path = locate(root, name)
    where = f"{WHERE}: {name}" if name else "data/base_model: its chat template"
    if path is not None:
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{where}: is not UTF-8 text", "save it as UTF-8") from None
    elif name is not None:
        for token in ("<|im_start|>", "<|im_end|>") if name == "chatml" else ():
            if not any(str(added) == token and added.special for added in tokenizer.added_tokens_decoder.values()):
                raise InputError(
                    f"{where}: the base model's tokenizer has no special token {token}", "use alpaca, or a template of your own"
                )
        # a tokenizer that begins texts with a token of its own adds none to a template, which therefore has to write it
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + NAMED[name]
    elif not tokenizer.chat_template:
        return None
    source = str(tokenizer.get_chat_template())
    refuse_tricks(source, where)
    _try(tokenizer, where)
    return source


def refuse_tricks(source: str, where: str) -> None:
    """Raises:
    InputError: not Jinja; or it reaches for what begins with `_`, which the sandbox would silently render as nothing; or it calls the clock or
        the dice, which would make two runs differ.
    """
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", source))  # a tag of transformers' own
    except TemplateSyntaxError as error:
        raise InputError(f"{where}: line {error.lineno}: {error.message}", "mend the template") from None
    reached = [(node.lineno, node.attr) for node in tree.find_all(nodes.Getattr)]
    reached += [(node.lineno, node.arg.value) for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)]
    called = [(node.lineno, node.node.name) for node in tree.find_all(nodes.Call) if isinstance(node.node, nodes.Name)]
    called += [(node.lineno, node.name) for node in tree.find_all(nodes.Filter)]
    for line, name in sorted((line, name) for line, name in reached if str(name).startswith("_")):
        raise InputError(f"{where}: line {line}: reaches for `{name}`, which is none of a template's business", "mend the template")
    for line, name in sorted(called):
        if name == "attr":
            raise InputError(f"{where}: line {line}: `attr` reaches for attributes by name, which no template needs", "mend the template")
        if name in {"strftime_now", "random", "lipsum"}:
            raise InputError(
                f"{where}: line {line}: `{name}` gives something else each time, so two runs would not give the same bytes",
                f"copy the template to {FOLDER}/, write a constant in its place, and name the file in tokenized.chat_template",
            )


def _try(tokenizer: Any, where: str) -> None:
    import multiprocessing

    context = multiprocessing.get_context("fork")  # the tokenizer is there already: nothing is imported or read again
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
            f"takes more than {SECONDS} s for a few words" if slow else f"ends the process that renders it (exit code {child.exitcode})"
        )
    child.join()
    if problem:
        raise InputError(f"{where}: {problem}", "mend the template, or use another one")


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
            pieces(tokenizer, probe)
        except InputError as error:
            if probe is PROBES[0]:
                problem = error.what
                break
    sender.send(problem)
