"""A surface that does what no part of the project may do, for the tests of the fuzzer."""

from __future__ import annotations

import os
import random
from pathlib import Path

from fuzz import data_files
from fuzz.surface import Case, Surface


def draw(random: random.Random) -> Case:
    return {"number": random.random()}


def play(case: Case, folder: Path) -> str:
    kind = case.get("kind")
    while kind == "hang":
        pass
    if kind == "die":
        os.abort()
    if kind == "traceback":
        raise KeyError("x")
    if kind == "lost row":
        return data_files.play(
            {
                "files": {"a.jsonl": '{"prompt": "a", "completion": "b"}\n'},
                "data": "a.jsonl",
                "rows": 2,
                "options": None,
            },
            folder,
        )
    return "fine"


SURFACE = Surface("broken", 3, draw, play)
