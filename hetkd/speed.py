"""How large and how fast a model is, on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hetkd.distillation import Distillation
from hetkd.models.load import load_model
from hetkd.student import Student, load_student
from hetkd.utils.checks import whole_number

_SECONDS = 1.0


@dataclass(frozen=True)
class Speed:
    """What `bench` measured.

    Attributes:
        parameters: Of the model.
        megabytes: Of its weights in memory.
        gigaflops: Operations of a forward on one image, a multiplication and an addition counted as two.
        size: Height and width of the images in pixels.
        milliseconds: A forward on one image.
        images_per_second: In batches of ``batch_size``.
        batch_size: Images a batch.
        device: Where it ran.
        threads: Of PyTorch, on a CPU.
    """

    parameters: int
    megabytes: float
    gigaflops: float
    size: tuple[int, int]
    milliseconds: float
    images_per_second: float
    batch_size: int
    device: str
    threads: int

    def __str__(self) -> str:
        """Say it in two lines."""
        where = self.device if self.device != "cpu" else f"cpu, {self.threads} thread{'s' * (self.threads > 1)}"
        return (
            f"{self.parameters / 1e6:.2f} M parameters, {self.megabytes:.1f} MB, {self.gigaflops:.2f} GFLOP an image "
            f"of {self.size[1]} x {self.size[0]} pixels\n"
            f"{self.milliseconds:.2f} ms an image, {self.images_per_second:,.0f} images/s in batches of "
            f"{self.batch_size} ({where})"
        )


@torch.inference_mode()
def bench(model: str | Path | nn.Module | Student | Distillation, *, batch_size: int = 32) -> Speed:
    """Measure size and speed of a model as it is deployed: in eval mode, in float32, on the device where it is.

    Args:
        model: A saved student by its path, any name of `hetkd.load_model`, a module, or a distiller (its student).
        batch_size: Images a batch, for the images per second.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such model.

    Example:
        >>> speed = bench("timm:test_resnet", batch_size=4)
        >>> speed.parameters, speed.size
        (469688, (160, 160))
    """
    from torch.utils.flop_counter import FlopCounterMode

    whole_number("batch_size", batch_size)
    distillation = _distillation_of(model)
    tap = distillation.student_tap
    network, shape = tap.model.eval(), (tap.spec.channels, *tap.size)
    example = tap.prepare(torch.rand(batch_size, *shape).to(tap.device))
    with FlopCounterMode(display=False) as counter:
        network(example[:1])
    parameters = list(network.parameters())
    return Speed(
        parameters=sum(p.numel() for p in parameters),
        megabytes=sum(p.numel() * p.element_size() for p in parameters) / 1e6,
        gigaflops=counter.get_total_flops() / 1e9,
        size=tap.size,
        milliseconds=1000 * seconds(network, example[:1]),
        images_per_second=batch_size / seconds(network, example),
        batch_size=batch_size,
        device=tap.device.type,
        threads=torch.get_num_threads(),
    )


def _distillation_of(model: str | Path | nn.Module | Student | Distillation) -> Distillation:
    if isinstance(model, Student):
        return model.distillation
    if isinstance(model, Distillation):
        return model
    if isinstance(model, nn.Module):
        return Distillation(None, model, "ce", ce_weight=0)
    if isinstance(model, Path) or Path(model).expanduser().exists():
        return load_student(model).distillation
    return Distillation(None, load_model(model, pretrained=False), "ce", ce_weight=0)


def seconds(network: Callable[[torch.Tensor], Any], images: torch.Tensor) -> float:
    """Return the median time of a forward in seconds, after one to warm up."""
    taken: list[float] = []
    network(images)
    start = time.perf_counter()
    while len(taken) < 3 or (time.perf_counter() - start < _SECONDS and len(taken) < 1000):
        _wait_for(images.device)
        began = time.perf_counter()
        network(images)
        _wait_for(images.device)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
