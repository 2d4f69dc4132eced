"""A merged model is base plus adapter, and an adapter without effect is rejected."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dagster_project.core.params import Compute
from dagster_project.stages import merged
from dagster_project.training.methods.build import build, peft_config, save_adapter


def make_adapter(tiny_model: Path, folder: Path, size: float) -> Path:
    """A LoRA adapter with random lora_B of a standard deviation, as training
    would leave it; 0 is an adapter that was never trained."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        peft_config("lora", {"target_modules": "all-linear"}, "adapter.x"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
    save_adapter(model, folder, base_model="data/base_model")
    return folder


@pytest.mark.parametrize(("size", "passes"), [(0.3, True), (0.0, False)], ids=["trained", "untrained"])
def test_a_merge_passes_only_with_an_adapter_that_changes_something(
    tiny_model: Path, tmp_path: Path, size: float, passes: bool
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", size)
    report = merged.produce(Compute(threads=1), tiny_model, adapter, out=tmp_path / "merged")
    assert {check.name: check.passed for check in report.checks} == {"merge_is_equal": passes}
    assert [check.name for check in report.failures] == ([] if passes else ["merge_is_equal"])
    assert report.metrics["largest_logit_difference"] < merged.TOLERANCE
    assert (report.metrics["largest_adapter_effect"] > 0.1) == passes


def test_the_merged_model_loads_by_itself_and_answers_like_base_plus_adapter(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = make_adapter(tiny_model, tmp_path / "adapter", 0.3)
    merged.produce(Compute(threads=1), tiny_model, adapter, out=tmp_path / "merged")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("The capital of France is", return_tensors="pt").input_ids
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).eval()
    with torch.inference_mode():
        torch.testing.assert_close(alone(ids).logits, tuned(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_effect_of_an_adapter_that_starts_in_the_models_weights_is_that_on_the_base_model(
    tiny_model: Path, tmp_path: Path
) -> None:
    """PiSSA takes the start of the adapter out of the weights: switched off, it leaves another model."""
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"}
    untrained = build("lora", options, tiny_model, torch.device("cpu"), torch.float32, "adapter.x")
    untrained.save(tmp_path / "adapter")
    report = merged.produce(Compute(threads=1), tiny_model, tmp_path / "adapter", out=tmp_path / "merged")
    assert report.metrics["largest_adapter_effect"] < merged.TOLERANCE
    assert [check.name for check in report.failures] == ["merge_is_equal"]


@pytest.mark.parametrize("merge", [True, False])
def test_trained_rows_of_tokens_that_are_in_no_probe_are_compared(
    tiny_model: Path, tmp_path: Path, merge: bool
) -> None:
    """Where the output layer has a weight of its own, rows of the word
    embeddings act only on texts with these tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    prepared = build(
        "trainable_tokens", {"token_indices": [1]}, base, torch.device("cpu"), torch.float32, "adapter.x", merge=merge
    )
    for weight in prepared.model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight.data)
    prepared.save(adapter)
    report = merged.produce(Compute(threads=1), base, adapter, out=tmp_path / "merged")
    assert not report.failures and report.metrics["largest_adapter_effect"] > 0.1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_tuned_model_of_a_base_model_with_several_chat_templates_has_the_one_of_its_training(
    tiny_model: Path, tmp_path: Path, method: str
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_model, base)
    (base / "additional_chat_templates").mkdir()  # as transformers saves a tokenizer with several templates
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    if method == "lora":
        make_adapter(base, adapter, 0.3)
    else:
        prepared = build("full", {}, base, torch.device("cpu"), torch.float32, "adapter.x")
        for weight in prepared.model.parameters():
            torch.nn.init.normal_(weight.data, std=0.1)
        prepared.save(adapter)
    (adapter / "chat_template.jinja").write_text("trained with")
    report = merged.produce(Compute(threads=1), base, adapter, out=tmp_path / "merged")
    assert report.failures == []
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "trained with"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_the_base_model_keeps_in_float32_are_not_rounded(
    tiny_model: Path, tmp_path: Path, method: str
) -> None:
    """transformers keeps routers of mixtures of experts, and what it adds to
    their scores, in float32: in bfloat16, 5.001 and 5.009 are both 5."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    base = tmp_path / "base"
    adapter = tmp_path / "adapter"
    keys = {"n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    size = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
    }
    kind = AutoConfig.for_model(
        "glm4_moe", **size, **keys, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind).to(torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for name, weight in model.state_dict().items():
        if name.endswith("gate.e_score_correction_bias"):
            weight.copy_(5 + torch.rand_like(weight) / 100)
    model.save_pretrained(base)
    prepared = build(method, {}, base, torch.device("cpu"), torch.float32, "adapter.x")
    for name, weight in prepared.model.named_parameters():
        if weight.requires_grad and "gate." not in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    prepared.save(adapter)
    report = merged.produce(Compute(threads=1), base, adapter, out=tmp_path / "merged")
    assert report.failures == []
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: weight.dtype for name, weight in after.items()} == {
        name: weight.dtype for name, weight in before.items()
    }
    routers = [name for name, weight in before.items() if weight.dtype == torch.float32]
    assert len(routers) == 2 and all(torch.equal(before[name], after[name]) for name in routers)


Array = np.ndarray[Any, Any]


def cayley(packed: Array, size: int) -> Array:
    """Blocks on the diagonal, each (I + Q)(I - Q)^-1 of a skew-symmetric Q,
    whose upper triangle is given (Qiu et al. 2023, section 3.3)."""
    whole = np.zeros((len(packed) * size, len(packed) * size))
    for i, upper in enumerate(packed):
        q = np.zeros((size, size))
        q[np.triu_indices(size, 1)] = upper
        place = slice(i * size, (i + 1) * size)
        whole[place, place] = (np.eye(size) + q - q.T) @ np.linalg.inv(np.eye(size) - q + q.T)
    return whole


def reflections(vectors: Array) -> Array:
    """The product of the Householder reflections of the columns."""
    whole = np.eye(len(vectors))
    for u in vectors.T:
        whole = whole @ (np.eye(len(u)) - 2 * np.outer(u, u) / (u @ u))
    return whole


FORMULAS: dict[str, tuple[dict[str, Any], Callable[[Array, Callable[[str], Array], bool], Array]]] = {
    "lora": (
        {"r": 4, "use_rslora": True, "alpha_pattern": {"down_proj": 3}, "rank_pattern": {"k_proj": 9}},
        lambda w, of, down: w + (3 / 4**0.5 if down else 32 / 9**0.5) * of("lora_B.weight") @ of("lora_A.weight"),
    ),
    "adalora": (
        {"init_r": 4, "target_r": 2},
        lambda w, of, _: w + 32 / 4 * of("lora_B") @ (of("lora_E") * of("lora_A")),
    ),
    "ia3": ({}, lambda w, of, _: w * of("ia3_l")),
    "loha": (
        {"r": 4, "alpha": 6},
        lambda w, of, _: w + 6 / 4 * (of("hada_w1_a") @ of("hada_w1_b")) * (of("hada_w2_a") @ of("hada_w2_b")),
    ),
    "lokr": (
        {"r": 2, "alpha": 6},
        lambda w, of, _: w + 6 / 2 * np.kron(of("lokr_w1"), of("lokr_w2_a") @ of("lokr_w2_b")),
    ),
    "vera": (
        {"r": 4},
        lambda w, of, _: (
            w
            + (of("vera_lambda_b")[:, None] * of("/vera_B")[: len(w)])
            @ (of("vera_lambda_d")[:, None] * of("/vera_A")[:, : w.shape[1]])
        ),
    ),
    "hra": ({"r": 4}, lambda w, of, _: w @ reflections(of("hra_u"))),
    "oft": ({"oft_block_size": 16, "use_cayley_neumann": False}, lambda w, of, _: w @ cayley(of("oft_R.weight"), 16)),
}
"""Method -> its keys, and the weight after the merge, from the one before, the
adapter's weights by name, and whether it is down_proj."""


def part_of(adapter: dict[str, Array], module: str, part: str) -> Array:
    """A weight of an adapter: of a module, or, with /, one that all modules share."""
    return adapter[f"base_model{part.replace('/', '.')}" if "/" in part else f"base_model.model.{module}.{part}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", FORMULAS)
def test_the_merged_weights_are_those_of_the_paper(
    method: str, dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    """Computed in float64 from the files, without PEFT, for weights with more
    columns than rows; everything else is unchanged."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base, (options, formula) = tmp_path / "base", FORMULAS[method]
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(base)
    keys = options | {"target_modules": ["k_proj", "down_proj"]}
    prepared = build(method, keys, base, torch.device("cpu"), torch.float32, "adapter.x", total_steps=10)
    torch.manual_seed(5)
    for weight in prepared.model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    prepared.save(tmp_path / "adapter")
    report = merged.produce(Compute(threads=1), base, tmp_path / "adapter", out=tmp_path / "merged")
    assert not report.failures
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    adapter = {
        name: weight.double().numpy()
        for name, weight in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
    }
    assert before.keys() == after.keys() and {weight.dtype for weight in after.values()} == {dtype}
    changed = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    assert changed == sorted(
        f"model.layers.{i}.{module}.weight" for i in (0, 1) for module in ("mlp.down_proj", "self_attn.k_proj")
    )
    for name in changed:
        found = formula(
            before[name].double().numpy(), partial(part_of, adapter, name.removesuffix(".weight")), "down_proj" in name
        )
        # half a unit of the last place of bfloat16, and float32's rounding in between
        nearest = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
        np.testing.assert_allclose(after[name].double().numpy(), found, rtol=nearest, atol=2e-6)
