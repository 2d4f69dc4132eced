"""Rows -> near-copies among them and of held-out items: duplicates, conflicting responses, leaks between splits and from benchmarks."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagster_project.core.messages import Message, calls
from dagster_project.core.records import content_id
from dagster_project.curation.checks.check import Rows, part_text
from dagster_project.curation.similarity.overlap import Comparison, Pair, Rule, clusters, compare, words
from dagster_project.curation.similarity.wording import is_instruction_only, is_near_duplicate, leak_severity
from dagster_project.curation.sources.benchmarks import Item

SHORT_ANSWER = 8
"""Minimum number of words of an answer that is compared with a benchmark's answers: a short one is right for many
questions."""
GROUPED = "grouped"
"""In `Overlaps.links`: near-copies that share a `group_id` but are not similar enough for `near_duplicates`."""
HELD_OUT = {"test": 0, "validation": 1}
FIELDS = ("reasoning_content", "tool_calls")
"""Parts of a row that are compared separately, in addition to its prompt and its response."""


@dataclass(frozen=True)
class Link:
    """Two rows, or a row and a benchmark item, with nearly the same text."""

    row: int
    other: int | str
    """Index of the earlier row, or the item's place."""
    part: str
    """The part of the row that matched: "prompt", "response" or one of `FIELDS`."""
    rule: Rule
    score: float
    partial: bool = False
    """An overlap with held-out text that is neither equal nor a copy of most of it. It is a warning, a copy is an
    error."""


@dataclass
class Overlaps:
    """Result of `find_overlaps`."""

    cluster: Sequence[int]
    """For each record the first record of its near-duplicate cluster."""
    compared: Comparison
    """The comparison of all prompts."""
    links: dict[str, list[Link]] = field(default_factory=dict)
    """Check, or `GROUPED` -> its overlaps, most similar first; without waived ones."""
    waived: dict[str, set[int]] = field(default_factory=dict)
    """Check -> rows all of whose overlaps are waived as pairs."""
    common_frames: int = 0
    """Number of overlaps with held-out questions that share only a common phrase. They are not leaks."""


def find_overlaps(rows: Rows) -> Overlaps:
    """`near_duplicates`: rows with the same or nearly the same user turns, regardless of system prompt and tools, and
    rows with nearly the same
    reasoning or arguments of calls. The other checks are described in docs/checks.md."""
    size = len(rows.records)
    subjects = [prompt or response for prompt, response in zip(rows.prompts, rows.responses, strict=True)]  # as records.subject_text
    labels = [label if isinstance(label := meta.get("split"), str) else None for meta in rows.metas]
    repeats, conflicts = _repeats(rows.records, [*map(tools_of, rows.records, rows.metas)], labels)
    first = [i for i in range(size) if rows.records[i]["messages"] and i not in repeats]
    compared = compare([subjects[i] for i in first], count_words=True)
    near = [Pair(first[p.left], first[p.right], p.similarity, p.rule) for p in compared.pairs]
    copies = [Pair(j, i, 1.0) for i, j in repeats.items()]
    reported, grouped = _reported(near, rows.records, subjects, compared.frequency, rows.near_duplicate_similarity)
    fields = {part: texts for part in FIELDS if (texts := _long_texts(rows, part))}
    leaks, common_frames = _leaks(subjects, rows.responses, fields, rows.held_out)
    split = _split_leaks(near + copies, labels)
    for part, texts in fields.items():
        found = _near_fields(part, texts, repeats, {(pair.left, pair.right) for pair in near}, rows.near_duplicate_similarity)
        reported, grouped = reported + found[0], grouped + found[1]
        alike = [Pair(int(link.other), link.row, link.score, link.rule) for links in found for link in links]
        split += _split_leaks(alike, labels, part)
        near += alike
    overlaps = Overlaps(clusters(size, near + copies), compared, common_frames=common_frames)
    for name, links in {
        "exact_duplicates": [Link(i, j, "prompt", "equal", 1.0) for i, j in repeats.items()],
        "conflicting_responses": [Link(i, j, "prompt", "equal", 1.0) for i, j in conflicts.items()],
        "near_duplicates": reported,
        GROUPED: grouped,
        "split_leakage": split,
        "benchmark_leakage": leaks,
    }.items():
        waived = rows.waived.pairs.get(name, set())
        left = [link for link in links if (link.row, link.other) not in waived]
        overlaps.links[name] = sorted(left, key=lambda link: (-link.score, link.row, str(link.other)))
        overlaps.waived[name] = {link.row for link in links} - {link.row for link in left}
    return overlaps


def first_overlap(rows: Rows, name: str) -> list[str | None]:
    """For each row the earlier row or held-out item of its most similar overlap, or None."""
    best: list[str | None] = [None] * len(rows.records)
    for link in rows.shared(find_overlaps).links[name]:
        best[link.row] = best[link.row] or str(link.other)
    return best


def _long_texts(rows: Rows, part: str) -> dict[int, str]:
    """Index -> text of one of `FIELDS`, if it is long enough to be compared."""
    texts = ((i, part_text(rows.records[i], part)) for i in rows.rich)
    return {i: text for i, text in texts if _is_long(text)}


def _near_fields(
    part: str, texts: Mapping[int, str], repeats: Mapping[int, int], seen: set[tuple[int, int]], least: float
) -> tuple[list[Link], list[Link]]:
    """Rows with nearly the same text in one of `FIELDS`: those that are reported, and those that only share a cluster.

    Args:
        repeats: excluded rows.
        seen: (earlier, later) excluded pairs, because their prompts are nearly the same.
    """
    rows = [i for i in texts if i not in repeats]
    compared = compare([texts[i] for i in rows], count_words=True)
    reported: list[Link] = []
    grouped: list[Link] = []
    for p in compared.pairs:
        left, right = rows[p.left], rows[p.right]
        if (left, right) in seen:
            continue
        same = p.rule == "equal" or (
            p.rule != "containment" and p.similarity >= least and is_near_duplicate(texts[left], texts[right], compared.frequency)
        )
        (reported if same else grouped).append(Link(right, left, part, p.rule, p.similarity))
    return reported, grouped


def tools_of(record: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """The definitions of the functions that the assistant may call, in a normal form; "" for none. Like a system
    prompt, they are context and not part of the question.
    """
    given = record.get("tools") or meta.get("tools") or meta.get("functions")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = given.strip()
    return json.dumps(given, ensure_ascii=False, sort_keys=True) if given else ""


def _repeats(
    records: Sequence[dict[str, Any]], tools: Sequence[str], labels: Sequence[str | None]
) -> tuple[dict[int, int], dict[int, int]]:
    """Row -> the kept row with the same messages and tools: the first, or the first that an upstream label holds out.
    And row -> an earlier row with the same prompt and tools and a different answer."""
    ids = [content_id({**record, "tools": None}) if record.get("tools") else record["example_id"] for record in records]
    first: dict[tuple[str, str], int] = {}
    for i in sorted((i for i, label in enumerate(labels) if label in HELD_OUT), key=lambda i: (HELD_OUT[str(labels[i])], i)):
        first.setdefault((ids[i], tools[i]), i)
    answers: dict[tuple[str, ...], dict[Any, int]] = defaultdict(dict)
    repeats: dict[int, int] = {}
    conflicts: dict[int, int] = {}
    for i, record in enumerate(records):
        messages = record["messages"]
        if not messages:
            continue
        if (same := first.setdefault((ids[i], tools[i]), i)) != i:
            repeats[i] = same
            continue
        if "rejected" in record:
            chosen, rejected = (tuple(map(_message_key, side)) for side in (messages[record["asked"] :], record["rejected"]))
            earlier = answers[_key(messages[: record["asked"]], tools[i])]
            if (rejected, chosen) in earlier:
                conflicts[i] = earlier[rejected, chosen]
            earlier.setdefault((chosen, rejected), i)
            continue
        if len(messages) < 2:
            continue
        earlier = answers[_key(messages[:-1], tools[i])]
        answer = _message_key(messages[-1])
        if earlier and answer not in earlier:
            conflicts[i] = next(iter(earlier.values()))
        earlier.setdefault(answer, i)
    return repeats, conflicts


def _key(messages: Sequence[Message], tools: str) -> tuple[Any, ...]:
    return (tools, *(part for m in messages for part in (m["role"], _message_key(m))))


def _message_key(message: Message) -> Any:
    """The compared part of a message: its content and, if present, its reasoning and calls. Ids of calls are ignored,
    because they are arbitrary."""
    made = [(call.name, json.dumps(call.arguments, ensure_ascii=False, sort_keys=True)) for call in calls(message)]
    reasoning = message.get("reasoning_content")
    return (message["content"], reasoning or "", *made) if reasoning or made else message["content"]


def _split_leaks(pairs: Iterable[Pair], labels: Sequence[str | None], part: str = "prompt") -> list[Link]:
    """Pairs in two upstream splits. The row is the one in the training split, else the later one."""
    links = []
    for p in pairs:
        if labels[p.left] and labels[p.right] and labels[p.left] != labels[p.right]:
            other, row = sorted((p.left, p.right), key=lambda i: (labels[i] == "train", i))
            links.append(Link(row, other, part, p.rule, p.similarity))
    return links


def _reported(
    near: Sequence[Pair], records: Sequence[dict[str, Any]], subjects: Sequence[str], frequency: Mapping[str, int], least: float
) -> tuple[list[Link], list[Link]]:
    """Reported near-copies, and those that only share a cluster: less similar ones, texts contained in a longer one,
    and conversations that end in different questions."""
    reported: list[Link] = []
    grouped: list[Link] = []
    for p in near:
        same = p.rule == "equal" or (
            p.rule != "containment"
            and p.similarity >= least
            and is_near_duplicate(subjects[p.left], subjects[p.right], frequency)
            and is_near_duplicate(_last_question(records[p.left]), _last_question(records[p.right]), frequency)
        )
        (reported if same else grouped).append(Link(p.right, p.left, "prompt", p.rule, p.similarity))
    return reported, grouped


def _last_question(record: dict[str, Any]) -> str:
    return next((m["content"] for m in reversed(record["messages"]) if m["role"] == "user"), "")


def _leaks(
    subjects: Sequence[str], responses: Sequence[str], fields: Mapping[str, Mapping[int, str]], held_out: Sequence[Item]
) -> tuple[list[Link], int]:
    """Prompts that overlap a held-out question, and responses, reasoning and arguments that overlap its answer or the
    question itself. Also returns the number of overlaps that are only a common phrase.

    Args:
        fields: part -> index of a row -> its text.
    """
    if not held_out:
        return [], 0
    size, items = len(subjects), len(held_out)
    long = [response if _is_long(response[:400]) else "" for response in responses]
    answers = [item.text if _is_long(item.text) else "" for item in held_out]
    more = [(i, part, text) for part, texts in fields.items() for i, text in texts.items()]
    mine, theirs = [*subjects, *long, *(text for _, _, text in more)], [*_questions(held_out), *answers]
    compared = compare(mine, theirs, count_words=True)
    links, frames = [], 0
    for p in compared.pairs:
        if p.left < size and p.right >= items:
            continue
        severity = leak_severity(mine[p.left], theirs[p.right], p.rule, p.similarity, compared.frequency)
        frames += severity is None
        if severity:
            row, part = (p.left % size, "prompt" if p.left < size else "response") if p.left < 2 * size else more[p.left - 2 * size][:2]
            links.append(Link(row, held_out[p.right % items].place, part, p.rule, p.similarity, severity == "warn"))
    return links, frames


def _questions(held_out: Sequence[Item]) -> list[str]:
    """The question of each item; with its choices if the question alone is an instruction, or if other items have it
    with other choices."""
    choices: dict[str, set[frozenset[str]]] = defaultdict(set)
    for item in held_out:
        if item.choices:
            choices[item.question].add(frozenset(item.choices))
    return [
        item.with_choices if len(choices[item.question]) > 1 or is_instruction_only(item.question) else item.question for item in held_out
    ]


_LONG = re.compile(rf"[\W_]*+(?:[^\W_]++[\W_]++){{{SHORT_ANSWER - 1}}}[^\W_]", re.ASCII)


def _is_long(text: str) -> bool:
    """Whether a text has `SHORT_ANSWER` `words`; for ASCII a regular expression is faster."""
    return bool(_LONG.match(text)) if text.isascii() else len(words(text)) >= SHORT_ANSWER
