"""Gaussian low-pass weights on the frequency grid."""

import torch
from torch import Tensor, nn

from hetkd.spectral.precision import full_precision


def gaussian_window(
    height: int,
    width: int,
    sigma: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Return Gaussian low-pass weights on the centred frequency grid of a ``height x width`` map.

    .. math:: w_{uv} = \exp\left(-\frac{(u / (h/2))^2 + (v / (w/2))^2}{2 \sigma^2}\right)

    Args:
        height: Rows of the map whose spectrum is weighted.
        width: Its columns.
        sigma: Width of the Gaussian as a fraction of the Nyquist frequency (0.5 cycles a pixel): at a frequency of
            ``sigma`` times Nyquist the weight is exp(-1/2). 0 leaves the mean (zero frequency) only; ``math.inf``
            weighs everything alike.
        dtype: Of the result.
        device: Of the result.

    Returns:
        ``[height, width]``, laid out as ``fftshift(fft2(x))``, 1 at zero frequency.

    Raises:
        ValueError: If ``sigma`` is negative or not a number.

    Example:
        >>> gaussian_window(1, 5, sigma=0.4)
        tensor([[0.1353, 0.6065, 1.0000, 0.6065, 0.1353]])
    """
    rows, columns = (_axis_weights(size, sigma).to(device=device, dtype=dtype) for size in (height, width))
    return torch.outer(rows, columns)


def _axis_weights(size: int, sigma: float) -> Tensor:
    """Return the weights of the frequencies of an axis of ``size`` pixels, in their order."""
    from kornia.filters.kernels import gaussian

    if not sigma >= 0:
        raise ValueError(f"sigma={sigma} must be 0 (the mean only), positive, or math.inf (no filter).")
    # kornia centres an even kernel between two samples; here it peaks at zero frequency.
    peak = size // 2 + (0.5 if size % 2 == 0 else 0.0)
    kernel: Tensor = gaussian(size, sigma * size / 2, mean=peak, dtype=torch.float64)[0]
    return kernel / kernel.max()


class GaussianWindow(nn.Module):
    """Weights a centred spectrum ``[..., h, w]`` by `gaussian_window`."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        gaussian_window(1, 1, sigma)
        self.sigma = sigma

    def forward(self, spectrum: Tensor) -> Tensor:
        """Return ``spectrum`` times the window of its last two axes."""
        return _weigh(spectrum, self.sigma)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"sigma={self.sigma}"


@full_precision
def _weigh(spectrum: Tensor, sigma: float) -> Tensor:
    height, width = spectrum.shape[-2:]
    return spectrum * gaussian_window(height, width, sigma, dtype=spectrum.dtype, device=spectrum.device)
