"""The spectral core against PyWavelets, ptwt and torch.fft."""

import math
import warnings

import numpy as np
import ptwt
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetkd.spectral import (
    DWT2,
    IDWT2,
    Bands,
    GaussianWindow,
    LowFrequencies,
    dwt2,
    frequencies,
    gaussian_window,
    idwt2,
    list_wavelets,
    low_frequencies,
    low_waves,
    real_fourier_basis,
)

GRIDS = [(8, 8), (7, 7), (14, 14), (5, 9), (56, 28), (2, 3)]


def centred_fft(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.fftshift(torch.fft.fft2(x, norm="forward"), dim=(-2, -1))


FITTING = [(grid, levels) for grid in GRIDS for levels in range(4) if levels == 0 or min(grid) > 2 ** (levels - 1)]


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym5", "coif1"])
@pytest.mark.parametrize(("grid", "levels"), FITTING)
def test_dwt2_equals_pywavelets_and_is_inverted(wavelet, grid, levels):
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyWavelets warns of boundary effects
        low, *details = pywt.wavedec2(x.numpy(), wavelet, mode="periodization", level=levels)
    bands = dwt2(x, wavelet, levels)
    np.testing.assert_allclose(bands.low.numpy(), low, atol=1e-10)
    for ours, theirs in zip(bands.details, reversed(details), strict=True):
        np.testing.assert_allclose(ours.numpy(), np.stack(theirs, axis=-3), atol=1e-10)
    torch.testing.assert_close(idwt2(bands, wavelet, size=grid), x)


@pytest.mark.parametrize("levels", [1, 2])
def test_haar_equals_ptwt(levels):
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    low, *details = ptwt.wavedec2(x, "haar", mode="zero", level=levels)
    bands = dwt2(x, "haar", levels)
    torch.testing.assert_close(bands.low, low)
    for ours, theirs in zip(bands.details, reversed(details), strict=True):
        torch.testing.assert_close(ours, torch.stack(list(theirs), dim=-3))


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(4, 20),
    width=st.integers(4, 20),
    levels=st.integers(0, 2),
    wavelet=st.sampled_from(["haar", "db3"]),
)
def test_even_grids_keep_energy(height, width, levels, wavelet):
    x = torch.randn(height * 4, width * 4, dtype=torch.float64)
    bands = dwt2(x, wavelet, levels)
    energy = bands.low.square().sum() + sum(detail.square().sum() for detail in bands.details)
    torch.testing.assert_close(energy, x.square().sum())


def test_haar_of_a_hand_computed_case():
    bands = dwt2(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "haar", 1)
    assert bands.low.item() == 5.0  # (1 + 2 + 3 + 4) / 2
    assert bands.details[0].flatten().tolist() == [-2.0, -1.0, 0.0]  # top - bottom, left - right, diagonal


def test_small_grids_are_refused():
    with pytest.raises(ValueError, match="2 x 2 grid is too small for levels=2"):
        dwt2(torch.zeros(2, 2), "haar", 2)


@pytest.mark.parametrize("name", ["bior2.2", "harr", "db999"])
def test_other_wavelets_are_refused_with_names(name):
    with pytest.raises(ValueError, match="unknown orthogonal wavelet"):
        DWT2(name)
    assert "db4" in list_wavelets()
    assert "bior2.2" not in list_wavelets()


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 15), width=st.integers(1, 15), data=st.data())
def test_low_frequencies_equal_the_cropped_fft(height, width, data):
    keep = data.draw(st.integers(1, min(height, width)))
    x = torch.randn(3, height, width, dtype=torch.float64)
    top, left = height // 2 - keep // 2, width // 2 - keep // 2
    expected = centred_fft(x)[..., top : top + keep, left : left + keep]
    torch.testing.assert_close(torch.view_as_complex(low_frequencies(x, keep)), expected)


@pytest.mark.parametrize("keep", [3, 5, 7])
def test_half_plane_holds_the_non_negative_columns(keep):
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(low_frequencies(x, keep, half=True), low_frequencies(x, keep)[..., keep // 2 :, :])


def test_low_frequencies_do_not_depend_on_the_grid():
    def wave(size):
        t = torch.arange(size, dtype=torch.float64) / size
        return torch.cos(2 * math.pi * t)[:, None] + torch.sin(4 * math.pi * t)[None, :] + 3

    torch.testing.assert_close(low_frequencies(wave(7), 5), low_frequencies(wave(32), 5))


@pytest.mark.parametrize("keep", [0, 8])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=f"keep={keep} must be between 1 and"):
        low_frequencies(torch.zeros(7, 7), keep)


@pytest.mark.parametrize("grid", GRIDS)
def test_low_waves_are_an_orthonormal_basis_of_the_low_frequencies(grid):
    keep = min(5, (min(grid) - 1) // 2 * 2 + 1)
    waves, cycles = low_waves(grid, keep)
    torch.testing.assert_close(waves @ waves.T, torch.eye(keep**2), atol=1e-5, rtol=0)
    x = torch.randn(*grid)
    spectrum = torch.fft.fft2(x)
    rows, columns = (torch.fft.fftfreq(side, 1 / side).round().abs() <= keep // 2 for side in grid)
    low_pass = torch.fft.ifft2(spectrum * torch.outer(rows, columns)).real
    torch.testing.assert_close((waves.T @ (waves @ x.flatten())).view(grid), low_pass, atol=1e-5, rtol=1e-4)
    for wave, (row, column) in zip(waves.unflatten(1, grid), cycles.tolist(), strict=True):
        strongest = (torch.fft.fft2(wave).abs() > 1e-3).nonzero()
        assert {(min(r, grid[0] - r), min(c, grid[1] - c)) for r, c in strongest.tolist()} == {(row, column)}


def test_low_waves_need_a_grid_that_has_them():
    with pytest.raises(ValueError, match=r"keep=5 must be between 1 and the smaller side of the 4 x 8 grid"):
        low_waves((4, 8), 5)


def test_real_fourier_basis_gates_the_spectrum():
    for size in (1, 2, 5, 8):
        basis, frequency = real_fourier_basis(size, dtype=torch.float64)
        torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64))
        x, gate = torch.randn(size, dtype=torch.float64), torch.randn(size // 2 + 1, dtype=torch.float64)
        expected = torch.fft.irfft(torch.fft.rfft(x) * gate, n=size)
        torch.testing.assert_close(basis.T @ (gate[frequency] * (basis @ x)), expected)


def test_window_does_what_sigma_says():
    window = gaussian_window(8, 8, 0.5)
    assert window[4, 4] == 1.0
    # row 6 is frequency 2 of Nyquist's 4: sigma times Nyquist
    assert window[6, 4].item() == pytest.approx(math.exp(-0.5))
    assert window[6, 6].item() == pytest.approx(math.exp(-1.0))
    assert gaussian_window(8, 8, 0.0).sum() == 1.0
    assert torch.equal(gaussian_window(5, 7, math.inf), torch.ones(5, 7))
    wide, narrow = gaussian_window(9, 9, 1.0), gaussian_window(9, 9, 0.2)
    assert (wide >= narrow).all()
    with pytest.raises(ValueError, match="sigma=-1"):
        GaussianWindow(-1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computes_in_float32_under_autocast(dtype):
    x = torch.randn(2, 7, 7).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        spectrum, bands = low_frequencies(x, 5), dwt2(x, "db2", 2)
        restored = idwt2(bands, "db2", size=(7, 7))
    torch.testing.assert_close(spectrum, low_frequencies(x.double(), 5).float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(restored, x.float(), atol=1e-5, rtol=1e-5)


def test_complex_or_integer_input_is_refused():
    with pytest.raises(TypeError, match="real floating-point"):
        low_frequencies(torch.zeros(4, 4, dtype=torch.int64), 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: low_frequencies(x, 3),
        lambda x: dwt2(x, "haar", 2).details[1],
        lambda x: dwt2(x, "db2", 1).low,
        lambda x: idwt2(Bands(x[..., :2, :2], (x[None, :2, :2].expand(3, 2, 2),)), "db2"),
        GaussianWindow(0.5),
    ],
)
def test_gradcheck(function):
    assert torch.autograd.gradcheck(function, torch.randn(5, 6, dtype=torch.float64, requires_grad=True))


def test_modules_equal_functions():
    x = torch.randn(2, 8, 8)
    torch.testing.assert_close(LowFrequencies(3, half=True)(x), low_frequencies(x, 3, half=True))
    torch.testing.assert_close(IDWT2("db2")(DWT2("db2", levels=2)(x)), x, atol=1e-5, rtol=1e-5)
    assert "keep=3" in repr(LowFrequencies(3))
    assert "db2" in repr(DWT2("db2"))
    assert "db2" in repr(IDWT2("db2"))
    assert "0.5" in repr(GaussianWindow(0.5))
    assert frequencies(5) == [-2, -1, 0, 1, 2]
    assert frequencies(4) == [-2, -1, 0, 1]


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_compiles_without_graph_breaks(wavelet):
    def both(x):
        bands = dwt2(x, wavelet, 2)
        return low_frequencies(idwt2(bands, wavelet), 5, half=True)

    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="eager")(x), both(x))
