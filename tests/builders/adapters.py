"""LoRA adapters for the tiny model with random weights, as trainings would
leave them, and the changes of weights that they make, by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np


def make_adapter(
    model: Path, folder: Path, seed: int, method: str = "lora", quantization: str = "none", **keys: Any
) -> Path:
    """The output of a training: an adapter with random A and B, and its records."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from dagster_project.training.methods.build import peft_config, save_adapter
    from dagster_project.training.methods.load import AdapterInfo

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **keys}
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), peft_config(method, options, "adapter.x"))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(tuned, folder, base_model="data/base_model")
    AdapterInfo(method=method, quantization=quantization).write(folder)  # type: ignore[arg-type]
    (folder / "training.json").write_text(
        json.dumps({"steps": 10 + seed, "tokens": 1000 + seed, "trained_tokens": 100 + seed})
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def random_policy(model: Path, peft: dict[str, Any]) -> Any:
    """A policy of an alignment whose adapter has an effect, and whose answers differ."""
    import torch

    from dagster_project.training.trainers.alignment import preference

    torch.manual_seed(1)
    policy = preference.policy(model, peft, torch.device("cpu"), torch.float32, "aligned.mine", "lora").model
    for weight in policy.parameters():
        weight.data = weight.data + 0.05 * torch.randn_like(weight) if weight.requires_grad else weight.data * 2
    return policy


def factors(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Module -> {"A", "B"} of an adapter's file, in float64."""
    from safetensors.numpy import load_file

    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        found.setdefault(module, {})[factor] = tensor.astype(np.float64)
    return found


def scale(folder: Path, module: str) -> float:
    config = json.loads((folder / "adapter_config.json").read_text())
    alpha = next(
        (value for name, value in config["alpha_pattern"].items() if re.search(rf"{name}$", module)),
        config["lora_alpha"],
    )
    return float(alpha / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"]))


def changes(folder: Path) -> dict[str, np.ndarray]:
    """Module -> the change of its weight: scale * B @ A, in float64."""
    return {module: scale(folder, module) * pair["B"] @ pair["A"] for module, pair in factors(folder).items()}
