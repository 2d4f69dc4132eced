"""Starts the processes of one training by Ray Train, with the same work as launch.py.

Ray selects the nodes; the first process must be on this one, which has the stage's files. The others read the
training's inputs at the same paths.

An interrupt ends the group without a checkpoint: Ray runs the work in a thread, where Python handles no signals.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dagster_project.core.errors import PedigreeError
from dagster_project.training.trainers.harness import distributed
from dagster_project.training.trainers.harness.launch import (
    AGAIN,
    HIDDEN,
    WAIT,
    backend,
    error_of,
    log_to,
    relayed_log,
    said_by,
    take_part,
)

log = logging.getLogger("pedigree")


def launch(processes: int, module: str, work: Mapping[str, Any]) -> Any:
    """As `launch.launch`, on the connected Ray cluster, or else on that of RAY_ADDRESS or a local one.

    Raises:
        PedigreeError: that of the first process, or another process was lost.
    """
    import ray.exceptions
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory(prefix="pedigree-group-") as name:
        folder = Path(name)
        with relayed_log(folder):
            gpus = torch.cuda.is_available()
            trainer = TorchTrainer(
                _member,
                train_loop_config={"folder": name, "module": module, "work": json.dumps(work)},
                torch_config=_config_of_own_gpus(),
                scaling_config=ScalingConfig(num_workers=processes, use_gpu=gpus, placement_strategy="PACK"),
                run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=0)),
            )
            try:
                trainer.fit()
            except (ray.exceptions.RayError, TrainingFailedError) as error:
                other = PedigreeError(f"the processes on Ray failed: {error}", AGAIN)
                raise error_of(folder / "error-0.json") or other from None
        return json.loads((folder / "result.json").read_text())


def _config_of_own_gpus() -> Any:
    """Configuration of the group, in which each process sees only the GPU that Ray reserved for it.

    By default Ray shows the GPUs of all processes on a node to each of them; the first one would be used by all.
    """
    from ray.train.torch import TorchConfig

    parent: Any = TorchConfig().backend_cls

    class OwnGpus(parent):
        share_cuda_visible_devices = False

    class Config(TorchConfig):
        backend_cls = OwnGpus

    return Config(backend=backend(), timeout_s=int(WAIT.total_seconds()))


def _member(config: Mapping[str, str]) -> None:
    """Main function of a process that Ray Train started and joined to the group."""
    folder, rank = Path(config["folder"]), distributed.place().rank
    for name in HIDDEN:
        os.environ.pop(name, None)
    distributed.ignore_accelerate_variables()
    if rank == 0 and not folder.is_dir():
        raise RuntimeError("Ray placed the first process on another node than the stage's")
    try:
        if rank == 0:
            log_to(folder)
        result = take_part(config["module"], json.loads(config["work"]))
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))
    except Exception as error:
        if rank == 0:
            (folder / "error-0.json").write_text(json.dumps(said_by(error)))
        raise
