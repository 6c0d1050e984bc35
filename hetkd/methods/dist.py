"""DIST: correlations of predictions instead of their exact match (arXiv 2205.10536)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hetkd.features.adapter import Features
from hetkd.methods.common.method import LogitMethod, register_method, student_logits
from hetkd.utils.checks import choice, not_negative, one_positive
from hetkd.utils.distributed import gather_over_processes


@register_method("dist")
class DIST(LogitMethod):
    r"""Distillation from a stronger teacher (Huang et al., NeurIPS 2022, arXiv 2205.10536).

    Pearson's correlation r between predictions of student and teacher, over the classes of an image (inter) and over
    the images of a batch for each class (intra); a strong teacher need not be matched in scale:

    .. math:: L = w_{ce}\,CE + w_{kd}\,T^2 \Big(\beta \big(1 - \tfrac1B \sum_b r(p^s_{b:}, p^t_{b:})\big)
        + \gamma \big(1 - \tfrac1C \sum_c r(p^s_{:c}, p^t_{:c})\big)\Big)

    The batch is that of all processes.

    Args:
        beta: Weight of the correlation over the classes of an image (inter).
        gamma: Weight of the correlation over the images of a batch (intra).
        scores: What correlates: ``"probabilities"``, as in the authors' code, or ``"logits"``. With logits the loss
            ignores their scale and shift, and T acts only through its square.
        kd_weight: Weight of both correlations together.
        **common: ``ce_weight`` and ``temperature`` of `Method`.
    """

    logit_term = "dist"

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        scores: str = "probabilities",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        one_positive(beta=beta, gamma=gamma)
        self.beta = not_negative("beta", beta)
        self.gamma = not_negative("gamma", gamma)
        self.batch_statistics = "all" if gamma else None
        self.scores = choice("scores", scores, ["probabilities", "logits"])

    def describe_logits(self) -> str:
        """Return what the plan says of the logits."""
        return f"correlations of {self.scores}, T = {self.temperature:g}"

    def logit_loss(self, student: Features, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return both parts, weighted; see `Method.logit_loss`."""
        s, t = (gather_over_processes(self._scores(logits)) for logits in (student_logits(student), teacher))
        inter, intra = (1 - correlation(s, t, dim).mean() for dim in (1, 0))
        return (self.beta * inter + self.gamma * intra) * self.temperature**2

    def _scores(self, logits: Tensor) -> Tensor:
        return logits if self.scores == "logits" else F.softmax(logits / self.temperature, dim=1)


def correlation(x: Tensor, y: Tensor, dim: int = 1) -> Tensor:
    """Return Pearson's correlation of ``x`` and ``y`` ``[N, M]`` along an axis; 0 where either is constant.

    Example:
        >>> import torch
        >>> correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[20.0, 40.0, 60.0]]))
        tensor([1.])
    """
    x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    return (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim)).clamp_min(1e-16)
