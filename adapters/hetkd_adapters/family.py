"""What the families share: which models belong to one, and how each library's models are tapped."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hetkd.adapter import Features, HookAdapter, find_classifier, first_tensor
from hetkd.grid import tokens_to_map


@dataclass(frozen=True)
class Layout:
    """Where a model outside timm is tapped, and what comes out there.

    Attributes:
        stages: Regular expression that the paths of the stage modules end with.
        order: ``"NCHW"``, ``"NHWC"`` or ``"tokens"`` (``[B, N, C]``, prefix tokens first).
    """

    stages: str
    order: str = "NCHW"


class FamilyAdapter(HookAdapter):
    """Base of the built-in families: timm by ``forward_intermediates``, other libraries by hooks.

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
        """Accepts models whose class or configuration is listed."""
        if library(model) == "timm":
            return is_tappable_timm(model) and any(base.__name__ in self.timm for base in type(model).__mro__)
        return self._layout(model) is not None

    def stage_names(self, model: nn.Module, images: Tensor) -> list[str]:
        """Lists timm's feature modules, or the modules that the layout names."""
        layout = self._layout(model)
        if layout is None:
            return timm_stage_names(model)
        pattern = re.compile(rf"(?:.*\.)?(?:{layout.stages})")
        return [name for name, _ in model.named_modules() if pattern.fullmatch(name)]

    def run(self, model: nn.Module, images: Tensor, stages: Sequence[str]) -> Features:
        """Runs the model once; see `hetkd.Adapter.run`."""
        if library(model) == "timm":
            return run_timm(model, images, stages)
        return super().run(model, images, stages)

    def to_map(self, output: Any, model: nn.Module, images: Tensor) -> Tensor:
        """Drops prefix tokens and turns tokens and NHWC around."""
        layout = self._layout(model)
        tensor = first_tensor(output)
        if layout is not None and layout.order == "NHWC" and tensor.ndim == 4:
            return tensor.permute(0, 3, 1, 2)
        if tensor.ndim == 3:
            return tokens_to_map(tensor, (images.shape[-2], images.shape[-1]), self.patch_size(model))
        return tensor

    def patch_size(self, model: nn.Module) -> int | tuple[int, int] | None:
        """Returns the pixels that a token covers at every stage, or ``None`` where it differs or is unknown."""
        return None

    def _layout(self, model: nn.Module) -> Layout | None:
        home = library(model)
        if home == "torchvision":
            return self.torchvision.get(type(model).__name__)
        if home == "transformers":
            return self.transformers.get(getattr(model.config, "model_type", ""))
        return None


def library(model: nn.Module) -> str | None:
    """Returns ``"timm"``, ``"torchvision"`` or ``"transformers"``, where the model's class comes from, or ``None``."""
    for base in type(model).__mro__:
        root = base.__module__.partition(".")[0]
        if root in ("timm", "torchvision", "transformers"):
            return root
    return None


def is_tappable_timm(model: nn.Module) -> bool:
    """Says whether a model has timm's interface for intermediate features."""
    return hasattr(model, "forward_intermediates") and hasattr(model, "feature_info")


def timm_stage_names(model: Any) -> list[str]:
    """Returns the module paths of timm's feature stages, in the order of their indices."""
    return [info["module"] for info in model.feature_info]


def run_timm(model: Any, images: Tensor, stages: Sequence[str]) -> Features:
    """Runs a timm model once by ``forward_intermediates`` and ``forward_head``; see `hetkd.Adapter.run`."""
    pooled: list[Tensor] = []
    classifier = find_classifier(model)
    if classifier is not None:
        handle = classifier.register_forward_pre_hook(lambda module, args: pooled.append(args[0].flatten(1)))
    try:
        names = timm_stage_names(model)
        if stages:
            indices = [names.index(stage) for stage in stages]
            final, maps = model.forward_intermediates(images, indices=indices, output_fmt="NCHW")
        else:
            final, maps = model.forward_features(images), []
        output = model.forward_head(final)
    finally:
        if classifier is not None:
            handle.remove()
    if len(maps) != len(stages):
        raise RuntimeError(f"{type(model).__name__} returned {len(maps)} feature maps for the stages {list(stages)}.")
    if classifier is None:
        return Features(None, tuple(maps), output if output.ndim == 2 else None)
    return Features(output, tuple(maps), pooled[0])
