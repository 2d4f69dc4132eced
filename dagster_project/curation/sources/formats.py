"""Rows -> canonical records and preference pairs. One function per layout; layouts are detected by the keys of the rows."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from dagster_project.core.errors import InputError
from dagster_project.core.records import example_id, pair_id
from dagster_project.curation.sources.files import Row, files_of, read_rows

Messages = list[dict[str, str]]
T = TypeVar("T")
L = TypeVar("L", "Layout", "PairLayout")


@dataclass(frozen=True)
class Layout:
    """How one format lays out a row."""

    keys: frozenset[str]
    """Keys a row must have."""
    messages: Callable[[dict[str, Any]], Messages]
    """Converts a row to a conversation. Raises KeyError, TypeError or ValueError for rows of another layout."""
    used: frozenset[str]
    """Keys that went into the messages; the others are kept in `meta`."""
    meta: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {}
    """Entries of `meta` in addition to the unused keys."""
    category: str = "category"
    """Key of the row's category."""
    alone: bool = False
    """Detected only for rows without other keys."""
    parts: Callable[[dict[str, Any]], list[Any]] | None = None
    """Splits a source row with several examples into one row per example. Raises errors like `messages`."""
    labels: bool = False
    """Whether the response is a label, which is also the category. Detected only for rows that fit no other layout."""


def _label(value: Any) -> str:
    """Convert a label to text, without surrounding spaces: "spam "  ->  "spam", 1  ->  "1", True  ->  "true"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int):
        raise ValueError(f"expected a label (text, a whole number, true or false), found {type(value).__name__}")
    return str(value).strip()


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


def _instruction(row: dict[str, Any], context: str) -> str:
    extra = _text(row.get(context) or "")
    return _text(row["instruction"]) + (f"\n\n{extra}" if extra else "")


def _alpaca(row: dict[str, Any]) -> Messages:
    return _turns(row.get("system"), ("user", _instruction(row, "input")), ("assistant", _text(row["output"])))


def _input(row: dict[str, Any]) -> dict[str, Any]:
    return {"input": row["input"]} if row.get("input") else {}


def _dolly(row: dict[str, Any]) -> Messages:
    return _turns(None, ("user", _instruction(row, "context")), ("assistant", _text(row["response"])))


def _messages(row: dict[str, Any]) -> Messages:
    return [{"role": _text(m["role"]), "content": _content(m)} for m in _list(row, "messages", "message")]


def _content(message: dict[str, Any]) -> str:
    """Content, then tool calls as JSON: {"content": None, "tool_calls": [{"id": "a"}]}  ->  '[{"id": "a"}]'"""
    calls = message.get("tool_calls")
    content = [] if calls and message.get("content") is None else [_text(message["content"])]
    return "\n".join([*content, json.dumps(calls, ensure_ascii=False)] if calls else content)


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def _turn(turn: dict[str, Any]) -> tuple[str, str]:
    return SHAREGPT_ROLES.get(_text(turn["from"]), turn["from"]), _text(turn["value"])


def _sharegpt(row: dict[str, Any]) -> Messages:
    return _turns(row.get("system"), *map(_turn, _list(row, "conversations", "turn")))


def _ultrachat(row: dict[str, Any]) -> Messages:
    return _turns(None, *((("user", "assistant")[i % 2], _text(text)) for i, text in enumerate(_list(row, "data", "turn"))))


def _single(prompt: str, completion: str, system: str | None = "system") -> Callable[[dict[str, Any]], Messages]:
    return lambda row: _turns(row.get(system) if system else None, ("user", _text(row[prompt])), ("assistant", _text(row[completion])))


def _instances(row: dict[str, Any]) -> list[Any]:
    """One row per instance, with its number: {"instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}]}
    ->  [{"instruction": "Add.", "input": "1, 2", "output": "3", "instance": 0}]

    Values of the row whose key the instance has too go to `row`. An instance that is not an object is unchanged.
    """
    shared = {key: value for key, value in row.items() if key != "instances"}
    _text(shared["instruction"])
    rows: list[Any] = []
    for number, instance in enumerate(_list(row, "instances", "instance")):
        if not isinstance(instance, dict):
            rows.append(instance)
            continue
        own = {"instance": number, **instance}
        hidden = {key: shared[key] for key in own if key in shared and shared[key] != own[key]}
        rows.append({**shared, **own} | ({"row": hidden} if hidden else {}))
    return rows


OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def _oasst_turn(message: dict[str, Any]) -> dict[str, str]:
    return {"role": OASST_ROLES.get(_text(message["role"]), message["role"]), "content": _text(message["text"])}


def _replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Replies that were not deleted, best first: by rank, then those with replies, then in their order."""
    replies = [reply for reply in message.get("replies") or [] if not reply.get("deleted")]
    return sorted(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0, not reply.get("replies")))


def _thread(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The thread of best replies, starting at the prompt."""
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
    """Numbers of messages of a tree by their use; `messages` is the sum of the others."""
    found = [row["prompt"]]
    for message in found:
        found += message.get("replies") or []
    kept, thread = len(_oasst(row)), len(_thread(row))
    return {"tree": {"messages": len(found), "kept": kept, "unanswered": thread - kept, "other_branches": len(found) - thread}}


def _labeled(prompt: str, label: str, system: str | None = "system") -> Callable[[dict[str, Any]], Messages]:
    return lambda row: _turns(row.get(system) if system else None, ("user", _text(row[prompt])), ("assistant", _label(row[label])))


def _classification(row: dict[str, Any]) -> Messages:
    """Use the names in `label_text`, if there are any, instead of numeric labels."""
    return _labeled("text", "label_text" if row.get("label_text") else "label")(row)


def _layout(keys: str, messages: Callable[[dict[str, Any]], Messages], optional: str = "", **more: Any) -> Layout:
    return Layout(frozenset(keys.split()), messages, frozenset((keys + " " + optional).split()), **more)


LAYOUTS: dict[str, Layout] = {
    "alpaca": _layout("instruction output", _alpaca, "input system", meta=_input),
    "messages": _layout("messages", _messages),
    "sharegpt": _layout("conversations", _sharegpt, "system"),
    "dolly": _layout("instruction response", _dolly, "context"),
    "instances": _layout("instruction instances", _alpaca, "input output system", meta=_input, parts=_instances),
    "prompt_completion": _layout("prompt completion", _single("prompt", "completion"), "system"),
    "prompt_response": _layout("prompt response", _single("prompt", "response"), "system"),
    "question_answer": _layout("question answer", _single("question", "answer"), "system"),
    "flan": _layout("inputs targets", _single("inputs", "targets"), "system"),
    "ultrachat": _layout("data", _ultrachat),
    "oasst": Layout(frozenset({"message_tree_id", "prompt"}), _oasst, frozenset({"prompt"}), _tree),
    "classification": _layout(
        "text label",
        _classification,
        "label_text system",
        category="label",
        labels=True,
        meta=lambda row: {"label": row["label"]} if row.get("label_text") else {},
    ),
    "text": _layout("text", lambda row: _turns(None, ("assistant", _text(row["text"]))), meta=lambda row: {"kind": "text"}, alone=True),
}


def is_text(messages: Sequence[dict[str, str]], meta: Mapping[str, Any]) -> bool:
    """Whether a record is plain text from the `text` layout: one assistant message without a prompt."""
    return meta.get("kind") == "text" and [message["role"] for message in messages] == ["assistant"]


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt. One side is empty if the format has one completion per row (KTO)."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    """Difference in quality, in the format's unit; 0 is a tie."""


@dataclass(frozen=True)
class PairLayout:
    """How one format lays out preferences."""

    keys: frozenset[str]
    """Keys a row must have."""
    pairs: Callable[[dict[str, Any]], list[Pair]]
    """Converts a row to pairs. Raises KeyError, TypeError or ValueError for rows of another layout."""
    used: frozenset[str]
    """Keys that went into the pairs; the others are kept in `meta`."""
    judged: str = ""
    """Key of a boolean in each row. With another value the row is in another layout."""
    category: str = "category"
    """Key of the pair's category."""
    variants: tuple[PairLayout, ...] = ()
    """The same layout with other keys."""

    @property
    def forms(self) -> tuple[PairLayout, ...]:
        return (self, *self.variants)

    def form_of(self, row: Mapping[str, Any]) -> PairLayout:
        """The variant whose keys the row has, or most of them. Keys with null count as missing."""

        def match(form: PairLayout) -> tuple[bool, int]:
            keys = sum(row.get(key) is not None for key in form.keys)
            return keys == len(form.keys), keys

        return max(self.forms, key=match) if self.variants else self


def _conversation(value: Any, role: str) -> Messages:
    """Convert text to a message; messages are unchanged: "Hi"  ->  [{"role": "user", "content": "Hi"}]"""
    if not isinstance(value, str | list):
        raise ValueError(f"expected text or messages, found {type(value).__name__}")
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages({"messages": value})


MISMATCH = "chosen and rejected do not answer the same prompt"


def _margin(row: dict[str, Any]) -> float | None:
    return None if row.get("margin") is None else _number(row["margin"])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, found {type(value).__name__}")
    return float(value)


def _preference(prompt: str, chosen: str, rejected: str) -> Callable[[dict[str, Any]], list[Pair]]:
    def pairs(row: dict[str, Any]) -> list[Pair]:
        context = [*_turns(row.get("system")), *_conversation(row[prompt], "user")]
        good, bad = (_conversation(row[key], "assistant") for key in (chosen, rejected))
        if good[: len(context)] == context == bad[: len(context)]:  # UltraFeedback repeats the prompt in both
            good, bad = good[len(context) :], bad[len(context) :]
        if not good or not bad:
            raise ValueError("chosen or rejected says nothing after the prompt")
        if good[0]["role"] != "assistant" or bad[0]["role"] != "assistant":
            raise ValueError(MISMATCH)
        return [Pair(context, good, bad, _margin(row))]

    return pairs


def _sharegpt_pair(row: dict[str, Any]) -> list[Pair]:
    return [Pair(_sharegpt(row), _turns(None, _turn(row["chosen"])), _turns(None, _turn(row["rejected"])), _margin(row))]


def _transcript(text: str) -> Messages:
    """Parse Anthropic's format: "\\n\\nHuman: Hi\\n\\nAssistant: Hello"  ->  user "Hi", assistant "Hello"."""
    before, *parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if before.strip() or not parts:
        raise ValueError("expected a transcript that begins with a blank line and `Human:`")
    roles = {"Human": "user", "Assistant": "assistant"}
    return _turns(None, *((roles[name], text) for name, text in zip(parts[::2], parts[1::2], strict=True)))


def _whole_conversations(row: dict[str, Any]) -> list[Pair]:
    """Convert two whole conversations; their common beginning, up to a user turn, is the prompt."""
    good, bad = (
        _transcript(row[key]) if isinstance(row[key], str) else _conversation(row[key], "assistant") for key in ("chosen", "rejected")
    )
    shared = len([*takewhile(lambda both: both[0] == both[1], zip(good[:-1], bad[:-1], strict=False))])
    while shared and good[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        raise ValueError(MISMATCH)
    return [Pair(good[:shared], good[shared:], bad[shared:], _margin(row))]


def _alpaca_eval(row: dict[str, Any]) -> list[Pair]:
    """Convert AlpacaEval annotations. The margin is the distance from a tie, 0 to 1.

    `preference` is between 1 (the first output is better) and 2; 1.5, in older annotations 0, is a tie.
    """
    preference = _number(row["preference"]) or TIE
    if not 1 <= preference <= 2:
        raise ValueError(f"preference must lie between 1 and 2, or be 0 for a tie, found {preference:g}")
    outputs = [_conversation(_text(row[key]), "assistant") for key in ("output_1", "output_2")]
    chosen, rejected = outputs if preference <= TIE else reversed(outputs)
    return [Pair(_turns(row.get("system"), ("user", _instruction(row, "input"))), chosen, rejected, 2 * abs(preference - TIE))]


TIE = 1.5
"""AlpacaEval's metrics convert a `preference` of 0 to this value (alpaca_eval/metrics/helpers.py)."""


def _judgement(value: Any) -> bool | None:
    """Parse a boolean, which is text in a CSV file; None for other values."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _kto(judged: str, conversation: Callable[[dict[str, Any]], tuple[Messages, Messages]]) -> Callable[[dict[str, Any]], list[Pair]]:
    """Reader of rows with one answer each that is labelled good or bad.

    Args:
        judged: key of the label.
        conversation: returns the prompt and the answer.
    """

    def pairs(row: dict[str, Any]) -> list[Pair]:
        prompt, answer = conversation(row)
        good = _judgement(row[judged])
        if good is None:
            raise ValueError(f"{judged} must be true or false, found {type(row[judged]).__name__}")
        return [Pair(prompt, answer, []) if good else Pair(prompt, [], answer)]

    return pairs


def _completion(row: dict[str, Any]) -> tuple[Messages, Messages]:
    return [*_turns(row.get("system")), *_conversation(row["prompt"], "user")], _conversation(row["completion"], "assistant")


def _last_turn(conversation: Callable[[dict[str, Any]], Messages]) -> Callable[[dict[str, Any]], tuple[Messages, Messages]]:
    """Split a conversation before its last turn, which must be the assistant's and is what the label refers to."""

    def cut(row: dict[str, Any]) -> tuple[Messages, Messages]:
        *prompt, answer = conversation(row)
        if not prompt or answer["role"] != "assistant":
            raise ValueError("the conversation must end with an answer of the assistant, after a prompt")
        return prompt, [answer]

    return cut


def _oasst_pairs(row: dict[str, Any]) -> list[Pair]:
    """Pair the best reply to each prompter turn with each lower-ranked reply. The margin is the difference in rank."""
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


def _pair_layout(keys: str, pairs: Callable[[dict[str, Any]], list[Pair]], optional: str = "", **more: Any) -> PairLayout:
    return PairLayout(frozenset(keys.split()), pairs, frozenset((keys + " " + optional).split()), **more)


def _kto_forms() -> Iterator[PairLayout]:
    """TRL's columns, then LLaMA-Factory's: whole conversations, or Alpaca's columns, with a judgement."""
    yield _pair_layout("prompt completion label", _kto("label", _completion), "system", judged="label")
    for judged in ("label", "kto_tag"):
        yield _pair_layout(f"messages {judged}", _kto(judged, _last_turn(_messages)), judged=judged)
        yield _pair_layout(f"conversations {judged}", _kto(judged, _last_turn(_sharegpt)), "system", judged=judged)
    yield _pair_layout("instruction output kto_tag", _kto("kto_tag", _last_turn(_alpaca)), "input system", judged="kto_tag")


def _kto_layout() -> PairLayout:
    first, *others = _kto_forms()
    return replace(first, variants=tuple(others))


PAIR_LAYOUTS: dict[str, PairLayout] = {
    "preference": _pair_layout("prompt chosen rejected", _preference("prompt", "chosen", "rejected"), "system margin"),
    "sharegpt": _pair_layout("conversations chosen rejected", _sharegpt_pair, "system margin"),
    "transcripts": _pair_layout("chosen rejected", _whole_conversations, "margin"),
    "alpaca_eval": _pair_layout("instruction output_1 output_2 preference", _alpaca_eval, "input system"),
    "kto": _kto_layout(),
    "oasst": PairLayout(frozenset({"message_tree_id", "prompt"}), _oasst_pairs, frozenset({"prompt"})),
}

RECORD_FIELDS = {"prompt": True, "response": True, "system": False, "category": False}
"""Field of a `mapping` -> whether it is required."""
PAIR_FIELDS = {"prompt": True, "chosen": True, "rejected": True, "category": False}


def mapping_problem(mapping: Mapping[str, str], fields: Mapping[str, bool] = RECORD_FIELDS) -> str:
    """Why a mapping of fields to columns is invalid; empty if valid."""
    if unknown := [field for field in mapping if field not in fields]:
        return f"unknown field {', '.join(map(repr, unknown))}; fields: {', '.join(fields)}"
    if missing := [field for field, needed in fields.items() if needed and field not in mapping]:
        return f"no column for {', '.join(missing)}"
    columns = [column for field, column in mapping.items() if (field, column) != ("category", mapping.get("response"))]
    if twice := [column for column in columns if columns.count(column) > 1]:
        return f"column {twice[0]!r} is named twice"
    return ""


def _mapped(mapping: Mapping[str, str]) -> Layout:
    """Layout of a mapping. If response and category are the same column, responses are labels."""
    labels = mapping.get("category") == mapping["response"]
    return Layout(
        keys=frozenset({mapping["prompt"], mapping["response"]}),
        messages=(_labeled if labels else _single)(mapping["prompt"], mapping["response"], mapping.get("system")),
        used=frozenset(mapping.values()) - ({mapping.get("category")} if not labels else set()),
        category=mapping.get("category", "category"),
        labels=labels,
    )


def _mapped_pairs(mapping: Mapping[str, str]) -> PairLayout:
    columns = [mapping[field] for field in ("prompt", "chosen", "rejected")]
    return PairLayout(
        keys=frozenset(columns),
        pairs=_preference(*columns),
        used=frozenset(columns) | {"system", "margin"},
        category=mapping.get("category", "category"),
    )


def detect(rows: Sequence[Row], name: str, layouts: Mapping[str, Layout] | Mapping[str, PairLayout] = LAYOUTS) -> str:
    """The layout whose keys most rows have.

    Args:
        layouts: LAYOUTS or PAIR_LAYOUTS.
    Raises:
        InputError: no layout fits any row, or the rows are preferences where examples are expected, or vice versa.
    """
    examples, pairs = _best(rows, LAYOUTS), _best(rows, PAIR_LAYOUTS, _is_pair if layouts is LAYOUTS else None)
    best = examples if layouts is LAYOUTS else pairs
    if layouts is LAYOUTS and _preferred(examples, pairs):
        raise InputError(
            f"{name}: the rows are preferences ({pairs.name}: {', '.join(sorted(pairs.keys))}), not examples to imitate",
            "list the file under raw_preferences"
            + (f"; to imitate all of it nevertheless, set format: {examples.name}" if examples.rows else ""),
        )
    if layouts is PAIR_LAYOUTS and examples.rows and not pairs.rows:
        raise InputError(
            f"{name}: the rows are examples ({examples.name}: {', '.join(sorted(examples.keys))}), not preferences",
            "list the file under raw_examples",
        )
    if not best.rows:
        keys = sorted(next((row.value for row in rows if row.value is not None), {}))
        expected = "; ".join(f"{known}: {', '.join(sorted(layout.keys))}" for known, layout in layouts.items())
        raise InputError(
            f"{name}: unknown format (keys of the first row: {', '.join(keys) or 'none'})",
            f"known formats and their keys: {expected}",
        )
    return best.name


def is_known(rows: Sequence[Row]) -> bool:
    """Whether any row is in a layout of examples or of preferences."""
    return bool(_best(rows, LAYOUTS).rows or _best(rows, PAIR_LAYOUTS).rows)


def kind(rows: Sequence[Row]) -> Literal["examples", "preferences"]:
    """Kind of the rows: preferences if most rows have the keys of a pair layout that has more keys than any layout of examples.

    {"prompt", "completion"}                 ->  examples
    {"prompt", "completion", "label": true}  ->  preferences (KTO), since the other half should not be imitated
    {"message_tree_id", "prompt"}            ->  examples, since a tree is both
    """
    return "preferences" if _preferred(_best(rows, LAYOUTS), _best(rows, PAIR_LAYOUTS, _is_pair)) else "examples"


class _Fit(NamedTuple):
    """The layout that fits most rows."""

    name: str
    rows: int
    """How many rows it fits."""
    keys: frozenset[str]
    """The keys of the layout."""


def _preferred(examples: _Fit, pairs: _Fit) -> bool:
    return pairs.rows > examples.rows or (len(pairs.keys) > len(examples.keys) and 2 * pairs.rows > examples.rows)


def _best(rows: Sequence[Row], layouts: Mapping[str, L], look: Callable[[dict[str, Any], PairLayout], bool] | None = None) -> _Fit:
    """The layout that fits most rows; of several, the one with most keys.

    Args:
        look: further condition for rows that have the keys of a variant of a pair layout.
    """
    shapes = Counter(tuple(row.value) for row in rows if row.value is not None)
    fits = []
    for name, layout in layouts.items():
        forms = {shape: _forms(layout, shape) for shape in shapes}
        counts: Counter[frozenset[str]] = Counter()
        if look and any(forms.values()):
            for row in rows:
                if row.value is not None and (form := next((form for form in forms[tuple(row.value)] if look(row.value, form)), None)):  # type: ignore[arg-type]
                    counts[form.keys] += 1
        else:
            for shape, fitting in forms.items():
                counts.update({fitting[0].keys: shapes[shape]} if fitting else {})
        keys = max(counts, key=lambda keys: (counts[keys], len(keys)), default=layout.keys)
        fits.append(_Fit(name, counts.total(), keys))
    return max(fits, key=lambda fit: (fit.rows, len(fit.keys)))


def _forms(layout: Layout | PairLayout, shape: Sequence[str]) -> Sequence[Layout | PairLayout]:
    """The variants of a layout whose keys a row has."""
    if isinstance(layout, PairLayout):
        return [form for form in layout.forms if form.keys <= set(shape)]
    if layout.labels and any(_forms(other, shape) for other in _OTHERS):
        return []
    return [layout] if (layout.keys == set(shape) if layout.alone else layout.keys <= set(shape)) else []


_OTHERS: list[Layout | PairLayout] = [*(layout for layout in LAYOUTS.values() if not layout.labels), *PAIR_LAYOUTS.values()]
"""Layouts that take precedence over classification, e.g. KTO, whose rows also have a `label`."""


def _is_pair(row: dict[str, Any], form: PairLayout) -> bool:
    """Whether a row is a pair. In a table with both kinds every row has all columns, some of them null."""
    return all(row[key] is not None for key in form.keys) and (not form.judged or _judgement(row[form.judged]) is not None)


def _choose(rows: Sequence[Row], name: str, layout: str, layouts: Mapping[str, L], mapped: L | None) -> tuple[str, L]:
    if mapped is None:
        if layout != "auto" and layout not in layouts:
            raise InputError(f"{name}: unknown format {layout!r}", f"known formats: auto, {', '.join(layouts)}")
        layout = detect(rows, name, layouts) if layout == "auto" else layout
        return layout, layouts[layout]
    if layout != "auto":
        raise InputError(f"{name}: both a format ({layout}) and a mapping", "leave one of them out")
    if not any(row.value is not None and mapped.keys <= row.value.keys() for row in rows):
        columns = sorted(next((row.value for row in rows if row.value is not None), {}))
        raise InputError(
            f"{name}: mapping: no row has the columns {', '.join(sorted(mapped.keys))}",
            f"columns of the first row: {', '.join(columns) or 'none'}",
        )
    return "mapping", mapped


SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"
)
"""Spelling of a split -> canonical name."""


def canonical_split(label: Any) -> str | None:
    """ "Dev"  ->  "validation"; None if it is not a split name."""
    return SPLITS.get(label.strip().lower()) if isinstance(label, str) else None


def split_of_file(path: str) -> str | None:
    """The split in the name of a file: "a/val.jsonl.gz", "a/validation-00000-of-00002.parquet"  ->  "validation"."""
    return canonical_split(re.sub(r"-\d+-of-\d+$", "", path.rpartition("/")[2].split(".")[0]))


def to_records(
    path: Path, source: str, layout: str = "auto", mapping: Mapping[str, str] | None = None, split: str | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """Convert every row of a file to a canonical record with its `source_row`; nothing is dropped.

    An unreadable row has no messages, and `meta.problem`:
    {"instruction": "Hi", "output": 3}  ->  messages [], meta {"problem": "expected text, found int (line 1)"}

    In a folder each file is a source: source "data/sources/mine", file "b/a.jsonl"  ->
    "data/sources/mine/b/a.jsonl".

    Args:
        mapping: field (prompt, response, system, category) -> column, for a custom layout:
            {"prompt": "q", "response": "a"} reads {"q": "Hi", "a": "Hello"} as user "Hi", assistant "Hello".
        split: label for every row, or "from_file_names".
    Returns:
        The layout ("mapping" for a custom one; several in a folder are joined by ", "), and the records (`record_schema` plus `source_row`).
    """
    return of_files(path, source, layout, mapping, split, records_of)


FROM_FILE_NAMES = "from_file_names"


class Reader(Protocol):
    """`records_of` or `pairs_of`."""

    def __call__(
        self,
        rows: list[Row],
        name: str,
        source: str,
        layout: str = "auto",
        mapping: Mapping[str, str] | None = None,
        split: str | None = None,
    ) -> tuple[str, list[dict[str, Any]]]: ...


def of_files(
    path: Path, source: str, layout: str, mapping: Mapping[str, str] | None, split: str | None, read: Reader
) -> tuple[str, list[dict[str, Any]]]:
    """Apply `read` to a file, or to each file of a folder."""
    used: dict[str, None] = {}
    records: list[dict[str, Any]] = []
    labels = set()
    for file, name, file_source in _each(path, source):
        label = split_of_file(name) if split == FROM_FILE_NAMES else split
        labels.add(label)
        file_layout, file_records = read(read_rows(file), name, file_source, layout, mapping, label)
        used[file_layout] = None
        records += file_records
    if split == FROM_FILE_NAMES and labels == {None}:
        raise InputError(f"{path.name}: no file name contains a split", f"use the names {', '.join(SPLITS)}, or leave split out")
    return ", ".join(used), records


def _each(path: Path, source: str) -> list[tuple[Path, str, str]]:
    """Each file with its name for messages and its source."""
    if not path.is_dir():
        return [(path, path.name, source)]
    return [(file, f"{path.name}/{name}", f"{source.rstrip('/')}/{name}") for name, file in files_of(path)]


def records_of(
    rows: list[Row], name: str, source: str, layout: str = "auto", mapping: Mapping[str, str] | None = None, split: str | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """As `to_records`, for rows that are already read. Empties the list, so that rows are not in memory twice."""
    mapped = _mapped(_validated(mapping, RECORD_FIELDS, name)) if mapping else None
    layout, used = _choose(rows, name, layout, LAYOUTS, mapped)
    return layout, [_record(part, source, used, split) for row in _consumed(rows) for part in _parts(row, used)]


def _parts(row: Row, layout: Layout) -> list[Row]:
    """The row, or one row per example in it. A row that cannot be split is malformed."""
    if layout.parts is None or row.value is None:
        return [row]
    nothing: list[Any] = []
    parts, problem = _read(row, layout.parts, nothing)
    if problem:
        return [row._replace(problem=problem)]
    return [row._replace(value=part) if isinstance(part, dict) else _no_instance(row, part, number) for number, part in enumerate(parts)]


def _no_instance(row: Row, part: Any, number: int) -> Row:
    where = f" (line {row.line})" if row.line else ""
    value = {**(row.value or {}), "instances": [part]}
    return row._replace(value=value, problem=f"instance {number}: expected an object, found {type(part).__name__}{where}")


def _consumed(rows: list[Row]) -> Iterator[Row]:
    rows.reverse()
    while rows:
        yield rows.pop()


def to_pairs(
    path: Path, source: str, layout: str = "auto", mapping: Mapping[str, str] | None = None, split: str | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """Convert a file to preference pairs. Every row is in the `source_rows` of at least one pair; a tree may give several, and two KTO rows form one:

    {"prompt": "Hi", "completion": "Hello", "label": true}   ->  {"source_rows": [0, 1], "margin": None, "prompt": [user "Hi"],
    {"prompt": "Hi", "completion": "What?", "label": false}       "chosen": [assistant "Hello"], "rejected": [assistant "What?"], ...}

    An unreadable row has no messages, and a KTO row without a counterpart has one empty side. `meta.problem` has the reason.

    Args:
        mapping: field (prompt, chosen, rejected, category) -> column, for a custom layout.
        split: as for `to_records`. KTO rows of different splits are not paired.
    Returns:
        The layout, and the pairs (`pair_schema` plus `source_row`, the first of its `source_rows`).
    """
    return of_files(path, source, layout, mapping, split, pairs_of)


def pairs_of(
    rows: list[Row], name: str, source: str, layout: str = "auto", mapping: Mapping[str, str] | None = None, split: str | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """As `to_pairs`, for rows that are already read. Empties the list."""
    mapped = _mapped_pairs(_validated(mapping, PAIR_FIELDS, name)) if mapping else None
    layout, used = _choose(rows, name, layout, PAIR_LAYOUTS, mapped)
    entries: list[dict[str, Any]] = []
    waiting: dict[tuple[str, str], deque[dict[str, Any]]] = defaultdict(deque)
    for row in _consumed(rows):
        form = used.form_of(row.value or {})
        pairs, problem = _read(row, form.pairs, [Pair([], [], [])])
        kept = _kept(row, form.used, form.category)
        label = split or canonical_split((row.value or {}).get("split"))
        labelled = {"split": label} if label and not problem else {}
        for pair in pairs:
            side, other = ("chosen", "rejected") if pair.chosen else ("rejected", "chosen")
            messages = {"chosen": pair.chosen, "rejected": pair.rejected}
            half = not problem and not messages[other]
            same = json.dumps([label, pair.prompt])
            if half and waiting[same, other]:
                entry = waiting[same, other].popleft()
                entry[side] = messages[side]
                entry["source_rows"].append(row.source_row)
                entry["meta"] = {other: entry["meta"][other], side: kept, **labelled}
                continue
            missing = f"no {other} completion of the same prompt"
            meta = {"problem": problem, "row": row.value} if problem else {side: kept, "problem": missing} if half else kept
            entry = {"source": source, "source_row": row.source_row, "source_rows": [row.source_row], "prompt": pair.prompt, **messages}
            entries.append(
                {**entry, "margin": pair.margin, "category": _category(row, form.category), "group_id": None, "meta": {**meta, **labelled}}
            )
            if half:
                waiting[same, side].append(entries[-1])
    return layout, [{"example_id": _pair_id(entry), **entry, "meta": json.dumps(entry["meta"], sort_keys=True)} for entry in entries]


def _pair_id(entry: dict[str, Any]) -> str:
    """Content hash of a pair; of the row if it is unreadable."""
    sides = [entry[side] for side in ("prompt", "chosen", "rejected")]
    if any(sides):
        return pair_id(*sides)
    return example_id([{"role": "malformed", "content": json.dumps(entry["meta"]["row"], ensure_ascii=False, sort_keys=True)}])


def as_record(pair: dict[str, Any]) -> dict[str, Any]:
    """Convert a pair to a record for the checks, whose `messages` end with the chosen answer:

    prompt [user "Hi"], chosen [assistant "Hello"]  ->  messages [user "Hi", assistant "Hello"], asked 1
    """
    messages = [*pair["prompt"], *pair["chosen"]]
    mismatch = not messages and str(json.loads(pair["meta"]).get("problem")).startswith(MISMATCH)
    if pair["chosen"] and pair["rejected"]:  # of several turns only the last are compared, so all others must be equal
        mismatch = pair["chosen"][:-1] != pair["rejected"][:-1]
    kept = {key: value for key, value in pair.items() if key not in {"prompt", "chosen"}}
    return {**kept, "messages": messages, "asked": len(pair["prompt"]), "same_prompt": not mismatch}


def _validated(mapping: Mapping[str, str], fields: Mapping[str, bool], name: str) -> Mapping[str, str]:
    if problem := mapping_problem(mapping, fields):
        raise InputError(f"{name}: mapping: {problem}", "map each field to a different column")
    return mapping


def _read(row: Row, convert: Callable[[dict[str, Any]], T], otherwise: T) -> tuple[T, str]:
    """The converted row, or `otherwise` and why it is unreadable."""
    if row.problem or row.value is None:
        return otherwise, row.problem
    try:
        return convert(row.value), ""
    except KeyError as error:
        problem = f"no key {error}"
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        problem = str(error)
    return otherwise, f"{problem} (line {row.line})" if row.line else problem


def _category(row: Row, key: str) -> str | None:
    category = (row.value or {}).get(key)
    return category if isinstance(category, str) else None


def _kept(row: Row, used: frozenset[str], category: str) -> dict[str, Any]:
    """Values that are in no other column, including a category that is not text."""
    elsewhere = used | ({category} if isinstance((row.value or {}).get(category), str | None) else set())
    return {key: value for key, value in (row.value or {}).items() if key not in elsewhere}


def _record(row: Row, source: str, layout: Layout, split: str | None) -> dict[str, Any]:
    nothing: tuple[Messages, dict[str, Any]] = ([], {})
    (messages, more), problem = _read(row, lambda value: (layout.messages(value), layout.meta(value)), nothing)
    value = row.value or {}
    if problem:
        meta: dict[str, Any] = {"problem": problem, "row": value}
    else:
        meta = _kept(row, layout.used, layout.category)
        if label := canonical_split(meta.get("split")):
            meta["split"] = label
        if split:
            more = {**more, "split": split}
        hidden = {key: meta[key] for key in more if key in meta and meta[key] != more[key]}
        meta |= more | ({"row": hidden} if hidden else {})
    return {
        "example_id": example_id(messages or [{"role": "malformed", "content": json.dumps(value, ensure_ascii=False, sort_keys=True)}]),
        "source": source,
        "source_row": row.source_row,
        "messages": messages,
        "category": (messages[-1]["content"] or None) if layout.labels and messages else _category(row, layout.category),
        "group_id": None,
        "meta": (ASCII if problem else JSON).encode(meta) if meta else "{}",
    }


JSON, ASCII = json.JSONEncoder(ensure_ascii=False, sort_keys=True), json.JSONEncoder(sort_keys=True)
