"""DKD: what the teacher says of the target class and of all others, weighed apart (arXiv 2203.08679)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hetkd.features.adapter import Features
from hetkd.methods.common.method import LogitMethod, register_method, student_logits, target_classes
from hetkd.utils.checks import not_negative, one_positive

_NEVER = -1e9


@register_method("dkd")
class DKD(LogitMethod):
    r"""Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679).

    The KL divergence of KD is :math:`TCKD + (1 - p^t_y)\,NCKD`: a part on the probability of the target class y against
    all others, and a part on the distribution among the others, which a confident teacher all but switches off. DKD
    weighs both freely:

    .. math:: L = w_{ce}\,CE + w_{kd}\,T^2 (\alpha\,TCKD + \beta\,NCKD)

    Labels that are probabilities count as their likeliest class; without labels the teacher's class stands in. The
    authors raise the weight linearly over the first 20 epochs; here it is constant.

    Args:
        alpha: Weight of TCKD, the part on the target class.
        beta: Weight of NCKD, the part on all other classes.
        kd_weight: Weight of both parts together.
        **common: ``ce_weight`` and ``temperature`` of `Method`.
    """

    logit_term = "dkd"

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 2.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        one_positive(alpha=alpha, beta=beta)
        self.alpha = not_negative("alpha", alpha)
        self.beta = not_negative("beta", beta)

    def describe_logits(self) -> str:
        """Return what the plan says of the logits."""
        return f"{self.alpha:g} TCKD + {self.beta:g} NCKD, T = {self.temperature:g}"

    def logit_loss(self, student: Features, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return both parts, weighted; see `Method.logit_loss`."""
        classes = target_classes(labels, teacher)
        target, others = decoupled_parts(
            student_logits(student) / self.temperature, teacher / self.temperature, classes
        )
        return (self.alpha * target.mean() + self.beta * others.mean()) * self.temperature**2


def decoupled_parts(student: Tensor, teacher: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return TCKD and NCKD ``[B]`` of logits ``[B, classes]``, whose target classes are ``classes`` ``[B]``.

    Example:
        >>> logits, classes = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
        >>> [part.item() for part in decoupled_parts(logits, logits, classes)]
        [0.0, 0.0]
    """
    (binary_s, others_s), (binary_t, others_t) = (_decoupled(logits, classes) for logits in (student, teacher))
    return (
        F.kl_div(binary_s, binary_t, reduction="none", log_target=True).sum(1),
        F.kl_div(others_s, others_t, reduction="none", log_target=True).sum(1),
    )


def _decoupled(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of (target, not target) ``[B, 2]``, and among the others ``[B, classes]``."""
    target = logits.gather(1, classes.unsqueeze(1))
    others = logits.scatter(1, classes.unsqueeze(1), _NEVER)  # finite, for 0 times infinity is no number
    binary = torch.cat([target, others.logsumexp(1, keepdim=True)], dim=1)
    return F.log_softmax(binary, dim=1), F.log_softmax(others, dim=1)
