"""Images and labels out of the samples of a dataset or loader."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_IMAGE_KEYS = ("pixel_values", "image", "images", "img")
_LABEL_KEYS = ("labels", "label", "fine_label", "class", "target", "cls")
MASK_KEYS = ("mask", "masks", "annotation", "segmentation_mask", "semantic_segmentation")


class Keys(NamedTuple):
    """Keys of image and label in a sample that is a dict; ``None``: found by name, else by type."""

    image: str | None = None
    label: str | None = None


def keys_of(dataset: Any, given: Keys = Keys()) -> Keys:  # noqa: B008  (a constant)
    """Return the keys of a data set whose columns have types, as Hugging Face's ``Image`` and ``ClassLabel``.

    Raises:
        ValueError: If a given key is none of its columns.
    """
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping) or has_own_transform(dataset):
        return given
    for name, key in given._asdict().items():
        if key is not None and key not in features:
            raise ValueError(f"{name}_key={key!r} is none of the columns {list(features)}.")
    images = [name for name, x in features.items() if type(x).__name__ == "Image"]
    labels = [name for name, x in features.items() if type(x).__name__ == "ClassLabel"]
    image = given.image or (images[0] if len(images) == 1 else None)
    return Keys(image, given.label or (labels[0] if len(labels) == 1 else None))


def has_own_transform(dataset: Any) -> bool:
    """Say whether samples of a Hugging Face data set are made by a function (``with_transform``), not by columns."""
    return isinstance(format := getattr(dataset, "format", None), Mapping) and format.get("type") == "custom"


def images_and_labels(batch: Any, keys: Keys = Keys()) -> tuple[Any, Any]:  # noqa: B008
    """Take a batch or sample apart: ``(images, labels)``, a dict, or images alone.

    Args:
        batch: One of these; dicts as Hugging Face's collators make them.
        keys: Of dicts.

    Returns:
        Images, and labels or ``None``.

    Raises:
        TypeError: If it is none of these, or a dict does not tell image and label.
    """
    if isinstance(batch, Mapping):
        return _from_dict(batch, keys)
    given = [f"{name}_key={key!r}" for name, key in keys._asdict().items() if key is not None]
    if given:
        got = type(batch).__name__
        raise TypeError(f"{' and '.join(given)} is for samples that are dicts, got {got}: leave it out.")
    if isinstance(batch, Tensor) or hasattr(batch, "convert") or hasattr(batch, "__array_interface__"):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    raise TypeError(
        f"a sample must be (image, label), a dict of both, or an image alone, got {type(batch).__name__} "
        f"{'of ' + str(len(batch)) if isinstance(batch, (tuple, list)) else ''}".rstrip()
        + "."
    )


def keys_in(sample: Mapping[str, Any], keys: Keys = Keys()) -> tuple[str, str | None]:  # noqa: B008
    """Return the keys of image and label in a sample; ``None`` for the label if there is none.

    Raises:
        TypeError: If there is no image, or it is not clear which key is meant.
        ValueError: If a given key is not there.
    """
    for name, key in keys._asdict().items():
        if key is not None and key not in sample:
            raise ValueError(f"{name}_key={key!r} is none of a sample's keys {sorted(sample)}.")
    image = keys.image or _key(sample, _IMAGE_KEYS, _is_picture, "image")
    if image is None:
        raise TypeError(
            f"a sample has the keys {sorted(sample)}; expected an image and a label: name it, image_key=..."
        )
    label = keys.label or _key(sample, _LABEL_KEYS, _is_class, "label", other_than=image)
    masks = (name for name in MASK_KEYS if isinstance(sample.get(name), Tensor) and name != image)
    return image, label or next(masks, None)


def _from_dict(sample: Mapping[str, Any], keys: Keys) -> tuple[Any, Any]:
    image, label = keys_in(sample, keys)
    return sample[image], None if label is None else sample[label]


def _key(
    sample: Mapping[str, Any], names: tuple[str, ...], fits: Any, what: str, other_than: str | None = None
) -> str | None:
    named = next((name for name in names if name in sample and name != other_than), None)
    if named is not None:
        return named
    fitting = [name for name, value in sample.items() if name != other_than and fits(value)]
    if len(fitting) > 1:
        raise TypeError(f"a sample may have its {what} in {' or '.join(fitting)}: name it, {what}_key={fitting[0]!r}.")
    return fitting[0] if fitting else None


def _is_picture(value: Any) -> bool:
    return hasattr(value, "convert") or (hasattr(value, "ndim") and value.ndim >= 3)


def _is_class(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim <= 1 and not value.is_floating_point()
    return not isinstance(value, bool) and hasattr(value, "__index__")


def checked_label(label: Any, name: str) -> Any:
    """Return a label; raise TypeError, naming the image, for one that is text."""
    if isinstance(label, str):
        raise TypeError(
            f"the label of {name} is the text {label!r}: give class numbers, a ClassLabel column, or a folder of class "
            "folders."
        )
    return label


def check_alike(samples: Sequence[Any], name_of: Callable[[int], str]) -> None:
    """Raise ValueError, with the names of two, if images of a batch differ in shape or only some have labels."""
    images = [sample[0] if isinstance(sample, tuple) else sample for sample in samples]
    for number, (sample, image) in enumerate(zip(samples, images, strict=True)):
        if isinstance(sample, tuple) != isinstance(samples[0], tuple):
            without, other = (0, number) if isinstance(sample, tuple) else (number, 0)
            raise ValueError(
                f"{name_of(without)} has no label, but {name_of(other)} has one: give each image a label, or none."
            )
        if image.shape != images[0].shape:
            raise ValueError(
                f"{name_of(number)} has the shape {list(image.shape)}, and {name_of(0)} {list(images[0].shape)}: "
                "tensors stay as they are, so resize them in the dataset, or yield PIL images."
            )


def as_picture(image: Any) -> Any:
    """Return a NumPy image ``[H, W]`` or ``[H, W, C]`` of 8 bits as a PIL image, another one as a tensor."""
    # A picture is asked for its array last: that encodes all its pixels.
    if isinstance(image, Tensor) or hasattr(image, "convert") or not hasattr(image, "__array_interface__"):
        return image
    import numpy as np
    from PIL import Image

    array = np.asarray(image)
    if array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    is_hwc = array.ndim == 3 and array.shape[2] in (1, 3) and array.shape[0] not in (1, 3)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1) if is_hwc else array))
