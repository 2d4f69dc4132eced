"""The weights that a training command wrote: read as safetensors, compared with the base model, put into a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.text import listed, visible
from dagster_project.training.methods import options as methods
from dagster_project.training.methods.build import PreparedModel, build
from dagster_project.training.trainers.harness import weight_audit
from dagster_project.training.trainers.harness.params import AdapterParams
from dagster_project.training.trainers.harness.weight_audit import WeightChange

if TYPE_CHECKING:
    import torch

CONFIG, ADAPTER, START = "adapter_config.json", "adapter_model.safetensors", "start.safetensors"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
IGNORED = {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"}
"""Pickle files of transformers' Trainer other than weights. They are neither opened nor copied."""
SHOWN = 5
"""Most names that a message lists."""
CHECKED = "compare with data/base_model; docs/own-trainer.md lists the files"

Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Weights:
    """What the command wrote."""

    tensors: Tensors
    config: dict[str, Any] | None
    """adapter_config.json; None for a complete model."""
    start: Tensors | None
    """The same tensors before training, if the command wrote them."""

    def not_finite(self) -> list[str]:
        floats = {name: tensor for name, tensor in self.tensors.items() if tensor.is_floating_point()}
        return sorted(name for name, tensor in floats.items() if not bool(tensor.float().isfinite().all()))


def read_weights(output: Path, where: str) -> Weights:
    """The weights in the output of a command.

    Args:
        where: dotted path of the entry in params.yaml, for messages.
    Raises:
        InputError: pickle files; no adapter and no model, or both; a file that cannot be read.
    """
    if not output.is_dir():
        raise InputError(f"{where}: the command removed output/", "leave the folder, and save the weights in it")
    if pickled := sorted(path.name for path in output.iterdir() if path.suffix in PICKLES and path.name not in IGNORED):
        raise InputError(
            f"{where}: output/ has pickle files, which can run code when they are opened: {_shortened(pickled)}",
            "write the weights as safetensors: save_pretrained(..., safe_serialization=True)",
        )
    adapter, complete = (output / ADAPTER).is_file(), sorted(output.glob("model*.safetensors"))
    if adapter == bool(complete):
        what = "both an adapter and a complete model" if adapter else f"neither {ADAPTER} nor model.safetensors"
        hint = "save either, for example with model.save_pretrained('output')"
        raise InputError(f"{where}: the command wrote {what} to output/", hint)
    start = _read([output / START], where) if (output / START).is_file() else None
    if adapter:
        return Weights(_read([output / ADAPTER], where), _config(output / CONFIG, where), start)
    return Weights(_read(complete, where), None, start)


def _read(paths: Iterable[Path], where: str) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in paths:
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            problem = f"{where}: {path.name} is not a valid safetensors file: {visible(str(error))}"
            raise InputError(problem, "write it again") from None
    return tensors


def _config(path: Path, where: str) -> dict[str, Any]:
    hint = "save the model with PEFT's save_pretrained"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise InputError(f"{where}: {path.name} is missing or not a JSON object", hint)
    if not isinstance(document.get("peft_type"), str):
        raise InputError(f"{where}: {path.name} has no peft_type", hint)
    return document


@dataclass(frozen=True)
class Comparison:
    """A model without and with the weights of a command."""

    prepared: PreparedModel
    before: Tensors
    """Saved weights at the start of training, by name; without those that start at random."""
    after: Tensors
    frozen_before: str

    def change(self) -> WeightChange:
        def norm(name: str, start: torch.Tensor) -> float:
            """In the dtype of the result: rounding alone does not count as training."""
            after = self.after[name]
            return float((after.double() - start.to(after.dtype).double()).norm())

        frozen = weight_audit.frozen(self.prepared.model)
        hashes = {"sha256_before": self.frozen_before, "sha256_after": weight_audit.sha256_of_tensors(frozen)}
        groups = weight_audit.grouped((name, norm(name, start)) for name, start in self.before.items())
        return WeightChange(groups, {"tensors": len(frozen), **hashes})

    def unknown(self) -> dict[str, int]:
        """Group -> tensors that start at random, so that their change is unknown."""
        groups = [weight_audit.kind_of(name) for name in self.after if name not in self.before]
        return {kind: groups.count(kind) for kind in sorted(set(groups))}


class Candidate:
    """A model that is ready for the weights of a command, and still without them."""

    def __init__(
        self,
        weights: Weights,
        params: AdapterParams,
        base_model: Path,
        device: torch.device,
        dtype: torch.dtype,
        where: str,
        seed: int,
    ) -> None:
        """Raise InputError if the weights are not those of the entry's method on this base model."""
        self.weights, self.where = weights, where
        build = partial(_untrained, weights.config, params, base_model, device, dtype, where)
        other = _saved(build(seed + 1)) if weights.config is not None and weights.start is None else {}
        self.prepared = build(seed)
        expected = _saved(self.prepared)
        _compare(weights.tensors, expected, self._aliases(), where, "the weights")
        if weights.start is not None:
            _compare(weights.start, expected, self._aliases(), where, START)
            self.before = {name: tensor for name, tensor in weights.start.items() if name in weights.tensors}
        else:
            random = {name for name, tensor in other.items() if not bool((expected[name] == tensor).all())}
            self.before = {name: tensor for name, tensor in expected.items() if name not in random}
        if not self.before:
            problem = f"all weights of {params.method} start at random, so nothing shows that they were trained"
            raise InputError(f"{where}: {problem}", f"also save them before training, as output/{START}")

    def _aliases(self) -> dict[str, str]:
        """Name of a weight -> the first name of the same weight: tied weights are stored once."""
        if self.weights.config is not None:
            return {}
        first: dict[int, str] = {}
        state = self.prepared.model.state_dict(keep_vars=True)
        return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}

    def filled(self) -> Comparison:
        """The model with the weights.

        Raises:
            InputError: PEFT does not restore what the command wrote.
        """
        model, tensors = self.prepared.model, self.weights.tensors
        frozen = weight_audit.sha256_of_tensors(weight_audit.frozen(model))
        if self.weights.config is None:
            model.load_state_dict(tensors, strict=False)  # names and shapes were compared, except for tied weights
            parameters = model.named_parameters(remove_duplicate=False)
            names = {name for name, parameter in parameters if parameter.requires_grad}
            trained = [name for name in self.before if name in names and name in tensors]
            before, after = ({name: of[name] for name in trained} for of in (self.before, tensors))
            return Comparison(self.prepared, before, after, frozen)
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, dict(tensors))
        restored = _saved(self.prepared)
        same = {name: bool((restored[name] == one.to(restored[name].dtype)).all()) for name, one in tensors.items()}
        if wrong := sorted(name for name in same if not same[name]):
            problem = f"{self.where}: PEFT does not restore what the command wrote: {_shortened(wrong)}"
            raise InputError(problem, CHECKED)
        return Comparison(self.prepared, self.before, tensors, frozen)


def _untrained(
    config: Mapping[str, Any] | None,
    params: AdapterParams,
    base_model: Path,
    device: torch.device,
    dtype: torch.dtype,
    where: str,
    seed: int,
) -> PreparedModel:
    """The base model, with a new adapter if there is a configuration.

    Args:
        config: adapter_config.json.
    Raises:
        InputError: the entry has another method, or the configuration is refused.
    """
    import torch

    torch.manual_seed(seed)
    method = partial(
        build, params.method, base_model=base_model, device=device, dtype=dtype, where=where,
        quantization=params.quantization, merge=params.merge, total_steps=1,
    )  # fmt: skip
    if config is None:
        if params.method.lower() not in methods.OWN:
            problem = f"params.yaml: {where}.method: {params.method}, but the command wrote a complete model"
            raise InputError(problem, "set method: full")
        return method(params.peft)
    options = _options(config, params, where)
    try:
        return method(options)
    except InputError as error:
        raise InputError(f"{where}: {CONFIG} is refused: {error.what}", "correct the command") from None


def _saved(prepared: PreparedModel) -> Tensors:
    """Copies of the weights that the model would save, by name."""
    from peft import PeftModel, get_peft_model_state_dict

    model = prepared.model
    state = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _options(config: Mapping[str, Any], params: AdapterParams, where: str) -> dict[str, Any]:
    """The options of `build` for an adapter_config.json.

    Raises:
        InputError: the configuration is of another method, contradicts the entry, or has a key that is refused.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = config["peft_type"].lower()
    name, implied = methods.ALIASES.get(params.method.lower(), (params.method.lower(), {}))
    if kind != name:
        problem = f"{params.method}, but the command wrote an adapter of {visible(kind)}"
        raise InputError(f"params.yaml: {where}.method: {problem}", f"set method: {visible(kind)}")
    standard = {kind.value.lower(): one for kind, one in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[name]().to_dict()
    others = {key: value for key, value in config.items() if key not in standard}
    if unknown := sorted(key for key, value in others.items() if value not in (None, False, [], {})):
        what = f"{_shortened(unknown)} is unknown to PEFT {version('peft')}, which Pedigree uses"
        raise InputError(f"{where}: {CONFIG}: {what}", "train with this version of PEFT")
    off = {key: (None, False, standard.get(key)) for key in methods.REFUSED_KEYS}
    if refused := sorted(key for key in off if config.get(key) not in off[key]):
        reason = methods.REFUSED_KEYS[refused[0]]
        raise InputError(f"{where}: {CONFIG}: {refused[0]} is not supported: it {reason}", "train without it")
    for key, value in {**implied, **params.peft}.items():
        if value != "all-linear" and _plain(config.get(key)) != _plain(value):
            stated = f"{config.get(key)!r}, but params.yaml says {value!r}"
            raise InputError(f"{where}: {CONFIG}: {key} is {visible(stated)}", f"correct {where}.peft or the command")
    return {key: config[key] for key in methods.peft_keys(name) if config.get(key) is not None}


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list | set | tuple) else value


def _compare(
    tensors: Mapping[str, Any], expected: Mapping[str, Any], aliases: Mapping[str, str], where: str, what: str
) -> None:
    """Compare weights with those of the model that they are for.

    Raises:
        InputError: other names or shapes than those of the base model, or two names of one weight with different
            values.
    """
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{where}: {what}: the base model has no module for {_shortened(unknown)}", CHECKED)
    present = {aliases.get(name, name) for name in tensors}
    if missing := sorted(name for name in expected if aliases.get(name, name) not in present):
        raise InputError(f"{where}: {what}: missing {_shortened(missing)}", CHECKED)
    if wrong := [name for name in sorted(tensors) if tensors[name].shape != expected[name].shape]:
        shapes = f"{tuple(tensors[wrong[0]].shape)} instead of {tuple(expected[wrong[0]].shape)}"
        raise InputError(f"{where}: {what}: wrong shape {shapes}: {_shortened(wrong)}", CHECKED)
    for name, first in aliases.items():
        if name != first and name in tensors and first in tensors and not bool((tensors[name] == tensors[first]).all()):
            problem = f"{name} and {first} are one weight in the base model, but differ"
            raise InputError(f"{where}: {what}: {problem}", CHECKED)


def _shortened(names: list[str]) -> str:
    return visible(listed(names, SHOWN))
