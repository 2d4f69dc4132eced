"""Reward model, DPO, KTO and PPO with a model that is divided by FSDP2: they
train like a whole one, and resume to the same bytes.

Run as a script this file is where they train: it loads the libraries once and forks what else would be started anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders.preferences import write_letters
from builders.processes import Trained, at_pass, group, printed, run_main, train_all, weights
from builders.training import output_files, ready_to_fork
from conftest import ROOT

from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.params import Compute
from dagster_project.pipeline import validate
from dagster_project.stages import aligned, reward_model
from dagster_project.training.trainers.alignment import ppo, preference
from dagster_project.training.trainers.alignment import reward_model as reward
from dagster_project.training.trainers.harness import distributed, sharding
from dagster_project.training.trainers.harness import launch as launching
from dagster_project.training.trainers.harness.launch import launch, start_others
from dagster_project.training.trainers.harness.params import Sharding
from dagster_project.training.trainers.harness.sharding import ShardedModel, in_step

SHARDED: dict[str, Any] = {"sharding": {"fsdp": "full_shard"}}
GRADIENTS: dict[str, Any] = {"sharding": {"fsdp": "shard_grad_op"}}
PAIRS: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
JUDGE: dict[str, Any] = {"model": "base_model", **PAIRS}
FULL_JUDGE: dict[str, Any] = {**JUDGE, "method": "full", "learning_rate": 1e-3}
ALIGNED: dict[str, Any] = {"adapter": "lora", "samples": 2, "max_new_tokens": 4}
DPO: dict[str, Any] = {"method": "dpo", **PAIRS, **ALIGNED}
KTO: dict[str, Any] = {"method": "kto", **PAIRS, "num_train_epochs": 1, **ALIGNED}
PPO: dict[str, Any] = {
    "method": "ppo",
    "options": {
        "total_episodes": 15,
        "batch_size": 8,
        "rollout_batch_size": 4,
        "mini_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "response_length": 4,
        "learning_rate": 3e-3,
    },
    **ALIGNED,
}
"""Batches that do not divide evenly among two processes, in the rollout, the passes and the steps."""

QUANTIZED: dict[str, Any] = {"quantization": "nf4"}

BOUNDS = {
    "judge": 2e-6,
    "full_judge": 2e-6,
    "dpo": 2e-6,
    "kto": 2e-6,
    "ppo": 2e-6,
    "four_bit_judge": 1e-3,
    "four_bit_dpo": 1e-3,
}
"""Largest difference of a weight from the unsharded training; products with 4-bit weights are in bfloat16."""


def with_passes(recipe: dict[str, Any], passes: int) -> dict[str, Any]:
    """With forward passes of each process per optimizer step; PPO shares those of its options."""
    return recipe if recipe.get("method") == "ppo" else {**recipe, "gradient_accumulation_steps": passes}


def work(folder: Path, model: Path, name: str, count: int, recipe: dict[str, Any]) -> None:
    """Run the stage in `count` processes. Its outputs, its report and the
    message of its error are written to folder/name*."""
    out = folder / name
    checkpoints = folder / "checkpoints" / name
    compute = Compute(seed=3, threads=1, dtype="float32", processes=count)
    pairs = folder / "preferences"
    try:
        if "model" in recipe:
            judged = reward_model.Params(**recipe)
            report = reward_model.produce(
                judged, compute, pairs, model, out, out / "curve.csv", out / "calibration.csv", checkpoints
            )
        else:
            tuned = aligned.Params(**recipe)
            sources = aligned.Sources(pairs, folder / "judge", model)
            report = aligned.produce("x", tuned, compute, sources, out, out / "curve.csv", checkpoints)
    except PedigreeError as error:
        (folder / f"{name}.said").write_text(str(error))
        os._exit(error.exit_code)
    (out / "report.json").write_text(json.dumps(report.document()))


def the_launcher_is_killed() -> None:
    group()[0].kill()


def the_launcher_is_asked_to_stop() -> None:
    group()[0].send_signal(signal.SIGINT)


def killed_in_iteration(number: int) -> None:
    whole = ppo.Training.run_iteration

    def run(self: ppo.Training, step: int) -> None:
        if step == number and distributed.place().rank == 0:
            the_launcher_is_killed()
        whole(self, step)

    ppo.Training.run_iteration = run  # type: ignore[method-assign]


Runs = list[tuple[str, int, dict[str, Any], Callable[[], None] | None]]


def runs() -> Runs:
    judge, full_judge, dpo, kto = (with_passes(recipe, 2) | SHARDED for recipe in (JUDGE, FULL_JUDGE, DPO, KTO))
    return [
        ("judge", 1, with_passes(JUDGE, 4), None),
        ("judge_sharded", 2, judge, None),
        ("judge_killed", 2, judge, partial(at_pass, 6, the_launcher_is_killed)),
        ("judge_killed", 3, judge, None),
        ("judge_killed", 2, judge, None),
        ("full_judge", 1, with_passes(FULL_JUDGE, 4), None),
        ("full_judge_sharded", 2, full_judge, None),
        ("dpo", 1, with_passes(DPO, 4), None),
        ("dpo_sharded", 2, dpo, None),
        ("dpo_stopped", 2, dpo | GRADIENTS, partial(at_pass, 3, the_launcher_is_asked_to_stop)),
        ("dpo_stopped", 2, dpo | GRADIENTS, None),
        ("four_bit_judge", 1, with_passes(JUDGE, 4) | QUANTIZED, None),
        ("four_bit_judge_sharded", 2, judge | QUANTIZED, None),
        ("four_bit_dpo", 1, with_passes(DPO, 4) | QUANTIZED, None),
        ("four_bit_dpo_sharded", 2, dpo | QUANTIZED, None),
        ("kto", 1, with_passes(KTO, 4), None),
        ("kto_sharded", 2, kto, None),
        ("ppo", 2, PPO, None),
        ("ppo_sharded", 2, PPO | SHARDED, None),
        ("ppo_killed", 2, PPO | GRADIENTS, partial(killed_in_iteration, 2)),
        ("ppo_killed", 2, PPO | GRADIENTS, None),
    ]


def main() -> None:
    import trl

    assert trl.RewardTrainer and trl.DPOTrainer and trl.KTOTrainer
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    launching.START_METHOD = "fork"
    ready_to_fork()
    train_all(folder, [(name, arrange, partial(work, folder, model, name, *how)) for name, *how, arrange in runs()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Trained:
    """The folder of all trainings of `main`, and the exit codes of each."""
    folder = tmp_path_factory.mktemp("sharding")
    write_letters(folder / "preferences", train=range(13), validation=range(20, 23), test=range(30, 34))
    return folder, json.loads(run_main(__file__, folder, tiny_model))


@pytest.mark.long
@pytest.mark.parametrize("name", BOUNDS)
def test_a_sharded_training_gives_the_weights_of_an_unsharded_one_within_the_bound(trained: Trained, name: str) -> None:
    import torch

    whole, sharded = weights(trained, name), weights(trained, f"{name}_sharded")
    assert sharded.keys() == whole.keys()
    for key, weight in whole.items():
        torch.testing.assert_close(sharded[key], weight, atol=BOUNDS[name], rtol=0)
    files = [output_files(trained[0], n) for n in (name, f"{name}_sharded")]
    assert files[0].keys() == files[1].keys()
    for same in {"examples.parquet", "samples.parquet", "quality.json"} & files[0].keys():
        assert files[0][same] == files[1][same]
    one, two = (json.loads(file["training.json"]) for file in files)
    assert two["processes"] == 2 and one.get("processes", 1) == (2 if name == "ppo" else 1)
    assert two["settings"].pop("sharding") == {"fsdp": "full_shard", "cpu_offload": False}
    assert "sharding" not in one["settings"]
    assert one["frozen"] == two["frozen"]
    assert (one["steps"], one["tokens"]) == (two["steps"], two["tokens"])
    assert [point["step"] for point in one["validation"]] == [point["step"] for point in two["validation"]]
    for point, other in zip(one["validation"], two["validation"], strict=True):
        assert other == pytest.approx(point, abs=10 * BOUNDS[name])
    assert min(group["norm_of_change"] for group in one["trained"].values()) > 100 * BOUNDS[name], (
        "the bound would not notice another training"
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ["judge", "full_judge", "dpo", "kto", "ppo"])
def test_the_curves_and_the_evaluation_are_those_of_an_unsharded_training(trained: Trained, name: str) -> None:
    one, two = (json.loads((trained[0] / n / "report.json").read_text()) for n in (name, f"{name}_sharded"))
    assert two["checks"] == one["checks"]
    assert two.get("watch") == one.get("watch") and two.get("preference") == one.get("preference")
    rows = [(trained[0] / n / "curve.csv").read_text().splitlines() for n in (name, f"{name}_sharded")]
    assert rows[0][0] == rows[1][0] and len(rows[0]) == len(rows[1])
    for ours, theirs in zip(rows[0][1:], rows[1][1:], strict=True):
        assert [float(x) for x in theirs.split(",") if x] == pytest.approx(
            [float(x) for x in ours.split(",") if x], rel=1e-4, abs=1e-5
        )


@pytest.mark.long
@pytest.mark.parametrize(("name", "step"), [("judge", 2), ("ppo", 1)])
def test_a_killed_training_resumes_to_the_same_bytes_with_as_many_processes(
    trained: Trained, name: str, step: int
) -> None:
    folder, ends = trained
    assert [ends[f"{name}_killed"][0], ends[f"{name}_killed"][-1]] == [-signal.SIGKILL, 0], printed(
        folder, f"{name}_killed"
    )
    assert re.search(
        rf"resuming from the checkpoint of (step|iteration) {step}\b", (folder / f"{name}_killed.log").read_text()
    )
    resumed, whole = output_files(folder, f"{name}_killed"), output_files(folder, f"{name}_sharded")
    without_settings(resumed, whole)
    assert resumed == whole


@pytest.mark.long
def test_another_number_of_processes_is_refused(trained: Trained) -> None:
    folder, ends = trained
    assert ends["judge_killed"][1] == 2, printed(folder, "judge_killed")
    said = (folder / "judge_killed.said").read_text()
    assert re.search(
        r"step-00000002: this checkpoint is of 2 processes, .*as many\nhint: set compute.processes: 2, or remove", said
    )


@pytest.mark.long
def test_a_stopped_training_saves_the_parts_of_all_processes(trained: Trained) -> None:
    folder, ends = trained
    assert ends["dpo_stopped"] == [130, 0], printed(folder, "dpo_stopped")
    assert (
        (folder / "dpo_stopped.said").read_text().startswith("interrupted at step 2; the next run resumes from there")
    )
    resumed, whole = output_files(folder, "dpo_stopped"), output_files(folder, "dpo_sharded")
    without_settings(resumed, whole)
    assert resumed == whole


def without_settings(*outputs: dict[str, bytes]) -> None:
    """Remove the kind of sharding, which changes no other bit."""
    for files in outputs:
        document = json.loads(files["training.json"])
        document["settings"].pop("sharding")
        files["training.json"] = json.dumps(document).encode()


# in a group of processes without a training


def kept_and_computed(work: dict[str, Any]) -> dict[str, Any]:
    """What this process keeps of a reward model and a policy with its value head, and what they compute."""
    import torch

    model, cpu = Path(work["model"]), torch.device("cpu")
    here = distributed.place().rank
    judge = reward.RewardModel(model, cpu, torch.float32, Sharding.model_validate(work["sharding"]))
    policy = preference.policy(model, {}, cpu, torch.float32, "aligned.x", "lora").model.eval()
    shared = ShardedModel(policy, Sharding.model_validate(work["sharding"]), cpu)
    ids = torch.arange(3, 9)[None]
    wanted = policy(ids).logits
    head = ppo.value_head(policy)
    whole = sum(weight.numel() for module in (policy, head) for weight in module.parameters())
    shared.divide(head)
    parts = list(shared.root.parameters())
    kept = sum(part.to_local().numel() for part in parts)

    def alternate() -> float:
        """Passes of both models in the first process: 1 + 2; in the others none."""
        apart = 0.0
        for _ in range(2 if here == 0 else 0):
            with policy.disable_adapter():
                apart = max(apart, float((policy(ids).logits - wanted).abs().max()))
            judge._score([([3, 4], [5])])
        return apart

    def as_many_as_the_rank() -> float:
        return max([float((policy(ids).logits - wanted).abs().max()) for _ in range(here)], default=0.0)

    with torch.no_grad():
        differences = [in_step([shared, judge.shared], alternate), in_step([shared], as_many_as_the_rank)]
    trained = sum(part.requires_grad for part in shared.root.parameters())
    return {
        "sharded": all(map(sharding.is_sharded, [*parts, *judge.shared.root.parameters()])),
        "kept": kept, "whole": whole, "difference": max(differences), "trained": trained,
    }  # fmt: skip


def first_process(work: dict[str, Any]) -> list[Any]:
    start_others(work, __name__)
    return distributed.documents(kept_and_computed(work))


def other_process(work: dict[str, Any]) -> None:
    distributed.documents(kept_and_computed(work))


@pytest.mark.parametrize("settings", [SHARDED, GRADIENTS], ids=["full_shard", "shard_grad_op"])
def test_processes_with_different_numbers_of_passes_compute_with_parts(
    settings: dict[str, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "START_METHOD", "fork")
    found = launch(3, __name__, {"model": str(tiny_model), **settings})
    assert all(one["sharded"] for one in found), "a weight is whole in every process"
    assert sum(one["kept"] for one in found) == found[0]["whole"]
    assert max(one["kept"] for one in found) < 0.4 * found[0]["whole"]
    assert max(one["difference"] for one in found) < 1e-6
    assert {one["trained"] for one in found} == {2 * 2 * 4 + 2}, (
        "adapters of four matrices in two layers, and the value head"
    )


# what is not supported


@pytest.mark.parametrize(
    ("change", "processes", "message"),
    [
        (
            {"aligned": {"x": {"method": "dpo", "adapter": "lora", **SHARDED}}},
            1,
            "aligned.x.sharding: one process has nothing to share",
        ),
        (
            {"reward_model": {"model": "base_model", **SHARDED}},
            1,
            "reward_model.sharding: one process has nothing to share",
        ),
        (
            {"aligned": {"x": {"method": "grpo", "adapter": "lora", **SHARDED}}},
            2,
            "aligned.x.sharding: grpo needs the whole model in each process\nhint: use dpo, kto or ppo",
        ),
        (
            {"aligned": {"x": {"method": "kto", "adapter": "lora", "optim": "adafactor", **SHARDED}}},
            2,
            "aligned.x.optim: adafactor",
        ),
        (
            {"reward_model": {"model": "base_model", **QUANTIZED, "sharding": {"cpu_offload": True}}},
            2,
            "reward_model.sharding.cpu_offload: 4-bit weights are not supported on the CPU",
        ),
        (
            {"reward_model": {"model": "base_model", "method": "full", **QUANTIZED}},
            1,
            "reward_model.quantization: full computes with the",
        ),
        (
            {"reward_model": {"model": "base_model", "optim": "adamw_8bit", **SHARDED}},
            2,
            "reward_model.optim: adamw_8bit is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], processes: int, message: str) -> None:
    import yaml

    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["compute"]["processes"] = processes
    with pytest.raises(InputError, match=re.escape(f"params.yaml: {message}")):
        validate(ROOT, {**values, **change})


def test_without_sharding_and_quantization_they_are_not_among_the_settings() -> None:
    for plain in (reward_model.Params(model="base_model"), aligned.Params(method="dpo", adapter="lora")):
        assert not {"sharding", "quantization"} & plain.settings().keys()
    settings = aligned.Params(method="dpo", adapter="lora", **SHARDED, **QUANTIZED).settings()
    assert (settings["sharding"]["fsdp"], settings["quantization"]) == ("full_shard", "nf4")


@pytest.mark.long
def test_a_reward_model_trained_on_four_bit_weights_is_saved_with_the_unquantized_ones(
    trained: Trained, tiny_model: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    tuned, base = weights(trained, "four_bit_judge"), load_file(tiny_model / "model.safetensors")
    assert torch.equal(tuned["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"]), (
        "not trained"
    )
    assert (
        0
        < float(
            (tuned["model.layers.0.self_attn.q_proj.weight"] - base["model.layers.0.self_attn.q_proj.weight"])
            .abs()
            .max()
        )
        < 0.5
    )


if __name__ == "__main__":
    main()
