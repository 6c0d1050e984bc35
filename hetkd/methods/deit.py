"""DeiT: the teacher's decision as a second label (arXiv 2012.12877)."""

import torch.nn.functional as F
from torch import Tensor

from hetkd.features.adapter import Features
from hetkd.methods.common.method import LogitMethod, register_method, student_logits
from hetkd.spectral.precision import at_least_float32


@register_method("deit")
class DeiT(LogitMethod):
    r"""Hard-label distillation (Touvron et al., ICML 2021, arXiv 2012.12877).

    .. math:: L = \tfrac12 CE(z_s, y) + \tfrac12 CE(z_d, \arg\max z_t)

    A student with a distillation token (timm's ``deit_*_distilled``, LeViT, EfficientFormer, ...) has a second
    classifier for :math:`z_d`, and averages both when it is used; any other student learns both with the one that it
    has, :math:`z_d = z_s`.

    Args:
        ce_weight: Weight of the cross-entropy with the labels.
        kd_weight: Weight of the cross-entropy with the teacher's decisions.
    """

    tasks = ("classification",)
    logit_term = "hard"
    uses_distillation_token = True

    def __init__(self, *, ce_weight: float = 0.5, kd_weight: float = 0.5) -> None:
        super().__init__(ce_weight=ce_weight, kd_weight=kd_weight)

    def describe_logits(self) -> str:
        """Return what the plan says of the logits."""
        return "the teacher's class as a label"

    def logit_loss(self, student: Features, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the cross-entropy with the teacher's decisions; see `Method.logit_loss`."""
        second = student.distillation_logits
        return F.cross_entropy(
            student_logits(student) if second is None else at_least_float32(second), teacher.argmax(1)
        )
