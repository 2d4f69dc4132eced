"""Tracing copies of a deep model with few layers gives the result of tracing the whole model."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dagster_project.__main__ import main
from dagster_project.commands import plan
from dagster_project.core.params import Compute
from dagster_project.training.planning import layerwise, memory
from dagster_project.training.planning.layerwise import SmallCopies, repeated, repetition
from dagster_project.training.planning.memory import StorageEvent, TrainingSpec, trace_step

BASE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 500,
    "dtype": "bfloat16",
}
LAYERS = 8
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {**BASE, "model_type": "qwen3"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "vocab_size": 500, "n_positions": 256, "n_layer": LAYERS},
}
METHODS = {"lora": memory.LORA, "qlora": memory.LORA, "full": {}}


def write(folder: Path, values: dict[str, Any], layers: int = LAYERS) -> Path:
    folder.mkdir(exist_ok=True)
    depth = {} if "n_layer" in values else {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps({**values, **depth}))
    return folder


def spec(model: Path, method: str, options: dict[str, Any] | None = None, **changed: Any) -> TrainingSpec:
    given = {"device": "cuda", "dtype": torch.float32, "lengths": [24], "counted": 24, **changed}
    return TrainingSpec(base_model=model, method=method, options=options or {}, **given)


def in_order(events: list[StorageEvent]) -> list[StorageEvent]:
    """With the events between two allocations sorted."""
    groups = itertools.groupby(events, lambda event: not event[0])
    return [event for is_allocation, group in groups for event in (group if is_allocation else sorted(group))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_with_few_layers_give_the_prediction_of_the_whole_model(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal event by event, but for the order of frees between two allocations, which changes no account: so peak,
    fragmentation and operations are equal, too."""
    model = write(tmp_path / "model", KINDS[kind])
    copies, traced = SmallCopies(model), []

    def counting(spec: TrainingSpec) -> memory.StepTrace:
        traced.append(spec.base_model)
        return trace_step(spec)

    monkeypatch.setattr(layerwise, "trace_step", counting)
    for checkpointing, device in ((True, "cuda"), (False, "cpu")):
        given = spec(
            model, method, METHODS[method], device=device, dtype=torch.bfloat16, gradient_checkpointing=checkpointing
        )
        whole, small = trace_step(given), copies.trace(given)
        assert in_order(small.events) == in_order(whole.events)
        assert small.operations.counts == whole.operations.counts
        sizes = ("trainable", "total", "optimizer", "optim", "loading")
        assert [getattr(small, name) for name in sizes] == [getattr(whole, name) for name in sizes]
        assert small.peak(device, 7) == whole.peak(device, 7)
    assert len(traced) == 4 and model not in traced, "no layer but those of the copies was traced"


def test_models_that_copies_cannot_represent_are_traced_in_full(tmp_path: Path) -> None:
    model = write(tmp_path / "model", KINDS["llama"])
    two, three = (trace_step(spec(write(tmp_path / str(n), KINDS["llama"], n), "full")) for n in (2, 3))
    assert layerwise.extended(two, three, 1) is not None
    assert layerwise.extended(three, two, 1) is None
    upper = {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [LAYERS - 1]}
    for method, options in (("prefix_tuning", {"num_virtual_tokens": 4}), ("lora", upper)):
        given = spec(model, method, options)
        assert SmallCopies(model).trace(given).events == trace_step(given).events


@pytest.mark.parametrize("method", METHODS)
def test_results_that_are_kept_are_those_that_torch_computes(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = spec(write(tmp_path / "model", KINDS["llama"], 2), method, METHODS[method], gradient_checkpointing=True)
    trace_step(given)
    kept = trace_step(given)
    monkeypatch.setattr(memory, "run_on_meta", lambda func, args, kwargs: func(*args, **kwargs))
    computed = trace_step(given)
    assert kept.events == computed.events and kept.operations.counts == computed.operations.counts


def test_copies_have_the_layers_that_differ_and_two_or_three_periods_of_the_others() -> None:
    assert repetition("aaaaaaaa") == (2, 3)
    assert repetition("daaaaaaa") == (3, 4)
    assert repetition("abababababab") == (4, 6)
    assert repetition("ababababababa") == (5, 7)
    assert repetition("abcdefgh") is None
    assert repetition("aaaaa") is None, "the copies would have as many layers as the model"


def test_a_run_is_inserted_again_if_it_is_equal_to_the_one_before_it() -> None:
    def inserted(short: str, long: str, times: int) -> str | None:
        found = repeated(list(short), list(long), times)
        return found and "".join(found)

    assert inserted("PAAMBBS", "PAAAMBBBS", 0) == "PAAAMBBBS"
    assert inserted("PAAMBBS", "PAAAMBBBS", 2) == "PAAAAAMBBBBBS"
    assert inserted("PabcabcS", "PabcabcabcS", 1) == "PabcabcabcabcS"
    assert inserted("PAAMBBS", "PAAXMBBYS", 1) is None
    assert inserted("PAAMS", "PAAANS", 1) is None
    assert inserted("PAAS", "PAA", 1) is None


def test_the_order_in_which_storages_are_freed_changes_no_account() -> None:
    born, freed, gradient = ("", "activations", 8), ("activations", "", 8), ("activations", "gradients", 8)
    accounts = []
    for given in ([born, born, born, gradient, freed, born, freed], [born, born, born, freed, gradient, born, freed]):
        account = memory.Account()
        for event in given:
            account.apply(event)
        accounts.append(vars(account))
    assert accounts[0] == accounts[1]


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    return write(tmp_path / "Acme-Small", {**KINDS["qwen3"], "architectures": ["Qwen3ForCausalLM"]}, layers=12)


def test_a_plan_names_the_model_its_assumptions_and_the_gpus_it_fits_on(
    deep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(deep), "--tokens-per-row", "64", "--batch", "2"]) == 0
    said = capsys.readouterr().out
    assert "model: Acme-Small (Qwen3ForCausalLM), " in said and " parameters in 12 layers" in said
    for assumption in (
        "2 rows of 64 tokens",
        "no gradient accumulation",
        "gradient checkpointing on",
        "2,000 such rows",
        "bfloat16",
        "lora: optimizer adamw_torch_fused, r 16",
        "qlora: optimizer paged_adamw_8bit",
    ):
        assert assumption in said, assumption
    table = [line.split() for line in said.splitlines() if line.startswith(("full  ", "lora  ", "qlora "))]
    assert [(row[0], row[1]) for row in table] == [
        (method, on) for method in ("full", "lora", "qlora") for on in ("off", "on")
    ]
    assert all(row[-3:] == ["fits", "fits", "fits"] for row in table)


def test_a_plan_fits_a_gpu_up_to_its_memory_size(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingSpec, "needed", 40 * 10**9)
    given: dict[str, Any] = {
        "tokens": 16,
        "rows": 1,
        "checkpointing": True,
        "compute": Compute(threads=1),
        "device": "cuda",
    }
    with_on = plan.plan_model(deep, ["lora"], **given)["gpus"]["lora"]
    assert [row["gradient_checkpointing"] for row in with_on] == [False, True]
    assert with_on[1].pop("sharded") == {"24": 2}, "two GPUs hold half of the model each"
    assert with_on[1] == {
        "gradient_checkpointing": True,
        "peak": 40 * 10**9,
        "fits": {"24": False, "40": True, "80": True},
    }


def test_the_name_in_the_configuration_overrides_the_folder_name(deep: Path) -> None:
    (deep / "config.json").write_text(
        json.dumps({**json.loads((deep / "config.json").read_text()), "_name_or_path": "acme/small-12"})
    )
    assert plan._model(deep, SmallCopies(deep))["name"] == "acme/small-12"
    assert plan._model(deep / "config.json", SmallCopies(deep / "config.json"))["name"] == "acme/small-12"


def test_tracing_time_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Eighty layers are traced as fast as nine: as many layers, on shapes that
    cost nothing. CPU time, since tests share cores."""
    took = {}
    for layers in (9, 80):
        copies = SmallCopies(write(tmp_path / str(layers), KINDS["llama"], layers))
        start = time.process_time()
        copies.trace(spec(copies.base_model, "lora", memory.LORA, timed=False))
        took[layers] = time.process_time() - start
    assert took[80] < 3 * took[9]
