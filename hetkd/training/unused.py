"""Parameters of the student that get no gradient, which DDP would wait for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.distillation import Distillation
from hetkd.features.hooks import eval_mode


@contextmanager
def unused_parameters(distillation: Distillation, accelerator: Any) -> Iterator[None]:
    """Let several processes train a student some of whose parameters get no gradient.

    A forward and a backward of two random images in eval mode find them. What leads to logits alone is frozen while
    the context lasts if no loss compares logits: DDP sees them among the outputs and waits. For all others (a branch
    that these images did not take, layers behind the last tapped stage) DDP looks at each step which were used.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    # A student that FSDP is to shard may not fit on one device.
    device = torch.device("cpu") if accelerator.is_fsdp2 else accelerator.device
    of_logits, others = _unused_parameters(distillation, device)
    if others:
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    for parameter in of_logits:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in of_logits:
            parameter.requires_grad_(True)


def _unused_parameters(
    distillation: Distillation, device: torch.device
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that lead to logits alone, which no loss compares, and the others without a gradient."""
    student = distillation.student_tap
    student.to(device)
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained]
    images = torch.rand(2, student.spec.channels, *student.size, generator=torch.Generator().manual_seed(0))
    with eval_mode(student.model), torch.enable_grad():
        features = student.run(images.to(device))
        lead_to_maps = _that_lead_to(features.maps, trained)
        lead_to_logits = _that_lead_to([features.logits], trained)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    compares_logits = distillation.method.uses_student_logits
    of_logits = [] if compares_logits else [p for p in trained if id(p) in lead_to_logits - lead_to_maps]
    return of_logits, [p for p in trained if id(p) not in lead_to_logits | lead_to_maps]


def _that_lead_to(outputs: Sequence[Tensor | None], parameters: list[nn.Parameter]) -> set[int]:
    for parameter in parameters:
        parameter.grad = None
    sums = [output.float().sum() for output in outputs if output is not None and output.requires_grad]
    if sums:
        torch.stack(sums).sum().backward(retain_graph=True)
    return {id(parameter) for parameter in parameters if parameter.grad is not None}
