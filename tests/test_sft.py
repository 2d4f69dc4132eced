"""Training: packed examples are strangers to each other, the loss is the one that is documented, and runs repeat byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from dagster_project.chat import IGNORE, encode
from dagster_project.errors import InputError
from dagster_project.params import Compute
from dagster_project.records import write_table
from dagster_project.stages import adapter
from dagster_project.stages.tokenized import row_schema
from dagster_project.training.methods import peft_config, save_adapter
from dagster_project.training.sft import Recipe, attention_for, collate, steps, train

COMPUTE = Compute(threads=1, dtype="float32")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj", "down_proj"]}


def example(ids: list[int], answer_from: int, weight: float = 1.0) -> dict[str, Any]:
    """A row of one example, trained on from a position on."""
    labels = [IGNORE] * answer_from + ids[answer_from:]
    return {
        "example_ids": ["-"],
        "input_ids": ids,
        "labels": labels,
        "weights": [weight * (x != IGNORE) for x in labels],
        "lengths": [len(ids)],
    }


def packed(*examples: dict[str, Any]) -> dict[str, Any]:
    return {column: [value for one in examples for value in one[column]] for column in examples[0]}


def losses_alone(model: Any, one: dict[str, Any]) -> list[tuple[float, float]]:
    """(cross entropy, weight) of each trained token of an example that has a forward pass of its own."""
    with torch.no_grad():
        scores = model(torch.tensor([one["input_ids"]])).logits[0].log_softmax(-1)
    return [(-float(scores[i - 1, t]), one["weights"][i]) for i, t in enumerate(one["labels"]) if t != IGNORE]


def weighted_mean(losses: list[tuple[float, float]]) -> float:
    return sum(loss * weight for loss, weight in losses) / sum(weight for _, weight in losses)


SHORT, LONG, OTHER = (
    example([5, 6, 7, 8, 9], 2, weight=0.5),
    example([9, 8, 7, 20, 30, 40, 50], 3, weight=2.0),
    example([50, 60, 70, 80], 1),
)


def test_positions_start_anew_for_each_example_and_its_first_token_is_no_label() -> None:
    row, other = packed(example([5, 6], 1), example([7], 0)), example([8, 9, 10, 11, 12], 3, weight=2.0)
    batch = collate([row, other])
    assert {name: batch[name].tolist() for name in batch} == {
        "input_ids": [[5, 6, 7, 8, 9, 10, 11, 12]],
        "labels": [[IGNORE, 6, IGNORE, IGNORE, IGNORE, IGNORE, 11, 12]],
        "weights": [[0, 1, 1, 0, 0, 0, 2, 2]],
        "position_ids": [[0, 1, 0, 0, 1, 2, 3, 4]],
        "cu_seq_lens_q": [0, 2, 3, 8],
    }
    assert {name: batch[name].dtype for name in batch} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "weights": torch.float32,
        "position_ids": torch.int64,
        "cu_seq_lens_q": torch.int32,
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["attention of a CPU", "attention of a GPU"])
def test_packed_examples_never_attend_to_each_other(model: Any, device: str) -> None:
    batch = collate([packed(SHORT, LONG), OTHER])
    with torch.no_grad():
        alone = [model(torch.tensor([one["input_ids"]])).logits[0] for one in (SHORT, LONG, OTHER)]
        leaking = model(input_ids=batch["input_ids"][:, :12], use_cache=False).logits[0, 5:]
        model.set_attn_implementation(attention_for(torch.device(device)))  # the model itself stays on the CPU
        whole = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q")}
        together = model(**whole, use_cache=False).logits[0]
    for found, wanted in zip(together.split([5, 7, 4]), alone, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (leaking - alone[1]).abs().max() > 0.1, "the examples do not affect each other anyway, so nothing is shown"


def test_the_training_loss_is_the_weighted_mean_cross_entropy_of_the_batch(model: Any, tiny_tokenizer: Any) -> None:
    wanted = weighted_mean([loss for one in (SHORT, LONG, OTHER) for loss in losses_alone(model, one)])
    recipe = Recipe(per_device_train_batch_size=2, num_train_epochs=1)
    curve = train(model, tiny_tokenizer, Dataset.from_list([packed(SHORT, LONG), OTHER]), None, recipe, COMPUTE)
    assert [point["loss"] for point in curve] == pytest.approx([wanted], abs=1e-4)


def test_accumulated_passes_count_the_same(model: Any, tiny_tokenizer: Any) -> None:
    wanted = sum(weighted_mean(losses_alone(model, one)) for one in (LONG, OTHER)) / 2
    recipe = Recipe(gradient_accumulation_steps=2, num_train_epochs=1)
    curve = train(model, tiny_tokenizer, Dataset.from_list([LONG, OTHER]), None, recipe, COMPUTE)
    assert [point["loss"] for point in curve] == pytest.approx([wanted], abs=1e-4)


def test_the_validation_loss_before_the_first_step_is_the_plain_mean_per_token(model: Any, tiny_tokenizer: Any) -> None:
    losses = [loss for one in (SHORT, LONG, OTHER) for loss, _ in losses_alone(model, one)]
    rows = Dataset.from_list([packed(SHORT, LONG), OTHER])  # two rows with unlike numbers of tokens
    curve = train(model, tiny_tokenizer, rows, rows, Recipe(num_train_epochs=2), COMPUTE)
    watched = [(point["step"], point["validation_loss"]) for point in curve if "validation_loss" in point]
    assert [step for step, _ in watched] == [0, 2, 4]
    assert watched[0][1] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_checkpointing_changes_no_loss(model: Any, tiny_tokenizer: Any) -> None:
    import copy

    rows, curves = Dataset.from_list([packed(SHORT, LONG)]), []
    for checkpointing in (False, True):
        recipe = Recipe(num_train_epochs=3, gradient_checkpointing=checkpointing)
        curves.append(train(copy.deepcopy(model), tiny_tokenizer, rows, None, recipe, COMPUTE))
    assert [point["loss"] for point in curves[1]] == pytest.approx([point["loss"] for point in curves[0]], abs=1e-4)


@pytest.mark.parametrize(
    ("rows", "recipe"),
    [
        (3, Recipe()),
        (5, Recipe(per_device_train_batch_size=2, gradient_accumulation_steps=2)),
        (5, Recipe(gradient_accumulation_steps=4, num_train_epochs=3)),
        (5, Recipe(max_steps=3)),
        (2, Recipe(num_train_epochs=1, max_steps=6)),
    ],
    ids=["plain", "batch and accumulation", "accumulation that does not divide", "max_steps stops early", "max_steps beyond the epochs"],
)
def test_steps_says_how_many_steps_are_taken(model: Any, tiny_tokenizer: Any, rows: int, recipe: Recipe) -> None:
    curve = train(model, tiny_tokenizer, Dataset.from_list([OTHER] * rows), None, recipe, COMPUTE)
    assert [point["step"] for point in curve] == list(range(1, steps(rows, recipe) + 1))


@pytest.fixture
def tokenized(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A train split with one example, twice, and the same example to validate on."""
    ids, labels = encode(tiny_tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])
    row = example(ids, next(i for i, label in enumerate(labels) if label != IGNORE))
    write_table(tmp_path / "tokenized" / "train.parquet", [row, row], row_schema())
    write_table(tmp_path / "tokenized" / "validation.parquet", [row], row_schema())
    return tmp_path / "tokenized"


def tune(
    tokenized: Path, tiny_model: Path, out: Path, method: str = "lora", peft: dict[str, Any] = LORA, epochs: int = 2, rate: float = 1e-2
) -> Any:
    recipe = adapter.Params(method=method, peft=peft, num_train_epochs=epochs, learning_rate=rate)
    return adapter.run("x", recipe, COMPUTE, tokenized, tiny_model, out=out, curve_file=out.parent / f"{out.name}.csv")


def test_two_trainings_give_identical_bytes(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    tune(tokenized, tiny_model, tmp_path / "first")
    torch.rand(7)
    tune(tokenized, tiny_model, tmp_path / "second")
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert set(first) == {"adapter_config.json", "adapter_model.safetensors"}
    assert first == second


def test_loss_falls_on_a_repeated_example(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    report = tune(tokenized, tiny_model, tmp_path / "adapter", epochs=8, rate=0.1)
    losses = [float(line.split(",")[1]) for line in (tmp_path / "adapter.csv").read_text().splitlines()[1:]]
    assert len(losses) == report.metrics["steps"] == 16
    assert losses[-1] < losses[0] - 0.5
    assert report.metrics["validation_loss"][-1] < report.metrics["validation_loss"][0]
    assert [check.passed for check in report.checks] == [True]


def test_training_works_without_a_validation_split(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    write_table(tokenized / "validation.parquet", [], row_schema())
    report = tune(tokenized, tiny_model, tmp_path / "adapter")
    assert (report.metrics["steps"], report.metrics["validation_loss"]) == (4, [])


def test_an_empty_training_split_is_refused(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    write_table(tokenized / "train.parquet", [], row_schema())
    with pytest.raises(InputError, match="adapter: the training split is empty"):
        tune(tokenized, tiny_model, tmp_path / "adapter")


def test_an_unknown_method_is_refused_with_the_methods_there_are() -> None:
    with pytest.raises(InputError) as refusal:
        peft_config("lorra", {}, "adapter.x")
    assert refusal.value.what == "params.yaml: adapter.x.method: unknown method 'lorra'"
    assert {"lora", "ia3"} <= set(refusal.value.hint.removeprefix("methods: ").split(", "))


def test_unknown_keys_of_a_method_are_refused_all_at_once() -> None:
    with pytest.raises(InputError) as refusal:
        peft_config("lora", {"r": 4, "rank": 4, "alpha": 8}, "adapter.x")
    assert refusal.value.what.splitlines() == [
        "params.yaml: adapter.x.peft.alpha: unknown key of lora",
        "params.yaml: adapter.x.peft.rank: unknown key of lora",
    ]
    assert "lora_alpha" in refusal.value.hint


def test_a_target_that_the_model_lacks_is_refused(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"params.yaml: adapter.x.peft: .*no_such_layer"):
        tune(tokenized, tiny_model, tmp_path / "adapter", peft={"target_modules": ["no_such_layer"]})


def test_a_saved_adapter_has_a_sorted_configuration_without_absolute_paths(tiny_model: Path, tmp_path: Path, model: Any) -> None:
    from peft import get_peft_model

    model.config._name_or_path = str(tiny_model)
    save_adapter(get_peft_model(model, peft_config("lora", LORA, "adapter.x")), tmp_path / "adapter", base_model="data/base_model")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "data/base_model"
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert list(config) == sorted(config)
    assert str(tiny_model) not in text
