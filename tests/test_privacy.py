"""Personal data and secrets are found at any position and appear in no masked text or excerpt; similar values pass."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from phonenumbers import PhoneNumberFormat, PhoneNumberType, example_number_for_type, format_number
from stdnum import iban, luhn

from dagster_project.curation.checks import personal_data, privacy, text_search
from dagster_project.curation.checks.privacy import _find, mask, scan

MANY = bool(os.environ.get("PEDIGREE_FUZZ"))
"""`make fuzz` sets it: many examples and seeds, of which the test suite has a fixed part."""

LETTERS, ALNUM = string.ascii_letters, string.ascii_letters + string.digits
TOKEN = ALNUM + "_-"


def some(alphabet: str, low: int, high: int | None = None) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=low, max_size=high or low)


def joined(*parts: str | st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*(st.just(part) if isinstance(part, str) else part for part in parts)).map("".join)


def card(body: str, grouped: bool) -> str:
    digits = body + luhn.calc_check_digit(body)
    return " ".join(digits[i : i + 4] for i in range(0, 16, 4)) if grouped else digits


def account(bank: str, number: str, grouped: bool) -> str:
    bare = f"DE00{bank}{number}"
    found = f"DE{iban.calc_check_digits(bare)}{bank}{number}"
    return iban.format(found) if grouped else found


def jwt(name: str) -> str:
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256"}, {"sub": name})]
    return ".".join([*(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts), "c2lnbmF0dXJl" + name])


def pem(body: str, kind: str, newline: str) -> str:
    lines = [
        f"-----BEGIN {kind}PRIVATE KEY-----",
        *(body[i : i + 64] for i in range(0, len(body), 64)),
        f"-----END {kind}PRIVATE KEY-----",
    ]
    return newline.join(lines)


def phone(region: str, kind: int, style: int) -> str:
    number = example_number_for_type(region, kind)
    assert number is not None
    return format_number(number, style)


def local(name: str) -> bool:
    return not name.startswith("git@")


abroad = st.builds(
    phone,
    st.sampled_from(
        [
            "US",
            "GB",
            "DE",
            "FR",
            "ES",
            "IT",
            "NL",
            "PL",
            "BR",
            "MX",
            "IN",
            "CN",
            "JP",
            "KR",
            "AU",
            "ZA",
            "NG",
            "EG",
            "TR",
            "RU",
            "UA",
            "SE",
        ]
    ),
    st.sampled_from([PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE]),
    st.sampled_from([PhoneNumberFormat.INTERNATIONAL, PhoneNumberFormat.E164]),
)
at_home = st.builds(
    phone, st.sampled_from(["US", "GB", "FR"]), st.just(PhoneNumberType.MOBILE), st.just(PhoneNumberFormat.NATIONAL)
)
VALUES: dict[str, st.SearchStrategy[str]] = {
    "e-mail": joined(
        some(string.ascii_lowercase, 1, 8),
        st.sampled_from(["", ".x", "+tag", "_1"]),
        "@",
        some(ALNUM, 1, 9),
        ".",
        st.sampled_from(["com", "co.uk", "example.org", "museum"]),
    ).filter(local),
    "phone": abroad | at_home,
    "card": st.builds(
        card,
        joined(st.sampled_from(["4", "51", "2221", "6011"]), some(string.digits, 15)).map(lambda d: d[:15]),
        st.booleans(),
    ),
    "iban": st.builds(account, some(string.digits, 8), some(string.digits, 10), st.booleans()),
    "national id": st.sampled_from(
        [
            "536-90-4399",
            "390.533.447-05",
            "11010519491231002X",
            "RCCMNL83S18D969H",
            "131052-308T",
            "12345678Z",
            "X2482300W",
            "2 95 10 99 126 111 93",
            "253072B07300470",
            "971013-9019902",
            "880320-0016",
        ]
    ),
    "ip address": st.sampled_from(
        ["93.184.216.34", "203.0.113.7", "151.101.1.69", "2606:2800:220:1:248:1893:25c8:1946"]
    ),
    "private key": st.builds(
        pem,
        some(ALNUM + "+/", 40, 300),
        st.sampled_from(["", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "]),
        st.sampled_from(["\n", "\\n", "\r\n"]),
    ),
    "aws key": joined("AKIA", some(string.ascii_uppercase + string.digits, 16)),
    "azure key": joined("AccountKey=", some(ALNUM + "+/", 86), "=="),
    "discord token": joined("M", some(ALNUM, 23), ".", some(ALNUM, 6), ".", some(ALNUM, 27)),
    "github token": joined(st.sampled_from(["ghp_", "gho_", "ghs_"]), some(ALNUM, 36))
    | joined("github_pat_", some(ALNUM + "_", 82)),
    "gitlab token": joined("glpat-", some(ALNUM, 20)),
    "jwt": st.builds(jwt, some(LETTERS, 1, 12)),
    "mailchimp key": joined(some("0123456789abcdef", 32), "-us", st.sampled_from(["1", "21"])),
    "npm token": joined("npm_", some(ALNUM, 36)),
    "openai key": joined("sk-", some(ALNUM, 20), "T3BlbkFJ", some(ALNUM, 20))
    | joined(
        st.sampled_from(["sk-proj-", "sk-svcacct-", "sk-admin-"]), some(TOKEN, 58, 74), "T3BlbkFJ", some(TOKEN, 58, 74)
    ),
    "pypi token": joined("pypi-AgEIcHlwaS5vcmc", some(TOKEN, 70, 90)),
    "sendgrid key": joined("SG.", some(ALNUM, 22), ".", some(ALNUM, 43)),
    "slack token": joined("xoxb-", some(string.digits, 11), "-", some(string.digits, 11), "-", some(ALNUM, 24))
    | joined(
        "xapp-1-A",
        some(string.ascii_uppercase + string.digits, 10),
        "-",
        some(string.digits, 13),
        "-",
        some("0123456789abcdef", 64),
    )
    | joined("xoxe-1-", some(ALNUM, 146)),
    "square key": joined("sq0csp-", some(ALNUM, 43)),
    "stripe key": joined("sk_live_", some(ALNUM, 24)),
    "telegram token": joined(some("123456789", 9), ":AA", some(ALNUM, 33)),
    "twilio key": joined("AC", some("0123456789abcdef", 32)),
    "anthropic key": joined("sk-ant-api03-", some(TOKEN, 80)),
    "databricks token": joined("dapi", some("0123456789abcdef", 32)),
    "digitalocean token": joined(st.sampled_from(["dop_v1_", "doo_v1_", "dor_v1_"]), some("0123456789abcdef", 64)),
    "google key": joined("AIza", some(TOKEN, 35)),
    "groq key": joined("gsk_", some(ALNUM, 52)),
    "hugging face token": joined("hf_", some(LETTERS, 34)),
    "openrouter key": joined("sk-or-v1-", some("0123456789abcdef", 64)),
    "perplexity key": joined("pplx-", some(ALNUM, 48)),
    "replicate token": joined("r8_", some(ALNUM, 37)),
    "xai key": joined("xai-", some(ALNUM, 80)),
}
planted = st.sampled_from(sorted(VALUES)).flatmap(lambda kind: st.tuples(st.just(kind), VALUES[kind]))
before = st.sampled_from(["", " ", "\n", "(", '"', ": ", "= '"])
after = st.sampled_from(["", " ", "\n", ")", '"', ", ", ". ", "' "])
any_text = st.text() | st.text("0123456789 +-.@:/[]aA\n", max_size=12)


@settings(max_examples=1500 if MANY else 400, deadline=None)
@given(any_text, before, planted, after, any_text)
def test_a_planted_value_is_found_in_any_text_and_always_masked(
    head: str, left: str, value: tuple[str, str], right: str, tail: str
) -> None:
    kind, planted = value
    assume(planted not in head + tail)
    text = f"{head}{left or ' '}{planted}{right or ' '}{tail}"
    start = len(head) + len(left or " ")
    hidden = mask(text)
    assert planted not in hidden
    assert mask(hidden) == hidden
    hits = scan([text, hidden])
    assert any(hit.start <= start and hit.end >= start + len(planted) for hit in hits if hit.row == 0), (kind, text)
    assert not [hit for hit in hits if hit.row == 1]


@settings(max_examples=300, deadline=None)
@given(planted, st.lists(planted, max_size=2), st.sampled_from([" ", ", ", "\n"]))
def test_an_excerpt_shows_at_most_two_characters_of_a_value(
    first: tuple[str, str], more: list[tuple[str, str]], gap: str
) -> None:
    values = [value for _, value in [first, *more]]
    hits = scan([f"ж {gap.join(values)} ж"])
    assert hits
    for hit in hits:
        shown = hit.excerpt
        for kind in {hit.kind for hit in hits}:
            shown = shown.replace(f"[{kind}]", "")
        kept = [
            run for run in "".join(c if c.isascii() and c.isalnum() else " " for c in shown).split() if len(run) > 2
        ]
        assert not [run for run in kept if any(run in value for value in values)], (hit, values)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(any_text, st.none() | planted, any_text), max_size=6))
def test_scanning_a_batch_equals_scanning_each_text(rows: list[tuple[str, tuple[str, str] | None, str]]) -> None:
    texts = [f"{head} {value[1] if value else ''} {tail}" for head, value, tail in rows]
    alone = [(row, hit.kind, hit.start, hit.end, hit.excerpt) for row, text in enumerate(texts) for hit in scan([text])]
    batch = scan(texts)
    assert [(hit.row, hit.kind, hit.start, hit.end, hit.excerpt) for hit in batch] == alone
    closely = [(row, rule.kind, start, end) for row, text in enumerate(texts) for start, end, rule in _find(text)]
    assert [(hit.row, hit.kind, hit.start, hit.end) for hit in batch] == closely  # the pre-filter loses nothing


@pytest.mark.parametrize("kind", sorted(VALUES))
def test_each_kind_is_masked_by_its_name(kind: str) -> None:
    @settings(max_examples=20, deadline=None)
    @given(VALUES[kind])
    def named(value: str) -> None:
        hits = scan([f"So it is {value} today"])
        assert [hit.kind for hit in hits] == [kind]
        assert mask(f"So it is {value} today") == f"So it is [{kind}] today"
        assert hits[0].secret == (kind not in {"e-mail", "phone", "card", "iban", "national id", "ip address"})

    named()


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("Mail ann.lee@example.org.", "Mail [e-mail]."),
        ('{"url":"http://a.de","to":"ann@a.de"}', '{"url":"http://a.de","to":"[e-mail]"}'),
        ("jörg@müller.de", "[e-mail]"),
        ("https://a.org/leave?id=4&email=ann.lee@b.de&x=1", "https://a.org/leave?id=4&email=[e-mail]&x=1"),
        ("Ring (212) 555-0123 or 555-123-4567.", "Ring [phone] or [phone]."),
        ("+1 (555) 123-4567", "[phone]"),
        ("020 7946 0958, 06 12 34 56 78 or 030 90182012", "[phone], [phone] or [phone]"),
        ("06.12.34.56.78, tel 01-42-68-53-00", "[phone], tel [phone]"),
        ("0049 151 12345678, 0044 (0)20 7946 0958 or 00 33-6-12-34-56-78.", "[phone], [phone] or [phone]."),
        (
            "06\xa012\xa034\u202f56\u202f78, 415\u2011555\u20112671, DE89\xa03704\xa00044\xa00532\xa00130\xa000",
            "[phone], [phone], [iban]",
        ),
        ("電話：（０３）１２３４－５６７８、ａｎｎ＠ｍａｉｌ．ｊｐ（安）", "電話：[phone]、[e-mail]（安）"),
        ("电话：(021)62345678、ann@mail.cn（１号）", "电话：[phone]、[e-mail]（１号）"),
        (
            "\u0627\u062a\u0635\u0644 +\u0669\u0666\u0666\u0665\u0660\u0661\u0662\u0663\u0664\u0665\u0666\u0667",
            "\u0627\u062a\u0635\u0644 [phone]",
        ),
        ("Telefon: 2125550123", "Telefon: [phone]"),
        ("call 212 555 0123 or 212 555 0124", "call [phone] or [phone]"),
        ("3782 822463 10005 and 4111-1111-1111-1111", "[card] and [card]"),
        ("1234 4111 1111 1111 1111 123", "1234 [card] 123"),
        ("gb29nwbk60161331926819 NOW", "[iban] NOW"),
        (
            "电话13800138000,身份证号11010519491231002X。IP是93.184.216.34的",
            "电话[phone],身份证号[national id]。IP是[ip address]的",
        ),
        ("번호는 640823-3234562입니다", "번호는 [national id]입니다"),
        ("Ann,536-90-4399,4111111111111111,212-555-0123,94110", "Ann,[national id],[card],[phone],94110"),
        ("postgres://ann:hunter2@db:5432/x", "postgres://ann:[password in a url]@db:5432/x"),
        ("aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "aws_secret_access_key = [aws key]"),
        ("//registry.npmjs.org/:_authToken=npm_" + "a" * 36, "//registry.npmjs.org/:_authToken=[npm token]"),
    ],
)
def test_values_in_their_usual_notation_are_found(text: str, hidden: str) -> None:
    assert mask(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "Follow me @kites, 3 @ 5.00, or W@x.reshape(2) and icon@2x.png",
        "git clone git@github.com:ann/kites.git from ftp://ann@host.org/, or see medium.com/@ann.lee and"
        " https://x.org/@ann.lee",
        "She earns 336*5=<<336*5=1680>>1680 a week, $1,234,567.89 in all",
        "355909190063-746 = 256626720691 + 1646615806005, or 3600000000000 + 62426244000 + 198472480000",
        "0.13691995878400012 and 4111.1111111111111111",
        "On 01-02-2020 at 08:30, 1939-1945, 05/06/2021, 2024-05-17T10:00:00, 05.12.24 10.30 05-12-24-10-30",
        "Order 4539578763621487, order number 123456789, ISBN 0-306-40615-2 or 978-3-16-148410-0",
        "The hotline is 1-800-273-8255, or 00800 1234 5678",
        "0010 1100 0011 0101, part 0012 3456 7890, code 0049151123456, 0020 0061 0064 in hex",
        "v1.2.3.4, version 10.0.22621.150, section 3.14.15.9, 192.168.0.1, 127.0.0.1, std::vector::push_back, 12:30:45",
        "0100 0001 0100 0010 in binary; color: #333333; 078-05-1120",
        "Asia uses AKIA as a name; sk-learn; hf_hub; eyJ is how a token starts; pypi-AgE",
        "Continue 01 02 03 04 05 06 07 08 and 83 91 04 97 39 46 71, or 44-01-60-70-99-32-22",
        "Translate ACCAGGTTACGATCGATTTGACCAGTACGGATCC and the primer ACCAGTACGGATCCATGCAA;"
        " MKTAYIAKQRASIAQRSFVKSHFSRQLEERLG folds",
        "A file begins with -----BEGIN RSA PRIVATE KEY----- and holds base64",
        "mysql://user:password@localhost and mysql://user:${PASS}@localhost",
        "commit 3f786850e387550fdab836ed7e6dc881de23001b, uuid 123e4567-e89b-12d3-a456-426614174000",
    ],
)  # fmt: skip
def test_values_that_only_look_sensitive_are_not_masked(text: str) -> None:
    assert scan([text]) == []
    assert mask(text) == text


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("06 12 34 56 78 07 98 76 54 32", "[phone] [phone]"),
        ("Lyon 69 06 12 34 56 78", "Lyon 69 [phone]"),
        ("06 12 34 56 78 75 ans", "[phone] 75 ans"),
        ("06 12 34 56 78", "[phone]"),
        ("01 02 03 04 05", "01 02 03 04 05"),
        ("01 02 03 04 05 06 07 08 09 10", "01 02 03 04 05 06 07 08 09 10"),
    ],
)
def test_numbers_beside_other_pairs_of_digits_are_found_and_series_are_not(text: str, masked: str) -> None:
    assert mask(text) == masked


def test_rows_and_places_are_those_of_the_texts() -> None:
    hits = scan(["no", "it is ann@a.de", "\ud800 bob@b.de and carl@c.de"])
    assert [(hit.row, hit.start, hit.end) for hit in hits] == [(1, 6, 14), (2, 2, 10), (2, 15, 24)]
    assert hits[1].excerpt == "\ud800 [e-mail] and [e-mail]"
    assert scan([]) == []


def long_texts() -> dict[str, Callable[[], str]]:
    return {
        "no spaces": lambda: "a" * 1_000_000,
        "one address": lambda: "a" * 500_000 + "@" + "b." * 200_000 + "com",
        "digits": lambda: "1 2-" * 100_000,
        "many": lambda: "ann@a.de and " * 2_000,
    }


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", long_texts())
def test_one_long_text_takes_seconds_at_most(name: str) -> None:
    assert "ann@a.de" not in mask(long_texts()[name]())


@pytest.mark.parametrize(
    "letters",
    [
        ["eyJ", "eyJhIjoxfQ", "eyJhIjoxfQ.", "eyJhIjoxfQ.eyJhIjoxfQ", ".", "a", "-", "_", "=", " ", "/"],
        ["sk-", "T3BlbkFJ", "a" * 20 + "T3BlbkFJ" + "b" * 20, "a" * 20, "a", "-", "_", " ", "b" * 19],
    ],
)
def test_linear_searches_find_what_the_patterns_of_the_library_find(letters: list[str]) -> None:
    from detect_secrets.plugins import jwt, openai

    plugin, dice = jwt.JwtTokenDetector(), random.Random(1)

    def by_pattern(text: str, pattern: Any, tail: str, valid: Any = bool) -> list[tuple[int, int]]:
        found = [
            (m.start(), re.compile(tail).match(text, m.end()).end()) for m in pattern.finditer(text) if valid(m.group())
        ]  # type: ignore[union-attr]
        return sorted(set(found))

    tokens = 0
    for _ in range(3_000):
        text = "".join(dice.choices(letters, k=dice.randint(1, 14)))
        keys = by_pattern(text, openai.OpenAIDetector.denylist[0], r"[A-Za-z0-9_\-]*")
        parts = by_pattern(text, plugin.denylist[0], r"[A-Za-z0-9_\-.=]*", plugin.is_formally_valid)
        assert sorted(privacy._openai_keys(text)) == keys, text
        assert sorted(privacy._jwts(plugin)(text)) == parts, text
        tokens += bool(keys or parts)
    assert tokens > 100


PIECES = [
    "GR1348941",
    "AKIA0123456789ABCDEF",
    "ann@exam.ple",
    "4111111111111111",
    " ",
    "\n",
    "x",
    "://u:pw1@h",
    "hf_" + "a" * 34,
    "+49 30 1234567",
]


@pytest.mark.parametrize("seed", range(30 if MANY else 8))
def test_values_near_masked_ones_are_found_as_by_searching_everything_again(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    text = "".join(dice.choices(PIECES, k=200))
    whole = privacy._find(text)
    monkeypatch.setattr(text_search, "LONG", 1_000)
    monkeypatch.setattr(privacy, "NEAR", 300)
    assert privacy._find(text) == whole
    assert privacy.mask(privacy.mask(text)) == privacy.mask(text)


def test_a_long_chain_of_values_is_masked_whole() -> None:
    chain = "GR1348941" * 3_000
    masked = privacy.mask(f"before\n{chain}\nafter")
    assert masked.startswith("before\n[") and masked.endswith("]\nafter") and "GR13" not in masked
    [*_, hit] = privacy.scan([chain])
    assert hit.kind == "gitlab token"


@pytest.mark.parametrize(
    "unit",
    [
        "eyJ",
        "eyJa.b.",
        "sk-aT3BlbkFJ",
        "GR1348941",
        "AKIA",
        "xoxb-1-",
        "ghp_",
        "sq0csp-",
        "a@b.c",
        "-----BEGIN PRIVATE KEY-----",
    ],
)
def test_a_long_text_of_one_pattern_is_searched_again_only_near_what_was_masked(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = 0
    whole = privacy._spans

    def counted(text: str, ranks: Any = None) -> Any:
        nonlocal searched
        searched += len(text)
        return whole(text, ranks)

    monkeypatch.setattr(privacy, "_spans", counted)
    text = (unit * 40_000)[:40_000]
    privacy.scan([text])
    assert searched < 20 * len(text)


KEY = "ghp_" + "a1B2c3D4e5" * 3 + "f6G7h8"


def test_a_key_behind_thousands_of_other_values_is_found_as_a_key() -> None:
    addresses = "".join(f"ann{i}@example.com " for i in range(privacy.MOST_VALUES + 100))
    text = f"{addresses}the key is {KEY} and plain words"
    found = privacy.scan([text])
    assert [text[hit.start : hit.end] for hit in found if hit.secret] == [KEY]
    assert len(found) == privacy.MOST_VALUES + 3, "the rest before and after the key counts as one value each"
    assert KEY not in privacy.redact(text, secret=True) and f"ann{privacy.MOST_VALUES}@" in privacy.redact(
        text, secret=True
    )
    without = privacy.redact(text, secret=False)
    assert KEY in without and "@" not in without and "plain words" not in without
    assert "@" not in privacy.mask(text) and KEY not in privacy.mask(text)


def test_a_text_with_too_many_candidates_counts_as_a_value_from_there_on() -> None:
    text = "DE12 " * 3 * personal_data.MOST_LOOKED_UP + f"{KEY} end"
    found = privacy.scan([text])
    assert [hit.kind for hit in found if not hit.secret] == ["iban"] * 2
    assert [text[hit.start : hit.end] for hit in found if hit.secret] == [KEY]


def test_patterns_before_the_one_that_found_too_much_are_searched_too() -> None:
    text = "(212) 555-0123 and then " + "word by word " * 2_000 + "+49 30 1234 " * (personal_data.MOST_LOOKED_UP + 100)
    first = privacy.scan([text])[0]
    assert (first.kind, first.start, first.end) == ("phone", 0, 14)


def test_a_text_that_needs_too_many_looks_into_numbering_plans_counts_as_a_value_from_there_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = [f"call 1234567890{i:03}" for i in range(100)]
    text = f"{', '.join(numbers)} and Ann"
    assert privacy.scan([text]) == []
    monkeypatch.setattr(personal_data, "MOST_LOOK_UPS", 120)
    [hit] = privacy.scan([text])
    assert (hit.kind, text[: hit.start].count("call "), hit.end) == ("phone", 11, len(text))


LOCAL = [
    *(value for value in vars(personal_data).values() if isinstance(value, text_search.Local)),
    *(pattern for pattern, _ in personal_data.national_ids()),
    text_search.Local("", r"GR1348941[A-Za-z0-9_\-]{20,50}", after=r"\w"),
]


@pytest.mark.parametrize("local", LOCAL, ids=lambda local: local.body[:20])
def test_long_texts_are_searched_where_a_match_can_begin(
    local: text_search.Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_search, "PIECE", 30)
    strategy, found = st.from_regex(local.body, fullmatch=True), 0

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        st.lists(
            strategy
            | strategy.map(" {} ".format)
            | st.sampled_from([*" \n.,+-:[19aAé²Ⅳ٣\u0301\ud800", "\U0001e030", ". 1", "word " * 8]),
            max_size=30,
        )
    )
    def same(parts: list[str]) -> None:
        nonlocal found
        text = "".join(parts)
        whole = [match.span() for match in local.pattern.finditer(text)]
        found += len(whole)
        assert [match.span() for match in text_search.matches(local, text_search.LongText(text))] == whole

    same()
    assert found > 5
    widest = re._parser.parse(local.body).getwidth()[1]  # type: ignore[attr-defined]
    assert widest + 4 <= text_search.REACH


def test_no_character_that_python_takes_for_no_letter_is_one_in_hints() -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    letters = text_search.text_column(characters).str.contains(f"^{text_search.WORD}$")
    assert letters.sum() > 100_000
    assert all(re.match(r"\w", characters[i]) for i in letters.arg_true())


def test_npm_tokens_are_what_the_pattern_of_the_library_finds() -> None:
    from detect_secrets.plugins.npm import NpmDetector

    dice, find, tokens = random.Random(1), privacy._npm_tokens(NpmDetector), 0
    letters = [
        "//",
        "/",
        "/:_authToken=",
        ":_authToken=",
        "npm_",
        "a",
        " ",
        "\n",
        "0123456789ABCDEFabcdef0123456789-abcd",
        "//a/:_authToken=npm_x",
    ]
    for _ in range(5_000):
        text = "".join(dice.choices(letters, k=dice.randint(1, 12)))
        expected = [match.span(1) for match in NpmDetector.denylist[0].finditer(text)]
        assert [*find(text)] == expected, text
        tokens += len(expected)
    assert tokens > 500
