"""A check: one object with its fact about each row, the condition on it, severity, hint, and content of findings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from dagster_project.core.imports import import_pandera
from dagster_project.core.messages import Message, argument_texts, calls
from dagster_project.core.records import prompt_text, response_text, subject_text
from dagster_project.core.stored_rows import StoredRows
from dagster_project.curation.checks.review import Waived
from dagster_project.curation.checks.token_counts import Tokens
from dagster_project.curation.sources.benchmarks import Item

if TYPE_CHECKING:
    import pandera.polars as pa

    from dagster_project.curation.checks.features import Features

Action = Literal["fix", "drop", "review", "warn", "fail"]
Severity = Literal["error", "warn", "info"]
Kind = Literal["examples", "preferences", "benchmark"]
Values = Sequence[bool] | Sequence[str | None] | Sequence[int | None]
T = TypeVar("T")


def text_of(record: Mapping[str, Any]) -> str:
    """All messages of a record, or both sides of a pair: contents, reasoning and the texts in arguments of calls."""
    parts: list[str] = []
    for message in (*record["messages"], *(record.get("rejected") or ())):
        parts.append(message["content"])
        if len(message) > 2:
            parts += [message["reasoning_content"]] if message.get("reasoning_content") else []
            parts += _argument_texts(message)
    return "\n".join(parts)


def _argument_texts(message: Message) -> list[str]:
    """The texts in the arguments of a message's calls."""
    return [text for call in calls(message) for _, text in argument_texts(call.arguments) if isinstance(text, str)]


def named_text_of(record: Mapping[str, Any]) -> str:
    """As `text_of`, with the names of speakers and arguments.

    The name of an argument comes before its value, because it identifies the kind of value: "phone: 0151 123456".
    """
    parts = []
    for message in (*record["messages"], *(record.get("rejected") or ())):
        parts += [message["content"], *(message[key] for key in ("reasoning_content", "name") if message.get(key))]
        for call in calls(message):
            parts += [f"{key}: {text}" if key else str(text) for key, text in argument_texts(call.arguments)]
    return "\n".join(parts)


def part_text(record: Mapping[str, Any], part: str) -> str:
    """A part of a record that is compared separately.

    Args:
        part: "prompt", "response", "rejected", or all of "reasoning_content" or "tool_calls".
    """
    if part == "rejected":
        return response_text(record["rejected"])
    messages = record["messages"]
    if part == "reasoning_content":
        return "\n".join(message[part] for message in messages if message.get(part))
    if part == "tool_calls":
        return "\n".join(text for message in messages for text in _argument_texts(message))
    return response_text(messages) if part == "response" else subject_text(messages)


@dataclass(frozen=True)
class Limits:
    """What the facts depend on besides the rows."""

    tokens: Tokens
    max_tokens: int
    min_response_tokens: int
    near_duplicate_similarity: float
    """Minimum similarity of reported near-copies. Less similar ones share a cluster, too."""

    @property
    def identity(self) -> tuple[object, ...] | None:
        """What facts about one row depend on besides the row; None if that is unknown."""
        tokens = self.tokens.identity
        return None if tokens is None else (tokens, self.max_tokens, self.min_response_tokens)


class Shared:
    """Values that several checks need, computed once."""

    def __init__(self) -> None:
        self._shared: dict[Callable[..., Any], Any] = {}

    def shared(self, compute: Callable[[Self], T]) -> T:
        """`compute(self)`, computed on the first call."""
        if compute not in self._shared:
            self._shared[compute] = compute(self)
        return self._shared[compute]


class Rows(Shared):
    """A block of records, for facts that depend on one record each."""

    def __init__(self, records: Sequence[dict[str, Any]], limits: Limits) -> None:
        """Args:
        records: canonical records with `source` and `source_row`; pairs have `rejected` (messages), `asked` (number of
            `messages` in the prompt), `margin` and `same_prompt`; benchmark questions have `labelled`.
        """
        super().__init__()
        self.records, self.limits = records, limits

    @cached_property
    def metas(self) -> list[dict[str, Any]]:
        nothing: dict[str, Any] = {}
        return [json.loads(record["meta"]) if record["meta"] != "{}" else nothing for record in self.records]

    @cached_property
    def rich(self) -> list[int]:
        """Indices of the records with tools, or with a message that has more than role and content."""
        found = []
        for i, record in enumerate(self.records):
            messages = chain(record["messages"], record.get("rejected") or ())
            if record.get("tools") or any(len(message) > 2 for message in messages):
                found.append(i)
        return found

    @cached_property
    def texts(self) -> list[str]:
        return [text_of(record) for record in self.records]

    @cached_property
    def prompts(self) -> list[str]:
        return [prompt_text(record["messages"]) for record in self.records]

    @cached_property
    def responses(self) -> list[str]:
        return [response_text(record["messages"]) for record in self.records]


class DataSet(Shared):
    """All records, for facts that depend on several records.

    Records are decoded when they are read; features are in memory.
    """

    def __init__(
        self,
        records: StoredRows,
        features: Features,
        held_out: Sequence[Item],
        waived: Waived,
        limits: Limits,
        dropped: Collection[int],
    ) -> None:
        """Args:
        held_out: questions that must not be trained on.
        dropped: indices of the records that checks of single records drop.
        """
        super().__init__()
        self.records, self.features, self.held_out = records, features, held_out
        self.waived, self.limits, self.dropped = waived, limits, dropped


def is_null(limits: Limits, name: str) -> pa.Column:
    """The fact is text that describes a fault, or null."""
    pa = import_pandera()
    import polars as pl

    return pa.Column(
        pl.String,
        pa.Check(lambda data: data.lazyframe.select(pl.col(data.key).is_null()), name=name, ignore_na=False),
        nullable=True,
    )


def is_true(limits: Limits, name: str) -> pa.Column:
    pa = import_pandera()
    import polars as pl

    return pa.Column(pl.Boolean, pa.Check(lambda data: data.lazyframe.select(pl.col(data.key)), name=name))


@dataclass(frozen=True)
class Check:
    """A check on each row or, without `column` and `of_set`, on the set as a whole."""

    name: str
    """The same in code, reports, UI, command line, and as the name of its column in the table of facts."""
    description: str
    """The property of good data that it tests."""
    severity: Severity
    hint: str
    """How to fix what it finds."""
    action: Action = "drop"
    """Default action of a stage on a row that violates it; params.yaml can override it."""
    column: Callable[[Rows, str], Values] | None = None
    """Rows and the check's name -> the fact about each row, which depends on that row only."""
    of_set: Callable[[DataSet, str], Mapping[int, str]] | None = None
    """Set and the check's name -> the fault of each row that has one, which depends on other rows."""
    holds: Callable[[Limits, str], pa.Column] = is_null
    """Limits and the check's name -> type of the column, and the condition on its values."""
    kind: Kind | None = None
    """The only kind of data that it applies to; None for every kind."""
    quotes: bool = False
    """Whether the fact quotes the text ("mojibake: 'cafÃ©'"). Findings then show it as the example, in place of the
    start of the row, so the quotation must be masked (`privacy.mask`)."""
    worst: Callable[[Sequence[Any]], Severity] | None = None
    """Facts of the rows that violate it -> severity, for checks whose severity depends on them; params.yaml can
    override it."""
    note: Callable[[DataSet, Sequence[Any]], list[str]] = lambda data, facts: []
    """Set, and the facts of the rows that violate it or did before their repair -> note with figures."""


def kinds(data: DataSet, facts: Sequence[str]) -> list[str]:
    """The most frequent kinds of fault, of facts such as "mojibake: 'cafÃ©'": "mojibake 3, control character 1"."""
    found = Counter(fact.partition(":")[0] for fact in facts)
    return [", ".join(f"{kind} {n}" for kind, n in found.most_common(5))] if found else []
