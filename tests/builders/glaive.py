"""The 300 Glaive rows (ShareGPT with function calls) as canonical records, read without the project's layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builders.records import Record, call, result, rich, said, user


def glaive(path: Path) -> list[Record]:
    records = []
    for number, row in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        tools = [{"type": "function", "function": function} for function in json.loads(row["tools"])]
        messages = [_message(turn["from"], turn["value"]) for turn in row["conversations"]]
        records.append({**rich(*messages, tools=tools), "source": path.name, "source_row": number})
    return records


def _message(role: str, text: str) -> dict[str, Any]:
    if role == "function_call":
        made = json.loads(text)
        return said("", call(made["arguments"], made["name"]))
    return {"human": user, "gpt": said, "observation": result}[role](text)
