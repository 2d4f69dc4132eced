"""What a training command reports about its training: the order of the examples, and the curve of the loss.

Both are optional.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.text import visible

ORDER = ("examples.parquet", "examples.csv")
CURVE, STATE = "metrics.csv", "trainer_state.json"
COLUMNS = ("loss", "learning_rate", "grad_norm")
"""Columns of the curve besides the step. The validation loss is measured by Pedigree itself."""
LARGEST = 2**31 - 1
"""Of a step, an epoch or a row: int32."""
REWRITE = "write it as docs/own-trainer.md says, or leave it out"


def read_order(output: Path, examples: Sequence[tuple[str, int, int]], where: str) -> list[dict[str, Any]] | None:
    """The examples in training order.

    Args:
        examples: of the workspace.
        where: dotted path of the entry in params.yaml, for messages.
    Returns:
        Rows of `weight_audit.seen_schema`, each with the "row" of train.parquet if it is given; None if the command
        wrote none. Without a column epoch, it is the number of times that the example, or the row, has been used.
    Raises:
        InputError: a column is missing, a step is not a number or comes before an earlier one, or an example is not in
            the training split.
    """
    path = next((path for name in ORDER if (path := output / name).is_file()), None)
    if path is None:
        return None
    found: list[dict[str, Any]] = []
    known, used = {identity for identity, _, _ in examples}, Counter[Any]()
    step_before, position = 0, 0
    for number, line in enumerate(_lines(path, where, (("step",), ("row", "example_id")))):
        place = f"{where}: {path.name}, row {number}"
        step, row, identity = _whole(line, "step", place, 1), None, line.get("example_id")
        if line.get("row") not in (None, ""):
            row = _whole(line, "row", place, 0)
            if row >= len(examples):
                raise InputError(f"{place}: train.parquet has no row {row}", REWRITE)
            if identity not in (None, "", examples[row][0]):
                problem = f"row {row} is example {examples[row][0]}, not {visible(str(identity))}"
                raise InputError(f"{place}: {problem}", REWRITE)
            identity = examples[row][0]
        if identity not in known:
            raise InputError(f"{place}: example {visible(str(identity))} is not in the training split", REWRITE)
        if step < step_before:
            raise InputError(f"{place}: step {step} comes after step {step_before}", "write the rows in training order")
        key = identity if row is None else row
        used[key] += 1
        epoch = used[key] if line.get("epoch") in (None, "") else _whole(line, "epoch", place, 1)
        position = position + 1 if step == step_before else 0
        step_before = step
        found.append({"step": step, "epoch": epoch, "position": position, "example_id": identity, "row": row})
    if not found:
        raise InputError(f"{where}: {path.name} has no rows", REWRITE)
    return found


def tokens_of(order: Sequence[Mapping[str, Any]], examples: Sequence[tuple[str, int, int]]) -> dict[str, int]:
    """{"tokens", "trained_tokens"} of a training in this order; empty if an example_id names several rows."""
    rows = {identity: row for row, (identity, _, _) in enumerate(examples)}
    if len(rows) < len(examples) and any(one["row"] is None for one in order):
        return {}
    used = [examples[rows[one["example_id"]] if one["row"] is None else one["row"]] for one in order]
    return {"tokens": sum(tokens for _, tokens, _ in used), "trained_tokens": sum(trained for _, _, trained in used)}


def read_curve(output: Path, where: str) -> list[dict[str, float]]:
    """Points {"step", "loss", ...} with the columns that are known; empty if the command wrote none.

    Raises:
        InputError: metrics.csv or trainer_state.json cannot be read.
    """
    if (output / CURVE).is_file():
        lines = enumerate(_lines(output / CURVE, where, (("step",),)))
        points = [_point(line, f"{where}: {CURVE}, row {number}") for number, line in lines]
    elif (output / STATE).is_file():
        try:
            history = json.loads((output / STATE).read_text(encoding="utf-8"))["log_history"]
            points = [_point(entry, f"{where}: {STATE}") for entry in history]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{where}: {STATE} is not the state of a Trainer: {visible(str(error))}"
            raise InputError(problem, REWRITE) from None
    else:
        return []
    return sorted((point for point in points if len(point) > 1), key=lambda point: point["step"])


def _point(line: Mapping[str, Any], place: str) -> dict[str, float]:
    point: dict[str, float] = {"step": _whole(line, "step", place, 0)}
    for name in COLUMNS:
        if line.get(name) in (None, ""):
            continue
        try:
            point[name] = float(line[name])
        except (ValueError, TypeError):
            raise InputError(f"{place}: {name} is not a number: {visible(str(line[name]))[:80]}", REWRITE) from None
    return point


def _whole(line: Mapping[str, Any], name: str, place: str, least: int) -> int:
    value = line.get(name)
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not (least <= number <= LARGEST and number.is_integer()):
        raise InputError(f"{place}: {name} is not a whole number from {least} on: {visible(str(value))[:80]}", REWRITE)
    return int(number)


def _lines(path: Path, where: str, required: Sequence[Sequence[str]]) -> Iterator[Mapping[str, Any]]:
    """Rows of a CSV or Parquet file.

    Args:
        required: groups of columns, of each of which the file needs one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                table = csv.DictReader(file)
                _refuse_columns(path.name, table.fieldnames, where, required)
                yield from table
        else:
            with pq.ParquetFile(path) as parquet:
                _refuse_columns(path.name, parquet.schema_arrow.names, where, required)
                for batch in parquet.iter_batches(8192):
                    yield from batch.to_pylist()
    except (UnicodeDecodeError, csv.Error, pa.ArrowException, OSError) as error:
        problem = f"{where}: {path.name} cannot be read: {visible(str(error).splitlines()[0])}"
        raise InputError(problem, REWRITE) from None


def _refuse_columns(name: str, columns: Sequence[str] | None, where: str, required: Sequence[Sequence[str]]) -> None:
    for group in required if columns is not None else ():
        if not set(group) & set(columns or ()):
            found = ", ".join(visible(repr(column))[:80] for column in columns or ())
            raise InputError(f"{where}: {name} has no column {' or '.join(group)}, but {found or 'none'}", REWRITE)
