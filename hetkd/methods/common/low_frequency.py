"""What SFKD and UHKD share: both compare the low frequencies of maps, on a grid where teacher and student meet."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hetkd.features.adapter import StagePair
from hetkd.features.grid import common_grid, resampling
from hetkd.methods.common.stagewise import FeatureMethod
from hetkd.methods.common.statistics import ChannelReduction
from hetkd.spectral import low_waves
from hetkd.spectral.precision import separable
from hetkd.utils.checks import choice, whole_number


class LowFrequencyMethod(FeatureMethod):
    """Base of methods that compare coefficients of low frequencies ``[B, N, D]``: N waves, D channels.

    The teacher's coefficients are targets without parameters; the student's channels go through a learnt 1x1
    convolution. Neither depends on the grid of the maps: resampling to the common grid and the waves are one fixed
    matrix for each native grid. The last stage is left to the loss on logits, because measurements favour that
    (docs/research/ablations.md).

    Args:
        feature_weight: Weight of the features' loss; ``stage_weights`` divide it among the stages.
        grid: Largest side of the common grid in pixels; ``None``: 8, and 32 for segmentation.
        keep: K, the waves kept per axis; ``None`` keeps 5 of 8, 21 of 32, or fewer on a smaller grid.
        width: D, the largest number of channels to compare; a fixed orthonormal map reduces a wider teacher to it.
        reduction: How that map is chosen: ``"orthogonal"``, at random, or ``"pca"``, from the first batch.
        kd_weight: Weight of the KL divergence between logits. Use 0 for a teacher without a classifier; the last stage
            is then compared too.
        temperature: T, for both sides of the KL divergence.
        **common: ``stage_weights`` and ``ce_weight`` of `StagewiseMethod`.
    """

    batch_statistics = "all"

    def __init__(
        self,
        *,
        feature_weight: float = 100.0,
        grid: int | None = None,
        keep: int | None = None,
        width: int = 256,
        reduction: str = "orthogonal",
        kd_weight: float = 10.0,
        temperature: float = 4.0,
        **common: Any,
    ) -> None:
        super().__init__(feature_weight=feature_weight, kd_weight=kd_weight, temperature=temperature, **common)
        self.leaves_last_stage = self.kd_weight > 0
        self._grid = None if grid is None else whole_number("grid", grid)
        self.keep = None if keep is None else whole_number("keep", keep)
        self.width = whole_number("width", width)
        self.reduction = choice("reduction", reduction, ["orthogonal", "pca"])

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make the fixed maps of these stage pairs; see `Method.bind`.

        Raises:
            ValueError: If ``keep`` is more than a common grid has.
        """
        super().bind(pairs)
        self._grids = [self.grid_of(pair) for pair in pairs]
        self._keeps = [self._keep_of(pair, min(grid)) for pair, grid in zip(pairs, self._grids, strict=True)]
        self.reduce = nn.ModuleList(ChannelReduction(p.teacher.channels, self.width, self.reduction) for p in pairs)
        self.teacher_view = self.views_of([pair.teacher.grid for pair in pairs])
        self.student_view = self.views_of([pair.student.grid for pair in pairs])
        self.project = self.projections_from([pair.student.channels for pair in pairs])

    @property
    def grid(self) -> int:
        """Largest side of the common grid in pixels."""
        return self._grid or self.task.common_grid

    def grid_of(self, pair: StagePair) -> tuple[int, int]:
        """Return the common grid of a stage pair."""
        return common_grid(pair.teacher.grid, pair.student.grid, 1, self.grid)

    def waves_of(self, index: int) -> Tensor:
        """Return the maps ``[N, h, w]`` of the common grid whose products with a map are compared."""
        return low_waves(self._grids[index], self._keeps[index])[0].unflatten(1, self._grids[index])

    def views_of(self, sizes: Sequence[tuple[int, int]]) -> nn.ModuleList:
        """Return for each stage pair what makes coefficients of maps of these sizes."""
        return nn.ModuleList(View(size, self.waves_of(index)) for index, size in enumerate(sizes))

    def projections_from(self, channels: Sequence[int]) -> nn.ModuleList:
        """Return for each stage pair a learnt map from so many channels to the D that are compared."""
        widths = [min(pair.teacher.channels, self.width) for pair in self.pairs or ()]
        return nn.ModuleList(aligning_projection(*sizes) for sizes in zip(channels, widths, strict=True))

    def _keep_of(self, pair: StagePair, largest: int) -> int:
        if self.keep is None:
            return min(self.task.kept_waves(self.grid), largest)
        if self.keep > largest:
            raise ValueError(
                f"keep={self.keep} must be between 1 and {largest}, the smallest side of the grid of the stage pair "
                f"{pair.teacher} / {pair.student}."
            )
        return self.keep

    def describe_pair(self, index: int) -> str:
        """Return grid and kept frequencies of stage pair ``index``."""
        (height, width), keep = self._grids[index], self._keeps[index]
        return f"{height} x {width}, {keep} x {keep} frequencies"

    def describe_target(self, index: int) -> dict[str, Any]:
        """Return grid, waves and channels: SFKD and UHKD have the same targets where these are the same."""
        return {
            "what": "low frequencies",
            "grid": list(self._grids[index]),
            "keep": self._keeps[index],
            "width": self.width,
            "reduction": self.reduction,
        }

    def encode_stage(self, index: int, x: Tensor) -> Tensor:
        """Return the teacher's coefficients ``[B, N, D]``."""
        return cast(Tensor, self.reduce[index](self.teacher_view[index](x)))

    def coefficients(self, index: int, x: Tensor) -> Tensor:
        """Return the student's ``[B, N, D]`` that are to agree with `encode_stage`, for its map ``[B, C, h, w]``.

        What is projected are the few coefficients: the same as those of projected pixels.
        """
        return cast(Tensor, self.project[index](self.student_view[index](x)))


class View(nn.Module):
    """Takes the products of a map with waves of a common grid, to which it is resampled: both are one matrix.

    Args:
        size: Height h and width w of the map.
        waves: ``[N, *grid]``.
    """

    def __init__(self, size: tuple[int, int], waves: Tensor) -> None:
        super().__init__()
        rows, columns = (resampling(old, new) for old, new in zip(size, waves.shape[1:], strict=True))
        self.register_buffer("matrix", separable(waves, rows.T, columns.T).flatten(1).contiguous(), persistent=False)

    matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, h, w]`` to ``[B, N, C]``."""
        return torch.matmul(self.matrix.to(x.dtype), x.flatten(2).transpose(1, 2))


def aligning_projection(channels: int, width: int) -> nn.Linear:
    """Return a linear map without bias: the identity if it can be, else an orthogonal one."""
    projection = nn.Linear(channels, width, bias=False)
    if channels == width:
        nn.init.eye_(projection.weight)
    else:
        nn.init.orthogonal_(projection.weight)
    return projection
