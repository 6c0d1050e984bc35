"""CRD: the student's vector tells its own teacher vector from thousands of others (arXiv 1910.10699)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetkd.features.adapter import StagePair
from hetkd.methods.common.method import register_method
from hetkd.methods.common.stagewise import PooledMethod
from hetkd.utils.checks import positive, whole_number
from hetkd.utils.distributed import gather_over_processes, world_size


@register_method("crd")
class CRD(PooledMethod):
    r"""Contrastive representation distillation (Tian et al., ICLR 2020, arXiv 1910.10699).

    Learnt linear maps bring the vectors before both classifiers to unit vectors s, t of ``width`` numbers. A critic
    :math:`h = u / (u + N)`, :math:`u = e^{\langle s, t \rangle / \tau} / Z`, tells whether both come from one image:

    .. math:: L_{crd} = -\tfrac1B \sum_b \Big( \log h(s_b, t_b) + \sum_{n=1}^{N} \log (1 - h(s_b, t_n)) \Big)
        + \text{the same with } s, t \text{ exchanged}

    The N negatives are the batch of all processes and a memory of the latest vectors, without those of the image's own
    class (without labels: but its own). Z is the mean of :math:`e^{\langle s, t \rangle / \tau}` over the
    first batch; the authors take it over a memory that is filled with random vectors then. As in their code, each side
    learns against the other as a constant.

    The authors keep one averaged vector an image of the training set and draw from it; the memory here is a queue, so
    that it needs no index of images, does not grow with the data set, and holds nothing older than its length. It is in
    the checkpoint, and is the same in all processes.

    Args:
        negatives: Number of images that the memory holds.
        width: Length of the unit vectors.
        contrast_temperature: :math:`\tau`, which divides the similarities.
        feature_weight: Weight of the features' loss; the authors use 0.8.
        **common: Options of `StagewiseMethod`; ``kd_weight`` is 0 in the published comparisons.
    """

    tasks = ("classification",)
    term = "crd"

    def __init__(
        self,
        *,
        negatives: int = 16_384,
        width: int = 128,
        contrast_temperature: float = 0.07,
        feature_weight: float = 0.8,
        **common: Any,
    ) -> None:
        super().__init__(feature_weight=feature_weight, **common)
        self.negatives = whole_number("negatives", negatives)
        self.width = whole_number("width", width)
        self.contrast_temperature = positive("contrast_temperature", contrast_temperature)

    def bind(self, pairs: Sequence[StagePair], /) -> None:
        """Make linear maps and memories for these stage pairs; see `Method.bind`."""
        super().bind(pairs)
        self.embed_student = nn.ModuleList(nn.Linear(p.student.channels, self.width) for p in pairs)
        self.embed_teacher = nn.ModuleList(nn.Linear(p.teacher.channels, self.width) for p in pairs)
        self.memories = nn.ModuleList(Memory(self.negatives, self.width, self.contrast_temperature) for _ in pairs)

    def describe_pair(self, index: int) -> str:
        """Return the number of negatives."""
        return f"contrast, {self.negatives:,} negatives"

    def compare_vectors(self, index: int, x: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the contrastive loss; see `PooledMethod.compare_vectors`."""
        student = F.normalize(self.embed_student[index](x), dim=1)
        teacher = F.normalize(self.embed_teacher[index](target), dim=1)
        loss: Tensor = self.memories[index](student, teacher, labels)
        return loss


class Memory(nn.Module):
    """The latest unit vectors of student and teacher, with their classes, and the contrast with them.

    Args:
        length: Images that it holds.
        width: Numbers a vector.
        temperature: Of the similarities.
    """

    def __init__(self, length: int, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("vectors", torch.zeros(length, 2, width))
        self.register_buffer("keys", torch.zeros(length, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("log_scale", torch.full((2,), math.nan))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Contrast unit vectors ``[B, width]`` with batch and memory; in training mode, then remember them."""
        own_keys = self._keys(labels, len(student), student.device)
        both = torch.stack([student, teacher], dim=1)
        with torch.no_grad():
            batch, batch_keys = gather_over_processes(both), gather_over_processes(own_keys)
        filled = torch.arange(len(self.keys), device=student.device) < self.count
        candidates, keys = torch.cat([batch.detach(), self.vectors]), torch.cat([batch_keys, self.keys])
        usable = torch.cat([torch.ones_like(batch_keys, dtype=torch.bool), filled])
        negative = usable & (own_keys.unsqueeze(1) != keys)
        loss = torch.zeros((), device=student.device)
        for side, (anchor, partner) in enumerate(((student, teacher), (teacher, student))):
            # Each side learns against the other as a constant, as from the authors' memory.
            positive_pair = (anchor * partner.detach()).sum(1) / self.temperature
            similarity = anchor @ candidates[:, 1 - side].T / self.temperature
            log_scale = self._log_scale(side, similarity[:, : len(batch)].detach())
            loss = loss + _contrast(positive_pair - log_scale, similarity - log_scale, negative)
        if self.training:
            self._remember(batch, batch_keys)
        return loss

    def _keys(self, labels: Tensor | None, size: int, device: torch.device) -> Tensor:
        """Return what tells images apart: classes, or without labels numbers below 0 that nothing else has."""
        if labels is not None:
            return labels if labels.ndim == 1 else labels.argmax(1)
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        serial: Tensor = -1 - self.count - rank * size - torch.arange(size, device=device)
        return serial

    def _log_scale(self, side: int, similarity: Tensor) -> Tensor:
        log_sum = gather_over_processes(similarity.logsumexp((0, 1)).unsqueeze(0)).logsumexp(0)
        log_mean = log_sum - math.log(similarity.numel() * world_size())
        scale = torch.where(self.log_scale[side].isnan(), log_mean, self.log_scale[side])
        if self.training:
            self.log_scale[side] = scale
        return scale

    @torch.no_grad()
    def _remember(self, batch: Tensor, keys: Tensor) -> None:
        length = len(self.keys)
        slots = ((self.count + torch.arange(len(keys), device=keys.device)) % length)[-length:]
        self.vectors[slots], self.keys[slots] = batch[-length:].to(self.vectors.dtype), keys[-length:]
        self.count += len(keys)

    vectors: Tensor
    keys: Tensor
    count: Tensor
    log_scale: Tensor


def _contrast(positive_pair: Tensor, others: Tensor, negative: Tensor) -> Tensor:
    """Return -log h of the pairs ``[B]``, and -log(1 - h) of the negatives among ``[B, M]``; scores are log u."""
    log_count = negative.sum(1).clamp_min(1).log()
    rejected = F.softplus(others - log_count.unsqueeze(1)) * negative
    return (F.softplus(log_count - positive_pair) + rejected.sum(1)).mean()
