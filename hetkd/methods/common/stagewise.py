"""Base of the methods that compare features: stage weights and the loop over stage pairs."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hetkd.features.adapter import Features, StagePair
from hetkd.methods.common.method import Method, Targets
from hetkd.spectral.precision import at_least_float32
from hetkd.utils.checks import positive, unknown_name


class StagewiseMethod(Method):
    """Base of methods with one loss a stage pair, beside cross-entropy and KL divergence.

    `FeatureMethod` is for those that look at one pair after the other.

    Args:
        feature_weight: Weight of the features' loss; each stage's share is in ``stage_weights``.
        stage_weights: ``None``: equal weights, 1 each (``sfkd`` and ``uhkd``: 1 in total). A sequence: one weight per
            stage pair. ``"learnt"``: equal at the start, then learnt by uncertainty (Kendall et al., arXiv 1705.07115).
        kd_weight: Weight of the KL divergence between logits; 0 leaves it out, as the published comparisons do.
        **common: ``ce_weight`` and ``temperature`` of `Method`.

    Attributes:
        stages_share_weight: Whether the default weights of the stages sum to 1, or are 1 each.
        leaves_last_stage: Whether the automatic pairs are without the last one, if there are others.
        term: Name of the method's terms.
    """

    automatic_stages: ClassVar[int] = 4
    stages_share_weight: ClassVar[bool] = True
    leaves_last_stage: bool = False
    term: ClassVar[str]

    def __init__(
        self,
        *,
        feature_weight: float = 1.0,
        stage_weights: Sequence[float] | str | None = None,
        kd_weight: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(kd_weight=kd_weight, **common)
        self.feature_weight = positive("feature_weight", feature_weight)
        if isinstance(stage_weights, str) and stage_weights != "learnt":
            raise unknown_name("stage_weights", stage_weights, ["learnt"])
        self.stage_weights = stage_weights

    def automatic_pairs(self, pairs: Sequence[StagePair], pooled: StagePair | None) -> list[StagePair]:
        """Return the last `automatic_stages` pairs, without the very last if it is left to the logits."""
        found = super().automatic_pairs(pairs, pooled)
        return found[:-1] if self.leaves_last_stage and len(found) > 1 else found

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make the parameters for these stage pairs; see `Method.bind`.

        Raises:
            ValueError: If there are no pairs, or the number of weights is another than that of the pairs.
        """
        super().bind(pairs)
        if not pairs:
            raise ValueError(f"method {self.term!r} compares features, but there is no stage pair to compare.")
        self._weights = self._fixed_weights(len(pairs))
        self._names = [self._term_name(pair) for pair in pairs]
        if len(set(self._names)) < len(pairs):
            raise ValueError(f"stages has the same pair twice: {self._names}.")
        self.log_variance = nn.Parameter(torch.zeros(len(pairs))) if self.stage_weights == "learnt" else None

    def _fixed_weights(self, count: int) -> list[float]:
        if self.stage_weights is None or isinstance(self.stage_weights, str):
            return [1 / count if self.stages_share_weight else 1.0] * count
        weights = [positive("stage_weights", float(weight)) for weight in self.stage_weights]
        if len(weights) != count:
            raise ValueError(f"stage_weights={tuple(weights)} has {len(weights)} entries for {count} stage pairs.")
        return weights

    def remark(self) -> str:
        """Return the sum of the stages' weights, if the user's differs from the default's."""
        usual = 1.0 if self.stages_share_weight else float(len(self._weights))
        if isinstance(self.stage_weights, str) or math.isclose(sum(self._weights), usual):
            return ""
        return (
            f"stage_weights sum to {sum(self._weights):g}, by default to {usual:g}: {self.term}'s terms weigh "
            f"{sum(self._weights) / usual:g} times as much."
        )

    def _term_name(self, pair: StagePair) -> str:
        of_student = [other for other in self.pairs or () if other.student.name == pair.student.name]
        between = "" if len(of_student) == 1 else f"{pair.teacher.name}-"
        return f"{self.term}.{between}{pair.student.name}"

    def added_parameters(self, index: int) -> int:
        """Return the parameters of the entries ``index`` of the method's module lists with one entry a stage pair."""
        lists = [x for x in self.children() if isinstance(x, nn.ModuleList) and len(x) == len(self.pairs or ())]
        return count_parameters(*(entries[index] for entries in lists))

    def feature_terms(self, student: Features, targets: Targets, labels: Tensor | None) -> dict[str, Tensor]:
        """Return one weighted term a stage pair, named after the student's stage."""
        assert self.pairs is not None, "bind comes first"
        with torch.autocast(student.maps[0].device.type, enabled=False):
            maps = [at_least_float32(x) for x in student.maps]
            losses = self.compare_all(maps, [self.target_of(i, targets) for i in range(len(maps))], labels)
        terms = {}
        for index, loss in enumerate(losses):
            if self.log_variance is not None:
                loss = loss * torch.exp(-self.log_variance[index]) + self.log_variance[index]
            terms[self._names[index]] = self.feature_weight * self._weights[index] * loss
        return terms

    def target_of(self, index: int, targets: Targets) -> Tensor:
        """Return the target of stage pair ``index``."""
        return targets[f"stage{index}"]

    @abstractmethod
    def compare_all(self, maps: list[Tensor], targets: list[Tensor], labels: Tensor | None) -> list[Tensor]:
        """Return the loss of each stage pair.

        Args:
            maps: The student's map ``[B, C_s, h, w]`` of each pair (float32, autocast off).
            targets: The result of `encode_stage` for each pair and the same images.
            labels: As for `Method.forward`.
        """


class FeatureMethod(StagewiseMethod):
    """Base of methods that compare one stage pair after the other; arguments as of `StagewiseMethod`."""

    def compare_all(self, maps: list[Tensor], targets: list[Tensor], labels: Tensor | None) -> list[Tensor]:
        """Return `compare` of each stage pair; see `StagewiseMethod.compare_all`."""
        parts = zip(maps, targets, strict=True)
        return [self.compare(index, x, target, labels) for index, (x, target) in enumerate(parts)]

    @abstractmethod
    def compare(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of stage pair ``index``.

        Args:
            index: Number of the stage pair.
            x: The student's map ``[B, C_s, h, w]`` (float32, autocast off).
            target: The result of `encode_stage` for the same images.
            labels: As for `Method.forward`.
        """


class PooledMethod(FeatureMethod):
    """Base of methods that compare one vector an image: the classifiers' inputs, or stages averaged over their maps."""

    automatic_stages: ClassVar[int] = 1
    batch_statistics = "all"
    stages_share_weight: ClassVar[bool] = False

    def automatic_pairs(self, pairs: Sequence[StagePair], pooled: StagePair | None) -> list[StagePair]:
        """Return the pair of vectors before both classifiers; see `Method.automatic_pairs`."""
        return [] if pooled is None else [pooled]

    def describe_target(self, index: int) -> dict[str, Any]:
        """Return that it is the mean, which is the same for all methods of this kind."""
        return {"what": "mean"}

    def encode_stage(self, index: int, x: Tensor) -> Tensor:
        """Return the mean ``[B, C_t]`` over the map."""
        return x.mean((2, 3))

    def compare(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return `compare_vectors` of the mean over the map; see `FeatureMethod.compare`."""
        return self.compare_vectors(index, x.mean((2, 3)), target, labels)

    @abstractmethod
    def compare_vectors(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of stage pair ``index`` for vectors ``[B, C_s]`` and ``[B, C_t]`` (float32)."""


def count_parameters(*modules: nn.Module) -> int:
    """Return the number of parameters that the modules learn."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
