"""A saved student at work: from pictures to names and probabilities."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hetkd.data.folders import picture_files
from hetkd.data.pictures import open_picture
from hetkd.data.samples import as_picture
from hetkd.data.transforms import crop_transform, picture_tensor, resize_transform
from hetkd.distillation import Distillation
from hetkd.models.inputs import check_images
from hetkd.models.labels import model_labels
from hetkd.models.load import is_file, load_model
from hetkd.tasks.segmentation import resized
from hetkd.utils.checks import whole_number
from hetkd.utils.notebook import table

_BATCH = 64


class Prediction(NamedTuple):
    """What a student says of a picture.

    Attributes:
        image: Its path, or its number among those that were given.
        label: The likeliest class: its name, or its number where names are unknown.
        probability: Of that class.
        top: The likeliest classes with their probabilities, in order.
    """

    image: str
    label: str
    probability: float
    top: list[tuple[str, float]]

    def _repr_html_(self) -> str:
        """Return the likeliest classes as a table for notebooks."""
        rows = [(label, f"{100 * probability:.1f} %") for label, probability in self.top]
        return table(("class", "probability"), rows, above=self.image)


class PredictedMask(NamedTuple):
    """What a segmenter says of a picture.

    Attributes:
        image: Its path, or its number among those that were given.
        mask: The class of each pixel, ``[H, W]``, int64, at the size of the picture.
        shares: Share of the pixels of each class that occurs, by name, the largest first.
    """

    image: str
    mask: Tensor
    shares: dict[str, float]


class Student:
    """A trained model that knows how its pictures are prepared and what its classes are called.

    Args:
        model: As `hetkd.load_model` returns it.

    Attributes:
        model: The module.
        distillation: What prepares images for it, and reads its logits.
        classes: Names of its classes in the order of the logits.
        size: Height and width in pixels that pictures are brought to.
    """

    def __init__(self, model: nn.Module) -> None:
        self.distillation = Distillation(None, model.eval(), "ce")
        tap = self.distillation.student_tap
        self.model, self.size, self._spec = model, tap.size, tap.spec
        labels = model_labels(model, tap.classes)
        count = tap.classes or 0
        if labels is not None and labels.certain:
            self.distillation.class_names = [names[0] for names in labels.names]
        self.classes = [str(n) for n in range(count)] if labels is None else [names[0] for names in labels.names]

    @torch.no_grad()
    def predict(self, images: Any, *, top: int = 5) -> Any:
        """Name what is on pictures, or of a segmenter what is at each pixel.

        Args:
            images: A picture: a path, a PIL image, an array ``[H, W, C]`` or a tensor ``[C, H, W]`` (uint8, or float in
                [0, 1]). Or several: a folder, a list of these, a tensor ``[B, C, H, W]``.
            top: How many classes to name.

        Returns:
            One `Prediction` or `PredictedMask`, or a list of them in the order of the pictures (of a folder: sorted by
            path).

        Raises:
            FileNotFoundError: If there is no such file.
            TypeError: If it is none of these.
            ValueError: If a folder has no pictures, or images have a wrong rank, channel count or range.
            OSError: If a file cannot be read.

        Example:
            >>> student = Student(load_model("timm:test_resnet", pretrained=False, num_classes=3))
            >>> len(student.predict(torch.rand(2, 3, 80, 100)))
            2
        """
        whole_number("top", top)
        pictures, names, single = _listed(images)
        is_dense = self.distillation.task.is_dense
        found: list[Any] = []
        for start in range(0, len(pictures), _BATCH):
            prepared, sizes = [], []
            for picture in pictures[start : start + _BATCH]:
                pixels = self._pixels(picture)
                prepared.append(self._prepared(pixels))
                sizes.append(pixels.shape[1:])
            logits = self.distillation.predict(torch.stack(prepared)).float().cpu()
            for name, size, row in zip(names[start : start + _BATCH], sizes, logits, strict=True):
                found.append(self._masked(name, row, size) if is_dense else self._named(name, row.softmax(0), top))
        return found[0] if single else found

    def _pixels(self, picture: Any) -> Tensor:
        picture = open_picture(picture) if isinstance(picture, (str, Path)) else as_picture(picture)
        if not (isinstance(picture, Tensor) or hasattr(picture, "convert")):
            raise TypeError(
                f"a picture must be a path, a PIL image, an array [H, W, C] or a tensor [C, H, W], got "
                f"{type(picture).__name__}; several come in a list: predict(list(pictures)). Bytes of a file: "
                "PIL.Image.open(io.BytesIO(data))."
            )
        if not isinstance(picture, Tensor):
            return picture_tensor(picture, self._spec)
        check_images(picture[None], self._spec.channels, look_at_values=True, normalized=False)
        return picture

    def _prepared(self, pixels: Tensor) -> Tensor:
        if self.distillation.task.is_dense:  # all of the picture counts
            pixels = resize_transform(self._spec, self.size)(pixels)
        else:
            pixels = crop_transform(self._spec, self.size, train=False)(pixels)
        return pixels / 255 if pixels.dtype == torch.uint8 else pixels.clamp(0, 1)  # bicubic goes beyond

    def _masked(self, name: str, logits: Tensor, size: Sequence[int]) -> PredictedMask:
        mask = resized(logits[None], size).argmax(1)[0]
        classes, counts = mask.unique(return_counts=True)
        shares = {self.classes[int(c)]: float(n) / mask.numel() for c, n in zip(classes, counts, strict=True)}
        return PredictedMask(name, mask, dict(sorted(shares.items(), key=lambda item: -item[1])))

    def _named(self, name: str, probabilities: Tensor, top: int) -> Prediction:
        values, places = probabilities.topk(min(top, len(probabilities)))
        ranked = [(self.classes[int(place)], float(value)) for value, place in zip(values, places, strict=True)]
        return Prediction(name, *ranked[0], ranked)


def load_student(path: str | Path) -> Student:
    """Load a saved student by its path alone.

    Args:
        path: ``FILE.safetensors`` that hetkd saved, or a directory of a Hugging Face model.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If the file does not say which model it is.

    Example:
        >>> load_student("resnet18.safetensors").predict("photo.jpg")  # doctest: +SKIP
        Prediction(image='photo.jpg', label='otter', probability=0.93, top=[('otter', 0.93), ...])
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    return Student(load_model(str(path) if is_file(path.name) else f"hf:{path}"))


def _listed(images: Any) -> tuple[Sequence[Any], list[str], bool]:
    """Return pictures one by one, their names, and whether a single one was given."""
    if isinstance(images, (str, Path)):
        path = Path(images).expanduser()
        if path.is_dir():
            files = picture_files(path)
            return files, [str(file) for file in files], False
        return [path], [str(path)], True
    if isinstance(images, (list, tuple)):
        return images, [str(x) if isinstance(x, (str, Path)) else str(n) for n, x in enumerate(images)], False
    if isinstance(images, Tensor) and images.ndim == 4:
        return list(images), [str(n) for n in range(len(images))], False
    return [images], ["0"], True
