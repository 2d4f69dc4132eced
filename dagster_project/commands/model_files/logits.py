"""Whether llama.cpp computes a GGUF file as the model computes: the logits of a
prompt, by llama.cpp and by transformers in float32."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.commands.model_files import llama_cpp
from dagster_project.core.errors import InputError
from dagster_project.core.imports import lean_imports

if TYPE_CHECKING:
    import numpy as np

TOKENS = 128
"""Most tokens of the prompt."""
ROUNDING = {"f32": 0.05, "f16": 0.05, "bf16": 0.1, "q8_0": 0.25}
"""Number format of the weights -> largest distance that rounding explains, with much room: see docs/model-files.md."""


def refuse_others(file: Path, folder: Path, name: str, form: str, ids: Sequence[int]) -> float | None:
    """Args:
        file: GGUF.
        folder: of the same model.
        form: number format of the file, in `ROUNDING`.
        ids: tokens of a prompt.
    Returns:
        Mean distance over the tokens, as `distances`. None: llama.cpp is not
        installed, or memory does not suffice for the model in float32.
    Raises:
        InputError: llama.cpp cannot load the file, or computes something else.
    """
    if not llama_cpp.is_installed() or not _fits(folder):
        return None
    ids = list(ids[:TOKENS])
    served = llama_cpp.logits(file, ids)
    found = float(distances(_expected(folder, ids), served).mean())
    if not found <= ROUNDING[form]:  # also NaN
        raise InputError(
            f"{name}: llama.cpp computes other logits than the model: they differ"
            f" by {found:.0%} for a prompt of {len(ids)} tokens, and rounding explains {ROUNDING[form]:.0%}",
            "llama.cpp or its converter does not support a setting in the model's config.json;"
            " export the model with --format safetensors",
        )
    return found


def distances(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Length of the difference over the length of the expected logits around their mean.

    Args:
        expected: (tokens, vocabulary).
        found: the same; both may have columns at the end that no token has.
    Returns:
        (tokens,).
    """
    import numpy as np

    size = min(expected.shape[1], found.shape[1])
    expected, found = expected[:, :size].astype(np.float64), found[:, :size].astype(np.float64)
    around = expected - expected.mean(axis=1, keepdims=True)
    distance: np.ndarray = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(around, axis=1)
    return distance


def _fits(folder: Path) -> bool:
    from dagster_project.commands.model_files.convert import weights
    from dagster_project.training.methods.hardware import available_memory

    numbers = sum(int(prod(weight["shape"])) for weight in weights(folder))
    return 5 * numbers < available_memory("cpu")


def _expected(folder: Path, ids: Sequence[int]) -> Any:
    with lean_imports():
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    ).eval()
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0].numpy()
