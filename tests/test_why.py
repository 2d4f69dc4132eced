"""`pedigree why`: gradients equal those of plain autograd, a store is of one
model only, and a check by training again changes nothing but the records."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders.gradients import flat
from builders.tool_calls import weather
from builders.training import LORA, example, make_data, train_adapter

from dagster_project.__main__ import main
from dagster_project.commands import why
from dagster_project.commands.why import Texts, as_text
from dagster_project.commands.why_question import answering, tokenize
from dagster_project.core.chat import IGNORE, encode
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_folder
from dagster_project.core.named_templates import HERMES
from dagster_project.core.params import Compute
from dagster_project.core.records import example_id, read_table, write_records
from dagster_project.evaluation.baselines import bm25
from dagster_project.lineage.attribution import proof, ranking, second_moment, store
from dagster_project.lineage.attribution.gradients import TrainedModel
from dagster_project.lineage.attribution.per_record import is_packed, projected_gradients
from dagster_project.lineage.attribution.projection import Projection, signs
from dagster_project.lineage.attribution.records import Example, TrainedRecord, trained_records
from dagster_project.lineage.attribution.second_moment import SecondMoment
from dagster_project.lineage.attribution.store import GradientStore, identity_of
from dagster_project.lineage.history import listing_of

COMPUTE = Compute(threads=1, dtype="float32")
WHOLE = Projection(numbers=4096**2)
"""So large that no side of a gradient is projected."""
SHORT = {**LORA, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def work(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenized`, and `adapter`, which was trained on it."""
    folder = tmp_path_factory.mktemp("why")
    make_data(folder)
    train_adapter(folder, tiny_model, "adapter", SHORT)
    return folder


@pytest.fixture(scope="module")
def records(work: Path) -> list[TrainedRecord]:
    return trained_records(work / "adapter", work / "tokenized")


@pytest.fixture(scope="module")
def trained(work: Path, tiny_model: Path) -> TrainedModel:
    return TrainedModel.load(work / "adapter", tiny_model, COMPUTE, "adapter@x")


def plain_gradients(model: Any, example: Example) -> dict[str, np.ndarray]:
    """Gradients of the weighted mean loss by PEFT's own layers, transformers' own attention and autograd alone."""
    import torch

    model.zero_grad()
    logits = model(torch.tensor([example.input_ids])).logits[0, :-1].float()
    likely = torch.log_softmax(logits, -1)
    kept = [(i, label, example.weights[i + 1]) for i, label in enumerate(example.labels[1:]) if label != IGNORE]
    loss = -sum(weight * likely[i, label] for i, label, weight in kept) / sum(weight for _, _, weight in kept)
    loss.backward()
    return {name: weight.grad.numpy().copy() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.fixture(scope="module")
def expected(work: Path, tiny_model: Path, records: list[TrainedRecord]) -> np.ndarray:
    """Full gradient of each of the first records, by `plain_gradients`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), work / "adapter", is_trainable=True
    ).eval()
    return np.stack([flat(plain_gradients(model, record.examples[0])) for record in records[:12]])


def assert_close(found: np.ndarray, expected: np.ndarray, bound: float = 1e-5) -> None:
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()


# ---- records


def test_the_records_are_those_of_the_training_with_its_tokens(work: Path, records: list[TrainedRecord]) -> None:
    seen = {row["example_id"] for row in read_table(work / "adapter/examples.parquet")}
    assert [record.example_id for record in records] == sorted(seen)
    first = read_table(work / "tokenized/train.parquet")[0]
    [one] = [record for record in records if record.example_id == first["example_ids"][1]]
    start, stop = first["lengths"][0], sum(first["lengths"][:2])
    assert one.examples == (Example(*(tuple(first[name][start:stop]) for name in ("input_ids", "labels", "weights"))),)


def test_records_that_were_never_in_a_step_are_left_out(
    work: Path, tmp_path: Path, records: list[TrainedRecord]
) -> None:
    from dagster_project.core.records import write_table
    from dagster_project.training.trainers.harness.weight_audit import seen_schema

    rows = [row for row in read_table(work / "adapter/examples.parquet") if row["example_id"] != records[3].example_id]
    write_table(tmp_path / "examples.parquet", rows, seen_schema())
    assert trained_records(tmp_path, work / "tokenized") == [record for record in records if record != records[3]]


def test_data_of_another_training_are_refused(work: Path, tmp_path: Path) -> None:
    make_data(tmp_path, rows=2)
    with pytest.raises(InputError, match="not the data of this training"):
        trained_records(work / "adapter", tmp_path / "tokenized")


# ---- gradients


def test_a_gradient_equals_that_of_plain_autograd(
    trained: TrainedModel, records: list[TrainedRecord], expected: np.ndarray
) -> None:
    assert_close(np.stack([flat(trained.of_record(record.examples)) for record in records[:12]]), expected)


def test_packed_records_have_the_gradients_of_each_alone(
    trained: TrainedModel, records: list[TrainedRecord], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_project.lineage.attribution import per_record

    assert is_packed(trained), "otherwise they would not be packed"
    examples = [record.examples for record in records[:12]]
    assert_close(projected_gradients(trained, WHOLE, examples).numpy(), expected)
    monkeypatch.setattr(per_record, "ROOM", 30)  # several passes
    assert_close(projected_gradients(trained, WHOLE, examples).numpy(), expected)
    alone = np.stack([Projection(25).project(trained.of_record(record)).numpy() for record in examples])
    assert_close(projected_gradients(trained, Projection(25), examples).numpy(), alone)


def test_threads_compute_passes_of_their_own(
    trained: TrainedModel, records: list[TrainedRecord], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    import torch

    from dagster_project.lineage.attribution import per_record

    seen = []
    of_pass, before = per_record._of_pass, torch.get_num_threads()
    both = threading.Barrier(2, timeout=60)

    def watched(model: TrainedModel, projection: Projection, given: Any) -> torch.Tensor:
        both.wait()  # two passes at a time
        seen.append((threading.get_ident(), id(model.prepared.model), torch.get_num_threads()))
        return of_pass(model, projection, given)

    monkeypatch.setattr(per_record, "_of_pass", watched)
    monkeypatch.setattr(per_record, "ROOM", 20)
    examples = [record.examples for record in records[:12]]
    torch.set_num_threads(2)
    try:
        assert_close(projected_gradients(trained, WHOLE, examples).numpy(), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(seen) > 2 and len({thread for thread, _, _ in seen}) == 2, "each of two threads has passes"
    assert len({model for _, model, _ in seen}) == 2, "a forward pass may change the modules of a model"
    assert {threads for _, _, threads in seen} == {1}


def test_an_error_in_a_pass_is_reported_and_leaves_the_layers_as_they_were(
    trained: TrainedModel, records: list[TrainedRecord], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [record.examples for record in records[:12]]
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(TrainedModel, "sum_of_losses", lambda *_: (_ for _ in ()).throw(MemoryError))
        projected_gradients(trained, WHOLE, examples)
    assert_close(np.stack([flat(trained.of_record(one)) for one in examples]), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_passes_have_about_as_many_tokens_each(threads: int) -> None:
    from dagster_project.lineage.attribution.per_record import ROOM, _passes

    dice = np.random.default_rng(0)
    for count in (0, 1, 2, 32, 100):
        tokens = dice.integers(20, 400, count).tolist()
        passes = _passes(tokens, threads)
        assert sorted(number for numbers in passes for number in numbers) == list(range(count))
        assert all(passes) and all(numbers == sorted(numbers) for numbers in passes)
        assert len(passes) % threads == 0 or len(passes) == count
        sizes = [sum(tokens[i] for i in numbers) for numbers in passes]
        assert max(sizes, default=0) <= ROOM + 400
        assert count < 32 or max(sizes) - min(sizes) <= 400


def test_packed_records_have_the_gradients_of_each_alone_where_the_output_layer_has_an_adapter(
    tiny_model: Path, tmp_path: Path
) -> None:
    """It computes only the tokens with labels."""
    make_data(tmp_path)
    peft = {**LORA["peft"], "target_modules": ["q_proj", "lm_head"]}
    train_adapter(tmp_path, tiny_model, "adapter", {**SHORT, "merge": False, "peft": peft})
    model = TrainedModel.load(tmp_path / "adapter", tiny_model, COMPUTE, "adapter@x")
    examples = [one.examples for one in trained_records(tmp_path / "adapter", tmp_path / "tokenized")[:6]]
    expected = np.stack([flat(model.of_record(one)) for one in examples])
    assert_close(projected_gradients(model, WHOLE, examples).numpy(), expected)


def test_records_of_a_model_that_mixes_packed_examples_have_the_gradients_of_each_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Such a model is trained with `tokenized.packing: false`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

    from dagster_project.core.records import write_table
    from dagster_project.stages.tokenized import row_schema

    base = shutil.copytree(tiny_model, tmp_path / "model")
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=64, num_hidden_layers=2, state_size=8)).save_pretrained(
        base
    )
    rows = [example([*range(5 + i, 15 + i)], 4) | {"example_ids": [f"{i}"]} for i in range(4)]
    for split in ("train", "validation"):
        write_table(tmp_path / "tokenized" / f"{split}.parquet", rows, row_schema())
    peft = {**LORA["peft"], "target_modules": ["in_proj", "x_proj"]}
    params = {**SHORT, "neftune_noise_alpha": None, "merge": False, "peft": peft}
    train_adapter(tmp_path, base, "adapter", params)
    model = TrainedModel.load(tmp_path / "adapter", base, COMPUTE, "adapter@x")
    records = trained_records(tmp_path / "adapter", tmp_path / "tokenized")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", is_trainable=True
    ).eval()
    expected = np.stack([flat(plain_gradients(plain, record.examples[0])) for record in records])
    assert_close(projected_gradients(model, WHOLE, [record.examples for record in records]).numpy(), expected, 1e-4)
    together = model.of_record([record.examples[0] for record in records])
    assert_close(flat(together), expected.mean(0), 1e-4)


def test_examples_of_one_record_share_a_loss(
    trained: TrainedModel, records: list[TrainedRecord], expected: np.ndarray
) -> None:
    one, two = records[0].examples[0], records[1].examples[0]
    weights = [
        sum(w for w, label in zip(e.weights[1:], e.labels[1:], strict=True) if label != IGNORE) for e in (one, two)
    ]
    mean = (weights[0] * expected[0] + weights[1] * expected[1]) / sum(weights)
    assert_close(projected_gradients(trained, WHOLE, [(one, two)]).numpy()[0], mean)
    assert_close(flat(trained.of_record((one, two))), mean)


def test_a_record_without_a_trained_token_has_the_gradient_zero(
    trained: TrainedModel, records: list[TrainedRecord]
) -> None:
    one = records[0].examples[0]
    silent = Example(one.input_ids, (IGNORE,) * len(one.labels), (0.0,) * len(one.weights))
    found = projected_gradients(trained, WHOLE, [(silent,), records[1].examples]).numpy()
    assert not found[0].any() and found[1].any()


def test_a_step_along_the_gradient_of_a_span_makes_it_more_likely(
    trained: TrainedModel, records: list[TrainedRecord]
) -> None:
    import torch

    example = records[0].examples[0]
    before, gradient = trained.of_span(example)
    assert before == pytest.approx(trained.log_probability(example), rel=1e-5) and before < 0
    size = sum(float(value.square().sum()) for value in gradient.values())
    step = 1e-3 / size**0.5

    def move(by: float) -> None:
        with torch.no_grad():
            for name, weight in trained.weights.items():
                weight -= by * gradient[name]

    move(step)
    gained = trained.log_probability(example) - before
    move(-step)
    assert gained == pytest.approx(step * size, rel=0.05)


def test_a_weakened_model_has_half_of_the_adapter_and_answers_as_before(
    work: Path, tiny_model: Path, records: list[TrainedRecord]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    full = TrainedModel.load(work / "adapter", tiny_model, COMPUTE, "adapter@x")
    asked = records[0].examples[0]
    likely = full.log_probability(asked)
    before = {name: weight.detach().clone() for name, weight in full.weights.items()}
    weak = full.weakened()
    assert weak.is_weakened and weak.weakened() is weak
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), work / "adapter", is_trainable=True
    ).eval()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "lora_B" in name:
                weight /= 2
    expected = np.stack([flat(plain_gradients(plain, record.examples[0])) for record in records[:6]])
    assert_close(projected_gradients(weak, WHOLE, [record.examples for record in records[:6]]).numpy(), expected)
    value, gradient = weak.of_span(asked)
    assert value == weak.log_probability(asked) == likely, "a probability is that of the model as it answers"
    tokens = sum(label != IGNORE for label in asked.labels[1:])
    even = Example(asked.input_ids, asked.labels, (1.0,) * len(asked.weights))
    assert_close(flat(gradient), tokens * flat(plain_gradients(plain, even)))
    changed = {name for name, weight in weak.weights.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_B" in name}


def test_an_error_while_the_model_answers_leaves_it_weakened(
    work: Path, tiny_model: Path, records: list[TrainedRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    weak = TrainedModel.load(work / "adapter", tiny_model, COMPUTE, "adapter@x").weakened()
    before = {name: weight.detach().clone() for name, weight in weak.weights.items()}
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(TrainedModel, "_nats", lambda model, example: (_ for _ in ()).throw(MemoryError))
        weak.log_probability(records[0].examples[0])
    assert all(torch.equal(weight, before[name]) for name, weight in weak.weights.items())


@pytest.mark.parametrize(("method", "changes"), [("dora", True), ("adalora", True), ("ia3", False)])
def test_b_is_halved_where_a_method_has_one(
    tiny_model: Path, work: Path, tmp_path: Path, method: str, changes: bool
) -> None:
    import torch

    shutil.copytree(work / "tokenized", tmp_path / "tokenized")
    train_adapter(tmp_path, tiny_model, "adapter", {"method": method, "learning_rate": 1e-2, "num_train_epochs": 1})
    full = TrainedModel.load(tmp_path / "adapter", tiny_model, COMPUTE, "adapter@x")
    before = {name: weight.detach().clone() for name, weight in full.weights.items()}
    for name, weight in full.weakened().weights.items():
        assert torch.equal(weight, before[name] / 2 if ".lora_B." in name else before[name])
    assert any(".lora_B." in name for name in before) is changes


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora", False])
def test_an_adapter_that_began_with_an_effect_is_not_weakened(work: Path, tiny_model: Path, start: str | bool) -> None:
    import torch

    full = TrainedModel.load(work / "adapter", tiny_model, COMPUTE, "adapter@x")
    full.prepared.model.peft_config["default"].init_lora_weights = start
    before = {name: weight.detach().clone() for name, weight in full.weights.items()}
    assert all(torch.equal(weight, before[name]) for name, weight in full.weakened().weights.items())


def test_methods_without_gradients_of_weights_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    from dagster_project.training.methods.load import AdapterInfo

    AdapterInfo(method="prompt_tuning").write(tmp_path)
    with pytest.raises(InputError, match="virtual tokens"):
        TrainedModel.load(tmp_path, tiny_model, COMPUTE, "adapter@x")


def test_other_methods_take_one_record_at_a_time(tiny_model: Path, work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "tokenized", tmp_path / "tokenized")
    params = {"method": "ia3", "learning_rate": 1e-2, "num_train_epochs": 1}
    train_adapter(tmp_path, tiny_model, "adapter", params)
    model = TrainedModel.load(tmp_path / "adapter", tiny_model, COMPUTE, "adapter@x")
    found = trained_records(tmp_path / "adapter", tmp_path / "tokenized")[:2]
    assert not is_packed(model)
    gradients = projected_gradients(model, Projection(16), [record.examples for record in found]).numpy()
    assert (
        gradients.shape == (2, Projection(16).width(model.shapes))
        and np.isfinite(gradients).all()
        and gradients.any(1).all()
    )


# ---- projections


def test_inner_products_are_exact_where_nothing_is_projected_and_unbiased_where_it_is() -> None:
    import torch

    dice = np.random.default_rng(1)
    one, two = (
        {"w": torch.tensor(dice.normal(size=(40, 30)) + 0.5).float(), "v": torch.tensor(dice.normal(size=7)).float()}
        for _ in range(2)
    )
    exact = sum(float((one[name] * two[name]).sum()) for name in one)
    assert float(WHOLE.project(one) @ WHOLE.project(two)) == pytest.approx(exact, rel=1e-5)
    estimates = [float(p.project(one) @ p.project(two)) for p in (Projection(64, seed) for seed in range(300))]
    error = np.std(estimates) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - exact) < 4 * error and error < 0.1 * abs(exact)


@pytest.mark.parametrize("numbers", [1, 5, 16, 128, 1000])
def test_a_projection_has_at_most_the_wanted_numbers_and_no_more_than_the_weight(numbers: int) -> None:
    projection = Projection(numbers)
    for rows, columns in ((rows, columns) for rows in (1, 2, 3, 9, 16, 17, 300) for columns in (1, 4, 13, 16, 31, 576)):
        height, width = projection.shape((rows, columns))
        assert 1 <= height <= rows and 1 <= width <= columns and height * width <= numbers
        assert (height, width) == (rows, columns) or 2 * height * width > numbers, "few numbers are left unused"
        if min(rows, columns) <= min(16, numbers):
            assert (height if rows <= columns else width) == min(rows, columns)
        assert projection.shape((columns, rows)) == (width, height) or rows == columns
    assert projection.shape((576,)) == (1, min(numbers, 576)) and projection.shape((8, 2, 2)) == projection.shape(
        (8, 4)
    )


def test_signs_depend_on_the_name_alone() -> None:
    one = signs("0:a:left", 3, 50)
    assert {*one.ravel().tolist()} == {1.0, -1.0} and abs(one.mean()) < 0.3
    assert (one == signs("0:a:left", 3, 50)).all() and (one != signs("0:b:left", 3, 50)).any()


# ---- the store


def gradient_of(numbers: Any) -> Any:
    import torch

    return torch.stack([torch.from_numpy(np.random.default_rng(i).normal(size=20)).float() for i in numbers])


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD", 4)


def contents(one: GradientStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(one.folder.iterdir())}


@pytest.mark.usefixtures("small_shards")
def test_a_store_has_the_same_bytes_twice_and_after_an_interruption(tmp_path: Path) -> None:
    one, two, three = (GradientStore.at(tmp_path / str(i), {"adapter": "a"}, 10) for i in range(3))
    assert one.build(gradient_of, "x") == two.build(gradient_of, "x") == 10
    calls = iter(range(2))

    def interrupted(numbers: Any) -> Any:
        next(calls)
        return gradient_of(numbers)

    with pytest.raises(StopIteration):
        three.build(interrupted, "x")
    with pytest.raises(InputError, match="incomplete or damaged: 1 of 3"):
        three.read()
    assert three.build(gradient_of, "x") == 2
    assert contents(one) == contents(two) == contents(three)


@pytest.mark.usefixtures("small_shards")
def test_what_is_read_are_the_gradients_at_length_one(tmp_path: Path) -> None:
    one = GradientStore.at(tmp_path, {}, 10)
    one.build(gradient_of, "x")
    stored = one.read()
    units, lengths = stored.units, stored.lengths
    whole = gradient_of(range(10)).numpy()
    assert units.dtype == np.float16 and np.allclose(units * lengths[:, None], whole, atol=2e-3)
    assert np.allclose(lengths, np.linalg.norm(whole, axis=1))
    assert np.allclose(stored.second_moment.inner, units.astype(np.float64) @ units.astype(np.float64).T, atol=1e-5)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    "change", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01")]
)
def test_a_second_moment_that_is_missing_or_damaged_is_computed_from_the_gradients(tmp_path: Path, change: Any) -> None:
    one = GradientStore.at(tmp_path, {}, 10)
    one.build(gradient_of, "x")
    before, content = one.read().second_moment.inner, contents(one)
    assert one.is_complete()
    change(one.folder / "second_moment.safetensors")
    assert np.array_equal(one.read().second_moment.inner, before)
    assert not one.is_complete() and not one.missing()
    assert one.build(gradient_of, "x") == 0 and contents(one) == content


@pytest.mark.usefixtures("small_shards")
def test_a_stored_second_moment_is_read_and_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = GradientStore.at(tmp_path, {}, 10)
    one.build(gradient_of, "x")
    before = one.read().second_moment.inner
    monkeypatch.setattr(SecondMoment, "of", lambda rows: pytest.fail("it is stored"))
    assert np.array_equal(one.read().second_moment.inner, before)


def test_a_gradient_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    one = GradientStore.at(tmp_path, {}, 10)
    with pytest.raises(InputError, match="a gradient is not finite"):
        one.build(lambda numbers: gradient_of(numbers) / 0, "adapter@x: gradients")
    assert not one.is_begun()


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_file_is_refused_and_computed_again(tmp_path: Path) -> None:
    one = GradientStore.at(tmp_path, {}, 10)
    one.build(gradient_of, "x")
    before = contents(one)
    path = one.folder / "gradients-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="damaged"):
        one.read()
    assert one.build(gradient_of, "x") == 4
    assert contents(one) == before


def test_a_store_of_another_model_is_never_used(
    work: Path, tiny_model: Path, records: list[TrainedRecord], tmp_path: Path
) -> None:
    def at(
        adapter: Path,
        of: list[TrainedRecord] = records,
        projection: Projection = WHOLE,
        dtype: str = "float32",
        strength: float = 0.5,
    ) -> GradientStore:
        hashes = [md5_of_folder(listing_of(folder)) for folder in (adapter, tiny_model)]
        return GradientStore.at(
            tmp_path, identity_of(*hashes, of, projection, {"dtype": dtype}, 0.0, strength), len(of)
        )

    first = at(work / "adapter")
    assert at(work / "adapter").folder == first.folder
    other = shutil.copytree(work / "adapter", tmp_path / "other")
    weights = other / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    altered = [*records[:-1], TrainedRecord(records[-1].example_id, records[0].examples)]
    different = [
        at(other),
        at(work / "adapter", altered),
        at(work / "adapter", projection=Projection(9)),
        at(work / "adapter", dtype="bfloat16"),
        at(work / "adapter", strength=1.0),
    ]
    assert len({first.folder, *(one.folder for one in different)}) == 6
    first.folder.mkdir(parents=True)
    manifest = {"identity": dict(different[0].identity), "records": len(records), "shards": {}}
    (first.folder / "store.json").write_text(json.dumps(manifest))  # moved there by hand
    assert not first.is_begun()


def test_an_erasure_removes_all_stores_and_trainings_of_checks(tmp_path: Path) -> None:
    from dagster_project.orchestration.erasure.steps import Erasure

    GradientStore.at(tmp_path, {}, 3).build(gradient_of, "x")
    (tmp_path / proof.PROOFS / "model" / "set").mkdir(parents=True)
    plan = {"needles": {"texts": [], "groups": [], "ids": [], "unsearchable": 0}, "files": []}
    Erasure(tmp_path, plan, lambda _: None).files()
    assert not (tmp_path / store.GRADIENTS).exists() and not (tmp_path / proof.PROOFS).exists()


# ---- ranking


def of_length_one(rows: np.ndarray) -> np.ndarray:
    units: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units


def test_cosines_of_questions_with_records(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = np.random.default_rng(2)
    rows, questions = dice.normal(size=(50, 30)), dice.normal(size=(3, 30)).astype(np.float32)
    exact = of_length_one(questions) @ of_length_one(rows).T
    for block in (4096, 7):
        monkeypatch.setattr(ranking, "BLOCK", block)
        assert np.allclose(ranking.cosines(of_length_one(rows).astype(np.float16), questions), exact, atol=2e-3)
    assert not ranking.cosines(rows.astype(np.float16), np.zeros((1, 30), np.float32)).any()


def dense_scores(rows: np.ndarray, questions: np.ndarray, damping: float) -> np.ndarray:
    """The definition: the second moment as a matrix, inverted."""
    moment = rows.T @ rows + damping * np.eye(rows.shape[1])
    found: np.ndarray = damping * of_length_one(questions) @ np.linalg.inv(moment) @ rows.T
    return found


@pytest.mark.parametrize(("count", "damping"), [(60, 1.0), (400, 0.01 * 400)])
def test_scores_are_those_of_the_damped_inverse_of_the_second_moment(
    count: int, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "BLOCK", 7 * 40 * 4)  # seven records at a time
    dice = np.random.default_rng(3)
    rows = of_length_one(dice.normal(size=(count, 40)) + 0.7).astype(np.float16)
    questions = (dice.normal(size=(4, 40)) + 0.7).astype(np.float32)
    found = second_moment.scores(SecondMoment.of(rows), rows, questions)
    assert np.allclose(found, dense_scores(rows.astype(np.float64), questions, damping), atol=1e-5)
    assert np.abs(found).max() < np.abs(ranking.cosines(rows, questions)).max(), (
        "what they have in common counts little"
    )
    assert not second_moment.scores(SecondMoment.of(rows), rows, np.zeros((1, 40), np.float32)).any()
    assert np.allclose(second_moment.scores(SecondMoment.of(rows), rows, questions[1:2])[0], found[1], atol=1e-6), (
        "questions do not depend on each other"
    )


def test_a_sample_stands_for_all_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of records that are all there twice, half stand for all; of others, scores are nearly the same."""
    dice = np.random.default_rng(4)
    shared = of_length_one(dice.normal(size=(3, 300)))
    rows = of_length_one(shared[dice.integers(3, size=600)] + 0.1 * dice.normal(size=(600, 300))).astype(np.float16)
    questions = (shared + 0.02 * dice.normal(size=(3, 300))).astype(np.float32)
    exact = second_moment.scores(SecondMoment.of(rows), rows, questions)
    monkeypatch.setattr(second_moment, "SAMPLE", 300)
    chosen = second_moment.sample(600)
    assert len(set(chosen.tolist())) == 300 and (chosen == second_moment.sample(600)).all()
    near = SecondMoment.of(rows)
    assert near.inner.shape == (300, 300)
    assert all(
        np.corrcoef(one, other)[0, 1] > 0.95
        for one, other in zip(second_moment.scores(near, rows, questions), exact, strict=True)
    )
    twice = np.empty((600, 300), np.float16)
    twice[chosen], twice[np.setdiff1d(np.arange(600), chosen)] = rows[:300], rows[:300]
    damping = 0.01 * 600
    assert np.allclose(
        second_moment.scores(SecondMoment.of(twice), twice, questions),
        dense_scores(twice.astype(np.float64), questions, damping),
        atol=1e-4,
    )


def test_a_record_that_is_like_the_question_in_what_is_rare_comes_before_those_that_are_like_it_in_what_all_share() -> (
    None
):
    dice = np.random.default_rng(5)
    rows = dice.normal(size=(200, 300)) * 0.04
    rows[:, 0] += 1.0  # all share this
    rows[7, 0], rows[7, 1] = 0.2, 1.0  # the one record with this
    question = np.zeros((1, 300), np.float32)
    question[0, :2] = 1.0, 0.6
    units = of_length_one(rows).astype(np.float16)
    assert ranking.ranks(ranking.cosines(units, question)[0])[7] > 100
    assert ranking.ranks(second_moment.scores(SecondMoment.of(units), units, question)[0])[7] == 1


def test_ranks_and_their_weighted_sum() -> None:
    assert ranking.ranks(np.array([0.1, 0.9, 0.9, 0.5])).tolist() == [4, 1, 2, 3]
    scores = np.array([[0.9, 0.1, 0.5, 0.0], [1.0, 0.0, 4.0, 0.5], [0.0, 0.0, 1.0, 0.0]])
    found = ranking.Ranking.of(*scores)
    assert found.gradient_rank.tolist() == [1, 3, 2, 4] and found.bm25_rank.tolist() == [2, 4, 1, 3]
    units = [(row - row.sum() / 4) / (np.square(row - row.sum() / 4).sum() / 4) ** 0.5 for row in scores]
    assert found.order() == sorted(range(4), key=lambda i: -(1.5 * units[0][i] + units[1][i] + units[2][i]))


def test_words_are_those_of_prompt_and_asked_part_together() -> None:
    documents = ["a late hat", "a blue box", "late blue pen", "a pen"]
    prompt, part, both = bm25(documents, ["late hat", "blue blue", "late hat blue blue"])
    assert np.allclose(prompt + part, both) and np.allclose(ranking.Ranking.of(np.zeros(4), prompt, part).bm25, both)


def test_a_score_in_which_nothing_is_far_from_the_others_changes_little() -> None:
    """A record comes first that is far from the others by its gradient, by the
    words of the prompt, or by those of the asked part alone."""
    dice = np.random.default_rng(4)
    noise = np.stack([0.01 * dice.normal(size=200), dice.gamma(2.0, size=200), dice.gamma(2.0, size=200)])
    for i, far in enumerate((0.3, 60.0, 60.0)):
        scores = noise.copy()
        scores[i, 7] = far
        assert ranking.Ranking.of(*scores).order()[0] == 7
    few = np.zeros(200)
    few[[3, 5]] = 1.0, 2.0
    assert ranking.Ranking.of(np.zeros(200), np.zeros(200), few).order()[:2] == [5, 3]


def test_records_without_a_word_in_common_share_the_last_place() -> None:
    found = ranking.Ranking.of(np.array([0.1, 0.2, 0.3, 0.4]), np.zeros(4), np.array([0.0, 0.0, 2.0, 0.0]))
    assert found.bm25_rank.tolist() == [4, 4, 1, 4] and found.order() == [2, 3, 1, 0]


@pytest.mark.parametrize(
    ("first", "tenth", "expected"),
    [(12.0, 3.0, True), (12.0, 7.0, False), (5.9, 1.0, False), (6.0, 3.0, True), (12.0, -1.0, True)],
)
def test_few_records_stand_out_and_a_crowd_does_not(first: float, tenth: float, expected: bool) -> None:
    z = np.array([*([-2.0] * 50), *([tenth] * 9), first])
    assert ranking.stands_out(np.random.default_rng(0).permutation(z)) == expected


def test_equal_scores_have_no_distance() -> None:
    assert not ranking.robust_z(np.full(5, 0.3)).any() and not ranking.standardized(np.full(5, 0.3)).any()
    normal = np.random.default_rng(3).normal(size=4000)
    assert np.allclose(ranking.robust_z(normal), (normal - normal.mean()) / normal.std(), atol=0.15)


# ---- questions


def test_the_asked_tokens_are_those_of_the_span(tiny_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hat?"}, {"role": "assistant", "content": "A red hat, a red one."}]
    asked = tokenize(tiny_tokenizer, messages, "red")
    kept = [
        token for token, label in zip(asked.example.input_ids, asked.example.labels, strict=True) if label != IGNORE
    ]
    assert tiny_tokenizer.decode(kept) == "redred" and [asked.turn[a:b] for a, b in asked.spans] == ["red", "red"]
    whole = tokenize(tiny_tokenizer, messages, None)
    kept = [
        token for token, label in zip(whole.example.input_ids, whole.example.labels, strict=True) if label != IGNORE
    ]
    assert tiny_tokenizer.decode(kept) == "A red hat, a red one.<|im_end|>"
    assert list(whole.example.input_ids) == encode(tiny_tokenizer, messages)[0]


def test_of_an_answer_that_was_cut_off_the_end_is_not_asked(tiny_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hat?"}, {"role": "assistant", "content": "A red hat, a"}]
    asked = tokenize(tiny_tokenizer, messages, None, ended=False)
    kept = [token for token in asked.example.labels if token != IGNORE]
    assert tiny_tokenizer.decode(kept) == "A red hat, a" and asked.cut_off
    assert asked.example.input_ids == tokenize(tiny_tokenizer, messages, None).example.input_ids


@pytest.mark.parametrize("span", ["im", "I", "think", "call"])
def test_a_part_of_a_token_of_the_template_is_not_asked(tiny_tokenizer: Any, span: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = HERMES
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    messages = [
        {"role": "user", "content": "Hat?"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "I think I call him."},
    ]
    asked = tokenize(tokenizer, messages, span)
    start = asked.turn.index("I think")
    assert asked.spans and all(start <= a and b <= start + len("I think I call him.") for a, b in asked.spans)
    assert [asked.turn[a:b] for a, b in tokenize(tokenizer, messages, "<|im_end|>").spans] == ["<|im_end|>"]


@pytest.mark.parametrize("span", ["Oslo", "the temperature", None])
def test_parts_of_calls_and_traces_can_be_asked(tiny_tokenizer: Any, span: str | None) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = HERMES
    asked = tokenize(tokenizer, weather()[:5], span)
    kept = tokenizer.decode([token for token in asked.example.labels if token != IGNORE])
    trace = "<think>\nI need the temperature first.\n</think>\n\n"
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert kept == (span or trace + called)


def test_occurrences_that_overlap_are_one_part(tiny_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Fruit?"}, {"role": "assistant", "content": "A banana. ana 1111"}]
    asked = {span: tokenize(tiny_tokenizer, messages, span) for span in ("ana", "11", "111", "a")}
    parts = {span: [one.turn[a:b] for a, b in one.spans] for span, one in asked.items()}
    assert parts == {"ana": ["anana", "ana"], "11": ["1111"], "111": ["1111"], "a": ["a"] * 5}
    kept = [label for label in asked["ana"].example.labels if label != IGNORE]
    assert tiny_tokenizer.decode(kept) == "ananaana"


@pytest.mark.parametrize("span", ["A  red", "red\n", "\n"])
def test_the_message_about_a_missing_part_has_its_white_space(tiny_tokenizer: Any, span: str) -> None:
    messages = [{"role": "user", "content": "Hat?"}, {"role": "assistant", "content": "A red\r\nhat."}]
    turn = "A red\r\nhat.<|im_end|>"
    with pytest.raises(InputError) as refused:
        tokenize(tiny_tokenizer, messages, span * 2)
    assert repr(span * 2) in refused.value.what and repr(turn) in refused.value.what


@pytest.mark.parametrize("span", ["blue", "", "Hat?", "end"])
def test_a_span_that_is_not_in_the_answer_is_refused(tiny_tokenizer: Any, span: str) -> None:
    messages = [{"role": "user", "content": "Hat?"}, {"role": "assistant", "content": "A red hat."}]
    with pytest.raises(InputError, match="not in the answer"):
        tokenize(tiny_tokenizer, messages, span)


def test_a_part_to_which_no_token_belongs_is_refused(tiny_tokenizer: Any) -> None:
    from tokenizers import processors

    trimming = copy.deepcopy(tiny_tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [{"role": "user", "content": "Hat?"}, {"role": "assistant", "content": "Red box."}]
    assert tokenize(trimming, messages, "box").tokens == 3
    with pytest.raises(InputError, match="belongs to the part ' '"):
        tokenize(trimming, messages, " ")


def test_a_step_with_several_examples_of_a_record_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"model": "adapter@x", "example_id": "a", "step": step, "source": "s.jsonl", "source_row": 0}
        for step in (1, 1, 2, 5, 5, 5)
    ]
    monkeypatch.setattr(why, "trained_on", lambda _: (pl.DataFrame(rows), []))
    found: Any = SimpleNamespace(subject=None, run=SimpleNamespace(address="adapter@x"))
    assert why.places_of(found) == {"a": {"source": "s.jsonl", "source_row": 0, "steps": [1, 2, 5]}}


# ---- the check by training again


def test_without_a_record_left_out_training_gives_the_very_bytes(work: Path, tiny_model: Path, tmp_path: Path) -> None:
    proof.zero_weights(work / "tokenized", tmp_path / "tokenized", [])
    train_adapter(tmp_path, tiny_model, "adapter", SHORT)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / weights).read_bytes() == (work / "adapter" / weights).read_bytes()


def test_only_the_weights_of_the_records_change(work: Path, tmp_path: Path, records: list[TrainedRecord]) -> None:
    out = {records[0].example_id, records[9].example_id}
    proof.zero_weights(work / "tokenized", tmp_path / "tokenized", out)
    before, after = (read_table(folder / "tokenized/train.parquet") for folder in (work, tmp_path))
    assert [{**row, "weights": 0} for row in after] == [{**row, "weights": 0} for row in before]
    for one, other in zip(before, after, strict=True):
        start = 0
        for name, length in zip(one["example_ids"], one["lengths"], strict=True):
            part = slice(start, start + length)
            assert list(other["weights"][part]) == ([0.0] * length if name in out else list(one["weights"][part]))
            start += length
    assert (tmp_path / "tokenized/validation.parquet").read_bytes() == (
        work / "tokenized/validation.parquet"
    ).read_bytes()


def test_a_record_of_weight_zero_has_no_share_in_the_gradient_of_its_row(
    trained: TrainedModel, records: list[TrainedRecord], expected: np.ndarray
) -> None:
    one, two = records[0].examples[0], records[1].examples[0]
    silent = Example(one.input_ids, one.labels, (0.0,) * len(one.weights))
    assert_close(flat(trained.of_record((silent, two))), expected[1])


def test_a_row_that_would_be_empty_is_refused(work: Path, tmp_path: Path) -> None:
    row = read_table(work / "tokenized/train.parquet")[0]["example_ids"]
    assert not proof.fits(work / "tokenized", row) and proof.fits(work / "tokenized", row[1:])
    with pytest.raises(InputError, match="--top"):
        proof.zero_weights(work / "tokenized", tmp_path / "tokenized", row)


def test_random_sets_are_as_large_without_the_first_records_and_shared_between_questions(
    work: Path, records: list[TrainedRecord]
) -> None:
    names = [record.example_id for record in records]
    found = list(islice(proof.draws(names, names[:3], "model", work / "tokenized"), 20))
    assert all(len({*one}) == 3 and {*one}.isdisjoint(names[:3]) and {*one} <= {*names} for one in found)
    assert len({*map(tuple, found)}) == 20
    other = list(islice(proof.draws(names, names[3:6], "model", work / "tokenized"), 20))
    assert len({*map(tuple, found)} & {*map(tuple, other)}) > 10
    with pytest.raises(InputError, match="too few"):
        next(proof.draws(names, names[:20], "model", work / "tokenized"))


def test_random_sets_are_found_for_many_first_records(tmp_path: Path) -> None:
    """Of a set of 30 among 100, one in a billion has none of 30 given ones."""
    names = [f"record {i:03d}" for i in range(100)]
    (tmp_path / "tokenized").mkdir()
    pq.write_table(pa.table({"example_ids": [names]}), tmp_path / "tokenized/train.parquet")
    found = list(islice(proof.draws(names, names[:30], "model", tmp_path / "tokenized"), 5))
    assert all(len({*one}) == 30 and {*one} <= {*names[30:]} for one in found) and len({*map(tuple, found)}) == 5


def test_no_random_set_comes_twice(tmp_path: Path) -> None:
    """Two equal sets would give changes without a spread, so an interval without a width."""
    make_data(tmp_path)
    names = read_table(tmp_path / "tokenized/train.parquet")[0]["example_ids"]
    drawn = proof.draws(names, names[:1], "model", tmp_path / "tokenized")
    assert {name for one in islice(drawn, 3) for name in one} == {*names[1:]}
    with pytest.raises(InputError, match="--top 1: too few"):
        next(drawn)


def test_a_change_for_the_better_is_not_called_chance() -> None:
    verdict = proof.Verdict(-40.0, (0.1, -0.2, 0.0))
    checked = {
        "left_out": 1,
        "identical": True,
        "change": verdict.change,
        "draws": [*verdict.of_draws],
        "difference": verdict.change - verdict.mean,
        "interval": [*verdict.interval],
        "supported": verdict.supported,
    }
    *_, shown, note = as_text(a_document(proof=checked)).splitlines()
    assert "NOT supported" in shown and "explain" not in shown and note == "note: a note"


def test_a_random_set_is_called_supported_in_one_of_forty() -> None:
    """The interval is two-sided, and only the side of less likely tokens counts."""
    dice = random.Random(5)

    def changes() -> Iterator[float]:
        while True:
            yield dice.gauss(0.3, 2.0)

    drawn = changes()
    verdicts = [proof.Verdict(next(drawn), tuple(islice(drawn, 3))) for _ in range(8000)]
    assert sum(one.supported for one in verdicts) / len(verdicts) == pytest.approx(0.025, abs=0.01)
    assert proof.Verdict(40.0, (0.1, -0.2, 0.0)).supported and not proof.Verdict(-40.0, (0.1, -0.2, 0.0)).supported


# ---- what is asked


def test_the_system_prompt_is_that_of_the_records_of_the_training_only(tiny_model: Path, tmp_path: Path) -> None:
    def record(system: str, prompt: str) -> dict[str, Any]:
        messages = [
            {"role": role, "content": text}
            for role, text in (("system", system), ("user", prompt), ("assistant", "Yes."))
        ]
        return {"example_id": example_id(messages), "messages": messages}

    def prompts(used: list[dict[str, Any]], split: list[dict[str, Any]]) -> Any:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        write_records(tmp_path / "data/splits/train", split)
        seen = [TrainedRecord(one["example_id"], ()) for one in used]
        found: Any = SimpleNamespace(root=tmp_path, records=seen, base_model=tiny_model, folder=tmp_path / "adapter")
        return Texts(found).system_prompts()

    one, two, other = record("You help.", "Hat?"), record("You help.", "Box?"), record("You sing.", "Bag?")
    assert prompts([one, two], [one, two, other]) == {"You help."}
    assert prompts([one, other], [one, two, other]) == {"You help.", "You sing."}
    assert prompts([one, two], [one, other]) is None, (
        "the split of another run does not say what this model was trained with"
    )


def test_a_model_whose_files_were_changed_does_not_answer(tmp_path: Path) -> None:
    folder = tmp_path / "data/merged/x"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    run = SimpleNamespace(
        address="merged@x", path="data/merged/x", md5=md5_of_folder(listing_of(folder)), in_workspace=True
    )
    found: Any = SimpleNamespace(root=tmp_path, folder=tmp_path / "data/adapter/x", subject=SimpleNamespace(run=run))
    assert answering(found) == folder
    (folder / "config.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="another model"):
        answering(found)
    run.in_workspace = False
    assert answering(found) == found.folder


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (("lora", "--suspects"), "--suspects is about all records: not with --system"),
        (("--diff", "lora", "dora"), "--diff compares recorded answers: not with --system"),
    ],
)
def test_an_option_with_an_empty_value_is_given(
    capsys: pytest.CaptureFixture[str], mode: tuple[str, ...], reason: str
) -> None:
    """`--system ''` asks without a system prompt."""
    assert main(["why", *mode, "--system", ""]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [("why", "release", "--suspects"), ("bisect", "release", "--prompt=a", "--expect=b")]
)
def test_a_page_is_not_written_into_an_output(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    stages = {"release": {"cmd": "x", "outs": [{"path": "data/release", "md5": f"{0:032}.dir"}]}}
    (tmp_path / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": stages}))
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--html", "data/release/page.html"]) == 2
    assert "--html data/release/page.html: it lies in data/release, an output of release" in capsys.readouterr().err


# ---- the page


def a_document(**more: Any) -> dict[str, Any]:
    hit = {
        "rank": 1,
        "example_id": "0123456789",
        "source": "a.jsonl",
        "source_row": 3,
        "steps": [1, 5],
        "split": "train",
        "prompt": "<b>Hat?</b>",
        "answer": "A red one.",
        "gradient": {"rank": 1, "score": 0.5, "z": 7.0},
        "bm25": {"rank": 2, "score": 1.5},
    }
    return {
        "model": {"asked": "lora", "stage": "adapter@lora", "path": "data/adapter/lora", "md5": "0" * 32},
        "question": {
            "system": None,
            "prompt": "Hat?",
            "answer": "red <i> red",
            "answered_by": "given",
            "span": "red",
            "spans": [[0, 3], [8, 11]],
            "tokens": 2,
            "log_probability": -1.0,
        },
        "records": 2,
        "distribution": {
            "median": 0.1,
            "first": 0.5,
            "z_of_first": 7.0,
            "z_of_tenth": 1.0,
            "compared": None,
            "stands_out": True,
            "counts": [1, 0, 1],
            "edges": [0.0, 0.2, 0.4, 0.6],
        },
        "hits": [hit],
        "notes": ["a note"],
        **more,
    }


def test_the_page_marks_what_was_asked_and_escapes_texts() -> None:
    from dagster_project.views.why import why_page

    page = why_page(a_document())
    assert "<mark>red</mark> &lt;i&gt; <mark>red</mark>" in page and "&lt;b&gt;Hat?" in page and "<b>Hat?" not in page
    assert "a.jsonl:3" in page and 'id="check"' not in page and "stands out" in page


@pytest.mark.parametrize("supported", [True, False])
def test_the_page_says_whether_the_check_supports_the_list(supported: bool) -> None:
    from dagster_project.views.why import why_page

    checked = {
        "left_out": 5,
        "log_probability": -1.0,
        "identical": True,
        "change": 2.0,
        "draws": [0.1, -0.2],
        "mean_of_draws": -0.05,
        "difference": 2.05,
        "interval": [0.5 if supported else -0.5, 4.0],
        "supported": supported,
    }
    page = why_page(a_document(proof=checked))
    assert 'id="check"' in page and ("Not supported." in page) == (not supported) and page.count("<circle") == 3
