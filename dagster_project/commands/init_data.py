"""What `pedigree init` finds in the files of a user: kind and layout of each,
and of the rows that the checks keep sizes, categories and task."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Messages, Tools
from dagster_project.core.records import response_text
from dagster_project.curation.check_files import Kind, load
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.checks.token_counts import ESTIMATED, Tokens
from dagster_project.curation.sources.detection import split_of_file
from dagster_project.curation.sources.files import files_of
from dagster_project.curation.sources.hub import HubSplit, parse_spec
from dagster_project.curation.sources.s3 import SCHEME
from dagster_project.evaluation.labels import MAX_LABELS
from dagster_project.evaluation.metrics import parse

FEW = 0.25
"""Distinct values above this share of the rows are not labels."""
MAX_VALUES = 30
"""Distinct values of a JSON field that are listed as its allowed values."""
JSON_SHARE = 0.5
"""Share of answers that must be JSON objects with the same fields; evaluation scores these."""
MARGIN = 1.25
"""Factor on estimated tokens: tokenizers differ by about this much."""
HELD_OUT = {"validation", "test"}


@dataclass(frozen=True)
class Given:
    """A file, folder or data set of the user."""

    path: str
    """As given."""
    kind: Kind
    layout: str
    records: Sequence[dict[str, Any]]
    revision: str | None = None
    """Of objects in S3: the digest of their list."""

    @property
    def hub(self) -> HubSplit | None:
        return parse_spec(self.path)

    @property
    def is_copied(self) -> bool:
        """Whether it is a file or folder, and not a data set on the Hub or objects in S3, which stay where they are."""
        return self.hub is None and not self.path.startswith(SCHEME)

    @property
    def name(self) -> str:
        """Its name in messages and reports of the project."""
        return self.place if self.is_copied else self.hub.name if self.hub else self.path

    @property
    def place(self) -> str:
        """Path of a copy in the project."""
        return f"data/sources/{'benchmarks/' if self.kind == 'benchmark' else ''}{Path(self.path).resolve().name}"

    @property
    def splits(self) -> set[str | None]:
        """The splits in the names of its files: train, validation or test; None for other names."""
        if not self.is_copied:
            return {None}
        place = Path(self.path)
        names = [name for name, _ in files_of(place)] if place.is_dir() else [place.resolve().name]
        return set(map(split_of_file, names))


def are_split(given: Sequence[Given]) -> bool:
    """Whether the names of files say which rows are held out, and not of all rows that they are."""
    splits = set[str | None]().union(*(one.splits for one in given))
    return bool(splits & HELD_OUT) and bool(splits - HELD_OUT)


@dataclass(frozen=True)
class Found:
    """What the rows of all files have in common."""

    given: Sequence[Given] = ()
    kept: int = 0
    """Examples that the checks keep."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Check -> examples that it drops."""
    categories: Mapping[str, int] = field(default_factory=dict)
    longest: int = 0
    """Tokens of the longest example."""
    longest_pair: int = 0
    """Tokens of the longest preference pair's prompt and longer answer."""
    answer: int = 0
    """Tokens of an answer with its trace and calls; 95 % have at most as many."""
    estimated: bool = True
    """Whether tokens are estimated from bytes, because the base model's tokenizer is not here yet."""
    task: Mapping[str, Any] | None = None
    """`evaluation.task`; None: answers are free text."""
    has_tools: bool = False
    has_traces: bool = False
    writes_traces: bool = True
    """Whether the chat template writes traces of reasoning; True if it is not known."""

    @property
    def margin(self) -> float:
        """Factor on the numbers of tokens."""
        return MARGIN if self.estimated else 1.0

    def of(self, kind: Kind) -> list[Given]:
        return [one for one in self.given if one.kind == kind]


def read(paths: Sequence[str]) -> list[Given]:
    """Read the files.

    Raises:
        InputError: a file cannot be read, or two have the same name.
    """
    read_files = [(path, load([path])) for path in paths]
    given = [Given(path, one.kind, one.layout, one.records, one.revision) for path, one in read_files]
    if elsewhere := next((one for one in given if one.kind == "benchmark" and not one.is_copied), None):
        raise InputError(
            f"--data: {elsewhere.path}: benchmark questions are read from files", "save them as a file, and name that"
        )
    names = Counter(one.name for one in given)
    if twice := next((one for one in given if names[one.name] > 1), None):
        what = f"two files would become {twice.name}" if twice.is_copied else f"{twice.name} is named twice"
        raise InputError(f"--data: {what}", "rename one of them" if twice.is_copied else "name it once")
    return given


def examine(given: Sequence[Given], task: str, tokens: Tokens = ESTIMATED) -> Found:
    """Check the rows of the files. Nothing is written.

    Args:
        task: auto, labels, json or text.
        tokens: the base model's tokenizer and template.
    Raises:
        InputError: no file has examples, or the answers do not fit the task.
    """
    examples = [record for one in given if one.kind == "examples" for record in one.records]
    if given and not examples:
        kinds = ", ".join(sorted({one.kind for one in given}))
        raise InputError(
            f"--data: no examples to train on, only {kinds}",
            "name a file with prompts and answers, too; see docs/sources.md",
        )
    pairs = [record for one in given if one.kind == "preferences" for record in one.records]
    longest_pair = max((_tokens(pair, tokens) for pair in pairs), default=0)
    if not examples:
        return Found()
    judged = judge(examples, [], Rules(), tokens)
    rows = [record for record, reason in zip(judged.records, judged.reason, strict=True) if reason is None]
    answers = [response_text(record["messages"]) for record in rows]
    lengths = sorted(tokens.count([_generated(record) for record in rows]))
    return Found(
        given,
        kept=len(rows),
        dropped=dict(Counter(reason for reason in judged.reason if reason)),
        categories=Counter(str(record["category"]) for record in rows if record.get("category") is not None),
        longest=max((_tokens(record, tokens) for record in rows), default=0),
        longest_pair=longest_pair,
        estimated=tokens.estimated,
        answer=lengths[math.ceil(0.95 * len(lengths)) - 1] if lengths else 0,
        task=_task(task, rows, answers),
        has_tools=any(
            record.get("tools") or any(message.get("tool_calls") for message in record["messages"]) for record in rows
        ),
        has_traces=any(_has_trace(record) for record in rows),
        writes_traces=_writes_traces(rows, tokens),
    )


def _generated(record: Mapping[str, Any]) -> str:
    """What the model has to write for the last answer: its trace, text and calls."""
    message: Mapping[str, Any] = next((one for one in reversed(record["messages"]) if one["role"] == "assistant"), {})
    calls = message.get("tool_calls")
    parts = (
        message.get("reasoning_content"),
        message.get("content"),
        json.dumps(calls, ensure_ascii=False) if calls else None,
    )
    return "\n".join(filter(None, parts))


def _has_trace(record: Mapping[str, Any]) -> bool:
    return any(message.get("reasoning_content") for message in record["messages"])


def _writes_traces(rows: Sequence[Mapping[str, Any]], tokens: Tokens) -> bool:
    """Whether the chat template writes the first trace: without it, the conversation is shorter."""
    first = next((record for record in rows if _has_trace(record)), None)
    if first is None or tokens.rendered is None:
        return True
    plain = [
        {key: value for key, value in message.items() if key != "reasoning_content"} for message in first["messages"]
    ]
    return tokens.rendered(first["messages"], first.get("tools")) != tokens.rendered(plain, first.get("tools"))


def _tokens(record: Mapping[str, Any], tokens: Tokens) -> int:
    """Tokens of an example, or of a pair with the longer answer."""
    conversations = [record["messages"]]
    if rejected := record.get("rejected"):
        conversations.append([*record["messages"][: record["asked"]], *rejected])
    return max(_length(messages, record.get("tools"), tokens) for messages in conversations)


def _length(messages: Messages, tools: Tools, tokens: Tokens) -> int:
    """Tokens of a conversation. Without a template the notation of JSON stands for that of one."""
    rendered = tokens.rendered(messages, tools) if tokens.rendered else None
    return tokens.count([json.dumps([messages, tools], ensure_ascii=False)])[0] if rendered is None else rendered


def _task(task: str, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, Any] | None:
    """`evaluation.task` for these answers.

    Raises:
        InputError: the answers are not of the requested kind.
    """
    if task == "text":
        return None
    labels = {"labels": "auto"} if _are_labels(rows, answers) else None
    fields = _json_task(rows, answers)
    if task == "labels" and labels is None:
        distinct = len(set(answers))
        raise InputError(
            f"--task labels: {distinct} different answers in {len(answers)} examples are not labels",
            f"at most {MAX_LABELS} labels, each on four examples on average; or leave --task out",
        )
    if task == "json" and fields is None:
        raise InputError(
            "--task json: the answers are not JSON objects with the same fields, one of them with few different values",
            "leave --task out, or set evaluation.task in params.yaml",
        )
    return {"labels": labels, "json": fields, "auto": labels or fields}[task]


def _are_labels(rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> bool:
    single = all(sum(message["role"] == "assistant" for message in record["messages"]) == 1 for record in rows)
    short = all(answer and len(answer) <= 60 and "\n" not in answer and parse(answer) is None for answer in answers)
    return single and short and 2 <= len(set(answers)) <= min(MAX_LABELS, FEW * len(answers))


def _json_task(rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, Any] | None:
    """Fields of JSON answers with their values, and the field to score: the
    rows' category, or else the one with the most values."""
    parsed = [value for answer in answers if (value := parse(answer)) is not None]
    shapes = Counter(tuple(value) for value in parsed)
    if not shapes or not (names := shapes.most_common(1)[0][0]) or shapes[names] < JSON_SHARE * len(answers):
        return None
    values: dict[str, Counter[Any]] = defaultdict(Counter)
    for value in parsed:
        for name in names:
            text = value.get(name)
            values[name][text if isinstance(text, str) else None] += 1
    fields = {name: _allowed(values[name]) for name in names}
    listed = [name for name in names if fields[name]]
    if not listed:
        return None
    categories = {record.get("category") for record in rows}
    score = next(
        (name for name in listed if set(fields[name]) == categories), max(listed, key=lambda name: len(fields[name]))
    )
    return {"fields": fields, "score": score}


def _allowed(values: Counter[Any]) -> list[str]:
    """The values of a field if they are few texts, most frequent first; else none, which allows any text."""
    few = None not in values and "" not in values and 2 <= len(values) <= min(MAX_VALUES, FEW * values.total())
    return [text for text, _ in values.most_common()] if few else []


def fitting_length(tokens: float, limit: int) -> int:
    """The smallest of 256, 512, 1024, ... that is not less than `tokens`; at most `limit`."""
    length = 256
    while length < tokens:
        length *= 2
    return min(length, limit)


def rows_of(given: Iterable[Given]) -> int:
    return sum(len(one.records) for one in given)
