"""Evaluation of a tuned or base model: likelihoods, answers, slices, and the results table."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dagster_project.core.chat import encode_prompt, encode_record, is_text
from dagster_project.core.errors import InputError
from dagster_project.core.messages import Messages, is_trained
from dagster_project.core.params import TAG, Compute, Section
from dagster_project.core.records import prompt_text, response_text, subject_text, write_table
from dagster_project.core.text import many
from dagster_project.core.words import split_words
from dagster_project.evaluation.final_answers import FinalAnswer
from dagster_project.evaluation.labels import LabelSet, LabelTask, label_set
from dagster_project.evaluation.metrics import AnyTask, Task, is_answer, label, measures, perplexity
from dagster_project.evaluation.paired.bootstrap import rounded
from dagster_project.evaluation.scoring import Offer
from dagster_project.training.inference.answers import Answer, read_answer
from dagster_project.training.inference.generate import generate_ids
from dagster_project.training.inference.likelihood import negative_log_likelihood
from dagster_project.training.methods import feature_extraction
from dagster_project.training.methods.hardware import prepare
from dagster_project.training.methods.load import load, load_tokenizer

log = logging.getLogger("pedigree")

if TYPE_CHECKING:
    import pyarrow as pa


@cache
def result_schema(rich: bool = False) -> pa.Schema:
    """One row per system and test example, and one for each earlier turn that was answered.

    Args:
        rich: with the columns for traces, calls and earlier turns.
    """
    import pyarrow as pa

    more = [
        ("turn", pa.int64()),  # index of the answered message; null for the last one
        ("reasoning", pa.string()),  # trace before the answer; null if there is none
        ("tool_calls", pa.string()),  # calls of the answer as JSON; null if there are none
    ]
    columns = [
        ("system", pa.string()),  # zero_shot, few_shot, ..., or a variant's name
        ("example_id", pa.string()),
        *(more if rich else []),
        ("answer", pa.string()),  # generated answer without trace and calls; null if none was generated
        ("label", pa.string()),  # label or final answer of the answer; null for free text
        # null for systems other than language models:
        ("prompt_tokens", pa.int64()),
        ("nll", pa.float64()),  # nats, summed over the reference response
        ("tokens", pa.int64()),  # of the reference response
    ]
    return pa.schema(columns)


BASE = "base"
"""Name of the base model in the results table, where it has likelihoods. Its answers have the names of its prompts."""


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the results table. It has the columns for traces, calls and earlier turns if a row needs them."""
    rich = any(row["turn"] is not None or row["reasoning"] or row["tool_calls"] for row in rows)
    write_table(path, rows, result_schema(rich))


def _task_kind(value: Any) -> str:
    """Tag of the kind of `task` that a value specifies."""
    for key, kind in (("final_answer", FinalAnswer), ("labels", LabelTask)):
        if isinstance(value, kind) or (isinstance(value, dict) and key in value):
            return TAG + key
    return f"{TAG}fields"


SomeTask = Annotated[
    Annotated[Task, Tag(f"{TAG}fields")]
    | Annotated[LabelTask, Tag(f"{TAG}labels")]
    | Annotated[FinalAnswer, Tag(f"{TAG}final_answer")],
    Discriminator(_task_kind),
]


class Settings(Section):
    """How answers are scored, the same for every variant. See docs/evaluation.md."""

    task: SomeTask | None = None
    """What a correct answer looks like: a label (`labels`), one JSON object (`fields` and `score`), or text that ends
    in an answer (`final_answer`). null, or no test example with such an answer: answers are free text."""
    metrics: list[str] = []
    """Measures of your own: `file.function` of a Python file in data/metrics/."""
    max_examples: int = Field(default=200, ge=1)
    """Most test examples that are answered, chosen by content, so that every system and every run answers the same
    ones. Perplexity covers all test examples."""
    benchmarks: list[str] = []
    """Multiple-choice files in data/sources/benchmarks/, to measure what tuning made the model forget."""
    forgetting: float = Field(default=0.05, ge=0, le=1)
    """Loss of accuracy on the benchmarks above which `comparison` warns."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = Field(default=40, ge=1)
    """Prompts that are answered at the same time."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Number format of models that are scored. null: that of `compute.dtype`. In float32 answers practically do not
    depend on `batch_size`; in bfloat16, which is faster, some do."""

    @model_validator(mode="after")
    def _names_differ(self) -> Settings:
        named = measures(self.task, {}) if isinstance(self.task, Task) else {}
        if same := sorted(named.keys() & self.metrics):
            raise ValueError(f"metrics: {same[0]!r} is the name of a measure of evaluation.task; rename the file")
        return self


class EvaluatedModel:
    """A loaded model with the operations that evaluation needs."""

    def __init__(self, folder: Path, compute: Compute, settings: Settings, base_model: Path | None = None) -> None:
        """
        Args:
            folder: a complete model; or an adapter or a classification head, which needs `base_model`.
        """
        device, dtype = prepare(compute.model_copy(update={"dtype": settings.dtype or compute.dtype}))
        is_head = feature_extraction.is_head(folder)
        incomplete = is_head or (folder / "adapter_config.json").is_file()
        self.tokenizer = load_tokenizer(base_model if base_model and incomplete else folder, folder)
        self.head = self.model = None
        if base_model and is_head:
            self.head = feature_extraction.load(folder, base_model, device, dtype)
        else:
            self.model = load(folder, base_model, device, dtype)
        self.settings = settings

    @property
    def writes(self) -> bool:
        """Whether the model generates text.

        A classifier only predicts labels: it has no perplexity and no benchmark scores.
        """
        return self.head is None

    def likelihood(self, records: Sequence[dict[str, Any]], what: str) -> list[tuple[float, int]]:
        """(negative log-likelihood in nats, tokens) of each record's responses.

        Records longer than the context are truncated at the end.
        """
        room, pad = self.tokenizer.model_max_length, self.tokenizer.pad_token_id
        encoded = [encode_record(self.tokenizer, record) for record in records]
        examples = [(ids[:room], labels[:room]) for parts in encoded for ids, labels in parts]
        scores = negative_log_likelihood(self.model, pad, examples, self.settings.batch_size, f"{what}: perplexity")
        in_order = iter(scores)
        of_records = [list(islice(in_order, len(parts))) for parts in encoded]
        return [(sum(nats for nats, _ in parts), sum(tokens for _, tokens in parts)) for parts in of_records]

    def answer(
        self, prompts: Sequence[Messages], what: str, thinking_tokens: int = 0, offers: Sequence[Offer] | None = None
    ) -> list[Answer]:
        """The answer to each prompt; for a classifier the predicted label.

        Prompts longer than the context are truncated at the beginning, with a warning.

        Args:
            thinking_tokens: additional tokens for reasoning before the answer.
            offers: what is offered with each prompt.
        Raises:
            InputError: the longest answer leaves no room for a prompt.
        """
        offers = offers or [Offer()] * len(prompts)
        tools, what = [offer.tools for offer in offers], f"{what}: answers"
        if self.head is not None:
            reasoning = [offer.reasoning for offer in offers]
            return [Answer(predicted) for predicted in self.head.predict(prompts, what, tools, reasoning)]
        longest, room = self.settings.max_new_tokens + thinking_tokens, self._room(thinking_tokens)
        whole = self._encode(prompts, offers)
        if cut := sum(len(encoded) > room for encoded in whole):
            log.warning(
                f"{what}: {cut} of {many(len(whole), 'prompt')} exceed {room:,} tokens and lose their beginning"
            )
        ids = [encoded[-room:] for encoded in whole]
        generated = generate_ids(self.model, self.tokenizer, ids, longest, self.settings.batch_size, what)
        return [read_answer(self.tokenizer, *parts) for parts in zip(ids, generated, tools, strict=True)]

    def _room(self, thinking_tokens: int) -> int:
        """Most tokens of a prompt before the longest answer."""
        context, longest = self.tokenizer.model_max_length, self.settings.max_new_tokens + thinking_tokens
        if longest < context:
            return int(context - longest)
        more = f" and baselines.thinking_tokens: {thinking_tokens:,}" if thinking_tokens else ""
        raise InputError(
            f"params.yaml: evaluation.max_new_tokens: {self.settings.max_new_tokens:,}{more}: answers of {longest:,}"
            f" tokens leave no room for a prompt in the model's context of {context:,}",
            "set it to less",
        )

    def prompt_tokens(
        self, prompts: Sequence[Messages], offers: Sequence[Offer] | None = None, thinking_tokens: int = 0
    ) -> list[int] | None:
        """Tokens of each prompt that the model reads, as `answer`; None for a classifier, which is not prompted."""
        if not self.writes:
            return None
        room = self._room(thinking_tokens)
        return [min(room, len(encoded)) for encoded in self._encode(prompts, offers)]

    def refuses(self, prompts: Sequence[Messages], offers: Sequence[Offer], what: str) -> bool:
        """Whether the chat template refuses a prompt, e.g. a system prompt, or worked examples with an open call."""
        try:
            self._encode(prompts, offers)
        except InputError as error:
            log.warning(f"{what} is left out: {error.what}")
            return True
        return False

    def _encode(self, prompts: Sequence[Messages], offers: Sequence[Offer] | None) -> list[list[int]]:
        pairs = zip(prompts, offers or [Offer()] * len(prompts), strict=True)
        return [encode_prompt(self.tokenizer, messages, offer.tools, offer.reasoning) for messages, offer in pairs]


def select_questions(
    records: Sequence[dict[str, Any]], settings: Settings, train: Sequence[dict[str, Any]] = ()
) -> tuple[AnyTask | None, list[dict[str, Any]]]:
    """Select the turns to answer.

    Args:
        records: the test split.
        train: the training split, whose responses are the labels of `labels: auto`.
    Returns:
        The task (None for free text) and the questions: test examples that end with the turn.
    """
    task: AnyTask | None
    if isinstance(settings.task, LabelTask):
        task = label_set(settings.task, _responses(train), _responses(records))
    else:
        task = settings.task
    answerable = with_task_answers(records, task)
    if task and not isinstance(task, LabelSet) and records and not answerable:
        if isinstance(task, Task):
            form = f"a JSON object with the fields {', '.join(task.fields)} and allowed values"
        else:
            form = f"a text with a final answer ({task.final_answer})"
        log.warning(
            f"params.yaml: evaluation.task: none of {len(records)} test answers is {form}; answers are scored as free"
            " text. Remove evaluation.task, or describe your own answers"
        )
    task = task if answerable else None
    last = {record["example_id"] for record in answerable or with_prompt_and_response(records)}
    questions = [question for record in records for question in turns(record, task, record["example_id"] in last)]
    chosen = set(sorted({question["example_id"] for question in questions})[: settings.max_examples])
    return task, [question for question in questions if question["example_id"] in chosen]


def _responses(records: Sequence[dict[str, Any]]) -> list[str]:
    texts = [response_text(record["messages"]) for record in with_prompt_and_response(records)]
    return [text for text in texts if text]


def turns(record: dict[str, Any], task: AnyTask | None, last: bool) -> list[dict[str, Any]]:
    """The questions of a test example: up to each earlier turn with tool calls, and the whole example.

    The calls are in earlier turns, because a conversation goes on with their results. Under a task with labels only
    last turns are answered.

    Args:
        last: whether the last turn is answered.
    Returns:
        Records that end with the answered turn. Those of earlier turns have the index of its message as `turn`.
    """
    questions = []
    if not isinstance(task, Task | LabelSet):
        messages = record["messages"]
        earlier = [i for i in range(1, len(messages) - 1) if _calls_in_training(messages[i])]
        questions = [{**record, "messages": messages[: i + 1], "turn": i} for i in earlier]
    return [*questions, record] if last else questions


def _calls_in_training(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls")) and is_trained(message)


def turn_key(row: Mapping[str, Any]) -> tuple[str, int]:
    """Identity of a question or of its row in the results table; -1 is the last turn."""
    turn = row.get("turn")
    return row["example_id"], -1 if turn is None else turn


def with_task_answers(records: Sequence[dict[str, Any]], task: AnyTask | None) -> list[dict[str, Any]]:
    """The conversations with a prompt whose reference response is an answer to the task."""
    return [r for r in with_prompt_and_response(records) if task and is_answer(task, response_text(r["messages"]))]


def with_prompt_and_response(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversations with both a prompt and a response, which may be a tool call."""
    return [r for r in records if not is_text(r) and prompt_text(r["messages"]) and _responds(r["messages"][-1])]


def _responds(message: Mapping[str, Any]) -> bool:
    return is_trained(message) and bool(message["content"] or message.get("tool_calls"))


def result_rows(
    system: str,
    records: Sequence[Mapping[str, Any]],
    task: AnyTask | None,
    answers: Sequence[Answer | None] | None = None,
    prompt_tokens: Sequence[int | None] | None = None,
    likelihoods: Sequence[tuple[float | None, int | None]] = (),
) -> list[dict[str, Any]]:
    """A system's rows of the results table, with null for missing answers, prompts or likelihoods."""
    nothing = [None] * len(records)
    columns = (records, answers or nothing, prompt_tokens or nothing, likelihoods or [(None, None)] * len(records))
    return [
        {
            "system": system,
            "example_id": record["example_id"],
            "turn": record.get("turn"),
            **(answer.columns if answer else NO_ANSWER),
            "label": label(task, answer.content) if task and answer else None,
            "prompt_tokens": length,
            "nll": nll,
            "tokens": n,
        }
        for record, answer, length, (nll, n) in zip(*columns, strict=True)
    ]


NO_ANSWER = {"answer": None, "reasoning": None, "tool_calls": None}


MOST_SLICES = 20
OTHERS = "(others)"
NO_CATEGORY = "(none)"


def slices(
    records: Sequence[dict[str, Any]],
    likelihoods: Sequence[tuple[float, int]],
    scored: str,
    values: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """Test examples, perplexity and mean score of answered examples, by category and by prompt length.

    Args:
        likelihoods: (nats, tokens) of the records; empty for a classifier.
        scored: name of the score.
        values: example_id -> score.
    """
    categories = [record["category"] or NO_CATEGORY for record in records]
    most = {name for name, _ in Counter(sorted(categories)).most_common(MOST_SLICES)}
    groupings = {
        "by_category": [name if name in most else OTHERS for name in categories],
        "by_prompt_words": thirds([len(split_words(subject_text(record["messages"]))) for record in records]),
    }
    found: dict[str, dict[str, Any]] = {}
    for grouping, names in groupings.items():
        members = {name: [i for i, other in enumerate(names) if other == name] for name in sorted(set(names))}
        found[grouping] = {name: _slice(some, records, likelihoods, scored, values) for name, some in members.items()}
    return found


def _slice(
    members: Sequence[int],
    records: Sequence[dict[str, Any]],
    likelihoods: Sequence[tuple[float, int]],
    scored: str,
    values: Mapping[str, float],
) -> dict[str, Any]:
    import numpy as np

    scores = [values[records[i]["example_id"]] for i in members if records[i]["example_id"] in values]
    counted = [likelihoods[i] for i in members if likelihoods[i][1]] if likelihoods else []
    found: dict[str, Any] = {"n": len(members)}
    if counted:
        found["perplexity"] = rounded(perplexity(np.array(counted).sum(0)))
    if scores:
        found |= {"answered": len(scores), scored: rounded(sum(scores) / len(scores))}
    return found


def thirds(lengths: Sequence[int]) -> list[str]:
    """Name of the tercile (short, medium, long) of each length, with its bounds."""
    ordered = sorted(lengths)
    low, high = (ordered[max(0, len(ordered) * k // 3 - 1)] for k in (1, 2))
    names = (f"short, up to {low}", f"medium, {low + 1} to {high}", f"long, {high + 1} and more")
    return [names[(n > low) + (n > high)] for n in lengths]
