"""Models for small images by short names, one or two of each family; any other name is one of timm's.

`vit`, `swin`, `mixer`, `convnext` are meant as teachers; `deit`, `resmlp`, `swin_p` as students, beside timm's CNNs.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fashion import build_teacher
from timm.layers import Mlp
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import Affine, MixerBlock, MlpMixer, ResBlock
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from hetkd import load_model


def build(
    name: str, pixels: int, classes: int, channels: int, *, pretrained: bool | Path = False
) -> tuple[nn.Module, int]:
    """Builds a model for images of ``pixels`` x ``pixels``.

    Args:
        name: A short name, or one of timm's.
        pixels: Of the images.
        classes: Of the head.
        channels: 1 for grey images, 3 for colour.
        pretrained: Load timm's weights, or those in this safetensors file, with a head of its own; not for the
            short names.

    Returns:
        The model, and the input size that it takes (tokens need multiples of their size).

    Raises:
        ValueError: If the name does not exist, or has no pretrained weights.
    """
    if name in SMALL:
        if pretrained:
            raise ValueError(f"{name!r} is a small model of these recipes, without weights to start from.")
        step, make = SMALL[name]
        size = step * math.ceil(pixels / step)
        return make(size, num_classes=classes, in_chans=channels), size
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels, "pretrained": bool(pretrained)}
    if isinstance(pretrained, Path):
        options["pretrained_cfg_overlay"] = {"file": str(pretrained)}
    try:
        return load_model(f"timm:{name}", img_size=pixels, **options), pixels
    except TypeError:  # models without tokens take any size
        return load_model(f"timm:{name}", **options), pixels


def _vit(size: int, *, width: int = 128, depth: int = 6, heads: int = 4, **options: Any) -> nn.Module:
    return VisionTransformer(
        img_size=size,
        patch_size=size // 4 if size < 32 else size // 8,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        **options,
    )


def _swin(size: int, *, width: int = 64, depths: tuple[int, ...] = (2, 2, 4), **options: Any) -> nn.Module:
    heads = tuple(2 * 2**stage for stage in range(len(depths)))
    window = size // 8
    return SwinTransformer(
        img_size=size, patch_size=2, window_size=window, embed_dim=width, depths=depths, num_heads=heads, **options
    )


def _mixer(
    size: int, *, width: int = 192, depth: int = 8, block: type[nn.Module] = MixerBlock, **options: Any
) -> nn.Module:
    norm = {} if block is MixerBlock else {"mlp_ratio": 4, "norm_layer": Affine, "mlp_layer": Mlp}
    return MlpMixer(
        img_size=size, patch_size=size // 8, num_blocks=depth, embed_dim=width, block_layer=block, **norm, **options
    )


def _convnext(size: int, **options: Any) -> nn.Module:
    return ConvNeXt(depths=(2, 2, 4, 2), dims=(40, 80, 160, 320), patch_size=2, **options)


def _resnet(size: int, **options: Any) -> nn.Module:
    model = ResNet(BasicBlock, (1, 1, 1, 1), channels=(16, 32, 64, 128), stem_width=16, **options)
    model.maxpool = nn.Identity()  # as is usual for images of 32 px
    return model


def _fashion_vit(size: int, **options: Any) -> nn.Module:
    if size == 28 and options["in_chans"] == 1:
        return build_teacher(trained=False)
    return _vit(size, class_token=False, global_pool="avg", **options)


SMALL: dict[str, tuple[int, Callable[..., nn.Module]]] = {
    "vit": (4, _fashion_vit),
    "swin": (32, _swin),
    "mixer": (8, _mixer),
    "convnext": (16, _convnext),
    "deit": (8, partial(_vit, width=96, depth=6, heads=3)),
    "deit_slim": (8, partial(_vit, width=64, depth=4, heads=2)),
    "resnet_slim": (32, _resnet),
    "swin_p": (32, partial(_swin, width=48, depths=(2, 2, 2))),
    "resmlp": (8, partial(_mixer, width=128, depth=6, block=ResBlock)),
    "resmlp_slim": (8, partial(_mixer, width=64, depth=4, block=ResBlock)),
}
