"""Orthogonal, periodised 2-D wavelet transforms by name; Haar in its fast form."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.spectral.precision import at_least_float32, constant_when_compiled, full_precision, separable
from hetkd.utils.checks import unknown_name


class Bands(NamedTuple):
    """Sub-bands of a J-level transform.

    Attributes:
        low: LL of the coarsest level, ``[..., h / 2^J, w / 2^J]``.
        details: One tensor ``[..., 3, h / 2^j, w / 2^j]`` a level, j = 1..J from the finest, with LH, HL, HH:
            horizontal, vertical and diagonal details in the terms of PyWavelets.
    """

    low: Tensor
    details: tuple[Tensor, ...]


@full_precision
def dwt2(x: Tensor, wavelet: str = "haar", levels: int = 1) -> Bands:
    """Split maps into wavelet sub-bands, as ``pywt.wavedec2(..., mode="periodization")``.

    The transform is orthogonal: energy is kept, and `idwt2` restores the input exactly. Sizes halve at each level; an
    odd side is first extended by repeating its last row or column.

    Args:
        x: ``[..., h, w]``, floating point.
        wavelet: An orthogonal wavelet of PyWavelets: ``"haar"``, ``"db2"``, ``"sym4"``, ``"coif1"``, ...
        levels: J >= 0; 0 returns ``x`` as the low band.

    Returns:
        `Bands` in float32, or float64 if ``x`` is.

    Raises:
        ValueError: If the wavelet is unknown or not orthogonal, or the grid is too small: every level needs a side of
            at least 2 pixels.

    Example:
        >>> bands = dwt2(torch.ones(2, 8, 16, 16), "haar", levels=2)
        >>> bands.low.shape, [detail.shape[-3:] for detail in bands.details]
        (torch.Size([2, 8, 4, 4]), [torch.Size([3, 8, 8]), torch.Size([3, 4, 4])])
    """
    check_wavelet(wavelet)
    if levels < 0:
        raise ValueError(f"levels={levels} must not be negative.")
    height, width = x.shape[-2:]
    if levels and min(height, width) <= 2 ** (levels - 1):
        raise ValueError(
            f"a {height} x {width} grid is too small for levels={levels}: use fewer levels or a larger grid."
        )
    low, details = x, []
    for _ in range(levels):
        low, detail = _split(_even(low), wavelet)
        details.append(detail)
    return Bands(low, tuple(details))


def idwt2(bands: Bands, wavelet: str = "haar", size: tuple[int, int] | None = None) -> Tensor:
    """Invert `dwt2`.

    Args:
        bands: What `dwt2` returned, or bands of the same shapes.
        wavelet: The wavelet they were made with.
        size: Height and width of the result, for grids with odd sides; by default twice the finest band.

    Returns:
        ``[..., h, w]`` in float32, or float64 if the low band is.

    Example:
        >>> x = torch.rand(2, 8, 14, 14)
        >>> torch.allclose(idwt2(dwt2(x, "db2"), "db2"), x, atol=1e-5)
        True
    """
    check_wavelet(wavelet)
    low = at_least_float32(bands.low)
    with torch.autocast(low.device.type, enabled=False):
        for detail in reversed(bands.details):
            height, width = detail.shape[-2:]
            low = _merge(low[..., :height, :width], at_least_float32(detail), wavelet)
    return low if size is None else low[..., : size[0], : size[1]]


def list_wavelets() -> list[str]:
    """Return the names of the orthogonal wavelets that `dwt2` takes.

    Example:
        >>> "sym4" in list_wavelets()
        True
    """
    import pywt

    return [name for name in pywt.wavelist(kind="discrete") if _restores(pywt.Wavelet(name))]


def _restores(wavelet: Any) -> bool:
    """Say whether a wavelet is orthogonal to rounding, which ``dmey`` is not: it is cut off."""
    import numpy

    low = numpy.array(wavelet.dec_lo)
    shifted = [low[: len(low) - 2 * k] @ low[2 * k :] for k in range(len(low) // 2)]
    return bool(wavelet.orthogonal) and numpy.allclose(shifted, [1.0] + [0.0] * (len(shifted) - 1), atol=1e-7)


@constant_when_compiled
def check_wavelet(name: str) -> None:
    """Raise ValueError, with the nearest names, unless ``name`` is an orthogonal wavelet."""
    if name != "haar" and name not in _orthogonal_wavelets():
        raise unknown_name("orthogonal wavelet", name, _orthogonal_wavelets())


@lru_cache(maxsize=1)
def _orthogonal_wavelets() -> frozenset[str]:
    return frozenset(list_wavelets())


def _even(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    if height % 2 == 0 and width % 2 == 0:
        return x
    flat = x.reshape(-1, 1, height, width)
    return F.pad(flat, (0, width % 2, 0, height % 2), mode="replicate").reshape(
        *x.shape[:-2], height + height % 2, width + width % 2
    )


def _split(x: Tensor, wavelet: str) -> tuple[Tensor, Tensor]:
    if wavelet == "haar":
        top, bottom = x[..., 0::2, :], x[..., 1::2, :]
        low_rows, high_rows = (top + bottom) / 2, (top - bottom) / 2
        (ll, hl), (lh, hh) = (
            (rows[..., 0::2] + rows[..., 1::2], rows[..., 0::2] - rows[..., 1::2]) for rows in (low_rows, high_rows)
        )
        return ll, torch.stack([lh, hl, hh], dim=-3)
    height, width = x.shape[-2:]
    y = separable(x, _analysis(wavelet, height, x), _analysis(wavelet, width, x))
    top, bottom = y.split(height // 2, dim=-2)
    (ll, hl), (lh, hh) = top.split(width // 2, dim=-1), bottom.split(width // 2, dim=-1)
    return ll, torch.stack([lh, hl, hh], dim=-3)


def _merge(low: Tensor, detail: Tensor, wavelet: str) -> Tensor:
    lh, hl, hh = detail.unbind(dim=-3)
    if wavelet == "haar":
        low_rows, high_rows = _interleave(low + hl, low - hl, -1), _interleave(lh + hh, lh - hh, -1)
        return _interleave(low_rows + high_rows, low_rows - high_rows, -2) / 2
    y = torch.cat([torch.cat([low, hl], dim=-1), torch.cat([lh, hh], dim=-1)], dim=-2)
    height, width = y.shape[-2:]
    return separable(y, _analysis(wavelet, height, y).T, _analysis(wavelet, width, y).T)


def _interleave(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    return torch.stack([even, odd], dim=dim).flatten(dim - 1, dim)


def _analysis(wavelet: str, size: int, like: Tensor) -> Tensor:
    return _constant_matrix(wavelet, size).to(like)


@constant_when_compiled
def _constant_matrix(wavelet: str, size: int) -> Tensor:
    return _analysis_matrix(wavelet, size)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor of inference mode could not be used in training later
def _analysis_matrix(wavelet: str, size: int) -> Tensor:
    """The orthogonal matrix ``[size, size]`` of one periodised level: low-pass rows, then high-pass rows."""
    import numpy
    import pywt

    low, high = pywt.dwt(numpy.eye(size), wavelet, mode="periodization", axis=0)
    return torch.from_numpy(numpy.concatenate([low, high]))


class DWT2(nn.Module):
    """Module form of `dwt2`."""

    def __init__(self, wavelet: str = "haar", levels: int = 1) -> None:
        super().__init__()
        check_wavelet(wavelet)
        self.wavelet, self.levels = wavelet, levels

    def forward(self, x: Tensor) -> Bands:
        """Split ``[..., h, w]`` into `Bands`."""
        return dwt2(x, self.wavelet, self.levels)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{self.wavelet!r}, levels={self.levels}"


class IDWT2(nn.Module):
    """Module form of `idwt2`."""

    def __init__(self, wavelet: str = "haar") -> None:
        super().__init__()
        check_wavelet(wavelet)
        self.wavelet = wavelet

    def forward(self, bands: Bands) -> Tensor:
        """Restore ``[..., h, w]`` from `Bands`."""
        return idwt2(bands, self.wavelet)

    def extra_repr(self) -> str:
        """Show the options."""
        return repr(self.wavelet)
