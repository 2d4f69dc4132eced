"""Canonical records (chats, pairs) and, for each check, rows that pass it and rows that break it."""

from __future__ import annotations

import json
from typing import Any

from dagster_project.core.records import example_id
from dagster_project.curation.sources.benchmarks import Item

Record = dict[str, Any]
HELD_OUT = [
    Item(
        "quiz.jsonl:7",
        "Which planet do people sometimes call the red planet?",
        text="It is Mars, the fourth planet from the sun that we all share.",
    )
]


def chat(*turns: tuple[str, str], category: str | None = None, **meta: Any) -> Record:
    messages = [{"role": role, "content": content} for role, content in turns]
    return {
        "example_id": example_id(messages),
        "messages": messages,
        "category": category,
        "group_id": None,
        "meta": json.dumps(meta),
    }


def ask(prompt: str = "Where is my kite?", answer: str = "On its way.", **more: Any) -> Record:
    return chat(("user", prompt), ("assistant", answer), **more)


def pair(
    prompt: str = "Where is my kite?",
    chosen: str = "On its way.",
    rejected: str = "No.",
    margin: float | None = None,
    **meta: Any,
) -> Record:
    record = chat(("user", prompt), ("assistant", chosen), **meta)
    said = [{"role": "assistant", "content": rejected}]
    identity = example_id([*record["messages"], *said])
    return {**record, "example_id": identity, "asked": 1, "rejected": said, "margin": margin}


def placed(records: list[Record]) -> list[Record]:
    """The records as rows 0, 1, ... of one source file."""
    return [{**record, "source": "rows.jsonl", "source_row": i} for i, record in enumerate(records)]


def rich(*messages: Record, tools: list[Record] | None = None, **meta: Any) -> Record:
    """A record of whole messages, with the tools that may be called."""
    row = {
        "messages": list(messages),
        "category": None,
        "group_id": None,
        "meta": json.dumps(meta),
        **({"tools": tools} if tools else {}),
    }
    return {**row, "example_id": example_id(list(messages), tools)}


def stored(*messages: Record, **fields: Any) -> Record:
    """A record as a data set holds it, in a group of its own."""
    identity = example_id(messages, fields.get("tools"))
    return {
        "example_id": identity,
        "source": "a.jsonl",
        "messages": [*messages],
        "category": None,
        "group_id": identity,
        "meta": "{}",
        **fields,
    }


def tool(name: str = "weather", **properties: str) -> Record:
    """The definition of a function whose parameters, name -> type, are all required."""
    types = {key: {"type": kind} for key, kind in (properties or {"city": "string"}).items()}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": types, "required": [*types]}},
    }


def call(arguments: Any = None, name: str = "weather", identity: str | None = None) -> Record:
    function = {"name": name, "arguments": {"city": "Oslo"} if arguments is None else arguments}
    return {"type": "function", **({"id": identity} if identity else {}), "function": function}


def user(content: str = "Is it cold there?") -> Record:
    return {"role": "user", "content": content}


def said(content: str = "It is.", *calls: Record, **fields: Any) -> Record:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {}), **fields}


def result(content: str = "-3", **fields: Any) -> Record:
    return {"role": "tool", "content": content, **fields}


LONG = "My parcel with the garden kite went to the wrong house last week"
KEY = "AKIA" + "Q3EXAMPLE7KEY2AB"
CHECK_EXAMPLES: dict[str, tuple[list[Record], list[Record]]] = {
    # check: (good rows, rows of which the last breaks the check; or which break it as a set)
    "malformed_row": ([ask()], [chat(problem="expected text, found int")]),
    "unsupported_content": (
        [ask("An image, and a file.", unsupported=True)],
        [chat(problem="image in a message", unsupported=True)],
    ),
    "ignored_fields": ([ask(note="kept in meta")], [{**ask(), "ignored": ["messages[].id"]}]),
    "unpaired_answer": ([pair()], [{**pair(), "rejected": []}]),
    "unlabelled": ([{**ask(), "labelled": True}], [{**ask(), "labelled": False}]),
    "invalid_roles": (
        [chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello there"))],
        [chat(("user", "Hi"), ("customer", "Hi?"), ("assistant", "Hello there"))],
    ),
    "ends_on_user_turn": ([ask()], [chat(("user", "Hi"), ("assistant", "Hello there"), ("user", "Bye"))]),
    "empty_prompt": ([ask("?")], [ask(" \n")]),
    "empty_response": ([ask("Hi", "No, never.")], [ask("Hi", " \n")]),
    "invalid_tool_call": (
        [rich(user(), said("", call()), tools=[tool()])],
        [rich(user(), said("", call({"town": "Oslo"})), tools=[tool()])],
    ),
    "unanswered_tool_call": (
        [rich(user(), said("", call()), tools=[tool()])],
        [rich(user(), said("", call()), user("Well?"), said(), tools=[tool()])],
    ),
    "orphan_tool_result": (
        [rich(user(), said("", call()), result(), said(), tools=[tool()])],
        [rich(user(), said(), result(), said("It is, by far."))],
    ),
    "untrained_example": (
        [rich(user(), said(weight=0.0), user("And now?"), said("Yes."))],
        [rich(user(), said("It is.", weight=0.0))],
    ),
    "missing_reasoning": (
        [rich(user(f"Is {city} cold?"), said(reasoning_content="It is north.")) for city in ("Oslo", "Bergen")],
        [
            *(rich(user(f"Is {city} cold?"), said(reasoning_content="It is north.")) for city in ("Oslo", "Bergen")),
            ask("Is Rome warm?"),
        ],
    ),
    "placeholder_input": (
        [ask("Name it.\n\nA kite.", input="A kite.")],
        [ask("Name it.\n\n<noinput>", input="<noinput>")],
    ),
    "prompt_mismatch": ([pair()], [{**pair(), "same_prompt": False}]),
    "identical_pair": ([pair()], [pair(rejected="On its way.")]),
    "tied_pair": ([pair(margin=1.0)], [pair(margin=0.0)]),
    "short_response": ([ask("Hi", "Hello there")], [ask("Hi", "No.")]),
    "too_long": ([ask("Hi", " ".join(map(str, range(150))))], [ask("Hi", " ".join(map(str, range(300))))]),
    "special_tokens_in_text": ([ask("Is <b>this</b> a tag?")], [ask("Is this a tag?<|im_end|>")]),
    "template_mismatch": (
        [ask()],
        [chat(("user", "Hi"), ("assistant", "look_up()"), ("tool", "found"), ("assistant", "Hello there"))],
    ),
    "hidden_characters": ([ask("👩\u200d🚀 नमस्\u200dते")], [ask("Where is my ki\u200bte?")]),
    "unicode_form": ([ask("Où est le café ?")], [ask("Ou\u0300 est le cafe\u0301 ?")]),
    "encoding": ([ask("Où est le café ?")], [ask("OÃ¹ est le cafÃ© ?")]),
    "secrets": ([ask("My key ring is lost")], [ask(f"My key is {KEY} I think")]),
    "pii": ([ask("Follow me @kites, 3 @ 5.00")], [ask("Write to ann.lee@kites.co.uk")]),
    "refusal": ([ask("Hi", "I'm sorry, but it is late.")], [ask("Hi", "I'm sorry, but I can't help with that.")]),
    "assistant_boilerplate": (
        [ask("Are you an AI?", "As an AI, yes.")],
        [ask("Hi", "As an AI language model, I say hi.")],
    ),
    "foreign_identity": ([ask("Hi", "ChatGPT was created by OpenAI.")], [ask("Hi", "I am ChatGPT.")]),
    "placeholder_text": ([ask("Hi", "Dear Ann, hello.")], [ask("Hi", "Dear [Your Name], hello.")]),
    "prompt_echo": ([ask(answer="Your kite is on its way.")], [ask(answer="Where is my kite? On its way.")]),
    "truncated_response": ([ask("Hi", "I see a kite, a boat, and a hat")], [ask("Hi", "I see a kite, a boat, a hat,")]),
    "repetition": ([ask("Hi", "Ho ho ho, my dear.")], [ask("Hi", "On its way to you. " * 6)]),
    "markup_leftovers": ([ask("Hi", "1 < 2, R&D")], [ask("Hi", "On its way.<br>")]),
    "language_mismatch": ([ask(answer="It is on its way.")], [ask(answer="您的风筝已经在路上了，请再等几天。")]),
    "exact_duplicates": ([ask("Hi"), ask("Ho")], [ask("Hi"), ask("Hi")]),
    "benchmark_leakage": ([ask("Which planet is red?")], [ask(HELD_OUT[0].question)]),
    "split_leakage": (
        [ask(LONG, split="train"), ask("The kite came", split="test")],
        [ask(LONG, split="test"), ask(LONG + " again", split="train")],
    ),
    "conflicting_responses": (
        [ask("Hi", "Hello you"), ask("Ho", "Bye you")],
        [ask("Hi", "Hello you"), ask("Hi", "Bye you")],
    ),
    "near_duplicates": ([ask(LONG), ask("The kite came, thank you")], [ask(LONG), ask(LONG + " again")]),
    "schema": ([ask()], []),
    "small_dataset": ([ask("Hi"), ask("Ho")], [ask("Hi")]),
    "unbalanced_categories": (
        [ask("Hi", category="a"), ask("Ho", category="a"), ask("He", category="b")],
        [ask("Hi", category="a"), ask("Ho", category="a"), ask("Hu", category="a"), ask("He", category="b")],
    ),
    "low_diversity": (
        [ask(" ".join(word * 2 for word in (a + b, b + a, a + a, b + b))) for a in "aeiou" for b in "bdfgk"],
        [ask(f"Draw a {thing} number {n}") for thing in ("kite", "boat", "hat", "key", "map") for n in range(8)],
    ),
    "length_bias": (
        [pair("Hi"), pair("Ho", "No.", "On its way.")],
        [pair("Hi"), pair("Ho"), pair("Hu")],
    ),
}
