"""Signs of progress that need no labels, or no classifier: agreement with the teachers, and nearest neighbours."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hetkd.data.samples import images_and_labels
from hetkd.distillation import Distillation
from hetkd.features.adapter import Features
from hetkd.features.hooks import eval_mode
from hetkd.features.tap import Tap
from hetkd.models.inputs import check_images
from hetkd.models.wrappers import tapped_module
from hetkd.training.signals import quietly

MOST_IMAGES = 4096
NOTHING_TO_AGREE_WITH = "val has neither labels nor a teacher to agree with (it is cached): give it labels."
_NEIGHBOURS, _TEMPERATURE = 20, 0.07
_CELLS = 8  # an axis, in which the classes of segmenters are compared


@torch.inference_mode()
def measure_agreement(
    distillation: Distillation, model: nn.Module, loader: Iterable[Any], device: torch.device, accelerator: Any = None
) -> dict[str, float]:
    """Measure a student that labels do not teach, on at most 4,096 images.

    Args:
        distillation: Has the teachers and prepares images.
        model: The student, or the average of its weights.
        loader: Yields batches of images, with labels or without.
        device: Where to compute.
        accelerator: Gathers the vectors of all processes from a ``DataLoader`` that it shared out, if given.

    Returns:
        ``"agreement"`` in percent, if a teacher is here: where logits are compared, the share of images of which both
        name the same class; elsewhere the linear CKA of the vectors before both classifiers (Kornblith et al.,
        arXiv 1905.00414), a mean over teachers. With labels also ``"knn"``: top-1 of nearest neighbours among the other
        images, by the student's vectors.

    Raises:
        ValueError: If there are no images, or neither labels nor a teacher.
    """
    sides = [distillation.student_tap, *distillation.teachers.live]
    shared = accelerator is not None and isinstance(loader, DataLoader)
    found: list[tuple[Tensor, ...]] = []
    with eval_mode(model), nullcontext() if accelerator is None else accelerator.autocast():
        for batch in quietly(loader):
            images, labels = images_and_labels(batch)
            channels, normalized = distillation.student_tap.spec.channels, distillation.normalized
            check_images(images, channels, look_at_values=not found, normalized=normalized)
            images = images.to(device, non_blocking=True)
            has_classes = labels is not None and not distillation.task.is_dense
            classes = torch.as_tensor(labels) if has_classes else torch.full((len(images),), -1)
            vectors = [_vector(tap, images, distillation, model) for tap in sides]
            row = (classes.to(device), *vectors)
            found.append(tuple(accelerator.gather_for_metrics(row)) if shared else row)
            if sum(len(each[0]) for each in found) >= MOST_IMAGES:
                break
    if not found:
        raise ValueError("val is empty: its loader yields no batch.")
    labels, student, *teachers = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return _metrics(labels, student, teachers, by_class=distillation.method.uses_teacher_logits)


def _metrics(labels: Tensor, student: Tensor, teachers: list[Tensor], *, by_class: bool) -> dict[str, float]:
    is_labelled = labels.ndim == 1 and bool((labels >= 0).all())
    if not (teachers or is_labelled):
        raise ValueError(NOTHING_TO_AGREE_WITH)
    values = [same_class(student, x) if by_class else linear_cka(student, x) for x in teachers]
    metrics = {"agreement": 100 * sum(values) / len(values)} if values else {}
    if is_labelled and not by_class:
        metrics["knn"] = 100 * neighbours_accuracy(student, labels)
    return metrics


def _vector(tap: Tap, images: Tensor, distillation: Distillation, model: nn.Module) -> Tensor:
    """Return the logits of a side where logits are compared, else the vector before its classifier, in float32."""
    own = tapped_module(model) if tap is distillation.student_tap else tap.model
    features: Features = tap.adapter.run(own, tap.prepare(images), ())
    if distillation.method.uses_teacher_logits:
        assert features.logits is not None, "the method compares logits"
        logits = features.logits.float()
        return logits if logits.ndim == 2 else F.adaptive_avg_pool2d(logits, _CELLS)
    vector = features.pooled if features.pooled is not None else features.logits
    if vector is None or vector.ndim > 2:  # a backbone that yields maps alone, or a segmenter
        vector = tap.adapter.run(own, tap.prepare(images), [tap.listed[-1].name]).maps[0].mean((2, 3))
    return vector.float()


def same_class(x: Tensor, y: Tensor) -> float:
    """Return the share of images, or of their cells, for which logits ``[N, classes, ...]`` name the same class."""
    return float((x.argmax(1) == y.argmax(1)).double().mean())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centred kernel alignment of features ``[N, C]`` and ``[N, D]``, from 0 to 1.

    Example:
        >>> x = torch.randn(50, 4)
        >>> round(linear_cka(x, 3 * x.flip(1) + 1), 6)
        1.0
    """
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    cross, own, other = (a.T @ b for a, b in ((x, y), (x, x), (y, y)))
    return float(cross.square().sum() / (own.norm() * other.norm()).clamp(min=1e-12))


def neighbours_accuracy(x: Tensor, labels: Tensor) -> float:
    """Return the accuracy of weighted nearest neighbours, each image judged by all others.

    Twenty neighbours by cosine similarity, weighted by exp(similarity / 0.07), as Wu et al. (arXiv 1805.01978) do.

    Args:
        x: Vectors ``[N, C]``.
        labels: Classes ``[N]``.
    """
    x = F.normalize(x - x.mean(0), dim=1)
    likeness = (x @ x.T).fill_diagonal_(-2)  # an image is no neighbour of its own
    values, nearest = likeness.topk(min(_NEIGHBOURS, max(1, len(x) - 1)))
    votes = torch.zeros(len(x), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], (values / _TEMPERATURE).exp())
    return float((votes.argmax(1) == labels).double().mean())
