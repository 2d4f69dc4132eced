"""`pedigree check --show`: rows as the chat template renders them, split into what is trained on and what is not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from dagster_project.core import chat, named_templates, params
from dagster_project.core.errors import InputError
from dagster_project.core.rendering import render, with_constant_date
from dagster_project.curation.checks import findings, quotes, references
from dagster_project.curation.checks.checks import Judgement
from dagster_project.curation.checks.light_tokenizer import LightTokenizer
from dagster_project.curation.checks.token_counts import load_tokenizer
from dagster_project.training.tokens import chat_templates

SPECIAL = re.compile(r"<[|｜]?[^<>\s]+>|\[/?[A-Z_]+\]")
"""What looks like a special token."""


@dataclass(frozen=True)
class Renderer:
    """A chat template, and how the project uses it."""

    name: str
    tokenizer: Any
    counts: bool
    """Whether the tokenizer can count tokens; a template by itself cannot."""
    reasoning: chat.Reasoning = "template"
    """Which traces are rendered."""


def renderer(project: Path, base_model: Path | None, template: str | None) -> Renderer:
    """The chat template that rows are rendered with.

    Args:
        base_model: folder of a model; None: data/base_model of the project,
            with `tokenized.chat_template`, if it exists.
        template: chatml, hermes, alpaca or a Jinja file, instead of the model's own.
    Raises:
        InputError: there is no template, or it is refused.
    """
    folder = base_model or project / "data" / "base_model"
    present = (folder / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(folder) if present else None
    name, where = template, f"--template {template}"
    reasoning: chat.Reasoning = "template"
    if template is None:
        where = "data/base_model" if base_model is None else str(base_model)
        if base_model is None and present and (project / "params.yaml").is_file():
            name, reasoning = _configured(project)
            where = f"tokenized.chat_template {name}" if name else where
    if name is not None:
        source = _source(name if template or name in named_templates.NAMED else str(project / name), where)
        source = with_constant_date(source)
        chat_templates.refuse_unsafe(source, where)
        tokenizer = (
            with_template(tokenizer, name, source, where) if tokenizer is not None else _template_only(name, source)
        )
        chat_templates.try_template(tokenizer, where)
    elif tokenizer is None or not tokenizer.chat_template:
        problem = f"{where} has no chat template" if present else "there is no data/base_model"
        raise InputError(
            f"--show: {problem}, so rows cannot be rendered",
            "add --template chatml, hermes, alpaca or FILE, or --base-model FOLDER",
        )
    return Renderer(where, tokenizer, present, reasoning)


def _source(name: str, where: str) -> str:
    """The text of a named template or a Jinja file."""
    if name in named_templates.NAMED:
        return named_templates.NAMED[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{where}: is not UTF-8 text", "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{where}: {reason}", f"use {', '.join(named_templates.NAMED)} or a Jinja file") from None


def _configured(project: Path) -> tuple[str | None, chat.Reasoning]:
    """`chat_template` and `reasoning` in the section `tokenized` of params.yaml."""
    section = params.read(project).get("tokenized")
    values = section if isinstance(section, dict) else {}
    name = values.get("chat_template")
    if isinstance(name, str):
        chat_templates.locate(project, name)
    reasoning: chat.Reasoning = next(
        (one for one in get_args(chat.Reasoning) if one == values.get("reasoning")), "template"
    )
    return name if isinstance(name, str) else None, reasoning


def with_template(tokenizer: Any, name: str, source: str, where: str) -> Any:
    """The tokenizer with another template.

    Raises:
        InputError: it lacks a special token of a named template.
    """
    special = {
        token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values() if token.special
    }
    if name in named_templates.MARKUP and not {"<|im_start|>", "<|im_end|>"} <= special:
        raise InputError(
            f"{where}: the base model's tokenizer has no special tokens <|im_start|> and <|im_end|>",
            "use alpaca, or a file",
        )
    if name in named_templates.NAMED and chat.adds_bos(tokenizer):
        source = "{{ bos_token }}" + source
    if isinstance(tokenizer, LightTokenizer):
        return replace(tokenizer, chat_template=source)
    tokenizer.chat_template = source
    return tokenizer


def _template_only(name: str, source: str) -> LightTokenizer:
    """A template without a tokenizer.

    The end of a turn is `eos_token` if the template writes it, else the token that follows an answer.
    """
    tokenizer = LightTokenizer(
        None, {"bos_token": "<s>", "eos_token": "</s>"}, list(dict.fromkeys(SPECIAL.findall(source))), source
    )
    answer = {"role": "assistant", "content": "pedigree7word"}
    try:
        after = render(tokenizer, [{"role": "user", "content": "Hi"}, answer]).partition(answer["content"])[2]
    except InputError:
        return tokenizer
    end = SPECIAL.search(after)
    if end is None or ("</s>" in after and name not in named_templates.MARKUP):
        return tokenizer
    return replace(tokenizer, special_tokens={"bos_token": "<s>", "eos_token": end.group()})


def select(judged: Judgement, first: int | None, rows: Sequence[int]) -> list[int]:
    """Indices of records: the first ones, or those of the given rows.

    Raises:
        InputError: there is no such row.
    """
    if first is not None:
        return list(range(min(first, len(judged.records))))
    numbers = _row_numbers(judged)
    missing = sorted(set(rows).difference(numbers))
    if missing:
        last = f"rows are numbered from 0 to {max(numbers)}" if numbers else "there are no rows"
        raise InputError(f"--show-rows: there is no row {missing[0]}", last)
    return [i for row in dict.fromkeys(rows) for i, number in enumerate(numbers) if number == row]


def _row_numbers(judged: Judgement) -> list[int]:
    numbers = findings.RowNumbers(judged.records)
    return [numbers.of(record) for record in judged.records]


def show(judged: Judgement, chosen: Sequence[int], by: Renderer) -> list[dict[str, Any]]:
    """The part `shown` of the check document: each row as it would be trained on, repaired and unmasked.

    A row that the template refuses, or that could not be read, has a `problem` instead of `examples`.
    """
    numbers = _row_numbers(judged)
    return [
        {
            "row": numbers[i],
            "place": references.place(judged.records[i]),
            "template": by.name,
            "outcome": f"dropped:{judged.reason[i]}" if judged.reason[i] else "kept",
            **_rendered(judged.records[i], by),
        }
        for i in chosen
    ]


def _rendered(record: Mapping[str, Any], by: Renderer) -> dict[str, Any]:
    if not record["messages"]:
        return {"problem": f"it cannot be read: {quotes.excerpt(record)}"}
    try:
        examples = (
            _sides(by.tokenizer, record)
            if "asked" in record
            else [("", parts) for parts in chat.examples_of(by.tokenizer, record, by.reasoning)]
        )
    except InputError as error:
        return {"problem": error.what}
    return {"examples": [{**({"side": side} if side else {}), **_example(parts, by)} for side, parts in examples]}


def _sides(tokenizer: Any, pair: Mapping[str, Any]) -> list[tuple[str, chat.Pieces]]:
    """Both answers of a preference pair after its prompt.

    Only the last answer counts in the loss, regardless of message weights.
    """
    prompt = pair["messages"][: pair["asked"]]
    found = []
    for side, turns in (("chosen", pair["messages"][pair["asked"] :]), ("rejected", pair["rejected"])):
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in [*prompt, *turns]]
        parts = chat.last_turn_pieces(tokenizer, messages, pair.get("tools"))
        last = max((i for i, (_, trained) in enumerate(parts) if trained), default=-1)
        found.append((side, [(text, i == last) for i, (text, _) in enumerate(parts)]))
    return found


def _example(parts: chat.Pieces, by: Renderer) -> dict[str, Any]:
    found: dict[str, Any] = {"pieces": [{"text": text, "trained": trained} for text, trained in parts]}
    if by.counts:
        encoded = by.tokenizer.backend_tokenizer.encode_batch([text for text, _ in parts], add_special_tokens=False)
        lengths = [len(one.ids) for one in encoded]
        trained = sum(length for length, (_, counts) in zip(lengths, parts, strict=True) if counts)
        found |= {"tokens": sum(lengths), "trained_tokens": trained}
    return found
