"""What images each model wants, and the transform that gives them to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Normalization = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class InputSpec:
    """What a model was made for.

    Attributes:
        channels: Of the images, 3 for colour.
        size: Height and width in pixels.
        mean: Per channel, of images in [0, 1].
        std: Per channel.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def input_spec(model: nn.Module) -> InputSpec:
    """Reads a model's channels, input size and normalisation.

    timm models carry them in their configuration, Hugging Face models in their image processor
    (or, for a model without files, in the defaults of its type). Others get ImageNet's
    normalisation and 224 pixels, the convention of torchvision.
    """
    if hasattr(model, "pretrained_cfg") and isinstance(model.pretrained_cfg, dict):
        return _timm_spec(model)
    if hasattr(model, "config") and hasattr(model.config, "model_type"):
        return _hugging_face_spec(model)
    channels = _first_channels(model)
    settings: Any = getattr(model, "input_settings", {})  # of hetkd.load_model("torchvision:...")
    size = settings.get("size") or getattr(model, "image_size", 224)
    mean, std = settings.get("mean", IMAGENET_MEAN), settings.get("std", IMAGENET_STD)
    return InputSpec(channels, _pair(size), *_for_channels(mean, std, channels))


def _timm_spec(model: Any) -> InputSpec:
    config = model.pretrained_cfg
    channels = _first_channels(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config.get("input_size", (3, 224, 224))[1:]
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return InputSpec(channels, _pair(size), *_for_channels(mean, std, channels))


def _hugging_face_spec(model: Any) -> InputSpec:
    from hetkd.models import image_processor_settings

    config = model.config
    settings = image_processor_settings(config)
    channels = getattr(config, "num_channels", 3)
    size: Any = getattr(config, "image_size", None) or settings.get("crop_size") or settings.get("size") or 224
    if not isinstance(size, (int, list, tuple)):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    mean, std = settings.get("image_mean") or IMAGENET_MEAN, settings.get("image_std") or IMAGENET_STD
    if settings.get("do_normalize") is False:
        mean, std = (0.0,), (1.0,)
    return InputSpec(channels, _pair(size), *_for_channels(mean, std, channels))


def _for_channels(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fits a normalisation to a number of channels as timm does: other than three get the average."""
    if len(mean) == channels:
        return tuple(mean), tuple(std)
    return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _first_channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


class InputTransform(nn.Module):
    """Resizes and normalises images for one model.

    Args:
        spec: What the model wants.
        size: Height and width to resize to.
        normalized: Mean and standard deviation that the incoming images were already normalised
            with, or ``None`` for images in [0, 1].
    """

    def __init__(self, spec: InputSpec, size: tuple[int, int], normalized: Normalization | None = None) -> None:
        super().__init__()
        self.size, self.spec = size, spec
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        given_mean, given_std = torch.zeros_like(mean), torch.ones_like(std)
        if normalized is not None:
            given_mean, given_std = (torch.tensor(_per_channel(v, spec.channels)) for v in normalized)
        # (x * given_std + given_mean - mean) / std in one step
        self.register_buffer("scale", (given_std / std)[:, None, None], persistent=False)
        self.register_buffer("shift", ((given_mean - mean) / std)[:, None, None], persistent=False)

    scale: Tensor
    shift: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, C, H, W]``, float or uint8, to ``[B, C, *size]`` in float32."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        return x * self.scale + self.shift


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    if len(values) != channels:
        raise ValueError(f"normalized has {len(values)} values for images of {channels} channels.")
    return [float(value) for value in values]


def check_images(images: Any, channels: int, *, look_at_values: bool, normalized: bool) -> None:
    """Refuses what cannot be a batch of images.

    Args:
        images: The candidate.
        channels: That the model wants.
        look_at_values: Also check the range, which waits for the device.
        normalized: Whether the loader is said to normalise, so that any range is right.

    Raises:
        TypeError: If it is not a float or uint8 tensor.
        ValueError: If shape or range are wrong.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor [B, {channels}, H, W], got {type(images).__name__}.")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be float in [0, 1] or uint8, got dtype {images.dtype}.")
    if images.ndim != 4:
        hint = "; add a batch axis: images[None]" if images.ndim == 3 else ""
        raise ValueError(f"images must have shape [B, {channels}, H, W], got {list(images.shape)}{hint}.")
    if images.shape[0] == 0:
        raise ValueError("images is an empty batch.")
    if images.shape[1] != channels:
        hint = "; they look like NHWC: images.permute(0, 3, 1, 2)" if images.shape[3] == channels else ""
        raise ValueError(f"images have {images.shape[1]} channels, but the model takes {channels}{hint}.")
    if look_at_values and images.is_floating_point():
        _check_range(images, normalized)


def _check_range(images: Tensor, normalized: bool) -> None:
    low, high = images.min().item(), images.max().item()
    if not (low == low and high == high and abs(low) != float("inf") and abs(high) != float("inf")):
        raise ValueError("images contain NaN or Inf.")
    if normalized or (low >= -0.01 and high <= 1.01):
        return
    if low >= 0 and high <= 255.5:
        raise ValueError(f"images reach {high:.4g}: divide by 255, or pass them as uint8.")
    raise ValueError(
        f"images range from {low:.4g} to {high:.4g}, not in [0, 1]: if the loader normalised them already, "
        "say so with Distiller(..., normalized=(mean, std))."
    )


def check_labels(labels: Any, batch: int, classes: int | None, look_at_values: bool) -> None:
    """Refuses labels of a wrong dtype, shape or range.

    Args:
        labels: The candidate: ``[B]`` int64 or ``[B, classes]`` float.
        batch: Number of images.
        classes: Of the student; ``None`` leaves the range unchecked.
        look_at_values: Also check the range, which on a GPU waits for the device.

    Raises:
        TypeError: If it is no tensor, or of a wrong dtype.
        ValueError: If shape or range are wrong.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}.")
    if labels.ndim == 2 and labels.is_floating_point():
        if labels.shape != (batch, classes or labels.shape[1]):
            raise ValueError(f"labels have shape {list(labels.shape)}, not [{batch}, {classes}].")
        return
    if labels.dtype != torch.int64:
        raise TypeError(
            f"labels have dtype {labels.dtype}: give class indices as int64 (labels.long()) or class probabilities "
            "[B, classes] as float."
        )
    if labels.shape != (batch,):
        raise ValueError(f"labels have shape {list(labels.shape)} for {batch} images; give [{batch}].")
    if look_at_values and classes is not None and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(
            f"labels range from {int(labels.min())} to {int(labels.max())}, but the student has {classes} classes "
            f"(0 to {classes - 1})."
        )
