"""Whose classes: training data, teachers and student agree on their order, by name where names are known."""

from typing import Any

from hetkd.data.classes import class_names, differing_parts, match
from hetkd.data.images import TransformedImages
from hetkd.distillation import Distillation
from hetkd.features.tap import Tap
from hetkd.models.labels import Labels


def name_classes(distillation: Distillation, loader: Any) -> list[str]:
    """Put the labels of training data into the models' order, and remember the names of the classes.

    The order is the teacher's where its logits teach, else that of a student which knows these classes already.

    Args:
        distillation: Keeps the names as ``class_names``.
        loader: Of the training data; the labels of a loader of the user's own stay as they are.

    Returns:
        What to tell the user.

    Raises:
        ValueError: If data and teacher have other classes, but the method compares logits; if teachers, or a loader and
            a teacher, have these classes in another order; or if there is one class only.
    """
    dataset: Any = getattr(loader, "dataset", None)
    is_ours = isinstance(dataset, TransformedImages)
    names, notes = (dataset.class_names, list(dataset.notes)) if is_ours else (class_names(loader), [])
    if distillation.method.ce_weight:
        refuse_differing_parts(loader, "train")
    if names is None or not (is_ours or len(names) == distillation.classes):  # names of something else
        return notes
    if distillation.method.ce_weight and len(names) == 1:
        raise ValueError(
            f"train has the single class {names[0]!r}, which leaves nothing to learn: give the folder above it, or use "
            "ce_weight=0 to learn without labels."
        )
    distillation.task.check_names(names, distillation.classes)
    distillation.class_names = list(names)
    known = _names_of_models(distillation, names, strict=is_ours)
    if known is not None:
        role, of_model = known
        if of_model[: len(names)] != names:
            first = of_model.index(names[0])
            if not is_ours:
                raise ValueError(
                    f"train is a loader, whose labels stay as they are: {names[0]!r} is 0 there, but {first} of the "
                    f"{role}. Give its data set, fit(loader.dataset, ...), whose labels follow the names, or number "
                    "the labels yourself, in a collate_fn."
                )
            notes.append(f"labels of train follow the {role}'s classes by name: {names[0]!r} is {first}, ...")
        if is_ours:
            dataset.order_classes(of_model, f"the {role}", "train")
        distillation.class_names = of_model
    return notes


def refuse_differing_parts(loader: Any, what: str) -> None:
    """Refuse a sum of data sets that gives one number to different classes.

    Raises:
        ValueError: If so.
    """
    dataset = getattr(loader, "dataset", None)
    parts = differing_parts(dataset.dataset if isinstance(dataset, TransformedImages) else loader)
    if parts:
        raise ValueError(
            f"{what} is a sum of data sets that number other classes from 0 ({parts}): put the images into one folder "
            "of class folders, or give each part a target_transform to common numbers."
        )


def _names_of_models(distillation: Distillation, names: list[str], *, strict: bool) -> tuple[str, list[str]] | None:
    """Return the role of the model whose order of the classes counts, and the names of its classes.

    Raises:
        ValueError: If two teachers have them in different orders.
    """
    method = distillation.method
    if not method.uses_teacher_logits:
        tap = distillation.student_tap
        of_student = names_of_model(names, tap, strict=False) if method.uses_student_logits and tap.classes else None
        return None if of_student is None else (tap.role, of_student)
    found = {tap.role: of for tap in distillation.teachers.taps if (of := names_of_model(names, tap, strict=strict))}
    orders = {role: [of_teacher.index(name) for name in names] for role, of_teacher in found.items()}
    first = next(iter(found), None)
    for role, order in orders.items():
        if first is not None and order != orders[first]:
            raise ValueError(
                f"the {first} and the {role} have these classes in different orders ({names[0]!r} is "
                f"{orders[first][0]} and {order[0]}), but the method compares logits by number: reorder a head, or use "
                "kd_weight=0."
            )
    return None if first is None else (first, found[first])


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
    labels = tap.labels
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
