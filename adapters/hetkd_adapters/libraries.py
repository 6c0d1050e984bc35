"""Name a model's library, and tap timm's models by their own feature interface."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from hetkd.features import Features, class_and_distillation_logits, find_classifier, tapped


def library(model: nn.Module) -> str | None:
    """Return ``"timm"``, ``"torchvision"`` or ``"transformers"``, where the model's class comes from, or ``None``."""
    for base in type(model).__mro__:
        root = base.__module__.partition(".")[0]
        if root in ("timm", "torchvision", "transformers"):
            return root
    return None


def is_tappable_timm(model: nn.Module) -> bool:
    """Say whether timm's interface for intermediate features does what calling the model does.

    It does not in a subclass with a ``forward`` of its own, or if the model has hooks.
    """
    if not (hasattr(model, "forward_intermediates") and hasattr(model, "feature_info")):
        return False
    is_own = not type(model).forward.__module__.startswith("timm.")
    return library(model) == "timm" and not (is_own or model._forward_hooks or model._forward_pre_hooks)


def timm_stage_names(model: Any, images: Tensor) -> list[str]:
    """List timm's features and, where the map before pooling is none of them, the module that yields it.

    In EfficientNet and MobileNetV2, for example, a 1 x 1 convolution and a norm stand between the last block and
    pooling, in ResNetV2 a norm. Token and NHWC models end with their last block.
    """
    names = _feature_names(model)
    with tapped(model, [path for path, _ in model.named_modules() if path]) as outputs:
        final, maps = model.forward_intermediates(images)
    if isinstance(final, Tensor) and final.ndim == 4 and _is_another_map(final, maps[-1]):
        names += [path for path, output in outputs.finished.items() if output is final][-1:]
    return names


def run_timm(
    model: Any, images: Tensor, stages: Sequence[str], to_map: Callable[[Any, nn.Module, Tensor], Tensor]
) -> Features:
    """Run a timm model once by ``forward_intermediates`` and ``forward_head``.

    Args:
        model: The model.
        images: ``[B, C, H, W]``.
        stages: Names of `timm_stage_names`, or paths of any other modules, which are tapped by hooks.
        to_map: Turns the output of such a module into a feature map.
    """
    names = _feature_names(model)
    indices = sorted({names.index(stage) for stage in stages if stage in names})
    with tapped(model, [stage for stage in stages if stage not in names]) as outputs:
        if indices:
            final, features = model.forward_intermediates(images, indices=indices, output_fmt="NCHW")
        else:
            final, features = model.forward_features(images), []
        output = None
        with suppress(NotImplementedError):  # timm's encoders have no head
            output = model.forward_head(final)
    if len(features) != len(indices):
        raise RuntimeError(f"{type(model).__name__} returned {len(features)} feature maps for {len(indices)} stages.")
    maps = {names[index]: x for index, x in zip(indices, features, strict=True)}
    maps |= {stage: to_map(outputs.of(stage), model, images) for stage in stages if stage not in maps}
    ordered = tuple(maps[stage] for stage in stages)
    if find_classifier(model) is None:
        return Features(None, ordered, output if isinstance(output, Tensor) and output.ndim == 2 else None)
    logits, distillation_logits = class_and_distillation_logits(model, output)
    return Features(logits, ordered, outputs.classifier_input, distillation_logits)


def _is_another_map(final: Tensor, last: Tensor) -> bool:
    if final.shape == last.shape:
        return not torch.equal(final, last)
    return final.shape[3] != last.shape[1]  # else it is the last map in NHWC


def _feature_names(model: Any) -> list[str]:
    """Return the module paths of timm's features, in the order of their indices.

    Where one module yields several of them (the branches of CrossViT, the scales of CoaT), they are told apart by a
    number: ``blocks.0``, ``blocks.0#2``.
    """
    seen: Counter[str] = Counter()
    names = []
    for info in model.feature_info:
        path = info["module"] or "stem"  # TResNet names none for its stem
        seen[path] += 1
        names.append(path if seen[path] == 1 else f"{path}#{seen[path]}")
    return names
