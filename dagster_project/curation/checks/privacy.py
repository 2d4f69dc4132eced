"""Texts -> personal data and secrets in them, and masked texts for reports and logs.

Libraries identify values: detect-secrets the tokens of services, python-stdnum the check digits of accounts and
national ids, phonenumbers the numbering plans. This module finds candidates and their extent.

Values made for examples (`@example.com`, 555 numbers, the card 4111..., 203.0.113.x) count like any other: they cannot
be distinguished from real values, and a model can reproduce both. Excluded are numbers of no person (toll-free,
premium), private and loopback addresses, and the word `password` in place of a password.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dagster_project.core.imports import lean_imports
from dagster_project.core.postponed import postponed
from dagster_project.curation.checks import personal_data, text_search
from dagster_project.curation.checks.text_search import (
    MOST_CANDIDATES,
    Local,
    LongText,
    Span,
    TooManyError,
    all_of,
    matches,
    text_column,
)

CONTEXT = 24
"""Characters of masked text on each side of a hit in its excerpt."""
MOST_ROUNDS = 64
"""Searches after which the whole lines of the values that are found last count as values: in ordinary texts fewer
follow each other."""
MOST_VALUES = 5_000
"""Keys, and pieces of personal data, in a text after which the rest of it counts as a value: ordinary texts have
fewer."""
NEAR, SEEN = 4096, 64
"""Characters around a masked value that are searched again in longer texts, and those of context that rules look at."""


@dataclass(frozen=True)
class Hit:
    """One piece of personal data, or one secret, in one text."""

    row: int
    """Index of the text."""
    kind: str
    """"e-mail", "phone", "card", "iban", "national id", "ip address", or the kind of key: "aws key", "github token",
    ..."""
    secret: bool
    """Whether it is a secret, which must be revoked; else personal data."""
    start: int
    end: int
    excerpt: str
    """The words around it, masked, for reports."""


@dataclass(frozen=True)
class Rule:
    kind: str
    hint: str
    """Regular expression that every text with such a value matches; without lookaround, because both Python's and
    Rust's engine read it."""
    find: Callable[[str], Iterable[Span]]
    secret: bool = False
    matcher: re.Pattern[str] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "matcher", re.compile(self.hint))


def scan(texts: Sequence[str]) -> list[Hit]:
    """All personal data and secrets, in order of row and position. Overlapping ones are one hit."""
    rules = _rules()
    hint = "|".join(rule.hint for rule in rules)
    plain = {row: form for row, text in enumerate(texts) if (form := _plain(text)) is not text}
    others = [*plain]
    rows = sorted({*candidates(texts, hint), *(others[i] for i in candidates([*plain.values()], hint))})
    column = text_column([texts[row] for row in rows])
    ranks: list[list[int]] = [[] for _ in rows]
    for rank, rule in enumerate(rules):
        for i in column.str.contains(rule.hint).arg_true():
            ranks[i].append(rank)
    hits: list[Hit] = []
    for row, which in zip(rows, ranks, strict=True):
        hits += _hits(row, texts[row], _find(texts[row], which))
    return hits


def mask(text: str) -> str:
    """The text with every value that `scan` finds replaced by its kind: "[e-mail]", "[aws key]".

    Masking again changes nothing.
    """
    # repeated, because replacements change positions, and rules use a few preceding characters
    while found := _find(text):
        text = "".join(_split_at_values(text, found))
    return text


def redact(text: str, secret: bool) -> str:
    """The text with a `placeholder` for each piece of personal data; with `secret`, for keys and passwords."""
    while found := [one for one in _find(text) if one[2].secret is secret]:  # repeated, as in `mask`
        text = "".join(_split_at_values(text, found, placeholder))
    return text


def placeholder(kind: str) -> str:
    """Placeholder for a value in a training text: "e-mail" -> "[EMAIL]", "national id" -> "[NATIONAL_ID]"."""
    return f"[{kind.upper().replace('-', '').replace(' ', '_')}]"


def candidates(texts: Sequence[str], hint: str, literals: Sequence[str] = ()) -> list[int]:
    """Indices of the texts that match a regular expression or hold a literal, by Polars' Rust engines.

    Only these are searched further.
    """
    strings = text_column(texts)
    found = strings.str.contains(hint)
    if literals:
        found |= strings.str.contains_any(list(literals))
    return found.arg_true().to_list()


def _split_at_values(
    text: str, found: Sequence[tuple[int, int, Rule]], name: Callable[[str], str] = "[{}]".format
) -> list[str]:
    """The text in pieces: unchanged parts at even indices, kinds of masked values at odd ones."""
    pieces, at = [], 0
    for start, end, rule in found:
        pieces += [text[at:start], name(rule.kind)]
        at = end
    return [*pieces, text[at:]]


def _hits(row: int, text: str, found: Sequence[tuple[int, int, Rule]]) -> Iterator[Hit]:
    pieces = _split_at_values(text, found)
    for i, (start, end, rule) in enumerate(found):
        before = "".join(pieces[max(0, 2 * i - 8) : 2 * i + 1])
        after = "".join(pieces[2 * i + 2 : 2 * i + 11])
        if len(before) > CONTEXT:
            before = "…" + re.sub(r"\A[a-z -]*\]", "", before[-CONTEXT:])  # without the rest of a truncated kind
        if len(after) > CONTEXT:
            after = re.sub(r"\[[a-z -]*\Z", "", after[:CONTEXT]) + "…"
        yield Hit(row, rule.kind, rule.secret, start, end, mask(" ".join(f"{before}[{rule.kind}]{after}".split())))


def _find(text: str, ranks: Iterable[int] | None = None) -> list[tuple[int, int, Rule]]:
    """Matches in one text, in order. Overlapping ones are merged, and named by the first of their rules in the table.

    Args:
        ranks: the rules that can apply, if known.
    """
    rules, plain = _rules(), _plain(text)
    found = _search(text, [], ranks)
    if plain is not text:
        found = _search(plain, found, None)
    return [(start, end, rules[rank]) for start, end, rank in found]


def _search(text: str, found: list[tuple[int, int, int]], ranks: Iterable[int] | None) -> list[tuple[int, int, int]]:
    """(start, end, rule) of the matches in a text and of those that were found before."""
    text = _covered(text, found)
    new, rounds = _spans(text, ranks), 0
    while new:  # repeated, because a value may be separated from its neighbor once that is masked
        rounds += 1
        if rounds > MOST_ROUNDS:
            new = _merged(_whole_lines(text, new))
        found = _merged(found + new)
        text = _covered(text, new)
        new = _spans(text) if len(text) <= text_search.LONG else _spans_near(text, new)
    return found


def _covered(text: str, spans: Iterable[tuple[int, int, int]]) -> str:
    """The text with brackets in place of values."""
    pieces, at = [], 0
    for start, end, _ in spans:
        pieces += [text[at:start], "[", "]" * (end - start - 1)]
        at = end
    return "".join([*pieces, text[at:]])


_FORMS = {
    **{code: code - 0xFEE0 for code in map(ord, "）＋－．／＠０１２３４５６７８９")},
    **{code: code - 0xFEE0 for first in "Ａａ" for code in range(ord(first), ord(first) + 26)},
    **{ord(zero) + n: ord("0") + n for zero in "\u0660\u06f0\u0966\u09e6" for n in range(10)},
    **dict.fromkeys(map(ord, "\xa0\u2007\u202f\u3000"), ord(" ")),
    **dict.fromkeys(map(ord, "\u2010\u2011"), ord("-")),
}
_OTHER_FORM = re.compile(f"[（{''.join(map(chr, _FORMS))}]")
_BEFORE_DIGIT = re.compile("（(?=[0-9])")
"""An opening bracket of a phone number; one after an address would look like that of a call in code."""


def _plain(text: str) -> str:
    """The text with unusual characters in their usual form; positions are the same.

    These are no-break spaces and hyphens, full-width digits, letters and signs, and digits of Arabic, Persian, Hindi
    and Bengali.
    """
    if text.isascii() or not _OTHER_FORM.search(text):
        return text
    return _BEFORE_DIGIT.sub("(", text.translate(_FORMS))


def _spans(text: str, ranks: Iterable[int] | None = None) -> list[tuple[int, int, int]]:
    """(start, end, rule) of the matches of rules, by default of all, outside of already masked parts."""
    rules = _rules()
    if len(text) > text_search.LONG:
        text = LongText(text)
    which = _ranks(text) if ranks is None else ranks
    spans: list[tuple[int, int, int]] = []
    limits: list[tuple[int, int]] = []
    """(rank, position) of rules that found too much up to this position."""
    for rank in which:
        try:
            for start, end in rules[rank].find(text):
                spans.append((start, end, rank))
        except TooManyError as stop:
            limits.append((rank, stop.position))
    merged = _merged([span for span in spans if _UNMASKED.search(text, span[0], span[1])])
    for secret in (True, False):
        if len(one_kind := [span for span in merged if rules[span[2]].secret is secret]) > MOST_VALUES:
            limits.append((one_kind[MOST_VALUES][2], one_kind[MOST_VALUES][0]))
    for rank, position in sorted(limits):
        merged = _with_the_rest(text, merged, position, rank)
    return merged


def _ranks(text: str) -> list[int]:
    """The rules that can apply to a text."""
    if isinstance(text, LongText):
        column = text_column([text])
        return [rank for rank, rule in enumerate(_rules()) if column.str.contains(rule.hint)[0]]
    return [rank for rank, rule in enumerate(_rules()) if rule.matcher.search(text)]


_UNMASKED = re.compile(r"[^\[\]]")


def _with_the_rest(
    text: str, spans: Sequence[tuple[int, int, int]], position: int, rank: int
) -> list[tuple[int, int, int]]:
    """Count all from a position on as values of a rule, except keys among personal data, or the reverse."""
    rules = _rules()
    kept = [span for span in spans if span[0] < position or rules[span[2]].secret is not rules[rank].secret]
    rest, at = [], position
    for start, end, _ in [*kept, (len(text), len(text), rank)]:
        if text[at:start].strip("[] \n"):
            rest.append((at, start, rank))
        at = max(at, end)
    return sorted([*kept, *rest])


def _whole_lines(text: str, spans: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    for start, end, rank in spans:
        after = text.find("\n", end)
        yield text.rfind("\n", 0, start) + 1, after if after >= 0 else len(text), rank


def _spans_near(text: str, masked: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """As `_spans`, of matches near parts that were just masked: nothing else has changed, and the time stays linear."""
    areas: list[list[int]] = []
    for start, end, _ in masked:
        # nothing follows the rest of a text
        last = min(end + NEAR, len(text)) if end < len(text) else min(start + NEAR, end)
        if areas and start - NEAR <= areas[-1][1]:
            areas[-1][1] = last
        else:
            areas.append([max(start - NEAR, 0), last])
    spans: list[tuple[int, int, int]] = []
    for first, last in areas:
        # context is cut off within `SEEN` characters of an end, unless it is the text's own
        least, most = SEEN if first else 0, last - first - (0 if last == len(text) else SEEN)
        found = [span for span in _spans(text[first:last]) if span[0] >= least and span[1] <= most]
        spans += [(first + start, first + end, rank) for start, end, rank in found]
    return _merged(spans)


def _merged(spans: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    merged: list[tuple[int, int, int]] = []
    for start, end, rank in sorted(spans):
        if merged and start < merged[-1][1]:
            first, last, best = merged.pop()
            merged.append((first, max(last, end), min(best, rank)))
        else:
            merged.append((start, end, rank))
    return merged


# --- secrets

_AFTER_TOKEN = re.compile(r"[A-Za-z0-9_\-]*")
_AWS_SECRET = re.compile(r"(?i:aws.{0,20}?(?:key|secret).{0,20}?[=:]\s*)([0-9a-zA-Z/+]{40})(?![0-9a-zA-Z/+=])")
_URL_PASSWORD = re.compile(r"://[^\s/:@\"']+:([^\s/@\"']+)@")
_NO_PASSWORD = re.compile(
    r"(?i)(?:your|my|the)?[_-]?(?:pass(?:word|wd|phrase)?|pwd|pw|secret|token|key)|x+|\*+|\.+|%\w+%?|\$\w+"
    r"|\[[a-z _-]+\]"
)
"""Placeholders for a password in a URL."""


def _tokens(patterns: Iterable[re.Pattern[str]]) -> Callable[[str], Iterator[Span]]:
    """Whole matches, extended to the end of the token: a service may use longer ones than the pattern."""

    def find(text: str, pattern: re.Pattern[str] | Local) -> Iterator[Span]:
        end = 0  # of the latest token, which is not searched again for each match in it
        for match in matches(pattern, text):
            if match.end() > end:
                tail = _AFTER_TOKEN.match(text, match.end())
                end = tail.end() if tail else match.end()
            yield match.start(), end

    searched = [_local(pattern) for pattern in patterns]
    return lambda text: all_of(find(text, pattern) for pattern in searched)


def _local(pattern: re.Pattern[str]) -> re.Pattern[str] | Local:
    """The same pattern for faster searches, if its only lookaround is at its end, and no match is long."""
    body = pattern.pattern.removesuffix(r"(?!\w)")
    if body == pattern.pattern or pattern.flags != re.UNICODE:
        return pattern
    is_local = not re.search(r"\(\?|\\[a-zA-Z]|[*+]|,\}|,[0-9]{3,}\}", body)
    return Local("", body, after=r"\w") if is_local else pattern


def _values(
    patterns: Iterable[re.Pattern[str]], valid: Callable[[str], bool] = bool
) -> Callable[[str], Iterator[Span]]:
    """The first group of each match, if it has one: the value after its keywords."""

    def find(text: str, pattern: re.Pattern[str]) -> Iterator[Span]:
        group = 1 if pattern.groups else 0
        return (match.span(group) for match in matches(pattern, text) if valid(match[group]))

    searched = [*patterns]
    return lambda text: all_of(find(text, pattern) for pattern in searched)


_NPM_HEAD, _NPM_NAME = r"\/\/.+\/:_authToken=", "/:_authToken="


def _npm_tokens(plugin: Any) -> Callable[[str], Iterator[Span]]:
    """The first group of each match of the plugin's pattern: an address, the name, a token and the rest of its line.

    Found line by line from the names in it, because the pattern needs quadratic time for many slashes.
    """
    (pattern,) = plugin.denylist
    assert pattern.pattern.startswith(_NPM_HEAD), "another version of detect-secrets"
    tail = re.compile(pattern.pattern.removeprefix(_NPM_HEAD))

    def find(text: str) -> Iterator[Span]:
        at = end = count = 0  # ends of the last match and of the last line, and matches
        while (name := text.find(_NPM_NAME, end)) >= 0:
            line, end = max(text.rfind("\n", end, name) + 1, end), text.find("\n", name) + 1 or len(text)
            address, last = text.find("//", max(at, line), end), end
            while address >= 0 and (last := text.rfind(_NPM_NAME, address + 3, last)) >= 0:
                if match := tail.match(text, last + len(_NPM_NAME)):
                    if count == MOST_CANDIDATES:
                        raise TooManyError(address)
                    yield match.span(1)
                    at, count = match.end(), count + 1
                    break

    return find


_AWS = re.compile("aws", re.IGNORECASE)


def _aws_secrets(patterns: Iterable[re.Pattern[str]]) -> Callable[[str], Iterator[Span]]:
    """The first group of each match.

    The patterns begin with the word, and are tried only there, because they look far ahead.
    """

    def find(text: str, pattern: re.Pattern[str]) -> Iterator[Span]:
        end = 0
        for word in matches(_AWS, text):
            match = pattern.match(text, word.start()) if word.start() >= end else None
            if match:
                end = match.end()
                yield match.span(1)

    searched = [*patterns]
    return lambda text: all_of(find(text, pattern) for pattern in searched)


_JWT_START = re.compile(r"eyJ(?=[A-Za-z0-9\-_=])")
_JWT_PART = re.compile(r"[A-Za-z0-9\-_=]+")
_JWT_REST = re.compile(r"[A-Za-z0-9_\-.=]*")


def _jwts(plugin: Any) -> Callable[[str], Iterator[Span]]:
    """Matches whose parts decode, with the signature, which the plugin's pattern excludes.

    Parts are found one by one, because the pattern needs quadratic time for long texts without a dot.
    """

    def find(text: str) -> Iterator[Span]:
        at = end = 0  # where the next one may begin, and the end of the last one
        for found in matches(_JWT_START, text):
            start = found.start()
            first = _JWT_PART.match(text, start) if start >= at else None
            if not first:
                continue
            at = first.end()
            second = _JWT_PART.match(text, at + 1) if text[at : at + 1] == "." else None
            if second:
                at = second.end() + (text[second.end() : second.end() + 1] == ".")
                if at > end:
                    rest = _JWT_REST.match(text, at)
                    end = rest.end() if rest else at
                if plugin.is_formally_valid(text[start:at]):
                    yield start, end

    return find


_OPENAI_CORE = re.compile("[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}")
_OPENAI_KINDS = ("sk-proj-", "sk-svcacct-", "sk-admin-")
_OPENAI_KIND_CORE = re.compile(r"[A-Za-z0-9_\-]{20}T3BlbkFJ[A-Za-z0-9_\-]{20}")
"""Keys of projects, service accounts and administrators have _ and - at any place, which the plugin does not expect
around the core."""
_TOKEN = re.compile(r"[A-Za-z0-9_\-]+")


def _openai_keys(text: str) -> Iterator[Span]:
    """As the plugin's pattern, `sk-`, any characters of a token and the core, in linear time, up to the token's end."""
    for token in _TOKEN.finditer(text):
        start = text.find("sk-", token.start(), token.end())
        core = _OPENAI_KIND_CORE if text.startswith(_OPENAI_KINDS, max(start, 0)) else _OPENAI_CORE
        if start >= 0 and core.search(text, start + 3, token.end()):
            yield start, token.end()


_KEY_GAP = r"(?:[\s>|\"'+,]|\\[nrt])*"
_KEY_LINE = re.compile(
    rf"{_KEY_GAP}(?:[A-Za-z0-9+/=]{{24,}}|[A-Za-z0-9+/=]+(?=[\"' ]*(?:\n|\\n|$)|{_KEY_GAP}-{{4}})"
    r"|[A-Za-z]+-[A-Za-z]+: ?[^\n\\]*|Comment: ?[^\n\\]*)"
)
_KEY_END = re.compile(rf"{_KEY_GAP}-{{4,}} ?END [A-Z0-9 ]+-*")


def _private_keys(patterns: Iterable[re.Pattern[str]]) -> Callable[[str], Iterator[Span]]:
    """Header, body and footer; a header without a body is only a mention of keys."""

    def find(text: str, pattern: re.Pattern[str]) -> Iterator[Span]:
        # Of the latest line that is part of a header: its end, and (end of the key after it, whether it has a body).
        line, at_line = -1, (0, False)
        body = end = 0  # lines of the last key: another header in them has the same end
        for header in matches(pattern, text):
            if body <= header.start() and header.end() <= end:
                continue
            rest = _KEY_HEADER_END.match(text, header.end())
            start = rest.end() if rest else header.end()
            if text[start : start + 1] != ":":
                last, has_body = _end_of_key(text, start)
            else:
                if start > line:
                    found = text.find("\n", start)
                    line = found if found >= 0 else len(text)
                    at_line = _end_of_key(text, line)
                start, (last, has_body) = line, at_line
            if last > end:
                body, end = start, last
            if has_body:
                first = header.start()
                while first and text[first - 1] == "-":
                    first -= 1
                yield first, last

    searched = [*patterns]
    return lambda text: all_of(find(text, pattern) for pattern in searched)


_KEY_HEADER_END = re.compile("[- ]*")
_KEY_CHARACTERS = re.compile("[A-Za-z0-9+/=]{24}")


def _end_of_key(text: str, body: int) -> tuple[int, bool]:
    """End of the key whose body begins at a position, with its footer, and whether there is a body."""
    end = body
    while line := _KEY_LINE.match(text, end):
        end = line.end()
    if not _KEY_CHARACTERS.search(text, body, end):
        return end, False
    footer = _KEY_END.match(text, end)
    return (footer.end() if footer else end), True


_FORMATS = (
    ("anthropic key", "sk-ant-", r"[A-Za-z0-9_\-]{32,}"),
    ("databricks token", "dapi", r"[0-9a-f]{32}"),
    ("digitalocean token", "do[opr]_v1_", r"[0-9a-f]{64}"),
    ("google key", "AIza", r"[A-Za-z0-9_\-]{35}"),
    ("hugging face token", "hf_", r"[A-Za-z0-9]{34}"),
    ("groq key", "gsk_", r"[A-Za-z0-9]{52}"),
    ("npm token", "npm_", r"[A-Za-z0-9]{36}"),
    ("openrouter key", "sk-or-v1-", r"[0-9a-f]{64}"),
    ("perplexity key", "pplx-", r"[A-Za-z0-9]{48}"),
    ("replicate token", "r8_", r"[A-Za-z0-9]{37}"),
    ("xai key", "xai-", r"[A-Za-z0-9]{80}"),
)
"""Published formats of keys for which detect-secrets has no plugin: name of the key, prefix, and pattern of the
rest."""


@cache
def _rules() -> tuple[Rule, ...]:
    """In order of precedence: the first rule names a value that several find."""
    # detect-secrets imports requests to ask services whether a key is valid, which is never done here; Response is in
    # an annotation
    with lean_imports(), postponed("requests", Response=object):
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
        from detect_secrets.filters.heuristic import is_templated_secret

        plugins: dict[str, Any] = get_mapping_from_secret_type_to_class()

    def secret(kind: str, hint: str, find: Callable[[str], Iterable[Span]]) -> Rule:
        return Rule(kind, hint, find, secret=True)

    def token(kind: str, hint: str, plugin: str, *more: str) -> Rule:
        return secret(kind, hint, _tokens([*plugins[plugin].denylist, *map(re.compile, more)]))

    def is_password(value: str) -> bool:
        return not is_templated_secret(value) and not _NO_PASSWORD.fullmatch(value) and not set(value) & set("\"'")

    keys = [*plugins["Private Key"].denylist, re.compile("BEGIN ENCRYPTED PRIVATE KEY")]
    passwords = [*plugins["Basic Auth Credentials"].denylist, _URL_PASSWORD]
    access_key, secret_key = plugins["AWS Access Key"].denylist
    # a sequence of DNA or a protein, or a part of one, is not a key
    alone = re.compile(rf"(?<![A-Z0-9])(?![ACGTUN]+(?![A-Z0-9])){access_key.pattern}(?![A-Z0-9])")
    aws_secrets = _aws_secrets([secret_key, _AWS_SECRET])
    slack = ("xapp-[0-9]-[A-Z0-9]{8,16}-[0-9]{8,16}-[a-z0-9]{32,}", "xoxe-[0-9]-[A-Za-z0-9]{40,}")
    address = r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]|[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{3}"
    return (
        secret("private key", "PRIVATE KEY|PuTTY-User-Key-File", _private_keys(keys)),
        secret("aws key", "A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA", _tokens([alone])),
        secret("aws key", "(?i:aws.{0,20}(?:key|pwd|pw|pass|token|secret))", aws_secrets),
        token("azure key", "AccountKey=", "Azure Storage Account access key"),
        token("discord token", r"[MNO][a-zA-Z0-9_-]{23,25}\.[a-zA-Z0-9_-]{6}\.", "Discord Bot Token"),
        token("github token", "gh[pousr]_|github_pat_", "GitHub Token", "github_pat_[A-Za-z0-9_]{40,}"),
        token("gitlab token", "gl(?:pat|dt|ft|soat|rt|cbt|imt|ptt|agent|oas)-|GR1348941", "GitLab Token"),
        secret("jwt", "eyJ", _jwts(plugins["JSON Web Token"])),
        token("mailchimp key", "[0-9a-z]{32}-us[0-9]", "Mailchimp Access Key"),
        secret("npm token", "_authToken=", _npm_tokens(plugins["NPM tokens"])),
        secret("openai key", "T3BlbkFJ", _openai_keys),
        token("pypi token", "pypi-A", "PyPI Token"),
        token("sendgrid key", r"SG\.", "SendGrid API Key"),
        token("slack token", "(?i:xox[abeposr]-|xapp-|hooks.slack.com/services)", "Slack Token", *slack),
        token("square key", "sq0csp-", "Square OAuth Secret"),
        token("stripe key", "[rs]k_live_", "Stripe Access Key"),
        token("telegram token", "[0-9]{8}:[0-9A-Za-z_-]{35}", "Telegram Bot Token"),
        token("twilio key", "(?:AC|SK)[a-z0-9]{32}", "Twilio API Key"),
        *(secret(kind, prefix, _tokens([re.compile(prefix + rest)])) for kind, prefix, rest in _FORMATS),
        secret("password in a url", r"://[^\s/]+:[^\s]+@", _values(passwords, is_password)),
        Rule("iban", "[A-Za-z]{2}[0-9]{2}[ -]?[A-Za-z0-9]{4}[ -]?[A-Za-z0-9]{4}", personal_data.ibans),
        Rule("card", "[2-6](?:[ -]?[0-9]){13}", personal_data.cards),
        Rule("national id", "|".join(pattern.body for pattern, _ in personal_data.national_ids()), personal_data.ids),
        Rule("phone", f"[0-9](?:{personal_data.GAP}{{0,3}}[0-9]){{6}}", personal_data.phones),
        Rule("e-mail", "[^\\s@]@[^\\s@]", personal_data.emails),
        Rule("ip address", address, personal_data.addresses),
    )
