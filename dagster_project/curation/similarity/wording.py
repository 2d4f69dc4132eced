"""Whether two near-copies also share the words that carry their meaning.

`overlap` finds texts that share runs of words. In short texts such a run is often a common phrase ("Which of the
following is true of ..."), and the one different word is the subject. docs/decisions/006 has the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from dagster_project.curation.similarity.overlap import Rule, words

Severity = Literal["error", "warn"]

FEW_CONTENT = 10
"""In a text with fewer different content words, one of them can change what the text is about."""
QUOTED_CONTENT = 3
"""Content words of a held-out question that a row must quote word for word to be an `error`; fewer are a common
phrase."""
FIRM_JACCARD, FIRM_CONTAINMENT = 0.6, 0.8
"""From here on an overlap of texts with at least `FEW_CONTENT` content words is a copy, and an `error`."""

COMMON = frozenset(
    words("""
    a about after all also am an and any anyone anything are as at be because been before being below between both but
    by can could d did do does doing done don during each either else for from had has have having he her here hers
    him his how i if in into is it its just let like ll many may me might more most much must my of off on once one
    ones only or other our ours out over own per please re s shall she should since so some someone something such t
    than that the their theirs them then there these they this those through to too under until up upon us ve very via
    was we were what when where whether which while who whom whose why will with within would you your yours great
    hello help hey hi ok okay sure thank thanks yes people person according answer answers appropriate best brief
    briefly called choice choices choose common commonly complete consider considered correct correctly define defined
    describe described describes description detail details determine explain explanation fill find following give
    given gives identify important include includes indicate indicates instruction know known likely list main make
    mean meaning means missing name named need option options paragraph part phrase primary probably process provide
    provided question questions read refer refers related select sentence sentences show state stated statement
    statements suggest tell term terms text thing things true typical typically use used using usually want way ways
    word words write
    """)
)
"""Words that occur in any question: function words, courtesies, and the vocabulary of instructions and exams. English
only; in other languages only the frequency of words is used."""
ASPECTS = frozenset(
    words("""
    cause caused causes characteristic characteristics definition difference differences effect effects example
    examples feature features function functions purpose role symptom symptoms type types except false incorrect
    incorrectly least never no nor not untrue without wrong
    """)
)
"""Words that determine what is asked about a subject but are not subjects: "a cause of ...", "not a cause of ..."."""


@lru_cache(maxsize=1 << 15)
def content_words(text: str) -> frozenset[str]:
    """The different words of a text that are not `COMMON`."""
    return frozenset(words(text)) - COMMON


def is_instruction_only(text: str) -> bool:
    """Whether a question has no subject of its own: "Which of the following statements is not true?" """
    return content_words(text) <= ASPECTS


def is_near_duplicate(left: str, right: str, frequency: Mapping[str, int]) -> bool:
    """Whether two texts that `overlap` calls similar also ask the same.

    "Book a flight to Paris", "Please book a flight to Paris"  ->  True;  "... to Paris", "... to Rome"  ->  False

    Args:
        frequency: word -> number of texts with it.
    """
    mine, theirs = content_words(left), content_words(right)
    shared = mine & theirs
    if not mine | theirs:  # both consist of common words, so similarity alone decides
        return True
    if 2 * len(shared) < max(len(mine), len(theirs)):
        return False
    if min(len(mine), len(theirs)) >= FEW_CONTENT:
        return True
    replaced = mine - theirs and theirs - mine
    return mine & ASPECTS == theirs & ASPECTS and not (replaced and _distinguishes(mine ^ theirs, shared, frequency))


def leak_severity(text: str, held_out: str, rule: Rule, score: float, frequency: Mapping[str, int]) -> Severity | None:
    """Severity of an overlap with a held-out text: `error` for a copy, `warn` for a part, None for a common phrase.

    Args:
        text: prompt or response of a row.
        rule, score: of `overlap`.
        frequency: word -> number of texts of both sets with it.
    """
    mine, theirs = content_words(text), content_words(held_out)
    shared = (mine & theirs) - ASPECTS
    if not shared:
        return None
    if rule == "equal":
        return "error"
    firm = score >= (FIRM_CONTAINMENT if rule == "containment" else FIRM_JACCARD)
    least = min(len(mine), len(theirs))
    if least >= FEW_CONTENT and (firm or min(_size(mine), _size(theirs)) >= FEW_CONTENT):
        if 2 * len(shared) < least:
            return None
        return "error" if firm or _quotes(text, held_out) else "warn"
    if _quotes(text, held_out):
        return "error" if len(shared) >= QUOTED_CONTENT else "warn"
    missing, edited = theirs - mine, mine ^ theirs
    if rule == "containment":  # the row may contain other words
        edited = missing
    if edited & ASPECTS or any(map(_is_number, edited)):
        return None
    return None if missing and _distinguishes(edited, shared, frequency) else "warn"


def _size(content: frozenset[str]) -> float:
    """Number of words.

    Of Chinese, Japanese and Korean the words are characters, two of which are about as much as a word.
    """
    return sum([0.5 if len(word) == 1 and word >= "\u3040" else 1 for word in content])


def _distinguishes(edited: frozenset[str], shared: frozenset[str], frequency: Mapping[str, int]) -> bool:
    """Whether an edit changes the subject of a short text: a number, or a word as rare as the rarest shared one."""
    if any(map(_is_number, edited)):
        return True
    return min(frequency.get(word, 1) for word in edited) <= min(frequency.get(word, 1) for word in shared)


def _is_number(word: str) -> bool:
    return any(character.isdecimal() for character in word)


def _quotes(text: str, held_out: str) -> bool:
    """Whether the text contains the held-out words consecutively."""
    return f" {' '.join(words(held_out))} " in f" {' '.join(words(text))} "
