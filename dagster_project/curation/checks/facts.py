"""Rows -> one table of facts about them, which the schemas then judge. Facts say what is; schemas say what must be."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from dagster_project.core.records import prompt_text, response_text
from dagster_project.curation.checks.content import content_facts
from dagster_project.curation.checks.damage import damage, decomposed, hidden, template_marks
from dagster_project.curation.checks.privacy import scan
from dagster_project.curation.checks.review import Waived
from dagster_project.curation.checks.token_counts import Tokens
from dagster_project.curation.similarity.overlap import Comparison, Pair, Rule, clusters, compare, words
from dagster_project.curation.similarity.wording import is_instruction_only, is_near_duplicate, leak_severity
from dagster_project.curation.sources.benchmarks import Item
from dagster_project.curation.sources.formats import is_text

if TYPE_CHECKING:
    import polars as pl

PLACEHOLDERS = frozenset(
    {
        "no input", "noinput", "none", "n a", "na", "null", "nil", "empty", "not applicable", "no input provided", "no input required",
        "no input needed", "no additional input", "input not available", "placeholder", "todo", "tbd", "lorem ipsum",
    }
)  # fmt: skip
"""Inputs that only say that there is none, after `words` has removed case and punctuation ("<noinput>", "N/A", "No input.")."""
SHORT_ANSWER = 8
"""Words an answer must have to be compared with a benchmark's answers: a short one is right for many questions."""
LOOKED_AT = 20_000
"""Rows whose chat template is rendered; in a larger set as many of each conversation shape in turn. `tokenized` renders every row."""


@dataclass(frozen=True)
class Link:
    """Two rows, or a row and a benchmark item, that say nearly the same."""

    row: int
    other: int | str
    """Index of the earlier row, or the item's place."""
    part: str
    """What of the row matched: "prompt" or "response"."""
    rule: Rule
    score: float
    partial: bool = False
    """Of an overlap with held-out text: neither equal nor a copy of most of it. A warning, where a copy is an error."""


@dataclass
class Facts:
    """What `gather` found."""

    frame: pl.DataFrame
    """One row per record; see `gather`."""
    cluster: list[int]
    """For each record the first record of its near-duplicate cluster."""
    links: dict[str, list[Link]] = field(default_factory=dict)
    """Check -> the overlaps behind it, best first."""
    compared: Comparison | None = None
    """Of the prompts with one another."""
    waived: dict[str, set[int]] = field(default_factory=dict)
    """Check -> rows all of whose overlaps are waived as pairs."""
    transcripts: int = 0
    """Rows that quote a conversation ("Human: ... Assistant: ..."), which people do; a template's control tokens are another matter."""
    frames: int = 0
    """Overlaps with held-out questions that share only a common frame, and are not leaks."""


GROUPED = "grouped"
"""In `Facts.links`: near-copies that share a `group_id` and are too different to be reported as `near_duplicates`."""


def roles_are_valid(messages: Sequence[dict[str, str]], meta: Mapping[str, Any]) -> bool:
    """An optional system turn, then user and assistant in turns, the user first; tools may answer the assistant, who then goes on. Or plain text."""
    return is_text(messages, meta) or _in_turns(tuple([m["role"] for m in messages]))


_BEFORE = {"user": {"system", "assistant", ""}, "assistant": {"user", "tool"}, "tool": {"assistant", "tool"}, "system": {""}}


@lru_cache
def _in_turns(roles: tuple[str, ...]) -> bool:
    return set(roles) != {"system"} and all(last in _BEFORE.get(role, ()) for last, role in zip(("", *roles), roles, strict=False))


def is_placeholder(text: str) -> bool:
    return len(text) < 40 and " ".join(words(text)) in PLACEHOLDERS


def text_of(record: Mapping[str, Any]) -> str:
    """All that a record says, of a pair both sides."""
    return "\n".join([m["content"] for side in (record["messages"], record.get("rejected") or ()) for m in side])


def gather(
    records: Sequence[dict[str, Any]],
    held_out: Sequence[Item],
    waived: Waived,
    tokens: Tokens,
    max_tokens: int,
    min_response: int,
    near_similarity: float,
) -> Facts:
    """The facts about each record.

    Args:
        records: canonical records with `source` and `source_row`; pairs have `rejected` (messages), `asked` (how many of `messages` are the
            prompt), `margin` and `same_prompt`; benchmark questions have `labelled`.
        held_out: questions that must not be trained on.
        waived: pairs that may stand.
        max_tokens, min_response: limits; a row's tokens are counted only where they could pass one.
        near_similarity: from which on near-copies are reported; all of them share a cluster.
    Returns:
        `frame` has one row per record, in order:

        | column | meaning |
        | --- | --- |
        | problem | why the source row could not be read, else null |
        | paired | for pairs: there is both a chosen and a rejected answer |
        | roles_valid, ends_with_assistant, has_prompt, has_response | about the messages |
        | input_is_real | false where the input only says that there is none |
        | response_tokens, tokens | of the last response, of the conversation (of a pair the longer one, as the template writes it); null where far from the limit |
        | template_mark | a control token or boilerplate of a chat template in the text, else null |
        | misfit | why the conversation does not fit the base model's chat template, else null |
        | hidden, decomposed | a byte order mark or zero-width character in the text, a word that is not in Unicode's composed form, else null |
        | damage | what is wrong with the encoding, else null |
        | (each check of `content.CONTENT_CHECKS`) | what breaks it in the first answer that does, else null |
        | secret, personal | the kind of secret or personal data in the text and the words around it, masked; else null |
        | labelled | false for a benchmark question without its answer |
        | pair_is_real, same_prompt, preferred | for pairs: chosen and rejected differ in more than form, answer the same prompt, and one of them is better |
        | repeats | an earlier row with the same messages and tools, else null |
        | near_copy_of | an earlier row whose user turns are the same or nearly so, whatever its system prompt and tools; else null |
        | conflicts_with | an earlier row with the same system prompt, tools and turns and another response (pairs: the opposite preference), else null |
        | other_split | a row of another upstream split that it nearly repeats, else null |
        | leaks | the held-out question that its prompt or response overlaps, else null |
    """
    import polars as pl

    size = len(records)
    nothing: dict[str, Any] = {}
    metas = [json.loads(record["meta"]) if record["meta"] != "{}" else nothing for record in records]
    texts = [text_of(record) for record in records]
    prompts, responses = ([of(record["messages"]) for record in records] for of in (prompt_text, response_text))
    subjects = [prompt or response for prompt, response in zip(prompts, responses, strict=True)]  # as records.subject_text
    secret, personal = _hits(texts)
    labels = [label if isinstance(label := meta.get("split"), str) else None for meta in metas]
    repeats, conflicts = _repeats(records, [tools_of(meta) for meta in metas], labels)
    links: dict[str, list[Link]] = {"exact_duplicates": [Link(i, j, "prompt", "equal", 1.0) for i, j in repeats.items()]}
    links["conflicting_responses"] = [Link(i, j, "prompt", "equal", 1.0) for i, j in conflicts.items()]
    once = [i for i in range(size) if records[i]["messages"] and i not in repeats]
    compared = compare([subjects[i] for i in once], count_words=True)
    near = [Pair(once[p.left], once[p.right], p.similarity, p.rule) for p in compared.pairs]
    links["near_duplicates"], links[GROUPED] = _reported(near, records, subjects, compared.frequency, near_similarity)
    links["split_leakage"] = [
        Link(max(a, b, key=lambda i: (labels[i] == "train", i)), min(a, b, key=lambda i: (labels[i] == "train", i)), "prompt", rule, score)
        for a, b, rule, score in [(p.left, p.right, p.rule, p.similarity) for p in near] + [(i, j, "equal", 1.0) for i, j in repeats.items()]
        if labels[a] and labels[b] and labels[a] != labels[b]
    ]  # fmt: skip
    links["benchmark_leakage"], frames = _leaks(subjects, responses, held_out)
    may_stand: dict[str, set[int]] = {}
    for name, found in links.items():
        stand = waived.pairs.get(name, set())
        links[name] = sorted(
            (one for one in found if (one.row, one.other) not in stand), key=lambda one: (-one.score, one.row, str(one.other))
        )
        may_stand[name] = {one.row for one in found} - {one.row for one in links[name]}

    def first(name: str) -> pl.Series:
        return pl.Series([None if one is None else str(one.other) for one in _best(links[name], size)], dtype=pl.String)

    counted, answered = _lengths(
        [_longest(record) for record in records] if any("rejected" in r for r in records) else texts,
        responses,
        tokens,
        max_tokens,
        min_response,
    )
    if tokens.rendered:
        for i, record in enumerate(records):
            if record.get("rejected") and record["messages"]:
                sides = (record["messages"], [*record["messages"][: record["asked"]], *record["rejected"]])
                written = [n for side in sides if (n := tokens.rendered(side)) is not None]
                counted[i] = max(written, default=counted[i])
    rejected = [record.get("rejected") for record in records]
    halves = [is_half(record) for record in records]
    marks = template_marks(texts, tokens.special)
    sound = [roles_are_valid(r["messages"], meta) for r, meta in zip(records, metas, strict=True)]
    frame = pl.DataFrame(
        {
            "problem": pl.Series(
                [
                    None if r["messages"] or not r.get("same_prompt", True) else meta.get("problem")
                    for r, meta in zip(records, metas, strict=True)
                ],
                dtype=pl.String,
            ),
            "roles_valid": [not r["messages"] or valid for r, valid in zip(records, sound, strict=True)],
            "paired": [not half for half in halves],
            "ends_with_assistant": [
                not r["messages"] or half or r["messages"][-1]["role"] == "assistant" for r, half in zip(records, halves, strict=True)
            ],
            "has_prompt": [
                not r["messages"] or bool(prompt.strip()) or is_text(r["messages"], meta)
                for r, meta, prompt in zip(records, metas, prompts, strict=True)
            ],
            "has_response": [_says_something(r) for r in records],
            "input_is_real": [
                not any(is_placeholder(given) for given in inputs_of(r, meta)) for r, meta in zip(records, metas, strict=True)
            ],
            "response_tokens": pl.Series(answered, dtype=pl.Int64),
            "tokens": pl.Series(counted, dtype=pl.Int64),
            "template_mark": pl.Series([mark if mark and not mark.startswith("transcript") else None for mark in marks], dtype=pl.String),
            "misfit": pl.Series(_misfits(records, metas, sound, tokens), dtype=pl.String),
            "hidden": pl.Series(hidden(texts), dtype=pl.String),
            "decomposed": pl.Series(decomposed(texts), dtype=pl.String),
            "damage": pl.Series(damage(texts), dtype=pl.String),
            "secret": pl.Series(secret, dtype=pl.String),
            "personal": pl.Series(personal, dtype=pl.String),
            **{name: pl.Series(found, dtype=pl.String) for name, found in content_facts(records).items()},
            "labelled": [record.get("labelled", True) for record in records],
            "pair_is_real": [
                not r or not m["messages"] or not _alike(m["messages"][-len(r) :], r) for r, m in zip(rejected, records, strict=True)
            ],
            "same_prompt": [record.get("same_prompt", True) for record in records],
            "preferred": [record.get("margin") != 0 for record in records],
            "repeats": first("exact_duplicates"),
            "leaks": first("benchmark_leakage"),
            "other_split": first("split_leakage"),
            "conflicts_with": first("conflicting_responses"),
            "near_copy_of": first("near_duplicates"),
        }
    )
    transcripts = sum(mark is not None and mark.startswith("transcript") for mark in marks)
    cluster = clusters(size, near + [Pair(j, i, 1.0) for i, j in repeats.items()])
    return Facts(frame, cluster, links, compared, may_stand, transcripts, frames)


def _alike(chosen: Sequence[Mapping[str, str]], rejected: Sequence[Mapping[str, str]]) -> bool:
    """Whether two sides say the same, but for case, white space, Unicode form and the stop at the end; in code only white space at line ends."""
    if len(chosen) != len(rejected):
        return False
    texts = [(a["content"], b["content"]) for a, b in zip(chosen, rejected, strict=True)]
    code = any("```" in text for both in texts for text in both) or all(_INDENTED.search(text) for text in texts[-1])
    plain = _code_form if code else _plain_form
    return all(a["role"] == b["role"] for a, b in zip(chosen, rejected, strict=True)) and all(plain(a) == plain(b) for a, b in texts)


_INDENTED = re.compile(r"\n(?: {4}|\t)")


def _plain_form(text: str) -> str:
    plain = " ".join(normalize("NFKC", text).casefold().split())
    return plain.rstrip(".!\u3002\u2026 ") or plain


def _code_form(text: str) -> str:
    return "\n".join(line.rstrip() for line in normalize("NFC", text).strip("\n").split("\n"))


def _best(links: Iterable[Link], size: int) -> list[Link | None]:
    best: list[Link | None] = [None] * size
    for link in links:
        best[link.row] = best[link.row] or link
    return best


def is_half(record: Mapping[str, Any]) -> bool:
    """Whether a pair has one side alone: a KTO row without a counterpart."""
    return "rejected" in record and bool(record["messages"]) and (len(record["messages"]) <= record["asked"] or not record["rejected"])


def _says_something(record: dict[str, Any]) -> bool:
    sides = [record["messages"], record["rejected"]] if "rejected" in record else [record["messages"]]
    return all(not side or side[-1]["role"] != "assistant" or bool(side[-1]["content"].strip()) for side in sides)


def inputs_of(record: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> list[str]:
    """The texts that a user gives: the input of an Alpaca row, and what user turns say.

    Args:
        meta: of the record, where it is parsed already.
    """
    meta = (json.loads(record["meta"]) if '"input"' in record["meta"] else {}) if meta is None else meta
    given = meta.get("input", "")
    return [*([given] if isinstance(given, str) else []), *(m["content"] for m in record["messages"] if m["role"] == "user")]


def _hits(texts: Sequence[str]) -> tuple[list[str | None], list[str | None]]:
    """The first secret and the first piece of personal data in each text: its kind, and the words around it, masked."""
    secret: list[str | None] = [None] * len(texts)
    personal: list[str | None] = [None] * len(texts)
    for hit in scan(texts):
        found = secret if hit.secret else personal
        found[hit.row] = found[hit.row] or f"{hit.kind}: {hit.excerpt}"
    return secret, personal


HELD_OUT = {"test": 0, "validation": 1}


def tools_of(meta: Mapping[str, Any]) -> str:
    """The definitions of the functions that the assistant may call, in one spelling; "" for none.

    They are context, as a system prompt is: part of what the model sees, and no part of the question.
    """
    given = meta.get("tools") or meta.get("functions")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = given.strip()
    return json.dumps(given, ensure_ascii=False, sort_keys=True) if given else ""


def _repeats(
    records: Sequence[dict[str, Any]], tools: Sequence[str], labels: Sequence[str | None]
) -> tuple[dict[int, int], dict[int, int]]:
    """Row -> the row with the same messages and tools that is kept: the first, or the first that an upstream label holds out. And row -> an earlier
    row that answers the same prompt, tools included, in another way."""
    first: dict[tuple[str, str], int] = {}
    for i in sorted((i for i, label in enumerate(labels) if label in HELD_OUT), key=lambda i: (HELD_OUT[str(labels[i])], i)):
        first.setdefault((records[i]["example_id"], tools[i]), i)
    answers: dict[tuple[str, ...], dict[Any, int]] = defaultdict(dict)
    repeats: dict[int, int] = {}
    conflicts: dict[int, int] = {}
    for i, record in enumerate(records):
        messages = record["messages"]
        if not messages:
            continue
        if (same := first.setdefault((record["example_id"], tools[i]), i)) != i:
            repeats[i] = same
            continue
        if "rejected" in record:
            chosen, rejected = (tuple(m["content"] for m in side) for side in (messages[record["asked"] :], record["rejected"]))
            earlier = answers[_key(messages[: record["asked"]], tools[i])]
            if (rejected, chosen) in earlier:
                conflicts[i] = earlier[rejected, chosen]
            earlier.setdefault((chosen, rejected), i)
            continue
        if len(messages) < 2:
            continue
        earlier = answers[_key(messages[:-1], tools[i])]
        answer = messages[-1]["content"]
        if earlier and answer not in earlier:
            conflicts[i] = next(iter(earlier.values()))
        earlier.setdefault(answer, i)
    return repeats, conflicts


def _key(messages: Sequence[dict[str, str]], tools: str) -> tuple[str, ...]:
    return (tools, *(part for m in messages for part in (m["role"], m["content"])))


def _reported(
    near: Sequence[Pair], records: Sequence[dict[str, Any]], subjects: Sequence[str], frequency: Mapping[str, int], least: float
) -> tuple[list[Link], list[Link]]:
    """Near-copies that people are told of, and those that only share a cluster: less similar ones, texts contained in a longer one, and
    conversations that end in different questions."""
    told: list[Link] = []
    grouped: list[Link] = []
    for p in near:
        same = p.rule == "equal" or (
            p.rule != "containment"
            and p.similarity >= least
            and is_near_duplicate(subjects[p.left], subjects[p.right], frequency)
            and is_near_duplicate(_last_asked(records[p.left]), _last_asked(records[p.right]), frequency)
        )
        (told if same else grouped).append(Link(p.right, p.left, "prompt", p.rule, p.similarity))
    return told, grouped


def _last_asked(record: dict[str, Any]) -> str:
    return next((m["content"] for m in reversed(record["messages"]) if m["role"] == "user"), "")


def _leaks(subjects: Sequence[str], responses: Sequence[str], held_out: Sequence[Item]) -> tuple[list[Link], int]:
    """Prompts that overlap a held-out question, and responses that overlap its answer or the question itself. And how many overlaps are a common
    frame and nothing else."""
    if not held_out:
        return [], 0
    size, items = len(subjects), len(held_out)
    long = [response if _is_long(response[:400]) else "" for response in responses]
    answers = [item.text if _is_long(item.text) else "" for item in held_out]
    mine, theirs = [*subjects, *long], [*_questions(held_out), *answers]
    compared = compare(mine, theirs, count_words=True)
    links, frames = [], 0
    for p in compared.pairs:
        if p.left < size and p.right >= items:
            continue
        severity = leak_severity(mine[p.left], theirs[p.right], p.rule, p.similarity, compared.frequency)
        frames += severity is None
        if severity:
            part = "prompt" if p.left < size else "response"
            links.append(Link(p.left % size, held_out[p.right % items].place, part, p.rule, p.similarity, severity == "warn"))
    return links, frames


def _questions(held_out: Sequence[Item]) -> list[str]:
    """What each item asks; with its choices where the question alone is an instruction, or other items ask it with other choices."""
    choices: dict[str, set[frozenset[str]]] = defaultdict(set)
    for item in held_out:
        if item.choices:
            choices[item.question].add(frozenset(item.choices))
    return [
        item.with_choices if len(choices[item.question]) > 1 or is_instruction_only(item.question) else item.question for item in held_out
    ]


_LONG = re.compile(rf"[\W_]*+(?:[^\W_]++[\W_]++){{{SHORT_ANSWER - 1}}}[^\W_]", re.ASCII)


def _is_long(text: str) -> bool:
    """Whether it has `SHORT_ANSWER` `words`; of ASCII an expression tells that sooner."""
    return bool(_LONG.match(text)) if text.isascii() else len(words(text)) >= SHORT_ANSWER


def _lengths(
    texts: Sequence[str], responses: Sequence[str], tokens: Tokens, max_tokens: int, min_response: int
) -> tuple[list[int | None], list[int | None]]:
    """Tokens of conversations that may be too long and of responses that may be too short. A token is one byte at least, 16 at most in prose."""
    counted: list[int | None] = [None] * len(texts)
    answered: list[int | None] = [None] * len(texts)
    long = [
        i
        for i, text in enumerate(texts)
        if 4 * len(text) >= max_tokens and (len(text) >= max_tokens or len(text.encode("utf-8", "replace")) >= max_tokens)
    ]
    short = [i for i, text in enumerate(responses) if len(text) <= 16 * min_response and text.strip()]
    for i, n in zip(long, tokens.count([texts[i] for i in long]), strict=True):
        counted[i] = n
    for i, n in zip(short, tokens.count([responses[i] for i in short]), strict=True):
        answered[i] = n
    return counted, answered


def _longest(pair: dict[str, Any]) -> str:
    """Of the two conversations of a pair the longer one."""
    prompt = pair["messages"][: pair["asked"]]
    return max(("\n".join(m["content"] for m in side) for side in (pair["messages"], [*prompt, *pair["rejected"]])), key=len)


def _misfits(
    records: Sequence[dict[str, Any]], metas: Sequence[Mapping[str, Any]], sound: Sequence[bool], tokens: Tokens
) -> list[str | None]:
    """Why each conversation does not fit the chat template. What a template does depends on roles and on white space around the contents."""
    misfits: list[str | None] = [None] * len(records)
    if tokens.misfit is None:
        return misfits
    shapes: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, (record, meta) in enumerate(zip(records, metas, strict=True)):
        if record["messages"] and sound[i] and not is_text(record["messages"], meta):
            turns = [(m["role"], m["content"]) for m in record["messages"]]
            shapes[tuple([(role, said[:1].isspace(), said[-1:].isspace(), not said) for role, said in turns])].append(i)
    share = max(1, LOOKED_AT // max(1, len(shapes)))
    for rows in shapes.values():
        for i in rows[:share]:
            misfits[i] = tokens.misfit(records[i]["messages"])
    return misfits
