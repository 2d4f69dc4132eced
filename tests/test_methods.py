"""Every tuning method trains its documented weights only, matches its paper, and reloads as it was saved."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.training import example, packed
from conftest import ROOT
from torch.nn.functional import cross_entropy

from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.stages import merged
from dagster_project.training.inference import decoding
from dagster_project.training.methods import feature_extraction
from dagster_project.training.methods.build import PreparedModel, build, peft_config, refuse_unmatched
from dagster_project.training.methods.load import AdapterInfo, load, load_base
from dagster_project.training.methods.options import (
    ALIASES,
    CANNOT_MERGE,
    CANNOT_QUANTIZE,
    OWN,
    REFUSED_KEYS,
    RESERVED_KEYS,
    UNSUPPORTED_METHODS,
    check,
    methods,
    peft_keys,
    peft_methods,
    refuse_untrained,
)
from dagster_project.training.tokens.collators import collate_packed, collate_padded

CPU = torch.device("cpu")
COMPUTE = Compute(threads=1, dtype="float32")

SMALL: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "rslora": {"r": 4},
    "dora": {"r": 4},
    "qlora": {"r": 4},
    "qdora": {"r": 4},
    "adalora": {"init_r": 6, "target_r": 2, "tinit": 4, "tfinal": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 32},
    "cartridge": {"num_virtual_tokens": 3},
    "c3a": {"block_size": 32},
    "shira": {"r": 4},
    "road": {"group_size": 32},
    "vblora": {"vector_length": 32, "num_vectors": 16},
    "waveft": {"n_frequency": 100},
    "trainable_tokens": {"token_indices": [5, 6]},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "osf": {"effective_rank": 4},
}
"""Method -> keys that suit a model 64 wide."""

TRAINED = [name for name in methods() if name not in {"bitfit", "feature_extraction"}]
LEARNS_VIRTUAL = ["prefix_tuning", "prompt_tuning", "p_tuning", "cartridge"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield


SHORT_ONE = example([5, 6, 7, 8, 9], 2, weight=0.5)
LONG_ONE = example([9, 8, 7, 20, 30, 40, 50], 3, weight=2.0)
ROW = packed(SHORT_ONE, LONG_ONE)


def make(method: str, tiny_model: Path, dtype: torch.dtype = torch.float32, **how: Any) -> PreparedModel:
    options = how.pop("options", SMALL.get(method, {}))
    how.setdefault("merge", not CANNOT_MERGE.get(ALIASES.get(method, (method, {}))[0]))
    return build(method, options, tiny_model, CPU, dtype, "adapter.x", total_steps=10, **how)


def loss_of(tunable: PreparedModel, row: dict[str, Any] = ROW) -> torch.Tensor:
    """What a trainer computes: the weighted mean cross entropy over the seam
    that every method has, and the method's own term."""
    batch = collate_packed([row]) if tunable.packs else collate_padded([row])
    labels, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
    counted = labels != IGNORE
    causal = tunable.model.get_base_model() if hasattr(tunable.model, "get_base_model") else tunable.model
    logits = causal.get_output_embeddings()(tunable.hidden_states(batch)[:, :-1][counted]).float()
    losses = cross_entropy(logits, labels[counted], reduction="none")
    loss = (losses * weights[counted]).sum() / weights[counted].sum()
    extra = tunable.extra_loss(tunable.model) if tunable.model.training else None
    return loss if extra is None else loss + extra


def steps(tunable: PreparedModel, n: int = 3, rate: float = 1e-2) -> list[float]:
    """A plain training loop."""
    from transformers import TrainerControl, TrainerState

    tunable.model.train()
    optimizer = torch.optim.AdamW([p for p in tunable.model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in range(n):
        loss = loss_of(tunable)
        loss.backward()
        optimizer.step()
        for callback in tunable.callbacks:
            callback.on_optimizer_step(None, TrainerState(global_step=step), TrainerControl())
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    tunable.model.eval()
    return losses


def logits(model: Any, ids: list[int] = LONG_ONE["input_ids"]) -> torch.Tensor:
    """(1, tokens, vocabulary), by the ordinary attention also where the model was loaded with that for packed rows."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    packs = causal.config._attn_implementation == "by_example"
    with torch.inference_mode():
        if packs:
            causal.set_attn_implementation("sdpa")
        found = model(torch.tensor([ids])).logits
        if packs:
            causal.set_attn_implementation("by_example")
        return found[:, -len(ids) :]


def plain(tiny_model: Path) -> Any:
    return load_base(tiny_model, CPU, torch.float32).eval()


# ---- every method
# ---------------------------------------------------------------------------------------------------------------------


def reloaded(folder: Path, tiny_model: Path, quantization: str) -> Any:
    """The saved folder, loaded without any code of ours beyond the base model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return PeftModel.from_pretrained(load_base(tiny_model, CPU, torch.float32, quantization), folder).eval()


@pytest.mark.parametrize("method", TRAINED)
def test_a_method_trains_only_its_documented_weights_and_reloads_unchanged(
    method: str, tiny_model: Path, tmp_path: Path
) -> None:
    tunable = make(method, tiny_model)
    before = {name: parameter.detach().clone() for name, parameter in tunable.model.named_parameters()}
    learning = {name for name, parameter in tunable.model.named_parameters() if parameter.requires_grad}
    assert sum(before[name].numel() for name in learning) == tunable.trainable > 0
    losses = steps(tunable, rate=1e-3 if method == "rslora" else 1e-2)
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in tunable.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == learning

    tunable.save(tmp_path / "adapter")
    tunable.save(tmp_path / "again")
    assert {f.name: f.read_bytes() for f in (tmp_path / "adapter").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()
    }
    record = AdapterInfo.read(tmp_path / "adapter")
    assert record.method == method
    theirs = reloaded(tmp_path / "adapter", tiny_model, record.quantization)
    torch.testing.assert_close(logits(theirs), logits(tunable.model), atol=1e-6, rtol=1e-6)
    ours = load(tmp_path / "adapter", tiny_model, CPU, torch.float32)
    torch.testing.assert_close(logits(ours), logits(tunable.model), atol=1e-5, rtol=1e-5)

    report = merged.produce(COMPUTE, tiny_model, tmp_path / "adapter", out=tmp_path / "merged")
    assert [check.passed for check in report.checks] == [True], report.checks[0].note
    assert report.metrics["merged"] == (not CANNOT_MERGE.get(ALIASES.get(method, (method, {}))[0]))
    if record.quantization == "none":
        torch.testing.assert_close(
            logits(load(tmp_path / "merged", tiny_model, CPU, torch.float32)), logits(ours), atol=1e-4, rtol=1e-4
        )
    else:
        assert report.metrics["trained_against"] == "nf4"
        assert 0 < report.metrics["largest_difference_from_trained"] < report.metrics["largest_adapter_effect"]


@pytest.mark.parametrize("method", [name for name in TRAINED if name not in {"cartridge", *LEARNS_VIRTUAL}])
def test_packed_examples_are_independent_under_every_method_that_packs(method: str, tiny_model: Path) -> None:
    tunable = make(method, tiny_model)
    steps(tunable)
    together = tunable.hidden_states(collate_packed([ROW])).split([5, 7], 1)
    for found, one in zip(together, (SHORT_ONE, LONG_ONE), strict=True):
        torch.testing.assert_close(found, tunable.hidden_states(collate_packed([one])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", TRAINED)
def test_trained_weights_are_float32_on_a_bfloat16_model(method: str, tiny_model: Path) -> None:
    tunable = make(method, tiny_model, torch.bfloat16)
    assert {parameter.dtype for parameter in tunable.model.parameters() if parameter.requires_grad} == {torch.float32}
    before = {
        name: parameter.detach().clone()
        for name, parameter in tunable.model.named_parameters()
        if parameter.requires_grad
    }
    steps(tunable, rate=1e-4)
    assert all(
        not torch.equal(parameter, before[name])
        for name, parameter in tunable.model.named_parameters()
        if name in before
    )


@pytest.mark.parametrize("method", [name for name in TRAINED if name not in {*ALIASES, "full"}])
def test_a_method_trains_on_quantized_weights_or_is_refused(method: str, tiny_model: Path, tmp_path: Path) -> None:
    if method in CANNOT_QUANTIZE:
        with pytest.raises(
            InputError, match=f"adapter.x.quantization: {method} computes with the base model's weights"
        ):
            make(method, tiny_model, quantization="nf4")
        return
    tunable = make(method, tiny_model, quantization="nf4", merge=False)
    losses = steps(tunable)
    assert losses[-1] < losses[0]
    assert (logits(tunable.model) - logits(load_base(tiny_model, CPU, torch.float32, "nf4").eval())).abs().max() > 1e-3
    tunable.save(tmp_path)
    # where adalora's ranks are cut, PEFT loads its matrices in the bfloat16 that quantized layers compute in
    near = 5e-3 if method == "adalora" else 1e-6
    torch.testing.assert_close(
        logits(reloaded(tmp_path, tiny_model, "nf4")), logits(tunable.model), atol=near, rtol=near
    )


def test_hashing_a_quantized_model_does_not_change_its_training(tiny_model: Path) -> None:
    curves = []
    for looked in (False, True):
        torch.manual_seed(0)
        tunable = make("qlora", tiny_model, options={"r": 4, "lora_dropout": 0.0})
        if looked:
            tunable.model.eval()
            with torch.no_grad():
                assert float(loss_of(tunable)) == pytest.approx(curves[0][0], abs=1e-6)
        curves.append(steps(tunable, 4))
    assert curves[0] == curves[1]


def test_every_method_of_peft_is_trained_or_refused_with_a_reason() -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    assert (
        {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
        == set(peft_methods())
        == (set(methods()) - {*ALIASES, *OWN}) | {*UNSUPPORTED_METHODS}
    )
    for method, reason in UNSUPPORTED_METHODS.items():
        with pytest.raises(InputError, match=f"params.yaml: adapter.x.method: {method} {reason}"):
            check(method, {}, None, True, "adapter.x")


def test_keys_read_from_the_source_are_those_of_the_configuration_itself() -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind.value.lower() not in UNSUPPORTED_METHODS:
            names = {field.name for field in dataclasses.fields(config)} - RESERVED_KEYS - REFUSED_KEYS.keys()
            assert set(peft_keys(kind.value.lower())) == names


# ---- what the papers say
# --------------------------------------------------------------------------------------------------------------


def weights_of(tunable: PreparedModel, module: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(f"base_model.model.{module}."): value.detach().double()
        for name, value in tunable.model.state_dict().items()
        if name.startswith(f"base_model.model.{module}.")
    }


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("method", "scale"), [("lora", 32 / 4), ("rslora", 32 / 4**0.5)])
def test_lora_is_w_plus_scaled_ba(method: str, scale: float, tiny_model: Path) -> None:
    tunable = make(method, tiny_model)
    steps(tunable)
    w = weights_of(tunable, Q)
    merged_model = tunable.model.merge_and_unload()
    wanted = w["base_layer.weight"] + scale * w["lora_B.default.weight"] @ w["lora_A.default.weight"]
    torch.testing.assert_close(merged_model.get_submodule(Q).weight.double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["dora", "qdora"])
def test_dora_is_magnitude_times_direction_and_its_magnitudes_move(
    method: str, tiny_model: Path, tmp_path: Path
) -> None:
    tunable = make(method, tiny_model)
    key = "lora_magnitude_vector.default.weight"
    start = weights_of(tunable, Q)[key]
    steps(tunable)
    w = weights_of(tunable, Q)
    assert bool((w[key] != start).all())
    tunable.save(tmp_path / "adapter")
    report = merged.produce(COMPUTE, tiny_model, tmp_path / "adapter", out=tmp_path / "merged")
    assert report.checks[0].passed
    base = plain(tiny_model).get_submodule(Q).weight.detach().double()
    direction = base + 32 / 4 * w["lora_B.default.weight"] @ w["lora_A.default.weight"]
    wanted = (
        w[key][:, None] * direction / direction.norm(dim=1, keepdim=True)
    )  # the norm of each output's row (section 4.1)
    found = load(tmp_path / "merged", None, CPU, torch.float32).get_submodule(Q).weight.double()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_adalora_prunes_ranks_to_the_budget_and_reloads_in_plain_peft(tiny_model: Path, tmp_path: Path) -> None:
    tunable = make("adalora", tiny_model)

    def ranks() -> list[int]:
        return [int((p != 0).sum()) for name, p in tunable.model.named_parameters() if "lora_E" in name]

    steps(tunable, 10)
    assert sum(ranks()) == 2 * len(ranks()) == 16
    assert len(set(ranks())) > 1, "every matrix kept the same rank: nothing was adapted"
    tunable.save(tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(map(sum, pattern.values())) == sorted(ranks())
    torch.testing.assert_close(
        logits(reloaded(tmp_path, tiny_model, "none")), logits(tunable.model), atol=1e-6, rtol=1e-6
    )


def test_adalora_prunes_ranks_under_the_trainer(tiny_model: Path) -> None:
    """The callback is called where gradients still exist."""
    from transformers import Trainer, TrainingArguments

    tunable = make("adalora", tiny_model)

    class Plain(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return loss_of(tunable)

    arguments = TrainingArguments(
        output_dir="unused", max_steps=10, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    Plain(
        model=tunable.model,
        args=arguments,
        train_dataset=[{"x": 1}] * 80,
        data_collator=lambda rows: {"x": torch.ones(1)},
        callbacks=tunable.callbacks,
    ).train()
    assert sum(int((p != 0).sum()) for name, p in tunable.model.named_parameters() if "lora_E" in name) == 16


def test_adaloras_regularization_is_the_one_peft_adds_to_its_own_loss(tiny_model: Path) -> None:
    tunable = make("adalora", tiny_model)
    ids = torch.tensor([LONG_ONE["input_ids"]])
    inner = tunable.model.get_base_model()
    inner.set_attn_implementation("sdpa")
    tunable.model.eval()
    with torch.no_grad():
        theirs = tunable.model(input_ids=ids, labels=ids).loss - inner(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(tunable.extra_loss(tunable.model), theirs, atol=1e-5, rtol=1e-5)


def test_adalora_resumes_from_its_saved_state(tiny_model: Path) -> None:
    """Weights, optimizer and the method's own memory together are the whole state of a run."""
    tunable, other = make("adalora", tiny_model), make("adalora", tiny_model)
    tunable.model.train()
    steps(tunable, 7)
    other.model.load_state_dict(tunable.model.state_dict())
    other.restore({name: value.clone() for name, value in tunable.state().items()})
    from transformers import TrainerControl, TrainerState

    for one in (tunable, other):
        torch.manual_seed(1)
        one.model.train()
        loss_of(one).backward()
        one.callbacks[0].on_optimizer_step(None, TrainerState(global_step=7), TrainerControl())
    assert {name: value.tolist() for name, value in tunable.state().items()} == {
        name: value.tolist() for name, value in other.state().items()
    }
    assert tunable.state()


# ---- virtual tokens
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LEARNS_VIRTUAL)
def test_the_loss_behind_virtual_tokens_is_the_weighted_mean_over_real_tokens_whatever_the_padding(
    method: str, tiny_model: Path
) -> None:
    tunable = make(method, tiny_model)
    assert not tunable.packs
    steps(tunable)
    total, weight = 0.0, 0.0
    for one in (SHORT_ONE, LONG_ONE):  # alone, without padding, by PEFT's own forward pass
        ids = one["input_ids"]
        scores = tunable.model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].log_softmax(-1)
        for i, label in enumerate(one["labels"]):
            if label != IGNORE:
                total -= float(scores[i - 1, label]) * one["weights"][i]
                weight += one["weights"][i]
    assert float(loss_of(tunable)) == pytest.approx(total / weight, abs=1e-5)
    alone = [tunable.hidden_states(collate_padded([one]))[0] for one in (SHORT_ONE, LONG_ONE)]
    together = tunable.hidden_states(collate_padded([ROW]))
    torch.testing.assert_close(together[0, :5], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1], alone[1], atol=1e-5, rtol=1e-5)


def test_unpacked_examples_are_padded_rows_with_a_mask() -> None:
    batch = collate_padded([packed(example([5, 6], 1), example([7], 0, weight=2.0)), example([8, 9, 10], 1)])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 0], [7, 0, 0], [8, 9, 10]],
        "labels": [[IGNORE, 6, IGNORE], [IGNORE, IGNORE, IGNORE], [IGNORE, 9, 10]],
        "weights": [[0, 1, 0], [2, 0, 0], [0, 1, 1]],
        "attention_mask": [[1, 1, 0], [1, 0, 0], [1, 1, 1]],
        "rows": [-1, -1],
    }


@pytest.mark.parametrize("method", LEARNS_VIRTUAL)
def test_answers_and_likelihoods_behind_virtual_tokens_are_those_of_peft(
    method: str, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_project.curation.sources.benchmarks import Item
    from dagster_project.evaluation.retention import ask
    from dagster_project.training.inference.generate import generate_ids
    from dagster_project.training.inference.likelihood import negative_log_likelihood

    tunable = make(method, tiny_model)
    steps(tunable, 30, rate=0.1)
    tunable.save(tmp_path)
    model = load(tmp_path, tiny_model, CPU, torch.float32)
    shared = list(range(60, 80))  # long enough to be shared by `generate_ids`
    prompts = [[*shared, 5, 6, 7], [*shared, 9], [*shared, 8, 30, 40, 50, 60]]

    def greedy(prompt: list[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(logits(tunable.model, ids)[0, -1].argmax()))
            if ids[-1] == tiny_tokenizer.eos_token_id:
                break
        return ids[len(prompt) :]

    monkeypatch.setitem(decoding.TOKENS_AT_ONCE, "cpu", 6)  # the two shorter ones are read together
    assert generate_ids(model, tiny_tokenizer, prompts, 6, 3, "test") == [greedy(prompt) for prompt in prompts]
    assert generate_ids(model, tiny_tokenizer, prompts[:1], 6, 1, "test") == [greedy(prompts[0])]
    examples = [(one["input_ids"], one["labels"]) for one in (SHORT_ONE, LONG_ONE)]
    for (found, n), one in zip(
        negative_log_likelihood(model, 0, examples, 2, "test"), (SHORT_ONE, LONG_ONE), strict=True
    ):
        scores = logits(tunable.model, one["input_ids"])[0, -len(one["input_ids"]) :].log_softmax(-1)
        wanted = -sum(float(scores[i - 1, label]) for i, label in enumerate(one["labels"]) if label != IGNORE)
        assert (found, n) == (pytest.approx(wanted, abs=1e-4), sum(label != IGNORE for label in one["labels"]))
    item = Item("b.jsonl:0", "Hot?", ("ice", "fire"), 1, "fire")
    context, whole = (tiny_tokenizer.encode(text) for text in (item.prompt, f"{item.prompt} fire"))
    scores = logits(tunable.model, whole)[0, -len(whole) :].log_softmax(-1)
    wanted = sum(float(scores[i - 1, whole[i]]) for i in range(len(context), len(whole)))
    assert ask(model, tiny_tokenizer, {"b": [item]}, 2, "test")[0]["gold_logprob"] == pytest.approx(wanted, abs=1e-4)


def test_p_tuning_saves_its_tokens_without_dropout(tiny_model: Path, tmp_path: Path) -> None:
    options = {
        "num_virtual_tokens": 3,
        "encoder_hidden_size": 32,
        "encoder_reparameterization_type": "LSTM",
        "encoder_dropout": 0.5,
    }
    tunable = make("p_tuning", tiny_model, options=options)
    tunable.model.train()
    for name in ("first", "second"):
        tunable.save(tmp_path / name)
    assert len({(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")}) == 1
    assert tunable.model.training


def test_prompt_tuning_starts_from_words_and_keeps_no_path(tiny_model: Path, tmp_path: Path) -> None:
    options = {"num_virtual_tokens": 4, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Sort this."}
    tunable = make("prompt_tuning", tiny_model, options=options)
    words = plain(tiny_model).get_input_embeddings().weight
    start = tunable.model.prompt_encoder["default"].embedding.weight
    assert all(bool((words == row).all(1).any()) for row in start)
    tunable.save(tmp_path)
    assert str(tiny_model) not in (tmp_path / "adapter_config.json").read_text()


# ---- weights of the base model
# --------------------------------------------------------------------------------------------------------


def test_full_changes_every_weight_and_keeps_tied_embeddings_tied(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    tunable = make("full", tiny_model)
    assert tunable.trainable == tunable.total
    steps(tunable)
    tunable.save(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "model.safetensors", "pt") as stored:
        assert "model.embed_tokens.weight" in stored.keys()  # noqa: SIM118
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118
    model = load(tmp_path / "adapter", None, CPU, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    report = merged.produce(COMPUTE, tiny_model, tmp_path / "adapter", out=tmp_path / "merged")
    assert (report.checks[0].passed, report.metrics["merged"]) == (True, True)
    assert {f.name for f in (tmp_path / "adapter").iterdir()} - {f.name for f in (tmp_path / "merged").iterdir()} == {
        "method.json"
    }


def test_full_trains_the_weights_that_a_pattern_finds_and_tied_weights_by_either_name(tiny_model: Path) -> None:
    tunable = make("full", tiny_model, options={"trainable": [r"layers\.1\.", "lm_head"]})
    learning = {name for name, parameter in tunable.model.named_parameters() if parameter.requires_grad}
    assert "model.embed_tokens.weight" in learning
    assert {name for name in learning if "layers" in name} == {
        n for n, _ in tunable.model.named_parameters() if "layers.1." in n
    }
    with pytest.raises(InputError, match=r"adapter.x.peft.trainable: 'no_such' matches no weight"):
        make("full", tiny_model, options={"trainable": ["no_such"]})


def test_full_weights_are_stored_as_the_base_model_is(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    low = tmp_path / "base"
    shutil.copytree(tiny_model, low)
    load_base(tiny_model, CPU, torch.bfloat16).save_pretrained(low)
    tunable = make("full", low, torch.bfloat16)
    assert {p.dtype for p in tunable.model.parameters()} == {torch.float32}
    steps(tunable)
    tunable.save(tmp_path / "adapter")
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype="auto").dtype == torch.bfloat16
    assert {p.dtype for p in tunable.model.parameters()} == {torch.float32}


def test_bitfit_trains_biases_only_and_refuses_models_without_any(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with pytest.raises(InputError, match="bitfit trains biases, and this model has none\nhint: use method: layernorm"):
        make("bitfit", tiny_model)
    config = AutoConfig.from_pretrained(tiny_model)
    config.attention_bias = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "biased")
    for file in tiny_model.glob("*token*"):
        (tmp_path / "biased" / file.name).write_bytes(file.read_bytes())
    tunable = make("bitfit", tmp_path / "biased")
    before = {name: parameter.detach().clone() for name, parameter in tunable.model.named_parameters()}
    steps(tunable)
    changed = {name for name, parameter in tunable.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.endswith(".bias")} != set()


def test_layernorm_trains_every_normalization_layer(tiny_model: Path) -> None:
    tunable = make("layernorm", tiny_model)
    assert tunable.trainable == sum(p.numel() for name, p in plain(tiny_model).named_parameters() if "norm" in name)


# ---- a classifier's head
# --------------------------------------------------------------------------------------------------------------


def conversations(n: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Questions about one of two things, and which of them."""
    asked = [f"{'Cannot log in' if i % 3 else 'Where is my parcel'}, case {i}" for i in range(n)]
    return [[{"role": "user", "content": text}] for text in asked], ["login" if i % 3 else "delivery" for i in range(n)]


def rows_of(tokenizer: Any, n: int) -> list[dict[str, Any]]:
    from dagster_project.core.chat import encode

    rows = []
    for messages, category in zip(*conversations(n), strict=True):
        ids, labels = encode(tokenizer, [*messages, {"role": "assistant", "content": category}])
        rows.append({"input_ids": ids, "labels": labels, "lengths": [len(ids)], "categories": [category]})
    return rows


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_head_learns_the_category_and_reloads_unchanged(
    quantization: Any, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rows = rows_of(tiny_tokenizer, 30)
    how = {"quantization": quantization, "merge": False, "categories": ["login", "delivery", "login"]}
    folders = []
    for name in ("first", "second"):
        tunable = make("feature_extraction", tiny_model, **how)
        assert tunable.trainable == 2 * (64 + 1)
        assert tunable.fit is not None
        curve = tunable.fit([packed(*rows[:12]), packed(*rows[12:24])], rows[24:])
        losses = [point["loss"] for point in curve if "loss" in point]
        assert losses == sorted(losses, reverse=True)
        watched = [point["validation_loss"] for point in curve if "validation_loss" in point]
        assert watched[0] == pytest.approx(0.6931, abs=1e-4)
        assert watched[-1] < 0.2
        tunable.save(tmp_path / name)
        folders.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert folders[0] == folders[1]
    assert set(folders[0]) == {"head.json", "head.safetensors", "method.json"}
    asked, wanted = conversations(36)
    predictor = feature_extraction.load(tmp_path / "first", tiny_model, CPU, torch.float32)
    assert predictor.predict(asked) == wanted
    report = merged.produce(COMPUTE, tiny_model, tmp_path / "first", out=tmp_path / "merged")
    assert (report.checks[0].passed, report.metrics["merged"]) == (True, False)
    assert "does not change the base model" in report.metrics["why_not"]

    from dagster_project.evaluation.evaluator import EvaluatedModel, Settings

    subject = EvaluatedModel(tmp_path / "merged", COMPUTE, Settings(), tiny_model)
    assert not subject.writes
    assert [answer.content for answer in subject.answer(asked, "test")] == wanted


def test_a_head_is_logistic_regression_with_an_l2_penalty() -> None:
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(3)
    x = torch.randn(60, 5)
    y = (x @ torch.randn(5, 3) + torch.randn(60, 3)).argmax(1)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    for balanced in (None, "balanced"):
        weight, bias, losses = feature_extraction.fit(
            x * 7 + 3, y, 3, feature_extraction.Options(l2=0.1, class_weight=balanced)
        )
        total = (
            60 if balanced is None else sum(60 / (3 * float((y == k).sum())) * float((y == k).sum()) for k in range(3))
        )
        theirs = LogisticRegression(C=1 / (0.1 * total), class_weight=balanced, tol=1e-10, max_iter=5000).fit(
            x.numpy(), y.numpy()
        )
        scores = (x * 7 + 3) @ weight.T + bias
        torch.testing.assert_close(
            scores.softmax(1).double(), torch.tensor(theirs.predict_proba(x.numpy())).double(), atol=1e-4, rtol=1e-3
        )
        assert losses[-1] < losses[0]


def test_a_prompt_ends_where_the_last_answer_begins() -> None:
    row = {
        "input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        "labels": [-100, -100, 3, -100, 5, 6, -100, -100, 9, 10],
        "lengths": [7, 3],
        "categories": ["a", None],
    }
    assert feature_extraction.split_prompts([row]) == ([[1, 2, 3, 4]], ["a"], [(0, 0)])


def test_a_head_needs_categories(tiny_model: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="the training split has 1\n"):
        make("feature_extraction", tiny_model, merge=False, categories=["login"])
    tunable = make("feature_extraction", tiny_model, merge=False, categories=["login", "billing"])
    assert tunable.fit is not None
    with pytest.raises(InputError, match="categories without a class: delivery") as caught:
        tunable.fit(rows_of(tiny_tokenizer, 3), [])
    assert caught.value.hint.startswith("a class is a category of the training split")


# ---- the border
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "how", "what", "hint"),
    [
        ("lorra", {}, {}, "adapter.x.method: unknown method 'lorra'", "nearest: lora"),
        ("qlorra", {}, {}, "adapter.x.method: unknown method 'qlorra'", "qlora"),
        ("dora", {"rank": 4}, {}, "adapter.x.peft.rank: unknown key of lora", "lora_alpha"),
        ("lora", {"r": "16"}, {}, "adapter.x.peft.r: must be int (got '16')", "correct"),
        ("lora", {"r": 0}, {}, "adapter.x.peft.r: must be at least 1 (got 0)", "correct"),
        ("lora", {"lora_dropout": 1.5}, {}, "adapter.x.peft.lora_dropout: must be below 1 (got 1.5)", "correct"),
        (
            "trainable_tokens",
            {"token_indices": [-1]},
            {},
            "adapter.x.peft.token_indices: a token id cannot be negative (got [-1])",
            "correct",
        ),
        (
            "fourierft",
            {"random_loc_seed": None},
            {},
            "adapter.x.peft.random_loc_seed: must be a number (got null)",
            "correct",
        ),
        (
            "lora",
            {"loftq_config": {"loftq_bits": 4}},
            {},
            "adapter.x.peft.loftq_config: has no effect without init_lora_weights",
            "correct",
        ),
        (
            "lora",
            {"init_lora_weights": "loftq", "loftq_config": {"bits": 4}},
            {},
            "adapter.x.peft.loftq_config: must have the keys loftq_bits and loftq_iter",
            "correct",
        ),
        (
            "lora",
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3, "loftq_iter": 1}},
            {},
            "adapter.x.peft.loftq_config: loftq_bits must be 4 or 8 (got 3)",
            "correct",
        ),
        (
            "lora",
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 0}},
            {},
            "adapter.x.peft.loftq_config: loftq_iter must be a whole number from 1 on (got 0)",
            "correct",
        ),
        ("lora", {"use_rslora": "yes"}, {}, "adapter.x.peft.use_rslora: must be bool (got 'yes')", "correct"),
        (
            "lora",
            {"init_lora_weights": "gausian"},
            {},
            "adapter.x.peft.init_lora_weights: must be bool | Literal[",
            "correct",
        ),
        ("dora", {"use_dora": False}, {}, "adapter.x.peft.use_dora: False contradicts the method", "method: lora"),
        (
            "qlora",
            {"layers_to_transform": [1]},
            {},
            "adapter.x.peft.layers_to_transform: requires a list of target_modules",
            "list",
        ),
        ("lora", {"megatron_core": "os"}, {}, "adapter.x.peft.megatron_core: is not supported: it imports", "correct"),
        (
            "prompt_tuning",
            {"tokenizer_kwargs": {}},
            {"merge": False},
            "adapter.x.peft.tokenizer_kwargs: is not supported",
            "correct",
        ),
        ("adalora", {"init_r": 8, "target_r": 8}, {}, "adapter.x.peft.init_r: must be above target_r", "correct"),
        ("full", {"trainable": ["("]}, {}, "adapter.x.peft.trainable: '(' is not a valid regular expression", "fix"),
        ("full", {"r": 4}, {}, "adapter.x.peft.r: unknown key", "trainable"),
        ("bitfit", {"r": 4}, {}, "adapter.x.peft.r: unknown key", ""),
        ("feature_extraction", {"l2": -1.0}, {"merge": False}, "adapter.x.peft.l2: ", "fix"),
        (
            "qlora",
            {},
            {"quantization": "none"},
            "adapter.x.quantization: qlora trains on 4-bit weights",
            "method: lora",
        ),
        ("full", {}, {"quantization": "nf4"}, "adapter.x.quantization: full computes with", "quantization: none"),
        (
            "lora",
            {"init_lora_weights": "pissa"},
            {"quantization": "nf4"},
            "adapter.x.peft.init_lora_weights: pissa is computed",
            "none",
        ),
        (
            "prefix_tuning",
            {},
            {},
            "adapter.x.merge: prefix_tuning cannot be merged: it trains virtual tokens",
            "merge: false",
        ),
        ("prompt_tuning", {}, {}, "adapter.x.merge: prompt_tuning cannot be merged", "merge: false"),
        ("p_tuning", {}, {}, "adapter.x.merge: p_tuning cannot be merged", "merge: false"),
        ("feature_extraction", {}, {}, "adapter.x.merge: feature_extraction cannot be merged", "merge: false"),
        (
            "ia3",
            {},
            {"quantization": "nf4"},
            "adapter.x.merge: ia3 cannot be merged once trained against quantized",
            "merge: false",
        ),
        (
            "adalora",
            {},
            {"quantization": "nf4"},
            "adapter.x.merge: adalora cannot be merged once trained",
            "merge: false",
        ),
        (
            "prefix_tuning",
            {},
            {"merge": False, "gradient_checkpointing": True},
            "adapter.x.gradient_checkpointing: prefix_tuning",
            "false",
        ),
        ("xlora", {}, {}, "adapter.x.method: xlora combines adapters", "methods: "),
    ],
)
def test_errors_visible_in_params_yaml_alone_are_refused_at_validation(
    method: str, options: dict[str, Any], how: dict[str, Any], what: str, hint: str
) -> None:
    with pytest.raises(InputError) as refusal:
        check(method, options, where="adapter.x", **{"quantization": None, "merge": True, **how})
    assert refusal.value.what.startswith(f"params.yaml: {what}")
    assert hint in refusal.value.hint


@pytest.mark.parametrize("method", methods())
def test_every_method_passes_validation_with_its_defaults(method: str) -> None:
    check(method, {}, None, merge=not CANNOT_MERGE.get(ALIASES.get(method, (method, {}))[0]), where="adapter.x")
    check(method.upper(), SMALL.get(method, {}), None, merge=False, where="adapter.x")


def test_validation_imports_neither_peft_nor_torch() -> None:
    code = (
        "import sys; from dagster_project.training.methods.options import check; check('lora', {'r': 4}, None, True,"
        " 'x');assert not {'peft', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_defaults_match_the_documentation_and_a_set_key_overrides_them(tiny_model: Path) -> None:
    base = plain(tiny_model)
    config = peft_config("lora", {}, "adapter.x", base)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (16, 32, 0.05, "none")
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert peft_config("qdora", {"r": 2}, "adapter.x", base).r == 2
    assert peft_config("qdora", {}, "adapter.x", base).use_dora
    assert peft_config("qlora", {}, "adapter.x", base).target_modules == "all-linear"
    ranks = peft_config("adalora", {"tinit": 5}, "adapter.x", base, total_steps=100)
    assert (ranks.init_r, ranks.target_r, ranks.tinit, ranks.tfinal, ranks.total_step) == (24, 16, 5, 50, 100)


@pytest.mark.parametrize("method", [name for name in TRAINED if name != "pvera"])
def test_a_method_answers_as_it_was_trained(method: str, tiny_model: Path) -> None:
    """Evaluation mode changes nothing but dropout (and pvera, which draws its adapter anew at each step)."""
    options = SMALL.get(method, {}) | (
        {"lora_dropout": 0.0} if {method, ALIASES.get(method, (method, {}))[0]} & {"lora", "adalora"} else {}
    )
    tunable = make(method, tiny_model, options=options)
    steps(tunable)
    evaluated = float(loss_of(tunable))
    tunable.model.train()
    assert float(loss_of(dataclasses.replace(tunable, extra_loss=lambda _: None))) == pytest.approx(evaluated, abs=1e-5)


@pytest.mark.parametrize("start", ["gaussian", "pissa", "olora", "orthogonal"])
def test_initializations_that_change_the_base_model_merge_into_the_trained_model(
    start: str, tiny_model: Path, tmp_path: Path
) -> None:
    tunable = make("lora", tiny_model, options={"r": 4, "init_lora_weights": start})
    steps(tunable)
    tunable.save(tmp_path / "adapter")
    assert merged.produce(COMPUTE, tiny_model, tmp_path / "adapter", out=tmp_path / "merged").checks[0].passed
    torch.testing.assert_close(
        logits(load(tmp_path / "merged", None, CPU, torch.float32)), logits(tunable.model), atol=1e-4, rtol=1e-4
    )


def test_an_adapter_that_is_not_merged_by_choice_is_measured_on_its_base(tiny_model: Path, tmp_path: Path) -> None:
    from dagster_project.evaluation.evaluator import EvaluatedModel, Settings

    tunable = make("lora", tiny_model, merge=False)
    steps(tunable)
    tunable.save(tmp_path / "adapter")
    report = merged.produce(COMPUTE, tiny_model, tmp_path / "adapter", out=tmp_path / "merged")
    assert (report.metrics["merged"], report.metrics["why_not"]) == (False, "params.yaml says merge: false")
    subject = EvaluatedModel(tmp_path / "merged", COMPUTE, Settings(), tiny_model)
    torch.testing.assert_close(logits(subject.model), logits(tunable.model), atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match="is an adapter that was not merged"):
        load(tmp_path / "merged", None, CPU, torch.float32)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_whose_order_would_matter_are_refused_and_others_reload_unchanged(
    key: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The saved configuration has its keys in alphabetical order; in another
    one, PEFT takes another pattern for a module that both match."""
    with pytest.raises(
        InputError, match=rf"adapter\.x\.peft\.{key}: 'v_proj' and .* match model\.layers\.0\.self_attn\.v_proj"
    ):
        make("lora", tiny_model, options={"r": 4, key: {"v_proj": 2, r"layers\.0\..*": 8}})
    tunable = make("lora", tiny_model, options={"r": 4, key: {"v_proj": 2, "q_proj": 8, "self_attn.v_proj": 2}})
    steps(tunable)
    tunable.save(tmp_path)
    scales = {name: module.scaling for name, module in tunable.model.named_modules() if hasattr(module, "scaling")}
    loaded = load(tmp_path, tiny_model, CPU, torch.float32)
    assert {
        f"base_model.model.{name}": module.scaling
        for name, module in loaded.named_modules()
        if hasattr(module, "scaling")
    } == scales


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_lora_weights": "eva"}, "init_lora_weights: eva is not supported: it needs a pass over the data"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: corda is not supported"),
        ({"kasa_config": {"gamma": 0.1}}, "kasa_config: is not supported: it adds a term to the loss"),
        ({"use_asa": True}, "use_asa: is not supported: it removes subspaces in a callback"),
        ({"velora_config": {}}, "velora_config: is not supported: it computes its projections in the first pass"),
    ],
)
def test_keys_that_would_not_act_in_the_training_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=rf"adapter\.x\.peft\.{said}"):
        refuse_untrained(options, "adapter.x")
    refuse_untrained({"init_lora_weights": "pissa", "kasa_config": None, "use_asa": False}, "adapter.x")


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("r", 8, "set init_r and target_r"),
        ("use_rslora", True, "leave it out"),
        ("alpha_pattern", {"q_proj": 4}, "leave it out"),
        ("init_lora_weights", "pissa", ""),
    ],
)
def test_keys_that_peft_does_not_read_for_adalora_are_refused(key: str, value: Any, hint: str) -> None:
    with pytest.raises(InputError, match=rf"adapter\.x\.peft\.{key}: has no effect with adalora\nhint: {hint}"):
        check("adalora", {key: value}, None, True, "adapter.x")
    check("adalora", {"init_lora_weights": False, "use_rslora": False}, None, True, "adapter.x")


def test_an_adapter_that_would_be_drawn_in_evaluation_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"adapter\.x\.peft\.sample_at_inference: is not supported: it draws the adapter anew"
    ):
        check("pvera", {"sample_at_inference": True}, None, True, "adapter.x")


@pytest.mark.parametrize("targets", [["k_proj", "v_proj"], ["up_proj", "down_proj"]])
def test_ia3_of_some_modules_can_be_loaded_and_merged(targets: list[str], tiny_model: Path, tmp_path: Path) -> None:
    """PEFT's own table has down_proj as a module whose input is scaled, also where it is not adapted."""
    tunable = make("ia3", tiny_model, options={"target_modules": targets})
    steps(tunable, rate=0.1)
    tunable.save(tmp_path / "adapter")
    report = merged.produce(COMPUTE, tiny_model, tmp_path / "adapter", out=tmp_path / "merged")
    assert report.checks[0].passed, report.checks[0].note
    torch.testing.assert_close(
        logits(load(tmp_path / "merged", None, CPU, torch.float32)), logits(tunable.model), atol=1e-4, rtol=1e-4
    )


def test_ia3_with_another_name_for_a_module_whose_input_is_scaled_is_refused(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=1, n_head=4)).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match=r"feedforward_modules: PEFT's names .* target_modules: mlp\.c_proj"):
        make("ia3", tmp_path, options={"target_modules": ["c_attn", "c_proj"]})


@pytest.mark.parametrize("start", ["pissa_niter_4", "pissa_niter_[number of iters]"])
def test_a_start_that_a_loaded_adapter_would_not_have_is_refused(start: str) -> None:
    said = (
        f"init_lora_weights: {start} is not supported: it starts from a random approximation, and a loaded adapter from"
        " another one"
    )
    with pytest.raises(InputError, match=re.escape(f"adapter.x.peft.{said}\nhint: use pissa")):
        check("lora", {"init_lora_weights": start}, None, True, "adapter.x")


def test_olora_of_weights_that_are_stored_transposed_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from dagster_project.training.trainers.alignment import reward_model

    GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=1, n_head=4)).save_pretrained(
        tmp_path
    )
    tiny_tokenizer.save_pretrained(tmp_path)
    for where in ("c_attn", "attn.c_proj"):  # the latter is square, so that no shape differs
        options = {"r": 4, "init_lora_weights": "olora", "target_modules": [where]}
        with pytest.raises(
            InputError, match=re.escape("adapter.x.peft.init_lora_weights: olora is not supported for this model")
        ):
            make("lora", tmp_path, options=options)
        with pytest.raises(
            InputError, match=re.escape("reward_model.peft.init_lora_weights: olora is not supported for this model")
        ):
            reward_model.build(tmp_path, options, CPU, torch.float32, "reward_model")
    with pytest.raises(InputError, match=re.escape("params.yaml: reward_model.peft: ")):
        reward_model.build(tmp_path, {"target_modules": "c_attn("}, CPU, torch.float32, "reward_model")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"target_modules": ["q_proj", "gate_prj"]},
            "target_modules: this model has no module 'gate_prj'\nhint: nearest: gate_proj",
        ),
        ({"modules_to_save": ["lm_heads"]}, "modules_to_save: this model has no module 'lm_heads'"),
        (
            {"target_modules": "all-linear", "exclude_modules": ["qproj"]},
            "exclude_modules: this model has no module 'qproj'",
        ),
        ({"rank_pattern": {"up_proj": 2}}, "rank_pattern: 'up_proj' matches no module that is adapted"),
        (
            {"layers_to_transform": [0, 2]},
            "layers_to_transform: no module of layer 2 is adapted\nhint: layers of this model: 0 to 1",
        ),
    ],
)
def test_a_name_that_no_module_has_is_refused_although_others_are_found(
    options: dict[str, Any], said: str, tiny_model: Path
) -> None:
    tunable = make("lora", tiny_model, options={"r": 4, **options})
    with pytest.raises(InputError, match=re.escape(f"params.yaml: adapter.x.peft.{said}")):
        refuse_unmatched(tunable.model, options, "adapter.x")
    fine = {
        "target_modules": ["q_proj", "self_attn.v_proj", "lm_head"],
        "modules_to_save": ["norm"],
        "alpha_pattern": {"v_proj": 8},
    }
    for one in (fine, {"layers_to_transform": 1}, {"layers_to_transform": [0, 1]}):
        refuse_unmatched(make("lora", tiny_model, options=one, merge=False).model, one, "adapter.x")


def test_patterns_and_names_of_adapted_parameters_are_those_of_the_model(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The experts of a mixture are parameters, not modules."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    size = {
        "vocab_size": len(tiny_tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **experts)).save_pretrained(tmp_path)
    names = ["experts.down_proj", "experts.gate_up_proj"]
    options = {
        "r": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "target_parameters": names,
        "rank_pattern": {names[0]: 2},
    }
    tunable = make("lora", tmp_path, options=options)
    refuse_unmatched(tunable.model, options, "adapter.x")
    ranks = {
        name: len(weight) for name, weight in tunable.model.named_parameters() if "lora_A" in name and "experts" in name
    }
    assert sorted(ranks.values()) == [2 * 4, 4 * 4], "each of the four experts has its own"
    misspelled = options | {"target_parameters": [*names, "experts.up_proj"]}
    with pytest.raises(
        InputError, match=r"target_parameters: this model has no weight 'experts\.up_proj' that can be adapted"
    ):
        refuse_unmatched(make("lora", tmp_path, options=misspelled).model, misspelled, "adapter.x")
    with pytest.raises(InputError, match=r"rank_pattern: .* match model\.layers\.0\.mlp\.experts\.down_proj"):
        make("lora", tmp_path, options=options | {"rank_pattern": {names[0]: 2, "down_proj": 3}})


def test_trained_rows_of_a_shared_output_layer_cannot_be_merged(tiny_model: Path) -> None:
    """Merged, they would be rows of the word embeddings, too."""
    for method, options in (
        ("trainable_tokens", {"token_indices": [5], "target_modules": ["lm_head"]}),
        ("lora", {"r": 4, "trainable_token_indices": {"lm_head": [5]}}),
        ("lora", {"r": 4, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [6]}}),
    ):
        with pytest.raises(InputError, match="this adapter cannot be merged: word embeddings and output layer"):
            make(method, tiny_model, options=options)
        assert make(method, tiny_model, options=options, merge=False).trainable


def test_the_same_trained_rows_of_embeddings_and_output_layer_can_be_merged(tiny_model: Path) -> None:
    for rows in ([6, 5], {"embed_tokens": [6, 5], "lm_head": [6, 5]}):
        assert make("lora", tiny_model, options={"r": 4, "trainable_token_indices": rows}).trainable


def test_whole_modules_beside_normalization_layers_cannot_be_merged(tiny_model: Path) -> None:
    options = {"modules_to_save": ["lm_head"]}
    with pytest.raises(InputError, match=r"peft\.modules_to_save: this adapter cannot be merged"):
        make("layernorm", tiny_model, options=options)
    assert make("layernorm", tiny_model, options=options, merge=False).trainable


def test_trained_biases_that_no_layer_of_the_base_model_can_take_are_refused_before_training(tiny_model: Path) -> None:
    with pytest.raises(
        InputError, match=r"lora_bias: this adapter cannot be merged: model\.layers\.0\.self_attn\.q_proj has no bias"
    ):
        make("lora", tiny_model, options={"r": 4, "lora_bias": True})
    assert make("lora", tiny_model, options={"r": 4, "lora_bias": True}, merge=False).trainable


def test_nothing_to_train_is_an_error(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    made = peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", lambda *given: made(*given).requires_grad_(False))
    with pytest.raises(InputError, match="lora leaves no parameter to train"):
        make("lora", tiny_model)


# ---- the real model
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_every_method_takes_two_steps_on_the_real_model(method: str, tmp_path: Path) -> None:
    base = ROOT / "data" / "base_model"
    if not (base / "model.safetensors").is_file():
        pytest.skip("no real model: run `dvc repro base_model`")
    wide = {
        "c3a": {"block_size": 64},
        "vblora": {"vector_length": 64},
        "road": {},
        "waveft": {},
        "osf": {"effective_rank": 16},
        "shira": {},
    }
    tunable = make(
        method,
        base,
        torch.bfloat16,
        options=wide.get(method, {} if method not in {"trainable_tokens", "adaption_prompt"} else SMALL[method]),
    )
    losses = steps(tunable, 2, rate=1e-4)
    assert all(map(math.isfinite, losses))
    tunable.save(tmp_path)
    assert any(tmp_path.glob("*.safetensors"))
