"""From PIL images to tensors: upright, cropped or resized to what a model takes."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from hetkd.data.pictures import upright_8bit
from hetkd.models.inputs import InputSpec


def image_transform(
    spec: InputSpec, size: tuple[int, int], train: bool, min_crop: float = 0.08
) -> Callable[[Any], Tensor]:
    """Return the transform from a PIL image to a uint8 tensor ``[C, H, W]``: training crops and flips at random."""
    from torchvision.transforms import v2

    pixels = v2.Lambda(partial(picture_tensor, spec=spec))
    transform: Callable[[Any], Tensor] = v2.Compose([pixels, crop_transform(spec, size, train, min_crop)])
    return transform


def picture_tensor(picture: Any, spec: InputSpec) -> Tensor:
    """Return a PIL image as a uint8 tensor ``[C, H, W]``, upright, in colour or grey as a model takes it."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    pixels: Tensor = pil_to_tensor(upright_8bit(picture, "L" if spec.channels == 1 else "RGB"))
    return pixels


def resize_transform(spec: InputSpec, size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Return the transform of tensors ``[C, H, W]`` that resizes the whole image."""
    from torchvision.transforms import InterpolationMode, v2

    resize: Callable[[Tensor], Tensor] = v2.Resize(size, interpolation=InterpolationMode(spec.interpolation))
    return resize


def crop_transform(
    spec: InputSpec, size: tuple[int, int], train: bool, min_crop: float = 0.08
) -> Callable[[Tensor], Tensor]:
    """Return the part of `image_transform` that works on tensors ``[C, H, W]``."""
    from torchvision.transforms import InterpolationMode, v2

    mode = InterpolationMode(spec.interpolation)
    crop: Sequence[Any]
    if train:
        crop = [v2.RandomResizedCrop(size, scale=(min_crop, 1.0), interpolation=mode), v2.RandomHorizontalFlip()]
    elif spec.crop_ratio is None:
        crop = [v2.Resize(size, interpolation=mode)]
    else:
        crop = [v2.Resize(math.floor(max(size) / spec.crop_ratio), interpolation=mode), v2.CenterCrop(size)]
    transform: Callable[[Tensor], Tensor] = v2.Compose(crop)
    return transform
