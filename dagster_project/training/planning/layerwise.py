"""The trace of a deep model's training step, composed from copies of the model with few layers.

Decoder layers with the same structure use memory in the same way, so a layer adds a run of events to each phase of a
step. Two copies are traced, of which the larger has one layer more. If every run that this layer adds is equal to the
run before it, it is inserted as often as the model has more layers; otherwise the whole model is traced. Layers that
differ with a period (e.g. every sixth with full attention) are handled a period at a time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dagster_project.training.methods.options import CANNOT_MERGE, VIRTUAL
from dagster_project.training.planning.memory import StepTrace, TrainingSpec, read_config, trace_step


class SmallCopies:
    """Traces one model with any method. How its layers repeat is determined once."""

    def __init__(self, base_model: Path) -> None:
        """
        Args:
            base_model: folder with a config.json, or such a file.
        Raises:
            InputError: no configuration, or one that transformers does not support.
        """
        config = read_config(base_model)
        self.base_model = base_model
        self.text = config.get_text_config()
        self.layers = int(self.text.num_hidden_layers)
        self.skeleton = _skeleton(base_model)
        self._folder = tempfile.TemporaryDirectory(prefix="pedigree-plan-")
        self.sizes = self._sizes()

    def trace(self, spec: TrainingSpec) -> StepTrace:
        """The trace of the whole model."""
        has_weights = self.base_model.is_dir() and any(self.base_model.glob("*.safetensors"))
        reads_weights = has_weights and spec.device == "cpu"  # the sizes of the files count
        virtual = CANNOT_MERGE.get(spec.method.lower()) == VIRTUAL
        if self.sizes and not (reads_weights or virtual or names_layers(spec.options)):
            short, long = (trace_step(replace(spec, base_model=self._copy(layers))) for layers in self.sizes)
            deep = extended(short, long, (self.layers - self.sizes[1]) // (self.sizes[1] - self.sizes[0]))
            if deep is not None:
                return deep
        return trace_step(spec)

    def _sizes(self) -> tuple[int, int] | None:
        """Numbers of layers of the copies; None if the layers do not repeat, or copies would not be faster."""
        known = _layers(self.skeleton, self.layers)
        sizes = repetition(known)
        try:
            if sizes and _layers(_skeleton(self._copy(sizes[1])), sizes[1]) == known[: sizes[1]]:
                return sizes
        except (ValueError, TypeError, KeyError, IndexError):  # this configuration needs its own number of layers
            pass
        return None

    def _copy(self, layers: int) -> Path:
        """Folder with the configuration for this number of layers; lists with a value per layer are shortened."""
        folder = Path(self._folder.name) / str(layers)
        if folder.is_dir():
            return folder
        file = self.base_model / "config.json" if self.base_model.is_dir() else self.base_model
        values = json.loads(file.read_text())
        name = self.text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        text = next((part for part in (values, *values.values()) if isinstance(part, dict) and name in part), values)
        for key, value in text.items():
            if isinstance(value, list) and len(value) == self.layers:
                text[key] = value[:layers]
        text[name] = layers
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values))
        return folder


def names_layers(options: dict[str, Any]) -> bool:
    """Whether a method's keys can treat layers differently."""
    layers = ("layers_to_transform", "layers_pattern", "layer_replication")
    modules = ("rank_pattern", "alpha_pattern", "exclude_modules", "trainable")
    if any(options.get(key) for key in (*layers, *modules)):
        return True
    targets = options.get("target_modules") or []
    if isinstance(targets, str):
        return targets != "all-linear"  # a regular expression
    return any(character.isdigit() for name in targets for character in name)


def repetition(layers: Sequence[Any]) -> tuple[int, int] | None:
    """Numbers of layers of two copies that differ by the shortest period with which the layers repeat up to the last.

    Returns:
        None if the layers do not repeat, or if both copies together have as many layers as the model.
    """
    n = len(layers)
    for period in range(1, n // 5 + 1):
        first = max((i + 1 for i in range(n - period) if layers[i] != layers[i + period]), default=0)
        first += (n - first) % period
        if 2 * first + 5 * period < n:
            return first + 2 * period, first + 3 * period
    return None


def extended(short: StepTrace, long: StepTrace, times: int) -> StepTrace | None:
    """The trace of a model with `times` more periods than that of `long`.

    None if the one that `long` adds to `short` does not repeat.
    """
    events = repeated(short.events, long.events, times)
    if events is None:
        return None
    counts = {key: n + times * (n - short.operations.counts.get(key, 0)) for key, n in long.operations.counts.items()}
    sizes = {
        name: (1 + times) * getattr(long, name) - times * getattr(short, name)
        for name in ("trainable", "total", "optimizer", "loading", "divisible")
    }
    return replace(long, events=events, operations=long.operations.with_counts(counts), **sizes)


def repeated(short: list[Any], long: list[Any], times: int) -> list[Any] | None:
    """`long` with the runs that `short` lacks inserted `times` times more.

    None if a run differs from what precedes it.
    """
    events: list[Any] = []
    here = there = 0
    while left := len(long) - there - len(short) + here:
        same = _same(short, here, long, there)
        here, there = here + same, there + same
        size = max(range(1, left + 1), key=lambda n: (_same(short, here, long, there + n), -n), default=0)
        run = long[there : there + size]
        if not run or run != short[max(0, here - size) : here]:
            return None
        events += long[there - same : there] + run * (1 + times)
        there += size
    return events + long[there:] if short[here:] == long[there:] else None


def _same(short: list[Any], here: int, long: list[Any], there: int) -> int:
    """Length of the common run from these two indices on."""
    most = min(len(short) - here, len(long) - there)
    return next((n for n in range(most) if short[here + n] != long[there + n]), most)


def _skeleton(base_model: Path) -> Any:
    """The base model on the meta device."""
    import torch

    from dagster_project.training.methods.load import load_base

    return load_base(base_model, torch.device("cpu"), torch.bfloat16, weights=False)


def _layers(model: Any, n: int) -> list[Any]:
    """Signature of each of a model's n layers: classes, settings and shapes.

    Empty if the layers cannot be identified.
    """
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == n]
    return [_signature(layer) for layer in lists[0]] if len(lists) == 1 else []


def _signature(layer: Any) -> list[Any]:
    plain = (bool, int, float, str, tuple, type(None))
    modules = []
    for name, module in layer.named_modules():
        settings = {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        settings.pop("layer_idx", None)
        modules.append((name, type(module).__qualname__, sorted((key, repr(settings[key])) for key in settings)))
    named = [*layer.named_parameters(), *layer.named_buffers()]
    return [modules, [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in named]]
