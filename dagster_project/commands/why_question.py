"""The question of `pedigree why`: a prompt with an answer, tokenized as in
training, with the tokens that are asked about as labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dagster_project.commands.nearest_records import cut, opening
from dagster_project.commands.why_model import Target
from dagster_project.core import params
from dagster_project.core.chat import IGNORE, encode_pieces, encode_prompt, examples_of
from dagster_project.core.errors import InputError
from dagster_project.core.imports import lean_imports
from dagster_project.core.messages import Messages, Tools
from dagster_project.core.params import Compute
from dagster_project.core.rendering import end_ids, end_tokens
from dagster_project.core.text import shortened
from dagster_project.evaluation.evaluator import EvaluatedModel, Settings
from dagster_project.lineage.attribution.gradients import TrainedModel
from dagster_project.lineage.attribution.points import END_ONLY, PointSelection
from dagster_project.lineage.attribution.projection import Projection
from dagster_project.lineage.attribution.records import Example
from dagster_project.lineage.attribution.search import Found, Search, read_all
from dagster_project.lineage.attribution.store import GradientStore
from dagster_project.lineage.history import md5_on_disk
from dagster_project.training.inference.answers import read_answer
from dagster_project.training.inference.generate import generate_ids
from dagster_project.training.methods.load import load_tokenizer

OF_LENGTH = "sequence-length-is-longer-than-the-specified-maximum"
"""Transformers' name of its warning about long texts."""


@dataclass(frozen=True)
class Options:
    """What is asked."""

    prompt: str
    answer: str | None = None
    """None: the model's own."""
    span: str | None = None
    """Part of the answer; None: all of it."""
    system: str | None = None
    """None: that of the training records, if all have the same."""
    top: int = 10
    points: PointSelection = END_ONLY


@dataclass(frozen=True)
class Question:
    """A prompt with an answer, tokenized, with the asked tokens as labels."""

    messages: Messages
    turn: str
    """The answer as the chat template writes it, trace, calls and end of turn included."""
    spans: tuple[tuple[int, int], ...]
    """Bounds of the asked parts in `turn`."""
    example: Example
    cut_off: bool = False
    """Whether the model did not end the answer, whose end is then not asked about."""

    @property
    def tokens(self) -> int:
        return sum(label != IGNORE for label in self.example.labels)


@dataclass(frozen=True)
class AnsweringModel:
    """The model that answers a question, not loaded yet."""

    folder: Path
    base_model: Path
    compute: Compute
    settings: Settings
    name: str

    @classmethod
    def of(cls, found: Target) -> AnsweringModel:
        """Raises:
        InputError: its files were changed.
        """
        settings = params.parse(Settings, params.read(found.root).get("evaluation"), "evaluation")
        return cls(answering(found), found.base_model, found.compute, settings, found.run.address)

    def answer(self, prompt: Messages) -> tuple[dict[str, Any], bool]:
        """The model's most likely answer, as evaluation makes it: the message, and whether the model ended it."""
        model = EvaluatedModel(self.folder, self.compute, self.settings, self.base_model)
        tokenizer, longest = model.tokenizer, self.settings.max_new_tokens
        ids = encode_prompt(tokenizer, prompt, None)[-max(1, tokenizer.model_max_length - longest) :]
        [given] = generate_ids(model.model, tokenizer, [ids], longest, 1, f"{self.name}: answers")
        return dict(read_answer(tokenizer, ids, given).message), bool(given) and given[-1] in end_ids(tokenizer)


def question(options: Options, system: str | None, tokenizer: Any, model: AnsweringModel | None) -> Question:
    """Tokenize a question with its answer.

    Args:
        tokenizer: of the model (`tokenizer_of`).
        model: gives the answer if `options` has none.

    Raises:
        InputError: the answer is empty, too long, or does not contain the part that is asked about.
    """
    prompt = [*opening(system), {"role": "user", "content": options.prompt}]
    if options.answer is None:
        assert model
        reply, ended = model.answer(prompt)
    else:
        reply, ended = {"role": "assistant", "content": options.answer}, True
    if not any(reply.get(name) for name in ("content", "reasoning_content", "tool_calls")):
        raise InputError(
            "the answer is empty" if options.answer is not None else "the model's answer is empty",
            "give one with --answer",
        )
    return tokenize(tokenizer, [*prompt, reply], options.span, ended=ended)


def tokenize(tokenizer: Any, messages: Messages, span: str | None, tools: Tools = None, ended: bool = True) -> Question:
    """A question of which the last message is the answer.

    Args:
        ended: whether the model ended the answer. Otherwise the template's mark of its end is not the model's.
    Raises:
        InputError: as `question`.
    """

    def parts(turn: str) -> Sequence[tuple[int, int]]:
        if span is not None:
            return _find(tokenizer, turn, span)
        return [(0, len(turn) if ended else _end_of_text(tokenizer, turn))]

    return replace(tokenize_parts(tokenizer, messages, parts, tools), cut_off=not ended)


def _end_of_text(tokenizer: Any, turn: str) -> int:
    """Where the token that ends an answer begins."""
    return max((turn.rfind(end) for end in end_tokens(tokenizer) if end in turn), default=len(turn))


def tokenize_parts(
    tokenizer: Any, messages: Messages, parts: Callable[[str], Sequence[tuple[int, int]]], tools: Tools = None
) -> Question:
    """As `tokenize`, for parts of the answer given by their bounds.

    Args:
        parts: the answer as the chat template writes it -> bounds of what is asked about.
    Raises:
        InputError: the question is too long, or no token belongs to what is asked about.
    """
    tokenizer.deprecation_warnings[OF_LENGTH] = True  # a longer one is refused below
    pieces = examples_of(tokenizer, {"messages": messages, "tools": tools})[-1]
    last = max(i for i, (_, is_trained) in enumerate(pieces) if is_trained)
    turn = pieces[last][0]
    spans = parts(turn)
    input_ids: list[int] = []
    labels: list[int] = []
    for i, ((text, _), ids) in enumerate(zip(pieces, encode_pieces(tokenizer, [pieces])[0], strict=True)):
        input_ids += ids
        labels += _labels(tokenizer, text, ids, spans) if i == last else [IGNORE] * len(ids)
    if len(input_ids) > (context := tokenizer.model_max_length):
        raise InputError(f"the question has {len(input_ids):,} tokens, the model's context {context:,}", "shorten it")
    if all(label == IGNORE for label in labels):  # some tokenizers count white space to no token
        asked = ", ".join(repr(turn[start:stop]) for start, stop in dict.fromkeys(spans))
        raise InputError(f"no token of the answer {cut(turn)!r} belongs to the part {asked}", "ask about a longer part")
    return Question(messages, turn, tuple(spans), Example(tuple(input_ids), tuple(labels), ()))


def _find(tokenizer: Any, turn: str, span: str) -> list[tuple[int, int]]:
    """Every occurrence of a text in an answer, but those that are only a part
    of a token of the chat template, such as `end` of `<|im_end|>`. Those that overlap are one."""
    tokens = [
        one for one in tokenizer.added_tokens_decoder.values() if one.special or one.content.startswith(("<", "["))
    ]
    marks = "|".join(
        re.escape(one.content) for one in sorted(tokens, key=lambda one: -len(one.content)) if one.content in turn
    )
    within = [match.span() for match in re.finditer(marks, turn)] if marks else []
    found = list[tuple[int, int]]()
    for match in re.finditer(f"(?={re.escape(span)})", turn) if span else ():
        start, stop = match.start(), match.start() + len(span)
        if any(begin <= start and stop <= end and stop - start < end - begin for begin, end in within):
            continue
        if found and start < found[-1][1]:  # "ana" twice in "banana"
            start = found.pop()[0]
        found.append((start, stop))
    if not found:
        raise InputError(
            f"the part {shortened(span, 80)!r} is not in the answer: {shortened(turn)!r}",
            "copy a part of the answer, letter by letter",
        )
    return found


def _labels(tokenizer: Any, text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The ids of tokens with a character in one of the spans; -100 for the others."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [
        token if any(start < stop and end > begin for begin, stop in spans) else IGNORE
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]


def answering(found: Target) -> Path:
    """Folder of the model that answers: the one that was asked, if the workspace has it, else its adapter.

    Raises:
        InputError: its files were changed.
    """
    run = found.subject.run
    folder = found.root / run.path
    if not (run.in_workspace and (folder / "config.json").is_file()):
        return found.folder
    if md5_on_disk(folder) != run.md5:
        raise InputError(
            f"{run.path} in the workspace is not {run.address},"
            f" md5 {run.md5[:12]}: its answer would be that of another model",
            f"restore it with `dvc checkout --force {run.path}`, or give the answer with --answer",
        )
    return folder


def tokenizer_of(found: Target) -> Any:
    return load_tokenizer(found.base_model, found.folder)


def ask_loaded(
    options: Options,
    system: str | None,
    answering: AnsweringModel | None,
    loading: Mapping[str, Any],
    store: GradientStore,
) -> Iterator[Question | tuple[float, Found]]:
    """Load a supervised model and ask it, in another process (`commands/model_process.py`).

    Args:
        loading: arguments of `TrainedModel.load`.
        store: complete, and not large.
    Yields:
        The question; then its log-probability and the scores of all records.
    """
    asked = question(options, system, load_tokenizer(loading["base_model"], loading["folder"]), answering)
    yield asked
    with ThreadPoolExecutor(1) as pool:
        stored = pool.submit(store.read)
        with lean_imports():  # of the model's own module
            model = TrainedModel.load(**loading).weakened()
        value, gradient = model.of_span(asked.example)
        projected = Projection().project(gradient).numpy()
        yield value, read_all([Search(stored.result(), projected)])
