"""What a report shows: answers of all models to the same images, their calibration, their features."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from hetkd.data.images import TensorImages, TransformedImages, make_loader
from hetkd.data.samples import Keys, images_and_labels
from hetkd.data.survey import spread
from hetkd.distillation import Distillation
from hetkd.features.grid import to_grid
from hetkd.features.hooks import eval_mode
from hetkd.features.tap import Tap
from hetkd.models.load import load_model
from hetkd.spectral import dwt2
from hetkd.training.evaluate import eval_loader

BINS = 10
_MOST_OF_A_LOADER, _BATCH, _COMPARED, _GRID, _LEVELS = 2048, 64, 256, 8, 2


@dataclass(frozen=True)
class Answers:
    """What a model answers to the images.

    Attributes:
        probabilities: ``[N, classes]``, float32.
        labels: ``[N]``.
    """

    probabilities: Tensor
    labels: Tensor

    @property
    def classes(self) -> Tensor:
        """The likeliest class of each image, ``[N]``."""
        return self.probabilities.argmax(1)

    @property
    def right(self) -> Tensor:
        """Whether it is the label, ``[N]``."""
        return self.classes == self.labels

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * self.right.double().mean().item()

    @property
    def top5(self) -> float:
        """In percent; with fewer than five classes, all of them count."""
        best = self.probabilities.topk(min(5, self.probabilities.shape[1])).indices
        return 100 * (best == self.labels[:, None]).any(1).double().mean().item()

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return F.nll_loss(self.probabilities.clamp(min=1e-12).log(), self.labels).item()

    def of_class(self, count: int) -> list[float | None]:
        """Return top-1 of each class in percent; ``None`` for a class without images."""
        images = self.labels.bincount(minlength=count)
        right = self.labels[self.right].bincount(minlength=count)
        return [100 * int(r) / int(n) if n else None for r, n in zip(right, images, strict=True)]

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """Return the pairs (label, answer) that are confused most, with how often."""
        pairs = torch.stack([self.labels, self.classes], 1)[~self.right]
        if not len(pairs):
            return []
        found, counts = pairs.unique(dim=0, return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:most]
        return [(int(a), int(b), int(n)) for (a, b), n in zip(found[order], counts[order], strict=True)]

    def reliability(self) -> list[tuple[float, float, int]]:
        """Return mean confidence, accuracy and number of images for ten bins of equal width that hold some."""
        confidence = self.probabilities.max(1).values
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        held = [bins == number for number in range(BINS)]
        return [
            (confidence[b].mean().item(), self.right[b].double().mean().item(), int(b.sum())) for b in held if b.any()
        ]

    @property
    def calibration_error(self) -> float:
        """The expected calibration error in percent (Guo et al., arXiv 1706.04599), ten bins of equal width.

        Example:
            >>> sure_and_right = torch.eye(3)
            >>> Answers(sure_and_right, torch.arange(3)).calibration_error
            0.0
        """
        return 100 * sum(n * abs(c - a) for c, a, n in self.reliability()) / len(self.labels)


def report_images(distillation: Distillation, val: Any, keys: Keys, most: int) -> Any:
    """Return the images of a report as data with numbers; of a loader the first 2,048, in memory."""
    inputs = distillation.student_inputs
    loading: dict[str, Any] = {"spec": inputs.spec, "size": inputs.size, "num_workers": 0, "keys": keys}
    loader: Any = make_loader(val, what="val", batch_size=_BATCH, train=False, **loading)
    if not isinstance(getattr(loader, "dataset", None), (TransformedImages, TensorImages)):
        parts = [images_and_labels(batch) for batch in itertools.islice(loader, -(-_MOST_OF_A_LOADER // _BATCH))]
        return torch.cat([x for x, _ in parts]), torch.cat([torch.as_tensor(y) for _, y in parts])
    if isinstance(loader.dataset, TensorImages) and loader.dataset.labels is not None:
        chosen = spread(len(loader.dataset), most)
        return loader.dataset.images[chosen], loader.dataset.labels[chosen]
    return val


@torch.inference_mode()
def answers(distillation: Distillation, val: Any, keys: Keys, most: int) -> Answers:
    """Return the answers of a student (or of a teacher in its place) to the images, evenly spread."""
    loader = _some(eval_loader(distillation, val, _BATCH, 0, keys, notes=[]), most)
    probabilities, labels = [], []
    for batch in loader:
        images, classes = images_and_labels(batch)
        logits = distillation.predict(images.to(distillation.student_tap.device))
        probabilities.append(logits.float().softmax(1).cpu())
        labels.append(torch.as_tensor(classes).cpu())
    return Answers(torch.cat(probabilities), torch.cat(labels))


def pictures(distillation: Distillation, val: Any, keys: Keys, most: int, indices: Sequence[int]) -> list[Tensor]:
    """Return some of the images that `answers` saw, uint8 ``[C, H, W]``."""
    loader: Any = _some(eval_loader(distillation, val, _BATCH, 0, keys, notes=[]), most)
    found = [images_and_labels(loader.dataset[index])[0] for index in indices]
    return [x if x.dtype == torch.uint8 else (255 * x.clamp(0, 1)).byte() for x in found]


def _some(loader: Any, most: int) -> DataLoader[Any]:
    if isinstance(loader.dataset, TensorImages):
        return DataLoader(TensorDataset(*loader.dataset[:]), batch_size=_BATCH)
    return DataLoader(Subset(loader.dataset, spread(len(loader.dataset), most)), batch_size=_BATCH)


@torch.inference_mode()
def stage_maps(tap: Tap, images: Tensor) -> dict[str, Tensor]:
    """Return the maps of all stages of a model, float32 on the CPU, for images ``[B, C, H, W]``."""
    names = [stage.name for stage in tap.listed]
    maps: dict[str, list[Tensor]] = {name: [] for name in names}
    with eval_mode(tap.model):
        for part in images.split(_BATCH):
            x = tap.prepare(part.to(tap.device))
            for name, found in zip(names, tap.adapter.run(tap.model, x, names).maps, strict=True):
                maps[name].append(to_grid(found.float(), (_GRID, _GRID)).cpu())
    return {name: torch.cat(parts) for name, parts in maps.items()}


def compared_images(distillation: Distillation, val: Any, keys: Keys) -> Tensor:
    """Return the images on which features are compared."""
    parts = pictures(distillation, val, keys, _COMPARED, range(min(_COMPARED, _count(distillation, val, keys))))
    return torch.stack(parts)


def _count(distillation: Distillation, val: Any, keys: Keys) -> int:
    loader: Any = eval_loader(distillation, val, _BATCH, 0, keys, notes=[])
    return len(loader.dataset)


def cka_table(rows: dict[str, Tensor], columns: dict[str, Tensor]) -> list[list[float]]:
    """Return the linear CKA (Kornblith et al., arXiv 1905.00414) of each stage of one model with each of another."""
    of_rows, of_columns = ([_gram(x) for x in maps.values()] for maps in (rows, columns))
    return [[float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)) for b in of_columns] for a in of_rows]


def _gram(x: Tensor) -> Tensor:
    z = x.flatten(1).double()
    z = z - z.mean(0)
    return z @ z.T


def band_energies(maps: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return the shares of energy in low and high frequencies of each stage: LL, details of level 2, of level 1.

    Channels are centred over positions and images before, so that their means do not count.
    """
    found = {}
    for name, x in maps.items():
        bands = dwt2(x - x.mean((0, 2, 3), keepdim=True), "haar", _LEVELS)
        energies = [float(each.square().sum()) for each in (bands.low, *reversed(bands.details))]
        found[name] = [energy / max(sum(energies), 1e-12) for energy in energies]
    return found


def untrained(distillation: Distillation) -> Tap | None:
    """Return a student as before any training, with other random weights; ``None`` if only its code builds it."""
    description = distillation.describe_student()
    if description.name in (None, "hf:"):
        return None
    assert description.name is not None
    model = load_model(description.name, pretrained=False, **description.options)
    device = distillation.student_tap.device
    return Tap("student", model.to(device), distillation.student_tap.size, distillation.normalization)


def disagreements(student: Answers, teacher: Answers, most: int) -> list[int]:
    """Return the images on which both differ most: by the total variation of their probabilities, wrong ones first."""
    distance = (student.probabilities - teacher.probabilities).abs().sum(1) / 2
    differ = student.classes != teacher.classes
    order = (distance + differ.float()).argsort(descending=True, stable=True)
    return [int(index) for index in order[:most] if bool(differ[index])]
