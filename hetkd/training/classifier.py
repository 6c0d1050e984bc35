"""The best linear classifier on a model's features as they are."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.data.samples import images_and_labels
from hetkd.distillation import Distillation
from hetkd.features.hooks import find_classifier

_DECAYS, _AS_GOOD = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), 0.01


def fit_classifier(distiller: Distillation, images: Iterable[Any]) -> None:
    """Fit the last linear layer of the student to its inputs, by logistic regression; other layers stay as they are.

    A tenth of the images chooses the weight decay. Where the student does not end in a linear layer, nothing is done.

    Args:
        distiller: Its student has as many classes as the data.
        images: Batches of images and labels.
    """
    classes = distiller.classes or 0
    layer = find_classifier(distiller.student_tap.model)
    if not isinstance(layer, nn.Linear) or layer.out_features != classes:
        return
    x, y = _inputs_of(layer, distiller, images)
    asked = torch.arange(len(y)) % 10 == 0
    scores = [
        (_right(logistic_regression(x[~asked], y[~asked], classes, decay), x[asked], y[asked]), decay)
        for decay in _DECAYS
    ]
    best = max(score for score, _ in scores)
    decay = max(decay for score, decay in scores if score >= best - _AS_GOOD)  # small weights leave room to learn
    weight, bias = logistic_regression(x, y, classes, decay)
    with torch.no_grad():
        own = dict(layer.named_parameters())  # of a layer that simulates int8, `weight` is a rounded copy
        own["weight"].copy_(weight)
        if "bias" in own:
            own["bias"].copy_(bias)


def logistic_regression(x: Tensor, y: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Return weight ``[classes, C]`` and bias ``[classes]`` of a linear classifier with least cross-entropy.

    Args:
        x: Features ``[N, C]``, standardised on the way.
        y: Classes ``[N]``.
        classes: How many there are.
        decay: Weight of half the squared norm of the weights, in units of standardised features.
    """
    mean, std = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / std
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ weight.T + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    scaled = weight.detach() / std
    return scaled, bias.detach() - scaled @ mean


def _right(classifier: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    weight, bias = classifier
    return float(((x @ weight.T + bias).argmax(1) == y).double().mean())


@torch.no_grad()
def _inputs_of(layer: nn.Linear, distiller: Distillation, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return what a layer sees of all images, ``[N, C]``, and their classes."""
    seen: list[Tensor] = []
    classes: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].float().cpu()))
    try:
        for batch in loader:
            images, labels = images_and_labels(batch)
            distiller.predict(images.to(layer.weight.device))
            classes.append(torch.as_tensor(labels).cpu())
    finally:
        handle.remove()
    return torch.cat(seen).flatten(1), torch.cat(classes)
