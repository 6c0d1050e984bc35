"""CWD: channel-wise distillation for dense prediction (Shu et al., arXiv 2011.13256)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hetkd.features.adapter import Features
from hetkd.methods.common.method import LogitMethod, register_method, student_logits
from hetkd.tasks.segmentation import on_coarser_grid


@register_method("cwd")
class CWD(LogitMethod):
    r"""Where each class is seen in the image: for each channel a distribution over pixels.

    .. math:: L = w_{ce}\,CE + w_{kd}\,\frac{T^2}{C} \sum_{c=1}^{C} KL\big(\phi(z^t_c / T) \,\|\, \phi(z^s_c / T)\big)

    with the logits :math:`z_c` of class c and :math:`\phi` a softmax over all pixels of one image; the mean over images
    is taken. The authors compare the logits of student and teacher with T = 4 and weight 3; maps of different strides
    meet on the coarser grid here.

    Args:
        kd_weight: Weight of the divergence.
        temperature: T.
        **common: ``ce_weight`` of `Method`.
    """

    tasks = ("segmentation",)
    logit_term = "cwd"

    def __init__(self, *, kd_weight: float = 3.0, temperature: float = 4.0, **common: Any) -> None:
        super().__init__(kd_weight=kd_weight, temperature=temperature, **common)

    def describe_logits(self) -> str:
        """Return T."""
        return f"channel-wise KL, T = {self.temperature:g}"

    def compare_logits(self, student: Features, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the divergence of the distributions over pixels, mean over images and classes, times T^2."""
        own = student_logits(student)
        both = on_coarser_grid(own, teacher)
        mine, theirs = ((x / self.temperature).flatten(2).log_softmax(2) for x in both)
        divergence = F.kl_div(mine, theirs, reduction="sum", log_target=True)
        return divergence * self.temperature**2 / (own.shape[0] * own.shape[1])
