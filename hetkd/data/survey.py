"""A look at a split before training: how many images of which classes, how large, and which cannot be read."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetkd.data.images import TensorImages, TransformedImages
from hetkd.data.labels import known_labels
from hetkd.data.pictures import is_of_content
from hetkd.data.samples import keys_in

_SIZES_READ, _THREADS, _PIXELS_READ, _DARK = 32, 8, 16, 16
Split = TransformedImages | TensorImages


@dataclass(frozen=True)
class Survey:
    """What is in a split.

    Attributes:
        what: ``"train"`` or ``"val"``.
        images: How many there are.
        counts: Images of each class, int64 ``[classes]``, in the order of the labels that come out; ``None`` where only
            loading each image would tell.
        names: Of these classes; ``None`` if they are unknown.
        size: Median height and width in pixels of the images as they are.
        unreadable: Images that cannot be read, among those that were looked at.
    """

    what: str
    images: int
    counts: Tensor | None
    names: list[str] | None
    size: tuple[int, int]
    unreadable: list[str]

    @property
    def used(self) -> int | None:
        """The number of classes that have images."""
        return None if self.counts is None else int((self.counts > 0).sum())

    def __str__(self) -> str:
        """Say it in a line."""
        line = f"{self.what}: {self.images:,} images, {self.size[1]} x {self.size[0]} pixels (median)"
        if self.counts is None or not self.used:
            return line
        there = self.counts[self.counts > 0]
        low, high = int(there.min()), int(there.max())
        each = f"{low:,} each" if low == high else f"{low:,} to {high:,} each"
        return f"{line}, {self.used:,} class{'es' * (self.used > 1)}, {each}"


def survey(dataset: Split, what: str, *, looked_at: Sequence[int] = ()) -> Survey:
    """Survey a split.

    Args:
        dataset: As `hetkd.data.images.make_dataset` made it.
        what: Name of the argument.
        looked_at: The images to read, to find those that cannot be read.
    """
    _warn_of_dark(dataset, what)
    if isinstance(dataset, TransformedImages):
        dataset.notes += _said_of_labels(dataset, what)
    labels = known_labels(dataset)
    names = dataset.class_names if isinstance(dataset, TransformedImages) else None
    counts = None if labels is None else labels.clamp(min=0).bincount(minlength=len(names or []))
    bad = unreadable(dataset, looked_at) if isinstance(dataset, TransformedImages) else []
    named = [dataset.name_of(index) for index in bad] if isinstance(dataset, TransformedImages) else []
    return Survey(what, len(dataset), counts, names, _median_size(dataset), named)


def _said_of_labels(dataset: TransformedImages, what: str) -> list[str]:
    """Say in which column the labels of samples that are dicts were found, unless it is called so."""
    try:
        sample = None if dataset.has_masks else dataset.dataset[0]
    except Exception as error:
        if not is_of_content(error):
            raise
        return []
    key = keys_in(sample, dataset.keys)[1] if isinstance(sample, Mapping) else None
    return [] if key in (None, "label", "labels") else [f"{what}: labels are in {key!r}"]


def _warn_of_dark(dataset: Split, what: str) -> None:
    """Warn of whole-number or deep pixels that use a small part of their range, and come out black."""
    seen = []
    for index in spread(len(dataset), _PIXELS_READ):
        picture = dataset.images[index] if isinstance(dataset, TensorImages) else _picture(dataset, index)
        brightest = None if picture is None else _brightest(picture)
        if brightest is None:
            return
        seen.append(brightest)
    high, most = max(seen)
    if 0 < high * _DARK <= most:
        warnings.warn(
            f"{what}: the brightest pixel of {len(seen)} images is {high:g} of {most:g}, so that all come out black: "
            "scale them to their range first.",
            RuntimeWarning,
            stacklevel=2,
        )


def _picture(dataset: TransformedImages, index: int) -> Any:
    try:
        return dataset.picture(index)
    except Exception as error:
        if not is_of_content(error):
            raise
        return None


def _brightest(picture: Any) -> tuple[float, float] | None:
    """Return the largest value and the largest possible one of a deep picture or whole-number tensor, else ``None``."""
    import numpy as np

    if isinstance(picture, Tensor):
        return (float(picture.max()), 255.0) if picture.dtype == torch.uint8 else None
    if not picture.mode.startswith(("I", "F")):
        return None
    return float(np.asarray(picture).max()), 1.0 if picture.mode == "F" else 65_535.0


def unreadable(dataset: TransformedImages, indices: Iterable[int]) -> list[int]:
    """Return which of these images cannot be read; several threads read them."""

    def is_bad(index: int) -> bool:
        try:
            dataset.picture(index)
        except Exception as error:
            if not is_of_content(error):
                raise
            return True
        return False

    listed = list(indices)
    with ThreadPoolExecutor(_THREADS) as pool:
        return [index for index, bad in zip(listed, pool.map(is_bad, listed), strict=True) if bad]


def spread(count: int, most: int) -> list[int]:
    """Return at most so many numbers, evenly spread over ``range(count)``.

    >>> spread(10, 4)
    [0, 2, 5, 7]
    """
    wanted = min(count, most)
    return [number * count // wanted for number in range(wanted)]


def _median_size(dataset: Split) -> tuple[int, int]:
    if isinstance(dataset, TensorImages):
        return int(dataset.images.shape[-2]), int(dataset.images.shape[-1])
    sizes = [size for index in spread(len(dataset), _SIZES_READ) if (size := _size(dataset, index)) is not None]
    height, width = torch.tensor(sizes or [(0, 0)]).median(0).values.tolist()
    return height, width


def _size(dataset: TransformedImages, index: int) -> tuple[int, int] | None:
    """Return height and width of an image, of a file by its header alone; ``None`` if it cannot be read."""
    from PIL import Image

    path = Path(dataset.name_of(index))
    try:
        if path.is_file():
            with Image.open(path) as image:
                return image.height, image.width
        image = dataset.picture(index)
    except Exception as error:
        if not is_of_content(error):
            raise
        return None
    if isinstance(image, Tensor):
        return int(image.shape[-2]), int(image.shape[-1])
    return image.height, image.width
