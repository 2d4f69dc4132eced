"""`pedigree init`: the chat template of a base model in a folder, if its own does not write what the data contains."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dagster_project.commands.init_data import Found, Given, examine
from dagster_project.commands.show import with_template
from dagster_project.core.errors import InputError
from dagster_project.core.named_templates import NAMED
from dagster_project.curation.checks.token_counts import WEIGHTS, Tokens, load_tokenizer, tokens_of

CANDIDATES = ("hermes", "alpaca")
"""Values of base_model.chat_template, in the order in which they are tried."""


def examine_for(model: Path, given: Sequence[Given], task: str) -> tuple[Found, str | None]:
    """What is in the data, and the named template that writes it.

    None: the model's own template does, or none does better.

    Args:
        model: folder of the base model.
        given: what the user has, read.
        task: as for `init`.
    Raises:
        InputError: as `init_data.examine`.
    """
    tokens = tokens_of(model)
    found = examine(given, task, tokens)
    has_template = tokens.misfit is not None
    if has_template and found.writes_traces and not found.dropped.get("template_mismatch"):
        return found, None
    for name in CANDIDATES:
        with ExitStack() as stack:
            try:
                named = stack.enter_context(_tokens_with(model, name))
            except InputError:  # the tokenizer lacks a token of the template
                continue
            other = examine(given, task, named)
        if not has_template or (other.kept, other.writes_traces) > (found.kept, found.writes_traces):
            return other, name
    return found, None


@contextmanager
def _tokens_with(model: Path, template: str) -> Iterator[Tokens]:
    """Functions of a model's tokenizer with one of the named templates.

    Raises:
        InputError: the tokenizer lacks a token of the template.
    """
    with TemporaryDirectory(prefix="tokenizer-") as folder:
        for file in model.iterdir():
            if file.is_file() and file.suffix not in WEIGHTS:
                shutil.copy(file, folder)
        named = with_template(load_tokenizer(model), template, NAMED[template], str(model))
        Path(folder, "chat_template.jinja").write_text(named.chat_template, encoding="utf-8")
        yield tokens_of(Path(folder))
