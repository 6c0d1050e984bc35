"""How large and how fast a model is, on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hetkd.distillation import Distillation
from hetkd.features.hooks import eval_mode
from hetkd.models.int8 import without_simulation

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
            f"{self.parameters / 1e6:.2f} M parameters, {self.megabytes:.1f} MB, {self.gigaflops:.3g} GFLOP an image "
            f"of {self.size[1]} x {self.size[0]} pixels\n"
            f"{self.milliseconds:.2f} ms an image, {self.images_per_second:,.0f} images/s in batches of "
            f"{self.batch_size} ({where})"
        )


@torch.inference_mode()
def speed_of(distillation: Distillation, batch_size: int) -> Speed:
    """Measure the student of a distillation; see `hetkd.bench`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    tap = distillation.student_tap
    network, shape = without_simulation(tap.model), (tap.spec.channels, *tap.size)
    example = tap.prepare(torch.rand(batch_size, *shape).to(tap.device))
    parameters = list(network.parameters())
    with eval_mode(network):
        # Fused attention is not counted on a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(example[:1])
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
