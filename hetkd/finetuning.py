"""Fine-tunes a teacher on one's own classes: the classifier first, then all layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hetkd.data.images import TensorImages, TransformedImages, length, make_dataset, make_loader
from hetkd.data.labels import known_labels
from hetkd.data.samples import Keys, images_and_labels
from hetkd.distillation import Distillation
from hetkd.distiller import Distiller
from hetkd.features.hooks import is_from_library
from hetkd.features.tap import Size, Tap, as_size
from hetkd.models.heads import last_linear, with_classes
from hetkd.models.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSpec
from hetkd.models.load import is_file, load_model
from hetkd.models.weights import load_weights
from hetkd.models.wrappers import architecture_name
from hetkd.utils.checks import whole_number

if TYPE_CHECKING:
    from hetkd.training.option_types import FitOptions

_LARGEST = 224
_STEPS, _EPOCHS = 300, 5
_DEFAULTS: dict[str, Any] = {
    "batch_size": 32,
    "layer_decay": 0.75,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "min_crop": 0.35,
}
_DECAYS, _AS_GOOD = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), 0.01


@dataclass(frozen=True)
class Finetuned:
    """A model that was fine-tuned.

    Attributes:
        model: With the weights of the best epoch, in eval mode.
        path: The file that holds it.
        top1: On the validation images in percent; ``None`` without them.
        history: One record an epoch, as of `hetkd.Distiller.fit`.
    """

    model: nn.Module
    path: Path
    top1: float | None
    history: list[dict[str, float]]

    def __str__(self) -> str:
        """Say how good it is, and how to load it."""
        top1 = "" if self.top1 is None else f"top-1 {self.top1:.2f} % on the validation images\n"
        return (
            f"{top1}as a teacher:  Distiller({str(self.path)!r}, STUDENT)\n"
            f"as a model:    hetkd.load_model({str(self.path)!r})\n"
            f"on pictures:   hetkd.load_student({str(self.path)!r}).predict('photo.jpg')"
        )


def finetune(
    model: str | nn.Module,
    train: Any,
    val: Any = None,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    input_size: Size | None = None,
    epochs: int | None = None,
    output_dir: str | Path = "runs/teachers",
    resume: bool = False,
    **options: Unpack[FitOptions],
) -> Finetuned:
    """Fine-tune a model on one's own classes, and save it so that its path alone loads it.

    First a new classifier is fitted to the features of the model as it is (one pass over the images), then all layers
    are trained, early ones at lower rates. Crops and evaluation are those of `hetkd.Distiller.fit`.

    Args:
        model: ``"timm:NAME"``, ``"hf:ORG/NAME"``, ``"torchvision:NAME"`` with pretrained weights, a file that hetkd
            saved, or any ``nn.Module``, with a classifier of any number of classes or without one.
        train: As for `hetkd.Distiller.fit`.
        val: The same; the best epoch on it is kept, and three without a better one end the training.
        num_classes: ``None``: as the labels of ``train`` say.
        weights: A file with weights of a model given by name, instead of its library's.
        input_size: Pixels, a number or ``(height, width)``; ``None``: what the model was made for, but at most 224.
        epochs: Passes over the images; ``None``: at least 5, and as many as make 300 steps; 0: the classifier alone.
        output_dir: Folder for the run; the model is ``OUTPUT_DIR/NAME.safetensors``.
        resume: Go on with the run there.
        **options: As of `hetkd.Distiller.fit`, with defaults for fine-tuning: 32 images a step, ``layer_decay=0.75``,
            ``label_smoothing=0.1``, ``min_crop=0.35``, and a learning rate by the number of steps.

    Returns:
        The model and where it is; what is printed at the end.

    Raises:
        ValueError: If arguments are not valid, or the classes of ``train`` are unknown.
        FileExistsError: If ``output_dir`` holds another run of this model.

    Example:
        >>> finetune("timm:vit_small_patch14_dinov2", "photos/train", "photos/val")  # doctest: +SKIP
    """
    keys = Keys(options.get("image_key"), options.get("label_key"))
    distiller = _distiller(model, num_classes or _classes_of(train, keys), weights, input_size)
    teacher, chosen = distiller.student, {**_DEFAULTS, **options}
    path = Path(output_dir).expanduser() / f"{_file_name(teacher)}.safetensors"
    steps = _steps_an_epoch(train, keys, chosen["batch_size"])
    epochs = _epochs(epochs, steps)
    top1 = None if resume and path.with_suffix("").exists() else _fit_head(distiller, train, val, keys, chosen)
    history: list[dict[str, float]] = []
    if epochs:
        chosen = {**_schedule(epochs, steps), **({} if val is None else {"patience": 3}), **chosen}
        history, top1 = _fit_all(distiller, train, val, top1, path, epochs=epochs, resume=resume, **chosen)
    distiller.trained = {"finetuned": architecture_name(teacher), "epochs": len(history), "top1": top1}
    distiller.save_student(path)
    found = Finetuned(teacher.eval(), path, top1, history)
    print(found)
    return found


def _fit_all(
    distiller: Distiller, train: Any, val: Any, top1: float | None, path: Path, **options: Any
) -> tuple[list[dict[str, float]], float | None]:
    """Train all layers, and keep the best epoch, or what was there before where none is better."""
    teacher, folder = distiller.student, path.with_suffix("")
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    result = distiller.fit(train, val, output_dir=folder, **options)
    if top1 is not None and result.best["top1"] < top1:
        teacher.load_state_dict(before)
        return result.history, top1
    load_weights(teacher, folder / "best.safetensors")
    return result.history, result.best.get("top1")


def _fit_head(distiller: Distiller, train: Any, val: Any, keys: Keys, options: dict[str, Any]) -> float | None:
    """Fit a new classifier, and return its top-1 on the validation images."""
    loading: dict[str, Any] = {"batch_size": options["batch_size"], "num_workers": options.get("num_workers", 0)}
    fit_classifier(distiller, train, keys, **loading)
    if val is None:
        return None
    top1 = distiller.evaluate(val, image_key=keys.image, label_key=keys.label, **loading)["top1"]
    print(f"the new classifier alone: top-1 {top1:.2f} % on the validation images")
    return top1


def _distiller(model: str | nn.Module, classes: int, weights: str | Path | None, input_size: Size | None) -> Distiller:
    """Return a distiller whose student is the model, with so many classes."""
    built = _built(model, classes, weights, input_size)
    tap = Tap("student", built, input_size, None)
    outputs = tap.classes if tap.classes is None or _has_classifier(built) else None
    example = tap.prepare(torch.rand(2, tap.spec.channels, *tap.size))
    teacher = with_classes(built, classes, outputs, example)
    return Distiller(None, teacher.requires_grad_(True), "ce", input_size=tap.size)


def _schedule(epochs: int, steps: int | None) -> dict[str, Any]:
    """Return the learning rate and warm-up for so many steps: few steps need a higher rate."""
    total = epochs * (steps or _STEPS)
    return {"lr": min(1e-3, 5e-4 * math.sqrt(_STEPS / total)), "warmup_epochs": min(1.0, epochs / 5)}


def _file_name(model: nn.Module) -> str:
    return re.sub(r"[^-.\w]", "_", architecture_name(model)).lower()


def fit_classifier(distiller: Distillation, train: Any, keys: Keys, *, batch_size: int, num_workers: int) -> None:
    """Fit the last linear layer of the student to its inputs, by logistic regression; other layers stay as they are.

    A tenth of the images chooses the weight decay. Where the student does not end in a linear layer, nothing is done.

    Args:
        distiller: Its student has as many classes as the data.
        train: Images with labels.
        keys: Where both are in samples that are dicts.
        batch_size: Images a forward.
        num_workers: Loading processes.
    """
    student, classes = distiller.student, distiller.classes
    layer = last_linear(student, classes or 0)
    if layer is None:
        return
    loader = _plain_loader(distiller, train, keys, batch_size, num_workers)
    x, y = _inputs_of(layer, distiller, loader)
    held_out = torch.arange(len(y)) % 10 == 0
    known, asked = ~held_out, held_out
    scores = [
        (_right(logistic_regression(x[known], y[known], classes or 0, decay), x[asked], y[asked]), decay)
        for decay in _DECAYS
    ]
    best = max(score for score, _ in scores)
    decay = max(decay for score, decay in scores if score >= best - _AS_GOOD)  # small weights leave room to learn
    weight, bias = logistic_regression(x, y, classes or 0, decay)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)


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


def _plain_loader(distiller: Distillation, train: Any, keys: Keys, batch_size: int, num_workers: int) -> Iterable[Any]:
    """Return a loader of the images as they are evaluated, with their labels."""
    inputs = distiller.student_inputs
    return make_loader(
        train,
        what="train",
        spec=inputs.spec,
        size=inputs.size,
        batch_size=batch_size,
        train=False,
        num_workers=num_workers,
        keys=keys,
    )


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


def _built(model: str | nn.Module, classes: int, weights: str | Path | None, size: Size | None) -> nn.Module:
    if isinstance(model, nn.Module):
        if weights is not None:
            raise ValueError("weights=... is for a model given by name; load them into the module.")
        return model
    if not isinstance(model, str):
        raise TypeError(f"model must be a name or an nn.Module, got {model!r}.")
    options: dict[str, Any] = {} if is_file(model) else {"weights": weights}
    options["num_classes"] = None if model.startswith("torchvision:") else classes
    pixels = _pixels(model) if size is None else as_size(size)[0]
    return load_model(model, **options) if pixels is None else _sized(model, pixels, options)


def _pixels(name: str) -> int | None:
    """Return the largest usual size for a timm model that was made for a larger one; ``None`` for any other model."""
    library, _, architecture = name.rpartition(":")
    if library not in ("", "timm") or is_file(name):
        return None
    import timm

    config = timm.get_pretrained_cfg(architecture)
    return _LARGEST if config is not None and min(config.input_size[1:]) > _LARGEST else None


def _sized(model: str, pixels: int, options: dict[str, Any]) -> nn.Module:
    """Build a model for images of this size; those without tokens take any."""
    try:
        return load_model(model, img_size=pixels, **options)
    except TypeError:
        return load_model(model, **options)


def _has_classifier(model: nn.Module) -> bool:
    """Say whether a module of no library ends in a classifier, and not in features."""
    if is_from_library(model):
        return True
    tap = Tap("teacher", model.eval(), None, None)
    return tap.classes is not None


def _steps_an_epoch(train: Any, keys: Keys, batch_size: int) -> int | None:
    if isinstance(train, DataLoader):
        return length(train)
    spec = InputSpec(3, (32, 32), IMAGENET_MEAN, IMAGENET_STD)
    images = length(make_dataset(train, what="train", spec=spec, size=spec.size, train=False, keys=keys))
    return None if images is None else max(1, images // batch_size)


def _classes_of(train: Any, keys: Keys) -> int:
    spec = InputSpec(3, (32, 32), IMAGENET_MEAN, IMAGENET_STD)
    dataset = make_dataset(train, what="train", spec=spec, size=spec.size, train=False, keys=keys)
    if isinstance(dataset, TransformedImages) and dataset.class_names:
        return len(dataset.class_names)
    labels = known_labels(dataset) if isinstance(dataset, (TransformedImages, TensorImages)) else None
    if labels is None:
        raise ValueError("the classes of train are unknown before it is iterated: say num_classes=...")
    return int(labels.max()) + 1


def _epochs(epochs: int | None, steps: int | None) -> int:
    if epochs is None:
        return _EPOCHS if steps is None else max(_EPOCHS, math.ceil(_STEPS / steps))
    return epochs if epochs == 0 else whole_number("epochs", epochs)
