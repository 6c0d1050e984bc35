"""Evaluation of a student: every image counts once, in however many processes."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hetkd.data.classes import class_names, match
from hetkd.data.images import TensorImages, TransformedImages, has_labels, length, make_loader
from hetkd.data.samples import Keys, images_and_labels
from hetkd.data.seeding import generators_kept
from hetkd.data.survey import spread
from hetkd.data.survey import unreadable as unreadable_among
from hetkd.distillation import Distillation
from hetkd.features.hooks import eval_mode
from hetkd.models.inputs import check_images
from hetkd.training.agreement import MOST_IMAGES, NOTHING_TO_AGREE_WITH, measure_agreement
from hetkd.training.classes import names_of_model, refuse_differing_parts
from hetkd.training.signals import quietly
from hetkd.utils.checks import choice

_LOOKED_AT, _FAR_BRIGHTER = 64, 16.0
WITHOUT_LABELS = "val has images without labels, which say nothing of accuracy: leave val out."


def evaluate(
    distillation: Distillation, data: Any, *, role: str, batch_size: int, num_workers: int, keys: Keys, unreadable: str
) -> dict[str, float]:
    """Evaluate the student or a teacher of a distiller on the device where it is; see `hetkd.Distiller.evaluate`."""
    alone, notes = in_role(distillation, role), list[str]()
    loader = eval_loader(alone, data, batch_size, num_workers, keys, notes)
    if choice("unreadable", unreadable, ["error", "skip"]) == "skip":
        leave_unreadable_out(loader, notes)
    for note in notes if unreadable == "skip" else []:
        print(note)
    device = next(alone.student.parameters()).device
    return measure_as_taught(alone, alone.student, loader, device)


def measure_as_taught(
    distillation: Distillation, model: nn.Module, loader: Iterable[Any], device: torch.device, accelerator: Any = None
) -> dict[str, float]:
    """Measure accuracy, or agreement where labels do not teach; see `measure` and `measure_agreement`."""
    by = measure if is_measured_by_accuracy(distillation, loader) else measure_agreement
    return by(distillation, model, loader, device, accelerator)


def is_measured_by_accuracy(distillation: Distillation, loader: Iterable[Any]) -> bool:
    """Say whether a student is measured by its accuracy: it has a classifier that learns, and there are labels.

    Raises:
        ValueError: If labels teach it, but these data have none.
    """
    if not distillation.method.uses_student_logits:
        return False
    if _has_labels(loader):
        return True
    if distillation.method.ce_weight:
        raise ValueError(WITHOUT_LABELS)
    return False


def _has_labels(loader: Any) -> bool:
    known = has_labels(loader)
    if known is not None:
        return known
    if not can_be_looked_at(loader):
        return True  # which is seen when it is measured
    with generators_kept():
        try:
            batch = loader.collate_fn([loader.dataset[0]])
            labelled: bool = images_and_labels(batch)[1] is not None
        except Exception:  # of the user's own data, which fail where they are measured
            return True
    return labelled


def can_be_looked_at(loader: Any) -> bool:
    """Say whether single samples of a loader can be had without using it up: it is no stream."""
    dataset = getattr(loader, "dataset", None)
    is_stream = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    return isinstance(loader, DataLoader) and not is_stream and bool(length(dataset))


def in_role(distillation: Distillation, role: str) -> Distillation:
    """Return the distillation itself for ``"student"``; for a teacher one whose student is that teacher.

    Raises:
        ValueError: If there is no such teacher, its weights are not here, or it yields no logits.
    """
    if role == "student":
        return distillation
    taps = {tap.role: tap for tap in distillation.teachers.live}
    tap = taps[choice("role", role, ["student", *taps])]
    if tap.classes is None:
        raise ValueError(f"the {role} has no classifier, so it has no accuracy.")
    if tap.yields_probabilities:
        raise ValueError(
            f"the {role} yields probabilities, and is measured by logits: leave its softmax or sigmoid out, or undo "
            "it: model(images).log() after a softmax, .logit() after a sigmoid."
        )
    alone = Distillation(
        None, tap.model, "ce", input_size=tap.size, normalized=distillation.normalization, task=distillation.task
    )
    if distillation.method.uses_teacher_logits:  # else its classes may have another order
        alone.class_names = distillation.class_names
    return alone


def eval_loader(
    distillation: Distillation,
    data: Any,
    batch_size: int,
    num_workers: int,
    keys: Keys,
    notes: list[str],
) -> Iterable[Any]:
    """Make a loader in the order of the data, with every image; labels follow the classes of the training data.

    Args:
        distillation: Knows the names of the classes after training.
        data: As ``val`` of `hetkd.Distiller.fit`.
        batch_size: Images a batch.
        num_workers: Loading processes.
        keys: Where images and labels are in samples that are dicts.
        notes: Gets what to tell the user.

    Raises:
        ValueError: If labels teach the student, but the data have none, or other classes.
    """
    loader = _plain_loader(distillation, data, distillation.student_inputs.size, batch_size, num_workers, keys)
    by_accuracy = is_measured_by_accuracy(distillation, loader)
    if not by_accuracy:  # teachers see these images too
        loader = _plain_loader(distillation, data, distillation.loading_size, batch_size, num_workers, keys)
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, TransformedImages):
        notes += dataset.notes
    if by_accuracy:
        refuse_differing_parts(loader, "val")
        notes += _follow_names(distillation, loader)
    else:
        _prepare_for_agreement(distillation, loader)
    return loader


def refuse_nameless(distillation: Distillation, trained: Any, loader: Iterable[Any]) -> None:
    """Refuse validation data without names where labels of the training data follow names.

    Raises:
        ValueError: If so.
    """
    if getattr(trained, "label_map", None) is None or not is_measured_by_accuracy(distillation, loader):
        return
    dataset = getattr(loader, "dataset", None)
    names = dataset.class_names if isinstance(dataset, TransformedImages) else class_names(dataset)
    if names is None:
        raise ValueError(
            "labels of train follow the models' classes by name, but val has labels without names, which would count "
            "as other classes: give val as class folders, or as a data set with the attribute classes."
        )


def _follow_names(distillation: Distillation, loader: Any) -> list[str]:
    """Give labels of validation data the numbers of the student's classes, by name; return what to tell the user.

    Raises:
        ValueError: If a class is none of the student's, or a loader numbers them otherwise.
    """
    dataset = getattr(loader, "dataset", None)
    own = dataset.class_names if isinstance(dataset, TransformedImages) else class_names(loader)
    names = distillation.class_names
    if names is None and own is not None:
        names = names_of_model(own, distillation.student_tap, strict=False)
    if isinstance(dataset, TransformedImages):
        missing = [] if names is None else dataset.order_classes(names, "train", "val")
        return [f"val has no images of {len(missing)} classes: {', '.join(missing[:10])}"] if missing else []
    if names is None or own is None:
        return []
    numbers = match(own, [(name,) for name in names])
    if None not in numbers and numbers != list(range(len(own))):
        index = next(index for index, number in enumerate(numbers) if number != index)
        raise ValueError(
            f"val is a loader, whose labels stay as they are: {own[index]!r} is {index} there, but {numbers[index]} of "
            "the student. Give its data set (loader.dataset), whose labels follow the names, or number the labels "
            "yourself, in a collate_fn."
        )
    return []


def _plain_loader(
    distillation: Distillation, data: Any, size: tuple[int, int], batch_size: int, num_workers: int, keys: Keys
) -> Iterable[Any]:
    loading: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "keys": keys}
    loading |= {"spec": distillation.student_inputs.spec, "make": distillation.task.make_dataset}
    return make_loader(data, what="val", size=size, train=False, **loading)


def _prepare_for_agreement(distillation: Distillation, loader: Any) -> None:
    """Leave as many images as are looked at, evenly spread.

    Raises:
        ValueError: If there is neither a teacher to agree with nor a label.
    """
    if not (distillation.teachers.live or _has_labels(loader)):
        raise ValueError(NOTHING_TO_AGREE_WITH)
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, TransformedImages) and len(dataset) > MOST_IMAGES:
        dataset.keep(spread(len(dataset), MOST_IMAGES))
    elif isinstance(dataset, TensorImages) and len(dataset) > MOST_IMAGES:
        chosen = spread(len(dataset), MOST_IMAGES)
        dataset.images, labels = dataset.images[chosen], dataset.labels
        dataset.labels = None if labels is None else labels[chosen]


def leave_unreadable_out(loader: Iterable[Any], notes: list[str]) -> None:
    """Read all images of a split once, and leave out those that cannot be read.

    Args:
        loader: One that `eval_loader` made; others are left as they are.
        notes: Gets what to tell the user.

    Raises:
        ValueError: If no image can be read.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, TransformedImages):
        return
    bad = unreadable_among(dataset, range(len(dataset)))
    if len(bad) == len(dataset):
        raise ValueError("val has no image that can be read.")
    if bad:
        some = ", ".join(dataset.name_of(index) for index in bad[:5]) + (", ..." if len(bad) > 5 else "")
        notes.append(f"{len(bad)} images of val cannot be read and are left out: {some}")
        dataset.leave_out(bad)


def measure(
    distillation: Distillation, model: nn.Module, loader: Iterable[Any], device: torch.device, accelerator: Any = None
) -> dict[str, float]:
    """Measure accuracy and cross-entropy of ``model``, a module of the student's architecture.

    Args:
        distillation: Prepares images for the student.
        model: The student, or the average of its weights.
        loader: Yields batches of images and labels.
        device: Where to compute.
        accelerator: Gathers the results of all processes, if given. A ``DataLoader`` was shared out by it, and samples
            that even batches repeat count once; any other loader is a process's own share.

    Returns:
        ``{"top1", "top5", "loss"}`` of a classifier, ``{"miou", "pixel_accuracy", "loss", "iou/CLASS", ...}`` of a
        segmenter, all but the loss in percent.

    Raises:
        ValueError: If the loader is empty.
    """
    classes, task = distillation.classes, distillation.task
    assert classes is not None, "the method trains a classifier"
    shared_out = isinstance(loader, DataLoader)
    own_share = accelerator is not None and not shared_out
    names = list(distillation.class_names or [])
    names += [str(number) for number in range(len(names), classes)]
    metrics = task.metrics(names, device, sync=own_share)
    autocast = nullcontext() if accelerator is None else accelerator.autocast()
    seen = 0
    with eval_mode(model), torch.inference_mode(), autocast:
        for batch in quietly(loader):
            images, labels = _checked(distillation, batch, first=seen == 0)
            logits = distillation.predict_checked(images.to(device, non_blocking=True), model).float()
            statistics = task.statistics(logits, labels)
            if accelerator is not None and shared_out:
                statistics = accelerator.gather_for_metrics(statistics)
            seen += len(statistics[0])
            metrics.update(*statistics)
    if seen == 0:
        raise ValueError("val is empty: its loader yields no batch.")
    return metrics.compute()


def look_at_images(distillation: Distillation, loader: Iterable[Any], what: str) -> None:
    """Load and check the first batch of a loader, and images spread over all of its own data set.

    Raises:
        TypeError: If images or labels have a wrong type.
        ValueError: If images or labels are not valid.
        OSError: If an image cannot be read.
    """
    dataset: Any = getattr(loader, "dataset", None)
    batches: Any = getattr(loader, "batch_sampler", None)
    if not isinstance(loader, DataLoader) or batches is None or not can_be_looked_at(loader):
        return
    with generators_kept():
        first = next(iter(batches), None)
        if first is None:
            raise ValueError(f"{what} is empty: its loader yields no batch.")
        fetched = dataset.__getitems__(first) if hasattr(dataset, "__getitems__") else [dataset[i] for i in first]
        by_accuracy = what == "val" and is_measured_by_accuracy(distillation, loader)
        check = _checked if by_accuracy else _checked_for_training
        check(distillation, loader.collate_fn(fetched), first=True)
        if isinstance(dataset, TensorImages):
            check(distillation, dataset[:], first=False)
        for index in spread(len(dataset), _LOOKED_AT) if isinstance(dataset, TransformedImages) else []:
            check(distillation, loader.collate_fn([dataset[index]]), first=False)


def _checked_for_training(distillation: Distillation, batch: Any, *, first: bool) -> None:
    images, labels = images_and_labels(batch)
    _check_images(distillation, images, look_at_values=first or _are_strange(images))
    if labels is not None and distillation.method.ce_weight:
        distillation.task.check_labels(labels, images, distillation.classes, True)


def _checked(distillation: Distillation, batch: Any, *, first: bool) -> tuple[Tensor, Any]:
    images, labels = images_and_labels(batch)
    if labels is None:
        raise ValueError(WITHOUT_LABELS)
    _check_images(distillation, images, look_at_values=first or _are_strange(images))
    return images, distillation.task.checked_for_evaluation(labels, images, distillation.classes)


def _are_strange(images: Any) -> bool:
    """Say whether images behind the first ones are NaN or Inf, or reach 255; on a GPU looking would wait for it."""
    if not (isinstance(images, Tensor) and images.is_cpu and images.is_floating_point()):
        return False
    return not bool(images.isfinite().all()) or bool(images.max() > _FAR_BRIGHTER)


def _check_images(distillation: Distillation, images: Any, *, look_at_values: bool) -> None:
    channels = distillation.student_inputs.spec.channels
    check_images(images, channels, look_at_values=look_at_values, normalized=distillation.normalized)
