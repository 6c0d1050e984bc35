"""Models for small images by short names, one or two of each family; any other name is one of timm's.

``vit``, ``swin``, ``mixer`` and ``convnext`` are meant as teachers; ``deit``, ``resmlp`` and ``swin_p`` as students,
beside timm's CNNs.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hetkd.models.load import load_model


def build_small(
    name: str, pixels: int, classes: int, channels: int, *, pretrained: bool | Path = False
) -> tuple[nn.Module, int]:
    """Build a model for images of ``pixels`` x ``pixels``.

    Args:
        name: A short name, or one of timm's.
        pixels: Of the images.
        classes: Of the head.
        channels: 1 for grey images, 3 for colour.
        pretrained: Load timm's weights, or those in this safetensors file, with a head of its own; not for the
            short names.

    Returns:
        The model, which is evaluated on whole images (`hetkd.data.load_images`), and the input size that it takes
        (tokens need multiples of their size).

    Raises:
        ValueError: If the name does not exist, or has no pretrained weights.
    """
    if name in _SMALL:
        if pretrained:
            raise ValueError(f"{name!r} is a small model without weights to start from.")
        step, make = _SMALL[name]
        size = step * math.ceil(pixels / step)
        return _on_whole_images(make(size, num_classes=classes, in_chans=channels)), size
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels, "pretrained": bool(pretrained)}
    if isinstance(pretrained, Path):
        options["pretrained_cfg_overlay"] = {"file": str(pretrained)}
    try:
        model = load_model(f"timm:{name}", img_size=pixels, **options)
    except TypeError:  # models without tokens take any size
        model = load_model(f"timm:{name}", **options)
    return _on_whole_images(model), pixels


def _on_whole_images(model: nn.Module) -> nn.Module:
    """Have images resized without a crop of their middle."""
    configuration = getattr(model, "pretrained_cfg", None)
    if isinstance(configuration, dict):
        whole = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}
        model.pretrained_cfg = {**configuration, **whole}  # type: ignore[assignment]
    else:
        model.input_settings = {"crop_ratio": 1.0, "source": "ImageNet's convention"}  # type: ignore[assignment]
    return model


def _vit(size: int, *, width: int = 128, depth: int = 6, heads: int = 4, **options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    patch = size // 4 if size < 32 else size // 8
    return VisionTransformer(img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, **options)


def _teacher_vit(size: int, **options: Any) -> nn.Module:
    pooling: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
    if size != 28 or options["in_chans"] != 1:
        return _vit(size, **pooling, **options)
    shape: dict[str, Any] = {"img_size": 28, "patch_size": 7, "embed_dim": 128, "depth": 6, "num_heads": 4}
    return load_model("timm:vit_tiny_patch16_224", pretrained=False, **shape, **pooling, **options)


def _swin(size: int, *, width: int = 64, depths: tuple[int, ...] = (2, 2, 4), **options: Any) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    heads, window = tuple(2 * 2**stage for stage in range(len(depths))), size // 8
    return SwinTransformer(
        img_size=size, patch_size=2, window_size=window, embed_dim=width, depths=depths, num_heads=heads, **options
    )


def _mixer(size: int, *, width: int = 192, depth: int = 8, residual: bool = False, **options: Any) -> nn.Module:
    from timm.layers import Mlp
    from timm.models.mlp_mixer import Affine, MixerBlock, MlpMixer, ResBlock

    if residual:
        options |= {"block_layer": ResBlock, "mlp_ratio": 4, "norm_layer": Affine, "mlp_layer": Mlp}
    else:
        options |= {"block_layer": MixerBlock}
    return MlpMixer(img_size=size, patch_size=size // 8, num_blocks=depth, embed_dim=width, **options)


def _convnext(size: int, **options: Any) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(2, 2, 4, 2), dims=(40, 80, 160, 320), patch_size=2, **options)


def _resnet(size: int, **options: Any) -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, (1, 1, 1, 1), channels=(16, 32, 64, 128), stem_width=16, **options)
    model.maxpool = nn.Identity()  # as is usual for images of 32 px
    return model


_SMALL: dict[str, tuple[int, Callable[..., nn.Module]]] = {
    "vit": (4, _teacher_vit),
    "swin": (32, _swin),
    "mixer": (8, _mixer),
    "convnext": (16, _convnext),
    "deit": (8, partial(_vit, width=96, depth=6, heads=3)),
    "deit_slim": (8, partial(_vit, width=64, depth=4, heads=2)),
    "resnet_slim": (32, _resnet),
    "swin_p": (32, partial(_swin, width=48, depths=(2, 2, 2))),
    "resmlp": (8, partial(_mixer, width=128, depth=6, residual=True)),
    "resmlp_slim": (8, partial(_mixer, width=64, depth=4, residual=True)),
}
