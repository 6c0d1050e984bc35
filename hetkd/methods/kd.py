"""Learning from labels alone (`CE`) and from the teacher's logits (`KD`)."""

from torch import Tensor

from hetkd.features.adapter import Features
from hetkd.methods.common.method import LogitMethod, Method, Targets, register_method


@register_method("ce")
class CE(Method):
    """Cross-entropy with the labels: the student trained alone. The teacher is never run.

    Args:
        ce_weight: Weight of the cross-entropy with the labels.
    """

    def __init__(self, *, ce_weight: float = 1.0) -> None:
        super().__init__(ce_weight=ce_weight, kd_weight=0.0)

    def forward(self, student: Features, targets: Targets, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the term ``ce``; see `Method.forward`.

        Raises:
            ValueError: If there are no labels to learn from.
        """
        if labels is None:
            raise ValueError("method 'ce' learns from labels only, but labels=None; use 'kd', 'sfkd' or 'uhkd'.")
        return super().forward(student, targets, labels)


@register_method("kd")
class KD(LogitMethod):
    r"""Knowledge distillation by logits (Hinton, Vinyals, Dean; arXiv 1503.02531).

    .. math:: L = w_{ce}\,CE(z_s, y) + w_{kd}\,T^2\,KL(\sigma(z_t / T) \,\|\, \sigma(z_s / T))

    Args:
        kd_weight: Weight of the KL divergence.
        temperature: T; the comparisons across architectures use 1 (OFA-KD, arXiv 2310.19444), others 2 to 4.
        **common: ``ce_weight`` of `Method`.
    """
