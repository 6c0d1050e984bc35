"""A run on a sample: which stages a model has, their shapes, and its classes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hetkd.features.adapter import Adapter, Stage
from hetkd.features.hooks import eval_mode, tapped


class NoSpatialFeatures(ValueError):
    """A model yields no feature map anywhere; it can only be distilled by its logits."""


class Probe(NamedTuple):
    """Shapes and classes of a model, measured by a run on a sample.

    Attributes:
        stages: In order of depth.
        classes: Of its classifier, or ``None`` without one.
        pooled: Channels of the vector that the classifier sees, or ``None`` if there is none.
        is_dense: Whether its logits are maps.
        yields_logits: Names of listed stages whose map is that of the logits.
        are_probabilities: Whether a softmax or sigmoid has been at its logits.
        of_one_pixel: Whether its logits are maps of one pixel, ``[B, classes, 1, 1]``.
    """

    stages: list[Stage]
    classes: int | None
    pooled: int | None
    is_dense: bool
    yields_logits: set[str]
    are_probabilities: bool
    of_one_pixel: bool


def probe(
    adapter: Adapter, model: nn.Module, images: Tensor, extra: Sequence[str] = (), *, stages: bool = True
) -> Probe:
    """Run ``model`` on a sample, without gradients and in eval mode.

    Args:
        adapter: One that accepts the model.
        model: The model.
        images: The sample.
        extra: Paths of modules that are to be stages beside those that the adapter lists.
        stages: Whether to look for stages at all.

    Raises:
        NoSpatialFeatures: If the adapter finds no stage.
    """
    with eval_mode(model), torch.no_grad():
        listed = adapter.stage_names(model, images) if stages else []
        added = [name for name in dict.fromkeys(extra) if name not in listed]
        paths = {path for path, _ in model.named_modules() if path}
        with tapped(model, [name for name in (*listed, *added) if name in paths]) as outputs:
            features = adapter.run(model, images, [*listed, *added])
    names = _in_order_of_depth(listed, added, list(outputs.finished))
    shapes = {name: _map_shape(name, x) for name, x in zip([*listed, *added], features.maps, strict=True)}
    classes, pooled = (None if x is None else x.shape[1] for x in (features.logits, features.pooled))
    is_dense = features.logits is not None and features.logits.ndim == 4
    yields_logits = {name for name, x in zip(listed, features.maps, strict=False) if x is features.logits}
    found = [Stage(name, *shapes[name]) for name in names]
    of_one_pixel = is_dense and features.logits is not None and features.logits.shape[2:] == (1, 1)
    return Probe(
        found, classes, pooled, is_dense, yields_logits, _are_probabilities(features.logits, model), of_one_pixel
    )


def _are_probabilities(logits: Tensor | None, model: nn.Module) -> bool:
    if logits is None or logits.shape[1] < 2 or bool((logits < 0).any()):
        return False
    sum_to_1 = torch.allclose(logits.float().sum(1), torch.ones((), device=logits.device), atol=1e-3)
    return sum_to_1 or (isinstance(list(model.modules())[-1], nn.Sigmoid) and bool((logits <= 1).all()))


def _in_order_of_depth(listed: list[str], added: list[str], finished: list[str]) -> list[str]:
    """Put each added name behind the last listed one that finished before it."""
    names = list(listed)
    for name in added:
        before = [other for other in finished[: finished.index(name)] if other in names]
        names.insert(max((names.index(other) + 1 for other in before), default=0), name)
    return names


def _map_shape(name: str, x: Tensor) -> tuple[int, int, int]:
    if x.ndim != 4:
        raise RuntimeError(f"stage {name!r} yields a tensor of shape {list(x.shape)}, not a feature map [B, C, h, w].")
    return x.shape[1], x.shape[2], x.shape[3]
