"""OFA-KD: student exits that learn from the teacher's logits (arXiv 2310.19444)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.features.adapter import Features, Stage, StagePair
from hetkd.methods.common.method import Targets, register_method, student_logits, target_classes
from hetkd.methods.common.stagewise import FeatureMethod
from hetkd.utils.checks import positive


@register_method("ofa")
class OFA(FeatureMethod):
    r"""One-for-all distillation (Hao et al., NeurIPS 2023, arXiv 2310.19444).

    Features of different architectures are compared where they agree in meaning, in the space of logits: each of four
    student stages gets an exit of its own. With p probabilities and y the one-hot target class, each exit and the final
    logits learn by

    .. math:: L_{ofa} = -\sum_c \big( (p^t_c + y_c)^g - y_c \big) \log p^s_c

    which for g > 1 gives the target class more weight. The teacher's features are not used. An exit has a block for
    each later stage: of a student whose grids shrink a strided separable convolution, of one whose grids stay a
    transformer block (at least one, on patches merged to about 7 x 7); then pooling and a linear layer. The authors
    give Swin and MLP students that shrink transformer blocks too. Labels that are probabilities count as their
    likeliest class; without labels the teacher's stands in.

    Args:
        gamma: g, of the exits and of the final logits; the authors use 1 to 1.5.
        kd_weight: Weight of the loss on the final logits.
        feature_weight: Weight of the losses of the exits; the authors use 1, for CIFAR-100 0.1.
        temperature: T, which divides all logits; there is no factor of T^2.
        **common: ``ce_weight`` and ``stage_weights`` of `StagewiseMethod`.
    """

    tasks = ("classification",)
    batch_statistics = "process"
    term = "ofa"
    logit_term = "ofa"
    stages_share_weight = False

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        kd_weight: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(kd_weight=kd_weight, **common)
        self.gamma = positive("gamma", gamma)

    @property
    def uses_teacher_logits(self) -> bool:
        """True: they are what every exit learns from."""
        return True

    def teacher_stages(self) -> list[str]:
        """Return none: the teacher's features are not used."""
        return []

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make the exits for these student stages; see `Method.bind`.

        Raises:
            ValueError: If the student has no classifier.
        """
        super().bind(pairs)
        if self.classes is None:
            raise ValueError("method 'ofa' learns logits, but the student has no classifier: use num_classes=...")
        stages = [pair.student for pair in pairs]
        width = max(stages[-1].channels, pairs[-1].teacher.channels)
        is_isotropic = len({stage.grid for stage in stages}) == 1 < len(stages)
        exits = []
        for index, stage in enumerate(stages):
            later = len(stages) - 1 - index
            exits.append(
                token_exit(stage, later, self.classes)
                if is_isotropic
                else convolutional_exit(stage, later, width, self.classes)
            )
        self.exits = nn.ModuleList(exits)

    def describe_pair(self, index: int) -> str:
        """Return what is compared."""
        return "exit to logits"

    def describe_logits(self) -> str:
        """Return what the plan says of the logits."""
        return f"target class enhanced, g = {self.gamma:g}, T = {self.temperature:g}" if self.kd_weight else ""

    def target_of(self, index: int, targets: Targets) -> Tensor:
        """Return the teacher's logits."""
        return targets["logits"]

    def compare(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of the exit of stage ``index``; see `FeatureMethod.compare`."""
        return self._enhanced(self.exits[index](x), target, labels)

    def logit_loss(self, student: Features, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of the final logits; see `Method.logit_loss`."""
        return self._enhanced(student_logits(student), teacher, labels)

    def _enhanced(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        classes = target_classes(labels, teacher)
        return enhanced_loss(student / self.temperature, teacher / self.temperature, classes, self.gamma)


def enhanced_loss(student: Tensor, teacher: Tensor, classes: Tensor, gamma: float) -> Tensor:
    """Return the target-enhanced cross-entropy of logits ``[B, classes]``, mean over the batch.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> loss = enhanced_loss(logits, logits, torch.tensor([0]), gamma=1.0)
        >>> torch.allclose(loss, -(logits.softmax(1) * logits.log_softmax(1)).sum())
        True
    """
    y = F.one_hot(classes, student.shape[1])
    target = (F.softmax(teacher, dim=1) + y) ** gamma - y
    return -(target * F.log_softmax(student, dim=1)).sum(1).mean()


def convolutional_exit(stage: Stage, later: int, width: int, classes: int) -> nn.Module:
    """Build the exit of a stage of a student whose grids shrink.

    Args:
        stage: Where the exit is.
        later: How many stages with exits stand behind it; a strided separable convolution stands in for each.
        width: Channels before the linear layer.
        classes: Of the logits.
    """
    layers: list[nn.Module] = [] if later else [nn.Conv2d(stage.channels, width, kernel_size=1)]
    channels = stage.channels
    for step in range(later):
        grown = width if step == later - 1 else 2 * channels
        layers.append(_separable_convolution(channels, grown))
        channels = grown
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def token_exit(stage: Stage, later: int, classes: int) -> nn.Module:
    """Build the exit of a stage of a student whose grids stay: patches merged to about 7 x 7, transformer blocks."""
    merges = max(0, int(math.log2(min(stage.grid) / 7)))
    merging = [nn.Conv2d(stage.channels, stage.channels, kernel_size=2, stride=2) for _ in range(merges)]
    return nn.Sequential(*merging, _TokenBlocks(stage.channels, max(later, 1)), nn.Linear(stage.channels, classes))


def _separable_convolution(channels: int, grown: int) -> nn.Module:
    def half(outgoing: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, outgoing, kernel_size=1, bias=False),
            nn.BatchNorm2d(outgoing),
            nn.ReLU(),
        ]

    return nn.Sequential(*half(channels, 2), *half(grown, 1))


class _TokenBlocks(nn.Module):
    """Transformer blocks on a map ``[B, C, h, w]`` as tokens, averaged to ``[B, C]``."""

    def __init__(self, channels: int, depth: int) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        heads = next(heads for heads in (4, 2, 1) if channels % heads == 0)
        self.blocks = nn.Sequential(*(Block(channels, heads) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.blocks(x.flatten(2).transpose(1, 2))
        return torch.mean(tokens, dim=1)
