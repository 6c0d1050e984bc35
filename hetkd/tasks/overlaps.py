"""What a segmenter is measured by, from the counts of pairs of true and named classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Overlaps(Metric):  # type: ignore[misc]
    """Mean IoU, IoU a class, pixel accuracy and cross-entropy.

    Args:
        classes: Their names.
        **options: Of torchmetrics.
    """

    pairs: Tensor
    losses: Tensor

    def __init__(self, classes: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.classes = list(classes)
        self.add_state("pairs", torch.zeros(len(classes), len(classes), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("losses", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, pairs: Tensor, losses: Tensor) -> None:
        """Add pairs ``[B, classes, classes]`` (true, named) and sums and numbers of cross-entropies ``[B, 2]``."""
        self.pairs += pairs.sum(0)
        self.losses += losses.sum(0)

    def compute(self) -> dict[str, float]:
        """Return ``miou`` (mean over the classes that occur), ``pixel_accuracy``, ``loss`` and ``iou/CLASS``."""
        pairs = self.pairs.cpu().double()
        right, union = pairs.diag(), pairs.sum(0) + pairs.sum(1) - pairs.diag()
        iou, occurs = 100 * right / union, union > 0
        return {
            "miou": iou[occurs].mean().item(),
            "pixel_accuracy": 100 * (right.sum() / pairs.sum()).item(),
            "loss": (self.losses[0] / self.losses[1]).item(),
            **{f"iou/{self.classes[number]}": iou[number].item() for number in occurs.nonzero()[:, 0].tolist()},
        }
