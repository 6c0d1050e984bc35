"""Augmentation of whole batches on the training device, by kornia: the presets of ``fit(augment=...)``."""

from typing import Any

from torch import Tensor, nn

from hetkd.utils.checks import choice

PRESETS = ("light", "strong")
_SHIFT = 8  # images shift by up to 1 / _SHIFT of a side


class Augmentation(nn.Module):
    """A preset, for batches of images ``[B, C, H, W]`` in [0, 1] of any size.

    - ``"light"``: a shift of up to an eighth of each side (padded with black) and a horizontal flip, the usual
      augmentation of small images.
    - ``"strong"``: the same, RandAugment (two operations of magnitude 9; colour images only) and random erasing.

    Args:
        preset: ``"light"`` or ``"strong"``.

    Raises:
        ValueError: If there is no such preset.

    Example:
        >>> import torch
        >>> Augmentation("light")(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(self, preset: str) -> None:
        super().__init__()
        self.preset = choice("augment", preset, PRESETS)
        self._made: dict[tuple[int, ...], Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Return the images, each augmented by itself."""
        shape = tuple(images.shape[1:])
        if shape not in self._made:
            self._made[shape] = self._make(*shape)
        augmented: Tensor = self._made[shape](images)
        return augmented

    def _make(self, channels: int, height: int, width: int) -> Any:
        import kornia.augmentation as K

        steps = [
            K.RandomCrop((height, width), padding=(height // _SHIFT, width // _SHIFT)),
            K.RandomHorizontalFlip(p=0.5),
        ]
        if self.preset == "strong":
            steps += [K.auto.RandAugment(n=2, m=9)] if channels == 3 else []
            steps += [K.RandomErasing(p=0.25)]
        return K.AugmentationSequential(*steps, data_keys=["input"])

    def extra_repr(self) -> str:
        """Show the preset."""
        return repr(self.preset)
