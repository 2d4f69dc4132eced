"""FSDP2 (torch.distributed.fsdp.fully_shard): each process keeps a part of every weight, gradient and optimizer state.

A layer's weights are gathered while it computes and freed afterwards; gradients are summed where their part of the weight is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.training.methods.build import PreparedModel, causal, quantization_of
from dagster_project.training.trainers.harness import distributed
from dagster_project.training.trainers.harness.params import AUTO, AdapterParams, Sharding

if TYPE_CHECKING:
    import torch

METHODS = ("full", "lora", "rslora", "qlora")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
FOLDER = "shards"
"""Folder of a checkpoint with the parts of all processes, written by torch.distributed.checkpoint as safetensors."""


def check(entry: AdapterParams, compute: Compute, where: str) -> None:
    """Refuse what is not supported with `sharding`.

    Args:
        where: dotted path of the entry in params.yaml.
    Raises:
        InputError: there is such a setting.
    """
    if entry.sharding is None:
        return
    if compute.processes == 1:
        raise InputError(f"params.yaml: {where}.sharding: one process has nothing to share", "set compute.processes, or leave it out")
    refused = {
        "method": entry.method.lower() not in METHODS and f"{entry.method} is not supported with sharding; use {', '.join(METHODS)}",
        "optim": entry.optim not in OPTIMIZERS and f"{entry.optim} is not supported with sharding; use {', '.join(OPTIMIZERS)}",
        "learning_rate": str(entry.learning_rate) == AUTO and "trials run in one process, which the model does not fit; set a number",
        "compile": entry.compile != "none" and "is not supported with sharding; leave it out",
        "use_liger_kernel": entry.use_liger_kernel and "is not supported with sharding; leave it out",
        "sharding.cpu_offload": entry.sharding.cpu_offload
        and quantization_of(entry.method, entry.quantization) != "none"
        and "4-bit weights are not supported on the CPU; leave it out",
    }
    for key, why in refused.items():
        if why:
            what, _, hint = str(why).partition("; ")
            raise InputError(f"params.yaml: {where}.{key}: {what}", hint)


def shard(prepared: PreparedModel, layers: Sequence[Any], settings: Sharding, device: torch.device) -> Any:
    """Keep only this process' parts of the model's weights.

    Args:
        layers: the decoder layers; each is gathered as a whole.
        device: of the computation.
    Returns:
        A module that computes the logits of positions with labels, see `_logits_class`. The model must only be called through it.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

    offload = settings.cpu_offload and device.type != "cpu"
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (distributed.place().size,)),
        "reshard_after_forward": settings.fsdp == "full_shard",
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    torch.set_autocast_cache_enabled(False)  # it would keep a copy of every gathered weight
    for layer in layers:
        fully_shard(layer, **options)
    root = fully_shard(_logits_class()(prepared), **options)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum: each pass is divided by the number of passes already
            module.set_force_sum_reduction_for_comms(True)
    if offload:
        prepared.model.to = lambda *_, **__: prepared.model  # neither the Trainer nor accelerate may move it to the GPU
    return root


@cache
def _logits_class() -> type:
    import torch

    class Logits(torch.nn.Module):
        """The root of the sharded modules: whatever computes with a weight outside the layers does it in its forward pass."""

        def __init__(self, prepared: PreparedModel) -> None:
            super().__init__()
            self.model, self.prepared = prepared.model, prepared

        def forward(self, inputs: Mapping[str, Any], counted: torch.Tensor) -> torch.Tensor:
            hidden = self.prepared.hidden_states(inputs)
            return causal(self.model).get_output_embeddings()(hidden[:, :-1][counted])

    return Logits


def free_gathered(root: Any) -> None:
    """Free gathered weights after a forward pass without a backward pass. With `shard_grad_op` they would be kept, and the
    next pass would use them although the optimizer has changed the parts."""
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unshard(model: Any) -> None:
    """Gather the whole weights in the first process, on the CPU. The model cannot be trained any more."""
    import torch
    from torch.distributed.tensor import DTensor

    first = distributed.place().rank == 0
    gathered: dict[int, torch.nn.Parameter | None] = {}
    for module in model.modules():
        for name, part in list(module._parameters.items()):
            if not isinstance(part, DTensor):
                continue
            if id(part) not in gathered:  # tied weights are one parameter of two modules
                whole = part.detach().full_tensor()
                gathered[id(part)] = torch.nn.Parameter(whole.cpu(), requires_grad=part.requires_grad) if first else None
            if first:
                module._parameters[name] = gathered[id(part)]
    if first and getattr(causal(model), "is_loaded_in_4bit", False):
        from bitsandbytes.nn.modules import Linear4bit, fix_4bit_weight_quant_state_from_module

        for module in model.modules():
            if isinstance(module, Linear4bit):
                fix_4bit_weight_quant_state_from_module(module)


def is_sharded(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def norm_value(norm: Any) -> Any:
    """A gradient norm as a plain tensor, the same in every process."""
    return norm.full_tensor() if is_sharded(norm) else norm


def write(folder: Path, parts: Mapping[str, torch.Tensor]) -> None:
    """Write this process' parts. All processes call it."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder / FOLDER), save_distributed=True)
    dcp.save(dict(parts), storage_writer=writer)


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
            optimizer.state[parameter][key] = tensors[f"optimizer.{number}.{key}"] = torch.zeros_like(parameter.detach())
    return tensors
