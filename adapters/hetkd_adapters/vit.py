"""Plain vision transformers: one grid of tokens all the way, with class, distillation or register tokens before it."""

from typing import Any

from torch import nn

from hetkd_adapters.family import DRY_RUN, FamilyAdapter, Layout

_LAYERS = Layout(r"(?:encoder\.layer|encoder\.layers|layers|layer)\.\d+", "tokens")


class ViTAdapter(FamilyAdapter):
    """ViT, DeiT (with and without distillation token), BEiT, EVA, DINOv2 and v3, CaiT, NaFlexViT, CLIP and SigLIP."""

    family = "ViT"
    timm = frozenset(
        {
            "Beit",
            "Cait",
            "ConVit",
            "CrossVit",
            "DeepseekVitClassifier",
            "DeepseekVitEncoder",
            "Eva",
            "Gemma4VitClassifier",
            "Gemma4VitEncoder",
            "NaFlexVit",
            "Qwen3VitClassifier",
            "Qwen3VitEncoder",
            "TNT",
            "VisionTransformer",
            "VisionTransformerDistilled",
            "VisionTransformerRelPos",
            "VisionTransformerSAM",
            "Xcit",
        }
    )
    torchvision = {"VisionTransformer": Layout(r"encoder\.layers\.encoder_layer_\d+", "tokens")}
    transformers = {
        "beit": _LAYERS,
        "clip": _LAYERS,
        "clip_vision_model": _LAYERS,
        "data2vec-vision": _LAYERS,
        "deit": _LAYERS,
        "dinov2": _LAYERS,
        "dinov2_with_registers": _LAYERS,
        "dinov3_vit": _LAYERS,
        "ijepa": _LAYERS,
        "lw_detr_vit": DRY_RUN,
        "metaclip_2": _LAYERS,
        "metaclip_2_vision_model": _LAYERS,
        "pixio": _LAYERS,
        "rf_detr_dinov2": DRY_RUN,
        "sapiens2": DRY_RUN,
        "siglip": _LAYERS,
        "siglip_vision_model": _LAYERS,
        "tipsv2": _LAYERS,
        "tipsv2_vision_model": _LAYERS,
        "vit": _LAYERS,
        "vit_msn": _LAYERS,
        "vitdet": DRY_RUN,
        "vitpose_backbone": _LAYERS,
    }

    def patch_size(self, model: nn.Module) -> int | tuple[int, int] | None:
        """Return the patch size in the model or its configuration."""
        config = getattr(model, "config", model)
        size: Any = getattr(getattr(config, "vision_config", config), "patch_size", None)
        return tuple(size) if isinstance(size, list) else size
