"""base_model + adapter@X -> merged@X. A stand-alone model, proven equal to base plus adapter on logits; what cannot be merged passes as it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.params import Compute, Section
from dagster_project.core.records import CheckResult, Report
from dagster_project.training.methods import feature_extraction
from dagster_project.training.methods.hardware import prepare
from dagster_project.training.methods.load import RECORD, AdapterInfo, load, load_base

CHECK_DESCRIPTIONS = {"merge_is_equal": "In float32, merged and unmerged model give the same logits."}

TOLERANCE = 1e-3
"""Largest difference between two logits (which span tens) that counts as rounding."""

PROBES = ("The capital of France is", '{"summary": "parcel', "Dear customer,\nthank you for", "0 1 1 2 3 5 8 13")


class Params(Section):
    """No parameters of its own: whether a variant is merged is part of its entry under `adapter`."""


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
        return _pass_on(base_model, adapter, out, {"merged": False, "why_not": tuned.why_not}, f"not merged: {tuned.why_not}")
    if not (adapter / "adapter_config.json").is_file():
        return _pass_on(base_model, adapter, out, {"merged": True}, "the tuned weights stand alone")
    return _merge(base_model, adapter, tuned, out)


def _merge(base_model: Path, adapter: Path, tuned: AdapterInfo, out: Path) -> Report:
    """Fold the adapter into the base model's weights, and store them in the base model's dtype.

    The base model is the full one, also where the adapter was trained against quantized weights: the report then says how far apart the two are.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    cpu = torch.device("cpu")
    probes = _probes(base_model)
    stored = AutoConfig.from_pretrained(base_model, trust_remote_code=False).dtype or torch.float32
    model = PeftModel.from_pretrained(load_base(base_model, cpu, torch.float32), adapter).eval()
    with model.disable_adapter():
        untuned = _logits(model, probes)
    wanted = _logits(model, probes)
    metrics: dict[str, Any] = {"merged": True, "dtype": str(stored).removeprefix("torch.")}
    if tuned.quantization != "none":
        trained = _logits(load(adapter, base_model, cpu, torch.float32), probes)
        metrics |= {
            "trained_against": tuned.quantization,
            "largest_difference_from_trained": round(_furthest(trained, wanted), 3),
            "same_next_token_as_trained": _agreement(trained, wanted),
        }
    try:
        model = model.merge_and_unload()
    except (ValueError, NotImplementedError) as error:
        note = f"PEFT cannot merge it: {error}; set merge: false"
        return Report(metrics=metrics, checks=[CheckResult("merge_is_equal", passed=False, blocking=True, note=note)])
    difference = _furthest(_logits(model, probes), wanted)
    effect = _furthest(untuned, wanted)
    model.to(stored).save_pretrained(out)
    model.float()
    for file in base_model.iterdir():
        if file.suffix != ".safetensors" and not (out / file.name).exists():
            shutil.copy(file, out)
    for template in adapter.glob("chat_template.jinja"):  # the one it was tuned with
        shutil.copy(template, out)
    alone = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, use_safetensors=True, trust_remote_code=False).eval()
    rounded, found = dict(model.named_parameters()), dict(alone.named_parameters())
    lost = sorted(
        name
        for name in rounded.keys() | found.keys()
        if name not in rounded or name not in found or not torch.equal(rounded[name], found[name])
    )
    metrics |= {
        "largest_logit_difference": float(f"{difference:.3g}"),
        "largest_adapter_effect": round(effect, 3),
        "same_next_token_as_stored": _agreement(_logits(alone, probes), wanted),
    }
    note = f"largest difference {difference:.2g}; the adapter changes logits by up to {effect:.2g}"
    if lost:
        note = f"{len(lost)} stored weights are not what was merged: {', '.join(lost[:5])}"
    passed = difference < TOLERANCE < effect and not lost
    return Report(metrics=metrics, checks=[CheckResult("merge_is_equal", passed=passed, blocking=True, note=note)])


def _pass_on(base_model: Path, adapter: Path, out: Path, metrics: dict[str, Any], note: str) -> Report:
    """What stands alone, or must go on as it is: the same files, once it is known to load and to do something."""
    import torch

    cpu = torch.device("cpu")
    shutil.copytree(adapter, out, dirs_exist_ok=True)
    if metrics["merged"]:
        (out / RECORD).unlink(missing_ok=True)
    if feature_extraction.is_head(out):
        effect = float(feature_extraction.load(out, base_model, cpu, torch.float32).classifier.score.weight.detach().abs().max())
        note += f"; the layer's largest weight is {effect:.2g}"
    else:
        probes = _probes(base_model)
        untuned = _logits(load_base(base_model, cpu, torch.float32, AdapterInfo.read(out).quantization).eval(), probes)
        effect = _furthest(_logits(load(out, base_model, cpu, torch.float32), probes), untuned)
        metrics["largest_adapter_effect"] = round(effect, 3)
        note += f"; it changes logits by up to {effect:.2g}"
    return Report(metrics=metrics, checks=[CheckResult("merge_is_equal", passed=effect > TOLERANCE, blocking=True, note=note)])


def _probes(base_model: Path) -> list[Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    return [tokenizer(text, return_tensors="pt").input_ids for text in PROBES]


def _logits(model: Any, probes: list[Any]) -> list[Any]:
    """Per probe the logits (1, tokens, vocabulary)."""
    import torch

    with torch.inference_mode():
        return [model(ids).logits for ids in probes]


def _furthest(ours: list[Any], theirs: list[Any]) -> float:
    """Largest absolute difference between two lists of logits."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _agreement(ours: list[Any], theirs: list[Any]) -> float:
    """Mean share of places with the same most likely next token."""
    shares = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in zip(ours, theirs, strict=True)]
    return round(sum(shares) / len(shares), 4)
