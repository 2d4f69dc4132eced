"""Which parameters learn: PEFT's own table of methods, with its own keys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dagster_project.errors import InputError


def peft_config(method: str, options: dict[str, Any], where: str) -> Any:
    """The PEFT configuration of a method.

    Args:
        method: a name of PEFT's table in any case, e.g. "lora".
        options: its keys as PEFT names them, e.g. {"r": 16, "lora_alpha": 32}.
        where: dotted place in params.yaml, for messages.
    Raises:
        InputError: unknown method or key, or a value PEFT refuses.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, TaskType

    table = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method.lower() not in table:
        raise InputError(f"params.yaml: {where}.method: unknown method {method!r}", f"methods: {', '.join(sorted(table))}")
    config = table[method.lower()]
    known = {field.name for field in dataclasses.fields(config)} - {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
    }
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(
            "\n".join(f"params.yaml: {where}.peft.{key}: unknown key of {method}" for key in unknown),
            f"keys of {method}: {', '.join(sorted(known))}",
        )
    try:
        made = config(task_type=TaskType.CAUSAL_LM, **options)
    except (ValueError, TypeError) as error:
        raise InputError(f"params.yaml: {where}.peft: {error}", "correct the values named") from None
    if made.is_prompt_learning:
        raise InputError(
            f"params.yaml: {where}.method: {method} learns virtual tokens, which packed rows and a stand-alone model cannot hold",
            "use a method that changes weights, such as lora",
        )
    return made


def save_adapter(model: Any, folder: Path, base_model: str) -> None:
    """Adapter weights and configuration, the same bytes for the same weights.

    PEFT writes sets in hash order and the base model's absolute path; both would differ from run to run.
    """
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_model
    config = {
        key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value for key, value in config.items()
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
