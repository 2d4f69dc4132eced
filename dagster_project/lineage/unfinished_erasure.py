"""An erasure that has not ended: its plan is on disk, by which it goes on."""

from __future__ import annotations

from pathlib import Path

PLAN = Path(".dvc", "tmp", "pedigree", "erase")
"""Folder of the plan of an unfinished erasure. It holds the text, and is deleted at the end."""
FILE = PLAN / "plan.json"
NOTE = (
    "an erasure is unfinished: the records are still in places that it has not reached;"
    " `pedigree erase --resume` goes on with it"
)


def is_unfinished(root: Path) -> bool:
    return (root / FILE).is_file()
