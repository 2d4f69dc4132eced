"""Token counts of texts by the base model's tokenizer, and whether conversations fit its chat template."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dagster_project.core.chat import examples_of
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_bytes, sha256_of_text
from dagster_project.core.messages import Messages, Tools
from dagster_project.core.rendering import render
from dagster_project.curation.checks.light_tokenizer import read_tokenizer


@dataclass(frozen=True)
class Tokens:
    """The base model's tokenizer and chat template, as far as the checks need them."""

    count: Callable[[Sequence[str]], list[int]]
    """Tokens of each text, without a template."""
    misfit: Callable[[Messages, Tools], str | None] | None = None
    """The reason that a conversation, with its tools, does not fit the chat template, or None if it does; None itself
    without a template."""
    special: frozenset[str] = frozenset()
    """The tokenizer's own control tokens."""
    estimated: bool = False
    """Whether the counts are estimates, without a tokenizer."""
    rendered: Callable[[Messages, Tools], int | None] | None = None
    """Tokens of a conversation, with its tools, as the chat template writes it, None if that refuses it; None itself
    without a template."""
    folder: Path | None = None
    """The base model's folder. Another process gets the small files in it, because functions of a tokenizer cannot be
    sent."""

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is None:
            return Tokens, (self.count, self.misfit, self.special, self.estimated, self.rendered)
        return _of_files, (_files(self.folder),)

    @property
    def identity(self) -> str | None:
        """Hash of the files that the functions compute with, or the name of the estimate; None if it is unknown."""
        if self.folder is not None:
            files = [(name, sha256_of_bytes(content)) for name, content in _files(self.folder)]
            return sha256_of_text(json.dumps(files))
        return "estimated" if self.count is _four_bytes and self.misfit is None and not self.special else None


WEIGHTS = {".safetensors", ".bin", ".pt", ".gguf"}


def _files(folder: Path) -> tuple[tuple[str, bytes], ...]:
    """Name and content of each file in a model's folder except for weights, and of its named chat templates."""
    files = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    files = [file for file in sorted(files) if file.is_file() and file.suffix not in WEIGHTS]
    return tuple([(file.relative_to(folder).as_posix(), file.read_bytes()) for file in files])


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""Kept until the process ends, because the model's end-of-text tokens are read later."""


@cache
def _of_files(files: tuple[tuple[str, bytes], ...]) -> Tokens:
    """`tokens_of` a folder with these files."""
    folder = tempfile.TemporaryDirectory(prefix="tokenizer-")
    _FOLDERS.append(folder)
    for name, content in files:
        Path(folder.name, name).parent.mkdir(exist_ok=True)
        Path(folder.name, name).write_bytes(content)
    return tokens_of(Path(folder.name))


def _four_bytes(texts: Sequence[str]) -> list[int]:
    return [-(-len(text.encode("utf-8", "replace")) // 4) for text in texts]


ESTIMATED = Tokens(_four_bytes, estimated=True)
"""Four bytes per token: about the average of English with most tokenizers."""


def _from_transformers(base_model: Path) -> Any:
    """Any tokenizer that transformers can read. The import loads torch if that is installed."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        what = f"{base_model}: reading its tokenizer requires transformers: {error}"
        raise InputError(what, "pip install 'pedigree-llm[train]'") from None
    try:
        return AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  tokenizers raises nothing narrower; transformers any exception
        what = f"{base_model}: the tokenizer cannot be read: {error!r}"
        raise InputError(what, "name the folder of a complete model") from None


def load_tokenizer(base_model: Path) -> Any:
    """The tokenizer in a model's folder, without transformers if possible.

    Raises:
        InputError: it cannot be read.
    """
    tokenizer = read_tokenizer(base_model) or _from_transformers(base_model)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()  # tokenizer.json may contain settings that a training script left
        backend.no_padding()
    return tokenizer


def tokens_of(base_model: Path) -> Tokens:
    """Functions of the tokenizer in a model's folder.

    A conversation fits its chat template if the template renders it, keeps earlier turns unchanged when a later one
    follows, writes all of the assistant's text, and ends it with the end-of-turn token (`chat.pieces`).
    """
    tokenizer = load_tokenizer(base_model)

    def count(texts: Sequence[str]) -> list[int]:
        counts: list[int] = []
        for start in range(0, len(texts), 4096):
            block = list(texts[start : start + 4096])
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(block, add_special_tokens=False)
            counts += [len(encoding.ids) for encoding in encodings]
        return counts

    def rendered(messages: Messages, tools: Tools) -> int | None:
        try:
            return count([render(tokenizer, messages, tools=tools)])[0]
        except InputError:
            return None

    def misfit(messages: Messages, tools: Tools) -> str | None:
        try:
            examples_of(tokenizer, {"messages": messages, "tools": tools})
        except InputError as error:
            return error.what
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            return f"the chat template refuses it: {error}"
        return None

    special = frozenset(str(token) for token in tokenizer.all_special_tokens if len(str(token)) > 3)
    if not tokenizer.chat_template:
        return Tokens(count, special=special, folder=base_model)
    return Tokens(count, misfit, special, rendered=rendered, folder=base_model)
