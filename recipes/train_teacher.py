"""Trains the small ViT teacher of the quickstart on the whole of Fashion-MNIST, and writes its weights.

    python recipes/train_teacher.py                      # about 40 minutes on two cores
    python recipes/train_teacher.py --resume             # goes on after the last whole epoch

The weights go to `recipes/assets/` in half precision; what is printed last is their accuracy on the
official 10,000 test images.
"""

import argparse
from pathlib import Path

import kornia.augmentation as K
import torch
from fashion import TEACHER, build_teacher, read_split, whole_set_folder

from hetkd import Distiller
from hetkd.models import save_model


def main() -> None:
    """Trains by cross-entropy (the method without a teacher), checks, and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
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
    distiller.fit(
        (images[: arguments.images], labels[: arguments.images]),
        epochs=arguments.epochs,
        output_dir=arguments.output,
        resume=arguments.resume,
        batch_size=64,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.05,
        warmup_epochs=1,
        clip_grad=1.0,
        augment=K.RandomHorizontalFlip(p=0.5),
        seed=arguments.seed,
    )
    save_model(distiller.student.half(), arguments.weights)
    distiller.student.float()
    result = distiller.evaluate(test)
    print(f"{arguments.weights}: top-1 {result['top1']:.2f} % on the {len(test[0]):,} official test images")


if __name__ == "__main__":
    main()
