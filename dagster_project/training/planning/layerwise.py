"""The trace of a deep model's training step, composed from copies of the model with few layers.

Decoder layers with the same structure use memory in the same way, so a trace of n + 1 layers is the trace of n layers with inserted runs
of events. Copies with one, two and three layers are traced. If what the second adds to the first gives the third, event by event, it is
inserted as often as the model has more layers; otherwise the whole model is traced. Layers that differ with a period (e.g. every sixth
with full attention), or of which the first few differ, are handled a period at a time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dagster_project.training.methods.build import CANNOT_MERGE, VIRTUAL
from dagster_project.training.planning.memory import StepTrace, StorageEvent, in_order, read_config, trace_step
from dagster_project.training.planning.timing import Operations

COPIES = 3
"""Number of traced copies: two to find what a layer adds, and one to check it."""


@dataclass(frozen=True)
class Depth:
    """How the layers of a model repeat."""

    layers: int
    first: int
    """Layers before the repetition, which covers all other layers exactly."""
    period: int

    @property
    def small(self) -> list[int]:
        """Number of layers of each small copy."""
        return [self.first + n * self.period for n in range(1, COPIES + 1)]

    @property
    def times(self) -> int:
        """Number of periods of the model beyond those of the largest copy."""
        return (self.layers - self.small[-1]) // self.period

    @property
    def saves(self) -> bool:
        """Whether the copies together have fewer layers than the model."""
        return sum(self.small) < self.layers


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
        self.depth = self._depth()

    def trace(self, base_model: Path, method: str, options: dict[str, Any], **arguments: Any) -> StepTrace:
        """The trace of the whole model; see `memory.trace_step` for the arguments."""
        has_weights = self.base_model.is_dir() and any(self.base_model.glob("*.safetensors"))
        reads_weights = has_weights and arguments["device"] == "cpu"  # the sizes of the files count
        virtual = CANNOT_MERGE.get(method.lower()) == VIRTUAL
        if self.depth is not None and not (reads_weights or virtual or names_layers(options)):
            traces = [trace_step(self._copy(layers), method, options, **arguments) for layers in self.depth.small]
            extended = extend(traces, self.depth.times)
            if extended is not None:
                return extended
        return trace_step(self.base_model, method, options, **arguments)

    def _depth(self) -> Depth | None:
        """How the layers repeat; None if they do not, or if copies would not be faster."""
        known = _layers(self.skeleton, self.layers)
        depth = repetition(known)
        if depth is None or not depth.saves:
            return None
        largest = depth.small[-1]
        try:
            same = _layers(_skeleton(self._copy(largest)), largest) == known[:largest]
        except (ValueError, TypeError, KeyError, IndexError):  # this configuration needs its own number of layers
            return None
        return depth if same else None

    def _copy(self, layers: int) -> Path:
        """Folder with the configuration for this number of layers; lists with a value per layer are shortened."""
        folder = Path(self._folder.name) / str(layers)
        if folder.is_dir():
            return folder
        file = self.base_model / "config.json" if self.base_model.is_dir() else self.base_model
        values = json.loads(file.read_text())
        name = self.text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        text = next((part for part in values.values() if isinstance(part, dict) and name in part), values)
        text = values if name in values else text
        text.update({key: value[:layers] for key, value in text.items() if isinstance(value, list) and len(value) == self.layers})
        text[name] = layers
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values))
        return folder


def names_layers(options: dict[str, Any]) -> bool:
    """Whether a method's keys can treat layers differently."""
    known = {"layers_to_transform", "layers_pattern", "layer_replication", "rank_pattern", "alpha_pattern", "exclude_modules", "trainable"}
    if any(options.get(key) for key in known):
        return True
    targets = options.get("target_modules") or []
    if isinstance(targets, str):
        return targets != "all-linear"  # a regular expression
    return any(character.isdigit() for name in targets for character in name)


def repetition(layers: Sequence[Any]) -> Depth | None:
    """The shortest period with which the layers repeat up to the last, after the fewest other layers; None if they do not repeat."""
    for period in range(1, len(layers) // COPIES + 1):
        different = [n for n in range(len(layers) - period) if layers[n] != layers[n + period]]
        first = different[-1] + 1 if different else 0
        first += (len(layers) - first) % period
        if first + COPIES * period <= len(layers):
            return Depth(len(layers), first, period)
    return None


def extend(traces: Sequence[StepTrace], times: int) -> StepTrace | None:
    """The trace of a model with `times` more periods than the last of three traces; None if the first two do not predict the third."""
    one, two, three = traces
    # storages that are freed together repeat either in the recorded order or when sorted
    recorded = [trace.events for trace in traces]
    events = extended_events(recorded, times)
    if events is None:
        events = extended_events([in_order(event_list) for event_list in recorded], times)
    operations = _extended(one.operations, two.operations, three.operations, times)
    sizes = {}
    for name in ("trainable", "total", "optimizer", "loading"):
        a, b, c = (getattr(trace, name) for trace in traces)
        if c - b != b - a:
            return None
        sizes[name] = c + times * (c - b)
    if events is None or operations is None:
        return None
    return replace(three, events=events, operations=operations, **sizes)


def extended_events(traces: Sequence[list[StorageEvent]], times: int) -> list[StorageEvent] | None:
    """Events of a model with `times` more periods than the third; None if the runs that the second adds to the first do not give the third."""
    one, two, three = traces
    added = insertions(one, two)
    if added is None or insert(one, added, 2) != three:
        return None
    return insert(one, added, 2 + times)


def insertions(short: Sequence[StorageEvent], long: Sequence[StorageEvent]) -> list[tuple[int, Sequence[StorageEvent]]] | None:
    """Runs of events in `long` that `short` lacks, as (index in `short`, run); None if `long` is not `short` with inserted runs."""
    runs: list[tuple[int, Sequence[StorageEvent]]] = []
    here, there = 0, 0
    left = len(long) - len(short)
    while left > 0:
        same = _same(short, here, long, there)
        here, there = here + same, there + same
        size = max(range(1, left + 1), key=lambda n: (_same(short, here, long, there + n), -n))
        runs.append((here, long[there : there + size]))
        there, left = there + size, left - size
    return runs if left == 0 and short[here:] == long[there:] else None


def insert(events: Sequence[StorageEvent], runs: Sequence[tuple[int, Sequence[StorageEvent]]], times: int) -> list[StorageEvent]:
    """`events` with each run inserted `times` times at its index."""
    extended: list[StorageEvent] = []
    start = 0
    for index, run in runs:
        extended += [*events[start:index], *(event for _ in range(times) for event in run)]
        start = index
    return [*extended, *events[start:]]


def _same(short: Sequence[Any], here: int, long: Sequence[Any], there: int) -> int:
    """Length of the common run of events from these two indices on."""
    most = min(len(short) - here, len(long) - there)
    return next((n for n in range(most) if short[here + n] != long[there + n]), most)


def _extended(one: Operations, two: Operations, three: Operations, times: int) -> Operations | None:
    """Operations of a deeper model by linear extrapolation; None if the three counts are not on a line."""
    counts = dict[Any, float]()
    for key in three.counts.keys() | two.counts.keys() | one.counts.keys():
        a, b, c = (operations.counts.get(key, 0) for operations in (one, two, three))
        if c - b != b - a:
            return None
        counts[key] = c + times * (c - b)
    return three.with_counts(counts)


def _skeleton(base_model: Path) -> Any:
    """The base model on the meta device."""
    import torch

    from dagster_project.training.methods.load import load_base

    return load_base(base_model, torch.device("cpu"), torch.bfloat16, weights=False)


def _layers(model: Any, n: int) -> list[Any]:
    """Signature of each of a model's n layers: classes, settings and shapes. Empty if the layers cannot be identified."""
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == n]
    return [_signature(layer) for layer in lists[0]] if len(lists) == 1 else []


def _signature(layer: Any) -> list[Any]:
    plain = (bool, int, float, str, tuple, type(None))
    modules = [
        (
            name,
            type(module).__qualname__,
            sorted((key, repr(value)) for key, value in vars(module).items() if isinstance(value, plain) and key != "layer_idx"),
        )
        for name, module in layer.named_modules()
    ]
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype) for part in (layer.named_parameters(), layer.named_buffers()) for name, tensor in part
    ]
    return [modules, tensors]
