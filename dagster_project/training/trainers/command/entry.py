"""What an entry of params.yaml with a training command may say."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute, inside
from dagster_project.training.methods import options as methods
from dagster_project.training.trainers.harness.params import AUTO, COMMAND_KEYS, AdapterParams

FOLDER = "data/trainers"
"""A dependency in dvc.yaml: an edit of a file in it trains again."""

UNSUPPORTED = {
    "adalora": "saves fewer ranks than its configuration states",
    "p_tuning": "saves its virtual tokens without the network that computes them",
    "feature_extraction": "has a file format of its own",
}
"""Methods that cannot be checked from the files of a command -> reason."""


def check_command(params: AdapterParams, compute: Compute, where: str, root: Path) -> None:
    """Refuse what a training command cannot have, before anything runs.

    Args:
        where: dotted path of the entry in params.yaml, e.g. "adapter.mine".
        root: the project's folder.
    Raises:
        InputError: there is such a key; the command cannot be split into words; a file is missing or outside `FOLDER`.
    """
    if params.command is None:
        if useless := [key for key in COMMAND_KEYS if key in params.model_fields_set and getattr(params, key)]:
            problem = f"params.yaml: {where}.{useless[0]}: is used by a training command only"
            raise InputError(problem, "set command, or leave it out")
        return
    words_of(params.command, f"{where}.command")
    for path in params.files:
        source_of(root, path, f"{where}.files")
    if params.sharding is not None:
        raise InputError(f"params.yaml: {where}.sharding: a training command starts its own processes", "leave it out")
    if compute.processes > 1:
        problem = f"params.yaml: compute.processes: {where} has a command, which starts its own processes"
        raise InputError(problem, "set it to 1")
    values = given(params) | {f"peft.{key}": value for key, value in params.peft.items()}
    if autos := [key for key, value in values.items() if value == AUTO]:
        problem = f"params.yaml: {where}.{autos[0]}: auto is resolved by Pedigree's own trainer only"
        raise InputError(problem, "set a value, or leave it out")
    name = methods.ALIASES.get(params.method.lower(), (params.method.lower(), {}))[0]
    if name in UNSUPPORTED:
        problem = f"{params.method} is not supported with a command: it {UNSUPPORTED[name]}"
        raise InputError(f"params.yaml: {where}.method: {problem}", "use another method")
    methods.check(params.method, params.peft, params.quantization, params.merge, where)


def words_of(command: str, where: str) -> list[str]:
    """The words of a command, as a POSIX shell would split it.

    Raises:
        InputError: there are none, or a quote is not closed.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"params.yaml: {where}: {error}", "close the quote") from None
    if not words or not words[0]:
        raise InputError(f"params.yaml: {where}: is empty", "write a command such as `python train.py`")
    return words


def source_of(root: Path, path: str, where: str) -> Path:
    """A file that the command needs.

    Raises:
        InputError: it does not exist, is not a file, or is outside `FOLDER`.
    """
    full = inside(root, path, where)
    if not (full.is_relative_to((root / FOLDER).resolve()) and full.is_file()):
        problem = f"params.yaml: {where}: {path} is not a file in {FOLDER}/"
        raise InputError(problem, f"move it to {FOLDER}/ and use that path")
    return full


def given(params: AdapterParams) -> dict[str, Any]:
    """The keys of the entry that are set, as the command gets them: without the command and its files."""
    values = params.model_dump(mode="json", exclude_unset=True, exclude={"command", "files"}, warnings=False)
    return {"method": params.method, **values}
