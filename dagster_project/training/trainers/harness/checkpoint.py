"""Checkpoints from which an interrupted training resumes to the same bytes: written atomically, verified before use."""

from __future__ import annotations

import ast
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core import faults
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.hashing import sha256_of_file, sha256_of_files, sha256_of_text
from dagster_project.core.params import Compute
from dagster_project.core.records import remove
from dagster_project.training.trainers.harness.params import NON_SEMANTIC_PARAMS, TrainingParams
from dagster_project.training.trainers.harness.weight_audit import versions

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pedigree")

MARKER = "complete.json"
"""Written last: {"step", "identity", "files": {name: sha256}}. A folder without it is not a checkpoint."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A verified checkpoint."""

    folder: Path
    step: int

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved under a name, on the CPU; empty if there are none."""
        from safetensors.torch import load_file

        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}

    def document(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def state(self, device: torch.device) -> Any:
        """The state as passed to `save`; tensors that were on an accelerator are moved to `device`."""
        return unpack(self.document("state"), self.tensors("state"), device)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one variant, in their own folder."""

    folder: Path
    identity: Mapping[str, str]
    """What must be equal to resume from a checkpoint, by its name in messages: {"parameters": sha256, ...}."""
    keep: int = 2
    """Number of checkpoints to keep; older ones are removed once a newer one is complete."""
    sharded: bool = False
    """Whether each process writes its part. Then only the same number of processes can resume, and another is refused.
    """

    def save(
        self,
        step: int,
        state: Any,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        documents: Mapping[str, Any],
        parts: Callable[[Path], None] | None = None,
    ) -> None:
        """Write one checkpoint: a temporary folder, every file flushed, one rename, then the marker.

        A kill at any time leaves a complete checkpoint or one that `newest` recognizes as incomplete, and never changes
        the previous one.

        Args:
            state: any state that `pack` supports.
            tensors: file name (without suffix) -> name -> tensor.
            documents: file name (without suffix) -> JSON.
            parts: writes the parts of all processes into a folder.
        Raises:
            PedigreeError: the disk is full.
        """
        from safetensors.torch import save_file

        target, scratch = self.folder / f"step-{step:08d}", self.unfinished(step)
        state_tensors: dict[str, torch.Tensor] = {}
        state_document = pack(state, state_tensors, "state")
        try:
            remove(scratch)
            scratch.mkdir(parents=True)
            for name, group in {**tensors, "state": state_tensors}.items():
                save_file(_copy_shared(group), scratch / f"{name}.safetensors")
            for name, document in {**documents, "state": state_document}.items():
                (scratch / f"{name}.json").write_text(json.dumps(document))
            if parts:
                parts(scratch)
            paths = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
            files = {str(path.relative_to(scratch)): sha256_of_file(path) for path in paths}
            for name in files:
                _to_disk(scratch / name)
                _to_disk((scratch / name).parent)
            _to_disk(scratch)
            _remove(target)
            os.replace(scratch, target)  # noqa: PTH105
            _to_disk(self.folder)
            write = target / f"{MARKER}.unfinished"
            write.write_text(json.dumps({"step": step, "identity": dict(self.identity), "files": files}))
            _to_disk(write)
            os.replace(write, target / MARKER)  # noqa: PTH105
            _to_disk(target)
        except Exception as error:
            if not faults.is_full(error):
                raise
            remove(scratch)
            if not (target / MARKER).is_file():
                remove(target)
            raise PedigreeError(
                f"the disk is full: the checkpoint of step {step} does not fit into {self.folder}",
                "free some space and run again: training resumes from the previous checkpoint",
            ) from None
        for old in self._complete()[self.keep :]:
            _remove(old)

    def unfinished(self, step: int) -> Path:
        """Folder in which the checkpoint of a step is written."""
        return self.folder / f"step-{step:08d}.unfinished"

    def newest(self) -> SavedCheckpoint | None:
        """The newest complete checkpoint of the same training; None to start over.

        A damaged one is removed and the previous one is used; one of another training is set aside as `*.stale`. Both
        are logged.

        Raises:
            InputError: a sharded one of another number of processes.
        """
        for unfinished in self.folder.glob("step-*.unfinished"):
            remove(unfinished)
        differing: list[str] = []
        numbered = [path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
        for folder in sorted(numbered, reverse=True):
            try:
                marker = json.loads((folder / MARKER).read_text())
                step, identity, files = marker["step"], marker["identity"], marker["files"]
            except FileNotFoundError:
                wrong = "it is incomplete"
            except (ValueError, KeyError, TypeError):
                wrong = f"{MARKER} is not readable"
            else:
                parts = {*identity, *self.identity}
                differing = sorted(part for part in parts if identity.get(part) != self.identity.get(part))
                if differing == ["processes"] and self.sharded:
                    raise InputError(
                        f"{folder}: this checkpoint is of {identity['processes']} processes, and a sharded training"
                        " resumes with as many",
                        f"set compute.processes: {identity['processes']}, or remove {self.folder} to start over",
                    )
                if differing:
                    break
                wrong = _changed(folder, files)
            if not wrong:
                return SavedCheckpoint(folder, step)
            log.warning(f"training: checkpoint {folder.name} is damaged ({wrong}); using the previous one")
            _remove(folder)
        if differing:
            for stale in self.folder.glob("*.stale"):
                remove(stale)
            for folder in self._complete():
                folder.rename(folder.with_name(f"{folder.name}.stale"))
            what = f"the checkpoints are of another training (differs: {', '.join(differing)})"
            log.warning(f"training: {what}; set aside, starting over")
        return None

    def at(self, step: int) -> SavedCheckpoint:
        """The checkpoint of a step that another process verified.

        Raises:
            PedigreeError: it is not on this host.
        """
        folder = self.folder / f"step-{step:08d}"
        if not folder.is_dir():
            hint = "share the folder among the hosts, or remove it everywhere"
            raise PedigreeError(f"the checkpoint {folder} is not on this host", hint)
        return SavedCheckpoint(folder, step)

    def _complete(self) -> list[Path]:
        """Folders with a marker, newest step first."""
        folders = [path.parent for path in self.folder.glob(f"step-*/{MARKER}")]
        return sorted((folder for folder in folders if folder.suffix == ""), reverse=True)


def _changed(folder: Path, files: Mapping[str, str]) -> str:
    """What is wrong with the files of a checkpoint, given their hashes; empty if nothing is."""
    for name, sha256 in files.items():
        path = folder / name
        if not path.is_file() or sha256_of_file(path) != sha256:
            return f"{name} was changed"
    return ""


def _remove(folder: Path) -> None:
    """Remove a checkpoint, its marker first: a kill in between leaves no partial checkpoint that looks complete."""
    (folder / MARKER).unlink(missing_ok=True)
    remove(folder)


def _to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy_shared(group: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, copied if two of them share memory, which safetensors refuses.

    8-bit optimizers share their tables.
    """
    found: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, tensor in group.items():
        here = tensor.detach().cpu().contiguous()
        found[name] = here.clone() if here.untyped_storage().data_ptr() in taken else here
        taken.add(found[name].untyped_storage().data_ptr())
    return found


def code_of(module: Path, root: Path) -> list[Path]:
    """The file of a module and of every module of this package that it imports, directly or not, in a fixed order.

    Args:
        root: the package's folder; its name is the first part of each import.
    """
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == root.name:
                place = root.parent / Path(*node.module.split("."))
                names = [place.with_suffix(".py"), *(place / f"{name.name}.py" for name in node.names)]
                waiting += [name for name in names if name.is_file()]
    return sorted(found)


def run_identity(
    module: Path, compute: Compute, device: torch.device, dtype: torch.dtype, libraries: Sequence[str]
) -> dict[str, str]:
    """The part of a training's identity that every trainer shares.

    Args:
        module: the stage's own file.
    """
    return {
        "code": sha256_of_files(code_of(module, Path(__file__).parents[3])),
        "threads": str(compute.threads),
        "processes": str(compute.processes),
        "dtype": str(dtype),
        "device": device.type,
        "library versions": json.dumps(versions(libraries)),
    }


def params_identity(params: TrainingParams, compute: Compute) -> dict[str, str]:
    """The part of the identity that params.yaml determines."""
    values = {**params.model_dump(exclude=set(NON_SEMANTIC_PARAMS)), "seed": compute.seed}
    return {"parameters": sha256_of_text(json.dumps(values, sort_keys=True))}


def refuse_full_disk(needs: Mapping[Path, int], what: str) -> None:
    """Check before training that its files will fit on disk.

    Args:
        needs: folder -> bytes to write into it. Folders on one disk share its free space.
    Raises:
        PedigreeError: a disk has less free space.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs.items():
        folder.mkdir(parents=True, exist_ok=True)
        disk = folder.stat().st_dev
        disks[disk] = (folder, disks.get(disk, (folder, 0))[1] + size)
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            needed, left = f"{size / 2**20:,.0f} MiB", f"{free / 2**20:,.0f} MiB"
            raise PedigreeError(
                f"{what}: checkpoints and output need about {needed} of disk, and {left} are free in {folder}",
                "free some space, lower save_total_limit, or set save_strategy: no",
            )


def pack(value: Any, tensors: dict[str, torch.Tensor], place: str) -> Any:
    """A state (of an optimizer, a schedule, a random generator) as plain JSON.

    Its tensors are added to `tensors` under their path in it.

    >>> pack({0: (1.5, None)}, {}, "state")
    {'items': [[0, {'tuple': [1.5, None]}]]}

    Raises:
        TypeError: a value is neither plain data nor a tensor.
    """
    import torch

    if isinstance(value, torch.Tensor):
        tensors[place] = value
        return {"tensor": place, "device": value.device.type}
    if isinstance(value, Mapping):
        return {"items": [[key, pack(item, tensors, f"{place}.{key}")] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        packed = [pack(item, tensors, f"{place}.{i}") for i, item in enumerate(value)]
        return {"tuple": packed} if isinstance(value, tuple) else packed
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{place}: cannot be saved: {type(value).__name__}")


def unpack(packed: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    """Inverse of `pack`; tensors that were on an accelerator are moved to `device`."""
    if isinstance(packed, list):
        return [unpack(item, tensors, device) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        found = tensors[packed["tensor"]]
        return found if packed["device"] == "cpu" else found.to(device)
    if "tuple" in packed:
        return tuple(unpack(item, tensors, device) for item in packed["tuple"])
    return {key: unpack(item, tensors, device) for key, item in packed["items"]}


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The state of a torch optimizer, by the position of each parameter.

    Its own `state_dict` is not used, because loading converts the state to the parameter's dtype.
    """
    groups = optimizer.param_groups
    return {
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in groups],
        "state": [dict(optimizer.state.get(parameter, {})) for group in groups for parameter in group["params"]],
    }


def restore_optimizer(optimizer: Any, saved: Mapping[str, Any]) -> None:
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(values)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, state in zip(parameters, saved["state"], strict=True):
        if state:
            optimizer.state[parameter] = state


def random_state() -> dict[str, Any]:
    """States of the random generators of Python, numpy, torch and each GPU."""
    import random

    import numpy as np
    import torch

    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(saved: Mapping[str, Any]) -> None:
    import random

    import numpy as np
    import torch

    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])
