"""Threads, number format and determinism: what the machine adds to the identity of a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dagster_project.errors import InputError
from dagster_project.params import Compute

if TYPE_CHECKING:
    import torch


def prepare(compute: Compute) -> tuple[torch.device, torch.dtype]:
    """Pin threads, seeds and deterministic kernels; say on which device and in which dtype to compute.

    Raises:
        InputError: params.yaml asks for a dtype that does not exist.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers import set_seed
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    torch.set_num_threads(compute.threads)
    set_seed(compute.seed)
    torch.use_deterministic_algorithms(True)
    # would write every new tensor once more, to show up reads that no kernel here does
    torch.utils.deterministic.fill_uninitialized_memory = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if compute.dtype not in {"auto", "bfloat16", "float32"}:
        raise InputError(f"params.yaml: compute.dtype: {compute.dtype!r} is unknown", "use auto, bfloat16 or float32")
    if compute.dtype != "auto":
        return device, getattr(torch, compute.dtype)
    return device, torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
