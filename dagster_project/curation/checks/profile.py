"""Statistics of a set as a whole: balance, lengths, diversity, readability; and the checks on its shares."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dagster_project.core import row_cache
from dagster_project.core.imports import import_pandera
from dagster_project.core.messages import calls
from dagster_project.core.params import Section
from dagster_project.core.records import prompt_text, response_text
from dagster_project.core.stored_rows import Selected, StoredRows, decode
from dagster_project.core.text import listed, many
from dagster_project.curation.checks.privacy import mask
from dagster_project.curation.checks.references import Reference

if TYPE_CHECKING:
    import numpy as np
    import pandera.polars as pa
    import polars as pl

NONE, OTHERS = "(none)", "(others)"
SAMPLE_WORDS = 20_000
"""Number of words of prompts over which the vocabulary is measured. Distinct-n falls with the amount of text, so sets
of different size compare only over equal amounts."""
SAMPLE_PROMPT = 100
"""Words taken from one prompt, so that long ones do not fill the sample alone."""
TEMPLATE = 0.05
"""A pair of neighboring words belongs to a template if it occurs in more than this share of prompts (and in more than
two)."""
SCRIPT_CHARACTERS = 500
"""Characters at the beginning of a prompt from which its script is determined."""
LONG_RESPONSE = 8
"""Minimum number of words of a repeated response that is reported. Shorter ones are labels, which classification sets
repeat by design."""
MOST, RAREST = 50, 10
"""Categories listed, and of the least frequent ones."""
REPEATED = 0.01
"""Minimum share of rows of a response that is listed as repeated (and two rows)."""
SCORED_WORDS = 10
"""Minimum number of words of a prompt whose readability is scored."""
HARD = 50.0
"""Flesch reading ease below which a text is `difficult` or `very difficult` in his scale: above school level."""

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
_WORD = rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’][^\W_{_CJK}]+)*"
"""A word, contractions whole ("don't"); each CJK character, which has no spaces around it."""
_VOWELS = "aeiouyà-öø-ÿ"
_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_SYLLABLE = rf"(?i)[{_VOWELS}]+|(?:^|[^\w'’])[{_CONSONANTS}0-9]+\b"
"""A group of vowels, or a whole word without any ("Mr", "48")."""
_SILENT = (
    rf"(?i)[{_VOWELS}](?:le|[a-z]*(?:[bcdfghjkmnpqrstvwxz]e|[{_VOWELS}]le|[bcfghjklmnpqrsvwxz]ed|[bdfkmnprtvw]es))\b"
)
"""A word whose last vowel is silent after another vowel: make, whole, walked, times; not: the, table, wanted,
houses."""
_ENDS = r"[.!?…]+[\"'”’)\]]*\s+|[^\S\n]*\n\s*"
"""Between two sentences: a stop and space, or the end of a line (lists and verses have no stops)."""

_NAMES = {
    "CJK": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "KATAKANA-HIRAGANA": "Kana",
    **{
        name.upper(): name
        for name in (
            "Latin", "Hangul", "Cyrillic", "Arabic", "Hebrew", "Devanagari", "Greek", "Thai", "Bengali", "Tamil",
            "Telugu", "Gujarati", "Gurmukhi", "Kannada", "Malayalam", "Sinhala", "Lao", "Tibetan", "Myanmar", "Khmer",
            "Armenian", "Georgian", "Ethiopic",
        )
    },
}  # fmt: skip
_SCRIPTS = (NONE, "other", *dict.fromkeys(_NAMES.values()))


class Limits(Section):
    """Limits of the shares of a set."""

    min_rows: int = Field(default=100, ge=0)
    """Minimum number of rows. Smaller sets fail `small_dataset`: a model rarely learns more than the format from
    them."""
    balance_ratio: float = Field(default=5.0, ge=1)
    """Largest allowed ratio of the most frequent to the least frequent category. Models neglect rare categories."""
    max_source_share: float | None = Field(default=None, ge=0, le=1)
    """Largest share of rows that may come from one source file. null: no limit."""
    max_opening_share: float = Field(default=0.6, ge=0, le=1)
    """Largest share of prompts that may begin with the same two words. Above it the set probably contains one kind of
    task in one wording."""
    min_distinct_2: float = Field(default=0.3, ge=0, le=1)
    """Smallest share of distinct pairs of neighboring words among all such pairs in 20,000 words of prompts. Prompts
    written by people have more than 0.6."""
    max_template_share: float = Field(default=0.3, ge=0, le=1)
    """Largest share of these word pairs that may each occur in more than a twentieth of the prompts. Prompts written by
    people have 0.1 or less. Filled-in templates have more, including templates with so many gaps that few pairs
    repeat."""
    max_response_share: float = Field(default=0.2, ge=0, le=1)
    """Largest share of rows that may have the same response of 8 words or more. A model learns to give such a response
    to any prompt."""
    max_near_copy_share: float = Field(default=0.5, ge=0, le=1)
    """Largest share of rows that may share a `group_id` with an earlier row (exact repeats not counted). Above it most
    rows add little."""
    min_rows_for_diversity: int = Field(default=20, ge=1)
    """Minimum number of rows for checks of diversity: in smaller sets two similar rows are already a large share."""


@dataclass
class _Counts:
    """Statistics of several records."""

    categories: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    roles: Counter[tuple[str, ...]] = field(default_factory=Counter)
    tools: Counter[str] = field(default_factory=Counter)
    """Calls by tool."""
    others: Counter[str] = field(default_factory=Counter)
    """rows_with_tools; rows (with calls); calls; results; traced (rows with reasoning); traces; untrained (answers)."""

    def add(self, counted: str, rows: int) -> None:
        """Args:
        counted: what several records have in common, as `_counted` says it.
        """
        category, source, roles, names, *numbers = json.loads(counted)
        self.categories[category] += rows
        self.sources[source] += rows
        self.roles[tuple(roles)] += rows
        for name in names:
            self.tools[name] += rows
        for name, number in zip(OF_RECORD, numbers, strict=True):
            self.others[name] += number * rows


OF_RECORD = ("rows_with_tools", "rows", "calls", "traced", "traces", "results", "untrained")
"""Of `_Counts.others`, as `_counted` lists them."""


def profile(records: Sequence[dict[str, Any]], lengths: Sequence[int] | pl.Series | None = None) -> dict[str, Any]:
    """The statistics of a set.

    Args:
        records: canonical records.
        lengths: tokens of each whole conversation by the base model's tokenizer, if known.
    Returns:
        rows, category_count, categories, rarest, sources, scripts, roles, lengths, singletons, entropy,
        effective_categories, diversity, readability; and, if there are any, tool_calls, reasoning and
        untrained_answers. Counts are of rows, most frequent first, ties by name; entropies are in bits; floats have 4
        digits.
    """
    stored = records if isinstance(records, StoredRows | Selected) else StoredRows(records)
    rows, counts = row_cache.facts(_measure_block, None, stored, ()), _Counts()
    for counted, n in rows["counted"].value_counts().iter_rows():
        counts.add(counted, n)
    others, categories = counts.others, counts.categories
    named = Counter({name: n for name, n in categories.items() if name != NONE}) or categories
    shapes: Counter[str] = Counter()
    for turns, n in counts.roles.items():
        shapes[_shape(turns)] += n
    words = {"prompt": rows["prompt_words"], "response": rows["response_words"]}
    if others["traced"]:
        words["reasoning"] = rows["trace_words"].drop_nulls()
    spreads = {name: {"unit": "words", **_spread(column)} for name, column in words.items()}
    if lengths is not None:
        spreads["tokens"] = {"unit": "tokens", **_spread(lengths)}
    document = {
        "rows": len(records),
        "category_count": len(named) if named is not categories else 0,
        "categories": _top(categories, MOST),
        "rarest": _rarest(named),
        "sources": _top(counts.sources, 50),
        "scripts": _top(dict(rows["script"].value_counts().iter_rows()), 50),
        "roles": _top(shapes, 20),
        "lengths": spreads,
        "singletons": sum(n == 1 for name, n in named.items() if name != NONE),
        "entropy": round(_entropy(named.values()), 4),
        "effective_categories": round(2 ** _entropy(named.values()), 4) if len(records) else 0.0,
        "diversity": {**_vocabulary(records, rows), **_openings(records, rows), **_responses(records, rows)},
        "readability": _readability(rows["reading_ease"].drop_nulls()),
    }
    if others["rows_with_tools"] or others["calls"]:
        numbers = {name: others[name] for name in ("rows_with_tools", "rows", "calls", "results")}
        document["tool_calls"] = {**numbers, "by_tool": _top(counts.tools, 50)}
    if others["traced"]:
        document["reasoning"] = {"rows": others["traced"], "answers": others["traces"]}
    if others["untrained"]:
        document["untrained_answers"] = others["untrained"]
    return document


def _measure_block(_: None, lines: Sequence[bytes]) -> pl.DataFrame:
    """The columns of `_measure`; `trace_words`: words of a record's reasoning, if it has any; `counted`: `_counted`."""
    import polars as pl

    records = [decode(line) for line in lines]
    traces = [_traces(record) for record in records]
    words = iter(count_words(["\n".join(own) for own in traces if own]).to_list())
    counted = [_counted(record, len(own)) for record, own in zip(records, traces, strict=True)]
    return _measure(records).with_columns(
        trace_words=pl.Series([next(words) if own else None for own in traces], dtype=pl.Int64),
        counted=pl.Series(counted, dtype=pl.String),
    )


def _traces(record: Mapping[str, Any]) -> list[str]:
    return [trace for message in record["messages"] if (trace := message.get("reasoning_content"))]


def _counted(record: Mapping[str, Any], traces: int) -> str:
    """What `_Counts` adds up, as JSON: category, source, roles, names of tools that are called, and `OF_RECORD`.

    Equal for many records.
    """
    messages = record["messages"]
    names = [call.name for message in messages for call in calls(message)]
    numbers = [
        int(bool(record.get("tools"))), int(bool(names)), len(names), int(bool(traces)), traces,
        sum(message["role"] == "tool" for message in messages),
        sum(message.get("weight") == 0 for message in messages if message["role"] == "assistant"),
    ]  # fmt: skip
    category = str(record["category"] or "").strip() or NONE
    return json.dumps([category, record["source"], [message["role"] for message in messages], names, *numbers])


def _top(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """The most frequent, ties by name, then the sum of the others."""
    ordered = _most_frequent(counts)
    others = {OTHERS: sum(counts[name] for name in ordered[most:])} if len(ordered) > most else {}
    return {**{shown: counts[name] for name, shown in _masked(ordered[:most]).items()}, **others}


def _rarest(counts: Mapping[str, int]) -> dict[str, int]:
    """The least frequent, ties by name, under the names that `_top` shows where it has them."""
    rarest = [name for name in sorted(counts, key=lambda name: (counts[name], name))[:RAREST] if name != NONE]
    shown = _masked([*dict.fromkeys([*_most_frequent(counts)[:MOST], *rarest])])
    return {shown[name]: counts[name] for name in rarest}


def _most_frequent(counts: Mapping[str, int]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))


def _masked(names: Sequence[str]) -> dict[str, str]:
    """Name -> the name as it is shown.

    Names come from the data, so addresses in them are masked; those that would look alike are numbered: "[e-mail]",
    "[e-mail] 2".
    """
    shown = dict[str, str]()
    for name in names:
        text, taken = mask(name), {*shown.values()}
        numbered = (f"{text} {i}" for i in range(2, len(names) + 2))
        shown[name] = text if text not in taken else next(one for one in numbered if one not in taken)
    return shown


def _entropy(counts: Iterable[int]) -> float:
    """Shannon entropy in bits (A mathematical theory of communication, 1948).

    0 for one kind, log2(n) for n equally frequent ones.
    """
    given = list(counts)
    total = sum(given)
    return math.fsum(n / total * math.log2(total / n) for n in given)


def _shape(roles: tuple[str, ...]) -> str:
    """system user assistant user assistant  ->  "system user assistant ... (4 turns)" """
    first = roles[:1] if roles[:1] == ("system",) else ()
    turns = roles[len(first) :]
    most = 2 if all(role == turns[i % 2] for i, role in enumerate(turns)) else 8
    more = [f"... ({len(turns)} turns)"] if len(turns) > most else []
    return " ".join([*first, *turns[:most], *more]) or NONE


def _measure(records: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """A row per record: example_id, script, prompt_words, response_words, opening, response (a hash), reading_ease."""
    import polars as pl

    prompt, response = pl.col("prompt").str, pl.col("response").str
    counted = {
        "prompt_words": prompt.count_matches(_WORD).cast(pl.Int64),
        "response_words": response.count_matches(_WORD).cast(pl.Int64),
        "sentences": 1 + prompt.strip_chars(" \t\r\n.!?…\"'”’)]").str.count_matches(_ENDS),
        "syllables": prompt.count_matches(_SYLLABLE).cast(pl.Int64) - prompt.count_matches(_SILENT),
        "opening": pl.col("asked").str.to_lowercase().str.extract_groups(rf"^[\W_]*({_WORD})[\W_]*({_WORD})?"),
        "response": response.strip_chars(),
    }
    words, opening = pl.col("prompt_words"), [pl.col("opening").struct.field(group) for group in ("1", "2")]
    # Flesch, A new readability yardstick, Journal of Applied Psychology 32 (1948); for English.
    ease = 206.835 - 1.015 * words / pl.col("sentences") - 84.6 * pl.col("syllables") / words
    scored = (pl.col("script") == "Latin") & (words >= SCORED_WORDS)
    # numbers are replaced: numbered rows have the same opening, and no number is revealed
    opened = pl.concat_str(opening, separator=" ", ignore_nulls=True).str.replace_all(r"\S*\d\S*", "#")
    conversations = [record["messages"] for record in records]
    prompts = [prompt_text(messages) for messages in conversations]
    texts = {
        "example_id": [record["example_id"] for record in records],
        "prompt": prompts,
        "response": [response_text(messages) for messages in conversations],
        "asked": [_last_question(messages)[:200] for messages in conversations],
        "script": scripts(prompts),
    }
    table = pl.DataFrame(texts, dict.fromkeys(texts, pl.String)).select("example_id", "script", **counted)
    return table.select(
        "example_id",
        "script",
        "prompt_words",
        "response_words",
        pl.Series("response", [_text_hash(text) for text in table["response"].to_list()], dtype=pl.UInt64),
        opening=pl.when(opening[0].is_not_null()).then(opened),
        reading_ease=pl.when(scored).then(ease),
    )


def _last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def _text_hash(text: str) -> int:
    """Not polars' own hash, which may differ between machines."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


UNKNOWN = 255


@cache
def _known_letters() -> np.ndarray[Any, Any]:
    """Code point -> index into `_SCRIPTS`, `UNKNOWN` until it occurs.

    Looking up the names of all would take longer than a small edit.
    """
    import numpy as np

    return np.full(0x110000, UNKNOWN, np.uint8)


def _letters(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Index into `_SCRIPTS` of each code point."""
    known = _known_letters()
    for code in {*codes[known[codes] == UNKNOWN].tolist()}:
        known[code] = _script(code)
    return known[codes]


def _script(code: int) -> int:
    """0 if it is not a letter. The Unicode name of a letter begins with its script's."""
    import unicodedata

    if code >= 0x32000 or unicodedata.category(chr(code))[0] != "L":  # no letters beyond
        return 0
    name = unicodedata.name(chr(code), "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").split(" ")[0]
    return _SCRIPTS.index(_NAMES.get(name, "other"))


def count_words(texts: Sequence[str]) -> pl.Series:
    """Words of each text."""
    import polars as pl

    return pl.Series(texts, dtype=pl.String).str.count_matches(_WORD).cast(pl.Int64)


def scripts(texts: Sequence[str]) -> list[str]:
    """The script that most letters of each text belong to."""
    import numpy as np

    found = ["Latin" if text.isascii() and _ASCII_LETTER.search(text) else NONE for text in texts]
    mixed = [i for i, text in enumerate(texts) if not text.isascii()]
    beginnings = [texts[i][:SCRIPT_CHARACTERS] for i in mixed]
    codes = np.frombuffer("".join(beginnings).encode("utf-32-le"), np.uint32)
    row = np.repeat(np.arange(len(mixed)), [len(text) for text in beginnings])
    size = len(_SCRIPTS)
    counts = np.bincount(row * size + _letters(codes), minlength=len(mixed) * size).reshape(-1, size)
    counts[:, 0] = 0  # not a letter
    han, kana = _SCRIPTS.index("Han"), _SCRIPTS.index("Kana")
    counts[:, kana] += np.where(counts[:, kana] * 5 >= counts[:, han], counts[:, han], 0)  # Japanese is written in both
    for i, main in zip(mixed, counts.argmax(axis=1).tolist(), strict=True):
        found[i] = _SCRIPTS[main]
    return found


_ASCII_LETTER = re.compile("[A-Za-z]")


def _rounded(value: float) -> float | int:
    """Rounded to 4 digits; whole numbers as int."""
    return int(value) if value == int(value) else round(value, 4)


def _spread(values: Sequence[int] | pl.Series) -> dict[str, Any]:
    """total, median, p95 (interpolated), max, and a histogram by powers of two: 0, 1, 2-3, 4-7, ..."""
    import numpy as np

    given = np.asarray(values, np.int64)
    if not len(given):
        return {"total": 0, "median": 0, "p95": 0, "max": 0, "histogram": []}
    edges = [0, *(2**i for i in range(int(given.max()).bit_length() + 1))]
    rows = np.histogram(given, edges)[0].tolist()
    first = next(i for i, n in enumerate(rows) if n)
    bins = [{"from": edges[i], "to": edges[i + 1], "rows": n} for i, n in enumerate(rows)]
    median, p95 = np.percentile(given, [50, 95]).tolist()
    return {
        "total": int(given.sum()),
        "median": _rounded(median),
        "p95": _rounded(p95),
        "max": int(given.max()),
        "histogram": bins[first:],
    }


def _vocabulary(records: Sequence[dict[str, Any]], rows: pl.DataFrame) -> dict[str, Any]:
    """Diversity of words and pairs of words, over a sample.

    It has the beginnings of prompts in the order of their content hashes, which is as good as random, needs no seed and
    does not depend on the order of rows.

    distinct_1, distinct_2: Li et al., A diversity-promoting objective function for neural conversation models (2016):
    share of distinct words (pairs of neighboring words within a prompt). effective_words: the Hill number of order 1
    (Hill, Diversity and evenness, 1973), 2 to the power of the entropy of the words: the number of equally frequent
    words with the same diversity. template_share: share of pairs that occur in more than `TEMPLATE` of the prompts.
    """
    import polars as pl

    beginnings: list[str] = []
    expected = 0
    order = ["example_id", "row"]
    indexed = rows.lazy().select("example_id", "prompt_words").with_row_index("row")
    sample = indexed.bottom_k(SAMPLE_WORDS, by=order).sort(order).select("row", "prompt_words").collect()
    for i, prompt_words in sample.iter_rows():
        if expected >= SAMPLE_WORDS:
            break
        beginnings.append(prompt_text(records[i]["messages"])[: 20 * SAMPLE_PROMPT])
        expected += min(prompt_words, SAMPLE_PROMPT)
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    prompts: Counter[tuple[str, str]] = Counter()
    split = pl.Series(beginnings, dtype=pl.String).str.to_lowercase().str.extract_all(_WORD)
    for found in split.list.head(SAMPLE_PROMPT).to_list():
        words.update(found)
        pairs.update(pairwise(found))
        prompts.update(set(pairwise(found)))
    total = words.total()
    template = sum(n for pair, n in pairs.items() if prompts[pair] > max(2, TEMPLATE * len(beginnings)))
    return {
        "sampled_words": total,
        "distinct_1": round(len(words) / max(1, total), 4),
        "distinct_2": round(len(pairs) / max(1, pairs.total()), 4),
        "effective_words": round(2 ** _entropy(words.values()), 4) if words else 0.0,
        "template_share": round(template / max(1, pairs.total()), 4),
    }


def _openings(records: Sequence[dict[str, Any]], rows: pl.DataFrame) -> dict[str, Any]:
    """The variety of tasks, by the first two words of the last question ("write a", "how do").

    As in Wang et al., Self-Instruct (2023), who use verb and noun.
    """
    import polars as pl

    counted = (
        rows.select("example_id", "opening")
        .with_row_index("row")
        .drop_nulls("opening")
        .group_by("opening")
        .agg(pl.len().alias("count"), _first())
    ).sort(["count", "opening"], descending=[True, False])
    counts = counted["count"].to_list()
    common = counted.filter(pl.col("count") > 1).head(10)
    return {
        "openings": len(counted),
        "top_openings": [_named(records, first, n) for first, n in common.select("first", "count").iter_rows()],
        "top_opening_share": round(max(counts, default=0) / max(1, len(rows)), 4),
        "opening_entropy": round(_entropy(counts), 4),
    }


def _first() -> pl.Expr:
    """`first`: indices of the rows with the smallest content hash, which do not depend on the order of rows."""
    import polars as pl

    return pl.col("row").filter(pl.col("example_id") == pl.col("example_id").min()).alias("first")


def _named(records: Sequence[dict[str, Any]], first: Sequence[int], rows: int) -> dict[str, Any]:
    """One of several rows that have something in common, and their number."""
    return {**min(Reference.of(records[i]) for i in first)._asdict(), "rows": rows}


def opening(record: Mapping[str, Any]) -> str:
    """The words by which `top_openings` counts a record."""
    return str(_measure([dict(record)])["opening"][0] or "")[:40]


def _responses(records: Sequence[dict[str, Any]], rows: pl.DataFrame) -> dict[str, Any]:
    """Responses that occur in many rows, and the share of the most frequent one of `LONG_RESPONSE` words or more."""
    import polars as pl

    counted = (
        rows.with_row_index("row")
        .filter(pl.col("response_words") > 0)
        .group_by("response")
        .agg(pl.len().alias("rows"), _first(), pl.col("example_id").min(), pl.col("response_words").first())
        .filter(pl.col("rows") > 1)
        .sort(["rows", "example_id"], descending=[True, False])
    )
    repeated = counted.filter(pl.col("rows") >= REPEATED * len(rows)).select("first", "rows")
    long = counted.filter(pl.col("response_words") >= LONG_RESPONSE)["rows"].to_list()
    return {
        "repeated_responses": len(repeated),
        "top_responses": [_named(records, first, n) for first, n in repeated.head(10).iter_rows()],
        "top_response_share": round(long[0] / len(rows), 4) if long else 0.0,
    }


def response_opening(record: Mapping[str, Any]) -> str:
    """What is shown of a response in `top_responses`."""
    return mask(" ".join(response_text(record["messages"]).split()))[:60]


def _readability(scores: pl.Series) -> dict[str, Any]:
    """Flesch reading ease of prompts, 100 very easy, 0 very hard.

    `rows` of them were scored; the others are short or in another script. The histogram's first and last bins are open.
    """
    import numpy as np

    if not len(scores):
        return {"measure": "Flesch reading ease of prompts", "rows": 0}
    low, middle, high = np.percentile(scores, [10, 50, 90]).tolist()
    rows = np.histogram(np.clip(scores, 0, 100), range(0, 101, 10))[0].tolist()
    return {
        "measure": "Flesch reading ease of prompts",
        "rows": len(scores),
        "median": round(middle, 4),
        "p10": round(low, 4),
        "p90": round(high, 4),
        "share_hard": round(int((scores < HARD).sum()) / len(scores), 4),
        "histogram": [{"from": 10 * i, "to": 10 * i + 10, "rows": n} for i, n in enumerate(rows)],
    }


def set_schema(limits: Limits) -> pa.DataFrameSchema:
    """Schema of the `shares` of a set.

    Each check has the name under which it is reported; null is a share that does not apply.
    """
    pa = import_pandera()
    import polars as pl

    def at_most(limit: float | None, check: str) -> Any:
        return pa.Column(pl.Float64, pa.Check.le(limit, error=check) if limit is not None else None, nullable=True)

    def at_least(limit: float, check: str) -> Any:
        return pa.Column(pl.Float64, pa.Check.ge(limit, error=check), nullable=True)

    columns = {
        "rows": pa.Column(pl.Int64, pa.Check.ge(limits.min_rows, error="small_dataset")),
        "category_ratio": at_most(limits.balance_ratio, "unbalanced_categories"),
        "top_source_share": at_most(limits.max_source_share, "unbalanced_categories"),
        "top_opening_share": at_most(limits.max_opening_share, "low_diversity"),
        "distinct_2": at_least(limits.min_distinct_2, "low_diversity"),
        "template_share": at_most(limits.max_template_share, "low_diversity"),
        "top_response_share": at_most(limits.max_response_share, "low_diversity"),
        "near_copy_share": at_most(limits.max_near_copy_share, "low_diversity"),
    }
    return pa.DataFrameSchema(columns, strict=True)


OF_DIVERSITY = ("top_opening_share", "distinct_2", "template_share", "top_response_share")
"""Shares of `profile` that `low_diversity` judges."""
JUDGED = ("small_dataset", "unbalanced_categories", "low_diversity")


def shares(profile: Mapping[str, Any], limits: Limits, near_copies: int | None = None) -> pl.DataFrame:
    """The row that `set_schema` validates: a column per measure, null where it does not apply.

    Args:
        near_copies: number of rows that share a group of near-copies with an earlier row; None if unknown.
    """
    import polars as pl

    rows, diversity = profile["rows"], profile["diversity"]
    judged = rows >= limits.min_rows_for_diversity
    named = [n for name, n in profile["categories"].items() if name not in {NONE, OTHERS}]
    measures = {
        "category_ratio": named[0] / min(profile["rarest"].values()) if profile["category_count"] else None,
        "top_source_share": _largest(profile["sources"])[1] / rows if rows else None,
        **{name: diversity[name] if judged else None for name in OF_DIVERSITY},
        "near_copy_share": near_copies / rows if judged and near_copies is not None else None,
    }
    return pl.DataFrame({"rows": rows, **measures}, schema={"rows": pl.Int64, **dict.fromkeys(measures, pl.Float64)})


def failures(profile: Mapping[str, Any], limits: Limits, near_copies: int | None = None) -> dict[str, str]:
    """Check -> the fault with its figures, for failed checks on the set."""
    pa = import_pandera()

    try:
        set_schema(limits).validate(shares(profile, limits, near_copies), lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases.select("check", "column").rows()
        if wrong := [case for case in cases if case[0] not in JUDGED]:
            raise AssertionError(f"the table of shares itself is wrong: {wrong}") from None
        said, failed = _notes(profile, limits, near_copies), dict(cases)
        faults = {check: [said[column] for name, column in cases if name == check] for check in JUDGED}
        return {check: "; ".join(faults[check]) for check in JUDGED if check in failed}
    return {}


def notes(profile: Mapping[str, Any], limits: Limits, near_copies: int | None = None) -> dict[str, str]:
    """Check -> note with its figures, for passed checks on the set."""
    said, failed = _notes(profile, limits, near_copies), failures(profile, limits, near_copies)
    measured = shares(profile, limits, near_copies).row(0, named=True)
    diverse = [name for name in (*OF_DIVERSITY, "near_copy_share") if measured[name] is not None]
    balance = ["category_ratio", *(["top_source_share"] if len(profile["sources"]) > 1 else [])]
    parts: dict[str, list[str]] = {
        "small_dataset": ["rows"],
        "unbalanced_categories": [*balance, *(["scripts"] if len(profile["scripts"]) > 1 else [])],
        "low_diversity": diverse or ["few"],
    }
    return {check: "; ".join(said[name] for name in names) for check, names in parts.items() if check not in failed}


def _notes(profile: Mapping[str, Any], limits: Limits, near_copies: int | None) -> dict[str, str]:
    """Measure -> note with its figures."""
    rows, diversity, count = profile["rows"], profile["diversity"], profile["category_count"]
    words = profile["lengths"]["prompt"]["total"] + profile["lengths"]["response"]["total"]
    source, most = _largest(profile["sources"])
    begin, repeats = "each in one prompt", "no long response repeats"
    if diversity["top_openings"]:
        begin = f"{diversity['top_opening_share']:.0%} of the prompts open with the same words"
    if diversity["top_response_share"]:
        repeats = f"{diversity['top_response_share']:.0%} of the rows have the same long response"
    copies = near_copies or 0
    return {
        "rows": f"{many(rows, 'row')}, {many(words, 'word')}: {_volume(words)}",
        "category_ratio": _categories(profile) if count else "no categories",
        "top_source_share": f"{source} holds {most / max(1, rows):.0%} of the rows",
        "scripts": "scripts: " + listed([f"{name} {n:,}" for name, n in profile["scripts"].items()], 3),
        "top_opening_share": f"{diversity['openings']:,} openings, {begin}",
        "distinct_2": (
            f"{diversity['distinct_2']:.0%} of the pairs of words"
            f" in {diversity['sampled_words']:,} words of prompts are distinct"
        ),
        "template_share": (
            f"{diversity['template_share']:.0%} of the pairs"
            f" of words in prompts occur in more than {TEMPLATE:.0%} of the prompts each"
        ),
        "top_response_share": repeats,
        "near_copy_share": (
            f"{many(copies, 'prompt')} ({_percent(copies / max(1, rows))})"
            f" {'is nearly that of an earlier row' if copies == 1 else 'are nearly those of earlier rows'}"
        ),
        "few": f"not checked below {limits.min_rows_for_diversity} rows",
    }


def _percent(share: float) -> str:
    """0.25  ->  "25%"; a share that would be rounded to 0  ->  "below 1%" """
    return "below 1%" if 0 < share <= 0.005 else f"{share:.0%}"


def _largest(counts: Mapping[str, int]) -> tuple[str, int]:
    """The first, which is the most frequent."""
    return next(iter(counts.items()), ("", 0))


def _volume(words: int) -> str:
    """What this amount of text can teach.

    Rules of thumb, not measurements: it depends on how far the task is from the model's knowledge.
    """
    if words < 1_000:
        return "teaches form more than knowledge; a prompt or retrieval may do"
    if words <= 10_000:
        return "can teach a form or one narrow task; knowledge is better retrieved"
    return "enough to teach a task"


def _categories(profile: Mapping[str, Any]) -> str:
    """12 categories (effectively 7.8); login 60 rows (40%), bug 1; 2 with one row: bug, idea"""
    rows, count, single = profile["rows"], profile["category_count"], profile["singletons"]
    name, most = next((item for item in profile["categories"].items() if item[0] not in {NONE, OTHERS}), (NONE, 0))
    rarest, least = _largest(profile["rarest"])
    text = f"{count} {'category' if count == 1 else 'categories'} (effectively {profile['effective_categories']:.1f}); "
    text += f"{name} {many(most, 'row')} ({_percent(most / rows)})"
    if count > 1:
        text += f", {rarest} {least:,}" if least < most else ", as every other"
    if single:
        names = list(profile["rarest"])[: min(single, 5)]
        text += f"; {single} with one row: {', '.join(names)}{', ...' if single > len(names) else ''}"
    if missing := profile["categories"].get(NONE):
        text += f"; {many(missing, 'row')} without"
    return text
