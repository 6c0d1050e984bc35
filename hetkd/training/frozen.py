"""Parameters of the student that no loss depends on, frozen while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.distillation import Distillation
from hetkd.features.hooks import eval_mode


@contextmanager
def only_used_parameters(distillation: Distillation, device: torch.device) -> Iterator[None]:
    """Freeze, while the context lasts, the student's parameters that no loss of the method depends on.

    DDP would wait for their gradients: those of a classifier without a loss on logits, or of layers behind the last
    tapped stage. A forward and a backward of two images in eval mode find them.

    Raises:
        RuntimeError: In a backward within the context, if a part that these images did not reach gets a gradient.
    """
    unused, unreached = _unused_parameters(distillation, device)
    for parameter in unused:
        parameter.requires_grad_(False)
    watches = [module.register_forward_hook(partial(_watch_gradient, name)) for name, module in unreached.items()]
    try:
        yield
    finally:
        for watch in watches:
            watch.remove()
        for parameter in unused:
            parameter.requires_grad_(True)


def _unused_parameters(
    distillation: Distillation, device: torch.device
) -> tuple[list[nn.Parameter], dict[str, nn.Module]]:
    """Return the parameters without a gradient, and the modules that hold some and did not run."""
    student = distillation.student_tap
    student.to(device)
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained]
    images = torch.rand(2, student.spec.channels, *student.size, generator=torch.Generator().manual_seed(0))
    for parameter in trained:
        parameter.grad = None
    unreached = {
        name: module for name, module in student.model.named_modules() if any(True for _ in module.parameters(False))
    }
    watches = [m.register_forward_hook(partial(_cross_out, unreached, name)) for name, m in unreached.items()]
    with eval_mode(student.model), torch.enable_grad():
        features = student.run(images.to(device))
        outputs = [*features.maps, *([features.logits] if distillation.method.uses_student_logits else [])]
        torch.stack([x.float().sum() for x in outputs if x is not None]).sum().backward()
    for watch in watches:
        watch.remove()
    unused = [parameter for parameter in trained if parameter.grad is None]
    without = {id(parameter) for parameter in unused}
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    return unused, {
        name: module for name, module in unreached.items() if any(id(p) in without for p in module.parameters(False))
    }


def _cross_out(names: dict[str, nn.Module], name: str, *_: Any) -> None:
    names.pop(name, None)


def _watch_gradient(name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
    if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.is_floating_point()):
        return output
    if not output.requires_grad:
        output = output.detach().requires_grad_(True).clone()  # a leaf could not be changed in place
    output.register_hook(partial(_refuse_gradient, name))
    return output


def _refuse_gradient(name: str, gradient: Tensor) -> None:
    raise RuntimeError(
        f"the loss depends on the student's {name}, which the images that were tried at the start did not reach, so "
        "that several processes do not train it: make every image reach it, or train in one process."
    )
