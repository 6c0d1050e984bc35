"""Loaders from what people have: folders, datasets, tensors, loaders."""

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from hetkd.data.classes import class_names, label_map
from hetkd.data.folders import open_folder
from hetkd.data.memory import TensorImages as TensorImages
from hetkd.data.memory import in_memory
from hetkd.data.pictures import (
    UnreadableImage,
    check_is_picture,
    is_of_content,
    is_transparent,
    name_of,
    raise_for_content,
)
from hetkd.data.samples import Keys, as_picture, check_alike, checked_label, images_and_labels, keys_of
from hetkd.data.seeding import sample_seed, seeded
from hetkd.data.transforms import image_transform
from hetkd.models.inputs import InputSpec


class TransformedImages(Dataset[Any]):
    """A dataset of (PIL image, label) or PIL images, with a transform on the images; tensors pass as they are.

    Args:
        dataset: The images; it may augment them at random itself.
        transform: From a PIL image to a tensor.
        seed: In training: what is random about a sample is a pure function of seed, epoch and index. ``None``: nothing
            is random.
        skip_unreadable: Take the next readable image in the place of one that cannot be read.
        keys: Where images and labels are in samples that are dicts.

    Attributes:
        unreadable: Which images could not be read so far; loading processes write it too.
        transparent: Whether any image had to be laid on a background.
        class_names: Names of the classes in the order of the labels that come out, or ``None`` if they are unknown.
        label_map: The label that comes out for each label of the dataset, if they differ.
        notes: What a person should know of the dataset.
    """

    has_masks = False

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any], Tensor],
        seed: int | None = None,
        *,
        skip_unreadable: bool = False,
        keys: Keys = Keys(),  # noqa: B008  (a constant)
    ) -> None:
        self.dataset, self.transform, self.seed, self.skip_unreadable = dataset, transform, seed, skip_unreadable
        self.keys = keys_of(dataset, keys)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loading processes outlive an epoch
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self.transparent = torch.zeros((), dtype=torch.bool).share_memory_()
        self.is_transparency_said = False
        self.class_names = class_names(dataset, self.keys.label)
        self.label_map: list[int] | None = None
        self.notes: list[str] = list(getattr(dataset, "notes", []))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for readable in range(index, index + len(self)):
            try:
                return self._load(readable % len(self))
            except Exception as error:
                if not is_of_content(error):
                    raise
                if not self.skip_unreadable:
                    choice = "" if self.seed is None else ", or train with unreadable='skip'"
                    reason = str(error) if isinstance(error, UnreadableImage) else f"cannot be read ({error})"
                    name = "" if isinstance(error, UnreadableImage) else f"{name_of(self.dataset, readable)} "
                    raise UnreadableImage(f"{name}{reason}: repair or remove it{choice}.") from error
                self.unreadable[readable % len(self)] = True
        raise UnreadableImage("no image of the data set can be read.")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return the samples of a batch; PyTorch's loader asks for them in this way."""
        samples = [self[index] for index in indices]
        check_alike(samples, lambda number: self.name_of(indices[number]))
        return samples

    def _load(self, index: int) -> Any:
        with nullcontext() if self.seed is None else seeded(sample_seed(self.seed, self.epoch, index)):
            image, label = self.as_it_is(index)
            if not isinstance(image, Tensor):
                if is_transparent(image):
                    self.transparent.fill_(True)
                try:
                    image = self.transform(image)
                except Exception as error:
                    raise_for_content(name_of(self.dataset, index), error)
        if label is None:
            return image
        label = checked_label(label, name_of(self.dataset, index)) if isinstance(label, str) else label
        return image, label if self.label_map is None else self._mapped(label, index)

    def _mapped(self, label: Any, index: int) -> int:
        assert self.label_map is not None
        try:
            number = operator.index(label)
        except TypeError:  # soft labels, floats
            number = -1
        if not 0 <= number < len(self.label_map):
            raise ValueError(
                f"{self.name_of(index)} has the label {label!r}, but labels that follow names must be class numbers "
                f"from 0 to {len(self.label_map) - 1}."
            )
        return self.label_map[number]

    def for_evaluation(self, spec: InputSpec, size: tuple[int, int]) -> "TransformedImages":
        """Return the same images as another model is evaluated on them; unreadable ones are passed over."""
        whole = TransformedImages(
            self.dataset, image_transform(spec, size, train=False), keys=self.keys, skip_unreadable=True
        )
        whole.label_map = self.label_map
        return whole

    def picture(self, index: int) -> Any:
        """Return an image as it is, before the transform.

        Raises:
            TypeError: If it is no image.
            UnreadableImage: If its content is damaged.
        """
        return self.as_it_is(index)[0]

    def as_it_is(self, index: int) -> tuple[Any, Any]:
        """Return an image before the transform and its label or ``None``; errors as of `picture`."""
        sample = self.dataset[index]
        image, label = (None, None) if sample is None else images_and_labels(sample, self.keys)
        image = as_picture(image)
        check_is_picture(image, self.dataset, index)
        return image, label

    def leave_out(self, indices: Iterable[int]) -> None:
        """Leave images out, before any loader is iterated."""
        left_out = set(indices)
        self.keep([index for index in range(len(self)) if index not in left_out])

    def keep(self, indices: Sequence[int]) -> None:
        """Keep these images alone, before any loader is iterated."""
        self.dataset = Subset(self.dataset, indices)
        self.unreadable = torch.zeros(len(self.dataset), dtype=torch.bool).share_memory_()

    def order_classes(self, classes: Sequence[str], other: str, what: str) -> list[str]:
        """Map labels to the numbers of their classes among ``classes``, by name; return those that are missing here.

        Args:
            classes: In the order of the student's outputs.
            other: Where these names come from, for errors.
            what: Name of the argument, for errors.

        Raises:
            ValueError: If a class here is none of them.
        """
        if self.class_names is None:
            return []
        numbers, missing = label_map(self.class_names, classes, what, other)
        self.label_map = None if numbers == list(range(len(numbers))) else numbers
        self.class_names = list(classes)
        return missing

    @property
    def epoch(self) -> int:
        """The epoch that randomness depends on."""
        return int(self._epoch)

    def start_epoch(self, epoch: int) -> None:
        """Set `epoch`, in loading processes too, before a loader is iterated."""
        self._epoch.fill_(epoch)

    def name_of(self, index: int) -> str:
        """Return the path of an image where the dataset knows it, else its index."""
        return name_of(self.dataset, index)


def make_loader(
    data: Any,
    *,
    what: str,
    spec: InputSpec,
    size: tuple[int, int],
    batch_size: int,
    train: bool,
    num_workers: int,
    seed: int = 0,
    skip_unreadable: bool = False,
    keys: Keys = Keys(),  # noqa: B008  (a constant)
    min_crop: float = 0.08,
    sampler: Callable[[Any], Sampler[int]] | None = None,
    wrap: Callable[[TransformedImages], Dataset[Any]] | None = None,
    make: Callable[..., Any] | None = None,
) -> Iterable[Any]:
    """Make a loader of batches of images and labels.

    Args:
        data: A folder of class folders, a dataset of (image, label) or of Hugging Face's dicts, tensors ``(images,
            labels)``, or a loader, which is returned as it is. Without labels: a folder of images, a dataset of images,
            a tensor of images.
        what: Name of the argument, for errors.
        spec: Of the student: colour or grey images, and how PIL images are resized and cropped.
        size: Height and width to resize PIL images to.
        batch_size: Images a batch.
        train: Shuffle, drop the last incomplete batch, and crop and flip PIL images at random.
        num_workers: Loading processes.
        seed: Of what is random about single training images.
        skip_unreadable: See `TransformedImages`.
        keys: See `TransformedImages`.
        min_crop: Smallest share of a training picture's area that its random crop keeps.
        sampler: Makes the sampler of the dataset, instead of a plain one; a loader keeps its own.
        wrap: Makes another dataset of the one that would be loaded; then a loader is refused.
        make: Makes the dataset; ``None``: `make_dataset`.

    Raises:
        FileNotFoundError: If the folder does not exist.
        TypeError: If ``data`` is none of these.
        ValueError: If it is empty.
    """
    loading: dict[str, Any] = {"seed": seed, "skip_unreadable": skip_unreadable, "keys": keys, "min_crop": min_crop}
    dataset: Any = (make or make_dataset)(data, what=what, spec=spec, size=size, train=train, **loading)
    if wrap is not None:
        dataset = wrap(as_single_images(dataset, what, seed))
    elif is_loader(dataset):
        return _taking_no_keys(dataset, keys, what)
    drop_last = train and len(dataset) >= batch_size
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=train if sampler is None else None,
        sampler=None if sampler is None else sampler(dataset),
        drop_last=drop_last,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available() and not isinstance(dataset, TensorImages),
        collate_fn=_as_it_is if isinstance(dataset, TensorImages) else getattr(dataset, "collate", None),
    )


def _taking_no_keys(loader: Iterable[Any], keys: Keys, what: str) -> Iterable[Any]:
    for name, key in keys._asdict().items():
        if key is not None:
            raise ValueError(
                f"{name}_key={key!r} is for data sets, but {what} is a loader: give its data set, or have the loader's "
                "collate_fn name them 'image' and 'label'."
            )
    return loader


def make_dataset(
    data: Any,
    *,
    what: str,
    spec: InputSpec,
    size: tuple[int, int],
    train: bool,
    seed: int = 0,
    skip_unreadable: bool = False,
    keys: Keys = Keys(),  # noqa: B008  (a constant)
    min_crop: float = 0.08,
) -> Any:
    """Make a dataset of what `make_loader` takes; a loader is returned as it is."""
    data = open_data(open_folder(Path(data), what) if isinstance(data, (str, Path)) else data, what)
    if is_loader(data) or isinstance(data, TensorImages):
        return data
    transform = image_transform(spec, size, train, min_crop)
    return TransformedImages(data, transform, seed if train else None, skip_unreadable=skip_unreadable, keys=keys)


def open_data(data: Any, what: str) -> Any:
    """Return tensors and arrays as a `TensorImages`, and datasets and loaders as they are.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is empty.
    """
    data = in_memory(data, what)
    _refuse_empty(data, what)
    if is_loader(data) or isinstance(data, TensorImages):
        return data
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(
            f"{what} must be a folder, a dataset, tensors (images, labels) or a loader, got {type(data).__name__}."
        )
    return data


def as_single_images(dataset: Any, what: str, seed: int) -> TransformedImages:
    """Return a dataset whose images have numbers, on which a teacher cache is founded.

    Raises:
        TypeError: If it is a loader.
    """
    if is_loader(dataset):
        raise TypeError(f"{what} is a loader, whose images have no numbers; a teacher cache needs a dataset.")
    return dataset if isinstance(dataset, TransformedImages) else TransformedImages(dataset, _as_it_is, seed)


def has_labels(loader: Iterable[Any]) -> bool | None:
    """Say whether the samples of a loader have labels; ``None`` if it is not one of `make_loader`'s own."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, TensorImages):
        return dataset.labels is not None
    if not isinstance(dataset, TransformedImages):
        return None
    if hasattr(dataset.dataset, "samples") or dataset.has_masks:  # a folder of class folders, or a mask an image
        return True
    try:
        return dataset.as_it_is(0)[1] is not None
    except (OSError, SyntaxError):  # which is said where it is loaded
        return None


def is_loader(data: Any) -> bool:
    """Say whether data come in batches already, or one after another without numbers."""
    return isinstance(data, DataLoader) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__"))


def _refuse_empty(data: Any, what: str) -> None:
    if length(data) == 0:
        hint = ": fewer samples than batch_size with drop_last=True?" if isinstance(data, DataLoader) else ""
        raise ValueError(f"{what} is empty{hint}.")


def length(data: Any) -> int | None:
    """Return the length of a data set or loader, or ``None`` if it has none, as a stream and its ``DataLoader``."""
    try:
        return len(data)
    except TypeError:
        return None


def _as_it_is(batch: Any) -> Any:
    return batch
