"""Plain vision transformers: one grid of tokens all the way, with class, distillation or register tokens before it."""

from typing import Any

from torch import nn

from hetkd_adapters.family import FamilyAdapter, Layout

_LAYERS = Layout(r"(?:encoder\.layer|encoder\.layers|layers)\.\d+", "tokens")


class ViTAdapter(FamilyAdapter):
    """ViT, DeiT (with and without distillation token), BEiT, EVA, DINOv2 (with and without registers)."""

    family = "ViT"
    timm = frozenset({"Beit", "Cait", "Eva", "VisionTransformer", "VisionTransformerDistilled"})
    torchvision = {"VisionTransformer": Layout(r"encoder\.layers\.encoder_layer_\d+", "tokens")}
    transformers = {
        "beit": _LAYERS,
        "deit": _LAYERS,
        "dinov2": _LAYERS,
        "dinov2_with_registers": _LAYERS,
        "vit": _LAYERS,
    }

    def patch_size(self, model: nn.Module) -> int | tuple[int, int] | None:
        """Returns the patch size in the model or its configuration."""
        size: Any = getattr(getattr(model, "config", model), "patch_size", None)
        return tuple(size) if isinstance(size, list) else size
