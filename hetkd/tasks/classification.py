"""Classification: one class an image."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hetkd.data.images import make_dataset
from hetkd.data.labels import known_labels
from hetkd.models.inputs import check_labels
from hetkd.tasks.task import ComparedLogits, Metrics, Task


class Classification(Task):
    """One class an image; labels are classes ``[B]`` or class probabilities ``[B, classes]``."""

    name = "classification"
    is_dense = False
    common_grid = 8
    levels = 2
    min_crop = 0.08
    counted = "images"

    def check_labels(self, labels: Any, images: Tensor, classes: int | None, look_at_values: bool) -> None:
        """See `hetkd.models.inputs.check_labels`."""
        check_labels(labels, len(images), classes, look_at_values)

    def checked_for_evaluation(self, labels: Any, images: Tensor, classes: int | None) -> Any:
        """Return classes ``[B]``; raises as `check_labels`."""
        labels = torch.as_tensor(labels)
        if labels.ndim != 1:
            raise ValueError(f"val needs class indices [B] as labels, got shape {list(labels.shape)}.")
        self.check_labels(labels, images, classes, look_at_values=True)
        return labels

    def are_classes(self, labels: Any) -> bool:
        """Say whether labels are class indices."""
        return isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()

    def predicted_and_true(self, logits: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
        """Return the class of each image."""
        return logits.argmax(1), labels.cpu()

    def statistics(self, logits: Tensor, labels: Any) -> tuple[Tensor, ...]:
        """Return logits and classes."""
        return logits, labels.to(logits.device, non_blocking=True)

    def cross_entropy(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the mean over images."""
        return F.cross_entropy(logits, labels, weights)

    def compared_logits(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> ComparedLogits:
        """Return the logits as they are."""
        return ComparedLogits(student, teacher, labels)

    def metrics(self, classes: Sequence[str], device: torch.device, *, sync: bool) -> Metrics:
        """Return top-1 and top-5 in percent (top 5, or as many classes as there are) and the cross-entropy."""
        return Accuracies(len(classes), device, sync=sync)

    def check_names(self, names: Sequence[str], classes: int | None) -> None:
        """Accept any: labels say which classes there are."""

    def class_counts(self, dataset: Any, classes: int) -> Tensor | None:
        """Return how many images each class has, where labels are known without loading each image."""
        labels = known_labels(dataset)
        return None if labels is None else labels.bincount(minlength=classes)

    def kept_waves(self, grid: int) -> int:
        """Return 5: finer waves tell less of the class."""
        return 5

    def make_dataset(self, data: Any, **options: Any) -> Any:
        """See `hetkd.data.images.make_dataset`."""
        return make_dataset(data, **options)


class Accuracies:
    """Top-1, top-5 and cross-entropy."""

    def __init__(self, classes: int, device: torch.device, *, sync: bool) -> None:
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        self._accuracies = {
            f"top{k}": MulticlassAccuracy(
                classes, top_k=min(k, classes), average="micro", validate_args=False, sync_on_compute=sync
            ).to(device)
            for k in (1, 5)
        }
        self._loss = MeanMetric(sync_on_compute=sync).to(device)

    def update(self, *statistics: Tensor) -> None:
        """Add a batch of logits ``[B, classes]`` and classes ``[B]``."""
        logits, labels = statistics
        self._loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        for metric in self._accuracies.values():
            metric.update(logits, labels)

    def compute(self) -> dict[str, float]:
        """Return ``top1``, ``top5`` and ``loss``."""
        accuracies = {name: 100 * metric.compute().item() for name, metric in self._accuracies.items()}
        return {**accuracies, "loss": self._loss.compute().item()}
