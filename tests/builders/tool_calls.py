"""Canonical records with tools, calls, reasoning and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dagster_project.core.records import example_id, write_ledger, write_records

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Temperature of a city in °C.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def record(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, source: str = "a.jsonl", row: int = 0
) -> dict[str, Any]:
    """A canonical record, with the row of its source."""
    return {
        "example_id": example_id(messages, tools),
        "source": source,
        "source_row": row,
        "messages": messages,
        "category": None,
        "group_id": None,
        "meta": "{}",
        **({"tools": tools} if tools else {}),
    }


def call(name: str, arguments: Any, identity: str | None = None) -> dict[str, Any]:
    return {
        "type": "function",
        **({"id": identity} if identity else {}),
        "function": {"name": name, "arguments": arguments},
    }


def weather() -> list[dict[str, Any]]:
    """A conversation with reasoning, a call and its result, and an assistant turn of weight 0."""
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello, who are you?"},
        {"role": "assistant", "content": "A bot.", "weight": 0.0},
        {"role": "user", "content": "Is it cold in Oslo?"},
        {"role": "assistant", "content": "", "reasoning_content": "I need the temperature first.",
         "tool_calls": [call("weather", {"city": "Oslo"}, "call_1")]},
        {"role": "tool", "content": '{"celsius": -3}', "tool_call_id": "call_1", "name": "weather"},
        {"role": "assistant", "content": "Yes, it is three degrees below zero."},
    ]  # fmt: skip


GLAIVE_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


def glaive(path: Path, rows: int) -> list[dict[str, Any]]:
    """The first rows of a ShareGPT file with function calls."""
    found = []
    for number, row in enumerate(json.loads(path.read_text(encoding="utf-8"))[:rows]):
        messages: list[dict[str, Any]] = []
        for turn in row["conversations"]:
            message = {"role": GLAIVE_ROLES[turn["from"]], "content": turn["value"]}
            if turn["from"] == "function_call":
                value = json.loads(turn["value"])
                message |= {"content": "", "tool_calls": [call(value["name"], value["arguments"])]}
            messages.append(message)
        tools = [{"type": "function", "function": tool} for tool in json.loads(row["tools"] or "[]")]
        found.append(record(messages, tools, path.name, number))
    return found


def write_data_set(folder: Path, records: list[dict[str, Any]]) -> Path:
    """An output of `raw_examples`, which `pedigree check` reads too."""
    stored = [{key: value for key, value in one.items() if key != "source_row"} for one in records]
    write_records(folder, stored)
    write_ledger(folder, [{**one, "outcome": "read", "why": ""} for one in records])
    return folder
