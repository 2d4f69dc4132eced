"""`pedigree export MODEL --format gguf | safetensors`: a folder with the model
for servers, with its pedigree in the files' metadata."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from dagster_project.commands.model_files import (
    claim,
    conformance,
    convert,
    gguf_metadata,
    llama_cpp,
    logits,
    safetensors_metadata,
)
from dagster_project.commands.model_files.claim import Claim
from dagster_project.commands.model_files.modelfile import modelfile
from dagster_project.commands.new_folder import new_folder
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_folder, sha256_of_file
from dagster_project.core.imports import lean_imports
from dagster_project.core.records import write_text
from dagster_project.core.text import shortened
from dagster_project.lineage.exports_in_place import without_exports
from dagster_project.lineage.history import listing_of
from dagster_project.lineage.signing.target import Target, find, refuse_in_output
from dagster_project.views.texts import text

MODELFILE = "Modelfile"
BUILD = "build"
"""Folder of the project for models that are exported without --out."""
PROMPTS = 200
"""Most test prompts whose token ids are compared."""
PROBES = (
    "What is the capital of France?",
    "My parcel arrived damaged. What can I do?\n\n  1. wait",
    'Größe: 3.14 €, {"a": [1, 2]} 日本 🙂',
)


def export(root: Path, model: str, form: str, quantization: str | None, out: str | None) -> dict[str, Any]:
    """Args:
        out: folder that does not exist yet; None: named after the model, in the project's folder `build`.
    Returns:
        {"format", "quantization", "model": address, "md5", "folder", "files":
        {name: {"bytes", "sha256"}}, "pedigree": the claim, "checked"}.
    Raises:
        InputError: the model cannot be exported in this form, or the folder cannot be written.
        ModuleNotFoundError: a library of the extra is missing.
    """
    if form == "gguf":
        convert.require(quantization or "f16")
    target = find(root, model)
    if not target.address:
        raise InputError(
            f"{model}: not an output of this project, so nothing records where it is from",
            "name a model, such as release",
        )
    if form != "gguf" and quantization:
        raise InputError("--quantization requires --format gguf", "leave it out")
    quantization = (quantization or "f16") if form == "gguf" else None
    name = "-".join(filter(None, (target.address.replace("@", "-"), quantization)))
    folder = Path(out) if out else root / BUILD / (f"{name}-{form}" if form == "safetensors" else name)
    _refuse_folder(root, folder)
    refuse = convert.refuse_unsupported if form == "gguf" else convert.refuse_incomplete
    refuse(target.folder, target.address)
    target.refuse_unrecorded()
    origin = replace(claim.make(root, target.address), quantization=quantization or "")
    with nullcontext() if out else _hidden_from_git(root / BUILD), new_folder(folder) as made:
        if form == "gguf":
            checked = _write_gguf(root, target, f"{name}.gguf", origin, made)
            target.refuse_unrecorded()  # so it did not change while it was converted
        else:
            checked = _write_safetensors(target, origin, made)
        files = {path.relative_to(made).as_posix(): _facts(path) for path in sorted(made.rglob("*")) if path.is_file()}
    return {
        "format": form,
        "quantization": quantization,
        "model": target.address,
        "md5": origin.model,
        "folder": str(folder),
        "files": files,
        "pedigree": origin.as_fields(),
        "checked": checked,
    }


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _refuse_folder(root: Path, folder: Path) -> None:
    if os.path.lexists(folder):
        raise InputError(f"{folder}: it exists already", "name a new folder with --out, or delete this one")
    refuse_in_output(root, "--out", folder)


@contextmanager
def _hidden_from_git(build: Path) -> Iterator[None]:
    """A new folder gets a file that lets git ignore what is in it, as models are too large for a commit.

    Without a model in it the folder does not stay.
    """
    ignore, is_new = build / ".gitignore", not os.path.lexists(build)
    if is_new:
        build.mkdir()
        write_text(ignore, "*\n")
    try:
        yield
    finally:
        if is_new and [*build.iterdir()] == [ignore]:
            ignore.unlink()
            build.rmdir()


def _write_gguf(root: Path, target: Target, name: str, origin: Claim, made: Path) -> dict[str, Any]:
    with lean_imports():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(target.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{target.address}: its tokenizer cannot be loaded: {shortened(' '.join(str(error).split()))}",
            convert.OTHERS,
        ) from None
    prompts = test_prompts(root, tokenizer)
    checked = write_gguf(target.folder, target.address, made / name, origin, prompts, tokenizer)
    write_text(made / MODELFILE, modelfile(tokenizer, name))
    return checked


def write_gguf(
    folder: Path,
    name: str,
    file: Path,
    origin: Claim,
    prompts: list[conformance.Prompt],
    tokenizer: Any,
) -> dict[str, Any]:
    """Convert a model, add its pedigree, and compare the file with the tokenizer.

    Args:
        file: to write. Temporary files are beside its folder.
    Returns:
        As `conformance.verify`, and "logits": as `logits.refuse_others`.
    """
    with lean_imports():
        from transformers import AutoConfig

    scratch = Path(tempfile.mkdtemp(dir=file.parent.parent))
    converted, written = scratch / "converted.gguf", convert.before_quantization(folder, origin.quantization)
    convert.convert(folder, name, converted, written)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    conformance.refuse_lost_window(converted, config, tokenizer.model_max_length)
    conformance.refuse_lost_settings(converted, config)
    distance = logits.refuse_others(converted, folder, name, written, max((prompt.ids for prompt in prompts), key=len))
    if written != origin.quantization:
        whole, converted = converted, scratch / "quantized.gguf"
        llama_cpp.quantize(whole, converted, origin.quantization)
        whole.unlink()
    gguf_metadata.with_fields(converted, file, {**origin.as_fields(), **conformance.further_fields(tokenizer, prompts)})
    shutil.rmtree(scratch)
    return {**conformance.verify(file, tokenizer, prompts), "logits": distance}


def test_prompts(root: Path, tokenizer: Any) -> list[conformance.Prompt]:
    """The prompts of test examples as training and evaluation render them; a few sentences where there are none."""
    from dagster_project.core.chat import encode_prompt, generation_prompt, is_text
    from dagster_project.core.records import iter_records

    if not tokenizer.chat_template:
        return [conformance.Prompt(text, tokenizer(text).input_ids) for text in PROBES]
    test = root / "data" / "splits" / "test"
    records = iter_records(test) if test.is_dir() else iter(())
    asked = ((r["messages"], r.get("tools")) for r in records if not is_text(r) and len(r["messages"]) > 1)
    given = [
        (messages[:-1], tools, bool(messages[-1].get("reasoning_content")))
        for messages, tools in islice(asked, PROMPTS)
    ]
    given = given or [([{"role": "user", "content": text}], None, False) for text in PROBES]
    return [conformance.Prompt(generation_prompt(tokenizer, *one), encode_prompt(tokenizer, *one)) for one in given]


def _write_safetensors(target: Target, origin: Claim, made: Path) -> dict[str, Any]:
    """Copy the folder, with the claim in its safetensors files.

    Returns:
        {"files": number, "weights_identical", "left_out": files with records or texts}.
    """
    left_out = []
    for path in sorted(without_exports(target.folder, target.folder.rglob("*"))):
        name = path.relative_to(target.folder)
        if path.is_dir():
            continue
        if path.suffix == claim.TABLES and target.address != claim.RELEASE:
            left_out.append(name.as_posix())
            continue
        copy = made / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            safetensors_metadata.with_metadata(path, copy, origin.as_fields())
        else:
            shutil.copyfile(path, copy)
    recorded, copied = listing_of(target.folder), safetensors_metadata.listing_without_pedigree(made)
    if md5_of_folder(recorded) != origin.model:
        raise InputError(f"{target.path} changed while it was copied", "run the command again")
    if wrong := [name for name, md5 in copied.items() if recorded[name] != md5]:
        raise InputError(
            f"{target.path}/{wrong[0]}: the copy without its metadata is not the same file",
            "save the model with a current version of safetensors",
        )
    return {"files": len(copied), "weights_identical": True, "left_out": left_out}


def as_text(document: Mapping[str, Any]) -> str:
    """For the terminal."""
    return text("model_files", **document, direct=convert.DIRECT, has_llama_cpp=llama_cpp.is_installed())
