"""The labels of a data set, without loading its images."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hetkd.data.images import TensorImages, TransformedImages
from hetkd.data.samples import Keys, has_own_transform


def known_labels(dataset: Any, keys: Keys = Keys()) -> Tensor | None:  # noqa: B008  (a constant)
    """Return the classes of all images, int64 ``[N]``, or ``None`` where only loading each image would tell.

    Folders, torchvision's data sets (``targets``), Hugging Face's (the column of labels) and tensors know them; so do
    their subsets and sums.

    Args:
        dataset: One of these, or a `TransformedImages` of one, whose labels are those that come out.
        keys: Where labels are in samples that are dicts.

    Raises:
        ValueError: If a `TransformedImages` has a label that is none of its classes.
    """
    if isinstance(dataset, TransformedImages) and dataset.has_masks:
        return None
    if isinstance(dataset, TransformedImages):
        labels = known_labels(dataset.dataset, dataset.keys)
        if labels is None:
            return None
        _refuse_strange(dataset, labels)
        return labels if dataset.label_map is None else torch.tensor(dataset.label_map)[labels]
    if isinstance(dataset, TensorImages):
        return _classes(dataset.labels)
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        whole = known_labels(dataset.dataset, keys)
        return None if whole is None else whole[torch.as_tensor(dataset.indices)]
    if hasattr(dataset, "datasets") and hasattr(dataset, "cumulative_sizes"):
        parts = [known_labels(part, keys) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    return _classes(_listed(dataset, keys))


def _refuse_strange(dataset: TransformedImages, labels: Tensor) -> None:
    """Refuse labels that are none of the classes, as -1 in Hugging Face's unlabelled splits."""
    names = dataset.class_names if dataset.label_map is None else dataset.label_map
    strange = labels < 0 if names is None else (labels < 0) | (labels >= len(names))
    if strange.any():
        first = int(strange.nonzero()[0, 0])
        raise ValueError(
            f"{dataset.name_of(first)} has the label {int(labels[first])}, which is none of the classes "
            f"({int(strange.sum()):,} of {len(labels):,} images have such labels): leave them out, or give images "
            "alone to learn without labels."
        )


def _listed(dataset: Any, keys: Keys) -> Any:
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping) and has_own_transform(dataset):
        return None
    if isinstance(features, Mapping):  # Hugging Face's
        return dataset[keys.label] if keys.label in features else None
    if isinstance(dataset, torch.utils.data.TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) == 2 else None
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list) and samples and isinstance(samples[0], tuple) and not _has_own_labels(dataset):
        return [sample[1] for sample in samples]
    return None if _has_own_labels(dataset) else getattr(dataset, "targets", None)


def _has_own_labels(dataset: Any) -> bool:
    """Say whether a data set changes the labels that it lists, as torchvision's do with a ``target_transform``."""
    return getattr(dataset, "target_transform", None) is not None


def _classes(labels: Any) -> Tensor | None:
    try:
        found = torch.as_tensor(list(labels) if labels is not None and not isinstance(labels, Tensor) else labels)
    except (TypeError, ValueError, RuntimeError):
        return None
    is_whole = found.ndim == 1 and len(found) > 0 and not found.is_floating_point() and found.dtype != torch.bool
    return found.long().cpu() if is_whole else None
