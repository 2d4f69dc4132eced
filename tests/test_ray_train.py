"""Ray Train starts the same work as torch elastic (tests/test_processes.py), with the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.cluster import Cluster
from builders.training import LORA, make_data, output_files, run_in_child
from conftest import ROOT, skip_without

from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.stages import adapter
from dagster_project.training.trainers.harness import launch as launching
from dagster_project.training.trainers.harness import ray_train
from dagster_project.training.trainers.harness.distributed import documents
from dagster_project.training.trainers.harness.launch import LAUNCHER, launch, start_others

pytestmark = pytest.mark.cluster

skip_without("ray", "moto")


def first_process(work: dict[str, Any]) -> Any:
    if not work:
        raise InputError("the first cannot", "help it")
    start_others(work, __name__)
    return documents(os.environ.get("CUDA_VISIBLE_DEVICES"))


def other_process(work: dict[str, Any]) -> None:
    documents(os.environ.get("CUDA_VISIBLE_DEVICES"))


@pytest.fixture
def on_ray(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is connected to the cluster, and Ray Train is selected."""
    for name, value in {**cluster.variables(), LAUNCHER: "ray"}.items():
        monkeypatch.setenv(name, value)
    import ray  # not before the variables are set: Ray reads them once

    variables = {
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
        "OMP_NUM_THREADS": "1",
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    }
    ray.init(f"127.0.0.1:{cluster.port}", runtime_env={"env_vars": variables})
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def by_elastic(tmp_path: Path, tiny_model: Path) -> dict[str, bytes]:
    """The files of a training in two processes of torch elastic; a child of
    this process, before it has threads of Ray."""
    make_data(tmp_path)

    def work() -> None:
        launching.START_METHOD = "fork"
        train(tmp_path, tiny_model, "by_elastic")

    assert run_in_child(work, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    return output_files(tmp_path, "by_elastic")


def train(folder: Path, model: Path, name: str) -> dict[str, bytes]:
    out = folder / name
    out.mkdir()
    compute = Compute(threads=1, dtype="float32", processes=2)
    params = adapter.Params(**{**LORA, "num_train_epochs": 1})
    report = adapter.produce(
        "x", params, compute, folder / "tokenized", model, out, out / "loss.csv", folder / "checkpoints" / name
    )
    (out / "report.json").write_text(json.dumps(report.document()))
    return output_files(folder, name)


@pytest.mark.long
def test_ray_train_gives_the_bytes_of_torch_elastic(
    tmp_path: Path, tiny_model: Path, by_elastic: dict[str, bytes], on_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "pedigree"):
        assert train(tmp_path, tiny_model, "on_ray") == by_elastic
    assert any(record.getMessage().startswith("training: step 2, validation loss") for record in caplog.records)
    with pytest.raises(InputError, match="the first cannot\nhint: help it"):
        launch(2, __name__, {})


@pytest.mark.long
def test_each_process_on_a_node_sees_only_its_own_gpu(
    cluster: Cluster, on_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node that claims to have two GPUs: Ray reserves them and sets the variable without looking at them."""
    import torch

    cluster.add("third", f"--address=127.0.0.1:{cluster.port}", "--num-cpus=2", "--num-gpus=2")
    try:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(ray_train, "backend", lambda: "gloo")
        assert sorted(launch(2, __name__, {"number": 1})) == ["0", "1"]
    finally:
        cluster.kill("third")
