"""Any module: timm's by their own interface, others by stages that a dry run finds."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from hetkd.features import (
    Features,
    HookAdapter,
    NoSpatialFeatures,
    Outputs,
    find_tensor,
    first_tensor,
    tapped,
    tokens_to_map,
    windows_to_map,
)
from hetkd_adapters.libraries import is_tappable_timm, run_timm, timm_stage_names

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_WITHOUT_SPATIAL_FEATURES = {
    "imagegpt": "it takes the indices of colours instead of images",
    "perceiver": "its latent vectors have no place in the image",
    "shieldgemma2": "it takes text beside images",
}
"""Types of Hugging Face models that no dry run can tell from others, and why they are refused."""


class GenericAdapter(HookAdapter):
    """Taps models that no family knows.

    timm models are tapped by ``forward_intermediates``. In others, the blocks of the outermost ``nn.Sequential`` and
    ``nn.ModuleList`` containers, the modules beside them and those around them are stages if their output is spatial:
    NCHW, NHWC, or tokens ``[B, N, C]`` that form a grid of the image's aspect ratio.
    """

    family = "other"
    priority: ClassVar[int] = -100

    def accepts(self, model: nn.Module) -> bool:
        """Accept everything."""
        return True

    def stage_names(self, model: nn.Module, images: Tensor) -> list[str]:
        """List timm's features, or the blocks with spatial outputs, in the order in which they finish."""
        if is_tappable_timm(model):
            return timm_stage_names(model, images)
        if _model_type(model) in _WITHOUT_SPATIAL_FEATURES:
            reason = _WITHOUT_SPATIAL_FEATURES[_model_type(model)]
            raise NoSpatialFeatures(f"{type(model).__name__} has no spatial features: {reason}")
        with tapped(model, list(_blocks(model))) as outputs:
            self.call(model, images)
        names = [name for name in distinct(outputs) if self._is_spatial(outputs.of(name), model, images)]
        if not names:
            raise NoSpatialFeatures(
                f"{type(model).__name__} has no spatial features: no block yields a feature map larger than 1 x 1 "
                f"for an input of {images.shape[2]} x {images.shape[3]} pixels"
            )
        return names

    def run(self, model: nn.Module, images: Tensor, stages: Sequence[str]) -> Features:
        """Run the model once; see `hetkd.Adapter.run`."""
        if is_tappable_timm(model):
            return run_timm(model, images, stages, self.to_map)
        return super().run(model, images, stages)

    def call(self, model: nn.Module, images: Tensor) -> Any:
        """Call the model; Hugging Face's are told to interpolate position embeddings for a size that is not theirs."""
        config = getattr(model, "config", None)
        own = getattr(getattr(config, "vision_config", config), "image_size", None)
        own = (own, own) if isinstance(own, int) else own
        if own is None or tuple(own) == images.shape[2:] or not _takes(model, "interpolate_pos_encoding"):
            return super().call(model, images)
        return model._call_impl(images, interpolate_pos_encoding=True)

    def to_map(self, output: Any, model: nn.Module, images: Tensor) -> Tensor:
        """Turn NHWC (told by the image's aspect ratio), tokens and windows of tokens into ``[B, C, h, w]``."""
        x = first_tensor(output)
        height, width = images.shape[-2:]
        if x.ndim == 3 and x.shape[2] > 1:
            if len(x) != len(images):
                return windows_to_map(x, len(images), (height, width))
            return tokens_to_map(x, (height, width))
        if x.ndim == 4 and not _has_aspect(x.shape[2:], height / width) and _has_aspect(x.shape[1:3], height / width):
            return x.permute(0, 3, 1, 2)
        return x

    def _is_spatial(self, output: Any, model: nn.Module, images: Tensor) -> bool:
        try:
            x = self.to_map(output, model, images)
        except (RuntimeError, ValueError, TypeError):
            return False
        is_map = x.ndim == 4 and x.shape[0] == images.shape[0] and x.shape[2:] != (1, 1)
        return is_map and x.shape != images.shape  # what a normalisation returns is still the image


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _has_aspect(grid: Sequence[int], aspect: float) -> bool:
    return abs(grid[0] - grid[1] * aspect) <= max(1, aspect)


def distinct(outputs: Outputs) -> list[str]:
    """Name the modules whose outputs stayed as they were, and were not returned by a module inside them too."""
    names: list[str] = []
    seen: list[Tensor] = []
    for name, output in outputs.finished.items():
        tensor = find_tensor(output)
        if tensor is None or outputs.is_overwritten(name) or any(tensor is other for other in seen):
            continue
        names.append(name)
        seen.append(tensor)
    return names


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield the paths of what may be a stage: elements of containers, and what stands beside and around containers.

    A module is taken as a whole if its containers hold single layers only, as the branches of a residual block do.
    """
    inside_container = bool(prefix) and isinstance(module, _CONTAINERS)
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, _CONTAINERS) or (_has_blocks(child) and not inside_container):
            yield from _blocks(child, f"{path}.")
        if not isinstance(child, _CONTAINERS):
            yield path


def _has_blocks(module: nn.Module) -> bool:
    containers = (inner for inner in module.modules() if isinstance(inner, _CONTAINERS))
    return any(next(element.children(), None) is not None for container in containers for element in container)
