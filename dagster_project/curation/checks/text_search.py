"""Searches in texts that may be long: columns for Polars' Rust engine, and bounded searches in Python's syntax.

Python's engine needs 15 to 40 ns for each character at which a pattern with a lookbehind can begin, so that a dozen of
them would take many seconds for the longest texts. Rust's engine has no lookaround and gives no positions, but reads a
gigabyte in a second: it finds the pieces of a text that contain a match, and only these are searched by Python's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from dagster_project.core.words import WITHOUT_SPACES

if TYPE_CHECKING:
    import polars as pl

MOST_CANDIDATES = 50_000
"""Matches of one pattern in a text after which the rest of it is not looked at, so that no text takes long."""
LONG = 20_000
"""Characters up to which a text is searched as a whole."""
PIECE, REACH = 512, 160
"""Characters of the pieces of a longer text, and those that a match of a `Local` pattern has at most, with what follows
it."""
WORD = r"[\p{L}\p{N}_&&\p{Age=14.0}]"
r"""\w of Python in Rust's syntax, in the oldest version of Unicode of a supported Python: newer ones have more letters,
so it finds too many pieces, not too few."""
BESIDE_VALUES = rf"{WITHOUT_SPACES}\u3005-\u3007\uac00-\ud7af"
"""Characters of scripts without spaces, and Hangul, whose particles follow a word: a value may begin and end next to
them."""


Span = tuple[int, int]


class TooManyError(Exception):
    """A text has too many candidates.

    Args:
        position: of the first that was not looked at.
    """

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


def all_of(searches: Iterable[Iterable[Span]]) -> Iterator[Span]:
    """What several searches find.

    Raises:
        TooManyError: at the end, one of them found too much.
    """
    limits = []
    for search in searches:
        try:
            yield from search
        except TooManyError as stop:
            limits.append(stop.position)
    if limits:
        raise TooManyError(min(limits))


@dataclass(frozen=True)
class Local:
    r"""A pattern with matches of at most `REACH` characters, given by its parts.

    Args:
        before: characters that must not precede a match, as in a class: r"\w."; empty: any may. A comma only if a digit
            precedes it. `\w` does not mean `BESIDE_VALUES`.
        body: without lookaround, in the syntax that Python and Rust share.
        after: characters that must not follow it.
        decimals: characters that must not follow it if a digit follows them.
        overlapping: whether matches are empty, with the body as their first group, so that they may overlap.
    """

    before: str
    body: str
    after: str = ""
    decimals: str = ""
    overlapping: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        behind = _one_of(self.after) * bool(self.after) + f"|[{self.decimals}][0-9]" * bool(self.decimals)
        match = f"(?:{self.body})" + f"(?!{behind})" * bool(behind)
        ahead = f"(?<!{_one_of(self.before.replace(',', ''))})" * bool(self.before)
        ahead += "(?<![0-9],)" * ("," in self.before)
        return re.compile(ahead + (f"(?=({match}))" if self.overlapping else match))

    @cached_property
    def hint(self) -> str:
        """The same in Rust's syntax. A match includes the characters before and after."""
        either = f"[^{self.decimals}{self.after}]" + f"|[{self.decimals}][^0-9]" * bool(self.decimals)
        ends = f"(?:{either})" * bool(self.after or self.decimals)
        hint = (f"[^{self.before.replace(',', '')}]" if self.before else "(?s:.)") + f"(?:{self.body})" + ends
        return hint.replace(r"\w", f"[{WORD}--[{BESIDE_VALUES}]]")


def _one_of(characters: str) -> str:
    """Alternatives in Python's syntax: one of the characters of a class, but for `\\w` none of `BESIDE_VALUES`."""
    others = characters.replace(r"\w", "")
    return "|".join([rf"[^\W{BESIDE_VALUES}]"] * (others != characters) + [f"[{others}]"] * bool(others))


class LongText(str):
    """A text, with what searches in it share."""

    @cached_property
    def pieces(self) -> pl.Series:
        """Each begins with the character before it, and goes on for `REACH` characters."""
        framed = f"\n{self}\n\n"
        return text_column([framed[start : start + PIECE + REACH] for start in range(0, len(self), PIECE)])

    def areas(self, hint: str) -> Iterator[tuple[int, int]]:
        """First and last position (excluded) of the parts in which matches begin, in order.

        Args:
            hint: a regular expression in Rust's syntax; its first character is one before the match.
        """
        found = self.pieces.str.contains(hint).arg_true().to_list()
        breaks = [i for i, (one, following) in enumerate(pairwise(found), 1) if following != one + 1]
        for first, last in pairwise([0, *breaks, len(found)]) if found else ():
            yield found[first] * PIECE, (found[last - 1] + 1) * PIECE


def text_column(texts: Sequence[str]) -> pl.Series:
    """The texts for Polars; half of a surrogate pair, which Arrow cannot hold, becomes U+FFFD."""
    import polars as pl

    try:
        return pl.Series(texts, dtype=pl.String)
    except UnicodeEncodeError:  # Arrow cannot store half of a surrogate pair
        return pl.Series([_without_surrogates(text) for text in texts], dtype=pl.String)


def _without_surrogates(text: str) -> str:
    """The text with U+FFFD in place of each half of a surrogate pair.

    A regular expression takes half a second for a million of them.
    """
    import numpy as np

    content = np.frombuffer(bytearray(text, "utf-8", "surrogatepass"), np.uint8)  # a copy that can be written
    first = np.flatnonzero((content[:-1] == 0xED) & (content[1:] >= 0xA0))  # U+D800 to U+DFFF are ED A0 80 to ED BF BF
    for i, byte in enumerate("\ufffd".encode()):
        content[first + i] = byte
    return content.tobytes().decode()


def without_matches(pattern: re.Pattern[str], text: str) -> str:
    """As `pattern.sub("", text)`: in a long ASCII text by Rust's engine, which finds the same matches there.

    Args:
        pattern: without lookaround, word boundaries and empty matches.
    """
    if len(text) <= LONG or not text.isascii():
        return pattern.sub("", text)
    return str(text_column([text]).str.replace_all(looser(pattern), "")[0])


def first_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """As `pattern.search`: in a long text, from where Rust's engine finds the first match of a looser expression."""
    if len(text) <= LONG or (not text.isascii() and _OTHER_CASES.search(text)):
        return pattern.search(text)
    at = text_column([text]).str.find(looser(pattern))[0]
    if at is None:
        return None
    if not text.isascii():  # `at` counts bytes
        at = len(text.encode("utf-8", "surrogatepass")[:at].decode("utf-8", "surrogatepass"))
    return pattern.search(text, at)


_OTHER_CASES = re.compile("[\u0130\u0131]")
"""Letters that Python's engine takes for an i where case is ignored, and Rust's does not."""


@cache
def looser(pattern: re.Pattern[str]) -> str:
    r"""An expression in Rust's syntax that matches wherever a pattern does: without \b and (?!...), with (?=...)."""
    source = pattern.pattern.replace(r"\b", "").replace(r"\Z", r"\z").replace("(?=", "(?:")
    parts, at = [], 0
    while (start := source.find("(?!", at)) >= 0:
        parts.append(source[at:start])
        at = _closing(source, start)
    source = "".join([*parts, source[at:]]).replace(r"\w", WORD).replace(r"\s", r"[\s\x1c-\x1f]")
    names = {"i": re.IGNORECASE, "s": re.DOTALL, "m": re.MULTILINE}
    flags = "".join(name for name, flag in names.items() if pattern.flags & flag)
    return f"(?{flags}){source}" if flags else source


def _closing(source: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for part in re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()]", re.DOTALL).finditer(source, start):
        depth += {"(": 1, ")": -1}.get(part.group(), 0)
        if not depth:
            return part.end()
    raise ValueError(f"not closed: {source[start:]}")


def matches(pattern: re.Pattern[str] | Local, text: str, most: int = MOST_CANDIDATES) -> Iterator[re.Match[str]]:
    """As `pattern.finditer`.

    Raises:
        TooManyError: there are more than `most`.
    """
    if isinstance(pattern, re.Pattern):
        found = pattern.finditer(text)
    else:
        found = _local_matches(pattern, text) if isinstance(text, LongText) else pattern.pattern.finditer(text)
    for number, match in enumerate(found):
        if number == most:
            raise TooManyError(match.start())
        yield match


def _local_matches(local: Local, text: LongText) -> Iterator[re.Match[str]]:
    at = 0
    for first, last in text.areas(local.hint):
        at = max(at, first)
        while (match := local.pattern.search(text, at, last + REACH)) and match.start() < last:
            yield match
            at = match.end() + (match.end() == match.start())
