"""A look at data and teachers before the first epoch: what is there, what does not fit, what the teachers know."""

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from hetkd.data.classes import match
from hetkd.data.images import TensorImages, TransformedImages
from hetkd.data.samples import images_and_labels
from hetkd.data.seeding import generators_kept
from hetkd.data.survey import Survey, spread, survey
from hetkd.distillation import Distillation
from hetkd.features.tap import Tap
from hetkd.training.evaluate import can_be_looked_at, in_role

_MEASURED, _BATCH, _SECONDS = 512, 32, 10.0
_ENLARGED, _FEW_IN_USE, _SEVERAL = 1.5, 4, 20
_BETTER_ORDER, _FEWEST = 20.0, 20  # points, images


def look_at_data(loaders: dict[str, Any]) -> list[Survey]:
    """Survey the splits that are data; of a loader of the user's own nothing is known before it is iterated.

    Args:
        loaders: By the name of their argument, as `hetkd.data.images.make_loader` made them.
    """
    datasets = {what: getattr(loader, "dataset", None) for what, loader in loaders.items()}
    return [
        survey(dataset, what)
        for what, dataset in datasets.items()
        if isinstance(dataset, (TransformedImages, TensorImages))
    ]


def take_classes(distillation: Distillation, surveys: Sequence[Survey]) -> None:
    """Give a student that was built from a name as many classes as the training data have, once."""
    train = next((each for each in surveys if each.what == "train"), None)
    if train is None or train.counts is None or not distillation.classes_from_data:
        return
    if len(train.counts) > 1:
        distillation.set_classes(len(train.counts))


def remarks(distillation: Distillation, surveys: Sequence[Survey]) -> list[str]:
    """Return what a person should know before training: models that see images enlarged.

    Warns:
        RuntimeWarning: If most outputs of the student are of classes without images.

    Raises:
        ValueError: If the data have more classes than the student.
    """
    train = next((each for each in surveys if each.what == "train"), None)
    if train is None:
        return []
    classes, used = distillation.classes, train.used
    there = 0 if train.counts is None or not distillation.method.ce_weight else len(train.counts)
    if classes is not None and there > classes:
        raise ValueError(f"train has {there} classes, but the student has {classes} classes: num_classes={there}.")
    is_by_name = distillation.class_names is not None and len(distillation.class_names) == classes
    counts = used is not None and distillation.method.ce_weight > 0 and not is_by_name
    if counts and classes is not None and used is not None and classes >= max(_SEVERAL, used * _FEW_IN_USE):
        warnings.warn(
            f"train has images of {used} of the student's {classes:,} classes: if it is meant for these alone, build "
            f"it so, num_classes={used} (with kd_weight=0 where the teacher has others).",
            RuntimeWarning,
            stacklevel=2,
        )
    return _enlarged(distillation, train)


def _enlarged(distillation: Distillation, train: Survey) -> list[str]:
    short = min(train.size)
    taps = [tap for tap in distillation.taps.values() if short and min(tap.size) / short >= _ENLARGED]
    listed = [f"{min(tap.size) / short:.1f} times for the {tap.role} ({tap.size[1]} x {tap.size[0]})" for tap in taps]
    cure = ", ".join(f"{tap.role!r}: ..." for tap in taps)
    return [f"images are enlarged {' and '.join(listed)}; input_size={{{cure}}} makes it cheaper"] if taps else []


def teachers_accuracy(distillation: Distillation, data: Any, what: str) -> tuple[list[str], dict[str, float]]:
    """Measure the teachers on some labelled images.

    Args:
        distillation: Its method compares logits; otherwise nothing is measured.
        data: A loader of the split, or the data themselves.
        what: Name of the argument.

    Returns:
        What to tell the user, and top-1 in percent by role.

    Warns:
        RuntimeWarning: If a teacher is no better than chance, or other numbers for its classes fit much better.

    Raises:
        ValueError: If it also has names for its classes, and none of the data's is among them.
    """
    notes, found = [], {}
    for tap in distillation.teachers.live:
        if not (tap.placement == "device" and tap.classes and distillation.method.uses_teacher_logits):
            continue
        answers = _answers(distillation, tap, data, what)
        if answers is None:
            continue
        predicted, labels = answers
        if not len(labels):
            continue
        right, seen = int((predicted == labels).sum()), len(labels)
        found[tap.role] = 100 * right / seen
        kind = {"train": "training", "val": "validation"}[what]
        notes.append(
            f"the {tap.role} is right on {found[tap.role]:.1f} % of {seen:,} {kind} {distillation.task.counted}"
        )
        problem = _problem(tap, predicted, labels)
        if problem:
            _refuse_strange_classes(distillation, tap, found[tap.role])
            warnings.warn(f"{notes[-1]}, {problem}", RuntimeWarning, stacklevel=2)
    return notes, found


def _refuse_strange_classes(distillation: Distillation, tap: Tap, top1: float) -> None:
    """Refuse a teacher that answers wrongly, and has a name for each of its classes but none of the data's."""
    names, labels = distillation.class_names, tap.labels
    if names is None or labels is None or all(name.isdigit() for name in names):
        return
    if not any(number is not None for number in match(names, labels.names)):
        raise ValueError(
            f"the {tap.role} is right on {top1:.1f} % of the images, and none of the data's classes "
            f"({', '.join(names[:3])}, ...) is among its {len(labels.names):,} ({labels.names[0][-1]}, ...): its "
            "logits say nothing of them. Fine-tune it, hetkd.finetune(...), or use its features alone, kd_weight=0."
        )


def _answers(distillation: Distillation, tap: Tap, data: Any, what: str) -> tuple[Tensor, Tensor] | None:
    """Return the classes that a teacher names and the labels of some images; ``None`` if there are no labels."""
    alone, start = in_role(distillation, tap.role), time.perf_counter()
    predicted, labels, images_seen = [], [], 0
    with generators_kept():
        for images, classes in _labelled(alone, data, what):
            with torch.no_grad():
                logits = alone.predict_checked(images.to(tap.device)).cpu()
            if logits.isnan().any():
                raise ValueError(
                    f"the {tap.role}'s logits are NaN: look at its weights, "
                    "all(p.isfinite().all() for p in teacher.parameters()), and load them again."
                )
            found, right = alone.task.predicted_and_true(logits, classes)
            predicted.append(found)
            labels.append(right)
            images_seen += len(images)
            if images_seen >= _MEASURED or time.perf_counter() - start > _SECONDS:
                break
    return (torch.cat(predicted), torch.cat(labels)) if labels else None


def _labelled(alone: Distillation, data: Any, what: str) -> Iterator[tuple[Tensor, Any]]:
    """Yield small batches of images with class indices, evenly spread over a split where it has an order."""
    dataset = getattr(data, "dataset", None)
    if isinstance(dataset, (TransformedImages, TensorImages)):
        data = _some(alone, dataset)
    elif what == "train" or not can_be_looked_at(data):
        return
    for batch in islice(data, _MEASURED):
        images, labels = images_and_labels(batch)
        if not (isinstance(images, Tensor) and alone.task.are_classes(labels)):
            return
        for start in range(0, len(images), _BATCH):
            yield images[start : start + _BATCH], labels[start : start + _BATCH]


def _some(alone: Distillation, dataset: TransformedImages | TensorImages) -> Iterable[Any]:
    order = torch.tensor(spread(len(dataset), _MEASURED))
    order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]  # time may be up early
    if isinstance(dataset, TensorImages):
        yield from (dataset[part.tolist()] for part in order.split(_BATCH))
        return
    whole = dataset.for_evaluation(alone.student_inputs.spec, alone.student_inputs.size)
    collate = getattr(whole, "collate", None)
    yield from DataLoader(Subset(whole, order.tolist()), batch_size=_BATCH, collate_fn=collate)


def _problem(tap: Tap, predicted: Tensor, labels: Tensor) -> str:
    """Return what is wrong with a teacher's answers, or an empty string."""
    seen, classes = len(labels), tap.classes or 1
    right = int((predicted == labels).sum())
    better = better_order(predicted, labels)
    if better is not None and better - 100 * right / seen >= _BETTER_ORDER:
        return (
            f"but would be on {better:.0f} % if its classes had other numbers: they are in another order than those of "
            "the data. Name the folders as the teacher names its classes (model.config.id2label), or reorder its head."
        )
    if _is_chance(right, seen, classes):
        return (
            f"which is chance for {classes} classes: are the classes in the teacher's order, the images normalised "
            "once, the weights its own?"
        )
    return ""


def better_order(predicted: Tensor, labels: Tensor) -> float | None:
    """Return the accuracy in percent that renamed classes would have; ``None`` where there are too few images.

    The number of each class is chosen on half of the images, and judged on the other half.

    Args:
        predicted: Classes ``[N]``.
        labels: Classes ``[N]``.

    Example:
        >>> labels = torch.arange(40) % 2
        >>> better_order(1 - labels, labels)
        100.0
    """
    used = labels.unique()
    if len(used) < 2 or len(labels) < max(_FEWEST, 3 * len(used)):
        return None
    half = torch.zeros(len(labels), dtype=torch.bool)
    for label in used:  # every second image of each class
        half[(labels == label).nonzero()[::2, 0]] = True
    table = torch.zeros(int(labels.max()) + 1, int(predicted.max()) + 1, dtype=torch.int64)
    table.index_put_((labels[half], predicted[half]), torch.ones(int(half.sum()), dtype=torch.int64), accumulate=True)
    renamed = table.argmax(1)
    if len(renamed[used].unique()) < len(used):  # two classes would get one number
        return None
    return 100 * (renamed[labels[~half]] == predicted[~half]).double().mean().item()


def _is_chance(right: int, seen: int, classes: int) -> bool:
    """Say whether guessing among the classes gets as many right in more than one of a hundred trials."""
    if classes < 2:
        return True
    chance, rest = 1 / classes, math.log1p(-1 / classes)
    below = sum(math.exp(_log_choose(seen, k) + k * math.log(chance) + (seen - k) * rest) for k in range(right))
    return 1 - below > 0.01


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
