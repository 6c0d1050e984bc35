"""AT: where the teacher looks (arXiv 1612.03928)."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hetkd.features.adapter import StagePair
from hetkd.features.grid import meeting_grid, to_grid
from hetkd.methods.common.method import register_method
from hetkd.methods.common.stagewise import FeatureMethod


@register_method("at")
class AT(FeatureMethod):
    r"""Activation-based attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928).

    The attention map Q of a stage is the mean over channels of its squared activations; resampled to a common grid,
    laid out as a vector and divided by its length:

    .. math:: L = w_{ce}\,CE + w_f \sum_i w_i \operatorname{mean}
        \Big( \frac{Q^s_i}{\|Q^s_i\|_2} - \frac{Q^t_i}{\|Q^t_i\|_2} \Big)^2

    There are no parameters. A grid of one pixel has no attention: such stage pairs are left out of the automatic
    pairing.

    Args:
        feature_weight: Weight of the features' loss; the authors use 1000.
        **common: Options of `StagewiseMethod`; ``kd_weight`` is 0 in the published comparisons.

    Raises:
        ValueError: If a stage pair meets on a grid of one pixel.
    """

    term = "at"
    stages_share_weight = False

    def __init__(
        self,
        *,
        feature_weight: float = 1000.0,
        **common: Any,
    ) -> None:
        super().__init__(feature_weight=feature_weight, **common)

    def automatic_pairs(self, pairs: Sequence[StagePair], pooled: StagePair | None) -> list[StagePair]:
        """Return the pairs that meet on more than one pixel; see `Method.automatic_pairs`."""
        return super().automatic_pairs([pair for pair in pairs if _grid(pair) != (1, 1)], pooled)

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Take the stage pairs; see `Method.bind`.

        Raises:
            ValueError: If there is none, or one has no attention map.
        """
        super().bind(pairs)
        self._grids = [_grid(pair) for pair in pairs]
        for pair, grid in zip(pairs, self._grids, strict=True):
            if grid == (1, 1):
                raise ValueError(
                    f"method 'at' compares attention over a map, but {pair.teacher} / {pair.student} meet on one "
                    "pixel: use other stages or a larger input_size."
                )

    def describe_pair(self, index: int) -> str:
        """Return the grid of stage pair ``index``."""
        return "attention on {} x {}".format(*self._grids[index])

    def describe_target(self, index: int) -> dict[str, Any]:
        """Return the grid, on which alone the teacher's attention depends."""
        return {"what": "attention", "grid": list(self._grids[index])}

    def encode_stage(self, index: int, x: Tensor) -> Tensor:
        """Return the teacher's attention ``[B, h * w]``."""
        return attention(x, self._grids[index])

    def compare(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the mean squared error of attention; see `FeatureMethod.compare`."""
        return F.mse_loss(attention(x, self._grids[index]), target)


def attention(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the attention ``[B, h * w]``, of length 1, of a feature map ``[B, C, H, W]`` on a grid of h x w.

    Example:
        >>> import torch
        >>> attention(torch.ones(1, 8, 4, 4), (2, 2))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    return F.normalize(to_grid(x.square().mean(1, keepdim=True), grid).flatten(1), dim=1)


def _grid(pair: StagePair) -> tuple[int, int]:
    return meeting_grid(pair.teacher.grid, pair.student.grid)
