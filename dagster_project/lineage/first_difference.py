"""Locates the first difference between two versions of a file: tensor
(safetensors), row and field (Parquet), key (JSON), or line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dagster_project.core.text import many
from dagster_project.curation.checks.privacy import mask

SHOWN = 120
"""Longest value shown, in characters."""


def first_difference(recorded: Path, made: Path) -> dict[str, Any]:
    """The first difference between two files whose bytes differ.

    Returns:
        {"tensor", "max_abs_difference", "tensors_differing", "tensors"}, {"row", "field", "recorded", "made"},
        {"field", "recorded", "made"}, {"line", "recorded", "made"} or {"byte"}. Rows and lines count from 0; personal
        data is masked and long values are truncated.
    """
    from safetensors import SafetensorError

    compare = {".safetensors": _tensor, ".parquet": _row, ".json": _field}.get(made.suffix, _line)
    try:
        difference = compare(recorded, made)
    except (OSError, ValueError, NotImplementedError, SafetensorError):
        difference = {}  # a file is invalid, but its bytes can still be compared
    return difference or {"byte": _byte(recorded, made)}


def _tensor(recorded: Path, made: Path) -> dict[str, Any]:
    import torch
    from safetensors import safe_open

    with safe_open(recorded, framework="pt") as a, safe_open(made, framework="pt") as b:
        names, others = set(a.keys()), set(b.keys())
        for name in sorted(names ^ others):
            return {"tensor": name, "only": "recorded" if name in names else "made"}
        differences: list[dict[str, Any]] = []
        for name in sorted(names):
            tensor_a, tensor_b = a.get_tensor(name), b.get_tensor(name)
            if tensor_a.shape != tensor_b.shape or tensor_a.dtype != tensor_b.dtype:
                shapes = {
                    "recorded": f"{tensor_a.dtype} {tuple(tensor_a.shape)}",
                    "made": f"{tensor_b.dtype} {tuple(tensor_b.shape)}",
                }
                differences.append({"tensor": name, **shapes})
            elif not torch.equal(
                *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (tensor_a, tensor_b))
            ):
                differences.append(
                    {"tensor": name, "max_abs_difference": float((tensor_a.double() - tensor_b.double()).abs().max())}
                )
    return {**differences[0], "tensors_differing": len(differences), "tensors": len(names)} if differences else {}


def _row(recorded: Path, made: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    table_a, table_b = pq.read_table(recorded), pq.read_table(made)
    if table_a.schema != table_b.schema:
        return {"field": "schema", "recorded": _shown(str(table_a.schema)), "made": _shown(str(table_b.schema))}
    for row, (a, b) in enumerate(zip_longest(_rows(table_a), _rows(table_b))):
        if a is None or b is None:
            return {"row": row, "recorded": many(table_a.num_rows, "row"), "made": many(table_b.num_rows, "row")}
        for name in a:
            if (difference := _first_key(a[name], b[name], name)) is not None:
                return {"row": row, **difference}
    return {}


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches():
        yield from batch.to_pylist()


def _field(recorded: Path, made: Path) -> dict[str, Any]:
    return _first_key(json.loads(recorded.read_bytes()), json.loads(made.read_bytes()), "") or {}


def _first_key(a: Any, b: Any, path: str) -> dict[str, Any] | None:
    """The first key, in the recorded order, whose values differ; None if the values are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            difference = _first_key(a.get(key, ABSENT), b.get(key, ABSENT), f"{path}.{key}" if path else str(key))
            if difference is not None:
                return difference
        return None
    if isinstance(a, list) and isinstance(b, list):
        for i, (item_a, item_b) in enumerate(zip_longest(a, b, fillvalue=ABSENT)):
            if (difference := _first_key(item_a, item_b, f"{path}[{i}]")) is not None:
                return difference
        return None
    # compared as written: 1 is not True, and NaN equals NaN
    return None if repr(a) == repr(b) else {"field": path, "recorded": _shown(a), "made": _shown(b)}


def _line(recorded: Path, made: Path) -> dict[str, Any]:
    with recorded.open(encoding="utf-8") as file_a, made.open(encoding="utf-8") as file_b:
        for number, (a, b) in enumerate(zip_longest(file_a, file_b, fillvalue=ABSENT)):
            if a != b:
                return {"line": number, "recorded": _shown(a), "made": _shown(b)}
    return {}


def _byte(recorded: Path, made: Path) -> int:
    position = 0
    with recorded.open("rb") as file_a, made.open("rb") as file_b:
        while True:
            a, b = file_a.read(1 << 20), file_b.read(1 << 20)
            if a != b:
                return position + next(
                    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
                )
            if not a:
                return position
            position += len(a)


def _shown(value: Any) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).split())
    masked = mask(text)
    return masked if len(masked) <= SHOWN else f"{masked[:SHOWN]}..."


ABSENT = "(nothing)"
