"""SigLIP 2 of Hugging Face, which takes sequences of patches instead of images."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hetkd.features import HookAdapter
from hetkd_adapters.libraries import library


class Siglip2Adapter(HookAdapter):
    """Cuts images into patches as SigLIP 2's image processor does, and taps its layers."""

    family = "ViT"
    priority: ClassVar[int] = 1

    def accepts(self, model: nn.Module) -> bool:
        """Accept SigLIP 2's image classifier and its vision model."""
        model_type = getattr(getattr(model, "config", None), "model_type", "")
        return library(model) == "transformers" and model_type in ("siglip2", "siglip2_vision_model")

    def stage_names(self, model: nn.Module, images: Tensor) -> list[str]:
        """List the layers of the vision encoder."""
        return [path for path, _ in model.named_modules() if path.rpartition(".")[0].endswith("encoder.layers")]

    def call(self, model: nn.Module, images: Tensor) -> Any:
        """Call the model on patches, which it takes row by row with the channels last."""
        config: Any = model.config
        size = getattr(config, "vision_config", config).patch_size
        batch, height, width = len(images), images.shape[2] // size, images.shape[3] // size
        patches = images.unflatten(3, (width, size)).unflatten(2, (height, size)).permute(0, 2, 4, 3, 5, 1)
        return model._call_impl(
            pixel_values=patches.reshape(batch, height * width, -1),
            pixel_attention_mask=torch.ones(batch, height * width, dtype=torch.int32, device=images.device),
            spatial_shapes=torch.tensor([[height, width]], device=images.device).expand(batch, 2),
        )
