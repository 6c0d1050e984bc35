"""How a run is spread over processes: Accelerate, sharded students, teachers that do not fit on one device."""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hetkd.adapter import eval_mode
from hetkd.compiling import blocks
from hetkd.tap import RecordedTap
from hetkd.training.options import TrainingOptions
from hetkd.training.teacher_cache import fingerprint_model

if TYPE_CHECKING:
    from hetkd.distiller import Distiller

_FUSED = ("adam", "adamw", "sgd")
_FORWARD_METHODS = ("forward_intermediates", "forward_features", "forward_head")
"""What adapters call beside ``forward``."""


def make_accelerator(options: TrainingOptions, folder: Path | None) -> Any:
    """Makes the `accelerate.Accelerator` of a run, as the options and ``accelerate launch`` say.

    Raises:
        RuntimeError: If other processes were launched than train together.
        ValueError: If Accelerate's configuration asks for what `fit` cannot do.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration, DistributedType

    # Accelerate keeps its settings for the whole process; a second run may have others.
    AcceleratorState._reset_state(reset_partial_state=True)
    cpu = options.cpu or not torch.accelerator.is_available()
    PartialState(cpu=cpu)  # before anything else asks for it: only then do several processes on CPUs find each other
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation,
        cpu=cpu,
        log_with=list(options.trackers) or None,
        project_dir=None if folder is None else str(folder),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"{launched} processes were launched, but this one trains with {accelerator.num_processes}: they would "
            "overwrite each other's files. Unset WORLD_SIZE, or launch with accelerate launch or torchrun."
        )
    if accelerator.gradient_accumulation_steps != options.gradient_accumulation:
        raise ValueError(
            f"gradient_accumulation={options.gradient_accumulation}, but Accelerate's configuration says "
            f"{accelerator.gradient_accumulation_steps}: set both alike."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("Accelerate's configuration asks for FSDP 1: set fsdp_version: 2 there.")
        if options.ema is not None:
            raise ValueError(f"ema={options.ema} cannot average a student that FSDP shards: leave it out.")
    if uses_deepspeed(accelerator) and accelerator.deepspeed_plugin.zero_stage == 3:
        raise ValueError("DeepSpeed's stage 3 shards the student's weights: use stage 2, or FSDP 2.")
    return accelerator


@atexit.register
def _end_gloo() -> None:
    """Ends Gloo's threads before the interpreter: one that frees a tensor later aborts the process (pytorch#179291)."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def uses_deepspeed(accelerator: Any) -> bool:
    """Says whether DeepSpeed runs the training; its optimizer's state is in no checkpoint of `fit`."""
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


@contextmanager
def only_used_parameters(distiller: Distiller, device: torch.device) -> Iterator[None]:
    """Freezes, while the context lasts, the student's parameters that no loss of the method depends on.

    A classifier without a loss on logits, or layers behind the last tapped stage, get no gradient, for which
    DDP would wait. They are found by a forward and a backward of two images in eval mode.
    """
    unused = _unused_parameters(distiller, device)
    for parameter in unused:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in unused:
            parameter.requires_grad_(True)


def _unused_parameters(distiller: Distiller, device: torch.device) -> list[nn.Parameter]:
    student = distiller.taps["student"]
    student.to(device)
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained]
    images = torch.rand(2, student.spec.channels, *student.size, generator=torch.Generator().manual_seed(0))
    for parameter in trained:
        parameter.grad = None
    with eval_mode(student.model), torch.enable_grad():
        features = student.run(images.to(device))
        outputs = [*features.maps, *([features.logits] if distiller.method.uses_student_logits else [])]
        torch.stack([x.float().sum() for x in outputs if x is not None]).sum().backward()
    unused = [parameter for parameter in trained if parameter.grad is None]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    return unused


def place_teachers(distiller: Distiller, placement: str, accelerator: Any) -> None:
    """Shards the teachers over the processes, or keeps them in main memory, block by block on the device as they run.

    Both are PyTorch's ``fully_shard``; offloading in one process is sharding over one.

    Args:
        distiller: Its teachers stay so afterwards.
        placement: ``"sharded"``, ``"offloaded"``, or ``"device"``: nothing is done.
        accelerator: Of the run.

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
    for role, tap in distiller.taps.items():
        if role == "student" or isinstance(tap, RecordedTap):
            continue
        if tap.placement != "device":
            if tap.placement != placement:
                raise ValueError(f"teacher_placement={placement!r}, but the {role} is {tap.placement} already.")
            continue
        tap.placement = placement
        tap.fingerprint = fingerprint_model(tap.model)
        for block in (*blocks(tap.model), tap.model):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        for method in _FORWARD_METHODS:
            if hasattr(tap.model, method):
                register_fsdp_forward_method(tap.model, method)


def fused_update(optimizer: str, accelerator: Any) -> dict[str, bool]:
    """Returns the option of PyTorch's own optimizers that makes an update one kernel: six times faster on a CPU."""
    is_plain = not (accelerator.is_fsdp2 or uses_deepspeed(accelerator))
    return {"fused": True} if optimizer in _FUSED and is_plain else {}


def prepare(
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    accelerator: Any,
    options: TrainingOptions,
    batch_size: int,
) -> tuple[Any, Any]:
    """Wraps or shards a distiller and its optimizer, as `accelerate.Accelerator.prepare` does.

    Raises:
        ValueError: If DeepSpeed's configuration contradicts the options.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    if uses_deepspeed(accelerator):
        _fill_in(accelerator.deepspeed_plugin.deepspeed_config, options, batch_size)
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        # All processes hold all weights already, and Accelerate's loading fails on buffers.
        plugin.cpu_ram_efficient_loading = False
        # Half precision is autocast's, as under DDP; weights in it would meet features in float32.
        plugin.mixed_precision_policy = None
        for tap in distiller.taps.values():
            tap.inputs.to(accelerator.device)
            if tap.role != "student":
                tap.to(accelerator.device)
    model, wrapped = accelerator.prepare(distiller, optimizer)
    if accelerator.is_fsdp2:
        register_fsdp_forward_method(model, "predict")
    return model, wrapped


def _fill_in(settings: dict[str, Any], options: TrainingOptions, batch_size: int) -> None:
    """Fills in what DeepSpeed's configuration leaves open, before Accelerate does with figures of its own."""
    if settings.get("train_micro_batch_size_per_gpu", "auto") == "auto":
        settings["train_micro_batch_size_per_gpu"] = batch_size
    clip = options.clip_grad or 0.0
    if settings.get("gradient_clipping", "auto") == "auto":
        settings["gradient_clipping"] = clip
    elif options.clip_grad is not None and settings["gradient_clipping"] != clip:
        raise ValueError(
            f"clip_grad={clip}, but DeepSpeed's configuration has gradient_clipping={settings['gradient_clipping']}."
        )


def copy_for_sharding(distiller: Distiller) -> Distiller:
    """Returns a copy to be sharded by FSDP, which changes modules for good; the teachers are the same."""
    memo: dict[int, Any] = {id(tap): tap for role, tap in distiller.taps.items() if role != "student"}
    sharded = copy.deepcopy(distiller, memo)
    # Where Accelerate's wrapping policy looks for the blocks of a transformer.
    sharded._no_split_modules = sorted({type(block).__name__ for block in blocks(distiller.student)})  # type: ignore[assignment]
    return sharded


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gathers the state dicts of a sharded model and its optimizer on the first process, in main memory."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_sharded_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], moments: dict[str, Any]
) -> None:
    """Shards out what `sharded_state` gathered; every process has all of it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=StateDictOptions(full_state_dict=True),
    )


def unsharded_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gathers the state dict of a sharded model in the main memory of every process, one tensor after another."""
    from torch.distributed.tensor import DTensor

    state: dict[str, Tensor] = model.state_dict()
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).cpu() for name, x in state.items()}


def share_buffers(model: nn.Module) -> None:
    """Gives all processes the buffers of the first one: running statistics, for example.

    DDP does so before each forward, but what is evaluated comes after the last.
    """
    for buffer in model.buffers():
        shared = buffer.contiguous()
        dist.broadcast(shared, 0)
        if shared is not buffer:
            buffer.copy_(shared)


def local_part(parameter: Tensor) -> Tensor:
    """Returns what this process holds of a parameter."""
    to_local: Any = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()
