"""Trains a teacher for small images in memory: any timm model, or a short name of `hetkd.models.small`.

    python recipes/research/small_teacher.py --dataset cifar100 --model convnext --epochs 30
    python recipes/research/small_teacher.py --dataset cifar100 --model vit_small_patch14_dinov2 --weights-from FILE
    python recipes/research/small_teacher.py --dataset cifar100 --model swin --taught-by runs/teachers/....safetensors

`recipes/train_teacher.py` fine-tunes on one's own pictures.

Stopped and started again, it goes on after its last whole epoch. The weights go to
`OUTPUT/DATASET-DIGEST-PIXELS-MODEL.safetensors` in half precision, their accuracy on the test images beside them.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import torch
from torch import nn

from hetkd import Distiller
from hetkd.data import ImageData, load_images
from hetkd.models import build_small, load_weights, save_model

EVALUATED_IMAGES = 1_000  # after each epoch, evenly spread over the test images; all of them at the end


def main() -> None:
    """Train, evaluate, save."""
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_images(arguments.dataset, arguments.pixels or 64).first(arguments.images).to(device)
    path = teacher_path(arguments.output, data, arguments.model, arguments.pixels)
    top1 = train_teacher(
        arguments.model,
        data,
        path,
        pixels=arguments.pixels,
        epochs=arguments.epochs,
        pretrained=arguments.weights_from or arguments.pretrained,
        seed=arguments.seed,
        taught_by=arguments.taught_by,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        mixed_precision=arguments.mixed_precision,
    )
    print(f"{path}: top-1 {top1:.2f} % on {len(data.test[0]):,} test images")


def teacher_path(folder: Path, data: ImageData, model: str, pixels: int | None = None) -> Path:
    """Return where the weights of a teacher are, by its data (name and digest), input size and architecture."""
    name = data.name.replace("/", "_").replace(":", "_")
    return folder / f"{name}-{data.digest[:8]}-{pixels or data.pixels}px-{model}.safetensors"


def train_teacher(
    model: str,
    data: ImageData,
    path: Path,
    *,
    pixels: int | None = None,
    epochs: int,
    pretrained: bool | Path = False,
    seed: int = 0,
    taught_by: Path | None = None,
    **options: Any,
) -> float:
    """Train a model on labels, alone or with a teacher of its own, and save it.

    Args:
        model: A short name of `hetkd.models.small`, or one of timm's.
        data: Images and labels.
        path: Where the weights go; the run's checkpoints are in a folder beside them.
        pixels: Input size; ``None``: that of the images.
        epochs: Passes over the training images.
        pretrained: Start from timm's weights, or from those in this file.
        seed: Of initial weights, data order and augmentation.
        taught_by: A teacher that this script saved, for the same images, from which the model learns by UHKD.
        **options: Of `hetkd.Distiller.fit`.

    Returns:
        Top-1 on the test images, in percent.
    """
    torch.manual_seed(seed)
    teacher, size = build_small(model, pixels or data.pixels, data.classes, data.channels, pretrained=pretrained)
    teacher = teacher.to(memory_format=torch.channels_last)  # faster convolutions on CPUs
    some = slice(None, None, math.ceil(len(data.test[1]) / EVALUATED_IMAGES))
    _make_distiller(teacher, size, data, taught_by).fit(
        data.train,
        (data.test[0][some], data.test[1][some]),
        epochs=epochs,
        output_dir=path.with_suffix(""),
        resume=True,
        **{
            "batch_size": 128,
            "lr": 1e-4 if pretrained else 1e-3,
            "warmup_epochs": min(2, epochs / 4),
            "clip_grad": 1.0,
            "label_smoothing": 0.1,
            "augment": "light" if data.channels == 3 else K.RandomHorizontalFlip(p=0.5),
            "seed": seed,
            **{name: value for name, value in options.items() if value is not None},
        },
    )
    save_model(teacher.half(), path)
    top1 = Distiller(None, teacher.float(), "ce", input_size=size).evaluate(data.test)["top1"]
    facts = {"model": model, "dataset": data.name, "pixels": size, "top1": top1}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    return top1


def _make_distiller(model: nn.Module, size: int, data: ImageData, taught_by: Path | None) -> Distiller:
    if taught_by is None:
        return Distiller(None, model, "ce", input_size=size)
    try:
        _, pixels, name = taught_by.stem.rsplit("-", 2)  # as `teacher_path` made it
        teacher, teacher_size = build_small(name, int(pixels.removesuffix("px")), data.classes, data.channels)
    except ValueError as error:
        raise ValueError(f"--taught-by {str(taught_by)!r} has no name that this script gives to teachers.") from error
    load_weights(teacher, taught_by)
    return Distiller(teacher, model, "uhkd", input_size={"teacher": teacher_size, "student": size})


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion-mnist", help="fashion-mnist, cifar100, hf:NAME or a folder")
    parser.add_argument("--model", default="convnext", help="a short name of hetkd.models.small, or one of timm's")
    parser.add_argument("--pixels", type=int, help="input size; default: that of the images, 64 for folders")
    parser.add_argument("--images", type=int, help="use only so many training images, as many of each class")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    start.add_argument("--weights-from", type=Path, metavar="FILE", help="start from the weights in this file")
    parser.add_argument(
        "--taught-by", type=Path, metavar="FILE", help="learn from this teacher too, which this script saved"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/teachers"), metavar="DIR")
    arguments = parser.parse_args(words)
    if arguments.weights_from is not None and not arguments.weights_from.is_file():
        parser.error(f"--weights-from {str(arguments.weights_from)!r} is no file")
    if arguments.taught_by is not None and not arguments.taught_by.is_file():
        parser.error(f"--taught-by {str(arguments.taught_by)!r} is no file")
    if arguments.images is not None and arguments.images < 1:
        parser.error("--images must be at least 1")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"small_teacher.py: {error}") from error
