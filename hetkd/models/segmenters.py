"""Segmenters of timm encoders: a small, plain decoder on features that timm's models yield."""

from typing import Any

from torch import Tensor, nn

_DECODER_WIDTH = 128


class TimmSegmenter(nn.Module):
    """A timm model as an encoder, with torchvision's LR-ASPP on two of its stages, or a linear layer on its tokens.

    LR-ASPP (Howard et al., arXiv 1905.02244) takes the stage of stride 8 and the last one. A model with a single grid,
    as a ViT, gets a batch norm and a 1x1 convolution on its last stage, as DINOv2 is measured (arXiv 2304.07193).

    Args:
        name: Of the timm model.
        num_classes: Classes of a pixel.
        pretrained: Whether the encoder has timm's weights.
        **options: Of `timm.create_model`.

    Attributes:
        encoder: timm's model, without its classifier.
        decoder: From the encoder's stages to logits.
    """

    def __init__(self, name: str, num_classes: int, pretrained: bool, **options: Any) -> None:
        import timm
        from torchvision.models.segmentation.lraspp import LRASPPHead

        super().__init__()
        self.encoder = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        info = self.encoder.feature_info
        strides, widths = [stage["reduction"] for stage in info], [stage["num_chs"] for stage in info]
        last = len(info) - 1
        low = next((index for index, stride in enumerate(strides) if stride >= 8), last)
        self.is_plain = strides[low] == strides[last]
        self.decoder: nn.Module
        if self.is_plain:
            self.decoder = nn.Sequential(nn.BatchNorm2d(widths[last]), nn.Conv2d(widths[last], num_classes, 1))
        else:
            self.decoder = LRASPPHead(widths[low], widths[last], num_classes, _DECODER_WIDTH)
        self.stages = self.encoder.prune_intermediate_layers([low, last], prune_norm=not self.is_plain, prune_head=True)
        self.num_classes = num_classes
        self.pretrained_cfg = self.encoder.pretrained_cfg

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, classes, h, w]`` at the stride of the finer stage."""
        maps = self.encoder.forward_intermediates(
            images, indices=self.stages, intermediates_only=True, norm=self.is_plain
        )
        logits: Tensor = self.decoder(maps[-1]) if self.is_plain else self.decoder({"low": maps[0], "high": maps[-1]})
        return logits
