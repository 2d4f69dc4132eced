"""`pedigree why --checkpoints` and `--second-moments`: gradients at earlier
points of a training, which is run again."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import training_pipeline
from builders.commands import document, exit_code
from builders.files import contents
from builders.training import LORA
from conftest import dvc
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from dagster_project.__main__ import main
from dagster_project.commands import why_calibration, why_checkpoints
from dagster_project.commands.why_checkpoints import EarlierTarget, at_points
from dagster_project.commands.why_model import Target, target
from dagster_project.core.errors import Busy, CheckFailed, InputError, Interrupted
from dagster_project.core.records import read_table
from dagster_project.lineage.attribution import points
from dagster_project.lineage.attribution.points import Point, PointSelection, second_moments, steps_of
from dagster_project.lineage.attribution.retraining import Retraining, optimizer_order
from dagster_project.orchestration import locks
from dagster_project.stages import adapter
from dagster_project.training.methods.build import causal
from dagster_project.training.trainers.sft.fit import TrainingData
from dagster_project.training.trainers.sft.sft import SftSession

MODEL = "adapter@x"
QUESTION = ("--prompt", "Where is my hat?", "--answer", "In the blue box.", "--span", "blue")
PLAIN: dict[str, Any] = {
    **LORA,
    "peft": {**LORA["peft"], "lora_dropout": 0.0},
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 1,
    "neftune_noise_alpha": None,
    "load_best_model_at_end": False,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "max_grad_norm": 1e9,
}
"""Each step depends only on its row and the previous weights."""
STEPS = 14


@pytest.fixture(scope="module")
def indexed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of the stage `adapter@x` alone, with gradients at three points of its training, plain and scaled."""
    root = training_pipeline.make_project(tmp_path_factory.mktemp("why") / "project", tiny_model, PLAIN)
    done = dvc(root, "repro", "-q")
    assert done.returncode == 0, done.stderr + done.stdout
    for options in ([], ["--second-moments"]):
        assert main(["why", MODEL, "--index", "--checkpoints", "3", *options, "--project", str(root)]) == 0
    return root


@pytest.fixture
def root(indexed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(indexed, tmp_path / "project", symlinks=True))


def why(root: Path, *arguments: str) -> int:
    return exit_code("why", MODEL, *arguments, "--project", str(root))


def files(root: Path) -> dict[str, bytes]:
    return contents(root / ".dvc/tmp/pedigree/gradients")


def retraining(found: Target) -> Retraining:
    return Retraining("x", found.entry, found.compute, found.training, found.folder, found.tokenized, found.base_model)


def untrained(found: Target) -> Any:
    data = TrainingData.read(found.variant, found.entry.method, found.compute, found.tokenized, found.base_model)
    prepared = data.model(found.entry, STEPS)
    causal(prepared.model).set_attn_implementation(
        "eager"
    )  # written for whole rows: here each example is read by itself
    return prepared


def loss_of_row(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """Mean loss over the labeled tokens of a packed row, each example read by
    itself: written without the project's own loss."""
    losses, at = [], 0
    for length in row["lengths"]:
        ids, labels = (torch.tensor([row[name][at : at + length]]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[0, :-1].float()
        losses.append(
            torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="none")[
                labels[0, 1:] != -100
            ]
        )
        at += length
    return torch.cat(losses).mean()


def test_steps_are_equally_spaced_up_to_the_last() -> None:
    assert (
        steps_of(8, 4) == [2, 4, 6, 8]
        and steps_of(19, 10) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
        and steps_of(5, 1) == [5]
    )
    with pytest.raises(InputError, match="has 2 steps"):
        steps_of(2, 3)


def test_weights_of_a_point_are_those_of_a_training_that_ended_there(indexed: Path, tmp_path: Path) -> None:
    found = target(indexed, MODEL)
    assert found.training["steps"] == STEPS
    first, second, end = at_points(found, PointSelection(3))
    assert isinstance(first, EarlierTarget) and isinstance(second, EarlierTarget) and end is found
    assert (first.point.step, second.point.step) == (4, 9)
    shorter = found.entry.model_copy(update={"max_steps": first.point.step})
    out = tmp_path / "adapter"
    out.mkdir()
    adapter.produce(
        "x",
        shorter,
        found.compute,
        found.tokenized,
        found.base_model,
        out,
        tmp_path / "loss.csv",
        tmp_path / "checkpoints",
    )
    kept, trained = first.point.weights(), load_file(out / "adapter_model.safetensors")
    assert kept and len(kept) == len(trained)
    for name, weight in kept.items():
        assert torch.equal(weight, trained[name.replace(".default", "")]), name


def test_second_moments_of_the_first_step_are_the_squares_of_its_gradient(root: Path) -> None:
    found = target(root, MODEL)
    chosen = [Point(found.store.folder, step, step == STEPS, True) for step in steps_of(STEPS, STEPS)]
    retraining(found).write_points(chosen)
    moments = load_file(chosen[0].folder / "moments.safetensors")
    used = {row["example_id"] for row in read_table(found.folder / "examples.parquet") if row["step"] == 1}
    [row] = [row for row in read_table(found.tokenized / "train.parquet") if used & {*row["example_ids"]}]
    model = untrained(found).model.eval()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(loss_of_row(model, row), list(weights.values()))
    assert moments.keys() == weights.keys()
    for (name, moment), gradient in zip(((name, moments[name]) for name in weights), gradients, strict=True):
        torch.testing.assert_close(moment, gradient**2, rtol=1e-3, atol=1e-10, msg=name)


@pytest.mark.parametrize("scaled", [False, True])
def test_stored_gradients_are_those_of_autograd_with_half_of_the_adapter_of_each_point(
    indexed: Path, scaled: bool
) -> None:
    found = target(indexed, MODEL)
    for point in at_points(found, PointSelection(3, scaled)):
        read = point.store.read()
        stored, lengths = read.units, read.lengths
        model = untrained(found).model.eval()
        named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        saved = point.point.weights() if isinstance(point, EarlierTarget) else None
        end = {
            name.replace(".weight", ".default.weight"): weight
            for name, weight in load_file(found.folder / "adapter_model.safetensors").items()
        }
        for name, weight in (saved or end).items():
            named[name].data.copy_(weight / 2 if "lora_B" in name else weight)
        for number in (0, 13, 27):
            [example] = point.records[number].examples
            row = {
                "lengths": [len(example.input_ids)],
                "input_ids": list(example.input_ids),
                "labels": list(example.labels),
            }
            gradients = dict(
                zip(named, torch.autograd.grad(loss_of_row(model, row), list(named.values())), strict=True)
            )
            if scaled:
                assert isinstance(point, EarlierTarget)
                moments = load_file(point.point.folder / "moments.safetensors")
                gradients = {
                    name: gradient / (moments[name].sqrt() + 1e-8).sqrt() for name, gradient in gradients.items()
                }
            expected = point.projection.project(gradients).numpy()
            assert np.allclose(lengths[number], np.linalg.norm(expected), rtol=1e-3)
            assert np.allclose(stored[number], expected / np.linalg.norm(expected), atol=2e-3)


def test_a_score_is_the_mean_of_the_scores_at_the_points(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def scores(*options: str) -> dict[str, float]:
        assert why(indexed, *QUESTION, "--top", "28", "--json", *options) == 0
        found = document(capsys)
        assert ("points" in found) is bool(options)
        return {hit["example_id"]: hit["gradient"]["score"] for hit in found["hits"]}

    found = target(indexed, MODEL)
    mean = scores("--checkpoints", "3")
    assert len(mean) == 28 and mean != scores()
    from dagster_project.commands.why_question import Options, question, tokenizer_of

    asked = question(Options("Where is my hat?", "In the blue box.", "blue"), None, tokenizer_of(found), None)
    of_points = []
    for point in at_points(found, PointSelection(3)):
        _, gradient = point.model.of_span(asked.example)
        stored, wanted = point.store.read(), point.projection.project(gradient).numpy()
        of_points.append(stored.scores(wanted[None])[0])
    for record, score in zip(found.records, np.mean(of_points, 0), strict=True):
        assert abs(mean[record.example_id] - score) < 1e-4


def test_the_points_are_named_in_every_form_of_the_answer(
    indexed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--checkpoints", "3", "--second-moments")
    assert why(indexed, *QUESTION, *options, "--html", str(tmp_path / "why.html")) == 0
    said = (
        "gradient scores are means over the steps 4, 9 and 14 of the training, of gradients scaled by the second"
        " moments of its optimizer"
    )
    assert said in capsys.readouterr().out and said in (tmp_path / "why.html").read_text()
    assert why(indexed, *QUESTION, *options, "--json") == 0
    assert document(capsys)["points"] == {"steps": [4, 9, 14], "second_moments": True}


def test_an_index_of_points_is_computed_once_and_what_is_damaged_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(root)
    assert why(root, "--index", "--checkpoints", "3", "--json") == 0
    found = document(capsys)["index"]
    assert (found["computed"], found["records"], found["steps"]) == (0, 28, [4, 9, 14]) and files(root) == before
    [home] = (root / ".dvc/tmp/pedigree/gradients").iterdir()
    weights = home / "points/step-00000004/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert why(root, *QUESTION, "--checkpoints", "3") == 2
    assert "add --index to train again and store them" in capsys.readouterr().err
    assert why(root, "--index", "--checkpoints", "3") == 0
    assert files(root) == before, "the same bytes"


def test_a_training_that_gives_other_weights_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = target(root, MODEL)
    shutil.rmtree(found.store.folder / "points")
    monkeypatch.setitem(found.training, "seed", 5)
    with pytest.raises(CheckFailed, match="ended with other weights"):
        why_checkpoints.index(found, PointSelection(3))
    assert not (found.store.folder / "points").exists() or not [*(found.store.folder / "points").glob("step-*")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--index", "--checkpoints", "15"), "--checkpoints 15: the training has 14 steps"),
        (("--index", "--checkpoints", "0"), "'0' is not a whole number from 1"),
        ((*QUESTION, "--checkpoints", "2"), "missing or damaged"),
        (("--suspects", "--checkpoints", "3"), "--suspects does not support --checkpoints"),
        (("--suspects", "--second-moments"), "--suspects does not support --second-moments"),
    ],
)
def test_bad_input_is_refused_with_one_message(
    indexed: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(indexed)
    code = why(indexed, *arguments)
    shown = capsys.readouterr()
    assert code == 2 and said in shown.err and "Traceback" not in shown.err and files(indexed) == before


def test_an_interrupted_training_goes_on_and_one_for_other_points_starts_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = target(root, MODEL)
    shutil.rmtree(found.store.folder / "points")
    whole = SftSession.step_begins
    begun = []

    def stops_at(step: int) -> None:
        def step_begins(session: Any) -> None:
            begun.append(step)
            if len(begun) == step:
                os.kill(os.getpid(), signal.SIGINT)
            whole(session)

        begun.clear()
        monkeypatch.setattr(SftSession, "step_begins", step_begins)

    stops_at(6)
    with pytest.raises(Interrupted, match="at step 6"):
        why_checkpoints.index(found, PointSelection(3))
    stops_at(99)
    why_checkpoints.index(found, PointSelection(3))
    assert len(begun) == STEPS - 6, "it goes on"
    stops_at(8)
    with pytest.raises(Interrupted):
        why_checkpoints.index(found, PointSelection(7))
    stops_at(99)
    why_checkpoints.index(found, PointSelection(5))
    assert len(begun) == STEPS, "checkpoints of other steps are not used"


def test_no_erasure_comes_between_the_points_of_an_index(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, compute, refused = target(root, MODEL), why_calibration.index, list[str]()

    def erases(one: Target) -> dict[str, Any]:
        def refuse(holder: str) -> None:
            refused.append(holder)
            raise Busy(holder, "")

        with pytest.raises(Busy), locks.hold(root, MODEL, refuse):
            pass
        return compute(one)

    monkeypatch.setattr(why_calibration, "index", erases)
    why_checkpoints.index(found, PointSelection(3))
    assert len(refused) == 3 and all("pedigree why --index" in holder for holder in refused)


@pytest.mark.parametrize("name", ["weights", "moments"])
def test_a_checkpoint_that_an_erasure_removes_during_a_question_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    [home] = (root / ".dvc/tmp/pedigree/gradients").iterdir()
    load = EarlierTarget.load

    def removes(found: EarlierTarget) -> Any:
        (home / f"points/step-00000004/{name}.safetensors").unlink()
        return load(found)

    monkeypatch.setattr(EarlierTarget, "load", removes)
    assert why(root, *QUESTION, "--checkpoints", "3", "--second-moments") == 2
    assert "the checkpoint of step 4 was removed" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_computed_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = target(root, MODEL)
    chosen = [Point(found.store.folder, step, step == STEPS, True) for step in steps_of(STEPS, 3)]
    before = files(root)
    train, runs = Retraining._train, []

    def damaging(self: Retraining, steps: Any, scratch: Path) -> Any:
        fitted = train(self, steps, scratch)
        runs.append(steps)
        if len(runs) == 1:
            weights = scratch / "checkpoints/step-00000004/weights.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        return fitted

    monkeypatch.setattr(Retraining, "_train", damaging)
    retraining(found).write_points(chosen)
    assert len(runs) == 2 and files(root) == before


@pytest.mark.long
def test_points_end_where_the_best_weights_were(tiny_model: Path, tmp_path: Path) -> None:
    """The validation loss of random examples is lowest early, so the saved weights are not those of the last step."""
    values = {**PLAIN, "num_train_epochs": 3, "load_best_model_at_end": True, "learning_rate": 0.5}
    root = training_pipeline.make_project(tmp_path / "project", tiny_model, values)
    assert dvc(root, "repro", "-q").returncode == 0
    found = target(root, MODEL)
    best = found.training["best_step"]
    assert best < found.training["steps"]
    assert why_checkpoints.index(found, PointSelection(2, True))["steps"] == [best // 2, best]
    *_, end = at_points(found, PointSelection(2, True))
    assert isinstance(end, EarlierTarget) and end.point.at_end
    checkpoint = load_file(end.point.folder / "weights.safetensors")
    saved = {
        name.replace(".weight", ".default.weight"): weight
        for name, weight in load_file(found.folder / "adapter_model.safetensors").items()
    }
    assert checkpoint.keys() == saved.keys()
    for name, weight in checkpoint.items():
        assert torch.equal(weight, saved[name]), name


@pytest.mark.long
def test_the_weights_of_full_are_those_that_it_trained(tiny_model: Path, tmp_path: Path) -> None:
    values = {
        "method": "full",
        "peft": {"trainable": [r"layers\.1\..*v_proj"]},
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
    }
    root = training_pipeline.make_project(tmp_path / "project", tiny_model, values)
    assert dvc(root, "repro", "-q").returncode == 0
    found = target(root, MODEL)
    assert [*found.model.weights] == ["model.layers.1.self_attn.v_proj.weight"]
    assert why_checkpoints.index(found, PointSelection(2, True))["computed"] == 56
    first, end = at_points(found, PointSelection(2, True))
    assert first.model.shapes == end.model.shapes == found.model.shapes
    assert not torch.equal(
        first.model.weights["model.layers.1.self_attn.v_proj.weight"], next(iter(found.model.weights.values()))
    )


@pytest.mark.parametrize(
    ("changes", "optimizer", "message"),
    [
        (
            {},
            "adafactor",
            "adafactor, the optimizer of adapter@x, is not supported: adamw_torch and adamw_torch_fused are",
        ),
        ({}, "paged_adamw_8bit", "paged_adamw_8bit, the optimizer"),
        ({"method": "adalora"}, "adamw_torch", "checkpoints of adalora do not contain the weights"),
    ],
)
def test_trainings_without_such_points_are_refused_before_they_are_repeated(
    root: Path, changes: dict[str, Any], optimizer: str, message: str
) -> None:
    found = target(root, MODEL)
    entry = found.entry.model_copy(update=changes)
    training = {**found.training, "settings": {**found.training["settings"], "optim": optimizer}}
    asked = replace(retraining(found), entry=entry, training=training)
    with pytest.raises(InputError, match=message):
        asked.refuse_unsupported(scaled=True)


def test_the_entry_of_a_training_has_the_number_that_was_chosen_for_a_rank(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = target(root, MODEL)
    recorded = found.subject.index.lock_entry(found.run)
    asked = {"variants.x": {**PLAIN, "peft": {**PLAIN["peft"], "r": "auto"}}}
    monkeypatch.setattr(
        type(found.subject.index), "lock_entry", lambda index, run: {**recorded, "params": {"params.yaml": asked}}
    )
    monkeypatch.setitem(found.training, "chosen", {"peft.r": {"value": 6, "why": "few examples"}})
    assert found.entry.peft == {**PLAIN["peft"], "r": 6}


def test_names_follow_the_groups_of_the_optimizer() -> None:
    """Transformers puts biases and norms into a second group, whatever their place in the model."""
    model = torch.nn.Module()
    model.first = torch.nn.Linear(2, 2)
    model.norm = torch.nn.LayerNorm(2)
    model.last = torch.nn.Linear(2, 3)
    assert optimizer_order(model) == [
        "first.weight",
        "last.weight",
        "first.bias",
        "norm.weight",
        "norm.bias",
        "last.bias",
    ]
    groups = (
        Trainer(model=model, args=TrainingArguments(output_dir="unused", report_to="none", use_cpu=True))
        .create_optimizer()
        .param_groups
    )
    shapes = [tuple(weight.shape) for group in groups for weight in group["params"]]
    assert shapes == [tuple(model.get_parameter(name).shape) for name in optimizer_order(model)]


def test_moments_of_elements_without_a_gradient_give_no_weight(tmp_path: Path) -> None:
    point = Point(tmp_path, 3, False, True)
    point.write({"a": torch.zeros(3)}, {"a": torch.tensor([0.0, 1e-16, 4.0])})
    scales = point.scales()
    assert scales and torch.allclose(scales["a"], torch.tensor([0.0, 2e-8**-0.5, 2.0**-0.5]))
    state = {
        "groups": [{"betas": (0.9, 0.99)}],
        "state": [{"exp_avg_sq": torch.tensor([0.02]), "step": torch.tensor(2.0)}],
    }
    assert torch.allclose(second_moments(state, {}, ["a"])["a"], torch.tensor([0.02 / (1 - 0.99**2)]))
    never = {"groups": state["groups"], "state": [{}]}
    assert second_moments(never, {"a": torch.ones(2)}, ["a"])["a"].tolist() == [0.0, 0.0]


def test_files_of_other_code_and_questions_of_other_gradients_are_not_used(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = target(root, MODEL)
    [first, *_] = at_points(found, PointSelection(3))
    assert isinstance(first, EarlierTarget) and first.point.is_complete()
    before = why_calibration._identity(first)
    monkeypatch.setattr(points, "code", lambda: "other")
    assert not first.point.is_complete()
    with pytest.raises(InputError, match="missing or damaged"):
        next(at_points(found, PointSelection(3)))
    [other] = [replace(first)]
    assert why_calibration._identity(other) != before


def test_an_audit_lists_the_gradients_of_all_points(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", MODEL, "--json", "--project", str(indexed)]) == 0
    listed = document(capsys)["gradients"]
    assert [(one["stage"], one["records"], one["of"]) for one in listed] == [(MODEL, 28, 28)] * 6
    names = [Path(one["folder"]).name for one in listed[1:]]
    assert names == [
        "step-00000004",
        "step-00000004-scaled",
        "step-00000009",
        "step-00000009-scaled",
        "step-00000014-scaled",
    ]
