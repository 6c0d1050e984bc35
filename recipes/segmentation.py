"""A segmenter teaches a small one: from folders of images and masks to a student, in one command.

    python recipes/segmentation.py --data camvid/ --ignore 11
    python recipes/segmentation.py --data hf:NAME --classes 19 --teacher hf:DIRECTORY
    python recipes/segmentation.py --dry-run

`--data` holds `train/` and `val/` (and `test/`), each with images and PNG masks of the same names, or `images/` and
`masks/`; a file `classes.txt` names the classes. A teacher of another task or without a head is trained first, its
decoder alone or all of it. `--dry-run` takes all steps with small models on made-up images, in a minute.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetkd import Distiller, Segmentation, list_methods, load_model
from hetkd.data.mask_folders import names_in
from hetkd.data.sets import hub_splits

Size = tuple[int, int]


def main(words: list[str] | None = None) -> dict[str, float]:
    """Train the teacher if it has no weights for these classes, then the student; return what the student is worth."""
    arguments = parse_arguments(words)
    splits, classes = open_data(arguments)
    task = Segmentation(ignore_index=arguments.ignore)
    output = Path(arguments.output)
    teacher = get_teacher(arguments, splits, classes, task, output / "teacher")
    student = load_model(arguments.student, task="segmentation", num_classes=classes, pretrained=arguments.pretrained)
    sizes = {"teacher": arguments.teacher_size, "student": arguments.size}
    distiller = Distiller(teacher, student, arguments.method, input_size=sizes, task=task)
    print(f"{distiller.plan}\n")
    run = distiller.fit(
        splits["train"],
        splits["val"],
        output_dir=output / f"{arguments.method}-{arguments.seed}",
        resume=True,
        **training(arguments),
    )
    found = distiller.evaluate(splits["test"], batch_size=arguments.batch_size)
    row = {"method": arguments.method, "student": arguments.student, "seed": arguments.seed, **found}
    with (output / "runs.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"best validation mIoU {run.best['miou']:.2f} %; test mIoU {found['miou']:.2f} %, by class:")
    for name, value in found.items():
        if name.startswith("iou/"):
            print(f"  {name.removeprefix('iou/'):<16} {value:6.2f}")
    return found


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder with train/ and val/, or hf:NAME")
    parser.add_argument("--classes", type=int, help="how many; read off classes.txt or the teacher without it")
    parser.add_argument("--ignore", type=int, default=255, help="value of pixels without a class")
    parser.add_argument("--teacher", default="timm:tf_efficientnet_lite0", help="of timm, hf: or a FILE.safetensors")
    parser.add_argument("--teacher-weights", help="weights of the teacher's encoder, from a file")
    parser.add_argument("--teacher-epochs", type=int, default=30, help="of its training, if it needs one")
    parser.add_argument("--train-encoder", action="store_true", help="train all of the teacher, not its decoder alone")
    parser.add_argument("--student", default="timm:mobilenetv3_small_050")
    parser.add_argument("--pretrained", action="store_true", help="start the student from pretrained weights")
    parser.add_argument("--method", default="sfkd", choices=list_methods("segmentation"))
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--teacher-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", metavar="DIR", help="runs/segmentation, or a new folder for a dry run")
    parser.add_argument("--dry-run", action="store_true", help="small models, made-up images")
    arguments = parser.parse_args(words)
    if arguments.dry_run:
        arguments.teacher, arguments.student = "timm:test_efficientnet", "timm:test_resnet"
        arguments.size, arguments.epochs, arguments.teacher_epochs, arguments.batch_size = (64, 96), 2, 2, 8
        arguments.output = arguments.output or tempfile.mkdtemp(prefix="segmentation-")
    elif arguments.data is None:
        parser.error("--data is needed, or --dry-run")
    arguments.output = arguments.output or "runs/segmentation"
    arguments.size = tuple(arguments.size)
    arguments.teacher_size = tuple(arguments.teacher_size or arguments.size)
    torch.manual_seed(arguments.seed)
    return arguments


def open_data(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Return training, validation and test data (validation data where there are no others), and how many classes."""
    if arguments.dry_run:
        train, val = stripes(32), stripes(16)
        return {"train": train, "val": val, "test": val}, 3
    if arguments.data.startswith("hf:"):
        train, val = hub_splits(arguments.data)
        splits: dict[str, Any] = {"train": train, "val": val, "test": val}
    else:
        folder = Path(arguments.data)
        splits = {split: str(folder / split) for split in ("train", "val", "test") if (folder / split).is_dir()}
        splits.setdefault("test", splits.get("val"))
        names = folder / "classes.txt"
        if arguments.classes is None and names.is_file():
            arguments.classes = len(names_in(names))
    if arguments.classes is None:
        raise SystemExit("how many classes are there? Say --classes, or put classes.txt beside train/.")
    return splits, arguments.classes


def get_teacher(
    arguments: argparse.Namespace, splits: Mapping[str, Any], classes: int, task: Segmentation, output: Path
) -> nn.Module:
    """Return a teacher that segments into these classes: as it is, trained before, or trained now."""
    if arguments.teacher.startswith("hf:") or arguments.teacher.endswith(".safetensors"):
        return load_model(arguments.teacher)
    done = output / "best.safetensors"
    if done.is_file():
        teacher = load_model(str(done))
        if teacher.num_classes != classes:
            raise SystemExit(f"{done} is a teacher of {teacher.num_classes} classes, not {classes}: say --output.")
        print(f"the teacher is {done}, trained before")
        return teacher
    teacher = load_model(arguments.teacher, task="segmentation", num_classes=classes, pretrained=False)
    if arguments.teacher_weights:
        encoder = load_model(arguments.teacher, pretrained=False, weights=arguments.teacher_weights)
        missing = teacher.encoder.load_state_dict(encoder.state_dict(), strict=False).missing_keys
        if missing:  # what is in the file alone was pruned
            raise SystemExit(f"{arguments.teacher_weights} lacks {', '.join(missing[:3])} of {arguments.teacher}.")
    if not (arguments.train_encoder or arguments.dry_run):
        teacher.encoder.requires_grad_(False)
    alone = Distiller(None, teacher, "ce", input_size=arguments.teacher_size, task=task)
    options = {**training(arguments), "epochs": arguments.teacher_epochs}
    print(f"training the teacher: {alone.plan.title}")
    run = alone.fit(splits["train"], splits["val"], output_dir=output, resume=True, **options)
    print(f"the teacher has a validation mIoU of {run.best['miou']:.2f} %\n")
    return load_model(str(done))


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `fit`."""
    return {
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "lr": arguments.lr,
        "warmup_epochs": 0.1 * arguments.epochs,
        "num_workers": arguments.workers,
        "seed": arguments.seed,
        "cpu": arguments.cpu,
    }


def stripes(count: int, size: Size = (64, 96)) -> tuple[Tensor, Tensor]:
    """Make images of bright stripes, whose class is their brightness, and their masks."""
    masks = torch.randint(0, 3, (count, 1, size[1] // 8)).repeat_interleave(8, 2).expand(count, *size).clone()
    noise = 0.1 * torch.rand(count, 3, *size)
    return (masks[:, None] / 3 + noise).clamp(0, 1), masks


if __name__ == "__main__":
    main()
