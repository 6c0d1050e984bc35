"""Accelerate for a run: devices, precision, processes, DeepSpeed."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hetkd.distillation import Distillation
from hetkd.training.options import TrainingOptions

_FUSED = ("adam", "adamw", "sgd")


@contextmanager
def own_state_kept() -> Iterator[None]:
    """Give the user's own Accelerate state, if there is one, back after the context."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states: list[Any] = [PartialState, AcceleratorState, GradientState]
    before = [dict(state._shared_state) for state in states]
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True) if before[0] else ():
            state._shared_state.clear()
            state._shared_state.update(values)


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Compute gradients within the context, also under ``torch.no_grad()``.

    Raises:
        RuntimeError: Under ``torch.inference_mode()``, whose tensors never have gradients.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "fit needs gradients, which torch.inference_mode() rules out: make the models and call fit outside of it."
        )
    with torch.enable_grad():
        yield


def make_accelerator(options: TrainingOptions, folder: Path | None) -> Any:
    """Make the `accelerate.Accelerator` of a run, as the options and ``accelerate launch`` say.

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
    """End Gloo's threads before the interpreter: one that frees a tensor later aborts the process (pytorch#179291)."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def uses_deepspeed(accelerator: Any) -> bool:
    """Say whether DeepSpeed runs the training; its optimizer's state is in no checkpoint of `fit`."""
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def fused_update(optimizer: str, accelerator: Any) -> dict[str, bool]:
    """Return the option of PyTorch's own optimizers that makes an update one kernel: six times faster on a CPU."""
    is_plain = not (accelerator.is_fsdp2 or uses_deepspeed(accelerator))
    return {"fused": True} if optimizer in _FUSED and is_plain else {}


def prepare(
    distillation: Distillation,
    optimizer: torch.optim.Optimizer,
    accelerator: Any,
    options: TrainingOptions,
    batch_size: int,
) -> tuple[Any, Any]:
    """Wrap or shards a distiller and its optimizer, as `accelerate.Accelerator.prepare` does.

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
        distillation.student_inputs.to(accelerator.device)
        distillation.teachers.to(accelerator.device)
    model, wrapped = accelerator.prepare(distillation, optimizer)
    if accelerator.is_fsdp2:
        for method in ("predict", "predict_checked"):
            register_fsdp_forward_method(model, method)
    return model, wrapped


def _fill_in(settings: dict[str, Any], options: TrainingOptions, batch_size: int) -> None:
    """Fill in what DeepSpeed's configuration leaves open, before Accelerate does with figures of its own."""
    if settings.get("train_micro_batch_size_per_gpu", "auto") == "auto":
        settings["train_micro_batch_size_per_gpu"] = batch_size
    clip = options.clip_grad or 0.0
    if settings.get("gradient_clipping", "auto") == "auto":
        settings["gradient_clipping"] = clip
    elif options.clip_grad is not None and settings["gradient_clipping"] != clip:
        raise ValueError(
            f"clip_grad={clip}, but DeepSpeed's configuration has gradient_clipping={settings['gradient_clipping']}."
        )
