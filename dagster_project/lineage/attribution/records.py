"""The records that an adapter was trained on, as token ids, labels and weights of its training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.records import read_table
from dagster_project.core.text import many

COLUMNS = ("input_ids", "labels", "weights")


@dataclass(frozen=True)
class Example:
    """One tokenized example, (tokens,) each."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class TrainedRecord:
    """A record and its examples: one, or several if it was split or has one for each answer.

    Copies of an example are one.
    """

    example_id: str
    examples: tuple[Example, ...]


def seen_ids(adapter: Path) -> set[str]:
    """Ids of all records in a training step of an adapter."""
    return {row["example_id"] for row in read_table(adapter / "examples.parquet", ["example_id"])}


def trained_records(adapter: Path, tokenized: Path) -> list[TrainedRecord]:
    """Exactly the records that were in a training step of an adapter, by id.

    Args:
        adapter: its folder, with `examples.parquet`.
        tokenized: the tokenized data that it was trained on.
    Raises:
        InputError: a record of a training step is not in the tokenized data.
    """
    seen = seen_ids(adapter)
    found: dict[str, dict[Example, None]] = {}
    for row in read_table(tokenized / "train.parquet", ["example_ids", "lengths", *COLUMNS]):
        bounds = pairwise(accumulate(row["lengths"], initial=0))
        for name, (start, stop) in zip(row["example_ids"], bounds, strict=True):
            if name in seen:
                parts = (tuple(row[column][start:stop]) for column in COLUMNS)
                found.setdefault(name, {})[Example(*parts)] = None
    if lost := seen - found.keys():
        raise InputError(
            f"{len(lost)} of {many(len(seen), 'record')} of the training are not in {tokenized.name}:"
            " it is not the data of this training",
            "restore it with `dvc checkout --force`, then run the same command again",
        )
    return [TrainedRecord(name, tuple(found[name])) for name in sorted(found)]


def sha256_of_records(records: list[TrainedRecord]) -> str:
    """Identity of the records: ids, tokens, labels and weights."""
    return sha256_of_text("\n".join(sha256_of_text(repr(record)) for record in records))
