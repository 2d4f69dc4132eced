"""Rows -> one table of facts about them, which the schemas then judge. Facts say what is; schemas say what must be."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dagster_project.curation.overlap import Pair, clusters, near_pairs, words
from dagster_project.records import prompt_text, response_text

if TYPE_CHECKING:
    import polars as pl

PLACEHOLDERS = frozenset(
    {
        "no input",
        "noinput",
        "none",
        "n a",
        "na",
        "null",
        "nil",
        "empty",
        "not applicable",
        "no input provided",
        "no input required",
        "no input needed",
        "no additional input",
        "input not available",
        "placeholder",
        "todo",
        "tbd",
        "lorem ipsum",
    }
)
"""Inputs that only say that there is none, after `words` has removed case and punctuation ("<noinput>", "N/A", "No input.")."""

_SPECIAL = re.compile(r"<\|[a-z_]{2,30}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>")
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}")
_DAMAGE = re.compile("\ufffd|\x00|Ã[\x80-\xbf©¨¼¶¤]|â€[™œ\x9d“”]")


def roles_are_valid(messages: Sequence[dict[str, str]]) -> bool:
    """An optional system turn, then user and assistant in turns, the user first."""
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return bool(turns) and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(turns))


def mask(text: str) -> str:
    """The text with e-mail addresses hidden, fit for a report or a log."""
    return _EMAIL.sub("[e-mail]", text)


def is_placeholder(text: str) -> bool:
    return " ".join(words(text)) in PLACEHOLDERS


def gather(records: Sequence[dict[str, Any]], held_out: Sequence[str]) -> tuple[pl.DataFrame, list[int]]:
    """The facts about each record, and the near-duplicate cluster of each.

    Args:
        records: canonical records with `source` and `source_row`.
        held_out: texts that must not be trained on (benchmark questions).
    Returns:
        A frame with one row per record, in order:

        | column | meaning |
        | --- | --- |
        | problem | why the source row could not be read, else null |
        | roles_valid, ends_with_assistant, has_prompt, has_response | about the messages |
        | input_is_real | false where the input only says that there is none |
        | special_token, email, damage | the first match in the text, else null |
        | repeats, near_copy_of | index of an earlier record with the same, or nearly the same, messages / prompt; else null |
        | conflicts_with | index of an earlier record with the same prompt and another response, else null |
        | leaks | index into `held_out` of a text the prompt overlaps, else null |

        and for each record the index of its cluster's first record.
    """
    import polars as pl

    readable = [i for i, r in enumerate(records) if r["messages"]]
    prompts = [prompt_text(r["messages"]) for r in records]
    repeats, conflicts = _repeats(records)
    first_of_kind = [i for i in readable if repeats[i] is None]
    pairs = [replace(p, left=first_of_kind[p.left], right=first_of_kind[p.right]) for p in near_pairs([prompts[i] for i in first_of_kind])]
    near: dict[int, int] = {}
    for pair in pairs:
        near.setdefault(pair.right, pair.left)
    leaks: dict[int, int] = {}
    for pair in near_pairs(prompts, held_out):
        leaks.setdefault(pair.left, pair.right)
    links = pairs + [Pair(first, i, 1.0) for i, first in enumerate(repeats) if first is not None]
    rows = [_row(i, record, repeats, near, conflicts, leaks) for i, record in enumerate(records)]
    text, flag, index = pl.String, pl.Boolean, pl.Int64
    schema = {
        "problem": text,
        "roles_valid": flag,
        "ends_with_assistant": flag,
        "has_prompt": flag,
        "has_response": flag,
        "input_is_real": flag,
        "special_token": text,
        "email": text,
        "damage": text,
        "repeats": index,
        "near_copy_of": index,
        "conflicts_with": index,
        "leaks": index,
    }
    return pl.DataFrame(rows, schema=schema), clusters(len(records), links)


def _row(
    i: int, record: dict[str, Any], repeats: list[int | None], near: dict[int, int], conflicts: dict[int, int], leaks: dict[int, int]
) -> dict[str, Any]:
    messages, meta = record["messages"], json.loads(record["meta"])
    text = "\n".join(m["content"] for m in messages)
    readable = bool(messages)
    inputs = [meta.get("input", "")] + [m["content"] for m in messages if m["role"] == "user"]
    return {
        "problem": None if readable else meta.get("problem"),
        "roles_valid": not readable or roles_are_valid(messages),
        "ends_with_assistant": not readable or messages[-1]["role"] != "user",
        "has_prompt": not readable or bool(prompt_text(messages).strip()),
        "has_response": not readable or messages[-1]["role"] != "assistant" or bool(response_text(messages).strip()),
        "input_is_real": not any(isinstance(given, str) and is_placeholder(given) for given in inputs),
        "special_token": _first(_SPECIAL, text),
        "email": _first(_EMAIL, text),
        "damage": _first(_DAMAGE, text),
        "repeats": repeats[i],
        "near_copy_of": near.get(i),
        "conflicts_with": conflicts.get(i),
        "leaks": leaks.get(i),
    }


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return match.group() if match else None


def _repeats(records: Sequence[dict[str, Any]]) -> tuple[list[int | None], dict[int, int]]:
    """Earlier rows with the same messages, and earlier rows with the same prompt but another response."""
    first: dict[str, int] = {}
    by_prompt: dict[str, list[int]] = defaultdict(list)
    repeats: list[int | None] = []
    conflicts: dict[int, int] = {}
    for i, record in enumerate(records):
        if not record["messages"]:
            repeats.append(None)
            continue
        repeats.append(first.get(record["example_id"]))
        first.setdefault(record["example_id"], i)
        prompt = json.dumps(record["messages"][:-1], ensure_ascii=False)
        earlier = [j for j in by_prompt[prompt] if response_text(records[j]["messages"]) != response_text(record["messages"])]
        if earlier and repeats[i] is None:
            conflicts[i] = earlier[0]
        by_prompt[prompt].append(i)
    return repeats, conflicts
