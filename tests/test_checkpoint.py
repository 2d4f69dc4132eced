"""A checkpoint is used only if every byte is intact, and only by the training that wrote it."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from ruamel.yaml import YAML

from dagster_project.core.errors import PedigreeError
from dagster_project.core.layout import is_code
from dagster_project.core.params import Compute
from dagster_project.stages import reward_model
from dagster_project.training.trainers.alignment.trl_trainers.training import preference_identity
from dagster_project.training.trainers.harness import checkpoint
from dagster_project.training.trainers.harness.checkpoint import Checkpoints, code_of, pack, refuse_full_disk, unpack
from dagster_project.training.trainers.harness.params import PreferenceParams

IDENTITY = {"parameters": "p", "code": "c", "threads": "1"}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "x", IDENTITY)


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "pedigree")
    return caplog


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(
            step,
            {"n": step, "t": torch.tensor([step])},
            {"weights": {"w": torch.full((3,), float(step))}},
            {"course": {"step": step}},
        )


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_a_saved_checkpoint_is_found(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)
    found = checkpoints.newest()
    assert found
    assert (found.step, found.document("course")) == (5, {"step": 5})
    assert torch.equal(found.tensors("weights")["w"], torch.full((3,), 5.0))
    assert found.tensors("best") == {}
    state = found.state(torch.device("cpu"))
    assert (state["n"], state["t"].tolist()) == (5, [5])


def test_without_a_saved_checkpoint_none_is_found(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None


def test_the_newest_checkpoints_are_kept_by_step_and_not_by_time(checkpoints: Checkpoints) -> None:
    save(checkpoints, 9, 100, 1000)
    assert names(checkpoints) == ["step-00000100", "step-00001000"]
    os.utime(checkpoints.folder / "step-00001000", (0, 0))
    found = checkpoints.newest()
    assert found
    assert found.step == 1000


@pytest.mark.parametrize(
    "file", ["weights.safetensors", "state.safetensors", "state.json", "course.json", "complete.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_logged_and_the_previous_one_used(
    checkpoints: Checkpoints, said: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    save(checkpoints, 1, 2)
    path = checkpoints.folder / "step-00000002" / file
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    found = checkpoints.newest()
    assert found
    assert found.step == 1
    [line] = said.messages
    assert line.startswith("training: checkpoint step-00000002 is damaged (")
    assert line.endswith("using the previous one")
    assert names(checkpoints) == ["step-00000001"]


def test_training_starts_from_step_0_if_all_checkpoints_are_damaged(
    checkpoints: Checkpoints, said: pytest.LogCaptureFixture
) -> None:
    save(checkpoints, 1, 2)
    for step in (1, 2):
        (checkpoints.folder / f"step-0000000{step}" / "state.json").write_text("{}")
    assert checkpoints.newest() is None
    assert len(said.messages) == 2


@pytest.mark.parametrize("part", list(IDENTITY))
def test_a_checkpoint_of_another_training_is_renamed_and_the_difference_logged(
    checkpoints: Checkpoints, said: pytest.LogCaptureFixture, part: str
) -> None:
    save(checkpoints, 1, 2)
    other = Checkpoints(checkpoints.folder, {**IDENTITY, part: "other"})
    assert other.newest() is None
    assert names(checkpoints) == ["step-00000001.stale", "step-00000002.stale"]
    assert said.messages == [
        f"training: the checkpoints are of another training (differs: {part}); set aside, starting over"
    ]
    assert other.newest() is None
    save(other, 1)
    found = other.newest()
    assert found
    assert found.step == 1
    assert len(said.messages) == 1


def test_an_added_or_missing_part_is_a_difference(checkpoints: Checkpoints, said: pytest.LogCaptureFixture) -> None:
    save(checkpoints, 1)
    assert Checkpoints(checkpoints.folder, {**IDENTITY, "dtype": "float32"}).newest() is None
    assert "differs: dtype" in said.text


def test_only_the_latest_renamed_checkpoints_are_kept(checkpoints: Checkpoints) -> None:
    for number in range(3):
        other = Checkpoints(checkpoints.folder, {**IDENTITY, "code": str(number)})
        assert other.newest() is None
        save(other, number + 1)
    assert names(checkpoints) == ["step-00000002.stale", "step-00000003"]


def test_a_full_disk_while_saving_is_one_message_and_leaves_the_checkpoint_before(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(PedigreeError, match="the disk is full: the checkpoint of step 2"):
            save(checkpoints, 2)
    assert names(checkpoints) == ["step-00000001"]


def test_folders_on_one_disk_share_its_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
    refuse_full_disk({tmp_path / "a": 2**20, tmp_path / "b": 2**20}, "x")
    with pytest.raises(PedigreeError, match=r"x: checkpoints and output need about 4 MiB of disk, and 3 MiB are free"):
        refuse_full_disk({tmp_path / "a": 2**21, tmp_path / "b": 2**21}, "x")


def test_any_state_is_restored_unchanged() -> None:
    shared = torch.arange(4, dtype=torch.uint8)
    state = {
        0: (1.5, None, [True, "x"]),
        "t": {"a": torch.tensor(2.5), "b": torch.zeros(0, 3, dtype=torch.bfloat16)},
        "inf": float("inf"),
    }
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack({**state, "shared": [shared, shared]}, tensors, "state")))
    found = unpack(packed, tensors, torch.device("cpu"))
    assert found[0] == (1.5, None, [True, "x"])
    assert found["inf"] == float("inf")
    assert found["t"]["a"].shape == ()
    assert (found["t"]["b"].dtype, found["t"]["b"].shape) == (torch.bfloat16, (0, 3))
    with pytest.raises(TypeError, match=r"state.f: cannot be saved: function"):
        pack({"f": lambda: None}, {}, "state")


def test_tensors_that_share_memory_are_saved(checkpoints: Checkpoints) -> None:
    table = torch.arange(4.0)
    checkpoints.save(1, {"a": table, "b": table, "c": table[1:]}, {}, {})
    found = checkpoints.newest()
    assert found
    assert [found.state(torch.device("cpu"))[name].tolist() for name in "abc"] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [1, 2, 3],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_continues_identically(dtype: torch.dtype) -> None:
    def make() -> tuple[torch.Tensor, torch.optim.AdamW]:
        weight = torch.ones(3, dtype=dtype, requires_grad=True)
        return weight, torch.optim.AdamW([weight], lr=0.1)

    def advance(weight: torch.Tensor, optimizer: torch.optim.AdamW, n: int) -> None:
        for i in range(n):
            weight.grad = torch.tensor([1.0, -2.0, i], dtype=dtype)
            optimizer.step()

    weight, whole = make()
    advance(weight, whole, 4)
    state = checkpoint.optimizer_state(whole)
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(state, tensors, "o")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    other, resumed = make()
    other.data.copy_(weight.data)
    checkpoint.restore_optimizer(resumed, unpack(packed, tensors, torch.device("cpu")))
    advance(weight, whole, 3)
    advance(other, resumed, 3)
    assert torch.equal(weight, other)


def test_all_random_generators_are_restored() -> None:
    import random

    import numpy as np

    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(checkpoint.random_state(), tensors, "r")))

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    first = draw()
    checkpoint.restore_random_state(unpack(packed, tensors, torch.device("cpu")))
    assert draw() == first


def test_the_code_in_the_checkpoint_identity_is_what_dvc_tracks() -> None:
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    tracked = [dep for dep in stages["adapter"]["do"]["deps"] if is_code(dep)]
    code = [
        path.relative_to(ROOT)
        for path in code_of(ROOT / "dagster_project" / "stages" / "adapter.py", ROOT / "dagster_project")
    ]
    assert [str(path) for path in code if not any(path.is_relative_to(entry) for entry in tracked)] == []
    assert [entry for entry in tracked if not any(path.is_relative_to(entry) for path in code)] == []


def test_the_identity_of_a_training_on_preferences_covers_files_in_folders_of_its_model(tmp_path: Path) -> None:
    nested = (
        tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja"
    )  # as transformers saves a tokenizer with several templates
    nested.parent.mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")

    def identity() -> dict[str, str]:
        params, folders = PreferenceParams(), {"model": tmp_path / "model"}
        return preference_identity(
            params,
            Compute(threads=1),
            torch.device("cpu"),
            torch.float32,
            tmp_path,
            folders,
            Path(reward_model.__file__),
        )

    nested.write_text("{{ messages }}")
    before = identity()
    nested.write_text("{{ tools }}")
    assert {name for name, value in identity().items() if value != before[name]} == {"model"}
