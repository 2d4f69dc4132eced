"""Writes the tombstones that curation/sources/erased.py reads, and reads which models an erasure deleted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dagster_project.core.records import write_text
from dagster_project.curation.sources.erased import TOMBSTONES
from dagster_project.lineage.notes import read_note


def of_deleted(root: Path, missing: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Missing outputs, of which those that an erasure deleted have no command that would bring the records back.

    Args:
        missing: outputs with md5 and the commands that fetch them (`fetch`).
    """
    certificates = {path.relative_to(root).as_posix(): read_note(path) for path in (root / CERTIFICATES).glob("*.json")}
    deleted = dict[str, str]()
    for name, certificate in certificates.items() if missing else ():
        with suppress(AttributeError, KeyError, TypeError):  # a signature, or a file of somebody else
            models = [one for outcome in ("made again", "retired") for one in certificate["models"][outcome]]
            deleted |= {one["before"]: name for one in models if one["before"] != one.get("after")}
    note = "`pedigree erase` deleted it ({}); what brings it back also brings back the records"
    return [
        {**one, "fetch": note.format(deleted[one["md5"]])} if one.get("md5") in deleted else dict(one)
        for one in missing
    ]


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
