"""Fine-tunes a teacher on one's own classes: the classifier first, then all layers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from hetkd.data.images import TensorImages, TransformedImages, length, make_dataset, make_loader
from hetkd.data.labels import known_labels
from hetkd.data.samples import Keys
from hetkd.data.survey import spread
from hetkd.distillation import Distillation
from hetkd.distiller import Distiller
from hetkd.features.hooks import is_from_library
from hetkd.features.tap import Size, Tap, as_size
from hetkd.models.description import read_description
from hetkd.models.heads import with_classes
from hetkd.models.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSpec
from hetkd.models.load import is_file, load_model
from hetkd.models.weights import load_weights, save_model
from hetkd.models.wrappers import architecture_name
from hetkd.training.classes import name_classes
from hetkd.training.classifier import fit_classifier
from hetkd.training.options import TrainingOptions
from hetkd.utils.checks import whole_number
from hetkd.utils.distributed import is_first_process
from hetkd.utils.files import output_folder

if TYPE_CHECKING:
    from hetkd.training.option_types import FitOptions

_LARGEST = 224
_STEPS, _EPOCHS, _PATIENT_STEPS, _MOST_FOR_HEAD = 300, 5, 60, 20_000
_DEFAULTS: dict[str, Any] = {
    "batch_size": 32,
    "layer_decay": 0.75,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "min_crop": 0.35,
}


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

    First a new classifier is fitted to the model's features (one pass over the images), then all layers are trained,
    early ones at lower rates. Crops and evaluation are those of `hetkd.Distiller.fit`.

    Args:
        model: ``"timm:NAME"``, ``"hf:ORG/NAME"``, ``"torchvision:NAME"`` with pretrained weights, a file of hetkd, or
            any ``nn.Module``, with a classifier of any number of classes or without one.
        train: As for `hetkd.Distiller.fit`.
        val: The same; the best epoch on it is kept, and three without a better one (or 60 steps) end the training.
        num_classes: ``None``: of the labels of ``train``.
        weights: A file with weights of a model given by name, instead of its library's.
        input_size: Pixels, a number or ``(height, width)``; ``None``: what the model was made for, at most 224.
        epochs: Passes over the images; ``None``: at least 5 that make 300 steps; 0: the classifier alone.
        output_dir: Folder for the run; the model is ``OUTPUT_DIR/NAME.safetensors``.
        resume: Go on with the run there.
        **options: As of `hetkd.Distiller.fit`, with defaults for fine-tuning: 32 images a step, ``layer_decay=0.75``,
            ``label_smoothing=0.1``, ``min_crop=0.35``, and a learning rate by the number of steps.

    Returns:
        The model and where it is; what is printed at the end.

    Raises:
        ValueError: If arguments are not valid, or the classes of ``train`` are unknown.
        FileExistsError: If ``output_dir`` holds this model already, unless it goes on.

    Example:
        >>> finetune("timm:vit_small_patch14_dinov2", "photos/train", "photos/val")  # doctest: +SKIP
    """
    keys = Keys(options.get("image_key"), options.get("label_key"))
    chosen = {**_DEFAULTS, **options}
    classes, steps = _facts(train, keys, chosen["batch_size"])
    distiller = _distiller(model, num_classes or classes, weights, input_size)
    path = output_folder(output_dir) / f"{_file_name(distiller.student)}.safetensors"
    epochs = _epochs(epochs, steps)
    chosen = {**_schedule(epochs, steps, path), **({} if val is None else {"patience": _patience(steps)}), **chosen}
    _check(path, chosen, resume=resume)
    if not chosen.get("cpu"):
        distiller.move_to_accelerator()
    head = path.with_suffix(".head.safetensors")
    if not resume:  # it may be of other data, of a call that came no further
        head.unlink(missing_ok=True)
    top1 = _head(distiller, train, val, head, keys, chosen)
    history: list[dict[str, float]] = []
    if epochs:
        history, top1 = _fit_all(distiller, train, val, top1, path, epochs=epochs, resume=resume, **chosen)
    return _finished(distiller, path, top1, history)


def _check(path: Path, options: dict[str, Any], *, resume: bool) -> None:
    TrainingOptions.from_mapping(options)
    if not resume and (path.exists() or path.with_suffix("").exists()):
        raise FileExistsError(f"{path} is there already: choose another output_dir, or go on with resume=True.")


def _finished(distiller: Distiller, path: Path, top1: float | None, history: list[dict[str, float]]) -> Finetuned:
    distiller.trained = {"finetuned": True, "epochs": len(history), "top1": top1}
    found = Finetuned(distiller.student.eval(), path, top1, history)
    if is_first_process():
        distiller.save_student(path)
        print(found)
    return found


def _head(distiller: Distiller, train: Any, val: Any, path: Path, keys: Keys, options: dict[str, Any]) -> float | None:
    """Fit a new classifier, or load it where that was done before; return its top-1 on the validation images."""
    loading: dict[str, Any] = {"num_workers": options.get("num_workers", 0), "keys": keys}
    loading["unreadable"] = options.get("unreadable", "error")
    images = _as_evaluated(distiller, train, options["batch_size"], **loading)
    for note in name_classes(distiller, images):
        print(note)
    if path.exists():
        load_weights(distiller.student, path)
        description = read_description(path)
        found: float | None = None if description is None else description.made.get("top1")
        return found
    fit_classifier(distiller, images)
    top1 = None
    if val is not None:
        asked = {"image_key": keys.image, "label_key": keys.label, "unreadable": loading["unreadable"]}
        top1 = distiller.evaluate(val, num_workers=loading["num_workers"], **asked)["top1"]
        print(f"the new classifier alone: top-1 {top1:.2f} % on the validation images")
    if is_first_process():
        distiller.trained = {"top1": top1}
        save_model(distiller.student, path, distiller.describe_student())
    return top1


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


def _distiller(
    model: str | nn.Module, classes: int | None, weights: str | Path | None, input_size: Size | None
) -> Distiller:
    """Return a distiller whose student is the model, with so many classes.

    Raises:
        ValueError: If their number is unknown.
    """
    if classes is None:
        raise ValueError("the classes of train are unknown before it is iterated: say num_classes=...")
    built = _built(model, classes, weights, input_size)
    tap = Tap("student", built, input_size, None)
    if tap.is_dense:
        raise ValueError(
            "finetune is for classifiers; a segmenter is trained alone: Distiller(None, model, 'ce').fit(train, val)."
        )
    outputs = tap.classes if tap.classes is None or _has_classifier(built) else None
    example = tap.prepare(torch.rand(2, tap.spec.channels, *tap.size))
    teacher = with_classes(built, classes, outputs, example)
    return Distiller(None, teacher.requires_grad_(True), "ce", input_size=tap.size)


def _schedule(epochs: int, steps: int | None, path: Path) -> dict[str, Any]:
    """Return learning rate and warm-up for so many steps (few need a higher rate), or those of a run that goes on."""
    settings = path.with_suffix("") / "settings.json"
    if settings.exists():
        before = json.loads(settings.read_text(encoding="utf-8"))
        return {name: before[name] for name in ("lr", "warmup_epochs")}
    total = max(1, epochs) * (steps or _STEPS)
    return {"lr": min(1e-3, 5e-4 * math.sqrt(_STEPS / total)), "warmup_epochs": min(1.0, epochs / 5)}


def _patience(steps: int | None) -> int:
    """Return after how many epochs without a better one to end: three, or more where an epoch has few steps."""
    return 3 if steps is None else max(3, math.ceil(_PATIENT_STEPS / steps))


def _file_name(model: nn.Module) -> str:
    return re.sub(r"[^-.\w]", "_", architecture_name(model)).lower()


def _as_evaluated(
    distiller: Distillation, train: Any, batch_size: int, *, num_workers: int, keys: Keys, unreadable: str
) -> Iterable[Any]:
    """Return a loader of training images as they are evaluated, of at most so many as a classifier needs."""
    inputs = distiller.student_inputs
    loading: dict[str, Any] = {"spec": inputs.spec, "size": inputs.size, "num_workers": num_workers, "keys": keys}
    skip = unreadable == "skip"
    loader = make_loader(train, what="train", batch_size=batch_size, train=False, skip_unreadable=skip, **loading)
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, TransformedImages) and len(dataset) > _MOST_FOR_HEAD:
        names = dataset.class_names
        dataset.keep(spread(len(dataset), _MOST_FOR_HEAD))
        dataset.class_names = names
    return loader


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


def _facts(train: Any, keys: Keys, batch_size: int) -> tuple[int | None, int | None]:
    """Return the number of classes and of steps an epoch, as far as they are known before the data are iterated."""
    spec = InputSpec(3, (32, 32), IMAGENET_MEAN, IMAGENET_STD)
    dataset = make_dataset(train, what="train", spec=spec, size=spec.size, train=False, keys=keys)
    if not isinstance(dataset, (TransformedImages, TensorImages)):
        return None, length(dataset)  # a loader's
    names, labels = getattr(dataset, "class_names", None), known_labels(dataset)
    known = len(names) if names else None if labels is None else int(labels.max()) + 1
    return known, max(1, len(dataset) // batch_size)


def _epochs(epochs: int | None, steps: int | None) -> int:
    if epochs is None:
        return _EPOCHS if steps is None else max(_EPOCHS, math.ceil(_STEPS / steps))
    return epochs if epochs == 0 else whole_number("epochs", epochs)
