"""tokenized + base_model -> adapter@X. One variant tuned by its entry in params.yaml."""

from __future__ import annotations

import logging
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dagster_project.errors import InputError
from dagster_project.params import Compute
from dagster_project.records import CheckResult, Report, read_table
from dagster_project.training.hardware import prepare
from dagster_project.training.methods import peft_config, save_adapter
from dagster_project.training.sft import Recipe, attention_for, train, write_curve

log = logging.getLogger("pedigree")

TRUTHS = {
    "learned": "Every loss and every trained weight is finite, and the validation loss fell.",
}


class Params(Recipe):
    method: str = "lora"
    """A PEFT method by its name."""
    peft: dict[str, Any] = {}
    """The method's own keys, as PEFT names them (r, lora_alpha, target_modules, ...)."""


def run(variant: str, params: Params, compute: Compute, tokenized: Path, base_model: Path, out: Path, curve_file: Path) -> Report:
    config = peft_config(params.method, params.peft, f"adapter.{variant}")
    device, dtype = prepare(compute)
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    columns = ["input_ids", "labels", "weights", "lengths"]
    rows = {split: Dataset.from_list(read_table(tokenized / f"{split}.parquet", columns)) for split in ("train", "validation")}
    if not len(rows["train"]):
        raise InputError("adapter: the training split is empty", "name more examples in raw_examples.sources")
    tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        base_model, dtype=dtype, use_safetensors=True, trust_remote_code=False, attn_implementation=attention_for(device)
    ).to(device)
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"params.yaml: adapter.{variant}.peft: {error}", "correct the keys named") from None
    trainable, total = model.get_nb_trainable_parameters()
    if not trainable:
        raise InputError(
            f"params.yaml: adapter.{variant}: {params.method} leaves no parameter to train in this model", "choose other target_modules"
        )
    tokens = sum(map(sum, rows["train"]["lengths"]))
    log.info(
        f"training {variant}: {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %), {tokens:,} tokens an epoch, {str(dtype).removeprefix('torch.')} on {device}"
    )
    curve = train(model, tokenizer, rows["train"], rows["validation"], params, compute)
    save_adapter(model, out, base_model="data/base_model")
    write_curve(curve_file, curve)

    losses = [point["loss"] for point in curve if "loss" in point]
    watched = [point["validation_loss"] for point in curve if "validation_loss" in point]
    finite = all(map(math.isfinite, losses)) and all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)
    sound = finite and (len(watched) < 2 or watched[-1] < watched[0])
    return Report(
        metrics={
            "method": params.method,
            "trainable_parameters": trainable,
            "trainable_percent": round(100 * trainable / total, 4),
            "steps": len(losses),
            "tokens_per_epoch": tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "loss": round(losses[-1], 4),
            "environment": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "trl", "peft")},
            },
            "validation_loss": [round(loss, 4) for loss in watched],
        },
        checks=[
            CheckResult(
                "learned", passed=sound, note=f"validation loss {watched[0]:.3f} -> {watched[-1]:.3f}" if watched else "no validation split"
            )
        ],
    )
