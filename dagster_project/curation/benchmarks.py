"""Held-out benchmarks: what they ask and which answer is right, in the layouts of MMLU, HellaSwag, GSM8K, ARC and PIQA."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dagster_project.curation.files import Row, read_rows
from dagster_project.errors import InputError


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    place: str
    """ "<file>:<source row>"."""
    question: str
    choices: tuple[str, ...] = ()
    """Empty where the answer is free text."""
    answer: int | None = None
    """Index of the right choice; None where there is no label (HellaSwag's test split has -1), or no choice."""
    text: str = ""
    """The answer in words: the right choice, or the free text."""
    subject: str = ""
    continues: bool = False
    """The choices go on where the question breaks off, as in HellaSwag."""

    @property
    def row(self) -> int:
        return int(self.place.rpartition(":")[2])

    @property
    def prompt(self) -> str:
        """What a language model is to go on from, as lm-evaluation-harness words it for ARC and PIQA, and for MMLU in `mmlu_continuation`."""
        return self.question if self.continues else f"Question: {self.question}\nAnswer:"

    @property
    def labelled(self) -> bool:
        return bool(self.text)


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"`{key}`: expected text, found {type(row[key]).__name__}")
    return row[key]


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise ValueError("expected a list of two choices or more, each a text")
    return tuple(values)


def _index(label: Any, names: Sequence[str]) -> int | None:
    """A label as index into the choices: 2, "2" or "C"; None for none (absent, "", -1).

    Raises:
        ValueError: it is no choice's.
    """
    if label is None or label in {"", -1, "-1"}:
        return None
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int | str) and not isinstance(label, bool) and str(label).isdecimal() and int(label) < len(names):
        return int(label)
    raise ValueError(f"the answer {label!r} is none of the {len(names)} choices")


def _chosen(row: Mapping[str, Any], question: str, choices: tuple[str, ...], label: Any, names: Sequence[str]) -> Item:
    answer = _index(label, names)
    subjects = [row.get(key) for key in ("subject", "category", "activity_label")]
    subject = next((name for name in subjects if isinstance(name, str) and name), "")
    return Item("", question, choices, answer, "" if answer is None else choices[answer], subject)


def _mmlu(row: Mapping[str, Any]) -> Item:
    choices = _texts(row["choices"])
    return _chosen(row, _text(row, "question"), choices, row.get("answer"), string.ascii_uppercase[: len(choices)])


def _arc(row: Mapping[str, Any]) -> Item:
    names = _texts(row["choices"]["label"])
    return _chosen(row, _text(row, "question"), _texts(row["choices"]["text"]), row.get("answerKey"), names)


def _hellaswag(row: Mapping[str, Any]) -> Item:
    endings = _texts(row["endings"])
    return replace(_chosen(row, _text(row, "ctx"), endings, row.get("label"), [""] * len(endings)), continues=True)


def _piqa(row: Mapping[str, Any]) -> Item:
    return _chosen(row, _text(row, "goal"), (_text(row, "sol1"), _text(row, "sol2")), row.get("label"), ["", ""])


def _gsm8k(row: Mapping[str, Any]) -> Item:
    answer = row.get("answer")
    return Item("", _text(row, "question"), text=answer if isinstance(answer, str) else "")


BENCHMARKS: dict[str, tuple[frozenset[str], Callable[[Mapping[str, Any]], Item]]] = {
    "arc": (frozenset({"question", "choices", "answerKey"}), _arc),
    "mmlu": (frozenset({"question", "choices"}), _mmlu),
    "hellaswag": (frozenset({"ctx", "endings"}), _hellaswag),
    "piqa": (frozenset({"goal", "sol1", "sol2"}), _piqa),
    "gsm8k": (frozenset({"question", "answer"}), _gsm8k),
}
"""Name -> the keys that tell it, and how to read a row. In this order: the first whose keys a row has."""


def benchmark_of(rows: Sequence[Row]) -> str | None:
    """The benchmark layout of most rows that can be read, if any."""
    votes = dict.fromkeys(BENCHMARKS, 0)
    for row in rows:
        for name, (keys, _) in BENCHMARKS.items():
            if row.value is not None and keys <= row.value.keys():
                votes[name] += 1
                break
    best = max(votes, key=lambda name: votes[name])
    return best if 2 * votes[best] > sum(row.value is not None for row in rows) else None


def read_item(layout: str, row: Row, source: str) -> Item:
    """Raises:
    ValueError, KeyError, TypeError: it is no row of the layout.
    """
    if row.problem or row.value is None:
        raise ValueError(row.problem)
    return replace(BENCHMARKS[layout][1](row.value), place=f"{source}:{row.source_row}")


def read_items(path: Path, source: str) -> list[Item]:
    """The questions of a benchmark file, labelled or not.

    Raises:
        InputError: no known layout, or a row that is not of it (a benchmark of which a part was not read proves nothing).
    """
    rows = read_rows(path)
    layout = benchmark_of(rows)
    if layout is None:
        raise InputError(f"{path.name}: not a benchmark in a known layout", f"known: {'; '.join(_shapes())}")
    items = []
    for row in rows:
        try:
            items.append(read_item(layout, row, source))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path.name}: row {row.source_row} is no {layout} question: {error}", "mend the row, or take it out"
            ) from None
        except KeyError as error:
            raise InputError(
                f"{path.name}: row {row.source_row} is no {layout} question: no key {error}", "mend the row, or take it out"
            ) from None
    return items


def _shapes() -> Iterator[str]:
    return (f"{name} ({', '.join(sorted(keys))})" for name, (keys, _) in BENCHMARKS.items())


def read_multiple_choice(path: Path) -> list[Item]:
    """Questions that a model can be scored on.

    Raises:
        InputError: names the first row that is not such a question, or has no label (`unlabelled`).
    """
    items = read_items(path, path.name)
    for item in items:
        if not item.choices or item.answer is None:
            raise InputError(
                f"{item.place} is unlabelled: no score can be computed without the right choice"
                if item.choices
                else f"{item.place} has no choices",
                "use the split of the benchmark that has labels, of multiple-choice questions",
            )
    return items
