"""Text for display: visible forms of hidden characters, numbers, plurals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "zero_shot": "base model, the question alone",
    "same_prompt": "base model, asked as the variants are",
    "system_prompt": "base model, instruction only",
    "chain_of_thought": "base model, told to think step by step",
    "few_shot": "base model, worked examples in the prompt",
    "retrieved": "base model, retrieved examples in the prompt",
    "tfidf_logistic": "TF-IDF + logistic regression",
}
"""Display names of the systems that tuned variants are compared with."""

TITLES = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "no_final_answer": "no final answer",
    "tool_arguments_exact": "same calls",
    "tool_name_accuracy": "same tools",
    "tool_call_valid": "valid calls",
    "false_call": "false calls",
}
"""Display names of the measures in the comparison table."""

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff\U000e0000-\U000e0fff"
    + "".join(chr(plane * 0x10000 + last) for plane in range(1, 17) for last in (0xFFFE, 0xFFFF))
    + "]"
)
"""Controls, bidirectional controls, characters without a glyph, lone surrogates and non-characters. Excludes the two
joiners that some scripts need."""


def visible(text: str) -> str:
    """The text with every hidden character written out: ESC as \\x1b, a right-to-left override as \\u202e.

    Encodes as UTF-8.
    """
    return _HIDDEN.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)


def visible_json(text: str) -> str:
    """The same JSON document with every hidden character as an escape of JSON."""
    return _HIDDEN.sub(lambda match: json.dumps(match.group())[1:-1], text)


def common_prefix(a: str, b: str) -> int:
    """Length of the common prefix of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def shortened(text: str, most: int = 300) -> str:
    """The text, cut to `most` characters, for a message."""
    return text if len(text) <= most else f"{text[:most]}…"


_MARKUP = re.compile(r"[\\`|<>\[\]*~&]|((?<=http)|(?<=https)|(?<=ftp)):(?=//)|(?<=www)\.", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


def markdown(text: str) -> str:
    """Text of the data for a line or a table cell of Markdown, where it makes no HTML, link, image, code or column."""
    return _MARKUP.sub(r"\\\g<0>", visible(text).replace("\n", " "))


def cell(text: str) -> str:
    """Text of the data for a cell of a CSV file, with an apostrophe if a spreadsheet would run it as a formula.

    Numbers keep their sign.
    """
    return f"'{text}" if text[:1] in {"=", "+", "-", "@", "\t", "\r"} and not _NUMBER.fullmatch(text) else text


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{round(value, 3):,}"


def many(count: int, one: str, more: str = "") -> str:
    """A count with its noun, and the words that depend on it.

    Args:
        more: the words for any count but 1; `one` with an s unless given.
    """
    return f"{number(count)} {one if count == 1 else more or f'{one}s'}"


def finite_number(text: str) -> float:
    """The number that a JSON decoder found. ValueError for NaN, infinity and numbers that are too large."""
    if math.isfinite(value := float(text)):
        return value
    large = text.lstrip("+-")[:1].isdigit()
    what = "is too large for a 64-bit number" if large else "is not a number that JSON supports"
    raise ValueError(f"{shortened(text, 80)} {what}")


STRICT_JSON = json.JSONDecoder(parse_constant=finite_number, parse_float=finite_number)
"""Raises ValueError for NaN and infinity, too, which JSON does not have."""


def json_text(document: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """The document as JSON, which has no NaN and no infinity: null instead, and why under `not_finite`.

    {"perplexity": nan}  ->  {"perplexity": null, "not_finite": {"perplexity": "nan"}}
    """
    try:
        return json.dumps(document, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        found: dict[str, str] = {}
        plain = _finite(document, "", found)
    if isinstance(plain, dict):
        plain["not_finite"] = found
    return json.dumps(plain, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any, place: str, found: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one, f"{place}.{key}".removeprefix("."), found) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one, f"{place}[{i}]", found) for i, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found[place] = str(value)
        return None
    return value


def listed(names: Sequence[object], most: int) -> str:
    """The first names, and how many are left out."""
    return ", ".join(map(str, names[:most])) + (f" and {number(len(names) - most)} more" if len(names) > most else "")


def place_text(source: str | None, row: int | None) -> str:
    """Place of a row, such as `data/sources/a.jsonl:3`."""
    if not source:
        return "source unknown"
    return source if row is None else f"{source}:{row}"


def commit_text(code: Mapping[str, Any]) -> str:
    """ "commit 1234abcd5678, clean"."""
    if code["commit"] is None:
        return f"uncommitted, after {code['after'][:12]}" if code.get("after") else "uncommitted"
    commit, state = f"commit {code['commit'][:12]}", "clean"
    if code.get("or_earlier"):
        commit += " or earlier (this clone is shallow: `git fetch --unshallow` brings the rest)"
    if differs := code.get("differs"):
        state = f"dirty: it contains {', '.join(differs[:5])}{' and more' if len(differs) > 5 else ''} otherwise"
    same = f"; the same bytes before, at {code['same_bytes_at'][:12]}" if code.get("same_bytes_at") else ""
    return f"{commit}, {state}{same}"
