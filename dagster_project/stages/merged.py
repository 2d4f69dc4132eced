"""base_model + adapter@X -> merged@X.

A complete model with the same logits as base plus adapter; unmergeable variants are copied unchanged.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.params import Compute, Section
from dagster_project.core.records import CheckResult, Report
from dagster_project.core.text import listed
from dagster_project.training.methods import feature_extraction
from dagster_project.training.methods.hardware import adding_adapters, prepare
from dagster_project.training.methods.load import RECORD, AdapterInfo, load, load_base, store_as

CHECK_DESCRIPTIONS = {"merge_is_equal": "In float32, the merged and the unmerged model compute the same logits."}

TOLERANCE = 1e-3
"""Largest logit difference attributed to rounding (logits span tens)."""

PROBES = ("The capital of France is", '{"summary": "parcel', "Dear customer,\nthank you for", "0 1 1 2 3 5 8 13")

MOST_ROWS = 64
"""Most trained tokens that are compared."""


class Params(Section):
    """No parameters: whether a variant is merged is set in its entry under `adapter`."""


def validate(params: Params, ctx: ValidationContext) -> None:
    """Nothing to check."""


def run(ctx: StageContext) -> Report:
    if ctx.stage == "merged":
        return produce(ctx.compute, ctx.output_of("base_model"), ctx.output_of("adapter"), out=ctx.out)
    sft = ctx.values["aligned"][ctx.variant]["adapter"]
    return produce(ctx.compute, ctx.outputs_of("merged") / sft, ctx.output_of("aligned"), out=ctx.out)


def produce(compute: Compute, base_model: Path, adapter: Path, out: Path) -> Report:
    prepare(compute)
    tuned = AdapterInfo.read(adapter)
    if feature_extraction.is_head(adapter) or not tuned.merge:
        metrics = {"merged": False, "why_not": tuned.why_not}
        return _copy_unmerged(base_model, adapter, out, metrics, f"not merged: {tuned.why_not}")
    if not (adapter / "adapter_config.json").is_file():
        return _copy_unmerged(base_model, adapter, out, {"merged": True}, "the tuned weights are a complete model")
    return _merge(base_model, adapter, tuned, out)


def _merge(base_model: Path, adapter: Path, tuned: AdapterInfo, out: Path) -> Report:
    """Merge the adapter into the base model's weights, and store them in the base model's number formats.

    The unquantized base model is used even if the adapter was trained on quantized weights; the report then states the
    difference.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    cpu = torch.device("cpu")
    probes = _probes(base_model, adapter)
    stored = AutoConfig.from_pretrained(base_model, trust_remote_code=False).dtype or torch.float32
    base = load_base(base_model, cpu, torch.float32)
    untuned = _logits(base.eval(), probes)  # an adapter that is switched off may leave other weights (PiSSA, biases)
    with adding_adapters():
        model = PeftModel.from_pretrained(base, adapter).eval()
    expected = _logits(model, probes)
    metrics: dict[str, Any] = {"merged": True, "dtype": str(stored).removeprefix("torch.")}
    if tuned.quantization != "none":
        trained = _logits(load(adapter, base_model, cpu, torch.float32), probes)
        metrics |= {
            "trained_against": tuned.quantization,
            "largest_difference_from_trained": round(_max_difference(trained, expected), 3),
            "same_next_token_as_trained": _agreement(trained, expected),
        }
    try:
        model = model.merge_and_unload()
    except (ValueError, NotImplementedError) as error:
        note = f"PEFT cannot merge it: {error}; set merge: false"
        return Report(metrics=metrics, checks=[CheckResult("merge_is_equal", passed=False, blocking=True, note=note)])
    difference = _max_difference(_logits(model, probes), expected)
    effect = _max_difference(untuned, expected)
    store_as(model, base_model).save_pretrained(out)
    model.float()
    for file in base_model.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not (out / file.name).exists():
            shutil.copy(file, out)
    for template in adapter.glob("chat_template.jinja"):  # the template it was tuned with
        shutil.copy(template, out)
    saved = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    saved.eval()
    rounded, reloaded = dict(model.named_parameters()), dict(saved.named_parameters())
    equal = {name for name in rounded.keys() & reloaded.keys() if torch.equal(rounded[name], reloaded[name])}
    mismatched = sorted((rounded.keys() | reloaded.keys()) - equal)
    metrics |= {
        "largest_logit_difference": float(f"{difference:.3g}"),
        "largest_adapter_effect": round(effect, 3),
        "same_next_token_as_stored": _agreement(_logits(saved, probes), expected),
    }
    note = f"largest difference {difference:.2g}; the adapter changes logits by up to {effect:.2g}"
    if mismatched:
        note = f"{len(mismatched)} stored weights are not what was merged: {listed(mismatched, 5)}"
    passed = difference < TOLERANCE < effect and not mismatched
    return Report(metrics=metrics, checks=[CheckResult("merge_is_equal", passed=passed, blocking=True, note=note)])


def _copy_unmerged(base_model: Path, adapter: Path, out: Path, metrics: dict[str, Any], note: str) -> Report:
    """Copy a complete or unmergeable model unchanged, after checking that it loads and has an effect."""
    import torch

    cpu = torch.device("cpu")
    shutil.copytree(adapter, out, dirs_exist_ok=True)
    if metrics["merged"]:
        (out / RECORD).unlink(missing_ok=True)
    if feature_extraction.is_head(out):
        layer = feature_extraction.load(out, base_model, cpu, torch.float32).classifier.score
        effect = float(layer.weight.detach().abs().max())
        note += f"; the layer's largest weight is {effect:.2g}"
    else:
        probes = _probes(base_model, adapter)
        untuned = _logits(load_base(base_model, cpu, torch.float32, AdapterInfo.read(out).quantization).eval(), probes)
        effect = _max_difference(_logits(load(out, base_model, cpu, torch.float32), probes), untuned)
        metrics["largest_adapter_effect"] = round(effect, 3)
        note += f"; it changes logits by up to {effect:.2g}"
    check = CheckResult("merge_is_equal", passed=effect > TOLERANCE, blocking=True, note=note)
    return Report(metrics=metrics, checks=[check])


def _probes(base_model: Path, adapter: Path) -> list[Any]:
    """Token ids of the texts, and of tokens whose rows were trained, which may be in none of the texts."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    texts = [tokenizer(text, return_tensors="pt").input_ids for text in PROBES]
    rows = _trained_rows(adapter)[:MOST_ROWS]
    return [*texts, torch.tensor([rows])] if rows else texts


def _trained_rows(adapter: Path) -> list[int]:
    """Tokens whose rows of the word embeddings or of the output layer an adapter trained."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    given = [config.get("token_indices"), config.get("trainable_token_indices")]
    lists = [one for found in given for one in (found.values() if isinstance(found, dict) else [found or []])]
    return sorted({int(token) for one in lists for token in one})


def _logits(model: Any, probes: list[Any]) -> list[Any]:
    """Logits of each probe, (1, tokens, vocabulary)."""
    import torch

    with torch.inference_mode():
        return [model(ids).logits for ids in probes]


def _max_difference(ours: list[Any], theirs: list[Any]) -> float:
    """Largest absolute difference between two lists of logits."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _agreement(ours: list[Any], theirs: list[Any]) -> float:
    """Mean share of positions with the same most likely next token."""
    shares = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in zip(ours, theirs, strict=True)]
    return round(sum(shares) / len(shares), 4)
