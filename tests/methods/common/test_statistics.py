"""Statistics over a batch, and the losses made of them."""

import math

import numpy as np
import pytest
import torch

from hetkd.methods.common.statistics import ChannelReduction, correlation_loss, infonce, standardize_batch


def test_correlation_loss_equals_numpy():
    student, target = torch.randn(20, 2, 3, dtype=torch.float64), torch.randn(20, 2, 3, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.25], dtype=torch.float64)
    rho = np.array(
        [[np.corrcoef(student[:, n, d], target[:, n, d])[0, 1] for d in range(3)] for n in range(2)],
    )
    expected = ((1 - rho) ** 2 * weight.numpy()[:, None]).sum() / (3 * weight.sum().item())
    assert correlation_loss(student, target, weight).item() == pytest.approx(expected, rel=1e-9)


def test_correlation_loss_of_one_coefficient_is_the_diagonal_of_rsd():
    student, target = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, 5, dtype=torch.float64)
    s = (student - student.mean(0)) / student.std(0, unbiased=False)
    t = (target - target.mean(0)) / target.std(0, unbiased=False)
    on = (torch.diagonal(s.T @ t / 32) - 1).square().mean()
    found = correlation_loss(student[:, None], target[:, None], torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(found, on)


def test_correlation_loss_ignores_scale_shift_and_constant_targets():
    target = torch.randn(16, 3, 4)
    student = 3 * target + 5
    weight = torch.ones(3)
    assert correlation_loss(student, target, weight) < 1e-6
    target[:, :, 2] = 7.0
    assert correlation_loss(student, target, weight) < 1e-6
    assert correlation_loss(-student, target, weight) == pytest.approx(4.0, abs=1e-4)


def test_correlation_loss_sees_targets_of_any_scale():
    student, target, weight = torch.randn(16, 3, 4), torch.randn(16, 3, 4), torch.ones(3)
    torch.testing.assert_close(
        correlation_loss(student, 1e-12 * target, weight), correlation_loss(student, target, weight)
    )


def test_a_batch_of_one_has_no_statistics():
    with pytest.raises(ValueError, match="batch of one image"):
        standardize_batch(torch.ones(1, 3))


def test_infonce_is_the_log_of_the_batch_where_nothing_is_learnt():
    constant = torch.ones(8, 3)
    assert infonce(constant, constant).item() == pytest.approx(math.log(8))
    distinct = torch.eye(8)
    assert infonce(distinct, distinct) < 0.01


@pytest.mark.parametrize("kind", ["orthogonal", "pca"])
def test_channel_reduction_is_orthonormal_and_fixed(kind):
    reduce = ChannelReduction(24, 8, kind)
    x = torch.randn(16, 25, 24) @ torch.randn(24, 24)
    first = reduce(x)
    assert first.shape == (16, 25, 8)
    torch.testing.assert_close(reduce.basis.T @ reduce.basis, torch.eye(8), atol=1e-5, rtol=1e-5)
    other = torch.randn(4, 25, 24)
    torch.testing.assert_close(reduce(other), other @ reduce.basis)
    restored = ChannelReduction(24, 8, kind)
    restored.load_state_dict(reduce.state_dict())
    torch.testing.assert_close(restored(x), first)


def test_pca_keeps_the_most_variance():
    x = torch.randn(64, 9, 24) * torch.linspace(0.1, 3, 24)
    pca, orthogonal = ChannelReduction(24, 8, "pca")(x), ChannelReduction(24, 8)(x)
    top = torch.linalg.eigvalsh(torch.cov(x.flatten(0, 1).T.double(), correction=0)).flip(0)[:8].sum()
    variance = pca.double().flatten(0, 1).var(0, unbiased=False).sum()
    torch.testing.assert_close(variance, top, atol=1e-3, rtol=1e-4)
    assert variance > orthogonal.flatten(0, 1).var(0).sum()
