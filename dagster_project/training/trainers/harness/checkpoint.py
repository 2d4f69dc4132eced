"""Checkpoints from which an interrupted training ends in the same bytes: written whole or not at all, proven before they are used."""

from __future__ import annotations

import ast
import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import PedigreeError
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
class Saved:
    """A checkpoint that has been found whole."""

    folder: Path
    step: int

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved under a name, on the CPU; none if there are none."""
        from safetensors.torch import load_file

        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}

    def document(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def state(self, device: torch.device) -> Any:
        """The state as it was handed to `save`; tensors that were on an accelerator are put on `device`."""
        return unpack(self.document("state"), self.tensors("state"), device)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one variant, in a folder of their own."""

    folder: Path
    identity: Mapping[str, str]
    """What must be the same for a checkpoint to be gone on from, by a name that a message can use: {"parameters": sha256, ...}."""
    keep: int = 2
    """How many to keep; older ones are removed once a newer one is complete."""

    def save(self, step: int, state: Any, tensors: Mapping[str, Mapping[str, torch.Tensor]], documents: Mapping[str, Any]) -> None:
        """Write one checkpoint: a temporary folder, every file on disk, one rename, then the marker.

        A kill at any moment leaves either a whole checkpoint or one that `newest` recognizes as unfinished, and never touches the one before.

        Args:
            state: anything that `pack` can take apart.
            tensors: file name (without suffix) -> name -> tensor.
            documents: file name (without suffix) -> JSON.
        Raises:
            PedigreeError: the disk is full.
        """
        from safetensors.torch import save_file

        target, scratch = self.folder / f"step-{step:08d}", self.folder / f"step-{step:08d}.unfinished"
        state_tensors: dict[str, torch.Tensor] = {}
        state_document = pack(state, state_tensors, "state")
        try:
            remove(scratch)
            scratch.mkdir(parents=True)
            for name, group in {**tensors, "state": state_tensors}.items():
                save_file(_apart(group), scratch / f"{name}.safetensors")
            for name, document in {**documents, "state": state_document}.items():
                (scratch / f"{name}.json").write_text(json.dumps(document))
            files = {path.name: sha256_of_file(path) for path in sorted(scratch.iterdir())}
            for name in files:
                _to_disk(scratch / name)
            _to_disk(scratch)
            _remove(target)
            os.replace(scratch, target)  # noqa: PTH105
            _to_disk(self.folder)
            write = target / f"{MARKER}.unfinished"
            write.write_text(json.dumps({"step": step, "identity": dict(self.identity), "files": files}))
            _to_disk(write)
            os.replace(write, target / MARKER)  # noqa: PTH105
            _to_disk(target)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            remove(scratch)
            raise PedigreeError(
                f"the disk is full: the checkpoint of step {step} does not fit into {self.folder}",
                "free some space and run again: training goes on from the checkpoint before",
            ) from None
        for old in self._complete()[self.keep :]:
            _remove(old)

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole and of this very training; None to start anew.

        One that is damaged is removed in favour of the one before; one of another training is set aside as `*.stale`. Each time one line says so.
        """
        for unfinished in self.folder.glob("step-*.unfinished"):
            remove(unfinished)
        differing: list[str] = []
        for folder in sorted((path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdigit()), reverse=True):
            wrong = ""
            try:
                marker = json.loads((folder / MARKER).read_text())
                step, identity, files = marker["step"], marker["identity"], marker["files"]
            except FileNotFoundError:
                wrong = "it was not written to its end"
            except (ValueError, KeyError, TypeError):
                wrong = f"{MARKER} is not readable"
            else:
                differing = sorted(part for part in {*identity, *self.identity} if identity.get(part) != self.identity.get(part))
                if differing:
                    break
                wrong = next(
                    (
                        f"{name} is not what was written"
                        for name, sha256 in files.items()
                        if (sha256_of_file(folder / name) if (folder / name).is_file() else "") != sha256
                    ),
                    "",
                )
            if not wrong:
                return Saved(folder, step)
            log.warning(f"training: checkpoint {folder.name} is damaged ({wrong}); going back to the one before")
            _remove(folder)
        if differing:
            for stale in self.folder.glob("*.stale"):
                remove(stale)
            for folder in self._complete():
                folder.rename(folder.with_name(f"{folder.name}.stale"))
            log.warning(f"training: the checkpoints are of another training (differs: {', '.join(differing)}); set aside, starting anew")
        return None

    def at(self, step: int) -> Saved:
        """The checkpoint of a step, which another process has found whole."""
        return Saved(self.folder / f"step-{step:08d}", step)

    def _complete(self) -> list[Path]:
        """Folders with a marker, newest step first."""
        return sorted((path.parent for path in self.folder.glob(f"step-*/{MARKER}") if path.parent.suffix == ""), reverse=True)


def _remove(folder: Path) -> None:
    """A checkpoint, its marker first, so that a kill in between cannot leave half a checkpoint that looks whole."""
    (folder / MARKER).unlink(missing_ok=True)
    remove(folder)


def _to_disk(path: Path) -> None:
    """Flush a file, or what a folder says of its entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _apart(group: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, copied where two of them share memory, which safetensors refuses (8-bit optimizers share their tables)."""
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
        root: the package's folder; its name is the first word of each import.
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


def run_identity(module: Path, compute: Compute, device: torch.device, dtype: torch.dtype, libraries: Sequence[str]) -> dict[str, str]:
    """The part of a training's identity that every trainer shares: code, threads, processes, dtype, device, library versions.

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
    """The part that params.yaml determines."""
    values = {**params.model_dump(exclude=set(NON_SEMANTIC_PARAMS)), "seed": compute.seed}
    return {"parameters": sha256_of_text(json.dumps(values, sort_keys=True))}


def refuse_full_disk(needs: Mapping[Path, int], what: str) -> None:
    """Say before training that its files will not fit.

    Args:
        needs: folder -> bytes that will be written into it. Folders on one disk share what is free there.
    Raises:
        PedigreeError: a disk has less space than that.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs.items():
        folder.mkdir(parents=True, exist_ok=True)
        disk = folder.stat().st_dev
        disks[disk] = (folder, disks.get(disk, (folder, 0))[1] + size)
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise PedigreeError(
                f"{what}: checkpoints and output need about {size / 2**20:,.0f} MiB of disk, and {free / 2**20:,.0f} MiB are free in {folder}",
                "free some space, lower save_total_limit, or set save_strategy: no",
            )


def pack(value: Any, tensors: dict[str, torch.Tensor], place: str) -> Any:
    """A state (of an optimizer, a schedule, a random generator) as plain JSON; its tensors go into `tensors` under the place they have in it.

    >>> pack({0: (1.5, None)}, {}, "state")
    {'items': [[0, {'tuple': [1.5, None]}]]}

    Raises:
        TypeError: something that is neither plain data nor a tensor.
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
    """What `pack` has packed; tensors that were on an accelerator go to `device`."""
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
    """All that a torch optimizer remembers, by the position of each parameter.

    Not its own `state_dict`, whose loading converts what it remembers to the parameter's dtype.
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
    """Where the generators of Python, numpy, torch and each GPU stand."""
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
