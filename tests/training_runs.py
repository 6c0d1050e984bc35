"""Small data and models for training runs."""

import torch
from conftest import tiny_cnn, tiny_vit

from hetkd import Distiller

QUIET = {"progress": False, "cpu": True}


def make(method="sfkd", **kwargs) -> Distiller:
    torch.manual_seed(0)
    return Distiller(tiny_vit(), tiny_cnn(), method, input_size=64, **kwargs)


def bright_or_dark(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes of brightness: easy to learn."""
    labels = torch.arange(count) % 10
    images = (labels[:, None, None, None] / 10 + 0.05 * torch.rand(count, 3, 32, 32)).clamp(0, 1)
    return images, labels
