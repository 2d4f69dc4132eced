"""Files of a new user: invented questions and answers, no two alike, in each
layout of examples and for each recipe of examples/."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = 40
"""Good rows of a file."""
SPLIT_OF = ("train", "train", "test", "train", "train", "validation", "train", "test", "train", "train")
"""Split of each row, by the last digit of its number."""
SYLLABLES = [consonant + vowel for consonant in "bdfglmnprst" for vowel in "aeiou"]

Row = dict[str, Any]
Make = Callable[[str, str], Row]


def oasst(prompt: str, answer: str) -> Row:
    reply = {"role": "assistant", "text": answer, "rank": 0, "replies": []}
    return {"message_tree_id": prompt, "prompt": {"role": "prompter", "text": prompt, "replies": [reply]}}


def xlam(prompt: str, answer: str) -> Row:
    tools = [
        {
            "name": "note",
            "description": "Write a note.",
            "parameters": {"text": {"type": "str", "description": "The note."}},
        }
    ]
    calls = [{"name": "note", "arguments": {"text": answer}}] if answer else []
    return {"query": prompt, "tools": json.dumps(tools), "answers": json.dumps(calls)}


def messages(prompt: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


LAYOUTS: dict[str, Make] = {
    "alpaca": lambda prompt, answer: {"instruction": prompt, "input": "", "output": answer},
    "messages": messages,
    "sharegpt": lambda prompt, answer: {
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    },
    "conversation": lambda prompt, answer: {"conversation": messages(prompt, answer)["messages"]},
    "openorca": lambda prompt, answer: {"system_prompt": "", "question": prompt, "response": answer},
    "responses": lambda prompt, answer: {
        "input": prompt,
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": answer}]}],
    },
    "gemini": lambda prompt, answer: {
        "contents": [
            {"role": "user", "parts": [{"text": prompt}]},
            {"role": "model", "parts": [{"text": answer}]},
        ]
    },
    "bedrock": lambda prompt, answer: {
        "schemaVersion": "bedrock-conversation-2024",
        "messages": [
            {"role": "user", "content": [{"text": prompt}]},
            {"role": "assistant", "content": [{"text": answer}]},
        ],
    },
    "anthropic": lambda prompt, answer: {"system": "Be brief.", **messages(prompt, answer)},
    "dolly": lambda prompt, answer: {"instruction": prompt, "context": "", "response": answer},
    "prompt_completion": lambda prompt, answer: {"prompt": prompt, "completion": answer},
    "prompt_response": lambda prompt, answer: {"prompt": prompt, "response": answer},
    "question_answer": lambda prompt, answer: {"question": prompt, "answer": answer},
    "flan": lambda prompt, answer: {"inputs": prompt, "targets": answer},
    "ultrachat": lambda prompt, answer: {"id": prompt, "data": [prompt, answer]},
    "oasst": oasst,
    "instances": lambda prompt, answer: {"instruction": prompt, "instances": [{"input": "", "output": answer}]},
    "glaive": lambda prompt, answer: {
        "system": "SYSTEM: Be brief.\n",
        "chat": f"USER: {prompt}\n\n\nASSISTANT: {answer} <|endoftext|>\n\n\n",
    },
    "classification": lambda prompt, answer: {"text": prompt, "label": answer},
    "xlam": xlam,
    "text": lambda prompt, answer: {"text": f"{prompt} {answer}" if answer else ""},
}
"""Layout -> a row of it with this question and answer."""


@dataclass(frozen=True)
class Data:
    """Rows of a file, and what a reader of the file expects of them."""

    rows: Sequence[Row]
    questions: Sequence[str]
    """The question of each good row, which occurs nowhere else in the file but in a copy of the row."""

    def questions_in(self, split: str) -> set[str]:
        """Questions of the good rows that belong to a split."""
        return {question for i, question in enumerate(self.questions) if SPLIT_OF[i % 10] == split}

    def write(self, path: Path) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


def texts(count: int, words: int, seed: int) -> list[str]:
    """Sentences of invented words, no two of which are near-copies."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices(SYLLABLES, k=3)) for _ in range(600)]
    return [f"{' '.join(draw.choices(vocabulary, k=words)).capitalize()}." for _ in range(count)]


def questions(count: int = ROWS, seed: int = 1) -> list[str]:
    return [f"{text[:-1]}?" for text in texts(count, 10, seed)]


def data_of(make: Make, answers: Sequence[str]) -> Data:
    """Good rows with a split each; then a copy of the first row, and a row without an answer, which the checks drop."""
    *prompts, last = questions(len(answers) + 1)
    rows = [
        {**make(prompt, answer), "split": SPLIT_OF[i % 10]}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    return Data([*rows, rows[0], {**make(last, ""), "split": "train"}], prompts)


def layout_data(layout: str) -> Data:
    data = data_of(LAYOUTS[layout], texts(ROWS, 8, seed=2))
    if layout == "text":  # detected only without any other key
        return Data([{"text": row["text"]} for row in data.rows], data.questions)
    return data


def labels() -> Data:
    return data_of(LAYOUTS["classification"], [("merula", "corvus", "pica", "turdus")[i // 10] for i in range(ROWS)])


def structured() -> Data:
    answers = [
        json.dumps({"summary": text, "category": ("bug", "question", "idea")[i % 3]})
        for i, text in enumerate(texts(ROWS, 4, seed=3))
    ]
    return data_of(messages, answers)


def reasoning() -> Data:
    return data_of(messages, [f"<think>{text}</think>\n#### {i}" for i, text in enumerate(texts(ROWS, 6, seed=4))])


def pairs(count: int = ROWS) -> list[Row]:
    """Pairs with prompts of their own; the better answer is the shorter one."""
    better, worse = texts(count, 4, seed=5), texts(count, 8, seed=6)
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "split": SPLIT_OF[i % 10]}
        for i, (prompt, chosen, rejected) in enumerate(zip(questions(count, seed=7), better, worse, strict=True))
    ]


def write_pairs(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs()))


RECIPE_DATA: Mapping[str, Callable[[], Data]] = {
    "classification": labels,
    "structured-answers": structured,
    "free-text": lambda: layout_data("messages"),
    "tool-calls": lambda: layout_data("xlam"),
    "reasoning": reasoning,
    "preferences-dpo": lambda: layout_data("prompt_completion"),
    "grpo-rule-reward": structured,
    "domain-adaptation": lambda: layout_data("text"),
    "full-fine-tuning": lambda: layout_data("messages"),
    "several-variants": labels,
}
"""Recipe -> the data that its first lines ask for."""
WITH_PAIRS = ("preferences-dpo", "grpo-rule-reward")
