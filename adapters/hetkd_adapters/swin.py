"""Hierarchical transformers, tapped at each of their grids before patches are merged."""

from hetkd_adapters.family import DRY_RUN, FamilyAdapter, Layout

_BLOCKS = Layout(r"encoder\.layers\.\d+\.blocks\.\d+", "tokens")
_STAGES = Layout(r"features\.[1357]", "NHWC")


class SwinAdapter(FamilyAdapter):
    """Swin and Swin v2: attention in shifted windows."""

    family = "Swin"
    timm = frozenset({"SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr"})
    torchvision = {"SwinTransformer": _STAGES}
    transformers = {"donut-swin": _BLOCKS, "maskformer-swin": _BLOCKS, "swin": _BLOCKS, "swinv2": _BLOCKS}


class HierarchicalAdapter(FamilyAdapter):
    """Other transformers over several grids: PVT, Twins, Hiera, MViT, DaViT, NesT, DiNAT, SegFormer."""

    family = "hierarchical ViT"
    timm = frozenset(
        {
            "DaVit",
            "GlobalContextVit",
            "Hiera",
            "HieraDet",
            "MultiScaleVit",
            "Nest",
            "PyramidVisionTransformerV2",
            "Twins",
        }
    )
    transformers = {"dinat": DRY_RUN, "hiera": DRY_RUN, "pvt": DRY_RUN, "pvt_v2": DRY_RUN, "segformer": DRY_RUN}
