"""What a batch is turned into before the step: augmented and mixed images, soft labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hetkd.training.options import TrainingOptions

if TYPE_CHECKING:
    from hetkd.distiller import Distiller


class TargetMaker:
    """Augments and mixes a batch, and smooths its hard labels; teacher and student see the same images."""

    def __init__(self, options: TrainingOptions, distiller: Distiller) -> None:
        from timm.data import Mixup

        self.augment, self.smoothing, self.classes = options.augment, options.label_smoothing, distiller.classes or 0
        self.mix = None
        if not (options.mixup or options.cutmix or self.smoothing):
            return
        if not self.classes:
            raise ValueError("mixup, cutmix and label_smoothing need a student with a classifier.")
        if options.mixup or options.cutmix:
            self.mix = Mixup(options.mixup, options.cutmix, label_smoothing=self.smoothing, num_classes=self.classes)

    def __call__(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns what the step gets for images ``[B, C, H, W]`` and labels.

        Raises:
            ValueError: If labels are soft already or the batch is odd, and images are to be mixed.
        """
        if self.augment is None and self.mix is None and not self.smoothing:
            return images, labels
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if self.augment is not None:
            images = self.augment(images)
        if labels is None:
            return images, None
        if self.mix is not None:
            if labels.ndim == 2:
                raise ValueError("mixup and cutmix make soft labels from class indices, but labels are soft already.")
            if len(images) % 2:
                raise ValueError(f"mixup and cutmix need an even batch, got {len(images)} images: use drop_last=True.")
            images, labels = self.mix(images.clone(), labels)
        elif self.smoothing:
            hard = labels if labels.ndim == 2 else F.one_hot(labels, self.classes)
            labels = hard * (1 - self.smoothing) + self.smoothing / self.classes
        return images, labels
