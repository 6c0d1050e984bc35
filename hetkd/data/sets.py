"""Data sets by name: a folder with splits, or ``hf:NAME`` of Hugging Face's hub; as they are, or in memory."""

import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetkd.data.classes import class_names
from hetkd.data.folders import open_folder
from hetkd.data.images import TransformedImages, make_dataset
from hetkd.models.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSpec

CACHE = Path.home() / ".cache" / "hetkd"
SYSTEM_FASHION = Path("/usr/share/datasets/fashion-mnist")
MOST_BYTES = 8 << 30
Labelled = tuple[Tensor, Tensor]


class Splits(NamedTuple):
    """Training and validation data, as `hetkd.Distiller.fit` takes them, and the names of the classes."""

    train: Any
    val: Any
    classes: list[str]


def load_splits(name: str) -> Splits:
    """Return the splits of a data set.

    Args:
        name: A folder with ``train/`` and ``val/``, one folder of images a class each, or ``hf:NAME``.

    Raises:
        ValueError: If a split or the labels are missing.
        ImportError: If Hugging Face's datasets is needed and not installed.
    """
    if name.startswith("hf:"):
        train, val = hub_splits(name)
        return Splits(train, val, _classes_of(train, name))
    splits = {split: Path(name) / split for split in ("train", "val") if (Path(name) / split).is_dir()}
    if len(splits) < 2:
        raise ValueError(f"{name!r} needs the folders train/ and val/, one folder of images a class each.")
    return Splits(str(splits["train"]), str(splits["val"]), _classes_of(open_folder(splits["train"], "train"), name))


def hub_splits(name: str, *, streaming: bool = False) -> tuple[Any, Any]:
    """Return the splits of ``hf:NAME`` to train and to evaluate on: validation images, or else the test images.

    Raises:
        ValueError: If a split is missing.
        ImportError: If datasets is not installed.
    """
    found = import_datasets(name).load_dataset(name.removeprefix("hf:"), streaming=streaming)
    val = next((found[split] for split in ("validation", "val", "test") if split in found), None)
    if "train" not in found or val is None:
        raise ValueError(f"{name!r} has the splits {list(found)}; it needs train and validation or test.")
    return found["train"], val


def import_datasets(name: str) -> Any:
    """Import Hugging Face's datasets, for the data set ``name``.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{name!r} needs Hugging Face's datasets: pip install datasets.") from None
    return datasets


@dataclass(frozen=True)
class ImageData:
    """A data set in memory; small sets stay on the device and are augmented there.

    Attributes:
        name: Its name.
        train: Images uint8 ``[N, C, H, W]`` and labels int64 ``[N]``.
        test: The same.
        classes: Number of classes.
    """

    name: str
    train: Labelled
    test: Labelled
    classes: int

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.train[0].shape[1]

    @property
    def pixels(self) -> int:
        """Height of the images."""
        return self.train[0].shape[2]

    @property
    def digest(self) -> str:
        """A digest of the training images and labels."""
        digest = hashlib.sha256()
        for part in self.train:
            digest.update(part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device) -> "ImageData":
        """Return the same data on a device."""
        train, test = (tuple(part.to(device) for part in split) for split in (self.train, self.test))
        return ImageData(self.name, (train[0], train[1]), (test[0], test[1]), self.classes)

    def first(self, train_images: int | None) -> "ImageData":
        """Return the data with at most so many training images, spread as evenly over the classes as possible."""
        images, labels = self.train
        if train_images is None or train_images >= len(labels):
            return self
        of_class = [(labels == label).nonzero()[:, 0] for label in range(self.classes)]
        rank = torch.empty_like(labels)
        for indices in of_class:
            rank[indices] = torch.arange(len(indices), device=labels.device)
        chosen = rank.argsort(stable=True)[:train_images].sort().values  # the first of each class, the second, ...
        return ImageData(self.name, (images[chosen], labels[chosen]), self.test, self.classes)


def load_images(name: str, pixels: int = 64) -> ImageData:
    """Load a data set into memory.

    Args:
        name: ``"cifar100"`` or ``"fashion-mnist"`` (found or downloaded), ``"hf:NAME"``, or a folder: with ``train/``
            and ``val/`` (or ``test/``), or with the four files of an MNIST-like set.
        pixels: For images of many sizes: the shorter side is resized to it and the middle cut out, as `evaluate` does
            for the models of `hetkd.models.build_small`.

    Raises:
        ValueError: If there is no such data set, or it does not fit in memory.
    """
    if name == "cifar100":
        return ImageData(name, cifar100_split("train"), cifar100_split("test"), 100)
    if name == "fashion-mnist":
        return _idx(name, _fashion_folder())
    if name.startswith("hf:"):
        return _in_memory(name, *hub_splits(name), pixels)
    if any(Path(name).glob("*-idx3-ubyte.gz")):
        return _idx(Path(name).resolve().name, Path(name))
    if Path(name).is_dir():
        return _folder(Path(name), pixels)
    raise ValueError(f"{name!r} is none of cifar100, fashion-mnist, hf:NAME, and no folder.")


def cifar100_split(split: str) -> Labelled:
    """Return CIFAR-100's ``"train"`` or ``"test"`` images, uint8 ``[N, 3, 32, 32]``, and their fine labels.

    They come from ``$HETKD_DATA/cifar100`` (a WebP strip of all images a class) where it exists, else from torchvision.
    """
    import numpy as np
    from PIL import Image

    strips = Path(os.environ.get("HETKD_DATA", "")) / "cifar100"
    if not (strips / "classes.txt").exists():
        from torchvision.datasets import CIFAR100

        data = CIFAR100(str(CACHE), train=split == "train", download=True)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
    names = (strips / "classes.txt").read_text().split()
    images = []
    for name in names:  # image k is rows 32 k to 32 k + 31
        pixels = np.asarray(Image.open(strips / split / f"{name}.webp").convert("RGB"))
        images.append(torch.from_numpy(pixels.reshape(-1, 32, 32, 3).copy()).permute(0, 3, 1, 2))
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(strip) for strip in images]))
    return torch.cat(images).contiguous(), labels


def _fashion_folder() -> Path:
    if SYSTEM_FASHION.is_dir():
        return SYSTEM_FASHION
    from torchvision.datasets import FashionMNIST

    FashionMNIST(str(CACHE), download=True)
    return CACHE / "FashionMNIST" / "raw"


def _idx(name: str, folder: Path) -> ImageData:
    import numpy as np

    def read(split: str) -> Labelled:
        pixels = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
        images = torch.from_numpy(np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy())
        return images, torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))

    train, test = read("train"), read("t10k")
    return ImageData(name, train, test, int(train[1].max()) + 1)


def _folder(path: Path, pixels: int) -> ImageData:
    val = next((path / split for split in ("val", "test") if (path / split).is_dir()), None)
    if val is None or not (path / "train").is_dir():
        raise ValueError(f"{str(path)!r} needs train/ and val/ (or test/) with one folder a class each.")
    return _in_memory(path.resolve().name, str(path / "train"), str(val), pixels)


def _in_memory(name: str, train: Any, val: Any, pixels: int) -> ImageData:
    """Load both splits as `hetkd.Distiller.evaluate` does for the models of `hetkd.models.build_small`."""
    spec = InputSpec(3, (pixels, pixels), IMAGENET_MEAN, IMAGENET_STD, crop_ratio=1.0)
    splits = [
        make_dataset(data, what=what, spec=spec, size=spec.size, train=False)
        for data, what in ((train, "train"), (val, "val"))
    ]
    classes = _classes_of(splits[0], name)
    splits[1].order_classes(classes, "train", "val")
    loaded = [_decode(split, pixels, name) for split in splits]
    return ImageData(name, loaded[0], loaded[1], len(classes))


def _classes_of(dataset: Any, name: str) -> list[str]:
    """Return the names of the classes.

    Raises:
        ValueError: If there are none.
    """
    classes = dataset.class_names if isinstance(dataset, TransformedImages) else class_names(dataset)
    if not classes:
        raise ValueError(f"{name!r} names no classes: it needs one folder a class, or a ClassLabel column.")
    return list(classes)


def _decode(dataset: TransformedImages, pixels: int, name: str) -> Labelled:
    count = len(dataset)
    if count * 3 * pixels**2 > MOST_BYTES:
        raise ValueError(f"{name!r} takes {count * 3 * pixels**2 >> 30} GB at {pixels} px: use fewer pixels.")
    images, labels = torch.empty(count, 3, pixels, pixels, dtype=torch.uint8), torch.empty(count, dtype=torch.int64)
    for index in range(count):
        images[index], labels[index] = dataset[index]
    return images, labels
