"""The number that an answer ends in: one reader for scores and rewards."""

from __future__ import annotations

import re
from decimal import Decimal

_MINUS = "[-\u2212]"  # a hyphen, and the minus sign of typeset text
_CURRENCY = "[$\u20ac\u00a3\u20b9]"
_BETWEEN = r"(?:[ \u00a0\u2009\u202f'\u2019]|\\,|\{,\})"  # "1 000", "1'000", and LaTeX's "1\,000" and "1{,}000"
_GROUPED = (
    rf"\d{{1,3}}(?:{_BETWEEN}\d{{3}})+(?!\d)(?:,\d{{1,2}}(?![\d,]))?"
    # "1.000,50", "1.000.000": as in most of Europe
    r"|\d{1,3}(?:\.\d{3})+,\d+(?!\d|[.,]\d)|\d{1,3}(?:\.\d{3}){2,}(?!\d|[.,]\d)"
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])"  # "12,34,567", as in India
    r"|\d{1,3}(?:,\d{3})+(?!\d)"
)
# "3/4", "1 1/2"; not a part of "5/12/2024" or "1.5/2"
_FRACTION = r"(?<![\w./])(?<!\d,)(?:\d{1,30} )?\d{1,30}/0*[1-9]\d{0,29}(?![\w/]|[.,]\d)"
_NUMBER = re.compile(
    # no sign: after a word, number or hyphen ("10-12", "---"), and with spaces on both sides after a number ("10 - 12")
    rf"(?:(?<![\w)\]\-\u2212]){_MINUS}(?:(?!\s)|(?<![\d)]\s{_MINUS})\s))?"
    rf"{_CURRENCY}?\s?(?:{_FRACTION}|(?:{_GROUPED}|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    rf"(?:[eE](?:\+|{_MINUS})?\d{{1,3}}(?!\w))?"
)
_MARKED = re.compile(r"####\s*((?:(?!####)[^\n])+)")


def number_in(text: str) -> Decimal | None:
    """The number after the last `####` (GSM8K's form of an answer), or else the last one. A fraction is one number.

    >>> number_in("5 + 3 = 8\\n#### -1,200.50 dollars in 2 days"), number_in("So 7, or $12.")
    (Decimal('-1200.50'), Decimal('12'))
    >>> number_in("1 1/2"), number_in("none")
    (Decimal('1.5'), None)
    """
    marked = _MARKED.findall(text)
    found = _NUMBER.findall(marked[-1]) if marked else []
    found = found[:1] or _NUMBER.findall(text)[-1:]
    return _value(found[0]) if found else None


def _value(spelling: str) -> Decimal:
    if "/" not in spelling:
        spelling, separated = re.subn(rf"(?<=\d){_BETWEEN}(?=\d{{3}})", "", spelling)
        if separated or re.search(r"\.\d{3}[.,]\d", spelling):  # a comma is that of decimals
            spelling = spelling if separated else spelling.replace(".", "")
            spelling = spelling.replace(",", ".")
    text = re.sub(rf"{_CURRENCY}|,", "", spelling).replace("\u2212", "-").strip()
    *whole, last = text.removeprefix("-").split()
    numerator, _, denominator = last.partition("/")
    value = sum(map(Decimal, whole), Decimal(numerator) / Decimal(denominator)) if denominator else Decimal(numerator)
    return value.copy_negate() if text.startswith("-") else value  # exact, where a minus rounds to 28 digits
