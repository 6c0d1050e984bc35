"""Fine-tunes a teacher on your pictures: the classifier first, then all layers.

    python recipes/train_teacher.py --model timm:convnext_tiny --dataset photos/
    python recipes/train_teacher.py --model hf:facebook/dinov2-small --dataset hf:food101 --epochs 3
    python recipes/train_teacher.py --model timm:tf_efficientnet_lite0 --weights lite0.safetensors --dataset photos/

A dataset is a folder with `train/` and `val/`, one folder of images a class each, `hf:NAME` of Hugging Face's hub
(`pip install datasets`), `cifar100` or `fashion-mnist`. A model is one of timm, Hugging Face (`hf:`) or torchvision,
with or without a classifier, or a file that hetkd saved. At the end it prints the lines that load the result.
"""

import argparse
from pathlib import Path
from typing import Any

import hetkd
from hetkd.data import load_images, load_splits

IN_MEMORY = ("cifar100", "fashion-mnist")


def main() -> None:
    """Open the data, fine-tune, save."""
    arguments = vars(parse_arguments())
    train, val, more = open_data(arguments.pop("dataset"))
    hetkd.finetune(arguments.pop("model"), train, val, **more, **arguments)


def open_data(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return training and validation data, and options that fit them."""
    if name in IN_MEMORY:
        data = load_images(name)
        return data.train, data.test, {"augment": "light"}
    splits = load_splits(name)
    return splits.train, splits.val, {}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``words``; an option that is not given is `hetkd.finetune`'s default."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="timm:, hf: or torchvision:, or a file")
    parser.add_argument("--dataset", required=True, metavar="DATA", help="a folder, hf:NAME, cifar100, fashion-mnist")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="instead of the library's own weights")
    parser.add_argument("--pixels", type=int, dest="input_size", help="default: the model's, at most 224")
    parser.add_argument("--epochs", type=int, help="default: at least 5, as many as make 300 steps; 0: the head alone")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="default: by the number of steps")
    parser.add_argument("--layer-decay", type=float)
    parser.add_argument("--patience", type=int, help="evaluations without a better one; default: 3")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument("--unreadable", choices=["error", "skip"])
    parser.add_argument("--workers", type=int, dest="num_workers")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT")
    parser.add_argument("--output", type=Path, dest="output_dir", metavar="DIR", help="default: runs/teachers")
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"train_teacher.py: {error}") from error
