"""Writes the tombstones that curation/sources/erased.py reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster_project.core.records import write_text
from dagster_project.curation.sources.erased import TOMBSTONES


def add(root: Path, stones: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Add a line for each record that has none yet.

    Args:
        stones: keyed hashes: {"record", "texts"}.
        facts: what all of the lines state: key, date and reason.
    """
    path = root / TOMBSTONES
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    known = {json.loads(line)["record"] for line in lines}
    lines += [json.dumps({**stone, **facts}) for stone in stones if stone["record"] not in known]
    if lines:
        write_text(path, "".join(f"{line}\n" for line in lines))
