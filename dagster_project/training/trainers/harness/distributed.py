"""A training in several processes: the first starts the others, and all end with it. With a single process, every sum
here returns its input."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError, PedigreeError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch

READY, DONE = b"ready", b"done"

BUCKET = 2**23
"""Numbers that are summed in one call, to avoid a round trip per small tensor."""

_lost: list[str] = []
"""Why a process ended before its work was done."""


@dataclass(frozen=True)
class ProcessRank:
    """Rank of this process, and the number of processes."""

    rank: int
    """From 0; only process 0 writes files and receives stop requests."""
    size: int

    def does(self, number: int) -> bool:
        """Whether this process computes the n-th pass, from 0."""
        return number % self.size == self.rank


def place() -> ProcessRank:
    import torch.distributed as dist

    return ProcessRank(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else ProcessRank(0, 1)


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Replace the tensor by the sum over all processes. Every process gets the same bits."""
    import torch.distributed as dist

    if place().size > 1:
        refuse_lost()
        dist.all_reduce(tensor)
    return tensor


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Replace the tensor by that of the first process."""
    import torch.distributed as dist

    if place().size > 1:
        dist.broadcast(tensor, 0)
    return tensor


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


def refuse_lost() -> None:
    """Check that no process was lost. Also called before a sum is used, because on a GPU an interrupted sum raises no
    exception.

    Raises:
        PedigreeError: another process ended before its work was done.
    """
    if _lost:
        raise PedigreeError(_lost[0], "run again: training resumes from its newest checkpoint")


def claim_gpus(count: int) -> list[str]:
    """GPUs of `count` processes, empty on a CPU, by their names in CUDA_VISIBLE_DEVICES. From here on this process sees
    only its own GPU. Call it before CUDA starts.

    Raises:
        InputError: more processes than GPUs.
    """
    import torch

    found = torch.cuda.device_count()
    if not found:
        return [""] * count
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (named.split(",") if named else list(map(str, range(found))))[:found]
    if count > found:
        raise InputError(f"params.yaml: compute.processes: {count} processes, and there are {found} GPUs", f"set it to {found}")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]
    return gpus[:count]


@contextmanager
def process_group(gpus: Sequence[str], work: Callable[[], object]) -> Iterator[None]:
    """While open, this process is the first of a torch.distributed group: NCCL with one GPU each, or gloo on a CPU. The
    others run `work` without output. They end when this process ends, even if it is killed. They connect by a file and
    the loopback interface; no port is reachable from outside.

    Args:
        gpus: one for each process, including this one, from `claim_gpus`. With a single one no process is started.
        work: function of each other process. Picklable.
    Raises:
        PedigreeError: another process ended before its work was done.
    """
    count = len(gpus)
    if count == 1:
        yield
        return
    import multiprocessing

    import torch.distributed as dist

    spawn = multiprocessing.get_context("spawn")
    heard, closing = threading.Event(), threading.Event()
    listener: threading.Thread | None = None
    with tempfile.TemporaryDirectory() as folder:
        others = []
        ears: dict[Any, str] = {}
        try:
            for rank in range(1, count):
                ear, mouth = spawn.Pipe(duplex=False)
                others.append(spawn.Process(target=_work, args=(rank, count, gpus[rank], Path(folder), mouth, work), daemon=True))
                others[-1].start()
                mouth.close()
                ears[ear] = f"process {rank + 1} of {count}"
            for ear, name in ears.items():
                if wrong := _fault(ear, READY):
                    raise PedigreeError(f"{name} {wrong}", "run again")
            _join(0, count, Path(folder))
            listener = threading.Thread(target=_listen, args=(ears, heard, closing, dist.group.WORLD), daemon=True)
            listener.start()
            try:
                yield
            except RuntimeError:  # raised by torch.distributed if another process is gone, with a long message
                if heard.wait(5):
                    refuse_lost()
                raise
        finally:
            closing.set()
            for other in others:
                other.kill()
                other.join()
            if listener:
                listener.join()
            for ear in ears:
                ear.close()
            if dist.is_initialized():
                dist.destroy_process_group()
            _lost.clear()


def _join(rank: int, count: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback, TORCH_NCCL_ASYNC_ERROR_HANDLING="0")
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{folder / 'group'}",
        rank=rank,
        world_size=count,
        timeout=timedelta(hours=1),  # the first process may take long to write a checkpoint; lost processes are detected separately
    )


def _work(rank: int, count: int, gpu: str, folder: Path, mouth: Connection, work: Callable[[], object]) -> None:
    """Main function of another process. Only the first process handles stop requests; this one ends with it."""
    import multiprocessing

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    first = multiprocessing.parent_process()
    assert first

    def end_with_first() -> None:
        first.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_first, daemon=True).start()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    try:
        import torch.distributed  # noqa: F401 the import takes seconds; from here on the first process may wait

        mouth.send_bytes(READY)
        _join(rank, count, folder)
        work()
        mouth.send_bytes(DONE)
    except Exception as error:  # noqa: BLE001 the first process must be notified of any exception
        with suppress(OSError):
            mouth.send_bytes((str(error) if isinstance(error, PedigreeError) else traceback.format_exc()).encode())
        os._exit(1)


def _fault(ear: Connection, wanted: bytes) -> str:
    """Wait for the next message of another process; returns its fault, if any."""
    try:
        word = ear.recv_bytes()
    except EOFError:
        return "was killed"
    return "" if word == wanted else f"failed: {word.decode()}"


def _listen(ears: dict[Any, str], heard: threading.Event, closing: threading.Event, group: Any) -> None:
    """Wait until all others are done. If one is lost, no sum can complete: abort the current one."""
    from multiprocessing.connection import wait

    waiting: list[Any] = list(ears)
    while waiting:
        for ear in wait(waiting):
            waiting.remove(ear)
            if (wrong := _fault(ear, DONE)) and not closing.is_set():  # type: ignore[arg-type]
                _lost.append(f"{ears[ear]} {wrong}")
                heard.set()
                with suppress(RuntimeError):
                    group.abort()
                return
