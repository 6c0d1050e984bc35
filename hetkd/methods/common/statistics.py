"""Standardise and compare coefficients of student and teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.utils.distributed import gather_over_processes, sum_over_processes, world_size

_EPS = 1e-12
TARGET_EPS = 1e-30  # targets have no gradient that a small divisor could blow up, and may be small as a whole
_RELATIVE_EPS = 1e-10


def standardize_batch(x: Tensor, *, eps: float = _EPS) -> Tensor:
    """Give each coefficient ``[B, ...]`` mean 0 and variance 1 over the batch of all processes.

    Args:
        x: ``[B, ...]``.
        eps: Added to the variance.

    Raises:
        ValueError: If the batch of all processes has a single image.

    Example:
        >>> standardize_batch(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        tensor([[-1., -1.],
                [ 1.,  1.]])
    """
    centred, variance, floor = _centre(x, eps)
    return centred * (variance + floor).rsqrt()


def _centre(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return coefficients without their mean over the batch, their variance, and the least variance that counts."""
    mean = _batch_mean(x)
    centred = x - mean
    variance = _batch_mean(centred.square())
    # Rounding noise on a constant coefficient is no variance.
    return centred, variance, _RELATIVE_EPS * (variance + mean.square()) + eps


def correlation_loss(student: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    r"""Compare coefficients by their correlation over the batch of all processes.

    .. math:: L = \frac{\sum_{nd} w_n (1 - \rho_{nd})^2}{\sum_{nd} w_n}

    where :math:`\rho_{nd}` is the correlation of coefficient n of channel d between student and teacher. With the mean
    of a map as its only coefficient this is the diagonal of RSD (arXiv 2507.21844). Coefficients that do not vary in
    the teacher are left out.

    Args:
        student: ``[B, N, D]``.
        target: Of the same shape, without gradient.
        weight: ``[N]``, not negative.

    Returns:
        A scalar between 0 and 4.

    Raises:
        ValueError: If the batch of all processes has a single image.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
        >>> [round(correlation_loss(y, x, torch.ones(1)).item(), 4) for y in (5 * x + 1, -x)]
        [0.0, 4.0]
    """
    student, student_variance, student_floor = _centre(student, _EPS)
    target, target_variance, target_floor = _centre(target, TARGET_EPS)
    scale = (student_variance + student_floor).rsqrt() * (target_variance + target_floor).rsqrt()
    correlation = _batch_mean(student * target) * scale
    weights = weight[:, None] * (target_variance > target_floor)
    return (weights * (1 - correlation).square()).sum() / weights.sum().clamp_min(_EPS)


def infonce(student: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """Contrast each student sample's target with those of all other samples (InfoNCE, arXiv 1807.03748).

    Args:
        student: ``[B, ...]``.
        target: Of the same shape, without gradient.
        temperature: Of the softmax over cosine similarities.

    Returns:
        A scalar; ``log(batch of all processes)`` where nothing is learnt yet.

    Example:
        >>> x = torch.eye(3)
        >>> infonce(x, x).item() < infonce(x, x.flip(0)).item()
        True
    """
    anchors = F.normalize(gather_over_processes(student.flatten(1)), dim=1)
    candidates = F.normalize(gather_over_processes(target.flatten(1)), dim=1)
    similarity = anchors @ candidates.T / temperature
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))


def _global_batch(x: Tensor) -> float:
    """Return the number of images in all processes; they all have as many as this one."""
    count = x.shape[0] * world_size()
    if count < 2:
        raise ValueError(
            "a batch of one image has no statistics: use larger batches (drop_last=True for the last one)."
        )
    return float(count)


def _batch_mean(x: Tensor) -> Tensor:
    return sum_over_processes(x.sum(0)) / _global_batch(x)


class ChannelReduction(nn.Module):
    """A fixed orthonormal map of the teacher's channels to fewer: nothing here is learnt.

    Args:
        channels: C of the teacher.
        width: D; with C <= D the map is the identity.
        kind: ``"orthogonal"``: a random rotation, the same for the same C and D. ``"pca"``: the principal components of
            the first batch (of all processes) that is encoded.
    """

    def __init__(self, channels: int, width: int, kind: str = "orthogonal") -> None:
        super().__init__()
        self.width = min(channels, width)
        self._fit_at_next_call = False
        if channels <= width:
            return
        generator = torch.Generator().manual_seed(channels * 65_537 + width)
        basis = torch.linalg.qr(torch.randn(channels, width, generator=generator))[0]
        self.register_buffer("basis", basis)
        if kind == "pca":
            self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
            self._fit_at_next_call = True

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, N, C]`` to ``[B, N, D]``."""
        if "basis" not in self._buffers:
            return x
        if self._fit_at_next_call:
            self._fit(x)
        return x @ self.basis.to(x.dtype)

    @property
    def is_fitted(self) -> bool:
        """Whether the map is of images that were seen."""
        return "fitted" in self._buffers and bool(self.fitted)

    def _fit(self, x: Tensor) -> None:
        self._fit_at_next_call = False
        if self.fitted:  # restored from a checkpoint
            return
        positions = x.flatten(0, 1).double()
        count = len(positions) * world_size()
        positions = positions - sum_over_processes(positions.sum(0)) / count
        covariance = sum_over_processes(positions.T @ positions) / count
        self.basis.copy_(torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : self.width])
        self.fitted.fill_(True)

    basis: Tensor
    fitted: Tensor
