"""UHKD: feature distillation in the frequency domain (arXiv 2510.24116).

Only the paper's abstract is public knowledge here; the internals are this project's own reading of it.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.features.adapter import StagePair
from hetkd.features.grid import to_grid
from hetkd.methods.common.low_frequency import LowFrequencyMethod
from hetkd.methods.common.method import register_method
from hetkd.methods.common.statistics import TARGET_EPS, standardize_batch
from hetkd.utils.checks import positive


@register_method("uhkd")
class UHKD(LowFrequencyMethod):
    r"""Compact frequency-domain targets of the teacher (FTM), matched by an aligned student (FAM).

    For each stage pair but the last, with the student's map s and the teacher's map t on a common G x G grid:

    .. math::
        T &= \operatorname{std}(\mathcal F_K\, R t) &&\text{FTM: the } K \times K \text{ lowest waves, no parameters} \\
        S &= \operatorname{std}(\mathcal F_K\, A(s)) &&\text{FAM: } A \text{ is learnt, and dropped after training} \\
        L &= \operatorname{mean} (S - T)^2

    A is a 1x1 convolution to the teacher's channels, or with ``expansion`` two of them with GELU between; R a fixed
    orthonormal map of the teacher's channels where it has more than D; std standardises each coefficient over the batch
    of all processes. Targets do not depend on the native grid, so maps of different sizes need no resampling.

    The loss is ``ce_weight CE + kd_weight KL + feature_weight sum over stages of weight times L``. The last stage is
    left to KL. docs/research/ablations.md has what each part is worth.

    Args:
        expansion: Channels between two convolutions of FAM, as a multiple of the student's; ``None``: one convolution.
        **common: Options of `LowFrequencyMethod`.

    Raises:
        ValueError: If an option is out of range, or a stage's grid is too small for ``keep``.
    """

    term = "uhkd"

    def __init__(self, *, expansion: float | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.expansion = None if expansion is None else positive("expansion", expansion)

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make the alignment modules for these stage pairs; see `Method.bind`.

        Raises:
            ValueError: If a grid is too small for ``keep``.
        """
        super().bind(pairs)
        if self.expansion is not None:
            widths = [max(1, round(self.expansion * pair.student.channels)) for pair in pairs]
            self.expand = nn.ModuleList(nn.Linear(p.student.channels, n) for p, n in zip(pairs, widths, strict=True))
            self.student_view = self.views_of(self._grids)
            self.project = self.projections_from(widths)

    def compare(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the mean squared error between the coefficients of both sides; see `FeatureMethod.compare`."""
        student = standardize_batch(self.coefficients(index, x))
        return F.mse_loss(student, standardize_batch(target, eps=TARGET_EPS))

    def coefficients(self, index: int, x: Tensor) -> Tensor:
        """Return what FAM makes of the student's map; see `LowFrequencyMethod.coefficients`."""
        if self.expansion is None:
            return super().coefficients(index, x)
        expanded = F.gelu(self.expand[index](to_grid(x, self._grids[index]).movedim(1, 3)))
        return cast(Tensor, self.project[index](self.student_view[index](expanded.movedim(3, 1))))
