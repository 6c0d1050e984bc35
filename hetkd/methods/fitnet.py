"""FitNet: the student's feature maps imitate the teacher's (arXiv 1412.6550)."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.features.adapter import StagePair
from hetkd.features.grid import meeting_grid, to_grid
from hetkd.methods.common.method import register_method
from hetkd.methods.common.stagewise import FeatureMethod
from hetkd.methods.common.statistics import TARGET_EPS, standardize_batch
from hetkd.utils.checks import choice


@register_method("fitnet")
class FitNet(FeatureMethod):
    r"""Hints (Romero et al., ICLR 2015, arXiv 1412.6550), on all stages at once as OFA-KD compares it.

    A learnt 1x1 convolution r brings the student's map to the teacher's channels; both maps meet on a common grid:

    .. math:: L = w_{ce}\,CE + w_f \sum_i w_i \operatorname{mean} (r_i(S_i) - T_i)^2

    The paper trains the first half of the student with one hint before everything else; here, as in later comparisons,
    all terms are learnt together. Across architectures this is the method that fails first, for it asks for the
    teacher's activations as they are. ``normalize="batch"``, which is not in the paper, asks for them standardised.

    Args:
        normalize: ``None`` takes the teacher's values as they are; ``"batch"`` standardises each over the batch of all
            processes, which is not in the paper.
        **common: Options of `StagewiseMethod`; ``kd_weight`` is 0 in the published comparisons.
    """

    term = "fitnet"
    stages_share_weight = False

    def __init__(self, *, normalize: str | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.normalize = None if normalize is None else choice("normalize", normalize, ["batch"])
        self.batch_statistics = None if normalize is None else "all"

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make the convolutions for these stage pairs; see `Method.bind`."""
        super().bind(pairs)
        self._grids = [meeting_grid(p.teacher.grid, p.student.grid) for p in pairs]
        self.project = nn.ModuleList(nn.Conv2d(p.student.channels, p.teacher.channels, 1, bias=False) for p in pairs)

    def describe_pair(self, index: int) -> str:
        """Return the grid of stage pair ``index``."""
        return "mse on {} x {}".format(*self._grids[index])

    def describe_target(self, index: int) -> dict[str, Any]:
        """Return the grid, on which alone the teacher's map depends."""
        return {"what": "map", "grid": list(self._grids[index])}

    def encode_stage(self, index: int, x: Tensor) -> Tensor:
        """Return the teacher's map ``[B, C_t, *grid]``."""
        return to_grid(x, self._grids[index])

    def compare(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the mean squared error; see `FeatureMethod.compare`."""
        student: Tensor = self.project[index](to_grid(x, self._grids[index]))
        if self.normalize == "batch":
            target = standardize_batch(target, eps=TARGET_EPS)
        return F.mse_loss(student, target)
