"""UHKD: its modules, its switches."""

import pytest
import torch
import torch.nn.functional as F
from conftest import features
from spectral_methods import UHKD_OPTIONS, bound, same_pairs

from hetkd import (
    UHKD,
    Stage,
    StagePair,
)
from hetkd.methods.common.statistics import (
    standardize_batch,
    standardize_sample,
)
from hetkd.methods.uhkd import spectrum_per_pixel


@pytest.mark.parametrize("options", UHKD_OPTIONS)
def test_uhkd_mixes_coefficients_as_it_would_mix_pixels(options):
    pair = StagePair(Stage("t", 24, 14, 14), Stage("s", 12, 7, 8))
    align, x = bound(UHKD(**options), [pair]).align[0], torch.randn(4, 12, 7, 8)
    pixels = align.mix(align.layers(x))
    keep = align.gain.shape[1]
    expected = align.compress(spectrum_per_pixel(pixels, keep)) * (1 + align.gain) + align.bias
    torch.testing.assert_close(align(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("grid", "pixels"), [(14, (14, 12)), (6, (6, 6)), (3, (5, 5))])
def test_uhkd_resamples_a_map_of_many_pixels_first(grid, pixels):
    pair = StagePair(Stage("t", 24, 14, 14), Stage("s", 12, 14, 12))
    align, x = bound(UHKD(grid=grid), [pair]).align[0], torch.randn(4, 12, 14, 12)
    resampled = F.interpolate(x, pixels, mode="bilinear", antialias=True)
    expected = spectrum_per_pixel(align.mix(align.layers(resampled)), 5) * (1 + align.gain) + align.bias
    torch.testing.assert_close(align(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", UHKD_OPTIONS[:5])
def test_uhkd_is_zero_where_aligned_features_are_equal(options):
    method = bound(UHKD(**options), same_pairs())
    x = features(tuple(pair.teacher for pair in same_pairs()), size=8)
    targets = method.encode(x)
    standardized = {"batch": lambda t: standardize_batch(t, is_complex=method.spectrum == "complex")}
    make = standardized.get(method.normalize, standardize_sample)
    for index in range(2):
        aligned = make(targets[f"stage{index}"])
        method.align[index].forward = lambda _, aligned=aligned: aligned
    terms = method(x, targets)
    assert terms["uhkd.a"] < 1e-6
    assert terms["uhkd.b"] < 1e-6
