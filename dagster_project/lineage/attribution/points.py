"""Points of a training at which gradients are taken.

The trained weights there, and the second moments of its optimizer, in files beside the gradients of the model. Scores
are then averaged over the points, after TracIn (Pruthi et al. 2020, arXiv 2002.08484), which sums inner products
weighted by the learning rate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file, sha256_of_files
from dagster_project.core.records import remove, write_json
from dagster_project.core.text import many

if TYPE_CHECKING:
    import torch

POINTS = "points"
WEIGHTS, MOMENTS, MANIFEST = "weights.safetensors", "moments.safetensors", "point.json"
EPSILON = 1e-8
"""Added to the root of a second moment, as Adam does."""


@dataclass(frozen=True)
class PointSelection:
    """The points of a training at which gradients are taken."""

    count: int = 1
    """Number of equally spaced steps, including the last."""
    scaled: bool = False
    """Whether gradients are scaled by the second moments of the optimizer."""


END_ONLY = PointSelection()
"""The model as it was saved."""


@dataclass(frozen=True)
class Point:
    """A step of the training of a model."""

    model_store: Path
    """Folder of the gradients of the model, which has the files of all points."""
    step: int
    at_end: bool
    """Whether the weights are those of the model."""
    scaled: bool

    @property
    def folder(self) -> Path:
        return self.model_store / POINTS / f"step-{self.step:08d}"

    @property
    def store(self) -> Path:
        """Folder of its gradients."""
        return self.model_store / (f"step-{self.step:08d}" + ("-scaled" if self.scaled else ""))

    @property
    def needed(self) -> list[str]:
        """Names of the files that gradients at this point need."""
        return [*([] if self.at_end else [WEIGHTS]), *([MOMENTS] if self.scaled else [])]

    def files(self) -> dict[str, str]:
        """Name -> sha256 of the files that are kept and intact."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
            known = manifest["files"] if manifest["code"] == code() else {}
            paths = {name: self.folder / name for name in (WEIGHTS, MOMENTS) if (self.folder / name).is_file()}
            return {name: known[name] for name, path in paths.items() if known.get(name) == sha256_of_file(path)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def is_complete(self) -> bool:
        return self.files().keys() >= {*self.needed}

    def identity(self) -> dict[str, Any]:
        """What gradients at this point depend on, besides the model."""
        files = self.files()
        return {
            "point": {"step": self.step, **{name: files.get(name) for name in self.needed}},
            "code of points": code(),
        }

    def weights(self) -> dict[str, torch.Tensor] | None:
        """The trained weights; None where they are those of the model."""
        return None if self.at_end else self._read(WEIGHTS)

    def scales(self) -> dict[str, torch.Tensor] | None:
        """Factors of the elements of gradients by name of the weight, 1 / sqrt(sqrt(second moment) + EPSILON), and 0
        for elements that never had a gradient; None without scaling. The product of two scaled gradients is that of one
        unscaled gradient and of the other divided by the root of the second moment, as in a step of Adam.
        """
        if not self.scaled:
            return None
        return {name: (moment.sqrt() + EPSILON).rsqrt() * (moment > 0) for name, moment in self._read(MOMENTS).items()}

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        try:
            return load_file(self.folder / name)
        except FileNotFoundError:
            raise InputError(
                f"the checkpoint of step {self.step} was removed, e.g. by `pedigree erase`",
                "add --index to train again and store it, if the model was not erased",
            ) from None

    def write(self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor] | None) -> None:
        """Args:
        moments: None to write none.
        """
        from safetensors.torch import save_file

        scratch = self.folder.with_suffix(".writing")
        remove(scratch)
        scratch.mkdir(parents=True)
        for name, tensors in ((WEIGHTS, weights), (MOMENTS, moments)):
            if tensors is not None:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, scratch / name)
        files = {path.name: sha256_of_file(path) for path in sorted(scratch.glob("*.safetensors"))}
        write_json(scratch / MANIFEST, {"code": code(), "files": files})
        remove(self.folder)
        scratch.rename(self.folder)


def steps_of(total: int, count: int) -> list[int]:
    """Equally spaced steps of a training, up to its last.

    Args:
        total: steps until the weights of the model.
        count: how many.

    >>> steps_of(421, 3)
    [140, 280, 421]
    """
    if not 1 <= count <= total:
        raise InputError(
            f"--checkpoints {count}: the training has {many(total, 'step')}", f"give a number from 1 to {total}"
        )
    return [total * (i + 1) // count for i in range(count)]


def code() -> str:
    """sha256 of the modules that files of points depend on."""
    return sha256_of_files([Path(__file__), Path(__file__).with_name("retraining.py")])


def second_moments(
    optimizer: Mapping[str, Any], weights: Mapping[str, torch.Tensor], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Bias-corrected second moments of Adam by name of the weight (Kingma and Ba 2015, algorithm 1).

    Args:
        optimizer: its state, as in a checkpoint: {"groups", "state"}. A weight
            that never had a gradient has none: its moments are 0.
        weights: by name.
        names: of the weights, in the order of the state.
    """
    import torch

    decay = {group["betas"][1] for group in optimizer["groups"]}
    assert len(decay) == 1, decay
    [beta] = decay
    return {
        name: state["exp_avg_sq"].float() / (1.0 - beta ** float(state["step"]))
        if state
        else torch.zeros_like(weights[name])
        for name, state in zip(names, optimizer["state"], strict=True)
    }
