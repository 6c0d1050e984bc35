"""RSD: redundancy suppression between architectures (arXiv 2507.21844)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hetkd.adapter import StagePair
from hetkd.distributed import sum_over_processes, world_size
from hetkd.methods.base import not_negative, register_method, whole_number
from hetkd.methods.feature import PooledMethod, count_parameters
from hetkd.methods.matching import TARGET_EPS, standardize_batch


@register_method("rsd")
class RSD(PooledMethod):
    r"""Redundancy suppression distillation (ICCV 2025, arXiv 2507.21844), on the vectors before the classifiers.

    A learnt projector g (linear - batch norm - GELU - linear) brings the student's vector to the teacher's width.
    With both standardised over the batch of all processes, C is their cross-correlation, and should be the
    identity:

    .. math:: L = w_{ce}\,CE + w_f \Big( \sum_i (1 - C_{ii})^2 + \kappa \sum_{i \ne j} C_{ij}^2 \Big), \quad
        C = \tfrac1B \, \tilde t^{\,\top} \widetilde{g(s)}

    Args:
        feature_weight: Weight of the features' loss.
        decorrelation: :math:`\kappa`, weight of the correlations between different dimensions.
        expansion: Width of the projector's middle, in widths of the student.
        ce_weight: Weight of the cross-entropy with the labels.
        kd_weight: Weight of the KL divergence between logits; the authors use none.
        temperature: Of the KL divergence.
    """

    batch_is_local = True
    term = "rsd"

    def __init__(
        self,
        *,
        feature_weight: float = 0.1,
        decorrelation: float = 0.01,
        expansion: int = 2,
        ce_weight: float = 1.0,
        kd_weight: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(
            feature_weight=feature_weight, ce_weight=ce_weight, kd_weight=kd_weight, temperature=temperature
        )
        self.decorrelation = not_negative("decorrelation", decorrelation)
        self.expansion = whole_number("expansion", expansion)

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Makes the projectors for these stage pairs; see `Method.bind`."""
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

    def describe(self, index: int) -> str:
        """Returns what is compared."""
        return "cross-correlation"

    def added_parameters(self, index: int) -> int:
        """Returns the parameters of the projector of stage pair ``index``."""
        return count_parameters(self.project[index])

    def compare_vectors(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Returns the distance of the cross-correlation from the identity; see `PooledMethod.compare_vectors`."""
        return redundancy(self.project[index](x), target, self.decorrelation)


def redundancy(student: Tensor, target: Tensor, decorrelation: float) -> Tensor:
    """Returns how far the cross-correlation of ``[B, D]`` and ``[B, D]`` over all processes is from the identity."""
    student, target = standardize_batch(student), standardize_batch(target, eps=TARGET_EPS)
    cross = sum_over_processes(target.T @ student) / (len(student) * world_size())
    squares = (cross - torch.eye(len(cross), device=cross.device)).square()
    on_diagonal = squares.diagonal().sum()
    return on_diagonal + decorrelation * (squares.sum() - on_diagonal)
