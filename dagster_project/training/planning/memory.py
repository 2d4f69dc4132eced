"""Peak memory and operations of a training step, from the model's configuration alone.

Model and method are built on torch's meta device, where tensors have shapes and dtypes but no storage. Forward and
backward passes run there with the training's own code, and every storage is counted from allocation to release. All
sizes are in bytes. docs/memory.md has the formulas and compares predictions with measurements (`benchmarks/memory.py`).
"""

from __future__ import annotations

import warnings
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.params import parse
from dagster_project.training.methods.build import PreparedModel, build, causal, decoder_layers
from dagster_project.training.methods.feature_extraction import Options
from dagster_project.training.methods.hardware import LARGE_BLOCK
from dagster_project.training.methods.load import load_base
from dagster_project.training.methods.options import CANNOT_CHECKPOINT, CANNOT_MERGE, VIRTUAL, Quantization, place_of
from dagster_project.training.planning.answer_groups import AnswerPass, answer_passes
from dagster_project.training.planning.distillation import distillation_passes
from dagster_project.training.planning.pairs import pair_passes
from dagster_project.training.planning.timing import Operations, attention, attention_and_back
from dagster_project.training.planning.torch_internals import intercepted, meta_tensors, replaced, run_on_meta
from dagster_project.training.trainers.harness.params import OPTIMIZER_MEMORY, Sharding
from dagster_project.training.trainers.harness.sharding import METHODS as SHARDED_METHODS

STARTED = 45 * 2**20
"""Bytes by which a process grows once the Trainer runs, beyond its imports;
measured with `benchmarks/memory.py --tiny`."""

MOST_GPUS = 1024

CUDA_RUNTIME = 600 * 2**20
"""Bytes that a process uses on a GPU before its first tensor: context and kernels (300 to 550 MB by card and driver),
cuBLAS workspace."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment of the peak."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    fragmentation: int = 0
    runtime: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class Unpredictable(InputError):
    """The method reads weights while it is applied to the model, so it cannot be built on the meta device."""


@dataclass(frozen=True)
class Gathered:
    """Bytes that a sharded training gathers in each process."""

    layer: int = 0
    """Parameters of the largest decoder layer."""
    layer_gradients: int = 0
    root: int = 0
    """Parameters outside the layers."""
    root_gradients: int = 0


StorageEvent = tuple[str, str, int]
"""(from, to, bytes): a storage is allocated ("", part), freed (part, ""), or becomes a gradient (part, "gradients")."""


@dataclass(frozen=True)
class StepTrace:
    """A training step on the meta device, from which predictions are computed."""

    events: list[StorageEvent]
    operations: Operations
    """Operations of an optimizer step: its passes, gradient clipping and the update."""
    trainable: int
    """Number of trained parameters."""
    total: int
    """Number of all parameters."""
    optimizer: int
    """Bytes of the optimizer state."""
    optim: str
    """transformers' name of the optimizer; empty if the method takes no optimizer steps."""
    loading: int
    """Bytes resident while weights are read and converted; 0 if the stored weights are used without conversion."""
    divisible: int = field(default=0, kw_only=True)
    """Bytes of all parameters, which sharding divides; buffers and scales of 4-bit weights are not divided."""
    gathered: Gathered = field(default=Gathered(), kw_only=True)

    def peak(self, device: str, runtime: int, sharding: Sharding | None = None, processes: int = 1) -> Memory:
        """Memory of a step on "cpu" or "cuda" in a process that uses `runtime` bytes in addition.

        Args:
            sharding: divides the model among `processes` GPUs. `full_shard` gathers two layers at a time (the next one
                is prefetched) and what is outside the layers; the gradient of a gathered weight exists twice while it
                is summed.
        """
        kept = 1 if sharding is None or not sharding.cpu_offload else 0
        account = Account(kept / processes if sharding else 1)
        for event in self.events:
            account.apply(event)
        fragmentation = account.fragmentation if device == "cpu" else 0
        peak = Memory(**account.peak, optimizer=self.optimizer, fragmentation=fragmentation, runtime=runtime)
        if sharding:
            part, gathered = self.gathered, self.divisible
            if sharding.fsdp == "full_shard":
                gathered = min(part.root + 2 * part.layer, gathered)
            return replace(
                peak,
                weights=peak.weights - self.divisible + gathered + kept * -(-self.divisible // processes),
                gradients=2 * (part.root_gradients + part.layer_gradients) + kept * -(-peak.gradients // processes),
                optimizer=kept * -(-self.optimizer // processes),
            )
        if self.loading > peak.total - runtime:
            return Memory(weights=self.loading, runtime=runtime)
        return peak


@dataclass(frozen=True)
class Prediction(StepTrace):
    """Predicted memory and work of one training."""

    memory: Memory


def trace_step(spec: TrainingSpec) -> StepTrace:
    """Build model and method on the meta device and run one step. The random state of torch does not change.

    Raises:
        InputError: no configuration, an unknown method or key, or one that does not fit the model; Unpredictable if the
            method needs weights.
    """
    import torch

    config = read_config(spec.base_model)
    stored = config.dtype or torch.float32  # read before the model is built, which changes it
    options = dict(spec.options)
    # initial values that are computed from the weights (pissa, olora, ...) have the same shapes as any others
    if not isinstance(options.get("init_lora_weights"), bool):
        options.pop("init_lora_weights", None)
    ledger = _Ledger(config.get_text_config().vocab_size, spec.timed)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"), _needs_no_weights(spec):
        with torch.device("meta"), intercepted(0):
            prepared = build(
                spec.method, options, spec.base_model, torch.device(spec.device), spec.dtype, spec.where,
                spec.quantization, merge=False, total_steps=100, categories=("one", "other"), weights=False,
                packs=spec.teacher is None,
            )  # fmt: skip
        model = prepared.model
        network = model.base if prepared.fit else model
        base = causal(network)
        if not prepared.fit:
            _prepare_for_training(model, base, spec.gradient_checkpointing)
        for tensor in _tensors(network):
            ledger.born(tensor, "weights")
        if spec.other_weights:
            ledger.events.append(("", "weights", spec.other_weights))
        if prepared.fit:
            batch = parse(Options, options, spec.where).batch_size
            _feature_pass(ledger, base, [max(spec.lengths)] * batch)
        else:
            _training_passes(ledger, prepared, base, spec)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if spec.timed and not prepared.fit:
        ledger.operations.note_optimizer(trained)
    optim = (not spec.sharding and prepared.optim) or spec.optim  # sharded, an adapter's own optimizer is not used
    states = 0 if prepared.fit else sum(_state_bytes(parameter, optim) for parameter in trained)
    if spec.method.lower() == "adalora":
        states += 3 * sum(map(_bytes, trained))  # importance of each weight, its mean and its spread
    in_4bit = getattr(base, "is_loaded_in_4bit", False)
    as_stored = stored == (torch.float32 if prepared.autocast else spec.dtype) and not in_4bit
    loading = 0 if spec.device != "cpu" or as_stored else _loading(spec.base_model, base, stored)
    optim = "" if prepared.fit else optim
    return StepTrace(
        list(ledger.events), ledger.operations, prepared.trainable, prepared.total, states, optim, loading,
        divisible=sum(map(_bytes, network.parameters())), gathered=_gathered(network, decoder_layers(base)),
    )  # fmt: skip


def _training_passes(ledger: _Ledger, prepared: PreparedModel, base: Any, spec: TrainingSpec) -> None:
    """Run the passes of an optimizer step: at most two, which count as often as it has passes."""
    import torch

    for parameter in prepared.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(ledger.is_gradient)
    passes = min(2, spec.gradient_accumulation_steps)
    lengths = spec.rows * spec.lengths
    if spec.teacher:
        with torch.device("meta"), intercepted(0):
            teacher = load_base(spec.teacher, torch.device(spec.device), spec.dtype, weights=False)
        for tensor in _tensors(teacher):
            ledger.born(tensor, "weights")
        distillation_passes(ledger, prepared, teacher, lengths, spec.counted, spec.divergence, passes)
    elif spec.answers:
        answer_passes(ledger, prepared, base, spec.answers, spec.gradient_checkpointing, passes)
    elif spec.pair_lengths:
        pair_passes(ledger, prepared, base, spec.pair_lengths, spec.counted, passes)
    else:
        _passes(ledger, prepared, base, lengths, spec.rows * spec.counted, passes, not spec.sharding)
    ledger.operations.multiply(spec.gradient_accumulation_steps / passes)


def _gathered(network: Any, layers: Sequence[Any]) -> Gathered:
    """What is gathered of a whole model, given its decoder layers."""

    def sizes(module: Any, without: frozenset[int] = frozenset()) -> tuple[int, int]:
        parameters = [parameter for parameter in module.parameters() if id(parameter) not in without]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return sum(map(_bytes, parameters)), sum(map(_bytes, trained))

    inside = frozenset(id(parameter) for layer in layers for parameter in layer.parameters())
    return Gathered(*max(map(sizes, layers), default=(0, 0)), *sizes(network, inside))


LORA = {"r": 16, "target_modules": "all-linear"}
"""PEFT keys of LoRA when it is suggested instead of a method that needs more memory."""


@dataclass(frozen=True)
class TrainingSpec:
    """Everything that a prediction depends on.

    `method`, `options`, `quantization` and `optim` are those of the variant's entry in params.yaml.
    """

    device: str
    """"cpu" or "cuda", the device of the training; it need not exist on this machine."""
    dtype: Any
    """torch.float32 or torch.bfloat16."""
    base_model: Path
    """Folder with a config.json, or such a file; weights are not needed."""
    method: str
    options: dict[str, Any]
    lengths: list[int]
    """Tokens of each example in the largest packed row."""
    counted: int
    """Positions of that row that count in the loss."""
    rows: int = 1
    """Packed rows in a forward pass."""
    runtime: int = 0
    """Bytes of the process, see `resident`; CUDA_RUNTIME on "cuda"."""
    quantization: Quantization | None = None
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    optim: str = "adamw_torch_fused"
    where: str = "adapter"
    """Dotted path of the entry in params.yaml, for messages."""
    timed: bool = True
    """Whether the operations are recorded, so that their time can be measured. Takes a third longer."""
    trace: Callable[[TrainingSpec], StepTrace] = trace_step
    sharding: Sharding | None = None
    processes: int = 1
    """Number of GPUs among which `sharding` divides the model. On a CPU each process loads the whole model, and nothing
    is divided."""
    pair_lengths: tuple[tuple[int, int, int], ...] = ()
    """Of a training on pairs that reads what two texts have in common once: tokens of that, of the rest of the first
    and of the rest of the second text, for each pair of the largest pass. Then `lengths` are the tokens of the pairs,
    and without `counted` no logits are computed."""
    answers: AnswerPass | None = None
    """Of an online training that reads a prompt once for all its answers: the largest pass. Then `lengths` are its
    tokens."""
    other_weights: int = 0
    """Bytes of a further model that the process holds, e.g. of a reward model.
    Its passes need less memory than those of training."""
    teacher: Path | None = None
    """Folder of a second model, whose distributions are learned; `lengths` are those of padded texts, which end in
    equally many counted tokens."""
    divergence: float = 0.5
    """With a teacher: `beta` of the loss."""

    @cached_property
    def prediction(self) -> Prediction:
        """Predicted peak memory and work of training."""
        trace = self.trace(self)
        sharding = self.sharding if self.device == "cuda" else None
        return Prediction(**vars(trace), memory=trace.peak(self.device, self.runtime, sharding, self.processes))

    def gpus_needed(self, room: int) -> int | None:
        """The smallest number of GPUs with `room` bytes each on which the training fits with `sharding`.

        By default with `full_shard`. None if no number is enough, or the method does not support it.
        """
        if self.device != "cuda" or self.method.lower() not in SHARDED_METHODS:
            return None
        settings = self.sharding or Sharding()
        trace = self.prediction if self.sharding else replace(self, sharding=settings, timed=False).prediction

        def needs(processes: int) -> int:
            return -trace.peak(self.device, self.runtime, settings, processes).total

        found = bisect_left(range(2, MOST_GPUS + 1), -room, key=needs) + 2  # the more GPUs, the less each needs
        return found if found <= MOST_GPUS else None

    @property
    def needed(self) -> int:
        """Bytes of the predicted peak."""
        return self.prediction.memory.total

    @property
    def can_checkpoint(self) -> bool:
        return self.method.lower() not in CANNOT_CHECKPOINT

    def checkpointed_beyond(self, free: int) -> TrainingSpec:
        """With gradient checkpointing, if without it more than `free` bytes are needed and the method supports it."""
        return replace(self, gradient_checkpointing=True) if self.can_checkpoint and self.needed > free else self

    def lighter(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Changes that need less memory, mildest first, as pairs of (text for params.yaml, changed fields)."""
        import torch

        passes = self.gradient_accumulation_steps * self.rows
        single = {"rows": 1, "gradient_accumulation_steps": passes}
        row = f"per_device_train_batch_size: 1 with gradient_accumulation_steps: {passes}"
        with_row = f", {row}" if self.rows > 1 else ""
        lora = {"options": LORA, "quantization": None, "gradient_checkpointing": True, **single}
        if not self.gradient_checkpointing and self.can_checkpoint:
            yield "gradient_checkpointing: true", {"gradient_checkpointing": True}
        if self.rows > 1:
            yield row, single
            if self.can_checkpoint:
                yield f"gradient_checkpointing: true, {row}", {"gradient_checkpointing": True, **single}
        if self.dtype == torch.float32:
            yield "compute.dtype: bfloat16", {"dtype": torch.bfloat16}
            if self.can_checkpoint:
                least = {"dtype": torch.bfloat16, "gradient_checkpointing": True, **single}
                yield f"compute.dtype: bfloat16 and gradient_checkpointing: true{with_row}", least
        if self.method.lower() in ("full", "bitfit", "layernorm"):
            yield f"method: lora with gradient_checkpointing: true{with_row}", {"method": "lora", **lora}
        if self.method.lower() != "qlora":
            least = {"method": "qlora", **lora, "dtype": torch.bfloat16}
            yield f"method: qlora with gradient_checkpointing: true{with_row}", least

    def remedy(self, room: int) -> str:
        """The mildest change that fits into `room` bytes, or else the one that needs least memory."""
        least = (self.needed, "")
        for text, changed in self.lighter():
            needed = replace(self, **changed).needed
            if needed <= room:
                return f"{text} would take {size_text(needed)}"
            least = min(least, (needed, text))
        other = "use a smaller model or a machine with more memory"
        return f"{least[1]} would take {size_text(least[0])}, which is the least; {other}" if least[1] else other


def size_text(size: float) -> str:
    """Bytes as text in MB or GB (powers of ten)."""
    return f"{size / 1e9:.1f} GB" if size >= 9.5e8 else f"{size / 1e6:.0f} MB"


@contextmanager
def _needs_no_weights(spec: TrainingSpec) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # a value was read from a meta tensor
        why = str(error).splitlines()[0][:80]
        problem = f"the memory of {spec.method} cannot be predicted without weights ({why})"
        option = spec.where.startswith("--")
        hint = "leave this --method out" if option else "list the variants to plan, without this one"
        raise Unpredictable(f"{place_of(spec.where, 'method')}: {problem}", hint) from None


def largest_row(rows: Sequence[Mapping[str, Any]], method: str) -> tuple[list[int], int]:
    """The packed row that needs the most memory. With virtual tokens every example is padded to the longest.

    Args:
        rows: with the columns `lengths`, the tokens of each example, and `labels`.
    Returns:
        Tokens of each example in that row; the largest number of positions that count in the loss of any row.
    """
    padded = CANNOT_MERGE.get(method.lower()) == VIRTUAL

    def size(lengths: Sequence[int]) -> tuple[int, int]:
        return (len(lengths) * max(lengths) if padded else sum(lengths)), len(lengths)

    largest = max((row["lengths"] for row in rows), key=size)
    return list(largest), max(sum(label != IGNORE for label in row["labels"]) for row in rows)


def read_config(base_model: Path) -> Any:
    """The transformers configuration of a model.

    Raises:
        InputError: there is none, or transformers does not support the model type.
    """
    from transformers import AutoConfig

    file = base_model / "config.json" if base_model.is_dir() else base_model
    if not file.is_file():
        raise InputError(f"{base_model}: no config.json", "give the folder of a model or its config.json")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=False)
    # transformers fails where it first uses a wrong value
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        problem = f"{file}: transformers does not support this configuration: {why}"
        raise InputError(problem, "use another model") from None


def resident() -> int:
    """Bytes that a training process uses on a CPU besides tensors: those of this process after training's imports."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import psutil
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    return int(psutil.Process().memory_info().rss) + STARTED


def _prepare_for_training(model: Any, base: Any, gradient_checkpointing: bool) -> None:
    """Change the model as TRL's SFTTrainer does before its first step."""
    if gradient_checkpointing:
        base.activation_checkpointing_enable()
        if model is not base:
            model.enable_input_require_grads()
    model.train()


def _tensors(model: Any) -> Iterator[Any]:
    """All parameters and buffers of a model, and the scales of 4-bit weights."""
    import torch

    for tensor in [*model.parameters(), *model.buffers()]:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        for part in (state, getattr(state, "state2", None)) if state is not None else ():
            yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor))


def _batch(lengths: Sequence[int], packs: bool) -> dict[str, Any]:
    """A batch on the meta device with the shapes of `collate_packed` or, if `packs` is False, `collate_padded`."""
    import torch

    shape = (1, sum(lengths)) if packs else (len(lengths), max(lengths))
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
    return {
        "input_ids": ids,
        "position_ids": ids,
        "cu_seq_lens_q": bounds,
        "max_length_q": max(lengths),
        "attention_mask": torch.ones_like(ids),
    }


def _feature_pass(ledger: _Ledger, base: Any, lengths: Sequence[int]) -> None:
    """Run the forward pass of training/methods/feature_extraction.py."""
    import torch

    batch = _batch(lengths, packs=False)
    with torch.no_grad(), ledger.mode(), ledger.attention():
        base.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def _passes(
    ledger: _Ledger, prepared: PreparedModel, base: Any, lengths: Sequence[int], counted: int, passes: int, cached: bool
) -> None:
    """Run the forward and backward passes of training/trainers/sft/sft.py on the meta device.

    Args:
        cached: whether autocast keeps converted weights; it does not with sharding (trainers/harness/sharding.py).
    """
    import torch
    from torch.nn.functional import cross_entropy

    batch = _batch(lengths, prepared.packs)
    where = torch.zeros(counted, dtype=torch.long, device="meta")
    for _ in range(passes):
        with ledger.mode(), ledger.attention(), _autocast_on_meta(cached):
            hidden = prepared.hidden_states(batch)
            scores = base.get_output_embeddings()(hidden[:, :-1].flatten(0, 1)[where]).float()
            losses = cross_entropy(scores, where, reduction="none")
            weights = torch.ones_like(losses)
            loss = (losses * weights).sum() / weights.sum()
            penalty = prepared.extra_loss(prepared.model)
            loss = loss if penalty is None else loss + penalty
            del hidden, scores, losses, penalty  # a reference that is kept would count as memory
            torch.autograd.backward(loss)
            del loss


@contextmanager
def _autocast_on_meta(cached: bool) -> Iterator[None]:
    """Let torch.autocast work on the meta device as on a CPU, which torch does not support.

    A trained weight is converted once per autocast region, everything else at each product (torch's autocast_mode.cpp,
    cached_cast).
    """
    import torch

    functions, autocast = torch.nn.functional, torch.autocast
    linear, copies = functions.linear, dict[int, Any]()

    def cast(value: Any) -> Any:
        if value is None or value.dtype != torch.float32:
            return value
        if not (cached and value.is_leaf and value.requires_grad):
            return value.to(torch.get_autocast_dtype("cpu"))
        if id(value) not in copies:
            copies[id(value)] = value.to(torch.get_autocast_dtype("cpu"))
        return copies[id(value)]

    def linear_cast(input: Any, weight: Any, bias: Any = None) -> Any:
        if torch.is_autocast_enabled("cpu"):
            input, weight, bias = map(cast, (input, weight, bias))
        return linear(input, weight, bias)

    def autocast_on_cpu(device_type: str, **options: Any) -> Any:
        return autocast("cpu", **options)

    with (
        replaced(torch, "autocast", autocast_on_cpu),
        replaced(torch, "clear_autocast_cache", copies.clear),
        replaced(functions, "linear", linear_cast),
    ):
        yield


class Account:
    """Bytes allocated in each part, now and at the peak."""

    def __init__(self, gradient_share: float = 1) -> None:
        """
        Args:
            gradient_share: of the gradients that a process keeps.
        """
        self.gradient_share = gradient_share
        self.live = {"weights": 0, "gradients": 0, "activations": 0, "logits": 0}
        self.peak = dict(self.live)
        self.highest = self.now = 0
        self._small = Counter[int]()  # size of a block that glibc keeps when freed -> bytes allocated in such blocks
        self._most = Counter[int]()  # the same, the maximum for each size
        self._at_peak = 0  # bytes allocated in all such blocks at the peak

    def apply(self, event: StorageEvent) -> None:
        before, after, size = event
        if before and after:
            self.live[before] -= size
            self.live[after] += size
            if after == "gradients" and self.gradient_share < 1:
                self.now -= round(size * (1 - self.gradient_share))
            return
        part, change = (before, -size) if before else (after, size)
        self.live[part] += change
        self.now += round(change * self.gradient_share) if part == "gradients" and self.gradient_share < 1 else change
        if size <= LARGE_BLOCK and part != "weights":
            self._small[size] += change
            self._most[size] = max(self._most[size], self._small[size])
        if self.now > self.highest:
            self.highest, self.peak, self._at_peak = self.now, dict(self.live), self._small.total()

    @property
    def fragmentation(self) -> int:
        """Free bytes that are held at the peak, assuming that a freed block is reused only for its own size."""
        return self._most.total() - self._at_peak


class _Ledger:
    """Records allocations and releases of meta storages, and the operations between them."""

    def __init__(self, vocabulary: int, timed: bool = True) -> None:
        self.vocabulary, self.timed = vocabulary, timed
        self.events: list[StorageEvent] = []
        self.operations = Operations()
        self._known: dict[int, tuple[str, int, Any]] = {}

    def born(self, tensor: Any, part: str) -> None:
        """Record the allocation of the tensor's storage, unless it is already recorded."""
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps one Python object per storage, for as long as the storage exists
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (part, size, weakref.ref(storage, lambda _: self._on_release(key)))
        self.events.append(("", part, size))

    def _on_release(self, key: int) -> None:
        part, size, _ = self._known.pop(key)
        self.events.append((part, "", size))

    def passing(self, size: int) -> None:
        """Record bytes that a kernel allocates only while it runs."""
        self.events += [("", "activations", size), ("activations", "", size)]

    def is_gradient(self, parameter: Any) -> None:
        """Move the storage of the parameter's gradient to the gradients."""
        key = id(parameter.grad.untyped_storage())
        part, size, alive = self._known[key]
        self.events.append((part, "gradients", size))
        self._known[key] = ("gradients", size, alive)

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and record it and the storages that it allocates."""
        out = run_on_meta(func, args, kwargs)
        outputs = meta_tensors(out)
        if self.timed and (outputs or meta_tensors((args, kwargs))):
            self.operations.note(func, *args, **kwargs)
        for tensor in outputs:
            self.born(tensor, "logits" if tensor.shape and tensor.shape[-1] == self.vocabulary else "activations")
        if func.name() == "bitsandbytes::gemm_4bit":  # for more than a few rows it makes a temporary copy of the matrix
            self.passing(args[2][0] * args[2][1] * args[0].element_size())
        return out

    def mode(self) -> Any:
        """A context in which every operation is recorded.

        The only value that is read is whether a batch is not packed.
        """
        return intercepted(False, self.run)

    @contextmanager
    def attention(self) -> Iterator[None]:
        """A context in which attention saves what the fused kernel saves (Dao et al. 2022).

        That is query, key, value, output and log-sum-exp. On the meta device torch would choose the implementation that
        also saves the scores.
        """
        import torch

        ledger = self

        class Fused(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any, causal: bool) -> Any:
                out = torch.empty_like(query)
                log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
                ctx.save_for_backward(query, key, value, out, log_sum, bias)
                ctx.causal = causal
                if ledger.timed:
                    ledger.operations.note(attention, query, key, value, bias, causal)
                return out

            @staticmethod
            def backward(ctx: Any, *gradient: Any) -> Any:
                query, key, value, _, _, bias = ctx.saved_tensors
                if ledger.timed:
                    ledger.operations.note(attention, query, key, value, bias, ctx.causal, times=-1)
                    ledger.operations.note(attention_and_back, query, key, value, bias, ctx.causal)
                return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None

        def fused(query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False, **_: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in (query, key, value))
            bias = None if attn_mask is None else attn_mask.to(query.dtype)  # the kernel needs it in this dtype
            return Fused.apply(query, key, value, bias, is_causal)

        with replaced(torch.nn.functional, "scaled_dot_product_attention", fused):
            yield


def _bytes(tensor: Any) -> int:
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def _elements(parameter: Any) -> int:
    """Number of weights in a parameter; 4-bit weights are stored two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel() if state is not None else parameter.numel())


def _state_bytes(parameter: Any, optim: str) -> int:
    """Bytes of optimizer state for a parameter."""
    n = int(parameter.numel())
    if "8bit" in optim:
        return 2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n
    if "adamw" not in optim:
        return int(n * 4 * OPTIMIZER_MEMORY[optim])
    return 2 * n * int(parameter.element_size()) + 4


def _loading(base_model: Path, base: Any, stored: Any) -> int:
    """Bytes resident on a CPU while weights are read and converted: the mapped file and the converted weights."""
    files = list(base_model.glob("*.safetensors")) if base_model.is_dir() else []
    size = sum(file.stat().st_size for file in files) or sum(map(_elements, base.parameters())) * stored.itemsize
    return size + sum(_bytes(tensor) for tensor in _tensors(base))
