"""`pedigree why --checkpoints` and `--second-moments`: gradients at earlier points of a training, which is run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import training_pipeline
from builders.training import LORA
from conftest import dvc
from safetensors.torch import load_file

from dagster_project.__main__ import main
from dagster_project.commands import why_checkpoints
from dagster_project.commands.why_checkpoints import at_points
from dagster_project.commands.why_model import Target, target
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.records import read_table
from dagster_project.lineage.attribution import remake
from dagster_project.lineage.attribution.points import Where, second_moments, steps_of
from dagster_project.stages import adapter
from dagster_project.training.methods.build import causal
from dagster_project.training.trainers.harness.checkpoint import optimizer_state
from dagster_project.training.trainers.sft.fit import TrainingData

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
"""A training whose step depends on its row and the step before alone."""
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
    return main(["why", MODEL, *arguments, "--project", str(root)])


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def files(root: Path) -> dict[str, bytes]:
    folder = root / ".dvc/tmp/pedigree/gradients"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def untrained(found: Target) -> Any:
    data = TrainingData.read(found.variant, found.entry.method, found.compute, found.tokenized, found.base_model)
    prepared = data.model(found.entry, STEPS)
    causal(prepared.model).set_attn_implementation("eager")  # written for whole rows: here each example is read by itself
    return prepared


def loss_of_row(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """Mean loss over the labeled tokens of a packed row, each example read by itself: written without the project's own loss."""
    losses, at = [], 0
    for length in row["lengths"]:
        ids, labels = (torch.tensor([row[name][at : at + length]]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="none")[labels[0, 1:] != -100])
        at += length
    return torch.cat(losses).mean()


def test_steps_are_equally_spaced_up_to_the_last() -> None:
    assert steps_of(8, 4) == [2, 4, 6, 8] and steps_of(9, 4) == [2, 4, 6, 9] and steps_of(5, 1) == [5] and steps_of(2, 2) == [1, 2]
    with pytest.raises(InputError, match="has 2 steps"):
        steps_of(2, 3)


def test_weights_of_a_point_are_those_of_a_training_that_ended_there(indexed: Path, tmp_path: Path) -> None:
    found = target(indexed, MODEL)
    assert found.training["steps"] == STEPS
    first, second, end = at_points(found, Where(3))
    assert [first.point and first.point.step, second.point and second.point.step, end.point] == [4, 8, None]
    assert first.point
    shorter = found.entry.model_copy(update={"max_steps": first.point.step})
    out = tmp_path / "adapter"
    out.mkdir()
    adapter.produce("x", shorter, found.compute, found.tokenized, found.base_model, out, tmp_path / "loss.csv", tmp_path / "checkpoints")
    kept, trained = first.point.weights(), load_file(out / "adapter_model.safetensors")
    assert kept and len(kept) == len(trained)
    for name, weight in kept.items():
        assert torch.equal(weight, trained[name.replace(".default", "")]), name


def test_second_moments_of_the_first_step_are_the_squares_of_its_gradient(root: Path) -> None:
    found = target(root, MODEL)
    why_checkpoints.keep_checkpoints(found, Where(STEPS, True))
    [first, *_] = at_points(found, Where(STEPS, True))
    assert first.point and first.point.step == 1
    moments = load_file(first.point.folder / "moments.safetensors")
    used = {row["example_id"] for row in read_table(found.folder / "examples.parquet") if row["step"] == 1}
    [row] = [row for row in read_table(found.tokenized / "train.parquet") if used & {*row["example_ids"]}]
    model = untrained(found).model.eval()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(loss_of_row(model, row), list(weights.values()))
    assert moments.keys() == weights.keys()
    for (name, moment), gradient in zip(((name, moments[name]) for name in weights), gradients, strict=True):
        torch.testing.assert_close(moment, gradient**2, rtol=1e-3, atol=1e-10, msg=name)


@pytest.mark.parametrize("scaled", [False, True])
def test_stored_gradients_are_those_of_autograd_at_the_weights_of_each_point(indexed: Path, scaled: bool) -> None:
    found = target(indexed, MODEL)
    for point in at_points(found, Where(3, scaled)):
        stored, lengths = point.store.read()
        model = untrained(found).model.eval()
        named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        saved = point.point.weights() if point.point else None
        end = {
            name.replace(".weight", ".default.weight"): weight
            for name, weight in load_file(found.folder / "adapter_model.safetensors").items()
        }
        for name, weight in (saved or end).items():
            named[name].data.copy_(weight)
        for number in (0, 13, 27):
            [example] = point.records[number].examples
            row = {"lengths": [len(example.input_ids)], "input_ids": list(example.input_ids), "labels": list(example.labels)}
            gradients = dict(zip(named, torch.autograd.grad(loss_of_row(model, row), list(named.values())), strict=True))
            if scaled:
                assert point.point
                moments = load_file(point.point.folder / "moments.safetensors")
                gradients = {name: gradient / (moments[name].sqrt() + 1e-8).sqrt() for name, gradient in gradients.items()}
            expected = point.projection.project(gradients).numpy()
            assert np.allclose(lengths[number], np.linalg.norm(expected), rtol=1e-3)
            assert np.allclose(stored[number], expected / np.linalg.norm(expected), atol=2e-3)


def test_a_score_is_the_mean_of_the_cosines_at_the_points(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def scores(*options: str) -> dict[str, float]:
        assert why(indexed, *QUESTION, "--top", "28", "--json", *options) == 0
        found = document(capsys)
        assert ("points" in found) is bool(options)
        return {hit["example_id"]: hit["gradient"]["score"] for hit in found["hits"]}

    found = target(indexed, MODEL)
    mean = scores("--checkpoints", "3")
    assert len(mean) == 28 and mean != scores()
    from dagster_project.commands.why_question import Options, question, tokenizer_of

    asked = question(found, Options("Where is my hat?", "In the blue box.", "blue"), None, tokenizer_of(found))
    of_points = []
    for point in at_points(found, Where(3)):
        _, gradient = point.model.of_span(asked.example)
        wanted = point.projection.project(gradient).numpy()
        of_points.append(point.store.read()[0].astype(np.float32) @ (wanted / np.linalg.norm(wanted)))
    for record, score in zip(found.records, np.mean(of_points, 0), strict=True):
        assert abs(mean[record.example_id] - score) < 1e-4


def test_the_points_are_named_in_every_form_of_the_answer(indexed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--checkpoints", "3", "--second-moments")
    assert why(indexed, *QUESTION, *options, "--html", str(tmp_path / "why.html")) == 0
    said = (
        "gradient scores are means over the steps 4, 8 and 14 of the training, of gradients scaled by the second moments of its optimizer"
    )
    assert said in capsys.readouterr().out and said in (tmp_path / "why.html").read_text()
    assert why(indexed, *QUESTION, *options, "--json") == 0
    assert document(capsys)["points"] == {"steps": [4, 8, 14], "second_moments": True}


def test_an_index_of_points_is_computed_once_and_what_is_damaged_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(root)
    assert why(root, "--index", "--checkpoints", "3", "--json") == 0
    found = document(capsys)["index"]
    assert (found["computed"], found["records"], found["steps"]) == (0, 28, [4, 8, 14]) and files(root) == before
    [home] = (root / ".dvc/tmp/pedigree/gradients").iterdir()
    weights = home / "points/step-00000004/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert why(root, *QUESTION, "--checkpoints", "3") == 2
    assert "add --index to train again" in capsys.readouterr().err
    assert why(root, "--index", "--checkpoints", "3") == 0
    assert files(root) == before, "the same bytes"


def test_a_training_that_gives_other_weights_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = target(root, MODEL)
    shutil.rmtree(found.store.folder / "points")
    monkeypatch.setitem(found.training, "seed", 5)
    with pytest.raises(CheckFailed, match="has other weights"):
        why_checkpoints.index(found, Where(3))
    assert not (found.store.folder / "points").exists() or not [*(found.store.folder / "points").glob("step-*")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--index", "--checkpoints", "15"), "--checkpoints 15: the training has 14 steps"),
        (("--index", "--checkpoints", "0"), "--checkpoints"),
        ((*QUESTION, "--checkpoints", "2"), "missing or damaged"),
        (("--suspects", "--checkpoints", "3"), "not with --checkpoints"),
        (("--suspects", "--second-moments"), "not with --second-moments"),
    ],
)
def test_bad_input_is_refused_with_one_message(
    indexed: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(indexed)
    try:
        code = why(indexed, *arguments)
    except SystemExit as ended:
        code = int(str(ended.code))
    shown = capsys.readouterr()
    assert code == 2 and said in shown.err and "Traceback" not in shown.err and files(indexed) == before


def test_an_optimizer_without_second_moments_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_sgd = torch.optim.SGD([torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)], momentum=0.9)
    for group in of_sgd.param_groups:
        for weight in group["params"]:
            weight.grad = torch.ones_like(weight)
    of_sgd.step()
    state = optimizer_state(of_sgd)
    assert second_moments(state, ["a", "b"]) is None
    shutil.rmtree(next((root / ".dvc/tmp/pedigree/gradients").iterdir()) / "points")
    monkeypatch.setattr(remake, "_optimizer", lambda saved: state)
    assert why(root, "--index", "--second-moments") == 2
    assert "keeps none for each number" in capsys.readouterr().err
    assert why(root, "--index", "--checkpoints", "2", "--json") == 0
    assert document(capsys)["index"]["steps"] == [7, 14]


def test_an_audit_lists_the_gradients_of_all_points(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", MODEL, "--json", "--project", str(indexed)]) == 0
    listed = document(capsys)["gradients"]
    assert [(one["stage"], one["records"], one["of"]) for one in listed] == [(MODEL, 28, 28)] * 6
    names = [Path(one["folder"]).name for one in listed[1:]]
    assert names == ["step-00000004", "step-00000004-scaled", "step-00000008", "step-00000008-scaled", "step-00000014-scaled"]
