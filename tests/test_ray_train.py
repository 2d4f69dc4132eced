"""Ray Train starts the same work as torch elastic (tests/test_processes.py), with the same bytes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.servers import free_port
from builders.training import LORA, make_data, output_files
from conftest import ROOT

from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.stages import adapter
from dagster_project.training.trainers.harness.launch import LAUNCHER, launch

pytestmark = pytest.mark.cluster
if importlib.util.find_spec("ray") is None and not os.environ.get("CI"):
    pytest.skip("ray is not installed: pip install '.[dev,cluster]'", allow_module_level=True)


def first_process(work: dict[str, Any]) -> None:
    raise InputError("the first cannot", "help it")


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import ray  # not before the variables of another test file are set: Ray reads them once

    folder = Path(tempfile.mkdtemp(prefix="ped-", dir="/tmp"))  # Ray's sockets need a short path
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_register_timeout_seconds": "300", LAUNCHER: "ray"}.items():
        monkeypatch.setenv(name, value)
    try:
        ray.init(
            "local",
            num_cpus=3,
            object_store_memory=80_000_000,
            include_dashboard=True,  # Ray Train asks it whether a training still runs, and ends the processes without an answer
            dashboard_port=free_port(),
            _temp_dir=str(folder),
            runtime_env={
                "env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1", "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5"}
            },
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def train(folder: Path, model: Path, name: str) -> dict[str, bytes]:
    out = folder / name
    out.mkdir()
    compute = Compute(threads=1, dtype="float32", processes=2)
    params = adapter.Params(**LORA)
    report = adapter.produce("x", params, compute, folder / "tokenized", model, out, out / "loss.csv", folder / "checkpoints" / name)
    (out / "report.json").write_text(json.dumps(report.document()))
    return output_files(folder, name)


def test_ray_train_gives_the_bytes_of_torch_elastic(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    make_data(tmp_path)
    with caplog.at_level("INFO", "pedigree"):
        on_ray = train(tmp_path, tiny_model, "on_ray")
    assert any(record.getMessage().startswith("training: step 6, validation loss") for record in caplog.records)
    with pytest.raises(InputError, match="the first cannot\nhint: help it"):
        launch(2, __name__, {})
    monkeypatch.delenv(LAUNCHER)
    assert train(tmp_path, tiny_model, "by_elastic") == on_ray
