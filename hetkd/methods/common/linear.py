"""Chains of linear transforms of small maps as one matrix product."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class LinearMap(nn.Module):
    """A fixed linear function of maps, applied as one matrix: its values at unit impulses.

    Resampling, a wavelet transform, its inverse and low frequencies are linear; on the few pixels of a common grid, one
    product with the matrix of all of them (in float32) costs less than any one of them alone.

    Args:
        function: From ``[N, 1, *size]`` to ``[N, 1, *result]``, linear, without parameters.
        size: Of a map.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], size: tuple[int, ...]) -> None:
        super().__init__()
        values = torch.cat([function(impulses).float() for impulses in _impulses(size)])
        self.size, self.result = size, tuple(values.shape[2:])
        self.register_buffer("matrix", values.flatten(1), persistent=False)

    matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, D, *size]`` to ``[B, D, *result]``."""
        return (x.flatten(2) @ self.matrix.to(x.dtype)).unflatten(2, self.result)


def mix_channels(weight: Tensor, x: Tensor) -> Tensor:
    """Mix the channels of ``[B, C, ...]`` by ``[D, C]``: a 1x1 convolution of whatever comes behind the channels."""
    return torch.einsum("dc,bc...->bd...", weight, x)


def _impulses(size: tuple[int, ...], numbers: int = 1 << 22) -> Iterator[Tensor]:
    """Yield maps ``[N, 1, *size]`` that are 1 at one place and 0 elsewhere, a part (of so many numbers) at a time."""
    count = math.prod(size)
    for places in torch.arange(count).split(max(1, numbers // count)):
        impulses = torch.zeros(len(places), count, dtype=torch.float64).scatter_(1, places[:, None], 1.0)
        yield impulses.unflatten(1, (1, *size))
