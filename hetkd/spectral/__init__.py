"""Wavelet and Fourier transforms of feature maps, as functions and as modules.

All of them compute in float32 with autocast off (half-precision FFTs need power-of-two sizes and bfloat16 ones do not
exist; float64 stays float64), use real parameters only, and take odd grids.
"""

from hetkd.spectral.fourier import (
    LowFrequencies,
    frequencies,
    low_frequencies,
    low_waves,
    real_fourier_basis,
)
from hetkd.spectral.gaussian import GaussianWindow, gaussian_window
from hetkd.spectral.wavelet import DWT2, IDWT2, Bands, dwt2, idwt2, list_wavelets

__all__ = [
    "Bands",
    "DWT2",
    "GaussianWindow",
    "IDWT2",
    "LowFrequencies",
    "dwt2",
    "frequencies",
    "gaussian_window",
    "idwt2",
    "list_wavelets",
    "low_frequencies",
    "low_waves",
    "real_fourier_basis",
]
