"""`pedigree export MODEL --format adapter`: a PEFT folder that PEFT,
transformers and vLLM load onto the base model that it names by hash."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dagster_project.commands.model_files import MERGED
from dagster_project.commands.model_ids import model_id
from dagster_project.commands.new_folder import new_folder, refuse_used
from dagster_project.core.errors import InputError
from dagster_project.core.records import write_text
from dagster_project.lineage import lineage
from dagster_project.lineage.export.export import refuse, summarize
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.index import Index
from dagster_project.lineage.signing.target import Target, find, refuse_in_output
from dagster_project.views.texts import text

FORMAT = "adapter"
CONFIG = "adapter_config.json"
TEMPLATE = "chat_template.jinja"
COPIED = ("adapter_model.safetensors", TEMPLATE)
NOT_IN_VLLM = {
    "modules_to_save": "modules_to_save",
    "use_dora": "DoRA",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters",
    "use_qalora": "QALoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
"""Keys of the configuration of a LoRA that vLLM refuses or does not read
(vllm/lora/peft_helper.py, v0.11 and main in November 2026)."""


CHANGES_THE_BASE = re.compile(r"(pissa|olora|corda|loftq|lora_ga).*", re.IGNORECASE)
"""Values of init_lora_weights with which PEFT takes the start of the adapter
out of the base model's weights, each time it loads it. vLLM does not."""


def write_adapter(root: Path, model: str, folder: Path | None) -> dict[str, Any]:
    """Write the folder. It appears when it is complete.

    Args:
        model: stage, path or hash of an adapter.
        folder: new or empty; None: named after the adapter and its hash, in the current folder.
    Returns:
        {"format", "folder", "model": {"stage", "md5"}, "base": {"name", "path", "md5"}, "files", "method",
        "quantization", "vllm": what it does not support}.
    Raises:
        InputError: the model is not an adapter, not as dvc.lock recorded it, or the folder cannot be written.
    """
    target = find(root, model)
    config = _config(target)
    base = _base(target, str(config["base_model_name_or_path"]))
    place = Path(model_id(target.address, target.md5)) if folder is None else folder
    refuse_in_output(root, "--out", place)
    refuse_used("--out", place)
    subject = lineage.find(Index(root), target.address, None)
    refuse(subject, target.address, "model-card")
    trained = json.loads((target.folder / "method.json").read_text(encoding="utf-8"))
    facts = {
        "format": FORMAT,
        "folder": str(place),
        "model": {"stage": target.address, "md5": target.md5},
        "base": base,
        "method": trained.get("method"),
        "quantization": trained.get("quantization", "none"),
        "vllm": not_in_vllm(config),
    }
    texts = {
        CONFIG: (
            json.dumps(config | {"base_model_name_or_path": base["name"], "revision": None}, indent=2, sort_keys=True)
            + "\n"
        ),
        "README.md": (
            f"{model_card(summarize(subject)).rstrip()}\n\n"
            f"{_how_to_load(facts, config, (target.folder / TEMPLATE).is_file())}"
        ),
    }
    return facts | {"files": _write(target, place, texts)}


def _config(target: Target) -> dict[str, Any]:
    """Raises:
    InputError: it is not an adapter in PEFT's format, or not as dvc.lock recorded it.
    """
    stage, _, variant = target.address.partition("@")
    if stage not in MERGED:
        names = [f"name {adapter}@{variant}" for adapter, merged in MERGED.items() if merged == stage]
        hint = names[0] if names else "name adapter@VARIANT or aligned@VARIANT"
        raise InputError(f"{target.label} is not an adapter: --format {FORMAT} writes one that PEFT loads", hint)
    target.refuse_unrecorded()
    if not (target.folder / CONFIG).is_file():
        raise InputError(
            f"{target.label} trained other weights than those of an adapter ({target.path}/{CONFIG} does not exist)",
            f"the complete model is {MERGED[stage]}@{variant}",
        )
    return dict(json.loads((target.folder / CONFIG).read_text(encoding="utf-8")))


def _base(target: Target, path: str) -> dict[str, str]:
    """The model that the adapter was trained on, as its own run in dvc.lock recorded it.

    Raises:
        InputError: the run does not name it.
    """
    digest = next((dep["md5"] for dep in target.lock[target.address]["deps"] if dep["path"] == path), None)
    if digest is None:
        raise InputError(
            f"{target.label}: dvc.lock does not record {path}, the model that it was trained on",
            f"`dvc repro {target.address}`",
        )
    name = Path(path).relative_to("data").as_posix().replace("/", "@")
    return {"name": model_id(name, digest), "path": path, "md5": digest}


def not_in_vllm(config: Mapping[str, Any]) -> list[str]:
    """What vLLM's `--lora-modules` does not support of an adapter; empty if it loads it."""
    if config.get("peft_type") != "LORA":
        return [str(config.get("peft_type"))]
    found = ["bias"] if config.get("bias", "none") != "none" or config.get("lora_bias") else []
    start = config.get("init_lora_weights")
    found += [f"init_lora_weights: {start}"] if isinstance(start, str) and CHANGES_THE_BASE.fullmatch(start) else []
    return found + [name for key, name in NOT_IN_VLLM.items() if config.get(key)]


def _how_to_load(facts: Mapping[str, Any], config: Mapping[str, Any], has_template: bool) -> str:
    """Args:
    has_template: whether the folder has the chat template of the training,
        which may be another one than the base model's.
    """
    return (
        text(
            "adapter",
            base=facts["base"],
            name=facts["model"]["stage"].partition("@")[2],
            quantization=facts["quantization"],
            vllm=facts["vllm"],
            max_rank=_rank(int(config["r"])) if not facts["vllm"] else None,
            template=TEMPLATE if has_template else "",
        )
        + "\n"
    )


def _rank(rank: int) -> int:
    """The smallest value of vLLM's --max-lora-rank that is enough."""
    return next((most for most in (8, 16, 32, 64, 128, 256, 320, 512) if most >= rank), rank)


def _write(target: Target, place: Path, texts: Mapping[str, str]) -> list[str]:
    """Raises:
    InputError: the adapter changed meanwhile, or the folder cannot be written.
    """
    with new_folder(place) as made:
        for name in COPIED:
            if (target.folder / name).is_file():
                shutil.copyfile(target.folder / name, made / name)
        target.refuse_unrecorded()  # so it did not change while it was read and copied
        for name, text in texts.items():
            write_text(made / name, text)
        return sorted(path.name for path in made.iterdir())


def as_text(document: Mapping[str, Any]) -> str:
    """What was written, for the terminal."""
    return text("adapter_written", **document)
