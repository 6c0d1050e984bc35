"""Standardise and compare coefficients of student and teacher."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.utils.distributed import gather_over_processes, sum_over_processes, world_size

_EPS = 1e-12
TARGET_EPS = 1e-30  # targets have no gradient that a small divisor could blow up, and may be small as a whole
_RELATIVE_EPS = 1e-10


def standardize_sample(x: Tensor) -> Tensor:
    """Divide each sample ``[B, ...]`` by the root mean square of its own coefficients."""
    return x * (x.square().mean(dim=tuple(range(1, x.ndim)), keepdim=True) + _EPS).rsqrt()


def standardize_batch(x: Tensor, *, is_complex: bool = False, eps: float = _EPS) -> Tensor:
    """Give each coefficient ``[B, ...]`` mean 0 and variance 1 over the batch of all processes.

    Args:
        x: ``[B, ...]``; for complex numbers with real and imaginary parts in the last axis.
        is_complex: Whether real and imaginary parts share one variance.
        eps: Added to the variance.

    Raises:
        ValueError: If the batch of all processes has a single image.

    Example:
        >>> standardize_batch(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        tensor([[-1., -1.],
                [ 1.,  1.]])
    """
    centred, variance, floor = _centre(x, is_complex, eps)
    return centred * (variance + floor).rsqrt()


def _centre(x: Tensor, is_complex: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return coefficients without their mean over the batch, their variance, and the least variance that counts."""
    mean = _batch_mean(x)
    centred = x - mean
    variance = _batch_mean(centred.square())
    # Rounding noise on a constant coefficient is no variance.
    floor = _RELATIVE_EPS * (variance + mean.square()) + eps
    if is_complex:
        variance, floor = variance.sum(-1, keepdim=True), floor.sum(-1, keepdim=True)
    return centred, variance, floor


def correlation_losses(
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    weight: Tensor,
    *,
    is_complex: bool = False,
    decorrelation: float = 0.0,
) -> list[Tensor]:
    r"""Compare coefficients of some stages by their correlation over the batch of all processes.

    .. math:: L = \frac{\sum_k w_k (1 - \rho_k)^2}{\sum_k w_k}, \quad
        \rho_k = \frac{\mathrm{Re} \sum_b \tilde s_{bk} \overline{\tilde t_{bk}}}{\|\tilde s_k\| \|\tilde t_k\|}

    with coefficients centred over the batch. At zero frequency alone this is the diagonal of RSD (arXiv 2507.21844).
    Coefficients that do not vary in the teacher are left out.

    Args:
        students: ``[B, D, *K]`` of each stage, or ``[B, D, *K, 2]`` for complex coefficients.
        targets: Of the same shapes, without gradient.
        weight: ``[N]``, not negative: of the D * K coefficients of the first stage, then of the second, and so on.
        is_complex: Whether the last axis holds real and imaginary parts.
        decorrelation: Weight of RSD's off-diagonal term: the squared correlations between different channels at the
            same frequency, summed over one and averaged over the other.

    Returns:
        A scalar a stage, between 0 and 4 (without ``decorrelation``).

    Raises:
        ValueError: If the batch of all processes has a single image.
    """
    channels = [x.shape[1] for x in students]
    student, sizes = _side_by_side(students, is_complex)
    target, _ = _side_by_side(targets, is_complex)
    student, student_variance, student_floor = _centre(student, True, _EPS)
    target, target_variance, target_floor = _centre(target, True, TARGET_EPS)
    student_scale, target_scale = (student_variance + student_floor).rsqrt(), (target_variance + target_floor).rsqrt()
    correlation = _batch_mean(student * target).sum(-1) * (student_scale * target_scale).squeeze(-1)
    weight = weight * (target_variance > target_floor).squeeze(-1)
    losses = _weighted_means((1 - correlation).square(), weight, sizes)
    if decorrelation:
        scaled = ((student * student_scale).split(sizes, 1), (target * target_scale).split(sizes, 1))
        parts = zip(channels, *scaled, weight.split(sizes), strict=True)
        losses = [loss + decorrelation * _off_diagonal(*part) for loss, part in zip(losses, parts, strict=True)]
    return losses


def _off_diagonal(channels: int, student: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    student, target = student.unflatten(1, (channels, -1)), target.unflatten(1, (channels, -1))
    cross = sum_over_processes(torch.einsum("bckr,bdkr->kcd", student, target)) / _global_batch(student)
    off = 1 - torch.eye(channels, device=cross.device, dtype=cross.dtype)
    weight = weight.unflatten(0, (channels, -1)).mean(0)
    return (weight * (cross * off).square().sum((1, 2)) / channels).sum() / weight.sum().clamp_min(_EPS)


def squared_errors(
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    weight: Tensor,
    *,
    is_complex: bool = False,
    standardize: bool = False,
) -> list[Tensor]:
    """Return the mean squared difference of some stages.

    Args:
        students: See `correlation_losses`.
        targets: See there.
        weight: See there.
        is_complex: See there.
        standardize: Whether targets go through `standardize_batch` first.

    Raises:
        ValueError: If they do, and the batch of all processes has a single image.
    """
    student, sizes = _side_by_side(students, is_complex)
    target, _ = _side_by_side(targets, is_complex)
    if standardize:
        target = standardize_batch(target, is_complex=True, eps=TARGET_EPS)
    return _weighted_means((student - target).square().mean((0, -1)), weight, sizes)


def weights_side_by_side(windows: Sequence[Tensor], channels: Sequence[int]) -> Tensor:
    """Return the ``weight`` of `correlation_losses`, from the weights ``[*K]`` of each stage and its channels D."""
    parts = zip(windows, channels, strict=True)
    return torch.cat([window.expand(count, *window.shape).flatten() for window, count in parts])


def _side_by_side(parts: Sequence[Tensor], is_complex: bool) -> tuple[Tensor, list[int]]:
    """Return the coefficients of all stages as ``[B, N, 1 or 2]``, and how many are of each.

    All of them at once cost as many operations, and exchanges between processes, as those of one stage.
    """
    flat = [x.flatten(1, -2) if is_complex else x.flatten(1).unsqueeze(-1) for x in parts]
    return torch.cat(flat, dim=1), [x.shape[1] for x in flat]


def _weighted_means(x: Tensor, weight: Tensor, sizes: list[int]) -> list[Tensor]:
    """Return the weighted means of the parts of ``[N]`` that have these sizes."""
    parts = zip((weight * x).split(sizes), weight.split(sizes), strict=True)
    return [product.sum() / of_part.sum().clamp_min(_EPS) for product, of_part in parts]


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
            "a batch of one image has no statistics: use larger batches (drop_last=True for the last one) or "
            "normalize='sample'."
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
        """Map ``[B, C, ...]`` to ``[B, D, ...]``."""
        if "basis" not in self._buffers:
            return x
        if self._fit_at_next_call:
            self._fit(x)
        return torch.einsum("bc...,cd->bd...", x, self.basis.to(x.dtype))

    @property
    def is_fitted(self) -> bool:
        """Whether the map is of images that were seen."""
        return "fitted" in self._buffers and bool(self.fitted)

    def _fit(self, x: Tensor) -> None:
        self._fit_at_next_call = False
        if self.fitted:  # restored from a checkpoint
            return
        positions = x.flatten(2).transpose(1, 2).flatten(0, 1).double()
        count = len(positions) * world_size()
        positions = positions - sum_over_processes(positions.sum(0)) / count
        covariance = sum_over_processes(positions.T @ positions) / count
        self.basis.copy_(torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : self.width])
        self.fitted.fill_(True)

    basis: Tensor
    fitted: Tensor
