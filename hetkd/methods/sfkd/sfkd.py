"""SFKD: distillation of spatial-spectral features through wavelet sub-bands (arXiv 2607.01906).

Only the paper's abstract is public knowledge here; the internals are this project's own reading of it.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.features.adapter import StagePair
from hetkd.features.grid import common_grid, to_grid
from hetkd.methods.common.low_frequency import LowFrequencyMethod
from hetkd.methods.common.method import register_method
from hetkd.methods.common.statistics import TARGET_EPS, correlation_loss, infonce, standardize_batch
from hetkd.methods.sfkd.ds2s import DS2S
from hetkd.spectral import dwt2, gaussian_window, idwt2, low_waves
from hetkd.spectral.wavelet import check_wavelet
from hetkd.utils.checks import choice, not_negative

_SIGMA = 0.5


@register_method("sfkd")
class SFKD(LowFrequencyMethod):
    r"""Features of all stages but the last, compared by a Gaussian-filtered frequency loss.

    For each stage pair, with the student's map s and the teacher's map t on a common G x G grid:

    .. math::
        \hat s &= P s &&\text{align: a learnt 1x1 convolution to D channels} \\
        \hat s &\leftarrow W^{-1}\, \mathrm{DS2S}(W \hat s) &&\text{refine: off by default (ds2s)} \\
        S, T &= \mathcal F_K\, \hat s,\ \mathcal F_K\, R t &&\text{the } K \times K \text{ lowest waves} \\
        L &= \frac{\sum_k w_k (1 - \rho_k)^2}{\sum_k w_k},\quad w_k = e^{-|f_k|^2 / 2 \sigma^2} &&\text{GFFL}

    W is a wavelet transform of J levels, R a fixed orthonormal map of the teacher's channels where it has more than D,
    :math:`\rho_k` the correlation over the batch of coefficient k of S and T, and :math:`f_k` its frequency as a
    fraction of Nyquist's. Without refinement W cancels itself, and is not computed. The teacher's map is never refined,
    for otherwise both sides could agree on a constant.

    The loss is ``ce_weight CE + kd_weight KL + feature_weight sum over stages of weight times L``. The last stage is
    left to KL. docs/research/ablations.md has what each part is worth.

    Args:
        ds2s: Streams of the refinement DS2S: ``"full"`` (both), ``"spatial"``, ``"spectral"``, or ``None`` for none.
        levels: J, the wavelet levels of DS2S, 0 to 3; ``None`` takes 2, or fewer on small grids, so that the coarsest
            band has at least 2 x 2 pixels.
        wavelet: Name of an orthogonal wavelet of PyWavelets, for DS2S.
        loss: ``"gffl"``; for comparison ``"mse"`` or ``"infonce"``, which compare pixels of the common grid, each
            standardised over the batch.
        sigma: Width of the Gaussian window as a fraction of the Nyquist frequency; ``math.inf`` weighs all waves alike.
            Neither it nor ``keep`` is for the losses of pixels.
        **common: Options of `LowFrequencyMethod`.

    Raises:
        ValueError: If an option is out of range, or a stage's grid is too small for it.
    """

    term = "sfkd"

    def __init__(
        self,
        *,
        ds2s: str | None = None,
        levels: int | None = None,
        wavelet: str = "haar",
        loss: str = "gffl",
        sigma: float = _SIGMA,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.ds2s = None if ds2s is None else choice("ds2s", ds2s, ["full", "spatial", "spectral"])
        if levels not in (None, 0, 1, 2, 3):
            raise ValueError(f"levels={levels} must be 0, 1, 2 or 3, or None for what the grid holds.")
        check_wavelet(wavelet)
        if ds2s is None and (levels is not None or wavelet != "haar"):
            raise ValueError(
                f"levels={levels} and wavelet={wavelet!r} have no use without refinement: add ds2s='full'."
            )
        self.levels, self.wavelet = levels, wavelet
        self.loss = choice("loss", loss, ["gffl", "mse", "infonce"])
        self.sigma = not_negative("sigma", sigma)
        if self.loss != "gffl" and (sigma != _SIGMA or self.keep is not None):
            raise ValueError(
                f"sigma={sigma:g} and keep={self.keep} choose frequencies, but loss={loss!r} compares pixels: leave "
                "both out, or use loss='gffl'."
            )

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make projections and refinements for these stage pairs; see `Method.bind`.

        Raises:
            ValueError: If a grid is too small for ``levels`` or ``keep``.
        """
        self._check_levels(pairs)
        super().bind(pairs)
        self.gffl = nn.ModuleList(
            GFFL(grid, keep, self.sigma) for grid, keep in zip(self._grids, self._keeps, strict=True)
        )
        if self.ds2s:
            self.student_view = self.views_of(self._grids)
            self.refine = nn.ModuleList(
                Refinement(min(pair.teacher.channels, self.width), grid, self.levels_of(pair), self.wavelet, self.ds2s)
                for pair, grid in zip(pairs, self._grids, strict=True)
            )

    def grid_of(self, pair: StagePair) -> tuple[int, int]:
        """Return the common grid of a stage pair, on which J levels fit."""
        return common_grid(pair.teacher.grid, pair.student.grid, 2 ** self.levels_of(pair), self.grid)

    def waves_of(self, index: int) -> Tensor:
        """Return what maps are multiplied by: waves for GFFL, for the other losses single pixels."""
        if self.loss == "gffl":
            return super().waves_of(index)
        grid = self._grids[index]
        return torch.eye(grid[0] * grid[1]).unflatten(1, grid)

    def describe_target(self, index: int) -> dict[str, Any]:
        """Return what `LowFrequencyMethod` does, or for the other losses that pixels are compared."""
        found = super().describe_target(index)
        return found if self.loss == "gffl" else {**found, "what": "pixels", "keep": None}

    def levels_of(self, pair: StagePair) -> int:
        """Return J for a stage pair; without DS2S there is no wavelet transform."""
        if self.ds2s is None:
            return 0
        if self.levels is not None:
            return self.levels
        side = min(self.grid, _smallest_side(pair))
        return next(levels for levels in range(self.task.levels, -1, -1) if levels == 0 or 2**levels < side)

    def _check_levels(self, pairs: Sequence[StagePair]) -> None:
        if self.ds2s is None or self.levels is None or not pairs:
            return
        pair = min(pairs, key=_most_levels)
        if self.levels > _most_levels(pair):
            raise ValueError(
                f"levels={self.levels} needs grids of at least {2**self.levels} x {2**self.levels}, but the stage pair "
                f"{pair.teacher} / {pair.student} has less: use levels={_most_levels(pair)}, other stages or a larger "
                "input_size."
            )

    def describe_pair(self, index: int) -> str:
        """Return grid, levels and what is compared at stage pair ``index``."""
        assert self.pairs is not None, "bind comes first"
        (height, width), keep, levels = self._grids[index], self._keeps[index], self.levels_of(self.pairs[index])
        refined = f", DS2S on {levels} level{'s' * (levels != 1)}" if self.ds2s else ""
        what = f"{keep} x {keep} frequencies" if self.loss == "gffl" else self.loss
        return f"{height} x {width}{refined}, {what}"

    def compare(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss between the student's coefficients and the target's; see `FeatureMethod.compare`."""
        student = self.coefficients(index, x)
        if self.loss == "gffl":
            return cast(Tensor, self.gffl[index](student, target))
        loss = F.mse_loss if self.loss == "mse" else infonce
        return loss(standardize_batch(student), standardize_batch(target, eps=TARGET_EPS))

    def coefficients(self, index: int, x: Tensor) -> Tensor:
        """Return the student's coefficients, refined before if that is asked; see `LowFrequencyMethod.coefficients`."""
        if self.ds2s is None:
            return super().coefficients(index, x)
        aligned = self.project[index](to_grid(x, self._grids[index]).movedim(1, 3)).movedim(3, 1)
        return cast(Tensor, self.student_view[index](self.refine[index](aligned)))


class GFFL(nn.Module):
    """Gaussian-filtered frequency loss: `correlation_loss` of waves, weighted by their frequencies.

    Args:
        grid: Of the maps, height and width.
        keep: Waves per axis.
        sigma: See `hetkd.spectral.gaussian_window`.
    """

    def __init__(self, grid: tuple[int, int], keep: int, sigma: float) -> None:
        super().__init__()
        rows, columns = low_waves(grid, keep)[1].T
        window = gaussian_window(*grid, sigma)[grid[0] // 2 - rows, grid[1] // 2 - columns]
        self.register_buffer("window", window, persistent=False)

    window: Tensor

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """Compare coefficients ``[B, K * K, D]``."""
        return correlation_loss(student, target, self.window.to(student.dtype))


class Refinement(nn.Module):
    """Takes maps to wavelet sub-bands, refines these by `DS2S`, and recombines them; arguments as there."""

    def __init__(self, channels: int, grid: tuple[int, int], levels: int, wavelet: str, streams: str) -> None:
        super().__init__()
        self.levels, self.wavelet = levels, wavelet
        self.refine = DS2S(channels, grid, levels, streams=streams)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, D, *grid]`` to the same shape."""
        return idwt2(self.refine(dwt2(x, self.wavelet, self.levels)), self.wavelet)


def _most_levels(pair: StagePair) -> int:
    """Return the most levels, up to 3, that both grids of a pair hold."""
    return next(levels for levels in (3, 2, 1, 0) if 2**levels <= _smallest_side(pair))


def _smallest_side(pair: StagePair) -> int:
    return min(*pair.teacher.grid, *pair.student.grid)
