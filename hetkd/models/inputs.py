"""Input size and normalisation of each model, and the transform that applies them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.models.hugging_face import image_processor_settings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Normalization = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class InputSpec:
    """Input size and normalisation that a model was trained with.

    Attributes:
        channels: Of the images, 3 for colour.
        size: Height and width in pixels.
        mean: Per channel, of images in [0, 1].
        std: Per channel.
        interpolation: How images are resized: ``"bilinear"`` or ``"bicubic"``, antialiased.
        crop_ratio: For evaluation, the side of the central crop over the short side of the image; ``None``: the whole
            image is resized, whatever its aspect ratio.
        source: Where these settings come from, in words.
        reversed_channels: Whether the model takes the normalised channels in reverse order, as BGR.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_ratio: float | None = 0.875
    reversed_channels: bool = False
    source: str = field(default="", compare=False)


def input_spec(model: nn.Module, channels: int | None = None) -> InputSpec:
    """Read a model's channels, input size and preprocessing.

    timm models carry them in their configuration, Hugging Face models in their image processor (or, for a model without
    files, in the defaults of its type), torchvision models built by `hetkd.load_model` in their weights' preset. Others
    get the convention of torchvision: ImageNet's normalisation and 224 pixels.

    Args:
        model: The model.
        channels: Of the images, where it is known; otherwise it is read off the model.
    """
    settings, size, source = _preprocessing(model)
    channels = channels or _first_channels(model)
    mean, std = settings.get("mean") or IMAGENET_MEAN, settings.get("std") or IMAGENET_STD
    interpolation = "bicubic" if settings.get("interpolation") in _BICUBIC else "bilinear"
    crop_ratio = settings.get("crop_ratio", InputSpec.crop_ratio)
    return InputSpec(
        channels,
        _pair(size),
        *_for_channels(mean, std, channels),
        interpolation,
        crop_ratio,
        settings.get("reversed_channels", False),
        source,
    )


_BICUBIC = (
    "bicubic",
    "lanczos",
    "random",
    1,
    3,
)  # names of timm and torchvision, and Pillow's numbers
Settings = dict[str, Any]


def _preprocessing(model: Any) -> tuple[Settings, int | Sequence[int], str]:
    """Return a model's preprocessing in the words of `InputSpec`, its input size, and where both come from."""
    settings: Settings = getattr(model, "input_settings", {})  # of hetkd.load_model("torchvision:..."), or the user's
    if settings:
        size: Any = settings.get("size") or getattr(model, "image_size", None) or 224
        return settings, size, settings.get("source", "its input_settings")
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        return *_of_timm(model), "timm's configuration"
    if hasattr(getattr(model, "config", None), "model_type"):
        settings, size = _of_hugging_face(model.config)
        return settings, size, "its image processor" if "mean" in settings else "ImageNet's convention"
    inner = [child for child in model.children() if isinstance(getattr(child, "pretrained_cfg", None), dict)]
    inner += [child for child in model.children() if hasattr(getattr(child, "config", None), "model_type")]
    if len(inner) == 1:
        settings, size, source = _preprocessing(inner[0])
        if any(type(child).__name__ == "Normalize" for child in model.children()):
            return {**settings, "mean": (0.0,), "std": (1.0,)}, size, f"{source}, normalised by itself"
        return settings, size, f"{source}, of the model inside"
    return {}, getattr(model, "image_size", None) or 224, "ImageNet's convention"


def _of_timm(model: Any) -> tuple[Settings, Sequence[int]]:
    config = model.pretrained_cfg
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config.get("input_size", (3, 224, 224))[1:]
    crop_ratio = None if config.get("crop_mode") == "squash" else config.get("crop_pct") or InputSpec.crop_ratio
    return {**config, "crop_ratio": crop_ratio}, size


def _of_hugging_face(config: Any) -> tuple[Settings, int | Sequence[int]]:
    processor = image_processor_settings(config)
    crop, resized = _side(processor.get("crop_size")), _side(processor.get("size"))
    own = getattr(getattr(config, "vision_config", config), "image_size", None)
    size = own or (crop if processor.get("do_center_crop") else None) or resized or 224
    ratio = processor.get("crop_pct")
    if processor.get("do_center_crop") and crop and resized:
        ratio = crop[0] / resized[0]
    settings: Settings = {"interpolation": processor.get("resample"), "crop_ratio": ratio if processor else 0.875}
    # PP-LCNet's processor reverses the channels without a setting that says so.
    settings["reversed_channels"] = bool(processor.get("do_flip_channel_order")) or "pp_lcnet" in config.model_type
    return settings | (_hugging_face_normalization(processor) if processor else {}), size


def _hugging_face_normalization(processor: Settings) -> Settings:
    """Return the mean and standard deviation of images in [0, 1] that do what an image processor does."""
    scale = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255.0
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    if processor.get("do_normalize"):
        mean, std = processor.get("image_mean") or IMAGENET_MEAN, processor.get("image_std") or IMAGENET_STD
        if processor.get("include_top"):  # EfficientNet's divides twice
            std = [value**2 for value in std]
    return {"mean": [(value + offset) / scale for value in mean], "std": [value / scale for value in std]}


def _side(size: Any) -> tuple[int, int] | None:
    """Read the size in a Hugging Face image processor: ``{"shortest_edge": s}`` or ``{"height": h, "width": w}``."""
    if isinstance(size, (int, tuple, list)):
        return _pair(size)
    if not size:
        return None
    return _pair(size.get("shortest_edge") or (size.get("height"), size.get("width")))


def _for_channels(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fit a normalisation to a number of channels as timm does: other than three get the average."""
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
        normalized: Mean and standard deviation that the incoming images were already normalised with, or ``None`` for
            images in [0, 1].
    """

    def __init__(self, spec: InputSpec, size: tuple[int, int], normalized: Normalization | None = None) -> None:
        super().__init__()
        self.size, self.spec, self.takes_normalized = size, spec, normalized is not None
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        given_mean, given_std = torch.zeros_like(mean), torch.ones_like(std)
        if normalized is not None:
            if not isinstance(normalized, (tuple, list)) or len(normalized) != 2:
                raise ValueError(f"normalized={normalized!r} must be (mean, std), each with a value per channel.")
            given_mean, given_std = (torch.tensor(_per_channel(v, spec.channels)) for v in normalized)
            if not (given_std > 0).all():
                raise ValueError(
                    f"normalized has the standard deviations {list(normalized[1])}; they must be positive."
                )
        # (x * given_std + given_mean - mean) / std in one step
        self.register_buffer("scale", (given_std / std)[:, None, None], persistent=False)
        self.register_buffer("shift", ((given_mean - mean) / std)[:, None, None], persistent=False)

    scale: Tensor
    shift: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]``, float or uint8, to ``[B, C, *size]`` in float32."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, size=self.size, mode=self.spec.interpolation, align_corners=False, antialias=True)
        x = torch.addcmul(self.shift, x, self.scale)
        return x.flip(1) if self.spec.reversed_channels else x


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    if not isinstance(values, Sequence):
        raise ValueError(f"normalized has {values!r}; give (mean, std), each a sequence with a value per channel.")
    if len(values) != channels:
        raise ValueError(f"normalized has {len(values)} values for images of {channels} channels.")
    return [float(value) for value in values]


def check_images(images: Any, channels: int, *, look_at_values: bool, normalized: bool) -> None:
    """Refuse what cannot be a batch of images.

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
    if normalized and images.dtype == torch.uint8:
        raise ValueError(
            "images are uint8, which cannot be normalised: leave normalized=... out, or convert them first."
        )
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
    """Refuse labels of a wrong dtype, shape or range.

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
        if look_at_values and not ((labels.float().sum(1) - 1).abs().max() < 1e-2 and labels.min() > -1e-2):
            raise ValueError(
                "labels are floats that are negative or do not sum to 1 (the first row to "
                f"{labels[0].sum().item():.4g}, from {labels[0].min().item():.4g}): they must be probabilities, not "
                "several classes at once; give class indices, or divide rows by their sums."
            )
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
