"""Small segmenters and data: bright stripes, whose class is their brightness."""

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torchvision.models import segmentation

from hetkd import load_model

CLASSES = 3


class UNet(nn.Module):
    """One's own module, without a library."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(self.block(*widths) for widths in ((3, 8), (8, 16), (16, 24)))
        self.up = nn.ModuleList(self.block(*widths) for widths in ((40, 16), (24, 8)))
        self.head = nn.Conv2d(8, CLASSES, 1)

    @staticmethod
    def block(channels: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if index else x)
            skips.append(x)
        for block, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = block(torch.cat([F.interpolate(x, skip.shape[2:]), skip], 1))
        return self.head(x)


def segformer() -> nn.Module:
    options = {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16, "num_labels": CLASSES}
    config = transformers.SegformerConfig(num_attention_heads=[1, 1, 1, 1], **options)
    return transformers.SegformerForSemanticSegmentation(config)


def lraspp() -> nn.Module:
    return segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)


def small() -> nn.Module:
    return load_model("timm:test_resnet", pretrained=False, task="segmentation", num_classes=CLASSES)


def stripes(count: int = 16, size: tuple[int, int] = (40, 56)) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, H, W]`` in [0, 1] and their masks; the first row has no class."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, CLASSES, (count, 1, size[1] // 8), generator=generator)
    masks = classes.repeat_interleave(8, 2).expand(count, size[0], -1).clone()
    images = (masks[:, None] / CLASSES + 0.1 * torch.rand(count, 3, *size, generator=generator)).clamp(0, 1)
    masks[:, 0] = 255
    return images, masks
