"""Files of examples -> canonical rows. One function per layout; detection looks at the keys the rows have."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.errors import InputError
from dagster_project.records import example_id

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Layout:
    """How one format lays out a row."""

    keys: frozenset[str]
    """Keys a row must have."""
    messages: Callable[[dict[str, Any]], Messages]
    """The row's conversation. KeyError, TypeError and ValueError mean: not such a row."""
    used: frozenset[str]
    """Keys that went into the messages; the others are kept in `meta`."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {type(value).__name__}")
    return value


def _turns(system: Any, *turns: tuple[str, str]) -> Messages:
    first = [{"role": "system", "content": _text(system)}] if system else []
    return first + [{"role": role, "content": content} for role, content in turns]


def _alpaca(row: dict[str, Any]) -> Messages:
    given = _text(row.get("input") or "")
    prompt = _text(row["instruction"]) + (f"\n\n{given}" if given else "")
    return _turns(row.get("system"), ("user", prompt), ("assistant", _text(row["output"])))


def _messages(row: dict[str, Any]) -> Messages:
    if not isinstance(row["messages"], list) or not row["messages"]:
        raise ValueError("`messages` must be a list with at least one message")
    return [{"role": _text(m["role"]), "content": _text(m["content"])} for m in row["messages"]]


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def _sharegpt(row: dict[str, Any]) -> Messages:
    if not isinstance(row["conversations"], list) or not row["conversations"]:
        raise ValueError("`conversations` must be a list with at least one turn")
    turns = [(SHAREGPT_ROLES.get(_text(t["from"]), t["from"]), _text(t["value"])) for t in row["conversations"]]
    return _turns(row.get("system"), *turns)


def _dolly(row: dict[str, Any]) -> Messages:
    context = _text(row.get("context") or "")
    prompt = _text(row["instruction"]) + (f"\n\n{context}" if context else "")
    return _turns(None, ("user", prompt), ("assistant", _text(row["response"])))


def _pair(prompt: str, completion: str) -> Callable[[dict[str, Any]], Messages]:
    return lambda row: _turns(row.get("system"), ("user", _text(row[prompt])), ("assistant", _text(row[completion])))


def _layout(keys: str, messages: Callable[[dict[str, Any]], Messages], optional: str = "") -> Layout:
    return Layout(frozenset(keys.split()), messages, frozenset((keys + " " + optional).split()))


LAYOUTS: dict[str, Layout] = {
    "alpaca": _layout("instruction output", _alpaca, "input system"),
    "messages": _layout("messages", _messages),
    "sharegpt": _layout("conversations", _sharegpt, "system"),
    "dolly": _layout("instruction response", _dolly, "context"),
    "prompt_completion": _layout("prompt completion", _pair("prompt", "completion"), "system"),
    "question_answer": _layout("question answer", _pair("question", "answer"), "system"),
}


@dataclass(frozen=True)
class Row:
    """One row of a source file, parsed or not."""

    source_row: int
    """0-based: the element of a JSON array, or the line of a JSONL file (blank lines are not rows)."""
    value: dict[str, Any] | None
    problem: str = ""


def read_rows(path: Path) -> list[Row]:
    """The rows of a .json, .jsonl or .jsonl.gz file. A broken JSONL line is a row with a problem, not an end.

    Raises:
        InputError: another file type, an empty file, or a file in which nothing is JSON.
    """
    suffixes = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffixes not in {".json", ".jsonl", ".jsonl.gz"}:
        raise InputError(f"{path.name}: unknown file type {suffixes or '(none)'}", "use .json, .jsonl or .jsonl.gz")
    try:
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 at byte {error.start}", "save the file as UTF-8") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path.name}: broken gzip file: {error}", "compress it again") from None
    if not text.strip():
        raise InputError(f"{path.name}: the file is empty", "put at least one example in it, or take it out of params.yaml")
    if suffixes == ".json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path.name}: not JSON: {error}", "mend the file; one object a line is .jsonl") from None
        if not isinstance(values, list):
            raise InputError(f"{path.name}: a .json file must hold a list of rows", "wrap the rows in [ ]")
        if not values:
            raise InputError(f"{path.name}: the list is empty", "put at least one example in it")
        return [_row(i, value) for i, value in enumerate(values)]
    rows = [_line(i, line) for i, line in enumerate(line for line in text.split("\n") if line.strip())]
    if all(row.value is None for row in rows):
        raise InputError(f"{path.name}: not JSON: {rows[0].problem}", "each line must be one JSON object")
    return rows


def _line(number: int, line: str) -> Row:
    try:
        return _row(number, json.loads(line))
    except (ValueError, RecursionError) as error:
        return Row(number, None, f"line is not JSON: {error}")


def _row(number: int, value: Any) -> Row:
    return Row(number, value) if isinstance(value, dict) else Row(number, None, f"expected an object, found {type(value).__name__}")


def detect(rows: list[Row], name: str) -> str:
    """The layout whose keys most rows have.

    Raises:
        InputError: no layout fits any row.
    """

    def fits(layout: Layout) -> tuple[int, int]:
        return sum(1 for row in rows if row.value is not None and layout.keys <= row.value.keys()), len(layout.keys)

    best = max(LAYOUTS, key=lambda known: fits(LAYOUTS[known]))
    if not fits(LAYOUTS[best])[0]:
        found = sorted(next((row.value for row in rows if row.value is not None), {}))
        wanted = "; ".join(f"{name}: {', '.join(sorted(layout.keys))}" for name, layout in LAYOUTS.items())
        raise InputError(
            f"{name}: unknown format (keys of the first row: {', '.join(found) or 'none'})", f"known formats and their keys: {wanted}"
        )
    return best


def to_records(path: Path, source: str, layout: str = "auto") -> tuple[str, list[dict[str, Any]]]:
    """Every row of a file as a canonical record with its `source_row`; nothing is dropped.

    A row that cannot be read keeps its place with no messages and `meta.problem`:
    {"instruction": "Hi", "output": 3}  ->  messages [], meta {"problem": "expected text, found int"}

    Returns:
        The layout used, and the records (`record_schema` plus `source_row`).
    """
    rows = read_rows(path)
    if layout == "auto":
        layout = detect(rows, path.name)
    elif layout not in LAYOUTS:
        raise InputError(f"{path.name}: unknown format {layout!r}", f"known formats: auto, {', '.join(LAYOUTS)}")
    return layout, [_record(row, source, LAYOUTS[layout]) for row in rows]


def _record(row: Row, source: str, layout: Layout) -> dict[str, Any]:
    value, problem, messages = row.value or {}, row.problem, []
    if not problem:
        try:
            messages = layout.messages(value)
        except KeyError as error:
            problem = f"no key {error}"
        except (ValueError, TypeError, AttributeError) as error:
            problem = str(error)
    meta = {key: kept for key, kept in value.items() if key not in layout.used and key != "category"}
    if "input" in layout.used and value.get("input"):
        meta["input"] = value["input"]
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    if not text.isascii() and text.encode("utf-8", "replace") != text.encode("utf-8", "surrogatepass"):
        problem, messages = "text holds half of a surrogate pair, which is no character", []
    if problem:
        meta = {"problem": problem, "row": value}
    category = value.get("category")
    return {
        "example_id": example_id(messages) if messages else example_id([{"role": "malformed", "content": text}]),
        "source": source,
        "source_row": row.source_row,
        "messages": messages,
        "category": category if isinstance(category, str) else None,
        "group_id": None,
        "meta": json.dumps(meta, ensure_ascii=bool(problem), sort_keys=True),
    }


def read_multiple_choice(path: Path) -> Iterator[dict[str, Any]]:
    """A benchmark of multiple-choice questions: {"question", "choices": [...], "answer": index, "subject"}.

    Raises:
        InputError: names the first row that is not such a question (an answer that is missing counts: unlabelled).
    """
    for row in read_rows(path):
        value = row.value or {}
        choices, answer = value.get("choices"), value.get("answer")
        if not (
            isinstance(value.get("question"), str)
            and isinstance(choices, list)
            and len(choices) > 1
            and isinstance(answer, int)
            and 0 <= answer < len(choices)
        ):
            raise InputError(
                f"{path.name}: row {row.source_row} is not a labelled multiple-choice question",
                "each row needs question, choices and the index of the right one as answer",
            )
        yield value
