"""Parameters of the student that no loss depends on, frozen while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hetkd.distillation import Distillation
from hetkd.features.hooks import eval_mode


@contextmanager
def only_used_parameters(distillation: Distillation, device: torch.device) -> Iterator[None]:
    """Freeze, while the context lasts, the student's parameters that no loss of the method depends on.

    DDP would wait for their gradients: those of a classifier without a loss on logits, or of layers behind the last
    tapped stage. A forward and a backward of two images in eval mode find them.
    """
    unused = _unused_parameters(distillation, device)
    for parameter in unused:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in unused:
            parameter.requires_grad_(True)


def _unused_parameters(distillation: Distillation, device: torch.device) -> list[nn.Parameter]:
    student = distillation.student_tap
    student.to(device)
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained]
    images = torch.rand(2, student.spec.channels, *student.size, generator=torch.Generator().manual_seed(0))
    for parameter in trained:
        parameter.grad = None
    with eval_mode(student.model), torch.enable_grad():
        features = student.run(images.to(device))
        outputs = [*features.maps, *([features.logits] if distillation.method.uses_student_logits else [])]
        torch.stack([x.float().sum() for x in outputs if x is not None]).sum().backward()
    unused = [parameter for parameter in trained if parameter.grad is None]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    return unused
