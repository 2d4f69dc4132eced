"""Searches the messages of every available data set for a text: a name, an address, part of a sentence.

Texts of ASCII characters are searched by polars, a million in about a second;
the others one by one, because their normal forms differ.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Literal

from dagster_project.core.errors import InputError
from dagster_project.core.progress import Progress
from dagster_project.core.text import visible
from dagster_project.lineage import tables
from dagster_project.lineage.index import Index
from dagster_project.lineage.rows import call_texts

if TYPE_CHECKING:
    import polars as pl

FIELDS = ("content", "reasoning_content", "tool_calls", "name")
"""Fields of a message that are searched. Of calls: their arguments."""
PARTS = ("messages", "prompt", "chosen", "rejected", "tools")
BEYOND_ASCII = re.compile(r"[^\x00-\x7f]|\\[xuUpP]")
"""In a regular expression: a character beyond ASCII, or an escape of one."""
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]"
)
"""Invisible characters such as soft hyphens and zero-width spaces: most of
Unicode's Default_Ignorable_Code_Point, without fillers of Hangul."""
UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Characters of scripts without spaces between words (Thai, Lao, Tibetan, Burmese, Khmer, Chinese, Japanese), and
Hangul, where particles follow a name without one: no word boundary is required next to them."""
ESCAPED = r'"[^"]*\\'
"""In a text that may contain a JSON string with escapes."""
JSON_STRING = re.compile(r'(?<![\w\\])"(?:[^"\\]|\\.)*"', re.DOTALL)
CONTEXT = 40
"""Characters of an excerpt on either side of a match."""


def normalized(text: str) -> str:
    """A text without invisible characters and without differences of case,
    compatibility forms (NFKC) and whitespace."""
    return " ".join(unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).casefold().split())


def _forms(text: str) -> tuple[str, ...]:
    """The texts to search.

    A zero-width space is invisible within a word, and separates words in Thai, Khmer or Chinese.
    """
    return (normalized(text), normalized(text.replace("\u200b", " "))) if "\u200b" in text else (normalized(text),)


def _json_strings(text: str) -> Iterator[str]:
    r"""The JSON strings in a text that have escapes, without these: '{"name":
    "Zo\u00eb\n", "n": "x"}'  ->  "Zoë" and a line break."""
    for literal in JSON_STRING.findall(text):
        if "\\" in literal:
            with suppress(ValueError):  # a string of another language
                yield json.loads(literal, strict=False).encode("utf-8", "replace").decode()


def _with_strings(text: str) -> Iterator[str]:
    """A text and the JSON strings in it, also those in these."""
    yield text
    for one in _json_strings(text):
        yield from _with_strings(one)


def _has_boundary(char: str) -> bool:
    """Whether a text that begins or ends with a character is a word there."""
    return char.isalnum() and re.match(f"[{UNSPACED}]", char) is None


class Pattern:
    """What is searched for: a text between word boundaries, which scripts without spaces do not have, or a regular
    expression (without look-around and back-references, case-insensitive).

    An expression that names characters beyond ASCII is matched with the NFKC and the NFC form of each text, because
    NFKC replaces characters such as an ellipsis. It has to match one of them as a whole.
    """

    def __init__(self, text: str, regex: bool) -> None:
        """Raises:
        InputError: the text is empty, or not a regular expression.
        """
        import polars as pl

        words = (text if regex else normalized(text)).split()
        if not words:
            raise InputError("--containing: the text is empty", "give a word, a name or part of a sentence")
        self.regex = regex
        text = unicodedata.normalize("NFC", text) if regex else text  # as texts are
        self.forms: tuple[Literal["NFKC", "NFC"], ...] = (
            ("NFKC", "NFC") if regex and BEYOND_ASCII.search(text) else ("NFKC",)
        )
        begin, end = (r"(^|\W)" if words[0][0].isalnum() else ""), (r"($|\W)" if words[-1][-1].isalnum() else "")
        self.ascii = text if regex else begin + r"\s+".join(map(re.escape, words)) + end
        before = rf"(?<![^\W{UNSPACED}])" if _has_boundary(words[0][0]) else ""
        after = rf"(?![^\W{UNSPACED}])" if _has_boundary(words[-1][-1]) else ""
        try:
            self.python = re.compile(text if regex else before + re.escape(" ".join(words)) + after, re.IGNORECASE)
            self.matches_of(pl.Series(["probe"]))
        except (re.error, pl.exceptions.ComputeError) as error:
            reasons = [line.removeprefix("error: ") for line in str(error).splitlines() if line.startswith("error: ")]
            raise InputError(
                f"--containing {visible(text)}: not a regular expression: {(reasons or str(error).splitlines())[0]}",
                "leave --regex out to search for a text",
            ) from None

    def matches_of(self, texts: pl.Series) -> list[int]:
        """Indices of the texts that match, or a JSON string in them; null does not.

        Raises ComputeError if Rust's `regex` does not know the expression.
        """
        import polars as pl

        escaped = texts.str.contains(ESCAPED).fill_null(False).arg_true()
        inside = [
            (i, one)
            for i, text in zip(escaped.to_list(), texts.gather(escaped).to_list(), strict=True)
            for one in _json_strings(text)
        ]
        matching = self.matches_of(pl.Series([one for _, one in inside], dtype=pl.String)) if inside else []
        return sorted({*self._matches_of(texts), *(inside[number][0] for number in matching)})

    def _matches_of(self, texts: pl.Series) -> list[int]:
        """As `matches_of`, of the texts themselves."""
        if self.regex:
            forms = [texts.str.normalize(form).str.replace_all(r"\s+", " ").str.strip_chars() for form in self.forms]
            found = [one.str.contains(f"(?i){self.ascii}").fill_null(False) for one in forms]
            return reduce(or_, found).arg_true().to_list()
        plain = (texts.str.len_bytes() == texts.str.len_chars()).fill_null(True)
        of_plain = (plain & texts.str.contains(f"(?i){self.ascii}").fill_null(False)).arg_true().to_list()
        others = (~plain).arg_true()
        matching = [
            i
            for i, text in zip(others.to_list(), texts.gather(others).to_list(), strict=True)
            if any(map(self.python.search, _forms(text)))
        ]
        return [*of_plain, *matching]

    def excerpt(self, text: str) -> str:
        """The match in the normalized text, with what is around it."""
        flats = [
            flat
            for one in _with_strings(text)
            for flat in (
                [" ".join(unicodedata.normalize(form, one).split()) for form in self.forms]
                if self.regex
                else _forms(one)
            )
        ]
        matches = [match for match in map(self.python.search, flats) if match]
        flat, (start, end) = (matches[0].string, matches[0].span()) if matches else (flats[0], (0, 0))
        cut = flat[max(0, start - CONTEXT) : end + CONTEXT]
        return f"{'...' if start > CONTEXT else ''}{cut}{'...' if end + CONTEXT < len(flat) else ''}"


def search(index: Index, text: str, regex: bool = False) -> list[dict[str, Any]]:
    """Every record with a message that contains a text, also in a JSON string with escapes: ignoring case,
    compatibility forms (NFKC), whitespace and invisible characters; between word boundaries.

    Args:
        regex: the text is a regular expression instead, which also matches invisible characters.
    Returns:
        {"example_id", "part", "role", "field", "excerpt"} per record, role and field, in the order of the data sets.
    Raises:
        InputError: the text is empty, or not a regular expression.
    """
    pattern = Pattern(text, regex)
    paths = index.shard_paths()
    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    bar = Progress("search", len(paths), "file")
    for path in paths.values():
        for part, identity, role, name, matched in _matches(path, pattern):
            key = (identity, part, role, name)
            if key not in found:
                found[key] = {
                    "example_id": identity,
                    "part": part,
                    "role": role,
                    "field": name,
                    "excerpt": pattern.excerpt(matched),
                }
        bar.advance()
    return list(found.values())


def _matches(path: Any, pattern: Pattern) -> Iterator[tuple[str, str, str, str, str]]:
    """(part, example_id, role, field, text) of every match in a shard."""
    import numpy as np
    import polars as pl

    names = tables.column_names(path)
    parts = [part for part in PARTS if part in names]
    table = tables.read(path, ["example_id", *parts])
    ids = table["example_id"]
    for part in parts:
        column = table[part]
        if not isinstance(column.dtype, pl.List):
            for row in pattern.matches_of(column):
                yield part, ids[row], "", part, column[row]
            continue
        sizes, fields = tables.flattened(column)
        owners = np.repeat(np.arange(table.height), sizes)
        for name in (name for name in FIELDS if name in fields):
            texts, rows = fields[name], np.arange(len(owners))
            if name == "tool_calls":
                given = [[*call_texts(calls)] if calls else [] for calls in texts.to_list()]
                rows = np.repeat(rows, [len(one) for one in given])
                texts = pl.Series([text for one in given for text in one], dtype=pl.String)
            for i in pattern.matches_of(texts):
                message = int(rows[i])
                yield part, ids[int(owners[message])], fields["role"][message], name, texts[i]
