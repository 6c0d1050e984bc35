"""The adapter contract: how any model becomes feature maps.

An adapter knows one family of models. `docs/guides/own-adapter.md` shows how to write one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hetkd.utils.checks import unknown_name


@dataclass(frozen=True)
class Features:
    """Feature maps, logits and pooled features of one forward pass.

    Attributes:
        logits: ``[B, classes]``, or ``None`` for a model without a classifier.
        maps: Feature maps ``[B, C, h, w]`` of the requested stages, in their order, at native grids, without prefix
            tokens.
        pooled: ``[B, C]``, the vector that the classifier sees, or ``None`` if there is none.
        distillation_logits: ``[B, classes]`` of the second classifier of a student with a distillation token that is in
            training (DeiT, arXiv 2012.12877); ``None`` elsewhere.
    """

    logits: Tensor | None
    maps: tuple[Tensor, ...]
    pooled: Tensor | None = None
    distillation_logits: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """One place where a model can be tapped, and the shape of what comes out there."""

    name: str
    channels: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the feature map."""
        return self.height, self.width

    def __str__(self) -> str:
        return f"{self.name} [{self.channels}, {self.height}, {self.width}]"


@dataclass(frozen=True)
class StagePair:
    """A teacher stage and the student stage that learns from it.

    Attributes:
        teacher: Where the teacher is tapped.
        student: Where the student is tapped.
        source: Number of the teacher, of several.
    """

    teacher: Stage
    student: Stage
    source: int = 0


class Adapter(ABC):
    """Taps the models of one family.

    Attributes:
        family: The name of the family, as users know it.
        priority: Of all adapters that accept a model, the one with the highest priority taps it (ties: the first name
            in alphabetical order). The built-in families have 0 or 1, the generic adapter -100, so that an adapter of
            one's own wins without setting anything.
    """

    family: ClassVar[str]
    priority: ClassVar[int] = 10

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Say whether this adapter can tap ``model``. Must not raise and not run the model."""

    @abstractmethod
    def stage_names(self, model: nn.Module, images: Tensor) -> list[str]:
        """List every place where ``model`` can be tapped, in order of depth.

        Args:
            model: A model that this adapter accepts.
            images: A sample input of the model, for adapters that find stages by a dry run.

        Raises:
            NoSpatialFeatures: If there is none.
        """

    @abstractmethod
    def run(self, model: nn.Module, images: Tensor, stages: Sequence[str]) -> Features:
        """Run the model once and returns its features.

        Args:
            model: A model that this adapter accepts.
            images: ``[B, C, H, W]``, already resized and normalised for this model.
            stages: Names from `stage_names`, in any order.

        Returns:
            Logits as ``model(images)`` gives them, and one map a stage, in the order of ``stages``.

        Raises:
            RuntimeError: If a stage yields no feature map. A missing feature never passes silently.
        """


def find_stage(what: str, name: str, stages: Sequence[Stage]) -> Stage:
    """Return the stage called ``name``; raises with the nearest names if there is none."""
    for stage in stages:
        if stage.name == name:
            return stage
    raise unknown_name(what, name, [stage.name for stage in stages])
