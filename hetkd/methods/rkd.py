"""RKD: distances and angles between images (arXiv 1904.05068)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hetkd.methods.common.method import register_method
from hetkd.methods.common.stagewise import PooledMethod
from hetkd.utils.checks import not_negative, one_positive

_TINY = 1e-24


@register_method("rkd")
class RKD(PooledMethod):
    r"""Relational knowledge distillation (Park et al., CVPR 2019, arXiv 1904.05068), on the vectors before classifiers.

    With h Huber's loss, :math:`d_{ij} = \|x_i - x_j\|_2 / \mu`, where :math:`\mu` is the mean distance in the batch,
    and :math:`a_{ijk}` the cosine of the angle at :math:`x_j` between :math:`x_i` and :math:`x_k`:

    .. math:: L = w_{ce}\,CE + w_f \big(w_d \operatorname{mean}_{ij} h(d^s_{ij}, d^t_{ij})
        + w_a \operatorname{mean}_{ijk} h(a^s_{ijk}, a^t_{ijk})\big)

    There are no parameters, and widths need not agree. The batch is that of each process; angles take memory with its
    cube.

    Args:
        distance_weight: :math:`w_d`, the weight of the distances.
        angle_weight: :math:`w_a`, the weight of the angles.
        feature_weight: :math:`w_f`, the weight of both together.
        **common: Options of `StagewiseMethod`; ``kd_weight`` is 0 in the published comparisons.
    """

    batch_statistics = "process"
    term = "rkd"

    def __init__(
        self,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        feature_weight: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(feature_weight=feature_weight, **common)
        one_positive(distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight = not_negative("distance_weight", distance_weight)
        self.angle_weight = not_negative("angle_weight", angle_weight)

    def describe_pair(self, index: int) -> str:
        """Return what is compared."""
        return "distances and angles"

    def compare_vectors(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return both parts, weighted; see `PooledMethod.compare_vectors`."""
        by_distance = F.smooth_l1_loss(distances(x), distances(target))
        return self.distance_weight * by_distance + self.angle_weight * F.smooth_l1_loss(angles(x), angles(target))


def distances(x: Tensor) -> Tensor:
    """Return the distances ``[B, B]`` between the rows of ``x`` ``[B, C]``, divided by the mean of distinct rows.

    Example:
        >>> distances(torch.tensor([[0.0], [1.0], [3.0]]))
        tensor([[0.0000, 0.5000, 1.5000],
                [0.5000, 0.0000, 1.0000],
                [1.5000, 1.0000, 0.0000]])
    """
    distance = pairwise(x)
    return distance / (distance.sum() / (len(x) * (len(x) - 1)))


def angles(x: Tensor) -> Tensor:
    """Return the cosines ``[B, B, B]``, as ``[j, i, k]``, of the angles at row j between rows i and k of ``x``.

    By the law of cosines, in float64: the differences of all rows would take more time and memory.
    """
    distance = pairwise(x.double())
    inverse = torch.where(distance > _TINY, 1 / distance.clamp_min(_TINY), 0)
    squares = distance.square()
    doubled = squares.unsqueeze(2) + squares.unsqueeze(1) - squares.unsqueeze(0)
    return (doubled * (inverse / 2).unsqueeze(2) * inverse.unsqueeze(1)).to(x.dtype)


def pairwise(x: Tensor) -> Tensor:
    """Return the distances ``[B, B]`` between rows ``[B, C]``, exact for rows that are nearly equal."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
