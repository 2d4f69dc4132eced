"""base_model + adapter@X -> merged@X. A stand-alone model, proven equal to base plus adapter on logits."""

from __future__ import annotations

import shutil
from pathlib import Path

from dagster_project.params import Compute
from dagster_project.records import CheckResult, Report
from dagster_project.training.hardware import prepare

TRUTHS = {"merge_is_equal": "In float32, merged and unmerged model give the same logits."}

TOLERANCE = 1e-3
"""Largest difference between two logits (which span tens) that counts as rounding."""

PROBES = ("The capital of France is", '{"summary": "parcel', "Dear customer,\nthank you for", "0 1 1 2 3 5 8 13")


def run(compute: Compute, base_model: Path, adapter: Path, out: Path) -> Report:
    prepare(compute)
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    stored = AutoConfig.from_pretrained(base_model, trust_remote_code=False).dtype or torch.float32
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False).eval()
    model = PeftModel.from_pretrained(base, adapter).eval()
    probes = [tokenizer(text, return_tensors="pt").input_ids for text in PROBES]

    def logits() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model(ids).logits for ids in probes]

    with model.disable_adapter():
        untuned = logits()
    wanted = logits()
    model = model.merge_and_unload()
    difference = _furthest(logits(), wanted)
    effect = _furthest(untuned, wanted)
    model.to(stored).save_pretrained(out)
    model.float()
    rounded = logits()
    agreement = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in zip(rounded, wanted, strict=True)]
    for file in base_model.iterdir():
        if file.suffix != ".safetensors" and not (out / file.name).exists():
            shutil.copy(file, out)
    return Report(
        metrics={
            "dtype": str(stored).removeprefix("torch."),
            "largest_logit_difference": float(f"{difference:.3g}"),
            "largest_adapter_effect": round(effect, 3),
            "same_next_token_as_stored": round(sum(agreement) / len(agreement), 4),
        },
        checks=[
            CheckResult(
                "merge_is_equal",
                passed=difference < TOLERANCE < effect,
                blocking=True,
                note=f"largest difference {difference:.2g}; the adapter changes logits by up to {effect:.2g}",
            )
        ],
    )


def _furthest(ours: list, theirs: list) -> float:
    """Largest absolute difference between two lists of logits."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
