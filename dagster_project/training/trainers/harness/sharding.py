"""FSDP2 through accelerate: each process keeps a part of every weight, gradient and optimizer state.

A layer's weights are gathered while it computes and freed afterwards; gradients are summed where their part of the
weight is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.params import Compute
from dagster_project.training.methods.build import causal, decoder_layers
from dagster_project.training.methods.options import quantization_of
from dagster_project.training.trainers.harness import distributed
from dagster_project.training.trainers.harness.params import AUTO, PreferenceParams, SftParams, Sharding

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

METHODS = ("full", "lora", "rslora", "qlora")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
FOLDER = "shards"
"""Folder of a checkpoint with the parts of all processes, written by torch.distributed.checkpoint as safetensors."""


def check(
    entry: SftParams | PreferenceParams, compute: Compute, where: str, method: str, optim: str | None = None
) -> None:
    """Refuse what is not supported with `sharding`.

    Args:
        where: dotted path of the entry in params.yaml.
        method: how the weights are trained: full, lora, ...
        optim: the optimizer; None: that of the entry.
    Raises:
        InputError: there is such a setting.
    """
    settings: Sharding | None = getattr(entry, "sharding", None)
    if settings is None:
        return
    if compute.processes == 1:
        problem = f"params.yaml: {where}.sharding: one process has nothing to share"
        raise InputError(problem, "set compute.processes, or leave it out")
    optim = optim or entry.optim
    four_bit = quantization_of(method, getattr(entry, "quantization", None)) != "none"

    def refuse(key: str, problem: str, hint: str) -> None:
        raise InputError(f"params.yaml: {where}.{key}: {problem}", hint)

    if method.lower() not in METHODS:
        refuse("method", f"{method} is not supported with sharding", f"use {', '.join(METHODS)}")
    if optim not in OPTIMIZERS:
        refuse("optim", f"{optim} is not supported with sharding", f"use {', '.join(OPTIMIZERS)}")
    if str(entry.learning_rate) == AUTO:
        refuse("learning_rate", "trials run in one process, which the model does not fit", "set a number")
    for key in ("compile", "use_liger_kernel"):
        if getattr(entry, key, False) not in (False, "none"):
            refuse(key, "is not supported with sharding", "leave it out")
    if settings.cpu_offload and four_bit:
        refuse("sharding.cpu_offload", "4-bit weights are not supported on the CPU", "leave it out")


def shard(model: Any, settings: Sharding, device: torch.device, *more: Any) -> Any:
    """Keep only this process' parts of the model's weights.

    Args:
        model: each of its decoder layers is gathered as a whole.
        device: of the computation.
        more: further modules that are trained with it.
    Returns:
        A module that calls a function and returns its result, while everything outside the layers is gathered. The
        model must only be used in such a function.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
    from torch.distributed.fsdp import FSDPModule

    offload = settings.cpu_offload and device.type != "cpu"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=settings.fsdp == "full_shard",
        cpu_offload=offload,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted({type(layer).__name__ for layer in decoder_layers(model)}),
    )
    torch.set_autocast_cache_enabled(False)  # it would keep a copy of every gathered weight
    _store_4bit(model, torch.bfloat16)  # accelerate does not divide weights that are stored as integers
    root = _root_class()(model, *more)
    accelerator = Accelerator()
    # not an argument of Accelerator, which ignores it on CPUs; removed again because all Accelerators share this state,
    # and that of a Trainer would divide the rows itself
    accelerator.state.fsdp_plugin = plugin
    try:
        fsdp2_prepare_model(accelerator, root)
    finally:
        del accelerator.state.fsdp_plugin
    root.set_reshard_after_forward(plugin.reshard_after_forward, recurse=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum: each pass is divided by the number of passes already
            module.set_force_sum_reduction_for_comms(True)
    if offload:
        model.to = lambda *_, **__: model  # neither the Trainer nor accelerate may move it to the GPU
    return root


def _store_4bit(model: Any, dtype: torch.dtype) -> None:
    """Reinterpret the bytes of all 4-bit weights as numbers of another type. Other models are not changed."""
    if not getattr(causal(model), "is_loaded_in_4bit", False):
        return
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.quant_storage = dtype
            module.weight = Params4bit(
                module.weight.data.view(-1).view(dtype)[:, None],
                quant_state=module.quant_state,
                quant_storage=dtype,
                bnb_quantized=True,
            )


@cache
def _root_class() -> type:
    import torch

    class Root(torch.nn.Module):
        """The root of the sharded modules, in whose forward pass weights outside the layers are used."""

        def __init__(self, model: Any, *more: Any) -> None:
            super().__init__()
            self.model, self.more = model, torch.nn.ModuleList(more)

        def forward(self, compute: Callable[[], Any]) -> Any:
            return compute()

    return Root


class ShardedModel:
    """A model that is divided among the processes, or whole in each of them."""

    def __init__(self, model: Any, settings: Sharding | None, device: torch.device) -> None:
        """
        Args:
            settings: None for a whole model.
            device: of the computation. A model to be divided is on the CPU until then, so that it is never whole on a
                GPU; a quantized one is not.
        """
        self.model, self.settings, self.device = model, settings, device
        self.root: Any = None
        """See `shard`; None while the model is whole."""
        self._trained: list[Any] = []  # its parts that are trained

    @contextmanager
    def kept_in_place(self) -> Iterator[None]:
        """While open, a model to be divided cannot be moved: a Trainer would move the whole model to the GPU."""
        if self.settings is None:
            yield
            return
        self.model.to = lambda *_, **__: self.model
        try:
            yield
        finally:
            del self.model.to

    def divide(self, *more: Any) -> None:
        """Divide the model, and `more` modules that are trained with it. No effect without settings.

        One pass follows, because torch creates the gathered weights in the first: it has to run with the adapter
        enabled and outside inference mode.
        """
        import torch

        if self.settings is None:
            return
        self.root = shard(self.model, self.settings, self.device, *more)
        self._trained = [part for part in self.root.parameters() if part.requires_grad]
        with torch.no_grad(), torch.random.fork_rng(enabled=True):
            self.compute(self.idle)
        self.free()

    def free(self) -> None:
        """Free gathered weights after passes without a backward pass, see `free_gathered`."""
        free_gathered(self.root)
        # disabling an adapter changes whichever of part and gathered weight is in use at its begin and end
        for part in self._trained:
            part.requires_grad_(True)

    def compute(self, work: Callable[[], Result]) -> Result:
        """The result of a function that uses the model. All processes call it at the same time, with as many passes."""
        return self.root(work) if self.root is not None else work()

    @property
    def decoder(self) -> Any:
        return causal(self.model).base_model

    def idle(self) -> None:
        """A pass of two tokens, without a use for its result."""
        import torch

        two = torch.arange(2, device=self.device)[None]
        # for attention per example, see methods/attention.py
        ends = torch.tensor([0, 2], dtype=torch.int32, device=self.device)
        self.decoder(input_ids=two * 0, position_ids=two, cu_seq_lens_q=ends, max_length_q=2, use_cache=False)

    def join(self) -> None:
        """Gather the whole weights in the first process, see `unshard`."""
        if self.root is not None:
            unshard(self.model)
            self.root, self._trained = None, []


def in_step(models: Sequence[ShardedModel], work: Callable[[], Result]) -> Result:
    """The result of a function that uses models without gradients, where each process needs another number of passes.

    A process that has finished its own passes takes part in those of the others, because gathering a layer needs every
    process. All processes call it at the same time; those without work pass a function that does nothing. At any time,
    they may use only one of the models.
    """
    import torch

    divided = [model for model in models if model.root is not None]
    if not divided:
        return work()

    def announced(number: int | None) -> list[int]:
        """The processes that are about to run a pass of each model, after this one has announced its own."""
        counts = torch.zeros(len(divided), dtype=torch.int64)
        if number is not None:
            counts[number] = 1
        found: list[int] = distributed.summed(counts).tolist()
        assert sum(map(bool, found)) <= 1, "the processes use different models"
        return found

    def announce(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            announced(number)

        return hook

    def with_others() -> Result:
        hooks = [model.decoder.register_forward_pre_hook(announce(number)) for number, model in enumerate(divided)]
        result = work()
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            while any(found := announced(None)):
                divided[found.index(max(found))].idle()
        return result

    function = with_others
    for model in divided:
        function = partial(model.compute, function)
    result = function()
    for model in divided:
        model.free()
    return result


def free_gathered(root: Any) -> None:
    """Free gathered weights after a forward pass without a backward pass.

    With `shard_grad_op` they would be kept, and the next pass would use them although the optimizer has changed the
    parts.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unshard(model: Any) -> None:
    """Gather the whole weights in the first process, on the CPU. The model cannot be trained any more."""
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    first = distributed.place().rank == 0
    gathered: dict[int, torch.nn.Parameter | None] = {}
    for module in model.modules():
        # its class extends the module's own; `to` and `float` of it work on parts only
        if isinstance(module, FSDPModule):
            extended, fsdp, own, *_ = type(module).__mro__
            known = extended.__name__ == f"FSDP{own.__name__}" and fsdp is FSDPModule
            assert known, f"written for torch 2.13: {torch.__version__}"
            module.__class__ = own
        for name, part in list(module._parameters.items()):
            if not isinstance(part, DTensor):
                continue
            if id(part) not in gathered:  # tied weights are one parameter of two modules
                whole = part.detach().full_tensor()
                gathered[id(part)] = torch.nn.Parameter(whole.cpu(), part.requires_grad) if first else None
            if first:
                module._parameters[name] = gathered[id(part)]
    if first:
        _store_4bit(model, torch.uint8)


def is_sharded(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def norm_value(norm: Any) -> Any:
    """A gradient norm as a plain tensor, the same in every process."""
    return norm.full_tensor() if is_sharded(norm) else norm


def named(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under their names in a checkpoint of parts."""
    return {f"{prefix}.{name}": tensor.detach() for name, tensor in tensors.items()}


def asked_first(stop_requested: Callable[[], bool]) -> Callable[[], bool]:
    """Whether the first process was asked to stop, in all processes, which ask at the same time."""
    import torch

    return lambda: bool(distributed.from_first(torch.tensor(int(stop_requested()))))


def write(folder: Path, parts: Mapping[str, torch.Tensor]) -> None:
    """Write this process' parts. All processes call it, the first one when the folder exists: the others wait for it.

    Raises:
        PedigreeError: the folder is not on this host.
    """
    import torch.distributed.checkpoint as dcp

    distributed.document_from_first()
    if not folder.is_dir():
        problem = f"the folder of checkpoints, {folder.parent}, is not shared with this host"
        raise PedigreeError(problem, "share it among all hosts")
    writer = dcp.HuggingFaceStorageWriter(str(folder / FOLDER), save_distributed=True)
    dcp.save(dict(parts), storage_writer=writer)


def save(
    parts: Mapping[str, torch.Tensor], unfinished: Path, first: Callable[[Callable[[Path], None]], None] | None
) -> None:
    """Write a checkpoint. All processes call it; none goes on before it is complete.

    Args:
        parts: of this process.
        unfinished: folder in which the first process writes it.
        first: in the first process, writes a checkpoint with a function that adds the parts to a folder.
    """
    if first:
        first(partial(write, parts=parts))
    else:
        write(unfinished, parts)
    distributed.document_from_first()


def read(folder: Path, parts: Mapping[str, torch.Tensor]) -> None:
    """Read this process' parts into existing tensors. All processes call it."""
    import torch.distributed.checkpoint as dcp

    dcp.load(dict(parts), storage_reader=dcp.HuggingFaceStorageReader(str(folder / FOLDER)))


def split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Separate the sharded tensors of an optimizer's state.

    Args:
        state: as `checkpoint.optimizer_state` returns it.
    Returns:
        The state without them, but with their names in "sharded"; and the tensors by name.
    """
    plain = [{key: value for key, value in one.items() if not is_sharded(value)} for one in state["state"]]
    sharded = [[key for key, value in one.items() if is_sharded(value)] for one in state["state"]]
    tensors = {f"optimizer.{n}.{key}": state["state"][n][key] for n, keys in enumerate(sharded) for key in keys}
    return {**state, "state": plain, "sharded": sharded}, tensors


def join_optimizer(optimizer: Any, saved: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Create the sharded tensors of an optimizer's state, to be read into.

    Args:
        saved: the first result of `split_optimizer`, restored already.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, (parameter, keys) in enumerate(zip(parameters, saved["sharded"], strict=True)):
        for key in keys:
            empty = torch.zeros_like(parameter.detach())
            optimizer.state[parameter][key] = tensors[f"optimizer.{number}.{key}"] = empty
    return tensors
