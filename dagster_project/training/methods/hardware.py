"""Device, dtype, threads and determinism, which are part of a run's identity, and memory settings, which are not."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core import waiting
from dagster_project.core.imports import hidden, import_transformers
from dagster_project.core.params import Compute
from dagster_project.core.torch_imports import lean_torch_imports
from dagster_project.core.versions import require_version

if TYPE_CHECKING:
    import torch

LARGE_BLOCK = 32 * 2**20
"""Bytes from which glibc returns a freed block to the kernel; it keeps smaller ones (mallopt(3), M_MMAP_THRESHOLD)."""


def prepare(compute: Compute) -> tuple[torch.device, torch.dtype]:
    """Set threads, seeds and deterministic kernels, and choose device and dtype."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import_libraries()
    import torch
    from transformers import set_seed
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    torch.set_num_threads(compute.threads)
    waiting.follow(compute.threads)
    set_seed(compute.seed)
    torch.set_deterministic_debug_mode("error")  # `use_deterministic_algorithms` imports the compiler, too
    # a debugging aid that fills every new tensor; no kernel here reads uninitialized memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if compute.dtype != "auto":
        return device, getattr(torch, compute.dtype)
    return device, torch.bfloat16 if _supports_bfloat16(device) else torch.float32


def import_libraries() -> None:
    """Import torch, transformers and PEFT in less time than their first use would take."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainers would report each training to the Hub
    # PEFT imports bitsandbytes for a function that is not used here (quantization imports it itself), accelerate boto3
    # for a command, and transformers scipy for losses of object detection; once loaded, it relies on what it found
    with lean_torch_imports("bitsandbytes", "boto3", *(() if "transformers" in sys.modules else ("scipy",))):
        import_transformers()
        import peft  # noqa: F401
        import transformers.trainer_utils  # noqa: F401


@contextmanager
def adding_adapters() -> Iterator[None]:
    """Without PEFT's layers for quantized weights unless a model has some.

    So without bitsandbytes, which imports torch's compiler.
    """
    import_libraries()
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    def forget() -> None:
        is_bnb_available.cache_clear()
        is_bnb_4bit_available.cache_clear()

    forget()
    try:
        with hidden("bitsandbytes"):  # imported already where weights are quantized
            yield
    finally:
        forget()


def reuse_large_blocks() -> None:
    """Let glibc keep large freed blocks for the next tensor. No effect with another C library.

    The kernel zeroes new blocks page by page, which takes half of a step with logits of many tokens over the whole
    vocabulary.
    """
    _set_thresholds(2**30, 2**31 - 1)


def return_large_blocks() -> None:
    """End `reuse_large_blocks`: free memory goes back to the kernel, now and later.

    Passes of many different sizes, as those of an evaluation, would each keep blocks of their own.
    """
    gc.collect()
    if _set_thresholds(LARGE_BLOCK, 2 * LARGE_BLOCK):
        _glibc_function("malloc_trim")(0)


def _set_thresholds(mapped: int, trimmed: int) -> bool:
    """Set glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes. False with another C library."""
    mallopt, (mmap_threshold, trim_threshold) = _glibc_function("mallopt"), (-3, -1)
    if mallopt:
        mallopt(mmap_threshold, mapped)
        mallopt(trim_threshold, trimmed)
    return bool(mallopt)


SLACK = 4 * LARGE_BLOCK
"""Bytes by which a process grows before freed memory is returned: a returned page takes time when it is used again."""


def memory_trimmer() -> Callable[..., None]:
    """A function or forward hook that returns freed memory to the kernel once the process has grown by more than SLACK.

    No effect with another C library than glibc.
    """
    import psutil

    malloc_trim, process = _glibc_function("malloc_trim"), psutil.Process()
    if not malloc_trim:
        return lambda *_: None
    least = process.memory_info().rss

    def trim(*_: Any) -> None:
        nonlocal least
        now = process.memory_info().rss
        if now > least + SLACK:
            malloc_trim(0)
            least = process.memory_info().rss
        else:
            least = min(least, now)

    return trim


def _glibc_function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _supports_bfloat16(device: torch.device) -> bool:
    """Whether the processor has bfloat16 products, without emulation."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch.cpu.get_capabilities is newer than the oldest supported torch
    require_version("torch", ">=2.9,<3", "torch.cpu._is_amx_tile_supported")
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def available_memory(device: str, processes: int = 1) -> int:
    """Free bytes per process. Processes share a CPU's memory, within the container's limit, and have a GPU each."""
    import psutil
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroups v2, or no limit
        return free // processes
    return min(free, limit - used) // processes


def peak_memory(device: str) -> int:
    """Peak bytes of this process so far: resident on a CPU, allocated by torch on a GPU."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage includes the size of the parent process
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
