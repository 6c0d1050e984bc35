"""A saved student at work: from pictures to names and probabilities."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hetkd.data.folders import picture_files
from hetkd.data.images import crop_transform, image_transform
from hetkd.data.pictures import open_picture
from hetkd.data.samples import as_picture
from hetkd.distillation import Distillation
from hetkd.models.inputs import check_images
from hetkd.models.labels import model_labels
from hetkd.models.load import is_file, load_model
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
    def predict(self, images: Any, *, top: int = 5) -> "Prediction | list[Prediction]":
        """Name what is on pictures.

        Args:
            images: A picture: a path, a PIL image, an array ``[H, W, C]`` or a tensor ``[C, H, W]`` (uint8, or float in
                [0, 1]). Or several: a folder, a list of these, a tensor ``[B, C, H, W]``.
            top: How many classes to name.

        Returns:
            One prediction, or a list of them in the order of the pictures (of a folder: sorted by path).

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a folder has no pictures, or images have a wrong rank, channel count or range.
            OSError: If a file cannot be read.

        Example:
            >>> student = Student(load_model("timm:test_resnet", pretrained=False, num_classes=3))
            >>> len(student.predict(torch.rand(2, 3, 80, 100)))
            2
        """
        whole_number("top", top)
        pictures, names, single = _listed(images)
        found: list[Prediction] = []
        for start in range(0, len(pictures), _BATCH):
            batch = torch.stack([self._prepared(picture) for picture in pictures[start : start + _BATCH]])
            probabilities = self.distillation.predict(batch).float().softmax(1).cpu()
            part = zip(names[start : start + _BATCH], probabilities, strict=True)
            found += [self._named(name, row, top) for name, row in part]
        return found[0] if single else found

    def _prepared(self, picture: Any) -> Tensor:
        picture = open_picture(picture) if isinstance(picture, (str, Path)) else as_picture(picture)
        if not isinstance(picture, Tensor):
            return image_transform(self._spec, self.size, train=False)(picture) / 255
        check_images(picture[None], self._spec.channels, look_at_values=True, normalized=False)
        pixels = crop_transform(self._spec, self.size, train=False)(picture)
        return pixels / 255 if pixels.dtype == torch.uint8 else pixels.clamp(0, 1)  # bicubic goes beyond

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
