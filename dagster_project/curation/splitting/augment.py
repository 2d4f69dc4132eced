"""Train rows -> copies with another prompt: typing errors, another case, supplied paraphrases.

The response never changes.

A copy depends only on the seed and its row: adding a row does not change the copies of other rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, field_validator

from dagster_project.core.errors import InputError
from dagster_project.core.messages import field_texts
from dagster_project.core.records import example_id, prompt_text, response_text
from dagster_project.curation.similarity.overlap import near_pairs, words
from dagster_project.curation.sources.declarations import UNKNOWN, Declared
from dagster_project.curation.sources.files import read_rows

PARAPHRASES = PurePosixPath("data/sources/paraphrases")
"""Folder of files with paraphrases, tracked by DVC."""
FORMAT = "paraphrases"
"""Format of such a file in reports."""


class Augment(Declared):
    """Copies of train rows with a changed prompt. See docs/splits.md."""

    typos: float = Field(default=0.0, ge=0, le=1)
    """Share of train rows that get a copy with one to three typing errors in the last user turn."""
    case: float = Field(default=0.0, ge=0, le=1)
    """Share of train rows that get a copy whose last user turn is in lower case, or begins with a capital letter."""
    paraphrases: str | None = None
    """File inside data/sources/paraphrases/. Each row is {"example_id" or "prompt": ..., "paraphrase": ...} and adds a
    copy with that last user turn."""
    license: str = UNKNOWN
    """License of the paraphrases; audits and model cards show it. The keys below declare the same facts for the
    paraphrases."""

    @field_validator("paraphrases")
    @classmethod
    def _is_tracked(cls, path: str | None) -> str | None:
        if path is not None and (".." in PurePosixPath(path).parts or PARAPHRASES not in PurePosixPath(path).parents):
            raise ValueError(f"must lie inside {PARAPHRASES}/, which DVC tracks")
        return path


@dataclass(frozen=True)
class Paraphrase:
    example_id: str | None
    prompt: str | None
    """All user turns, joined by line breaks, as `records.prompt_text` has them."""
    text: str


def read_paraphrases(path: Path) -> list[Paraphrase]:
    """Raises:
    InputError: lists the rows that are not {"example_id" or "prompt", "paraphrase"}, all of them text.
    """
    found, problems = [], []
    for row in read_rows(path):
        value = row.value or {}
        name, prompt, text = (value.get(key) or None for key in ("example_id", "prompt", "paraphrase"))
        if row.problem:
            problems.append(f"{path.name}:{row.source_row}: {row.problem}")
        elif not isinstance(text, str) or not text.strip():
            problems.append(f"{path.name}:{row.source_row}: `paraphrase` must be text")
        elif (name is None) == (prompt is None) or not isinstance(name or prompt, str):
            problems.append(f"{path.name}:{row.source_row}: needs either `example_id` or `prompt`, as text")
        else:
            found.append(Paraphrase(name, prompt.strip() if prompt else None, text))
    if problems:
        more = f"\nand {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError("\n".join(problems[:10]) + more, f"fix the rows of {path.name} (0-based)")
    return found


@dataclass
class AddedRows:
    """The copies to add to train."""

    rows: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    """(index of the copied train row, kind, record), in the order of train."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of excluded copies: `repeats_a_prompt`, `near_held_out`."""
    unused: int = 0
    """Number of paraphrases of rows that are not in train, or have no prompt."""


def augment(
    settings: Augment,
    seed: int,
    train: Sequence[Mapping[str, Any]],
    held_out: Sequence[str],
    prompts: Container[str],
    paraphrases: Sequence[Paraphrase] = (),
) -> AddedRows:
    """Copies of train rows.

    Args:
        train: canonical records, which are read once, or twice with paraphrases. The copies are kept in memory.
        held_out: prompts of validation and test. No copy is a near-copy of one of them.
        prompts: prompts of the whole set. No copy has the same prompt as one of them.
    """
    made: list[tuple[int, str, dict[str, Any]]] = []
    seen: set[str] = set()
    repeats = 0
    own, unused = _by_row(train, paraphrases)
    for i, record in enumerate(train):
        name, messages = record["example_id"], record["messages"]
        turn = max((k for k, message in enumerate(messages) if message["role"] == "user"), default=None)
        if turn is None:
            unused += len(own.get(i, ()))
            continue
        said = messages[turn]["content"]
        # Reasoning and arguments repeat words of the prompt too.
        more = [text for message in messages[turn + 1 :] for part, text in field_texts(message) if part != "content"]
        answer = "\n".join([response_text(messages), *more])
        copies = [("paraphrase", text) for text in own.get(i, ())]
        for kind, share, edit in (("typos", settings.typos, with_typos), ("case", settings.case, in_another_case)):
            if share and _random_number(seed, kind, name) < share * 2**64:
                copies.append((kind, edit(said, answer, _draws(seed, kind, name))))
        for kind, text in copies:
            if text == said:
                repeats += kind == "paraphrase"  # other copies are unchanged where nothing in the prompt can change
                continue
            asked = [*messages[:turn], {**messages[turn], "content": text}, *messages[turn + 1 :]]
            identity = example_id(asked, record.get("tools"))
            if prompt_text(asked) in prompts or identity in seen:
                repeats += 1
                continue
            seen.add(identity)
            meta = json.dumps({**json.loads(record["meta"]), "parent": name, "augmented": kind}, ensure_ascii=False)
            made.append((i, kind, {**record, "example_id": identity, "messages": asked, "meta": meta}))
    count = len(made)
    while made:  # removing copies makes runs of words rarer, which can make other texts near-copies
        near = {pair.left for pair in near_pairs([prompt_text(record["messages"]) for _, _, record in made], held_out)}
        made = [row for k, row in enumerate(made) if k not in near]
        if not near:
            break
    dropped = {"repeats_a_prompt": repeats, "near_held_out": count - len(made)}
    return AddedRows(made, {reason: n for reason, n in dropped.items() if n}, unused)


def _by_row(train: Sequence[Mapping[str, Any]], paraphrases: Sequence[Paraphrase]) -> tuple[dict[int, list[str]], int]:
    """The paraphrases of each train row, and the number of those of other rows."""
    wanted: dict[tuple[str, str], list[int]] = defaultdict(list)
    for k, one in enumerate(paraphrases):
        wanted[("example_id", one.example_id) if one.example_id else ("prompt", one.prompt or "")].append(k)
    own: dict[int, list[str]] = {}
    used: set[int] = set()
    for i, record in enumerate(train) if paraphrases else ():
        names = (("example_id", record["example_id"]), ("prompt", prompt_text(record["messages"]).strip()))
        if found := sorted(k for name in names for k in wanted.get(name, ())):
            own[i] = [paraphrases[k].text for k in found]
            used.update(found)
    return own, len(paraphrases) - len(used)


# --- changes of a prompt

_NOT_PROSE = re.compile(
    r"""
    ```.*?(?:```|\Z) | ~~~.*?(?:~~~|\Z) | `[^`\n]*`                  # code in Markdown
    | ^(?:[ ]{4}|\t)[^\n]*$                                         # and indented
    | ^[^\n]*(?:\w\([^\n]*\)|;\s*$|[ ]=[ ]|==|=>|->|</|/>)[^\n]*$   # lines that look like code
    | \{.*\} | \[[^\]]*\]                                           # JSON, {placeholders}, [links]
    | "[^"\n]*" | “[^”\n]*” | «[^»\n]*»                             # the answer is often about the quoted text
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_WORD = re.compile(r"(?<!\S)[(‘]?([^\W\d_]+)[)’]?[.,:;!?]*(?!\S)")
"""A word of letters between spaces: not a number, address, path or name in code."""
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_BESIDE = {key: row[max(0, i - 1) : i] + row[i + 1 : i + 2] for row in _ROWS for i, key in enumerate(row)}
"""Letter -> the adjacent letters on an English keyboard."""

Draws = Iterator[int]


def _random_number(seed: int, *what: object) -> int:
    """A number below 2**64, from a hash, because Python's own generator may differ between versions."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()[:8])


def _draws(seed: int, kind: str, name: str) -> Draws:
    n = 0
    while True:
        n += 1
        yield _random_number(seed, kind, name, n)


def _words(text: str, answer: str, fits: Callable[[str], bool]) -> list[tuple[int, int]]:
    """Positions of matching words of prose that the answer does not repeat: it would no longer match the prompt."""
    taken = [match.span() for match in _NOT_PROSE.finditer(text)]
    repeated = set(words(answer))
    found = []
    for match in _WORD.finditer(text):
        start, end = match.span(1)
        if fits(match[1]) and match[1].casefold() not in repeated and not any(a < end and start < b for a, b in taken):
            found.append((start, end))
    return found


def _replaced(text: str, spans: Sequence[tuple[int, int]], edit: Callable[[str], str]) -> str:
    for start, end in sorted(spans, reverse=True):
        text = text[:start] + edit(text[start:end]) + text[end:]
    return text


def with_typos(text: str, answer: str, draws: Draws) -> str:
    """The text with one to three typing errors, in words of four or more lower-case letters, if there are any."""
    spans = _words(text, answer, lambda word: len(word) >= 4 and word.islower())
    chosen = [spans.pop(next(draws) % len(spans)) for _ in range(min(1 + len(spans) // 8, 3, len(spans)))]
    return _replaced(text, chosen, lambda word: _mistyped(word, draws))


def _mistyped(word: str, draws: Draws) -> str:
    """The word with a letter after the first replaced by one beside it on the keyboard, swapped, or omitted."""
    kind, at = next(draws) % 3, 1 + next(draws) % (len(word) - 1)
    if kind == 0 and word[at] in _BESIDE:
        beside = _BESIDE[word[at]]
        return word[:at] + beside[next(draws) % len(beside)] + word[at + 1 :]
    if kind == 1 and at + 1 < len(word) and word[at] != word[at + 1]:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :]


def in_another_case(text: str, answer: str, draws: Draws) -> str:
    """The text in lower case, or capitalized if it is already; unchanged if neither changes it."""
    spans = _words(text, answer, lambda word: word.istitle() or word.isupper())
    first = [span for span in _words(text, answer, str.islower)[:1] if not text[: span[0]].strip("(‘ \t\n")]
    if spans and (not first or next(draws) % 2):
        return _replaced(text, spans, str.lower)
    return _replaced(text, first, lambda word: word[0].upper() + word[1:])
