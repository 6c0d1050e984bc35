"""Segmenters: the stages of their encoders; what the decoder makes of them is no feature of its own."""

from collections.abc import Sized
from typing import Any, ClassVar

from torch import Tensor, nn

from hetkd.features import is_segmenter, tapped
from hetkd_adapters.generic import GenericAdapter, distinct
from hetkd_adapters.libraries import is_tappable_timm, timm_stage_names

_ENCODERS = ("encoder", "backbone", "model.pixel_level_module.encoder")  # the last is MaskFormer's and its kin's


class SegmenterAdapter(GenericAdapter):
    """Segmenters of torchvision, Hugging Face, segmentation_models_pytorch and `hetkd.load_model`.

    They have an encoder beside a decoder.
    """

    family = "segmenter"
    priority: ClassVar[int] = 2

    def accepts(self, model: nn.Module) -> bool:
        """Accept the libraries' own segmenters."""
        return is_segmenter(model) and (_adds_queries(model) or self._encoder(model) is not None)

    def stage_names(self, model: nn.Module, images: Tensor) -> list[str]:
        """List timm's features, or the blocks of the encoder with spatial outputs."""
        if _adds_queries(model):
            return _layers_without_queries(model)
        name = self._encoder(model)
        encoder = model.get_submodule(str(name))
        if is_tappable_timm(encoder):
            listed = timm_stage_names(encoder, images)
        elif type(model).__module__.startswith("torchvision"):
            listed = [child for child, _ in encoder.named_children()]
        else:
            return [stage for stage in super().stage_names(model, images) if stage.startswith(f"{name}.")]
        paths = {path for path, _ in encoder.named_modules()}
        names = [f"{name}.{stage}" for stage in listed if stage in paths]
        with tapped(model, names) as outputs:
            self.call(model, images)
        unchanged = distinct(outputs)
        return [stage for stage in names if stage in unchanged]

    def _encoder(self, model: nn.Module) -> str | None:
        names = (*_ENCODERS, getattr(model, "base_model_prefix", ""))  # the latter is Hugging Face's
        paths = {path for path, _ in model.named_modules()} - {""}
        return next((name for name in names if name in paths), None)


def _adds_queries(model: Any) -> bool:
    """Say whether a model is EoMT or its kin, which has no decoder: its last blocks see queries beside patches."""
    return hasattr(getattr(model, "config", None), "num_blocks") and isinstance(getattr(model, "layers", None), Sized)


def _layers_without_queries(model: Any) -> list[str]:
    plain = model.config.num_hidden_layers - model.config.num_blocks
    return [f"layers.{index}" for index in range(plain)] or ["embeddings"]
