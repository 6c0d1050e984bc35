"""A task: what labels are, what losses on logits compare, how data are opened, and what is measured."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


class Metrics(Protocol):
    """Counts right answers over batches, exactly, in however many processes."""

    def update(self, *statistics: Tensor) -> None:
        """Add the statistics of a batch, see `Task.statistics`."""

    def compute(self) -> dict[str, float]:
        """Return what was measured, by name."""


class ComparedLogits(NamedTuple):
    """What losses on logits compare, a row each: images of a classifier, valid pixels of a segmenter.

    Attributes:
        student: Logits ``[N, classes]``.
        teacher: Logits ``[N, classes]``.
        labels: Classes ``[N]``, class probabilities ``[N, classes]``, or ``None``.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor | None


class Task(ABC):
    """Base of the tasks.

    Attributes:
        name: As ``Distiller(task=...)`` takes it.
        is_dense: Whether logits are maps ``[B, classes, h, w]``.
        common_grid: Largest side of the grid on which low frequencies are compared, by default.
        levels: Levels of wavelets, by default, where the grid is large enough.
        min_crop: Smallest share of a training picture's area that its random crop keeps, by default.
        counted: What answers are counted in: images or pixels.
        unsupported: Options of `hetkd.Distiller.fit` that have no meaning here, with what to do instead.
    """

    name: ClassVar[str]
    is_dense: ClassVar[bool]
    common_grid: ClassVar[int]
    levels: ClassVar[int]
    min_crop: ClassVar[float]
    counted: ClassVar[str]
    unsupported: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def check_labels(self, labels: Any, images: Tensor, classes: int | None, look_at_values: bool) -> None:
        """Refuse labels of a wrong dtype, shape or range.

        Raises:
            TypeError: If it is no tensor, or of a wrong dtype.
            ValueError: If shape or range are wrong.
        """

    @abstractmethod
    def checked_for_evaluation(self, labels: Any, images: Tensor, classes: int | None) -> Any:
        """Return the labels of a batch to evaluate on; raises as `check_labels`."""

    @abstractmethod
    def statistics(self, logits: Tensor, labels: Any) -> tuple[Tensor, ...]:
        """Return what metrics need of each image, batch first: processes exchange it, and drop what came twice."""

    @abstractmethod
    def are_classes(self, labels: Any) -> bool:
        """Say whether labels are classes, which predictions are compared with."""

    @abstractmethod
    def predicted_and_true(self, logits: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
        """Return the classes that a model names, and the true ones: ``[N]`` each, of images or of some pixels."""

    @abstractmethod
    def cross_entropy(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the mean cross-entropy with the labels, classes weighted by ``weights`` ``[classes]``."""

    @abstractmethod
    def compared_logits(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> ComparedLogits:
        """Return what losses on logits compare."""

    @abstractmethod
    def metrics(self, classes: Sequence[str], device: torch.device, *, sync: bool) -> Metrics:
        """Return what measures a student of classes with these names; ``sync`` sums over processes."""

    @abstractmethod
    def make_dataset(self, data: Any, **options: Any) -> Any:
        """Make a dataset of what the user gave; options as of `hetkd.data.images.make_dataset`."""

    @abstractmethod
    def kept_waves(self, grid: int) -> int:
        """Return how many waves an axis are compared by default, for a common grid of so many pixels a side."""

    @abstractmethod
    def check_names(self, names: Sequence[str], classes: int | None) -> None:
        """Refuse names of classes that are not those of the student's logits; raises ValueError."""

    @abstractmethod
    def class_counts(self, dataset: Any, classes: int) -> Tensor | None:
        """Return how often each class occurs in training data, ``[classes]``; ``None`` where only training tells."""

    def remarks(self, dataset: Any) -> list[str]:
        """Return what a person should know of training data before training."""
        return []

    def compact(self, logits: Tensor) -> Tensor:
        """Return a teacher's logits as they are kept and compared."""
        return logits

    def refuse_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError for options of a run that have no meaning here."""
        for name, cure in self.unsupported.items():
            if options.get(name):
                raise ValueError(f"{name}={options[name]!r} is not for {self.name}: {cure}.")
