"""Rows -> canonical records and preference pairs. One function per layout; detection looks at the keys the rows have."""

from __future__ import annotations

import json
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from dagster_project.curation.files import Row, read_rows
from dagster_project.errors import InputError
from dagster_project.records import example_id

Messages = list[dict[str, str]]
T = TypeVar("T")
L = TypeVar("L", "Layout", "PairLayout")


@dataclass(frozen=True)
class Layout:
    """How one format lays out a row."""

    keys: frozenset[str]
    """Keys a row must have."""
    messages: Callable[[dict[str, Any]], Messages]
    """The row's conversation. KeyError, TypeError and ValueError mean: not such a row."""
    used: frozenset[str]
    """Keys that went into the messages; the others are kept in `meta`."""
    meta: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {}
    """What `meta` says beyond the keys that are not used."""
    category: str = "category"
    """Key of the row's category."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {type(value).__name__}")
    return value


def _list(row: dict[str, Any], key: str, item: str) -> list[Any]:
    if not isinstance(row[key], list) or not row[key]:
        raise ValueError(f"`{key}` must be a list with at least one {item}")
    return row[key]


def _turns(system: Any, *turns: tuple[str, str]) -> Messages:
    first = [{"role": "system", "content": _text(system)}] if system else []
    return first + [{"role": role, "content": content} for role, content in turns]


def _asked(row: dict[str, Any], context: str) -> str:
    given = _text(row.get(context) or "")
    return _text(row["instruction"]) + (f"\n\n{given}" if given else "")


def _alpaca(row: dict[str, Any]) -> Messages:
    return _turns(row.get("system"), ("user", _asked(row, "input")), ("assistant", _text(row["output"])))


def _input(row: dict[str, Any]) -> dict[str, Any]:
    return {"input": row["input"]} if row.get("input") else {}


def _dolly(row: dict[str, Any]) -> Messages:
    return _turns(None, ("user", _asked(row, "context")), ("assistant", _text(row["response"])))


def _messages(row: dict[str, Any]) -> Messages:
    return [{"role": _text(m["role"]), "content": _content(m)} for m in _list(row, "messages", "message")]


def _content(message: dict[str, Any]) -> str:
    """What is said, then what is called: {"content": None, "tool_calls": [{"id": "a"}]}  ->  '[{"id": "a"}]'"""
    calls = message.get("tool_calls")
    said = [] if calls and message.get("content") is None else [_text(message["content"])]
    return "\n".join([*said, json.dumps(calls, ensure_ascii=False)] if calls else said)


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def _turn(turn: dict[str, Any]) -> tuple[str, str]:
    return SHAREGPT_ROLES.get(_text(turn["from"]), turn["from"]), _text(turn["value"])


def _sharegpt(row: dict[str, Any]) -> Messages:
    return _turns(row.get("system"), *map(_turn, _list(row, "conversations", "turn")))


def _ultrachat(row: dict[str, Any]) -> Messages:
    return _turns(None, *((("user", "assistant")[i % 2], _text(said)) for i, said in enumerate(_list(row, "data", "turn"))))


def _single(prompt: str, completion: str, system: str | None = "system") -> Callable[[dict[str, Any]], Messages]:
    return lambda row: _turns(row.get(system) if system else None, ("user", _text(row[prompt])), ("assistant", _text(row[completion])))


OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def _oasst_turn(message: dict[str, Any]) -> dict[str, str]:
    return {"role": OASST_ROLES.get(_text(message["role"]), message["role"]), "content": _text(message["text"])}


def _replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The replies that were not deleted, best first: by rank, then those that were answered themselves, then as they stand."""
    replies = [reply for reply in message.get("replies") or [] if not reply.get("deleted")]
    return sorted(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0, not reply.get("replies")))


def _thread(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The best reply to the best reply to the prompt, and so on."""
    thread = [row["prompt"]]
    while replies := _replies(thread[-1]):
        thread.append(replies[0])
    return thread


def _oasst(row: dict[str, Any]) -> Messages:
    messages = [_oasst_turn(message) for message in _thread(row)]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("the tree has no assistant reply")
    return messages


def _tree(row: dict[str, Any]) -> dict[str, Any]:
    """Where the tree's messages went; `messages` is the sum of the others."""
    found = [row["prompt"]]
    for message in found:
        found += message.get("replies") or []
    kept, thread = len(_oasst(row)), len(_thread(row))
    return {"tree": {"messages": len(found), "kept": kept, "unanswered": thread - kept, "other_branches": len(found) - thread}}


def _layout(keys: str, messages: Callable[[dict[str, Any]], Messages], optional: str = "", **more: Any) -> Layout:
    return Layout(frozenset(keys.split()), messages, frozenset((keys + " " + optional).split()), **more)


LAYOUTS: dict[str, Layout] = {
    "alpaca": _layout("instruction output", _alpaca, "input system", meta=_input),
    "messages": _layout("messages", _messages),
    "sharegpt": _layout("conversations", _sharegpt, "system"),
    "dolly": _layout("instruction response", _dolly, "context"),
    "prompt_completion": _layout("prompt completion", _single("prompt", "completion"), "system"),
    "question_answer": _layout("question answer", _single("question", "answer"), "system"),
    "flan": _layout("inputs targets", _single("inputs", "targets"), "system"),
    "ultrachat": _layout("data", _ultrachat),
    "oasst": Layout(frozenset({"message_tree_id", "prompt"}), _oasst, frozenset({"prompt"}), _tree),
    "text": _layout("text", lambda row: _turns(None, ("assistant", _text(row["text"])))),
}

NAMED_ONLY = frozenset({"text"})
"""Never detected: plain text has no prompt, so `invalid_roles` and `empty_prompt` drop it unless the policy says otherwise."""


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt. One side is empty where the format has them in rows of their own (KTO)."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    """How much better `chosen` is, in the format's own unit; 0 is a tie."""


@dataclass(frozen=True)
class PairLayout:
    """How one format lays out preferences."""

    keys: frozenset[str]
    """Keys a row must have."""
    pairs: Callable[[dict[str, Any]], list[Pair]]
    """The row's pairs. KeyError, TypeError and ValueError mean: not such a row."""
    used: frozenset[str]
    """Keys that went into the pairs; the others are kept in `meta`."""


def _said(value: Any, role: str) -> Messages:
    """Text, or messages already: "Hi"  ->  [{"role": "user", "content": "Hi"}]"""
    if not isinstance(value, str | list):
        raise ValueError(f"expected text or messages, found {type(value).__name__}")
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages({"messages": value})


def _margin(row: dict[str, Any]) -> float | None:
    return None if row.get("margin") is None else _number(row["margin"])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, found {type(value).__name__}")
    return float(value)


def _preference(prompt: str, chosen: str, rejected: str) -> Callable[[dict[str, Any]], list[Pair]]:
    def pairs(row: dict[str, Any]) -> list[Pair]:
        asked = [*_turns(row.get("system")), *_said(row[prompt], "user")]
        good, bad = (_said(row[key], "assistant") for key in (chosen, rejected))
        if good[: len(asked)] == asked == bad[: len(asked)]:  # UltraFeedback repeats the prompt in both
            good, bad = good[len(asked) :], bad[len(asked) :]
        if not good or not bad:
            raise ValueError("chosen or rejected says nothing after the prompt")
        return [Pair(asked, good, bad, _margin(row))]

    return pairs


def _sharegpt_pair(row: dict[str, Any]) -> list[Pair]:
    return [Pair(_sharegpt(row), _turns(None, _turn(row["chosen"])), _turns(None, _turn(row["rejected"])), _margin(row))]


def _transcript(text: str) -> Messages:
    """Anthropic's form: "\\n\\nHuman: Hi\\n\\nAssistant: Hello"  ->  user "Hi", assistant "Hello"."""
    before, *parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if before.strip() or not parts:
        raise ValueError("expected a transcript that begins with a blank line and `Human:`")
    roles = {"Human": "user", "Assistant": "assistant"}
    return _turns(None, *((roles[who], said) for who, said in zip(parts[::2], parts[1::2], strict=True)))


def _whole_conversations(row: dict[str, Any]) -> list[Pair]:
    """What both share, up to a user turn, is the prompt."""
    good, bad = (_transcript(row[key]) if isinstance(row[key], str) else _said(row[key], "assistant") for key in ("chosen", "rejected"))
    shared = len([*takewhile(lambda both: both[0] == both[1], zip(good[:-1], bad[:-1], strict=False))])
    while shared and good[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        raise ValueError("chosen and rejected do not answer the same prompt")
    return [Pair(good[:shared], good[shared:], bad[shared:], _margin(row))]


def _alpaca_eval(row: dict[str, Any]) -> list[Pair]:
    """`preference` runs from 1 (the first output is better) to 2; 1.5 is a tie. The margin is its distance from a tie, 0 to 1."""
    preference = _number(row["preference"])
    if not 1 <= preference <= 2:
        raise ValueError(f"preference must lie between 1 and 2, found {preference:g}")
    outputs = [_said(_text(row[key]), "assistant") for key in ("output_1", "output_2")]
    chosen, rejected = outputs if preference <= 1.5 else reversed(outputs)
    return [Pair(_turns(row.get("system"), ("user", _asked(row, "input"))), chosen, rejected, 2 * abs(preference - 1.5))]


def _kto(row: dict[str, Any]) -> list[Pair]:
    prompt, completion = [*_turns(row.get("system")), *_said(row["prompt"], "user")], _said(row["completion"], "assistant")
    if not isinstance(row["label"], bool):
        raise ValueError(f"label must be true or false, found {type(row['label']).__name__}")
    return [Pair(prompt, completion, []) if row["label"] else Pair(prompt, [], completion)]


def _oasst_pairs(row: dict[str, Any]) -> list[Pair]:
    """The best reply to each prompter turn against each reply ranked below it. The margin is the distance in ranks."""
    pairs = []
    threads = [[row["prompt"]]]
    for thread in threads:
        replies = _replies(thread[-1])
        threads += [[*thread, reply] for reply in replies]
        ranked = [reply for reply in replies if reply.get("rank") is not None and reply["role"] == "assistant"]
        prompt = [_oasst_turn(message) for message in thread]
        pairs += [
            Pair(prompt, [_oasst_turn(ranked[0])], [_oasst_turn(reply)], float(reply["rank"] - ranked[0]["rank"]))
            for reply in ranked[1:]
            if reply["rank"] > ranked[0]["rank"]
        ]
    if not pairs:
        raise ValueError("the tree has no two replies of different rank to the same message")
    return pairs


def _pair_layout(keys: str, pairs: Callable[[dict[str, Any]], list[Pair]], optional: str = "") -> PairLayout:
    return PairLayout(frozenset(keys.split()), pairs, frozenset((keys + " " + optional).split()))


PAIR_LAYOUTS: dict[str, PairLayout] = {
    "preference": _pair_layout("prompt chosen rejected", _preference("prompt", "chosen", "rejected"), "system margin"),
    "sharegpt": _pair_layout("conversations chosen rejected", _sharegpt_pair, "system margin"),
    "transcripts": _pair_layout("chosen rejected", _whole_conversations, "margin"),
    "alpaca_eval": _pair_layout("instruction output_1 output_2 preference", _alpaca_eval, "input system"),
    "kto": _pair_layout("prompt completion label", _kto, "system"),
    "oasst": PairLayout(frozenset({"message_tree_id", "prompt"}), _oasst_pairs, frozenset({"prompt"})),
}

RECORD_FIELDS = {"prompt": True, "response": True, "system": False, "category": False}
"""Field a `mapping` may name -> whether it must."""
PAIR_FIELDS = {"prompt": True, "chosen": True, "rejected": True}


def mapping_problem(mapping: Mapping[str, str], fields: Mapping[str, bool] = RECORD_FIELDS) -> str:
    """What is wrong with a mapping of fields to columns, or nothing."""
    if unknown := [field for field in mapping if field not in fields]:
        return f"unknown field {', '.join(map(repr, unknown))}; fields: {', '.join(fields)}"
    if missing := [field for field, needed in fields.items() if needed and field not in mapping]:
        return f"no column for {', '.join(missing)}"
    if twice := [column for column in mapping.values() if list(mapping.values()).count(column) > 1]:
        return f"column {twice[0]!r} is named twice"
    return ""


def _mapped(mapping: Mapping[str, str]) -> Layout:
    return Layout(
        keys=frozenset({mapping["prompt"], mapping["response"]}),
        messages=_single(mapping["prompt"], mapping["response"], mapping.get("system")),
        used=frozenset(mapping.values()) - {mapping.get("category")},
        category=mapping.get("category", "category"),
    )


def _mapped_pairs(mapping: Mapping[str, str]) -> PairLayout:
    columns = frozenset(mapping.values())
    return PairLayout(columns, _preference(mapping["prompt"], mapping["chosen"], mapping["rejected"]), columns | {"system", "margin"})


def detect(rows: Sequence[Row], name: str, layouts: Mapping[str, Layout] | Mapping[str, PairLayout] = LAYOUTS) -> str:
    """The layout whose keys most rows have.

    Raises:
        InputError: no layout fits any row.
    """

    def fits(layout: Layout | PairLayout) -> tuple[int, int]:
        return sum(1 for row in rows if row.value is not None and layout.keys <= row.value.keys()), len(layout.keys)

    best = max((known for known in layouts if known not in NAMED_ONLY), key=lambda known: fits(layouts[known]))
    if not fits(layouts[best])[0]:
        found = sorted(next((row.value for row in rows if row.value is not None), {}))
        wanted = "; ".join(f"{name}: {', '.join(sorted(layout.keys))}" for name, layout in layouts.items())
        raise InputError(
            f"{name}: unknown format (keys of the first row: {', '.join(found) or 'none'})",
            f"known formats and their keys: {wanted}",
        )
    return best


def _choose(rows: Sequence[Row], name: str, layout: str, layouts: Mapping[str, L], mapped: L | None) -> tuple[str, L]:
    if mapped is None:
        if layout != "auto" and layout not in layouts:
            raise InputError(f"{name}: unknown format {layout!r}", f"known formats: auto, {', '.join(layouts)}")
        layout = detect(rows, name, layouts) if layout == "auto" else layout
        return layout, layouts[layout]
    if layout != "auto":
        raise InputError(f"{name}: both a format ({layout}) and a mapping", "leave one of them out")
    if not any(row.value is not None and mapped.keys <= row.value.keys() for row in rows):
        found = sorted(next((row.value for row in rows if row.value is not None), {}))
        raise InputError(
            f"{name}: mapping: no row has the columns {', '.join(sorted(mapped.keys))}",
            f"columns of the first row: {', '.join(found) or 'none'}",
        )
    return "mapping", mapped


def to_records(path: Path, source: str, layout: str = "auto", mapping: Mapping[str, str] | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Every row of a file as a canonical record with its `source_row`; nothing is dropped.

    A row that cannot be read keeps its place with no messages and `meta.problem`:
    {"instruction": "Hi", "output": 3}  ->  messages [], meta {"problem": "expected text, found int"}

    Args:
        mapping: field (prompt, response, system, category) -> column, for a layout of one's own:
            {"prompt": "q", "response": "a"} reads {"q": "Hi", "a": "Hello"} as user "Hi", assistant "Hello".
    Returns:
        The layout used ("mapping" for one's own), and the records (`record_schema` plus `source_row`).
    """
    mapped = _mapped(_sound(mapping, RECORD_FIELDS, path)) if mapping else None
    rows = read_rows(path)
    layout, used = _choose(rows, path.name, layout, LAYOUTS, mapped)
    return layout, [_record(row, source, used) for row in rows]


def to_pairs(path: Path, source: str, layout: str = "auto", mapping: Mapping[str, str] | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Preference pairs. Every row of the file is in the `source_rows` of at least one; a tree may give several, and two KTO rows make one:

    {"prompt": "Hi", "completion": "Hello", "label": true}   ->  {"source_rows": [0, 1], "margin": None, "prompt": [user "Hi"],
    {"prompt": "Hi", "completion": "What?", "label": false}       "chosen": [assistant "Hello"], "rejected": [assistant "What?"], ...}

    A row that cannot be read keeps its place with no messages; a KTO row without a counterpart has one empty side. Both say why in
    `meta.problem`.

    Args:
        mapping: field (prompt, chosen, rejected) -> column, for a layout of one's own.
    Returns:
        The layout used, and the pairs: source, source_rows, prompt, chosen, rejected, margin, category, meta (JSON).
    """
    mapped = _mapped_pairs(_sound(mapping, PAIR_FIELDS, path)) if mapping else None
    rows = read_rows(path)
    layout, used = _choose(rows, path.name, layout, PAIR_LAYOUTS, mapped)
    entries: list[dict[str, Any]] = []
    waiting: dict[tuple[str, str], deque[dict[str, Any]]] = defaultdict(deque)
    for row in rows:
        pairs, problem = _read(row, used.pairs, [Pair([], [], [])])
        kept = _kept(row, used.used, "category")
        for pair in pairs:
            side, other = ("chosen", "rejected") if pair.chosen else ("rejected", "chosen")
            messages = {"chosen": pair.chosen, "rejected": pair.rejected}
            half = not problem and not messages[other]
            same = json.dumps(pair.prompt)
            if half and waiting[same, other]:
                entry = waiting[same, other].popleft()
                entry[side] = messages[side]
                entry["source_rows"].append(row.source_row)
                entry["meta"] = {other: entry["meta"][other], side: kept}
                continue
            missing = f"no {other} completion of the same prompt"
            meta = {"problem": problem, "row": row.value} if problem else {side: kept, "problem": missing} if half else kept
            entry = {"source": source, "source_rows": [row.source_row], "prompt": pair.prompt, **messages, "margin": pair.margin}
            entries.append({**entry, "category": _category(row, "category"), "meta": meta})
            if half:
                waiting[same, side].append(entries[-1])
    return layout, [{**entry, "meta": json.dumps(entry["meta"], sort_keys=True)} for entry in entries]


def _sound(mapping: Mapping[str, str], fields: Mapping[str, bool], path: Path) -> Mapping[str, str]:
    if problem := mapping_problem(mapping, fields):
        raise InputError(f"{path.name}: mapping: {problem}", "map each field to a column of its own")
    return mapping


def _read(row: Row, convert: Callable[[dict[str, Any]], T], otherwise: T) -> tuple[T, str]:
    """What the row says, or `otherwise` and why it cannot be read."""
    if row.problem or row.value is None:
        return otherwise, row.problem
    try:
        return convert(row.value), ""
    except KeyError as error:
        return otherwise, f"no key {error}"
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        return otherwise, str(error)


def _category(row: Row, key: str) -> str | None:
    category = (row.value or {}).get(key)
    return category if isinstance(category, str) else None


def _kept(row: Row, used: frozenset[str], category: str) -> dict[str, Any]:
    """What went into no other column. A category that is not text is no category, and stays here."""
    elsewhere = used | ({category} if isinstance((row.value or {}).get(category), str | None) else set())
    return {key: value for key, value in (row.value or {}).items() if key not in elsewhere}


def _record(row: Row, source: str, layout: Layout) -> dict[str, Any]:
    nothing: tuple[Messages, dict[str, Any]] = ([], {})
    (messages, more), problem = _read(row, lambda value: (layout.messages(value), layout.meta(value)), nothing)
    value = row.value or {}
    meta = {"problem": problem, "row": value} if problem else {**_kept(row, layout.used, layout.category), **more}
    return {
        "example_id": example_id(messages or [{"role": "malformed", "content": json.dumps(value, ensure_ascii=False, sort_keys=True)}]),
        "source": source,
        "source_row": row.source_row,
        "messages": messages,
        "category": _category(row, layout.category),
        "group_id": None,
        "meta": json.dumps(meta, ensure_ascii=bool(problem), sort_keys=True),
    }


def read_multiple_choice(path: Path) -> Iterator[dict[str, Any]]:
    """A benchmark of multiple-choice questions: {"question", "choices": [...], "answer": index, "subject"}.

    Raises:
        InputError: names the first row that is not such a question (an answer that is missing counts: unlabelled).
    """
    for row in read_rows(path):
        value = {} if row.problem else row.value or {}
        choices, answer = value.get("choices"), value.get("answer")
        if not (
            isinstance(value.get("question"), str)
            and isinstance(choices, list)
            and len(choices) > 1
            and isinstance(answer, int)
            and 0 <= answer < len(choices)
        ):
            raise InputError(
                f"{path.name}: row {row.source_row} is not a labelled multiple-choice question",
                "each row needs question, choices and the index of the right one as answer",
            )
        yield value
