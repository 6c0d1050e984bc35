"""Trains the small ViT teacher of the quickstart on the whole of Fashion-MNIST, and writes its weights.

    python recipes/train_teacher.py                      # about 45 minutes on two cores
    python recipes/train_teacher.py --resume             # goes on after the last whole epoch

The weights go to `recipes/assets/` in half precision; what is printed last is their accuracy on the
official 10,000 test images.
"""

import argparse
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import torch
from fashion import TEACHER, build_teacher, read_split, whole_set_folder
from torch import nn

from hetkd import Distiller
from hetkd.models import save_model

# Two cosine cycles. Shifted images slow the start and help the end, so only the second has them.
FLIP = K.RandomHorizontalFlip(p=0.5)
FLIP_AND_SHIFT = nn.Sequential(FLIP, K.RandomCrop((28, 28), padding=2))
CYCLES: tuple[dict[str, Any], ...] = (
    {"epochs": 12, "lr": 1e-3, "augment": FLIP},
    {"epochs": 8, "lr": 7e-4, "augment": FLIP_AND_SHIFT},
)


def main() -> None:
    """Trains by cross-entropy (the method without a teacher), checks, and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help="of each cycle, instead of 12 and 8")
    parser.add_argument("--images", type=int, help="use only so many training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/fashion_teacher"), metavar="DIR")
    parser.add_argument("--weights", type=Path, default=TEACHER, metavar="FILE", help="where the weights go")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    folder = whole_set_folder()
    images, labels = read_split(folder, "train")
    test = read_split(folder, "t10k")
    torch.manual_seed(arguments.seed)
    distiller = Distiller(None, build_teacher(trained=False), method="ce")
    for number, cycle in enumerate(CYCLES, start=1):
        distiller.fit(
            (images[: arguments.images], labels[: arguments.images]),
            epochs=arguments.epochs or cycle["epochs"],
            output_dir=arguments.output / f"cycle{number}",
            resume=arguments.resume,
            batch_size=64,
            optimizer="adamw",
            lr=cycle["lr"],
            weight_decay=0.05,
            warmup_epochs=1,
            clip_grad=1.0,
            augment=cycle["augment"],
            seed=arguments.seed,
        )
    save_model(distiller.student.half(), arguments.weights)
    distiller.student.float()
    result = distiller.evaluate(test)
    print(f"{arguments.weights}: top-1 {result['top1']:.2f} % on the {len(test[0]):,} official test images")


if __name__ == "__main__":
    main()
