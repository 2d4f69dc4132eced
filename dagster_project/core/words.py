"""Words of a text, for rewards and scores alike."""

from __future__ import annotations

import re
import unicodedata
from itertools import chain

WITHOUT_SPACES = "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts without spaces between words (Thai, Lao, Tibetan, Burmese, Khmer, Chinese, Japanese)."""
_SPACED = (
    range(0x300, 0xE00),
    range(0x10A0, 0x1780),
    range(0x1800, 0x1950),
    range(0x1AB0, 0x2000),
    range(0xA66F, 0xA9E0),
    range(0xAAE0, 0xAC00),
)
"""Ranges of code points with combining marks, in scripts that put spaces between words. Excluded: Thai to Burmese,
Khmer and a few others."""
SPACED_MARKS = "".join(c for c in map(chr, chain(*_SPACED)) if unicodedata.category(c) in {"Mn", "Mc"})
r"""Vowel signs, viramas, points and accents of these scripts. They are part of a word, and Python's \w lacks them:
\u0926\u093e\u0928 and \u0926\u093f\u0928 are two words of Hindi."""
_WORD = re.compile(rf"[{WITHOUT_SPACES}]|[^\s{WITHOUT_SPACES}]+")


def split_words(text: str) -> list[str]:
    """What is between spaces; in scripts without spaces between words, each character.

    >>> split_words("Restart it, now!"), split_words("请重启 it")
    (['Restart', 'it,', 'now!'], ['请', '重', '启', 'it'])
    """
    return _WORD.findall(text)
