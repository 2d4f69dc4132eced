"""Starts the processes of one training by torch elastic, the library behind `torchrun`.

Each process joins one torch.distributed group (NCCL with a GPU each, or gloo). The first runs `first_process` of a
module, the others its `other_process` on the JSON document that the first one sends (`start_others`). The caller waits,
relays the first process's log and stop requests, and returns its result. On one host no port is opened: rendezvous and
group meet in files, and data crosses the loopback interface.

On several hosts the others are started by `torchrun` itself: `torchrun ... -m
dagster_project.training.trainers.harness.launch`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dagster_project.core import faults
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.params import Compute, Section
from dagster_project.core.records import CheckResult, Report
from dagster_project.core.workers import end_with_parent
from dagster_project.training.trainers.harness import distributed

log = logging.getLogger("pedigree")

START_METHOD = "spawn"

STOP = signal.SIGUSR1
"""Sent to the first process to ask it to stop."""

LAUNCHER = "PEDIGREE_LAUNCHER"
"""Variable that selects the launcher: `ray` for Ray Train, which requires a connection to a Ray cluster; else torch
elastic."""

WAIT = timedelta(days=30)
"""The others may wait long for the first process (a sweep, a checkpoint); a lost process is noticed by torch elastic,
not by a timeout."""

LINGER = 5.0
"""Seconds after a failed exchange before a process ends: most likely another process was lost, and torch elastic then
names that one."""

PEDIGREE = "dagster_project."
"""Package of the modules that a process on another host accepts from the first process."""

HIDDEN = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""Variables that torch elastic sets. With them accelerate would wrap the model in DDP and divide the rows itself."""

AGAIN = "run again: training resumes from its newest checkpoint"


@dataclass(frozen=True)
class Nodes:
    """Hosts of a group, by the variables of `torchrun`."""

    count: int = 1
    endpoint: str = ""
    """HOST:PORT of the first host."""
    run_id: str = "none"
    """torchrun's own default."""
    local_address: str | None = None

    @classmethod
    def from_environment(cls) -> Nodes:
        """Raise InputError if a variable is missing or not a number."""
        count = os.environ.get("PET_NNODES", "1")
        if not count.isdigit() or int(count) < 1:
            hint = "set it to a number, such as 2, or unset it"
            raise InputError(f"PET_NNODES: {count!r} is not a number of hosts", hint)
        if int(count) == 1:
            return cls()
        if os.environ.get("PET_NODE_RANK", "0") != "0":
            hint = "start the other hosts by torchrun, see docs/methods.md"
            raise InputError("PET_NODE_RANK: stages run on the first host, 0", hint)
        endpoint = os.environ.get("PET_RDZV_ENDPOINT", "")
        if not endpoint.rpartition(":")[2].isdigit():
            problem = "PET_RDZV_ENDPOINT: HOST:PORT of this host is required for PET_NNODES > 1"
            raise InputError(problem, "for example 10.0.0.1:29400")
        return cls(int(count), endpoint, os.environ.get("PET_RDZV_ID", cls.run_id), os.environ.get("PET_LOCAL_ADDR"))

    def share(self, processes: int) -> int:
        """Processes per host.

        Raises:
            InputError: they do not divide evenly.
        """
        if processes % self.count:
            problem = f"params.yaml: compute.processes: {processes} do not divide evenly among {self.count} hosts"
            raise InputError(problem, "choose a multiple")
        return processes // self.count


def processes_here(processes: int) -> int | None:
    """Number of a group's processes on this host; None if Ray Train selects the nodes.

    Raises:
        InputError: they do not divide evenly among the hosts, or variables of `torchrun` are wrong.
    """
    return None if os.environ.get(LAUNCHER) == "ray" else Nodes.from_environment().share(processes)


def launch(processes: int, module: str, work: Mapping[str, Any]) -> Any:
    """Run a module's work in a group of processes and wait for its end.

    All processes end with this one, even if it is killed.

    Args:
        module: name of a module with `first_process(work) -> JSON document` and `other_process(document)`.
        work: JSON document.
    Returns:
        Result of the first process.
    Raises:
        InputError: the launchers of `LAUNCHER` and `torchrun` are both selected.
        PedigreeError: that of the first process, or another process ended before its work was done.
        KeyboardInterrupt: interrupted when the first process could not save.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if os.environ.get(LAUNCHER) == "ray":
        if os.environ.get("PET_NNODES", "1") != "1":
            problem = "Ray Train would start all processes, and leave those of torchrun waiting"
            raise InputError(
                f"{LAUNCHER}=ray and PET_NNODES are both set: {problem}",
                f"unset PET_NNODES to use the nodes of the Ray cluster, or {LAUNCHER} to use the hosts of torchrun",
            )
        from dagster_project.training.trainers.harness import ray_train

        return ray_train.launch(processes, module, work)
    nodes = Nodes.from_environment()
    gpus = distributed.gpus_of(nodes.share(processes))
    with tempfile.TemporaryDirectory(prefix="pedigree-group-") as name:
        folder = Path(name)
        document = {"module": module, "work": work, "gpus": gpus, "hosts": nodes.count}
        (folder / "work.json").write_text(json.dumps(document))
        with _quiet_elastic(), relayed_log(folder), _forwarded_requests(folder) as requests:
            try:
                elastic_launch(_config(nodes, len(gpus), folder), _member)(name)
            except ChildFailedError as failed:
                raise _reason(failed, folder, processes, bool(requests)) from None
        return json.loads((folder / "result.json").read_text())


def _config(nodes: Nodes, processes: int, folder: Path) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    settings: dict[str, Any]
    if nodes.count == 1:
        meeting, endpoint, settings = "c10d", str(folder / "rendezvous"), {"store_type": "file"}
    else:  # static: the rank of a host is given, so the first process is on this one
        meeting, endpoint, settings = "static", nodes.endpoint, {"rank": 0, "timeout": 900}
    return LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=processes,
        run_id=nodes.run_id,
        rdzv_backend=meeting,
        rdzv_endpoint=endpoint,
        rdzv_configs=settings,
        local_addr=nodes.local_address or ("127.0.0.1" if nodes.count == 1 else None),
        max_restarts=0,  # a training resumes from its checkpoint, in a new run
        start_method=START_METHOD,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "elastic")),
        signals_to_handle="SIGQUIT",  # the others are handled here, so that the first process can write a checkpoint
        shutdown_timeout=10,
    )


def is_first_host() -> bool:
    """Whether this process runs where the stage does."""
    return not _elsewhere


def refuse_differences(here: Mapping[str, str], first: Mapping[str, str]) -> None:
    """Compare what a training depends on with the first host.

    Raises:
        InputError: something differs; the message names it.
    """
    if differing := sorted(name for name, value in here.items() if first[name] != value):
        problem = f"this host differs from the first one: {', '.join(differing)}"
        raise InputError(problem, "use the same commit, versions and data on all hosts")


def portable(path: Path) -> str:
    """A path for the other processes: relative to the project, which another host may have elsewhere, if inside it."""
    full, project = path.resolve(), Path.cwd()
    return str(full.relative_to(project) if full.is_relative_to(project) else full)


def report_document(report: Report) -> dict[str, Any]:
    """A whole report as JSON, the result of a `first_process`."""
    return asdict(report)


def report_of_group(
    module: str, params: Section, compute: Compute, folders: Mapping[str, Path | None], **more: Any
) -> Report:
    """`launch` of a stage, whose `first_process` returns `report_document` of its report.

    Args:
        folders: by their names in the work; those that are None are left out.
        more: further parts of the work.
    """
    paths = {name: str(path.resolve()) for name, path in folders.items() if path}
    document = launch(compute.processes, module, {**settings_document(params, compute), "folders": paths, **more})
    return Report(**{**document, "checks": [CheckResult(**check) for check in document["checks"]]})


def settings_document(params: Section, compute: Compute) -> dict[str, Any]:
    """The parameters of a training in a work, without keys that the entry leaves out."""
    return {
        "params": params.model_dump(mode="json", exclude_unset=True, warnings=False),
        "compute": compute.model_dump(mode="json"),
    }


# in the group's processes


def _member(name: str) -> None:
    """Main function of a process on the first host."""
    folder = Path(name)
    given = json.loads((folder / "work.json").read_text())
    rank, world, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL if rank else signal.SIG_IGN)
    signal.signal(STOP, signal.SIG_IGN if rank else signal.default_int_handler)
    distributed.stop_signals = (STOP,)
    try:
        if rank:
            _silence()
        else:
            log_to(folder)
            (folder / "pid").write_text(str(os.getpid()))
        if given["gpus"][local]:
            os.environ["CUDA_VISIBLE_DEVICES"] = given["gpus"][local]
        _join(rank, world, f"file://{folder / 'group'}" if given["hosts"] == 1 else "env://")
        result = take_part(given["module"], given["work"])
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))
    except BaseException as error:  # noqa: BLE001 the launcher must be notified of any exception
        if isinstance(error, RuntimeError):
            time.sleep(LINGER)
        said = said_by(error)
        if given["hosts"] > 1 and isinstance(error, RuntimeError) and "onnection" in str(error):
            said = ["PedigreeError", f"a process on another host was lost ({str(error).splitlines()[0]})", AGAIN]
        (folder / f"error-{rank}.json").write_text(json.dumps(said))
        os._exit(1)


def said_by(error: BaseException) -> list[str]:
    """An exception as JSON: class, what, hint."""
    known = faults.explained(error, Path.cwd())
    if known is not None:
        return [type(known).__name__, known.what, known.hint]
    return ["KeyboardInterrupt" if isinstance(error, KeyboardInterrupt) else "", traceback.format_exc(), ""]


def backend() -> str:
    import torch

    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _join(rank: int, world: int, meeting: str) -> None:
    import torch.distributed as dist

    if meeting.startswith("file://"):
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    dist.init_process_group(backend(), init_method=meeting, rank=rank, world_size=world, timeout=WAIT)
    for name in HIDDEN:
        os.environ.pop(name, None)
    distributed.ignore_accelerate_variables()


_elsewhere = False
"""Whether `torchrun` started this process on another host."""

_started = False
"""Whether the first process has sent their work to the others."""


def start_others(document: Mapping[str, Any], module: str) -> None:
    """Let the other processes run `other_process` of a module on a JSON document. No effect with a single process."""
    global _started
    _started = True
    distributed.document_from_first({"module": module, "work": document})


def take_part(module: str, work: Any) -> Any:
    """The work of one process of a group, however it was started.

    Args:
        module, work: as for `launch`; the others take both from the first process, and `module` is what they accept.
    Returns:
        In the first process, the result.
    """
    global _started
    if distributed.place().rank == 0:
        _started = False
        result = importlib.import_module(module).first_process(work)
        if not _started:  # nothing to share
            distributed.document_from_first({})
        return result
    document = distributed.document_from_first()
    if document:
        if document["module"] != module and not document["module"].startswith(PEDIGREE):
            raise PedigreeError(f"the first process asks for {document['module']}, which is not of this package")
        importlib.import_module(document["module"]).other_process(document["work"])
    return None


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)


class _Relay(logging.Handler):
    """Writes log lines as JSON into the launcher's pipe."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.pipe = (folder / "log").open("a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        self.pipe.write(json.dumps([record.levelno, record.getMessage()]) + "\n")
        self.pipe.flush()


def log_to(folder: Path) -> None:
    log.handlers[:] = [_Relay(folder)]
    log.propagate = False
    log.setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in __main__.py, which this process does not run
    warnings.filterwarnings("ignore", category=FutureWarning)


# in the launcher


@contextmanager
def relayed_log(folder: Path) -> Iterator[None]:
    """Log the lines of the first process here."""
    os.mkfifo(folder / "log", 0o600)
    # open for writing too, so that it has no end
    pipe = os.fdopen(os.open(folder / "log", os.O_RDWR), "r+b", buffering=0)

    def relay() -> None:
        for line in iter(pipe.readline, b"\n"):
            with suppress(ValueError):  # cut off when the process was killed
                level, text = json.loads(line)
                log.log(level, text)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        pipe.write(b"\n")
        thread.join()
        pipe.close()


@contextmanager
def _forwarded_requests(folder: Path) -> Iterator[list[float]]:
    """Pass SIGINT and SIGTERM on to the first process, which stops where it can resume.

    Another one, at least a second later, ends all.
    """
    requests: list[float] = []

    def forward(number: int, _: Any) -> None:
        again = bool(requests) and time.monotonic() - requests[0] > 1
        requests.append(time.monotonic())
        known = (folder / "pid").exists()
        if known:
            with suppress(ProcessLookupError):
                os.kill(int((folder / "pid").read_text()), signal.SIGKILL if again else STOP)
        if again or not known:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    quit_before = signal.getsignal(signal.SIGQUIT)
    try:
        yield requests
    finally:
        for number, handler in {**before, signal.SIGQUIT: quit_before}.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_elastic() -> Iterator[None]:
    """Without torch elastic's own report of a failure, which `_reason` replaces, and without a port to meet at."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn")]
    levels = [logger.level for logger in loggers]
    share = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        os.environ.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
        if share is not None:
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = share
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(failed: Any, folder: Path, processes: int, asked: bool) -> BaseException:
    """The exception that ended a group: what the process that failed first wrote, or the signal that killed it."""
    rank, failure = min(failed.failures.items())
    path = folder / f"error-{rank}.json"
    kind, what, hint = json.loads(path.read_text()) if path.exists() else ("", "", "")
    if kind == "KeyboardInterrupt" or (asked and rank == 0 and not kind):
        return KeyboardInterrupt()
    if kind and rank == 0:
        return _error_class(kind)(what, hint)
    name = f"process {rank + 1} of {processes}"
    if what:
        return PedigreeError(f"{name} failed: {what}" + (f"\nhint: {hint}" if hint else ""), AGAIN)
    end = "was killed" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
    return PedigreeError(f"{name} {end}", AGAIN)


def error_of(path: Path) -> PedigreeError | None:
    """The error of the first process, if it wrote one."""
    if not path.exists():
        return None
    kind, what, hint = json.loads(path.read_text())
    return _error_class(kind)(what, hint) if kind else PedigreeError(what, AGAIN)


def _error_class(name: str) -> type[PedigreeError]:
    waiting, found = [PedigreeError], dict[str, type[PedigreeError]]()
    while waiting:
        kind = waiting.pop()
        found[kind.__name__] = kind
        waiting += kind.__subclasses__()
    return found.get(name, PedigreeError)


def main() -> None:
    """Main function of a process that `torchrun` started on another host."""
    global _elsewhere
    rank, world, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank == 0:
        raise SystemExit(
            "process 0 is the stage's own: run `pedigree run` on the first host,"
            " and torchrun with --node-rank 1 or more here"
        )
    gpus = distributed.gpus_of(int(os.environ["LOCAL_WORLD_SIZE"]))
    if gpus[local]:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local]
    _elsewhere = True
    _join(rank, world, "env://")
    try:
        take_part("", None)
    except PedigreeError as error:
        raise SystemExit(f"process {rank + 1} of {world}: {error}") from None


if __name__ == "__main__":
    from dagster_project.training.trainers.harness.launch import main  # this module is `__main__` too

    main()
