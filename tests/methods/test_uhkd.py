"""UHKD: its modules."""

import pytest
import torch
import torch.nn.functional as F
from conftest import features
from spectral_methods import bound, same_pairs

from hetkd import UHKD, Stage, StagePair
from hetkd.spectral import low_waves


def waves_of(image, grid, keep):
    return torch.einsum("nk,bck->bnc", low_waves(grid, keep)[0], image.flatten(2))


@pytest.mark.parametrize(("limit", "grid", "keep"), [(8, (7, 8), 5), (4, (4, 4), 4)])
@pytest.mark.parametrize("expansion", [None, 2.0])
def test_coefficients_are_those_of_aligned_pixels(limit, grid, keep, expansion):
    pair = StagePair(Stage("t", 24, 14, 8), Stage("s", 12, 7, 9))
    method = bound(UHKD(grid=limit, expansion=expansion), [pair])
    x = torch.randn(4, 12, 7, 9)
    aligned = F.interpolate(x, grid, mode="bilinear", antialias=True)
    if expansion is not None:
        expand = method.expand[0]
        assert expand.out_features == 24
        aligned = F.gelu(F.conv2d(aligned, expand.weight[:, :, None, None], expand.bias))
    aligned = F.conv2d(aligned, method.project[0].weight[:, :, None, None])
    torch.testing.assert_close(method.coefficients(0, x), waves_of(aligned, grid, keep), atol=1e-5, rtol=1e-4)


def test_loss_is_the_error_of_what_is_standardised_on_both_sides():
    pair = StagePair(Stage("t", 6, 8, 8), Stage("s", 3, 8, 8))
    method = bound(UHKD(keep=3, feature_weight=1.0), [pair])
    x, y = features((pair.student,), size=16), features((pair.teacher,), size=16)
    found = method(x, method.encode(y))["uhkd.s"]
    student, target = (z - z.mean(0) for z in (method.coefficients(0, x.maps[0]), waves_of(y.maps[0], (8, 8), 3)))
    correlation = (student * target).mean(0) / (student.std(0, unbiased=False) * target.std(0, unbiased=False))
    torch.testing.assert_close(found, (2 * (1 - correlation)).mean(), atol=1e-4, rtol=1e-4)


def test_uhkd_is_zero_where_features_are_equal():
    method = bound(UHKD(), same_pairs())
    x = features(tuple(pair.teacher for pair in same_pairs()), size=8)
    terms = method(x, method.encode(x))
    assert terms["uhkd.a"] < 1e-4
    assert terms["uhkd.b"] < 1e-4
