"""Students and teachers that do not fit on one device: sharded over processes, or kept in main memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hetkd.distillation import Distillation
from hetkd.teachers import Teachers, fingerprint_model
from hetkd.utils.compiling import blocks

_FORWARD_METHODS = ("forward_intermediates", "forward_features", "forward_head")
"""Methods that adapters call beside ``forward``."""


def place_teachers(teachers: Teachers, placement: str, accelerator: Any) -> None:
    """Shard the teachers over the processes, or keeps them in main memory, block by block on the device as they run.

    Both are PyTorch's ``fully_shard``; offloading in one process is sharding over one.

    Args:
        teachers: The placement lasts after the run.
        placement: ``"sharded"``, ``"offloaded"``, or ``"device"``: nothing is done.
        accelerator: The run's.

    Raises:
        ValueError: If an earlier run placed them elsewhere.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

    if placement == "device":
        return
    device = accelerator.device.type
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo" if device == "cpu" else None, store=store, rank=0, world_size=1)
    offload = placement == "offloaded"
    policy: OffloadPolicy = CPUOffloadPolicy(pin_memory=device != "cpu") if offload else OffloadPolicy()
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for tap in teachers.live:
        if tap.placement != "device":
            if tap.placement != placement:
                raise ValueError(f"teacher_placement={placement!r}, but the {tap.role} is {tap.placement} already.")
            continue
        tap.placement = placement
        tap.fingerprint = fingerprint_model(tap.model)
        for block in (*blocks(tap.model), tap.model):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        for method in _FORWARD_METHODS:
            if hasattr(tap.model, method):
                register_fsdp_forward_method(tap.model, method)


def copy_for_sharding(distillation: Distillation) -> Distillation:
    """Return a copy to be sharded by FSDP, which changes modules for good; the teachers are the same."""
    memo: dict[int, Any] = {id(tap): tap for tap in distillation.teachers.taps}
    sharded = copy.deepcopy(distillation, memo)
    # Where Accelerate's wrapping policy looks for the blocks of a transformer.
    names: Any = sorted({type(block).__name__ for block in blocks(distillation.student)})
    sharded._no_split_modules = names
    return sharded


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gather the state dicts of a sharded model and its optimizer on the first process, in main memory."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_sharded_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], moments: dict[str, Any]
) -> None:
    """Shard out what `sharded_state` gathered; every process has all of it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=StateDictOptions(full_state_dict=True),
    )


def unsharded_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather the state dict of a sharded model in the main memory of every process, one tensor after another."""
    from torch.distributed.tensor import DTensor

    state: dict[str, Tensor] = model.state_dict()
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).cpu() for name, x in state.items()}


def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first one: running statistics, for example.

    DDP does so before each forward, but what is evaluated comes after the last.
    """
    for buffer in model.buffers():
        shared = buffer.contiguous()
        dist.broadcast(shared, 0)
        if shared is not buffer:
            buffer.copy_(shared)


def local_part(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that this process holds."""
    to_local: Any = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()


@contextmanager
def synchronised_batchnorm(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """Let batch norms take their statistics over all processes while the context lasts.

    Raises:
        ValueError: On a CPU, where PyTorch has no such batch norm.
    """
    from timm.layers import convert_sync_batchnorm

    if accelerator.device.type == "cpu":
        raise ValueError("sync_batchnorm=True works on GPUs only: leave it out.")
    norms = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)
    }
    convert_sync_batchnorm(model)
    try:
        yield
    finally:  # with the same weights and statistics
        for path, module in norms.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
