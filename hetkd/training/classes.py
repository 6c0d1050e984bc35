"""Whose classes: training data, teachers and student agree on their order, by name where names are known."""

from typing import Any

from hetkd.data.classes import match
from hetkd.data.images import TransformedImages
from hetkd.distillation import Distillation
from hetkd.features.tap import Tap
from hetkd.models.labels import Labels, model_labels


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
    distillation.task.check_names(names, distillation.classes)
    distillation.class_names = list(names)
    for tap in distillation.teachers.taps if distillation.method.uses_teacher_logits else []:
        of_teacher = names_of_model(names, tap, strict=True)
        if of_teacher is not None:
            if of_teacher[: len(names)] != names:
                first = of_teacher.index(names[0])
                notes.append(f"labels of train follow the {tap.role}'s classes by name: {names[0]!r} is {first}, ...")
            dataset.order_classes(of_teacher, f"the {tap.role}", "train")
            distillation.class_names = of_teacher
            break
    return notes


def names_of_model(names: list[str], tap: Tap, *, strict: bool) -> list[str] | None:
    """Return the names of a model's classes in the order of its logits, those of the data as the data have them.

    Args:
        names: Of the classes of the data.
        tap: The model.
        strict: Refuse a model that certainly has other classes. Names that are numbers do not tell.

    Returns:
        ``None`` where the model does not know its classes, or not these.

    Raises:
        ValueError: If it is refused.
    """
    labels = model_labels(tap.model, tap.classes)
    strict = strict and not all(name.isdigit() for name in names)
    order = None if labels is None else _order(names, labels, tap, strict=strict)
    return None if labels is None or order is None else _names_of(labels, names, order)


def _order(names: list[str], labels: Labels, tap: Tap, *, strict: bool) -> list[int] | None:
    found = match(names, labels.names)
    numbers = [number for number in found if number is not None]
    if len(numbers) == len(names) == len(set(numbers)):
        return numbers
    if strict and labels.certain and (not numbers or len(names) == len(labels.names)):
        strange = [name for name, number in zip(names, found, strict=True) if number is None]
        theirs = [synonyms[0] for synonyms in labels.names[:5]]
        raise ValueError(
            f"train has classes that the {tap.role} does not know ({', '.join(strange[:5])}), which knows "
            f"{', '.join(theirs)}, ...: its logits say nothing of them. Use kd_weight=0 with a feature method, or a "
            "teacher of these classes: hetkd.finetune."
        )
    return None


def _names_of(labels: Labels, names: list[str], order: list[int]) -> list[str]:
    """Return the names of all classes of a teacher, those of the data as the data have them."""
    all_names = [synonyms[0] for synonyms in labels.names]
    for name, number in zip(names, order, strict=True):
        all_names[number] = name
    return all_names
