"""Several processes train like one: the same rows once each, the same
gradients, the same bytes in each run, and no process is left.

Run as a script this file is where they train: it loads the libraries once and forks what else would be started anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders.processes import Trained, at_pass, group, printed, run_main, train_all, tune
from builders.training import LORA, make_data, output_files, ready_to_fork
from conftest import edit_params

from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.params import Compute
from dagster_project.core.records import read_table, write_table
from dagster_project.orchestration import processes
from dagster_project.pipeline import validate
from dagster_project.stages import adapter
from dagster_project.training.trainers.harness import distributed, weight_audit
from dagster_project.training.trainers.harness import launch as launching
from dagster_project.training.trainers.harness.distributed import ProcessRank, claim_gpu, gpus_of
from dagster_project.training.trainers.harness.launch import Nodes, launch, start_others
from dagster_project.training.trainers.sft import fit
from dagster_project.training.trainers.sft.sft import steps

PLAIN = {**LORA, "peft": {**LORA["peft"], "lora_dropout": 0.0}, "neftune_noise_alpha": None}
"""Seven rows an epoch: of the four steps the last has one row, and so one process has none."""
LOST = "run again: training resumes from its newest checkpoint"


# the processes that train
# -----------------------------------------------------------------------------------------------------------------


def second_host(folder: Path, whole_bucket: int = distributed.BUCKET) -> None:
    """Let the training be that of two hosts of one process each, and start the second as docs/methods.md says."""
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    first = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"127.0.0.2:{port}", "PET_LOCAL_ADDR": "127.0.0.2"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.2",
        "--master-port",
        str(port),
        "--local-addr",
        "127.0.0.3",
        "-m",
        "dagster_project.training.trainers.harness.launch",
    ]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with (folder / "second_host.log").open("w") as said:
        subprocess.Popen(torchrun, stdout=said, stderr=said)
    os.environ.update(first)
    distributed.BUCKET = whole_bucket  # as on the second host


def main() -> None:
    import datasets  # noqa: F401  what each run needs, loaded once
    import peft  # noqa: F401
    import torch
    import trl

    assert trl.SFTTrainer and torch.get_num_threads()
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    launching.START_METHOD = "fork"
    ready_to_fork()
    distributed.BUCKET = 300  # so that gradients take several

    def everybody_is_asked_to_stop() -> None:
        for process in group():
            process.send_signal(signal.SIGINT)

    def the_launcher_is_killed() -> None:
        launcher, *processes = group()
        (folder / "pids").write_text(json.dumps([[process.pid, process.create_time()] for process in processes]))
        launcher.kill()

    def is_killed(rank: int) -> Callable[[], None]:
        return lambda: at_pass(5, lambda: group()[1 + rank].kill())

    runs = (
        ("one", 1, 2, PLAIN, None),
        ("two", 2, 1, PLAIN, None),
        ("three", 3, 1, PLAIN, None),
        ("one_for_three", 1, 3, PLAIN, None),
        ("hosts", 2, 2, LORA, lambda: second_host(folder)),
        ("first", 2, 2, LORA, None),
        ("second", 2, 2, LORA, None),
        ("four", 4, 1, LORA, None),
        ("killed", 2, 2, LORA, lambda: at_pass(8, the_launcher_is_killed)),
        ("killed", 2, 2, LORA, None),
        ("stopped", 2, 2, {**LORA, "save_strategy": "no"}, lambda: at_pass(5, everybody_is_asked_to_stop)),
        ("stopped", 2, 2, {**LORA, "save_strategy": "no"}, None),
        ("lonely", 2, 2, LORA, is_killed(1)),
        ("headless", 2, 2, LORA, is_killed(0)),
        ("headless", 2, 2, LORA, None),
    )
    trainings = [(name, arrange, partial(tune, folder, model, name, *how)) for name, *how, arrange in runs]
    train_all(folder, [*trainings, ("diverged", None, partial(tune, folder, model, "diverged", 2, 1, PLAIN, "bad"))])


# the tests
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Trained:
    """The folder of all trainings of `main`, and with what each of their runs ended."""
    from dagster_project.stages.tokenized import row_schema

    folder = tmp_path_factory.mktemp("processes")
    make_data(folder)
    rows = read_table(folder / "tokenized" / "train.parquet")
    rows[4]["weights"] = [float("nan") for _ in rows[4]["weights"]]
    write_table(folder / "bad" / "train.parquet", rows, row_schema())
    write_table(
        folder / "bad" / "validation.parquet", read_table(folder / "tokenized" / "validation.parquet"), row_schema()
    )
    return folder, json.loads(run_main(__file__, folder, tiny_model))


def assert_ended(trained: Trained, name: str, *codes: int) -> None:
    """The runs of a name ended with these exit codes."""
    folder, ends = trained
    assert ends[name] == [*codes], printed(folder, name)


@pytest.mark.long
def test_two_processes_match_one_with_twice_the_accumulation(trained: Any) -> None:
    import torch
    from safetensors.torch import load_file

    assert_ended(trained, "one", 0)
    assert_ended(trained, "two", 0)
    one, two = (load_file(trained[0] / name / "adapter_model.safetensors") for name in ("one", "two"))
    before = load_file(trained[0] / "four" / "adapter_model.safetensors")
    for name, weight in one.items():
        assert torch.equal(two[name], weight)
        assert not torch.equal(before[name], weight), "another training ends in the same weights, so nothing is shown"
    for file in ("examples.parquet", "loss.csv"):
        assert output_files(trained[0], "one")[file] == output_files(trained[0], "two")[file]
    alone, shared = (json.loads((trained[0] / name / "training.json").read_text()) for name in ("one", "two"))
    assert (alone.pop("processes"), shared.pop("processes")) == (1, 2)
    assert [point["validation_loss"] for point in shared.pop("validation")] == pytest.approx(
        [point["validation_loss"] for point in alone.pop("validation")], abs=1e-9
    )
    for document in (alone, shared):
        document["settings"].pop("gradient_accumulation_steps")
    assert shared == alone


@pytest.mark.long
def test_three_processes_match_one_with_three_times_the_accumulation_bit_for_bit(trained: Any) -> None:
    assert_ended(trained, "three", 0)
    assert_ended(trained, "one_for_three", 0)
    three, one = (output_files(trained[0], name) for name in ("three", "one_for_three"))
    for file in ("adapter_model.safetensors", "examples.parquet", "loss.csv"):
        assert three[file] == one[file], file
    assert three["adapter_model.safetensors"] != output_files(trained[0], "two")["adapter_model.safetensors"]


@pytest.mark.long
def test_two_hosts_of_one_process_give_the_bytes_of_one_host_with_two(trained: Any) -> None:
    assert trained[1]["hosts"] == [0], printed(trained[0], "hosts") + (trained[0] / "second_host.log").read_text()
    assert output_files(trained[0], "hosts") == output_files(trained[0], "first")


def test_a_host_with_other_data_or_versions_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    make_data(tmp_path)
    compute = Compute(threads=1, dtype="float32")
    data = fit.TrainingData.read("x", "lora", compute, tmp_path / "tokenized", tiny_model)
    versions = json.dumps(weight_audit.versions(["torch"]))
    equal = {
        **data.identity(),
        "dtype": "torch.float32",
        "device": "cpu",
        "library versions": versions,
        "code of the trainer": fit.code_of_trainer(),
    }
    fit.refuse_other_inputs(data, equal)
    for name in equal:
        other = json.dumps({**json.loads(versions), "torch": "1.0"}) if name == "library versions" else "another"
        with pytest.raises(InputError, match=f"this host differs from the first one: {name}\n"):
            fit.refuse_other_inputs(data, {**equal, name: other})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PET_NNODES": "1:4"}, "PET_NNODES: '1:4' is not a number of hosts"),
        ({"PET_NNODES": "2"}, "PET_RDZV_ENDPOINT: HOST:PORT of this host is required"),
        ({"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "a:1", "PET_NODE_RANK": "1"}, "stages run on the first host"),
        ({"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "a:1"}, "3 do not divide evenly among 2 hosts"),
    ],
)
def test_wrong_settings_of_hosts_are_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(message)):
        Nodes.from_environment().share(3)


def test_two_launchers_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PEDIGREE_LAUNCHER": "ray", "PET_NNODES": "2", "PET_RDZV_ENDPOINT": "127.0.0.2:1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="PEDIGREE_LAUNCHER=ray and PET_NNODES are both set"):
        launch(2, __name__, {"alone": 1})


@pytest.mark.long
def test_each_row_is_used_once_per_epoch_with_any_number_of_processes(trained: Any) -> None:
    assert_ended(trained, "four", 0)
    for name, in_a_step in (("two", 2), ("four", 4)):
        seen = read_table(trained[0] / name / "examples.parquet")
        rows = [example["example_id"].split(".")[0] for example in seen[::4]]
        assert [row["step"] for row in seen] == sorted(row["step"] for row in seen)
        for epoch in range(3):
            assert sorted(rows[7 * epoch : 7 * epoch + 7]) == [f"train{n}" for n in range(7)]
        recipe = adapter.Params(**{**PLAIN, "gradient_accumulation_steps": 1})
        assert (
            seen[-1]["step"]
            == steps(7, recipe, in_a_step)
            == json.loads((trained[0] / name / "training.json").read_text())["steps"]
        )


@pytest.mark.long
def test_random_numbers_depend_neither_on_the_run_nor_on_the_process(trained: Any) -> None:
    assert_ended(trained, "first", 0)
    assert_ended(trained, "second", 0)
    assert output_files(trained[0], "first") == output_files(trained[0], "second")
    weights = "adapter_model.safetensors"
    assert output_files(trained[0], "four")[weights] != output_files(trained[0], "one")[weights]
    import torch
    from safetensors.torch import load_file

    two, four = (load_file(trained[0] / name / weights) for name in ("first", "four"))
    for name, weight in two.items():
        torch.testing.assert_close(four[name], weight, atol=1e-6, rtol=0)


@pytest.mark.long
def test_a_killed_training_leaves_no_process_and_ends_in_the_same_bytes(trained: Any) -> None:
    assert_ended(trained, "killed", -signal.SIGKILL, 0)
    left = json.loads((trained[0] / "pids").read_text())
    assert left
    alive = {
        process.pid: process.create_time()
        for process in psutil.process_iter()
        if process.status() != psutil.STATUS_ZOMBIE
    }
    assert not [pid for pid, began in left if alive.get(pid) == began]
    assert re.search(r"resuming from the checkpoint of step \d of 6", (trained[0] / "killed.log").read_text())
    assert output_files(trained[0], "killed") == output_files(trained[0], "first")


@pytest.mark.long
def test_a_stopped_training_stops_within_the_step_and_ends_in_the_same_bytes(trained: Any) -> None:
    assert_ended(trained, "stopped", 130, 0)
    assert (
        (trained[0] / "stopped.said").read_text().startswith("interrupted at step 3; the next run resumes from there")
    )
    weights = "adapter_model.safetensors"
    assert output_files(trained[0], "stopped")[weights] == output_files(trained[0], "first")[weights]


@pytest.mark.long
def test_a_lost_process_ends_the_training_with_one_message(trained: Any) -> None:
    assert_ended(trained, "lonely", 1)
    assert (trained[0] / "lonely.said").read_text() == f"process 2 of 2 was killed\nhint: {LOST}"
    assert list((trained[0] / "lonely").iterdir()) == []


@pytest.mark.long
def test_a_training_whose_first_process_was_lost_ends_in_the_same_bytes_when_run_again(trained: Any) -> None:
    assert_ended(trained, "headless", 1, 0)
    assert (trained[0] / "headless.said").read_text() == f"process 1 of 2 was killed\nhint: {LOST}"
    assert output_files(trained[0], "headless") == output_files(trained[0], "first")


@pytest.mark.long
def test_a_loss_that_is_not_finite_in_any_process_names_the_examples(trained: Any) -> None:
    assert_ended(trained, "diverged", 0)
    learned = json.loads((trained[0] / "diverged" / "report.json").read_text())["checks"]["learned"]
    assert learned["note"].startswith("the loss is nan at step ")
    assert learned["rows"] == [f"train4.{n}" for n in range(4)]


def first_process(work: dict[str, Any]) -> Any:
    """The work of the first process of the groups below."""
    import torch

    if "fail" in work:
        raise InputError("the first cannot", "help it")
    if "alone" in work:
        return "nothing to share"
    start_others(work, __name__)
    total = distributed.summed(torch.tensor([1.0, -0.0]))
    (Path(work["folder"]) / "hidden").write_text(json.dumps([name for name in launching.HIDDEN if name in os.environ]))
    logging.getLogger("pedigree").warning("the first is heard")
    return {"total": total.tolist(), "place": [distributed.place().rank, distributed.place().size], "pid": os.getpid()}


def other_process(work: dict[str, Any]) -> None:
    import torch

    print("nobody hears this")
    if "out of memory" in work:
        raise PedigreeError("training ran out of memory", "lower it")
    total = distributed.summed(torch.tensor([float(distributed.place().rank + 1), -0.0]))
    (Path(work["folder"]) / f"{distributed.place().rank}").write_text(str(total[0].item()))


def test_spawned_processes_form_a_group_and_exit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)]
    with caplog.at_level(logging.INFO, "pedigree"):
        found = launch(2, __name__, {"folder": str(tmp_path)})
    assert (found["total"], found["place"]) == ([3.0, 0.0], [0, 2])
    assert (tmp_path / "1").read_text() == "3.0"
    assert json.loads((tmp_path / "hidden").read_text()) == [], "accelerate would divide the rows itself"
    assert [record.getMessage() for record in caplog.records if record.name == "pedigree"] == ["the first is heard"]
    assert not psutil.pid_exists(found["pid"])
    assert distributed.place() == ProcessRank(0, 1)
    assert capfd.readouterr() == ("", "")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)]


@pytest.mark.parametrize(
    ("work", "kind", "message"),
    [
        (
            {"out of memory": 1},
            PedigreeError,
            f"process 2 of 2 failed: training ran out of memory\nhint: lower it\nhint: {LOST}",
        ),
        ({"fail": 1}, InputError, "the first cannot\nhint: help it"),
    ],
)
def test_the_error_of_a_process_is_reported(
    work: dict[str, Any], kind: type[PedigreeError], message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(launching, "START_METHOD", "fork")
    with pytest.raises(kind) as caught:
        launch(2, __name__, work)
    assert type(caught.value) is kind and str(caught.value) == message


def test_others_end_if_there_is_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "START_METHOD", "fork")
    assert launch(3, __name__, {"alone": 1}) == "nothing to share"


def test_more_processes_than_gpus_are_refused_and_each_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        InputError,
        match=re.escape(
            "compute.processes: 3 processes on this host, which has 2 GPUs\nhint: use at most one process per GPU"
        ),
    ):
        gpus_of(3)
    assert gpus_of(2) == gpus_of(2) == ["4", "5"]
    claim_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus_of(3) == ["", "", ""], "on a CPU there is nothing to share out"


@pytest.mark.parametrize("launcher", ["", "ray"])
def test_gpus_are_counted_for_the_processes_of_this_host(
    launcher: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes on two hosts with a GPU each; Ray Train selects the nodes itself."""
    import torch

    from dagster_project.training.planning.hints import forecast_training

    make_data(tmp_path)
    params, target = adapter.Params(**PLAIN), (torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes on this host, which has 1 GPU"):
        forecast_training(params, tmp_path / "tokenized", tiny_model, 2, target, "adapter.x")
    hosts = {"PEDIGREE_LAUNCHER": launcher} if launcher else {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "a:1"}
    for name, value in hosts.items():
        monkeypatch.setenv(name, value)
    forecast_training(params, tmp_path / "tokenized", tiny_model, 2, target, "adapter.x")


def test_a_method_that_takes_no_steps_is_refused(project: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["compute"]["processes"] = 2
        values["adapter"]["x"] = {"method": "feature_extraction", "merge": False}

    edit_params(project, change)
    with pytest.raises(
        InputError, match=re.escape("adapter.x uses feature_extraction, which has no optimizer steps to share")
    ):
        validate(project)


if __name__ == "__main__":
    main()


def test_after_an_interrupt_a_shell_and_what_it_started_are_gone() -> None:
    shell = subprocess.Popen("sleep 60; true", shell=True)
    until = time.monotonic() + 30
    while not (children := psutil.Process(shell.pid).children()) and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt), processes.ended_with_its_children(shell):
        raise KeyboardInterrupt
    assert shell.returncode is not None and children and not psutil.wait_procs(children, timeout=30)[1]
