"""Label tasks, in which the whole response is a label: the set of labels, and the label of an answer."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, field_validator

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section
from dagster_project.core.text import listed, shortened

NO_LABEL = "(none)"
"""Predicted label of an answer without a valid label."""
MAX_LABELS = 200
"""`labels: auto` rejects more distinct responses than this,"""
MAX_DISTINCT_SHARE = 0.5
"""or more than this share of the training examples: such responses are free text."""
WRAPPING = " \t\"'`*“”‘’«»„"
"""Ignored on both sides of an answer: quotes and Markdown emphasis."""
ENDING = ".,;:!?…。！？"
"""Ignored at the end of an answer."""


class LabelTask(Section):
    """The whole response is one label, and nothing else."""

    labels: Literal["auto"] | list[str] = Field()
    """The labels, as a list, e.g. `[ham, spam]`. `auto`: every distinct response of the training split."""

    @field_validator("labels", mode="before")
    @classmethod
    def _auto_or_texts(cls, value: Any) -> Any:
        named = isinstance(value, list) and value and all(isinstance(name, str) and name.strip() for name in value)
        if value != "auto" and not named:
            raise ValueError('must be `auto`, or a list of labels as text; quote numbers, true and false: ["0", "1"]')
        return value

    @field_validator("labels")
    @classmethod
    def _distinct(cls, value: Literal["auto"] | list[str]) -> Literal["auto"] | list[str]:
        spellings = _spellings(value) if isinstance(value, list) else {}
        if same := next((found for found in spellings.values() if found.total() > 1), None):
            raise ValueError(
                f"{', '.join(map(repr, same.elements()))} are one label: case and punctuation at the end do not count"
            )
        if NO_LABEL in spellings:
            raise ValueError(f"{NO_LABEL!r} is reserved for answers without a label; choose another name")
        return value


@dataclass(frozen=True)
class LabelSet:
    """The labels that answers are scored by."""

    known: tuple[str, ...]
    """Labels of the training split, or those listed in params.yaml."""
    unseen: tuple[str, ...] = ()
    """With `auto`: labels that occur only in the test split. No instruction lists them, but answers with them are
    scored normally."""

    @cached_property
    def labels(self) -> list[str]:
        return [*self.known, *self.unseen]

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return {normalized(name): name for name in self.labels}

    def of_response(self, response: str) -> str | None:
        """Label of a whole reference response; None if it is not a label."""
        return self._by_name.get(normalized(response))

    def of_answer(self, answer: str) -> str | None:
        """Label of a model's answer: the whole answer, or else its first line. None if neither is a label."""
        first_line = next(iter(answer.strip().splitlines()), "")
        return self.of_response(answer) or self.of_response(first_line)


def normalized(text: str) -> str:
    """Normal form of a label: NFKC, case-folded, single spaces, without surrounding quotes and final punctuation.

    ' "Positive." '  ->  "positive";  "?!"  ->  "?!" (removing it would leave nothing)
    """
    line = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return line.lstrip(WRAPPING).rstrip(WRAPPING + ENDING) or line


def label_set(task: LabelTask, train: Sequence[str], test: Sequence[str]) -> LabelSet:
    """The labels of a task.

    Args:
        train: responses of the training split. With `auto` they are the labels, each in its most frequent spelling.
        test: responses of the test split.
    Raises:
        InputError: with `auto`, too many distinct responses; with a list, no response of the test split is in it.
    """
    if isinstance(task.labels, list):
        found = LabelSet(tuple(task.labels))
        if test and not any(found.of_response(text) for text in test):
            expected = listed([repr(shortened(name, 40)) for name in task.labels], 5)
            raise InputError(
                f"params.yaml: evaluation.task.labels: no response of the test split is one of {expected}; "
                f"the most frequent are {_frequent(test)}",
                "list the labels as the responses spell them, or write `labels: auto`",
            )
        return found
    spellings = _spellings(train)
    if not train or len(spellings) > MAX_LABELS or len(spellings) > MAX_DISTINCT_SHARE * len(train):
        raise InputError(
            f"params.yaml: evaluation.task.labels: auto: {len(spellings):,} different responses in the {len(train):,}"
            f" examples of the training split are not labels (at most {MAX_LABELS}, and half as many as examples)"
            + (f"; the most frequent are {_frequent(train)}" if train else ""),
            "list the labels that count (`labels: [a, b]`), or leave evaluation.task out: answers are then scored as"
            " free text",
        )
    others = {key: found for key, found in _spellings(test).items() if key not in spellings}
    for split, names in (("training", spellings), ("test", others)):
        if normalized(NO_LABEL) in names:
            raise InputError(
                f"params.yaml: evaluation.task.labels: auto: the response {NO_LABEL!r} of the {split} split is reserved"
                " for answers without a label",
                "rename it in the source",
            )
    known, unseen = (tuple(sorted(map(_most_frequent_spelling, names.values()))) for names in (spellings, others))
    return LabelSet(known, unseen)


def per_label(labels: LabelSet, sums: Sequence[float]) -> dict[str, dict[str, float]]:
    """Label -> true and predicted counts, precision, recall and F1 (0 where undefined).

    Args:
        sums: how often each label is true, predicted, and both, (3 * labels,).
    """
    n, table = len(labels.labels), {}
    for name, true, predicted, hit in zip(labels.labels, sums[:n], sums[n : 2 * n], sums[2 * n :], strict=True):
        table[name] = {
            "n": int(true),
            "predicted": int(predicted),
            "precision": round(float(hit / predicted), 4) if predicted else 0.0,
            "recall": round(float(hit / true), 4) if true else 0.0,
            "f1": round(float(2 * hit / (true + predicted)), 4) if true + predicted else 0.0,
        }
    return table


def _spellings(responses: Sequence[str]) -> dict[str, Counter[str]]:
    """Normalized label -> its spellings and how often each occurs."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for text in responses:
        spellings[normalized(text)][text.strip()] += 1
    return spellings


def _most_frequent_spelling(spellings: Mapping[str, int]) -> str:
    """The most frequent spelling; of equally frequent ones the first by code point."""
    return min(spellings, key=lambda text: (-spellings[text], text))


def _frequent(responses: Sequence[str]) -> str:
    counts = {_most_frequent_spelling(found): found.total() for found in _spellings(responses).values()}
    most = sorted(counts, key=lambda text: (-counts[text], text))[:3]
    return ", ".join(f"{shortened(text, 40)!r} ({counts[text]:,})" for text in most)
