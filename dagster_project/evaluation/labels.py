"""Classification without JSON: the whole response is the label. Which labels there are, and which one an answer gives."""

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

NO_LABEL = "(none)"
"""Predicted label of an answer that gives none."""
MAX_LABELS = 200
"""`labels: auto` refuses more different responses than this,"""
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
        if value != "auto" and not (isinstance(value, list) and value and all(isinstance(name, str) and name.strip() for name in value)):
            raise ValueError('must be `auto`, or a list of labels as text; quote numbers, true and false: ["0", "1"]')
        return value

    @field_validator("labels")
    @classmethod
    def _distinct(cls, value: Literal["auto"] | list[str]) -> Literal["auto"] | list[str]:
        spellings = _spellings(value) if isinstance(value, list) else {}
        if same := next((found for found in spellings.values() if found.total() > 1), None):
            raise ValueError(f"{', '.join(map(repr, same.elements()))} are one label: case and punctuation at the end do not count")
        if NO_LABEL in spellings:
            raise ValueError(f"{NO_LABEL!r} stands for answers that give no label; choose another name")
        return value


@dataclass(frozen=True)
class LabelSet:
    """The labels that answers are scored by."""

    known: tuple[str, ...]
    """The labels that a model can learn: those of the training split, or those listed in params.yaml."""
    unseen: tuple[str, ...] = ()
    """With `auto`: labels that only the test split has. No instruction names them, and an answer that gives one is scored like any other."""

    @cached_property
    def labels(self) -> list[str]:
        return [*self.known, *self.unseen]

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return {normalized(name): name for name in self.labels}

    def of_response(self, response: str) -> str | None:
        """The label that a reference response is, read as a whole."""
        return self._by_name.get(normalized(response))

    def of_answer(self, answer: str) -> str | None:
        """The label that a model's answer gives: the whole answer, or else its first line. None where that is no label."""
        first_line = next(iter(answer.strip().splitlines()), "")
        return self.of_response(answer) or self.of_response(first_line)


def normalized(text: str) -> str:
    """Equal for texts that are the same label: NFKC, case-folded, single spaces, without quotes around or punctuation at the end.

    ' "Positive." '  ->  "positive";  "?!"  ->  "?!" (nothing else would be left)
    """
    line = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return line.lstrip(WRAPPING).rstrip(WRAPPING + ENDING) or line


def label_set(task: LabelTask, train: Sequence[str], test: Sequence[str]) -> LabelSet:
    """The labels of a task.

    Args:
        train: responses of the training split. With `auto` they are the labels, each in its most frequent spelling.
        test: responses of the test split.
    Raises:
        InputError: with `auto`, the responses are too different to be labels; with a list, no response of the test split is in it.
    """
    if isinstance(task.labels, list):
        found = LabelSet(tuple(task.labels))
        if test and not any(found.of_response(text) for text in test):
            raise InputError(
                f"params.yaml: evaluation.task.labels: no response of the test split is one of {_listed(task.labels)}; "
                f"the most frequent are {_frequent(test)}",
                "list the labels as the responses spell them, or write `labels: auto`",
            )
        return found
    spellings = _spellings(train)
    if not train or len(spellings) > MAX_LABELS or len(spellings) > MAX_DISTINCT_SHARE * len(train):
        raise InputError(
            f"params.yaml: evaluation.task.labels: auto: {len(spellings):,} different responses in the {len(train):,} examples of the "
            f"training split are not labels (at most {MAX_LABELS}, and half as many as examples)"
            + (f"; the most frequent are {_frequent(train)}" if train else ""),
            "list the labels that count (`labels: [a, b]`), or leave evaluation.task out: answers are then scored as free text",
        )
    if normalized(NO_LABEL) in spellings:
        raise InputError(
            f"params.yaml: evaluation.task.labels: auto: the response {NO_LABEL!r} of the training split stands for answers that give no label",
            "rename it in the source",
        )
    others = {key: found for key, found in _spellings(test).items() if key not in spellings}
    return LabelSet(*(tuple(sorted(_usual(found) for found in names.values())) for names in (spellings, others)))


def per_label(labels: LabelSet, sums: Sequence[float]) -> dict[str, dict[str, float]]:
    """Label -> how many examples have it, how many answers give it, precision, recall and F1 (0 where there is nothing to divide by).

    Args:
        sums: how often each label is true, predicted, and both, (3 labels,).
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
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for text in responses:
        found[normalized(text)][text.strip()] += 1
    return found


def _usual(spellings: Mapping[str, int]) -> str:
    """The most frequent spelling; of equally frequent ones the first by code point."""
    return min(spellings, key=lambda text: (-spellings[text], text))


def _frequent(responses: Sequence[str]) -> str:
    counts = {_usual(found): found.total() for found in _spellings(responses).values()}
    most = sorted(counts, key=lambda text: (-counts[text], text))[:3]
    return ", ".join(f"{_cut(text)!r} ({counts[text]:,})" for text in most)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(_cut(name)) for name in names[:5]) + (", ..." if len(names) > 5 else "")


def _cut(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
