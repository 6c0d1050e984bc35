"""Tokens to maps, and maps to common grids."""

import pytest
import torch
import torch.nn.functional as F

from hetkd.features.grid import common_grid, to_grid, tokens_to_map
from hetkd.spectral import dwt2


def test_tokens_to_map_drops_prefix_tokens_and_keeps_order():
    patches = torch.arange(6.0).reshape(1, 6, 1)
    tokens = torch.cat([torch.full((1, 2, 1), 99.0), patches], dim=1)
    expected = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert torch.equal(tokens_to_map(tokens, (32, 48), 16), expected)
    assert torch.equal(tokens_to_map(tokens, (32, 48)), expected)
    with pytest.raises(ValueError, match="do not hold"):
        tokens_to_map(tokens, (64, 64), 16)
    with pytest.raises(ValueError, match="do not form a grid"):
        tokens_to_map(torch.zeros(1, 3, 1), (16, 4800))


def test_what_inference_mode_saw_first_trains_later():
    x = torch.rand(2, 3, 22, 22, dtype=torch.float64)
    with torch.inference_mode():
        to_grid(x, (9, 9))
        dwt2(x, "db3", 1)
    x.requires_grad_()
    (to_grid(x, (9, 9)).sum() + dwt2(x, "db3", 1).low.square().sum()).backward()
    assert x.grad is not None


@pytest.mark.parametrize("sizes", [((14, 14), (16, 16)), ((7, 9), (4, 4)), ((5, 5), (8, 3))])
def test_to_grid_is_the_antialiased_interpolation_and_compiles(sizes):
    x = torch.randn(2, 3, *sizes[0], dtype=torch.float64)
    expected = F.interpolate(x, sizes[1], mode="bilinear", antialias=True)
    torch.testing.assert_close(to_grid(x, sizes[1]), expected, atol=1e-12, rtol=1e-12)
    torch._dynamo.reset()  # else sizes that were others before become symbols
    compiled = torch.compile(lambda x: to_grid(x, sizes[1]), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x.float()), expected.float())


def test_grids():
    assert common_grid((14, 14), (7, 7), 4) == (8, 8)
    assert common_grid((56, 28), (64, 64), 4) == (16, 16)
    assert common_grid((7, 5), (9, 9), 1) == (7, 5)
    x = torch.randn(2, 3, 7, 7)
    assert to_grid(x, (7, 7)) is x
    constant = torch.full((1, 1, 14, 14), 2.5)
    torch.testing.assert_close(to_grid(constant, (8, 8)), torch.full((1, 1, 8, 8), 2.5))
