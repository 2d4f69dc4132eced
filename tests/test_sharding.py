"""A model that is divided among processes by FSDP2 trains like a whole one, and resumes to the same bytes.

Run as a script this file is where they train: it loads the libraries once and forks what else would be started anew.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders.processes import Trained, at_pass, group, printed, run_main, train_all, tune, weights
from builders.training import LORA, make_data, output_files, ready_to_fork

from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.params import Compute
from dagster_project.stages import adapter
from dagster_project.training.methods.build import build
from dagster_project.training.planning import memory
from dagster_project.training.trainers.harness import checkpoint, distributed, sharding
from dagster_project.training.trainers.harness import launch as launching
from dagster_project.training.trainers.harness.launch import launch, start_others
from dagster_project.training.trainers.harness.params import Sharding
from dagster_project.training.trainers.harness.session import training_arguments

LORA_TWO_EPOCHS = {**LORA, "num_train_epochs": 2}
FULL = {**LORA_TWO_EPOCHS, "method": "full", "peft": {}, "neftune_noise_alpha": None, "learning_rate": 1e-3}
QLORA = {**LORA_TWO_EPOCHS, "method": "qlora", "peft": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}}
SHARDED: dict[str, Any] = {"sharding": {"fsdp": "full_shard"}}
GRADIENTS: dict[str, Any] = {"sharding": {"fsdp": "shard_grad_op"}, "gradient_checkpointing": True}

BOUNDS = {"full": 1e-6, "full_four": 1e-6, "lora": 1e-6, "qlora": 1e-3}
"""Largest difference of a weight from the unsharded training; products with 4-bit weights are in bfloat16."""


def main() -> None:
    import bitsandbytes
    import datasets
    import peft
    import trl

    assert bitsandbytes and datasets and peft and trl.SFTTrainer
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    launching.START_METHOD = "fork"
    ready_to_fork()

    def the_launcher_is_killed() -> None:
        group()[0].kill()

    def the_launcher_is_asked_to_stop() -> None:
        group()[0].send_signal(signal.SIGINT)

    def the_first_process_is_slow_to_make_a_folder() -> None:
        def remove_slowly(path: Path, remove: Callable[[Path], None] = checkpoint.remove) -> None:
            remove(path)
            time.sleep(0.3)

        checkpoint.remove = remove_slowly

    runs = (
        ("full", 2, 2, FULL, None),
        ("full_sharded", 2, 2, {**FULL, **SHARDED}, None),
        ("full_sharded_checkpointed", 2, 2, {**FULL, **GRADIENTS}, the_first_process_is_slow_to_make_a_folder),
        ("full_four", 4, 1, FULL, None),
        ("full_four_sharded", 4, 1, {**FULL, **SHARDED}, None),
        ("lora", 2, 2, LORA_TWO_EPOCHS, None),
        ("lora_sharded", 2, 2, {**LORA_TWO_EPOCHS, **SHARDED}, None),
        ("qlora", 2, 2, QLORA, None),
        ("qlora_sharded", 2, 2, {**QLORA, **SHARDED}, None),
        ("killed", 2, 2, {**FULL, **SHARDED}, lambda: at_pass(6, the_launcher_is_killed)),
        ("killed", 4, 2, {**FULL, **SHARDED}, None),
        ("killed", 2, 2, {**FULL, **SHARDED}, None),
        (
            "stopped",
            2,
            2,
            {**LORA_TWO_EPOCHS, **SHARDED, "save_strategy": "no"},
            lambda: at_pass(5, the_launcher_is_asked_to_stop),
        ),
        ("stopped", 2, 2, {**LORA_TWO_EPOCHS, **SHARDED, "save_strategy": "no"}, None),
    )
    train_all(folder, [(name, arrange, partial(tune, folder, model, name, *how)) for name, *how, arrange in runs])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Trained:
    """The folder of all trainings of `main`, and the exit codes of each."""
    folder = tmp_path_factory.mktemp("sharding")
    make_data(folder)
    return folder, json.loads(run_main(__file__, folder, tiny_model))


@pytest.mark.long
@pytest.mark.parametrize("name", BOUNDS)
def test_a_sharded_training_gives_the_weights_of_an_unsharded_one_within_bounds(trained: Trained, name: str) -> None:
    import torch

    whole, sharded = weights(trained, name), weights(trained, f"{name}_sharded")
    assert sharded.keys() == whole.keys()
    for key, weight in whole.items():
        torch.testing.assert_close(sharded[key], weight, atol=BOUNDS[name], rtol=0)
    files = [output_files(trained[0], n) for n in (name, f"{name}_sharded")]
    assert files[0].keys() == files[1].keys()
    assert files[0]["examples.parquet"] == files[1]["examples.parquet"]
    documents = [json.loads(file["training.json"]) for file in files]
    assert documents[1]["settings"].pop("sharding") == {"fsdp": "full_shard", "cpu_offload": False}
    assert documents[0]["settings"] == documents[1]["settings"]
    assert documents[0]["frozen"] == documents[1]["frozen"]
    assert documents[0]["processes"] == documents[1]["processes"]


@pytest.mark.long
def test_the_bounds_would_notice_another_training(trained: Trained) -> None:
    two, four = weights(trained, "full"), weights(trained, "lora")
    other = weights(trained, "qlora")
    assert two.keys() != four.keys() != other.keys()
    moved = json.loads((trained[0] / "full" / "training.json").read_text())["trained"]
    assert min(group["norm_of_change"] for group in moved.values()) > 100 * BOUNDS["full"]


@pytest.mark.long
def test_checkpointed_gradients_and_gathered_weights_change_no_bit(trained: Trained) -> None:
    import torch

    one, other = weights(trained, "full_sharded"), weights(trained, "full_sharded_checkpointed")
    assert all(torch.equal(other[name], weight) for name, weight in one.items())


@pytest.mark.long
def test_a_killed_training_resumes_to_the_same_bytes_with_as_many_processes(trained: Trained) -> None:
    folder, ends = trained
    assert ends["killed"] == [-signal.SIGKILL, 2, 0], printed(folder, "killed")
    assert re.search(
        r"step-00000002: this checkpoint is of 2 processes, .*as many\nhint: set compute.processes: 2,"
        r" or remove",
        (folder / "killed.said").read_text(),
    )
    assert "resuming from the checkpoint of step 2 of 4" in (folder / "killed.log").read_text()
    assert output_files(folder, "killed") == output_files(folder, "full_sharded")


@pytest.mark.long
def test_a_stopped_training_saves_the_parts_of_all_processes(trained: Trained) -> None:
    folder, ends = trained
    assert ends["stopped"] == [130, 0], printed(folder, "stopped")
    assert (folder / "stopped.said").read_text().startswith("interrupted at step 3; the next run resumes from there")
    name = "adapter_model.safetensors"
    assert output_files(folder, "stopped")[name] == output_files(folder, "lora_sharded")[name]


def kept_here(work: dict[str, str]) -> tuple[int, int]:
    """Bytes of weights that this process keeps, and of the whole model."""
    import torch
    from accelerate import Accelerator

    entry = adapter.Params.model_validate(work["params"])
    prepared = build(entry.method, entry.peft, Path(work["model"]), torch.device("cpu"), torch.float32, "adapter.x")
    whole = sum(weight.nbytes for weight in prepared.model.parameters())
    sharding.shard(prepared.model, Sharding(), torch.device("cpu"))
    assert all(map(sharding.is_sharded, prepared.model.parameters())), "a weight is whole in every process"
    assert getattr(Accelerator().state, "fsdp_plugin", None) is None, "a Trainer would divide the rows"
    return sum(weight.to_local().nbytes for weight in prepared.model.parameters()), whole


def save_in(folder: str, first: bool) -> None:
    """Write a checkpoint as the first process or another one does."""

    def write(add_parts: Callable[[Path], None]) -> None:
        Path(folder).mkdir(parents=True)
        add_parts(Path(folder))

    sharding.save({}, Path(folder), write if first else None)


def first_process(work: dict[str, Any]) -> list[int]:
    import torch

    start_others(work, __name__)
    if "folders" in work:
        save_in(work["folders"][0], first=True)
    here, whole = kept_here(work)
    return [here, int(distributed.summed(torch.tensor(here))), whole]


def other_process(work: dict[str, Any]) -> None:
    import torch

    if "folders" in work:
        save_in(work["folders"][1], first=False)
    distributed.summed(torch.tensor(kept_here(work)[0]))


@pytest.mark.parametrize("recipe", [FULL, LORA, QLORA], ids=["full", "lora", "qlora"])
def test_each_process_keeps_its_part_of_every_weight(
    recipe: dict[str, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "START_METHOD", "fork")
    here, together, whole = launch(2, __name__, {"model": str(tiny_model), "params": recipe})
    assert together == whole
    assert here <= 0.51 * whole


def test_variables_of_accelerate_do_not_change_what_is_divided(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "START_METHOD", "fork")
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_IGNORED_MODULES": ".*layers.*",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true",
        "FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT",
    }.items():
        monkeypatch.setenv(name, value)
    here, together, whole = launch(2, __name__, {"model": str(tiny_model), "params": FULL})
    assert together == whole
    assert here <= 0.51 * whole


def test_variables_of_accelerate_do_not_change_the_arguments_of_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    arguments = training_arguments(adapter.Params(), Compute(), str(tmp_path), "cpu", validates=False)
    assert TrainingArguments(**arguments).mixed_precision == "no"


def test_a_host_without_the_folder_of_checkpoints_is_named_when_the_first_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "START_METHOD", "fork")
    folders = [str(tmp_path / host / "step-00000002.unfinished") for host in ("one", "two")]
    with pytest.raises(PedigreeError, match=re.escape(f"checkpoints, {tmp_path}/two, is not shared with this host")):
        launch(2, __name__, {"folders": folders})


@pytest.mark.parametrize(
    ("entry", "processes", "message"),
    [
        (
            {"method": "lora"},
            1,
            "sharding: one process has nothing to share\nhint: set compute.processes, or leave it out",
        ),
        ({"method": "dora"}, 2, "method: dora is not supported with sharding\nhint: use full, lora, rslora, qlora"),
        ({"method": "lora", "optim": "adafactor"}, 2, "optim: adafactor is not supported with sharding"),
        (
            {"method": "full", "learning_rate": "auto"},
            2,
            "learning_rate: trials run in one process, which the model does not fit\nhint: set a",
        ),
        ({"method": "full", "compile": "layers"}, 2, "compile: is not supported with sharding"),
        (
            {"method": "qlora", "sharding": {"cpu_offload": True}},
            2,
            "sharding.cpu_offload: 4-bit weights are not supported on the CPU",
        ),
    ],
)
def test_what_is_not_supported_is_refused(entry: dict[str, Any], processes: int, message: str) -> None:
    params = adapter.Params.model_validate({**SHARDED, **entry})
    with pytest.raises(InputError, match=re.escape(f"params.yaml: adapter.x.{message}")):
        sharding.check(params, Compute(processes=processes), "adapter.x", params.method)


LAYER, OUTSIDE = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64, 259 * 64 + 64
"""Parameters of a layer of `tiny_model` (attention, MLP, norms), and of what is
outside its layers (tied embeddings, norm)."""
PARAMETERS = 2 * LAYER + OUTSIDE


@pytest.mark.parametrize(
    ("settings", "processes", "weights", "kept"),
    [
        ({"fsdp": "full_shard"}, 4, OUTSIDE + 2 * LAYER, 1),
        ({"fsdp": "shard_grad_op"}, 2, PARAMETERS, 1),
        ({"fsdp": "full_shard", "cpu_offload": True}, 2, OUTSIDE + 2 * LAYER, 0),
    ],
)
def test_memory_per_gpu_is_predicted(
    settings: dict[str, Any], processes: int, weights: int, kept: int, tiny_model: Path
) -> None:
    import torch

    # of this little row the peak is at the end of the backward pass
    spec = memory.TrainingSpec("cuda", torch.float32, tiny_model, "full", {}, [2], 1, timed=False)
    whole = spec.prediction.memory
    assert spec.prediction.divisible == 4 * PARAMETERS
    buffers = whole.weights - 4 * PARAMETERS
    sharded = replace(spec, sharding=Sharding.model_validate(settings), processes=processes).prediction.memory
    part = 4 * PARAMETERS // processes
    assert sharded.weights == buffers + 4 * weights + kept * part
    assert 2 * 4 * (LAYER + OUTSIDE) <= sharded.gradients <= 2 * 4 * (LAYER + OUTSIDE) + kept * part
    assert sharded.optimizer == kept * -(-whole.optimizer // processes)
    assert sharded.runtime == whole.runtime and sharded.activations >= whole.activations


def test_the_peak_of_a_sharded_step_counts_the_part_of_the_gradients() -> None:
    events = [("", "weights", 100), ("", "activations", 10), ("activations", "gradients", 10), ("", "activations", 10),
              ("activations", "gradients", 10), ("", "activations", 4), ("activations", "", 4)]  # fmt: skip
    whole, half = memory.Account(), memory.Account(0.5)
    for event in events:
        whole.apply(event)
        half.apply(event)
    assert (whole.highest, whole.peak["gradients"], whole.peak["activations"]) == (124, 20, 4)
    assert (half.highest, half.peak["gradients"], half.peak["activations"]) == (115, 10, 10)


def test_the_number_of_gpus_needed_is_the_smallest_that_fits(tiny_model: Path) -> None:
    import torch

    spec = memory.TrainingSpec("cuda", torch.float32, tiny_model, "full", {}, [4], 2, timed=False)
    needs = {n: replace(spec, sharding=Sharding(), processes=n).needed for n in range(2, 9)}
    assert sorted(needs.values(), reverse=True) == list(needs.values())
    for processes, bytes_needed in needs.items():
        assert spec.gpus_needed(bytes_needed) == processes
        assert spec.gpus_needed(bytes_needed - 1) == processes + 1
    assert spec.gpus_needed(4 * PARAMETERS) is None, "what is gathered does not become less"
    assert replace(spec, method="dora").gpus_needed(10**12) is None
    assert replace(spec, device="cpu").gpus_needed(10**12) is None


def test_an_entry_without_sharding_keeps_its_settings() -> None:
    settings: Callable[[], dict[str, Any]] = adapter.Params().settings
    assert "sharding" not in settings()
    assert adapter.Params.model_validate(SHARDED).settings()["sharding"] == {"fsdp": "full_shard", "cpu_offload": False}


if __name__ == "__main__":
    main()
