"""Trains the small ViT teacher of the quickstart on the whole of Fashion-MNIST, and writes its weights.

    python recipes/research/fashion_teacher.py                      # some hours on two cores
    python recipes/research/fashion_teacher.py --resume             # goes on after the last whole epoch

In three runs: the ViT alone, then a ResNet, which learns such small images better, then the ViT again
with the ResNet as its teacher. The weights go to `recipes/assets/` in half precision; what is printed last is their
accuracy on the official 10,000 test images.
"""

import argparse
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import torch
from fashion import CLASSES, TEACHER, build_teacher, read_split, whole_set_folder
from torch import nn

from hetkd import KD, Distiller, load_model
from hetkd.models import save_model


def main() -> None:
    """Train, check, and save."""
    arguments = parse_arguments()
    folder = whole_set_folder()
    images, labels = (part[: arguments.images] for part in read_split(folder, "train"))
    test = read_split(folder, "t10k")

    def fit(distiller: Distiller, run: str, epochs: int, *, batch_size: int = 64, **options: Any) -> nn.Module:
        distiller.fit(
            (images, labels),
            test,
            epochs=arguments.epochs or epochs,
            output_dir=arguments.output / run,
            resume=arguments.resume,
            batch_size=batch_size,
            clip_grad=1.0,
            augment=K.RandomHorizontalFlip(p=0.5),
            seed=arguments.seed,
            **options,
        )
        return distiller.student

    torch.manual_seed(arguments.seed)
    vit = fit(Distiller(None, build_teacher(trained=False), "ce"), "vit", 12, lr=1e-3, warmup_epochs=1)
    resnet = load_model("timm:resnet10t", pretrained=False, num_classes=len(CLASSES), in_chans=1)
    resnet = fit(Distiller(None, resnet, "ce", input_size=28), "resnet", 3, lr=2e-3, warmup_epochs=0.5)
    distiller = Distiller(resnet, vit, KD(temperature=2.0, ce_weight=0.2), input_size={"teacher": 28, "student": 28})
    vit = fit(distiller, "vit_taught", 8, batch_size=128, lr=1e-3, warmup_epochs=0.5, ema=0.999)

    save_model(vit.half(), arguments.weights)
    result = Distiller(None, vit.float(), "ce").evaluate(test)
    print(f"{arguments.weights}: top-1 {result['top1']:.2f} % on the {len(test[0]):,} official test images")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help="of each of the three runs, instead of 12, 3 and 8")
    parser.add_argument("--images", type=int, help="use only so many training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/fashion_teacher"), metavar="DIR")
    parser.add_argument("--weights", type=Path, default=TEACHER, metavar="FILE", help="where the weights go")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
