"""Where do two versions of a file first differ? The tensor of a safetensors file, the row and field of a table, the key of a JSON document, else the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dagster_project.curation.checks.privacy import mask

SHOWN = 120
"""Characters shown of a value."""


def first_difference(recorded: Path, made: Path) -> dict[str, Any]:
    """The first place where two files differ that are not the same byte for byte.

    Returns:
        {"tensor", "max_abs_difference", "tensors_differing", "tensors"}, {"row", "field", "recorded", "made"}, {"field", "recorded", "made"},
        {"line", "recorded", "made"} or {"byte"}; rows and lines count from 0, as everywhere, and values are masked and cut.
    """
    from safetensors import SafetensorError

    look = {".safetensors": _tensor, ".parquet": _row, ".json": _field}.get(made.suffix, _line)
    try:
        found = look(recorded, made)
    except (OSError, ValueError, NotImplementedError, SafetensorError):  # one of them is no such file, and bytes can still be compared
        found = {}
    return found or {"byte": _byte(recorded, made)}


def _tensor(recorded: Path, made: Path) -> dict[str, Any]:
    import torch
    from safetensors import safe_open

    with safe_open(recorded, framework="pt") as a, safe_open(made, framework="pt") as b:
        names, others = set(a.keys()), set(b.keys())
        for name in sorted(names ^ others):
            return {"tensor": name, "only": "recorded" if name in names else "made"}
        found: list[dict[str, Any]] = []
        for name in sorted(names):
            one, other = a.get_tensor(name), b.get_tensor(name)
            if one.shape != other.shape or one.dtype != other.dtype:
                shapes = {"recorded": f"{one.dtype} {tuple(one.shape)}", "made": f"{other.dtype} {tuple(other.shape)}"}
                found.append({"tensor": name, **shapes})
            elif not torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))):
                found.append({"tensor": name, "max_abs_difference": float((one.double() - other.double()).abs().max())})
    return {**found[0], "tensors_differing": len(found), "tensors": len(names)} if found else {}


def _row(recorded: Path, made: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    one, other = pq.read_table(recorded), pq.read_table(made)
    if one.schema != other.schema:
        return {"field": "schema", "recorded": _shown(str(one.schema)), "made": _shown(str(other.schema))}
    for row, (a, b) in enumerate(zip_longest(_rows(one), _rows(other))):
        if a is None or b is None:
            return {"row": row, "recorded": f"{one.num_rows} rows", "made": f"{other.num_rows} rows"}
        for name in a:
            if (difference := _deep(a[name], b[name], name)) is not None:
                return {"row": row, **difference}
    return {}


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches():
        yield from batch.to_pylist()


def _field(recorded: Path, made: Path) -> dict[str, Any]:
    return _deep(json.loads(recorded.read_bytes()), json.loads(made.read_bytes()), "") or {}


def _deep(one: Any, other: Any, where: str) -> dict[str, Any] | None:
    """The first key, in the recorded order, under which two values differ; None if they are the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            found = _deep(one.get(key, ABSENT), other.get(key, ABSENT), f"{where}.{key}" if where else str(key))
            if found is not None:
                return found
        return None
    if isinstance(one, list) and isinstance(other, list):
        for i, (a, b) in enumerate(zip_longest(one, other, fillvalue=ABSENT)):
            if (found := _deep(a, b, f"{where}[{i}]")) is not None:
                return found
        return None
    # as written: 1 is not True, and not a number is not a number
    return None if repr(one) == repr(other) else {"field": where, "recorded": _shown(one), "made": _shown(other)}


def _line(recorded: Path, made: Path) -> dict[str, Any]:
    with recorded.open(encoding="utf-8") as one, made.open(encoding="utf-8") as other:
        for number, (a, b) in enumerate(zip_longest(one, other, fillvalue=ABSENT)):
            if a != b:
                return {"line": number, "recorded": _shown(a), "made": _shown(b)}
    return {}


def _byte(recorded: Path, made: Path) -> int:
    position = 0
    with recorded.open("rb") as one, made.open("rb") as other:
        while True:
            a, b = one.read(1 << 20), other.read(1 << 20)
            if a != b:
                return position + next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            if not a:
                return position
            position += len(a)


def _shown(value: Any) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).split())
    masked = mask(text)
    return masked if len(masked) <= SHOWN else f"{masked[:SHOWN]}..."


ABSENT = "(nothing)"
