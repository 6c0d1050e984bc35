"""The student's way from its maps to refined features and their spectra, step by step as in the formula."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.methods.sfkd.ds2s import DS2S, LiteDS2S
from hetkd.spectral import dwt2, idwt2, low_frequencies


class RefinedSpectra(nn.Module):
    r"""Spectra of refined features, for the student's maps of all stages with one common grid.

    .. math:: \hat S = \mathcal F_K \big( W^{-1}\, R\, W\, P\, S \big)

    with a projection P for each stage, the wavelet transform W, the refinement R (DS2S) and the K x K lowest
    frequencies :math:`\mathcal F_K`.

    Args:
        stages: Indices of the stage pairs with this grid.
        grid: Height and width of their maps.
        levels: J of the wavelet transform.
        keep: K, frequencies kept per axis.
        wavelet: Name of the wavelet.
        refine: Refines the sub-bands of all these stages, their channels side by side; ``None``: no refinement.
    """

    def __init__(
        self,
        stages: list[int],
        grid: tuple[int, int],
        levels: int,
        keep: int,
        wavelet: str,
        refine: DS2S | LiteDS2S | None,
    ) -> None:
        super().__init__()
        self.stages, self.grid, self.levels, self.keep, self.wavelet = stages, grid, levels, keep, wavelet
        self.refine = refine

    def forward(self, maps: list[Tensor], projections: list[Tensor]) -> Sequence[Tensor]:
        """Return the spectrum ``[B, D, K, K // 2 + 1, 2]`` of the refined features of each stage."""
        return [low_frequencies(x, self.keep, half=True) for x in self.features(maps, projections)]

    def features(self, maps: list[Tensor], projections: list[Tensor]) -> Sequence[Tensor]:
        """Return the refined features ``[B, D, *grid]`` of each stage.

        Args:
            maps: The student's ``[B, C, *grid]``.
            projections: Weights ``[D, C, 1, 1]`` of 1x1 convolutions.
        """
        x = self.aligned(maps, projections)
        if self.refine is not None:
            bands = dwt2(x, self.wavelet, self.levels)
            bands = self.refine(bands)
            x = idwt2(bands, self.wavelet)
        return x.split([len(weight) for weight in projections], dim=1)

    def aligned(self, maps: list[Tensor], projections: list[Tensor]) -> Tensor:
        """Return the projected maps, their channels side by side."""
        return torch.cat([F.conv2d(x, weight) for x, weight in zip(maps, projections, strict=True)], dim=1)
