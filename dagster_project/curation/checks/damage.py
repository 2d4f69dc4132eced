"""Texts -> damage in them: mojibake, invisible and control characters, and leftover tokens of chat templates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from unicodedata import is_normalized

from dagster_project.curation.checks import text_search
from dagster_project.curation.checks.privacy import candidates, mask
from dagster_project.curation.checks.text_search import LongText

AROUND = 10
"""Characters shown on each side of a fault in its excerpt."""

_CHARACTERS = {
    "replacement character": "\ufffd",
    "control character": "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f",
    "bidirectional control": "\u202a-\u202e\u2066-\u2069",
    "private-use character": "\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd",
    "half of a surrogate pair": "\ud800-\udfff",
    "hidden tag character": "\U000e0000-\U000e007f",
}
"""Kind -> characters, as a range of a regular expression.

Bidirectional controls display text in another order than stored. Arabic and Hebrew do not need them; the marks that
they do use (U+200E, U+200F, U+061C) are not included, nor is the joiner of emoji. Tag characters are invisible ASCII:
right after a black flag they name a region (Scotland's flag), anywhere else they hide text.
"""

_WRITTEN_WITH = "\u0e00-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"
"""Scripts without spaces (Thai, Lao, Tibetan, Burmese, Khmer, ...), in which a zero-width space marks where a word
ends."""
_PLAIN = "\x00-\u024f\u200b-\u200d\u2060\ufeff"
"""Characters next to which a joiner or non-joiner has no effect; emoji, Persian and the scripts of India need both."""
_HIDDEN = re.compile(
    f"[\u2060\ufeff]|(?<![{_WRITTEN_WITH}])\u200b(?![{_WRITTEN_WITH}])|(?<![^{_PLAIN}])[\u200c\u200d](?![^{_PLAIN}])"
)

_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")


def damage(texts: Sequence[str]) -> list[str | None]:
    """For each text the fault in its characters with an excerpt ("mojibake: 'cafÃ©'"), or None.

    The excerpt is masked, and invisible characters in it are escaped, as in "control character: 'a\\x00b'".
    """
    return _first_faults(texts, _damage_hint(), _damage)


def template_marks(texts: Sequence[str], special_tokens: Iterable[str] = ()) -> list[str | None]:
    """For each text the first of each kind of template mark in it, or None.

    - "control token: '<|im_end|>'": a control token of chat templates, or one of `special_tokens`. `<s>` and `</s>`
      around a part of a text are HTML's strike-through and ignored, unless they are special tokens of the base model,
      because its tokenizer would encode them as such.
    - "instruction template: '### Response:'": the boilerplate of a prompt template.
    - "transcript: 'Human: ... Assistant:'": turns of both sides written as text.

    Args:
        special_tokens: of the base model's tokenizer.
    """
    own = sorted({token for token in special_tokens if token.strip()}, key=lambda token: (-len(token), token))
    pattern = re.compile("|".join(map(re.escape, own))) if own else None
    return _first_faults(texts, _MARK_HINT, lambda text: _marks(text, pattern), own)


def hidden(texts: Sequence[str]) -> list[str | None]:
    """For each text the first byte order mark or zero-width character without effect, with an excerpt, or None."""
    return _first_faults(texts, "[\u200b-\u200d\u2060\ufeff]", _hidden)


def without_hidden(text: str) -> str:
    return _HIDDEN.sub("", text)


def decomposed(texts: Sequence[str]) -> list[str | None]:
    """For each text that is not in Unicode's composed form (NFC) the first word that is not, or None."""
    return [None if text.isascii() or is_normalized("NFC", text) else _decomposed(text) for text in texts]


def repaired_encoding(text: str) -> str:
    """The text with its mojibake undone, line by line or word by word, where `damage` finds any: "cafÃ©" -> "café"."""
    lines = text.split("\n")
    for number, _ in _broken_lines(text):
        lines[number] = _unmojibake(lines[number])
    return "\n".join(lines)


def without_end_marks(text: str, special_tokens: Iterable[str] = ()) -> str:
    """The text without leftover control tokens: end tokens at its end, start tokens at its beginning.

    "Yes. <|endoftext|>" -> "Yes."; tokens within the text, and HTML's strike-through, are kept.

    Args:
        special_tokens: of the base model; only those that end a text by their name count.
    """
    ends = (*END_MARKS, *(token for token in special_tokens if _ENDS.search(token)))
    while mark := next((mark for mark in ends if text.rstrip().endswith(mark)), None):
        if _is_partly_struck(text, at_end=True):
            break
        text = text.rstrip().removesuffix(mark).rstrip()
    while mark := next((mark for mark in START_MARKS if text.lstrip().startswith(mark)), None):
        if _is_partly_struck(text, at_end=False):
            break
        text = text.lstrip().removeprefix(mark).lstrip()
    return text


def _first_faults(
    texts: Sequence[str], hint: str, judge: Callable[[str], str | None], literals: Sequence[str] = ()
) -> list[str | None]:
    found: list[str | None] = [None] * len(texts)
    for row in candidates(texts, hint, literals):
        found[row] = judge(texts[row])
    return found


# --- characters


@cache
def _damage_hint() -> str:
    """Matches every damaged text.

    Looser than ftfy's own expression, but without matches in plain Cyrillic, Greek and French, and supported by Rust.
    """
    from ftfy.badness import MOJIBAKE_CATEGORIES as SETS

    # texts are passed with U+FFFD in its place
    characters = "".join(chars for kind, chars in _CHARACTERS.items() if kind != "half of a surrogate pair")
    letters = SETS["lower_common"] + SETS["upper_common"]  # of Cyrillic and Greek
    marks = "".join(chars for kind, chars in SETS.items() if not kind.endswith("_common")) + "À-ɏ√‚†®´¥µø"
    broken = SETS["bad"] + SETS["upper_accented"]
    between = SETS["bad"] + SETS["start_punctuation"] + SETS["end_punctuation"] + SETS["currency"] + "°µ"
    return (
        f"[{characters}]|[{marks}]{{2}}|[{letters}][{broken}]|[{broken}][{letters}]|[ВГРСΒΓΞΟ][{between}][ВГРСΒΓΞΟ]"
        "|[вВ]Ђ|β€|[Œœ][^A-Za-z]|[ÃÂ] "
    )


def _damage(text: str) -> str | None:
    broken = _mojibake(text)
    unflagged = _FLAG.sub("", text)
    patterns = {kind: re.compile(f"[{characters}]") for kind, characters in _CHARACTERS.items()}
    kinds = [kind for kind, pattern in patterns.items() if pattern.search(unflagged)]
    if not kinds and not broken:
        return None
    shown = mask(unflagged)
    found = [_say(kind, shown, patterns[kind]) for kind in kinds]
    if broken:
        found.append(_say("mojibake", shown, re.compile(re.escape(broken))))
    return "; ".join(found)


def _mojibake(text: str) -> str | None:
    """The first sequence that ftfy detects as mojibake, in a line that it can also fix.

    The sequence alone may be art or mathematics.
    """
    return next((broken for _, broken in _broken_lines(text)), None)


MOST_UNFIXED = 10_000
"""Different lines that seem to be broken and cannot be fixed, after which the rest of a text is not examined: fixing is
slow."""


def _broken_lines(text: str) -> Iterator[tuple[int, str]]:
    """The number of each line with mojibake, and its first sequence of it."""
    from ftfy import fix_encoding

    lines = _NOISE.sub("", text).split("\n")
    unfixed: set[str] = set()
    for number in candidates(lines, _badness_hint()) if len(text) > text_search.LONG else range(len(lines)):
        line = lines[number]
        if line in unfixed or (match := _badness(line)) is None:
            continue
        word = line[line.rfind(" ", 0, match.start()) + 1 :].partition(" ")[0]
        if any(fix_encoding(part) != part for part in (line, word)):
            yield number, match.group()
            continue
        unfixed.add(line)
        if len(unfixed) == MOST_UNFIXED:
            return


def _badness(line: str) -> re.Match[str] | None:
    """The first match of ftfy's expression, which needs a quarter of a microsecond for each accented letter."""
    from ftfy.badness import BADNESS_RE

    if len(line) <= text_search.LONG:
        return BADNESS_RE.search(line)
    for first, last in LongText(line).areas(f"(?s:.)(?:{_badness_hint()})"):
        if match := BADNESS_RE.search(line, first, last + text_search.REACH):
            return match
    return None


@cache
def _badness_hint() -> str:
    """ftfy's expression in Rust's syntax, without comments and white space."""
    from ftfy.badness import BADNESS_RE

    bare = re.sub("#[^\n]*", "", BADNESS_RE.pattern)
    bare = re.sub(r"(\[[^\]]*\])|\s+", lambda part: part[1] or "", bare)
    return bare.replace("|^", "|(?m:^)").replace(r"\w", text_search.WORD)


_NOISE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd\ufeff]")


def _say(kind: str, shown: str, pattern: re.Pattern[str]) -> str:
    match = pattern.search(shown)
    if match is None:  # in a value that is masked
        return kind
    start, end = max(0, match.start() - AROUND), match.end() + AROUND
    before, after = shown[start : match.start()], shown[match.end() : end]
    if start and " " in before:
        before = before.partition(" ")[2]
    if end < len(shown) and " " in after:
        after = after.rpartition(" ")[0]
    return f"{kind}: '{visible(before + match.group() + after)}'"


def visible(text: str) -> str:
    """On one line, with invisible and control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _hidden(text: str) -> str | None:
    if (match := _HIDDEN.search(text)) is None:
        return None
    return _say("byte order mark" if match.group() == "\ufeff" else "zero-width character", mask(text), _HIDDEN)


def _decomposed(text: str) -> str:
    word = next((word for word in mask(text).split(" ") if not is_normalized("NFC", word)), "")
    return f"not composed: '{''.join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in word[:40])}'"


def _unmojibake(line: str) -> str:
    from ftfy import fix_encoding

    whole = fix_encoding(line)
    return whole if whole != line else " ".join(map(fix_encoding, line.split(" ")))


# --- templates

_TOKEN = re.compile(
    r"<\|[A-Za-z][\w.:/-]{0,39}\|>"  # ChatML, Llama 3, Phi, Zephyr, Qwen, <|endoftext|>
    r"|<｜[^｜<>\s]{1,40}｜>"  # DeepSeek
    r"|\[/?INST\]|<</?SYS>>"  # Llama 2, Mistral
    # Mistral
    r"|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CONTENT|MODEL_SETTINGS)\]|\[(?:TOOL_CALLS|CALL_ID|ARGS)\]"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos)>"  # Gemma
)
END_MARKS = (
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eos|>", "<|end|>",
    "<|return|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<end_of_turn>", "<eos>", "</s>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
"""End tokens of texts and turns of GPT-2, ChatML, Llama, Phi, gpt-oss, OpenChat, Cohere, Gemma and DeepSeek."""
_DEEPSEEK_START = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
START_MARKS = ("<|endoftext|>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<s>", _DEEPSEEK_START)
_ENDS = re.compile("(?i)(?<![a-z])(?:end|eo[dmst])(?![a-z])|endof|</s>")
_STRIKE = re.compile(r"<s>(?:(?!</?s>).){1,400}</s>", re.DOTALL)
_SENTENCE = re.compile("</?s>")
_BOILERPLATE = re.compile(
    "(?m:^)[ \t]*### ?(?:Instruction|Response|Human|Assistant|User|System):|Below is an instruction"
    " that describes a task|A chat between a curious (?:user|human) and an artificial intelligence assistant"
)
"""Plural "### Instructions:" and "### Input:" head the parts of recipes and programming tasks."""
_ASKS = re.compile(r"(?m:^)[ \t>*]*(Human|HUMAN|User|USER)(?:\*\*)?:")
_ANSWERS = re.compile(r"(?m:^)[ \t>*]*(Assistant|ASSISTANT|AI|Bot|GPT)(?:\*\*)?:|\s(ASSISTANT):")
_MARK_HINT = (
    r"<\|[A-Za-z]|<｜|\[/?INST\]|SYS>>|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_[A-Z]+|MODEL_SETTINGS|CALL_ID|ARGS)\]"
    r"|_of_turn>|<(?:bos|eos|s|/s)>|### ?(?:Instruction|Response|Human|Assistant|User|System):"
    r"|Below is an instruction that|A chat between a curious|(?:Human|HUMAN|User|USER)(?:\*\*)?:"
)


def _marks(text: str, own: re.Pattern[str] | None) -> str | None:
    found = []
    if token := _TOKEN.search(text) or (own and own.search(text)) or _sentence(text):
        found.append(f"control token: '{visible(token.group())}'")
    if boilerplate := _BOILERPLATE.search(text):
        found.append(f"instruction template: '{boilerplate.group().strip()}'")
    if (asks := _ASKS.search(text)) and (answers := _ANSWERS.search(text, asks.end())):
        found.append(f"transcript: '{asks[1]}: ... {answers[1] or answers[2]}:'")
    return "; ".join(found) or None


def _sentence(text: str) -> re.Match[str] | None:
    """<s> or </s>, except pairs around a part of the text, which are HTML's strike-through.

    A pair around the whole text is a sequence.
    """
    whole = text.strip()
    at, pairs = 0, _STRIKE.finditer(whole)
    for pair in pairs:
        if pair.span() == (0, len(whole)):
            return _SENTENCE.search(whole)
        if between := _SENTENCE.search(whole, at, pair.start()):
            return between
        at = pair.end()
    return _SENTENCE.search(whole, at)


def _is_partly_struck(text: str, at_end: bool) -> bool:
    """Whether a part, not the whole, of the text at its end or beginning is struck through by HTML."""
    whole = text.strip()
    return any(
        match.span() != (0, len(whole)) and (match.end() == len(whole) if at_end else match.start() == 0)
        for match in _STRIKE.finditer(whole)
    )
