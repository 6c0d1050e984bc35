"""Any other module: stages are found by a dry run."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hetkd.adapter import Features, HookAdapter, first_tensor
from hetkd.grid import tokens_to_map
from hetkd_adapters.family import is_tappable_timm, library, run_timm, timm_stage_names


class GenericAdapter(HookAdapter):
    """Taps models that no family knows.

    timm models are tapped by ``forward_intermediates``. In others, the blocks of the outermost
    ``nn.Sequential`` and ``nn.ModuleList`` containers, and modules beside them, are stages if
    their output is spatial: NCHW, NHWC, or tokens that form a grid of the image's aspect ratio.
    """

    family = "other"
    priority: ClassVar[int] = -100

    def accepts(self, model: nn.Module) -> bool:
        """Accepts everything."""
        return True

    def stage_names(self, model: nn.Module, images: Tensor) -> list[str]:
        """Lists timm's feature modules, or the blocks with spatial outputs, in the order in which they finish."""
        if self._is_timm(model):
            return timm_stage_names(model)
        grids: dict[str, tuple[int, int]] = {}
        handles = [
            module.register_forward_hook(self._note_grid(grids, name, model, images))
            for name, module in _blocks(model, "")
        ]
        try:
            with torch.no_grad():
                model(images)
        finally:
            for handle in handles:
                handle.remove()
        names = [name for name, grid in grids.items() if grid != (1, 1)]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no spatial features: no block yields a feature map larger than 1 x 1 "
                f"for an input of {list(images.shape)}."
            )
        return names

    def run(self, model: nn.Module, images: Tensor, stages: Sequence[str]) -> Features:
        """Runs the model once; see `hetkd.Adapter.run`."""
        return run_timm(model, images, stages) if self._is_timm(model) else super().run(model, images, stages)

    def to_map(self, output: Any, model: nn.Module, images: Tensor) -> Tensor:
        """Turns NHWC (told by the image's aspect ratio) and tokens around."""
        x = first_tensor(output)
        height, width = images.shape[-2:]
        if x.ndim == 3:
            return tokens_to_map(x, (height, width))
        if x.ndim == 4 and not _has_aspect(x.shape[2:], height / width) and _has_aspect(x.shape[1:3], height / width):
            return x.permute(0, 3, 1, 2)
        return x

    def _note_grid(self, grids: dict[str, tuple[int, int]], name: str, model: nn.Module, images: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            try:
                x = self.to_map(output, model, images)
            except (RuntimeError, ValueError, TypeError):
                return  # not spatial: no stage
            if x.ndim == 4 and x.shape[0] == images.shape[0]:
                grids.pop(name, None)
                grids[name] = (x.shape[2], x.shape[3])

        return hook

    @staticmethod
    def _is_timm(model: nn.Module) -> bool:
        return library(model) == "timm" and is_tappable_timm(model)


def _has_aspect(grid: Sequence[int], aspect: float) -> bool:
    return abs(grid[0] - grid[1] * aspect) <= max(1, aspect)


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that may be stages: elements of containers, and what stands beside containers."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        inside = [m for m in child.modules() if isinstance(m, (nn.Sequential, nn.ModuleList)) and m is not child]
        is_container = isinstance(child, (nn.Sequential, nn.ModuleList))
        in_container = isinstance(module, (nn.Sequential, nn.ModuleList))
        if is_container or (inside and not in_container):
            yield from _blocks(child, f"{path}.")
        else:
            yield path, child
