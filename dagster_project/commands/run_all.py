"""`pedigree run --all` as text, and its exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def exit_code(document: Mapping[str, Any]) -> int:
    return 130 if document["interrupted"] else 0 if document["passed"] else 1


def as_text(document: Mapping[str, Any]) -> str:
    """One line for each stage that was not up to date, and a summary."""
    stages = document["stages"]
    width = max(map(len, stages), default=0)
    lines = []
    for address, stage in stages.items():
        if stage["outcome"] == "up to date":
            continue
        seconds = f"{stage['seconds']:8.1f} s" if "seconds" in stage else " " * 10
        lines.append(f"{address:{width}}  {stage['outcome']:11} {seconds}  {'; '.join(stage.get('why', []))}".rstrip())
    counts = Counter(stage["outcome"] for stage in stages.values())
    lines.append(
        ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        + f"; {document['seconds']:.1f} s, jobs: {document['jobs']}"
    )
    failed = [address for address, stage in stages.items() if stage["outcome"] == "failed"]
    if failed:
        lines.append(
            f"stopped: {', '.join(failed)} failed. Finished stages are kept;"
            " fix the error above and run the command again."
        )
    ended = [address for address, stage in stages.items() if stage["outcome"] == "interrupted"]
    if ended and not document["interrupted"]:
        lines.append(f"stopped: {', '.join(ended)} was interrupted. Finished stages are kept; run the command again.")
    if document["interrupted"]:
        lines.append("interrupted: finished stages are kept; run the command again to continue.")
    return "\n".join(lines)
