"""Calls of llama.cpp, by its binding llama-cpp-py-sync (llama_worker.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dagster_project.commands.model_files.processes import reason, run_python
from dagster_project.core.errors import InputError

BINDING = "llama_cpp_py_sync"
WORKER = Path(__file__).with_name("llama_worker.py")


@dataclass(frozen=True)
class Read:
    """How llama.cpp reads texts with the vocabulary of a file."""

    tokens: list[list[int]]
    """Of each text, with special tokens parsed, and added as the file says."""
    ends: list[bool]
    """Whether it ends an answer at each of the tokens asked for."""


def is_installed() -> bool:
    return find_spec(BINDING) is not None


def quantize(source: Path, target: Path, form: str) -> None:
    """Raises:
    InputError: llama.cpp refuses the file.
    """
    _ask({"quantize": [str(source.absolute()), str(target.absolute()), form]}, f"cannot quantize the model to {form}")


def tokenize(file: Path, texts: Sequence[str], ends: Sequence[int]) -> Read:
    """Raises:
    InputError: llama.cpp cannot load the vocabulary.
    """
    return Read(
        **_ask(
            {"tokenize": str(file.absolute()), "texts": list(texts), "ends": list(ends)},
            "cannot load the vocabulary of the file",
        )
    )


def logits(file: Path, ids: Sequence[int]) -> Any:
    """Logits (tokens, vocabulary) of one text, float32. A temporary file is beside the GGUF file.

    Raises:
        InputError: llama.cpp cannot load the file.
    """
    import numpy as np

    target = file.absolute().with_suffix(".logits")
    try:
        size = _ask({"logits": str(file.absolute()), "ids": list(ids), "target": str(target)}, "cannot load the model")[
            "vocabulary"
        ]
        return np.fromfile(target, dtype=np.float32).reshape(len(ids), size)
    finally:
        target.unlink(missing_ok=True)


def _ask(request: dict[str, Any], failed: str) -> dict[str, Any]:
    done = run_python(["-P", str(WORKER)], json.dumps(request).encode())
    if done.returncode:
        raise InputError(
            f"llama.cpp {failed}: {reason(done)}", "serve the model in another format, e.g. --format safetensors"
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
