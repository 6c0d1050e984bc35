"""DIST: correlations of predictions instead of their exact match (arXiv 2205.10536)."""

import torch.nn.functional as F
from torch import Tensor

from hetkd.adapter import Features
from hetkd.distributed import gather_over_processes
from hetkd.methods.base import Method, needed_kd_weight, not_negative, one_positive, register_method, student_logits
from hetkd.names import choice


@register_method("dist")
class DIST(Method):
    r"""Distillation from a stronger teacher (Huang et al., NeurIPS 2022, arXiv 2205.10536).

    Pearson's correlation r between predictions of student and teacher, over the classes of an image (inter) and over
    the images of a batch for each class (intra); a strong teacher need not be matched in scale:

    .. math:: L = w_{ce}\,CE + w_{kd}\,T^2 \Big(\beta \big(1 - \tfrac1B \sum_b r(p^s_{b:}, p^t_{b:})\big)
        + \gamma \big(1 - \tfrac1C \sum_c r(p^s_{:c}, p^t_{:c})\big)\Big)

    The batch is that of all processes.

    Args:
        beta: Weight of the correlation over classes.
        gamma: Weight of the correlation over images.
        scores: ``"probabilities"``, as the authors do, or ``"logits"``: then the loss is invariant to scale and
            shift of the student's logits, and T has no effect but its square.
        ce_weight: Weight of the cross-entropy with the labels.
        kd_weight: Weight of both correlations together.
        temperature: T.
    """

    logit_term = "dist"

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        scores: str = "probabilities",
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(ce_weight=ce_weight, kd_weight=needed_kd_weight("dist", kd_weight), temperature=temperature)
        one_positive(beta=beta, gamma=gamma)
        self.beta = not_negative("beta", beta)
        self.gamma = not_negative("gamma", gamma)
        self.scores = choice("scores", scores, ["probabilities", "logits"])

    @property
    def needs_batch(self) -> bool:
        """True with ``gamma``: the correlation over images."""
        return self.gamma > 0

    def describe_logits(self) -> str:
        """Returns what the plan says of the logits."""
        return f"correlations of {self.scores}, T = {self.temperature:g}"

    def logit_loss(self, student: Features, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Returns both parts, weighted; see `Method.logit_loss`."""
        s, t = (gather_over_processes(self._scores(logits)) for logits in (student_logits(student), teacher))
        inter, intra = 1 - correlation(s, t).mean(), 1 - correlation(s.T, t.T).mean()
        return (self.beta * inter + self.gamma * intra) * self.temperature**2

    def _scores(self, logits: Tensor) -> Tensor:
        return logits if self.scores == "logits" else F.softmax(logits / self.temperature, dim=1)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Returns Pearson's correlation ``[N]`` of the rows of ``x`` and ``y`` ``[N, M]``; 0 where a row is constant."""
    return F.cosine_similarity(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True), dim=1)
