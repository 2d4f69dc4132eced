"""A larger local model that a policy learns from by distillation, pinned by hashes and with the same vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.params import Section, inside
from dagster_project.core.text import listed
from dagster_project.training.methods.load import files_in_index, refuse_pickled_weights

if TYPE_CHECKING:
    import torch

READ = ("*.json", "*.safetensors", "*.model", "*.jinja")
"""Files that are read of a teacher: configuration, tokenizer and weights."""
MADE_HERE = ("base_model", "adapter", "merged", "reward_model", "aligned", "merged_aligned", "release")
"""Stages whose outputs are models."""
ADVICE = "copy the folder of a saved model: config.json, tokenizer and safetensors files"


class Teacher(Section):
    """The model whose next-token distributions a policy learns."""

    folder: str
    """A folder inside the project with config.json, the tokenizer and safetensors files."""
    sha256: dict[str, str]
    """File -> its sha256. Every json, safetensors, model and jinja file of the folder must be listed, and match."""
    license: str = "unknown"
    """License of the teacher, as its publisher states it. It is not checked."""


def locate(teacher: Teacher, root: Path, where: str) -> Path:
    """The folder of a teacher; its files are not hashed.

    Args:
        where: dotted path of the teacher in params.yaml, for messages.
    Raises:
        InputError: it is outside the project, an output of a stage or no saved model, names files elsewhere, or a file
            has no hash.
    """
    folder, place = inside(root, teacher.folder, f"{where}.folder"), f"params.yaml: {where}.folder"
    if any(folder.is_relative_to((root / "data" / stage).resolve()) for stage in MADE_HERE):
        problem = "is the output of a stage, which DVC does not know as an input of this one"
        raise InputError(f"{place}: {teacher.folder} {problem}", "use a model that this project does not make")
    files = files_of(folder)
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise InputError(f"{place}: {teacher.folder} has no config.json and safetensors files", ADVICE)
    if linked := next((name for name in files if (folder / name).is_symlink()), None):
        hint = "copy the file into the folder (tracked by DVC: `dvc unprotect`)"
        raise InputError(f"{place}: {linked} is a link", hint)
    if "adapter_config.json" in files:
        problem = f"{place}: this is an adapter, whose base model has no hash"
        raise InputError(problem, "merge it into its base model first")
    if missing := sorted({*files, *files_in_index(folder)} - teacher.sha256.keys()):
        hint = f"list their hashes: `cd {teacher.folder} && sha256sum *`"
        raise InputError(f"params.yaml: {where}.sha256: not listed: {listed(missing, 5)}", hint)
    return folder


def files_of(folder: Path) -> list[str]:
    """Names of the files that are read."""
    return sorted({path.name for pattern in READ for path in folder.glob(pattern)})


def verify(teacher: Teacher, folder: Path, student: Path, where: str) -> None:
    """Check the hashes and the vocabulary of a teacher before anything is loaded.

    Args:
        student: folder of the model that learns from it.
    Raises:
        InputError: a file differs from its hash, or token ids mean something else.
    """
    for name, digest in sorted(teacher.sha256.items()):
        path = folder / name
        if path.name != name or not path.is_file():
            problem = f"params.yaml: {where}.sha256: {name} is not a file in {teacher.folder}"
            raise InputError(problem, "remove it, or add the file")
        if (found := sha256_of_file(path)) != digest:
            problem = f"{teacher.folder}/{name} has sha256 {found}, not {digest[:64]}"
            raise InputError(problem, f"restore the file, or change params.yaml: {where}.sha256")
    _refuse_other_tokens(teacher, folder, student, where)


def _refuse_other_tokens(teacher: Teacher, folder: Path, student: Path, where: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    def tokens(model: Path) -> int:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return int(config.get_text_config().vocab_size)

    place = f"params.yaml: {where}.folder"
    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
        predicted, expected = tokens(folder), tokens(student)
    # transformers fails where it first uses a wrong value
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{place}: transformers cannot read {teacher.folder}: {why}", ADVICE) from None
    ours = AutoTokenizer.from_pretrained(student, trust_remote_code=False).get_vocab()
    hint = "use a teacher of the same family, whose token ids are those of the SFT model"
    if different := sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)):
        first = different[0]
        example = f"{first!r} has the id {theirs.get(first)} and in the SFT model {ours.get(first)}"
        problem = f"has another tokenizer: {len(different)} tokens differ, e.g. {example}"
        raise InputError(f"{place}: {teacher.folder} {problem}", hint)
    if predicted != expected:
        problem = f"{teacher.folder} predicts {predicted} tokens, and the SFT model {expected}"
        raise InputError(f"{place}: {problem}", hint)


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The teacher, of which every weight is in its files.

    Raises:
        InputError: weights are missing, which transformers would draw at random, do not fit the configuration, or
            cannot be read.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    refuse_pickled_weights(folder)
    what, safe = f"the teacher {folder.name}", {"use_safetensors": True, "trust_remote_code": False}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **safe
        )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        if isinstance(error, torch.OutOfMemoryError) or "memory" in lines[0].lower():
            raise
        raise InputError(f"{what}: transformers cannot load the model: {lines[0][:300]}", ADVICE) from None
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{what}: its files lack {len(missing)} weights of the model, such as {missing[0]}", ADVICE)
    return model.requires_grad_(False).to(device).eval()
