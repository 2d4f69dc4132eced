r"""The number that an answer ends in: one reader for scores and rewards.

A text is first written in plain spelling (`\frac{3}{4}` as `3/4`), then split into numbers and expressions that cannot
be read as one. An answer that ends in such an expression has no value: a part of it would be another number.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_BRACED = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"  # in braces, at most three levels deep
_VULGAR = "[\u00bc-\u00be\u2150-\u215e\u2189]"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SPELLINGS = [
    (r"(?m)^[ \t]*-[ \t]+", ""),  # the hyphen of a list
    (r"[\u2010\u2011\u2212\ufe63\uff0d]", "-"),
    (r"\\[,;: ]|[\u00a0\u2009\u202f~]", " "),
    (r"\\!|\\left|\\right", ""),
    (r"\\(?=[$%])", ""),
    (r"\{,\}", ","),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "\u00b0"),
    (r"\\times|\\cdot|[\u00b7\u22c5]", "\u00d7"),
    (r"\\div(?![A-Za-z])", "\u00f7"),
    (r"(?<=[\w}])(?=\\[dtc]?frac)", " "),
    (r"\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}", r"\1/\2"),
    (r"\\[dtc]?frac\s*(\d)\s*(\d)(?!\d)", r"\1/\2"),
    (r"\{\s*(-?\d+)\s*\\over\s*(\d+)\s*\}", r"\1/\2"),
    # an en dash is a minus before a number, unless it is between two, and in exponents
    (r"(?<![\w)\]\u2013\u2014-])\u2013(?=[$\u20ac\u00a3\u20b9]?\.?\d)", "-"),
    (r"(?:(?<=\d[eE])|(?<=\^)|(?<=\^\{))\u2013(?=\d)", "-"),
    (r"(\\[A-Za-z]+)(?=\d)", r"\1 "),
]
_PLAIN_SPELLINGS = [(re.compile(pattern), spelling) for pattern, spelling in _SPELLINGS]

_GROUPED = r"""(?!0)(?:
    \d{1,3}(?:[ '\u2019_]\d{3})+(?!\d)      # 1 000, 1'000, 1_000
    | \d{1,3}(?:,\d{3})+(?!\d)              # 1,000
    | \d{1,2}(?:,\d{2})+,\d{3}(?![\d,])     # 12,34,567, as in India
)"""
_PART = r"(?:(?!0)\d{1,3}(?:,\d{3})+(?!\d)|\d{1,30})(?:\.\d{1,30})?"
_EUROPEAN = r"""(?!0)(?:
    \d{1,3}(?:[ '\u2019]\d{3})+,\d{1,2}(?![\d,])                        # 1 000,50
    | \d{1,3}(?:\.\d{3})+,\d+(?!\d|[.,]\d) | \d{1,3}(?:\.\d{3}){2,}(?!\d|[.,]\d)  # 1.000,50 and 1.000.000
)"""
_PER = r"[ ]{0,9}/[ ]{0,9}"
_FUNCTION = r"(?<![A-Za-z])\\?(?:sqrt|log|ln|exp|sin|cos|tan)"
_POWER = r"10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|(-?\d{1,3})(?!\d))"
_NUMBER = rf"""
    # no sign: after a word, number or hyphen ("10-12", "---"), and with spaces on both sides after a number ("10 - 12")
    (?:(?<![\w)\]\-])(?P<sign>-)(?:(?!\s)|(?<![\d)]\s-)\s))?
    (?<!/)(?<!/\s)(?<!/-)(?<!/\s-)         # not a part of x/2
    (?<!-\()(?<!-\s\()                     # -(5)
    [$\u20ac\u00a3\u20b9\u00a5]?\s?
    (?!(?<=\d[ ])0\d\d(?!\d))             # not the 000 of 1234 000
    (?:
        (?:(?P<whole>{_GROUPED}|\d{{1,30}})[ ]+)?(?P<over>{_PART}){_PER}(?P<under>-?{_PART})
        | (?:(?P<european>{_EUROPEAN})|(?P<decimal>(?:{_GROUPED}|\d+)(?:\.\d+)?|(?<![\w.])\.\d+))
          (?:[eE](?P<exponent>[+-]?\d{{1,3}})(?!\w)|\s*[\u00d7*x]\s*(?P<power>{_POWER}))?
        | (?P<alone>{_POWER})
    )
    (?!
        \d|[.,:_'\u2019]\d|{_PER}[\d.]|\s*(?:\u00b1|\\pm)  # 1,5 3:30 5/12/2024 5 +- 2
        | \.?\(\d|\.?\s*\\(?:overline|sqrt|pi\b|[dtc]?frac)|\s*[\u221a\u03c0]  # 0.(3) 2\sqrt{{3}}
        | [)\]}}]*\s*\^|\*\*-?\d|-\d+{_PER}|-\d+-\d|[A-Za-z_]+\d  # 2^10 {{2}}^{{10}} 2-1/2 2024-05-12 0x1F
        | [ ]+\d+{_PER}\d                  # 1.000 1/2, which could be 1000 1/2
    )"""
_TOKEN = re.compile(
    rf"""
    (?:(?<=[A-Za-z}}])(?<!\d\}})|(?<=[A-Za-z}}]\s))\^\s*(?:\{{\s*-?\d+\s*\}}|-?\d+)  # of a unit: 5 cm^2
    | (?<![A-Za-z0-9_])(?!(?:USD|EUR|GBP|INR|CHF|Rs)\d)[A-Za-z_]+\d\w*(?:\.\d+)?  # CO2, x_1, v1.5
    | (?P<number>{_NUMBER})
    | (?P<other>
        (?:\\sqrt|\\overline|\u221a)\s*+(?:\[[^\[\]]{{0,40}}\]\s*+)?(?:{_BRACED}|\d+)
        | \\(?:[dtc]?frac|[dt]?binom)\s*+(?:{_BRACED}|\S)\s*+(?:{_BRACED}|\S)
        | (?:[)\]]|(?<=\d)\}})\s*\^\s*(?:{_BRACED}|-?\w+)
        | (?:{_FUNCTION}(?:_\{{?\d+\}}?)?[ ]?[({{]?[ ]?|(?:\u00b1|\\pm)\s*)?
          \d(?:[\d.,:/_'\u2019A-Za-z]|{_PER}(?=\d)|-(?=\d)|[ ]+(?=\d+{_PER}\d))*(?:\(\d+\))?
          (?:\s*\^\s*(?:{_BRACED}|-?\w+(?:\.\d+)?)|\*\*-?\d[\d.,A-Za-z]*)?
    )""",
    re.VERBOSE,
)
_OPERATOR = re.compile(
    r"[)\]}]*(?:\\?%)?"
    r"(?:[ ]?[\u00d7\u00f7][ ]?|([ ]?)(?:\*\*?|\+)\1|[ ]*//?[ ]*|[ ]?x[ ]?(?=10\s*\^)|(?<=\))(?=\())"
    r"[({\[]*-?[({\[]*"
)
"""Between two numbers, it makes them an expression. An asterisk with a space on one side only is markup."""
_MARKED = re.compile(r"####\s*((?:(?!####)[^\n])+)")
_BOXED = re.compile(rf"\\boxed\s*(?:({_BRACED})|(\d))?")


def number_in(text: str) -> Decimal | None:
    r"""The number after the last `####` (GSM8K's form of an answer), else in the last `\boxed{}`, else the last one.

    A fraction and a mixed number are one number. None if there is none, or an expression that has more than one reading
    (`1,5`), or is not computed here (`2^10`).

    >>> number_in("5 + 3 = 8\n#### -1,200.50 dollars in 2 days"), number_in("So 7, or $12.")
    (Decimal('-1200.50'), Decimal('12'))
    >>> number_in("1 1/2"), number_in(r"so \boxed{\frac{3}{4}} of 8"), number_in("1,5"), number_in("none")
    (Decimal('1.5'), Decimal('0.75'), None, None)
    >>> number_in("- 18 eggs"), number_in("= - 18"), number_in("3 * 4"), number_in(r"-\boxed{5}"), number_in("5/-2")
    (Decimal('18'), Decimal('-18'), None, Decimal('-5'), Decimal('-2.5'))
    """
    text = _plain(text)
    marked = _MARKED.findall(text)
    if marked and (found := _numbers(marked[-1].rpartition("=")[2])):
        return found[0]
    if boxed := [*_BOXED.finditer(text)]:
        return _in_box(text, boxed[-1])
    found = _numbers(text)
    return found[-1] if found else None


def _in_box(text: str, box: re.Match[str]) -> Decimal | None:
    r"""The number in a box, or the number that the box is a part of, as in `-\boxed{5}`."""
    content = (box[1][1:-1] if box[1] else box[2] or "").rpartition("=")[2]
    if len(_numbers(content)) != 1:
        return None
    # numbers beside it are others: the line break keeps them apart, because groups of digits may have spaces
    before, after = text[: box.start()], text[box.end() :]
    if before.endswith(" "):
        before = before.rstrip(" ") + "\n"
    if after.startswith(" "):
        after = "\n" + after.lstrip(" ")
    start, end = len(before), len(before) + len(content)
    found = [value for first, last, value in _tokens(before + content + after) if first < end and last > start]
    return found[0] if len(found) == 1 else None


def _numbers(text: str) -> list[Decimal | None]:
    """The numbers of a plain text in order; None for each expression that is not a single number."""
    return [value for _, _, value in _tokens(text)]


def _tokens(text: str) -> list[tuple[int, int, Decimal | None]]:
    """Begin and end of each number and expression of a plain text, with its value."""
    found: list[tuple[int, int, Decimal | None]] = []
    for match in _TOKEN.finditer(text):
        if not (match["number"] or match["other"]):
            continue
        end = match.end()
        start = end - len(match[0].lstrip())
        value = _value(match.groupdict()) if match["number"] else None
        operator = _OPERATOR.match(text, found[-1][1]) if found else None
        if operator and operator.end() - start in (0, 1):  # 1: the minus is the number's
            start, value = found.pop()[0], None
        found.append((start, end, value))
    return found


def _plain(text: str) -> str:
    """A text with LaTeX and typeset characters in plain spelling, as far as numbers depend on them."""
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+", lambda match: _superscript(match[0]), text)
    text = re.sub(rf"(?<=\w)(?={_VULGAR})", " ", text)
    text = re.sub(_VULGAR, lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("[\u2044\u2215]", "/", text)
    for pattern, spelling in _PLAIN_SPELLINGS:
        text = pattern.sub(spelling, text)
    return text


def _superscript(text: str) -> str:
    return f"^{{{text.translate(_SUPERSCRIPTS)}}}"


def _value(parts: dict[str, str | None]) -> Decimal | None:
    """Value of a number from the groups of its pattern; None if it is ambiguous, or divides by zero."""
    if parts["under"] is not None:
        value = _quotient(parts["whole"], parts["over"] or "", parts["under"])
    elif parts["alone"] is not None:
        value = Decimal("1e" + _digits(parts["alone"].partition("^")[2]))
    else:
        european, decimal = parts["european"], parts["decimal"] or ""
        digits = re.sub(r"[ .'\u2019]", "", european).replace(",", ".") if european else _digits(decimal)
        exponent = parts["exponent"] or (parts["power"] or "").partition("^")[2]
        value = Decimal(f"{digits}e{_digits(exponent) or 0}")
    return value.copy_negate() if value is not None and parts["sign"] else value


def _quotient(whole: str | None, over: str, under: str) -> Decimal | None:
    numerator, denominator = Decimal(_digits(over)), Decimal(_digits(under))
    if not denominator:
        return None
    if whole is None:
        return numerator / denominator
    # "1 100/300" is 1 1/3 or 1100/300, and "7 10/5" is not a mixed number
    if numerator >= denominator or len(over) == 3 or not (over + under).isdecimal():
        return None
    return (Decimal(_digits(whole)) * denominator + numerator) / denominator


def _digits(text: str) -> str:
    """A number without the separators of its groups, and without braces."""
    return re.sub(r"[ ,'\u2019_{}]", "", text)
