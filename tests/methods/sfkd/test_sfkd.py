"""SFKD: its steps, its switches."""

import numpy as np
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
from hetkd.methods.sfkd.sfkd import GFFL
from hetkd.spectral import dwt2, idwt2, low_waves


@pytest.mark.parametrize("options", [o for o in SFKD_OPTIONS if o.get("loss") != "infonce" and "width" not in o])
def test_sfkd_is_zero_where_features_are_equal(options):
    method = bound(SFKD(**options), same_pairs())
    x = features(tuple(pair.teacher for pair in same_pairs()), size=8)
    feature_terms = {k: v for k, v in method(x, method.encode(x)).items() if k.startswith("sfkd")}
    assert len(feature_terms) == 2
    assert all(term.abs() < 1e-4 for term in feature_terms.values())


@pytest.mark.parametrize("grids", [((14, 14), (7, 7)), ((7, 7), (14, 14)), ((28, 28), (14, 7))])
@pytest.mark.parametrize("loss", ["gffl", "mse"])
@pytest.mark.parametrize(
    "options", [{}, {"ds2s": "full"}, {"ds2s": "full", "wavelet": "db2"}, {"ds2s": "full", "levels": 0}]
)
def test_sfkd_by_matrices_equals_its_steps_one_by_one(grids, loss, options):
    teacher, student = grids
    pair = StagePair(Stage("t", 24, *teacher), Stage("s", 12, *student))
    method = bound(SFKD(loss=loss, **options), [pair])
    for parameter in method.parameters():  # away from the identity
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, y, grid = torch.randn(4, 12, *student), torch.randn(4, 24, *teacher), method._grids[0]

    def coefficients(image):
        if loss == "mse":
            return image.flatten(2).transpose(1, 2)
        return torch.einsum("nk,bck->bnc", low_waves(grid, 5)[0], image.flatten(2))

    resampled = F.interpolate(y, grid, mode="bilinear", antialias=True)
    torch.testing.assert_close(method.encode_stage(0, y), coefficients(resampled), atol=1e-5, rtol=1e-4)
    aligned = F.interpolate(x, grid, mode="bilinear", antialias=True)
    aligned = F.conv2d(aligned, method.project[0].weight[:, :, None, None])
    if options:
        bands = dwt2(aligned, method.wavelet, method.levels_of(pair))
        aligned = idwt2(method.refine[0].refine(bands), method.wavelet)
    torch.testing.assert_close(method.coefficients(0, x), coefficients(aligned), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("grid", "keep", "sigma"), [((7, 7), 5, 0.5), ((4, 6), 4, 0.3), ((8, 8), 1, 0.5)])
def test_gffl_is_the_formula(grid, keep, sigma):
    student, target = (torch.randn(12, keep * keep, 3, dtype=torch.float64) for _ in range(2))
    gffl = GFFL(grid, keep, sigma)
    cycles = low_waves(grid, keep)[1].numpy()
    weight = np.exp(-((cycles / (np.array(grid) / 2)) ** 2).sum(1) / (2 * sigma**2))
    rho = [[np.corrcoef(student[:, n, d], target[:, n, d])[0, 1] for d in range(3)] for n in range(keep * keep)]
    expected = (weight[:, None] * (1 - np.array(rho)) ** 2).sum() / (3 * weight.sum())
    assert gffl(student, target).item() == pytest.approx(expected, rel=1e-5)


def test_the_last_stage_is_left_to_the_logits():
    pairs = [StagePair(Stage(f"t{n}", 8, 8, 8), Stage(f"s{n}", 8, 8, 8)) for n in range(4)]
    assert SFKD().automatic_pairs(pairs, None) == pairs[:3]
    assert SFKD(kd_weight=0.0).automatic_pairs(pairs, None) == pairs
    assert SFKD().automatic_pairs(pairs[:1], None) == pairs[:1]
    assert FitNet().automatic_pairs(pairs, None) == pairs


def test_stages_share_the_weight():
    assert bound(SFKD())._weights == [0.5, 0.5]
    assert bound(FitNet())._weights == [1.0, 1.0]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [(1, "1 x 1, DS2S on 0 levels"), (4, "4 x 4, DS2S on 1 level"), (6, "8 x 8, DS2S on 2 levels")],
)
def test_the_grid_bounds_the_levels(grid, expected):
    pair = StagePair(Stage("t", 8, 16, 16), Stage("s", 8, 16, 16))
    assert bound(SFKD(grid=grid, ds2s="full"), [pair]).describe_pair(0).startswith(expected)
