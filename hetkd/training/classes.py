"""Whose classes: training data, teachers and student agree on their order, by name where names are known."""

import math
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from hetkd.data.classes import match
from hetkd.data.images import TransformedImages
from hetkd.data.seeding import generators_kept
from hetkd.distillation import Distillation
from hetkd.features.tap import Tap
from hetkd.models.labels import Labels, model_labels

_MEASURED, _BATCH, _SECONDS = 256, 32, 5.0


def name_classes(distillation: Distillation, dataset: Any) -> list[str]:
    """Put the labels of training data into the teacher's order, and remember the names of the classes.

    Args:
        distillation: Keeps the names as ``class_names``.
        dataset: Training data.

    Returns:
        What to tell the user.

    Raises:
        ValueError: If data and teacher have other classes, but the method compares logits; or there is one class only.
    """
    if not isinstance(dataset, TransformedImages) or dataset.class_names is None:
        return []
    names, notes = dataset.class_names, list(dataset.notes)
    if distillation.method.ce_weight and len(names) == 1:
        raise ValueError(
            f"train has the single class {names[0]!r}, which leaves nothing to learn: give the folder above it, or use "
            "ce_weight=0 to learn without labels."
        )
    distillation.class_names = list(names)
    for tap in distillation.teachers.taps if distillation.method.uses_teacher_logits else []:
        labels = model_labels(tap.model, tap.classes)
        order = None if labels is None else _order(names, labels, tap)
        if labels is not None and order is not None:
            of_teacher = _names_of(labels, names, order)
            if order != list(range(len(order))):
                notes.append(
                    f"labels of train follow the {tap.role}'s classes by name: {names[0]!r} is {order[0]}, ..."
                )
                dataset.order_classes(of_teacher, f"the {tap.role}", "train")
            distillation.class_names = of_teacher
            break
    return notes


def _order(names: list[str], labels: Labels, tap: Tap) -> list[int] | None:
    found = match(names, labels.names)
    numbers = [number for number in found if number is not None]
    if len(numbers) == len(names) == len(set(numbers)):
        return numbers
    if labels.certain and (not numbers or len(numbers) < len(names)) and len(names) == len(labels.names):
        strange = [name for name, number in zip(names, found, strict=True) if number is None]
        theirs = [synonyms[0] for synonyms in labels.names[:5]]
        raise ValueError(
            f"train has classes that the {tap.role} does not know ({', '.join(strange[:5])}), which knows "
            f"{', '.join(theirs)}, ...: its logits say nothing of them. Use kd_weight=0 with a feature method, or a "
            "teacher of these classes."
        )
    return None


def _names_of(labels: Labels, names: list[str], order: list[int]) -> list[str]:
    """Return the names of all classes of a teacher, those of the data as the data have them."""
    all_names = [synonyms[0] for synonyms in labels.names]
    for name, number in zip(names, order, strict=True):
        all_names[number] = name
    return all_names


def teachers_accuracy(distillation: Distillation, dataset: Any) -> list[str]:
    """Measure the teachers on some labelled training images; return what to tell the user.

    Warns:
        RuntimeWarning: If a teacher is no better than chance.
    """
    is_labelled = isinstance(dataset, TransformedImages) or getattr(dataset, "labels", None) is not None
    taps = [tap for tap in distillation.teachers.live if tap.placement == "device" and tap.classes]
    if not (is_labelled and distillation.method.uses_teacher_logits and taps):
        return []
    notes, indices = [], range(0, len(dataset), math.ceil(len(dataset) / _MEASURED))
    with generators_kept():
        samples = [dataset[index] for index in indices]
    if not all(isinstance(sample, tuple) and _is_class(sample[1]) for sample in samples):
        return []
    labels = torch.tensor([int(sample[1]) for sample in samples])
    for tap in taps:
        right, seen, start = 0, 0, time.perf_counter()
        for part in torch.arange(len(samples)).split(_BATCH):
            images = torch.stack([samples[int(index)][0] for index in part]).to(tap.device)
            with torch.no_grad():
                logits = tap.run(images).logits
            assert logits is not None, "it has classes"
            right, seen = right + int((logits.argmax(1).cpu() == labels[part]).sum()), seen + len(part)
            if time.perf_counter() - start > _SECONDS:
                break
        notes.append(f"the {tap.role} is right on {100 * right / seen:.1f} % of {seen} training images")
        if _is_chance(right, seen, tap.classes or 1):
            warnings.warn(
                f"{notes[-1]}, which is chance for {tap.classes} classes: are the classes in the teacher's order, the "
                "images normalised once, the weights its own?",
                RuntimeWarning,
                stacklevel=2,
            )
    return notes


def _is_class(label: Any) -> bool:
    return isinstance(label, int) or (isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point())


def _is_chance(right: int, seen: int, classes: int) -> bool:
    """Say whether guessing among the classes gets as many right in more than one of a hundred trials."""
    chance = 1 / classes
    below = sum(math.comb(seen, k) * chance**k * (1 - chance) ** (seen - k) for k in range(right))
    return 1 - below > 0.01
