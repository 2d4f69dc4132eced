"""Points of a training at which gradients are taken: the trained weights there, and the second moments of its optimizer, in files beside the store of the
model. A score is then the mean over the points, as in TracIn (Pruthi et al. 2020, arXiv 2002.08484, section 3.2)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.records import remove, write_json

if TYPE_CHECKING:
    import torch

POINTS = "points"
WEIGHTS, MOMENTS, NOTE = "weights.safetensors", "moments.safetensors", "point.json"
EPSILON = 1e-8
"""Added to the root of a second moment, as Adam does."""


@dataclass(frozen=True)
class Where:
    """The points of a training at which gradients are taken."""

    checkpoints: int = 1
    """How many, equally spaced; the last is its end."""
    second_moments: bool = False
    """Whether gradients are scaled by the second moments of the optimizer."""


END = Where()
"""The end of the training, as it was saved."""


@dataclass(frozen=True)
class Point:
    """A step of the training of a model."""

    home: Path
    """Folder of the store of the model, which has the files of all its points."""
    step: int
    at_end: bool
    """Whether it is the last step: then the weights are those of the model."""
    scaled: bool
    """Whether gradients are scaled by the second moments of the optimizer."""

    @property
    def folder(self) -> Path:
        return self.home / POINTS / f"step-{self.step:08d}"

    @property
    def store(self) -> Path:
        """Folder of its gradients."""
        return self.home / (f"step-{self.step:08d}" + ("-scaled" if self.scaled else ""))

    def files(self) -> dict[str, str]:
        """Name -> sha256 of its files; empty if one is missing or was changed."""
        try:
            known = json.loads((self.folder / NOTE).read_bytes())
        except (OSError, ValueError):
            return {}
        kept = {path.name: sha256_of_file(path) for path in self.folder.glob("*.safetensors")}
        return kept if known == kept else {}

    def identity(self) -> dict[str, Any]:
        """What gradients at this point depend on, besides the model."""
        files = self.files()
        return {
            "point": {
                "step": self.step,
                "weights": None if self.at_end else files[WEIGHTS],
                "moments": files[MOMENTS] if self.scaled else None,
            },
            "code of points": sha256_of_file(Path(__file__)),
        }

    def is_kept(self) -> bool:
        return (MOMENTS if self.scaled else WEIGHTS) in self.files()

    def weights(self) -> dict[str, torch.Tensor] | None:
        """The trained weights; None at the end of the training, where they are those of the model."""
        from safetensors.torch import load_file

        return None if self.at_end else load_file(self.folder / WEIGHTS)

    def scales(self) -> dict[str, torch.Tensor] | None:
        """What the numbers of gradients are multiplied with: an inner product of two scaled gradients is then that of one of them and the step that Adam
        would make along the other, up to the learning rate. None: nothing.
        """
        from safetensors.torch import load_file

        if not self.scaled:
            return None
        return {name: (moment.sqrt() + EPSILON).rsqrt() for name, moment in load_file(self.folder / MOMENTS).items()}

    def write(self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor] | None) -> None:
        """Args:
        moments: None if the optimizer has none.
        """
        from safetensors.torch import save_file

        scratch = self.folder.with_suffix(".writing")
        remove(scratch)
        scratch.mkdir(parents=True)
        for name, tensors in ((WEIGHTS, weights), (MOMENTS, moments)):
            if tensors is not None:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, scratch / name)
        write_json(scratch / NOTE, {path.name: sha256_of_file(path) for path in sorted(scratch.glob("*.safetensors"))})
        remove(self.folder)
        scratch.rename(self.folder)


def steps_of(total: int, count: int) -> list[int]:
    """Equally spaced steps of a training, up to its last.

    Args:
        total: steps of the training.
        count: how many.

    >>> steps_of(421, 3)
    [140, 280, 421]
    """
    if not 1 <= count <= total:
        raise InputError(f"--checkpoints {count}: the training has {total} steps", f"give a number from 1 to {total}")
    return [*(total // count * (i + 1) for i in range(count - 1)), total]


def second_moments(optimizer: Mapping[str, Any], names: Sequence[str]) -> dict[str, torch.Tensor] | None:
    """Second moments of the gradients by name of the weight, as Adam estimates them, without the bias to 0 of the first steps; None if the optimizer does not
    keep one for each number of a weight.

    Args:
        optimizer: its state, as in a checkpoint: {"groups", "state"}.
        names: of the weights, in the order of the state.
    """
    states = optimizer["state"]
    if len(states) != len(names) or any("exp_avg_sq" not in state or "step" not in state for state in states):
        return None
    decay = [group["betas"][1] for group in optimizer["groups"]]
    if len({*decay}) != 1:
        return None
    return {name: state["exp_avg_sq"].float() / (1.0 - decay[0] ** float(state["step"])) for name, state in zip(names, states, strict=True)}
