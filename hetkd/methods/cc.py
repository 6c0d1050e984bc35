"""CC: how images correlate with one another (arXiv 1904.01802)."""

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.features.adapter import StagePair
from hetkd.methods.common.method import register_method
from hetkd.methods.common.stagewise import PooledMethod
from hetkd.utils.checks import choice, positive, whole_number


@register_method("cc")
class CC(PooledMethod):
    r"""Correlation congruence (Peng et al., ICCV 2019, arXiv 1904.01802), on the vectors before the classifiers.

    Two forms. ``"neighbours"`` is the authors' code as the literature compares it (Tian et al., OFA-KD), with the
    weight 0.02: linear maps e bring both sides to ``width`` numbers, and the errors of images that follow each other in
    the batch are multiplied,

    .. math:: L_{cc} = \tfrac{1}{B - 1} \sum_b \langle |\delta_b|, |\delta_{b+1}| \rangle,
        \quad \delta = e_s(s) - e_t(t)

    ``"kernel"`` is the paper's formula: the matrices of a Gaussian kernel between all images of the batch, as its
    Taylor series of order P, without parameters:

    .. math:: L_{cc} = \tfrac{1}{B^2} \|\psi(s) - \psi(t)\|_F^2, \quad
        \psi_{ij}(x) = e^{-2\gamma} \sum_{p=0}^{P} \tfrac{(2\gamma)^p}{p!} \langle x_i, x_j \rangle^p,
        \quad \|x_i\|_2 = 1

    The batch is that of each process.

    Args:
        form: ``"neighbours"``, the authors' code, or ``"kernel"``, the formula of the paper.
        feature_weight: Weight of the features' loss. ``"kernel"`` yields far smaller values and needs a larger weight.
        width: Length of the vectors that ``"neighbours"`` compares.
        gamma: :math:`\gamma` of ``"kernel"``.
        order: P of ``"kernel"``, the order of its Taylor series.
        **common: Options of `StagewiseMethod`; ``kd_weight`` is 0 in the published comparisons.
    """

    batch_statistics = "process"
    term = "cc"

    def __init__(
        self,
        *,
        form: str = "neighbours",
        feature_weight: float = 0.02,
        width: int = 128,
        gamma: float = 0.4,
        order: int = 2,
        **common: Any,
    ) -> None:
        super().__init__(feature_weight=feature_weight, **common)
        self.form = choice("form", form, ["neighbours", "kernel"])
        self.width = whole_number("width", width)
        self.gamma = positive("gamma", gamma)
        self.order = whole_number("order", order)

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make the linear maps for these stage pairs; see `Method.bind`."""
        super().bind(pairs)
        learnt = pairs if self.form == "neighbours" else []
        self.embed_student = nn.ModuleList(nn.Linear(p.student.channels, self.width) for p in learnt)
        self.embed_teacher = nn.ModuleList(nn.Linear(p.teacher.channels, self.width) for p in learnt)

    def describe_pair(self, index: int) -> str:
        """Return the form."""
        return f"correlation, {self.form}"

    def compare_vectors(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of this form; see `PooledMethod.compare_vectors`."""
        if self.form == "kernel":
            return F.mse_loss(self._kernel(x), self._kernel(target))
        error = (self.embed_student[index](x) - self.embed_teacher[index](target)).abs()
        return (error[:-1] * error[1:]).sum(1).mean()

    def _kernel(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=1)
        products = 2 * self.gamma * x @ x.T
        powers = [products**p / math.factorial(p) for p in range(self.order + 1)]
        return math.exp(-2 * self.gamma) * sum(powers[1:], start=powers[0])
