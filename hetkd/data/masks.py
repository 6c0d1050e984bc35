"""Images with masks: datasets of (image, mask), tensors, loaders; what masks are read from; joint crops of both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetkd.data.images import TensorImages, TransformedImages, is_loader, open_data
from hetkd.data.mask_folders import MaskFolder
from hetkd.data.pictures import UnreadableImage, name_of, raise_for_content
from hetkd.data.samples import MASK_KEYS, Keys, as_picture
from hetkd.data.seeding import sample_seed, seeded
from hetkd.data.survey import spread
from hetkd.data.transforms import picture_tensor, resize_transform
from hetkd.models.inputs import InputSpec

_JITTER, _NARROWEST = 0.3, 0.75
_LOSSY = {"JPEG", "MPO"}  # as Pillow names them
_PLAIN = "it must be whole numbers [H, W], as a PNG of mode L, P or I;16 has them"
Colors = Sequence[tuple[int, ...]]


class MaskedImages(TransformedImages):
    """A dataset of (image, mask), both transformed alike; tensors pass as they are.

    Args:
        dataset: PIL images or arrays with masks: classes in 8 or 16 bits, palettes, or colours.
        transform: From image ``[C, H, W]`` and mask ``[H, W]`` to the same.
        read_mask: From a mask as it is to classes ``[H, W]``, int64.
        spec: Whether images have colour.
        seed: See `TransformedImages`.
        **options: Of `TransformedImages`.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        read_mask: Callable[[Any], Tensor],
        spec: InputSpec,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, partial(_pixels, spec=spec), seed, **options)
        self._both, self._read_mask = transform, read_mask
        self.keys, self.class_names = options.get("keys", Keys()), _names_of(dataset)  # not those of whole images

    has_masks = True

    def _load(self, index: int) -> Any:
        with nullcontext() if self.seed is None else seeded(sample_seed(self.seed, self.epoch, index)):
            name = name_of(self.dataset, index)
            image, mask = image_and_mask(self.dataset[index], self.keys, name)
            image = as_picture(image)
            _refuse_turned(image, name)
            try:
                pixels = image if isinstance(image, Tensor) else self.transform(image)
            except Exception as error:
                raise_for_content(name, error)
            classes = self._classes(mask, name)
            if pixels.shape[-2:] != classes.shape:
                raise ValueError(
                    f"the mask of {name} has {classes.shape[1]} x {classes.shape[0]} pixels, its image "
                    f"{pixels.shape[2]} x {pixels.shape[1]}."
                )
            return (pixels, classes) if isinstance(image, Tensor) else self._both(pixels, classes)

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Any]:
        """Return a batch: images ``[B, C, H, W]``, and masks ``[B, H, W]``, or a list of masks of several sizes."""
        images, masks = zip(*samples, strict=True)
        alike = len({mask.shape for mask in masks}) == 1
        return torch.stack(images), torch.stack(masks) if alike else list(masks)

    def for_evaluation(self, spec: InputSpec, size: tuple[int, int]) -> TransformedImages:
        """See `TransformedImages.for_evaluation`."""
        return MaskedImages(
            self.dataset, WholeImage(spec, size), self._read_mask, spec, keys=self.keys, skip_unreadable=True
        )

    def picture(self, index: int) -> Any:
        """Return an image as it is, before the transform."""
        return as_picture(image_and_mask(self.dataset[index], self.keys, name_of(self.dataset, index))[0])

    def _classes(self, mask: Any, name: str) -> Tensor:
        try:
            classes = self._read_mask(mask)
        except ValueError as error:
            raise ValueError(f"the mask of {name} {error}") from error
        if self.label_map is None:
            return classes
        numbers = torch.tensor(self.label_map)
        is_class = (classes >= 0) & (classes < len(numbers))
        return torch.where(is_class, numbers[classes.clamp(0, len(numbers) - 1)], classes)

    def named_masks(self, most: int) -> Iterator[tuple[str, Any]]:
        """Yield the names of at most so many images, evenly spread, and their masks as they are.

        Raises:
            UnreadableImage: If an image cannot be read, and is not to be skipped.
        """
        for index in spread(len(self), most):
            name = self.name_of(index)
            try:
                mask = image_and_mask(self.dataset[index], self.keys, name)[1]
            except UnreadableImage:
                if not self.skip_unreadable:
                    raise
            else:
                yield name, mask

    def some_masks(self, most: int) -> list[Tensor]:
        """Return the classes of at most so many masks, evenly spread, without those that are to be skipped."""
        return [self._classes(mask, name) for name, mask in self.named_masks(most)]


def _names_of(dataset: Any) -> list[str] | None:
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        return _names_of(dataset.dataset)
    names = getattr(dataset, "classes", None)
    return list(names) if isinstance(names, (list, tuple)) and names else None


def _pixels(image: Any, spec: InputSpec) -> Tensor:
    return picture_tensor(image, spec)


def _refuse_turned(image: Any, name: str) -> None:
    """Refuse an image that EXIF turns, unless the size of its mask tells whether it was drawn on the turned one."""
    from PIL import ExifTags

    turned = 1 if isinstance(image, Tensor) else image.getexif().get(ExifTags.Base.Orientation, 1)
    is_told_by_size = turned in (5, 6, 7, 8) and image.width != image.height
    if turned not in (0, 1) and not is_told_by_size:
        raise ValueError(
            f"{name} is turned by its EXIF data (orientation {turned}), and its mask may be or not: save both upright, "
            "PIL.ImageOps.exif_transpose(image)."
        )


def image_and_mask(sample: Any, keys: Keys, name: str) -> tuple[Any, Any]:
    """Take a sample ``(image, mask)`` or a dict apart.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(sample, Mapping):
        mask = keys.label or next((key for key in (*MASK_KEYS, "label", "labels") if key in sample), None)
        image = keys.image or next((key for key in ("image", "pixel_values", "images") if key in sample), None)
        if image in sample and mask in sample and image is not None and mask is not None:
            return sample[image], sample[mask]
        raise TypeError(f"{name} has the keys {sorted(sample)}: name both, image_key='image', label_key='mask'.")
    if isinstance(sample, (tuple, list)) and len(sample) == 2:
        return sample[0], sample[1]
    raise TypeError(f"{name} must be (image, mask) or a dict of both, got {type(sample).__name__}.")


def make_mask_dataset(
    data: Any,
    *,
    what: str,
    spec: InputSpec,
    size: tuple[int, int],
    train: bool,
    seed: int = 0,
    skip_unreadable: bool = False,
    keys: Keys = Keys(),  # noqa: B008  (a constant)
    min_crop: float = 0.25,
    ignore_index: int = 255,
    colors: Colors | None = None,
    reduce_labels: bool = False,
) -> Any:
    """Make a dataset of images with masks.

    Args:
        data: A folder (see `MaskFolder`), a dataset of (image, mask) or of dicts, tensors, or a loader, which is
            returned as it is.
        what: See `hetkd.data.images.make_dataset`, as for the next ones.
        spec: See there.
        size: Height and width of training crops, and of images that students are evaluated on.
        train: See there.
        seed: See there.
        skip_unreadable: See there.
        keys: See there.
        min_crop: See there.
        ignore_index: The value of pixels without a class.
        colors: See `hetkd.tasks.Segmentation`.
        reduce_labels: See there.
    """
    data = open_data(MaskFolder(Path(data), what) if isinstance(data, (str, Path)) else data, what)
    if isinstance(data, TensorImages) and data.labels is not None and data.labels.ndim != 3:
        raise ValueError(f"{what} needs masks [N, H, W] beside its images: {what}=(images, masks).")
    if is_loader(data) or isinstance(data, TensorImages):
        if reduce_labels:
            raise ValueError(
                f"reduce_labels=True is for folders and datasets, but {what} is {type(data).__name__}, whose masks are "
                "taken as they are: count classes from 0 there."
            )
        return data
    return MaskedImages(
        data,
        TrainingCrop(spec, size, min_crop) if train else WholeImage(spec, size),
        partial(read_mask, colors=colors, ignore_index=ignore_index, reduce_labels=reduce_labels),
        spec,
        seed if train else None,
        skip_unreadable=skip_unreadable,
        keys=keys,
    )


def read_mask(mask: Any, colors: Colors | None, ignore_index: int, reduce_labels: bool = False) -> Tensor:
    """Turn a mask into classes ``[H, W]``, int64.

    Args:
        mask: A PIL image (8 or 16 bits, palette or colour), an array or a tensor.
        colors: RGB of each class, of masks in colour. With it PIL images of 8 bits are read by their colours, palettes
            and grey ones too; without it by their numbers.
        ignore_index: For other colours, and for 0 where labels are reduced.
        reduce_labels: Whether the first class is 1.

    Raises:
        ValueError: If it is a JPEG, in colour without a table, or not whole numbers ``[H, W]``.
    """
    pixels = _whole_numbers(mask, by_color=colors is not None)
    if _is_in_color(pixels) and colors is not None:
        return _classes_of_colors(pixels, colors, ignore_index)
    if _is_in_color(pixels):
        raise ValueError(
            "is in colour: say the colour of each class, task=Segmentation(colors=[(128, 0, 0), ...]), or save "
            "masks of class numbers."
        )
    pixels = pixels[0] if pixels.ndim == 3 and len(pixels) == 1 else pixels
    if pixels.ndim != 2:
        raise ValueError(f"has shape {list(pixels.shape)}: {_PLAIN}.")
    classes = pixels.long()
    if not reduce_labels:
        return classes
    return torch.where((classes == 0) | (classes == ignore_index), ignore_index, classes - 1)


def unlisted_colors(mask: Any, colors: Colors) -> dict[tuple[int, ...], float]:
    """Return the colours of a mask that are none of the table, with their shares of its pixels, the largest first.

    Example:
        >>> import numpy as np
        >>> unlisted_colors(np.array([[[0, 0, 0], [1, 2, 3]]]), [(0, 0, 0)])
        {(1, 2, 3): 0.5}
    """
    pixels = _whole_numbers(mask, by_color=True)
    if not _is_in_color(pixels):
        return {}
    packed = _packed(pixels)
    found, counts = packed[~torch.isin(packed, _packed(torch.tensor(colors)))].unique(return_counts=True)
    largest = counts.argsort(descending=True, stable=True)
    unpacked = torch.stack([found >> 32, found >> 16 & 0xFFFF, found & 0xFFFF], -1)[largest].tolist()
    shares = (counts[largest] / packed.numel()).tolist()
    return {tuple(color): share for color, share in zip(unpacked, shares, strict=True)}


def _whole_numbers(mask: Any, *, by_color: bool) -> Tensor:
    """Return a mask as a tensor of any shape; ``by_color`` turns PIL images of 8 bits to RGB.

    Raises:
        ValueError: If it is a JPEG, or does not hold whole numbers.
    """
    import numpy as np

    if getattr(mask, "format", None) in _LOSSY:
        raise ValueError("is a JPEG, which changes class numbers and colours: make it again, and save masks as PNG.")
    if by_color and hasattr(mask, "convert") and not mask.mode.startswith(("I", "F")):
        mask = mask.convert("RGB")
    array = mask if isinstance(mask, Tensor) else np.array(mask)
    if not isinstance(array, Tensor) and array.dtype.kind not in "buif":
        raise ValueError(f"is of type {type(mask).__name__}: {_PLAIN}.")
    pixels = array if isinstance(array, Tensor) else torch.from_numpy(array)
    if pixels.is_floating_point():
        raise ValueError(f"has pixels of {pixels.dtype}: {_PLAIN}.")
    return pixels


def _is_in_color(pixels: Tensor) -> bool:
    return pixels.ndim == 3 and pixels.shape[-1] in (3, 4)


def _classes_of_colors(pixels: Tensor, colors: Colors, ignore_index: int) -> Tensor:
    packed = _packed(pixels)
    classes = torch.full_like(packed, ignore_index)
    for number, color in enumerate(_packed(torch.tensor(colors)).tolist()):
        classes[packed == color] = number
    return classes


def _packed(pixels: Tensor) -> Tensor:
    """Return one number for each colour ``[..., 3]`` of at most 16 bits."""
    red, green, blue = pixels[..., :3].long().unbind(-1)
    return red << 32 | green << 16 | blue


class TrainingCrop:
    """Crops, flips and colours an image ``[C, H, W]`` at random, and its mask ``[H, W]`` alike.

    Args:
        spec: How images are resized, and whether they have colour.
        size: Height and width that come out.
        min_crop: Smallest share of the area that is kept.
    """

    def __init__(self, spec: InputSpec, size: tuple[int, int], min_crop: float) -> None:
        from torchvision.transforms import InterpolationMode, v2

        aspect, hue = size[1] / size[0], 0.05 if spec.channels == 3 else 0
        ratio, scale = (_NARROWEST * aspect, aspect / _NARROWEST), (min_crop, 1.0)
        crop = v2.RandomResizedCrop(size, scale, ratio, interpolation=InterpolationMode(spec.interpolation))
        colour = v2.ColorJitter(_JITTER, _JITTER, _JITTER if spec.channels == 3 else 0, hue)
        self._transform = v2.Compose([crop, v2.RandomHorizontalFlip(), colour])

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return image and mask of the crop."""
        from torchvision import tv_tensors

        pixels, classes = self._transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return pixels.as_subclass(Tensor), classes.as_subclass(Tensor)


class WholeImage:
    """Resizes an image to what the student takes; the mask keeps its size, at which students are measured."""

    def __init__(self, spec: InputSpec, size: tuple[int, int]) -> None:
        self._resize = resize_transform(spec, size)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the resized image, and the mask as it is."""
        return self._resize(image), mask
