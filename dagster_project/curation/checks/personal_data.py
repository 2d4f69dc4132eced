"""Text -> spans of personal data: e-mail addresses, cards, accounts, national ids, phone numbers, IP addresses.

privacy.py has the rules that use them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address
from itertools import pairwise

from dagster_project.curation.checks.text_search import Local, Span, TooManyError, all_of, matches

MOST_LOOKED_UP = 10_000
"""Candidates of one pattern in a text after which the rest of it counts as a value, if they take a check of digits or a
lookup in a numbering plan; of all others `MOST_CANDIDATES`."""
MOST_LOOK_UPS = 25_000
"""Lookups in numbering plans after which the rest of a text counts as a value: for a number, several beginnings in
several countries are looked up."""

_LOCAL = re.compile(r"[A-Za-z0-9À-ɏ.!#$%&'*+/=?^_`{|}~-]{1,64}\Z")
_AT = re.compile("@")
_PARAMETER = re.compile(r"[?&][A-Za-z0-9_.-]{1,40}=([A-Za-z0-9À-ɏ][A-Za-z0-9À-ɏ._+-]*)\Z")
"""A parameter of a URL whose value may be the name of a mailbox."""
_DOMAIN = re.compile(
    r"[A-Za-z0-9À-ɏ](?:[A-Za-z0-9À-ɏ-]{0,62})(?:\.[A-Za-z0-9À-ɏ](?:[A-Za-z0-9À-ɏ-]{0,62}))*?"
    r"\.(?:xn--[A-Za-z0-9-]{2,59}|[A-Za-zÀ-ɏ]{2,24})(?![A-Za-z0-9À-ɏ-]|\.[A-Za-z0-9])"
)
_FILE_ENDINGS = frozenset({"png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "pdf", "js", "css", "ts", "json", "py"})


def emails(text: str) -> Iterator[Span]:
    """Searched from each @ outwards, which is fast on long texts without spaces."""
    for at in matches(_AT, text):
        domain = _DOMAIN.match(text, at.end())
        local = _LOCAL.search(text, max(0, at.start() - 64), at.start())
        if domain is None or local is None:
            continue
        name = local.group().lstrip(".!#$%&'*+/=?^`{|}~-")  # allowed in an address, but in prose it is punctuation
        start = at.start() - len(name)
        before = text[max(0, start - 64) : start]
        in_url = re.search(r"://[^\s\"'<>(),;]*\Z", before)  # ftp://ann@host: a host, not a mailbox
        if in_url and (parameter := _PARAMETER.search(before + name)):  # https://host/leave?email=ann@host
            name, in_url = parameter[1], None
            start = at.start() - len(name)
        image = domain.group().rpartition(".")[2].lower() in _FILE_ENDINGS  # icon@2x.png
        call = text[domain.end() : domain.end() + 1] in {"(", "["}  # W@x.reshape(2)
        handle = name.endswith("/")  # host/@ann.lee
        if name and name != "git" and not in_url and not image and not call and not handle:
            yield start, domain.end()


_CARD = Local(
    "0-9.,",
    "[0-9]{14,19}|[0-9]{4}(?:[ -][0-9]{4}){3}|[0-9]{4}[ -][0-9]{6}[ -][0-9]{4,5}",
    after="0-9",
    overlapping=True,
)
_ISSUED = re.compile(
    r"4[0-9]{15}(?:[0-9]{3})?"
    r"|(?:5[1-5][0-9]{4}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{2})[0-9]{10}"
    r"|3[47][0-9]{13}|3(?:0[0-5]|[689][0-9])[0-9]{11}"
    r"|(?:6011|65[0-9]{2}|64[4-9][0-9]|35(?:2[89]|[3-8][0-9])|62[0-9]{2})[0-9]{12}"
)
"""Leading digits and lengths of Visa, Mastercard, American Express, Diners, Discover, JCB and UnionPay."""


def cards(text: str) -> Iterator[Span]:
    from stdnum import luhn

    for match in matches(_CARD, text, MOST_LOOKED_UP):
        digits = re.sub("[ -]", "", match[1])
        if _ISSUED.fullmatch(digits) and luhn.is_valid(digits):
            yield match.span(1)


_IBAN = Local("A-Za-z0-9", "[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}", overlapping=True)
_IBAN_DIGITS = str.maketrans({letter: str(i) for i, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 10)})


def ibans(text: str) -> Iterator[Span]:
    """The longest run that is a valid account: words may follow after a space."""
    from stdnum import iban

    def is_valid(written: str) -> bool:
        compact = written.replace(" ", "").replace("-", "").upper()  # the library does this too, in ten times as long
        return int((compact[4:] + compact[:4]).translate(_IBAN_DIGITS)) % 97 == 1 and iban.is_valid(written)

    for match in matches(_IBAN, text, MOST_LOOKED_UP):
        written = match[1]
        ends = [m.end() for m in re.finditer("[A-Za-z0-9](?![A-Za-z0-9])", written)]
        end = next((end for end in reversed(ends) if end >= 15 and is_valid(written[:end])), None)
        if end:
            yield match.start(), match.start() + end


@cache
def national_ids() -> tuple[tuple[Local, Callable[[str], bool]], ...]:
    """Ids with a distinctive format, or with check digits and a date.

    Bare runs of 9 to 11 digits are excluded: too many are not ids.
    """
    from stdnum.br import cpf
    from stdnum.cn import ric
    from stdnum.es import dni, nie
    from stdnum.fi import hetu
    from stdnum.fr import nir
    from stdnum.it import codicefiscale
    from stdnum.kr import rrn
    from stdnum.se import personnummer
    from stdnum.us import ssn

    table: tuple[tuple[str, Callable[[str], bool]], ...] = (
        ("[0-9]{3}-[0-9]{2}-[0-9]{4}", ssn.is_valid),
        (r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}", cpf.is_valid),
        ("[1-9][0-9]{16}[0-9Xx]", ric.is_valid),
        ("[0-9]{8}[A-Z]", dni.is_valid),
        ("[XYZ][0-9]{7}[A-Z]", nie.is_valid),
        ("[0-9]{6}[-+A][0-9]{3}[0-9A-Y]", hetu.is_valid),
        ("[12] ?[0-9]{2} ?[0-9]{2} ?[0-9][0-9AB] ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}", nir.is_valid),
        ("[A-Z]{6}[0-9]{2}[A-EHLMPRST][0-9]{2}[A-Z][0-9]{3}[A-Z]", codicefiscale.is_valid),
        ("[0-9]{6}-[0-9]{7}", rrn.is_valid),
        ("(?:[0-9]{2})?[0-9]{6}[-+][0-9]{4}", personnummer.is_valid),
    )
    return tuple((Local(r"\w.,-", body, after=r"\w-", decimals="."), valid) for body, valid in table)


def ids(text: str) -> Iterator[Span]:
    def find(pattern: Local, valid: Callable[[str], bool]) -> Iterator[Span]:
        return (match.span() for match in matches(pattern, text, MOST_LOOKED_UP) if valid(match.group()))

    return all_of(find(*one) for one in national_ids())


GAP = "[ .()/\u2010-\u2013\xa0-]"
_INTERNATIONAL = Local(r"\w+", rf"\+\(?[1-9](?:{GAP}{{0,3}}[0-9]){{6,16}}")
_alone = partial(Local, r"\w.,+-", after=r"\w-", decimals=".")
_ABROAD = _alone(rf"00 ?[1-9][0-9]{{0,2}}[ ./-](?:\(0\) ?)?[1-9](?:{GAP}{{0,2}}[0-9]){{5,12}}")
"""An international number as it is dialed in most countries, with a gap after the code of the country."""
_AMERICAN = _alone(r"(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.-])[0-9]{3}[.-][0-9]{4}")
_ZERO = _alone(
    r"\(?0(?:[1-9](?:[ .-][0-9]{2}){4}|[1-9][0-9]{1,3}\)?[ /-][0-9]{3,8}(?:[ -][0-9]{2,5}){0,3})", overlapping=True
)
_PAIRS = re.compile("[0-9]{2}(?:[ .-][0-9]{2}){4}")
_PAIRS_BEFORE, _PAIRS_AFTER = re.compile(r"(?<![0-9])(?:[0-9]{2}[ .-])+\Z"), re.compile("(?:[ .-][0-9]{2}(?![0-9]))+")
SERIES = 60
"""Characters before and after a number in which further pairs of digits are looked for."""
_CUE = re.compile(
    r"(?i:\b(?:tel|phone|telephone|mobile|cell|cellphone|call|fax|whatsapp|sms|telefon|handy|mobil|t[ée]l"
    r"|t[ée]l[ée]phone|portable|tel[ée]fono|m[óo]vil|telefone|celular|cellulare|telefoon)\b|电话|手机|電話"
    r"|携帯)[^0-9\n+]{0,24}\Z"
)
_BEFORE_CUE = re.compile(r"[0-9\n+]")
_AFTER_CUE = _alone(rf"\(?[0-9](?:{GAP}{{0,2}}[0-9]){{8,13}}")
_DATE = re.compile(
    r"(?<![0-9])(?:[0-9]{1,2}[./-][0-9]{1,2}[./-](?:[0-9]{4}|[0-9]{2})|[0-9]{4}[./-][0-9]{1,2}[./-][0-9]{1,2})(?![0-9])"
)
_FRENCH = re.compile(
    r"\(?(?!...(?:0[1-9]|1[0-2]).[0-9]{2}.(?:[01][0-9]|2[0-3]).[0-5])0[1-9]([.-])[0-9]{2}(?:\1[0-9]{2}){3}"
)
"""Five pairs of digits with points or hyphens between all of them, unless they may be a date and a time. The first
three alone could be a date."""
_REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "BR", "IN", "CN", "JP", "AU")
"""Countries whose national numbers are recognized after a word such as "phone"."""


def phones(text: str) -> Iterator[Span]:
    """International numbers, and national ones.

    The latter in the usual format of the US, Britain, Germany and France, or after a word for a phone.
    """
    is_personal = _NumberingPlans().is_personal

    def is_personal_abroad(written: str, region: str) -> bool | None:
        return is_personal(f"+{written[2:]}", region)

    def international() -> Iterator[Span]:
        for match in matches(_INTERNATIONAL, text, MOST_LOOKED_UP):
            yield from _phone(match.group(), match.start(), ("ZZ",), is_personal)

    def abroad() -> Iterator[Span]:
        for match in matches(_ABROAD, text, MOST_LOOKED_UP):
            yield from _phone(match.group(), match.start(), ("ZZ",), is_personal_abroad)

    def american() -> Iterator[Span]:
        for match in matches(_AMERICAN, text, MOST_LOOKED_UP):
            yield from _phone(match.group(), match.start(), ("US",), is_personal)

    def with_zero() -> Iterator[Span]:
        for match in matches(_ZERO, text, MOST_LOOKED_UP):
            digits = sum(map(str.isdigit, match[1])) > 8 and set(match[1]) - set("01 -/.()")
            if digits and not _has_date(match[1]) and not _is_part_of_a_series(text, *match.span(1)):
                yield from _phone(match[1], match.start(), ("GB", "FR", "DE"), is_personal)

    def after_cue() -> Iterator[Span]:
        for match in matches(_AFTER_CUE, text):
            if _follows_a_cue(text, match.start()) and not _has_date(match.group()):
                yield from _phone(match.group(), match.start(), _REGIONS, is_personal)

    return all_of([international(), abroad(), american(), with_zero(), after_cue()])


def _has_date(written: str) -> bool:
    return _DATE.search(written) is not None and not _FRENCH.fullmatch(written)


def _is_part_of_a_series(text: str, start: int, end: int) -> bool:
    """Whether five pairs of digits count up, as in "01 02 03", or have two more next to them that are not numbers."""
    if not _PAIRS.fullmatch(text, start, end):
        return False
    before = _PAIRS_BEFORE.search(text, max(0, start - SERIES), start)
    after = _PAIRS_AFTER.match(text, end, end + SERIES)
    whole = text[before.start() if before else start : after.end() if after else end]
    pairs = re.findall("[0-9]{2}", whole)
    counts = len({int(second) - int(first) for first, second in pairwise(pairs)}) == 1
    are_numbers = len(pairs) % 5 == 0 and all(first[0] == "0" != first[1] for first in pairs[::5])
    return counts or (len(pairs) >= 7 and not are_numbers)


def _follows_a_cue(text: str, at: int) -> bool:
    """Whether a word for a phone is among the 40 characters before a position, and no digit after it."""
    before = text[max(0, at - 40) : at]
    digit = _BEFORE_CUE.search(before[::-1])
    cue = before[len(before) - digit.start() :] if digit else before
    return not cue.isspace() and cue != "" and _CUE.search(text, at - len(cue), at) is not None


def _phone(
    written: str, start: int, regions: Sequence[str], is_personal: Callable[[str, str], bool | None]
) -> Iterator[Span]:
    """The longest prefix, in whole groups of digits, that is a valid personal number in one of the regions.

    Raises:
        TooManyError: numbering plans were looked into too often.
    """
    ends = [m.end() for m in re.finditer(r"[0-9](?![0-9])", written)]
    for region in regions:
        for end in reversed(ends):
            found = is_personal(written[:end], region)
            if found is None:
                raise TooManyError(start)
            if found:
                yield start, start + end
                return


class _NumberingPlans:
    """The numbering plans of countries, for the numbers in one text."""

    def __init__(self) -> None:
        self.left = MOST_LOOK_UPS

    def is_personal(self, written: str, region: str) -> bool | None:
        """Whether a number is that of a person; None: too many were looked up."""
        from phonenumbers import NumberParseException, PhoneNumberType, number_type, parse

        if not self.left:
            return None
        self.left -= 1
        try:
            number = parse(written, region)
        except NumberParseException:
            return False
        if number.country_code == 1 and re.fullmatch("555[0-9]{7}", str(number.national_number)):
            return True  # an unassigned area code: an example number
        kinds = PhoneNumberType
        return number_type(number) not in {
            kinds.UNKNOWN,  # not valid
            kinds.TOLL_FREE,
            kinds.PREMIUM_RATE,
            kinds.SHARED_COST,
            kinds.UAN,
            kinds.VOICEMAIL,
        }


_DOCUMENTATION = tuple(map(IPv4Network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")))
_IPV4 = Local(r"\w.", r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}", after=r"\w", decimals=".")
_IPV6 = Local(r"\w:.", "[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{3,34}", after=r"\w:")
_VERSION = re.compile(r"(?i)(?:\bv|\bver|version|release|build|firmware|section|chapter|§)[.:]?\s?\Z")


def addresses(text: str) -> Iterator[Span]:
    """Public addresses."""
    return all_of([_ipv4(text), _ipv6(text)])


def _ipv4(text: str) -> Iterator[Span]:
    """Four small numbers are excluded, because they may be a version or a section."""
    for match in matches(_IPV4, text):
        try:
            address = IPv4Address(match.group())
        except AddressValueError:
            continue
        large = sorted(address.packed)[2:]
        if (large[1] < 100 and large[0] < 32) or _VERSION.search(text, max(0, match.start() - 12), match.start()):
            continue
        if (address.is_global and not address.is_multicast) or any(address in network for network in _DOCUMENTATION):
            yield match.span()


def _ipv6(text: str) -> Iterator[Span]:
    for match in matches(_IPV6, text):
        try:
            IPv6Address(match.group())
        except AddressValueError:
            continue
        yield match.span()
