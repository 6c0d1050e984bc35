"""Networks that mix convolution with attention, pooling, state spaces or recurrence."""

from typing import ClassVar

from torch import nn

from hetkd_adapters.family import DRY_RUN, FamilyAdapter
from hetkd_adapters.libraries import is_tappable_timm

_ATTENTION_IN_CNNS = frozenset(
    {"BilinearAttnTransform", "BottleneckAttn", "HaloAttn", "HybridEmbed", "LambdaLayer", "MobileVitBlock"}
    | {"MobileVitV2Block", "MultiQueryAttention2d", "Attention2d"}
)


class HybridAdapter(FamilyAdapter):
    """MaxViT, CoAtNet, LeViT, EfficientFormer, MobileViT, FastViT, MambaOut, MetaFormer and their kin.

    Also members of other families with blocks of another kind inside: BoTNet, LambdaNet and MobileViT among the CNNs,
    ViTs whose patches are embedded by a ResNet.
    """

    family = "hybrid"
    priority: ClassVar[int] = 1  # what is mixed is claimed before CNN and ViT claim the rest
    timm = frozenset(
        {
            "CPUBone",
            "CSATv2",
            "CoaT",
            "EdgeNeXt",
            "EfficientFormer",
            "EfficientFormerV2",
            "EfficientViM",
            "EfficientViMDistilled",
            "EfficientVit",
            "EfficientVitLarge",
            "EfficientVitMsra",
            "FastVit",
            "FocalNet",
            "IFormer",
            "Levit",
            "LevitDistilled",
            "LowFormer",
            "MambaOut",
            "MaxxVit",
            "MetaFormer",
            "MobileNetV5",
            "MobileNetV5Encoder",
            "NextViT",
            "PoolingVisionTransformer",
            "SHViT",
            "Sequencer2d",
            "SwiftFormer",
            "TinyVit",
            "VOLO",
            "Visformer",
        }
    )
    torchvision = {"MaxVit": DRY_RUN}
    transformers = {
        "cvt": DRY_RUN,
        "focalnet": DRY_RUN,
        "levit": DRY_RUN,
        "mobilevit": DRY_RUN,
        "mobilevitv2": DRY_RUN,
        "poolformer": DRY_RUN,
        "swiftformer": DRY_RUN,
    }

    def accepts(self, model: nn.Module) -> bool:
        """Accept what is listed, and timm models with blocks of another kind inside."""
        if super().accepts(model):
            return True
        return is_tappable_timm(model) and any(type(m).__name__ in _ATTENTION_IN_CNNS for m in model.modules())
