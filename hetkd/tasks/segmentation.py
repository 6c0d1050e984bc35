"""Semantic segmentation: one class a pixel."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hetkd.data.images import TensorImages
from hetkd.data.masks import MaskedImages, make_mask_dataset, unlisted_colors
from hetkd.data.survey import spread
from hetkd.features.grid import resampling
from hetkd.spectral.precision import separable
from hetkd.tasks.task import ComparedLogits, Metrics, Task

_LARGEST_LOGITS, _LOOKED_AT, _COUNTED = 128, 16, 512
_MOST_AT_ONCE = 2**24  # logits, 64 MB
_NAMED = 5  # colours in a message
_PIXELS = 4  # an axis of each image, to see what a teacher knows
_IN_FOLDERS = "folders of images and masks are scaled, cropped, flipped and coloured when they are loaded"


class Segmentation(Task):
    """One class a pixel; labels are masks of classes ``[B, H, W]``, int64.

    Logits of any stride are resized bilinearly: to the mask for the cross-entropy and the metrics, to the coarser of
    both grids where student and teacher are compared.

    Args:
        ignore_index: The value of pixels without a class; they count nowhere.
        colors: Of masks in colour, RGB of each class in order: ``[(128, 0, 0), (0, 128, 0), ...]``; other colours have
            no class, which is said before training. Palettes are then read by their colours, not by their numbers.
        reduce_labels: Masks of folders and datasets count classes from 1, and 0 is no class, as ADE20K's are.

    Raises:
        ValueError: If a value is out of range.
    """

    name = "segmentation"
    is_dense = True
    common_grid = 32
    levels = 3
    min_crop = 0.25
    counted = "pixels"
    unsupported: ClassVar[Mapping[str, str]] = {
        "mixup": "leave it out",
        "cutmix": "leave it out",
        "label_smoothing": "leave it out",
        "balanced_sampling": "use class_weights='balanced', or a number for each class",
        "augment": _IN_FOLDERS,
        "top_k": "logits of all classes are kept",
        "report": "the report is for classifiers",
    }

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        colors: Sequence[Sequence[int]] | None = None,
        reduce_labels: bool = False,
    ) -> None:
        if not (isinstance(ignore_index, int) and -1000 <= ignore_index <= 65535):
            raise ValueError(f"ignore_index={ignore_index!r} must be a whole number, as 255.")
        if colors is not None and not (len(colors) and all(len(color) == 3 for color in colors)):
            raise ValueError(f"colors={list(colors)[:2]}... must have three numbers for each class: (128, 0, 0).")
        if reduce_labels and 0 <= ignore_index < 255:
            raise ValueError(
                f"ignore_index={ignore_index} may be a class: with reduce_labels=True the 0 of a mask becomes "
                "ignore_index, and its 1 becomes class 0, so leave it at 255."
            )
        if colors is not None and reduce_labels:
            raise ValueError("reduce_labels=True has no use beside colors: leave out the colour of no class.")
        self.ignore_index, self.reduce_labels = ignore_index, reduce_labels
        self.colors = None if colors is None else [tuple(int(value) for value in color) for color in colors]

    def check_labels(self, labels: Any, images: Tensor, classes: int | None, look_at_values: bool) -> None:
        """Refuse anything but masks ``[B, H, W]`` of int64 with classes below ``classes`` or ``ignore_index``."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"masks must be a tensor [B, H, W], got {type(labels).__name__}.")
        if labels.dtype != torch.int64:
            raise TypeError(f"masks have dtype {labels.dtype}: give classes as int64 (masks.long()).")
        if labels.ndim != 3 or len(labels) != len(images):
            raise ValueError(f"masks have shape {list(labels.shape)} for {len(images)} images; give [B, H, W].")
        if labels.shape[1:] != images.shape[2:]:
            raise ValueError(
                f"masks have {labels.shape[2]} x {labels.shape[1]} pixels, images {images.shape[3]} x "
                f"{images.shape[2]}: give both the same size."
            )
        if look_at_values:
            self._check_values(labels, classes)

    def _check_values(self, labels: Tensor, classes: int | None) -> None:
        valid = labels[labels != self.ignore_index]
        if classes is not None and len(valid) and not (int(valid.min()) >= 0 and int(valid.max()) < classes):
            raise ValueError(
                f"masks range from {int(valid.min())} to {int(valid.max())}, but the student has {classes} classes "
                f"(0 to {classes - 1}); pixels without a class are ignore_index={self.ignore_index}: "
                "task=Segmentation(ignore_index=...)."
            )

    def checked_for_evaluation(self, labels: Any, images: Tensor, classes: int | None) -> Any:
        """Return masks ``[B, H, W]``, or a list of masks ``[H, W]`` of several sizes."""
        masks = labels if isinstance(labels, (Tensor, list)) else torch.as_tensor(labels)
        if len(masks) != len(images):
            raise ValueError(f"{len(masks)} masks for {len(images)} images.")
        for mask in masks:
            if mask.ndim != 2 or mask.dtype != torch.int64:
                raise ValueError(f"val needs masks [H, W] of int64, got {list(mask.shape)} of {mask.dtype}.")
            self._check_values(mask, classes)
        return masks

    def are_classes(self, labels: Any) -> bool:
        """Say whether labels are masks."""
        return isinstance(labels, (Tensor, list)) and all(mask.ndim == 2 for mask in labels)

    def predicted_and_true(self, logits: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
        """Return the classes of a few pixels of each image, evenly spread: neighbours tell little more."""
        found, right = [], []
        for each, mask in zip(logits, labels, strict=True):
            rows, columns = (torch.linspace(0, side - 1, _PIXELS + 2)[1:-1].round().long() for side in mask.shape)
            named = resized(each[None], mask.shape).argmax(1)[0]
            some = mask.cpu()[rows][:, columns]
            found.append(named[rows][:, columns][some != self.ignore_index])
            right.append(some[some != self.ignore_index])
        return torch.cat(found), torch.cat(right)

    def statistics(self, logits: Tensor, labels: Any) -> tuple[Tensor, ...]:
        """Return for each image the pairs of true and named class, and sum and number of the cross-entropies."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        classes = logits.shape[1]
        pairs = logits.new_zeros(len(logits), classes, classes, dtype=torch.int64)
        losses = logits.new_zeros(len(logits), 2)
        for index, mask in enumerate(labels):
            for own, true in in_strips(logits[index : index + 1], mask.to(logits.device)[None]):
                valid = true != self.ignore_index
                named = own.argmax(1)[valid]
                pairs[index] += multiclass_confusion_matrix(named, true[valid], classes, validate_args=False)
                losses[index, 0] += F.cross_entropy(own, true, ignore_index=self.ignore_index, reduction="sum")
                losses[index, 1] += valid.sum()
        return pairs, losses

    def cross_entropy(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the mean over valid pixels of the mask."""
        enlarged, valid = resized(logits, labels.shape[-2:]), labels != self.ignore_index
        total = F.cross_entropy(enlarged, labels, weights, ignore_index=self.ignore_index, reduction="sum")
        counted = valid.to(total.dtype) if weights is None else weights[labels.where(valid, 0)] * valid
        # A crop may hold no pixel with a class: then both are 0. To ask would wait for the device.
        return total / counted.sum().clamp(min=1e-12)

    def compared_logits(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> ComparedLogits:
        """Return the logits of pixels with a class, on the coarser of both grids; without labels of all pixels."""
        own, others = (x.movedim(1, -1) for x in on_coarser_grid(student, teacher))
        if labels is None:
            return ComparedLogits(own.flatten(0, 2), others.flatten(0, 2), None)
        coarse = F.interpolate(labels[:, None].float(), own.shape[1:3], mode="nearest-exact")[:, 0].long()
        valid = coarse != self.ignore_index
        if not valid.any():  # then the teacher teaches these images whole
            valid = torch.ones_like(valid)
            coarse = others.argmax(-1)
        return ComparedLogits(own[valid], others[valid], coarse[valid])

    def metrics(self, classes: Sequence[str], device: torch.device, *, sync: bool) -> Metrics:
        """Return mean IoU, IoU a class and pixel accuracy in percent, and the cross-entropy."""
        from hetkd.tasks.overlaps import Overlaps  # torchmetrics is slow to import

        metrics: Metrics = Overlaps(classes, sync_on_compute=sync).to(device)
        return metrics

    def check_names(self, names: Sequence[str], classes: int | None) -> None:
        """Refuse another number of names than of classes, and names that occur twice."""
        if len(names) != classes or len(set(names)) < len(names):
            raise ValueError(
                f"classes.txt has {len(names)} names ({len(set(names))} different ones), but the student has {classes} "
                "classes: give each class one name, a line each, and pixels without a class (ignore_index) none."
            )

    def remarks(self, dataset: Any) -> list[str]:
        """Look at a few masks: say which of their colours have no class.

        Warns:
            RuntimeWarning: If masks hold a single class beside ignored pixels, as 0 and 255 for foreground.

        Raises:
            ValueError: If no mask holds a class.
        """
        values = _values(_some_masks(dataset, _LOOKED_AT))
        if values == [self.ignore_index] and _values(_some_masks(dataset, _COUNTED)) == values:
            raise ValueError(self._without_classes(dataset))
        if len(values) == 2 and self.ignore_index in values and isinstance(dataset, MaskedImages):
            warnings.warn(
                f"masks hold the values {values[0]} and {values[1]} alone, and {self.ignore_index} means no class, so "
                "that there is one class: if it is the foreground, save masks of 0 and 1, and say "
                "task=Segmentation(ignore_index=-1) if every pixel has a class.",
                RuntimeWarning,
                stacklevel=2,
            )
        strange = self._unlisted(dataset)
        if not strange:
            return []
        return [f"colours of masks that are none of colors= and count nowhere ({len(strange)}): {_listed(strange)}"]

    def _without_classes(self, dataset: Any) -> str:
        found = "no mask that was looked at holds a class: "
        strange = self._unlisted(dataset)
        if strange:
            return (
                f"{found}their colours are none of colors={self.colors}: {_listed(strange)}. Give the colour of each "
                "class as red, green, blue."
            )
        if self.reduce_labels:
            return f"{found}their pixels are 0 or {self.ignore_index}: leave reduce_labels=True out if 0 is a class."
        return (
            f"{found}all their pixels are ignore_index={self.ignore_index}. Save masks of class numbers from 0, or say "
            "task=Segmentation(ignore_index=-1) if every pixel has a class."
        )

    def _unlisted(self, dataset: Any) -> dict[tuple[int, ...], tuple[float, str]]:
        """Return colours of a few masks without a class: the largest share of one mask, and the image of this mask."""
        found: dict[tuple[int, ...], tuple[float, str]] = {}
        if self.colors is None or not isinstance(dataset, MaskedImages):
            return found
        for name, mask in dataset.named_masks(_LOOKED_AT):
            for color, share in unlisted_colors(mask, self.colors).items():
                found[color] = max(found.get(color, (0.0, "")), (share, name))
        return found

    def class_counts(self, dataset: Any, classes: int) -> Tensor | None:
        """Return how many pixels each class has, in at most 512 masks, evenly spread."""
        masks = _some_masks(dataset, _COUNTED)
        if masks is None:
            return None
        counts = torch.zeros(classes, dtype=torch.int64)
        for mask in masks:
            self._check_values(mask, classes)
            counts += mask[mask != self.ignore_index].bincount(minlength=classes).cpu()
        return counts

    def kept_waves(self, grid: int) -> int:
        """Return the same share of all waves as for classification: 5 of 8, 21 of 32."""
        return 5 * grid // 8 | 1

    def make_dataset(self, data: Any, **options: Any) -> Any:
        """See `hetkd.data.masks.make_mask_dataset`."""
        return make_mask_dataset(
            data, ignore_index=self.ignore_index, colors=self.colors, reduce_labels=self.reduce_labels, **options
        )

    def compact(self, logits: Tensor) -> Tensor:
        """Return logits with at most 128 pixels a side: a library may have enlarged them to the image's size."""
        largest = max(logits.shape[-2:])
        if largest <= _LARGEST_LOGITS:
            return logits
        grid = torch.Size(max(1, round(side * _LARGEST_LOGITS / largest)) for side in logits.shape[-2:])
        return F.interpolate(logits, grid, mode="bilinear", align_corners=False, antialias=True)


def _some_masks(dataset: Any, most: int) -> list[Tensor] | None:
    """Return at most so many masks of a data set, evenly spread, or ``None`` where only loading each would tell."""
    if isinstance(dataset, MaskedImages):
        return dataset.some_masks(most)
    if isinstance(dataset, TensorImages) and dataset.labels is not None:
        return list(dataset.labels[spread(len(dataset), most)])
    return None


def _values(masks: Sequence[Tensor] | None) -> list[int]:
    return sorted({int(value) for mask in masks or [] for value in mask.unique()})


def _listed(colors: Mapping[tuple[int, ...], tuple[float, str]]) -> str:
    """Return the colours that fill most of a mask, with its image."""
    most = sorted(colors.items(), key=lambda item: item[1], reverse=True)[:_NAMED]
    return ", ".join(f"{color} ({100 * share:.3g} % of the mask of {name})" for color, (share, name) in most)


def on_coarser_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both logits ``[B, classes, h, w]`` at the smaller height and the smaller width of the two."""
    grid = [min(sizes) for sizes in zip(student.shape[-2:], teacher.shape[-2:], strict=True)]
    return resized(student, grid), resized(teacher, grid)


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return logits ``[B, classes, h, w]`` at another size, bilinearly, with antialiasing where it is smaller."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    smaller = any(old > new for old, new in zip(logits.shape[-2:], size, strict=True))
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False, antialias=smaller)


def in_strips(logits: Tensor, masks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Enlarge logits to the masks' size strip by strip, for those of a large picture may not fit into memory.

    Args:
        logits: ``[B, classes, h, w]``.
        masks: ``[B, H, W]``.

    Yields:
        Logits ``[B, classes, rows, W]`` and masks ``[B, rows, W]``, from top to bottom.
    """
    height, width = masks.shape[1:]
    at_once = max(1, _MOST_AT_ONCE // (logits.shape[0] * logits.shape[1] * width))
    if at_once >= height:
        yield resized(logits, (height, width)), masks
        return
    parts = masks.split(at_once, dim=1)
    if logits.shape[-2:] == masks.shape[1:]:
        yield from zip(logits.split(at_once, dim=2), parts, strict=True)
        return
    logits = logits.float()
    rows, columns = (
        resampling(old, new).to(logits) for old, new in zip(logits.shape[-2:], (height, width), strict=True)
    )
    for some, mask in zip(rows.split(at_once), parts, strict=True):
        with torch.autocast(logits.device.type, enabled=False):  # as interpolation, which it stands for
            strip = separable(logits, some, columns)
        yield strip, mask
