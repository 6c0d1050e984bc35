"""SFKD: distillation of spatial-spectral features through wavelet sub-bands (arXiv 2607.01906).

Only the paper's abstract is public knowledge here; the internals are this project's own reading of it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.features.adapter import StagePair
from hetkd.features.grid import common_grid, to_grid
from hetkd.methods.common.linear import LinearMap
from hetkd.methods.common.method import register_method
from hetkd.methods.common.stagewise import StagewiseMethod, count_parameters, kept_frequencies
from hetkd.methods.common.statistics import (
    TARGET_EPS,
    ChannelReduction,
    correlation_losses,
    infonce,
    squared_errors,
    standardize_batch,
    standardize_sample,
    weights_side_by_side,
)
from hetkd.methods.sfkd.ds2s import DS2S, LiteDS2S
from hetkd.methods.sfkd.fused import FusedSpectra
from hetkd.methods.sfkd.refine import RefinedSpectra
from hetkd.spectral import amplitude, half_plane_window, low_frequencies
from hetkd.spectral.wavelet import check_wavelet
from hetkd.utils.checks import choice, not_negative, whole_number


@register_method("sfkd")
class SFKD(StagewiseMethod):
    r"""Wavelet sub-bands of the student, refined, recombined, and compared by a Gaussian-filtered frequency loss.

    For each stage pair, on a common G x G grid:

    1. *Align*: the student's map is projected by a 1x1 convolution to D channels; the teacher's channels, where there
       are more, go through a fixed orthonormal map.
    2. *Decouple*: a J-level wavelet transform splits the student's map into sub-bands.
    3. *Refine*: DS2S (`hetkd.methods.ds2s.DS2S`) refines them. The teacher's bands are fixed targets, for otherwise
       both sides could agree on a constant.
    4. *Recombine*: the inverse transform returns a spatial-spectral feature; for the teacher steps 2 to 4 are the
       identity, so it skips them.
    5. *GFFL*: the K x K lowest frequencies of both are compared under a Gaussian window w, :math:`L = \sum_k w_k (1 -
       \rho_k)^2 / \sum_k w_k`, where :math:`\rho_k` is the correlation over the batch of complex coefficient k
       (`normalize="batch"`). With ``sigma`` towards 0 only the pooled features are left, and the loss is the diagonal
       of RSD's (arXiv 2507.21844).

    The loss is ``ce_weight CE + kd_weight KL + feature_weight sum over stages of weight times L``.

    Args:
        feature_weight: Weight of the features' loss, spread over the stages.
        grid: Most pixels a side of the common grid, before it is rounded up to a multiple of 2^J.
        levels: J, 0 to 3; ``None``: 2, or fewer on small grids, so that the coarsest band has 2 x 2 pixels or more.
        wavelet: An orthogonal wavelet of PyWavelets, by name.
        ds2s: ``"full"``, ``"lite"`` (on a few mixtures of the channels) or ``None`` (no refinement).
        streams: Streams of DS2S: ``"both"``, ``"spatial"``, ``"spectral"``.
        refinement_stages: Stages of DS2S: 2 (within and across bands), 1 (within), 0 (none).
        loss: ``"gffl"``, or for comparison ``"mse"`` or ``"infonce"`` on the recombined feature in space.
        sigma: Width of the Gaussian window as a fraction of Nyquist's frequency; ``math.inf``: none.
        keep: K, frequencies kept per axis; ``None``: 5, or fewer on a smaller grid.
        spectrum: ``"complex"``: amplitude and phase; ``"amplitude"``: invariant to circular shifts.
        normalize: ``"batch"``: each coefficient is standardised over the batch of all processes; ``"sample"``: each
            sample by its own energy, compared by mean squared error.
        decorrelation: Weight of RSD's off-diagonal term (with ``normalize="batch"`` and GFFL only).
        width: D, most channels to compare.
        reduction: The teacher's fixed map: ``"orthogonal"`` or ``"pca"`` (fitted on the first batch).
        kd_weight: Weight of the KL divergence between logits; 0 for a teacher without a classifier.
        temperature: T of the KL divergence.
        **common: ``stage_weights`` and ``ce_weight`` of `StagewiseMethod`.

    Raises:
        ValueError: If an option is out of range, or a stage's grid is too small for it.
    """

    term = "sfkd"

    def __init__(
        self,
        *,
        feature_weight: float = 100.0,
        grid: int = 8,
        levels: int | None = None,
        wavelet: str = "haar",
        ds2s: str | None = "full",
        streams: str = "both",
        refinement_stages: int = 2,
        loss: str = "gffl",
        sigma: float = 0.5,
        keep: int | None = None,
        spectrum: str = "complex",
        normalize: str = "batch",
        decorrelation: float = 0.0,
        width: int = 256,
        reduction: str = "orthogonal",
        kd_weight: float = 1.0,
        temperature: float = 4.0,
        **common: Any,
    ) -> None:
        super().__init__(feature_weight=feature_weight, kd_weight=kd_weight, temperature=temperature, **common)
        if levels not in (None, 0, 1, 2, 3):
            raise ValueError(f"levels={levels} must be 0, 1, 2 or 3, or None for what the grid holds.")
        if refinement_stages not in (0, 1, 2):
            raise ValueError(f"refinement_stages={refinement_stages} must be 0, 1 or 2.")
        check_wavelet(wavelet)
        self.grid, self.levels, self.wavelet = whole_number("grid", grid), levels, wavelet
        self.keep = None if keep is None else whole_number("keep", keep)
        self.ds2s = None if ds2s is None else choice("ds2s", ds2s, ["full", "lite"])
        self.streams = choice("streams", streams, ["both", "spatial", "spectral"])
        self.refinement_stages = refinement_stages
        self.loss = choice("loss", loss, ["gffl", "mse", "infonce"])
        self.sigma = not_negative("sigma", sigma)
        self.spectrum = choice("spectrum", spectrum, ["complex", "amplitude"])
        self.normalize = choice("normalize", normalize, ["batch", "sample"])
        self.batch_statistics = "all" if normalize == "batch" or loss == "infonce" else None
        self.decorrelation = not_negative("decorrelation", decorrelation)
        if decorrelation and (normalize, loss) != ("batch", "gffl"):
            raise ValueError("decorrelation needs normalize='batch' and loss='gffl'.")
        self.width = whole_number("width", width)
        self.reduction = choice("reduction", reduction, ["orthogonal", "pca"])

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make projections and refinements for these stage pairs; see `Method.bind`.

        Raises:
            ValueError: If a grid is too small for ``levels`` or ``keep``.
        """
        super().bind(pairs)
        self._check_levels(pairs)
        self._levels = [self._levels_of(pair) for pair in pairs]
        self._grids = [
            common_grid(pair.teacher.grid, pair.student.grid, 2**levels, self.grid)
            for pair, levels in zip(pairs, self._levels, strict=True)
        ]
        self._keeps = [
            kept_frequencies(self.keep, pair, min(grid)) for pair, grid in zip(pairs, self._grids, strict=True)
        ]
        self.reduce = nn.ModuleList(ChannelReduction(p.teacher.channels, self.width, self.reduction) for p in pairs)
        widths = [min(pair.teacher.channels, self.width) for pair in pairs]
        self.project = nn.ModuleList(
            aligning_projection(pair.student.channels, width) for pair, width in zip(pairs, widths, strict=True)
        )
        shapes = list(zip(self._grids, self._levels, self._keeps, strict=True))
        stages_of = {shape: [i for i, other in enumerate(shapes) if other == shape] for shape in shapes}
        self.shared = nn.ModuleList(
            FusedSpectra(stages, *shape, self.wavelet, self._refinement([widths[i] for i in stages], *shape[:2]))
            for shape, stages in stages_of.items()
        )
        self.teacher_spectra = nn.ModuleList(
            LinearMap(partial(self._spectrum, index), pair.teacher.grid) for index, pair in enumerate(pairs)
        )
        windows = [half_plane_window(grid, k, self.sigma) for grid, k in zip(self._grids, self._keeps, strict=True)]
        self.register_buffer("weight", weights_side_by_side(windows, widths), persistent=False)

    def _spectrum(self, index: int, x: Tensor) -> Tensor:
        return low_frequencies(to_grid(x, self._grids[index]), self._keeps[index], half=True)

    def _levels_of(self, pair: StagePair) -> int:
        if self.levels is not None:
            return self.levels
        side = min(self.grid, _smallest_side(pair))
        return next(levels for levels in (2, 1, 0) if levels == 0 or 2**levels < side)

    def _check_levels(self, pairs: Sequence[StagePair]) -> None:
        pair = min(pairs, key=_most_levels)
        if self.levels is not None and self.levels > _most_levels(pair):
            raise ValueError(
                f"levels={self.levels} needs grids of at least {2**self.levels} x {2**self.levels}, but the stage pair "
                f"{pair.teacher} / {pair.student} has less: use levels={_most_levels(pair)}, other stages or a larger "
                "input_size."
            )

    def _refinement(self, widths: list[int], grid: tuple[int, int], levels: int) -> DS2S | LiteDS2S | None:
        # On a single pixel, refinement could only scale a channel, which the loss does not see.
        if self.ds2s is None or self.refinement_stages == 0 or grid == (1, 1):
            return None
        return (LiteDS2S if self.ds2s == "lite" else DS2S)(
            widths,
            grid,
            levels,
            streams=self.streams,
            stages=self.refinement_stages,
            gate_whole_map=self.loss != "gffl" or self.normalize == "sample",
        )

    def describe_pair(self, index: int) -> str:
        """Return grid, levels and kept frequencies of stage pair ``index``."""
        (height, width), levels, keep = self._grids[index], self._levels[index], self._keeps[index]
        what = f"{keep} x {keep} frequencies" if self.loss == "gffl" else self.loss
        return f"{height} x {width}, {levels} level{'s' * (levels != 1)}, {what}"

    def added_parameters(self, index: int) -> int:
        """Return the parameters of the projection and the refinement of stage pair ``index``."""
        shared = next(shared for shared in cast(list[RefinedSpectra], self.shared) if index in shared.stages)
        refinement = 0 if shared.refine is None else shared.refine.parameters_of(shared.stages.index(index))
        return count_parameters(self.project[index]) + refinement

    def encode_stage(self, index: int, x: Tensor) -> Tensor:
        """Return the teacher's spectrum ``[B, D, K, K // 2 + 1, 2]`` (amplitudes: no last axis; no GFFL: its map)."""
        x = self.teacher_spectra[index](x) if self.loss == "gffl" else to_grid(x, self._grids[index])
        return self._representation(self.reduce[index](x))

    def compare_all(self, maps: list[Tensor], targets: list[Tensor], labels: Tensor | None) -> list[Tensor]:
        """Return the losses between the refined student features and the targets."""
        if self.loss == "gffl":
            return self._gffl(self.refined_spectra(maps), targets)
        students = [self._representation(x) for x in self.refined_features(maps)]
        if self.normalize == "batch":
            students = [standardize_batch(x) for x in students]
            targets = [standardize_batch(x, eps=TARGET_EPS) for x in targets]
        loss = infonce if self.loss == "infonce" else F.mse_loss
        return [loss(student, target) for student, target in zip(students, targets, strict=True)]

    def _gffl(self, spectra: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
        students = [self._representation(spectrum) for spectrum in spectra]
        weight, is_complex = self.weight.to(students[0].dtype), self.spectrum == "complex"
        if self.normalize == "sample":
            return squared_errors(students, targets, weight, is_complex=is_complex)
        return correlation_losses(students, targets, weight, is_complex=is_complex, decorrelation=self.decorrelation)

    weight: Tensor

    def refined_features(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the student's aligned, refined and recombined features ``[B, D, G, G]``."""
        return self._through(RefinedSpectra.features, maps)

    def refined_spectra(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the low frequencies of `refined_features`, without making them."""
        return self._through(RefinedSpectra.__call__, maps)

    def _through(self, what: Callable[..., Sequence[Tensor]], maps: list[Tensor]) -> list[Tensor]:
        """Bring maps to their common grids, and those of one grid through its transforms together."""
        found: dict[int, Tensor] = {}
        for shared in cast(list[RefinedSpectra], self.shared):
            on_grid = [to_grid(maps[index], self._grids[index]) for index in shared.stages]
            results = what(shared, on_grid, [self.project[index].weight for index in shared.stages])
            found.update(zip(shared.stages, results, strict=True))
        return [found[index] for index in range(len(maps))]

    def _representation(self, x: Tensor) -> Tensor:
        if self.loss == "gffl" and self.spectrum == "amplitude":
            x = amplitude(x)
        return standardize_sample(x) if self.normalize == "sample" else x


def _most_levels(pair: StagePair) -> int:
    """Return the most levels, up to 3, that both grids of a pair hold."""
    return next(levels for levels in (3, 2, 1, 0) if 2**levels <= _smallest_side(pair))


def _smallest_side(pair: StagePair) -> int:
    return min(*pair.teacher.grid, *pair.student.grid)


def aligning_projection(channels: int, width: int) -> nn.Conv2d:
    """Return a 1x1 convolution without bias: the identity if it can be, else an orthogonal map."""
    projection = nn.Conv2d(channels, width, kernel_size=1, bias=False)
    if channels == width:
        nn.init.dirac_(projection.weight)
    else:
        nn.init.orthogonal_(projection.weight)
    return projection
