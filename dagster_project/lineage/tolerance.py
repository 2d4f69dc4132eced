"""How far two versions of an output may differ if other kinds of machines made
them: tensor by tensor, number by number, answer by answer.

What is measured, and the bounds with how they were found: docs/verify.md, "Elsewhere".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OF_MACHINE = {
    "machine",
    "environment",
    "versions",
    "device",
    "dtype",
    "attention",
    "output_sha256",
    "sha256_before",
    "sha256_after",
}
"""Keys of reports and of training.json that are the machine's, or hashes of
weights. Reported as causes, not compared."""
GENERATED = {
    "answer",
    "label",
    "reasoning",
    "tool_calls",
    "correct",
    "predicted",
    "sft_answer",
    "aligned_answer",
    "sft_unfinished",
    "aligned_unfinished",
}
"""Columns of tables that hold what a model wrote or chose. All other texts are data, and equal on any machine."""
DERIVED = {"calibration.csv"}
"""Tables whose rows are counts of model scores; the report that is compared has their summary."""
SETTINGS = {"settings", "chosen", "seed"}
"""Keys of training.json whose numbers are parameters."""


@dataclass(frozen=True)
class Deviation:
    """The largest difference of one measure in one file."""

    artifact: str
    measure: str
    """`update`, `weight`, `number`, `column`, `interval` or `answers`; `equal` for what no machine may change."""
    value: float
    where: str
    """Tensor, column or key."""


def deviations(artifact: str, recorded: Path, made: Path, starts: Sequence[Path] = ()) -> list[Deviation]:
    """The largest difference of each measure between two versions of a file.

    Args:
        artifact: path of the file in the project; its ending decides how it is compared.
        starts: weights that the stage started from, to measure differences relative to the update.
    """
    if Path(artifact).name in DERIVED:
        return []
    compare = {".safetensors": _tensors, ".parquet": _rows, ".json": _fields, ".csv": _cells}.get(Path(artifact).suffix)
    found = compare(recorded, made, starts) if compare else iter([("equal", math.inf, "")])
    largest: dict[str, Deviation] = {}
    for measure, value, where in found:
        if value != 0 and (measure not in largest or value > largest[measure].value):
            largest[measure] = Deviation(artifact, measure, value, where)
    return list(largest.values())


Found = Iterator[tuple[str, float, str]]
"""(measure, value, where)."""


def _tensors(recorded: Path, made: Path, starts: Sequence[Path]) -> Found:
    import torch
    from safetensors import safe_open

    with safe_open(recorded, framework="pt") as a, safe_open(made, framework="pt") as b:
        names = set(a.keys()) & set(b.keys())
        for name in sorted(set(a.keys()) ^ set(b.keys())):
            yield "equal", math.inf, name
        shape = {name: tuple(a.get_slice(name).get_shape()) for name in names}
        alike = {name for name in names if shape[name] == tuple(b.get_slice(name).get_shape())}
        for name in sorted(names):
            one, other = a.get_tensor(name), b.get_tensor(name)
            if name not in alike or one.dtype != other.dtype or not one.is_floating_point():
                yield from _equal(name in alike and one.dtype == other.dtype and bool((one == other).all()), name)
                continue
            left, right = name.replace("lora_A", "lora_B"), name.replace("lora_B", "lora_A")
            if left != right and {left, right} <= alike and len(shape[left]) == len(shape[right]) == 2:
                if name == left:  # a pair counts once, by its product
                    yield (
                        "update",
                        _low_rank(*(weights.get_tensor(part).double() for weights in (a, b) for part in (left, right))),
                        name,
                    )
                continue
            rounding = torch.finfo(one.dtype).eps
            one, other, start = one.double(), other.double(), _start(starts, name, shape[name])
            if start is not None:  # an update below the rounding of the stored numbers counts as that rounding
                yield (
                    "update",
                    _ratio(float((one - other).norm()), max(float((one - start).norm()), rounding * float(one.norm()))),
                    name,
                )
            yield "weight", _ratio(_largest(one - other), _largest(one)), name


def _equal(equal: bool, where: str) -> Found:
    if not equal:
        yield "equal", math.inf, where


def _start(starts: Sequence[Path], name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The tensor of this name that training or merging started from; None if there is none of this shape."""
    from safetensors import safe_open

    for file in starts:
        with safe_open(file, framework="pt") as weights:
            # no mapping
            if name in weights.keys() and tuple(weights.get_slice(name).get_shape()) == shape:  # noqa: SIM118
                return weights.get_tensor(name).double()
    return None


def _low_rank(b: torch.Tensor, a: torch.Tensor, b2: torch.Tensor, a2: torch.Tensor) -> float:
    """|B A - B' A'| / |B A| in the Frobenius norm, without the products of full size.

    Args:
        b, a: recorded factors, (out, rank) and (rank, in), float64.
        b2, a2: reproduced factors.
    """
    import torch

    def norm(left: torch.Tensor, right: torch.Tensor) -> float:
        return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T).norm())

    return _ratio(norm(torch.cat([b, -b2], 1), torch.cat([a, a2])), norm(b, a))


def _rows(recorded: Path, made: Path, starts: Sequence[Path]) -> Found:
    import pyarrow.parquet as pq

    a, b = pq.read_table(recorded), pq.read_table(made)
    if a.schema != b.schema or a.num_rows != b.num_rows:
        yield "equal", math.inf, "schema" if a.schema != b.schema else "rows"
        return
    yield from _columns(a.to_pydict(), b.to_pydict())


def _cells(recorded: Path, made: Path, starts: Sequence[Path]) -> Found:
    import csv

    with recorded.open(encoding="utf-8", newline="") as one, made.open(encoding="utf-8", newline="") as other:
        a, b = list(csv.reader(one)), list(csv.reader(other))
    if a[:1] != b[:1] or len(a) != len(b) or {len(row) for row in a} != {len(row) for row in b}:
        yield "equal", math.inf, "rows"
        return
    tables = ({name: [_number(row[i]) for row in table[1:]] for i, name in enumerate(table[0])} for table in (a, b))
    yield from _columns(*tables)


def _columns(a: Mapping[str, list[Any]], b: Mapping[str, list[Any]]) -> Found:
    """Tables of the same shape: share of rows with another answer; and in the
    others, numbers relative to their column's scale."""
    count = max(map(len, a.values()), default=0)
    written = [name for name in a if name in GENERATED]
    changed = [any(a[name][i] != b[name][i] for name in written) for i in range(count)]
    if written and count:
        yield "answers", sum(changed) / count, ", ".join(written)
    for name in a:
        pairs = [
            (one, other) for one, other, other_answer in zip(a[name], b[name], changed, strict=True) if not other_answer
        ]
        if any(isinstance(one, float) for one, _ in pairs):
            scale = max((abs(one) for one, _ in pairs if _finite(one)), default=0.0)
            yield "column", max((_ratio(_gap(one, other), scale) for one, other in pairs), default=0.0), name
        elif any(one != other for one, other in pairs):
            yield "equal", math.inf, name


def _fields(recorded: Path, made: Path, starts: Sequence[Path]) -> Found:
    yield from _values(json.loads(recorded.read_bytes()), json.loads(made.read_bytes()), "", False)


def _values(a: Any, b: Any, path: str, exact: bool) -> Found:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            if key in OF_MACHINE or (key == "note" and "passed" in a):  # a note repeats numbers
                continue
            place = f"{path}.{key}" if path else str(key)
            interval = a.get(f"{key}_interval") or (a.get("interval") if key in {"difference", "value"} else None)
            if interval and _finite(a.get(key)) and _finite(b.get(key)) and not exact:
                yield _from_interval(a[key], b[key], interval, place)
            elif exact or not key.endswith("interval"):  # an interval moves with its figure
                yield from _values(a.get(key), b.get(key), place, exact or key in SETTINGS)
    elif isinstance(a, list) and isinstance(b, list):
        for i, (one, other) in enumerate(zip_longest(a, b)):
            yield from _values(one, other, f"{path}[{i}]", exact)
    elif isinstance(a, float) and isinstance(b, float) and not exact:
        yield "number", _ratio(_gap(a, b), max(abs(a), 1.0)), path
    elif repr(a) != repr(b):
        yield "equal", math.inf, path


def _from_interval(recorded: float, made: float, interval: Sequence[float], place: str) -> tuple[str, float, str]:
    """Difference of a figure, as a multiple of the distance from it to that end of its recorded interval.

    A plain number if it is that end.
    """
    distance = abs(recorded - (interval[0] if made < recorded else interval[1]))
    if distance == 0:
        return "number", _ratio(abs(recorded - made), max(abs(recorded), 1.0)), place
    return "interval", abs(recorded - made) / distance, place


def _gap(a: Any, b: Any) -> float:
    """0 for equal values (both missing or NaN), infinity for what is not a number in one of them."""
    if a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) if _finite(a) and _finite(b) else math.inf


def _ratio(difference: float, scale: float) -> float:
    """difference / scale; infinite where that is not a number, so that no bound admits it."""
    if difference == 0:
        return 0.0
    return difference / scale if scale and math.isfinite(difference) and math.isfinite(scale) else math.inf


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(cell: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(cell)
    return cell
