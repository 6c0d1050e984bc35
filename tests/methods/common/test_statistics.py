"""Statistics over a batch, and the losses made of them."""

import math

import pytest
import torch

from hetkd.methods.common.statistics import (
    ChannelReduction,
    correlation_losses,
    infonce,
    squared_errors,
    standardize_batch,
    weights_side_by_side,
)


def correlation_loss(student, target, weight, **options):
    """Compares one stage ``[B, D, *K]``, weighted by ``[*K]``."""
    weights = weights_side_by_side([weight], [student.shape[1]])
    return correlation_losses([student], [target], weights, **options)[0]


def test_correlation_loss_of_real_coefficients_equals_numpy():
    student, target = torch.randn(20, 3, 2, dtype=torch.float64), torch.randn(20, 3, 2, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.25], dtype=torch.float64)
    rho = torch.stack(
        [
            torch.stack([torch.corrcoef(torch.stack([student[:, d, k], target[:, d, k]]))[0, 1] for k in range(2)])
            for d in range(3)
        ]
    )
    expected = ((1 - rho) ** 2 * weight).sum() / (3 * weight.sum())
    torch.testing.assert_close(correlation_loss(student, target, weight), expected)


def test_correlation_loss_at_zero_frequency_is_the_diagonal_of_rsd():
    student, target = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, 5, dtype=torch.float64)
    s = (student - student.mean(0)) / student.std(0, unbiased=False)
    t = (target - target.mean(0)) / target.std(0, unbiased=False)
    cross = s.T @ t / 32
    on = (torch.diagonal(cross) - 1).square().mean()
    off = (cross.square().sum() - torch.diagonal(cross).square().sum()) / 5
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(correlation_loss(student, target, one), on)
    torch.testing.assert_close(correlation_loss(student, target, one, decorrelation=0.01), on + 0.01 * off)


def test_correlation_loss_ignores_scale_shift_and_constant_targets():
    target = torch.randn(16, 4, 3, 2)
    student = 3 * target + 5
    weight = torch.ones(3)
    assert correlation_loss(student, target, weight, is_complex=True) < 1e-6
    target[:, 2] = 7.0
    assert correlation_loss(student, target, weight, is_complex=True) < 1e-6
    assert correlation_loss(-student, target, weight, is_complex=True) == pytest.approx(4.0, abs=1e-4)


@pytest.mark.parametrize("is_complex", [True, False])
def test_all_stages_at_once_are_compared_as_one_by_one(is_complex):
    end = (2,) if is_complex else ()
    students, targets = ([torch.randn(6, d, k, 3, *end) for d, k in ((4, 5), (7, 2), (3, 1))] for _ in range(2))
    weights = [torch.rand(k, 3) for k in (5, 2, 1)]
    joint = weights_side_by_side(weights, [4, 7, 3])
    options = {"is_complex": is_complex, "decorrelation": 0.1}
    for loss, *one in zip(
        correlation_losses(students, targets, joint, **options), students, targets, weights, strict=True
    ):
        torch.testing.assert_close(loss, correlation_loss(*one, **options))
    found = squared_errors(students, targets, joint, is_complex=is_complex, standardize=True)
    for loss, student, target, weight in zip(found, students, targets, weights, strict=True):
        error = (student - standardize_batch(target, is_complex=is_complex)).square()
        weight = weight.view(*weight.shape, *(1 for _ in end)).expand_as(error)
        torch.testing.assert_close(loss, (error * weight).sum() / weight.sum())


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
    x = torch.randn(16, 24, 5, 5) @ torch.randn(5, 5)
    first = reduce(x)
    assert first.shape == (16, 8, 5, 5)
    torch.testing.assert_close(reduce.basis.T @ reduce.basis, torch.eye(8), atol=1e-5, rtol=1e-5)
    other = torch.randn(4, 24, 5, 5)
    torch.testing.assert_close(reduce(other), torch.einsum("bchw,cd->bdhw", other, reduce.basis))
    restored = ChannelReduction(24, 8, kind)
    restored.load_state_dict(reduce.state_dict())
    torch.testing.assert_close(restored(x), first)


def test_pca_keeps_the_most_variance():
    x = torch.randn(64, 24, 3, 3) * torch.linspace(0.1, 3, 24)[:, None, None]
    pca, orthogonal = ChannelReduction(24, 8, "pca")(x), ChannelReduction(24, 8)(x)
    flat = x.transpose(0, 1).flatten(1).double()
    top = torch.linalg.eigvalsh(torch.cov(flat, correction=0)).flip(0)[:8].sum()
    variance = pca.double().transpose(0, 1).flatten(1).var(1, unbiased=False).sum()
    torch.testing.assert_close(variance, top, atol=1e-3, rtol=1e-4)
    assert variance > orthogonal.transpose(0, 1).flatten(1).var(1).sum()
