"""Threads, number format and determinism: what the machine adds to the identity of a run; and what becomes of freed memory, which changes no bit."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute

if TYPE_CHECKING:
    import torch

LARGE_BLOCK = 32 * 2**20
"""Bytes from which glibc gives a freed block back to the kernel. Smaller ones it keeps (mallopt(3), M_MMAP_THRESHOLD)."""


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


def reuse_large_blocks() -> None:
    """Let glibc keep large blocks too for the next tensor. The kernel fills each new one with zeros page by page: half the time of a step
    where there are logits of a whole vocabulary for many tokens. Nothing happens with another C library."""
    if mallopt := _of_glibc("mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


SLACK = 4 * LARGE_BLOCK
"""Bytes by which a process grows before it gives back what is freed: a page that is given back takes time when it is next used."""


def giving_back() -> Callable[..., None]:
    """A function, or forward hook, that lets glibc give what is freed back to the kernel if the process has grown by more than SLACK since it
    last did. Nothing happens with another C library."""
    import psutil

    malloc_trim, process = _of_glibc("malloc_trim"), psutil.Process()
    if not malloc_trim:
        return lambda *_: None
    least = process.memory_info().rss

    def give_back(*_: Any) -> None:
        nonlocal least
        now = process.memory_info().rss
        if now > least + SLACK:
            malloc_trim(0)
            least = process.memory_info().rss
        else:
            least = min(least, now)

    return give_back


def _of_glibc(function: str) -> Any:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


def _multiplies_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def available_memory(device: str, processes: int = 1) -> int:
    """Bytes that are free now for each process, which share a CPU's memory and have a GPU each; on a CPU a container's limit counts."""
    import psutil
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no version 2 control groups, or no limit
        return free // processes
    return min(free, limit - used) // processes


def peak_memory(device: str) -> int:
    """The most bytes that this process has held so far: resident on a CPU, what torch has allocated on a GPU."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would begin with the size of the process that started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac
