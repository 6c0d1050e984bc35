"""Classifiers of any model: found, replaced, or added to a backbone."""

from typing import Any

import torch
from torch import Tensor, nn

from hetkd.models.description import BUILT_FROM


class WithHead(nn.Module):
    """A backbone of one's own with a linear classifier on its features.

    Args:
        backbone: Yields vectors ``[B, C]``, maps ``[B, C, h, w]`` or tokens ``[B, N, C]``; the latter are averaged.
        features: C.
        classes: Of the classifier.
    """

    def __init__(self, backbone: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, nn.Linear(features, classes)
        for name in ("input_settings", "image_size"):
            if hasattr(backbone, name):
                setattr(self, name, getattr(backbone, name))

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits ``[B, classes]``."""
        logits: Tensor = self.classifier(pooled(self.backbone(images)))
        return logits


def pooled(output: Any) -> Tensor:
    """Return the features ``[B, C]`` of a backbone's output.

    Raises:
        TypeError: If there is no tensor of rank 2, 3 or 4.
    """
    for name in ("pooler_output", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            output = getattr(output, name)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not (isinstance(output, Tensor) and output.ndim in (2, 3, 4)):
        raise TypeError(f"a backbone must yield vectors, maps or tokens, got {type(output).__name__}.")
    return output if output.ndim == 2 else output.mean(1) if output.ndim == 3 else output.mean((2, 3))


def with_classes(model: Any, classes: int, outputs: int | None, example: Tensor) -> nn.Module:
    """Return a model with a new, untrained classifier, or the model itself where it has as many classes already.

    Args:
        model: Of any library, with a classifier or without; it is changed.
        classes: Wanted.
        outputs: That its classifier has, ``None`` for a backbone without one.
        example: Images ``[B, C, H, W]`` that it takes.

    Raises:
        ValueError: If its classifier is neither a linear layer nor a convolution.
    """
    if outputs == classes:
        return model
    if hasattr(model, "reset_classifier"):  # timm's
        model.reset_classifier(classes)
        _note_classes(model, classes)
        return model
    if outputs is None:
        return _with_head(model, classes, example)
    layers = [(name, m) for name, m in model.named_modules() if _outputs(m) == outputs]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer of its {outputs} classes that could be replaced.")
    name, old = layers[-1]
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, _like(old, classes))
    _note_classes(model, classes)
    return model


def _outputs(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, nn.Conv2d) else None


def _like(layer: nn.Module, outputs: int) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, outputs, layer.bias is not None)
    assert isinstance(layer, nn.Conv2d)
    sizes: Any = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
    return nn.Conv2d(layer.in_channels, outputs, **sizes, bias=layer.bias is not None)


def _with_head(model: Any, classes: int, example: Tensor) -> nn.Module:
    if hasattr(getattr(model, "config", None), "model_type"):
        from transformers import AutoModelForImageClassification

        config = type(model.config).from_dict({**model.config.to_dict(), "architectures": None})
        config.num_labels = classes
        headed: Any = AutoModelForImageClassification.from_config(config)
        setattr(headed, headed.base_model_prefix, model)
        wrapped: nn.Module = headed
        return wrapped
    with torch.no_grad():
        features = pooled(model(example)).shape[1]
    return WithHead(model, features, classes)


def _note_classes(model: Any, classes: int) -> None:
    """Keep what a model says of itself true."""
    if hasattr(getattr(model, "config", None), "num_labels"):
        model.config.num_labels = model.num_labels = classes
    built = getattr(model, BUILT_FROM, None)
    if built is not None:
        setattr(model, BUILT_FROM, {**built, "options": {**built["options"], "num_classes": classes}})
    settings = getattr(model, "input_settings", None)
    if settings:
        model.input_settings = {**settings, "categories": None}
