"""Training commands without any training: plain Python scripts that write
files, and the stage that runs them on the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders.training import make_data

LORA = """
import csv, json, os, sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

given = json.loads(Path("inputs.json").read_text())
base = load_file("base_model/model.safetensors")
dice = np.random.default_rng(given["seed"])
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
config["target_modules"] = ["q_proj", "v_proj"]
tensors, start = {}, {}
for layer in range(2):
    for name in ("q_proj", "v_proj"):
        rows, columns = base[f"model.layers.{layer}.self_attn.{name}.weight"].shape
        path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        tensors[f"{path}.lora_A.weight"] = dice.normal(0, 0.3, (4, columns)).astype("float32")
        tensors[f"{path}.lora_B.weight"] = dice.normal(0, 0.3, (rows, 4)).astype("float32")
A, B = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
"""
"""Start of a script: makes the tensors and the configuration of an adapter, whose last pair is `A` and `B`."""

SAVE = """
save_file(tensors, "output/adapter_model.safetensors")
Path("output/adapter_config.json").write_text(json.dumps(config))
"""

FULL = """
import json
from pathlib import Path
from safetensors.numpy import load_file, save_file

tensors = load_file("base_model/model.safetensors")
norms = [name for name in tensors if "norm" in name]
"""
"""Start of a script: reads a complete model."""


def folders(root: Path, model: Path) -> Any:
    from dagster_project.training.trainers.command.train import Folders

    return Folders(
        root,
        root / "data/tokenized",
        model,
        root / "work",
        root / "checkpoints",
        root / "out",
        root / "loss.csv",
        root / "pages",
    )


def make_project(root: Path) -> Path:
    make_data(root / "data")
    (root / "data/trainers").mkdir()
    return root


def train(root: Path, model: Path, script: str, **entry: Any) -> Any:
    """Run the stage on a project of `make_project`, with a script as its command. Returns its report."""
    from dagster_project.core.params import Compute
    from dagster_project.core.records import remove
    from dagster_project.stages import adapter
    from dagster_project.training.trainers.command.train import train_by_command

    (root / "data/trainers/train.py").write_text(script)
    remove(root / "out")
    (root / "out").mkdir()
    params = adapter.Params(**{"command": "python train.py", "files": ["data/trainers/train.py"]} | entry)
    return train_by_command("x", params, Compute(threads=1, dtype="float32"), folders(root, model))


def outputs(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "out").iterdir())}
