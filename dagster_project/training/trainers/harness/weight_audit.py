"""Changes of the weights in training, and the examples that were used: records for the adapter's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.records import CheckResult

if TYPE_CHECKING:
    import pyarrow as pa
    import torch


LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "safetensors")
"""Libraries whose versions affect the results of a run."""
REPORTED = LIBRARIES[:4]
"""Those that reports name."""


@cache
def seen_schema() -> pa.Schema:
    """One row per trained example, in training order."""
    import pyarrow as pa

    columns = [
        ("step", pa.int32()),  # optimizer step, from 1
        ("epoch", pa.int32()),  # from 1
        ("position", pa.int32()),  # position in the step, from 0
        ("example_id", pa.string()),
    ]
    return pa.schema(columns)


def seen_examples(seen: Sequence[tuple[int, int, int]], example_ids: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Rows of `seen_schema`.

    Args:
        seen: (step, epoch, row) of each row that went through a forward pass, in order.
        example_ids: the examples in each row of the training split.

    >>> [list(row.values()) for row in seen_examples([(1, 1, 1), (2, 1, 0)], [["a"], ["b", "c"]])]
    [[1, 1, 0, 'b'], [1, 1, 1, 'c'], [2, 1, 0, 'a']]
    """
    found: list[dict[str, Any]] = []
    step_before, position = 0, 0
    for step, epoch, row in seen:
        position = position if step == step_before else 0
        step_before = step
        for identity in example_ids[row]:
            found.append({"step": step, "epoch": epoch, "position": position, "example_id": identity})
            position += 1
    return found


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """Stored tensors that training must not change: frozen parameters and buffers."""
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in learning}


def sha256_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names.

    Tensors are copied to the CPU one at a time.
    """
    import torch

    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def kind_of(name: str) -> str:
    """The group of a parameter: the name of its module, without its path in the model.

    >>> kind_of("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    'lora_A'
    >>> kind_of("model.layers.3.input_layernorm.weight"), kind_of("model.layers.3.mlp.up_proj.bias")
    ('input_layernorm', 'up_proj bias')
    """
    parts = [part for part in name.split(".") if not part.isdigit()]
    *path, last = [part for part in parts if part not in {"default", "modules_to_save"}]
    if last in {"weight", "bias"} and path:
        return path[-1] if last == "weight" else f"{path[-1]} bias"
    return last


def before_training(model: Any, path: Path) -> None:
    """Save the current trainable weights to a file: a second copy of a whole model may not fit into memory."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: parameter.detach().cpu().contiguous() for name, parameter in trainable(model).items()}, path)


def movement(model: Any, before: Path) -> dict[str, dict[str, Any]]:
    """Change of each group of trainable weights since `before_training`.

    Returns:
        Group -> {"tensors", "moved": number of changed ones, "norm_of_change": Euclidean norm over all of them}.
    """
    from safetensors import safe_open

    with safe_open(before, framework="pt") as stored:

        def norm(name: str, parameter: torch.Tensor) -> float:
            change = parameter.detach().cpu().double() - stored.get_tensor(name).double()
            return float(change.norm())

        return grouped((name, norm(name, parameter)) for name, parameter in trainable(model).items())


def grouped(norms: Iterable[tuple[str, float]]) -> dict[str, dict[str, Any]]:
    """Changes of weights by group, as in `movement`.

    Args:
        norms: name of each weight, and the norm of its change.
    """
    groups: dict[str, list[float]] = {}
    for name, norm in norms:
        groups.setdefault(kind_of(name), []).append(norm)
    movements: dict[str, dict[str, Any]] = {}
    for kind, of_kind in sorted(groups.items()):
        movements[kind] = {
            "tensors": len(of_kind),
            "moved": sum(norm > 0 for norm in of_kind),
            "norm_of_change": float(f"{sum(norm**2 for norm in of_kind) ** 0.5:.6g}"),
        }
    return movements


def unmoved(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Groups in which no weight changed, or the change is NaN."""
    return [kind for kind, group in groups.items() if not group["norm_of_change"] > 0]


def ranks(model: Any) -> dict[str, dict[str, int]]:
    """AdaLoRA's ranks: module -> {"before": initial number of singular values, "after": number of nonzero ones}.

    Empty for other methods.
    """
    found, ending = {}, ".lora_E.default"
    for name, parameter in model.named_parameters():
        if name.endswith(ending):
            module = name.removeprefix("base_model.model.").removesuffix(ending)
            found[module] = {"before": parameter.shape[0], "after": int((parameter != 0).sum())}
    return found


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the libraries that affect the results of a run."""
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in names}}


@dataclass(frozen=True)
class WeightChange:
    """Changes of the weights in a training."""

    groups: dict[str, dict[str, Any]]
    """Kind of trainable weight -> tensors, number of changed ones, norm of the change."""
    frozen: dict[str, Any]
    """Number of frozen tensors, and their sha256 before and after."""

    def check(self) -> CheckResult:
        """The check `trained_what_it_should`."""
        still = unmoved(self.groups)
        intact = self.frozen["sha256_before"] == self.frozen["sha256_after"]
        wrong = [f"did not move: {', '.join(still)}"] if still else []
        wrong += [] if intact else ["a frozen weight changed"]
        moved = [f"{kind}: {group['moved']} of {group['tensors']} moved" for kind, group in self.groups.items()]
        note, count = "; ".join(wrong) or ", ".join(moved), len(still) + (not intact)
        return CheckResult("trained_what_it_should", passed=not wrong, blocking=True, count=count, note=note)


class WeightAudit:
    """A model's weights before training, for the comparison afterwards."""

    def __init__(self, model: Any, folder: Path) -> None:
        """
        Args:
            folder: for a copy of the trainable weights.
        """
        self.model, self.before = model, folder / "before.safetensors"
        before_training(model, self.before)
        self.frozen_before = sha256_of_tensors(frozen(model))

    def change(self) -> WeightChange:
        kept = frozen(self.model)
        hashes = {"sha256_before": self.frozen_before, "sha256_after": sha256_of_tensors(kept)}
        return WeightChange(movement(self.model, self.before), {"tensors": len(kept), **hashes})
