"""The low-frequency part of the 2-D Fourier spectrum, by two small real matrix products."""

import math

import torch
from torch import Tensor, nn

from hetkd.spectral.precision import full_precision, separable


def frequencies(keep: int, *, half: bool = False) -> list[int]:
    """Return the ``keep`` lowest integer frequencies, ascending: ``[-2, -1, 0, 1, 2]`` for 5.

    Args:
        keep: How many; for an even number the negative side has one more, as in ``torch.fft``.
        half: Only the non-negative ones, which for real signals along one axis carry everything (an even ``keep`` also
            has its Nyquist-side frequency ``keep // 2``).

    Example:
        >>> frequencies(5)
        [-2, -1, 0, 1, 2]
    """
    if half:
        return list(range(keep // 2 + 1))
    return list(range(-(keep // 2), keep - keep // 2))


@full_precision
def low_frequencies(x: Tensor, keep: int, *, half: bool = False) -> Tensor:
    r"""Compute the centred low-frequency part of the 2-D spectrum of real feature maps.

    .. math:: X_{uv} = \frac{1}{hw} \sum_{y,x} x_{yx} e^{-2 \pi i (uy/h + vx/w)}

    equals ``fftshift(fft2(x, norm="forward"))`` cropped to its centre. With this norm the coefficients do not depend on
    the grid, so that cropping is the resampling: maps of any two sizes yield comparable results. Only ``keep`` rows and
    columns of the transform are computed, each by a real matrix product.

    Args:
        x: ``[..., h, w]``, floating point, any grid.
        keep: Frequencies K per axis, at most min(h, w); odd numbers are symmetric about zero.
        half: Return the non-negative horizontal frequencies only; the others are their complex conjugates.

    Returns:
        ``[..., K, K, 2]`` (or ``[..., K, K // 2 + 1, 2]`` for ``half``): real and imaginary parts, zero frequency at
        row K // 2 and, unless ``half``, column K // 2. float32, or float64 if ``x`` is.

    Raises:
        ValueError: If ``keep`` is not between 1 and min(h, w).

    Example:
        >>> low_frequencies(torch.ones(2, 64, 7, 7), keep=3).shape
        torch.Size([2, 64, 3, 3, 2])
        >>> low_frequencies(torch.full((4, 4), 3.0), keep=1)[..., 0]  # the mean
        tensor([[3.]])
    """
    height, width = x.shape[-2:]
    if not 1 <= keep <= min(height, width):
        raise ValueError(f"keep={keep} must be between 1 and the smaller side of the {height} x {width} grid.")
    rows = _dft_matrix(-(keep // 2), keep - keep // 2, height, x)
    columns = _dft_matrix(*((0, keep // 2 + 1) if half else (-(keep // 2), keep - keep // 2)), width, x)
    both = separable(x, rows.flatten(0, 1), columns.flatten(0, 1))
    quadrants = both.unflatten(-2, (2, -1)).unflatten(-1, (2, -1))
    cos_cos, cos_sin = quadrants[..., 0, :, 0, :], quadrants[..., 0, :, 1, :]
    sin_cos, sin_sin = quadrants[..., 1, :, 0, :], quadrants[..., 1, :, 1, :]
    return torch.stack([cos_cos - sin_sin, -(cos_sin + sin_cos)], dim=-1)


def _dft_matrix(first: int, end: int, size: int, like: Tensor) -> Tensor:
    """Return cosines and sines ``[2, end - first, size]`` of the integer frequencies, divided by ``size``."""
    frequency = torch.arange(first, end, dtype=like.dtype, device=like.device)
    position = torch.arange(size, dtype=like.dtype, device=like.device)
    angle = torch.outer(frequency, position) * (2 * math.pi / size)
    return torch.stack([angle.cos(), angle.sin()]) / size


def real_fourier_basis(size: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of cosines and sines of the integer frequencies.

    In it every circular convolution with an even kernel, that is every real gate on the Fourier spectrum, is a
    multiplication: ``basis.T @ diag(gate[frequency]) @ basis``, all in real numbers.

    Args:
        size: Number of samples n.
        dtype: Of the basis.

    Returns:
        The basis ``[n, n]``, one wave a row, and the frequency ``[n]`` of each row in cycles (int64).

    Example:
        >>> basis, frequency = real_fourier_basis(4)
        >>> frequency.tolist()
        [0, 1, 1, 2]
        >>> torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-6)
        True
    """
    position = torch.arange(size, dtype=torch.float64)
    waves, frequency = [], []
    for cycles in range(size // 2 + 1):
        angle = position * (2 * math.pi * cycles / size)
        waves.append(angle.cos())
        frequency.append(cycles)
        if 0 < 2 * cycles < size:
            waves.append(angle.sin())
            frequency.append(cycles)
    basis = torch.nn.functional.normalize(torch.stack(waves), dim=1)
    return basis.to(dtype), torch.tensor(frequency)


def low_waves(grid: tuple[int, int], keep: int) -> tuple[Tensor, Tensor]:
    """Return the products of cosines and sines of the lowest frequencies: orthonormal maps of a grid.

    For odd K they span the maps whose spectrum lies in the K x K lowest frequencies of `low_frequencies`, in as many
    real numbers as it has independent ones; an even K adds the next frequency's cosine. A map of white noise has
    coefficients ``waves @ x.flatten()`` of the same variance on any grid.

    Args:
        grid: Height h and width w in pixels.
        keep: Waves K per axis, at most min(h, w).

    Returns:
        The waves ``[K * K, h * w]``, and their frequencies ``[K * K, 2]`` in cycles a side (int64), both by rows.

    Raises:
        ValueError: If ``keep`` is not between 1 and min(h, w).

    Example:
        >>> waves, frequency = low_waves((4, 4), keep=3)
        >>> frequency.tolist()
        [[0, 0], [0, 1], [0, 1], [1, 0], [1, 1], [1, 1], [1, 0], [1, 1], [1, 1]]
        >>> torch.allclose(waves @ waves.T, torch.eye(9), atol=1e-6)
        True
    """
    if not 1 <= keep <= min(grid):
        raise ValueError(f"keep={keep} must be between 1 and the smaller side of the {grid[0]} x {grid[1]} grid.")
    (rows, row_cycles), (columns, column_cycles) = (real_fourier_basis(side, dtype=torch.float64) for side in grid)
    waves = torch.kron(rows[:keep].contiguous(), columns[:keep].contiguous()).float()
    return waves, torch.cartesian_prod(row_cycles[:keep], column_cycles[:keep])


class LowFrequencies(nn.Module):
    """Module form of `low_frequencies`."""

    def __init__(self, keep: int, *, half: bool = False) -> None:
        super().__init__()
        self.keep, self.half_plane = keep, half

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., h, w]`` to ``[..., K, K, 2]``."""
        return low_frequencies(x, self.keep, half=self.half_plane)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"keep={self.keep}, half={self.half_plane}"
