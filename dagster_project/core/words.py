"""Words of a text, for rewards and scores alike."""

from __future__ import annotations

import re

WITHOUT_SPACES = "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts without spaces between words (Thai, Lao, Tibetan, Burmese, Khmer, Chinese, Japanese)."""
_WORD = re.compile(rf"[{WITHOUT_SPACES}]|[^\s{WITHOUT_SPACES}]+")


def split_words(text: str) -> list[str]:
    """What is between spaces; in scripts without spaces between words, each character.

    >>> split_words("Restart it, now!"), split_words("请重启 it")
    (['Restart', 'it,', 'now!'], ['请', '重', '启', 'it'])
    """
    return _WORD.findall(text)
