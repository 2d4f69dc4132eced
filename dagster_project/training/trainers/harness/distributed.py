"""Arithmetic of a training in several processes (launch.py starts them).

With a single process, every sum here returns its input.
"""

from __future__ import annotations

import json
import os
import signal
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.text import many

if TYPE_CHECKING:
    import torch

ACCELERATE = ("ACCELERATE_", "FSDP_")
"""Beginnings of the names of accelerate's variables."""
BUCKET = 2**23
"""Numbers that are summed in one call, to avoid a round trip per small tensor."""


stop_signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask this process to stop. The first process of a group is only asked by its launcher, by another signal:
a terminal, DVC or Ray may send an interrupt to every process, and a second one would count as "immediately"."""


@dataclass(frozen=True)
class ProcessRank:
    """Rank of this process, and the number of processes."""

    rank: int
    """From 0; only process 0 writes files and receives stop requests."""
    size: int

    def does(self, number: int) -> bool:
        """Whether this process computes the n-th pass, from 0."""
        return number % self.size == self.rank


def ignore_accelerate_variables() -> None:
    """Remove variables that configure accelerate from this process' environment: the parameters alone decide.

    accelerate reads them for what its caller leaves out, such as mixed precision or weights that are not divided.
    """
    for name in [name for name in os.environ if name.startswith(ACCELERATE)]:
        del os.environ[name]


def place() -> ProcessRank:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return ProcessRank(dist.get_rank(), dist.get_world_size())
    return ProcessRank(0, 1)


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Replace the tensor by the sum over all processes, added in the order of their ranks.

    So every process gets the same bits, wherever the processes run: the order in which `all_reduce` adds depends on the
    algorithm that NCCL or gloo selects for the topology.
    """
    import torch
    import torch.distributed as dist

    size = place().size
    if size > 1:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, tensor.contiguous())
        for part in parts[1:]:
            parts[0] += part
        tensor.copy_(parts[0])
    return tensor


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Replace the tensor by that of the first process."""
    import torch.distributed as dist

    if place().size > 1:
        dist.broadcast(tensor, 0)
    return tensor


def document_from_first(document: Any = None) -> Any:
    """Send a JSON document from the first process to all others, which wait for it.

    Args:
        document: ignored except in the first process.
    """
    import torch

    if place().size == 1:
        return document
    text = json.dumps(document).encode() if place().rank == 0 else b""
    size = int(from_first(torch.tensor(len(text))))
    letters = torch.tensor(list(text), dtype=torch.uint8) if text else torch.empty(size, dtype=torch.uint8)
    return json.loads(bytes(from_first(letters).tolist()))


def documents(document: Any) -> list[Any]:
    """The JSON documents of all processes, by their ranks."""
    import torch
    import torch.distributed as dist

    if place().size == 1:
        return [document]
    text = torch.tensor(list(json.dumps(document).encode()), dtype=torch.uint8)
    sizes = torch.zeros(place().size, dtype=torch.int64)
    sizes[place().rank] = len(text)
    longest = int(summed(sizes).max())
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(text)] = text
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, sizes.tolist(), strict=True)]


def sum_gradients(parameters: Sequence[Any]) -> None:
    """Replace gradients by their sums over all processes; a missing gradient counts as zero."""
    import torch

    if place().size == 1:
        return
    bucket: list[torch.Tensor] = []
    for number, parameter in enumerate(parameters):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(map(torch.numel, bucket)) >= BUCKET or number == len(parameters) - 1:
            whole = summed(torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, part in zip(bucket, whole.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))
            bucket.clear()


def seed_of(seed: int, step: int, number: int) -> int:
    """The seed of the n-th pass of a step, so that its random numbers do not depend on the process that computes it."""
    return zlib.crc32(f"{seed} {step} {number}".encode())


def gpus_of(count: int) -> list[str]:
    """GPUs of `count` processes on this host by their names in CUDA_VISIBLE_DEVICES; empty names without a GPU.

    Raises:
        InputError: more processes than GPUs.
    """
    import torch

    found = torch.cuda.device_count()
    if not found:
        return [""] * count
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (named.split(",") if named else list(map(str, range(found))))[:found]
    if count > len(gpus):
        problem = f"params.yaml: compute.processes: {many(count, 'process', 'processes')} on this host"
        raise InputError(f"{problem}, which has {many(len(gpus), 'GPU')}", "use at most one process per GPU")
    return gpus[:count]


def claim_gpu() -> None:
    """Let this process see only its own GPU, the first one. Call it before CUDA starts."""
    [gpu] = gpus_of(1)
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
