"""Layouts of examples: a row -> messages.

One function per layout; layouts are detected by the keys of the rows (detection.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from dagster_project.curation.sources import tools
from dagster_project.curation.sources.message import (
    EMPTY,
    Messages,
    Parsed,
    as_text,
    as_turns,
    joined_calls,
    read_message,
    read_turn,
)
from dagster_project.curation.sources.part_messages import (
    answered,
    instruction_of,
    read_anthropic_instruction,
    read_anthropic_message,
    read_bedrock_instruction,
    read_bedrock_message,
    read_content,
    read_gemini_instruction,
    read_item,
    spread,
)

TurnReader = Callable[[Any], Parsed]


@dataclass(frozen=True)
class Layout:
    """How one format lays out a row."""

    keys: frozenset[str]
    """Keys a row must have."""
    messages: Callable[[dict[str, Any]], Messages]
    """Converts a row to a conversation. Raises KeyError, TypeError or ValueError for rows of another layout."""
    used: frozenset[str]
    """Keys that went into the messages; the others are kept in `meta`, except for tool definitions (`tools`,
    `functions`)."""
    meta: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {}
    """Entries of `meta` in addition to the unused keys."""
    unread: Callable[[dict[str, Any]], frozenset[str]] = lambda row: frozenset()
    """Keys of `used` that did not go into the messages of this row and are kept, too."""
    category: str = "category"
    """Key of the row's category."""
    alone: bool = False
    """Detected only for rows without other keys."""
    parts: Callable[[dict[str, Any]], list[Any]] | None = None
    """Splits a source row with several examples into one row per example. Raises errors like `messages`."""
    labels: bool = False
    """Whether the response is a label, which is also the category. Detected only for rows that fit no other layout."""
    by_value: bool = False
    """Detected only if the values of a row show it (`detection.shown_by_values`)."""
    turns: Mapping[str, TurnReader] = field(default_factory=dict)
    """Key whose value is a list of messages or turns -> the function that reads
    one. `messages` gets them as canonical messages."""
    tool_keys: tuple[str, ...] = tools.TOOL_KEYS
    """Keys for tool definitions. The first that holds any is read; the others are kept in `meta`."""
    of_tree: Callable[[dict[str, Any]], Iterable[dict[str, Any]]] | None = None
    """The messages of a tree of replies, under `prompt`, that are in the conversation."""


GEMINI_SYSTEM = ("systemInstruction", "system_instruction")
GEMINI_TURNS: dict[str, TurnReader] = {
    **dict.fromkeys(GEMINI_SYSTEM, read_gemini_instruction),
    "contents": read_content,
}


def as_label(value: Any) -> str:
    """Convert a label to text, without surrounding spaces: "spam "  ->  "spam", 1  ->  "1", True  ->  "true"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int):
        raise ValueError(f"expected a label (text, a whole number, true or false), found {type(value).__name__}")
    return str(value).strip()


def as_list(row: Mapping[str, Any], key: str, item: str) -> list[Any]:
    if not isinstance(row[key], list) or not row[key]:
        raise ValueError(f"`{key}` must be a list with at least one {item}")
    return row[key]


def as_conversation(value: Any, role: str) -> Messages:
    """Convert text to a message; messages are unchanged: "Hi"  ->  [{"role": "user", "content": "Hi"}]"""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"expected text or messages, found {type(value).__name__}")
    return as_list({"messages": value}, "messages", "message")


def instruction(row: dict[str, Any], context: str) -> str:
    """The instruction and its context as one question; either may be empty."""
    extra = "" if row.get(context) in EMPTY else as_text(row[context])
    return "\n\n".join(filter(None, (as_text(row["instruction"]), extra)))


def alpaca_prompt(row: dict[str, Any]) -> Messages:
    """The turns before the answer: those in LLaMA-Factory's `history`, [["Hi", "Hello"]], and the question."""
    rounds = row["history"] if has_rounds(row) else []
    earlier = [turn for asked, said in rounds for turn in (("user", asked), ("assistant", said))]
    return as_turns(row.get("system"), *earlier, ("user", instruction(row, "input")))


def alpaca(row: dict[str, Any]) -> Messages:
    return [*alpaca_prompt(row), {"role": "assistant", "content": as_text(row["output"])}]


def has_rounds(row: dict[str, Any]) -> bool:
    """Whether `history` is a list of pairs of texts. Any other one is not read."""
    rounds = row.get("history")
    return isinstance(rounds, list) and all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(text, str) for text in one) for one in rounds
    )


def _other_history(row: dict[str, Any]) -> frozenset[str]:
    return frozenset() if has_rounds(row) or row.get("history") in EMPTY else frozenset({"history"})


def _alpaca_meta(row: dict[str, Any]) -> dict[str, Any]:
    """The input, by which a repair finds it in the question."""
    return {"input": row["input"]} if row.get("input") else {}


def _dolly(row: dict[str, Any]) -> Messages:
    return as_turns(None, ("user", instruction(row, "context")), ("assistant", as_text(row["response"])))


def openai(row: dict[str, Any]) -> Messages:
    return as_list(row, "messages", "message")


def sharegpt(row: dict[str, Any]) -> Messages:
    return [*as_turns(row.get("system")), *joined_calls(as_list(row, "conversations", "turn"))]


def _conversation(row: dict[str, Any]) -> Messages:
    return [*as_turns(row.get("system")), *joined_calls(spread(as_list(row, "conversation", "turn")))]


def _read_round(given: Any) -> Parsed:
    """A turn, or a round as in Capybara: {"input": "Hi", "output": "Hello"}"""
    if not isinstance(given, dict) or not given.keys() >= {"input", "output"} or _is_turn(given):
        message, unused = read_turn(given)
        return {"messages": [message]}, unused
    messages = as_turns(None, ("user", as_text(given["input"])), ("assistant", as_text(given["output"])))
    return {"messages": messages}, tuple(key for key in given if key not in {"input", "output"})


def _is_turn(given: Mapping[str, Any]) -> bool:
    """Whether this is a turn: in a table with both forms it has the keys of a round, with null."""
    is_round = given["input"] is not None or given["output"] is not None
    return not is_round and (given.get("from") is not None or given.get("role") is not None)


def _responses(row: dict[str, Any]) -> Messages:
    """A request to OpenAI's Responses API and its answer."""
    if row.get("previous_response_id") not in EMPTY:
        raise ValueError("the row has only the end of a conversation (previous_response_id)")
    asked = row["input"]
    items = [{"messages": as_turns(None, ("user", asked))}] if isinstance(asked, str) else as_list(row, "input", "item")
    return [*as_turns(row.get("instructions")), *answered([*items, *as_list(row, "output", "item")])]


def _openorca(row: dict[str, Any]) -> Messages:
    asked = ("user", as_text(row["question"]))
    return as_turns(row.get("system_prompt"), asked, ("assistant", as_text(row["response"])))


def gemini(row: dict[str, Any]) -> Messages:
    return [*instruction_of(row, *GEMINI_SYSTEM), *spread(as_list(row, "contents", "message"))]


def _bedrock(row: dict[str, Any]) -> Messages:
    return [*instruction_of(row, "system"), *spread(as_list(row, "messages", "message"))]


def _anthropic(row: dict[str, Any]) -> Messages:
    """A system prompt in a column of its own, unless the messages begin with one."""
    messages = spread(as_list(row, "messages", "message"))
    system = [] if _other_system(row) else instruction_of(row, "system")
    return messages if system == messages[:1] else [*system, *messages]


def _other_system(row: dict[str, Any]) -> frozenset[str]:
    """A column `system` that is not the system prompt: it is not text, or the messages begin with another one."""
    given, first = row.get("system"), spread(row["messages"][:1])
    if isinstance(given, list) or given in EMPTY:
        return frozenset()
    is_prompt = isinstance(given, str) and (first[0]["role"] != "system" or first[0]["content"] == given)
    return frozenset() if is_prompt else frozenset({"system"})


def _tool_choice(row: dict[str, Any]) -> dict[str, Any]:
    """The configuration of tools as it was, if it holds more than their definitions."""
    given = row.get("toolConfig")
    return {"toolConfig": given} if isinstance(given, dict) and set(given) - {"tools"} else {}


def _ultrachat(row: dict[str, Any]) -> Messages:
    turns = zip(cycle(("user", "assistant")), map(as_text, as_list(row, "data", "turn")), strict=False)
    return as_turns(None, *turns)


def _single(prompt: str, completion: str) -> Callable[[dict[str, Any]], Messages]:
    def messages(row: dict[str, Any]) -> Messages:
        return as_turns(row.get("system"), ("user", as_text(row[prompt])), ("assistant", as_text(row[completion])))

    return messages


def _prompt_completion(row: dict[str, Any]) -> Messages:
    """Two texts or, as in TRL, two lists of messages."""
    if not isinstance(row["prompt"], list) and not isinstance(row["completion"], list):
        return _single("prompt", "completion")(row)
    prompt, completion = as_conversation(row["prompt"], "user"), as_conversation(row["completion"], "assistant")
    return [*as_turns(row.get("system")), *prompt, *completion]


def _xlam(row: dict[str, Any]) -> Messages:
    calls, _ = tools.calls(row["answers"])
    answer = {"role": "assistant", "content": "", **({"tool_calls": calls} if calls else {})}
    return [*as_turns(row.get("system"), ("user", as_text(row["query"]))), answer]


GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}


def _glaive(row: dict[str, Any]) -> Messages:
    """Glaive's transcripts.

    Tools in the system prompt and calls are read from the text, as in other layouts (call_texts.py).

    {"system": "SYSTEM: Be brief.", "chat": "USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>"}  ->
    system "Be brief.", user "Hi", assistant "Hello"
    """
    chat = as_text(row["chat"]).strip()
    # a line may quote a role; rows of one line have no other mark
    between = r"\n\s*" if re.search(r"\n\s*ASSISTANT:", chat) else r"\s"
    before, *parts = re.split(rf"(?:^|{between})({'|'.join(GLAIVE_ROLES)}):", chat)
    if before.strip() or not parts:
        raise ValueError("expected a chat that begins with `USER:` or `ASSISTANT:`")
    texts = (text.strip().removesuffix("<|endoftext|>").strip() for text in parts[1::2])
    system = ("" if row["system"] in EMPTY else as_text(row["system"])).strip().removeprefix("SYSTEM:").strip()
    return as_turns(system, *zip(map(GLAIVE_ROLES.__getitem__, parts[::2]), texts, strict=True))


def _calls_with_more(row: Mapping[str, Any], column: str | None) -> dict[str, Any]:
    """The calls of a row as they were, if they have keys that are not used."""
    if not column or row.get(column) in EMPTY:
        return {}
    _, unused = tools.calls(row[column])
    return {column: row[column]} if unused else {}


def _instances(row: dict[str, Any]) -> list[Any]:
    """One row per instance, with its number.

    {"instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}]}  ->
    [{"instruction": "Add.", "input": "1, 2", "output": "3", "instance": 0}]

    Values of the row whose key the instance has too go to `row`. An instance that is not an object is unchanged.
    """
    shared = {key: value for key, value in row.items() if key != "instances"}
    as_text(shared["instruction"])
    rows: list[Any] = []
    for number, instance in enumerate(as_list(row, "instances", "instance")):
        if not isinstance(instance, dict):
            rows.append(instance)
            continue
        own = {"instance": number, **instance}
        rows.append(merged(shared, own))
    return rows


def merged(row: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A row with further values.

    Values of the row that differ from those go to `row`: {"x": 1}, {"x": 2}  ->  {"x": 2, "row": {"x": 1}}
    """
    hidden = {key: row[key] for key in more if key in row and row[key] != more[key]}
    if hidden and "row" in row:
        hidden["row"] = row["row"]
    return {**row, **more} | ({"row": hidden} if hidden else {})


OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def oasst_turn(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": OASST_ROLES.get(as_text(message["role"]), message["role"]), "content": as_text(message["text"])}


def replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Replies that were not deleted, best first: by rank, then those with replies, then in their order."""

    def order(reply: dict[str, Any]) -> tuple[bool, Any, bool]:
        if not isinstance(reply.get("rank"), int | float | None):
            raise ValueError(f"rank must be a number, found {type(reply['rank']).__name__}")
        return reply.get("rank") is None, reply.get("rank") or 0, not reply.get("replies")

    return sorted((reply for reply in all_replies(message) if not reply.get("deleted")), key=order)


def all_replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Replies to a message of a tree, also those that were deleted."""
    found = _object(message).get("replies") or []
    if not isinstance(found, list):
        raise ValueError(f"replies must be a list, found {type(found).__name__}")
    return [*map(_object, found)]


def _object(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"expected a message, found {type(message).__name__}")
    return message


def _thread(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The thread of best replies, starting at the prompt."""
    thread = [row["prompt"]]
    while found := replies(thread[-1]):
        thread.append(found[0])
    return thread


def _oasst(row: dict[str, Any]) -> Messages:
    messages = [oasst_turn(message) for message in _thread(row)]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("the tree has no assistant reply")
    return messages


def _tree(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers of messages of a tree by their use; `messages` is the sum of the others."""
    found = [row["prompt"]]
    for message in found:
        found += all_replies(message)
    kept, thread = len(_oasst(row)), len(_thread(row))
    others = {"unanswered": thread - kept, "other_branches": len(found) - thread}
    return {"tree": {"messages": len(found), "kept": kept, **others}}


def _classification(row: dict[str, Any]) -> Messages:
    """Use the names in `label_text`, if there are any, instead of numeric labels."""
    label = row["label" if row.get("label_text") in EMPTY else "label_text"]
    return as_turns(row.get("system"), ("user", as_text(row["text"])), ("assistant", as_label(label)))


def _layout(keys: str, messages: Callable[[dict[str, Any]], Messages], optional: str = "", **more: Any) -> Layout:
    return Layout(frozenset(keys.split()), messages, frozenset((keys + " " + optional).split()), **more)


LAYOUTS: dict[str, Layout] = {
    "alpaca": _layout("instruction output", alpaca, "input system history", unread=_other_history, meta=_alpaca_meta),
    "messages": _layout("messages", openai, turns={"messages": read_message}),
    "sharegpt": _layout("conversations", sharegpt, "system", turns={"conversations": read_turn}),
    "dolly": _layout("instruction response", _dolly, "context"),
    "instances": _layout(
        "instruction instances",
        alpaca,
        "input output system history",
        unread=_other_history,
        meta=_alpaca_meta,
        parts=_instances,
    ),
    "prompt_completion": _layout(
        "prompt completion", _prompt_completion, "system", turns={"prompt": read_message, "completion": read_message}
    ),
    "prompt_response": _layout("prompt response", _single("prompt", "response"), "system"),
    "question_answer": _layout("question answer", _single("question", "answer"), "system"),
    "flan": _layout("inputs targets", _single("inputs", "targets"), "system"),
    "ultrachat": _layout("data", _ultrachat),
    "xlam": _layout("query tools answers", _xlam, "system", meta=lambda row: _calls_with_more(row, "answers")),
    "glaive": _layout("system chat", _glaive, turns={"chat": read_turn}),
    "oasst": Layout(
        frozenset({"message_tree_id", "prompt"}),
        _oasst,
        frozenset({"prompt"}),
        _tree,
        of_tree=lambda row: _thread(row)[: len(_oasst(row))],
    ),
    "conversation": _layout("conversation", _conversation, "system", turns={"conversation": _read_round}),
    "openorca": _layout("question response", _openorca, "system_prompt"),
    "responses": _layout(
        "input output", _responses, "instructions", turns={"input": read_item, "output": read_item}, by_value=True
    ),
    "gemini": _layout("contents", gemini, " ".join(GEMINI_SYSTEM), turns=GEMINI_TURNS),
    "bedrock": _layout(
        "schemaVersion messages",
        _bedrock,
        "system",
        meta=_tool_choice,
        turns={"system": read_bedrock_instruction, "messages": read_bedrock_message},
        tool_keys=("toolConfig", *tools.TOOL_KEYS),
    ),
    "anthropic": _layout(
        "messages system",
        _anthropic,
        unread=_other_system,
        turns={"system": read_anthropic_instruction, "messages": read_anthropic_message},
    ),
    "classification": _layout(
        "text label",
        _classification,
        "label_text system",
        category="label",
        labels=True,
        unread=lambda row: frozenset() if row.get("label_text") in EMPTY else frozenset({"label"}),
    ),
    "text": _layout(
        "text",
        lambda row: as_turns(None, ("assistant", as_text(row["text"]))),
        meta=lambda row: {"kind": "text"},
        alone=True,
        tool_keys=(),
    ),
}


def is_text(messages: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> bool:
    """Whether a record is plain text from the `text` layout: one assistant message without a prompt."""
    return meta.get("kind") == "text" and [message["role"] for message in messages] == ["assistant"]


RECORD_FIELDS = {
    "prompt": True,
    "response": True,
    "system": False,
    "category": False,
    "tools": False,
    "tool_calls": False,
    "reasoning": False,
}
"""Field of a `mapping` -> whether it is required. With `tool_calls`, a response is not."""


def mapping_problem(mapping: Mapping[str, str], fields: Mapping[str, bool] = RECORD_FIELDS) -> str:
    """Why a mapping of fields to columns is invalid; empty if valid."""
    if unknown := [name for name in mapping if name not in fields]:
        return f"unknown field {', '.join(map(repr, unknown))}; fields: {', '.join(fields)}"
    answered = {"response"} if "tool_calls" in mapping else set()
    if missing := [name for name, needed in fields.items() if needed and name not in mapping and name not in answered]:
        return f"no column for {', '.join(missing)}"
    columns = [column for name, column in mapping.items() if (name, column) != ("category", mapping.get("response"))]
    if twice := [column for column in columns if columns.count(column) > 1]:
        return f"column {twice[0]!r} is named twice"
    return ""


def mapped(mapping: Mapping[str, str]) -> Layout:
    """Layout of a mapping. If response and category are the same column, responses are labels."""
    labels = "response" in mapping and mapping.get("category") == mapping["response"]
    required = ("prompt", "response" if "response" in mapping else "tool_calls")
    return Layout(
        keys=frozenset(mapping[name] for name in required if name in mapping),
        messages=lambda row: _mapped_messages(row, mapping, labels),
        meta=lambda row: _calls_with_more(row, mapping.get("tool_calls")),
        used=frozenset(mapping.values()) - ({mapping.get("category")} if not labels else set()),
        category=mapping.get("category", "category"),
        labels=labels,
        tool_keys=(mapping["tools"],) if "tools" in mapping else (),
    )


def _mapped_messages(row: dict[str, Any], mapping: Mapping[str, str], labels: bool) -> Messages:
    def column(name: str) -> Any:
        return row.get(mapping[name]) if name in mapping else None

    calls, _ = tools.calls(column("tool_calls") or [])
    said = "" if "response" not in mapping or (calls and column("response") is None) else row[mapping["response"]]
    answer: dict[str, Any] = {"role": "assistant", "content": as_label(said) if labels else as_text(said)}
    if (trace := column("reasoning")) and as_text(trace).strip():
        answer["reasoning_content"] = trace
    if calls:
        answer["tool_calls"] = calls
    return [*as_turns(column("system"), ("user", as_text(row[mapping["prompt"]]))), answer]
