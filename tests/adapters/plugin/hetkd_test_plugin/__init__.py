"""Taps timm's ConvNeXt after each block, not after each stage."""

from timm.models.convnext import ConvNeXt, ConvNeXtBlock

from hetkd import HookAdapter, register_adapter


@register_adapter("convnext-blocks")  # beside the entry point, as people do
class ConvNeXtBlocks(HookAdapter):
    family = "ConvNeXt by blocks"

    def accepts(self, model):
        return isinstance(model, ConvNeXt)

    def stage_names(self, model, images):
        return [name for name, module in model.named_modules() if isinstance(module, ConvNeXtBlock)]
