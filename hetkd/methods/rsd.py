"""RSD: redundancy suppression between architectures (arXiv 2507.21844)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.features.adapter import StagePair
from hetkd.methods.common.method import register_method
from hetkd.methods.common.stagewise import PooledMethod
from hetkd.methods.common.statistics import TARGET_EPS, standardize_batch
from hetkd.utils.checks import not_negative, whole_number
from hetkd.utils.distributed import sum_over_processes, world_size


@register_method("rsd")
class RSD(PooledMethod):
    r"""Redundancy suppression distillation (ICCV 2025, arXiv 2507.21844), on the vectors before the classifiers.

    A learnt projector g (linear - batch norm - GELU - linear) brings the student's vector to the teacher's width. With
    both standardised over the batch of all processes, C is their cross-correlation, and should be the identity:

    .. math:: L = w_{ce}\,CE + w_f \Big( \sum_i (1 - C_{ii})^2 + \kappa \sum_{i \ne j} C_{ij}^2 \Big), \quad
        C = \tfrac1B \, \tilde t^{\,\top} \widetilde{g(s)}

    Args:
        feature_weight: Weight of the features' loss.
        decorrelation: :math:`\kappa`, the weight of correlations between different dimensions.
        expansion: Hidden width of the projector, as a multiple of the student's width.
        **common: Options of `StagewiseMethod`; the authors use no ``kd_weight``.
    """

    batch_statistics = "process"
    term = "rsd"

    def __init__(
        self,
        *,
        feature_weight: float = 0.1,
        decorrelation: float = 0.01,
        expansion: int = 2,
        **common: Any,
    ) -> None:
        super().__init__(feature_weight=feature_weight, **common)
        self.decorrelation = not_negative("decorrelation", decorrelation)
        self.expansion = whole_number("expansion", expansion)

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make the projectors for these stage pairs; see `Method.bind`."""
        super().bind(pairs)
        self.project = nn.ModuleList(self._projector(p.student.channels, p.teacher.channels) for p in pairs)

    def _projector(self, channels: int, width: int) -> nn.Module:
        middle = self.expansion * channels
        return nn.Sequential(
            nn.Linear(channels, middle, bias=False),
            nn.BatchNorm1d(middle),
            nn.GELU(),
            nn.Linear(middle, width, bias=False),
        )

    def describe_pair(self, index: int) -> str:
        """Return what is compared."""
        return "cross-correlation"

    def compare_vectors(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the distance of the cross-correlation from the identity; see `PooledMethod.compare_vectors`."""
        return redundancy(self.project[index](x), target, self.decorrelation)


def redundancy(student: Tensor, target: Tensor, decorrelation: float) -> Tensor:
    """Return how far the cross-correlation of ``[B, D]`` and ``[B, D]`` over all processes is from the identity."""
    student, target = standardize_batch(student), standardize_batch(target, eps=TARGET_EPS)
    cross = sum_over_processes(target.T @ student) / (len(student) * world_size())
    squares = (cross - torch.eye(len(cross), device=cross.device)).square()
    on_diagonal = squares.diagonal().sum()
    return on_diagonal + decorrelation * (squares.sum() - on_diagonal)
