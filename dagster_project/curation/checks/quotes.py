"""Findings with references to rows -> findings with the texts that people read, masked.

Only views and the terminal get them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dagster_project.core.messages import conversation_text
from dagster_project.core.records import prompt_text, subject_text
from dagster_project.curation.checks import conversations, profile
from dagster_project.curation.checks.check import Limits, Rows, part_text
from dagster_project.curation.checks.checks import CHECKS
from dagster_project.curation.checks.overlaps import FIELDS
from dagster_project.curation.checks.privacy import mask
from dagster_project.curation.checks.references import Reference
from dagster_project.curation.checks.repair import REPAIRS
from dagster_project.curation.checks.token_counts import ESTIMATED
from dagster_project.curation.similarity.overlap import Passage, shared_span, words
from dagster_project.curation.sources.benchmarks import Item

Record = Mapping[str, Any]
Found = Mapping[Reference, Record | Item]
"""Reference -> the record or held-out item, as far as they are there in the version that the reference names."""
Special = Callable[[], Collection[str]]
"""The base model's special tokens, read only if a finding needs them."""

WIDTH = 2000
"""Characters shown of a text around the shared words."""
SEARCHED = 4000
"""Characters of a text that are searched for words shared with a held-out one."""
MISSING = "(text not shown: the project's data have no row with this place and content)"


def quoted(
    document: Mapping[str, Any], find: Callable[[set[Reference]], Found], special: Special, width: int = WIDTH
) -> dict[str, Any]:
    """`findings.references` with texts.

    These are `examples`, `conversations`, texts of matches and common phrases, openings and responses of the profile.
    Documents of versions that wrote texts into the findings are returned as they are. No secret, address or number is
    in a text: it is masked.

    Args:
        find: returns what it finds of the wanted rows; a row that it does not find is shown as `MISSING`, beside its
            place.
        width: characters per text of a match.
    """
    found = find({*_wanted(document)})
    diversity = document.get("profile", {}).get("diversity", {})
    with_references = {name: text for name, text in TOPS.items() if isinstance(diversity.get(name), list)}
    tops = {name: _counted(diversity[name], found, text) for name, text in with_references.items()}
    shown = [_conversation(one, found) for one in document.get("conversations", [])]
    common = [_phrase(one, found) for one in document.get("similarity", {}).get("boilerplate", [])]
    return {
        **document,
        "findings": [_finding(finding, found, special, width) for finding in document["findings"]],
        **({"conversations": [one for one in shown if one]} if shown else {}),
        **({"similarity": {**document["similarity"], "boilerplate": common}} if "similarity" in document else {}),
        **({"profile": {**document["profile"], "diversity": {**diversity, **tops}}} if tops else {}),
    }


TOPS: Mapping[str, Callable[[Record], str]] = {
    "top_openings": profile.opening,
    "top_responses": profile.response_opening,
}
"""Part of the profile's `diversity` with references -> the text shown of a row."""


def _wanted(document: Mapping[str, Any]) -> Iterator[Reference]:
    diversity = document.get("profile", {}).get("diversity", {})
    lists: list[Sequence[Mapping[str, Any]]] = [
        *(one.get(key, ()) for one in document["findings"] for key in ("shown", "matches")),
        document.get("conversations", ()), document.get("similarity", {}).get("boilerplate", ()),
        *(diversity[name] for name in TOPS if isinstance(diversity.get(name), list)),
    ]  # fmt: skip
    for entry in (entry for entries in lists for entry in entries if "example_id" in entry):
        yield _reference(entry)
        if "other_id" in entry:
            yield Reference(entry["other"], entry["other_id"])


def _reference(entry: Mapping[str, Any]) -> Reference:
    return Reference(entry["place"], entry["example_id"])


def _finding(finding: Mapping[str, Any], found: Found, special: Special, width: int) -> dict[str, Any]:
    with_texts = {key: value for key, value in finding.items() if key != "shown"}
    if "shown" in finding:
        with_texts["examples"] = []
        rich: list[dict[str, Any] | None] = []
        for one in finding["shown"]:
            row = found.get(_reference(one))
            if isinstance(row, Mapping):
                with_texts["examples"].append(_example(finding["check"], one.get("repaired", False), row, special))
                rich.append(conversations.shown(row) if conversations.is_rich(row) else None)
            else:
                with_texts["examples"].append(MISSING)
                rich.append(None)
        if any(rich):
            with_texts["conversations"] = rich
    answered = finding["check"] == "conflicting_responses"
    with_texts["matches"] = [
        match if "text" in match else {**match, **_match_texts(match, found, width, answered)}
        for match in finding.get("matches", [])
    ]
    return with_texts


def _conversation(one: Mapping[str, Any], found: Found) -> dict[str, Any] | None:
    """A record in full; None if it is not there."""
    if "example_id" not in one:
        return dict(one)
    record = found.get(_reference(one))
    return {"place": one["place"], **conversations.shown(record)} if isinstance(record, Mapping) else None


def _phrase(one: Mapping[str, Any], found: Found) -> dict[str, Any]:
    if "example_id" not in one:
        return dict(one)
    record, text = found.get(_reference(one)), f"{one['place']} {MISSING}"
    if isinstance(record, Mapping):
        passage = Passage(0, one["start"], one["words"], one["rows"])
        text = mask(passage.of(subject_text(record["messages"])))
    return {"text": text, "rows": one["rows"]}


def _counted(entries: Sequence[Mapping[str, Any]], found: Found, text: Callable[[Record], str]) -> dict[str, int]:
    """Text -> rows, most frequent first."""
    counts: Counter[str] = Counter()
    for one in entries:
        record = found.get(_reference(one))
        counts[text(record) if isinstance(record, Mapping) else f"{one['place']} {MISSING}"] += one["rows"]
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _example(check: str, repaired: bool, record: Record, special: Special) -> str:
    """The fault of a row as the check quotes it or, if it quotes none, the beginning of the row.

    Args:
        repaired: whether the row was repaired for the check; the record is then the one before its repair.
    """
    fault: Any = None
    if repaired:
        (fault,) = REPAIRS[check].make(special())[0]([dict(record)])
    elif CHECKS[check].quotes and (column := CHECKS[check].column):
        tokens = replace(ESTIMATED, special=frozenset(special()))
        (fault,) = column(Rows([dict(record)], Limits(tokens, 0, 0, 0)), check)
    return str(fault)[:200] if fault else excerpt(record)


def excerpt(record: Record, width: int = 120) -> str:
    """The first words of a record, masked; for a record that could not be read, the reason and its content."""
    if record["messages"]:
        text = prompt_text(record["messages"]) or " ".join(m["content"] for m in record["messages"])
    else:
        meta = json.loads(record["meta"])
        text = f"{meta.get('problem', '')}  {json.dumps(meta['row'], ensure_ascii=False) if meta.get('row') else ''}"
    return " ".join(mask(text[: 20 * width]).split())[:width]


def _match_texts(match: Mapping[str, Any], found: Found, width: int, answered: bool) -> dict[str, Any]:
    """Both texts of an overlap, with the longest run of words that they share.

    Args:
        answered: show prompts with their responses, which differ.
    """
    part = match["part"]
    record = found.get(_reference(match))
    other = found.get(Reference(match["other"], match["other_id"]))
    text = _part(record, part, answered) if isinstance(record, Mapping) else MISSING
    if isinstance(other, Item):
        said = [*([] if part == "prompt" else [other.text]), other.question, other.with_choices]
        if part in FIELDS:
            text = _most_similar_part(text, "\n".join(said), SEARCHED)
        theirs = max(said, key=lambda t: _shared(text, t))
    else:
        theirs = MISSING if other is None else _part(other, part, answered)
    if record is None or other is None:
        return {"text": mask(text)[:width], "span": [0, 0], "other_text": mask(theirs)[:width], "other_span": [0, 0]}
    if part in FIELDS:  # reasoning is long
        text, theirs = _most_similar_part(text, theirs, 10 * width), _most_similar_part(theirs, text, 10 * width)
    text, theirs = mask(text[: 10 * width]), mask(theirs[: 10 * width])
    mine_span, other_span = shared_span(text, theirs)
    text, mine_span = _window(text, mine_span, width)
    theirs, other_span = _window(theirs, other_span, width)
    return {"text": text, "span": list(mine_span), "other_text": theirs, "other_span": list(other_span)}


def _part(record: Mapping[str, Any], part: str, answered: bool) -> str:
    text = part_text(record, part)
    return f"{text}\n\n{conversation_text(record['messages'][-1:])}" if answered else text


def _most_similar_part(text: str, other: str, size: int) -> str:
    """The part of a text, of a given size and masked, with the most three-word shingles in common with another text."""
    text = mask(text)
    if len(text) <= size:
        return text
    runs = _runs(other)
    parts = (text[start : start + size] for start in range(0, len(text) - size // 2, size // 2))
    return max(parts, key=lambda part: len(_runs(part) & runs))


def _runs(text: str) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {*zip(tokens, tokens[1:], tokens[2:], strict=False)}


def _shared(a: str, b: str) -> int:
    (start, end), _ = shared_span(a[:SEARCHED], b[:SEARCHED])
    return end - start


def _window(text: str, span: tuple[int, int], width: int) -> tuple[str, tuple[int, int]]:
    """At most `width` characters of the text, with the start of the span in them."""
    if len(text) <= width:
        return text, span
    start = max(0, min(span[0] - width // 4, len(text) - width))
    head = "… " if start else ""
    tail = " …" if start + width < len(text) else ""
    cut = text[start : start + width]
    begin = span[0] - start + len(head)
    return head + cut + tail, (begin, min(span[1] - start + len(head), len(head) + len(cut)))
