import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import timm
import torch
from torch import Tensor, nn

from hetkd import Features, Stage, StagePair

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
REPOSITORY = Path(__file__).parent.parent
DATA = Path(os.environ.setdefault("HETKD_DATA", str(REPOSITORY.parent / "shared" / "data")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_folder() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}; set HETKD_DATA")
    return DATA


def tiny_vit(**kwargs) -> nn.Module:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **{**options, **kwargs})


def tiny_cnn(**kwargs) -> nn.Module:
    """A ResNet without a strided stem: grids of 16, 8, 4, 2 pixels for 32-pixel images."""
    return timm.create_model("test_resnet", **{"num_classes": 10, "pretrained": False, **kwargs})


def tiny_norm_free(**kwargs) -> nn.Module:
    """A student without batch statistics or dropout, for comparisons between numbers of processes."""
    return timm.create_model(
        "test_convnext", **{"num_classes": 10, "pretrained": False, "drop_path_rate": 0.0, **kwargs}
    )


def batch(size: int = 8, pixels: int = 32, classes: int = 10, channels: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(size, channels, pixels, pixels), torch.randint(0, classes, (size,))


TEACHER_STAGES = (Stage("t1", 24, 8, 8), Stage("t2", 40, 7, 7))
STUDENT_STAGES = (Stage("s1", 16, 14, 14), Stage("s2", 32, 7, 7))
PAIRS = [StagePair(t, s) for t, s in zip(TEACHER_STAGES, STUDENT_STAGES, strict=True)]


def features(stages: tuple[Stage, ...], size: int = 6, classes: int = 10, grad: bool = False) -> Features:
    maps = tuple(torch.randn(size, s.channels, *s.grid, requires_grad=grad) for s in stages)
    return Features(torch.randn(size, classes, requires_grad=grad), maps)
