"""Image classification data for the recipes, as uint8 tensors: small sets stay on the device, and are augmented there.

| name | what |
|---|---|
| `fashion` | the embedded subset of Fashion-MNIST: 5,000 + 2,000 grey images of 28 px |
| `fashion-full` | all of it: 60,000 + 10,000 |
| `cifar100` | 50,000 + 10,000 colour images of 32 px, from `$HETKD_DATA/cifar100` or downloaded by torchvision |
| `FOLDER` | `train/CLASS/*.jpg` and `val/CLASS/*.jpg` (or `test/`), resized to `--pixels` |
| `hf:NAME` | a Hugging Face dataset (`pip install datasets`), resized to `--pixels` |
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fashion
import kornia.augmentation as K
import numpy as np
import torch
from hub import hub_splits
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.transforms import v2

REPOSITORY = Path(__file__).parent.parent
CACHE = Path.home() / ".cache" / "hetkd"
MOST_BYTES = 8 << 30
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    Attributes:
        name: As the user gave it.
        train: Images uint8 ``[N, C, H, W]`` and labels int64 ``[N]``.
        test: The same.
        classes: Their number.
    """

    name: str
    train: Data
    test: Data
    classes: int

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.train[0].shape[1]

    @property
    def pixels(self) -> int:
        """The longer side of an image."""
        return max(self.train[0].shape[2:])

    @property
    def digest(self) -> str:
        """A digest of the training images and labels."""
        digest = hashlib.sha256()
        for part in self.train:
            digest.update(part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device) -> "ImageData":
        """Returns the same data on a device."""
        train, test = (tuple(part.to(device) for part in split) for split in (self.train, self.test))
        return ImageData(self.name, (train[0], train[1]), (test[0], test[1]), self.classes)

    def first(self, train_images: int | None) -> "ImageData":
        """Returns the data with at most so many training images, as evenly spread over the classes as it goes."""
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
    """Loads a data set by its name in the table above.

    Args:
        name: Of the data set.
        pixels: Of images that come in many sizes: the shorter side is resized to it, the middle cut out.

    Raises:
        ValueError: If there is no such data set, or it does not fit in memory.
    """
    if name in ("fashion", "fashion-full"):
        folder = fashion.SUBSET if name == "fashion" else fashion.whole_set_folder()
        return ImageData(name, fashion.read_split(folder, "train"), fashion.read_split(folder, "t10k"), 10)
    if name == "cifar100":
        return ImageData(name, cifar100_split("train"), cifar100_split("test"), 100)
    if name.startswith("hf:"):
        return _hugging_face(name, pixels)
    if Path(name).is_dir():
        return _folder(Path(name), pixels)
    raise ValueError(f"--dataset {name!r} is none of fashion, fashion-full, cifar100, hf:NAME, and no folder.")


def cifar100_split(split: str) -> Data:
    """Returns CIFAR-100's ``"train"`` or ``"test"`` images, uint8 ``[N, 3, 32, 32]``, and their fine labels."""
    strips = Path(os.environ.get("HETKD_DATA", REPOSITORY.parent / "shared" / "data")) / "cifar100"
    if not strips.is_dir():
        data = CIFAR100(str(CACHE), train=split == "train", download=True)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
    names = (strips / "classes.txt").read_text().split()
    images = []
    for name in names:  # one strip a class: image k is rows 32 k to 32 k + 31
        pixels = np.asarray(Image.open(strips / split / f"{name}.webp").convert("RGB"))
        images.append(torch.from_numpy(pixels.reshape(-1, 32, 32, 3).copy()).permute(0, 3, 1, 2))
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(strip) for strip in images]))
    return torch.cat(images).contiguous(), labels


def augmentation(data: ImageData) -> nn.Module:
    """Returns the augmentation of small images, for the device: a shift of up to an eighth (colour images), a flip."""
    shift = [] if data.channels == 1 else [K.RandomCrop((data.pixels, data.pixels), padding=data.pixels // 8)]
    return K.AugmentationSequential(*shift, K.RandomHorizontalFlip(p=0.5), data_keys=["input"])


def _folder(path: Path, pixels: int) -> ImageData:
    test = next((path / split for split in ("val", "test") if (path / split).is_dir()), None)
    if test is None or not (path / "train").is_dir():
        raise ValueError(f"--dataset {str(path)!r} needs train/ and val/ (or test/) with one folder a class each.")
    splits = [ImageFolder(str(path / "train")), ImageFolder(str(test))]
    if splits[0].classes != splits[1].classes:
        raise ValueError(f"--dataset {str(path)!r}: {test.name}/ has other classes than train/.")
    train, evaluation = (_decode(split, len(split), pixels, path.resolve().name) for split in splits)
    return ImageData(path.resolve().name, train, evaluation, len(splits[0].classes))


def _hugging_face(name: str, pixels: int) -> ImageData:
    splits = hub_splits(name, "--dataset")
    features = splits[0].features
    image, label = (_column(name, features, kind) for kind in ("Image", "ClassLabel"))

    def pairs(split: Any) -> Iterable[tuple[Any, int]]:
        return ((sample[image], sample[label]) for sample in split)

    train, evaluation = (_decode(pairs(split), len(split), pixels, name) for split in splits)
    return ImageData(name, train, evaluation, features[label].num_classes)


def _column(name: str, features: Any, kind: str) -> str:
    columns = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if not columns:
        raise ValueError(f"--dataset {name!r} has the columns {list(features)}, none of which is a {kind}.")
    return columns[0]


def _decode(samples: Iterable[tuple[Any, int]], count: int, pixels: int, name: str) -> Data:
    if count * 3 * pixels**2 > MOST_BYTES:
        raise ValueError(
            f"--dataset {name!r} takes {count * 3 * pixels**2 >> 30} GB at {pixels} px: use fewer --pixels."
        )
    transform: Callable[[Any], Tensor] = v2.Compose(
        [v2.PILToTensor(), v2.Resize(pixels, antialias=True), v2.CenterCrop(pixels)]
    )
    images, labels = torch.empty(count, 3, pixels, pixels, dtype=torch.uint8), torch.empty(count, dtype=torch.int64)
    for index, (image, label) in enumerate(samples):
        images[index], labels[index] = transform(image.convert("RGB")), label
    return images, labels
