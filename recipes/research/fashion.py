"""Fashion-MNIST (MIT licence) for the recipes: the embedded subset, the whole set, and the teacher trained on it.

    python recipes/research/fashion.py            # writes the embedded subset anew, from the whole set

The whole set is read from `/usr/share/datasets/fashion-mnist` (`apt-get install dataset-fashion-mnist`),
or downloaded by torchvision.
"""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hetkd import load_model

ASSETS = Path(__file__).parents[1] / "assets"
SUBSET = ASSETS / "fashion_mnist"
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TEACHER = ASSETS / "vit_fashion_mnist.safetensors"
SUBSET_SIZES = {"train": 500, "t10k": 200}
_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the official files of ``split`` ("train" or "t10k"): images uint8 [N, 1, 28, 28], labels int64 [N]."""
    pixels = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    images = torch.from_numpy(np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy())
    return images, torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def whole_set_folder() -> Path:
    """Return the folder of the official files: the system's, or one that torchvision downloads."""
    if SYSTEM.is_dir():
        return SYSTEM
    from torchvision.datasets import FashionMNIST

    root = Path.home() / ".cache" / "hetkd"
    FashionMNIST(str(root), download=True)
    return root / "FashionMNIST" / "raw"


def build_teacher(*, trained: bool) -> nn.Module:
    """Build the small ViT of the quickstart, with the weights that `fashion_teacher.py` made if ``trained``."""
    return load_model(
        "timm:vit_tiny_patch16_224",
        pretrained=False,
        weights=TEACHER if trained else None,
        num_classes=len(CLASSES),
        in_chans=1,
        img_size=28,
        patch_size=7,
        embed_dim=128,
        depth=6,
        num_heads=4,
        class_token=False,
        global_pool="avg",
    )


def write_subset() -> None:
    """Write the first images of each class of the official splits, in the official format."""
    SUBSET.mkdir(parents=True, exist_ok=True)
    for split, per_class in SUBSET_SIZES.items():
        images, labels = read_split(whole_set_folder(), split)
        first = torch.cat([(labels == label).nonzero()[:per_class, 0] for label in range(len(CLASSES))]).sort().values
        pixels, targets = images[first].numpy(), labels[first].to(torch.uint8).numpy()
        _write(f"{split}-images-idx3-ubyte.gz", [_IMAGES_MAGIC, len(first), 28, 28], pixels)
        _write(f"{split}-labels-idx1-ubyte.gz", [_LABELS_MAGIC, len(first)], targets)
        print(f"{split}: {len(first)} images in {SUBSET}")


def _write(name: str, header: list[int], values: np.ndarray) -> None:
    content = np.array(header, dtype=">i4").tobytes() + values.tobytes()
    (SUBSET / name).write_bytes(gzip.compress(content, compresslevel=9, mtime=0))


if __name__ == "__main__":
    write_subset()
