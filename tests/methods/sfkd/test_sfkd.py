"""SFKD: its steps, its switches."""

import pytest
import torch
import torch.nn.functional as F
from conftest import features
from spectral_methods import SFKD_OPTIONS, bound, same_pairs

from hetkd import (
    SFKD,
    FitNet,
    Stage,
    StagePair,
)
from hetkd.spectral import dwt2, idwt2, low_frequencies


@pytest.mark.parametrize(
    "options", [o for o in SFKD_OPTIONS if o.get("loss") != "infonce" and "decorrelation" not in o and "width" not in o]
)
def test_sfkd_is_zero_where_features_are_equal(options):
    method = bound(SFKD(**options), same_pairs())
    x = features(tuple(pair.teacher for pair in same_pairs()), size=8)
    feature_terms = {k: v for k, v in method(x, method.encode(x)).items() if k.startswith("sfkd")}
    assert len(feature_terms) == 2
    assert all(term.abs() < 1e-4 for term in feature_terms.values())


@pytest.mark.parametrize("grids", [((14, 14), (7, 7)), ((7, 7), (14, 14)), ((28, 28), (14, 7))])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ds2s": "lite", "wavelet": "db2"},
        {"ds2s": "lite"},
        {"levels": 1},
        {"levels": 0},
        {"ds2s": None, "levels": 2},
    ],
)
def test_sfkd_by_matrices_equals_its_steps_one_by_one(grids, options):
    teacher, student = grids
    pair = StagePair(Stage("t", 24, *teacher), Stage("s", 12, *student))
    method = bound(SFKD(**options), [pair])
    for parameter in method.parameters():  # away from the identity
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, y = torch.randn(4, 12, *student), torch.randn(4, 24, *teacher)
    keep, grid = method._keeps[0], method._grids[0]
    expected = low_frequencies(method.refined_features([x])[0], keep, half=True)
    torch.testing.assert_close(method.refined_spectra([x])[0], expected, atol=1e-5, rtol=1e-4)
    resampled = F.interpolate(y, grid, mode="bilinear", antialias=True)
    torch.testing.assert_close(method.encode_stage(0, y), low_frequencies(resampled, keep, half=True))
    projected = F.interpolate(F.conv2d(x, method.project[0].weight), grid, mode="bilinear", antialias=True)
    refine = method.shared[0].refine
    if refine is not None:
        projected = idwt2(refine(dwt2(projected, method.wavelet, method._levels[0])), method.wavelet)
    torch.testing.assert_close(method.refined_features([x])[0], projected, atol=1e-5, rtol=1e-4)


def test_stages_share_the_weight():
    assert bound(SFKD())._weights == [0.5, 0.5]
    assert bound(FitNet())._weights == [1.0, 1.0]


@pytest.mark.parametrize(("grid", "expected"), [(1, "1 x 1, 0 levels"), (4, "4 x 4, 1 level"), (6, "8 x 8, 2 levels")])
def test_the_grid_bounds_the_levels(grid, expected):
    pair = StagePair(Stage("t", 8, 16, 16), Stage("s", 8, 16, 16))
    assert bound(SFKD(grid=grid), [pair]).describe_pair(0).startswith(expected)
