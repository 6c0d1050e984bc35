"""DS2S and its parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hetkd.methods.sfkd.ds2s import DS2S, DepthwiseKernel
from hetkd.spectral import dwt2, idwt2


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize("streams", ["full", "spatial", "spectral"])
def test_refinement_starts_as_the_identity_and_then_changes_every_band(levels, streams):
    refine = DS2S(6, (16, 8), levels, streams=streams)
    x = torch.randn(3, 6, 16, 8)
    bands = dwt2(x, "haar", levels)
    for ours, theirs in zip(refine(bands).details, bands.details, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(idwt2(refine(bands)), x)
    for parameter in refine.parameters():
        nn.init.normal_(parameter, std=0.3)
    refined = refine(bands)
    for ours, theirs in zip([refined.low, *refined.details], [bands.low, *bands.details], strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().mean() > 0.01


def test_low_and_high_frequencies_exchange_information():
    refine = DS2S(4, (8, 8), 2)
    for parameter in refine.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, 8, 8)
    low_only = dwt2(F.interpolate(x.mean((2, 3), keepdim=True), (8, 8)), "haar", 2)
    assert all(detail.abs().max() < 1e-5 for detail in low_only.details)
    assert all(detail.abs().max() > 0.01 for detail in refine(low_only).details)


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (1, 3)])
def test_kernels_are_depthwise_convolutions(size):
    kernel, x = DepthwiseKernel(5, 3, size), torch.randn(2, 5, 3, *size)
    weight = nn.init.normal_(kernel.weight).flatten(0, 1).unsqueeze(1)
    expected = F.conv2d(x.flatten(1, 2), weight, padding=1, groups=15).view_as(x)
    torch.testing.assert_close(kernel(x), expected)


def test_spectral_gate_equals_a_gate_on_the_fft():
    refine = DS2S(3, (8, 6), 0, streams="spectral")
    gate = nn.init.normal_(refine.gates["0"].gate)
    x = torch.randn(2, 3, 8, 6)
    rows, columns = torch.tensor([0, 1, 2, 3, 4, 3, 2, 1]), torch.arange(4)
    full = gate[:, 0][:, rows][..., columns]
    expected = x + torch.fft.irfft2(torch.fft.rfft2(x) * full, s=(8, 6))
    torch.testing.assert_close(refine(dwt2(x, "haar", 0)).low, expected, atol=1e-5, rtol=1e-4)
