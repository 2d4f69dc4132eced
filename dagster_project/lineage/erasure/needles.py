"""Texts and ids of erased records -> byte patterns that find them in any file.

Reports where they were found, never the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

LONGEST, SHORTEST = 24, 12
"""Bytes of text in a pattern are those of this many characters. A quotation of
at least twice LONGEST contains one of them whole."""
PIECES = re.compile(r"[^\x00-\x1f\x7f\"\\<>&'`\ud800-\udfff]+")
"""Runs of characters that JSON, HTML and CSV leave as they are. JSON may escape
those beyond ASCII and of `ALSO_ESCAPED`, which is searched for too."""
ALSO_ESCAPED: tuple[dict[str, str | int | None], ...] = (
    {"/": r"\/"},
    {"=": r"\u003d"},
    {"+": r"\u002b"},
    {"\u2028": r"\u2028", "\u2029": r"\u2029"},
)
"""Characters that some programs escape in JSON, also where they leave all others: PHP, Gson, .NET and Go."""
BACKSLASHES = (1, 2, 4)
"""Before an escape in JSON, in JSON that is a text in JSON (arguments of a tool call), and in JSON around that (a row
in a log)."""


def fragments(text: str) -> list[str]:
    """Parts of a text that are searched for.

    Consecutive pieces of LONGEST characters; shorter runs of at least SHORTEST as they are.
    """
    found: list[str] = []
    for run in (part.strip() for piece in PIECES.findall(text) for part in re.split(r"\s{2,}", piece)):
        if len(run) >= LONGEST:
            found += [run[start : start + LONGEST] for start in range(0, len(run) - LONGEST + 1, LONGEST)]
            found.append(run[-LONGEST:])
        elif len(run) >= SHORTEST:
            found.append(run)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Needles:
    """What to search for."""

    texts: tuple[str, ...] = ()
    """Fragments that no other record contains."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Positions in `texts` of the fragments of each text."""
    ids: tuple[str, ...] = ()
    """32 hexadecimal digits: `example_id` of each record, and the ids under which releases published it."""
    unsearchable: int = 0
    """Texts of which a form has no fragment of its own: short, or shared with records that
    stay. Their records are found by id only."""

    def patterns(self) -> dict[str, int | None]:
        """Pattern -> position of its fragment in `texts`, None for an id.

        Patterns are bytes in Latin-1, which polars searches for all at once.
        """
        texts = {shown: number for number, text in enumerate(self.texts) for shown in _encoded(text)}
        ids = [shown for one in self.ids for shown in (one, one.upper(), bytes.fromhex(one).decode("latin-1"))]
        return {**texts, **dict.fromkeys(ids)}

    def are_apart(self, found: Collection[int]) -> bool:
        """Whether some of these fragments, by position, are two of one text
        that have less than SHORTEST characters in common."""
        for group in self.groups:
            parts = [self.texts[number] for number in group if number in found]
            if any(not _overlap(parts[0], other) for other in parts[1:]):
                return True
        return False

    def document(self) -> dict[str, object]:
        groups = [list(group) for group in self.groups]
        return {"texts": list(self.texts), "groups": groups, "ids": list(self.ids), "unsearchable": self.unsearchable}


def _overlap(one: str, other: str) -> bool:
    return any(a[-size:] == b[:size] for a, b in ((one, other), (other, one)) for size in range(SHORTEST, LONGEST + 1))


def _encoded(text: str) -> Iterator[str]:
    yield text.encode().decode("latin-1")
    if not text.isascii():
        with suppress(UnicodeEncodeError):  # as spreadsheets on Windows write it
            yield text.encode("cp1252").decode("latin-1")
    for spelled in _in_json(text):
        yield from (spelled.replace("\\", "\\" * count).encode().decode("latin-1") for count in BACKSLASHES)


def _in_json(text: str) -> Iterator[str]:
    """A text with the escapes of JSON, as different programs write them."""
    escaped = text.encode("ascii", "backslashreplace").decode()  # "\xe9" for Latin-1, which JSON writes as \u00e9
    escaped = re.sub(r"\\x([0-9a-f]{2})", r"\\u00\1", escaped)
    escaped = re.sub(r"\\U([0-9a-f]{8})", lambda found: _surrogates(int(found[1], 16)), escaped)
    for form in dict.fromkeys((text, escaped)):
        for spelled in {form, *(form.translate(str.maketrans(table)) for table in ALSO_ESCAPED)} - {text}:
            yield spelled
            # capital letters: as .NET and others write it
            yield re.sub(r"\\u([0-9a-f]{4})", lambda found: f"\\u{found[1].upper()}", spelled)


def _surrogates(code: int) -> str:
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


def needles_of(texts: Iterable[str], ids: Iterable[str], others: Iterable[str]) -> Needles:
    """Args:
    texts: all texts of the records, and of what was made from them.
    ids: of all of them.
    others: the texts of all records that stay: a fragment that one of them contains finds nothing.
    """
    import polars as pl

    forms = {text: _forms(text) if fragments(text) else [text] for text in texts}
    by_text = {form: fragments(form) for found in forms.values() for form in found}
    wanted = list(dict.fromkeys(one for parts in by_text.values() for one in parts))
    shared: set[str] = set()
    if wanted:
        for start in _batches(others):
            found = pl.Series(start, dtype=pl.String).str.extract_many(wanted, overlapping=True)
            shared.update(found.explode().drop_nulls().to_list())
    own = {text: [one for one in parts if one not in shared] for text, parts in by_text.items()}
    unsearchable = sum(not all(own[form] for form in found) for text, found in forms.items() if text.strip())
    numbers = {one: number for number, one in enumerate(dict.fromkeys(one for parts in own.values() for one in parts))}
    groups = tuple(tuple(numbers[one] for one in parts) for parts in own.values() if len(parts) > 1)
    return Needles(tuple(numbers), groups, tuple(dict.fromkeys(ids)), unsearchable)


def _forms(text: str) -> list[str]:
    """A text as it is, with composed and with decomposed letters."""
    if text.isascii():
        return [text]
    return list(dict.fromkeys([text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)]))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch += [form.encode("utf-8", "replace").decode() for form in _forms(text)]
        if len(batch) >= 50_000:
            yield batch
            batch = []
    if batch:
        yield batch
