"""Our own sha256 of every output, beside DVC's md5: DVC trusts a read-only cache object without hashing it, we do not.

A stage's report holds the sha256 of the output it published. Before an output is used it is compared; one that differs though DVC calls it clean
came from a tampered cache object, is set aside, and is then made again like any output that is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from dagster_project.doors import dvc
from dagster_project.doors.dvc import StageState

KNOWN = Path(".dvc", "tmp", "pedigree", "sha256.json")
"""What was hashed before: path -> [mtime in ns, inode, size, sha256]. Only a cache: it can be deleted."""


def sha256_of(folder: Path, known: dict[str, list[int | str]] | None = None) -> str:
    """sha256 over the lines "<sha256 of file> <path>" of all files in a folder, in the order of their paths."""
    known = {} if known is None else known
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]:
        stat = path.stat()
        seen = [stat.st_mtime_ns, stat.st_ino, stat.st_size]
        have = known.get(str(path))
        if have is None or have[:3] != seen:
            with path.open("rb") as file:
                have = known[str(path)] = [*seen, hashlib.file_digest(file, "sha256").hexdigest()]
        lines.append(f"{have[3]} {path.relative_to(folder)}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def md5_of(path: Path) -> str:
    """By which DVC names the object."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _differs(published: str, out: Path) -> bool:
    return sha256_of(out) != published


def set_tampered_aside(root: Path, states: Iterable[StageState], held: bool = False) -> list[str]:
    """Compare what DVC calls clean with the sha256 it was published with; set aside what differs. Returns a line for each.

    What another process is at work on is left to the next look.

    Args:
        held: DVC holds these outputs for us, because it runs a stage that reads them.
    """
    path = root / KNOWN
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    before, said = json.dumps(known), []
    for state in states:
        report = root / state.report if state.report else None
        if state.doubt or report is None or not report.is_file():
            continue
        published = json.loads(report.read_text()).get("output_sha256")
        try:
            if published is None or published == sha256_of(root / state.out, known):
                continue
            objects = dvc.set_aside(root, state.address, partial(_differs, published), held)
        except FileNotFoundError:  # it is being replaced
            continue
        if objects is None:
            continue
        what = f"{len(objects)} cache object(s) of it were tampered with" if objects else "it was changed behind DVC's back"
        said.append(f"{state.address}: {state.out} is not what was published (sha256 differs): {what}; set aside, to be made again")
    if (after := json.dumps(known)) != before:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(after)
        scratch.replace(path)
    return said
