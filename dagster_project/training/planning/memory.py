"""What a training step will hold in memory and compute, told from the model's configuration alone.

The account is the step itself: model and method are built on torch's meta device, where tensors have shapes and dtypes but no storage,
one forward and backward pass runs there with the training's own code, and every storage is counted from its birth to its death. So what
autograd keeps for a frozen layer, for DoRA's norms or under checkpointing is not estimated but looked up. A second for a 7B model.

All in bytes; n = elements, b = bytes per element of the dtype:

    weights       sum of n b over parameters and buffers. 4-bit (Dettmers et al. 2023, QLoRA, section 3): n / 2 for nf4, n / 64 for the
                  8-bit scale of each block of 64, 4 n / (64 x 256) for the scales' own: 0.516 bytes a weight; what is not quantized
                  (embeddings, output layer, norms) is float32. On a CPU the mapped file counts as long as a tensor lies in it.
    gradients     n b of each trained parameter, from when the backward pass reaches it until the optimizer's step. Accumulation keeps
                  them through the next pass, so two passes are counted then.
    optimizer     AdamW: two states in the parameter's own dtype, 2 n b (torch.optim.AdamW makes them by zeros_like), and a step of 4
                  bytes. 8-bit: 2 n, and 2 x 4 bytes a block of 256 (Dettmers et al. 2022, 8-bit Optimizers, section 2); parameters
                  under 4,096 elements stay in 32 bits. Others: sft.OPTIMIZER_MEMORY. What learns is float32 whatever the model's dtype. AdaLoRA keeps 3 n b more: the importance of each
                  weight, its mean and its spread.
    activations   what autograd keeps, and passing results. In the way of Korthikanti et al. 2022, section 4.1 (34 h + 5 a s a token
                  and layer for GPT in 16 bits, with dropout), a Llama layer all of whose weights learn keeps, with h hidden, f
                  intermediate and a heads, in bytes a token:
                      float32  44 h + 16 f + 4 a + 8        computing in bfloat16  36 h + 8 f + 4 a + 8
                  two norms of 12 h + 4 (their input, the normed values, the output), attention b (4 h) + 4 a (query, key and value
                  repeated to all heads, output, log-sum-exp; no scores: the kernel computes them again), b h into the output projection,
                  b (4 f) in SwiGLU. In bfloat16 the weights that learn, and so the stream between layers, are float32: a norm keeps 8 h + 4,
                  each of five products a copy of its input (autocast makes one a product), and 2 n of copies of the weights are kept
                  for the backward pass. A frozen matrix does not keep its input; a layer below the lowest trained one keeps nothing.
    logits        whatever has the vocabulary as last dimension. At the most, in the loss's backward pass, counted positions x vocabulary
                  x 4 x 3: the log-softmax that was kept, its gradient and that of the scores, all in float32.
    fragmentation on a CPU, memory that is free and still held: glibc keeps freed blocks of up to hardware.LARGE_BLOCK. Counted as if it
                  reused a block for its own size alone: the most that ever lives of each size, all sizes together, less what of such
                  blocks lives at the peak. On a GPU the peak is what torch has allocated, which leaves this out.
    runtime       libraries and their state. On a CPU the resident size of a process that has imported them, measured on this machine;
                  on a GPU the CUDA context and cuBLAS workspace, CUDA_RUNTIME.

Not in it: kernels' scratch (benchmarks/memory.py prints predicted against measured).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.params import parse
from dagster_project.training.methods.build import CANNOT_CHECKPOINT, CANNOT_MERGE, VIRTUAL, PreparedModel, Quantization, build, causal
from dagster_project.training.methods.feature_extraction import Options
from dagster_project.training.methods.hardware import LARGE_BLOCK
from dagster_project.training.planning.timing import Operations, attention, attention_and_back
from dagster_project.training.trainers.harness.params import OPTIMIZER_MEMORY

STARTED = 45 * 2**20
"""Bytes that a process grows by once the Trainer runs, beyond its imports: `benchmarks/memory.py --tiny` measures it."""

CUDA_RUNTIME = 600 * 2**20
"""Bytes that a process takes of a GPU before its first tensor: context and kernels (300 to 550 MB by card and driver), cuBLAS workspace."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part, at the moment at which they are the most together."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    fragmentation: int
    runtime: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class Unpredictable(InputError):
    """A method that looks at weights while it is put on the model, and so cannot be put on shapes."""


@dataclass(frozen=True)
class Prediction:
    """What one way of training a model takes."""

    memory: Memory
    trainable: int
    """Parameters that learn."""
    total: int
    step: Operations
    """What an optimizer step does: its passes, the clipping and the update."""
    optim: str
    """transformers' name of the optimizer; empty where none takes steps."""


def predict(
    base_model: Path,
    method: str,
    options: dict[str, Any],
    *,
    lengths: Sequence[int],
    counted: int,
    dtype: Any,
    device: str,
    runtime: int,
    quantization: Quantization | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    optim: str = "adamw_torch_fused",
    where: str = "adapter",
) -> Prediction:
    """Peak memory and work of training, from the configuration alone. Random states of torch stay as they are.

    Args:
        base_model: folder with a config.json, or such a file; weights are not needed.
        method, options, quantization, optim: as the variant's entry has them.
        lengths: tokens of each example in the largest forward pass, all its rows together.
        counted: positions of it that count in the loss.
        dtype: the model's, torch.float32 or torch.bfloat16.
        device: "cpu" or "cuda", where training will run; it need not be here.
        runtime: bytes, see `resident`; on "cuda" give CUDA_RUNTIME.
        where: dotted place in params.yaml, for messages.
    Raises:
        InputError: no configuration, unknown method or key, or one that does not suit the model.
        Unpredictable: the method needs weights for it.
    """
    trace = trace_step(
        base_model, method, options, lengths=lengths, counted=counted, dtype=dtype, device=device, quantization=quantization,
        gradient_checkpointing=gradient_checkpointing, gradient_accumulation_steps=gradient_accumulation_steps, optim=optim, where=where,
    )  # fmt: skip
    return predict_from(trace, device, runtime)


StorageEvent = tuple[str, str, int]
"""(from, to, bytes): a storage is allocated ("", part), freed (part, ""), or becomes a gradient (part, "gradients")."""


@dataclass(frozen=True)
class StepTrace:
    """A training step on the meta device: everything that a prediction is computed from."""

    events: list[StorageEvent]
    operations: Operations
    trainable: int
    total: int
    optimizer: int
    """Bytes of its states."""
    optim: str
    """transformers' name of it; empty where none takes steps."""
    loading: int
    """Bytes resident while weights are read and converted; 0 where they are used as they are stored."""


def in_order(events: Sequence[StorageEvent]) -> list[StorageEvent]:
    """The events with what happens between two allocations sorted: in which order storages are freed there changes no peak, and is not always the same."""
    found: list[StorageEvent] = []
    start = 0
    for place, event in enumerate(events):
        if not event[0]:
            found += [*sorted(events[start:place]), event]
            start = place + 1
    return [*found, *sorted(events[start:])]


def predict_from(trace: StepTrace, device: str, runtime: int) -> Prediction:
    """Peak memory of a traced step."""
    account = Account()
    for event in trace.events:
        account.apply(event)
    kept = account.fragmentation if device == "cpu" else 0
    peak = Memory(**account.peak, optimizer=trace.optimizer, fragmentation=kept, runtime=runtime)
    if trace.loading > peak.total - runtime:
        peak = Memory(weights=trace.loading, gradients=0, optimizer=0, activations=0, logits=0, fragmentation=0, runtime=runtime)
    return Prediction(peak, trace.trainable, trace.total, trace.operations, trace.optim)


def trace_step(
    base_model: Path,
    method: str,
    options: dict[str, Any],
    *,
    lengths: Sequence[int],
    counted: int,
    dtype: Any,
    device: str,
    quantization: Quantization | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    optim: str = "adamw_torch_fused",
    where: str = "adapter",
    timed: bool = True,
) -> StepTrace:
    """Build model and method on the meta device and take one step; see `predict`.

    Args:
        timed: note the operations, too, so that their time can be measured. Takes a third longer.
    """
    import torch

    config = read_config(base_model)
    stored = config.dtype or torch.float32  # building the model will set it
    # a start that is computed from the weights (pissa, olora, ...) has the same shapes as any other
    options = {key: value for key, value in options.items() if key != "init_lora_weights" or isinstance(value, bool)}
    ledger = _Ledger(config.get_text_config().vocab_size, timed)
    with torch.random.fork_rng(devices=[]), _quiet(), _on_shapes(method, where):
        with torch.device("meta"), _answering():
            tunable = build(
                method, options, base_model, torch.device(device), dtype, where, quantization, merge=False, total_steps=100,
                categories=("one", "other"), weights=False,
            )  # fmt: skip
        model = tunable.model
        held = model.base if tunable.fit else model
        base = causal(held)
        if not tunable.fit:
            _like_the_trainer(model, base, gradient_checkpointing)
        for tensor in _tensors(held):
            ledger.born(tensor, "weights")
        if tunable.fit:
            batch = parse(Options, options, where).batch_size
            _read(ledger, base, [max(lengths)] * batch)
        else:
            _passes(ledger, tunable, base, lengths, counted, passes := min(2, gradient_accumulation_steps))
            ledger.operations.multiply(gradient_accumulation_steps / passes)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if timed and not tunable.fit:
        ledger.operations.note_optimizer(learning)
    optim = tunable.optim or optim
    states = 0 if tunable.fit else sum(_state_bytes(parameter, optim) for parameter in learning)
    if method.lower() == "adalora":
        states += 3 * sum(map(_bytes, learning))
    as_stored = stored == (torch.float32 if tunable.autocast else dtype) and not getattr(base, "is_loaded_in_4bit", False)
    loading = 0 if device != "cpu" or as_stored else _loading(base_model, base, stored)
    return StepTrace(
        list(ledger.events), ledger.operations, tunable.trainable, tunable.total, states, "" if tunable.fit else optim, loading
    )


LORA = {"r": 16, "target_modules": "all-linear"}
"""Keys of LoRA, where it is proposed instead of something heavier."""


@dataclass(frozen=True)
class Way:
    """One way of training: what a prediction depends on, see `predict`."""

    device: str
    dtype: Any
    runtime: int
    base_model: Path
    method: str
    options: dict[str, Any]
    quantization: Quantization | None
    rows: int
    """Packed rows in a forward pass."""
    lengths: list[int]
    """Tokens of each example in the largest such row."""
    counted: int
    """Its positions that count in the loss."""
    gradient_checkpointing: bool
    gradient_accumulation_steps: int
    optim: str
    where: str
    timed: bool = True
    """Whether the step's operations are needed, too."""
    trace: Callable[..., StepTrace] = trace_step

    def predict(self) -> Prediction:
        given = dict(vars(self))
        rows, runtime, trace = given.pop("rows"), given.pop("runtime"), given.pop("trace")
        given["lengths"], given["counted"] = rows * self.lengths, rows * self.counted
        step = trace(given.pop("base_model"), given.pop("method"), given.pop("options"), **given)
        return predict_from(step, self.device, runtime)

    def lighter(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Changes that need less memory, in the order in which one would try them: what to write, and what it changes here."""
        import torch

        one = {"rows": 1, "gradient_accumulation_steps": self.gradient_accumulation_steps * self.rows}
        row = f"per_device_train_batch_size: 1 with gradient_accumulation_steps: {one['gradient_accumulation_steps']}"
        beside = f", {row}" if self.rows > 1 else ""
        lora = {"options": LORA, "quantization": None, "gradient_checkpointing": True, **one}
        can = self.method.lower() not in CANNOT_CHECKPOINT
        if not self.gradient_checkpointing and can:
            yield "gradient_checkpointing: true", {"gradient_checkpointing": True}
        if self.rows > 1:
            yield row, one
            if can:
                yield f"gradient_checkpointing: true, {row}", {"gradient_checkpointing": True, **one}
        if self.dtype == torch.float32:
            yield "compute.dtype: bfloat16", {"dtype": torch.bfloat16}
            if can:
                least = {"dtype": torch.bfloat16, "gradient_checkpointing": True, **one}
                yield f"compute.dtype: bfloat16 and gradient_checkpointing: true{beside}", least
        if self.method.lower() in ("full", "bitfit", "layernorm"):
            yield f"method: lora with gradient_checkpointing: true{beside}", {"method": "lora", **lora}
        if self.method.lower() != "qlora":
            yield f"method: qlora with gradient_checkpointing: true{beside}", {"method": "qlora", **lora, "dtype": torch.bfloat16}

    def remedy(self, needed: int, room: int) -> str:
        """The first change with which it takes no more than `room` bytes, or else the one that takes the least, where it takes `needed` now."""
        least = (needed, "")
        for text, changed in self.lighter():
            took = replace(self, **changed).predict().memory.total
            if took <= room:
                return f"{text} would take {size_text(took)}"
            least = min(least, (took, text))
        other = "take a smaller model or a larger machine"
        return f"{least[1]} would take {size_text(least[0])}, which is the least; {other}" if least[1] else other


def size_text(size: float) -> str:
    """Bytes, for people."""
    return f"{size / 1e9:.1f} GB" if size >= 9.5e8 else f"{size / 1e6:.0f} MB"


@contextmanager
def _on_shapes(method: str, where: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the meta device was asked for a value
        raise Unpredictable(
            f"params.yaml: {where}.method: what {method} takes cannot be told without weights ({str(error).splitlines()[0][:80]})",
            "name the variants that you want planned",
        ) from None


def largest_row(lengths: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], method: str) -> tuple[list[int], int]:
    """(tokens of its examples, most positions that count) of the packed row that takes the most memory.

    Behind virtual tokens every example gets a row of its own, as long as the longest.

    Args:
        lengths: tokens of each example in each row.
        labels: of each row.
    """
    padded = CANNOT_MERGE.get(method.lower()) == VIRTUAL
    largest = max(lengths, key=lambda row: (len(row) * max(row) if padded else sum(row), len(row)))
    return list(largest), max(sum(label != IGNORE for label in row) for row in labels)


def read_config(base_model: Path) -> Any:
    """A model's configuration.

    Raises:
        InputError: there is none, or transformers knows no model of its kind.
    """
    from transformers import AutoConfig

    file = base_model / "config.json" if base_model.is_dir() else base_model
    if not file.is_file():
        raise InputError(f"{base_model}: no config.json there", "name the folder of a model or its config.json")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: not a configuration that transformers knows: {str(error).splitlines()[0]}", "name another model"
        ) from None


def resident() -> int:
    """Bytes this process will hold beside the training's tensors on a CPU: it imports what training imports, and reads its resident size."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import psutil
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    return int(psutil.Process().memory_info().rss) + STARTED


def _like_the_trainer(model: Any, base: Any, gradient_checkpointing: bool) -> None:
    """What TRL's SFTTrainer does to a model before its first step."""

    if gradient_checkpointing:
        base.activation_checkpointing_enable()
        if model is not base:
            model.enable_input_require_grads()
    model.train()


def _tensors(model: Any) -> Iterator[Any]:
    """Everything a model holds, the scales of 4-bit weights included."""
    import torch

    for tensor in [*model.parameters(), *model.buffers()]:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        for part in (state, getattr(state, "state2", None)) if state is not None else ():
            yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor))


def _batch(lengths: Sequence[int], packs: bool) -> dict[str, Any]:
    """A forward pass of examples of these lengths, shaped as `sft.collate` and `methods.apart` shape it."""
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


def _read(ledger: _Ledger, base: Any, lengths: Sequence[int]) -> None:
    """A forward pass of training/methods/feature_extraction.py."""
    import torch

    batch = _batch(lengths, packs=False)
    with torch.no_grad(), ledger.mode(), ledger.attention():
        base.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def _passes(ledger: _Ledger, tunable: PreparedModel, base: Any, lengths: Sequence[int], counted: int, passes: int) -> None:
    """Forward and backward passes of training/trainers/sft/sft.py on the meta device, counted by the ledger."""
    import torch
    from torch.nn.functional import cross_entropy

    for parameter in tunable.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(ledger.is_gradient)
    batch = _batch(lengths, tunable.packs)
    where = torch.zeros(counted, dtype=torch.long, device="meta")
    for _ in range(passes):
        with ledger.mode(), ledger.attention(), _autocast():
            hidden = tunable.hidden_states(batch)
            scores = base.get_output_embeddings()(hidden[:, :-1].flatten(0, 1)[where]).float()
            losses = cross_entropy(scores, where, reduction="none")
            weights = torch.ones_like(losses)
            loss = (losses * weights).sum() / weights.sum()
            more = tunable.extra_loss(tunable.model)
            loss = loss if more is None else loss + more
            del hidden, scores, losses, more
            torch.autograd.backward(loss)
            del loss


@contextmanager
def _autocast() -> Iterator[None]:
    """Within it, torch.autocast does on the meta device what it does on a CPU; torch itself knows none there.

    A weight that learns is converted once while it lasts, all else at each product (torch's autocast_mode.cpp, cached_cast).
    """
    import torch

    functions, autocast = torch.nn.functional, torch.autocast
    linear, copies = functions.linear, dict[int, Any]()

    def low(value: Any) -> Any:
        if value is None or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.get_autocast_dtype("cpu"))
        if id(value) not in copies:
            copies[id(value)] = value.to(torch.get_autocast_dtype("cpu"))
        return copies[id(value)]

    def lowered(input: Any, weight: Any, bias: Any = None) -> Any:
        return linear(*map(low, (input, weight, bias))) if torch.is_autocast_enabled("cpu") else linear(input, weight, bias)

    def on_cpu(device_type: str, **how: Any) -> Any:
        return autocast("cpu", **how)

    with (
        patch.object(torch, "autocast", on_cpu),
        patch.object(torch, "clear_autocast_cache", copies.clear),
        patch.object(functions, "linear", lowered),
    ):
        yield


class Account:
    """Bytes that live in each part, and the most that ever did."""

    def __init__(self) -> None:
        self.live = {"weights": 0, "gradients": 0, "activations": 0, "logits": 0}
        self.peak = dict(self.live)
        self.highest = self.now = 0
        self._small = Counter[int]()  # size of a block that glibc keeps -> bytes that live in such blocks
        self._most = Counter[int]()  # the same at its most
        self._at_peak = 0  # bytes in all of them at the peak

    def apply(self, event: StorageEvent) -> None:
        before, after, size = event
        if before and after:
            self.live[before] -= size
            self.live[after] += size
            return
        part, change = (before, -size) if before else (after, size)
        self.live[part] += change
        self.now += change
        if size <= LARGE_BLOCK and part != "weights":
            self._small[size] += change
            self._most[size] = max(self._most[size], self._small[size])
        if self.now > self.highest:
            self.highest, self.peak, self._at_peak = self.now, dict(self.live), self._small.total()

    @property
    def fragmentation(self) -> int:
        """Bytes held beside the peak, if a freed block is used again for its own size alone."""
        return self._most.total() - self._at_peak


class _Ledger:
    """Records storages of the meta device from birth to death, and notes the operations between."""

    def __init__(self, vocabulary: int, timed: bool = True) -> None:
        self.vocabulary, self.timed = vocabulary, timed
        self.events: list[StorageEvent] = []
        self.operations = Operations()
        self._known: dict[int, tuple[str, int, Any]] = {}

    def born(self, tensor: Any, part: str) -> None:
        """Count the tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (part, size, weakref.ref(storage, lambda _: self._dead(key)))
        self.events.append(("", part, size))

    def _dead(self, key: int) -> None:
        part, size, _ = self._known.pop(key)
        self.events.append((part, "", size))

    def passing(self, size: int) -> None:
        """Bytes that a kernel takes for as long as it runs."""
        self.events += [("", "activations", size), ("activations", "", size)]

    def is_gradient(self, parameter: Any) -> None:
        key = parameter.grad.untyped_storage()._cdata
        part, size, alive = self._known[key]
        self.events.append((part, "gradients", size))
        self._known[key] = ("gradients", size, alive)

    def mode(self) -> Any:
        """Within it, every operation is counted."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        ledger = self

        def tensors(values: Any) -> list[Any]:
            return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.device.type == "meta"]

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
                    return False  # a meta tensor has no value. The one question asked: is a batch not packed? It is.
                out = func(*args, **(kwargs or {}))
                found = tensors(out)
                if ledger.timed and (found or tensors((args, kwargs))):
                    ledger.operations.note(func, *args, **(kwargs or {}))
                for tensor in found:
                    ledger.born(tensor, "logits" if tensor.shape and tensor.shape[-1] == ledger.vocabulary else "activations")
                if func._schema.name == "bitsandbytes::gemm_4bit":  # with more than a few rows it makes a passing copy of the matrix
                    ledger.passing(args[2][0] * args[2][1] * args[0].element_size())
                return out

        return Counting()

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Within it, attention is the fused kernel's: it keeps query, key, value, output and log-sum-exp (Dao et al. 2022), no scores.

        On the meta device torch itself would take the path that keeps the scores.
        """
        import torch

        ledger = self

        class Fused(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any, causal: bool) -> Any:
                out = torch.empty_like(query)
                ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32), bias)
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
                query, key, value = (given.to(torch.get_autocast_dtype("cpu")) for given in (query, key, value))
            bias = None if attn_mask is None else attn_mask.to(query.dtype)  # the kernel wants one
            return Fused.apply(query, key, value, bias, is_causal)

        with patch.object(torch.nn.functional, "scaled_dot_product_attention", fused):
            yield


@contextmanager
def _answering() -> Iterator[None]:
    """For methods that ask a tensor for its value while they are built: a meta tensor has none, and zero is answered."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Zero(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
                return 0
            return func(*args, **(kwargs or {}))

    with Zero():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _bytes(tensor: Any) -> int:
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def _elements(parameter: Any) -> int:
    """Numbers a parameter stands for; a 4-bit weight is stored two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel() if state is not None else parameter.numel())


def _state_bytes(parameter: Any, optim: str) -> int:
    """What an optimizer keeps of a parameter."""
    n = int(parameter.numel())
    if "8bit" in optim:
        return 2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n
    if "adamw" not in optim:
        return int(n * 4 * OPTIMIZER_MEMORY[optim])
    return 2 * n * int(parameter.element_size()) + 4


def _loading(base_model: Path, base: Any, stored: Any) -> int:
    """Bytes resident on a CPU while weights are read and converted: the file, mapped into memory, and what is made of it."""
    files = list(base_model.glob("*.safetensors")) if base_model.is_dir() else []
    size = sum(file.stat().st_size for file in files) or sum(map(_elements, base.parameters())) * stored.itemsize
    return size + sum(_bytes(tensor) for tensor in _tensors(base))
