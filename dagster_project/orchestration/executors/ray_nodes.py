"""A training on several nodes of a Ray cluster, as one job (docs/decisions/026).

Ray Train (TorchTrainer) reserves all nodes at once and starts one worker on each. The first does what worker.py does
for a stage on one node. The others get the same inputs, and start their processes of the training by torch elastic, as
`torchrun` does on another host. The job's own process reserves nothing: it forwards messages, and ends when the workers
do.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster_project.core.errors import PedigreeError
from dagster_project.core.imports import lean_imports
from dagster_project.core.workers import end_with_parent
from dagster_project.orchestration import processes
from dagster_project.orchestration.executors import messages
from dagster_project.training.trainers.harness import distributed
from dagster_project.training.trainers.harness.launch import HIDDEN, START_METHOD, WAIT

WAITING = 60.0
"""Interval of log lines about nodes that are not free yet, in seconds."""
GRACE = 60.0
"""Seconds after which an error of another node ends the stage. Usually the first node reports it before."""
ENDED = 10.0
"""Seconds for the processes of another node to end when the stage has."""
JOIN_SECONDS = 900
"""Seconds for the processes of a node to find those of the first; as in harness/launch.py."""
ENDED_BY_ITSELF = "its part of the training failed"
LOG_LENGTH = 3000
"""Characters of the output of a node's processes that are sent if they fail."""
KILLED, FAILED = 9, 1
"""Exit codes of the process that starts a node's part of a training: one was killed, or ended by itself."""
SET_BY_RAY_TRAIN = ("NODE_RANK", "ACCELERATE_TORCH_DEVICE")
"""Variables of its group, in addition to those of torch elastic. The stage's processes form another group."""


class WorkerEnded(Exception):
    """A worker has no result. Ray Train ends the others when one of them fails."""


# in the job's own process


def run(job: Mapping[str, Any], lost: int) -> int:
    """Run the stage on all nodes.

    Args:
        job: as the driver wrote it (ray.py, `_Run.description`).
        lost: exit code of a worker that was lost.
    Returns:
        Exit code of the job.
    """
    with lean_imports("rfc3987_syntax"):
        import ray
        import ray.train.torch  # imports torch, which has to happen in the main thread
        from ray.util.queue import Empty, Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # workers begin in the folder with the project's files
    ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    ended: list[str] = []
    training = threading.Thread(target=lambda: ended.append(_train(job, queue)), daemon=True)
    training.start()
    code, begun, noted = None, False, time.monotonic()
    while training.is_alive() or not queue.empty():
        if not begun and time.monotonic() - noted > WAITING:
            noted = time.monotonic()
            each = ", ".join(f"{amount:g} {name}" for name, amount in job["reserved"].items())
            messages.send("log", f"{job['address']}: Ray Train waits for {job['nodes']} nodes with {each} each")
        with suppress(Empty):
            kind, content = queue.get(timeout=1)
            if kind == "exit":
                code = content if code is None else code
            else:
                begun = begun or kind == "hello"
                messages.send(kind, content)
    if code is None:
        messages.send("log", f"{job['address']}: a node was lost: {ended[0] if ended else 'Ray Train ended'}")
        return lost
    return code


def _train(job: Mapping[str, Any], queue: Any) -> str:
    """Let Ray Train run `_work` on all nodes. Returns why it ended; "" after success."""
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    reserved = job["reserved"]
    with tempfile.TemporaryDirectory(prefix="pedigree-nodes-") as folder:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": dict(job), "queue": queue},
            torch_config=TorchConfig(backend="gloo", timeout_s=int(WAIT.total_seconds())),
            scaling_config=ScalingConfig(
                num_workers=job["nodes"],
                use_gpu=reserved.get("GPU", 0) > 0,
                resources_per_worker=reserved,
                placement_strategy="STRICT_SPREAD",
                label_selector={"image": job["image"]} if job["image"] else None,
            ),
            # nothing is stored there; the driver submits a job again
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=0)),
        )
        try:
            trainer.fit()
        except (RayError, TrainingFailedError) as error:
            return " ".join(str(error).split())[:300]
    return ""


# in a worker of Ray Train


def _work(config: Mapping[str, Any]) -> None:
    """Main function of the worker on one node."""
    import ray

    from dagster_project.orchestration.executors import worker

    job, queue = config["job"], config["queue"]
    messages.receiver = lambda kind, content: queue.put((kind, content))
    code = worker.run(job, Group.join(job, ray.get_runtime_context().get_node_id()))
    if code or distributed.place().rank == 0:
        queue.put(("exit", code))
    if code:
        raise WorkerEnded(f"the worker on node {platform.node()} ended with exit code {code}")


@dataclass
class Group:
    """The workers of one job, which are one torch.distributed group."""

    nodes: int
    processes: int
    """Processes that train, on all nodes together."""
    endpoint: str
    """HOST:PORT at which the processes that train meet. The host is the first node."""
    names: str
    """Names of the nodes in the order of their ranks, each once."""
    ids: str
    """Ray's ids of the nodes."""
    address: str
    """The stage's."""
    _ended: list[str] = field(default_factory=list)
    """On another node: how the stage ended on the first one, once it has."""

    @classmethod
    def join(cls, job: Mapping[str, Any], node_id: str) -> Group:
        """All workers call it at the same time, in the group of Ray Train."""
        host = os.environ["MASTER_ADDR"]
        with socket.socket() as free:
            free.bind(("", 0))
            endpoint = distributed.document_from_first(f"{host}:{free.getsockname()[1]}")
        for name in (*HIDDEN, *SET_BY_RAY_TRAIN):
            os.environ.pop(name, None)
        found = distributed.documents([platform.node(), node_id])
        names, ids = (", ".join(dict.fromkeys(one)) for one in zip(*found, strict=True))
        return cls(job["nodes"], job["processes"], endpoint, names, ids, job["address"])

    @property
    def is_first(self) -> bool:
        return distributed.place().rank == 0

    def variables(self) -> dict[str, str]:
        """Environment of the stage's command on the first node: those of torchrun (harness/launch.py, `Nodes`)."""
        return {"PET_NNODES": str(self.nodes), "PET_RDZV_ENDPOINT": self.endpoint}

    def end(self) -> bool:
        """On the first node, when the stage has ended: end the processes of the other nodes.

        Returns:
            Whether all nodes answered. One that was lost does not: Ray Train then ends this worker.
        """
        try:
            distributed.document_from_first({})
            distributed.documents({})
        except RuntimeError:  # of gloo: a connection was closed
            return False
        return True

    def take_part(self, root: Path, environment: Mapping[str, str]) -> bool:
        """On another node: start its processes of the training, and wait until the stage has ended on the first one.

        Returns:
            False if one of these processes was killed, or the first node was lost.
        Raises:
            PedigreeError: the processes ended by themselves, and the stage on the first node did not.
        """
        given = [self.nodes, distributed.place().rank, self.processes // self.nodes, self.endpoint]
        command = [sys.executable, "-m", __name__, json.dumps(given)]
        threading.Thread(target=self._wait_for_the_end, daemon=True).start()
        with (root.parent / "training.log").open("w+b") as said:
            process = subprocess.Popen(command, cwd=root, env=dict(environment), stdout=said, stderr=said)
            try:
                failure = self._watch(process)
            finally:
                _end(process)
            if failure:
                said.seek(0)
                text = said.read().decode(errors="replace")[-LOG_LENGTH:]
                messages.send("log", f"{self.address}: node {platform.node()}: {failure}\n{text}".rstrip())
            if failure == ENDED_BY_ITSELF:
                raise PedigreeError(f"{self.address}: node {platform.node()}: {failure}", "see the lines above")
        if not failure:
            with suppress(RuntimeError):
                distributed.documents({})
        return not failure

    def _wait_for_the_end(self) -> None:
        try:
            distributed.document_from_first()
            self._ended.append("")
        except RuntimeError as error:
            self._ended.append(f"the first node was lost ({str(error).splitlines()[0]})")

    def _watch(self, process: subprocess.Popen[bytes]) -> str:
        """Wait for the end of the stage. Returns why this node's part ended before it, or "" if it did not."""
        failed: float | None = None
        while not self._ended:
            code = process.poll()
            if code is not None and code not in (0, FAILED):
                return "a process of the training was killed"
            if code == FAILED:
                failed = failed or time.monotonic()
                if time.monotonic() - failed > GRACE:
                    return ENDED_BY_ITSELF
            time.sleep(0.1)
        return self._ended[0]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # torch elastic ends the processes that it has started
    try:
        process.wait(ENDED)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# in the process that a worker starts


def main(nodes: int, rank: int, processes_here: int, endpoint: str) -> int:
    """Start the processes of this node. Returns the exit code."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes.end_with_parent()
    with tempfile.TemporaryDirectory(prefix="pedigree-group-") as folder:
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes_here,
            run_id="none",  # as in harness/launch.py
            rdzv_backend="static",
            rdzv_endpoint=endpoint,
            rdzv_configs={"rank": rank, "timeout": JOIN_SECONDS},
            max_restarts=0,
            start_method=START_METHOD,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, _member)()
        except ChildFailedError as failed:
            return KILLED if any(one.exitcode < 0 for one in failed.failures.values()) else FAILED
    return 0


def _member() -> None:
    """Main function of a process that trains."""
    from dagster_project.training.trainers.harness import launch

    end_with_parent()
    launch.main()


if __name__ == "__main__":
    from dagster_project.orchestration.executors import ray_nodes  # this module is `__main__` too

    sys.exit(ray_nodes.main(*json.loads(sys.argv[1])))
