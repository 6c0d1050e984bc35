"""Data in memory: tensors and NumPy arrays of images and labels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class TensorImages(Dataset[Any]):
    """Images and labels in memory; a whole batch is one indexing operation.

    Args:
        images: ``[N, C, H, W]``, uint8 or float in [0, 1].
        labels: ``[N]``, int64, or ``None``: then samples are images alone.

    Raises:
        ValueError: If the numbers of images and labels differ.
    """

    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        if labels is not None and len(images) != len(labels):
            raise ValueError(f"{len(images)} images, but {len(labels)} labels.")
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | list[int] | slice) -> Any:
        return self.images[index] if self.labels is None else (self.images[index], self.labels[index])

    def __getitems__(self, indices: list[int]) -> Any:
        """Return a batch; PyTorch's loader asks for it in this way."""
        return self[indices]


def in_memory(data: Any, what: str) -> Any:
    """Return tensors ``images`` or ``(images, labels)`` and arrays ``(images, labels)`` as a `TensorImages`.

    Arrays of images are ``[N, C, H, W]``, ``[N, H, W, C]`` or ``[N, H, W]``; anything else comes back as it is.

    Raises:
        TypeError: If an array holds no numbers, or the data are a dict.
    """
    if isinstance(data, Mapping):
        raise TypeError(_why_no_dict(data, what))
    if isinstance(data, Tensor):
        return TensorImages(data, None)
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        return data
    if all(isinstance(item, Tensor) for item in data):
        return TensorImages(*data)
    # Two arrays of the same rank are two pictures.
    if all(isinstance(item, (Tensor, np.ndarray)) for item in data) and data[0].ndim != data[1].ndim:
        return TensorImages(_images(data[0], what), _labels(data[1], what))
    return data


def _why_no_dict(data: Mapping[str, Any], what: str) -> str:
    if not data or not all(isinstance(item, (Tensor, np.ndarray)) for item in data.values()):
        return f"{what} is a dict of the splits {list(data)}: give one of them, {next(iter(data), 'train')!r}."
    names = sorted(data, key=lambda name: -data[name].ndim)[:2]
    cure = ", ".join(f"data[{name!r}]" for name in names)
    return f"{what} is a dict of the tensors {list(data)}: give {'images' if len(names) == 1 else 'a pair'}, ({cure})."


def _images(images: Any, what: str) -> Tensor:
    images = images if isinstance(images, Tensor) else _tensor(images, what)
    images = images[:, None] if images.ndim == 3 else images
    if images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)
    return images.float() if images.dtype == torch.float64 else images


def _labels(labels: Any, what: str) -> Tensor:
    labels = labels if isinstance(labels, Tensor) else _tensor(labels, what)
    return labels.float() if labels.is_floating_point() else labels.long()


def _tensor(array: np.ndarray[Any, Any], what: str) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{what} has an array of dtype {array.dtype}: give numbers, and classes as 0, 1, ...")
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
