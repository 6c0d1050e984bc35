"""Hierarchical transformers with shifted windows; every stage is tapped before its patches are merged."""

from hetkd_adapters.family import FamilyAdapter, Layout

_BLOCKS = Layout(r"encoder\.layers\.\d+\.blocks\.\d+", "tokens")
_STAGES = Layout(r"features\.[1357]", "NHWC")


class SwinAdapter(FamilyAdapter):
    """Swin and Swin v2."""

    family = "Swin"
    timm = frozenset({"SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr"})
    torchvision = {"SwinTransformer": _STAGES}
    transformers = {"swin": _BLOCKS, "swinv2": _BLOCKS}
