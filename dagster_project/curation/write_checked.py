"""Output files of `pedigree check`: kept rows in one file, dropped rows in another."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.curation.checks import account
from dagster_project.curation.checks.checks import Judgement
from dagster_project.curation.checks.row_checks import ROW_CHECKS
from dagster_project.curation.sources import formats

FORMS = [form for layout in formats.PAIR_LAYOUTS.values() for form in layout.forms]
LAYOUTS: list[formats.Layout | formats.PairLayout] = [*formats.LAYOUTS.values(), *FORMS]
RESERVED = frozenset({"meta", *formats.TOOL_KEYS}).union(*(layout.keys | layout.used for layout in LAYOUTS))
"""Keys that identify a layout or that it reads. A row is written with those of its own layout only; others go to
`meta`."""


def refuse_overwriting(outputs: Mapping[str, Path], inputs: Sequence[Path], report: Path | None = None) -> None:
    """Refuse outputs that would overwrite something.

    Args:
        outputs: option -> file to write.
        inputs: files and folders that are read.
        report: another file that is written.
    Raises:
        InputError: an output is an input, is inside one, is not a .jsonl file, or is written twice.
    """
    for option, path in outputs.items():
        if path.suffix.lower() != ".jsonl":
            hint = "use a new file, because an existing one is replaced"
            raise InputError(f"{option} {path}: the file name must end in .jsonl", hint)
        if path.is_dir():
            raise InputError(f"{option} {path}: is a folder", "use a file")
        for other in inputs:
            if _same(path, other) or (other.is_dir() and path.resolve().is_relative_to(other.resolve())):
                what = f"{option} {path}: {other} is read, and would be overwritten or read again"
                raise InputError(what, "use a file in another folder")
    written: list[tuple[str, Path]] = [*outputs.items(), *([("--report", report)] if report else [])]
    for i, (option, path) in enumerate(written):
        for earlier, there in written[:i]:
            if _same(path, there):
                raise InputError(f"{earlier} and {option} write {path}", "use two files")


def _same(path: Path, other: Path) -> bool:
    """Whether two paths are the same file, also through symbolic or hard links."""
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


def write_rows(judged: Judgement, out: Path | None, dropped: Path | None) -> None:
    """Write kept rows to `out` and dropped rows to `dropped`, as JSON lines. Both files appear complete, or neither.

    Raises:
        InputError: a file cannot be written.
    """
    kept = (i for i, reason in enumerate(judged.reason) if reason is None)
    removed = (i for i, reason in enumerate(judged.reason) if reason is not None)
    broken = _violations(judged)
    outputs: list[tuple[Path, Iterable[dict[str, Any]]]] = []
    if out:
        outputs.append((out, (_row(judged.records[i]) for i in kept)))
    if dropped:
        outputs.append((dropped, (_dropped_row(judged, i, broken) for i in removed)))
    scratch: list[tuple[Path, Path]] = []
    path = None
    try:
        for path, rows in outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.append((path.with_name(f".{path.name}.{os.getpid()}"), path))
            with scratch[-1][0].open("w", encoding="utf-8") as file:
                file.writelines(_line(row) for row in rows)
                file.flush()
                os.fsync(file.fileno())
        for partial, path in scratch:
            partial.replace(path)
    except OSError as error:
        what = f"--out or --dropped {path}: cannot be written: {error.strerror}"
        raise InputError(what, "use another file") from None
    finally:
        for partial, _ in scratch:
            partial.unlink(missing_ok=True)


def _line(row: Mapping[str, Any]) -> str:
    """JSON line without escapes, unless the row has unpaired surrogates, which UTF-8 cannot represent."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(row)
    return text + "\n"


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record in the `messages` layout or a pair in the `preference` layout, with other fields of its source row."""
    messages, asked, meta = record["messages"], record.get("asked"), json.loads(record["meta"])
    if asked is None:
        row: dict[str, Any] = {"messages": messages}
    else:
        row = {"prompt": messages[:asked], "chosen": messages[asked:], "rejected": record["rejected"]}
        if record.get("margin") is not None:
            row["margin"] = record["margin"]
    if record.get("tools"):
        row["tools"] = record["tools"]
    if record["category"] is not None:
        row["category"] = record["category"]
    extra = {key: value for key, value in meta.items() if key not in RESERVED and key not in row}
    rest = {key: value for key, value in meta.items() if key not in extra}
    return {**row, **extra, **({"meta": rest} if rest else {})}


def _violations(judged: Judgement) -> dict[int, list[str]]:
    """Index of each dropped row -> all checks that would drop it, not only the first."""
    reasons: dict[int, list[str]] = defaultdict(list)
    for name in ROW_CHECKS:
        verdict = judged.verdicts.get(name)
        if verdict is None or verdict.action not in {"drop", "fix"}:
            continue
        for i in verdict.broken:
            if judged.reason[i] is not None and i not in judged.repaired.get(name, {}):
                reasons[i].append(name)
    return reasons


def _dropped_row(judged: Judgement, i: int, broken: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    """A dropped row with its source, the check that it is counted for, and all checks that would drop it."""
    record, check = judged.records[i], judged.reason[i]
    location = {"source": record["source"], "source_row": record["source_row"]}
    if len(record.get("source_rows", ())) > 1:
        location["source_rows"] = record["source_rows"]
    reasons = [*dict.fromkeys([str(check), *broken.get(i, ())])]
    repaired = {"repaired": record["repaired"]} if record.get("repaired") else {}
    return {
        **location,
        "check": check,
        "reasons": reasons,
        "why": account.why(judged, i, record),
        **repaired,
        "row": _row(record),
    }
