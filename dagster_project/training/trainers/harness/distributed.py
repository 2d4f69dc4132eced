"""Several processes, one training: the first starts the others, and all end with it. Without others, every sum here is what it was."""

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
"""Numbers that are summed in one call; many small tensors would each cost a round trip."""

_lost: list[str] = []
"""What became of a process that ended before its work was done."""


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is."""

    rank: int
    """From 0; the first alone writes and is asked to stop."""
    size: int

    def does(self, number: int) -> bool:
        """Is the pass of this number, from 0, ours?"""
        return number % self.size == self.rank


def place() -> Place:
    import torch.distributed as dist

    return Place(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else Place(0, 1)


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in place the sum of those of all processes. Every process gets the same bits."""
    import torch.distributed as dist

    if place().size > 1:
        refuse_lost()
        dist.all_reduce(tensor)
    return tensor


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in place that of the first process."""
    import torch.distributed as dist

    if place().size > 1:
        dist.broadcast(tensor, 0)
    return tensor


def sum_gradients(parameters: Sequence[Any]) -> None:
    """Gradients become the sums of those of all processes; that of a parameter without one counts as zero."""
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
    """The seed of the n-th pass of a step, so that what is random in it does not depend on the process that does it."""
    return zlib.crc32(f"{seed} {step} {number}".encode())


def refuse_lost() -> None:
    """To be asked also before anything that was summed is kept: on a GPU a sum that was broken off raises nothing by itself.

    Raises:
        PedigreeError: another process ended before its work was done.
    """
    if _lost:
        raise PedigreeError(_lost[0], "run again: training goes on from its newest checkpoint")


def claim_gpus(count: int) -> list[str]:
    """The GPUs of so many processes, none on a CPU, by the names that CUDA_VISIBLE_DEVICES knows them by. This process sees its own alone from here on.

    To be called before CUDA starts.

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
    """While open, this process is the first of a group that torch.distributed joins: NCCL with a GPU each, or gloo on a CPU.

    The others do `work` and are silent. They end when this ends, however it does: by a kill too. They meet over a file and the loopback interface;
    no port is open to others.

    Args:
        gpus: one for each process, this one included, as `claim_gpus` gives them. One starts none.
        work: what each other process does. Picklable.
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
                if wrong := _wrong(ear, READY):
                    raise PedigreeError(f"{name} {wrong}", "run again")
            _join(0, count, Path(folder))
            listener = threading.Thread(target=_listen, args=(ears, heard, closing, dist.group.WORLD), daemon=True)
            listener.start()
            try:
                yield
            except RuntimeError:  # what torch.distributed raises where a partner is gone, in many words
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
        timeout=timedelta(hours=1),  # the first may take long to write a checkpoint; that one is gone is heard of otherwise
    )


def _work(rank: int, count: int, gpu: str, folder: Path, mouth: Connection, work: Callable[[], object]) -> None:
    """What another process does. Stopping is the first one's business; its end is the end of this."""
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
        import torch.distributed  # noqa: F401  it takes seconds; from here on the first one may wait

        mouth.send_bytes(READY)
        _join(rank, count, folder)
        work()
        mouth.send_bytes(DONE)
    except Exception as error:  # noqa: BLE001  whatever it is, the first must hear of it
        with suppress(OSError):
            mouth.send_bytes((str(error) if isinstance(error, PedigreeError) else traceback.format_exc()).encode())
        os._exit(1)


def _wrong(ear: Connection, wanted: bytes) -> str:
    """Wait for the next word of another process; what is wrong with it, if anything is."""
    try:
        word = ear.recv_bytes()
    except EOFError:
        return "was killed"
    return "" if word == wanted else f"failed: {word.decode()}"


def _listen(ears: dict[Any, str], heard: threading.Event, closing: threading.Event, group: Any) -> None:
    """Wait until all others are done. If one is lost, no sum will ever be complete: break off the one under way."""
    from multiprocessing.connection import wait

    waiting: list[Any] = list(ears)
    while waiting:
        for ear in wait(waiting):
            waiting.remove(ear)
            if (wrong := _wrong(ear, DONE)) and not closing.is_set():  # type: ignore[arg-type]
                _lost.append(f"{ears[ear]} {wrong}")
                heard.set()
                with suppress(RuntimeError):
                    group.abort()
                return
