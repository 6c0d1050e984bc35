"""Small inputs for the formulas of methods."""

import numpy as np
import torch

from hetkd import (
    Stage,
    StagePair,
)

VECTORS = [StagePair(Stage("pooled", 40, 1, 1), Stage("pooled", 32, 1, 1))]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def compared(method, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None = None) -> float:
    """Returns the loss of a method on vectors, without its weight."""
    if method.pairs is None:
        method.bind([StagePair(Stage("t", teacher.shape[1], 1, 1), Stage("s", student.shape[1], 1, 1))])
    return method.compare(0, student[:, :, None, None], teacher, labels)
