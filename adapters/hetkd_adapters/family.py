"""Base of the families: the models of each, and the taps of models outside timm."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hetkd.features import first_tensor, tapped, tokens_to_map
from hetkd_adapters.generic import GenericAdapter
from hetkd_adapters.libraries import is_tappable_timm, library


@dataclass(frozen=True)
class Layout:
    """Tap of a model outside timm: its module and the layout of its output.

    Attributes:
        stages: Regular expression that the paths of the stage modules end with; ``None``: a dry run finds the stages
            and tells their layout.
        order: ``"NCHW"``, ``"NHWC"`` or ``"tokens"`` (``[B, N, C]``, prefix tokens first).
    """

    stages: str | None = None
    order: str = "NCHW"


DRY_RUN = Layout()


class FamilyAdapter(GenericAdapter):
    """Base of the built-in families: a `GenericAdapter` that knows its models by name.

    Attributes:
        timm: Names of the timm classes of the family.
        torchvision: Layouts by the name of the torchvision class.
        transformers: Layouts by the ``model_type`` of the Hugging Face configuration.
    """

    priority: ClassVar[int] = 0
    timm: ClassVar[frozenset[str]] = frozenset()
    torchvision: ClassVar[dict[str, Layout]] = {}
    transformers: ClassVar[dict[str, Layout]] = {}

    def accepts(self, model: nn.Module) -> bool:
        """Accept models whose class or configuration is listed."""
        if library(model) == "timm":
            return is_tappable_timm(model) and any(base.__name__ in self.timm for base in type(model).__mro__)
        return self._listed(model) is not None

    def stage_names(self, model: nn.Module, images: Tensor) -> list[str]:
        """List timm's features, the modules that the layout names, or what a dry run finds."""
        layout = self._listed(model)
        if layout is None or layout.stages is None:
            return super().stage_names(model, images)
        pattern = re.compile(rf"(?:.*\.)?(?:{layout.stages})")
        listed = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
        with tapped(model, listed) as outputs:
            self.call(model, images)
        return [name for name in outputs.finished if not outputs.is_overwritten(name)]

    def to_map(self, output: Any, model: nn.Module, images: Tensor) -> Tensor:
        """Drop prefix tokens and turn tokens and NHWC around."""
        layout = self._listed(model)
        if layout is None or layout.stages is None:
            return super().to_map(output, model, images)
        x = first_tensor(output)
        if layout.order == "NHWC" and x.ndim == 4:
            return x.permute(0, 3, 1, 2)
        if x.ndim == 3:
            return tokens_to_map(x, (images.shape[-2], images.shape[-1]), self.patch_size(model))
        return x

    def patch_size(self, model: nn.Module) -> int | tuple[int, int] | None:
        """Return the pixels that a token covers at every stage, or ``None`` where it differs or is unknown."""
        return None

    def _listed(self, model: nn.Module) -> Layout | None:
        home = library(model)
        if home == "torchvision":
            return self.torchvision.get(type(model).__name__)
        if home == "transformers":
            return self.transformers.get(getattr(getattr(model, "config", None), "model_type", ""))
        return None
