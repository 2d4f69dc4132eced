"""Searches the messages of every available data set for a text: a name, an address, part of a sentence.

Texts of ASCII characters are searched by Arrow, a million in about a second; the others one by one, because their normal forms differ.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.progress import Progress
from dagster_project.core.text import visible
from dagster_project.lineage import tables
from dagster_project.lineage.index import Index
from dagster_project.lineage.rows import call_texts

if TYPE_CHECKING:
    import pyarrow as pa

FIELDS = ("content", "reasoning_content", "tool_calls", "name")
"""Fields of a message that are searched. Of calls: their arguments."""
PARTS = ("messages", "prompt", "chosen", "rejected", "tools")
CONTEXT = 40
"""Characters of an excerpt on either side of a match."""


def normalized(text: str) -> str:
    """A text without differences of case, compatible characters (NFKC) and whitespace."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Pattern:
    """What is searched for: a text between word boundaries, or a regular expression (RE2, case-insensitive)."""

    def __init__(self, text: str, regex: bool) -> None:
        """Raises:
        InputError: the text is empty, or not a regular expression.
        """
        words = normalized(text).split()
        if not words:
            raise InputError("--containing: the text is empty", "give a word, a name or part of a sentence")
        self.regex = regex
        begin, end = (r"(^|\W)" if words[0][0].isalnum() else ""), (r"($|\W)" if words[-1][-1].isalnum() else "")
        self.ascii = text if regex else begin + r"\s+".join(map(re.escape, words)) + end
        before, after = (r"(?<!\w)" if words[0][0].isalnum() else ""), (r"(?!\w)" if words[-1][-1].isalnum() else "")
        try:
            self.python = re.compile(text if regex else before + re.escape(" ".join(words)) + after, re.IGNORECASE)
            self.matches_of(["probe"])
        except (re.error, ValueError) as error:
            raise InputError(
                f"--containing {visible(text)}: not a regular expression: {error}", "leave --regex out to search for a text"
            ) from None

    def matches_of(self, texts: list[str | None] | pa.Array) -> list[int]:
        """Indices of the texts that match. Raises ArrowInvalid, a ValueError, if RE2 does not know the expression."""
        import pyarrow as pa
        import pyarrow.compute as pc

        array = pa.array(texts, pa.string()) if isinstance(texts, list) else texts
        if self.regex:
            folded = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_normalize(array, "NFKC"), r"\s+", " "))
            return [
                int(i)
                for i in pc.indices_nonzero(pc.fill_null(pc.match_substring_regex(folded, self.ascii, ignore_case=True), False)).to_pylist()
            ]
        plain = pc.fill_null(pc.string_is_ascii(array), True)
        found = pc.and_(plain, pc.fill_null(pc.match_substring_regex(array, self.ascii, ignore_case=True), False))
        others = [int(i) for i in pc.indices_nonzero(pc.invert(plain)).to_pylist()]
        taken = array.take(pa.array(others, pa.int64())).to_pylist()
        matching = [i for i, text in zip(others, taken, strict=True) if self.python.search(normalized(text))]
        return sorted([*pc.indices_nonzero(found).to_pylist(), *matching])

    def excerpt(self, text: str) -> str:
        """The match in the normalized text, with what is around it."""
        flat = " ".join(unicodedata.normalize("NFKC", text).split())
        flat = flat if self.regex else flat.casefold()
        match = self.python.search(flat)
        start, end = match.span() if match else (0, 0)
        cut = flat[max(0, start - CONTEXT) : end + CONTEXT]
        return f"{'...' if start > CONTEXT else ''}{cut}{'...' if end + CONTEXT < len(flat) else ''}"


def search(index: Index, text: str, regex: bool = False) -> list[dict[str, Any]]:
    """Every record with a message that contains a text: ignoring case, compatible characters (NFKC) and whitespace, between word boundaries.

    Args:
        regex: the text is a regular expression instead.
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
                found[key] = {"example_id": identity, "part": part, "role": role, "field": name, "excerpt": pattern.excerpt(matched)}
        bar.advance()
    return list(found.values())


def _matches(path: Any, pattern: Pattern) -> Iterator[tuple[str, str, str, str, str]]:
    """(part, example_id, role, field, text) of every match in a shard."""
    import numpy as np
    import pyarrow as pa

    names = tables.column_names(path)
    parts = [part for part in PARTS if part in names]
    table = tables.read(path, ["example_id", *parts])
    for part in parts:
        column = table[part].combine_chunks()
        if not pa.types.is_list(column.type):
            for row in pattern.matches_of(column):
                yield part, table["example_id"][row].as_py(), "", part, column[row].as_py()
            continue
        messages = column.flatten()
        owners = np.repeat(np.arange(table.num_rows), column.value_lengths().fill_null(0).to_numpy())
        fields = [messages.type.field(i).name for i in range(messages.type.num_fields)]
        for name in (name for name in FIELDS if name in fields):
            texts, rows = messages.field(name), np.arange(len(messages))
            if name == "tool_calls":
                given = [[*call_texts(calls)] if calls else [] for calls in texts.to_pylist()]
                rows = np.repeat(rows, [len(one) for one in given])
                texts = pa.array([text for one in given for text in one], pa.string())
            for i in pattern.matches_of(texts):
                message = int(rows[i])
                yield (
                    part,
                    table["example_id"][int(owners[message])].as_py(),
                    messages.field("role")[message].as_py(),
                    name,
                    texts[i].as_py(),
                )
