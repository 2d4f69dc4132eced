"""Adapters -> one adapter, by PEFT's `add_weighted_adapter`. Nothing is trained."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.params import Compute
from dagster_project.core.records import CheckResult, Report, write_json, write_text
from dagster_project.training.methods.build import save_adapter
from dagster_project.training.methods.hardware import adding_adapters, prepare
from dagster_project.training.methods.load import AdapterInfo, load_base
from dagster_project.training.trainers.harness import weight_audit
from dagster_project.training.trainers.harness.params import AdapterParams
from dagster_project.training.trainers.merging.entry import (
    ADAPTERS,
    EXACT,
    method_of,
    options_of,
    refuse_misfits,
    unmerged,
)

if TYPE_CHECKING:
    import torch

WEIGHTS, CONFIG, TEMPLATE = "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"
CHECK = "merged_what_it_should"
DESCRIPTION = (
    "Every merged weight is finite, the result changes the model, and with `cat` it is the weighted sum of the changes."
)
ROUNDING = 1e-5
"""Largest difference, relative to the norm of all weighted changes together, that is attributed to rounding in float32.
"""
TAKEN = ("steps", "tokens", "trained_tokens")
"""What the trainings of the merged adapters took, added up."""
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?")
"""A tensor of an adapter's file."""


@dataclass(frozen=True)
class Distance:
    """How far the merged change of the weights is from the weighted sum of the changes, over all weights."""

    parts: float
    """Euclidean norm of all weighted changes together."""
    sum_norm: float
    """Of the weighted sum."""
    norm: float
    """Of the merged change."""
    difference: float
    """Of their difference."""

    @property
    def relative(self) -> float | None:
        """None where the weighted sum is zero, or a weight is not finite."""
        return self.difference / self.sum_norm if self.sum_norm > 0 and math.isfinite(self.difference) else None

    @property
    def is_nothing(self) -> bool:
        """Whether the changes cancel, but for rounding."""
        return self.norm <= ROUNDING * self.parts

    @property
    def is_weighted_sum(self) -> bool:
        """But for rounding, which is relative to the parts: where they nearly cancel, it is much of their sum."""
        return self.difference <= ROUNDING * self.parts

    def rounded(self, digits: int) -> float | None:
        return None if self.relative is None else float(f"{self.relative:.{digits}g}")


def merge_adapters(
    name: str, params: AdapterParams, compute: Compute, adapters: Path, base_model: Path, out: Path, curve_file: Path
) -> Report:
    """The stage of an adapter that is merged of others.

    Args:
        adapters: the folder with the outputs of all adapters.
        curve_file: table of the training curve, which gets no rows.
    Raises:
        InputError: an adapter is not LoRA, they do not fit together, or the rank is too large for a weight.
    """
    assert params.merge_of is not None
    # sorted: to DVC a mapping with its keys in another order is the same value, so the bytes must not depend on it
    where, folders = f"adapter.{name}", {parent: adapters / parent for parent in sorted(params.merge_of)}
    quantization = _refuse_others(method_of(params), folders, where)
    prepare(compute)
    model = _merged(params, compute.seed, folders, base_model, where)
    save_adapter(model, out, base_model=_config(next(iter(folders.values())))["base_model_name_or_path"])
    _replace_config(out)
    _refuse_small_weights(out, where)
    why_not = "" if params.merge else "params.yaml says merge: false"
    AdapterInfo(quantization=quantization, merge=params.merge, why_not=why_not).write(out)  # type: ignore[arg-type]
    if (template := next(iter(folders.values())) / TEMPLATE).is_file():
        copyfile(template, out / TEMPLATE)
    write_text(curve_file, "step,loss\n")
    measured = distance(folders, params.merge_of, out)
    document = _document(params, compute, folders, out, measured, where)
    write_json(out / "training.json", document)
    return _report(params, document, out, measured)


def _refuse_others(method: str, folders: Mapping[str, Path], where: str) -> str:
    """The quantization of the weights that all adapters were trained against.

    Raises:
        InputError: an adapter is not LoRA, or they were trained with other weights, templates or quantization.
    """
    configs: dict[str, dict[str, Any]] = {}
    for parent, folder in folders.items():
        config = _config(folder) if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file() else {}
        if config.get("peft_type") != "LORA":
            raise InputError(f"params.yaml: {where}.merge_of: adapter.{parent} is not LoRA", ADAPTERS)
        if wrong := unmerged(config):
            problem = f"adapter.{parent} has {wrong}, which PEFT does not merge"
            raise InputError(f"params.yaml: {where}.merge_of: {problem}", ADAPTERS)
        configs[parent] = config
    refuse_misfits(method, configs, where)
    quantizations = [AdapterInfo.read(folder).quantization for folder in folders.values()]
    files = [folder / TEMPLATE for folder in folders.values()]
    templates = [file.read_text(encoding="utf-8") if file.is_file() else "" for file in files]
    for what, found in (("quantization", quantizations), ("chat template", templates)):
        if len(set(found)) > 1:
            problem = f"params.yaml: {where}.merge_of: the adapters were trained with different values of {what}"
            raise InputError(problem, f"train them again with the same {what}")
    return quantizations[0]


def _config(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _merged(params: AdapterParams, seed: int, folders: Mapping[str, Path], base_model: Path, where: str) -> Any:
    """The base model with the merged adapter, whose name in PEFT is "default": `save_pretrained` writes this one.

    In float32, also where the base model is stored in bfloat16: PEFT rounds a new adapter to the format of the weights
    that it is for.
    """
    import torch
    from peft import PeftModel

    assert params.merge_of is not None
    base = load_base(base_model, torch.device("cpu"), torch.float32)
    names = {parent: f"merged{i}" for i, parent in enumerate(folders)}
    model: Any = None
    try:
        with adding_adapters():
            for parent, folder in folders.items():
                if model is None:
                    model = PeftModel.from_pretrained(base, folder, adapter_name=names[parent])
                else:
                    model.load_adapter(folder, adapter_name=names[parent])
            torch.manual_seed(seed)  # dare_linear and dare_ties draw at random
            options = {"combination_type": method_of(params), **options_of(params, where).model_dump()}
            weights = [params.merge_of[parent] for parent in folders]
            model.add_weighted_adapter([*names.values()], weights, "default", svd_full_matrices=False, **options)
    except (ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        problem = f"params.yaml: {where}.merge_of: PEFT cannot merge these adapters: {reason}"
        raise InputError(problem, ADAPTERS) from None
    model.set_adapter("default")
    for name in names.values():
        model.delete_adapter(name)
    return model


def _replace_config(out: Path) -> None:
    """The scale of every adapter is in the merged weights, so that of the result is 1.

    PEFT keeps `use_rslora` of the first one, by which it would be the square root of the rank.
    """
    config = _config(out) | {"use_rslora": False, "lora_dropout": 0.0}
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_small_weights(out: Path, where: str) -> None:
    """Check that the rank of the result fits each weight. A method with svd writes factors that PEFT cannot load.

    Raises:
        InputError: a weight has fewer rows or columns.
    """
    rank, smallest = _config(out)["r"], min(pair["A"].shape[0] for pair in _factors(out)[1].values())
    if smallest < rank:
        problem = f"the rank is {rank}, and a weight has {smallest} rows or columns"
        raise InputError(f"params.yaml: {where}.peft.svd_rank: {problem}", f"set svd_rank to {smallest} or less")


def distance(folders: Mapping[str, Path], weights: Mapping[str, float], merged: Path) -> Distance:
    """Compare the merged change of each weight with the weighted sum of the others' changes, from files, in float64."""
    import torch

    parts = [(weights[parent], *_factors(folder)) for parent, folder in folders.items()]
    nothing = torch.zeros((), dtype=torch.float64)
    scale, factors = _factors(merged)
    squares = [0.0, 0.0, 0.0, 0.0]
    for module in sorted({module for _, _, found in parts for module in found} | factors.keys()):
        changes = [_change(weight * one(module), found[module]) for weight, one, found in parts if module in found]
        own = _change(scale(module), factors[module]) if module in factors else nothing
        total = sum(changes, nothing)
        sums = [sum(map(_square, changes)), _square(total), _square(own), _square(own - total)]
        squares = [one + more for one, more in zip(squares, sums, strict=True)]
    return Distance(*map(math.sqrt, squares))


def _square(change: torch.Tensor) -> float:
    return float((change**2).sum())


def _factors(folder: Path) -> tuple[Any, dict[str, dict[str, torch.Tensor]]]:
    """The scale of a module's change, as a function of its name, and the factors A and B of every module."""
    from safetensors.torch import load_file

    config = _config(folder)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if match := FACTOR.fullmatch(name):
            found.setdefault(match["module"], {})[match["factor"]] = tensor

    def scale(module: str) -> float:
        alphas = (alpha for key, alpha in config["alpha_pattern"].items() if re.match(rf"(.*\.)?({key})$", module))
        alpha, rank = next(alphas, config["lora_alpha"]), config["r"]
        return float(alpha) / (math.sqrt(rank) if config["use_rslora"] else rank)

    return scale, found


def _change(scale: float, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return scale * (factors["B"].double() @ factors["A"].double())


def _document(
    params: AdapterParams, compute: Compute, folders: Mapping[str, Path], out: Path, measured: Distance, where: str
) -> dict[str, Any]:
    """training.json: what was merged and how, and what the trainings took, unless one of them did not record it."""
    assert params.merge_of is not None
    documents = {name: json.loads((folder / "training.json").read_text("utf-8")) for name, folder in folders.items()}
    trainings: dict[str, dict[str, int]] = {}
    for name, one in documents.items():  # two merged adapters may have a parent in common, which was trained once
        trainings |= one.get("trainings", {name: {key: one[key] for key in TAKEN if key in one}})
    return {
        "merge_of": {
            parent: {"weight": params.merge_of[parent], "sha256": sha256_of_file(folder / WEIGHTS)}
            for parent, folder in folders.items()
        },
        "settings": {"method": method_of(params), **options_of(params, where).model_dump(include={*params.peft})},
        "rank": _config(out)["r"],
        "trainings": dict(sorted(trainings.items())),
        **{
            key: sum(one[key] for one in trainings.values())
            for key in TAKEN
            if all(key in one for one in trainings.values())
        },
        "distance_from_weighted_sum": measured.rounded(6),
        "seed": compute.seed,
        "threads": compute.threads,
        "versions": weight_audit.versions(weight_audit.LIBRARIES),
    }


def _report(params: AdapterParams, document: Mapping[str, Any], out: Path, measured: Distance) -> Report:
    metrics = {
        "method": method_of(params),
        "merge_of": dict(sorted((params.merge_of or {}).items())),
        "rank": document["rank"],
        "distance_from_weighted_sum": measured.rounded(3),
        "environment": weight_audit.versions(weight_audit.REPORTED),
    }
    return Report(metrics=metrics, checks=[_check(method_of(params), out, measured)])


def _check(method: str, out: Path, measured: Distance) -> CheckResult:
    from safetensors.torch import load_file

    broken = sorted(name for name, tensor in load_file(out / WEIGHTS).items() if not bool(tensor.isfinite().all()))
    away = measured.relative
    note = "the weighted sum of the changes is zero"
    if away is not None:
        note = f"the distance of the change from the weighted sum of the changes is {away:.2g} of the norm of that sum"
    if broken:
        note = f"NaN or infinity in {len(broken)} weights, first in {broken[0]}"
    elif measured.is_nothing:
        note = "the merged adapter does not change the model"
    passed = not broken and not measured.is_nothing and (method != EXACT or measured.is_weighted_sum)
    return CheckResult(CHECK, passed=passed, blocking=True, count=max(1, len(broken)) if not passed else 0, note=note)
