"""What a training step will hold in memory and compute, told from the model's configuration alone.

The account is the step itself: model and method are built on torch's meta device, where tensors have shapes and dtypes but no storage,
one forward and backward pass runs there with the training's own code, and every storage is counted from its birth to its death. So what
autograd keeps for a frozen layer, for DoRA's norms or under checkpointing is not estimated but looked up. A second for a 7B model.

All in bytes; n = elements, b = bytes per element of the dtype:

    weights       sum of n b over parameters and buffers. 4-bit (Dettmers et al. 2023, QLoRA, section 3): n / 2 for nf4, n / 64 for the
                  8-bit scale of each block of 64, 4 n / (64 x 256) for the scales' own: 0.516 bytes a weight; embeddings, output layer
                  and norms stay in the compute dtype. On a CPU the mapped file counts as long as a tensor lies in it.
    gradients     n b of each trained parameter, from when the backward pass reaches it until the optimizer's step. Accumulation keeps
                  them through the next pass, so two passes are counted then.
    optimizer     AdamW: two states in the parameter's own dtype, 2 n b (torch.optim.AdamW makes them by zeros_like), and a step of 4
                  bytes. 8-bit: 2 n, and 2 x 4 bytes a block of 256 (Dettmers et al. 2022, 8-bit Optimizers, section 2); parameters
                  under 4,096 elements stay in 32 bits. PEFT keeps adapters in float32 whatever the model's dtype.
    activations   what autograd keeps, and passing results. In the way of Korthikanti et al. 2022, section 4.1 (34 h + 5 a s a token
                  and layer for GPT in 16 bits, with dropout), a Llama layer all of whose weights learn keeps, with h hidden, f
                  intermediate and a heads, in bytes a token:
                      bfloat16  26 h +  8 f + 4 a + 8        float32  44 h + 16 f + 4 a + 8
                  two norms of 8 h + 4 (the float32 copy, the normed values and the output, 12 h + 4 in float32), attention b (4 h) +
                  4 a (query, key and value repeated to all heads, output, log-sum-exp; no scores: the kernel computes them again),
                  b h into the output projection, b (4 f) in SwiGLU. A frozen matrix does not keep its input; a layer below the
                  lowest trained one keeps nothing.
    logits        whatever has the vocabulary as last dimension. At the most, in the loss's backward pass, counted positions x vocabulary
                  x 4 x 3: the log-softmax that was kept, its gradient and that of the scores, all in float32.
    runtime       libraries and their state. On a CPU the resident size of a process that has imported them, measured on this machine;
                  on a GPU the CUDA context and cuBLAS workspace, CUDA_RUNTIME.

Not in it: kernels' scratch, and what an allocator keeps of freed memory (benchmarks/memory.py prints predicted against measured).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dagster_project.errors import InputError
from dagster_project.training.attention import attention_for
from dagster_project.training.methods import CANNOT_MERGE, VIRTUAL, peft_config

OWN_WEIGHTS = ("full", "bitfit", "feature_extraction")
"""Methods that train the model's own parameters: all of them, its biases, its output layer."""

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
    runtime: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Prediction:
    """What one way of training a model takes."""

    memory: Memory
    trainable: int
    """Parameters that learn."""
    total: int
    flops: int
    """Operations in matrix products of an optimizer step's passes; a multiplication and an addition are two."""
    moved: int
    """Bytes that all other operations of these passes and the optimizer's step read and write."""


def predict(
    base_model: Path,
    method: str,
    options: dict[str, Any],
    *,
    tokens: int,
    counted: int,
    dtype: Any,
    device: str,
    runtime: int,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    optim: str = "adamw_torch",
    quantize: bool = False,
    where: str = "adapter",
) -> Prediction:
    """Peak memory and work of training, from the configuration alone. Random states of torch stay as they are.

    Args:
        base_model: folder with a config.json, or such a file; weights are not needed.
        method: a name that `methods.build` takes.
        options: the method's keys.
        tokens: of the largest forward pass, all its rows together.
        counted: positions of it that count in the loss.
        dtype: the model's, torch.float32 or torch.bfloat16.
        device: "cpu" or "cuda", where training will run; it need not be here.
        runtime: bytes, see `resident`; on "cuda" give CUDA_RUNTIME.
        optim: transformers' name of an AdamW, in 8 bits where it says so.
        quantize: hold frozen matrices in nf4 with double quantization (implied by qlora and qdora).
        where: dotted place in params.yaml, for messages.
    Raises:
        InputError: no configuration, unknown method or key, or one that does not suit the model.
    """
    import torch

    config = read_config(base_model)
    stored = config.dtype or torch.float32  # building the model will set it
    method = method.lower()
    quantize = quantize or method in ("qlora", "qdora")
    ledger = _Ledger(config.get_text_config().vocab_size)
    with torch.random.fork_rng(devices=[]):
        base, model = _build(config, method, options, torch.device(device), dtype, quantize, where)
        if gradient_checkpointing:
            base.gradient_checkpointing_enable()
            if model is not base:
                model.enable_input_require_grads()
        model.train()
        with _quiet():
            _passes(ledger, base, model, tokens, counted, passes=min(2, gradient_accumulation_steps))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # read without conversion, embeddings lie in the mapped file and keep it resident, matrices that were quantized from it included
    mapped = _replaced(base) * stored.itemsize if device == "cpu" and quantize and stored == dtype else 0
    # what learns is float32: adapters are so in the model already; own weights stand beside the copies that autocast computes with
    beside = method in ("full", "bitfit") and dtype != torch.float32
    masters = 4 * sum(parameter.numel() for parameter in learning) if beside else 0
    states = sum(_state_bytes(parameter, optim) for parameter in learning) * (2 if beside else 1)
    parts = {
        **ledger.peak,
        "weights": ledger.peak["weights"] + mapped + masters,
        "gradients": ledger.peak["gradients"] * (2 if beside else 1),
    }
    peak = Memory(**parts, optimizer=states, runtime=runtime)
    loading = 0 if device != "cpu" or (stored == dtype and not quantize) else _loading(base_model, base, stored)
    if loading > peak.total - runtime:
        peak = Memory(weights=loading, gradients=0, optimizer=0, activations=0, logits=0, runtime=runtime)
    held = sum(_bytes(parameter) for parameter in learning)
    return Prediction(
        peak,
        trainable=sum(parameter.numel() for parameter in learning),
        total=sum(_elements(parameter) for parameter in model.parameters()),
        flops=ledger.flops * gradient_accumulation_steps // ledger.passes,
        moved=ledger.moved * gradient_accumulation_steps // ledger.passes + 3 * held + 2 * states,
    )


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


def peak(device: str) -> int:
    """The most bytes that this process has held so far: resident on a CPU, what torch has allocated on a GPU."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _build(config: Any, method: str, options: dict[str, Any], device: Any, dtype: Any, quantize: bool, where: str) -> tuple[Any, Any]:
    """(base model, what is trained) on the meta device; the same object for a method that trains the model's own weights."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    virtual = CANNOT_MERGE.get(method) == VIRTUAL
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa" if virtual else attention_for(device))
    adapter = None if method in OWN_WEIGHTS else _adapter(method, options, where, base)
    if quantize:
        _to_four_bits(base, dtype)
    if adapter is None:
        _unfreeze(base, method, where)
        return base, base
    try:
        with torch.device("meta"), _answering():
            model = get_peft_model(base, adapter)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"params.yaml: {where}.peft: {str(error).splitlines()[0]}", "correct the keys named") from None
    if quantize:  # as TRL does (SFTTrainer.__init__)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"params.yaml: {where}: {method} leaves no parameter to train in this model", "choose other target_modules")
    return base, model


def _adapter(method: str, options: dict[str, Any], where: str, base: Any) -> Any:
    """The PEFT configuration, less a start that is computed from the weights (pissa, olora, ...): it has the same shapes as any other."""
    kept = {key: value for key, value in options.items() if key != "init_lora_weights" or isinstance(value, bool)}
    return peft_config(method, kept, where, base, total_steps=100)


def _unfreeze(base: Any, method: str, where: str) -> None:
    """Let the model's own parameters learn: all, the biases, or the output layer (of its own, also where it was the input's twin)."""
    import torch

    for name, parameter in base.named_parameters():
        parameter.requires_grad_(method == "full" or (method == "bitfit" and name.endswith(".bias")))
    if method == "feature_extraction":
        head = base.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    if not any(parameter.requires_grad for parameter in base.parameters()):
        raise InputError(f"params.yaml: {where}: {method} leaves no parameter to train in this model", "it has none such; choose lora")


def _to_four_bits(base: Any, dtype: Any) -> None:
    """Put every linear layer but the output's into nf4 with double quantization, as transformers' BitsAndBytesConfig does."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for name, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not base.get_output_embeddings():
            held = Linear4bit(
                module.in_features,
                module.out_features,
                module.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            held.weight = Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=held
            )._quantize("meta")
            if held.bias is not None:
                held.bias.data = held.bias.data.to(dtype)
            base.set_submodule(name, held)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    base.is_loaded_in_4bit = True


def _tensors(model: Any) -> Iterator[Any]:
    """Everything a model holds, the scales of 4-bit weights included."""
    import torch

    for tensor in [*model.parameters(), *model.buffers()]:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        for part in (state, getattr(state, "state2", None)) if state is not None else ():
            yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor))


def _passes(ledger: _Ledger, base: Any, model: Any, tokens: int, counted: int, passes: int) -> None:
    """Forward and backward passes of training/sft.py on the meta device, counted by the ledger."""
    import torch
    from torch.nn.functional import cross_entropy

    ledger.passes = passes
    for tensor in _tensors(model):
        ledger.born(tensor, "weights")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(ledger.is_gradient)
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    where = torch.zeros(counted, dtype=torch.long, device="meta")
    learnt = getattr(model, "active_peft_config", None)
    for _ in range(passes):
        with ledger.mode(), ledger.attention():
            if learnt is not None and learnt.is_prompt_learning:
                prompts = model.get_prompt(batch_size=1)
                if learnt.peft_type.value == "PREFIX_TUNING":
                    given: dict[str, Any] = {"input_ids": ids, "past_key_values": prompts}
                else:
                    given = {"inputs_embeds": torch.cat([prompts.to(base.dtype), base.get_input_embeddings()(ids)], 1)}
                hidden = base.base_model(**given, use_cache=False).last_hidden_state
            else:
                bounds = torch.tensor([0, tokens], dtype=torch.int32, device="cpu")
                hidden = base.base_model(
                    input_ids=ids, position_ids=torch.zeros_like(ids), cu_seq_lens_q=bounds, use_cache=False
                ).last_hidden_state
            scores = base.get_output_embeddings()(hidden[:, :-1].squeeze(0)[where]).float()
            losses = cross_entropy(scores, where, reduction="none")
            weights = torch.ones_like(losses)
            loss = (losses * weights).sum() / weights.sum()
            del hidden, scores, losses
            torch.autograd.backward(loss)
            del loss


class _Ledger:
    """Counts storages of the meta device from birth to death, and the work between."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.live = {"weights": 0, "gradients": 0, "activations": 0, "logits": 0}
        self.peak = dict(self.live)
        self.highest = self.now = self.flops = self.moved = 0
        self.passes = 1
        self._known: dict[int, tuple[str, int, Any]] = {}

    def born(self, tensor: Any, part: str) -> bool:
        """Whether the tensor's storage was unknown so far."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        self._known[key] = (part, storage.nbytes(), weakref.ref(storage, lambda _: self._dead(key)))
        self.live[part] += storage.nbytes()
        self.now += storage.nbytes()
        if self.now > self.highest:
            self.highest, self.peak = self.now, dict(self.live)
        return True

    def _dead(self, key: int) -> None:
        part, size, _ = self._known.pop(key)
        self.live[part] -= size
        self.now -= size

    def passing(self, size: int) -> None:
        """Bytes that a kernel takes for as long as it runs."""
        if self.now + size > self.highest:
            self.highest, self.peak = self.now + size, {**self.live, "activations": self.live["activations"] + size}

    def is_gradient(self, parameter: Any) -> None:
        key = parameter.grad.untyped_storage()._cdata
        part, size, alive = self._known[key]
        self.live[part] -= size
        self.live["gradients"] += size
        self._known[key] = ("gradients", size, alive)

    def mode(self) -> Any:
        """Within it, every operation is counted."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves
        from torch.utils.flop_counter import flop_registry

        ledger = self

        def tensors(values: Any) -> list[Any]:
            return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.device.type == "meta"]

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
                    return False  # a meta tensor has no value. The one question asked: is a batch not packed? It is.
                out = func(*args, **(kwargs or {}))
                found = tensors(out)
                made = [ledger.born(t, "logits" if t.shape and t.shape[-1] == ledger.vocabulary else "activations") for t in found]
                name = func._schema.name
                if name == "bitsandbytes::gemm_4bit":  # what it does with more than a few rows: a passing copy of the matrix, multiplied
                    elements = args[2][0] * args[2][1]
                    ledger.passing(elements * args[0].element_size())
                    ledger.moved += elements * args[0].element_size()
                    ledger.flops += 2 * elements * args[0].numel() // args[0].shape[-1]
                elif func._overloadpacket in flop_registry:
                    ledger.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
                elif (any(made) or func._schema.is_mutable) and not name.startswith("aten::empty"):
                    ledger.moved += sum(map(_bytes, found)) + sum(map(_bytes, tensors((args, kwargs))))
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
            def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any) -> Any:
                out = torch.empty_like(query)
                ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32), bias)
                ledger.flops += 2 * query.numel() * key.shape[-2]  # two products, 2 operations each, half of them masked
                return out

            @staticmethod
            def backward(ctx: Any, *gradient: Any) -> Any:
                query, key, value, *_ = ctx.saved_tensors
                ledger.flops += 5 * query.numel() * key.shape[-2]  # five products
                return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None

        def fused(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
            return Fused.apply(query, key, value, None if attn_mask is None else attn_mask.to(query.dtype))  # the kernel wants a bias

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


def _replaced(base: Any) -> int:
    """Elements of all matrices that are held in 4 bits."""
    return sum(_elements(parameter) for parameter in base.parameters() if getattr(parameter, "quant_state", None) is not None)


def _state_bytes(parameter: Any, optim: str) -> int:
    """What AdamW keeps of a parameter."""
    n = int(parameter.numel())
    if "8bit" in optim:
        return 2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n
    return 2 * n * int(parameter.element_size()) + 4


def _loading(base_model: Path, base: Any, stored: Any) -> int:
    """Bytes resident on a CPU while weights are read and converted: the file, mapped into memory, and what is made of it."""
    files = list(base_model.glob("*.safetensors")) if base_model.is_dir() else []
    size = sum(file.stat().st_size for file in files) or sum(map(_elements, base.parameters())) * stored.itemsize
    return size + sum(_bytes(tensor) for tensor in _tensors(base))
