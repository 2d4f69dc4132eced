"""What an entry of params.yaml that merges other adapters may say, and which adapters can be merged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section, parse
from dagster_project.training.methods.options import ALIASES, STARTS_FROM_WEIGHTS, quantization_of
from dagster_project.training.trainers.harness.params import AUTO, AdapterParams
from dagster_project.training.trainers.merging.reads import parents_of

METHODS: dict[str, tuple[str, ...]] = {
    "cat": (),
    "linear": (),
    "svd": ("svd_rank", "svd_clamp"),
    "ties": ("density", "majority_sign_method"),
    "ties_svd": ("density", "majority_sign_method", "svd_rank", "svd_clamp"),
    "dare_linear": ("density",),
    "dare_linear_svd": ("density", "svd_rank", "svd_clamp"),
    "dare_ties": ("density", "majority_sign_method"),
    "dare_ties_svd": ("density", "majority_sign_method", "svd_rank", "svd_clamp"),
    "magnitude_prune": ("density",),
    "magnitude_prune_svd": ("density", "svd_rank", "svd_clamp"),
}
"""PEFT's `combination_type` -> its keys."""
EXACT = "cat"
"""The method whose result is the weighted sum of the changes. The default."""
OF_FACTORS = tuple(name for name in METHODS if name != EXACT and not name.endswith("svd"))
"""Methods that combine the matrices A with each other and the matrices B with each other, so that all need the same
rank."""
KEYS = {"merge_of", "method", "peft", "merge"}
"""Keys of an entry that merges. All others are those of a training."""
SAME = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")
"""Keys of LoRA that say which weights an adapter changes. Adapters that are merged must have the same."""
UNMERGED = (
    "use_dora", "layer_replication", "modules_to_save", "trainable_token_indices", "target_parameters", "rank_pattern",
    "lora_bias", "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
"""Keys of LoRA with which an adapter is more than pairs of matrices A and B of one rank: PEFT merges only these, or
refuses."""
ADAPTERS = "merge adapters of lora, rslora or qlora"


class MergeOptions(Section):
    """Keys of PEFT's `add_weighted_adapter`."""

    density: float | None = Field(default=None, gt=0, le=1)
    """Share of the values that is kept."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    """Elect the sign of a value by the sum of the values, or by the number of adapters."""
    svd_rank: int | None = Field(default=None, ge=1)
    """Rank of the result. null: the largest rank of the merged adapters."""
    svd_clamp: float | None = Field(default=None, gt=0, le=1)
    """Quantile of the values of the factors to which they are clamped. null: they are not."""


def method_of(params: AdapterParams) -> str:
    return params.method.lower() if "method" in params.model_fields_set else EXACT


def options_of(params: AdapterParams, where: str) -> MergeOptions:
    """The keys of the method.

    Raises:
        InputError: unknown method; a key that is wrong, unknown, missing, or that the method does not use.
    """
    method = method_of(params)
    if method not in METHODS:
        problem = f"params.yaml: {where}.method: {params.method!r} is not a way to merge adapters"
        raise InputError(problem, f"methods: {', '.join(METHODS)}")
    options = parse(MergeOptions, params.peft, f"{where}.peft")
    if useless := sorted(options.model_fields_set - {*METHODS[method]}):
        hint = f"its keys: {', '.join(METHODS[method]) or 'none'}"
        raise InputError(f"params.yaml: {where}.peft.{useless[0]}: {method} does not use it", hint)
    if "density" in METHODS[method] and options.density is None:
        problem = f"params.yaml: {where}.peft.density: missing: {method} keeps this share of the values"
        raise InputError(problem, "set it, e.g. 0.5")
    return options


def check_merge(params: AdapterParams, adapters: Mapping[str, Any], where: str) -> None:
    """Check an entry that merges, from params.yaml alone.

    Args:
        adapters: the section of params.yaml.
        where: dotted path of the entry, e.g. "adapter.soup".
    Raises:
        InputError: the entry, or one of the adapters that it names, is wrong.
    """
    name, place = where.partition(".")[2], f"params.yaml: {where}.merge_of"
    assert params.merge_of is not None
    if others := sorted(params.model_fields_set - KEYS):
        problem = "is a key of a training, and an entry with merge_of is not trained"
        raise InputError(f"params.yaml: {where}.{others[0]}: {problem}", "leave it out")
    options_of(params, where)
    if len(params.merge_of) < 2:
        raise InputError(f"{place}: names {len(params.merge_of)} adapter, and merging takes two", "name another one")
    for parent, weight in params.merge_of.items():
        if parent not in adapters:
            known = ", ".join(one for one in adapters if one != name)
            raise InputError(f"{place}: there is no adapter.{parent}", f"adapters: {known}")
        if not math.isfinite(weight) or weight == 0:
            hint = "use another number, or leave the adapter out"
            raise InputError(f"{place}.{parent}: the weight is {weight}", hint)
    refuse_circles(adapters, name, where)
    entries = {parent: parse(AdapterParams, adapters[parent], f"adapter.{parent}") for parent in params.merge_of}
    trained = {parent: entry for parent, entry in entries.items() if entry.merge_of is None}
    for parent, entry in trained.items():
        _refuse_other_methods(parent, entry, where)
    refuse_misfits(method_of(params), {parent: entry.peft for parent, entry in trained.items()}, where)
    kinds = sorted({quantization_of(entry.method, entry.quantization) for entry in trained.values()})
    if len(kinds) > 1:
        problem = f"the adapters are trained against different weights: quantization is {' and '.join(kinds)}"
        raise InputError(f"{place}: {problem}", "merge adapters with the same quantization")


def refuse_circles(adapters: Mapping[str, Any], name: str, where: str) -> None:
    """Raise InputError if an adapter is merged from itself, also through others."""

    def walk(one: str, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for parent in parents_of(adapters, one):
            if parent in path:
                yield (*path[path.index(parent) :], parent)
            else:
                yield from walk(parent, (*path, parent))

    if circle := next(walk(name, (name,)), None):
        problem = f"an adapter would be merged from itself: {' from '.join(circle)}"
        raise InputError(f"params.yaml: {where}.merge_of: {problem}", "leave one out")


def _refuse_other_methods(parent: str, entry: AdapterParams, where: str) -> None:
    what = f"params.yaml: {where}.merge_of: adapter.{parent}"
    name, keys = ALIASES.get(entry.method.lower(), (entry.method.lower(), {}))
    if name != "lora":
        raise InputError(f"{what} is trained by {entry.method}, which is not LoRA", ADAPTERS)
    if wrong := unmerged({**keys, **entry.peft}):
        raise InputError(f"{what} has {wrong}, which PEFT does not merge", ADAPTERS)


def unmerged(config: Mapping[str, Any]) -> str:
    """The key of a LoRA configuration with which it cannot be merged; empty if there is none."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and STARTS_FROM_WEIGHTS.search(start):
        return f"init_lora_weights: {start}"
    if config.get("bias", "none") != "none":
        return f"bias: {config['bias']}"
    return next((key for key in UNMERGED if config.get(key)), "")


def refuse_misfits(method: str, configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Compare the LoRA keys of the adapters. A key that one of them does not have is not compared.

    Args:
        configs: adapter -> its keys: those of params.yaml, or all of them, of adapter_config.json.
    Raises:
        InputError: they change other weights, have another base model, or another rank although the method needs the
            same.
    """
    same = (*SAME, "base_model_name_or_path", *(["r"] if method in OF_FACTORS else []))
    for key in same:
        found = {name: config[key] for name, config in configs.items() if key in config and config[key] != AUTO}
        values = {repr(sorted(value) if isinstance(value, list | set) else value) for value in found.values()}
        if len(values) > 1:
            what = "; ".join(f"{name}: {value}" for name, value in found.items())
            ranks = "cat and the methods with svd merge adapters of different ranks"
            problem = f"{method} cannot merge adapters with different {key} ({what})"
            hint = ranks if key == "r" else "merge adapters of the same weights"
            raise InputError(f"params.yaml: {where}.merge_of: {problem}", hint)
