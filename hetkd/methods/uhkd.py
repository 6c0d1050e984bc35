"""UHKD: feature distillation in the frequency domain (arXiv 2510.24116).

Only the paper's abstract is public knowledge here; the internals are this project's own reading of it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.features.adapter import Stage, StagePair
from hetkd.features.grid import to_grid
from hetkd.methods.common.linear import LinearMap, mix_channels
from hetkd.methods.common.method import register_method
from hetkd.methods.common.stagewise import StagewiseMethod, kept_frequencies
from hetkd.methods.common.statistics import ChannelReduction, squared_errors, standardize_sample, weights_side_by_side
from hetkd.spectral import amplitude, half_plane_window, low_frequencies
from hetkd.utils.checks import choice, whole_number

_COMPRESSIONS: dict[str, Callable[[Tensor], Tensor]] = {"log": torch.log1p, "power": torch.sqrt}


@register_method("uhkd")
class UHKD(StagewiseMethod):
    r"""Compact frequency-domain targets of the teacher (FTM), matched by an aligned student (FAM).

    For each stage pair:

    - *Feature Transformation Module* (teacher, no parameters): the K x K lowest frequencies of the map, as amplitudes
      or complex numbers, compressed, standardised. They do not depend on the native grid, so maps of different sizes
      need no resampling.
    - *Feature Alignment Module* (student, learnable, dropped after training): 1x1 convolution - norm - GELU - 1x1
      convolution to the teacher's channels, the same spectrum, and a real affine map a channel and a frequency.
    - *Loss*: mean squared error between both.

    The loss is ``ce_weight CE + kd_weight KL + feature_weight sum over stages of weight times MSE``.

    Args:
        feature_weight: Weight of the features' loss, spread over the stages.
        grid: Most pixels a side of the student's map in FAM, or ``keep`` where that is more.
        keep: K, frequencies kept per axis; ``None``: 5, or fewer on a smaller grid.
        spectrum: ``"complex"``: real and imaginary parts; ``"amplitude"``: invariant to circular shifts.
        compression: Of the amplitudes: ``"none"``, ``"log"`` (log(1 + a)) or ``"power"`` (square root), phases kept.
        normalize: How targets are standardised: ``"batch"`` (each coefficient over the batch of all processes) or
            ``"sample"`` (each sample by its own energy).
        width: Most channels to compare; the teacher's further ones go through a fixed orthonormal map.
        reduction: That map: ``"orthogonal"`` or ``"pca"`` (fitted on the first batch).
        kd_weight: Weight of the KL divergence between logits; 0 for a teacher without a classifier.
        temperature: T of the KL divergence.
        **common: ``stage_weights`` and ``ce_weight`` of `StagewiseMethod`.

    Raises:
        ValueError: If an option is out of range, or a stage's grid is too small for ``keep``.
    """

    term = "uhkd"

    def __init__(
        self,
        *,
        feature_weight: float = 100.0,
        grid: int = 8,
        keep: int | None = None,
        spectrum: str = "complex",
        compression: str = "none",
        normalize: str = "batch",
        width: int = 256,
        reduction: str = "orthogonal",
        kd_weight: float = 1.0,
        temperature: float = 4.0,
        **common: Any,
    ) -> None:
        super().__init__(feature_weight=feature_weight, kd_weight=kd_weight, temperature=temperature, **common)
        self.grid = whole_number("grid", grid)
        self.keep = None if keep is None else whole_number("keep", keep)
        self.spectrum = choice("spectrum", spectrum, ["complex", "amplitude"])
        self.compression = choice("compression", compression, ["none", *_COMPRESSIONS])
        self.normalize = choice("normalize", normalize, ["batch", "sample"])
        self.batch_statistics = "all" if normalize == "batch" else None
        self.width = whole_number("width", width)
        self.reduction = choice("reduction", reduction, ["orthogonal", "pca"])

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make the alignment modules for these stage pairs; see `Method.bind`.

        Raises:
            ValueError: If a grid is too small for ``keep``.
        """
        super().bind(pairs)
        self._keeps = [kept_frequencies(self.keep, p, min(*p.teacher.grid, *p.student.grid)) for p in pairs]
        widths = [min(pair.teacher.channels, self.width) for pair in pairs]
        self.reduce = nn.ModuleList(ChannelReduction(p.teacher.channels, self.width, self.reduction) for p in pairs)
        self.teacher_spectra = nn.ModuleList(
            LinearMap(partial(spectrum_per_pixel, keep=keep), pair.teacher.grid)
            for pair, keep in zip(pairs, self._keeps, strict=True)
        )
        self.align = nn.ModuleList(
            FAM(pair.student, width, keep, self) for pair, width, keep in zip(pairs, widths, self._keeps, strict=True)
        )
        windows = [half_plane_window((keep, keep), keep, float("inf")) for keep in self._keeps]
        self.register_buffer("weight", weights_side_by_side(windows, widths), persistent=False)

    def describe_pair(self, index: int) -> str:
        """Return the kept frequencies of stage pair ``index``."""
        return f"{self._keeps[index]} x {self._keeps[index]} frequencies"

    def encode_stage(self, index: int, x: Tensor) -> Tensor:
        """Return the teacher's compressed spectrum ``[B, D, K, K // 2 + 1, 2]`` (amplitudes: no last axis)."""
        return self.compress(self.reduce[index](self.teacher_spectra[index](x)))

    def compare_all(self, maps: list[Tensor], targets: list[Tensor], labels: Tensor | None) -> list[Tensor]:
        """Return the mean squared errors between FAM's output and the standardised targets."""
        students = [align(x) for align, x in zip(self.align, maps, strict=True)]
        over_batch, is_complex = self.normalize == "batch", self.spectrum == "complex"
        if not over_batch:
            targets = [standardize_sample(target) for target in targets]
        weight = self.weight.to(students[0].dtype)
        return squared_errors(students, targets, weight, is_complex=is_complex, standardize=over_batch)

    weight: Tensor

    def compress(self, spectrum: Tensor) -> Tensor:
        """Compress the amplitudes of a complex spectrum ``[..., 2]``; drop the phases unless they are compared."""
        if self.spectrum == "complex" and self.compression == "none":
            return spectrum
        size = amplitude(spectrum)
        compressed = size if self.compression == "none" else _COMPRESSIONS[self.compression](size)
        if self.spectrum == "amplitude":
            return compressed
        return spectrum * (compressed / size).unsqueeze(-1)


class FAM(nn.Module):
    """Feature Alignment Module: the student's map to compressed frequency coefficients of the teacher's width.

    Early maps are resampled to few pixels first, which is enough for low frequencies and costs little.

    Args:
        stage: Of the student: its C channels, its grid.
        width: D, the channels to compare.
        keep: K, frequencies kept per axis.
        method: Says how spectra are compressed, and how many pixels there are at most.
    """

    def __init__(self, stage: Stage, width: int, keep: int, method: UHKD) -> None:
        super().__init__()
        self.compress = method.compress
        self.grid = (min(stage.height, max(method.grid, keep)), min(stage.width, max(method.grid, keep)))
        self.spectrum = LinearMap(partial(spectrum_per_pixel, keep=keep), self.grid)
        self.layers = nn.Sequential(nn.Conv2d(stage.channels, width, kernel_size=1), nn.GroupNorm(1, width), nn.GELU())
        self.mix = nn.Conv2d(width, width, kernel_size=1)
        constant = spectrum_per_pixel(torch.ones(1, 1, *self.grid), keep)[0]
        self.register_buffer("constant", constant, persistent=False)
        parts = (2,) if method.spectrum == "complex" else ()
        self.gain = nn.Parameter(torch.zeros(width, keep, keep // 2 + 1, *(1 for _ in parts)))
        self.bias = nn.Parameter(torch.zeros(width, keep, keep // 2 + 1, *parts))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, h, w]`` to ``[B, D, K, K // 2 + 1, 2]`` (amplitudes: no last axis)."""
        spectrum = self.spectrum(self.layers(to_grid(x, self.grid)))
        return self.compress(self._mixed(spectrum)) * (1 + self.gain) + self.bias

    def _mixed(self, spectrum: Tensor) -> Tensor:
        """Apply the second convolution, which commutes with the spectrum, to its few coefficients."""
        assert self.mix.bias is not None
        return mix_channels(self.mix.weight.flatten(1), spectrum) + self.mix.bias[:, None, None, None] * self.constant

    constant: Tensor


def spectrum_per_pixel(x: Tensor, keep: int) -> Tensor:
    """Return low frequencies scaled as by an orthonormal transform: white noise has unit coefficients on any grid."""
    return low_frequencies(x, keep, half=True) * (x.shape[-2] * x.shape[-1]) ** 0.5
