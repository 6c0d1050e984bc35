"""DS2S: dual-stream dual-stage refinement of wavelet sub-bands (SFKD, arXiv 2607.01906; our own reading)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.spectral import Bands, real_fourier_basis

_KERNEL = 3
_FEW_PIXELS = 4


class DS2S(nn.Module):
    """Refines the student's sub-bands in two streams and two stages; at the start it is the identity.

    Stage one works within each band: the spatial stream is a depthwise convolution, the spectral stream a learnable
    real gate on the band's Fourier spectrum. Stage two works across bands and levels: the spatial stream gives each
    band a learnable share of every other one, resampled to its grid, and the spectral stream gates each band by the
    spectral energies of all of them, so that low and high frequencies exchange information.

    Args:
        channels: D of the feature map.
        grid: Height and width of the map that the bands come from.
        levels: J of the wavelet transform; with 0 there is one band, and one stage.
        streams: ``"full"`` (both), ``"spatial"`` or ``"spectral"``.
    """

    def __init__(self, channels: int, grid: tuple[int, int], levels: int, *, streams: str = "full") -> None:
        super().__init__()
        groups = [(3, (grid[0] >> level, grid[1] >> level)) for level in range(1, levels + 1)]
        coarsest = (grid[0] >> levels, grid[1] >> levels)
        groups = [*groups[:-1], (4, coarsest)] if levels else [(1, coarsest)]
        spatial, spectral = streams != "spectral", streams != "spatial"
        self.kernels, self.gates = nn.ModuleDict(), nn.ModuleDict()
        for index, (count, size) in enumerate(groups):
            if size == (1, 1):  # a single coefficient has no surroundings and no spectrum
                continue
            if spatial:
                self.kernels[str(index)] = DepthwiseKernel(channels, count, size)
            if spectral:
                self.gates[str(index)] = SpectralGate(channels, count, size)
        bands = sum(count for count, _ in groups)
        self.exchange = nn.Parameter(torch.zeros(channels, bands, bands)) if spatial and levels else None
        self.balance = BandBalance(bands) if spectral and levels else None

    def forward(self, bands: Bands) -> Bands:
        """Return refined bands of the same shapes."""
        groups = [self._within_bands(index, x) for index, x in enumerate(to_groups(bands))]
        if self.exchange is not None:
            groups = self._across_bands(groups, self.exchange)
        if self.balance is not None:
            groups = self._balanced(groups, self.balance)
        return to_bands(groups)

    def _within_bands(self, index: int, x: Tensor) -> Tensor:
        changes = [stream[str(index)](x) for stream in (self.kernels, self.gates) if str(index) in stream]
        return sum(changes, start=x)

    def _across_bands(self, groups: list[Tensor], shares: Tensor) -> list[Tensor]:
        counts = [x.shape[2] for x in groups]
        rows = shares.split(counts, dim=1)
        return [
            sum((_share(y, x, share) for y, share in zip(groups, row.split(counts, dim=2), strict=True)), start=x)
            for x, row in zip(groups, rows, strict=True)
        ]

    def _balanced(self, groups: list[Tensor], balance: nn.Module) -> list[Tensor]:
        # By Parseval's theorem the mean square of a band is the energy of its spectrum.
        energy = torch.cat([x.square().mean((-2, -1)) for x in groups], dim=2)
        scales = balance(energy).split([x.shape[2] for x in groups], dim=2)
        return [x * scale[..., None, None] for x, scale in zip(groups, scales, strict=True)]


def to_groups(bands: Bands) -> list[Tensor]:
    """Stack bands of one grid: ``[B, D, bands, h, w]``, finest first, the low band with the coarsest."""
    low = bands.low.unsqueeze(2)
    if not bands.details:
        return [low]
    return [*bands.details[:-1], torch.cat([low, bands.details[-1]], dim=2)]


def to_bands(groups: list[Tensor]) -> Bands:
    """Take the stacks of `to_groups` apart again."""
    low, coarsest = groups[-1][:, :, 0], groups[-1][:, :, 1:]
    return Bands(low, (*groups[:-1], coarsest) if coarsest.shape[2] else ())


def _share(x: Tensor, like: Tensor, share: Tensor) -> Tensor:
    """Mix bands ``[B, D, s, h, w]`` by ``[D, t, s]`` and bring them to another grid, in the cheaper order."""
    if x.shape[-2] > like.shape[-2]:
        return _mix(_resample(x, like), share)
    return _resample(_mix(x, share), like)


def _mix(x: Tensor, share: Tensor) -> Tensor:
    return (share @ x.flatten(3)).unflatten(3, x.shape[3:])


def _resample(x: Tensor, like: Tensor) -> Tensor:
    """Bring bands to the grid of another level, which is a power of two coarser or finer."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    size, flat = like.shape[-2:], x.flatten(1, 2)
    resampled = F.interpolate(flat, size) if size[0] > x.shape[-2] else F.avg_pool2d(flat, x.shape[-2] // size[0])
    return resampled.unflatten(1, x.shape[1:3])


class DepthwiseKernel(nn.Module):
    """Convolves each band of each channel by a 3 x 3 kernel of its own.

    What is returned is the change only, zero at the start. Bands of 2 x 2 pixels are multiplied by a matrix instead,
    which is several times faster than so small convolutions.
    """

    def __init__(self, channels: int, bands: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, bands, _KERNEL, _KERNEL))
        pixels = size[0] * size[1]
        impulses = torch.eye(pixels).view(pixels, 1, *size) if pixels <= _FEW_PIXELS else torch.zeros(0, 1, *size)
        kernels = torch.eye(_KERNEL**2).view(-1, 1, _KERNEL, _KERNEL)
        shifts = F.conv2d(impulses, kernels, padding=_KERNEL // 2)
        self.register_buffer("shifts", shifts.flatten(2).transpose(0, 1), persistent=False)

    shifts: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, D, bands, h, w]`` to the kernels' contribution, of the same shape."""
        if self.shifts.shape[1]:
            matrix = torch.einsum("dnk,kpq->dnpq", self.weight.flatten(2), self.shifts.to(x.dtype))
            return torch.einsum("bdnp,dnpq->bdnq", x.flatten(3), matrix).view_as(x)
        flat = x.flatten(1, 2)
        weight = self.weight.flatten(0, 1).unsqueeze(1)
        return F.conv2d(flat, weight, padding=_KERNEL // 2, groups=flat.shape[1]).view_as(x)


class SpectralGate(nn.Module):
    """Multiplies a band's Fourier spectrum by a learnable real gate, even in both frequencies.

    Done in a real Fourier basis (`hetkd.spectral.real_fourier_basis`) of the whole band: one matrix product each way,
    no complex numbers. What is returned is the change only, zero at the start.
    """

    def __init__(self, channels: int, bands: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(channels, bands, size[0] // 2 + 1, size[1] // 2 + 1))
        (rows, row_frequency), (columns, column_frequency) = (real_fourier_basis(side) for side in size)
        # For the few pixels of a band, one product is faster than one for rows and one for columns.
        self.register_buffer("basis", torch.kron(rows, columns), persistent=False)
        index = row_frequency[:, None] * (size[1] // 2 + 1) + column_frequency
        self.register_buffer("frequency", index.flatten(), persistent=False)

    basis: Tensor
    frequency: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, D, bands, h, w]`` to the gate's contribution, of the same shape."""
        gate = self.gate.flatten(2)[..., self.frequency]
        basis = self.basis.to(x.dtype)
        return ((x.flatten(3) @ basis.T) * gate @ basis).unflatten(3, x.shape[3:])


class BandBalance(nn.Module):
    """Say by how much to scale each band of a channel: a function of the log energies of all its bands."""

    def __init__(self, bands: int, hidden: int = 16, eps: float = 1e-4) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(bands, hidden), nn.Linear(hidden, bands)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.eps = eps

    def forward(self, energy: Tensor) -> Tensor:
        """Map energies ``[B, D, bands]`` to factors, 1 at the start."""
        scale: Tensor = 1 + self.outer(F.gelu(self.inner((energy + self.eps).log())))
        return scale
