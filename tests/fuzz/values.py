"""Random values: texts that break readers, JSON of every kind, values like a given one, and damage to bytes."""

from __future__ import annotations

import random
from typing import Any

TEXTS = {
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)></style></template><!--",
    "ansi": "\x1b[2J\x1b[31mred\x1b]0;title\x07 \x9b1m \x08\x08 \r over",
    "direction": "\u202egnp.exe \u2066\u2067\u2068 \u200f\u061c",
    "markup": "[bold red]x[/bold red] [/] [link=http://e.example]y[/link] :smile: \\[",
    "markdown": "| a | b |\n|---|---|\n# x\n```\n[l](javascript:alert(1))",
    "jinja": "{{ 1/0 }} {% for x in range(10**9) %}{% endfor %} {{ config }} ${HOME} %s %n {0}",
    "one word again and again": "ho " * 3_000,
    "punctuation": "?!... --- ,,, ;;; \"''\" (((",
    "family": "👩‍👩‍👧‍👦 🏳️‍🌈 " * 20 + "e\u0301\u0301\u0301" * 50,
    "zeroes": "a\0b\0",
    "spaces": "\u3000\u2003\t\v\f\u00a0\u200b\ufeff",
    "line ends": "a\r\nb\u2028c\u2029d\x85e",
    "not a character": "\uffff\ufffe\U0010ffff\ufdd0",
    "formula": "=cmd|' /C calc'!A0",
    "csv": '"a","b\n""c',
    "digits": "9" * 5000,
    "secret": "AKIA" + "Q3EXAMPLE7KEY2AB ann.lee@post.example.org",
    "scripts": "一二三 かな 한글 العربية עברית ไทย हिन्दी Ω",
    "math": "$\\frac{1}{0}$ $$ $x",
    "path": "../../etc/passwd",
    "template": "<|im_start|>system\nx<|im_end|> [INST] <s> </s> <think>a</think> <tool_call>{}</tool_call>",
    "empty": "",
    "space": " ",
}
WORDS = (
    "river",
    "mill",
    "Where does it begin?",
    "In the hills.",
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "gpt",
    "prompter",
    "train",
    "test",
    "-1",
    "0",
    "true",
    "null",
    "~",
)
NUMBERS = (0, 1, -1, 2, 7, 0.5, -0.0, 1e308, 1e-300, 2**31, 2**63, -(2**63), 10**20, 10**400)
KEYS = (
    "system",
    "category",
    "split",
    "kind",
    "meta",
    "margin",
    "label",
    "rank",
    "problem",
    "row",
    "input",
    "tree",
    "id",
    "subject",
    "tools",
    "weight",
    "name",
    "text",
    "messages",
    "prompt",
    "",
)


def text(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.35:
        return draw.choice([*TEXTS.values()])
    if kind < 0.7:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))
    return "".join(
        chr(draw.choice([draw.randrange(32, 127), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))
        for _ in range(draw.randint(0, 20))
    )


def scalar(draw: random.Random) -> Any:
    return draw.choice(
        [
            None,
            True,
            False,
            draw.choice(NUMBERS),
            draw.randint(-9, 99),
            round(draw.uniform(-2, 2), 3),
            text(draw),
            text(draw),
        ]
    )


def value(draw: random.Random, depth: int = 3) -> Any:
    """Any JSON."""
    kind = draw.random()
    if depth == 0 or kind < 0.6:
        return scalar(draw)
    if kind < 0.8:
        return [value(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    if kind < 0.82:
        return nested(draw.choice([10, 190, 210]))
    return {draw.choice([*KEYS, text(draw)]): value(draw, depth - 1) for _ in range(draw.randint(0, 3))}


def nested(depth: int) -> Any:
    found: Any = "x"
    for i in range(depth):
        found = [found] if i % 2 else {"a": found}
    return found


def like(draw: random.Random, given: Any, rate: float = 0.15) -> Any:
    """Nearly the given value: the same keys mostly, other texts, and now and then something else altogether.

    Args:
        rate: share of the parts that are changed.
    """
    if draw.random() < rate / 3:
        return value(draw)
    if isinstance(given, dict):
        found = {key: like(draw, inner, rate) for key, inner in given.items() if draw.random() > rate / 4}
        if draw.random() < rate:
            found[draw.choice([*KEYS, text(draw)])] = value(draw, 2)
        return found
    if isinstance(given, list):
        found = [like(draw, inner, rate) for inner in given if draw.random() > rate / 4]
        if found and draw.random() < rate:
            found.insert(draw.randint(0, len(found)), draw.choice([value(draw, 2), found[0]]))
        return found
    if draw.random() > rate:
        return given
    return text(draw) if isinstance(given, str) and draw.random() < 0.7 else scalar(draw)


PIECES = (b'{"', b'"}', b"\n", b"[", b"]", b",", b"\\u", b"\\ud83d", b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"PAR1",
    b"ARROW1", b"\x1f\x8b", b"NaN", b"1e999", b"null", b"\r", b"\r\n", b": ", b"- ", b"&a ", b"*a ",
    b"!!python/object:os.system ", b"<<<<<<< HEAD\n", b"=======\n", b">>>>>>> x\n", b"#", b"'", b"{{",
    b"\xe2\x80\xa8")  # fmt: skip


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Bytes after one to four random changes."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randint(0, len(found)), min(draw.choice([1, 1, 2, 8, 64, 1024]), max(1, len(found)))
        kind = draw.choice(["flip", "flip", "byte", "insert", "insert", "delete", "cut", "repeat", "zero", "swap"])
        if kind == "flip" and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif kind == "byte" and at < len(found):
            found[at] = draw.randrange(256)
        elif kind == "insert":
            found[at:at] = draw.choice([*PIECES, draw.randbytes(draw.randint(1, 8))])
        elif kind == "delete":
            del found[at : at + size]
        elif kind == "cut" and draw.random() < 0.5:
            del found[at:]
        elif kind == "repeat":
            found[at:at] = found[at : at + size] * draw.choice([1, 1, 3, 50])
        elif kind == "zero":
            found[at : at + size] = bytes(len(found[at : at + size]))
        elif kind == "swap":
            other = draw.randint(0, len(found))
            found[at : at + size], found[other : other + size] = found[other : other + size], found[at : at + size]
    return bytes(found)
