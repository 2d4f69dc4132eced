"""Rows -> near-copies among them and of held-out items: duplicates, conflicting responses, leaks."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from dagster_project.core import row_cache
from dagster_project.core.records import response_text, subject_text
from dagster_project.core.stored_rows import Chained, SelectedTexts, StoredRows, StoredTexts, Texts
from dagster_project.curation.checks.check import DataSet, part_text
from dagster_project.curation.similarity.overlap import Comparison, Pair, Passage, Rule, clusters, compare, words
from dagster_project.curation.similarity.wording import is_instruction_only, is_near_duplicate, leak_severity
from dagster_project.curation.sources.benchmarks import Item

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

HELD_OUT = {"test": 0, "validation": 1}
"""Upstream label -> rank among rows with the same text: the first of the lowest rank is kept."""
OTHERS = 2
SHORT_ANSWER = 8
"""Minimum number of words of an answer that is compared with a benchmark's answers: a short one is right for many
questions."""
GROUPED = "grouped"
"""In `Overlaps.links`: near-copies that share a `group_id` but are not similar enough for `near_duplicates`."""
FIELDS = ("reasoning_content", "tool_calls")
"""Parts of a row that are compared separately, in addition to its prompt and its response."""


@dataclass(frozen=True)
class Link:
    """Two rows, or a row and a benchmark item, with nearly the same text."""

    row: int
    other: int | str
    """Index of the earlier row, or the item's place."""
    part: str
    """The part of the row that matched: "prompt", "response", "rejected" of a pair, or one of `FIELDS`."""
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
    """The comparison of all prompts. Rows of its boilerplate are records."""
    links: dict[str, list[Link]] = field(default_factory=dict)
    """Check, or `GROUPED` -> its overlaps, most similar first; without waived ones."""
    waived: dict[str, set[int]] = field(default_factory=dict)
    """Check -> rows all of whose overlaps are waived as pairs."""
    common_frames: int = 0
    """Number of overlaps with held-out questions that share only a common phrase. They are not leaks."""


def find_overlaps(data: DataSet) -> Overlaps:
    """All overlaps of a set, by check.

    `near_duplicates`: rows with the same or nearly the same user turns, regardless of system prompt and tools, and rows
    with nearly the same reasoning or arguments of calls. The other checks are described in docs/checks.md.
    """
    import numpy as np

    records, labels, least = data.records, data.features.labels, data.limits.near_duplicate_similarity
    repeats = _repeats(data.features.table, data.dropped)
    conflicts = _conflicts(data.features.table, repeats)
    compared_rows = data.features.table["present"].to_numpy().copy()
    compared_rows[[*repeats]] = False
    first = np.flatnonzero(compared_rows)
    texts = _ComparedTexts(records)
    compared = _kept_comparison("prompts", SelectedTexts(texts.subjects, first))
    near = [Pair(int(first[p.left]), int(first[p.right]), p.similarity, p.rule) for p in compared.pairs]
    copies = [Pair(j, i, 1.0) for i, j in repeats.items()]
    reported, grouped = _reported(near, records, compared.frequency, least)
    leaks, common_frames = _leaks(data, texts)
    split = _split_leaks(near + copies, labels)
    for part, indices in data.features.long.items():
        if not len(indices):
            continue
        rows = indices[np.isin(indices, [*repeats], invert=True)]
        found = _near_fields(part, rows, records, {(pair.left, pair.right) for pair in near}, least)
        reported, grouped = reported + found[0], grouped + found[1]
        alike = [Pair(int(link.other), link.row, link.score, link.rule) for links in found for link in links]
        split += _split_leaks(alike, labels, part)
        near += alike
    passages = [passage._replace(row=int(first[passage.row])) for passage in compared.boilerplate]
    compared = replace(compared, boilerplate=passages)
    overlaps = Overlaps(clusters(len(records), near + copies), compared, common_frames=common_frames)
    by_check = {
        "exact_duplicates": [Link(i, j, "prompt", "equal", 1.0) for i, j in repeats.items()],
        "conflicting_responses": [Link(i, j, "prompt", "equal", 1.0) for i, j in conflicts.items()],
        "near_duplicates": reported,
        GROUPED: grouped,
        "split_leakage": split,
        "benchmark_leakage": leaks,
    }
    for name, links in by_check.items():
        waived = data.waived.pairs.get(name, set())
        left = [link for link in links if (link.row, link.other) not in waived]
        overlaps.links[name] = sorted(left, key=lambda link: (-link.score, link.row, str(link.other)))
        overlaps.waived[name] = {link.row for link in links} - {link.row for link in left}
    return overlaps


def _kept_comparison(name: str, texts: Sequence[str], against: Sequence[str] | None = None) -> Comparison:
    """`compare`, with frequencies of words, unless an earlier run compared exactly these texts."""

    def compute() -> pl.DataFrame:
        return _as_table(compare(texts, against, count_words=True))

    compared = chain([str(len(texts))], texts, against or ())
    return _as_comparison(row_cache.fact_of_set(f"comparison: {name}", compared, compute))


def _as_table(compared: Comparison) -> pl.DataFrame:
    """One row: columns of pairs as lists, the rest as JSON."""
    import polars as pl

    pairs = [(pair.left, pair.right, pair.similarity, pair.rule) for pair in compared.pairs]
    schema = {"left": pl.Int64, "right": pl.Int64, "similarity": pl.Float64, "rule": pl.String}
    rest = json.dumps([compared.scores, compared.boilerplate, compared.frequency])
    return pl.DataFrame(pairs, schema, orient="row").select(pl.all().implode()).with_columns(rest=pl.lit(rest))


def _as_comparison(table: pl.DataFrame) -> Comparison:
    columns = (table[name][0].to_list() for name in ("left", "right", "similarity", "rule"))
    scores, boilerplate, frequency = json.loads(table["rest"][0])
    return Comparison(
        [Pair(*values) for values in zip(*columns, strict=True)],
        [(other, near) for other, near in scores],
        [Passage(*passage) for passage in boilerplate],
        frequency,
    )


def first_overlap(data: DataSet, name: str) -> dict[int, str]:
    """Row -> the earlier row or held-out item of its most similar overlap."""
    best: dict[int, str] = {}
    for link in data.shared(find_overlaps).links[name]:
        best.setdefault(link.row, str(link.other))
    return best


def _subject(record: dict[str, Any]) -> str:
    return subject_text(record["messages"])


def _near_fields(
    part: str, rows: np.ndarray, records: Sequence[dict[str, Any]], seen: set[tuple[int, int]], least: float
) -> tuple[list[Link], list[Link]]:
    """Rows with nearly the same text in one of `FIELDS`: those that are reported, and those that only share a cluster.

    Args:
        rows: indices of the compared records.
        seen: (earlier, later) excluded pairs, because their prompts are nearly the same.
    """
    texts = Texts(records, rows, partial(part_text, part=part))
    compared = _kept_comparison(part, texts)
    reported: list[Link] = []
    grouped: list[Link] = []
    for p in compared.pairs:
        left, right = int(rows[p.left]), int(rows[p.right])
        if (left, right) in seen:
            continue
        same = p.rule == "equal" or (
            p.rule != "containment"
            and p.similarity >= least
            and is_near_duplicate(texts[p.left], texts[p.right], compared.frequency)
        )
        (reported if same else grouped).append(Link(right, left, part, p.rule, p.similarity))
    return reported, grouped


def _repeats(table: pl.DataFrame, dropped: Collection[int]) -> dict[int, int]:
    """Row -> the kept row with the same messages and tools.

    That is the first, or the first that an upstream label holds out; one that other checks drop only if they drop all.
    """
    import polars as pl

    same = ("same_0", "same_1")
    repeated = table.lazy().with_row_index("row").filter(pl.col("present")).filter(pl.len().over(same) > 1)
    gone = pl.col("row").is_in([*dropped])
    kept = repeated.sort(gone, "rank", "row").select("row", kept=pl.col("row").first().over(same))
    return dict(kept.filter(pl.col("row") != pl.col("kept")).sort("row").collect().iter_rows())


def _conflicts(table: pl.DataFrame, repeats: Mapping[int, int]) -> dict[int, int]:
    """Row -> an earlier row with the same context and a different answer; of pairs, one that prefers the other."""
    import polars as pl

    context, answer, swapped = ([f"{name}_0", f"{name}_1"] for name in ("context", "answer", "swapped"))
    rows = (
        table.lazy()
        .with_row_index("row")
        .filter(pl.any_horizontal(pl.col(context) != 0), pl.col("present"), ~pl.col("row").is_in([*repeats]))
    )
    pairs = rows.filter(pl.any_horizontal(pl.col(swapped) != 0))
    earliest = pairs.group_by(*context, *answer).agg(pl.col("row").min().alias("earlier"))
    preferred = (
        pairs.join(earliest, left_on=[*context, *swapped], right_on=[*context, *answer])
        .filter(pl.col("earlier") < pl.col("row"))
        .select("row", "earlier")
    )
    answered = (
        rows.filter(pl.all_horizontal(pl.col(swapped) == 0))
        .group_by(*context, *answer)
        .agg(pl.col("row").min())
        .with_columns(pl.col("row").min().over(context).alias("earlier"))
        .filter(pl.col("row") != pl.col("earlier"))
        .select("row", "earlier")
    )
    return dict(pl.concat([preferred, answered]).sort("row").collect().iter_rows())


def _split_leaks(pairs: Iterable[Pair], labels: Mapping[int, str], part: str = "prompt") -> list[Link]:
    """Pairs in two upstream splits. The row is the one that is held out less strictly, which later stages drop."""
    links = []
    for p in pairs:
        if labels.get(p.left) and labels.get(p.right) and labels[p.left] != labels[p.right]:
            other, row = sorted(
                (p.left, p.right), key=lambda i: (HELD_OUT.get(labels[i], OTHERS), labels[i] == "train", i)
            )
            links.append(Link(row, other, part, p.rule, p.similarity))
    return links


def _reported(
    near: Sequence[Pair], records: Sequence[dict[str, Any]], frequency: Mapping[str, int], least: float
) -> tuple[list[Link], list[Link]]:
    """Reported near-copies, and those that only share a cluster.

    The latter are less similar ones, texts contained in a longer one, and conversations that end in different
    questions.
    """
    reported: list[Link] = []
    grouped: list[Link] = []
    for p in near:
        same = p.rule == "equal" or (
            p.rule != "containment"
            and p.similarity >= least
            and _are_near_duplicates(records[p.left], records[p.right], frequency)
        )
        (reported if same else grouped).append(Link(p.right, p.left, "prompt", p.rule, p.similarity))
    return reported, grouped


def _are_near_duplicates(left: dict[str, Any], right: dict[str, Any], frequency: Mapping[str, int]) -> bool:
    return all(is_near_duplicate(text(left), text(right), frequency) for text in (_subject, _last_question))


def _last_question(record: dict[str, Any]) -> str:
    return next((m["content"] for m in reversed(record["messages"]) if m["role"] == "user"), "")


class _ComparedTexts:
    """Texts of all records, in scratch files: each record is decoded once for several comparisons."""

    def __init__(self, records: StoredRows) -> None:
        self.subjects, self.responses = StoredTexts(records.folder), StoredTexts(records.folder)
        """The text by which each record is compared, and its response, "" if that is too short to be compared."""
        self.rejected, self.rows_rejected = StoredTexts(records.folder), list[int]()
        """The rejected answers of pairs that are long enough to be compared, and their rows."""
        for row, record in enumerate(records):
            self.subjects.append(_subject(record))
            self.responses.append(_long_response(record["messages"]))
            if rejected := _long_response(record.get("rejected") or ()):
                self.rejected.append(rejected)
                self.rows_rejected.append(row)


def _leaks(data: DataSet, texts: _ComparedTexts) -> tuple[list[Link], int]:
    """Texts that overlap held-out ones, and the number of overlaps that are only a common phrase.

    Prompts are compared with held-out questions; responses, rejected answers, reasoning and arguments also with their
    answers.
    """
    held_out, records = data.held_out, data.records
    if not held_out:
        return [], 0
    size, items = len(records), len(held_out)
    answers = [item.text if is_long(item.text) else "" for item in held_out]
    more = [(int(i), part) for part, rows in data.features.long.items() for i in rows]
    fields = (Texts(records, rows, partial(part_text, part=part)) for part, rows in data.features.long.items())
    mine = Chained(texts.subjects, texts.responses, *fields)
    theirs = [*_questions(held_out), *answers]
    compared = _kept_comparison("held out", mine, theirs)
    links, frames = [], 0
    for p in compared.pairs:
        if p.left < size and p.right >= items:
            continue
        severity = leak_severity(mine[p.left], theirs[p.right], p.rule, p.similarity, compared.frequency)
        frames += severity is None
        if severity:
            if p.left >= 2 * size:
                row, part = more[p.left - 2 * size]
            else:
                row, part = p.left % size, "prompt" if p.left < size else "response"
            links.append(Link(row, held_out[p.right % items].place, part, p.rule, p.similarity, severity == "warn"))
    more_links, more_frames = _rejected_leaks(texts, held_out, theirs) if texts.rows_rejected else ([], 0)
    return links + more_links, frames + more_frames


def _rejected_leaks(texts: _ComparedTexts, held_out: Sequence[Item], theirs: Sequence[str]) -> tuple[list[Link], int]:
    """As `_leaks`, of rejected answers, which pairs are trained on, too.

    They are compared separately, because their words would change how rare those of the other texts are.

    Args:
        theirs: questions and answers of the held-out items.
    """
    compared = _kept_comparison("held out, rejected", texts.rejected, theirs)
    links, frames = [], 0
    for p in compared.pairs:
        severity = leak_severity(texts.rejected[p.left], theirs[p.right], p.rule, p.similarity, compared.frequency)
        frames += severity is None
        if severity:
            row, place = texts.rows_rejected[p.left], held_out[p.right % len(held_out)].place
            links.append(Link(row, place, "rejected", p.rule, p.similarity, severity == "warn"))
    return links, frames


def _long_response(messages: Sequence[Any]) -> str:
    """The response, or "" if it is too short to be compared."""
    response = response_text(messages)
    # the first 400 characters almost always suffice, and are faster
    return response if is_long(response[:400]) or is_long(response) else ""


def _questions(held_out: Sequence[Item]) -> list[str]:
    """The question of each item.

    With its choices if the question alone is an instruction, or if other items have it with other choices.
    """
    choices: dict[str, set[frozenset[str]]] = defaultdict(set)
    for item in held_out:
        if item.choices:
            choices[item.question].add(frozenset(item.choices))
    return [
        item.with_choices if len(choices[item.question]) > 1 or is_instruction_only(item.question) else item.question
        for item in held_out
    ]


_LONG = re.compile(rf"[\W_]*+(?:[^\W_]++[\W_]++){{{SHORT_ANSWER - 1}}}[^\W_]", re.ASCII)


def is_long(text: str) -> bool:
    """Whether a text has `SHORT_ANSWER` `words`; for ASCII a regular expression is faster."""
    return bool(_LONG.match(text)) if text.isascii() else len(words(text)) >= SHORT_ANSWER
